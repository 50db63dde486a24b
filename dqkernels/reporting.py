"""What a model became (`report`) and what this machine offers (`info`): a table for people, JSON for programs."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dqkernels import backends, decode
from dqkernels.config import FORMAT_VERSION, VERSION
from dqkernels.environment import ENVIRONMENT
from dqkernels.kernels import measured, native
from dqkernels.models import attention, blocks
from dqkernels.nn import PackedModule, QEmbedding, QLinear

_PACKAGES = ("dqkernels", "torch", "transformers", "triton", "safetensors", "numpy")
_WIDTH = 80
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_DIGIT = re.compile(r"\.\d")
_FLOAT = "float"
#: Auto classes and their tables in transformers. A class may stand in several: the first is the one users know.
_AUTO_TABLES = {
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE",
    "AutoModelForNextSentencePrediction": "MODEL_FOR_NEXT_SENTENCE_PREDICTION",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "AutoModel": "MODEL",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING",
}


@dataclass(frozen=True)
class Row:
    """One module, or a group of alike modules with a common name like `layers.0-5.fc1`.

    Attributes:
        name: full name; `0-5` or `0,2` stands for the numbers of a group, `{q,k}_proj` for its last parts.
        count: modules in the group.
        kind: `linear`, `embedding`, or `float` for one that was left as it is.
        bits: of the codes, or of the floats.
        quantizer: `absmax`, `ternary`, ..., or `none`.
        shape: [out_features, in_features], or [num_embeddings, embedding_dim].
        packed_bytes: of the group: codes, scales and multipliers (of a float one: its weight). 0 where
            another module holds the table.
        float32_bytes: of the same weights in fp32, 0 where another module holds them (a float head whose table
            is packed as the embedding is a copy that the float model did not have).
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
        float32_bytes: of the float model at 4 bytes a parameter, tied ones once, however their readers are packed.
        attention: how its products are computed: int8, in which modules, by which kernel; or why in float.
        blocks: which layers run in fused steps, and what keeps some apart; or why none does. Empty in a float model.
        decode: how `generate` decodes, and why; empty where `decode.attach` was not called.
        cache_bytes, workspace_bytes: what is kept for its next calls: keys and values; indices, captured steps.
        instructions: of the CPU, that native kernels use.
    """

    model: str
    rows: tuple[Row, ...]
    codes_bytes: int
    scales_bytes: int
    other_bytes: int
    float32_bytes: int
    attention: str = _FLOAT
    blocks: str = ""
    decode: str = ""
    cache_bytes: int = 0
    workspace_bytes: int = 0
    instructions: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors that a file of the model holds, as they lie in memory now."""
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
        if all(row.kind == "float" for row in self.rows):
            size = f"{self.model} ({_megabytes(self.total_bytes)}): nothing is packed."
            text = _wrap(f"{size} dqkernels.quantize_(model, dqkernels.DQConfig()) packs it in place.")
            return text if self.attention == _FLOAT else f"{text}\n{_wrap(f'Attention: {self.attention}')}"
        table = _table(("module", None), ("weights", None), ("shape", "right"), ("KB", "right"))
        for row in self.rows:
            weights = f"{row.bits} float" if row.kind == "float" else f"{row.bits} {row.quantizer}"
            size = f"{row.packed_bytes / 1000:,.1f}" if row.packed_bytes else "-"
            table.add_row(_broken(row.name), weights, "x".join(map(str, row.shape)), size)
        lines = [_render(table)]
        for kind in ("linear", "embedding"):
            kernels = _names_by((r.kernel, r.name) for r in self.rows if r.kind == kind)
            for kernel, names in kernels.items():
                who = f"every packed {kind}" if len(kernels) == 1 else _list(names)
                lines.append(_wrap(f"Runs on {kernel}: {who}"))
        lines += [_wrap(f"Instructions: {self.instructions}")] if self.instructions else []
        tied = _names_by((r.note, r.name) for r in self.rows if r.kind != "float" and r.note)
        lines += [_wrap(f"{note[0].upper()}{note[1:]}: {_list(names)}") for note, names in tied.items()]
        left = _names_by((r.note, r.name) for r in self.rows if r.kind == "float")
        lines += [_wrap(f"Left in float ({note}): {_list(names)}") for note, names in left.items()]
        lines.append(_wrap(f"Attention: {self.attention}"))
        lines += [_wrap(f"Blocks: {self.blocks}")] if self.blocks else []
        if self.decode:
            held = f"caches {_megabytes(self.cache_bytes)}, workspace {_megabytes(self.workspace_bytes)}"
            lines += [_wrap(f"Decoding: {self.decode}"), _wrap(f"Kept for the next calls of generate: {held}")]
        parts = (("codes", self.codes_bytes), ("scales", self.scales_bytes), ("other", self.other_bytes))
        sizes = ", ".join(f"{name} {_megabytes(value)}" for name, value in parts)
        total = f"{self.model}: {_megabytes(self.total_bytes)} ({sizes}); in fp32 {_megabytes(self.float32_bytes)}"
        return "\n".join([*lines, _wrap(f"{total}, {self.ratio:.2f} times as much")])


