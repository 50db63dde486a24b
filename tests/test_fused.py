"""fused.qlinear_multi: the same as its steps one by one, on every backend of the machine; refusals in words."""

from __future__ import annotations

import types

import pytest
import torch
from compare import assert_same_bits

from dqkernels import backends, fused, ops

K, SIZES = 40, (24, 16, 17)
WIDTHS = {"W8": (8, "absmax", -1), "W4 groups": (4, "absmax", 32), "W2": (2, "four_level", -1)}


def weights(width: str, count: int):
    bits, quantizer, group_size = WIDTHS[width]
    made = [ops.quantize_weight(torch.randn(n, K), bits, quantizer, "per_channel", group_size) for n in SIZES[:count]]
    qweight, scale, mult = (list(tensors) for tensors in zip(*made, strict=True))
    return qweight, scale, mult, [bits, quantizer == "four_level", group_size]


def call(x, norm, width, count, bias=True, mode="per_token", clip=None, act_scale=None, **where):
    qweight, scale, mult, format_ = weights(width, count)
    biases = [torch.randn(n) if bias and i != 1 else None for i, n in enumerate(SIZES[:count])]
    operands = (qweight, scale, mult, biases)
    rest = (mode, clip, act_scale, "none", torch.float32)
    return (x, *norm, *operands, *format_, list(SIZES[:count]), *rest), where


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [(2, 3), (20,), (0,)])
@pytest.mark.parametrize("norm", [False, True])
def test_equals_its_steps(width, rows, norm):
    torch.manual_seed(0)
    x = torch.randn(*rows, K)
    norms = (torch.rand(K), torch.randn(K), 1e-5) if norm else (None, None, 0.0)
    args, _ = call(x, norms, width, 3, clip=2.5)
    got = fused.qlinear_multi(*args)
    y = x
    if norm:
        y = ops.layernorm_quantize(x, None, *norms, "per_token", 2.5)[0]
        assert_same_bits(got.pop(0), y, may_be_zero=not x.numel())
    _, _, _, _, *lists, bits, four_level, group_size, sizes = args[:12]
    assert len(got) == 3
    for packed, scale, mult, bias, n, out in zip(*lists, sizes, got, strict=True):
        options = (bits, four_level, group_size, n, "per_token", 2.5, None, "none", torch.float32)
        expected = ops.qlinear(y, packed, scale, mult, bias, None, *options)
        assert_same_bits(out, expected, may_be_zero=not x.numel())


