"""`quantize_` and `calibrate` on whole models: what is packed, what is shared, what is left alone and why."""

import copy
import dataclasses

import pytest
import torch
import transformers
from compare import assert_same_bits
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrizations
from transformers import BartConfig, BartForConditionalGeneration

from dqkernels import convert, ops, qmath
from dqkernels.config import DQConfig
from dqkernels.convert import calibrate, plan, quantize_
from dqkernels.nn import PackedModule, QEmbedding, QLinear

VOCABULARY = 53  # a prime, as 50265 is odd: no tile divides it
TABLE = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")


def bart(vocabulary=VOCABULARY, **changes):
    config = BartConfig(
        vocab_size=vocabulary, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=24,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, dropout=0.0, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return BartForConditionalGeneration(config).eval()


def inputs(vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(1)
    return dict(
        input_ids=torch.randint(3, vocabulary, (2, 7), generator=generator),
        decoder_input_ids=torch.randint(3, vocabulary, (2, 5), generator=generator),
    )


def logits(model, vocabulary=VOCABULARY):
    with torch.no_grad():
        return model(**inputs(vocabulary)).logits


def packed_modules(model):
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedModule)}


class Block(nn.Module):
    """Two linears and an embedding, for what a BART does not have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 5, bias=False)

    def forward(self, ids):
        return self.second(self.first(self.embed(ids)).relu())


# -------------------------------------------------------------------------------------------------------- BART


@pytest.mark.parametrize("config", [
    DQConfig(weight_bits=8), DQConfig(), DQConfig(weight_bits=4, group_size=32, embedding_bits=4),
    DQConfig(weight_bits=2, embedding_bits=2), DQConfig.preset("dq-bart-2-2-8"),
], ids=lambda config: f"{config.name}-g{config.group_size}-{config.weight_quantizer}")  # fmt: skip
def test_bart_is_packed_whole_and_its_table_once(config):
    model = bart()
    wanted = logits(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert quantize_(model, config) is model
    packed = packed_modules(model)
    assert set(packed) == {*names, *TABLE}
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Linear)] == []
    table = packed["model.shared"]
    for name in TABLE[1:]:
        assert packed[name].qweight is table.qweight and packed[name].weight_scale is table.weight_scale
        assert packed[name].group_mult is table.group_mult
    assert isinstance(packed["lm_head"], QLinear) and packed["lm_head"].layer.bits == config.embedding_bits
    got = logits(model)
    assert got.shape == wanted.shape and got.isfinite().all()
    error = float((got - wanted).norm() / wanted.norm())
    assert 0 < error < {8: 0.05, 4: 0.5, 2: 1.5}[config.weight_bits], error


def test_layers_compute_with_the_fake_quantized_weights():
    """A packed model is the float one with its weights replaced by what their codes stand for."""
    model = bart()
    config = DQConfig(weight_bits=8)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(qmath.fake_quantize(module.weight, config.for_linear(name)))
        table = twin.model.shared.weight
        table.copy_(qmath.fake_quantize(table, config.for_embedding("model.shared")))
    quantize_(model, config)
    for name, module in packed_modules(model).items():
        assert_same_bits(module.dequantize(), twin.get_submodule(name).weight.detach(), name)
    error = (logits(model) - logits(twin)).norm() / logits(twin).norm()
    assert 0 < float(error) < 0.02


@pytest.mark.parametrize("vocabulary", [50265, 250027])
def test_the_odd_vocabularies_of_bart_and_mbart(vocabulary, tmp_path):
    """Packed, saved and loaded: the same logits to the bit, the table once in the file and in memory."""
    torch.manual_seed(0)
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder")
             for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = BartConfig(vocab_size=vocabulary, d_model=16, max_position_embeddings=8, dropout=0.0, **sides)
    model = quantize_(BartForConditionalGeneration(config).eval(), DQConfig(embedding_bits=4))
    ids = torch.tensor([[0, 3, vocabulary - 1, vocabulary - 2, 2]])
    with torch.no_grad():
        wanted = model(input_ids=ids, decoder_input_ids=ids).logits
    assert wanted.shape == (1, 5, vocabulary) and wanted.isfinite().all() and bool((wanted[..., -1] != 0).any())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        tables = {
            n: file.get_slice(n).get_shape() for n in file.keys() if file.get_slice(n).get_shape()[0] >= vocabulary
        }  # noqa: SIM118
    padded = (vocabulary + 15) // 16 * 16
    assert tables == {"model.shared.qweight": [padded, 64], "model.shared.weight_scale": [vocabulary]}
    loaded = BartForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.qweight is loaded.model.shared.qweight
    with torch.no_grad():
        assert_same_bits(loaded(input_ids=ids, decoder_input_ids=ids).logits, wanted)


@pytest.mark.parametrize("vocabulary", [13, 17, 101])
def test_odd_vocabularies(vocabulary):
    model = bart(vocabulary)
    wanted = logits(model, vocabulary)
    quantize_(model, DQConfig(weight_bits=8))
    assert logits(model, vocabulary).shape == wanted.shape == (2, 5, vocabulary)
    assert packed_modules(model)["lm_head"].qweight.shape[0] % 16 == 0


def test_positions_norms_and_biases_stay():
    model = bart()
    before = {n: p.clone() for n, p in model.named_parameters() if "position" in n or "norm" in n or "bias" in n}
    quantize_(model)
    after = dict(model.named_parameters())
    assert len(before) > 20
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert model.dqkernels_skipped == {
        "model.encoder.embed_positions": "a position or type embedding",
        "model.decoder.embed_positions": "a position or type embedding",
    }


def test_generate_runs_on_a_packed_model():
    model = quantize_(bart(), DQConfig(weight_bits=8))
    tokens = model.generate(inputs()["input_ids"], max_new_tokens=5, num_beams=2, do_sample=False)
    assert tokens.shape[0] == 2 and tokens.shape[1] > 1


def test_casting_after_packing_keeps_the_table_shared():
    model = quantize_(bart()).to(torch.bfloat16)
    packed = packed_modules(model)
    assert len({id(packed[name].qweight) for name in TABLE}) == 1
    assert len({id(packed[name].weight_scale) for name in TABLE}) == 1
    assert packed["lm_head"].weight_scale.dtype == torch.float32
    assert model.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16


def test_untied_heads_are_packed_on_their_own():
    model = bart(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    weight = model.lm_head.weight.detach().clone()
    config = DQConfig(weight_bits=8, embedding_bits=4)
    quantize_(model, config)
    head = model.lm_head
    assert head.layer.bits == 8 and head.qweight is not model.model.shared.qweight
    assert_same_bits(head.dequantize(), qmath.fake_quantize(weight, config.for_linear("lm_head")))


def test_a_head_that_got_its_own_weight_later_is_not_the_table():
    """transformers still lists lm_head as tied by name; the memory decides."""
    model = bart()
    weight = torch.randn(VOCABULARY, 32)
    model.lm_head.weight = nn.Parameter(weight.clone())
    config = DQConfig(weight_bits=8)
    decision = {d.name: d for d in plan(model, config)}["lm_head"]
    assert decision.tied_to is None
    quantize_(model, config)
    assert_same_bits(model.lm_head.dequantize(), qmath.fake_quantize(weight, config.for_linear("lm_head")))


def test_plan_works_on_the_meta_device_and_knows_ties_by_name():
    with torch.device("meta"):
        model = bart()
    for module in (model.lm_head, model.model.encoder.embed_tokens):  # as from_pretrained leaves them: apart
        module.weight = nn.Parameter(torch.empty_like(module.weight))
    decisions = {d.name: d for d in plan(model, DQConfig())}
    assert decisions["lm_head"].tied_to is not None and decisions["lm_head"].layer.bits == 8
    assert sum(d.tied_to is not None for d in decisions.values()) == 3
    assert packed_modules(model) == {}


# ---------------------------------------------------------------------------------------------- head, overrides


def test_a_float_head_keeps_the_float_table_and_its_bits():
    model = bart()
    table = model.lm_head.weight.detach().clone()
    quantize_(model, DQConfig(head="float", weight_bits=8))
    assert type(model.lm_head) is nn.Linear and torch.equal(model.lm_head.weight, table)
    assert isinstance(model.model.shared, QEmbedding)
    assert model.dqkernels_skipped["lm_head"] == "head='float'"
    assert logits(model).isfinite().all()


def test_embedding_bits_16_leave_table_and_head_in_float():
    model = quantize_(bart(), DQConfig(embedding_bits=16))
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.shared.weight
    assert model.dqkernels_skipped["model.shared"] == "embedding_bits=16"
    assert model.dqkernels_skipped["lm_head"] == "tied to model.shared, which stays in float"
    assert isinstance(model.model.encoder.layers[0].fc1, QLinear)


def test_overrides_reach_their_modules_only():
    config = DQConfig(
        overrides={
            r"encoder\.layers\.0\.": {"skip": True},
            r"fc2": {"weight_bits": 2, "weight_quantizer": "ternary", "act_clip": 2.5},
            r"q_proj": {"act_granularity": "per_tensor"},
        }
    )
    model = quantize_(bart(), config)
    encoder = model.model.encoder
    assert type(encoder.layers[0].fc1) is nn.Linear and type(encoder.layers[0].self_attn.q_proj) is nn.Linear
    assert model.dqkernels_skipped["model.encoder.layers.0.fc1"] == "overrides: skip"
    fc2 = encoder.layers[1].fc2.layer
    assert (fc2.bits, fc2.quantizer, fc2.act_clip) == (2, "ternary", 2.5)
    assert encoder.layers[1].self_attn.q_proj.layer.act_granularity == "per_tensor"
    assert encoder.layers[1].fc1.layer == config.for_linear("x")


def test_overrides_that_match_nothing_are_named(caplog):
    """A mistyped name would change nothing, in silence."""
    overrides = {r"layers\.0\.fc1": {"weight_bits": 8}, "fc3": {"skip": True}, "decoder.layer[.]": {"act_clip": 2.0}}
    with caplog.at_level("WARNING", "dqkernels"):
        quantize_(bart(), DQConfig(overrides=overrides))
    assert [record.getMessage() for record in caplog.records] == [
        "overrides: 'fc3', 'decoder.layer[.]' match none of the 28 linears and embeddings, such as lm_head"
    ]
    caplog.clear()
    quantize_(bart(), DQConfig(overrides={r"fc1$": {"weight_bits": 8}}))
    assert not caplog.records


def test_skip_holds_for_a_tied_head_too():
    """`{"skip": True}` leaves a module in float, whatever it is tied to."""
    model = bart()
    weight = model.lm_head.weight
    quantize_(model, DQConfig(overrides={"lm_head": {"skip": True}}))
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is weight
    assert model.dqkernels_skipped["lm_head"] == "overrides: skip"
    assert isinstance(model.model.shared, QEmbedding)


def test_a_tied_head_takes_the_table_of_the_embedding_and_its_own_activation_rule():
    config = DQConfig(
        act_clip=2.5, overrides={"lm_head": {"act_granularity": "per_tensor", "act_clip": None, "weight_bits": 2}}
    )
    model = quantize_(bart(), config)
    layer = model.lm_head.layer
    assert (layer.bits, layer.act_granularity, layer.act_clip) == (8, "per_tensor", None)
    assert model.model.shared.layer.act_clip == 2.5


def test_backend_and_strict_reach_every_module():
    model = quantize_(bart(), DQConfig(backend="eager", strict=True))
    assert {(m.backend, m.strict) for m in packed_modules(model).values()} == {("eager", True)}
    assert logits(model).isfinite().all()  # eager was asked for by name


# ---------------------------------------------------------------------------------------------- what is left


def test_computed_weights_are_skipped_with_the_reason():
    model = Block()
    model.normed = parametrizations.weight_norm(nn.Linear(6, 6))
    model.spectral = parametrizations.spectral_norm(nn.Linear(6, 6))
    model.old_norm = torch.nn.utils.weight_norm(nn.Linear(6, 6))
    quantize_(model)
    reason = "its weight is computed (parametrization or weight norm)"
    assert model.dqkernels_skipped == dict.fromkeys(["normed", "spectral", "old_norm"], reason)
    assert isinstance(model.first, QLinear)


def test_multihead_attention_keeps_its_out_proj():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    quantize_(model)
    assert model.dqkernels_skipped == {"attention.out_proj": "nn.MultiheadAttention reads its weight directly"}
    x = torch.randn(3, 2, 8)
    assert model["attention"](x, x, x)[0].isfinite().all()


READERS = {
    "ngram_embeddings": (
        transformers.ProphetNetModel,
        transformers.ProphetNetConfig(
            vocab_size=VOCABULARY, hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_encoder_layers=1,
            num_decoder_layers=1, num_encoder_attention_heads=2, num_decoder_attention_heads=2,
            max_position_embeddings=24,
        ),
        "ProphetNetDecoder",
    ),
    "rel_embeddings": (
        transformers.DebertaV2Model,
        transformers.DebertaV2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=24, relative_attention=True, pos_att_type=["p2c", "c2p"],
        ),
        "DebertaV2Encoder",
    ),
    "dt_proj": (
        transformers.MambaModel,
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4),
        "MambaMixer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("leaf", READERS)
def test_what_models_of_transformers_read_past_the_module_stays_float(leaf):
    """Packed, their outputs were NaN throughout."""
    kind, config, owner = READERS[leaf]
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.randint(3, VOCABULARY, (2, 7))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :4]} if config.is_encoder_decoder else {})}
    with torch.no_grad():
        wanted = model(**inputs)[0]
        quantize_(model, DQConfig(weight_bits=8))
        found = model(**inputs)[0]
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    reasons = {reason for name, reason in model.dqkernels_skipped.items() if name.endswith(leaf)}
    assert reasons == {f"{owner} reads its weight directly"}


def test_an_attention_that_is_the_whole_model_has_nothing_to_pack():
    with pytest.raises(ValueError, match="nothing to quantize .*: nn.MultiheadAttention reads its weight"):
        quantize_(nn.MultiheadAttention(8, 2))


def test_the_fast_path_of_transformer_encoder_layer_reads_weights_past_the_modules():
    """In eval mode torch computes such a layer from `linear1.weight`; a packed one would give NaN there."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4)).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = model[0](x)
        quantize_(model)
        assert_same_bits(model[0](x), wanted)
        assert model(x).isfinite().all()
    reason = "nn.TransformerEncoderLayer reads its weight directly"
    assert model.dqkernels_skipped["0.linear1"] == model.dqkernels_skipped["0.linear2"] == reason
    assert isinstance(model[1], QLinear)


