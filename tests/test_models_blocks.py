"""Fused blocks of BART, mBART, Marian and Pegasus: the same model in fewer steps, and back."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import pickle
import warnings

import pytest
import torch
import torch_floats
import transformers
from attention_models import IDS, PADDED, peaked, run
from torch.utils._python_dispatch import TorchDispatchMode

from dqkernels import DQConfig, convert, load, models, quantize_, report
from dqkernels.models import attention, blocks, steps
from dqkernels.nn import QLinear
from dqkernels.train import export, prepare_qat

FAMILIES = list(blocks.FAMILIES)
float_attention = functools.partial(DQConfig, attention="float")
CONFIGS = {
    "W8": float_attention(weight_bits=8),
    "W4 groups": float_attention(weight_bits=4, group_size=32),
    "W2": float_attention(weight_bits=2, embedding_bits=2, weight_quantizer="four_level"),
    "per tensor": float_attention(weight_bits=4, act_granularity="per_tensor", act_clip=2.5),
    "int8 attention": DQConfig(weight_bits=4, attention="int8"),
    "two widths": float_attention(weight_bits=4, overrides={r"v_proj": {"weight_bits": 8}}),
    "mixed": float_attention(weight_bits=4, overrides={r"v_proj|fc1": {"weight_bits": 8}, r"k_proj": {"skip": True}}),
}


@pytest.fixture(autouse=True)
def _torch_floats(monkeypatch):
    """Modules norm by torch: bits can be compared where fused steps do, too. test_models_native.py holds the rest."""
    torch_floats.put_in(monkeypatch)


class Mine(transformers.models.marian.modeling_marian.MarianEncoderLayer):
    """A user's class."""


def packed(family: str, config: str = "W4 groups", dtype: torch.dtype = torch.float32):
    """Not fused yet."""
    return quantize_(peaked(family).to(dtype), dataclasses.replace(CONFIGS[config], fused=False))


@torch.no_grad()
def outputs(model, **kwargs):
    """Logits of a padded batch, and whatever else was asked for."""
    return run(model, **kwargs)


def classes(model) -> list[type]:
    return [type(module) for module in model.modules()]


# ---- the same numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_is_unfused_in_fp32(family, config):
    """In fp32 a residual in the epilogue is rounded as one behind it; LayerNorm and GELU are torch's here."""
    model = packed(family, config)
    plain = outputs(model).logits
    assert blocks.patch(model) is model
    fused = outputs(model).logits
    assert torch.equal(fused, plain), f"{(fused - plain).abs().max()}"
    assert plain.std() > 0.01, "or nothing was compared"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_as_close_to_fp32(family, dtype):
    """One rounding less per residual: no farther from the fp32 model of the same codes than without fusing, by half."""
    model = packed(family, "W8", dtype)
    plain = outputs(model).logits.float()
    fused = outputs(blocks.patch(model)).logits.float()
    exact = outputs(blocks.unpatch(model).to(torch.float32)).logits
    far = [(each - exact).pow(2).mean().sqrt() for each in (plain, fused)]
    assert far[1] <= 1.5 * far[0] and far[0] > 0
    assert torch.isfinite(fused).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_writes_the_same_tokens(family, beams, cache):
    model = packed(family, "int8 attention" if family == "bart" else "W8")
    options = {"max_new_tokens": 9, "num_beams": beams, "do_sample": False, "cache_implementation": cache}
    given = {"input_ids": IDS, "attention_mask": PADDED["attention_mask"]}
    plain = model.generate(**given, **options)
    fused = blocks.patch(model).generate(**given, **options)
    assert torch.equal(fused, plain) and plain.shape[1] > 3


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_no_old_name_is_used(family):
    """The cache by the name of this transformers: fused, watched, and in layers that run as it wrote them."""
    model = packed(family, "W8")
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "input_ids": IDS}
    plain = model.generate(**options)
    blocks.patch(model)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    ways = {"fused": contextlib.nullcontext, "watched": contextlib.nullcontext, "as written": autocast}
    for way, context in ways.items():
        if way == "watched":
            model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: None)
        with warnings.catch_warnings(), context():
            warnings.simplefilter("error", FutureWarning)
            found = model.generate(**options)
            if way == "as written":  # of 16 bits: other tokens
                blocks.unpatch(model)
                plain = model.generate(**options)
        assert torch.equal(found, plain), way


