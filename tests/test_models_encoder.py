"""An encoder layer as one call of the compiled core: the bits of its steps, and when it runs step by step."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import tiny_models
import torch
from attention_models import KIN, peaked

from dqkernels import DQConfig, quantize_, report
from dqkernels.convert import calibrate
from dqkernels.kernels import cpu_encoder, native
from dqkernels.models import blocks, native_layer
from dqkernels.nn import QLinear

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = {
    "W4": DQConfig(weight_bits=4),
    "W8 per tensor, clipped": DQConfig(weight_bits=8, act_granularity="per_tensor", act_clip=2.0),
    "W2 four levels": DQConfig(weight_bits=2, weight_quantizer="four_level"),
    "W4 in groups": DQConfig(weight_bits=4, group_size=32),
    "one scale a matrix": DQConfig(weight_bits=2, weight_granularity="per_tensor"),
    "two widths": DQConfig(weight_bits=4, overrides={r"fc1|out_proj": {"weight_bits": 8}}),
    "two granularities": DQConfig(weight_bits=4, overrides={r"fc1": {"act_clip": 1.5}, r"fc2": {"act_clip": 3.0}}),
}
WHOLE = "3 fused layers; 2 of the encoder in one native call each"


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[int]:
    """Rows of every call of the core."""
    made, call = [], cpu_encoder.EncoderLayer.__call__

    def counted(self, x, mask):
        made.append(x.shape[0] * x.shape[1])
        return call(self, x, mask)

    monkeypatch.setattr(cpu_encoder.EncoderLayer, "__call__", counted)
    return made


def build(family: str = "bart", config: DQConfig | None = None, dtype: torch.dtype = torch.float32):
    model = peaked(family).to(dtype)
    return quantize_(model, CONFIGS["W4"] if config is None else config)


def source(batch: int, tokens: int, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, tiny_models.VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    given = {"input_ids": ids}
    if padded:
        lengths = torch.arange(batch) % tokens + 1
        given["attention_mask"] = (torch.arange(tokens) < lengths[:, None]).long()
    return given


@torch.no_grad()
def encode(model, **given) -> torch.Tensor:
    return model.get_encoder()(**given).last_hidden_state


@pytest.fixture
def stepwise(monkeypatch):
    """The encoder's output with every layer step by step."""

    def encoded(model, **given):
        with monkeypatch.context() as patch:
            patch.setattr(native_layer, "run", lambda *_: None)
            return encode(model, **given)

    return encoded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", blocks.FAMILIES)
def test_the_bits_of_its_steps(family, dtype, calls, stepwise):
    """Every family, with padding and without, for few rows and many."""
    model = build(family, dtype=dtype)
    assert report(model).blocks == WHOLE
    for batch, tokens, padded in ((1, 1, False), (3, 7, True), (2, 30, False), (4, 29, True)):
        given = source(batch, tokens, padded)
        calls.clear()
        got = encode(model, **given)
        assert calls == [batch * tokens] * 2
        want = stepwise(model, **given)
        assert torch.equal(got, want) and got.isfinite().all() and got.std() > 0.1


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["bart", "pegasus"])
def test_the_bits_of_its_steps_in_every_format(family, config, calls, stepwise):
    model = build(family, CONFIGS[config])
    given = source(5, 23, True)
    got = encode(model, **given)
    assert len(calls) == 2 and torch.equal(got, stepwise(model, **given))


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_static_scales(family, calls, stepwise):
    """Of the linears that share no input: measured ones, and those measured anew, for which the call is made anew."""
    static = {r"fc1|fc2|out_proj": {"act_granularity": "static"}}
    model = build(family, DQConfig(weight_bits=8, overrides=static))
    found = []
    for scale in (1.0, 3.0):
        with torch.no_grad():
            model.get_encoder().layers[0].final_layer_norm.weight.mul_(scale)
        calibrate(model, [{**source(2, 9, True), "decoder_input_ids": torch.tensor([[2], [3]])}])
        calls.clear()
        found.append(encode(model, **source(2, 9, True)))
        assert len(calls) == 2 and torch.equal(found[-1], stepwise(model, **source(2, 9, True)))
    assert not torch.equal(*found)


