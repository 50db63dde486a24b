"""The CUDA part of `dqkernels tune`: how the skinny GEMM is best cut up, and where Triton's tile beats it.

A cell is one format at one M x N x K of at most 64 rows, with float rows that the GEMM quantizes or int8 ones. Its
candidates are those of `plans.candidates`; the rule's own plan is always among them. Above 16 rows, where the input is
int8 for every kernel, Triton's GEMM runs beside the finalists, and the table says who was faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from dqkernels import packing
from dqkernels.bench import protocol, race
from dqkernels.kernels import measured, native, plans, skinny, tiles

#: The key of Triton's GEMM beside the plans of a race.
TRITON = "triton"


class PlanCell(NamedTuple):
    """One plan to be measured."""

    bits: int
    group_size: int
    input: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        return f"cuda W{self.bits}{group} {self.input} {self.m}x{self.n}x{self.k}"


def cells(
    sizes: Iterable[Sequence[int]], tokens: Iterable[int], bits: Iterable[int], group_sizes: Iterable[int]
) -> list[PlanCell]:
    """Every combination that the kernel has, one cell per entry of the table; none for tokens above 64."""
    found: dict[tuple, PlanCell] = {}
    for (n, k), width, group, m, kind in itertools.product(sizes, bits, group_sizes, tokens, plans.INPUTS):
        fitting = m <= (plans.FLOAT_ROWS if kind == "float" else plans.ROWS[-1])
        if (width, group != -1) in tiles.FORMATS and fitting:
            cell = PlanCell(width, group, kind, m, n, k)
            found.setdefault(key(cell), cell)
    return list(found.values())


def key(cell: PlanCell) -> tuple:
    """Of the table's entry; never that of a tile."""
    return "cuda", measured.plan_key(cell.m, cell.n, cell.k, cell.bits, cell.group_size, cell.input)


def measure(
    cell: PlanCell, device: torch.device, seconds: float, tile: tuple[tiles.Config, int] | None, against_triton: bool
) -> dict:
    """The row of one cell: the fastest plan that gives the rule's bits, the rule's time, and Triton's.

    tile: of Triton's GEMM and its number of K splits, None for the one it would take by itself.
    against_triton: Triton can be used here. It is asked above 16 rows alone.
    """
    rule = rule_of(cell, tiles.multiprocessors(device))
    forms, copies = operands(cell, device)
    rivals = [TRITON] if against_triton and cell.m > plans.FLOAT_ROWS else []

    def call(choice, **form):
        return _triton(cell, tile, form) if choice == TRITON else _skinny(cell, choice, form)

    found = race.run(
        choices(cell, rule), rule, call, forms, copies,
        describe=describe, device=device, seconds=seconds, rivals=rivals,
    )  # fmt: skip
    ours, triton_us = found.median_us(found.best), found.median_us(TRITON)
    return {
        "kernel": "cuda",
        **cell._asdict(),
        **found.best._asdict(),
        **found.row(rule),
        "triton_us": triton_us,
        "faster": faster(ours, triton_us),
    }


def faster(cuda_us: float, triton_us: float | None) -> str:
    """Who the dispatch takes: `triton` only where it gains more than the noise of a median."""
    return "triton" if triton_us is not None and cuda_us > race.GAIN * triton_us else "cuda"


def choices(cell: PlanCell, rule: plans.Plan) -> Iterator[plans.Plan]:
    """The rule's plan first, then every other that the kernel has room for."""
    yield rule
    for plan in plans.candidates(cell.m, cell.k, cell.bits, cell.group_size):
        if plan != rule:
            yield plan


def describe(choice: plans.Plan | str) -> str:
    """`n4 /3`: four warps of a block side by side in N, three blocks that share K."""
    if choice == TRITON:
        return "Triton's tile"
    return f"n{choice.warps_n}" + (f" /{choice.splits}" if choice.splits > 1 else "")


def rule_of(cell: PlanCell, sms: int) -> plans.Plan:
    """What the compiled core takes by itself, whatever table is in use."""
    floats = cell.input == "float"
    made = native.require("SkinnyPlan").SkinnyPlan(
        m=cell.m,
        k=cell.k,
        row_stride=cell.k,
        x_dtype=skinny._DTYPES[torch.bfloat16 if floats else torch.int8],
        mode=native.MODES["per_token"],
        clip=0.0,
        norm_eps=0.0,
        bits=cell.bits,
        four_level=False,
        group_size=max(cell.group_size, 0),
        tensor_scale=False,
        bias_dtype=skinny._DTYPES[torch.bfloat16],
        residual_dtype=skinny._DTYPES[torch.float32],
        activation=0,
        y_dtype=skinny._DTYPES[torch.bfloat16],
        n=[cell.n],
        warps_n=0,
        splits=0,
        sms=sms,
        overlap=False,
    )
    return plans.Plan(made.warps_n, made.splits)