@dataclass(frozen=True)
class Info:
    """What `info()` found. `str()` is a table of 80 columns, `to_dict()` plain JSON.

    Attributes:
        versions: of Python and the packages that matter; `absent` where not installed.
        devices: device types with a description; `cpu` always, `cuda` where torch sees one.
        backends: `{device: {backend: [usable, reason]}}`.
        core: what the build of the compiled core wrote down, with `present` and `reason`.
        tiles: how the Triton GEMM takes its tiles here: measured on this GPU, or by rule, and why.
        plans: the same of the skinny CUDA GEMM's plans.
        environment: variables that are honoured and set.
        format_version: of the files this release reads and writes.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    backends: dict[str, dict[str, tuple[bool, str]]]
    core: dict[str, Any]
    tiles: str
    plans: str
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
                table.add_row(f"{name} on {device}", f"{'yes' if usable else 'no'}: {reason}")
        table.add_row("triton tiles", self.tiles)
        table.add_row("cuda plans", self.plans)
        table.add_row("compiled core", self._core())
        for name, value in self.environment.items():
            table.add_row(name, value)
        table.add_row("file format", f"version {self.format_version}")
        return _render(table)

    def _core(self) -> str:
        if not self.core["present"]:
            return f"no: {self.core['reason']}"
        archs = " ".join(map(str, self.core.get("archs") or ()))
        cuda = f"CUDA for {archs or 'no card'}" if self.core.get("cuda") else native.why_no_cuda(self.core)
        return f"yes: CPU {self.core.get('cpu_isa', 'kernels')}, {cuda}"


def report(model: nn.Module) -> Report:
    """What each linear and embedding of a converted model is now, what it weighs, and which kernel runs it.

    Args:
        model: a model after `quantize_`, or loaded packed. Only metadata is read: no kernel runs.
    """
    rows, seen = [], {}
    skipped, copies = dict(getattr(model, "dqkernels_skipped", {})), float_copies(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            owner = seen.setdefault(id(module.qweight), name)
            rows.append(_packed_row(name, module, owner))
        elif name in skipped:
            weight = module.weight
            owner = seen.setdefault(id(weight), name)
            size = weight.numel() if owner == name else 0
            sizes = size * weight.element_size(), 0 if name in copies else size * 4
            facts = "float", weight.element_size() * 8, "none", tuple(weight.shape)
            rows.append(Row(name, 1, *facts, *sizes, "torch", skipped[name]))
    codes, scales, other = _stored_bytes(model)
    sizes = codes, scales, other, teacher_bytes(model)
    fused = [blocks.describe(model), blocks.describe_encoder(model)] if any(row.kind != "float" for row in rows) else []
    how = _attention(model), "; ".join(filter(None, fused)), decode.describe(model)
    native_ = any(row.kernel.startswith("cpu") for row in rows)
    instructions = backends.available("cpu", "cpu")[1].removeprefix("compiled core, ") if native_ else ""
    return Report(type(model).__name__, tuple(_grouped(rows)), *sizes, *how, *decode.memory(model), instructions)


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
    usable = {device: {name: backends.available(name, device) for name in backends.ORDER[device]} for device in devices}
    # No selection takes it on a CPU by itself: an interpreter is for tests. Asked for by name, it runs.
    here, reason = backends.available("triton", "cpu")
    usable["cpu"]["triton"] = here, f"{reason}, only where asked for by name" if here else reason
    if "cuda" not in devices:
        usable["cuda"] = {name: backends.available(name, "cuda") for name in ("cuda", "triton")}
    core = native.native()
    found = {"present": core is not None, "reason": native.why_absent(), **native.build_info()}
    if core is not None and hasattr(core, "cpu_isa"):
        found["cpu_isa"] = core.cpu_isa()
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    place = torch.device("cuda" if "cuda" in devices else "cpu")
    tiles, plans = (measured.in_use(place, kernels) for kernels in ("triton", "cuda"))
    return Info(versions, devices, usable, found, tiles, plans, environment)


def auto_class(architecture: str) -> str:
    """The class of transformers that opens a model of this class with its head: an Auto class where one does.

    `AutoModelForMaskedLM` for `BertForMaskedLM`, `AutoModel` for `BertModel`, the name itself for a class that no
    Auto class knows. Asks transformers' own tables; where it is absent, the name itself.
    """
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return architecture
    for name, table in _AUTO_TABLES.items():
        known = getattr(modeling_auto, f"{table}_MAPPING_NAMES", {}).values()
        if any(architecture in (entry if isinstance(entry, tuple | list) else (entry,)) for entry in known):
            return name
    return architecture


def rows_columns(module: PackedModule) -> tuple[int, int]:
    """[out_features, in_features] or [num_embeddings, embedding_dim] of a packed module."""
    if isinstance(module, QEmbedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def teacher_bytes(model: nn.Module) -> int:
    """Bytes of the float model's parameters at 4 bytes each, tied ones once; packed ones count unpacked."""
    seen, count = set(), 0
    copies = float_copies(model)
    for full_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or name == "group_mult":
                continue
            seen.add(id(parameter))
            if full_name in copies and name in ("weight", "qweight"):
                continue
            packed = isinstance(module, PackedModule) and name == "qweight"
            rows, columns = rows_columns(module) if packed else (parameter.numel(), 1)
            count += rows * columns
    return 4 * count


