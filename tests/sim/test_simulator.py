"""The simulator itself: mistakes that it must notice beside the same kernels without them, and what instructions
compute, against numpy.
"""

import re

import harness
import numpy as np
import pytest
from harness import Case, Report, changed, difference, given, run_cases, wanted

EIGHT = range(8)
THREADS = 64
REFUSED, TOO_MUCH_SHARED = (harness.statuses().index(name) for name in ("cuda_failed", "cuda_shared_memory"))

X = np.random.default_rng(7).integers(-(2**20), 2**20, THREADS).astype(np.int32)
LANES = np.arange(THREADS)
QUADS = X.view(np.int32).reshape(16, 4)[LANES % 4].sum(1, dtype=np.int32)


def sums_of_warps():
    """out[0]: the counter, back at 0; out[1:33]: x summed over warps and 3 blocks; out[33:]: the last block's copy."""
    folded = 3 * (X[:32] + X[32:])
    return np.concatenate([[0], folded, folded[:31]]).astype(np.int32)


def only(first, second):
    out = np.zeros(THREADS, np.int32)
    out[:2] = first, second
    return out


# The sanitizers' words and the simulator's own.
HEAP = r"AddressSanitizer: heap-buffer-overflow"
POISONED = r"AddressSanitizer: use-after-poison"
BOUND = r"runtime error: index 64 out of bounds for type 'int \[64\]'"
HERE = r"\(\S*self_test\.cpp:\d+\)"
WRONG = None  # no report: a wrong result, or one that depends on the seed

# kernel: (what the right one writes, the report that the wrong one must give under every seed)
PAIRS = {
    "global_read": (X, HEAP),
    "global_write": (X, HEAP),
    "shared_neighbour": (X, POISONED),
    "shared_bound": (X, BOUND),
    "dynamic_end": (X, POISONED),
    "uninitialised": (X, WRONG),
    "misaligned_weights": (QUADS, rf"misaligned: thread \d+ gives load_weights16 \S+, which is not on 16 bytes {HERE}"),
    "misaligned_vector": (QUADS, r"runtime error: (load|reference binding|member access).* misaligned address"),
    "weights_end": (X.reshape(32, 2).sum(1, dtype=np.int32)[LANES % 32], rf"load_weights8 {HERE} reaches outside"),
    "weights_from_shared": (np.full(THREADS, X[0]), rf"load_weights16 an address that is not in global memory {HERE}"),
    "too_much_shared": (X, r"takes 49184 bytes of shared memory, 49152 is the limit"),
    "barrier_before": (X[::-1], WRONG),
    "shuffle_for_barrier": (X[::-1] ^ X[LANES ^ 1], WRONG),
    "barrier_after": (3 * X[::-1] + 3, WRONG),
    "skipped_barrier": (X, rf"waits at __syncthreads {HERE}, thread \d+ at __syncthreads {HERE}"),
    "early_return": (X, rf"waits at __syncthreads {HERE}, thread 40 has returned from the kernel"),
    "racing_store": (np.full(THREADS, X[0]), WRONG),
    "racing_blocks": (3 * X, WRONG),
    "last_block": (sums_of_warps(), WRONG),
    "waits_for_block": (only(2 * THREADS, X[0]), rf"deadlock: thread \d+ polls for ever, .* {HERE}"),
    "different_warp_operations": (
        X + X[LANES ^ 1],
        rf"waits at (__shfl_xor_sync|__ballot_sync) {HERE}, thread \d+ at (__shfl_xor_sync|__ballot_sync) {HERE}",
    ),
    "lane_at_barrier": (X[LANES ^ 3], rf"waits at __shfl_xor_sync {HERE}, thread 37 at __syncthreads {HERE}"),
    "not_in_mask": (X[LANES ^ 1], rf"is not in its own mask 0000ffff: __shfl_xor_sync {HERE}"),
    "missing_syncwarp": (X[LANES ^ 1], WRONG),
    "mma_without_a_lane": (X + 4, rf"waits at mma_m16n8k32 {HERE}, thread 7 has returned from the kernel"),
    "ldmatrix_operand": (X[LANES % 32], rf"misaligned: thread \d+ gives ldmatrix_x4 \S+, .* {HERE}"),
    "ldmatrix_from_global": (X[LANES % 4], rf"ldmatrix_x4 an address that is not in shared memory {HERE}"),
    "missing_wait": (X, WRONG),
    "wait_too_short": (2 * X, WRONG),
    "missing_commit": (X, WRONG),
    "never_waited": (X, rf"returns, and nobody has waited for its copy_async16 {HERE}"),
    "copy_over_reader": (10 * X[::-1], WRONG),
    "copy_past_row": (X, rf"copy_async16 {HERE} reaches outside"),
}


@pytest.fixture
def program(sim_program):
    return sim_program("self_test.cpp")


