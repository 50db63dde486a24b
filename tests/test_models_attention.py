"""Int8 attention inside models of transformers: what it computes, where, and what stays as it was."""

from __future__ import annotations

import copy
import dataclasses
import logging
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from attention_models import FIVE, IDS, KIN, PADDED, peaked, run
from compare import assert_same_bits
from tiny_models import logits, make
from torch import nn

import dqkernels
from dqkernels import DQConfig, ops
from dqkernels.cli import main
from dqkernels.kernels import native
from dqkernels.models import attention

INT8 = DQConfig(attention="int8")


# ------------------------------------------------------------------------------------------ what it computes


def calls_of(model: nn.Module, padded: bool) -> dict[str, tuple]:
    """name -> (module, hidden, key_value_states or None, output) of one forward pass."""
    found = {}

    def record(name):
        def hook(module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            states = kwargs.get("key_value_states", args[1] if len(args) > 1 else None)
            found[name] = module, hidden, states, output[0]

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in model.named_modules()
        if hasattr(module, attention.KEY)
    ]
    with torch.no_grad():
        run(model, padded)
    for handle in handles:
        handle.remove()
    return found


def by_hand(module, hidden, states, visible, bias, scale):
    """Query by query over the keys it sees and no others: no mask, no causal flag, no batch."""
    names = ("q", "k", "v", "o") if hasattr(module, "q") else ("q_proj", "k_proj", "v_proj", "out_proj")
    to_q, to_k, to_v, to_out = (getattr(module, name) for name in names)
    heads = bias.shape[0] if bias is not None else getattr(module, "num_heads", None) or module.n_heads
    states = hidden if states is None else states
    q, k, v = ((f(x).unflatten(-1, (heads, -1))) for f, x in ((to_q, hidden), (to_k, states), (to_v, states)))
    out = torch.zeros_like(q)
    for b, i, h in ((b, i, h) for b in range(q.shape[0]) for i in range(q.shape[1]) for h in range(heads)):
        seen = visible[b, i]
        one = [q[b, i, h].view(1, 1, 1, -1), *(x[b, seen, h][None, None] for x in (k, v))]
        own = None if bias is None else bias[h, i, seen].view(1, 1, 1, -1)
        out[b, i, h] = ops.qattention(*one, None, own, False, scale).flatten()
    return to_out(out.flatten(2))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("family", [*FIVE, *KIN])
