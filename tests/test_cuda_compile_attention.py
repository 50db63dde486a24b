"""CUDA decode attention as machine code for sm_80 and sm_90a (others: TEST_CUDA_SASS_ARCHS), compiled without a GPU.

What it guards is what the simulator cannot see: spills, registers that would keep a block of 16 warps off an SM, loads
of the caches narrower than they could be, work done twice, and code that no longer fits beside another kernel's.
"""

import itertools
from typing import NamedTuple

import cuda_sass
import pytest
from test_cuda_compile import ARCHS

#: Registers and instructions: what nvcc 13.0 needs on sm_80 or sm_90a, whichever is more, and a little room.
REGISTERS = {
    (64, 1, "keep"): 128, (64, 2, "keep"): 148, (128, 1, "keep"): 152, (128, 2, "keep"): 196,
    (64, 1, "redo"): 128, (64, 2, "redo"): 156, (128, 1, "redo"): 144, (128, 2, "redo"): 196,
    (128, 1, "redo words"): 176,
}  # fmt: skip
INSTRUCTIONS = {
    (64, 1, "keep"): 2680, (64, 2, "keep"): 3480, (128, 1, "keep"): 2940, (128, 2, "keep"): 3840,
    (64, 1, "redo"): 3400, (64, 2, "redo"): 4320, (128, 1, "redo"): 3880, (128, 2, "redo"): 4880,
    (128, 1, "redo words"): 4160,
}  # fmt: skip
#: What an architecture that the tables were not made for gets besides: sm_100 needs this much of each.
OTHER_REGISTERS, OTHER_INSTRUCTIONS, OTHER_PERMUTES = 48, 1.35, 6


class Kernel(NamedTuple):
    dims: int
    tiles: int
    form: str
    arch: str

    @property
    def name(self):
        return f"attention {self.dims} {self.tiles} tiles {self.form} sm_{self.arch}"

    @property
    def key(self):
        return self.dims, self.tiles, self.form

    @property
    def other(self):
        return self.arch not in ("80", "90a")

    @property
    def keep(self):
        return self.form == "keep"

    @property
    def segments(self):
        return self.dims // 64


KERNELS = [Kernel(*key, arch) for arch, key in itertools.product(ARCHS, INSTRUCTIONS)]


@pytest.fixture(scope="module")
def kernels():
    why = cuda_sass.missing()
    if why:
        pytest.skip(why)
    return cuda_sass.compile_all(ARCHS, cuda_sass.ATTENTION_FILES)


def check(kernels, judge):
    """All that `judge(kernel, counts)` complains of, in one message."""
    said = [f"{kernel.name}: {text}" for kernel in KERNELS for text in [judge(kernel, kernels[kernel.name])] if text]
    assert not said, "\n".join(said)


def test_every_kernel_was_compiled(kernels):
    """A new instantiation needs its budget here."""
    assert set(kernels) == {kernel.name for kernel in KERNELS} | {f"attention_amax_kernel sm_{arch}" for arch in ARCHS}


def test_nothing_spills(kernels):
    bad = [name for name, found in kernels.items() if found["spills"] or found["stack"] or found["local"]]
    assert not bad, bad


def test_registers(kernels):
    """Of 65,536: a block of 16 warps takes them all at 128, two blocks of 8 warps likewise; no arch gets more there."""

    def judge(kernel, found):
        most = REGISTERS[kernel.key]
        if kernel.other and (kernel.dims, kernel.tiles) != (64, 1):
            most += OTHER_REGISTERS
        return found["registers"] > most and f"{found['registers']} registers, {most} are granted"

    check(kernels, judge)


def test_both_products_run_on_tensor_cores(kernels):
    """32 keys: two halves of two steps per 64 dimensions for the scores, once more where they are worked out twice; and
    four 16 x 32 pieces of V per 64 dimensions."""

    def judge(kernel, found):
        wanted = kernel.tiles * kernel.segments * (4 * (1 if kernel.keep else 2) + 4)
        return found["all"]["IMMA"] != wanted and f"{found['all']['IMMA']} IMMA, wanted {wanted}"

    check(kernels, judge)


