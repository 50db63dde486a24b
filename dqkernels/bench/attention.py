"""Int8 attention against torch's `scaled_dot_product_attention`, over 64 to 4,096 keys: time, and error to float64.

The times are those of `bench kernels`, proofs included. Beside them stands, for everyone who took part, how far its
output is from attention in float64 over the same float q, k and v: what quantizing costs, which a proof does not ask.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from dqkernels.bench import kernels, protocol, record
from dqkernels.bench import rows as shared
from dqkernels.bench.kernel_cases import Case

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
#: Longest prefill of as many queries as keys: the float64 scores of a longer one would not fit beside everything else.
SQUARE = 1024
_HEADS, _DIM, _QUERIES = 12, 64, 128  # BART-base's; a decoder's queries over a long source


def groups(lengths: Sequence[int] = LENGTHS) -> list[kernels.Group]:
    """(op, shape, variant) of prefill, causal prefill, and decoding with one beam and with four."""
    found: list[kernels.Group] = []
    for keys in lengths:
        queries = keys if keys <= SQUARE else _QUERIES
        found.append(("qattention", (1, _HEADS, queries, keys, _DIM), ""))
        if queries == keys:
            found.append(("qattention", (1, _HEADS, queries, keys, _DIM), "causal"))
        found += [("qattention_decode", (1, beams, _HEADS, keys, _DIM), "") for beams in (1, 4)]
    return found


def run(
    lengths: Sequence[int] = LENGTHS,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backends: Sequence[str] | None = None,
    seconds: float = 300,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Times and errors of `groups(lengths)`, as a record of `bench kernels` whose rows hold `norm_error` too.

    Raises:
        ValueError: as `kernels.run`.
    """
    made = kernels.run(groups(lengths), dtype=dtype, device=device, backends=backends, seconds=seconds)
    place = protocol.pick_device(device)
    (kind,) = shared.dtypes(dtype, [torch.bfloat16 if place.type == "cuda" else torch.float32])
    names, _ = shared.backends(backends, place)
    with torch.inference_mode(), shared.on(place):
        for op, shape, variant in groups(lengths):
            found = errors(Case(op, shape, variant, kind, place, names))
            for row in made["rows"]:
                named = (row.get("op"), tuple(row.get("shape", ())), row.get("variant")) == (op, shape, variant)
                if named and row.get("candidate") in found:
                    row["norm_error"] = found[row["candidate"]]
    made["protocol"]["error_rule"] = (
        "norm of (output - attention in float64 over the same q, k, v) / norm of the latter"
    )
    record.check(made)
    if out is not None:
        record.write(made, out)
    return made


def errors(case: Case) -> dict[str, float]:
    """Of everyone who can compute the case: the relative error of its output, by name."""
    kernels.OPS[case.op][0](case)
    q, k, v = (x.double() for x in case.ways[0].inputs)  # torch's, in floats
    score = (q @ k.mT) * q.shape[-1] ** -0.5
    if case.variant == "causal":
        score = score.masked_fill(~torch.ones_like(score, dtype=torch.bool).tril(), float("-inf"))
    truth = score.softmax(dim=-1) @ v
    found = {}
    for way in case.ways:
        y = case.calls(way, cold=False)[0]()
        if y.shape == truth.shape:  # a plain copy is no attention
            found[way.name] = float(f"{float((y.double() - truth).norm() / truth.norm()):.4g}")
    return found


def markdown(made: dict[str, Any]) -> str:
    """The table for docs/measured.md: warm times in microseconds, and errors in per cent."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in made["rows"]:
        if row.get("cache") == "warm" and "norm_error" in row:
            cells.setdefault((row["op"], tuple(row["shape"]), row["variant"]), {})[row["candidate"]] = row
    ours = sorted({name for each in cells.values() for name in each if name.startswith("dqkernels")})
    head = ["attention", "queries x keys", "sdpa us", "its error %"]
    for name in ours:
        short = name.removeprefix("dqkernels ")
        head += [f"{short} us", "x of sdpa", "error %"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (op, shape, variant), each in cells.items():
        decoding = op == "qattention_decode"
        what = (
            f"decode, {shape[1]} beam{'s' * (shape[1] > 1)}" if decoding else "causal prefill" if variant else "prefill"
        )
        line = [what, f"{1 if decoding else shape[2]} x {shape[3]}", *_figures(each.get("torch sdpa"))]
        for name in ours:
            row = each.get(name)
            time, error = _figures(row)
            ratio = None if row is None else row.get("speedup_ratio")
            line += [time, "-" if ratio is None else f"{ratio:.2f}", error]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _figures(row: dict[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "-", "-"
    time = row.get("median_us")
    return "-" if time is None else f"{time:.1f}", f"{100 * row['norm_error']:.2g}"