@torch.no_grad()
def test_every_attention_is_the_op_over_the_keys_it_sees(family, padded):
    model = peaked(family)
    names = attention.enable(model, DQConfig())
    calls = calls_of(model, padded)
    assert sorted(calls) == sorted(names) and len(names) >= 4
    source = PADDED["attention_mask"].bool() if padded else torch.ones(2, 6, dtype=torch.bool)
    target = PADDED["decoder_attention_mask"].bool() if padded else torch.ones(2, 5, dtype=torch.bool)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    is_t5 = "t5" in family
    for name, (module, hidden, states, output) in calls.items():
        encoder, cross = "encoder.block" in name or "encoder.layers" in name, states is not None
        visible = source[:, None].expand(2, hidden.shape[1], 6) if encoder or cross else causal & target[:, None]
        bias = None
        if is_t5 and not cross:
            stack = model.encoder if encoder else model.decoder
            bias = stack.block[0].layer[0].SelfAttention.compute_bias(*visible.shape[1:])[0]
        wanted = by_hand(module, hidden, states, visible, bias, 1.0 if is_t5 else (40 // 2) ** -0.5)
        assert_same_bits(output, wanted)


@pytest.mark.parametrize("family", ["bart", "t5"])
@torch.no_grad()
def test_batch_mates_and_padding_change_no_bit(family):
    model = dqkernels.quantize_(peaked(family), INT8)
    both = run(model).logits
    for i, (length, target) in enumerate([(6, 5), (4, 3)]):
        alone = model(input_ids=IDS[i : i + 1, :length], decoder_input_ids=IDS[i : i + 1, :target]).logits
        assert_same_bits(both[i, :target], alone[0])


@torch.no_grad()
def test_mode_clip_and_overrides_reach_the_op():
    model = peaked("bart")
    overrides = {r"layers\.1\.": {"act_clip": 0.25}, "decoder": {"act_granularity": "per_token", "skip": True}}
    config = DQConfig(act_granularity="per_tensor", act_clip=0.5, overrides=overrides)
    attention.enable(model, config)
    found = calls_of(model, padded=True)
    for layer, clip in ((0, 0.5), (1, 0.25)):
        module, hidden, _, output = found[f"model.encoder.layers.{layer}.self_attn"]
        q, k, v = (
            f(hidden).unflatten(-1, (2, 20)).transpose(1, 2) for f in (module.q_proj, module.k_proj, module.v_proj)
        )
        mask = PADDED["attention_mask"].bool()[:, None, None]
        wanted = ops.qattention(q, k, v, mask, None, False, 20**-0.5, "per_tensor", clip)
        assert_same_bits(output, module.out_proj(wanted.transpose(1, 2).flatten(2)))
    modes = {m.dqkernels_attention.name: m.dqkernels_attention.mode for m, _ in attention._enabled(model)}
    assert {modes["model.decoder.layers.0.self_attn"], modes["model.decoder.layers.0.encoder_attn"]} == {"per_token"}


@torch.no_grad()
def test_a_float_mask_is_added_to_the_scores():
    model = peaked("bart")
    attention.enable(model, DQConfig())
    visible = PADDED["attention_mask"].bool()[:, None, None].expand(2, 1, 6, 6)
    encoder = model.get_encoder()
    added = torch.zeros(2, 1, 6, 6).masked_fill(~visible, torch.finfo(torch.float32).min)
    wanted = encoder(input_ids=IDS, attention_mask=visible).last_hidden_state
    assert_same_bits(encoder(input_ids=IDS, attention_mask=added).last_hidden_state, wanted)
    assert not torch.equal(encoder(input_ids=IDS).last_hidden_state, wanted)


@torch.no_grad()
def test_a_longer_cache_without_a_mask_is_read_from_its_start():
    """What transformers hands over when it fills an empty static cache; its sdpa function does the same."""
    model = peaked("t5")
    attention.enable(model, DQConfig())
    module = model.decoder.block[0].layer[0].SelfAttention
    q, bias = torch.randn(2, 2, 3, 16), torch.randn(1, 2, 3, 7)
    k, v = torch.randn(2, 2, 2, 7, 16)
    out, weights = attention.int8_attention(module, q, k, v, None, position_bias=bias, output_attentions=True)
    cut = q, k[:, :, :3], v[:, :, :3]
    assert_same_bits(out.transpose(1, 2), ops.qattention(*cut, None, bias[..., :3], True, 0.25))
    assert weights.shape == (2, 2, 3, 3)
    again = attention.int8_attention(module, q, k, v, None, position_bias=bias, is_causal=False)[0]
    assert_same_bits(again.transpose(1, 2), ops.qattention(q, k, v, None, bias, False, 0.25))
    one = attention.int8_attention(module, q[:, :, :1], k, v, None, position_bias=bias[:, :, :1], scaling=2.0)[0]
    assert_same_bits(one.transpose(1, 2), ops.qattention(q[:, :, :1], k, v, None, bias[:, :, :1], False, 2.0))


# --------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_generate_gives_the_same_tokens_with_every_cache(family, beams):
    model = dqkernels.quantize_(peaked(family), INT8)
    how = {"attention_mask": PADDED["attention_mask"], "num_beams": beams, "max_new_tokens": 8, "min_new_tokens": 8}
    how["no_repeat_ngram_size"] = 1  # a random model would say one word again and again
    plain = model.generate(IDS, use_cache=False, **how)
    assert plain.shape == (2, 9) and len(set(plain.flatten().tolist())) > 9
    assert torch.equal(model.generate(IDS, **how), plain)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **how), plain)


