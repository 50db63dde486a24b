"""The skinny GEMM's launcher and backend without a GPU: end to end on the simulator."""

from __future__ import annotations

import compare
import numpy as np
import pytest
import skinny_calls
import torch
from skinny_calls import SimulatedPlan, cases, plain
from torch.nn import functional

from dqkernels import qmath, reference
from dqkernels.backends import cuda
from dqkernels.kernels import counters, skinny

FORMS = ((8, "absmax", 0), *((4, "absmax", group) for group in (0, 32, 64, 128)),
         *((2, rule, group) for rule in ("ternary", "four_level") for group in (0, 32, 64, 128)))  # fmt: skip


@pytest.fixture
def machine(skinny_program, monkeypatch):
    """CPU tensors in, the simulator for the GPU."""
    monkeypatch.setattr(SimulatedPlan, "program", skinny_program)
    monkeypatch.setattr(SimulatedPlan, "made", [])
    yield skinny_calls.on_this_machine(monkeypatch, SimulatedPlan)
    skinny._plan.cache_clear()
    counters.kept.clear()


def backend_arguments(built):
    """Positional and keyword arguments of qgemm's second half, which the reference takes as well."""
    part, (bits, rule, group) = built.parts[0], built.case.form
    w = part.weight
    facts = {"bits": bits, "four_level": rule == "four_level", "group_size": group or -1, "out_features": part.n,
             "activation": built.case.activation, "out_dtype": cases.DTYPES[built.case.y]}  # fmt: skip
    return [w.packed, w.scale, w.mult, part.bias, part.residual], facts


def act_facts(case):
    act_scale = torch.tensor([0.013]) if case.mode == "static" else None
    return {"act_mode": case.mode, "act_clip": case.clip, "act_scale": act_scale}


def qlinear_both(case, x=None):
    """The backend's qlinear and eager's."""
    built = cases.build(case)
    weight, facts = backend_arguments(built)
    x, act = built.x if x is None else x, act_facts(case)
    got = cuda.qlinear(x, *weight, **facts, **act)
    q, scale, row_sum = qmath.quantize_activation(x, act["act_mode"], act["act_clip"], act["act_scale"], True)
    return got, reference.qgemm(q, scale, row_sum, *weight, **facts)


# ------------------------------------------------------------------------------------------- the two ops


@pytest.mark.parametrize("m", [1, 16, 17, 64, 70])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_qlinear_has_eagers_bits(machine, form, m):
    case = plain(form, m, 21, 300, y="fp16", bias="fp16", activation="relu")
    compare.assert_same_bits(*qlinear_both(case), case.name)
    (plan,) = SimulatedPlan.made
    assert len(plan.runs) == 1, "one launch, whatever M"
    assert plan.facts["x_dtype"] == (1 if m <= skinny.PROLOGUE_ROWS else 3)
    assert plan.runs[0]["stream"] == machine.stream


@pytest.mark.parametrize(
    "facts",
    [
        {"mode": "static", "residual": "fp16", "y": "fp16"},
        {"mode": "static", "clip": 1.5, "m": 17},
        {"mode": "per_tensor", "clip": 1.5, "x": "bf16", "y": "bf16", "bias": "bf16"},
        {"mode": "per_tensor", "m": 33},
        {"clip": 0.7, "x": "fp32", "bias": "fp32", "residual": "fp32"},
        {"granularity": "per_tensor", "x": "bf16", "y": "fp32", "bias": "fp16", "residual": "bf16"},
        {"granularity": "per_tensor", "n": 1},
        {"n": 1, "m": 1, "k": 1},
        {"m": 70, "residual": "fp16", "activation": "relu", "bias": "fp32"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [(8, "absmax", 0), (2, "four_level", 0)], ids=str)
def test_qlinears_options(machine, form, facts):
    facts = {"m": 9, "n": 18, "k": 130} | facts
    case = plain(form, **facts)
    compare.assert_same_bits(*qlinear_both(case), case.name, may_be_zero=case.k == 1)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 1, 64), (2, 3, 64), (2, 2, 5, 64)], ids=str)
