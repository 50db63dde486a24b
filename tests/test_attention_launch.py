"""CUDA decode attention's launcher and backend without a GPU: end to end on the simulator."""

from __future__ import annotations

from pathlib import Path

import attention_calls
import pytest
import torch
from attention_calls import SimulatedPlan, cases, harness
from compare import assert_same_bits

from dqkernels import reference
from dqkernels.backends import cuda
from dqkernels.kernels import counters, cuda_attention, native


@pytest.fixture(scope="module")
def program():
    reason = harness.missing()
    if reason is not None:
        pytest.skip(reason)
    here = Path(harness.__file__).parent
    paths = [harness.ROOT / name if name.startswith("csrc/") else here / name for name in attention_calls.SOURCES]
    running = harness.Program(harness.build(paths))
    yield running
    running.close()


@pytest.fixture
def machine(program, monkeypatch):
    """CPU tensors in, the simulator for the GPU."""
    monkeypatch.setattr(SimulatedPlan, "program", program)
    monkeypatch.setattr(SimulatedPlan, "made", [])
    yield attention_calls.on_this_machine(monkeypatch)
    cuda_attention._plan.cache_clear()
    counters.kept.clear()


@pytest.mark.parametrize("built", attention_calls.samples(), ids=lambda built: f"{built.case.name} {built.case.mode}")
def test_every_kernel_through_the_launcher(machine, built):
    cases.assert_right(built, attention_calls.call(built, "cpu"))
    (plan,) = SimulatedPlan.made
    (run,) = plan.runs
    assert run["stream"] == machine.stream and plan.splits == (2 if built.case.form == "split 2" else 1)
    assert (run["workspace"] != 0) == (plan.splits > 1 or built.case.mode == "per_tensor")
    assert (run["counters"] != 0) == (plan.splits > 1)


def test_the_backend_gives_what_the_reference_gives(machine):
    """Bit by bit here: no share lies where two exponentials could round apart."""
    case = cases.plain(4, 2, 1, 50, 64, source="beams", caches=2, dtype="fp32", seed=21)
    built = cases.build(case)
    assert cases.assert_right(built, cuda.qattention_decode(**built.operands, **built.facts)) == 0
    got = cuda.qattention_decode(**built.operands, **built.facts)
    assert_same_bits(got, reference.qattention_decode(**built.operands, **built.facts))
    assert len(SimulatedPlan.made) == 1 and len(SimulatedPlan.made[0].runs) == 2, "a plan is made once per kind of call"


@pytest.mark.parametrize(
    "change",
    ["strided q", "odd caches", "caches on 4 bytes", "caches by row of heads", "scales with gaps", "wide source"],
)
def test_any_layout(machine, change):
    built = cases.build(cases.plain(3, 2, 2, 40, 32, source="by key", caches=2, spare=2, bias="keys", lengths="random"))
    want = attention_calls.call(built, "cpu")
    assert want.any()
    o = dict(built.operands)
    if change == "strided q":
        o["q"] = torch.stack([o["q"], o["q"] * 2], 4)[..., 0]
    elif change in ("odd caches", "caches on 4 bytes"):
        for name in ("k_cache", "v_cache") if change == "odd caches" else ("v_cache",):
            room = torch.empty(o[name].numel() + 4, dtype=torch.int8)[3 if change == "odd caches" else 4 :]
            o[name] = room[: o[name].numel()].view(o[name].shape).copy_(o[name])
    elif change == "caches by row of heads":
        for name in ("k_cache", "v_cache"):
            o[name] = o[name].transpose(1, 2).contiguous().transpose(1, 2)
    elif change == "scales with gaps":
        for name in ("k_scale", "v_scale"):
            o[name] = torch.stack([o[name], o[name] * 3], 3)[..., 0]
    else:
        o["source"] = torch.cat([o["source"], o["source"]], 1)[:, : o["source"].shape[1]]
        o["lengths"] = torch.stack([o["lengths"], o["lengths"] * 0], 1)[:, 0]
    assert_same_bits(cuda.qattention_decode(**o, **built.facts), want, change)


def test_the_rule_splits_long_caches_of_few_rows(machine):
    """One row with 4,096 places leaves SMs idle; with its heads on all of them, or 4,064 places, it is one launch."""
    machine.sms = 8
    for heads, capacity, splits in ((2, 4096, 4), (8, 4096, 1), (2, 4064, 1), (1, 4100, 4)):
        case = cases.plain(1, heads, 1, 40, 32, spare=capacity - 40)
        attention_calls.call(cases.build(case), "cpu")
        assert SimulatedPlan.made[-1].splits == splits, (heads, capacity)


def test_counters_of_the_default_stream_are_kept_and_zero_again(machine):
    built = cases.build(cases.plain(2, 2, 1, 70, 64, form="split 3"))
    machine.stream = 0
    first = attention_calls.call(built, "cpu")
    assert_same_bits(attention_calls.call(built, "cpu"), first)
    runs = SimulatedPlan.made[0].runs
    assert runs[0]["counters"] == runs[1]["counters"] and all(not left.any() for left in counters.kept.values())
    machine.stream = 7
    assert_same_bits(attention_calls.call(built, "cpu"), first)
    assert runs[2]["counters"] not in (0, runs[0]["counters"])


