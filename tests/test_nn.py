"""QLinear and QEmbedding as modules: everything a model may do to an `nn.Linear` that is not its arithmetic."""

import copy
import io
import pickle

import pytest
import torch
from compare import assert_same_bits
from torch import nn

from dqkernels import backends, packing, qmath
from dqkernels.config import DQConfig, LayerConfig
from dqkernels.nn import QEmbedding, QLinear

NAN = float("nan")
W4 = LayerConfig(4, "absmax")
LAYERS = {
    "w8": LayerConfig(8, "absmax"),
    "w4": W4,
    "w4-g32": LayerConfig(4, "absmax", group_size=32),
    "w2-four_level": LayerConfig(2, "four_level"),
    "w2-ternary-per_tensor": LayerConfig(2, "ternary", "per_tensor"),
}


def linear(layer=W4, **kwargs):
    return QLinear.from_linear(nn.Linear(40, 24, **kwargs), layer)


def tied_pair(layer=W4, head_layer=None):
    embedding = nn.Embedding(24, 40)
    head = nn.Linear(40, 24, bias=False)
    head.weight = embedding.weight
    table = QEmbedding.from_embedding(embedding, layer)
    return table, QLinear.from_linear(head, head_layer or layer, tied=table)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_computes_with_the_quantized_weight(name, bias):
    layer = LAYERS[name]
    float_layer = nn.Linear(40, 24, bias=bias)
    before = float_layer.weight.detach().clone()
    packed = QLinear.from_linear(float_layer, layer)
    assert torch.equal(float_layer.weight, before)
    assert_same_bits(packed.dequantize(), qmath.fake_quantize(before, layer))
    assert (packed.bias is None) == (not bias)
    x = torch.randn(2, 3, 40)
    y = packed(x).detach()
    q, scale, _ = qmath.quantize_activation(x, "per_token")
    wanted = (q.double() * scale.double().unsqueeze(-1)) @ packed.dequantize().double().t()
    wanted = wanted + (float_layer.bias.detach().double() if bias else 0)
    assert y.shape == (2, 3, 24) and y.dtype == torch.float32
    # An exact sum, then at most four float32 roundings of a value below 4: 2^-24 * 4 * 4 each way.
    assert float((y.double() - wanted).abs().max()) < 2**-20 and 0.1 < float(y.abs().max()) < 4


@pytest.mark.parametrize("name", LAYERS)
def test_from_embedding_reads_rows_of_the_quantized_table(name):
    layer = LAYERS[name]
    embedding = nn.Embedding(24, 40, padding_idx=1)
    packed = QEmbedding.from_embedding(embedding, layer)
    ids = torch.tensor([[0, 1, 23], [5, 5, 7]])
    assert packed.padding_idx == 1
    assert_same_bits(packed(ids), packed.dequantize()[ids])
    assert_same_bits(packed.dequantize(), qmath.fake_quantize(embedding.weight.detach(), layer))


@pytest.mark.parametrize("name", LAYERS)
def test_packing_in_pieces_gives_the_same_bits(name, monkeypatch):
    """A table of 250,000 words is quantized some rows at a time; the last piece may be a single row."""
    import dqkernels.nn

    layer, float_layer = LAYERS[name], nn.Linear(40, 49)
    whole = qmath.quantize_weight(float_layer.weight, layer)
    monkeypatch.setattr(dqkernels.nn, "_PACK_ELEMENTS", 1)  # 16 rows at a time
    packed = QLinear.from_linear(float_layer, layer)
    assert_same_bits(packed.qweight.data, packing.pack(whole.codes, layer.bits))
    assert_same_bits(packed.weight_scale, whole.scale)
    if whole.group_mult is not None:
        assert_same_bits(packed.group_mult.data, whole.group_mult)


def test_the_padding_row_of_a_fresh_embedding_is_zero_and_stays_zero():
    for name in ("w8", "w4", "w4-g32", "w2-four_level"):
        packed = QEmbedding.from_embedding(nn.Embedding(24, 40, padding_idx=1), LAYERS[name])
        assert (packed(torch.tensor([1])) == 0).all() and (packed(torch.tensor([2])) != 0).any()