def test_shapes_of_x_and_y(machine, shape):
    built = cases.build(plain((4, "absmax", 0), 26, 18, 64, y="fp16", residual="fp16"))
    weight, facts = backend_arguments(built)
    rows = shape[:-1].numel() if isinstance(shape, torch.Size) else int(np.prod(shape[:-1], dtype=int))
    x, weight[4] = built.x[6:][:rows].reshape(shape), weight[4][:rows].reshape(*shape[:-1], 18)
    got = cuda.qlinear(x, *weight, **facts, **act_facts(built.case))
    q, scale, _ = qmath.quantize_activation(x, "per_token")
    expected = reference.qgemm(q, scale, None, *weight, **facts)
    compare.assert_same_bits(got, expected, str(shape), may_be_zero=rows == 0)
    compare.assert_same_bits(cuda.qgemm(q, scale, None, *weight, **facts), expected, may_be_zero=rows == 0)


def test_views_of_x(machine):
    """Wide rows, every other row, a transposed matrix, one row for all, a row that starts off its element size."""
    case = plain((4, "absmax", 32), 8, 18, 70)
    room = torch.randn(16, 200, generator=torch.Generator().manual_seed(1)).half()
    odd = torch.frombuffer(bytearray(b"\0" + room[:8, :70].contiguous().numpy().tobytes()), dtype=torch.int8)[1:]
    views = {
        "wide": room[:8, :70],
        "odd start": room[:8, 1:71],
        "every other": room[::2, :70],
        "transposed": room.T[:8, :16].T[:, :8].repeat(1, 9)[:8, :70].T.contiguous().T,
        "expanded": room[:1, :70].expand(8, 70),
        "foreign": odd.view(torch.float16).view(8, 70) if odd.data_ptr() % 2 == 0 else room[:8, :70],
    }
    for name, x in views.items():
        assert x.shape == (8, 70), name
        compare.assert_same_bits(*qlinear_both(case, x), name)
    assert {plan.facts["row_stride"] for plan in SimulatedPlan.made} >= {70, 200, 400, 0}


@pytest.mark.parametrize("m", [1, 16, 17, 64, 70])
@pytest.mark.parametrize("form", [(8, "absmax", 0), (4, "absmax", 64), (2, "ternary", 0)], ids=str)
def test_qgemm_has_eagers_bits(machine, form, m):
    case = plain(form, m, 18, 260, x="int8", y="bf16", bias="fp32", residual="bf16")
    built = cases.build(case)
    weight, facts = backend_arguments(built)
    got = cuda.qgemm(built.q, built.scale, None, *weight, **facts)
    compare.assert_same_bits(got, reference.qgemm(built.q, built.scale, None, *weight, **facts), case.name)
    wide = torch.full((m, 300), 99, dtype=torch.int8)[:, 3:263]
    wide.copy_(built.q)
    compare.assert_same_bits(cuda.qgemm(wide, built.scale, None, *weight, **facts), got)
    assert SimulatedPlan.made[-1].facts["row_stride"] == (300 if m > 1 else 260)


def test_gelu_within_the_bound(machine):
    case = plain((8, "absmax", 0), 5, 33, 130, x="fp32", bias="fp32", activation="gelu")
    built = cases.build(case)
    weight, facts = backend_arguments(built)
    got = cuda.qlinear(built.x, *weight, **facts, **act_facts(case))
    t = reference.qgemm(built.q, built.scale, None, *weight, **(facts | {"activation": "none"}))
    compare.assert_bounded(got, functional.gelu(t.double()), functional.gelu(t))


# ------------------------------------------------------------------------------------ the launcher's own options


@pytest.mark.parametrize("case", [case for case in cases.cases() if case.parts > 1][::8], ids=lambda case: case.name)
def test_covering_cases_through_the_launcher(machine, case):
    """Several parts, forced plans, int8 outputs, layouts: the tensors that a GPU test hands over, as placed there."""
    built = cases.build(case)
    call = skinny_calls.placed(built, "cpu")
    said = skinny_calls.wrong(skinny_calls.gemm(call), built.expected)
    assert said is None, said
    (plan,) = SimulatedPlan.made
    wanted = list(built.scalars)
    wanted[17] = 4  # SMs, which the case leaves to its plan
    assert plan.scalars[:15] == [wanted[0], wanted[1], plan.facts["row_stride"], *wanted[3:15]]


