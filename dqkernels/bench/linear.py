"""`bench linear`: one layer, every bit width, every path, against torch's own linear. Proven before timed."""

from __future__ import annotations

import copy
import functools
import re
import time
from collections.abc import Iterable, Sequence

import torch

from dqkernels.bench import floors, peers, protocol, record
from dqkernels.bench import rows as shared
from dqkernels.bench.candidates import Candidate, Contest, float64_layer, make_linear, short
from dqkernels.config import DQConfig
from dqkernels.nn import QLinear

#: (out_features, in_features): BART-base QKV, BART-large square and fc1, and one large enough for bandwidth.
GPU_SIZES = ((2304, 768), (1024, 1024), (4096, 1024), (4096, 4096))
GPU_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
CPU_SIZES = ((768, 768), (3072, 768))
CPU_TOKENS = (1, 16, 128)
_MAX_ROUNDS = 200
_FLOOR_RULE = "max(bytes / bandwidth, 2 M N K / peak); bytes: packed weights, input, output, scales"


class Layer(Contest):
    """One float layer and everything here that can compute it, the float layer itself first."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device, bits, names=None, groups=(-1,)):
        super().__init__(make_linear(n, k, dtype, device))
        self._add_float(self.linear)
        for one in bits:
            # Of 8 bits there are no groups.
            for group_size in [size for size in groups if one != 8 or size == -1]:
                self._add_ours(one, group_size, names)
        self._add_int_mm()
        found, absent = peers.linear(self.linear)
        self.found += found
        self.absent.update(absent)

    def _add_ours(self, bits: int, group_size: int, names: Sequence[str] | None) -> None:
        device = self.linear.weight.device
        # The ternary rule at 2 bits: it packs fastest, and the kernels do the same work for any codes.
        # Packed on the CPU, which has no kernel to be wrong: the same codes on every machine.
        config = DQConfig(weight_bits=bits, weight_quantizer="ternary", group_size=group_size).for_linear("linear")
        self._add_backends(QLinear.from_linear(copy.deepcopy(self.linear).cpu(), config).to(device), names)


def run(
    shapes: Iterable[Sequence[int]] | None = None,
    bits: Sequence[int] = (8, 4, 2),
    dtype: str | torch.dtype | Sequence | None = None,
    device: str | torch.device | None = None,
    backends: Sequence[str] | None = None,
    seconds: float = 20,
    out: str | None = None,
    probe: bool = True,
    group_sizes: Sequence[int] = (-1,),
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
        group_sizes: of -1 (a scale per output channel), 32, 64 and 128; groups are for 2 and 4 bits, so that 8 bits
            stand beside them with a scale per channel where -1 is asked for too.

    Raises:
        ValueError: for what is not among these.
    """
    device = protocol.pick_device(device)
    shapes = [tuple(int(v) for v in shape) for shape in (shapes or _default_shapes(device))]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes must be (tokens, out_features, in_features) triples above 0, got {shapes}")
    scales = list(dict.fromkeys(group_sizes))
    if not scales or not set(scales) <= {-1, 32, 64, 128}:
        raise ValueError(f"group_sizes must be of -1, 32, 64 and 128, got {list(group_sizes)}")
    if set(bits) == {8} and -1 not in scales:
        raise ValueError(f"group_sizes are for 2 and 4 bits, got {scales} and bits={list(bits)}")
    default = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    dtypes = shared.dtypes(dtype, default)
    names, absent = shared.backends(backends, device)
    names = None if backends is None else names
    peak = shared.peak(device, probe)
    before = protocol.state(device)
    # Shapes of one layer together: it is packed, and its copies for the cold rows are made, once.
    order = {size: i for i, size in reversed(list(enumerate(shape[1:] for shape in shapes)))}
    groups = [(s, kind) for s in sorted(shapes, key=lambda s: order[s[1:]]) for kind in dtypes]
    groups.sort(key=lambda group: (order[group[0][1:]], dtypes.index(group[1])))
    rows: list[dict] = []
    layer, deadline = None, time.perf_counter() + seconds
    with torch.inference_mode(), shared.on(device):
        for index, (shape, kind) in enumerate(shared.progress("bench linear", groups, _words)):
            left = deadline - time.perf_counter()
            if left <= 0:
                rows.append({**_identity(shape, kind), "status": "not reached", "reason": f"{seconds:g} s were over"})
                continue
            if layer is None or layer.key != (shape[1:], kind):
                layer = Layer(shape[1], shape[2], kind, device, bits, names, scales)
                absent.update(layer.absent)
            rows += measure(shape[0], layer, left / (len(groups) - index), peak)
    rows += [{"candidate": n, "status": "not compared", "reason": record.scrub(r)} for n, r in absent.items()]
    described = protocol.describe(device, seconds, _MAX_ROUNDS, before)
    described["floor"] = shared.floor_words(peak, _FLOOR_RULE)
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
            "group_sizes": scales,
            "bias": True,
            "quantizing_the_input": "inside the timed region",
        },
        protocol=described,
        rows=rows,
    )
    if out is not None:
        record.write(result, out)
    return result


