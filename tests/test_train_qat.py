"""Models under quantization-aware training: the packed model's logits (design P2), kept codes, casts, checkpoints."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import torch_floats
from torch import nn

import dqkernels
from dqkernels import DQConfig, ops, straight_through
from dqkernels.config import LayerConfig
from dqkernels.train import export, make_student, packed_copy, prepare_qat
from dqkernels.train.modules import QATEmbedding, QATLinear, QATModule
from dqkernels.train.qat import CONFIG_KEY, is_prepared

IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [11, 12, 13, 2, 1, 1], [40, 41, 99, 98, 3, 2]])
#: name -> (config, learned steps)
RECIPES = {
    "default": (DQConfig(), False),
    "2-2-8 learned": (DQConfig(weight_bits=2, embedding_bits=2), True),
    "paper": (DQConfig.preset("dq-bart-2-2-8"), False),
    "8-8-8 learned": (DQConfig(weight_bits=8, embedding_bits=8, act_clip=2.5), True),
    "ternary learned": (
        DQConfig(weight_bits=2, embedding_bits=4, weight_quantizer="ternary", weight_granularity="per_tensor"), True
    ),
    "groups": (DQConfig(weight_bits=2, embedding_bits=8, group_size=32), False),
    "float head": (DQConfig(weight_bits=4, embedding_bits=4, head="float"), True),
    "float embedding": (DQConfig(weight_bits=4, embedding_bits=16), False),
    "overrides": (
        DQConfig(overrides={".*fc1": {"weight_bits": 2}, ".*wi": {"weight_bits": 8}, ".*fc2": {"skip": True}}), True
    ),
}  # fmt: skip
#: Every family of encoder-decoders, and of the others one each; recipes go round.
PAIRS = [
    ("bart", "default"), ("bart", "2-2-8 learned"), ("bart", "paper"), ("bart", "float head"),
    ("bart", "float embedding"), ("bart", "overrides"), ("bart", "ternary learned"), ("mbart", "2-2-8 learned"),
    ("mbart", "paper"), ("marian", "8-8-8 learned"), ("pegasus", "groups"), ("t5", "2-2-8 learned"), ("t5", "paper"),
    ("t5", "float head"), ("t5_v1_1", "default"), ("t5_v1_1", "overrides"), ("llama_tied", "2-2-8 learned"),
    ("bert", "8-8-8 learned"),
]  # fmt: skip


def loss_of(model):
    inputs = {"decoder_input_ids": IDS[:, :4]} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=IDS, **inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), IDS[:, : logits.shape[1]].flatten())


def trained(family, config=None, learned=False, steps=2, lr=1e-2, model=None):
    """A prepared tiny model after a few steps of AdamW."""
    model = prepare_qat(tiny_models.make(family) if model is None else model, config, learned).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def quantized(model):
    return [module for module in model.modules() if isinstance(module, QATModule)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two would only wait for each other: everything here is tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def counted(monkeypatch):
    """Names of the quantizers as they are called."""
    calls = []

    def count(module, name):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or op(*a, **k))

    count(ops, "quantize_weight")
    count(straight_through, "quantize_by_step")
    return calls


# ------------------------------------------------------------------------------------------------------ P2


def greedy(model):
    if not model.can_generate() or model.config.is_encoder_decoder is False:
        return None
    with torch.no_grad():
        more = {"num_beams": 1, "do_sample": False, "decoder_start_token_id": 2}
        return model.generate(IDS[:2], max_new_tokens=6, min_new_tokens=6, **more)


@pytest.mark.parametrize("family, recipe", PAIRS)
def test_trained_exported_and_loaded_logits_are_equal(family, recipe, tmp_path):
    model = trained(family, *RECIPES[recipe])
    float_logits = tiny_models.logits(tiny_models.make(family))
    # A cast rounds a Llama's rotary frequencies, which loading leaves alone, and the table that a float head shares.
    wide_only = "llama" in family or recipe == "float head"
    for dtype in (torch.float32,) if wide_only else (torch.float32, torch.bfloat16):
        same = copy.deepcopy(model).to(dtype)
        want, tokens = tiny_models.logits(same), greedy(same)
        assert want.dtype == dtype and bool(want.isfinite().all()) and not torch.equal(want.float(), float_logits)
        packed = packed_copy(model, dtype)
        assert torch.equal(tiny_models.logits(packed), want), f"packed_copy in {dtype}"
        folder = tmp_path / str(dtype)
        assert torch.equal(tiny_models.logits(export(same, folder, dtype=dtype)), want), f"export in {dtype}"
        loaded = dqkernels.load(folder, dtype=dtype)
        assert torch.equal(tiny_models.logits(loaded), want), f"loaded in {dtype}"
        assert not is_prepared(packed) and not is_prepared(loaded) and is_prepared(same)
        assert CONFIG_KEY not in json.loads((folder / "config.json").read_text())
        if tokens is not None:
            assert torch.equal(greedy(loaded), tokens) and tokens.shape == (2, 7)


def test_half_precision_as_well():
    model = trained("bart", DQConfig(weight_bits=4), True)
    assert torch.equal(tiny_models.logits(packed_copy(model, torch.float16)), tiny_models.logits(model.half()))


def test_a_tied_table_of_a_model_in_16_bits_gives_16_bits():
    """The first module that reads the table makes it float32; the others are of the model's type all the same."""
    model = prepare_qat(tiny_models.make("bart").bfloat16(), DQConfig(weight_bits=2, embedding_bits=2)).train()
    assert {m.compute_dtype for m in quantized(model)} == {torch.bfloat16}
    loss_of(model).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(tiny_models.logits(packed_copy(model, torch.bfloat16)), tiny_models.logits(model.eval()))