def test_subclasses_with_a_forward_of_their_own_are_left_alone():
    class LoRA(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Renamed(nn.Linear):
        pass

    class Weighted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    model = Block()
    model.lora, model.renamed, model.weighted = LoRA(6, 6), Renamed(6, 6), Weighted(5, 4)
    model.limited = nn.Embedding(5, 4, max_norm=1.0)
    model.double = nn.Linear(6, 6, dtype=torch.float64)
    quantize_(model)
    assert model.dqkernels_skipped == {
        "lora": "LoRA has a forward of its own",
        "weighted": "Weighted has a forward of its own",
        "limited": "max_norm changes its weight at every lookup",
        "double": "its weight is float64",
    }
    assert isinstance(model.renamed, QLinear)


@pytest.mark.parametrize("name", ["embed_positions", "relative_attention_bias", "token_type_embeddings", "wpe"])
def test_lookups_that_are_no_tokens_are_left_alone(name):
    model = Block()
    model.add_module(name, nn.Embedding(5, 4))
    quantize_(model)
    assert model.dqkernels_skipped == {name: "a position or type embedding"}


def test_linears_whose_k_could_overflow_are_left_alone():
    model = Block()
    with torch.device("meta"):
        model.wide = nn.Linear(131_072, 1)
        model.limit = nn.Linear(131_071, 1)
    decisions = {d.name: d for d in plan(model, DQConfig())}
    assert decisions["wide"].layer is None and "in_features=131072" in decisions["wide"].reason
    assert decisions["limit"].layer is not None


# --------------------------------------------------------------------------------- hooks, sharing, idempotence


def test_hooks_survive_and_see_the_packed_output():
    model = Block()
    seen = {}
    model.first.register_forward_hook(lambda module, args, output: seen.update(module=module, output=output))
    model.second.register_full_backward_hook(lambda module, *grads: seen.update(backward=module))
    quantize_(model)
    model.first.register_forward_pre_hook(lambda module, args: (args[0].requires_grad_(),))
    model(torch.tensor([[1, 2]])).sum().backward()
    assert seen["module"] is model.first and seen["output"].shape == (1, 2, 6)
    assert seen["backward"] is model.second


def test_a_module_used_under_two_names_stays_one_module():
    model = Block()
    model.again = model.first
    model.table_again = model.embed
    quantize_(model)
    assert model.again is model.first and isinstance(model.first, QLinear)
    assert model.table_again is model.embed
    assert sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8) == sum(
        m.qweight.numel() for m in (model.embed, model.first, model.second)
    )