def test_embed_scale_is_taken_from_the_scaled_embeddings_of_transformers():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    packed = QEmbedding.from_embedding(BartScaledWordEmbedding(24, 40, 1, embed_scale=6.25), W4)
    assert packed.embed_scale == 6.25 and "embed_scale=6.25" in repr(packed)
    assert_same_bits(packed(torch.arange(24)), packed.dequantize() * 6.25)


# ----------------------------------------------------------------------------------------------------- hooks


def test_hooks_of_every_kind_go_on_and_can_be_removed():
    float_layer = nn.Linear(40, 24)
    seen = []

    def note(name):
        return lambda *args, **kwargs: seen.append(name)

    handles = [
        float_layer.register_forward_pre_hook(note("pre")),
        float_layer.register_forward_pre_hook(note("pre with kwargs"), with_kwargs=True),
        float_layer.register_forward_hook(note("post")),
        float_layer.register_forward_hook(note("always"), always_call=True),
        float_layer.register_full_backward_pre_hook(note("backward pre")),
        float_layer.register_full_backward_hook(note("backward")),
    ]
    packed = QLinear.from_linear(float_layer, W4)
    packed(torch.randn(2, 40, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["always", "backward", "backward pre", "post", "pre", "pre with kwargs"]
    for handle in handles:
        handle.remove()
    seen.clear()
    packed(torch.randn(2, 40, requires_grad=True)).sum().backward()
    assert seen == []


def test_a_hook_can_replace_the_output():
    float_layer = nn.Linear(40, 24)
    float_layer.register_forward_hook(lambda module, args, output: output * 0 + 7)
    assert (QLinear.from_linear(float_layer, W4)(torch.randn(2, 40)) == 7).all()


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_is_taken_over(training):
    assert QLinear.from_linear(nn.Linear(40, 24).train(training), W4).training == training


# ----------------------------------------------------------------------------------- moving, casting, copying


@pytest.mark.parametrize("cast", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16),
    lambda m: m.to(dtype=torch.bfloat16), lambda m: m.to("cpu", torch.float16),
])  # fmt: skip
def test_casting_a_model_keeps_scales_in_float32_and_tables_shared(cast):
    static = LayerConfig(4, "absmax", act_granularity="static")
    table, head = tied_pair(W4, static)
    head.act_scale = torch.tensor([0.0123456789])
    model = nn.ModuleList([table, head, linear(LAYERS["w4-g32"])])
    scales = [m.weight_scale.clone() for m in model]
    cast(model)
    for module, scale in zip(model, scales, strict=True):
        assert module.weight_scale.dtype == torch.float32 and torch.equal(module.weight_scale, scale)
        assert module.qweight.dtype == torch.uint8
        assert module.weight.dtype == module.compute_dtype != torch.float32
    assert head.act_scale.dtype == torch.float32 and head.act_scale.item() == pytest.approx(0.0123456789)
    assert model[2].group_mult.dtype == torch.uint8 and model[2].bias.dtype == model[2].compute_dtype
    assert head.qweight is table.qweight and head.weight_scale is table.weight_scale
    assert table(torch.tensor([3])).dtype == table.compute_dtype
    x = torch.randn(2, 40)
    assert head(x.half()).dtype == torch.float16 and head(x).dtype == torch.float32


def test_moving_between_devices_keeps_scales_shared():
    """The meta device stands in for a GPU: a move makes new tensors, and the pair must get the same new ones."""
    table, head = tied_pair()
    model = nn.ModuleList([table, head])
    model.to("meta")
    assert table.weight_scale.is_meta and head.weight_scale is table.weight_scale
    model.to_empty(device="cpu")
    assert head.weight_scale is table.weight_scale and head.weight_scale.dtype == torch.float32
    assert head.weight_scale.shape == (24,)