# ----------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("family", FIVE)
def test_a_loaded_model_gives_the_bits_of_the_saved_one(family, tmp_path):
    model = dqkernels.quantize_(peaked(family), INT8)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert_same_bits(logits(type(model).from_pretrained(tmp_path)), wanted)
    attention.disable(model)
    assert not torch.equal(logits(model), wanted)


def test_from_pretrained_quantizes_alike_and_load_takes_a_backend(tmp_path):
    source = peaked("bart")
    source.save_pretrained(tmp_path / "float")
    model = dqkernels.quantize_(source, INT8)
    wanted = logits(model)
    direct = type(model).from_pretrained(tmp_path / "float", quantization_config=INT8)
    assert_same_bits(logits(direct), wanted)
    direct.save_pretrained(tmp_path / "packed")
    loaded = dqkernels.load(tmp_path / "packed", backend="eager")
    assert {o.backend for _, o in attention._enabled(loaded)} == {"eager"}
    # Of one backend: LayerNorm has other last bits on another.
    forced = dqkernels.quantize_(peaked("bart"), dataclasses.replace(INT8, backend="eager"))
    assert_same_bits(logits(loaded), logits(forced))
    restored = loaded.dequantize()
    assert restored.config._attn_implementation == "sdpa" and not list(attention._enabled(restored))