def test_the_old_name_is_taken():
    """A caller of a layer may still say past_key_values, as to transformers' own, or give the cache by position."""
    layer, x = blocks.patch(packed("bart", "W8")).get_decoder().layers[0], torch.randn(1, 3, 40)
    found = []
    for name in ("past_key_values", type(layer).dqkernels_cache, None):
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        with torch.no_grad():
            found.append(layer(x, None, x, None, cache) if name is None else layer(x, None, x, **{name: cache}))
        assert cache.self_attention_cache.get_seq_length() == 3 and cache.is_updated[0], name
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize(
    "part, old, new",
    [
        ("DecoderLayer", "use_cache: bool | None = True", "use_cache: bool | None = True, memory: Any = None"),
        ("Attention", "attention_mask: Any = None", "mask: Any = None"),
        ("EncoderLayer", "hidden_states, attention_mask", "attention_mask, hidden_states"),
    ],
)
def test_a_later_transformers_is_refused(monkeypatch, part, old, new):
    """5.24 renamed a parameter of these forwards: the old code took it into **kwargs and wrote wrong tokens."""
    bart = transformers.models.bart.modeling_bart
    cls = getattr(bart, "Bart" + part)
    kinds = {
        "Attention": "self, hidden_states, key_value_states=None, cache=None, attention_mask: Any = None, **kwargs",
        "EncoderLayer": "self, hidden_states, attention_mask, **kwargs",
        "DecoderLayer": "self, hidden_states, attention_mask=None, encoder_hidden_states=None, "
        "encoder_attention_mask=None, cache=None, use_cache: bool | None = True, **kwargs",
    }
    model = packed("bart")
    before = classes(model)
    assert old in kinds[part]
    for text, known in ((kinds[part], True), (kinds[part].replace(old, new), False)):
        space = {"Any": object, "__name__": bart.__name__}
        exec(f"def forward({text}):\n    raise NotImplementedError", space)
        monkeypatch.setattr(cls, "forward", space["forward"])
        if known:
            assert blocks._cache_name(cls)
            continue
        name = "memory" if part == "DecoderLayer" else "mask" if part == "Attention" else "these in this order"
        told = rf"Bart{part}\.forward of transformers 5\S+ takes .*do not know {name}\."
        with pytest.raises(ValueError, match=told) as e:
            blocks.patch(model)
        assert "made for transformers 5.17 to 5.23 and 5.24; quantize_ without patch works" in str(e.value)
        assert classes(model) == before


def test_a_decoder_alone_and_no_cache():
    model = blocks.patch(packed("bart"))
    decoder = model.get_decoder()
    with torch.no_grad():
        alone = decoder(input_ids=IDS, use_cache=False).last_hidden_state  # no cross-attention at all
        stepped = decoder(input_ids=IDS).last_hidden_state
        plain = blocks.unpatch(model).get_decoder()(input_ids=IDS).last_hidden_state
    assert torch.equal(alone, stepped) and torch.equal(alone, plain)


def test_maps_and_hidden_states():
    model = packed("pegasus", "W8")
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    plain = outputs(model, **asked)
    fused = outputs(blocks.patch(model), **asked)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert getattr(plain, name) and all(map(torch.equal, getattr(fused, name), getattr(plain, name))), name
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        assert len(getattr(fused, name)) == len(getattr(plain, name)) > 1
        assert all(map(torch.equal, getattr(fused, name), getattr(plain, name))), name


def test_what_was_captured_once_keeps_no_step_apart_later():
    """transformers never takes its hooks off again; 16 bits would show a step that is made of modules."""
    model = blocks.patch(packed("bart", "W8", torch.bfloat16))
    before, launches = outputs(model).logits, called(model)
    assert not torch.equal(before, outputs(packed("bart", "W8", torch.bfloat16)).logits), "or nothing shows"
    outputs(model, output_attentions=True, output_hidden_states=True)
    assert model.get_encoder().layers[0].self_attn._forward_hooks, "they are there"
    assert torch.equal(outputs(model).logits, before) and called(model) == launches
    assert blocks.describe(model) == "3 fused layers"