@pytest.mark.parametrize("x", ["fp16", "fp32"])
def test_layernorm_on_the_way_in(machine, x):
    built, norm = skinny_calls.norm_case(3, 264, x, with_bias=x == "fp16")
    call = skinny_calls.placed(built, "cpu")
    normalized, y = skinny_calls.gemm(call, norm=norm)
    bias64 = None if norm.bias is None else norm.bias.double()
    truth = functional.layer_norm(built.x.double(), (264,), norm.weight.double(), bias64, norm.eps)
    compare.assert_bounded(normalized, truth, functional.layer_norm(built.x, (264,), norm.weight, norm.bias, norm.eps))
    compare.assert_same_bits(y, skinny_calls.expected_after_norm(built, normalized))


def split_call(k=600, form=(4, "absmax", 0), m=3):
    built = cases.build(plain(form, m, 40, k, plan=(2, 3)))
    return built, skinny_calls.placed(built, "cpu")


def test_counters_of_the_default_stream_are_kept_and_zero_again(machine):
    built, call = split_call()
    machine.stream = 0
    for seed in (0, 3):
        SimulatedPlan.seed = seed
        assert skinny_calls.wrong(skinny_calls.gemm(call), built.expected) is None
        assert all(not arrivals.any() for arrivals in counters.kept.values())
    SimulatedPlan.seed = 0
    (plan,) = SimulatedPlan.made
    assert plan.workspace_bytes and plan.splits == 3
    first, second = plan.runs
    assert first["counters"] == second["counters"] != 0 and first["workspace"] != 0


def test_on_another_stream_a_call_has_counters_of_its_own(machine):
    """It may be captured, or warm up in the memory of a graph to come, where nothing may stay."""
    built, call = split_call()
    skinny_calls.gemm(call)
    assert not counters.kept, "counters stayed"
    machine.stream = 0
    skinny_calls.gemm(call)
    held = counters.kept[call.x.device]
    machine.stream = 7
    held.fill_(1)  # whoever counted in these would see it
    for _ in range(2):
        assert skinny_calls.wrong(skinny_calls.gemm(call), built.expected) is None
    (plan,) = SimulatedPlan.made
    assert held.data_ptr() not in [run["counters"] for run in plan.runs[2:]] and bool((held == 1).all())


def test_more_counters_than_the_stream_has(machine):
    built, call = split_call()
    machine.stream = 0
    counters.kept[call.x.device] = torch.zeros(4, dtype=torch.uint8)
    assert skinny_calls.wrong(skinny_calls.gemm(call), built.expected) is None
    assert counters.kept[call.x.device].numel() >= SimulatedPlan.made[0].counter_bytes


def test_one_plan_per_kind_of_call(machine):
    built = cases.build(plain((4, "absmax", 0), 2, 18, 64))
    call = skinny_calls.placed(built, "cpu")
    for _ in range(3):
        skinny_calls.gemm(call)
    assert len(SimulatedPlan.made) == 1
    for change in ({"activation": "relu"}, {"out_dtype": torch.float16}, {"clip": 1.5}, {"mode": "per_tensor"}):
        skinny_calls.gemm(call, **change)
    assert len(SimulatedPlan.made) == 5


def test_overlap_is_promised_not_assumed(machine):
    """Only within `settled_weights`, only where the code can wait, only in that thread; nested and after an error."""
    import threading

    call = skinny_calls.placed(cases.build(plain((4, "absmax", 0), 2, 18, 64)), "cpu")
    made = SimulatedPlan.made

    def overlap():
        skinny_calls.gemm(call)
        return made[-1].facts["overlap"]

    assert overlap() is False
    with skinny.settled_weights():
        assert overlap() is True
        with skinny.settled_weights():
            pass
        skinny_calls.gemm(call, clip=3.0)
        assert made[-1].facts["overlap"] is True, "the inner context ended, the outer one has not"
        seen = []
        thread = threading.Thread(
            target=lambda: (skinny_calls.gemm(call, clip=4.0), seen.append(made[-1].facts["overlap"]))
        )
        thread.start()
        thread.join()
        assert seen == [False]
    with pytest.raises(KeyError), skinny.settled_weights():
        raise KeyError
    skinny_calls.gemm(call, clip=5.0)
    assert made[-1].facts["overlap"] is False
    for major, archs, can in (
        (8, "80 90", False),
        (9, "80-real 90a-real", True),
        (9, "80", False),  # its PTX runs there, without a wait
        (12, "80 90a-real", False),
        (12, "80 90-virtual", True),
    ):
        machine.major, machine.archs = major, archs
        skinny._plan.cache_clear()
        with skinny.settled_weights():
            skinny_calls.gemm(call)
        assert made[-1].facts["overlap"] is can, (major, archs)