def float_copies(model: nn.Module) -> dict[str, str]:
    """Float modules whose weight another module holds packed, with that module: `{"lm_head": "model.shared"}`.

    `quantize_` writes down what it saw in memory. A model that transformers loaded has only what its classes
    tie by name, which counts where the config says that word embeddings are tied.
    """
    noted = getattr(model, "dqkernels_float_copies", None)
    if noted is not None:
        return noted
    modules = dict(model.named_modules(remove_duplicate=False))
    floats = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding)]
    found = {}
    for prefix, inner in modules.items():
        ties = getattr(type(inner), "_tied_weights_keys", None)
        if not isinstance(ties, dict) or not getattr(getattr(inner, "config", None), "tie_word_embeddings", False):
            continue
        start = f"{prefix}." if prefix else ""
        for target, source in ties.items():
            for name, other in ((target, source), (source, target)):
                name, other = (f"{start}{key.removesuffix('.weight')}" for key in (name, other))
                if name in floats and isinstance(modules.get(other), PackedModule):
                    found[name] = other
    return found


def _attention(model: nn.Module) -> str:
    """How attention is computed now, whatever the config asked for."""
    found = attention.describe(model)
    if found:
        return "; ".join(f"{text}: {', '.join(_spanned(names))}" for text, names in found)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    asked = getattr(config, "attention", None)
    if asked is None:
        return _FLOAT
    if asked == "int8":
        return f"{_FLOAT} (int8 attention was taken off)"
    return f"{_FLOAT} ({attention.why_float(model, config) or f'attention={asked!r}'})"


def _stored_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of codes, scales and the rest of the state dict, each storage once."""
    parts, seen = {"codes": 0, "scales": 0, "other": 0}, set()
    packed = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, PackedModule)}
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
    """Rows that differ only in the numbers of their names, then in the last part, become one."""
    numbered: dict[tuple, list[Row]] = {}
    for row in rows:
        numbered.setdefault((_NUMBER.sub("#", row.name), _facts(row)), []).append(row)
    merged = [_merged(rows, *_spanned([row.name for row in rows])) for rows in numbered.values()]
    siblings: dict[Any, list[Row]] = {}
    for row in merged:
        # Only inside a numbered block: elsewhere alike modules (three embeddings) are worth a line each.
        parent = row.name.rpartition(".")[0]
        key = (parent, row.count, _facts(row)) if _DIGIT.search(parent) else row.name
        siblings.setdefault(key, []).append(row)
    return [_merged(members, _braced([row.name for row in members])) for members in siblings.values()]


def _facts(row: Row) -> tuple:
    return (row.kind, row.bits, row.quantizer, row.shape, row.packed_bytes, row.kernel, row.note)


def _merged(rows: list[Row], name: str) -> Row:
    return replace(
        rows[0],
        name=name,
        count=sum(row.count for row in rows),
        packed_bytes=sum(row.packed_bytes for row in rows),
        float32_bytes=sum(row.float32_bytes for row in rows),
    )


def _braced(names: list[str]) -> str:
    """`a.{q,k}_proj` for `a.q_proj` and `a.k_proj`."""
    if len(names) == 1:
        return names[0]
    parent = names[0].rpartition(".")[0]
    leaves = [name.rpartition(".")[2] for name in names]
    suffix = os.path.commonprefix([leaf[::-1] for leaf in leaves])[::-1]
    suffix = suffix if suffix.startswith("_") else ""
    return f"{parent}.{{{','.join(leaf.removesuffix(suffix) for leaf in leaves)}}}{suffix}"


def _spanned(names: list[str]) -> list[str]:
    """Names that differ only in their numbers as one: `layers.0-2.fc1`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("#", name), []).append(name)
    spanned = []
    for members in groups.values():
        columns = zip(*map(_NUMBER.findall, members), strict=True)
        spans = iter([_span(sorted({int(number) for number in column})) for column in columns])
        spanned.append(_NUMBER.sub(lambda _, spans=spans: next(spans), members[0]))
    return spanned


def _span(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


# ------------------------------------------------------------------------------------------------------ words


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


def _broken(name: str, width: int = 44) -> str:
    """A long name in two lines, broken at its last dot."""
    parent, dot, leaf = name.rpartition(".")
    return name if len(name) <= width or not dot else f"{parent}.\n  {leaf}"


def _names_by(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, name in pairs:
        found.setdefault(key, []).append(name)
    return found


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more rows" if len(names) > 4 else "")


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.2f} MB"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "dqkernels":
            return f"{VERSION} (not installed)"
        return "absent"