def test_what_transformers_keeps_wide_beside_float16_is_wide_in_training_too(tmp_path):
    """T5's `wo`."""
    model = trained("t5", DQConfig(weight_bits=4, embedding_bits=8))
    export(model, tmp_path / "packed", dtype=torch.float16)
    loaded = dqkernels.load(tmp_path / "packed")
    assert torch.equal(tiny_models.logits(loaded), tiny_models.logits(model.half()))
    assert {
        n.rpartition(".")[2] for n, m in model.named_modules() if getattr(m, "compute_dtype", None) == torch.float32
    } == {"wo"}
    assert {m.compute_dtype for m in quantized(model.bfloat16())} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["marian", "pegasus"])
@pytest.mark.parametrize("of", ["make_student", "from_pretrained"])
def test_positions_of_a_formula_are_not_trained(family, of, tmp_path):
    """transformers stores none of Marian's: trained ones would be lost in the file, and the logits move."""
    model = tiny_models.make(family)
    tables = {name: table.clone() for name, table in model.named_parameters() if "embed_positions" in name}
    assert len(tables) == 2
    if of == "make_student":
        model = make_student(model, 1, 1)
    else:  # which forgets that they are frozen
        model.save_pretrained(tmp_path / "float")
        model = type(model).from_pretrained(tmp_path / "float")
        assert all(p.requires_grad for p in model.parameters())
    model = trained(family, DQConfig(weight_bits=8), model=model)
    for name, parameter in model.named_parameters():
        assert name not in tables or torch.equal(parameter, tables[name]), name
    export(model, tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(tiny_models.logits(dqkernels.load(tmp_path / "packed")), tiny_models.logits(model))


def test_training_forward_is_the_eval_forward(monkeypatch):
    """The same bits with gradients as without: in train mode too, but for dropout, and for the last bits of a norm
    where it is fused with the quantizer."""
    torch_floats.put_in(monkeypatch)
    model = trained("bart", DQConfig(weight_bits=2, embedding_bits=2, act_clip=2.5), True)
    want = tiny_models.logits(model)
    with_grad = model(input_ids=IDS[:2], attention_mask=(IDS[:2] != 1).long(), decoder_input_ids=IDS[:2, :4]).logits
    assert torch.equal(with_grad, want) and with_grad.requires_grad


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = trained("t5", DQConfig(weight_bits=2), True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want, mode = tiny_models.logits(model), model.training
    export(model, tmp_path / "packed", dtype=torch.bfloat16)
    assert is_prepared(model) and model.training == mode and torch.equal(tiny_models.logits(model), want)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert getattr(model.config, CONFIG_KEY)["learned_scale"] is True
    assert all(p.requires_grad for p in model.parameters())


def test_training_moves_the_codes_and_lowers_the_loss():
    model = prepare_qat(tiny_models.make("bart"), DQConfig(weight_bits=2, embedding_bits=2), True)
    first, codes = float(loss_of(model).detach()), [module.packed()[0].clone() for module in quantized(model)]
    steps = [p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight_log_step")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert float(loss_of(model).detach()) < 0.7 * first
    assert all(not torch.equal(module.packed()[0], old) for module, old in zip(quantized(model), codes, strict=True))
    now = [p for n, p in model.named_parameters() if n.endswith("weight_log_step")]
    assert steps and all(not torch.equal(a, b) for a, b in zip(now, steps, strict=True))


# ------------------------------------------------------------------------------------------------ kept codes


class ThroughData:
    """An optimizer that writes where torch's version counter does not look."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr

    def step(self):
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.data.sub_(self.lr * parameter.grad.data.sign())


OPTIMIZERS = {
    "AdamW single": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "SGD single": lambda p: torch.optim.SGD(p, lr=50.0, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=50.0, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=50.0, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.5),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=50.0),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=100.0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
    "through .data": lambda p: ThroughData(p, 0.05),
}


class Pair(nn.Module):
    """An embedding and a linear that reads its table: the tie of a small model."""

    def __init__(self, learned=False, bits=4):
        super().__init__()
        self.table, self.head = nn.Embedding(19, 24, padding_idx=1), nn.Linear(24, 19)
        self.head.weight = self.table.weight
        layer = LayerConfig(bits=bits, quantizer="absmax" if bits > 2 else "four_level")
        self.table = QATEmbedding.from_embedding(self.table, layer, learned_scale=learned)
        self.head = QATLinear.from_linear(self.head, layer, owner=self.table, learned_scale=learned)

    def forward(self, ids):
        return self.head(self.table(ids))


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_codes_are_made_anew_after_every_step(name, learned):
    model = Pair(learned)
    optimizer = OPTIMIZERS[name](model.parameters())
    ids = torch.arange(19)
    for _ in range(2):
        before = model.table.packed()[0].clone()
        F.cross_entropy(model(ids), ids.flip(0)).backward()
        model.table.packed()  # somebody looks between the backward pass and the step
        if name != "through .data":
            optimizer.step()
        else:
            model.table.forget()  # which is what a backward pass does, and this one's is over
            optimizer.step()
        after = model.head.packed()
        model.table.forget()
        fresh = model.table.packed()
        assert all(a is b or torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
        assert not torch.equal(after[0], before)


def test_a_write_through_data_is_seen_after_a_backward_pass():
    """Version counters do not move; the backward pass that came through the module has dropped the codes."""
    for ids in (torch.arange(19), torch.tensor([4])):
        model = Pair(learned=True)
        before = model.table.packed()[0].clone()
        optimizer = ThroughData(model.parameters(), 0.5)
        versions = model.table.weight._version
        model(ids).square().sum().backward()
        optimizer.step()
        assert model.table.weight._version == versions and not torch.equal(model.table.packed()[0], before)


def test_codes_are_dropped_when_weights_come_from_elsewhere():
    model = Pair()
    other = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    before = model.head.packed()[0].clone()
    model.load_state_dict(other)
    now = model.head.packed()[0]
    assert not torch.equal(now, before)
    for mode in (True, False):
        model.table.weight.data.neg_()  # unseen
        assert model.head.packed()[0] is now
        model.train(mode)
        assert not torch.equal(model.head.packed()[0], now)
        now = model.head.packed()[0]
    model.table.weight = nn.Parameter(torch.randn(19, 24))
    assert model.table.packed()[0] is not now


@pytest.mark.parametrize("family, learned", [("bart", True), ("t5", False), ("t5_v1_1", True)])
def test_each_table_is_quantized_once_a_step_and_once_for_eval(family, learned, counted):
    model = prepare_qat(tiny_models.make(family), DQConfig(weight_bits=4), learned)
    name = "quantize_by_step" if learned else "quantize_weight"
    tables = len({module.weight.data_ptr() for module in quantized(model)})
    assert len(quantized(model)) > tables or family == "t5_v1_1"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        counted.clear()
        loss_of(model).backward()
        optimizer.step()
        assert counted == [name] * tables
    model.eval()
    counted.clear()
    tiny_models.logits(model), tiny_models.logits(model)
    if model.config.is_encoder_decoder:
        greedy(model)
    assert counted == [name] * tables


def test_activations_are_quantized_once_for_siblings(monkeypatch):
    calls, op = [], ops.quantize_activation
    monkeypatch.setattr(ops, "quantize_activation", lambda x, *a: calls.append(x.shape) or op(x, *a))
    model = prepare_qat(tiny_models.make("bart"), DQConfig(weight_bits=8)).eval()
    loss_of(model)
    # Encoder layer: q+k+v, out, fc1, fc2. Decoder layer: q+k+v, out, q, k+v (of the encoder's output), out, fc1, fc2.
    assert len(calls) == 2 * 4 + 1 * 7 + 1


# -------------------------------------------------------------------------------------- casts, copies, ties


def tied_sets(model):
    """Names of modules by the storage of their weight, where there are several."""
    sets = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QATModule):
            sets.setdefault(module.weight.data_ptr(), set()).add(name)
    return sorted(sorted(names) for names in sets.values() if len(names) > 1)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_masters_stay_float32_and_tied(family, cast):
    model = trained(family, DQConfig(weight_bits=2), True)
    ties, masters = (
        tied_sets(model),
        {n: m.weight.detach().clone() for n, m in model.named_modules() if m in quantized(model)},
    )
    assert len(ties) == 1 and len(ties[0]) == tiny_models.FAMILIES[family][2]
    cast(model)
    assert tied_sets(model) == ties
    for name, module in model.named_modules():
        if isinstance(module, QATModule):
            assert module.weight.dtype == torch.float32 and torch.equal(module.weight, masters[name])
            assert module.log_step().dtype == torch.float32
    floats = {p.dtype for n, p in model.named_parameters() if not n.endswith(("weight_log_step",)) and p.dim() == 1}
    assert len(floats) == 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model).backward()
    optimizer.step()
    assert tied_sets(model) == ties and all(m.weight.grad.dtype == torch.float32 for m in quantized(model))


def test_deepcopy_is_a_model_of_its_own():
    model = trained("bart", DQConfig(weight_bits=2), True)
    model.model.shared.packed()
    other = copy.deepcopy(model)
    want = tiny_models.logits(model)
    assert torch.equal(tiny_models.logits(other), want) and tied_sets(other) == tied_sets(other)
    assert tied_sets(other)[0] == tied_sets(model)[0]
    owners = [m.__dict__["_owner"] for m in quantized(other) if m.__dict__["_owner"] is not None]
    assert owners and all(owner in set(other.modules()) for owner in owners)
    with torch.no_grad():
        other.model.shared.weight.neg_()
    assert torch.equal(tiny_models.logits(model), want) and not torch.equal(tiny_models.logits(other), want)


def test_state_dict_holds_floats_only(tmp_path):
    """Names and shapes of the float model and its learned steps, once each: no code, nothing to pickle."""
    plain, model = tiny_models.make("bart"), trained("bart", DQConfig(weight_bits=2), True)
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert extra and all(name.endswith(".weight_log_step") for name in extra)
    assert len([n for n in extra if "shared" in n or "embed_tokens" in n or "lm_head" in n]) == 1
    assert set(plain.state_dict()) <= set(model.state_dict())
    assert all(type(tensor) is torch.Tensor for tensor in model.state_dict().values())
    path = tmp_path / "state.pt"
    torch.save(model.state_dict(), path)
    other = prepare_qat(tiny_models.make("bart"), DQConfig(weight_bits=2), True).eval()
    other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(tiny_models.logits(other), tiny_models.logits(model))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(family, reentrant):
    """Recomputed layers find the same codes; nothing is left over from the first pass."""
    found = []
    for checkpointing in (False, True):
        model = prepare_qat(tiny_models.make(family), DQConfig(weight_bits=2, act_clip=2.5), True).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "activation_dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for module in quantized(model):
            module.packed()
        loss = loss_of(model)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, plain), (again, checkpointed) = found
    assert torch.equal(loss, again) and plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        if family == "t5":  # its position bias goes through all layers: gradients add up in another order
            torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(grad, checkpointed[name]), name


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_row_of_zeros_trains(bits):
    """The padding token's row: a step of its own, no NaN, and it stays 0 where nothing reads it."""
    model = tiny_models.make("bart")
    pad = model.config.pad_token_id
    with torch.no_grad():
        model.model.shared.weight[pad] = 0.0
        model.model.encoder.layers[0].fc1.weight[3] = 0.0
    prepare_qat(model, DQConfig(weight_bits=bits, embedding_bits=bits), True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
    assert bool(loss.isfinite()) and all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool(tiny_models.logits(model.eval()).isfinite().all())
    model.eval()
    assert torch.equal(tiny_models.logits(packed_copy(model, torch.float32)), tiny_models.logits(model))


def test_a_matrix_of_zeros_trains():
    layer = QATLinear.from_linear(nn.Linear(8, 4), LayerConfig(bits=4, quantizer="absmax"), learned_scale=True)
    with torch.no_grad():
        layer.weight.zero_()
    again = QATLinear.from_linear(layer.to_float(), LayerConfig(bits=4, quantizer="absmax"), learned_scale=True)
    again(torch.randn(3, 8)).sum().backward()
    assert all(bool(p.isfinite().all()) and bool(p.grad.isfinite().all()) for p in again.parameters())


def test_autocast_trains_in_its_dtype():
    """Outputs in autocast's dtype, float32 gradients, and the codes of the plain forward pass."""
    model = prepare_qat(tiny_models.make("bart"), DQConfig(weight_bits=4), True)
    codes = [m.packed()[0].clone() for m in quantized(model)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits
        assert model.model.encoder.layers[0].fc1(torch.randn(2, 40)).dtype == torch.bfloat16
        loss = F.cross_entropy(logits.float().flatten(0, 1), IDS[:, :4].flatten())
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(m.packed()[0], code) for m, code in zip(quantized(model), codes, strict=True))


def test_the_tied_head_learns_with_the_embedding():
    """One table, one step parameter: gradients of the lookup and of the product add up in both."""
    model = Pair(learned=True)
    ids = torch.arange(2, 19)
    hidden = model.table(ids).detach().requires_grad_()
    grads = []
    for call in (lambda: model.table(ids).sum(), lambda: model.head(hidden).square().sum()):
        grads.append(torch.autograd.grad(call(), [model.table.weight, model.table.weight_log_step]))
    assert all(bool(g.any()) for pair in grads for g in pair)
    (model.table(ids).sum() + model.head(hidden).square().sum()).backward()
    for leaf, parts in zip((model.table.weight, model.table.weight_log_step), zip(*grads, strict=True), strict=True):
        assert torch.allclose(leaf.grad, parts[0] + parts[1], rtol=1e-6, atol=1e-6)
    assert model.head.weight_log_step is None and model.head.log_step() is model.table.weight_log_step
    assert [n for n, _ in model.named_parameters()] == ["table.weight", "table.weight_log_step", "head.bias"]


def test_frozen_parts_stay():
    model = prepare_qat(tiny_models.make("bart"), DQConfig(weight_bits=4), True).train()
    for parameter in model.model.encoder.parameters():
        parameter.requires_grad_(False)
    codes = model.model.encoder.layers[0].fc1.packed()[0].clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    assert torch.equal(model.model.encoder.layers[0].fc1.packed()[0], codes)
    assert model.model.encoder.layers[0].fc1.weight.grad is None and model.model.decoder.layers[0].fc1.weight.grad.any()


def test_int32_ids_and_words_about_a_module():
    model = prepare_qat(tiny_models.make("bart"), DQConfig(weight_bits=2, embedding_bits=2), True)
    table = model.model.encoder.embed_tokens
    assert torch.equal(table(IDS), table(IDS.int())) and "embed_scale" in repr(table) and "learned scale" in repr(table)
    assert "bits=2, four_level, per_channel, learned scale" in repr(model.model.encoder.layers[0].fc1)
