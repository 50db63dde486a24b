"""The CUDA kernels as machine code for sm_80 and sm_90a (others: TEST_CUDA_SASS_ARCHS), compiled without a GPU.

What it guards is what the simulator cannot see: spills, the width of the weights' loads, unpacking that costs more
than a shift and a mask, loads which ptxas moves behind the wait for the previous kernel, and code that is compiled
into a kernel more often than it need be.
"""

import itertools
import os

import cuda_sass
import pytest

ARCHS = os.environ.get("TEST_CUDA_SASS_ARCHS", "80 90a").split()
TILES = (1, 2, 4, 8)
# (bits, bytes a lane loads, groups): the kernels there are, each for 1, 2, 4 and 8 tiles of tokens.
WIDTHS = [(2, 16, False), (2, 8, True), (4, 16, False), (4, 16, True), (4, 8, True), (8, 16, False)]
# Registers for 1, 2, 4 and 8 tiles: what nvcc 13.0 needs on sm_80 or sm_90a, whichever is more, and a little room.
# Up to 128 two blocks of 256 threads share an SM.
REGISTERS = {
    (2, 16, False): (128, 128, 176, 200),
    (2, 8, True): (172, 176, 184, 220),
    (4, 16, False): (124, 128, 136, 168),
    (4, 16, True): (168, 176, 168, 204),
    (4, 8, True): (152, 160, 144, 176),
    (8, 16, False): (124, 128, 148, 192),
}
# Instructions of the loop over K, likewise: 4 segments of K with up to 4 tiles, 2 with 8.
LOOP = {
    (2, 16, False): (448, 558, 758, 748),
    (2, 8, True): (714, 968, 1448, 1400),
    (4, 16, False): (276, 352, 518, 416),
    (4, 16, True): (508, 676, 1032, 876),
    (4, 8, True): (462, 614, 940, 798),
    (8, 16, False): (168, 230, 362, 356),
}
QUANTIZER_REGISTERS = 48
# What an architecture that the tables were not made for gets besides.
OTHER_REGISTERS, OTHER_LOOP, OTHER_SHIFTS = 24, 1.25, 3


@pytest.fixture(scope="module")
def kernels():
    why = cuda_sass.missing()
    if why:
        pytest.skip(why)
    return cuda_sass.compile_all(ARCHS)


