"""What the skinny GEMM's launcher and its binding refuse, each in one sentence; no GPU, no kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import skinny_calls
import torch
from skinny_calls import SimulatedPlan, cases, plain

from dqkernels.kernels import native, skinny

CORE = native.native()
needs_plan = pytest.mark.skipif(
    not hasattr(CORE, "SkinnyPlan"),
    reason=native.why_absent() or f"the compiled core has {native.why_no_cuda(native.build_info())}",
)


class NoPlan:
    """For calls that must not come as far as a plan."""

    def __init__(self, **facts):
        raise AssertionError("a plan was made")


@pytest.fixture
def no_kernel(monkeypatch):
    yield skinny_calls.on_this_machine(monkeypatch, NoPlan)
    skinny._plan.cache_clear()


class Elsewhere(torch.Tensor):
    def get_device(self):
        return 1


def part_with(part, **changes):
    return part._replace(**changes)


def grouped():
    return cases.build(plain((4, "absmax", 32), 2, 18, 64, bias="fp16", residual="fp16"))


#: What is changed of a good call (of its Part, or of the rest), and the words that the refusal must have.
REFUSED = {
    "double x": (lambda c: {"x": c.x.double()}, "x must be float32, float16 or bfloat16, got torch.float64"),
    "x by columns": (lambda c: {"x": c.x.T.contiguous().T}, "x must be .* adjacent elements"),
    "x 3-D": (lambda c: {"x": c.x[None]}, r"x must be \[M, K\]"),
    "no parts": (lambda c: {"parts": []}, "parts must be 1 to 3, got 0"),
    "four parts": (lambda c: {"parts": [c.parts[0]] * 4}, "parts must be 1 to 3, got 4"),
    "int8 without scale": (lambda c: {"x": c.x.to(torch.int8)}, "act_scale must hold 2 elements for int8 rows"),
    "int8, wrong scales": (
        lambda c: {"x": c.x.to(torch.int8), "act_scale": torch.ones(3)}, "act_scale must hold 2 elements"),
    "static without scale": (lambda c: {"mode": "static"}, "act_scale must hold 1 element for mode='static', got None"),
    "static, two scales": (lambda c: {"mode": "static", "act_scale": torch.ones(2)}, "act_scale must hold 1 element"),
    "half act_scale": (
        lambda c: {"mode": "static", "act_scale": torch.ones(1).half()}, "act_scale must be torch.float32"),
    "int8 without out_scale": (lambda c: {"out_dtype": torch.int8}, "out_scale must hold 1 element for int8"),
    "float with out_scale": (lambda c: {"out_scale": torch.ones(1)}, "out_scale must hold 1 element for int8"),
    "mode": (lambda c: {"mode": "per_row"}, "mode must be one of .*'per_row'"),
    "activation": (lambda c: {"activation": "silu"}, "activation must be one of .*'silu'"),
    "out_dtype": (lambda c: {"out_dtype": torch.int32}, "out_dtype must be float32"),
    "norm weight": (lambda c: {"norm": skinny.Norm(torch.ones(63).half(), None, 1e-5)}, "norm weight must have 64"),
    "norm bias": (
        lambda c: {"norm": skinny.Norm(torch.ones(64).half(), torch.ones(65).half(), 1e-5)}, "norm bias must have 64"),
    "norm dtype": (
        lambda c: {"norm": skinny.Norm(torch.ones(64), None, 1e-5)}, "norm weight must be torch.float16"),
}  # fmt: skip
REFUSED_PARTS = {
    "other device": (lambda p: {"bias": p.bias.as_subclass(Elsewhere)}, "bias must be on cpu like x"),
    "qweight elsewhere": (lambda p: {"qweight": p.qweight.as_subclass(Elsewhere)}, "qweight must be on cpu like x"),
    "qweight dtype": (lambda p: {"qweight": p.qweight.view(torch.int8)}, "qweight must be torch.uint8"),
    "qweight of fewer rows": (lambda p: {"qweight": p.qweight[:16]}, r"qweight must be \[32, 64\], got \[16, 64\]"),
    "qweight by columns": (lambda p: {"qweight": p.qweight.T.contiguous().T}, "qweight must be contiguous"),
    "qweight off 16 bytes": (lambda p: {"qweight": moved(p.qweight, 8)}, "qweight must start on a 16-byte boundary"),
    "scale dtype": (lambda p: {"weight_scale": p.weight_scale.double()}, "weight_scale must be torch.float32"),
    "too few scales": (lambda p: {"weight_scale": p.weight_scale[:17]}, "weight_scale must hold 18 elements"),
    "every other scale": (
        lambda p: {"weight_scale": p.weight_scale.repeat_interleave(2)[::2]}, "weight_scale must be contiguous"),
    "no multipliers": (lambda p: {"group_mult": None}, r"group_mult must be \[18, 2\], got None"),
    "too few multipliers": (lambda p: {"group_mult": p.group_mult[:, :1]}, r"group_mult must be \[18, 2\]"),
    "multipliers' dtype": (lambda p: {"group_mult": p.group_mult.int()}, "group_mult must be torch.uint8"),
    "bias size": (lambda p: {"bias": p.bias[:17]}, "bias must hold 18 elements"),
    "bias dtype": (lambda p: {"bias": p.bias.double()}, "bias must be float32, float16 or bfloat16"),
    "int8 bias": (lambda p: {"bias": p.bias.to(torch.int8)}, "bias must be float32, float16 or bfloat16"),
    "residual size": (lambda p: {"residual": p.residual[:1]}, r"residual must be \[2, 18\]"),
    "residual by columns": (lambda p: {"residual": p.residual.T.contiguous().T}, "residual must be contiguous"),
    "residual dtype": (lambda p: {"residual": p.residual.double()}, "residual must be float32"),
}  # fmt: skip


def moved(tensor, offset):
    room = torch.empty(tensor.numel() + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 16 + offset
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(no_kernel, name):
    change, words = REFUSED[name]
    call = skinny_calls.placed(grouped(), "cpu")
    changes = change(call)
    call.x, call.parts = changes.pop("x", call.x), changes.pop("parts", call.parts)
    with pytest.raises(ValueError, match=words):
        skinny_calls.gemm(call, **changes)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", REFUSED_PARTS)
def test_refused_of_a_part(no_kernel, name, place):
    """Also of the second one, which shares the input with a good first."""
    change, words = REFUSED_PARTS[name]
    call = skinny_calls.placed(grouped(), "cpu")
    good = call.parts[0]
    bad = part_with(good, **change(good))
    call.parts = [bad] if place == 0 else [part_with(good, bias=None, residual=None), bad]
    with pytest.raises(ValueError, match=words):
        skinny_calls.gemm(call)


def test_parts_must_agree(no_kernel):
    """Also the second and the third, where the first has none."""
    call = skinny_calls.placed(grouped(), "cpu")
    good = call.parts[0]
    for name in ("bias", "residual"):
        none, wide = part_with(good, **{name: None}), part_with(good, **{name: getattr(good, name).float()})
        for parts in ([good, wide], [none, good, wide]):
            call.parts = parts
            with pytest.raises(ValueError, match=f"the parts' {name} must have one dtype"):
                skinny_calls.gemm(call)
    single = part_with(good, weight_scale=torch.ones(1))
    call.parts = [good, single]
    with pytest.raises(ValueError, match="weight_scale must hold 1 elements"):
        skinny_calls.gemm(call)


def test_cpu_tensors_are_refused():
    call = skinny_calls.placed(grouped(), "cpu")
    with pytest.raises(ValueError, match="x must be on cuda, got cpu"):
        skinny_calls.gemm(call)


# ---------------------------------------------------------------------------------------------- the binding

GOOD = {"m": 2, "k": 512, "row_stride": 512, "x_dtype": 1, "mode": 0, "clip": 0.0, "norm_eps": 0.0, "bits": 4,
        "four_level": False, "group_size": 0, "tensor_scale": False, "bias_dtype": 0, "residual_dtype": 0,
        "activation": 0, "y_dtype": 1, "n": [40], "warps_n": 0, "splits": 0, "sms": 4, "overlap": False}  # fmt: skip


@needs_plan
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "bits must be 2, 4 or 8"),
        ({"four_level": True}, "bits must be"),
        ({"m": -1}, "rows must be >= 0"),
        ({"k": 0}, "columns >= 1"),
        ({"row_stride": -1}, "row stride >= 0"),
        ({"k": 131072}, "K is so large"),
        ({"m": 17}, "up to 16 rows only"),
        ({"m": 1 << 61, "x_dtype": 3}, "63 bits"),
        ({"x_dtype": 4}, "dtype code"),
        ({"y_dtype": -1}, "dtype code"),
        ({"bias_dtype": 3}, "dtype code"),
        ({"residual_dtype": 3}, "dtype code"),
        ({"mode": 3}, "mode must be"),
        ({"clip": float("nan")}, "clip must be positive"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"group_size": 48}, "group_size must be 32"),
        ({"group_size": 64, "bits": 8}, "group_size must be 32"),
        ({"activation": 3}, "activation code"),
        ({"n": []}, "1 to 3 parts"),
        ({"n": [1] * 4}, "1 to 3 parts"),
        ({"n": [0]}, "n >= 1"),
        ({"n": [1 << 60]}, "63 bits"),
        ({"warps_n": 3, "splits": 1}, "warps_n must be 1, 2, 4 or 8"),
        ({"warps_n": 1, "splits": 3}, "splits such that"),
        ({"sms": 0}, "warps_n must be"),
    ],
    ids=str,
)
def test_the_plan_refuses(change, words):
    CORE.SkinnyPlan(**GOOD)
    with pytest.raises(ValueError, match=words) as error:
        CORE.SkinnyPlan(**(GOOD | change))
    assert str(error.value).startswith("skinny_gemm: ")


@needs_plan
@pytest.mark.parametrize("n", [[1], [768], [50265], [768, 768, 768], [24, 1]], ids=str)
@pytest.mark.parametrize(("m", "x_dtype"), [(1, 1), (16, 2), (7, 0), (1, 3), (64, 3), (1000, 3)])
def test_the_plan_needs_what_the_simulators_needs(skinny_program, monkeypatch, m, x_dtype, n):
    monkeypatch.setattr(SimulatedPlan, "program", skinny_program)
    for bits, k in ((2, 768), (4, 4096), (8, 1280)):
        for cut in ((0, 0), (2, 3), (8, 0)):
            facts = GOOD | {"m": m, "x_dtype": x_dtype, "n": n, "bits": bits, "k": k, "row_stride": k, "sms": 132}
            facts |= {"warps_n": cut[0], "splits": cut[1]}
            mine = memory_of(CORE.SkinnyPlan, facts)
            assert mine == memory_of(SimulatedPlan, facts), facts
            assert mine is not None or cut[0] == 2, "the rule found no plan"


def memory_of(plan, facts):
    try:
        made = plan(**facts)
    except ValueError:
        return None  # of 64 rows, some forced cuts leave no room for a chunk
    return made.workspace_bytes, made.counter_bytes, made.warps_n, made.splits


def addresses(tensors):
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def run_arguments(facts, **changes):
    """A good call's, in memory of this process; no kernel may come to read it."""
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    base = memory.data_ptr() + -memory.data_ptr() % 256
    named = {"x": base, "act_scale": 0, "norm_weight": 0, "norm_bias": 0, "norm_y": 0, "out_scale": 0,
             "workspace": 0, "counters": 0, "stream": 0}  # fmt: skip
    part = {"qweight": base, "weight_scale": base, "group_mult": 0, "bias": 0, "residual": 0, "y": base}
    for name, value in changes.items():
        offset = base + value if value else 0
        if name in part:
            part[name] = offset
        else:
            named[name] = offset
    return named | {"parts": [tuple(part.values())] * len(facts["n"])}, memory