@pytest.mark.parametrize("family", FAMILIES)
def test_half_is_clamped_without_a_question(family):
    """BART's and Marian's encoder layers ask first whether anything is infinite; the others never did."""
    model = packed(family, "W8", torch.float16)
    layer = model.get_encoder().layers[0]
    norm = layer.final_layer_norm
    if blocks.FAMILIES[family][1] == "post":
        norm.weight.data.fill_(60000.0)
        norm.bias.data.fill_(60000.0)
    layer.fc2.bias.data.fill_(60000.0)
    if blocks.FAMILIES[family][1] == "post":
        layer.fc2.bias.data[1:] = 0.0  # a row of one value is the norm's bias, but for the noise of its sums
    layer.self_attn.out_proj.bias.data.fill_(30000.0)
    hidden = torch.randn(1, 4, 40, dtype=torch.float16)
    with torch.no_grad():
        plain = layer(hidden, None)
        fused = blocks.patch(model).get_encoder().layers[0](hidden, None)
    limit = torch.finfo(torch.float16).max - 1000
    assert fused.abs().max() == limit and torch.isfinite(fused).all(), "without the clamp it is infinite"
    if blocks.FAMILIES[family][1] == "post":  # torch norms 16 bits by another sum
        torch.testing.assert_close(fused, plain, rtol=2.0**-9, atol=0.0)
    else:
        assert torch.equal(fused, plain)


# ---- fewer steps ----------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of our ops as a model calls them."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dqkernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def called(model) -> list[str]:
    with torch.no_grad(), Calls() as calls:
        run(model)
    return calls.names


@pytest.mark.parametrize("family", FAMILIES)
def test_the_launches_of_a_layer(family):
    model = packed(family, "int8 attention")
    plain = called(model)
    fused = called(blocks.patch(model))
    assert "qlinear_multi" not in plain
    # Two encoder layers of qkv, fc1; a decoder layer of qkv, cross q, cross kv, fc1.
    assert fused.count("qlinear_multi") == 2 * 2 + 4
    # Attention's outputs and fc2, and the head.
    assert fused.count("qlinear") == 2 * 2 + 3 + 1
    assert fused.count("qattention") == 4 and len(fused) < len(plain)


# ---- in and out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_and_unpatch(family):
    model = packed(family)
    before, kinds, plain = model.state_dict(), classes(model), outputs(model).logits
    models.patch(models.patch(model))  # twice is once
    names = dict(model.named_modules())
    prefix = blocks.FAMILIES[family][0]
    modeling = importlib.import_module(blocks.file_of(family))
    for part, count in (("Attention", 4), ("EncoderLayer", 2), ("DecoderLayer", 1)):
        fused = [m for m in names.values() if blocks.is_fused(m) and isinstance(m, getattr(modeling, prefix + part))]
        assert len(fused) == count, part
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert blocks.describe(model) == "3 fused layers"
    assert report(model).blocks == "3 fused layers" and "Blocks: 3 fused layers" in str(report(model))
    assert models.unpatch(model) is model and classes(model) == kinds
    assert report(model).blocks == blocks.describe(model) == "not fused: fused=False, or unpatched"
    assert torch.equal(outputs(model).logits, plain)


def test_copies_pickles_and_files(tmp_path):
    model = blocks.patch(packed("marian"))
    plain = outputs(model).logits
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    model.get_encoder().layers[0].__class__ = blocks._fused_class(Mine)
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for other in again:
        assert blocks.describe(other) == "3 fused layers" and torch.equal(outputs(other).logits, plain)
    assert isinstance(again[1].get_encoder().layers[0], Mine)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="float32", fused=False)
    assert not any(map(blocks.is_fused, loaded.modules())) and torch.equal(outputs(loaded).logits, plain)


def test_names_of_classes_stay():
    """Wrap policies and device maps look layers up by them."""
    model = packed("mbart")
    names = [kind.__name__ for kind in classes(model)]
    assert [kind.__name__ for kind in classes(blocks.patch(model))] == names
    assert transformers.models.mbart.modeling_mbart.MBartAttention not in classes(model)


