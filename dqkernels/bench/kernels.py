"""`bench kernels`: every op but the plain linear, each at the shapes of BART, on every backend. Proven before timed.

For ops that move more than they compute the table gives the share of the copy bandwidth: a `copy_` of as many bytes,
timed in turn with them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from dqkernels.bench import floors, protocol, record
from dqkernels.bench import rows as shared
from dqkernels.bench.candidates import short
from dqkernels.bench.kernel_attention import qattention, qattention_backward, qattention_decode
from dqkernels.bench.kernel_cases import (
    COPY,
    ROTATION_BYTES,
    Case,
    dequantize_weight,
    gelu_quantize,
    layernorm_quantize,
    qembedding,
    qlinear_grad_input,
    qlinear_grad_weight,
    quantize_activation,
    quantize_by_step,
    quantize_weight,
)
from dqkernels.bench.kernel_fused import qlinear_multi

Group = tuple[str, tuple[int, ...], str]
WIDTHS = ("W8", "W4", "W2")
#: Of each op: its builder, the names of its dimensions, its variants.
OPS: dict[str, tuple[Callable[[Case], None], tuple[str, ...], tuple[str, ...]]] = {
    "quantize_activation": (quantize_activation, ("tokens", "features"), ("per_token", "per_tensor")),
    "layernorm_quantize": (layernorm_quantize, ("tokens", "features"), ("",)),
    "gelu_quantize": (gelu_quantize, ("tokens", "features"), ("",)),
    "qlinear_multi": (qlinear_multi, ("tokens", "out_features", "in_features"), WIDTHS),
    "quantize_weight": (quantize_weight, ("out_features", "in_features"), WIDTHS),
    "quantize_by_step": (quantize_by_step, ("out_features", "in_features"), WIDTHS),
    "dequantize_weight": (dequantize_weight, ("out_features", "in_features"), WIDTHS),
    "qembedding": (qembedding, ("tokens", "num_embeddings", "embedding_dim"), WIDTHS),
    "qattention": (qattention, ("batch", "heads", "queries", "keys", "head_dim"), ("", "causal")),
    "qattention_decode": (qattention_decode, ("sequences", "beams", "heads", "keys", "head_dim"), ("",)),
    "qattention_backward": (qattention_backward, ("batch", "heads", "queries", "keys", "head_dim"), ("", "causal")),
    "qlinear_grad_input": (qlinear_grad_input, ("tokens", "out_features", "in_features"), WIDTHS),
    "qlinear_grad_weight": (qlinear_grad_weight, ("tokens", "out_features", "in_features"), ("",)),
}
#: Shapes by device and op; with a variant where it is not every width.
_LARGE = ((4096, 1024, 1024), (4096, 4096, 1024), (4096, 1024, 4096))
_GPU: dict[str, tuple] = {
    # 4096 tokens are a batch of 8 sources of 512; 16 are a decoding step of 4 sources with 4 beams.
    "quantize_activation": (
        ((4096, 1024), "per_token"),
        ((4096, 4096), "per_token"),
        ((16, 1024), "per_token"),
        ((4096, 1024), "per_tensor"),
    ),
    "layernorm_quantize": (((4096, 768), ""), ((4096, 1024), ""), ((16, 1024), "")),
    "gelu_quantize": (((4096, 3072), ""), ((4096, 4096), ""), ((16, 4096), "")),
    "qlinear_multi": ((1, 768, 768), (16, 1024, 1024)),
    "quantize_weight": ((4096, 1024),),
    "quantize_by_step": ((4096, 1024),),
    "dequantize_weight": ((4096, 1024),),
    "qembedding": ((8192, 50265, 1024),),
    "qattention": (
        ((8, 12, 1024, 1024, 64), ""),
        ((8, 16, 1024, 1024, 64), ""),
        ((8, 16, 128, 128, 64), "causal"),
        ((8, 16, 128, 1024, 64), ""),
    ),
    "qattention_decode": tuple(((n, beams, 16, 1024, 64), "") for n in (1, 16) for beams in (1, 4)),
    "qattention_backward": (((8, 16, 1024, 1024, 64), ""), ((8, 16, 128, 128, 64), "causal")),
    "qlinear_grad_input": _LARGE,
    "qlinear_grad_weight": tuple((shape, "") for shape in _LARGE),
}
_CPU: dict[str, tuple] = {
    "quantize_activation": (((128, 768), "per_token"), ((128, 768), "per_tensor")),
    "layernorm_quantize": (((128, 768), ""),),
    "gelu_quantize": (((128, 3072), ""),),
    "qlinear_multi": ((1, 768, 768),),
    "quantize_weight": ((64, 768),),
    "quantize_by_step": ((64, 768),),
    "dequantize_weight": ((768, 768),),
    "qembedding": ((128, 4096, 768),),
    "qattention": (((1, 12, 64, 64, 64), ""), ((1, 12, 64, 64, 64), "causal")),
    "qattention_decode": (((1, 1, 12, 128, 64), ""), ((1, 4, 12, 128, 64), "")),
    "qattention_backward": (((1, 12, 64, 64, 64), ""),),
    "qlinear_grad_input": ((64, 768, 768),),
    "qlinear_grad_weight": (((64, 768, 768), ""),),
}
_MAX_ROUNDS = 200
#: A group that is reached gets this much, so that the late ones of a short run have figures or are left out.
_LEAST_SHARE_S = 0.1
_FLOOR_RULE = "max(bytes / bandwidth, operations / peak); bytes: each input read once, each output written once"


def run(
    groups: Iterable[Sequence] | None = None,
    ops: Sequence[str] | None = None,
    bits: Sequence[int] = (8, 4, 2),
    dtype: str | torch.dtype | Sequence | None = None,
    device: str | torch.device | None = None,
    backends: Sequence[str] | None = None,
    seconds: float = 20,
    out: str | None = None,
    probe: bool = True,
) -> dict:
    """Times the ops and gives the record.

    Args:
        groups: (op, shape, variant) triples, see `OPS`; default the shapes of BART at which `ops` and `bits` are asked.
        ops: names of `OPS`; default all of them.
        bits: weight widths.
        dtype: of float tensors: one, or several; default bfloat16 on a GPU, float32 on a CPU.
        device: default the GPU if there is one.
        backends: names to time; default every one that can, except Triton's interpreter.
        seconds: for all of it, building and proving included; groups that it does not reach say so.
        out: file for the record, or None.
        probe: on a CPU, measure the copy bandwidth for memory floors (0.3 s).

    Raises:
        ValueError: for a name, shape, variant, width or dtype that is none of these.
    """
    device = protocol.pick_device(device)
    plan = default_groups(device, ops, bits) if groups is None else [_checked(*group) for group in groups]
    dtypes = shared.dtypes(dtype, [torch.bfloat16 if device.type == "cuda" else torch.float32])
    names, absent = shared.backends(backends, device)
    peak = shared.peak(device, probe)
    before = protocol.state(device)
    todo = [(group, kind) for group in plan for kind in dtypes]
    rows: list[dict] = []
    deadline = time.perf_counter() + seconds
    with torch.inference_mode(), shared.on(device):
        # One case at a time: what it holds on the device goes with it.
        for index, ((op, shape, variant), kind) in enumerate(shared.progress("bench kernels", todo, _group_words)):
            case = Case(op, shape, variant, kind, device, names)
            left = deadline - time.perf_counter()
            if left <= 0:
                rows.append({**case.row(), "status": "not reached", "reason": f"{seconds:g} s were over"})
                continue
            rows += measure(case, max(left / (len(todo) - index), _LEAST_SHARE_S), peak)
    rows += [{"candidate": n, "status": "not compared", "reason": record.scrub(r)} for n, r in absent.items()]
    described = protocol.describe(device, seconds, _MAX_ROUNDS, before, ROTATION_BYTES)
    described["cold"] = described["cold"].replace("weight copies", "copies of inputs and outputs")
    described["warm"] = "the same inputs, over and over"
    described["floor"] = shared.floor_words(peak, _FLOOR_RULE)
    described["proof"] = "exact ops bit-equal to the reference; float ops within their bound to float64"
    result = record.new(
        "kernels",
        settings={
            "groups": [[op, list(shape), variant] for op, shape, variant in plan],
            "dtypes": [short(kind) for kind in dtypes],
            "device": device.type,
            "backends": "all that can" if backends is None else list(backends),
            "weight_granularity": "per_channel",
        },
        protocol=described,
        rows=rows,
    )
    if out is not None:
        record.write(result, out)
    return result


def default_groups(device: torch.device, ops: Sequence[str] | None = None, bits: Sequence[int] = (8, 4, 2)):
    """The (op, shape, variant) triples of a device, in the order of `OPS`."""
    if unknown := sorted(set(ops or ()) - set(OPS)):
        raise ValueError(f"ops must be of {list(OPS)}, got {unknown}")
    if not set(bits) <= {8, 4, 2}:
        raise ValueError(f"bits must be of 8, 4 and 2, got {list(bits)}")
    found: list[Group] = []
    for op, shapes in (_GPU if device.type == "cuda" else _CPU).items():
        if ops is None or op in ops:
            for shape in shapes:
                widths = OPS[op][2] == WIDTHS
                found += [(op, shape, f"W{width}") for width in bits] if widths else [(op, *shape)]
    return found


def _checked(op: str, shape: Sequence[int], variant: str = "") -> Group:
    if op not in OPS:
        raise ValueError(f"ops must be of {list(OPS)}, got {op!r}")
    _, names, variants = OPS[op]
    shape = tuple(int(size) for size in shape)
    if len(shape) != len(names) or min(shape) < 1:
        raise ValueError(f"{op} takes a shape ({', '.join(names)}) of numbers above 0, got {shape}")
    if variant not in variants:
        raise ValueError(f"{op} takes a variant of {list(variants)}, got {variant!r}")
    if variant == "causal" and shape[2] != shape[3]:
        raise ValueError(f"causal takes as many queries as keys (torch aligns others differently), got {shape}")
    return op, shape, variant


def measure(case: Case, seconds: float, peak: floors.Device | None, build: Callable | None = None) -> list[dict]:
    """All rows of one case: built (by its op's builder, unless another is given), proven, then timed."""
    start = time.perf_counter()
    (build or OPS[case.op][0])(case)
    rows: dict[tuple[str, str], dict] = {}
    samplers: dict[str, dict[str, protocol.Sampler]] = {cache: {} for cache in shared.CACHES}
    calls: dict[str, protocol.CALL] = {}
    for way in case.ways:
        # The output is dropped before the timing: cold calls keep outputs of their own.
        reason = shared.judged(case.calls(way, cold=False)[0], way.prove)[1]
        for cache in shared.CACHES:
            rows[way.name, cache] = {
                **case.row(),
                "candidate": way.name,
                "backend": way.backend,
                "kernel": way.kernel,
                "cache": cache,
                "moved_bytes": way.moved_bytes,
                **shared.floor_row(way.floor(peak)),
                **shared.verdict(reason),
            }
            if reason is None:
                walk = case.calls(way, cold=cache == "cold")
                samplers[cache][way.name] = protocol.sampler(walk, case.device, weight_bytes=way.moved_bytes)
        if reason is None:
            calls[way.name] = case.calls(way, cold=False)[0]
    base = case.ways[0].name
    shared.fill(rows, samplers, calls, base, case.device, start=start, seconds=seconds, max_rounds=_MAX_ROUNDS)
    _share_of_copy(rows)
    absent = [
        {**case.row(), "candidate": name, "status": "not compared", "reason": record.scrub(reason)}
        for name, reason in case.absent.items()
    ]
    return [*rows.values(), *absent]


def _share_of_copy(rows: dict[tuple[str, str], dict]) -> None:
    """`copy_fraction` and `copy_gb_per_s`: each row's bytes a second over those of the copy in the same cache."""
    for cache in shared.CACHES:
        copy = rows.get((COPY, cache), {})
        if "median_us" not in copy:
            continue
        speed = copy["moved_bytes"] / copy["median_us"]
        for (_, at), row in rows.items():
            if at == cache and "median_us" in row:
                row["copy_gb_per_s"] = float(f"{speed / 1e3:.4g}")
                row["copy_fraction"] = float(f"{row['moved_bytes'] / row['median_us'] / speed:.3g}")


# -------------------------------------------------------------------------------------------- table


def render(result: dict):
    """A rich table of a kernels record: cold and warm side by side."""
    from rich import box
    from rich.table import Table

    described, floor = result["protocol"], result["protocol"]["floor"]
    heads, keys, outside_words = shared.outside_column(result["rows"])
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"Ops on {protocol.machine_words(result['environment'])}",
    )
    peers = {
        re.sub("^torch ", "", row["candidate"]) for row in result["rows"] if row.get("candidate", "")[:6] == "torch "
    }
    columns = ("cold", "warm", "x", "floor", "copy", *heads)
    for name in ("op", "candidate", *columns):
        table.add_column(name, justify="right" if name in columns else "left", no_wrap=True)
    for label, found in shared.grouped(result["rows"], _label).items():
        names, words = list(found), label.split("\n")
        for index in range(max(len(names), len(words))):
            cells = [words[index] if index < len(words) else ""]
            if index < len(names):
                one, warm = found[names[index]]["cold"], found[names[index]]["warm"]
                cells += [re.sub("^(dqkernels|torch) ", "", names[index]), shared.cell(one), shared.cell(warm)]
                cells += [shared.ratio(one), shared.percent(one), shared.percent(one, "copy_fraction")]
                cells += [shared.microseconds(warm.get(key)) for key in keys]
            table.add_row(*cells, end_section=index == max(len(names), len(words)) - 1)
    lines = [
        "Median microseconds a call; x: that of the group's first over this one's, cold.",
        f"{', '.join(sorted(peers))}: torch's own." if peers else "",
        f"cold: data out of memory; warm: left in the {described['cache_bytes'] / 2**20:.0f} MiB cache.",
        "floor: not known for this device."
        if floor["device"] is None
        else f"floor: share reached of the {floor['device']}'s limit, cold ({floor['source']}).",
        "copy: share of the bytes a second that torch's copy_ moves here, cold.",
        *outside_words,
    ]
    cold = [line for line in result["rows"] if line.get("cache") == "cold"]
    if any((line.get(key) or 0) > 1 for line in cold for key in ("floor_fraction", "copy_fraction")):
        lines.append("Above 100%: the data stayed in a cache, or the machine was busy at the wrong moment.")
    warning = protocol.busy_words(described)
    lines += [] if warning is None else [warning]
    table.caption, table.caption_justify = "\n".join([*filter(None, lines), *_notes(result["rows"])]), "left"
    return table


def _label(line: dict) -> str:
    """Three lines: the op, its shape, its variant and dtype."""
    if "op" not in line:
        return ""
    return f"{line['op']}\n{'x'.join(map(str, line['shape']))}\n{line['variant']} {line['dtype']}".replace("\n ", "\n")


def _group_words(one: tuple[Group, torch.dtype]) -> str:
    (op, shape, variant), kind = one
    return _words({"op": op, "shape": shape, "variant": variant, "dtype": short(kind)})


def _words(line: dict) -> str:
    return _label(line).replace("\n", " ")


def _notes(lines: Iterable[dict]) -> list[str]:
    """As `rows.notes`, with the ops beside each candidate that was not compared or not right."""
    ops: dict[tuple[str, str, str], list[str]] = {}
    rest = []
    for line in lines:
        if line["status"] in ("not compared", "refused") and "op" in line:
            found = ops.setdefault((line["status"], line["reason"], line["candidate"]), [])
            found += [line["op"]] if line["op"] not in found else []
        else:
            rest.append(line)
    for (status, reason, candidate), names in ops.items():
        rest.append({"status": status, "reason": reason, "candidate": f"{candidate} on {', '.join(names)}"})
    return shared.notes(rest, _words)
