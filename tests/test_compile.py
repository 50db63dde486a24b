"""torch.compile takes the ops as they are: no graph break, the same bits."""

import shutil

import pytest
import torch
from compare import assert_same_bits
from torch import nn
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartEncoderLayer

from dqkernels import DQConfig, ops, quantize_

# inductor writes C++ on a CPU; where no compiler is, AOT autograd still sees every op.
BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def encoder_layer(config):
    bart = BartConfig(
        d_model=32, encoder_attention_heads=4, encoder_ffn_dim=48, dropout=0.0, attn_implementation="eager"
    )
    torch.manual_seed(0)
    return quantize_(BartEncoderLayer(bart, layer_idx=0).eval(), config)


@pytest.mark.parametrize("config", [
    DQConfig(), DQConfig(weight_bits=2, group_size=32), DQConfig.preset("dq-bart-2-2-8"),
], ids=lambda config: config.name)  # fmt: skip
def test_a_quantized_encoder_layer_compiles_whole(config):
    """aot_eager runs the same float kernels as eager: bits. (inductor fuses LayerNorm and GELU: next test.)"""
    layer = encoder_layer(config)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        wanted, got = layer(x, None), compiled(x, None)
    wanted, got = (y[0] if isinstance(y, tuple) else y for y in (wanted, got))
    assert_same_bits(got, wanted)


@pytest.mark.skipif(BACKEND != "inductor", reason="no C++ compiler for inductor")
def test_inductor_keeps_the_bits_of_packed_layers():
    """Only packed layers and exact float ops between them: what inductor generates must not touch a code."""
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 40, bias=False)).eval())
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    with torch.no_grad():
        for rows in (3, 5):  # the second has another batch: shapes become dynamic
            x = torch.randn(rows, 40)
            assert_same_bits(compiled(x), model(x), f"{rows} rows")


def test_gradients_through_a_compiled_layer():
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Linear(40, 24)).eval(), DQConfig(act_clip=1.5))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    compiled(x).square().sum().backward()
    model(twin).square().sum().backward()
    assert_same_bits(x.grad, twin.grad)


@pytest.mark.parametrize("mode, clip", [("per_token", None), ("per_tensor", 1.5)])
def test_gradients_through_compiled_attention(mode, clip):
    """T5's self-attention: one graph, the bits of eager, whether the bias learns or not."""

    def attend(q, k, v, bias):
        return ops.qattention(q, k, v, None, bias, True, 0.25, mode, clip)

    torch.manual_seed(0)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    shapes = ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), (1, 3, 5, 7))
    for learns in (True, False):
        tensors = [torch.randn(shape, requires_grad=learns or i < 3) for i, shape in enumerate(shapes)]
        twins = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        compiled(*tensors).square().sum().backward()
        attend(*twins).square().sum().backward()
        for i, (x, twin) in enumerate(zip(tensors, twins, strict=True)):
            assert (x.grad is None) == (not x.requires_grad)
            if x.requires_grad:
                assert_same_bits(x.grad, twin.grad, f"argument {i}")