def test_int8_attention_before_and_after():
    config = DQConfig(attention="int8")
    plain = outputs(packed("mbart", "int8 attention")).logits
    model = quantize_(peaked("mbart"), float_attention(weight_bits=4))
    attention.enable(model, config)
    assert torch.equal(outputs(model).logits, plain)
    attention.disable(model)
    assert not torch.equal(outputs(model).logits, plain)


def test_others_are_refused():
    t5 = quantize_(peaked("t5"), CONFIGS["W8"])
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no attention of bart, mbart, marian, pegasus"):
        blocks.patch(t5)


def test_a_forward_of_its_own_is_kept(monkeypatch):
    bart = transformers.models.bart.modeling_bart
    calls = []

    class Own(bart.BartAttention):
        @functools.wraps(bart.BartAttention.forward)
        def forward(self, *args, **kwargs):
            calls.append(1)
            return super().forward(*args, **kwargs)

    class Same(bart.BartEncoderLayer):
        pass

    model = packed("bart")
    first, second = model.get_encoder().layers
    first.self_attn.__class__, second.__class__ = Own, Same
    plain = outputs(model).logits
    blocks.patch(model)
    assert type(first.self_attn) is Own and isinstance(second, Same) and blocks.is_fused(second)
    assert torch.equal(outputs(model).logits, plain) and len(calls) == 2
    assert blocks.describe(model) == "3 fused layers; self_attn has a forward of its own in 1"
    # Somebody's function in the class of transformers.
    monkeypatch.setattr(bart.BartAttention, "forward", lambda self, x, **kwargs: (torch.zeros_like(x), None))
    patched = blocks.patch(packed("bart"))
    assert not any(blocks.is_fused(m) for m in patched.modules() if isinstance(m, bart.BartAttention))


# ---- what keeps steps apart -----------------------------------------------------------------------------------

WATCHED = [
    "encoder.layers.0.self_attn", "encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn_layer_norm",
    "encoder.layers.0.fc1", "encoder.layers.0.fc2", "encoder.layers.0.activation_fn", "decoder.layers.0.encoder_attn",
    "decoder.layers.0.encoder_attn.k_proj", "decoder.layers.0.encoder_attn.out_proj",
    "decoder.layers.0.final_layer_norm",
]  # fmt: skip


@pytest.mark.parametrize("family", ["bart", "pegasus"])
@pytest.mark.parametrize("name", WATCHED)
def test_a_hook_sees_what_it_saw(family, name):
    model = packed(family)
    watched = model.model.get_submodule(name)
    seen: list[tuple] = []

    def hook(module, args, kwargs, output):
        given = [*args, *(kwargs[name] for name in sorted(kwargs) if isinstance(kwargs[name], torch.Tensor))]
        result = output[0] if isinstance(output, tuple) else output
        seen.append((len(args), *(each.clone() for each in given), result.clone()))

    watched.register_forward_hook(hook, with_kwargs=True)
    plain = outputs(model).logits
    fused = outputs(blocks.patch(model)).logits
    assert torch.equal(fused, plain) and len(seen) == 2
    assert seen[0][0] == seen[1][0], "as many by position"
    for before, after in zip(seen[0][1:], seen[1][1:], strict=True):
        assert torch.equal(before, after)
    leaf = name.partition("layers.0.")[2]
    assert blocks.describe(model) == f"3 fused layers; a hook keeps {leaf} apart in 1"


@pytest.mark.parametrize("name", WATCHED)
def test_a_forward_put_on_the_instance_is_called(name):
    """As accelerate and others hook modules; before `patch` and after it."""

    def watch(module):
        inner, calls = module.forward, []

        def forward(*args, **kwargs):
            calls.append(1)
            out = inner(*args, **kwargs)
            return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5

        module.forward = forward
        return calls

    model = packed("pegasus")
    calls = watch(model.model.get_submodule(name))
    plain = outputs(model).logits
    assert torch.equal(outputs(blocks.patch(model)).logits, plain) and len(calls) == 2
    other = blocks.patch(packed("pegasus"))
    calls = watch(other.model.get_submodule(name))
    assert torch.equal(outputs(other).logits, plain) and len(calls) == 1