def measure(
    tokens: int, layer: Contest, seconds: float, peak: floors.Device | None, max_rounds: int | None = None
) -> list[dict]:
    """All rows of one layer at one M: proven, then timed cold and warm, in `seconds` with the building."""
    max_rounds = _MAX_ROUNDS if max_rounds is None else max_rounds
    start = time.perf_counter()
    (n, k), kind = layer.key
    device = layer.linear.weight.device
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(device, kind)
    exact_output = float64_layer(layer.linear, x)
    rows: dict[tuple[str, str], dict] = {}
    samplers: dict[str, dict[str, protocol.Sampler]] = {cache: {} for cache in shared.CACHES}
    calls: dict[str, protocol.CALL] = {}
    for one in layer.found:
        verdict, ready, y = _prepared(one, layer, x)
        error = None if y is None or y.shape != exact_output.shape else _relative(y, exact_output)
        floor = floors.gemm_floor(peak, tokens, n, k, one.bits, one.group_size)
        for cache in samplers:
            rows[one.name, cache] = {
                **_identity((tokens, n, k), kind),
                "candidate": one.name,
                "bits": one.bits,
                "group_size": one.group_size,
                "backend": one.backend,
                "foreign": one.foreign,
                "kernel": one.kernel,
                "cache": cache,
                "weights_bytes": one.weight_bytes,
                "float_error": error,
                **shared.floor_row(floor),
                **verdict,
            }
            if cache in ready:
                samplers[cache][one.name] = ready[cache]
        if ready:
            calls[one.name] = one.bind(one.module, x)
    base = layer.found[0].name
    shared.fill(rows, samplers, calls, base, device, start=start, seconds=seconds, max_rounds=max_rounds)
    return list(rows.values())


def _prepared(one: Candidate, layer: Contest, x: torch.Tensor):
    """The verdict on a candidate, its samplers by cache (none unless it is to be timed), and what it gave for x."""
    too_few = one.absent(x.shape[0])
    if too_few is not None:
        return shared.verdict(too_few, "not supported"), {}, None
    y, reason = shared.judged(one.bind(one.module, x), functools.partial(one.prove, x))
    if y is None and one.foreign:
        return shared.verdict(reason, "not compared"), {}, None
    ready: dict[str, protocol.Sampler] = {}
    if reason is None:
        try:
            for cache in shared.CACHES:
                walk = [one.bind(module, x) for module in (layer.copies(one) if cache == "cold" else [one.module])]
                ready[cache] = protocol.sampler(walk, x.device, weight_bytes=one.weight_bytes)
                if one.foreign:
                    ready[cache].sample()  # raises here or, most likely, never
        except Exception as error:
            if not one.foreign:
                raise
            return shared.verdict(shared.raised(error), "not compared"), {}, y
    return shared.verdict(reason), ready, y


def _words(group) -> str:
    return _label(_identity(*group))


def _identity(shape, kind: torch.dtype) -> dict:
    tokens, n, k = shape
    return {"tokens": tokens, "out_features": n, "in_features": k, "dtype": short(kind)}


def _relative(y: torch.Tensor, wanted: torch.Tensor) -> float | None:
    error = float((y.double() - wanted).norm() / wanted.norm())
    return float(f"{error:.3g}") if error == error and error != float("inf") else None


def default_tokens(device: torch.device) -> tuple[int, ...]:
    """The numbers of rows of a shape that comes without one."""
    return GPU_TOKENS if device.type == "cuda" else CPU_TOKENS


def _default_shapes(device: torch.device) -> list[tuple[int, int, int]]:
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    return [(m, n, k) for n, k in sizes for m in default_tokens(device)]


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
    heads, keys, outside_words = shared.outside_column(result["rows"])
    long_names = any(len(row.get("candidate") or "") > 20 for row in result["rows"])
    padding = (0, 1, 0, 0) if heads or long_names else (0, 1)  # columns are dear
    title = f"nn.Linear on {protocol.machine_words(environment)}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding, title=title)
    for name, justify in (
        ("MxNxK", "left"),
        ("candidate", "left"),
        ("cold us", "right"),
        ("warm us", "right"),
        ("x", "right"),
        ("floor", "right"),
        *((head, "right") for head in heads),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    words[2:2] = outside_words
    for label, found in shared.grouped(result["rows"], _label).items():
        for index, (name, caches) in enumerate(found.items()):
            cold, warm = caches["cold"], caches["warm"]
            table.add_row(
                "" if index else label,
                # In the table `W4A8 triton`.
                re.sub(r"^dqkernels (W\d)", r"\1A8", name),
                shared.cell(cold),
                shared.cell(warm),
                shared.ratio(cold),
                shared.percent(cold),
                *(shared.microseconds(warm.get(key)) for key in keys),
                end_section=index == len(found) - 1,
            )
    if any((line.get("floor_fraction") or 0) > 1 for line in result["rows"] if line.get("cache") == "cold"):
        words.append("Above 100%: the copies stayed in a cache, or the machine was busy during the probe.")
    warning = protocol.busy_words(protocol_)
    words += [] if warning is None else [warning]
    words += shared.notes(result["rows"], _label)
    table.caption, table.caption_justify = "\n".join(words), "left"
    return table


def _label(line: dict) -> str:
    if "tokens" not in line:
        return ""
    return f"{line['tokens']}x{line['out_features']}x{line['in_features']} {line['dtype']}"
