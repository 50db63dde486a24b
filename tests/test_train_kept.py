"""What training keeps for the backward pass: int8 codes, once for all layers that read one tensor, no float."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_straight_through import K, Linear, N, one_thread  # noqa: F401 - a fixture

from dqkernels import reference
from dqkernels import straight_through as st
from dqkernels.config import LayerConfig
from dqkernels.train.modules import QATLinear


def kept_by(call):
    """What autograd keeps for the backward pass of `call`."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


def layers(count=3, **more):
    layer = LayerConfig(**{"bits": 4, "quantizer": "absmax", **more})
    return [QATLinear.from_linear(torch.nn.Linear(K, N), layer, learned_scale=layer.group_size == -1)
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize("act_clip", [None, 1.5])
def test_siblings_share_one_set_of_int8_codes_and_no_float_is_kept(act_clip):
    """q, k and v read one tensor: it is quantized once, and what is kept of it is a byte (and a bit) per element."""
    projections = layers(act_clip=act_clip)
    x = torch.randn(8, 60, K, requires_grad=True)
    kept = kept_by(lambda: sum(p(x).sum() for p in projections))
    parameters = {p.data_ptr() for module in projections for p in module.parameters()}
    activations = [t for t in kept if t.data_ptr() not in parameters and t.numel() >= x.numel() // 8]
    assert {t.dtype for t in activations} == {torch.int8} | ({torch.uint8} if act_clip else set())
    for dtype in {t.dtype for t in activations}:
        mine = [t for t in activations if t.dtype == dtype]
        assert len(mine) == 3 and len({t.data_ptr() for t in mine}) == 1
    assert len([t for t in activations if t.dtype == torch.int8 and t.shape == x.shape]) == 3
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in kept if t.data_ptr() not in parameters}
    floats = kept_by(lambda: sum(torch.nn.functional.linear(x, p.weight, p.bias).sum() for p in projections))
    float_bytes = {t.data_ptr(): t.numel() * t.element_size() for t in floats if t.data_ptr() not in parameters}
    assert sum(unique.values()) < 0.5 * sum(float_bytes.values())


def test_codes_are_not_shared_where_they_must_not_be():
    """Another clip, another granularity, or a tensor changed in place: its own codes."""
    one, two = layers(1)[0], layers(1, act_clip=0.5)[0]
    three = layers(1, act_granularity="per_tensor")[0]
    with torch.no_grad():
        two.weight.copy_(one.weight), three.weight.copy_(one.weight)
    x = torch.randn(4, 5, K)
    fresh = [module(x.clone()) for module in (one, two, three)]
    assert all(torch.equal(module(x), want) for module, want in zip((one, two, three), fresh, strict=True))
    before = one(x)
    x.mul_(-3)
    assert torch.equal(one(x), one(x.clone())) and not torch.equal(one(x), before)


def test_no_float_weight_is_kept_beside_the_parameter():
    """With a learned step or a clip the backward pass reads the master weight; the parameter itself, no copy."""
    for learned, clipped in itertools.product((False, True), (False, True)):
        case = Linear("w4", learned=learned, clipped=clipped)
        leaves = case.leaves()
        kept = kept_by(lambda case=case, leaves=leaves: st.qlinear_train(**case.arguments(leaves)))
        floats = [t for t in kept if t.is_floating_point() and t.numel() >= N * K // 2]
        assert [t.data_ptr() for t in floats] == ([leaves[1].data_ptr()] if learned or clipped else [])


def test_mask_bits_are_of_the_strict_clip():
    x = torch.tensor([[1.5, -1.5, 1.4999999, 0.0, float("nan"), 9.0, -1.25, 1.5000001]])
    bits = reference.pack_bits(x.abs() < 1.5)
    assert bits.item() == 0b01001100