def test_a_hook_that_keeps_the_fused_forward_stops_unpatch():
    model = blocks.patch(packed("bart"))
    attention_ = model.get_encoder().layers[1].self_attn
    attention_._old_forward = attention_.forward
    with pytest.raises(ValueError, match=r"model.encoder.layers.1.self_attn._old_forward holds the fused forward"):
        blocks.unpatch(model)
    assert blocks.describe(model) == "3 fused layers"
    del attention_._old_forward
    assert blocks.describe(blocks.unpatch(model)).startswith("not fused")


def test_global_hooks_see_every_module():
    model, counts = packed("bart"), []
    for patched in (False, True):
        if patched:
            blocks.patch(model)
        seen = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))  # noqa: B023
        outputs(model)
        handle.remove()
        counts.append(sorted(seen))
    assert counts[0] == counts[1]


def test_offloaded_weights_come_back_for_their_layer():
    accelerate = pytest.importorskip("accelerate")
    model = packed("bart")
    plain = outputs(model).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(outputs(blocks.patch(model)).logits, plain)


def test_what_is_apart_is_told():
    assert "self_attn.k_proj is in float in 3" in blocks.describe(blocks.patch(packed("bart", "mixed")))
    told = blocks.describe(blocks.patch(packed("bart", "two widths")))
    assert (
        "q_proj, k_proj, v_proj of self_attn are launches of their own (they are packed in different formats) in 3"
        in told
    )
    assert "k_proj, v_proj of encoder_attn are" in told
    model = packed("marian")
    for layer in [*model.get_encoder().layers, *model.get_decoder().layers]:
        layer.activation_fn = torch.nn.SiLU()
    plain = outputs(model).logits
    assert torch.equal(outputs(blocks.patch(model)).logits, plain)
    assert blocks.describe(model) == "3 fused layers; SiLU has no epilogue in 3"


def test_static_scales_are_each_linears_own():
    model = quantize_(peaked("bart"), DQConfig(weight_bits=8, act_granularity="static", fused=False))
    convert.calibrate(model, [{"input_ids": IDS, "decoder_input_ids": IDS}])
    q, k = model.get_encoder().layers[0].self_attn.q_proj, model.get_encoder().layers[0].self_attn.k_proj
    k.act_scale = q.act_scale * 1.5
    plain = outputs(model).logits
    assert torch.equal(outputs(blocks.patch(model)).logits, plain)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_gradients_are_those_of_before(family):
    """A packed model has trainable norms and positions; fused steps have no gradient and step aside."""

    def gradients(model):
        model.train()
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        model.zero_grad()
        run(model, labels=IDS[:, :5].contiguous()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = packed(family, "W8")
    plain = gradients(model)
    blocks.patch(model)
    fused = gradients(model)
    assert plain and fused.keys() == plain.keys() and all(torch.equal(fused[name], plain[name]) for name in plain)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model)
    assert all(torch.allclose(checkpointed[name], plain[name], atol=1e-7) for name in plain)


def freeze(model, but=()):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and any(part in name for part in but))


WANTED = {
    "saliency": (),
    "biases": ("fc1.bias", "k_proj.bias"),
    "one norm": ("encoder_attn_layer_norm",),
    "a late norm": ("decoder.layers.0.final_layer_norm",),
}


@pytest.mark.parametrize("what", WANTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_frozen_model(family, what):
    """A step whose input needs no gradient may hold what does, and the other way round."""
    model = packed(family, "W8")
    freeze(model, WANTED[what])

    def gradients():
        embedded = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0))
        embedded.requires_grad_(what == "saliency")
        model.zero_grad()
        out = model(inputs_embeds=embedded, decoder_input_ids=IDS[:, :5])
        (out.logits * torch.linspace(-1, 1, 100)).sum().backward()
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return named | ({} if embedded.grad is None else {"input": embedded.grad})

    plain = gradients()
    blocks.patch(model)
    fused = gradients()
    assert plain and fused.keys() == plain.keys() and all(torch.equal(fused[name], plain[name]) for name in plain)