@pytest.mark.parametrize("config", ["W4", "W8 per tensor, clipped"])
def test_more_rows_than_it_takes_at_once(config, calls, stepwise):
    """Many sequences are taken in parts, unless one scale is that of all."""
    model = build("bart", CONFIGS[config])
    given = source(70, 30, True)  # 2,100 rows: parts of 17 sequences, the last of 2
    got = encode(model, **given)
    assert calls == [2100] * 2 and torch.equal(got, stepwise(model, **given))
    if config == "W4":
        for i in (0, 16, 17, 69):
            alone = {name: tensor[i : i + 1] for name, tensor in given.items()}
            assert torch.equal(encode(model, **alone)[0], got[i])


def test_a_mask_per_head_and_per_query(calls):
    """As the op takes them; transformers makes one for all heads, most often one for all queries."""
    model = build("pegasus")
    layer = model.get_encoder().layers[0]
    x = torch.randn(3, 11, layer.embed_dim, generator=torch.Generator().manual_seed(0))
    full = torch.rand(3, layer.self_attn.num_heads, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.7
    for mask in (full, full[:, :1], full[:1, :, :1], full[:1, :1], full.transpose(2, 3)):
        calls.clear()
        with torch.no_grad():
            got, want = layer(x, mask), layer._stepwise(x, mask)
        assert calls == [33] and torch.equal(got, want)


def test_threads_and_their_number_change_no_bit():
    model, given = build("bart"), source(40, 31, True)  # so many that threads are called together
    before, want = torch.get_num_threads(), encode(model, **given)
    try:
        torch.set_num_threads(1)
        assert torch.equal(encode(model, **given), want)
    finally:
        torch.set_num_threads(before)
    wrong = []

    def work():
        for _ in range(5):
            if not torch.equal(encode(model, **given), want):
                wrong.append(threading.get_ident())

    several = [threading.Thread(target=work) for _ in range(8)]
    for each in several:
        each.start()
    for each in several:
        each.join()
    assert not wrong


# ---- step by step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["self_attn.q_proj", "self_attn.out_proj", "self_attn", "fc1", "fc2", "activation_fn",
                                   "self_attn_layer_norm", "final_layer_norm"])  # fmt: skip
def test_who_is_watched_is_called(which, calls):
    """A hook on a module inside sees it run, and what it returns counts."""
    model, given = build("bart"), source(2, 9, False)
    want = encode(model, **given)
    seen = []
    handle = model.get_encoder().layers[1].get_submodule(which).register_forward_hook(lambda *a: seen.append(1))
    calls.clear()
    encode(model, **given)
    assert seen == [1] and len(calls) == 1
    assert report(model).blocks.endswith(
        "1 of the encoder in one native call each; 1 of the encoder step by step (one of its modules is watched)"
    )
    handle.remove()
    calls.clear()
    assert torch.equal(encode(model, **given), want) and len(calls) == 2


