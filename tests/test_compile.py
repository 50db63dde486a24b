"""torch.compile takes the ops as they are: no graph break, the same bits."""

import shutil

import pytest
import torch
from compare import assert_same_bits
from torch import nn
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartEncoderLayer

from dqkernels import DQConfig, quantize_

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
