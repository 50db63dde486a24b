"""The preset `dq-bart-W-E-8` against the authors' fake quantization, written here from its description.

Sources: DQ-BART (ACL 2022) and its released quantizers. The functions below follow their formulas, in float64,
so that one place holds what "the paper's rule" means: clip at +-2.5, a symmetric linear grid that ends at the
maximum, TWN ternary with D = 0.7 * mean|w|, one scale per matrix, per vocabulary row, per activation tensor.

Deliberate difference, named: their formulas divide by a maximum (or by a count) that may be zero and give NaN for
a zero row or tensor, such as the padding row of a fresh model. Here it is zero.
"""

import pytest
import torch
from torch import nn

from dqkernels.config import DQConfig
from dqkernels.nn import QEmbedding, QLinear

CLIP = 2.5


def sym_quantizer(x, bits, row_wise=False):
    """SymQuantizer: clamp, s = max|x| / (2^(b-1) - 1), round(x / s) * s."""
    x = x.double().clamp(-CLIP, CLIP)
    largest = x.abs().amax(dim=-1, keepdim=True) if row_wise else x.abs().max()
    s = largest / (2 ** (bits - 1) - 1)
    return torch.round(x / s) * s


def twn_quantizer(x, row_wise=False):
    """TwnQuantizer: clamp, D = 0.7 * mean|x|, a = mean of |x| over |x| > D, {-a, 0, a}."""
    x = x.double().clamp(-CLIP, CLIP)
    dims = (-1,) if row_wise else (-2, -1)
    threshold = 0.7 * x.abs().mean(dim=dims, keepdim=True)
    mask = (x.abs() > threshold).double()
    a = (mask * x.abs()).sum(dim=dims, keepdim=True) / mask.sum(dim=dims, keepdim=True)
    return a * (x > threshold).double() - a * (x < -threshold).double()


def weight_quantizer(x, bits, row_wise=False):
    return twn_quantizer(x, row_wise) if bits == 2 else sym_quantizer(x, bits, row_wise)