def test_two_linears_that_share_a_weight_share_its_codes():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    biases = [m.bias.detach().clone() for m in model]
    quantize_(model)
    assert model[0].qweight is model[1].qweight
    assert all(torch.equal(m.bias, b) for m, b in zip(model, biases, strict=True))


def test_quantized_already_is_a_no_op_that_says_so(caplog):
    model = quantize_(bart(), DQConfig(weight_bits=8))
    assert caplog.text == ""
    before, modules = logits(model), packed_modules(model)
    skipped = model.dqkernels_skipped
    assert quantize_(model, DQConfig(weight_bits=2)) is model
    assert packed_modules(model) == modules and model.dqkernels_skipped == skipped
    assert_same_bits(logits(model), before)
    (record,) = caplog.records
    count = len({id(m) for m in modules.values()})
    assert (record.name, record.levelname) == ("dqkernels", "WARNING")
    assert f"BartForConditionalGeneration has {count} packed modules already" in record.getMessage()
    assert "bits 2-8-8 do not reach them" in record.getMessage()


def test_what_was_left_can_be_packed_in_a_second_call(caplog):
    model = quantize_(Block(), DQConfig(overrides={"second": {"skip": True}}))
    first = model.first
    quantize_(model, DQConfig(weight_bits=8))
    assert "Block has 2 packed modules already" in caplog.text
    assert model.first is first and model.second.layer.bits == 8
    assert model.dqkernels_skipped == {}