def test_a_move_that_fails_leaves_a_whole_module():
    """Out of memory, or no driver: the scales, taken out while the rest is cast, must come back."""
    table, head = tied_pair()
    model = nn.ModuleList([table, head, linear()])
    x = torch.randn(2, 40)
    before = [head(x), model[2](x)]

    def no_memory(tensor):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        model._apply(no_memory)
    assert_same_bits(head(x), before[0])
    assert_same_bits(model[2](x), before[1])
    assert head.weight_scale is table.weight_scale
    assert "weight_scale" in table.state_dict()


def test_deepcopy_is_independent_and_keeps_sharing_inside():
    table, head = tied_pair()
    model = nn.ModuleList([table, head])
    x = torch.randn(2, 40)
    y = head(x)
    twin = copy.deepcopy(model)
    assert_same_bits(twin[1](x), y)
    assert twin[1].qweight is twin[0].qweight and twin[1].weight_scale is twin[0].weight_scale
    assert twin[0].qweight is not table.qweight
    with torch.no_grad():
        twin[0].weight_scale.mul_(2)
    assert_same_bits(head(x), y, "the original")
    assert_same_bits(twin[1](x), y * 2, "the copy, through its tied table")


def test_pickle_round_trip():
    packed = linear()
    x = torch.randn(2, 40)
    assert_same_bits(pickle.loads(pickle.dumps(packed))(x), packed(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(name, assign):
    source = nn.Sequential(linear(LAYERS[name]))
    names = {"0.qweight", "0.weight_scale", "0.bias"} | ({"0.group_mult"} if "g32" in name else set())
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert set(state) == names
    target = nn.Sequential(QLinear(40, 24, layer=LAYERS[name]))
    x = torch.randn(3, 40)
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(state, strict=True, assign=assign)
    assert_same_bits(target(x), source(x))
    assert target[0].weight_scale.dtype == torch.float32 and not target[0].qweight.requires_grad


def test_state_dict_of_a_tied_pair_loads_into_a_tied_pair():
    source, target = (nn.ModuleList(tied_pair()) for _ in range(2))
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    target.load_state_dict(state)
    x = torch.randn(2, 40)
    assert_same_bits(target[1](x), source[1](x))
    assert target[1].qweight is target[0].qweight and target[1].weight_scale is target[0].weight_scale


def test_a_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        linear().load_state_dict(QLinear.from_linear(nn.Linear(40, 99), W4).state_dict())


# --------------------------------------------------------------------------------------- what other code asks


def test_weight_tells_dtype_device_and_shape_and_holds_nothing():
    packed = linear().half()
    assert packed.weight.dtype == torch.float16 and packed.weight.device == packed.qweight.device
    assert packed.weight.shape == (24, 40) and packed.weight.untyped_storage().nbytes() == 2
    assert packed.weight.isnan().all(), "a computation with it would look like a result"
    assert "weight" not in dict(packed.named_parameters()) and "weight" not in packed.state_dict()
    assert next(p for p in nn.ModuleList([packed]).parameters() if p.is_floating_point()).dtype == torch.float16


def test_t5_casts_its_input_to_the_weight_dtype():
    """T5's feed-forward reads `wo.weight.dtype` before it calls wo."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

    config = T5Config(d_model=40, d_ff=56, dense_act_fn="relu")
    for block in (T5DenseActDense(config), T5DenseGatedActDense(config)):
        block.eval()
        x = torch.randn(2, 3, 40)
        wanted = block(x)
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, QLinear.from_linear(child, LAYERS["w8"]))
        assert float(((block(x) - wanted).norm() / wanted.norm()).detach()) < 0.05
        block.wo.half()
        assert block.wo.weight.dtype == torch.float16
        assert block(x).dtype == torch.float16  # the input was cast because the weight said so


def test_no_parameter_takes_a_gradient_and_inputs_do():
    packed = linear()
    assert not any(p.requires_grad for p in packed.parameters())
    x = torch.randn(2, 40, requires_grad=True)
    packed(x).sum().backward()
    assert bool((x.grad != 0).any()) and packed.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_dtype_follows_the_input(dtype):
    assert linear()(torch.randn(2, 40).to(dtype)).dtype == dtype


def test_float64_is_refused_in_words():
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16, got torch.float64"):
        linear()(torch.randn(2, 40, dtype=torch.float64))


def test_shapes_of_input():
    packed = linear()
    x = torch.randn(2, 3, 40)
    assert_same_bits(packed(x[0, 0]), packed(x)[0, 0])
    assert packed(x[:0]).shape == (0, 3, 24)
    for width in (1, 39, 41, 128, 200):  # up to 128 the padded codes have room for them all
        with pytest.raises(ValueError, match=rf"input must be \[..., in_features=40\], got \[2, {width}\]"):
            packed(torch.randn(2, width))


# ------------------------------------------------------------------------------------------------ static, tied


def test_static_is_refused_until_calibrated():
    """An output that nobody calibrated must not look like one; every backend says the same."""
    packed = linear(LayerConfig(4, "absmax", act_granularity="static"))
    x = torch.randn(2, 40)
    assert packed.act_scale.isnan().all()
    for backend in ("eager", "auto"):
        packed.backend = backend
        for value in (float("nan"), float("inf"), -0.05, 0.0, 2.0**-127, 2.0**127):
            packed.act_scale = torch.tensor([value])
            with pytest.raises(ValueError, match=r"act_scale must lie between .*dqkernels.calibrate"):
                packed(x)
    packed.act_scale = torch.tensor([0.05])
    assert packed(x).isfinite().all()
    assert "act_scale" in packed.state_dict() and "act_scale" not in linear().state_dict()


def test_static_head_of_a_tied_table_under_another_default_dtype():
    """transformers sets the default dtype while it loads; a scale made then must be float32 all the same."""
    try:
        torch.set_default_dtype(torch.bfloat16)
        table, head = tied_pair(W4, LayerConfig(4, "absmax", act_granularity="static"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.act_scale.dtype == head.weight_scale.dtype == table.weight_scale.dtype == torch.float32
    assert not head.act_scale.is_meta and head.act_scale.isnan().all()


@pytest.mark.parametrize("other", [
    LAYERS["w8"], LAYERS["w4-g32"], LayerConfig(2, "ternary"), LayerConfig(2, "four_level"),
])  # fmt: skip
def test_sharing_needs_one_format(other):
    """Four levels read as ternary would be wrong numbers, not an error, if nobody looked."""
    layer = LayerConfig(2, "four_level") if other.quantizer == "ternary" else LayerConfig(2, "ternary")
    with pytest.raises(ValueError, match="modules that share a packed table must agree"):
        tied_pair(layer, other)
    tied_pair(other, other)


def test_sharing_needs_one_shape():
    table, _ = tied_pair()
    with pytest.raises(ValueError, match=r"got .*\[24, 41\] and .*\[24, 40\]"):
        QLinear.from_linear(nn.Linear(41, 24), W4, tied=table)


def test_a_tied_head_costs_nothing_and_computes_with_the_table():
    table, head = tied_pair()
    assert head.qweight.data_ptr() == table.qweight.data_ptr()
    assert not head.qweight.is_meta
    x = torch.randn(3, 40)
    own = QLinear.from_linear(nn.Linear(40, 24, bias=False), W4)
    own.share_(table)
    assert_same_bits(head(x), own(x))


# ----------------------------------------------------------------------------------------------- refusals, words


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_that_is_not_finite_is_refused(name, bad):
    float_layer = nn.Linear(40, 24)
    with torch.no_grad():
        float_layer.weight[23, 39] = bad
    with pytest.raises(ValueError, match="weight has NaN or Inf values and cannot be quantized"):
        QLinear.from_linear(float_layer, LAYERS[name])


def test_a_failed_pack_leaves_the_module_as_it_was():
    packed = linear()
    x = torch.randn(2, 40)
    before = packed(x)
    with pytest.raises(ValueError, match="NaN or Inf"):
        packed.pack_(torch.full((24, 40), NAN))
    with pytest.raises(ValueError, match=r"weight must be \[24, 40\], got \[40, 24\]"):
        packed.pack_(torch.zeros(40, 24))
    assert_same_bits(packed(x), before)


def test_in_features_beyond_the_int32_bound():
    with pytest.raises(ValueError, match="in_features must be 1..131071"):
        QLinear.from_linear(nn.Linear(131_072, 1), W4)


def test_repr_and_kernel_say_what_runs():
    packed = linear(LAYERS["w4-g32"])
    assert repr(packed) == (
        "QLinear(in_features=40, out_features=24, bias=True, bits=4, absmax, per_channel, group_size=32, act=per_token)"
    )
    packed.backend = "eager"
    assert packed.kernel() == "eager (forced by backend='eager')"
    packed.backend = "cuda"
    assert packed.kernel().startswith("none (backend='cuda' cannot run qgemm on cpu")
    table = QEmbedding.from_embedding(nn.Embedding(24, 40), W4)
    assert repr(table) == "QEmbedding(24, 40, bits=4, absmax, per_channel)"
    first = backends.choose("qembedding", "cpu")  # the core, where there is one
    assert table.kernel() == f"{first.backend} ({first.reason})"
    table.backend = "eager"
    assert table.kernel() == "eager (forced by backend='eager')"


def test_packed_bytes_counts_codes_scales_and_multipliers():
    assert linear().packed_bytes() == 32 * 64 + 24 * 4
    assert linear(LAYERS["w4-g32"]).packed_bytes() == 32 * 64 + 24 * 4 + 24 * 2
    assert linear(LAYERS["w2-ternary-per_tensor"]).packed_bytes() == 32 * 32 + 4


def test_the_example_of_the_docstring():
    packed = QLinear.from_linear(nn.Linear(40, 24), DQConfig(weight_bits=4).for_linear("fc1"))
    assert packed.layer == W4


def test_a_whole_config_is_resolved_for_a_module_without_a_name():
    config = DQConfig(
        weight_bits=2, embedding_bits=8, backend="eager", strict=True, overrides={"fc1": {"weight_bits": 8}}
    )
    linear, embedding = nn.Linear(40, 24), nn.Embedding(24, 40)
    packed, table = QLinear.from_linear(linear, config), QEmbedding.from_embedding(embedding, config)
    assert packed.layer == config.for_linear("x") and packed.layer.bits == 2
    assert table.layer == config.for_embedding("x") and table.layer.bits == 8
    assert {(m.backend, m.strict) for m in (packed, table)} == {("eager", True)}
    assert_same_bits(packed.dequantize(), QLinear.from_linear(linear, config.for_linear("x")).dequantize())
    plain = QLinear.from_linear(linear, config.for_linear("x"))
    assert (plain.backend, plain.strict) == ("auto", False)


def test_layers_that_say_nothing_to_pack():
    with pytest.raises(ValueError, match="layer must be a LayerConfig or a DQConfig, got dict"):
        QLinear.from_linear(nn.Linear(4, 4), {"bits": 4})
    with pytest.raises(ValueError, match="leaves this module in float .overrides skip"):
        QLinear.from_linear(nn.Linear(4, 4), DQConfig(overrides={"": {"skip": True}}))
    with pytest.raises(ValueError, match="leaves this module in float .embedding_bits=16"):
        QEmbedding.from_embedding(nn.Embedding(4, 4), DQConfig(embedding_bits=16))


def test_meta_weights_are_refused_in_words():
    with pytest.raises(ValueError, match="weight is on the meta device and has no values to quantize: load"):
        QLinear.from_linear(nn.Linear(40, 24, device="meta"), W4)


def test_input_is_called_as_in_torch():
    packed, x, ids = linear(), torch.randn(2, 40), torch.tensor([3, 5])
    assert_same_bits(packed(input=x), packed(x))
    table = QEmbedding.from_embedding(nn.Embedding(24, 40), W4)
    assert_same_bits(table(input=ids), table(ids))