def assert_close_by_rounding(got, wanted, roundings):
    """Equal up to `roundings` float32 roundings of each element; a code off by one is thousands of times more."""
    error = (got.double() - wanted).abs()
    allowed = roundings * 2.0**-24 * wanted.abs() + 1e-30
    worst = int((error - allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"flat index {worst}: got {got.flatten()[worst].item()!r}, wanted {wanted.flatten()[worst].item()!r}"
    )
    assert bool((wanted != 0).any())


def assert_no_ties(x, bits):
    """The premise: no value within float32 rounding of a half, where float32 and float64 may part."""
    x = x.double().clamp(-CLIP, CLIP)
    steps = x / (x.abs().max() / (2 ** (bits - 1) - 1))
    assert float(((steps - steps.floor()) - 0.5).abs().min()) > 127 * 2.0**-22, "choose another seed"


def tensor(*shape, seed=0, spread=1.5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def packed_linear(weight, bits, bias=None):
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    config = DQConfig.preset(f"dq-bart-{bits}-{bits}-8")
    return QLinear.from_linear(linear, config.for_linear("model.encoder.layers.0.fc1"))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("spread", [0.02, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_linear_weights_one_scale_per_matrix(bits, spread, seed):
    """0.02: what a trained model has; 1.5: a tenth of the entries beyond the clip."""
    weight = tensor(24, 40, seed=seed, spread=spread)
    assert bool((weight.abs() > CLIP).any()) == (spread == 1.5)
    if bits > 2:
        assert_no_ties(weight, bits)
    packed = packed_linear(weight, bits)
    assert packed.weight_scale.numel() == 1
    assert_close_by_rounding(packed.dequantize(), weight_quantizer(weight, bits), roundings=4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_token_embeddings_one_scale_per_row(bits):
    weight = tensor(53, 40)
    embedding = nn.Embedding(53, 40)
    with torch.no_grad():
        embedding.weight.copy_(weight)
    config = DQConfig.preset(f"dq-bart-8-{bits}-8")
    packed = QEmbedding.from_embedding(embedding, config.for_embedding("model.shared"))
    assert packed.weight_scale.numel() == 53
    ids = torch.tensor([[0, 52, 7], [7, 1, 30]])
    assert_close_by_rounding(packed(ids), weight_quantizer(weight, bits, row_wise=True)[ids], roundings=4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layer_is_the_product_of_the_two_fake_quantized_tensors(bits, spread, with_bias):
    """linear(fake(x), fake(w)) + b in float64; the activation is one tensor, batch and padding together."""
    x, weight = tensor(3, 7, 40, seed=1, spread=spread), tensor(24, 40, seed=2, spread=0.05)
    bias = tensor(24, seed=3) if with_bias else None
    x[:, ::2] *= 0.1  # quiet tokens beside loud ones: the scale of a token is not the scale of the tensor
    assert_no_ties(x, 8)
    wanted = sym_quantizer(x, 8) @ weight_quantizer(weight, bits).t()
    got = packed_linear(weight, bits, bias)(x)
    # The sum is exact; the two scales carry 4 roundings between them, the three products and the sum one each.
    # Sums that cancel to zero: the float64 side is the one that errs, by 2^-53 of each of its 40 terms.
    size = wanted.abs() + (0 if bias is None else bias.double().abs())
    allowed = 8 * 2.0**-24 * size + 2.0**-45 * wanted.abs().max()
    wanted = wanted if bias is None else wanted + bias.double()
    assert bool(((got.double() - wanted).abs() <= allowed).all())
    # The bound can fail: any of these mistakes is beyond it.
    for mistake in (
        sym_quantizer(x, 8) @ weight.double().t(),
        x.double().clamp(-CLIP, CLIP) @ weight_quantizer(weight, bits).t(),
        sym_quantizer(x.reshape(-1, 40), 8, row_wise=True).reshape(x.shape) @ weight_quantizer(weight, bits).t(),
    ):
        other = mistake if bias is None else mistake + bias.double()
        assert not bool(((other - wanted).abs() <= allowed).all())


def test_the_clip_is_part_of_the_function():
    """An activation of 40 saturates at 2.5 and does not stretch the grid of the others."""
    x = tensor(2, 40, seed=4)
    x[0, 0] = 40.0
    weight = tensor(24, 40, seed=5, spread=0.05)
    got = packed_linear(weight, 8)(x)
    wanted = sym_quantizer(x, 8) @ sym_quantizer(weight, 8).t()
    assert float((got.double() - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    unclipped = x.double() @ sym_quantizer(weight, 8).t()
    assert float((got.double() - unclipped).abs().max()) > 0.1 * float(unclipped.abs().max())


def test_rows_depend_on_their_batch_as_in_the_paper():
    x, weight = tensor(2, 40, seed=6, spread=0.3), tensor(24, 40, seed=7, spread=0.05)
    loud = x.clone()
    loud[1] *= 5
    layer = packed_linear(weight, 8)
    assert not torch.equal(layer(x)[0], layer(loud)[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_named_difference_zero_rows_are_zero_and_not_nan(bits):
    weight = tensor(5, 40)
    weight[1] = 0.0
    assert weight_quantizer(weight, bits, row_wise=True)[1].isnan().all(), "the formulas no longer divide by zero?"
    embedding = nn.Embedding(5, 40)
    with torch.no_grad():
        embedding.weight.copy_(weight)
    packed = QEmbedding.from_embedding(embedding, DQConfig.preset(f"dq-bart-8-{bits}-8").for_embedding("shared"))
    assert (packed(torch.tensor([1])) == 0).all() and packed(torch.arange(5)).isfinite().all()

    assert sym_quantizer(torch.zeros(2, 40), 8).isnan().all()
    layer = packed_linear(tensor(3, 40), bits, bias=torch.tensor([1.0, 2.0, 3.0]))
    assert layer(torch.zeros(2, 40)).tolist() == [[1.0, 2.0, 3.0]] * 2
    zero = packed_linear(torch.zeros(3, 40), bits)
    assert (zero(tensor(2, 40)) == 0).all()


def test_straight_through_gradient_is_the_papers():
    """The incoming gradient, zero where x >= 2.5 or x <= -2.5, boundary included."""
    x = tensor(4, 40, seed=8, spread=2.0)
    x[0, 0], x[0, 1] = CLIP, -CLIP
    x.requires_grad_()
    weight = tensor(24, 40, seed=9, spread=0.05)
    upstream = tensor(4, 24, seed=10)
    packed_linear(weight, 2)(x).backward(upstream)
    inside = (x.detach() < CLIP) & (x.detach() > -CLIP)
    wanted = (upstream.double() @ twn_quantizer(weight)) * inside
    assert float((x.grad.double() - wanted).abs().max()) < 24 * 2.0**-23 * float(wanted.abs().max())
    assert (x.grad[~inside] == 0).all() and int((~inside).sum()) > 10