class Skinny:
    """What the sizes of one kernel say of its code (csrc/cuda/skinny.cuh)."""

    def __init__(self, bits, size, groups, tiles, arch):
        self.bits, self.size, self.groups, self.tiles, self.arch = bits, size, groups, tiles, arch
        self.name = f"skinny W{bits} {size}B {tiles} tiles" + " groups" * groups + f" sm_{arch}"
        self.depth = 2 if tiles > 4 else 4  # segments in flight, and bodies of the unrolled loop
        self.planes = 8 // bits
        self.fragments = self.depth * self.planes * (size // 8)  # 16 x 32 weights each
        self.two_blocks = tiles <= 2 and not groups

    @property
    def capability(self):
        return int("".join(filter(str.isdigit, self.arch)))


SKINNY = [Skinny(*width, tiles, arch) for arch in ARCHS for width, tiles in itertools.product(WIDTHS, TILES)]


def check(kernels, judge):
    """All that `judge(skinny, counts)` complains of, in one message."""
    said = [f"{kernel.name}: {text}" for kernel in SKINNY for text in [judge(kernel, kernels[kernel.name])] if text]
    assert not said, "\n".join(said)


def test_every_kernel_was_compiled(kernels):
    """A new instantiation needs its budget here."""
    quantizers = {
        f"{name} type{dtype} {kind} sm_{arch}"
        for name in ("quantize_rows_kernel", "row_amax_kernel")
        for dtype, kind, arch in itertools.product(range(3), ("vector", "scalar"), ARCHS)
    }
    quantizers |= {f"spread_max_kernel sm_{arch}" for arch in ARCHS}
    assert set(kernels) == {kernel.name for kernel in SKINNY} | quantizers


def test_nothing_spills(kernels):
    bad = [name for name, found in kernels.items() if found["spills"] or found["stack"] or found["local"]]
    assert not bad, bad


def test_registers(kernels):
    def judge(kernel, found):
        most = REGISTERS[kernel.bits, kernel.size, kernel.groups][TILES.index(kernel.tiles)]
        if kernel.arch not in ("80", "90a"):
            most = 128 if kernel.two_blocks else min(255, most + OTHER_REGISTERS)
        return found["registers"] > most and f"{found['registers']} registers, {most} are granted"

    check(kernels, judge)
    for name, found in kernels.items():
        if not name.startswith("skinny"):
            assert found["registers"] <= QUANTIZER_REGISTERS, name


def test_two_blocks_share_an_sm(kernels):
    assert all(most <= 128 for width, row in REGISTERS.items() if not width[2] for most in row[:2])


def test_tensor_cores_do_the_work_once(kernels):
    """One mma per fragment and tile, all of them in the loop."""

    def judge(kernel, found):
        wanted = kernel.fragments * kernel.tiles
        got = found["all"]["IMMA"], found["loop"]["IMMA"]
        return got != (wanted, wanted) and f"IMMA {got} in all and in the loop, wanted {wanted}"

    check(kernels, judge)


def test_weights_are_loaded_whole(kernels):
    """Two rows per segment, 16 bytes per lane (8 where a group is too short), past L1; as many before the loop."""

    def judge(kernel, found):
        width = str(8 * kernel.size)
        for loads, wanted in (
            (found["weight_loads"], 4 * kernel.depth),
            (found["loop_weight_loads"], 2 * kernel.depth),
        ):
            if sum(loads.values()) != wanted or any(width not in opcode.split(".") for opcode in loads):
                return f"{dict(loads)}, wanted {wanted} of {width} bits"

    check(kernels, judge)


def test_unpacking_costs_a_mask_and_a_shift(kernels):
    """Per fragment 4 LOP3 that mask (and set the bit of four_level), and 4 shifts but for the plane on top: 3 at
    2 bits, 2 at 4. Beside them a few per segment for addresses, and for groups one shift per sum and plane."""

    def judge(kernel, found):
        loop = found["loop"]
        masks = 4 * kernel.fragments if kernel.bits < 8 else 0
        shifts = 4 * kernel.fragments * (kernel.planes - 1) // kernel.planes
        if kernel.groups:
            shifts += 4 * kernel.tiles * kernel.planes * kernel.depth
        if found["loop_masks"] != masks:
            return f"{found['loop_masks']} LOP3 that unpack, wanted {masks}"
        spare = 12 if kernel.groups else {1: 2, 2: 3, 4: 5, 8: 7}[kernel.tiles]
        spare += 0 if kernel.arch in ("80", "90a") else OTHER_SHIFTS
        addresses = {
            "LOP3": (loop["LOP3"] - masks, 8 if kernel.size == 8 else 5),
            "shifts": (found["loop_shifts"] - shifts, spare),
            "PRMT": (loop["PRMT"], 1 if (kernel.bits, kernel.size) == (4, 8) else 0),
        }
        for what, (got, most) in addresses.items():
            if not 0 <= got <= most * kernel.depth:
                return f"{got} {what} besides unpacking, {most} per segment are granted ({kernel.depth} segments)"

    check(kernels, judge)


def test_the_loop_is_no_longer_than_it_was(kernels):
    """Whatever else an unpacking may cost: an addition, a move, an address worked out twice."""

    def judge(kernel, found):
        most = LOOP[kernel.bits, kernel.size, kernel.groups][TILES.index(kernel.tiles)]
        if kernel.arch not in ("80", "90a"):
            most = int(most * OTHER_LOOP)
        return found["loop_instructions"] > most and f"{found['loop_instructions']} in the loop, {most} are granted"

    check(kernels, judge)


def test_the_loop_holds_nothing_else(kernels):
    """Loads of weights and, for groups, of one byte per row and plane; activations once per plane and tile from
    shared memory. No conversion, no division, no barrier, and on sm_90 no search for the block's shared memory."""
    foreign = ("I2F", "I2FP", "F2I", "MUFU", "FMUL", "FADD", "FFMA", "BAR", "LDGSTS", "STS", "STG", "LD", "ST", "S2R")

    def judge(kernel, found):
        loop = found["loop"]
        stray = [name for name in foreign if loop[name]]
        if stray:
            return f"{stray} in the loop"
        bytes_ = 2 * kernel.planes * kernel.depth if kernel.groups else 0
        if loop["LDG"] != 2 * kernel.depth + bytes_:
            return f"{loop['LDG']} loads, wanted {2 * kernel.depth + bytes_}"
        if loop["LDS"] != kernel.tiles * kernel.planes * kernel.depth:
            return f"{loop['LDS']} loads of activations, wanted {kernel.tiles * kernel.planes * kernel.depth}"

    check(kernels, judge)


def test_filling_is_compiled_once(kernels):
    """One place copies int8 rows; float rows have theirs in the kernels of up to 16 tokens. At five places, one per
    slot of the ring, a kernel had 8000 instructions, which is all of an SM's instruction cache."""

    def judge(kernel, found):
        most = (5600 if kernel.groups else 4800) if kernel.tiles <= 2 else (4000 if kernel.groups else 2700)
        if found["all"]["LDGSTS"] != 1:
            return f"{found['all']['LDGSTS']} LDGSTS"
        return found["instructions"] > most and f"{found['instructions']} instructions, {most} are granted"

    check(kernels, judge)


def test_weights_come_before_the_wait(kernels):
    """Programmatic dependent launch: the next kernel is let in, a ring of weights (and multipliers) asked for, and
    only then the previous kernel waited for; nothing else of global memory is touched before."""

    def judge(kernel, found):
        if kernel.capability < 90:
            return (found["waits"] or found["releases"]) and "sm_80 has no dependent launch"
        bytes_ = 2 * kernel.planes * kernel.depth if kernel.groups else 0
        if found["waits"] != 1 or len(found["releases"]) != 1 or found["releases"][0] > found["wait"]:
            return f"{found['waits']} ACQBULK, PREEXIT at {found['releases']}"
        got = found["weights_before_wait"], found["bytes_before_wait"], found["loads_before_wait"]
        wanted = 2 * kernel.depth, bytes_, 2 * kernel.depth + bytes_
        return got != wanted and f"(weights, multipliers, all) loaded before the wait {got}, wanted {wanted}"

    check(kernels, judge)


def test_float_steps_are_not_fused(kernels):
    """In the PTX every product and sum names its rounding, which forbids ptxas to fuse them, and the only fma are the
    seven of erff. In machine code those and the ones of IEEE quotients and roots are left: their number is pinned."""
    erff, failures = 7, []
    for name, found in kernels.items():
        skinny = name.startswith("skinny")
        fused = sum(count for opcode, count in found["ptx"].items() if opcode.startswith("fma"))
        loose = [op for op in found["ptx"] if op.startswith(("mul", "add", "div", "sqrt")) and ".rn" not in op]
        quotients = found["ptx"]["div.rn.f32"] + found["ptx"]["sqrt.rn.f32"]
        if fused != (erff if skinny else 0) or loose or any("f64" in op for op in found["ptx"]):
            failures.append(f"{name}: {fused} fma, {loose}")
        elif found["fused"] > fused + 6 * quotients + 10:  # ptxas: 5 or 6 per quotient, and one slow path for all
            failures.append(f"{name}: {found['fused']} FFMA for {quotients} quotients")
    assert not failures, "\n".join(failures)


def test_quantizers_take_16_bytes(kernels):
    for name, found in kernels.items():
        if "vector" in name.split():
            assert found["wide_loads"], name
