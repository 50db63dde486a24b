"""The ops of training on a GPU: forward the bits of eager on the CPU, backward no worse than torch in 16 bits."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from compare import assert_bounded, assert_same_bits
from test_straight_through import FIXED_OR_LEARNED, Linear

from dqkernels import DQConfig, ops
from dqkernels import straight_through as st
from dqkernels.train import packed_copy, prepare_qat

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def usable():
    pytest.importorskip("triton", reason="triton is not installed")
    from dqkernels.backends import triton as backend

    available, reason = backend.available("cuda")
    if not available:
        pytest.skip(reason)


def cuda(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, learned", FIXED_OR_LEARNED)
def test_forward_bits_and_bounded_gradients(name, learned, dtype):
    """Error to float64 at most twice that of torch's own product of the dequantized matrices in `dtype`; 65 tokens."""
    case = Linear(name, dtype, learned, clipped=True, lead=(5, 13))
    host = st.qlinear_train(**case.arguments(case.leaves()), backend="eager")
    leaves = [None if leaf is None else leaf.detach().cuda().requires_grad_() for leaf in case.leaves()]
    there = {key: cuda(value) for key, value in case.arguments(leaves).items()}
    y = st.qlinear_train(**there, strict=True)
    assert_same_bits(y.detach().cpu(), host.detach())
    y.backward(case.grad.cuda())
    grad = case.grad.cuda().reshape(-1, host.shape[-1])
    truth, wide = case.truth(), case.truth(torch.float32)
    rounded = torch.from_numpy(case.q).float() * torch.from_numpy(case.act_scale).unsqueeze(1)
    torchs = [(grad @ case.matrix(torch.float32).to(dtype).cuda()).cpu(), (grad.t() @ rounded.to(dtype).cuda()).cpu()]
    torchs[0] = torch.where(wide[0] != 0, torchs[0].reshape(wide[0].shape).float(), 0.0)
    torchs[1] = torch.where(wide[1] != 0, torchs[1].float(), 0.0)
    for index, what in enumerate(("x", "weight")):
        assert_bounded(leaves[index].grad, truth[index], torchs[index], what)
    if learned:
        # The sum over K of a gradient that errs as torch's does, times slopes of about one weight.
        error = (leaves[2].grad.cpu().double() - truth[2]).abs().max()
        assert error <= 2.0**-6 * case.terms.cpu(), f"log_step: {error}"
    assert_bounded(leaves[3].grad, truth[3], wide[3] + 2.0**-22 * wide[3].abs().max(), "bias")


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_model_trains_on_the_gpu_and_packs_to_its_own_logits(family, learned):
    model = prepare_qat(tiny_models.make(family), DQConfig(weight_bits=2, embedding_bits=4), learned)
    host = copy.deepcopy(model)
    model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.tensor([[5, 6, 7, 8, 9, 2]], device="cuda")
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(input_ids=ids, decoder_input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    model.eval()
    packed = packed_copy(model, torch.float32)
    with torch.no_grad():
        want = model(input_ids=ids, decoder_input_ids=ids).logits
        assert torch.equal(packed(input_ids=ids, decoder_input_ids=ids).logits, want)
    first = next(m for m in model.modules() if hasattr(m, "weight_log_step"))
    again = next(m for m in host.modules() if hasattr(m, "weight_log_step"))
    with torch.no_grad():
        again.weight.copy_(first.weight.cpu())
        if learned:
            again.weight_log_step.copy_(first.weight_log_step.cpu())
    if not learned:  # exp() of the log step may differ by a bit between devices
        for mine, theirs in zip(first.packed()[:2], again.packed()[:2], strict=True):
            assert_same_bits(mine.cpu(), theirs)


def test_autocast_shields_on_cuda_too():
    case = Linear("w4", torch.float16)
    there = {key: cuda(value) for key, value in case.arguments(case.leaves()).items()}
    want = st.qlinear_train(**there)
    for backend in ("eager", "triton"):
        with torch.autocast("cuda", dtype=torch.float16):
            assert_same_bits(st.qlinear_train(**there, backend=backend), want)
            codes = ops.quantize_activation(there["x"].detach(), "per_token", None, False, None, backend)
        assert_same_bits(codes[0].cpu(), ops.quantize_activation(case.x, "per_token")[0])
