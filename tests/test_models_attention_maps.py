"""The attention maps of int8 attention: what `output_attentions` gives, and the gradient of a loss on it."""

from __future__ import annotations

import pytest
import torch
from attention_models import FIVE, peaked, run

from dqkernels import DQConfig, ops
from dqkernels.models import attention


def operands(dtype=torch.float32):
    shape = (2, 3, 4, 16), (2, 3, 5, 16)
    q, k = (torch.randn(s).to(dtype).requires_grad_() for s in shape)
    bias = torch.randn(1, 3, 4, 5).requires_grad_()
    mask = torch.rand(2, 1, 4, 5) > 0.3
    mask[0, 0, 1] = False  # a query that sees no key
    return q, k, bias, mask


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode, clip", [("per_token", None), ("per_token", 0.8), ("per_tensor", 0.5)])
def test_a_loss_on_maps_has_the_closed_form_gradient(mode, clip, dtype, autocast):
    q, k, bias, mask = operands(dtype)
    weight, scale = torch.randn(2, 3, 4, 5), 0.3
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        p = attention.attention_map(
            q, k, mask, bias, causal=False, softmax_scale=scale, mode=mode, clip=clip, backend="eager"
        )
        assert p.dtype == torch.float32
        (p * weight).sum().backward()
    scaled = q.detach().float() * scale
    (q8, qs, _), (k8, ks, _) = (ops.quantize_activation(x.detach(), mode, clip) for x in (scaled, k))
    q_hat, k_hat = q8.double() * qs.double().unsqueeze(-1), k8.double() * ks.double().unsqueeze(-1)
    score = (q_hat @ k_hat.mT + bias.detach().double()).masked_fill(~mask, float("-inf"))
    wanted = torch.softmax(score, dim=-1).nan_to_num(0.0)
    torch.testing.assert_close(p.double(), wanted, rtol=1e-5, atol=1e-7)
    grad_s = wanted * (weight - (wanted * weight).sum(dim=-1, keepdim=True))
    grad_q, grad_k = scale * grad_s @ k_hat, grad_s.mT @ q_hat
    if clip is not None:
        assert (scaled.abs() >= clip).any() and (k.abs() >= clip).any()
        grad_q, grad_k = grad_q * (scaled.abs() < clip), grad_k * (k.detach().float().abs() < clip)
    for found, expected in ((q.grad, grad_q), (k.grad, grad_k), (bias.grad, grad_s.sum(dim=0, keepdim=True))):
        tolerance = 2**-8 if found.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-6)


def test_a_hidden_key_may_hold_anything_and_no_key_at_all_is_no_error():
    q, k, bias, mask = operands()
    how = {"softmax_scale": 1.0, "mode": "per_token", "clip": None}
    wanted = attention.attention_map(q, k, mask, bias, causal=True, **how)
    wanted.square().sum().backward()
    hidden = torch.where(mask.any(dim=2)[:, :, :, None] & (torch.arange(5) < 3).view(1, 1, 5, 1), 0.0, float("nan"))
    seen = mask & (hidden[..., 0] == 0).unsqueeze(2)
    spoiled = (k.detach() + hidden).requires_grad_()
    found = attention.attention_map(q.detach(), spoiled, seen, bias.detach(), causal=True, **how)
    found.square().sum().backward()
    assert hidden.isnan().any() and found.isfinite().all() and spoiled.grad.isfinite().all()
    assert wanted[0, :, 1].abs().max() == 0
    empty = attention.attention_map(q, k[:, :, :0], None, None, causal=False, **how)
    assert empty.shape == (2, 3, 4, 0)


@pytest.mark.parametrize("family", FIVE)
def test_maps_are_close_to_the_float_ones_and_train_q_and_k(family):
    model = peaked(family)
    model.set_attn_implementation("eager")
    for module in model.modules():  # transformers 5.17 forgets the configs inside T5
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    with torch.no_grad():
        wanted = run(model, output_attentions=True)
    attention.enable(model, DQConfig())
    found = run(model, output_attentions=True)
    assert max(float(a.max()) for a in wanted.encoder_attentions) > 0.35, "flatter maps would be alike by themselves"
    loss = 0.0
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(found[name]) == len(wanted[name]) > 0
        for ours, theirs in zip(found[name], wanted[name], strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            rows = theirs.sum(dim=-1) > 0.5
            assert (ours - theirs)[rows].abs().max() < 0.06 and (ours - theirs)[rows].abs().mean() < 0.015
            loss = loss + ours.square().sum()
    loss.backward()
    leaves = ("q.weight", "k.weight") if family == "t5" else ("q_proj.weight", "k_proj.weight")
    grads = [p.grad for n, p in model.named_parameters() if n.endswith(leaves)]
    assert len(grads) >= 8 and all(g is not None and g.any() for g in grads)


def test_maps_cost_nothing_when_nobody_asks(monkeypatch):
    model = peaked("t5")
    attention.enable(model, DQConfig())
    calls = []
    monkeypatch.setattr(attention, "attention_map", lambda *a, **k: calls.append(1) or torch.zeros(2, 2, 1, 1))
    assert run(model).cross_attentions is None and not calls
    run(model, output_attentions=True)
    assert len(calls) == 6