def test_what_else_runs_step_by_step(calls, stepwise, monkeypatch):
    """Gradients, autocast, attention maps, a float mask, an unknown option, another backend, a forward that was put on
    the layer: the same output."""
    model, given = build("bart"), source(3, 8, True)
    layer, want = model.get_encoder().layers[0], encode(model, **given)
    x, mask = torch.randn(3, 8, layer.embed_dim), torch.ones(3, 1, 8, 8, dtype=torch.bool)
    calls.clear()
    model.get_encoder()(**given).last_hidden_state.sum().backward()
    assert layer.final_layer_norm.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.get_encoder()(**given)
    with torch.no_grad():
        maps = model.get_encoder()(**given, output_attentions=True)
        assert len(maps.attentions) == 2 and torch.equal(maps.last_hidden_state, want)
        added = torch.zeros(3, 1, 8, 8).masked_fill(~mask, torch.finfo(torch.float32).min)
        assert torch.equal(layer(x, added), layer(x, mask)) and calls == [24]
        layer(x, mask, position_bias=torch.zeros(1, 2, 8, 8))
    assert calls == [24]
    monkeypatch.setenv("DQKERNELS_BACKEND", "eager")
    encode(model, **given)
    assert calls == [24]
    monkeypatch.delenv("DQKERNELS_BACKEND")
    layer.forward = layer.forward
    assert torch.equal(encode(model, **given), want) and len(calls) == 2
    assert "1 of the encoder step by step (a forward was put on it)" in report(model).blocks
    del layer.forward
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        encode(model, **given)  # module by module, as all are watched: other last bits
        assert len(calls) == 2
    finally:
        handle.remove()
    with torch.inference_mode():
        assert torch.equal(model.get_encoder()(**given).last_hidden_state, want) and len(calls) == 4


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_rows_that_are_not_finite(family, calls, stepwise):
    """They spoil their own sequence as the steps let them, and no other; what fp16 cannot hold is clamped behind."""
    model, most = build(family, dtype=torch.float16), torch.finfo(torch.float16).max - 1000
    layer = model.get_encoder().layers[0]
    x = torch.randn(2, 9, layer.embed_dim, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        clean = layer(x, None)
        x[1, 4, 3] = float("nan")
        got, want = layer(x, None), layer._stepwise(x, None)
        assert torch.equal(got[0], clean[0]) and clean.isfinite().all() and got[1].isnan().any()
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())
        layer.fc2.weight_scale.mul_(1e7)
        got, want = layer(x[:1], None), layer._stepwise(x[:1], None)
    assert torch.equal(got.nan_to_num(), want.clamp(-most, most).nan_to_num()) and len(calls) == 3
    assert family == "bart" or got.abs().max() == most


def test_norms_of_another_type(calls, stepwise):
    model = build("pegasus", dtype=torch.bfloat16)
    for layer in model.get_encoder().layers:
        layer.final_layer_norm.float()
    given = source(2, 9, True)
    assert torch.equal(encode(model, **given), stepwise(model, **given)) and len(calls) == 2


@pytest.mark.parametrize("change", ["norm", "wider", "narrower", "attention"])
def test_parts_that_do_not_fit_are_refused_in_the_words_of_the_steps(change, calls):
    """The core reads as many numbers as a width says: whoever has fewer never gets there."""
    model = build("bart")
    layer, other = model.get_encoder().layers[0], DQConfig(weight_bits=4)
    if change == "norm":
        layer.final_layer_norm = torch.nn.LayerNorm(8)
    elif change == "attention":
        layer.self_attn.out_proj = QLinear.from_linear(torch.nn.Linear(24, 40), other)
    else:
        layer.fc1 = QLinear.from_linear(torch.nn.Linear(40, 600 if change == "wider" else 16), other)
    with pytest.raises((ValueError, RuntimeError)):
        encode(model, **source(2, 5, False))
    assert not calls
    assert "1 of the encoder step by step (its parts have widths that do not fit each other)" in report(model).blocks


@pytest.mark.parametrize(("config", "reason"), [
    (DQConfig(weight_bits=4, attention="float"), "its attention is not int8, or not fused"),
    (DQConfig(weight_bits=4, overrides={r"v_proj": {"weight_bits": 8}}), "Q, K and V are launches of their own"),
    (DQConfig(weight_bits=4, overrides={r"fc1": {"skip": True}}), "fc1 are launches of their own (one is not packed)"),
    (DQConfig(weight_bits=4, act_granularity="static"), "Q, K and V are launches of their own (static scales"),
    (DQConfig(weight_bits=4, backend="eager"), "qgemm of Q, K and V runs on eager"),
])  # fmt: skip
def test_the_report_says_why(config, reason, calls):
    model = build("bart", config)
    if config.act_granularity == "static":
        calibrate(model, [{**source(2, 9, False), "decoder_input_ids": torch.tensor([[2], [3]])}])
    encode(model, **source(2, 5, False))
    assert not calls and f"2 of the encoder step by step ({reason}" in report(model).blocks