def arguments():
    return given(X), changed(np.zeros(THREADS, np.int32))


@pytest.mark.parametrize("name", PAIRS)
def test_the_right_kernel_passes(program, name):
    expected = np.asarray(PAIRS[name][0], np.int32)
    assert run_cases(program, [Case(name, name, [0], arguments(), [expected])], EIGHT) == 1


@pytest.mark.parametrize("name", [name for name, (_, report) in PAIRS.items() if report is not WRONG])
def test_the_mistake_is_reported(program, name):
    for seed in (0, 1):
        with pytest.raises(Report) as said:
            program.call(name, [1], arguments(), seed)
        assert re.search(PAIRS[name][1], str(said.value)), f"seed {seed} says:\n{said.value}"


@pytest.mark.parametrize("name", [name for name, (_, report) in PAIRS.items() if report is WRONG])
def test_the_mistake_gives_a_wrong_result(program, name):
    """Under one of a schedule and its mirror image, whichever two they are."""
    expected = np.asarray(PAIRS[name][0], np.int32)
    for pair in (0, 2, 4, 6):
        results = [program.call(name, [1], arguments(), seed)[1][0] for seed in (pair, pair + 1)]
        assert any(difference(result, expected) for result in results), f"seeds {pair} and {pair + 1} see nothing"


def test_a_report_names_the_line_of_the_kernel(program):
    with pytest.raises(Report) as said:
        program.call("skipped_barrier", [1], arguments(), 0)
    found = re.findall(r"__syncthreads \(\S*self_test\.cpp:(\d+)\)", str(said.value))
    source = (program.source_folder / "self_test.cpp").read_text().splitlines()
    assert len(set(found)) == 2 and all("__syncthreads();" in source[int(line) - 1] for line in found)


def test_the_program_answers_again_after_a_report(program):
    with pytest.raises(Report, match="exit code"):
        program.call("global_read", [1], arguments(), 0)
    run_cases(program, [Case("global_read", "global_read", [0], arguments(), [X])])


# ---------------------------------------------------------------------------------------------- instructions


