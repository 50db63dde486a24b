"""Checks of the Triton GEMM's groups, split-K and int8 output, and of what it reads and writes; see triton_checks.py.

By hand: `TRITON_INTERPRET=1 python tests/triton_checks_gemm.py [NAME ...]`.
"""

import contextlib
import functools
import itertools
import random
import unittest.mock
from dataclasses import dataclass

import numpy as np
import oracle
import pairwise
import torch
from guarded import guarded
from triton_checks import DTYPES, assert_same, floats, main, pack, random_codes, refuses

CHECKS = {}
SMALL = (16, 64, 128, 4, 3)  # a tile of one packing block of K, so that short rows split too


def check(function):
    CHECKS[function.__name__] = function
    return function


@dataclass(frozen=True)
class Options:
    """What a GEMM is asked for beside its shape."""

    form: tuple  # bits, four_level, group_size
    output: torch.dtype
    split_k: int
    activation: str
    bias: bool
    residual: bool
    tensor_scale: bool
    scalar_tail: bool  # K not a multiple of 16: the launcher pads


FORMS = [(8, False, -1)] + [
    (bits, four_level, group_size)
    for (bits, four_level), group_size in itertools.product(((4, False), (2, False), (2, True)), (-1, 32, 64, 128))
]
VALUES = {
    "form": FORMS,
    "output": [*DTYPES, torch.int8],
    "split_k": [1, 2, 3, 4, 5, 6, 7, 8],
    "activation": ["none", "relu"],
    "bias": [False, True],
    "residual": [False, True],
    "tensor_scale": [False, True],
    "scalar_tail": [False, True],
}


def possible(options):
    """Groups have a scale per channel."""
    return not (options.get("tensor_scale") and options.get("form", (0, 0, -1))[2] != -1)


def shape(seed, options):
    """Around the tile's edges in M and N, around the groups' and the packing block's in K, a step per split or more."""
    draw = random.Random(seed)
    m = draw.choice([1, 2, 3, 5, 7, 11, 15, 16, 17, 23, 31, 33])
    n = draw.choice([1, 3, 15, 16, 17, 31, 37, 63, 64, 65, 79])
    tails = [1, 15, 31, 33, 63, 65, 95, 97, 127] if options.scalar_tail else [16, 32, 48, 64, 80, 96, 112, 128]
    return m, n, 128 * (options.split_k - 1 + draw.choice([0, 0, 1])) + draw.choice(tails)


