"""What a model became (`report`) and what this machine offers (`info`): facts, a table for people, JSON for programs."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from dqkernels import backends
from dqkernels.config import FORMAT_VERSION
from dqkernels.kernels import native
from dqkernels.nn import PackedModule, QEmbedding, QLinear

#: Variables the package honours, with what they may hold.
ENVIRONMENT = {
    "DQKERNELS_BACKEND": "auto|eager|triton|cuda|cpu",
    "DQKERNELS_CPU": "scalar|avx2|avx_vnni|avx512_vnni|amx_int8|dotprod",
    "DQKERNELS_BUILD": "auto|cpu|cuda|none",
    "DQKERNELS_CUDA_ARCHS": "for example 80;90a",
    "TRITON_INTERPRET": "1 runs Triton kernels on CPU tensors",
}
_PACKAGES = ("dqkernels", "torch", "transformers", "triton", "safetensors", "numpy")
_WIDTH = 80
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Row:
    """One module, or a group of alike modules with a common name like `layers.0-5.fc1`.

    Attributes:
        name: full name; `0-5` or `0,2` stands for the numbers of a group.
        count: modules in the group.
        kind: `linear`, `embedding`, or `float` for one that was left as it is.
        bits: of the codes, or of the floats.
        quantizer: `absmax`, `ternary`, ..., or `none`.
        shape: [out_features, in_features], or [num_embeddings, embedding_dim].
        packed_bytes: of the group: codes, scales and multipliers (of a float one: its weight). 0 where another
            module holds the table.
        float32_bytes: of the same weights in fp32, 0 where another module holds them.
        kernel: which backend runs it here, and why.
        note: `tied to NAME`, or why it was skipped.
    """

    name: str
    count: int
    kind: str
    bits: int
    quantizer: str
    shape: tuple[int, ...]
    packed_bytes: int
    float32_bytes: int
    kernel: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `report(model)` found. `str()` is a table of 80 columns, `to_dict()` plain JSON.

    Attributes:
        model: class name.
        rows: packed modules and skipped ones, alike ones grouped.
        codes_bytes: packed codes and group multipliers, each storage once.
        scales_bytes: weight and activation scales.
        other_bytes: every other parameter and saved buffer (biases, norms, positions, float layers).
        float32_bytes: all parameters of the float model at 4 bytes, tied ones once.
    """

    model: str
    rows: tuple[Row, ...]
    codes_bytes: int
    scales_bytes: int
    other_bytes: int
    float32_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the model's tensors now."""
        return self.codes_bytes + self.scales_bytes + self.other_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller than the same model in fp32."""
        return self.float32_bytes / max(self.total_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, units in the key names."""
        totals = {"total_bytes": self.total_bytes, "ratio_to_float32": round(self.ratio, 3)}
        body = {**asdict(self), **totals}
        body["rows"] = [{**asdict(row), "shape": list(row.shape)} for row in self.rows]
        return body

    def __str__(self) -> str:
        table = _table(
            ("module", None), ("bits", "right"), ("quantizer", None), ("shape", "right"), ("KB", "right")
        )
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            size = f"{row.packed_bytes / 1000:,.1f}" if row.packed_bytes else "-"
            table.add_row(_short(row.name), str(row.bits), row.quantizer, "x".join(map(str, row.shape)), size)
            text = f"runs on {row.kernel}" if row.kind != "float" else f"left in float: {row.note}"
            notes.setdefault(text, []).append(row.name)
            if row.kind != "float" and row.note:
                notes.setdefault(row.note, []).append(row.name)
        lines = [_render(table)]
        for text, names in notes.items():
            lines.append(_wrap(f"{_list(names, len(self.rows))}: {text}"))
        parts = (("codes", self.codes_bytes), ("scales", self.scales_bytes), ("other", self.other_bytes))
        sizes = ", ".join(f"{name} {_megabytes(value)}" for name, value in parts)
        lines.append(
            _wrap(
                f"{self.model}: {_megabytes(self.total_bytes)} ({sizes}), "
                f"{self.ratio:.2f}x smaller than fp32 ({_megabytes(self.float32_bytes)})"
            )
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Info:
    """What `info()` found. `str()` is a table of 80 columns, `to_dict()` plain JSON.

    Attributes:
        versions: of Python and the packages that matter; `absent` where not installed.
        devices: device types with a description; `cpu` always, `cuda` where torch sees one.
        backends: `{device: {backend: [usable, reason]}}`.
        core: what the build of the compiled core wrote down, with `present` and `reason`.
        environment: variables that are honoured and set.
        format_version: of the files this release reads and writes.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    backends: dict[str, dict[str, tuple[bool, str]]]
    core: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        body = asdict(self)
        body["backends"] = {
            device: {name: {"usable": usable, "reason": reason} for name, (usable, reason) in found.items()}
            for device, found in self.backends.items()
        }
        return body

    def __str__(self) -> str:
        table = _table(("what", None), ("found", None))
        for name, version in self.versions.items():
            table.add_row(name, version)
        for name, description in self.devices.items():
            table.add_row(f"device {name}", description)
        for device, found in self.backends.items():
            for name, (usable, reason) in found.items():
                table.add_row(f"{name} for {device}", f"{'yes' if usable else 'no'}: {reason}")
        core = self.core.get("reason") or ", ".join(
            f"{key} {value}"
            for key, value in self.core.items()
            if key in ("mode", "cpu_isa", "cuda", "archs")
        )
        table.add_row(
            "compiled core", f"{'yes' if self.core['present'] else 'no'}: {core}" if core else "yes"
        )
        for name, value in self.environment.items():
            table.add_row(name, value)
        table.add_row("file format", f"version {self.format_version}")
        return _render(table)


def report(model: nn.Module) -> Report:
    """What each linear and embedding of a converted model is now, what it weighs, and which kernel runs it.

    Args:
        model: a model after `quantize_`, or loaded packed. Only metadata is read: no kernel runs.
    """
    rows, seen = [], {}
    skipped = dict(getattr(model, "dqkernels_skipped", {}))
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            owner = seen.setdefault(id(module.qweight), name)
            rows.append(_packed_row(name, module, owner))
        elif name in skipped:
            weight = module.weight
            owner = seen.setdefault(id(weight), name)
            size = weight.numel() if owner == name else 0
            rows.append(
                Row(
                    name,
                    1,
                    "float",
                    weight.element_size() * 8,
                    "none",
                    tuple(weight.shape),
                    size * weight.element_size(),
                    size * 4,
                    "torch",
                    skipped[name],
                )
            )
    codes, scales, other = _stored_bytes(model)
    return Report(type(model).__name__, tuple(_grouped(rows)), codes, scales, other, teacher_bytes(model))


def info() -> Info:
    """Versions, devices, usable backends with reasons, the compiled core, and the variables that are set.

    Asks torch whether there is a CUDA device; initialises one only if there is, to read its name.
    """
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        devices["cuda"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    usable = {
        device: {name: backends.available(name, device) for name in backends.ORDER[device]}
        for device in devices
    }
    if "cuda" not in devices:
        usable["cuda"] = {name: backends.available(name, "cuda") for name in ("cuda", "triton")}
    core = native.native()
    found = {"present": core is not None, "reason": native.why_absent(), **native.build_info()}
    if core is not None and hasattr(core, "cpu_isa"):
        found["cpu_isa"] = core.cpu_isa()
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return Info(versions, devices, usable, found, environment)


def rows_columns(module: PackedModule) -> tuple[int, int]:
    """[out_features, in_features] or [num_embeddings, embedding_dim] of a packed module."""
    if isinstance(module, QEmbedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def teacher_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of the float model at 4 bytes each, tied ones once; packed ones count unpacked."""
    seen, count = set(), 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or name == "group_mult":
                continue
            seen.add(id(parameter))
            packed = isinstance(module, PackedModule) and name == "qweight"
            rows, columns = rows_columns(module) if packed else (parameter.numel(), 1)
            count += rows * columns
    return 4 * count


def _stored_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of codes, scales and the rest of the state dict, each storage once."""
    parts, seen = {"codes": 0, "scales": 0, "other": 0}, set()
    packed = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or not isinstance(tensor, torch.Tensor):
            continue
        seen.add(id(tensor))
        module, _, kind = name.rpartition(".")
        part = "other"
        if module in packed and kind in ("qweight", "group_mult"):
            part = "codes"
        elif module in packed and kind in ("weight_scale", "act_scale"):
            part = "scales"
        parts[part] += tensor.numel() * tensor.element_size()
    return parts["codes"], parts["scales"], parts["other"]


def _packed_row(name: str, module: PackedModule, owner: str) -> Row:
    rows, columns = rows_columns(module)
    layer = module.layer
    owns = owner == name
    grouped = f" g{layer.group_size}" if layer.group_size != -1 else ""
    return Row(
        name,
        1,
        "linear" if isinstance(module, QLinear) else "embedding",
        layer.bits,
        layer.quantizer + grouped,
        (rows, columns),
        module.packed_bytes() if owns else 0,
        4 * rows * columns if owns else 0,
        module.kernel(),
        "" if owns else f"tied to {owner}",
    )


def _grouped(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ only in the numbers of their names become one; order of first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        shape = (row.kind, row.bits, row.quantizer, row.shape, row.packed_bytes, row.kernel, row.note)
        groups.setdefault((_NUMBER.sub("#", row.name), shape), []).append(row)
    result = []
    for members in groups.values():
        first = members[0]
        if len(members) == 1:
            result.append(first)
            continue
        numbers = zip(*(_NUMBER.findall(row.name) for row in members), strict=True)
        spans = iter([_span(sorted({int(n) for n in column})) for column in numbers])
        result.append(
            Row(
                _NUMBER.sub(lambda _, spans=spans: next(spans), first.name),
                len(members),
                first.kind,
                first.bits,
                first.quantizer,
                first.shape,
                sum(row.packed_bytes for row in members),
                sum(row.float32_bytes for row in members),
                first.kernel,
                first.note,
            )
        )
    return result


def _span(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


# ------------------------------------------------------------------------------------------------------- words


def _table(*columns: tuple[str, str | None]):
    # rich takes 60 ms to import and is needed by nobody who does not print.
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify or "left", overflow="fold", no_wrap=justify is not None)
    return table


def _render(table) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, legacy_windows=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def _wrap(text: str) -> str:
    import textwrap

    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _short(name: str) -> str:
    return name.replace("self_attn", "self_attn").removeprefix("model.") if len(name) > 30 else name


def _list(names: list[str], total: int) -> str:
    if len(names) == total and total > 1:
        return "all"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more rows" if len(names) > 3 else "")


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.2f} MB"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "dqkernels":
            import dqkernels

            return f"{dqkernels.__version__} (not installed)"
        return "absent"