@needs_plan
@pytest.mark.parametrize(
    ("facts", "change", "words"),
    [
        ({}, {"x": 0}, "x is a null pointer"),
        ({}, {"x": 1}, "x must be aligned to 2 bytes"),
        ({}, {"qweight": 0}, "qweight is a null pointer"),
        ({}, {"qweight": 8}, "qweight must be aligned to 16 bytes"),
        ({}, {"weight_scale": 2}, "weight_scale must be aligned to 4 bytes"),
        ({}, {"y": 0}, "y is a null pointer"),
        ({}, {"y": 1}, "y must be aligned to 2 bytes"),
        ({}, {"bias": 2}, "bias must be aligned to 4 bytes"),
        ({}, {"residual": 2}, "residual must be aligned to 4 bytes"),
        ({}, {"norm_weight": 16}, "norm_y is a null pointer"),
        ({}, {"out_scale": 16}, "an int8 output needs its static scale"),
        ({"y_dtype": 3}, {}, "an int8 output needs its static scale"),
        ({"mode": 2}, {}, "act_scale must lie"),
        ({"x_dtype": 3}, {}, "act_scale must lie"),
        ({"group_size": 32}, {}, "group_mult is a null pointer"),
        ({"warps_n": 1, "splits": 2}, {}, "workspace is a null pointer"),
        ({"warps_n": 1, "splits": 2}, {"workspace": 16}, "counters is a null pointer"),
        ({"warps_n": 1, "splits": 2}, {"workspace": 16, "counters": 2}, "counters must be aligned to 4 bytes"),
    ],
    ids=str,
)
def test_run_refuses(facts, change, words):
    """Every one of these ends before a kernel could be launched, with a driver or without."""
    arguments, memory = run_arguments(GOOD | facts, **change)
    with pytest.raises(ValueError, match=f"skinny_gemm: .*{words}"):
        CORE.SkinnyPlan(**(GOOD | facts)).run(**arguments)
    assert memory.numel()


