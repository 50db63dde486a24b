"""csrc/cuda/attention_decode.cuh on the simulator, through the host API that the binding calls: the oracle's result,
the same bits under every schedule and however it is cut up."""

from __future__ import annotations

import attention_cases as attention
import harness
import numpy as np
import pytest
import torch

SOURCES = ("attention_host.cpp", "csrc/cuda/attention_decode.cpp", "csrc/cuda/attention_decode.cu")
CASES = attention.cases()


@pytest.fixture(scope="session")
def program(sim_program):
    return sim_program(*SOURCES)


def same(a, b) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def run(program, case) -> torch.Tensor:
    built = attention.build(case)
    results = []
    for seed in harness.SEEDS:
        try:
            results.append(attention.launch(program, built, seed))
        except harness.Report as report:
            pytest.fail(f"{case.name}, seed {seed}:\n{report}", pytrace=False)
    attention.assert_right(built, results[0])
    assert all(same(other, results[0]) for other in results[1:]), f"{case.name}: the schedule shows"
    harness.PASSED.append(len(harness.SEEDS))
    return results[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_oracle_under_every_schedule(program, case):
    run(program, case)


def test_every_kernel_and_form_ran():
    """The covering rows reach each instance: 64 dimensions or 128, few slots or many, kept scores, redone ones, splits,
    and rows of words."""
    kinds = set()
    for case in CASES:
        mates = -(-case.rows // case.caches) if case.source in ("beams", "one", "lost") else 1
        vector = case.head_dim % 16 == 0 and case.aligned
        tiles = 1 if mates * case.queries <= 8 else 2
        form = case.form if case.form != "rule" or vector else "redo"
        kinds.add(((case.head_dim > 64) + 1, tiles, form.split()[0]) if vector else ("words", form.split()[0]))
    forms = [form for form in ("keep", "redo", "split")]
    wanted = {(segments, tiles, form) for segments in (1, 2) for tiles in (1, 2) for form in forms}
    assert kinds >= wanted | {("words", "redo"), ("words", "split")}, (wanted - kinds, kinds)


# ------------------------------------------------------------------------------------- the same bits, however cut up


CUTS = [
    *({"form": "keep", "warps": warps} for warps in (1, 5, 0)),
    *({"form": "redo", "warps": warps} for warps in (1, 3)),
    *({"form": f"split {splits}", "warps": warps} for splits, warps in ((2, 0), (3, 1), (5, 2))),
]


@pytest.mark.parametrize(
    "source, rows, queries, head_dim", [("none", 2, 1, 112), ("beams", 7, 3, 64), ("by key", 3, 2, 112)]
)
def test_no_cut_changes_a_bit(program, source, rows, queries, head_dim):
    facts = {"source": source, "caches": rows if source == "none" else 2, "lengths": "random", "spare": 9}
    facts |= {"bias": "heads", "causal": queries > 1, "dtype": "fp32"}
    results = []
    for cut in CUTS:
        built = attention.build(attention.plain(rows, 2, queries, 150, head_dim, **facts, **cut))
        results.append(attention.launch(program, built))
        attention.assert_right(built, results[-1])
        assert same(results[-1], results[0]), cut
    assert results[0].any()


def test_a_pass_of_fewer_slots_than_come(program):
    """Kept scores of 13 slots over 1,500 keys have no room: three passes by force; the rule works them out twice."""
    facts = {"source": "one", "caches": 1, "dtype": "fp32"}
    built = attention.build(attention.plain(13, 1, 1, 1500, 16, **facts))
    want = attention.launch(program, built)
    attention.assert_right(built, want)
    for form, warps in (("keep", 0), ("keep", 3), ("redo", 0)):
        built.case.form, built.case.warps = form, warps
        assert same(attention.launch(program, built), want), (form, warps)


def test_a_row_does_not_know_its_mates(program):
    """Alone, among rows that share its cache, and with its own copy of it: the same bits, whatever the others hold."""
    built = attention.build(attention.plain(9, 2, 1, 70, 64, source="beams", caches=2, lengths="random", dtype="fp32"))
    whole = attention.launch(program, built)
    o = built.operands
    for row in range(9):
        alone = attention.build(attention.plain(1, 2, 1, 70, 64, source="beams", caches=2, dtype="fp32"))
        alone.operands |= {name: o[name][row : row + 1] for name in ("q", "lengths", "source")}
        alone.operands |= {name: o[name] for name in ("k_cache", "k_scale", "v_cache", "v_scale")}
        assert same(attention.launch(program, alone), whole[row : row + 1]), row
    o["q"][3:] = float("nan")
    assert same(attention.launch(program, built)[:3], whole[:3]) and attention.launch(program, built)[3:].isnan().all()


@pytest.mark.parametrize("form, warps", [("keep", 1), ("keep", 3), ("redo", 2)])
def test_more_rows_than_a_block_has_lanes(program, form, warps):
    """Mates are found 32 rows a warp at a time, and each has its own place whatever stands between them."""
    facts = {"source": "beams", "caches": 3, "lengths": "random", "dtype": "fp32", "form": form, "warps": warps}
    built = attention.build(attention.plain(110, 1, 1, 20, 16, **facts))
    assert built.operands["source"].bincount().min() > 16, "two passes of slots"
    attention.assert_right(built, attention.launch(program, built))


@pytest.mark.parametrize("form", ["keep", "redo", "split 2"])
def test_lost_keys_spoil_who_sees_them(program, form):
    """By key: a source that is no cache makes NaN of the queries that see the key, and of no neighbour."""
    case = attention.plain(3, 2, 3, 70, 64, source="by key", caches=2, causal=True, dtype="fp32", form=form)
    built = attention.build(case)
    clean = attention.launch(program, built)
    for lost in (-1, 2, 1 << 30):
        built.operands["source"][1, 68] = lost
        got = attention.launch(program, built)
        assert got[1, :, 1:].isnan().all() and same(got[1, :, :1], clean[1, :, :1])
        assert same(got[[0, 2]], clean[[0, 2]])


def test_sums_at_the_end_of_int32(program):
    """131,071 keys of the largest codes and equal scores: int32 holds both sums, and no partial sum leaves it."""
    keys = 131071
    case = attention.plain(1, 1, 1, keys, 16, dtype="fp32")
    built = attention.build(attention.plain(1, 1, 1, 8, 16, dtype="fp32"))
    built.case = case
    o = built.operands
    for name in ("k_cache", "v_cache"):
        o[name] = torch.full((1, 1, keys, 16), -127, dtype=torch.int8)
    o["k_scale"], o["v_scale"] = torch.full((1, 1, keys), 0.5), torch.full((1, 1, keys), 0.25)
    o["lengths"] = torch.tensor([keys], dtype=torch.int32)
    total = np.float32(np.float32(0.25) * np.float32(-127 * 127 * keys)) / np.float32(127 * keys)
    assert 127 * 127 * keys < 1 << 31
    case.form = "split 7"
    assert attention.launch(program, built).flatten().tolist() == [float(total)] * 16


def test_caches_beyond_32_bits(program):
    """By key in caches that stand more than 4 GiB from the first: places count in keys, addresses in 64 bits."""
    built = attention.build(
        attention.plain(2, 2, 1, 40, 128, source="by key", caches=2, lengths="random", dtype="fp32")
    )
    want = attention.launch(program, built)
    scalars, given = attention.arguments(built)
    out = harness.wanted(tuple(want.shape), np.float32)
    status, (got,) = program.call("launch far caches", scalars, [*given, out, harness.ABSENT, harness.ABSENT], 0)
    assert harness.statuses()[status] == "ok"
    assert same(torch.from_numpy(np.array(got)), want) and want.any()


# ------------------------------------------------------------------------------------------------- refusals


def changed(**fields):
    """Scalars of a plain call with some of them changed, by their place in attention_host.cpp."""
    names = (
        "dtype rows heads queries head_dim caches capacity q0 q1 q2 aligned shared by_key bias_dtype b0 b1 b2 b3 "
        "causal softmax_scale mode clip form splits warps sms"
    ).split()
    scalars, _ = attention.arguments(attention.build(attention.plain(2, 1, 1, 70, 64)))
    for name, value in fields.items():
        scalars[names.index(name)] = value
    return scalars


REFUSED = [
    ({"head_dim": 132}, "bad_cuda_attention"),
    ({"head_dim": 66}, "bad_cuda_attention"),
    ({"head_dim": 0}, "bad_cuda_attention"),
    ({"capacity": 0}, "bad_cuda_attention"),
    ({"capacity": 131072}, "k_too_large"),
    ({"rows": -1}, "bad_cuda_attention"),
    ({"caches": 3}, "bad_cuda_attention"),
    ({"shared": 1, "by_key": 1}, "bad_cuda_attention"),
    ({"dtype": 3}, "bad_dtype"),
    ({"bias_dtype": 3}, "bad_dtype"),
    ({"mode": 2}, "bad_mode"),
    ({"clip": -1.0}, "bad_clip"),
    ({"clip": float("inf")}, "bad_clip"),
    ({"q1": -64}, "bad_size"),
    ({"b3": -1}, "bad_size"),
    ({"form": 3}, "bad_attention_plan"),
    ({"form": 1, "splits": 2}, "bad_attention_plan"),
    ({"form": 1, "aligned": 0}, "bad_attention_plan"),
    ({"form": 1, "capacity": 5000, "warps": 1}, "bad_attention_plan"),
    ({"splits": 4}, "bad_attention_plan"),
    ({"splits": 4, "capacity": 150}, "bad_attention_plan"),
    ({"splits": 65, "capacity": 131071}, "bad_attention_plan"),
    ({"splits": -1}, "bad_attention_plan"),
    ({"warps": 17}, "bad_attention_plan"),
    ({"form": 2, "warps": 9}, "bad_attention_plan"),
    ({"head_dim": 128, "warps": 9}, "bad_attention_plan"),
    ({"sms": 0}, "bad_attention_plan"),
    ({"rows": 1 << 31, "shared": 1}, "size_overflow"),
    ({"heads": 1 << 40}, "size_overflow"),
    ({"caches": 1 << 20, "shared": 1, "capacity": 131071}, "size_overflow"),
    ({"queries": 1 << 31}, "size_overflow"),
]
TAKEN = [
    {"head_dim": 128}, {"head_dim": 4}, {"capacity": 131071}, {"rows": 0}, {"queries": 0, "caches": 3}, {"splits": 3},
    {"form": 1, "capacity": 4960}, {"warps": 16}, {"form": 2, "warps": 8}, {"sms": 0, "splits": 1, "warps": 1},
    {"splits": 64, "capacity": 131071, "warps": 8},
]  # fmt: skip


@pytest.mark.parametrize("fields, status", REFUSED, ids=str)
def test_what_the_core_refuses(program, fields, status):
    said, _ = program.call("memory", changed(**fields), [harness.wanted((4,), np.int64)], 0)
    assert harness.statuses()[said] == status


@pytest.mark.parametrize("fields", TAKEN, ids=str)
def test_the_limits_themselves_pass(program, fields):
    said, _ = program.call("memory", changed(**fields), [harness.wanted((4,), np.int64)], 0)
    assert harness.statuses()[said] == "ok"


def test_a_missing_or_misaligned_operand(program):
    built = attention.build(attention.plain(2, 1, 1, 70, 64, source="beams", caches=2, form="split 2"))
    scalars, given = attention.arguments(built)
    out, room = harness.wanted((2, 1, 1, 64), np.float16), harness.given(np.zeros(4096, np.int32))
    counters = harness.changed(np.zeros(64, np.uint32))
    whole = [*given[:7], harness.ABSENT, out, room, counters]
    assert program.call("launch", scalars, whole, 0)[0] == 0
    for index, status in [(i, "bad_cuda_attention") for i in (0, 1, 2, 3, 4, 5, 6, 8)] + [
        (9, "no_workspace"),
        (10, "no_workspace"),
    ]:
        buffers = list(whole)
        buffers[index] = harness.ABSENT
        assert harness.statuses()[program.call("launch", scalars, buffers, 0)[0]] == status, index
    for index, offset, status in ((1, 8, "bad_cuda_attention"), (3, 4, "bad_cuda_attention"), (9, 4, "no_workspace")):
        buffers = list(whole)
        buffers[index] = harness.Buffer(buffers[index].array, buffers[index].flags, offset)
        assert harness.statuses()[program.call("launch", scalars, buffers, 0)[0]] == status, index