def test_the_report_of_a_model_that_cannot_run(monkeypatch):
    """What the steps would raise is a reason here; so is training."""
    model = build("bart", DQConfig(weight_bits=4, backend="cuda"))
    assert "2 of the encoder step by step (" in report(model).blocks
    model = build("bart")
    for layer in model.get_encoder().layers:
        layer.dropout = 0.1
    model.train()
    assert report(model).blocks.endswith("2 of the encoder step by step (in training mode the modules run one by one)")


def test_a_wrong_mask_is_refused_in_the_words_of_attention():
    layer = build("bart").get_encoder().layers[0]
    with torch.no_grad(), pytest.raises(ValueError, match=r"encoder\.layers\.0\.self_attn: mask must"):
        layer(torch.randn(2, 5, layer.embed_dim), torch.ones(2, 1, 5, 6, dtype=torch.bool))


def test_the_launcher_refuses_another_input():
    layer = build("bart").get_encoder().layers[0]
    made = native_layer._make(layer, torch.float32)
    for x in (torch.zeros(1, 2, 39), torch.zeros(2, 40), torch.zeros(1, 2, 40, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"x must be torch.float32 \[batch, tokens, 40\] on the CPU, got"):
            made(x, None)
    assert made(torch.zeros(0, 2, 40), None).shape == (0, 2, 40)


def test_the_core_refuses_more_linears_than_a_layer_keeps(monkeypatch):
    """A call of the GEMM takes 64, a layer has room for three."""
    layer, inner = build("bart").get_encoder().layers[0], cpu_encoder.cpu_gemm.kept

    def four(k, dtype, parts, **options):
        return inner(k, dtype, [*parts, parts[0]] if len(parts) == 3 else parts, **options)

    monkeypatch.setattr(cpu_encoder.cpu_gemm, "kept", four)
    with pytest.raises(ValueError, match="1 to 3 where it is kept"):
        native_layer._make(layer, torch.float32)


# ---- weights that change ------------------------------------------------------------------------------------------


def test_weights_that_are_exchanged(calls, stepwise):
    """In place, by another tensor, by another module: the next call computes with them."""
    model, given = build("bart"), source(2, 9, True)
    layer, seen = model.get_encoder().layers[0], [encode(model, **given)]

    def moved():
        seen.append(encode(model, **given))
        assert torch.equal(seen[-1], stepwise(model, **given)) and not torch.equal(seen[-1], seen[-2])

    with torch.no_grad():
        layer.fc1.weight_scale.mul_(2)
        moved()
        layer.fc2.bias.data = torch.randn_like(layer.fc2.bias)
        moved()
        layer.fc2.bias.data = torch.randn(2 * layer.embed_dim)[::2]  # which the core would have to copy
        moved()
        layer.fc2.bias.mul_(2)
        moved()
        layer.fc2.bias.data = layer.fc2.bias.contiguous()
        layer.final_layer_norm.weight.data = layer.final_layer_norm.weight * 1.5
        moved()
        layer.self_attn.out_proj = copy.deepcopy(model.get_encoder().layers[1].self_attn.out_proj)
        moved()
        layer.self_attn.scaling *= 0.5
        moved()
        layer.activation_fn = torch.nn.ReLU()
        moved()
    model.to(torch.bfloat16)
    assert torch.equal(encode(model, **given), stepwise(model, **given))
    assert len(calls) == 2 * 8 + 2, "of two calls one layer was step by step"


def test_copies_are_their_own_and_nothing_outlives_a_model():
    model, given = build("bart"), source(2, 9, True)
    want = encode(model, **given)
    gc.collect()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_encoder().layers[0].fc1.weight_scale.mul_(2)
    assert not torch.equal(encode(other, **given), want) and torch.equal(encode(model, **given), want)
    layers = [*model.get_encoder().layers, *other.get_encoder().layers]
    assert all(each in native_layer._MADE for each in layers)
    count = len(native_layer._MADE)
    blocks.unpatch(other)
    assert len(native_layer._MADE) == count - 2, "a layer that is fused no more holds nothing"
    del model, other, layers
    gc.collect()
    assert len(native_layer._MADE) == count - 4


def test_no_family_is_forgotten():
    assert {"bart", "mbart", "marian", "pegasus", *KIN} - {"mt5"} == set(blocks.FAMILIES)