def test_nothing_is_computed_where_nothing_is(machine):
    built = cases.build(cases.plain(2, 2, 1, 5, 64))
    o = built.operands
    none = {name: t[:0] for name, t in o.items() if t is not None}
    assert cuda.qattention_decode(**none, source=None, bias=None, **built.facts).shape == (0, 2, 1, 64)
    no_keys = {name: t[:, :, :0] for name, t in o.items() if name not in ("q", "lengths", "source", "bias")}
    got = cuda.qattention_decode(o["q"], *no_keys.values(), o["lengths"] * 0, None, None, **built.facts)
    assert got.shape == o["q"].shape and got.dtype == o["q"].dtype and not got.any()
    assert not SimulatedPlan.made


def test_what_it_does_not_take_is_said_by_name():
    assert cuda.supports("qattention_decode", mode="per_token", head_dim=128, by_key=True) is None
    for head_dim in (6, 129, 132):
        assert f"head_dim={head_dim}, only multiples of 4 up to 128" in cuda.supports(
            "qattention_decode", head_dim=head_dim
        )
    q = torch.ones(1, 1, 1, 64)
    cache, scale = torch.ones(1, 1, 3, 64, dtype=torch.int8), torch.ones(1, 1, 3)
    lengths = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="q must be on cuda, got cpu"):
        cuda_attention.qattention_decode(
            q, cache, scale, cache, scale, lengths, None, None, False, 1.0, "per_token", None
        )


def test_a_tensor_of_another_device_is_refused_by_name(machine, monkeypatch):
    built = cases.build(cases.plain(1, 1, 1, 5, 64))
    monkeypatch.setattr(cuda_attention, "_device_of", lambda q: 3)  # q alone is there
    with pytest.raises(ValueError, match="k_cache must be on .* like q, got cpu"):
        cuda.qattention_decode(**built.operands, **built.facts)


@pytest.mark.parametrize("cut", [{"splits": 65}, {"splits": 3}, {"warps": 17}, {"form": "keep", "splits": 2}])
def test_cuts_that_are_not_to_be_had(machine, cut):
    built = cases.build(cases.plain(1, 1, 1, 64, 64))
    with pytest.raises(ValueError, match="bad_attention_plan"):
        attention_calls.call(built, "cpu", **cut)
    assert attention_calls.call(built, "cpu", splits=2).any()


# ------------------------------------------------------------------------------------------------------ the binding

CORE = native.native()
needs_plan = pytest.mark.skipif(
    not hasattr(CORE, "AttentionPlan"),
    reason=native.why_absent() or f"the compiled core has {native.why_no_cuda(native.build_info())}",
)
GOOD = {"dtype": 1, "rows": 12, "heads": 16, "queries": 1, "head_dim": 64, "caches": 3, "capacity": 1024,
        "q_stride": [1024, 64, 64], "aligned": True, "shared": True, "by_key": False, "bias_dtype": 0,
        "bias_stride": [0, 0, 0, 0], "causal": False, "softmax_scale": 0.125, "mode": 0, "clip": 0.0, "form": 0,
        "splits": 0, "warps": 0, "sms": 132}  # fmt: skip


@needs_plan
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 66}, "decode attention takes a head_dim of 4, 8 .. 128"),
        ({"shared": False}, "a cache for each row"),
        ({"capacity": 131072}, "could overflow"),
        ({"dtype": 3}, "dtype code"),
        ({"mode": 2}, "mode must be"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"splits": 65}, "splits must be 1 to 64"),
        ({"form": 1, "splits": 2}, "scores are kept only without splits"),
        ({"heads": 1 << 40}, "63 bits"),
    ],
    ids=str,
)
def test_the_plan_refuses(change, words):
    CORE.AttentionPlan(**GOOD)
    with pytest.raises(ValueError, match=words) as error:
        CORE.AttentionPlan(**(GOOD | change))
    assert str(error.value).startswith("attention_decode: ")


@needs_plan
@pytest.mark.parametrize("rows, caches", [(1, 1), (16, 1), (64, 16), (4096, 256)])
def test_the_plan_needs_what_the_simulators_needs(program, monkeypatch, rows, caches):
    monkeypatch.setattr(SimulatedPlan, "program", program)
    for capacity in (32, 1024, 8192):
        for more in ({}, {"mode": 1}, {"queries": 5}, {"head_dim": 128}, {"aligned": False}, {"splits": 1, "warps": 2}):
            facts = GOOD | {"rows": rows, "caches": caches, "capacity": capacity} | more
            mine, theirs = CORE.AttentionPlan(**facts), SimulatedPlan(**facts)
            for name in ("workspace_bytes", "counter_bytes", "splits", "warps"):
                assert getattr(mine, name) == getattr(theirs, name), (name, facts)