def operands(seed, m, n, k, form, bias=None, residual=None, tensor_scale=False):
    """Codes, scales, multipliers and addends on the CPU: (keyword arguments of `call`, codes)."""
    bits, four_level, group_size = form
    g = torch.Generator().manual_seed(seed)
    codes = random_codes(g, n, k, bits, four_level)
    mult = None
    if group_size != -1:
        limit = oracle.mult_max(bits, four_level, k)
        mult = torch.randint(1, limit + 1, (n, -(-k // group_size)), generator=g).to(torch.uint8)
    given = {
        "xq": torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8),
        "act_scale": torch.rand(m, generator=g) * 0.02 + 1e-4,
        "weight_scale": torch.rand(1 if tensor_scale else n, generator=g) * 0.02,
        "group_mult": mult,
        "bias": None if bias is None else torch.randn(n, generator=g).to(bias),
        "residual": None if residual is None else torch.randn(m, n, generator=g).to(residual),
    }
    return given, codes


def expected(given, codes, form, activation="none"):
    """The oracle's fp32 result before its last rounding."""
    _, four_level, group_size = form
    mult = None if given["group_mult"] is None else given["group_mult"].numpy()
    acc = oracle.accumulate(given["xq"].numpy(), codes, mult, four_level, group_size)
    added = floats(given["bias"]), floats(given["residual"])
    return oracle.epilogue(acc, given["act_scale"].numpy(), given["weight_scale"].numpy(), *added, activation)


def call(device, given, codes, form, *, place=lambda tensor: tensor, **more):
    """The launcher on `device`, each operand where `place` puts it."""
    from dqkernels.kernels import gemm
    from dqkernels.kernels.tiles import Config

    bits, four_level, group_size = form
    there = {name: None if tensor is None else place(tensor.to(device)) for name, tensor in given.items()}
    row_sum = place(given["xq"].sum(dim=1, dtype=torch.int32).to(device)) if four_level and group_size == -1 else None
    more.setdefault("tile", Config(*SMALL))
    return gemm.qgemm(
        row_sum=row_sum, qweight=place(pack(codes, bits, device)), bits=bits, four_level=four_level,
        out_features=len(codes), group_size=group_size, **there, **more,
    )  # fmt: skip


def assert_case(seed, shape, options, device):
    """One GEMM of random codes equals the oracle."""
    m, n, k = shape
    float_type = torch.float32 if options.output == torch.int8 else options.output
    addends = [float_type if wanted else None for wanted in (options.bias, options.residual)]
    given, codes = operands(seed, m, n, k, options.form, *addends, options.tensor_scale)
    want = expected(given, codes, options.form, options.activation)
    assert min(m, n) < 3 or want.any(), f"{shape} {options}: the oracle is all zero, which proves nothing"
    out_scale = None
    if options.output == torch.int8:
        out_scale = max(float(np.abs(want).max()), 1e-3) / 150  # some are clamped
        want = oracle.quantize_activation(want, "static", None, out_scale)[0]
        out_scale = torch.tensor([out_scale], device=device)
    got = call(
        device, given, codes, options.form, activation=options.activation, out_dtype=options.output,
        out_scale=out_scale, split_k=options.split_k,
    )  # fmt: skip
    assert_same(got, torch.from_numpy(want).to(options.output), f"{shape} {options}")


@check
def gemm_pairwise(device):
    """Every pair of options, over 100 shapes and more."""
    cases = [Options(**row) for row in pairwise.covering(VALUES, possible)]
    shapes = [shape(seed, options) for seed, options in enumerate(cases)]
    assert len(set(shapes)) >= 100, len(set(shapes))
    for seed, (size, options) in enumerate(zip(shapes, cases, strict=True)):
        assert_case(seed, size, options, device)


@check
def gemm_groups(device):
    """Every grouped form and both sides of each group's and block's edge, multipliers of one and of the largest."""
    for i, form in enumerate(form for form in FORMS if form[2] != -1):
        for k in (1, 31, form[2] - 1, form[2], form[2] + 1, 200, 256):
            given, codes = operands(i, 3, 18, k, form)
            given["group_mult"][0] = 1
            given["group_mult"][1] = oracle.mult_max(form[0], form[1], k)
            got = call(device, given, codes, form)
            assert_same(got, torch.from_numpy(expected(given, codes, form)), f"{form}, K = {k}")


@check
def gemm_group_extremes(device):
    """The largest level, code and multiplier at the largest K that takes them: a sum just below 2^31, and exact."""
    from dqkernels.kernels.tiles import Config

    one = torch.ones(1)
    for bits, four_level, code, level in ((4, False, -8, -8), (2, True, -2, -3)):
        k = (2**31 - 1) // (127 * 127 * abs(level))
        assert oracle.mult_max(bits, four_level, k) == 127 and oracle.mult_max(bits, four_level, k + 1) < 127
        codes = np.full((1, k), code)
        given = {
            "xq": torch.full((1, k), 127, dtype=torch.int8), "act_scale": one, "weight_scale": one, "bias": None,
            "group_mult": torch.full((1, -(-k // 128)), 127, dtype=torch.uint8), "residual": None,
        }  # fmt: skip
        got = call(device, given, codes, (bits, four_level, 128), tile=Config(16, 32, 1024, 4, 3), split_k=1)
        assert_same(got, torch.tensor([[float(127 * level * 127 * k)]]), f"W{bits} code {code}")


@check
def gemm_group_tiles(device):
    """Each tile for groups gives the same bits, split and not."""
    from dqkernels.kernels import tiles

    choices = list(dict.fromkeys(tiles.table("sm80", 4, 64).values()))
    for seed, (tile, split_k, form) in enumerate(itertools.product(choices, (1, 2), FORMS[3::4])):
        given, codes = operands(seed, 35, 150, 320, form)
        got = call(device, given, codes, form, tile=tile, split_k=split_k)
        assert_same(got, torch.from_numpy(expected(given, codes, form)), f"{tile} {split_k} {form}")


@check
def gemm_tiles_in_groups(device):
    """16, 17 and 33 tiles of 128 rows, in groups of 16: every tile is computed, none in another's place."""
    from dqkernels.kernels.tiles import Config

    for m, split_k in ((2048, 1), (2100, 1), (2100, 2), (4100, 1)):
        form = (4, False, -1)
        given, codes = operands(m, m, 70, 256, form)
        with memory_from(poisoned):
            got = call(device, given, codes, form, tile=Config(128, 32, 128, 4, 3), split_k=split_k)
        assert_same(got, torch.from_numpy(expected(given, codes, form)), f"{m} {split_k}")


@contextlib.contextmanager
def memory_from(make):
    """torch.empty and the launcher's padding, given by `make(tensor)`: what the launcher allocates for a kernel."""
    empty, pad = torch.empty, torch.nn.functional.pad
    with (
        unittest.mock.patch.object(torch, "empty", lambda *shape, **facts: make(empty(*shape, **facts))),
        unittest.mock.patch.object(torch.nn.functional, "pad", lambda *arguments: make(pad(*arguments))),
    ):
        yield


def poisoned(tensor):
    """0x5A in every byte of memory that nobody has written."""
    return tensor if tensor.dtype == torch.int8 else tensor.view(torch.uint8).fill_(0x5A).view(tensor.dtype)


@check
def gemm_split_k(device):
    """1 to 8 splits, and more than there are steps, over slabs of junk: one answer, and again the same."""
    for form, k in (((8, False, -1), 1040), ((4, False, -1), 1100), ((2, True, -1), 1152), ((2, True, 64), 1025)):
        given, codes = operands(5, 19, 70, k, form, bias=torch.float32)
        want = torch.from_numpy(expected(given, codes, form, "relu"))
        for split_k in (1, 2, 3, 5, 8, 8, 50):
            with memory_from(poisoned):
                got = call(device, given, codes, form, activation="relu", split_k=split_k)
            assert_same(got, want, f"{form} in {split_k}")


@check
def gemm_epilogue_once(device):
    """Y in the residual's own memory: an epilogue that ran twice would add the residual twice."""
    form = (4, False, -1)
    for split_k in (1, 2, 5, 8):
        given, codes = operands(6, 18, 66, 1024, form, residual=torch.float32)
        want = torch.from_numpy(expected(given, codes, form))
        memory = given["residual"] = given["residual"].to(device)
        with memory_from(lambda tensor, memory=memory: memory if tensor.dtype == torch.float32 else poisoned(tensor)):
            got = call(device, given, codes, form, split_k=split_k)
        assert got.data_ptr() == memory.data_ptr()
        assert_same(got, want, f"split_k = {split_k}")


@check
def gemm_guard_pages(device):
    """Every operand, the output and the slabs against an unreadable page, after them and before: no fault."""
    if device != "cpu":
        return  # pages of host memory; on a GPU compute-sanitizer does this
    sizes = ((1, 1, 1), (3, 17, 129), (17, 65, 256), (16, 64, 272), (5, 16, 31), (33, 15, 384), (2, 33, 100))
    for at_end, (i, (m, n, k)), form in itertools.product((True, False), enumerate(sizes), FORMS[:1] + FORMS[3::3]):
        kept = []

        def place(tensor, at_end=at_end, kept=kept):
            kept.append(guarded(tensor.contiguous().numpy(), at_end))
            return torch.from_numpy(kept[-1])

        given, codes = operands(i, m, n, k, form, bias=torch.float32, residual=torch.float32)
        with memory_from(place):
            got = call(device, given, codes, form, place=place, split_k=1 + i % 2)
        assert_same(got, torch.from_numpy(expected(given, codes, form)), f"{m}x{n}x{k} {form} {at_end}")


@check
def gemm_int8_output(device):
    """Ties to even, both clamps, the true quotient, a NaN row that gives zeros and stays alone."""
    halves = torch.arange(-130, 131) + 0.5
    one = torch.ones(1)
    given = {"xq": torch.ones(2, 1, dtype=torch.int8), "act_scale": torch.tensor([1.0, float("nan")]), "bias": None,
             "weight_scale": halves, "group_mult": None, "residual": None}  # fmt: skip
    codes = np.ones((len(halves), 1), np.int64)
    for scale in (1.0, 0.1, 3.0, 2.0**-126, 2.0**100, float("inf")):
        out_scale = one * scale
        got = call(device, given, codes, (8, False, -1), out_dtype=torch.int8, out_scale=out_scale.to(device)).cpu()
        want = torch.zeros(2, len(halves), dtype=torch.int8)
        want[0] = (halves * (one / out_scale)).clamp(-127, 127).round().to(torch.int8)
        assert_same(got, want, f"out_scale {scale}")
    refuses("out_scale", lambda: call(device, given, codes, (8, False, -1), out_dtype=torch.int8))
    refuses("int8", lambda: call(device, given, codes, (8, False, -1), out_scale=one))


@check
def gemm_refusals(device):
    """A multiplier matrix of another shape, sizes that do not exist, four_level without its sums."""
    from dqkernels.kernels import gemm

    given, codes = operands(1, 2, 16, 128, (4, False, 64))
    for wrong in (given["group_mult"][:, :1], given["group_mult"].int()):
        changed = functools.partial(call, device, given | {"group_mult": wrong}, codes, (4, False, 64))
        refuses("group_mult must be uint8", changed)
    refuses("group_size", lambda: call(device, given, codes, (4, False, 16)))
    refuses("group_size", lambda: call(device, given | {"group_mult": None}, codes, (4, False, 64)))
    refuses("group_size", lambda: call(device, given, codes, (8, False, 64)))
    q, scale = given["xq"].to(device), given["act_scale"].to(device)
    refuses("row_sum", lambda: gemm.qgemm(q, scale, None, pack(codes, 2, device), scale[:1], 2, True, 16))


@check
def gemm_choice(device):
    """The heuristic: a full machine is not split, an idle one is, never past 8 or below four steps each."""
    from dqkernels.kernels import tiles

    assert tiles.multiprocessors(torch.device("cpu")) == 108
    for arch, bits, group, sms in itertools.product(("sm80", "sm90"), (2, 4, 8), (-1, 64), (1, 40, 108, 132, 160)):
        if bits == 8 and group != -1:
            continue
        for m, n, k in itertools.product((1, 16, 64, 65, 256, 257, 4096), (16, 768, 50265), (16, 768, 4096, 65536)):
            tile, split = tiles.choose(m, n, k, bits, group, arch, sms)
            blocks, steps = tiles.count(m, n, tile), -(-k // tile.block_k)
            assert tile in tiles.table(arch, bits, group).values() and 1 <= split <= 8
            assert split == 1 or (m <= 256 and split * blocks <= 2 * sms and steps // split >= 4)
    assert tiles.choose(1, 768, 16384, 4, -1, "sm80", 108)[1] == 8
    # And the launcher asks it: 3 blocks on 108 multiprocessors share 16 steps.
    given, codes = operands(2, 3, 130, 4096, (4, False, -1))
    allocated = []
    with memory_from(lambda tensor: allocated.append(tensor.dtype) or tensor):
        got = call(device, given, codes, (4, False, -1), tile=None)
    assert torch.int32 in allocated, "not split"
    assert_same(got, torch.from_numpy(expected(given, codes, (4, False, -1))), "the heuristic's choice")
    assert tiles.family(torch.device("cpu")) == "sm80"


@check
def groups_through_the_backend(device):
    """backends/triton.py passes multipliers on, and leaves the row sums to the kernel; equal to the reference."""
    from dqkernels import qmath, reference
    from dqkernels.backends import triton as backend

    g = torch.Generator().manual_seed(8)
    for bits, four_level, group_size in FORMS[2::3]:
        if group_size == -1:
            continue
        given, codes = operands(3, 4, 20, 150, (bits, four_level, group_size), bias=torch.float32)
        x = torch.randn(2, 2, 150, generator=g)
        weight = (pack(codes, bits, "cpu"), given["weight_scale"], given["group_mult"], given["bias"], None)
        facts = {"bits": bits, "four_level": four_level, "group_size": group_size, "out_features": 20,
                 "activation": "none", "out_dtype": torch.float16}  # fmt: skip
        spec = qmath.quantize_activation(x, "per_token", 2.5, None, four_level)
        want = reference.qgemm(*spec, *weight, **facts)
        there = [None if t is None else t.to(device) for t in weight]
        quantizer = {"act_mode": "per_token", "act_clip": 2.5, "act_scale": None}
        assert_same(backend.qlinear(x.to(device), *there, **facts, **quantizer), want, f"qlinear {facts}")
        q, scale = spec[0].to(device), spec[1].to(device)
        assert_same(backend.qgemm(q, scale, None, *there, **facts), want, f"qgemm {facts}")


if __name__ == "__main__":
    main(CHECKS)