def operands(cell: PlanCell, device: torch.device) -> tuple[list[dict], list[torch.Tensor]]:
    """Forms of the call with random codes, the timed one first, and copies of the packed weight for a cold rotation.

    The others: fp32 with a residual, four_level at 2 bits, int8 out, two weights in one launch, and for float rows a
    LayerNorm on the way in.
    """
    g = torch.Generator().manual_seed(0)
    qweight = torch.randint(0, 256, packing.packed_shape(cell.n, cell.k, cell.bits), dtype=torch.uint8, generator=g)
    qweight, groups = qweight.to(device), None
    if cell.group_size != -1:
        groups = torch.randint(1, 4, (cell.n, -(-cell.k // cell.group_size)), dtype=torch.uint8, generator=g).to(device)
    if cell.input == "float":
        x, act_scale = torch.randn(cell.m, cell.k, generator=g).to(device, torch.bfloat16), None
    else:
        x = torch.randint(-127, 128, (cell.m, cell.k), dtype=torch.int8, generator=g).to(device)
        act_scale = torch.rand(cell.m, generator=g).to(device)
    timed = {
        "x": x,
        "act_scale": act_scale,
        "qweight": qweight,
        "weight_scale": torch.rand(cell.n, generator=g).to(device),
        "group_mult": groups,
        "bias": torch.rand(cell.n, generator=g).to(device, torch.bfloat16),
        "residual": None,
        "out_dtype": torch.bfloat16,
    }
    residual = torch.ones(cell.m, cell.n, device=device)
    full = {**timed, "out_dtype": torch.float32, "bias": timed["bias"].float(), "residual": residual}
    forms = [timed, full, {**timed, "parts": 2}]
    # Codes of 8 bits spread over +-74, scales over 0.5: a result's spread, of which int8 codes are to hold two.
    spread = cell.k**0.5 * {8: 74, 4: 4.6, 2: 1.1}[cell.bits] * 0.5 * (1 if cell.input == "float" else 36)
    out_scale = torch.full((1,), spread * (1 if groups is None else 2) / 64, device=device)
    forms.append({**timed, "out_dtype": torch.int8, "out_scale": out_scale})
    if cell.bits == 2:
        forms.append({**full, "four_level": True})
    if cell.input == "float":
        weight = torch.rand(cell.k, generator=g).to(device, torch.bfloat16)
        forms.append({**timed, "norm": skinny.Norm(weight, weight.flip(0), 1e-5)})
    return forms, [qweight, *(qweight.clone() for _ in range(protocol.copies_for(qweight.numel(), device) - 1))]


def _skinny(cell: PlanCell, plan: plans.Plan, form: dict) -> list[torch.Tensor]:
    weight = (form[name] for name in ("qweight", "weight_scale", "group_mult", "bias", "residual"))
    part = skinny.Part(*weight, cell.n)
    return skinny.gemm(
        form["x"],
        [part] * form.get("parts", 1),
        bits=cell.bits,
        four_level=form.get("four_level", False),
        group_size=cell.group_size,
        activation="none",
        out_dtype=form["out_dtype"],
        act_scale=form["act_scale"],
        norm=form.get("norm"),
        out_scale=form.get("out_scale"),
        warps_n=plan.warps_n,
        splits=plan.splits,
    )


def _triton(cell: PlanCell, tile: tuple[tiles.Config, int] | None, form: dict) -> torch.Tensor:
    from dqkernels.kernels import gemm

    chosen, split = tile or (None, None)
    return gemm.qgemm(
        form["x"],
        form["act_scale"],
        None,
        form["qweight"],
        form["weight_scale"],
        cell.bits,
        False,
        cell.n,
        bias=form["bias"],
        out_dtype=form["out_dtype"],
        tile=chosen,
        split_k=split,
        group_mult=form["group_mult"],
        group_size=cell.group_size,
    )


def render(rows: Sequence[dict], title: str):
    """A rich table: one line per cell, the plan taken, its gain over the rule, and Triton's time where it was taken."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    for name in ("MxNxK", "W", "group", "input", "plan", "us", "x", "triton us"):
        table.add_column(name, justify="left" if name in ("MxNxK", "input", "plan") else "right", no_wrap=True)
    for row in rows:
        triton = "" if row["triton_us"] is None else f"{row['triton_us']:.1f}"
        table.add_row(
            f"{row['m']}x{row['n']}x{row['k']}",
            str(row["bits"]),
            "" if row["group_size"] == -1 else str(row["group_size"]),
            row["input"],
            describe(plans.Plan(row["warps_n"], row["splits"])) + (" (rule)" if row["is_rule"] else ""),
            f"{row['median_us']:.1f}",
            f"{row['rule_us'] / row['median_us']:.2f}",
            triton + (" *" if row["faster"] == "triton" else ""),
        )
    table.caption, table.caption_justify = (
        "nW: warps of a block side by side in N, /S: blocks that share K.\n"
        "*: Triton is faster, and taken for these rows.",
        "left",
    )
    return table