def test_training_flags_are_kept():
    model = Block().train()
    model.second.eval()
    quantize_(model)
    assert model.training and model.first.training and not model.second.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_models(dtype):
    model = bart().to(dtype)
    wanted = logits(model).float()
    quantize_(model, DQConfig(weight_bits=8))
    got = logits(model)
    assert got.dtype == dtype
    assert float((got.float() - wanted).norm() / wanted.norm()) < 0.05
    assert model.model.encoder.layers[0].fc1.bias.dtype == dtype


# ------------------------------------------------------------------------------------------------ all or nothing


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_names_its_module_and_leaves_the_model_untouched(bad):
    model = bart()
    wanted = logits(model)
    last = "model.decoder.layers.0.fc2"
    with torch.no_grad():
        kept = model.get_submodule(last).weight[3, 4].item()
        model.get_submodule(last).weight[3, 4] = bad
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"^{last}: weight has NaN or Inf values and cannot be quantized$"):
        quantize_(model)
    assert dict(model.named_modules()) == modules and not hasattr(model, "dqkernels_skipped")
    with torch.no_grad():
        model.get_submodule(last).weight[3, 4] = kept
    assert_same_bits(logits(model), wanted)


def test_running_out_of_memory_leaves_the_model_untouched(monkeypatch):
    model = bart()
    wanted, modules, calls = logits(model), dict(model.named_modules()), []

    def quantize_weight(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError("no more")
        return ops.quantize_weight(*args, **kwargs)

    import dqkernels.nn

    stand_in = type("Ops", (), {**vars(ops), "quantize_weight": staticmethod(quantize_weight)})
    monkeypatch.setattr(dqkernels.nn, "ops", stand_in)
    with pytest.raises(MemoryError):
        quantize_(model)
    monkeypatch.undo()
    assert len(calls) == 5 and dict(model.named_modules()) == modules
    assert_same_bits(logits(model), wanted)


REFUSED = [
    (lambda: quantize_(nn.Linear(3, 3)), "model is a single layer, which has no parent"),
    (lambda: quantize_(nn.Sequential(nn.ReLU())), "nothing to quantize in Sequential: it has no nn.Linear"),
    (lambda: quantize_(nn.Sequential(nn.Linear(2, 2).double())), "nothing to quantize in .*: its weight is float64"),
    (lambda: quantize_(Block(), {"weight_bits": 4}), "config must be a DQConfig, got dict"),
    (lambda: quantize_(Block(), DQConfig(overrides={"": {"skip": True}})), "nothing to quantize in Block: overrides"),
    (
        lambda: quantize_(Block(), DQConfig(attention="int8")),
        "attention='int8' is not for Block: of transformers' models, those of bart, mbart, .* have it",
    ),
    (lambda: quantize_(Block().to("meta")), "^embed: weight is on the meta device and has no values"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("attention", ["auto", "float"])
def test_attention_in_float_is_what_there_is(attention):
    assert isinstance(quantize_(Block(), DQConfig(attention=attention)).first, QLinear)


def test_a_meta_model_is_left_as_it_was():
    with torch.device("meta"):
        model = bart()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="meta device .*: load the weights first"):
        quantize_(model)
    assert dict(model.named_modules()) == modules


def test_plan_changes_nothing():
    model = bart()
    wanted, modules = logits(model), dict(model.named_modules())
    decisions = plan(model, DQConfig())
    assert {d.name for d in decisions if d.layer is not None} >= set(TABLE)
    assert dict(model.named_modules()) == modules
    assert_same_bits(logits(model), wanted)


def test_after_convert_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(convert, "after_convert", [lambda model, config: told.append((model, config))])
    config = DQConfig()
    model = quantize_(Block(), config)
    assert told == [(model, dataclasses.replace(config, attention="float"))], "what auto came to"


# --------------------------------------------------------------------------------------------------- calibrate


def static_model(**changes):
    return quantize_(bart(), DQConfig(weight_bits=8, act_granularity="static", **changes))


def run(model, name, batches):
    """Largest |input| of one layer over batches, measured by the test itself."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].abs().max()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return float(max(seen))


def test_calibrate_measures_every_static_layer():
    model = static_model()
    batches = [inputs(), {k: v.flip(1) for k, v in inputs().items()}]
    fc1 = "model.encoder.layers.0.self_attn.q_proj"
    largest = run(quantize_(bart(), DQConfig(weight_bits=8)), fc1, batches)
    assert calibrate(model, batches) is model
    layers = {n: m for n, m in packed_modules(model).items() if isinstance(m, QLinear)}
    for name, module in layers.items():
        assert module.act_scale.dtype == torch.float32 and module.act_scale.shape == (1,)
        assert 0 < module.act_scale.item() < 1, name
        assert module.layer.act_granularity == "static" and len(module._forward_pre_hooks) == 0
    assert layers[fc1].act_scale.item() == torch.tensor(largest).div(torch.tensor(127.0)).item()
    wanted = logits(bart())
    got = logits(model)
    assert float((got - wanted).norm() / wanted.norm()) < 0.1


def test_calibrate_respects_the_clip_and_a_second_run_starts_anew():
    model = static_model(act_clip=0.5)
    calibrate(model, [inputs()])
    limit = torch.tensor(0.5).div(torch.tensor(127.0)).item()
    scales = {n: m.act_scale.item() for n, m in packed_modules(model).items() if isinstance(m, QLinear)}
    assert max(scales.values()) == limit and all(0 < s <= limit for s in scales.values())
    calibrate(model, [inputs()])
    assert scales == {n: m.act_scale.item() for n, m in packed_modules(model).items() if isinstance(m, QLinear)}


def test_calibrate_takes_dicts_tuples_and_tensors():
    ids = torch.tensor([[1, 2, 3]])
    scales = []
    for batch in ({"ids": ids}, (ids,), [ids], ids):
        torch.manual_seed(0)
        model = quantize_(Block(), DQConfig(act_granularity="static"))
        calibrate(model, [batch])
        scales.append((model.first.act_scale.item(), model.second.act_scale.item()))
    assert len(set(scales)) == 1 and all(s > 0 for s in scales[0])


def test_calibrate_sees_inputs_that_are_passed_by_keyword():
    class Keyword(nn.Sequential):
        def forward(self, x):
            return self[0](input=x)

    model = quantize_(Keyword(nn.Linear(4, 3)), DQConfig(act_granularity="static"))
    calibrate(model, [torch.full((2, 4), 127.0)])
    assert model[0].act_scale.item() == 1.0


def test_calibrate_zero_inputs_give_scale_one():
    model = quantize_(nn.Sequential(nn.Linear(4, 3)), DQConfig(act_granularity="static"))
    calibrate(model, [torch.zeros(2, 4)])
    assert model[0].act_scale.item() == 1.0


def test_calibrate_keeps_the_training_flag_of_every_module():
    model = quantize_(Block(), DQConfig(act_granularity="static")).train()
    model.second.eval()
    calibrate(model, [torch.tensor([[1]])])
    assert model.training and model.first.training and not model.second.training


class Broken(RuntimeError):
    pass


def broken_batches():
    yield torch.ones(1, 4)
    raise Broken("the loader failed")


CALIBRATE_ERRORS = [
    (ValueError, [], "batches is empty: calibration needs at least one batch"),
    (ValueError, [torch.full((1, 4), float("nan"))], "0: a calibration batch gives NaN or Inf activations"),
    (ValueError, [torch.ones(1, 4), torch.full((1, 4), float("inf"))], "0: a calibration batch gives NaN or Inf"),
    (Broken, broken_batches(), "the loader failed"),
]


@pytest.mark.parametrize("kind, batches, message", CALIBRATE_ERRORS)
def test_calibrate_errors_change_nothing(kind, batches, message):
    model = quantize_(nn.Sequential(nn.Linear(4, 3)), DQConfig(act_granularity="static")).train()
    model[0].act_scale = torch.tensor([0.25])
    with pytest.raises(kind, match=message):
        calibrate(model, batches)
    assert model[0].act_scale.item() == 0.25
    assert model[0].layer.act_granularity == "static"
    assert len(model[0]._forward_pre_hooks) == 0 and model.training and model[0].training


def test_calibrate_names_layers_that_never_ran_and_models_without_static_layers():
    model = Block()
    model.unused = nn.Linear(3, 3)
    quantize_(model, DQConfig(act_granularity="static"))
    with pytest.raises(ValueError, match="these layers never ran during calibration: unused"):
        calibrate(model, [torch.tensor([[1]])])
    assert model.first.act_scale.isnan().all()
    with pytest.raises(ValueError, match="model has no layer with act_granularity='static'"):
        calibrate(quantize_(Block()), [torch.tensor([[1]])])