@pytest.mark.parametrize("mode", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("width", WIDTHS)
def test_opcheck(width, mode):
    act_scale = torch.tensor([0.05]) if mode == "static" else None
    for norm in ((None, None, 0.0), (torch.rand(K), None, 1e-5), (torch.rand(K), torch.rand(K), 1e-5)):
        args, where = call(torch.randn(2, 3, K), norm, width, 2, mode=mode, act_scale=act_scale)
        torch.library.opcheck(fused.qlinear_multi, args, where)


@pytest.mark.parametrize("width", WIDTHS)
def test_autocast_stays_outside(width, monkeypatch):
    """Its steps are the backends' own functions, whose products of codes autocast would round."""
    torch.manual_seed(0)
    args, _ = call(torch.randn(20, K), (torch.rand(K), torch.randn(K), 1e-5), width, 3)
    seen = []
    inner = backends._module("eager").qgemm

    def qgemm(*operands, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return inner(*operands, **options)

    monkeypatch.setattr(backends._module("eager"), "qgemm", qgemm)
    wanted = fused.qlinear_multi(*args, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        got = fused.qlinear_multi(*args, backend="eager")
    assert seen == [False] * 6
    for a, b in zip(got, wanted, strict=True):
        assert_same_bits(a, b)


def test_compiles_whole():
    args, _ = call(torch.randn(4, K), (torch.rand(K), None, 1e-5), "W4 groups", 2)
    eager = fused.qlinear_multi(*args)
    compiled = torch.compile(lambda x: fused.qlinear_multi(x, *args[1:]), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(args[0]), eager, strict=True):
        assert_same_bits(got, expected)


def test_has_no_gradient():
    args, _ = call(torch.randn(2, K, requires_grad=True), (None, None, 0.0), "W8", 1)
    with pytest.raises(RuntimeError, match="qlinear_multi has no gradient: it is an inference op"):
        fused.qlinear_multi(*args)[0].sum().backward()


def test_refusals():
    x = torch.randn(2, K)
    args, _ = call(x, (None, None, 0.0), "W8", 2)
    with pytest.raises(ValueError, match="lists of one length, 1 to 64, got .*'bias': 1"):
        fused.qlinear_multi(*args[:7], args[7][:1], *args[8:])
    with pytest.raises(ValueError, match="norm_bias needs norm_weight"):
        fused.qlinear_multi(x, None, torch.ones(K), *args[3:])
    with pytest.raises(ValueError, match=r"weight must be \[40\], got \[39\]"):
        fused.qlinear_multi(x, torch.ones(K - 1), *args[2:])
    with pytest.raises(ValueError, match="bias must be"):
        fused.qlinear_multi(*args[:7], args[7][::-1], *args[8:])
    with pytest.raises(backends.BackendError, match="cannot run quantize_activation"):
        fused.qlinear_multi(*args, backend="cuda")


class OneKernel:
    """A backend with the launch; records what it is asked."""

    def __init__(self):
        self.asked = []

    def qlinear_multi(self, x, norm, parts, **options):
        self.asked.append((x, norm, parts, options))
        return [x.new_zeros(1)]


def test_one_kernel_is_taken_where_there_is_one(monkeypatch):
    stand_in = OneKernel()
    asked = {}
    args, _ = call(torch.randn(17, K), (torch.rand(K), torch.rand(K).half(), 1e-3), "W4 groups", 2)

    def one_kernel(op, device_type, backend, **facts):
        asked.update(facts, op=op, backend=backend)
        return backends.Choice("stand-in", "")

    monkeypatch.setattr(backends, "one_kernel", one_kernel)
    monkeypatch.setattr(backends, "_module", lambda name: stand_in)
    assert fused.qlinear_multi(*args)[0].numel() == 1
    assert asked == {
        "op": "qlinear_multi", "backend": "auto", "bits": 4, "group_size": 32, "many_rows": False, "where": None,
        "parts": 2, "prologue": False, "uniform": True, "norm": False,
    }  # fmt: skip
    ((_, norm, parts, options),) = stand_in.asked
    assert norm[2] == 1e-3 and len(parts) == 2 and parts[1][4] == SIZES[1] and options["act_mode"] == "per_token"


def test_mixed_parts_are_not_given_to_one_kernel(monkeypatch):
    """Biases of two types, or one scale beside one per channel: the kernel reads one kind, so the facts say so."""
    asked = []
    monkeypatch.setattr(backends, "one_kernel", lambda *given, **facts: asked.append(facts["uniform"]))
    args, _ = call(torch.randn(2, K), (None, None, 0.0), "W8", 3)
    for place, part, other in ((7, 2, args[7][2].half()), (5, 0, args[5][0][:1])):
        changed = list(args[place])
        changed[part] = other
        fused.qlinear_multi(*args[:place], changed, *args[place + 1 :])
    fused.qlinear_multi(*args)
    assert asked == [False, False, True]


def test_the_cuda_kernel_says_what_it_takes():
    from dqkernels.backends import cuda

    assert cuda.supports("qlinear_multi", bits=4, group_size=64, prologue=True, norm=True) is None
    assert "up to 16 rows" in cuda.supports("qlinear_multi", prologue=False, norm=True)
    assert "norm in the dtype of x" in cuda.supports("qlinear_multi", prologue=True, norm=False)
    assert "one kind of weight scales" in cuda.supports("qlinear_multi", uniform=False)
    assert cuda.supports("qlinear_multi", parts=3) is None
    assert "up to 3 linears in a launch, not 4" in cuda.supports("qlinear_multi", parts=4)
    assert "up to 64 rows" in cuda.defers("qlinear_multi", many_rows=True)
    assert cuda.defers("qlinear_multi", many_rows=False, where=None) is None


@pytest.mark.parametrize(("rows", "where"), [(1, None), (16, None), (17, (0, 32, 3072, 1024)), (65, None)])
def test_one_launch_is_weighed_where_it_quantizes_elsewhere(rows, where):
    """Up to 16 rows it stands for four launches; above, its GEMM is one of the others, of all parts together."""
    x = types.SimpleNamespace(
        is_cuda=True, shape=(rows, 1024), numel=lambda: rows * 1024, get_device=lambda: 0
    )  # fmt: skip
    facts = backends.gemm_facts(x, 3072, 4, -1, own=fused.PROLOGUE_ROWS)
    assert facts["where"] == where and facts["many_rows"] is (rows > 64)
