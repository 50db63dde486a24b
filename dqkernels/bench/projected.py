"""`bench projected`: what a card could do at best by its datasheet. Arithmetic; nothing in it was measured.

    floor = max(bytes / bandwidth, 2 M N K / peak)        of one GEMM (`floors.gemm_floor`)
    step  = the sum of these floors over the linears of a decoder and its head, one token for each row

A projection is a record of a kind of its own, so that none of its rows can stand in a table of measured ones:
`bench compare` refuses it, and its figures have no `median_us`. It is a bound from below. Launches, attention, norms
and caches are not in it, and GEMMs do not reach theirs: an H200's best at one row, 8192 x 8192, had 54% of it at 8 bits
and 29% at 2 (docs/measured.md), its small ones far less.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dqkernels.bench import floors, record, size
from dqkernels.bench.gemm import GPU_SIZES

KIND = "projected"
#: What every row says of itself.
STATUS = "projected"
#: As the command line names them; the A100's three kinds differ in bandwidth alone.
CARDS = {
    "a100-40": floors.A100_40,
    "a100-80-sxm": floors.A100_80_SXM,
    "a100-80-pcie": floors.A100_80_PCIE,
    "h100-sxm": floors.H100_SXM,
    "h100-pcie": floors.H100_PCIE,
    "h200": floors.H200,
}
#: Rows of a GEMM; in a decode step, texts times beams.
TOKENS = (1, 16, 64)
MODELS = ("bart-base", "bart-large")
#: fp16 first: ratios are to its floor.
BITS = (16, 8, 4, 2)
RULE = "max(bytes / bandwidth, 2 M N K / peak); bytes: packed weights, int8 input, 16-bit output, scales"
LEFT_OUT = "launches, attention, norms, caches, the host"


def step_sizes(shape: size.Shape) -> list[tuple[int, int]]:
    """(out_features, in_features) of the linears that one decode step runs: Q, K, V and output of self-attention, Q and
    output of cross-attention (K and V of the source are there already), the feed-forward, and the head behind all
    layers."""
    d = shape.d_model
    layer = [(d, d)] * 6 + [(shape.ffn, d), (d, shape.ffn)]
    return layer * shape.decoder + [(shape.vocab, d)]


def run(
    card: str = "a100-80-sxm",
    shapes: Sequence[Sequence[int]] | None = None,
    tokens: Sequence[int] = TOKENS,
    models: Sequence[str] = MODELS,
    *,
    out: str | os.PathLike | None = None,
) -> dict:
    """The projection of a card.

    Args:
        card: a name of `CARDS`.
        shapes: (out_features, in_features) pairs; default: those of `bench gemm` on a GPU.
        tokens: rows of each GEMM and of each step.
        models: names of `size.SHAPES`, for whole decode steps.
        out: file for the record.

    Returns:
        A record of kind `projected`: a row per GEMM or step and width, with `floor_us`, what bounds it, and
        `bound_ratio`, fp16's floor over this one's.

    Raises:
        ValueError: for an unknown card or model, or a size below 1.
    """
    if card not in CARDS:
        raise ValueError(f"card must be one of {', '.join(CARDS)}, got {card!r}")
    if unknown := [name for name in models if name not in size.SHAPES]:
        raise ValueError(f"models must be of {', '.join(size.SHAPES)}, got {unknown[0]!r}")
    sizes = [tuple(map(int, pair)) for pair in shapes or GPU_SIZES]
    if any(len(pair) != 2 or min(pair) < 1 for pair in sizes) or any(m < 1 for m in tokens):
        raise ValueError(f"shapes and tokens must be above 0, got {sizes} and {list(tokens)}")
    device, rows = CARDS[card], []
    for n, k in sizes:
        for m in tokens:
            rows += _rows({"what": "gemm", "out_features": n, "in_features": k}, device, m, [(n, k)])
    for name in models:
        for m in tokens:
            rows += _rows({"what": "decode step", "model": name}, device, m, step_sizes(size.SHAPES[name]))
    protocol = {
        "measured": False,
        "rule": RULE,
        "left_out": LEFT_OUT,
        "device": device.name,
        "source": device.source,
        "bandwidth_gb_per_s": device.gb_per_s,
        "int8_tops": device.int8_tops,
        "half_tops": device.half_tops,
    }
    result = record.new(
        KIND, settings={"card": card, "tokens": list(tokens), "models": list(models)}, protocol=protocol, rows=rows
    )
    if out is not None:
        record.write(result, out)
    return result


def _rows(facts: dict, device: floors.Device, m: int, sizes: Sequence[tuple[int, int]]) -> list[dict]:
    """A row per width, of GEMMs that run one after the other."""
    found = []
    for bits in BITS:
        each = [floors.gemm_floor(device, m, n, k, bits) for n, k in sizes]
        us = sum(floor.us for floor in each)
        found.append(
            {
                **facts,
                "tokens": m,
                "bits": bits,
                "moved_bytes": sum(floors.gemm_bytes(m, n, k, bits) for n, k in sizes),
                "operations": sum(floors.gemm_ops(m, n, k) for n, k in sizes),
                "floor_us": round(us, 3),
                "floor_bound": "/".join(sorted({floor.bound for floor in each})),
                "status": STATUS,
            }
        )
    for row in found:
        row["bound_ratio"] = round(found[0]["floor_us"] / max(row["floor_us"], 1e-3), 2)
    return found


def render(result: dict):
    """A rich table of a projection; its title and its columns say what it is."""
    from rich import box
    from rich.table import Table

    described = result["protocol"]
    table = Table(box=box.SIMPLE_HEAD, title=f"PROJECTED, not measured: {described['device']}", pad_edge=False)
    for name in ("what", "bits", "projected us", "bound by", "at most x"):
        table.add_column(name, justify="left" if name in ("what", "bound by") else "right", no_wrap=True)
    for row in result["rows"]:
        what = f"{row['out_features']}x{row['in_features']}" if row["what"] == "gemm" else f"{row['model']}, a step"
        table.add_row(
            f"{row['tokens']:>2} x {what}",
            str(row["bits"]),
            f"{row['floor_us']:,.2f}",
            row["floor_bound"],
            f"{row['bound_ratio']:.2f}",
            end_section=row["bits"] == BITS[-1],
        )
    table.caption_justify = "left"
    table.caption = (
        f"floor = {RULE}.\nBandwidth {described['bandwidth_gb_per_s']:,} GB/s, int8 {described['int8_tops']:,} and "
        f"fp16 {described['half_tops']:,} TOPS ({described['source']}). A step: the floors of a decoder's linears and "
        f"head, added up; 16 x: of 16 rows. at most x: fp16's floor over this one's. Left out: {LEFT_OUT}. No kernel "
        "reaches a floor."
    )
    return table