def test_students_whose_weights_alone_are_trained():
    student = prepare_qat(peaked("bart"), dataclasses.replace(CONFIGS["W8"], fused=False))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.endswith("proj.weight"))

    def gradients():
        student.zero_grad()
        run(student, labels=IDS[:, :5].contiguous()).loss.backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain = gradients()
    fused = models.patch(student) and gradients()
    assert len(plain) == 16 and fused.keys() == plain.keys()
    assert all(torch.equal(fused[name], plain[name]) for name in plain)


def test_compiles_whole():
    torch._dynamo.reset()
    model = blocks.patch(packed("bart", "W8"))
    layer = model.get_encoder().layers[0]
    x = torch.randn(2, 6, 40)
    with torch.no_grad():
        wanted = layer(x, None)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)(x, None)
    torch._dynamo.reset()
    assert torch.equal(got, wanted)


def test_shapes_alone():
    """On the meta device autocast has no word."""
    model = blocks.patch(packed("bart", "W8"))
    layer = copy.deepcopy(model.get_encoder().layers[0]).to("meta")
    with torch.no_grad():
        assert layer(torch.empty(2, 6, 40, device="meta"), None).shape == (2, 6, 40)


def test_a_layer_in_training_drops():
    model = blocks.patch(packed("bart", "W8"))
    model.train().requires_grad_(False)  # what is trained is not fused anyway
    torch.manual_seed(0)
    first, second = outputs(model).logits, outputs(model).logits
    assert not torch.equal(first, second), "dropout is on"
    torch.manual_seed(0)
    assert torch.equal(outputs(blocks.unpatch(model)).logits, first)


def test_autocast_keeps_its_types():
    model = packed("bart", "W8")
    with torch.autocast("cpu", torch.bfloat16):
        plain = outputs(model).logits
        fused = outputs(blocks.patch(model)).logits
    assert torch.equal(fused, plain) and fused.dtype == plain.dtype


@pytest.mark.parametrize("learned", [False, True])
def test_a_student_in_evaluation_is_its_packed_model(learned, tmp_path):
    """P2 with fused blocks on both sides; its training steps are those without them."""
    config = DQConfig(weight_bits=2, embedding_bits=2, weight_quantizer="four_level", attention="int8")

    def trained(patched: bool):
        student = prepare_qat(peaked("bart"), dataclasses.replace(config, fused="auto" if patched else False), learned)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        torch.manual_seed(1)
        student.train()
        for _ in range(3):
            run(student, labels=IDS[:, :5].contiguous()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return student.eval()

    plain, fused = trained(False), trained(True)
    states = plain.state_dict(), fused.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    assert blocks.describe(fused) == "3 fused layers"
    assert "qlinear_multi" in called(fused)
    logits = outputs(fused).logits
    assert torch.equal(logits, outputs(plain).logits)
    model = export(fused, tmp_path / "packed", dtype=torch.float32)
    assert blocks.describe(model) == "3 fused layers" and torch.equal(outputs(model).logits, logits)


def test_steps_on_float_linears():
    linear, norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
    x = torch.randn(3, 8)
    with torch.no_grad():
        normed, (out,) = steps.project(x, (linear,), norm, torch.nn.ReLU())
        assert torch.equal(normed, norm(x)) and torch.equal(out, linear(norm(x)).relu())
        assert torch.equal(steps.project_onto(x, linear, None), linear(x))
        assert torch.equal(steps.project_onto(x, linear, x), x + linear(x))


def test_other_activations_run_behind():
    """Marian's swish has no epilogue, and somebody's ReLU may be another one."""

    class ReLU(torch.nn.Module):
        def forward(self, x):
            return x.relu() ** 2

    linear = QLinear.from_linear(torch.nn.Linear(40, 24), DQConfig(weight_bits=8))
    x = torch.randn(2, 40)
    with torch.no_grad():
        for activation in (torch.nn.SiLU(), torch.nn.ReLU(), ReLU(), transformers.activations.ACT2FN["gelu"]):
            _, (out,) = steps.project(x, (linear,), None, activation)
            assert torch.equal(out, activation(linear(x)))