def test_caches_are_loaded_whole(kernels):
    """K by 16 bytes a lane, four rows of every tile; V by 8, eight rows. Before the loop and in it: K two tiles ahead
    where there are registers, V one tile where scores are kept."""

    def judge(kernel, found):
        if "words" in kernel.form:
            return found["weight_loads"] and f"{dict(found['weight_loads'])} of rows that may not be on 16 bytes"
        wide = sum(n for opcode, n in found["weight_loads"].items() if opcode.endswith("128"))
        half = sum(n for opcode, n in found["weight_loads"].items() if opcode.endswith("64"))
        tiles = 3 if not kernel.keep or kernel.dims == 64 else 2
        wanted = 4 * kernel.segments * tiles, 8 * kernel.segments * (2 if kernel.keep else 1)
        return (wide, half) != wanted and f"{(wide, half)} loads of 16 and 8 bytes, wanted {wanted}"

    check(kernels, judge)


def test_transposing_costs_half_an_instruction_per_byte(kernels):
    """8 PRMT per 4 x 4 bytes of V, 3 per four codes; a few more where ptxas likes them better than a shift."""

    def judge(kernel, found):
        most = 32 * kernel.segments + 6 * kernel.tiles + 10
        least = 32 * kernel.segments
        if kernel.keep and kernel.tiles == 2:
            most += 32 * kernel.segments  # ptxas makes two copies of the loop, one for each number of tiles
        if kernel.other:
            most += OTHER_PERMUTES
        got = found["all"]["PRMT"]
        return not least <= got <= most and f"{got} PRMT, wanted {least} to {most}"

    check(kernels, judge)


def test_integers_meet_by_atomics_and_floats_by_none(kernels):
    """A warp adds 16 sums of a tile of slots per 64 dimensions and one of e; arrivals are counted where keys may be
    split."""

    def judge(kernel, found):
        names = found["all"]
        shared = kernel.tiles * (16 * kernel.segments + 1)
        got = names["ATOMS"], names["ATOMG"] + names["ATOM"], names["RED"]
        wanted = shared, 0 if kernel.keep else 1, 0
        return got != wanted and f"(ATOMS, ATOMG, RED) {got}, wanted {wanted}"

    check(kernels, judge)


def test_a_share_takes_one_exponential(kernels):
    """8 of a tile of slots; the others are reciprocals inside quotients."""

    def judge(kernel, found):
        exps = 8 * kernel.tiles
        quotients = found["ptx"]["div.rn.f32"]
        got = found["all"]["MUFU"]
        return not exps + quotients <= got <= exps + 2 * quotients + 2 and f"{got} MUFU for {quotients} quotients"

    check(kernels, judge)


def test_float_steps_are_not_fused(kernels):
    """In the PTX every product and sum names its rounding and nothing is fused; in machine code only quotients are."""
    failures = []
    for name, found in kernels.items():
        fused = sum(count for opcode, count in found["ptx"].items() if opcode.startswith("fma"))
        loose = [op for op in found["ptx"] if op.startswith(("mul", "add", "div", "sqrt")) and ".rn" not in op]
        quotients = found["ptx"]["div.rn.f32"]
        if fused or loose or any("f64" in op for op in found["ptx"]):
            failures.append(f"{name}: {fused} fma, {loose}")
        elif found["fused"] > 6 * quotients + 10:  # ptxas: 5 or 6 per quotient, and one slow path for all
            failures.append(f"{name}: {found['fused']} FFMA for {quotients} quotients")
    assert not failures, "\n".join(failures)


def test_the_code_is_no_longer_than_it_was(kernels):
    """It runs once a launch, for a few microseconds: what is not there need not be fetched."""

    def judge(kernel, found):
        most = INSTRUCTIONS[kernel.key]
        if kernel.other:
            most = int(most * OTHER_INSTRUCTIONS)
        return found["instructions"] > most and f"{found['instructions']} instructions, {most} are granted"

    check(kernels, judge)