def fragments(matrix, groups, ks):
    """[32 lanes, registers] words of an int8 matrix: register r of lane 4g + t is row groups(g, r), k = 4t + ks(r)."""
    words = np.zeros((32, len(ks)), np.uint32)
    for lane in range(32):
        for r, k in enumerate(ks):
            at = 4 * (lane % 4) + k
            words[lane, r] = np.ascontiguousarray(matrix[groups(lane // 4, r), at : at + 4]).view(np.uint32)[0]
    return words


def test_mma(program):
    """Against numpy's product; the layouts are PTX's formulas."""
    rng = np.random.default_rng(0)
    cases = []
    for name, draw in {
        "random": lambda shape: rng.integers(-128, 128, shape),
        "lowest": lambda shape: np.full(shape, -128),
        "one of each": lambda shape: np.arange(np.prod(shape)).reshape(shape) % 251 - 125,
    }.items():
        a, b = draw((16, 32)).astype(np.int8), draw((8, 32)).astype(np.int8)  # b: columns, k adjacent
        c = rng.integers(-(2**31), 2**31, (16, 8)).astype(np.int64)
        product = (c + a.astype(np.int64) @ b.astype(np.int64).T + 2**31) % 2**32 - 2**31  # it wraps

        def of_lanes(matrix):
            g, t = LANES[:32, None] // 4, LANES[:32, None] % 4
            i = np.arange(4)
            return matrix[g + i // 2 * 8, 2 * t + i % 2].astype(np.int32)

        registers_a = fragments(a, lambda g, r: g + r % 2 * 8, (0, 0, 16, 16))
        registers_b = fragments(b, lambda g, r: g, (0, 16))
        buffers = [given(registers_a), given(registers_b), changed(of_lanes(c))]
        cases.append(Case(f"mma, {name}", "mma", [], buffers, [of_lanes(product)]))
    assert run_cases(program, cases) == 3


def test_ldmatrix(program):
    tile = np.random.default_rng(1).integers(-(2**31), 2**31, (4, 8, 4)).astype(np.int32)  # matrix, row, word
    expected = tile.transpose(1, 2, 0).reshape(32, 4).view(np.uint32)
    run_cases(program, [Case("ldmatrix", "ldmatrix", [], [given(tile), wanted((32, 4), np.uint32)], [expected])])


def test_dot4(program):
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-128, 128, (2, 500, 4))).astype(np.int8)
    a[0], b[0] = -128, -128
    c = rng.integers(-(2**31), 2**31, 500)
    expected = ((c + (a.astype(np.int64) * b).sum(1) + 2**31) % 2**32 - 2**31).astype(np.int32)
    buffers = [given(a), given(b), changed(c.astype(np.int32))]
    run_cases(program, [Case("dot4", "dot4", [500], buffers, [expected])])


def test_copies_of_every_length_fill_with_zeros(program):
    x = np.random.default_rng(3).integers(1, 256, (17, 16)).astype(np.uint8)
    expected = np.where(np.arange(16) < np.arange(17)[:, None], x, 0).astype(np.uint8)
    run_cases(program, [Case("copy", "copy", [], [given(x), wanted((17, 16), np.uint8)], [expected])])


def warp_oracle(x, operand, width):
    """Lane by lane from the CUDA programming guide; x: [blocks, threads]."""
    out, threads = np.zeros((*x.shape, 8), np.int32), x.shape[1]
    for block, row in enumerate(x):
        for thread in range(threads):
            first = thread // 32 * 32
            warp = row[first : min(first + 32, threads)]
            lane, segment = thread - first, (thread - first) // width * width
            sources = (
                segment + operand % width,
                lane - operand if lane - operand >= segment else lane,
                lane + operand if lane + operand < segment + width else lane,
                lane ^ operand if (lane ^ operand) < segment + width else lane,
            )
            out[block, thread, :4] = [warp[s] for s in sources]
            ballot = sum(1 << i for i, value in enumerate(warp) if value % 3 == 0)
            out[block, thread, 4] = np.uint32(ballot).astype(np.int32)
            out[block, thread, 5:] = [operand in warp, (warp >= 0).all(), (row % 64 == operand).any()]
    return out


@pytest.mark.parametrize(
    "threads, operands",  # operand and width; in a warp of 6 lanes only those whose sources are there
    [(32, "1/32 16/32 5/16 3/4"), (64, "1/2 0/1 31/32"), (70, "1/2 0/1"), (1024, "7/32")],
)
def test_shuffles_and_votes(program, threads, operands):
    rng = np.random.default_rng(threads)
    cases = []
    for operand, width in (map(int, words.split("/")) for words in operands.split()):
        x = rng.integers(0, 2**20, (2, threads)).astype(np.int32)
        x[0, -1] -= 2**21 if operand == 1 else 0
        x[1, 0] = operand
        scalars = [2, 1, 1, threads, 0, operand, width]
        buffers = [given(x), wanted((2, threads, 8), np.int32)]
        cases.append(Case(f"warp {operand}/{width}", "warp", scalars, buffers, [warp_oracle(x, operand, width)]))
    run_cases(program, cases)


def test_a_lane_that_is_not_there_sends_junk(program):
    """Undefined in CUDA: here it differs from seed to seed, so that no result can rest on it."""
    x = np.zeros((1, 6), np.int32)
    arguments = [given(x), wanted((1, 6, 8), np.int32)]
    seen = {int(program.call("warp", [1, 1, 1, 6, 0, 8, 32], arguments, seed)[1][0][0, 0, 0]) for seed in EIGHT}
    assert len(seen) == 8 and 0 not in seen


# ------------------------------------------------------------------------------------------------- the door


def test_every_block_runs_once(program):
    grid, threads = (3, 2, 4), 33
    z, y, x, thread = np.ogrid[: grid[2], : grid[1], : grid[0], :threads]
    expected = (1000000 * z + 10000 * y + 1000 * x + thread).astype(np.int32)
    case = Case("geometry", "geometry", [*grid, threads, 0], [wanted(expected.shape, np.int32)], [expected])
    run_cases(program, [case], EIGHT)


def test_an_element_that_nobody_writes_is_no_zero(program):
    """Outputs start as 0xA5 bytes: a kernel that forgets a zero is found."""
    expected = np.array([1, 0xA5A5A5A5, 0xA5A5A5A5], np.uint32)
    run_cases(program, [Case("two of three", "nothing", [1, 1, 1, 1, 0], [wanted(3, np.uint32)], [expected])])


@pytest.mark.parametrize(
    "shape, status",
    [
        ((0, 1, 1, 32, 0), REFUSED),
        ((1, 0, 1, 32, 0), REFUSED),
        ((1, 1, 0, 32, 0), REFUSED),
        ((1, 65536, 1, 1, 0), REFUSED),
        ((1, 1, 65536, 1, 0), REFUSED),
        ((1, 1, 1, 0, 0), REFUSED),
        ((1, 1, 1, 1025, 0), REFUSED),
        ((1, 1, 1, 32, 48 * 1024 + 1), TOO_MUCH_SHARED),
        ((1, 1, 1, 1024, 0), 0),
        ((1, 1, 1, 1, 48 * 1024), 0),
        ((1, 1, 1, 33, 0), 0),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_what_cuda_refuses_is_refused(program, shape, status):
    ran = np.array([1 if status == 0 else 0], np.int32)
    run_cases(program, [Case("nothing", "nothing", shape, [changed(np.zeros(1, np.int32))], [ran], status)])