@needs_plan
def test_run_takes_one_part_per_size():
    arguments, _ = run_arguments(GOOD)
    with pytest.raises(ValueError, match="1 to 3 parts"):
        CORE.SkinnyPlan(**(GOOD | {"n": [40, 40]})).run(**arguments)


@needs_plan
def test_no_rows_no_driver_needed():
    arguments, _ = run_arguments(GOOD, x=0, y=0)
    assert CORE.SkinnyPlan(**(GOOD | {"m": 0})).run(**arguments) is None


@needs_plan
@pytest.mark.skipif(
    torch.cuda.is_available() or Path("/dev/nvidiactl").exists(),
    reason="a driver is present: the kernel would run on host memory",
)
def test_run_without_a_driver_says_so():
    arguments, memory = run_arguments(GOOD)
    with pytest.raises(RuntimeError, match="skinny_gemm: no (usable CUDA driver|CUDA device) was found"):
        CORE.SkinnyPlan(**GOOD).run(**arguments)
    assert not memory.any()


@needs_plan
def test_the_launcher_and_the_binding_have_one_signature(monkeypatch):
    """The launcher's own words reach the real class: by keyword to the plan, in order to `run`."""
    call = skinny_calls.placed(grouped(), "cpu")
    seen = []

    class Recorded:
        workspace_bytes = counter_bytes = 0

        def run(self, *arguments):
            seen.append(arguments)

    def make(**facts):
        CORE.SkinnyPlan(**facts)
        return Recorded()

    skinny_calls.on_this_machine(monkeypatch, make)
    skinny_calls.gemm(call)
    (arguments,) = seen
    words = "x act_scale norm_weight norm_bias norm_y out_scale parts workspace counters stream".split()
    assert len(arguments) == len(words)
    text = CORE.SkinnyPlan.run.__doc__
    assert [text.index(f" {word}: ") for word in words] == sorted(text.index(f" {word}: ") for word in words)
    part = call.parts[0]
    given = addresses([part.qweight, part.weight_scale, part.group_mult, part.bias, part.residual])
    assert list(arguments[6][0][:5]) == given and arguments[0] == call.x.data_ptr()
    skinny._plan.cache_clear()