def test_a_model_is_not_saved_under_a_config_that_says_otherwise(tmp_path):
    model = dqkernels.quantize_(peaked("bart"), INT8)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)  # of this process only: the folder is an int8 model's
    assert dqkernels.report(dqkernels.load(tmp_path)).attention.startswith("int8 per_token on ")
    attention.enable(model, DQConfig(act_clip=2.0))
    with pytest.raises(ValueError, match=r"its attention is int8 with .*'per_token', 2.0.* says attention='int8' with"):
        model.save_pretrained(tmp_path)
    attention.disable(model)
    with pytest.raises(ValueError, match="its attention is in float, but its DQConfig says attention='int8'"):
        model.save_pretrained(tmp_path)
    plain = dqkernels.quantize_(peaked("bart"), DQConfig(attention="float"))
    attention.enable(plain, DQConfig())
    with pytest.raises(ValueError, match="its attention is int8 .* says attention='float'"):
        plain.save_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_gradients_reach_every_projection(family):
    model = peaked(family)
    attention.enable(model, DQConfig(act_clip=1.5))
    for module in model.train().modules():
        for name in ("p", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)

    def backward():
        model.zero_grad()
        torch.nn.functional.cross_entropy(run(model).logits.flatten(0, 1), IDS[:, 1:6].flatten()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that transformers 5.17 needs
        model.gradient_checkpointing_enable()
        recomputed = backward()
        model.gradient_checkpointing_disable()
    torch.testing.assert_close(backward(), recomputed)
    leaves = ("q.weight", "k.weight", "v.weight", "relative_attention_bias.weight") if family == "t5" else (
        "q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias"
    )  # fmt: skip
    found = [(n, p.grad) for n, p in model.named_parameters() if n.endswith(leaves)]
    assert len(found) >= 12 and all(g is not None and g.isfinite().all() and g.any() for _, g in found)


def test_dropout_of_attention_is_taken_off_and_given_back(caplog):
    model = peaked("t5")
    modules = [m for m in model.modules() if type(m).__name__ == "T5Attention"]
    with caplog.at_level(logging.WARNING, logger="dqkernels"):
        attention.enable(model, DQConfig())
        attention.enable(model, DQConfig(act_clip=2.0))
    said = [r.getMessage() for r in caplog.records if r.name == "dqkernels"]
    assert said == ["attention dropout 0.1 is now 0 in T5ForConditionalGeneration: int8 attention has none"]
    assert {m.dropout for m in modules} == {0.0}
    modules[0].dropout = 0.25
    with pytest.raises(ValueError, match=r"^encoder.block.0.layer.0.SelfAttention: .* has no dropout, got 0.25"):
        run(model.train())
    modules[0].dropout = 0.0
    attention.disable(model)
    assert {m.dropout for m in modules} == {0.1}


# ----------------------------------------------------------------------------- where it is, and where it is not


class _OwnForward(transformers.models.bart.modeling_bart.BartAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def _with_own_forward():
    model = make("bart")
    model.model.encoder.layers[0].self_attn.__class__ = _OwnForward
    return model


def _wide():
    config = transformers.BartConfig(vocab_size=10, d_model=1041, encoder_layers=1, decoder_layers=1,
                                     encoder_attention_heads=1, decoder_attention_heads=1, encoder_ffn_dim=4,
                                     decoder_ffn_dim=4)  # fmt: skip
    with torch.device("meta"):
        return transformers.BartForConditionalGeneration(config)


REFUSED = [
    (lambda: make("bert"), "attention='int8' is not for BertForMaskedLM: of transformers' models, those of bart, "),
    (lambda: make("llama"), "is not for LlamaForCausalLM"),
    (lambda: nn.Sequential(nn.Linear(2, 2)), "is not for Sequential"),
    (lambda: nn.ModuleList([make("bart"), make("bert")]), "is not for BertForMaskedLM"),
    (_with_own_forward, "is not for _OwnForward"),
    (_wide, "^model.encoder.layers.0.self_attn: head_dim must be at most 1040 for int8 attention, got 1041"),
]


@pytest.mark.parametrize("build, message", REFUSED)
@pytest.mark.parametrize("call", [attention.enable, dqkernels.quantize_], ids=["enable", "quantize_"])
def test_another_class_is_refused_by_name_and_left_alone(call, build, message):
    model = build()
    before, modules = copy.deepcopy(getattr(model, "config", None)), dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        call(model, INT8)
    assert dict(model.named_modules()) == modules and not list(attention._enabled(model))
    if before is not None:
        assert model.config._attn_implementation == before._attn_implementation


def test_what_the_op_refuses_names_the_module(monkeypatch):
    model = make("bart").double()
    attention.enable(model, DQConfig())
    with pytest.raises(ValueError, match=r"^model.encoder.layers.0.self_attn: q must be float32, float16 or bfloat16"):
        logits(model)
    model = make("bart")
    attention.enable(model, DQConfig(strict=True))
    monkeypatch.setattr(dqkernels.backends, "ORDER", {"cpu": ("eager",)})  # a machine without a kernel
    dqkernels.backends.refresh()
    with pytest.raises(dqkernels.backends.BackendError, match=r"^model.encoder.layers.0.self_attn: strict=True"):
        logits(model)
    monkeypatch.undo()
    dqkernels.backends.refresh()


def test_a_model_that_was_not_prepared_is_refused_rather_than_guessed():
    attention.enable(make("bart"), DQConfig())
    model = make("bart")
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ValueError, match="BartAttention was not prepared for int8 attention: call dqkernels.models"):
        logits(model)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_models_of_one_config_are_independent_and_disable_restores(family):
    one = peaked(family)
    config = one.config
    two = type(one)(config).eval()
    two.load_state_dict(one.state_dict())
    wanted = logits(one)
    implementations = {n: m.config._attn_implementation for n, m in one.named_modules() if hasattr(m, "config")}
    attention.enable(one, DQConfig())
    in_int8 = logits(one)
    assert not torch.equal(in_int8, wanted) and torch.equal(logits(two), wanted)
    assert config._attn_implementation == "sdpa" and not list(attention._enabled(two))
    assert not any(hasattr(type(m), attention.KEY) for m in one.modules())
    assert_same_bits(logits(copy.deepcopy(one)), in_int8)
    attention.enable(two, DQConfig(act_clip=0.1))
    assert_same_bits(logits(one), in_int8)
    attention.disable(one)
    attention.disable(one)
    assert_same_bits(logits(one), wanted)
    assert {n: m.config._attn_implementation for n, m in one.named_modules() if hasattr(m, "config")} == implementations
    two.set_attn_implementation("eager")
    attention.disable(two)
    assert two.config._attn_implementation == "eager", "what somebody chose since stays"


@torch.no_grad()
def test_a_compiled_layer_is_one_graph():
    model = peaked("bart")
    attention.enable(model, DQConfig())
    layer, x = model.model.encoder.layers[0].self_attn, torch.randn(2, 6, 40)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x)[0], layer(x)[0])


