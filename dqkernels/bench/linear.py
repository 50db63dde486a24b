"""`bench linear`: one layer, every bit width, every path, against torch's own linear. Proven before timed."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Iterable, Sequence

import torch

from dqkernels import backends as registry
from dqkernels.bench import floors, protocol, record
from dqkernels.bench.candidates import Layer, float64_layer, short
from dqkernels.checks import FLOAT_DTYPES

#: (out_features, in_features): BART-base QKV, BART-large square and fc1, and one large enough for bandwidth.
GPU_SIZES = ((2304, 768), (1024, 1024), (4096, 1024), (4096, 4096))
GPU_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
CPU_SIZES = ((768, 768), (3072, 768))
CPU_TOKENS = (1, 16, 128)
_MAX_ROUNDS = 200


def run(
    shapes: Iterable[Sequence[int]] | None = None,
    bits: Sequence[int] = (8, 4, 2),
    dtype: str | torch.dtype | Sequence | None = None,
    device: str | torch.device | None = None,
    backends: Sequence[str] | None = None,
    seconds: float = 20,
    out: str | None = None,
    probe: bool = True,
) -> dict:
    """Times the layer and gives the record.

    Args:
        shapes: (tokens, out_features, in_features) triples; default BART's own and one of 4096 x 4096.
        bits: weight widths of ours.
        dtype: of activations and of the float layer: one, or several; default bfloat16 on a GPU, float32 and
            bfloat16 on a CPU.
        device: default the GPU if there is one.
        backends: names to time; default the available ones, the slow `eager` only where nothing else runs.
        seconds: for all of it, building and proving included; groups that it does not reach say so.
        out: file for the record, or None.
        probe: on a CPU, measure the copy bandwidth for memory floors (0.3 s).
    """
    device = protocol.pick_device(device)
    shapes = [tuple(int(v) for v in shape) for shape in (shapes or _default_shapes(device))]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes must be (tokens, out_features, in_features) triples above 0, got {shapes}")
    dtypes = _dtypes(dtype, device)
    names, absent = _backends(backends, device)
    if device.type == "cuda":
        peak = floors.device_of(torch.cuda.get_device_name(device))
    else:
        peak = floors.probe_cpu() if probe else None
    before = protocol.state(device)
    # Shapes of one layer together: it is packed, and its copies for the cold rows are made, once.
    order = {size: i for i, size in reversed(list(enumerate(shape[1:] for shape in shapes)))}
    groups = [(s, kind) for s in sorted(shapes, key=lambda s: order[s[1:]]) for kind in dtypes]
    groups.sort(key=lambda group: (order[group[0][1:]], dtypes.index(group[1])))
    rows: list[dict] = []
    layer, deadline = None, time.perf_counter() + seconds
    with torch.inference_mode(), _on(device):
        for index, (shape, kind) in enumerate(groups):
            left = deadline - time.perf_counter()
            if left <= 0:
                rows.append({**_identity(shape, kind), "status": "not reached", "reason": f"{seconds:g} s were over"})
                continue
            if layer is None or layer.key != (shape[1:], kind):
                layer = Layer(shape[1], shape[2], kind, device, bits, names)
                absent.update(layer.absent)
            rows += measure(shape[0], layer, left / (len(groups) - index), peak)
    rows += [{"candidate": n, "status": "not compared", "reason": record.scrub(r)} for n, r in absent.items()]
    described = protocol.describe(device, seconds, _MAX_ROUNDS, before)
    described["floor"] = _floor_words(peak)
    described["proof"] = "ours bit-equal to the reference; float and int8 peers within a relative error of float64"
    result = record.new(
        "linear",
        settings={
            "shapes": [list(shape) for shape in shapes],
            "bits": list(bits),
            "dtypes": [short(kind) for kind in dtypes],
            "device": device.type,
            "backends": "the fast ones available" if names is None else names,
            "act_granularity": "per_token",
            "weight_granularity": "per_channel",
            "bias": True,
            "quantizing_the_input": "inside the timed region",
        },
        protocol=described,
        rows=rows,
    )
    if out is not None:
        record.write(result, out)
    return result


def measure(tokens: int, layer: Layer, seconds: float, peak: floors.Device | None) -> list[dict]:
    """All rows of one layer at one M: proven, then timed cold and warm, in `seconds` with the building."""
    start = time.perf_counter()
    (n, k), kind = layer.key
    device = layer.linear.weight.device
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(device, kind)
    exact_output = float64_layer(layer.linear, x)
    rows: dict[tuple[str, str], dict] = {}
    samplers: dict[str, dict[str, protocol.Sampler]] = {"cold": {}, "warm": {}}
    for one in layer.found:
        y, reason = None, None
        try:
            y = one.module(x)
            reason = one.prove(x, y)
        except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its refusal, not ours
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        error = None if y is None or y.shape != exact_output.shape else _relative(y, exact_output)
        floor = floors.gemm_floor(peak, tokens, n, k, one.bits)
        for cache in samplers:
            rows[one.name, cache] = {
                **_identity((tokens, n, k), kind),
                "candidate": one.name,
                "bits": one.bits,
                "backend": one.backend,
                "kernel": one.kernel,
                "cache": cache,
                "weights_bytes": one.weight_bytes,
                "float_error": error,
                "floor_us": None if floor is None else float(f"{floor.us:.4g}"),
                "floor_bound": None if floor is None else floor.bound,
                "status": "timed" if reason is None else "refused",
                "reason": None if reason is None else record.scrub(reason),
            }
            if reason is None:
                modules = layer.copies(one) if cache == "cold" else [one.module]
                samplers[cache][one.name] = protocol.sampler(
                    [functools.partial(module, x) for module in modules], device, weight_bytes=one.weight_bytes
                )
    for caches_left, (cache, chosen) in zip((2, 1), samplers.items(), strict=True):
        # What building took is gone; a third of the share is for timing all the same, or there would be no
        # figure.
        left = max(start + seconds - time.perf_counter(), seconds / 3) / caches_left
        outcome = protocol.interleave(
            {name: s.sample for name, s in chosen.items()}, seconds=left, max_rounds=_MAX_ROUNDS
        )
        base = outcome.stats.get(layer.found[0].name)
        for name, stats in outcome.stats.items():
            row = rows[name, cache]
            row.update(stats.row("us"))
            row["timer"], row["rotated_bytes"] = chosen[name].timer, chosen[name].rotated_bytes
            row["speedup_ratio"] = None if base is None else float(f"{base.median / stats.median:.4g}")
            if row["floor_us"] is not None:
                row["floor_fraction"] = float(f"{row['floor_us'] / row['median_us']:.3g}")
        for name, reason in outcome.skipped.items():
            rows[name, cache].update(status="too slow", reason=reason)
    return list(rows.values())


def _identity(shape, kind: torch.dtype) -> dict:
    tokens, n, k = shape
    return {"tokens": tokens, "out_features": n, "in_features": k, "dtype": short(kind)}


def _relative(y: torch.Tensor, wanted: torch.Tensor) -> float | None:
    error = float((y.double() - wanted).norm() / wanted.norm())
    return float(f"{error:.3g}") if error == error and error != float("inf") else None


def _default_shapes(device: torch.device) -> list[tuple[int, int, int]]:
    tokens, sizes = (GPU_TOKENS, GPU_SIZES) if device.type == "cuda" else (CPU_TOKENS, CPU_SIZES)
    return [(m, n, k) for n, k in sizes for m in tokens]


def _dtypes(dtype, device: torch.device) -> list[torch.dtype]:
    if dtype is None:
        return [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    kinds = []
    for one in [dtype] if isinstance(dtype, str | torch.dtype) else dtype:
        kind = getattr(torch, one, None) if isinstance(one, str) else one
        if kind not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {one!r}")
        kinds.append(kind)
    return kinds


def _backends(asked: Sequence[str] | None, device: torch.device) -> tuple[list[str] | None, dict[str, str]]:
    """Backends to time (None: the fast ones that can), and those that are not there."""
    unknown = sorted(set(asked or ()) - set(registry.NAMES))
    if unknown:
        raise ValueError(f"backends must be of {list(registry.NAMES)}, got {unknown}")
    usable, absent = [], {}
    for name in registry.ORDER.get(device.type, ("eager",)) if asked is None else asked:
        there, reason = registry.available(name, device.type)
        if there:
            usable.append(name)
        else:
            absent[f"dqkernels {name}"] = reason
    return (None if asked is None else usable), absent


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _floor_words(peak: floors.Device | None) -> dict:
    if peak is None:
        return {"device": None, "source": "none: this device is not in the table"}
    return {
        "device": peak.name,
        "source": peak.source,
        "bandwidth_gb_per_s": round(peak.gb_per_s, 1),
        "int8_tops": peak.int8_tops,
        "half_tops": peak.half_tops,
        "rule": "max(bytes / bandwidth, 2 M N K / peak); bytes: packed weights, input, output, scales",
    }


# -------------------------------------------------------------------------------------------- table


def render(result: dict):
    """A rich table of a linear record: cold and warm side by side."""
    from rich import box
    from rich.table import Table

    protocol_, floor = result["protocol"], result["protocol"]["floor"]
    words = [
        "Median microseconds a call; x: the float layer's time over this one's, cold.",
        f"cold: weights out of memory; warm: left in the {protocol_['cache_bytes'] / 2**20:.0f} MiB cache.",
        "floor: not known for this device."
        if floor["device"] is None
        else f"floor: share reached of the {floor['device']}'s limit, cold ({floor['source']}).",
    ]
    environment = result["environment"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"nn.Linear on {protocol.machine_words(environment)}")
    for name, justify in (
        ("MxNxK", "left"),
        ("candidate", "left"),
        ("cold us", "right"),
        ("warm us", "right"),
        ("x", "right"),
        ("floor", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    # In the table `W4A8 triton`: columns are dear.
    groups: dict[str, dict[str, dict[str, dict]]] = {}
    notes: dict[tuple[str, str], list[str]] = {}
    for line in result["rows"]:
        label = ""
        if "tokens" in line:
            label = f"{line['tokens']}x{line['out_features']}x{line['in_features']} {line['dtype']}"
        if "cache" in line:
            groups.setdefault(label, {}).setdefault(line["candidate"], {})[line["cache"]] = line
        if line["status"] == "too slow":
            notes.setdefault((line["status"], ""), []).append(f"{label} {line['candidate']} {line['cache']}")
        elif line["status"] != "timed":
            names = notes.setdefault((line["status"], line["reason"]), [])
            names += [name for name in [line.get("candidate", label)] if name not in names]
    for label, found in groups.items():
        for index, (name, caches) in enumerate(found.items()):
            cold, warm = caches["cold"], caches["warm"]
            table.add_row(
                "" if index else label,
                re.sub(r"^dqkernels (W\d)", r"\1A8", name),
                _cell(cold),
                _cell(warm),
                _ratio(cold),
                _percent(cold),
                end_section=index == len(found) - 1,
            )
    if any((line.get("floor_fraction") or 0) > 1 for line in result["rows"] if line.get("cache") == "cold"):
        words.append("Above 100%: the copies stayed in a cache, or the machine was busy during the probe.")
    warning = protocol.busy_words(protocol_)
    words += [] if warning is None else [warning]
    for (status, reason), names in notes.items():
        words.append(f"{status}: {', '.join(names)}" + (f": {reason}" if reason else ""))
    table.caption, table.caption_justify = "\n".join(words), "left"
    return table


def _cell(line: dict) -> str:
    if line["status"] != "timed":
        return {"too slow": "slow"}.get(line["status"], line["status"])
    time_us = line["median_us"]
    if time_us >= 1e5:
        return f"{time_us / 1e3:,.0f} ms"
    return f"{time_us:.1f}" if time_us < 1e3 else f"{time_us:,.0f}"


def _ratio(line: dict) -> str:
    return "" if line.get("speedup_ratio") is None else f"{line['speedup_ratio']:.2f}"


def _percent(line: dict) -> str:
    return "" if line.get("floor_fraction") is None else f"{100 * line['floor_fraction']:.0f}%"