def test_from_pretrained_refuses_another_class_too(tmp_path):
    make("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention='int8' is not for BertForMaskedLM"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path, quantization_config=INT8)


def test_a_packed_model_keeps_its_attention_and_is_told_so(caplog):
    model = dqkernels.quantize_(make("bart"), DQConfig(attention="float"))
    with caplog.at_level(logging.WARNING, logger="dqkernels"):
        dqkernels.quantize_(model, INT8)
    assert caplog.records[-1].getMessage() == "its attention stays too: attention='int8' is for the float model"
    assert not list(attention._enabled(model))


@pytest.mark.parametrize("more", [[], ["--preset", "dq-bart-2-2-8"]], ids=["", "preset"])
def test_the_command_line_has_the_switch(more, tmp_path, capsys):
    peaked("bart").save_pretrained(tmp_path / "float")
    out = str(tmp_path / "int8")
    assert main(["quantize", str(tmp_path / "float"), out, "--attention", "int8", "--dtype", "float32", *more]) == 0
    mode = "per_tensor, clip 2.5" if more else "per_token"
    assert f"Attention: int8 {mode} on" in capsys.readouterr().out
    assert {o.clip for _, o in attention._enabled(dqkernels.load(out))} == {2.5 if more else None}
    assert main(["quantize", str(tmp_path / "float"), out + "b", "--attention", "int4"]) == 2
    assert "attention must be one of ['auto', 'int8', 'float'], got 'int4'" in capsys.readouterr().err


def test_the_module_waits_for_transformers():
    code = "import sys, dqkernels.models.attention as a; assert 'transformers' not in sys.modules; print(a.NAME)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "dqkernels_int8\n"


# ------------------------------------------------------------------------------------------------------ report


def test_the_report_tells_what_is_not_what_was_asked_for():
    model = peaked("bart")
    in_float = logits(model)
    attention.enable(model, DQConfig(act_granularity="static", act_clip=2.5))
    report = dqkernels.report(model)
    choice = dqkernels.backends.choose("qattention", "cpu", mode="per_token", head_dim=8)
    assert choice.backend == ("eager" if native.native() is None else "cpu")
    assert report.attention == (
        f"int8 per_token (static has no scales for it), clip 2.5 on {choice.backend} ({choice.reason}): "
        "model.encoder.layers.0-1.self_attn, model.decoder.layers.0.self_attn, model.decoder.layers.0.encoder_attn"
    )
    assert "\nAttention: int8 per_token" in str(report) and report.to_dict()["attention"] == report.attention
    model.set_attn_implementation("sdpa")
    assert_same_bits(logits(model), in_float)
    assert dqkernels.report(model).attention.startswith("float ('sdpa' was set in place of int8): model.encoder.")
    model = dqkernels.quantize_(model, DQConfig(attention="int8", backend="eager"))
    assert dqkernels.report(model).attention.startswith("int8 per_token on eager (forced by backend='eager'): model.")
    attention.disable(model)
    assert dqkernels.report(model).attention == "float (int8 attention was taken off)"
    model = make("bart")
    attention.enable(model, DQConfig())
    dqkernels.quantize_(model, DQConfig(attention="float"))
    assert dqkernels.report(model).attention == "float (attention='float')"
    assert model.config._attn_implementation == "sdpa"
