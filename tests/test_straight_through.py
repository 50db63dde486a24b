"""The ops of training: gradients against the closed form of the straight-through estimator in float64, on the oracle's
codes; forward bits; refusals in words; what is kept for the backward pass; autocast."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import oracle
import pytest
import test_gradients
import test_ops
import torch
from compare import assert_bounded, assert_equal, assert_same_bits

from dqkernels import gradients, ops, packing
from dqkernels import straight_through as st

LEAD, N, K = (2, 3), 21, 150
M = 6
#: bits, quantizer, granularity, group_size
FORMATS = {
    "w8": (8, "absmax", "per_channel", -1),
    "w8-tensor": (8, "absmax", "per_tensor", -1),
    "w4": (4, "absmax", "per_channel", -1),
    "w4-mse": (4, "mse", "per_channel", -1),
    "w4-g64": (4, "mse", "per_channel", 64),
    "w2": (2, "ternary", "per_channel", -1),
    "w2-tensor": (2, "ternary", "per_tensor", -1),
    "w2-g32": (2, "ternary", "per_channel", 32),
    "w2f": (2, "four_level", "per_channel", -1),
    "w2f-tensor": (2, "four_level", "per_tensor", -1),
    "w2f-g32": (2, "four_level", "per_channel", 32),
}
LEARNED = [name for name, form in FORMATS.items() if form[3] == -1]
#: Levels reach this many steps from 0; beyond, a code does not move with its weight.
REACH = {"ternary": 1, "four_level": 2, "absmax": {4: 7, 8: 127}, "mse": {4: 7, 8: 127}}
ACT_CLIP, WEIGHT_CLIP = 1.5, 0.25
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two would only wait for each other: everything here is tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Linear:
    """One call of `qlinear_train`, its codes from the oracle, and the gradients it has to have."""

    def __init__(self, name, dtype=torch.float32, learned=False, clipped=False, lead=LEAD, mode="per_token", k=K):
        self.bits, self.quantizer, granularity, self.group_size = FORMATS[name]
        self.four_level = self.quantizer == "four_level"
        self.act_clip, self.weight_clip = (ACT_CLIP, WEIGHT_CLIP) if clipped else (None, None)
        self.dtype, self.learned = dtype, learned
        x, weight = torch.randn(*lead, k).to(dtype), torch.randn(N, k) * 0.2
        if x.numel():
            x[..., 0], x[..., 1], x[..., 2] = ACT_CLIP, -ACT_CLIP, ACT_CLIP * 0.96875
        weight[:, 0], weight[:, 1], weight[:, 2] = WEIGHT_CLIP, -WEIGHT_CLIP, WEIGHT_CLIP * 0.99
        rows = x.float().numpy().reshape(-1, k)
        self.q, self.act_scale, self.row_sum = oracle.quantize_activation(rows, mode, self.act_clip)
        self.log_step = None
        if learned:
            count = 1 if granularity == "per_tensor" else N
            # Some levels end inside the weights, and ternary's do for most.
            start = {2: 0.2, 4: 0.05, 8: 0.003}[self.bits]
            self.log_step = (start * torch.linspace(1.4, 0.6, count)).log()
            step = self.log_step.exp()
            reach = REACH[self.quantizer]
            self.edge = (reach if isinstance(reach, int) else reach[self.bits]) * step
            weight[:, 3], weight[:, 4] = self.edge, -self.edge
            self.codes, self.scale = oracle.quantize_by_step(
                weight.numpy(), step.numpy(), self.bits, self.quantizer, self.weight_clip
            )
            self.mult = None
        else:
            self.codes, self.scale, self.mult = oracle.quantize_weight(
                weight.numpy(), self.bits, self.quantizer, granularity, self.group_size, self.weight_clip
            )
        self.x, self.weight, self.bias = x, weight, torch.randn(N)
        self.grad = torch.randn(*lead, N).to(dtype)

    def matrix(self, dtype=torch.float64):
        """What the codes stand for: an exact integer times a scale, one rounding in `dtype`."""
        k = self.codes.shape[1]
        level = oracle.accumulate(np.eye(k, dtype=np.int64), self.codes, self.mult, self.four_level, self.group_size).T
        return torch.from_numpy(level).to(dtype) * torch.from_numpy(self.scale).to(dtype).reshape(-1, 1)

    def packed(self):
        mult = None if self.mult is None else torch.from_numpy(self.mult)
        return torch.from_numpy(oracle.pack(self.codes, self.bits)), torch.from_numpy(self.scale), mult

    def format(self):
        return self.bits, self.four_level, self.group_size

    def leaves(self):
        """x, weight, log_step or None, bias, to be differentiated by."""
        found = [self.x, self.weight, self.log_step, self.bias]
        return [None if t is None else t.clone().requires_grad_() for t in found]

    def arguments(self, leaves, **changes):
        shape = self.x.shape
        passed = None
        if self.act_clip is not None:
            bits = np.packbits((np.abs(self.x.float().numpy()) < ACT_CLIP).reshape(-1, shape[-1]), 1, "little")
            passed = torch.from_numpy(bits)
        sums = self.four_level and self.group_size == -1
        names = ("x", "weight", "log_step", "bias", "q", "act_scale", "row_sum", "passed", "qweight", "weight_scale",
                 "group_mult", "bits", "four_level", "group_size", "weight_clip", "out_dtype")  # fmt: skip
        values = (
            *leaves, torch.from_numpy(self.q).to(torch.int8).reshape(shape),
            torch.from_numpy(self.act_scale).reshape(shape[:-1]),
            torch.from_numpy(self.row_sum).int().reshape(shape[:-1]) if sums else None, passed,
            *self.packed(), *self.format(), self.weight_clip, self.dtype,
        )  # fmt: skip
        return {**dict(zip(names, values, strict=True)), **changes}

    def truth(self, dtype=torch.float64):
        """Gradients of x, weight, log_step and bias by the closed form, in `dtype` throughout."""
        k = self.codes.shape[1]
        grad, x = self.grad.to(dtype).reshape(-1, N), self.x.to(dtype).reshape(-1, k)
        rounded = torch.from_numpy(self.q).to(dtype) * torch.from_numpy(self.act_scale).to(dtype).unsqueeze(1)
        matrix, weight = self.matrix(dtype), self.weight.to(dtype)
        grad_x, grad_w = grad @ matrix, grad.t() @ rounded
        if self.act_clip is not None:
            grad_x = torch.where(x.abs() < self.act_clip, grad_x, 0.0)
        return [grad_x.reshape(self.x.shape), *through_weight(self, grad_w, matrix, weight), grad.sum(dim=0)]


def through_weight(case, grad_w, matrix, weight):
    """From the gradient of W^ to those of the master weight and of log s: LSQ's rule times s, zero where clipped."""
    grad_step, limited = None, weight
    open_ = torch.ones_like(weight, dtype=torch.bool)
    if case.weight_clip is not None:
        open_, limited = weight.abs() < case.weight_clip, weight.clamp(-case.weight_clip, case.weight_clip)
    if case.learned:
        between = limited.abs() < case.edge.to(weight.dtype).reshape(-1, 1)
        # W^ = s * level(w / s): its slope by log s is W^ - w where the level moves with w / s, else W^.
        slope = torch.where(between, matrix - limited, matrix)
        grad_step = (grad_w * slope).sum(dim=1)
        case.terms = (grad_w * slope).abs().sum()
        grad_step = grad_step.sum().reshape(1) if case.log_step.numel() == 1 else grad_step
        open_ = open_ & between
    return torch.where(open_, grad_w, 0.0), grad_step


def assert_gradients(case, leaves):
    """Each gradient in its leaf's dtype, and no further from float64 than twice what torch's fp32 products are."""
    names = ("x", "weight", "log_step", "bias")
    for name, leaf, truth, eager in zip(names, leaves, case.truth(), case.truth(torch.float32), strict=True):
        if leaf is None:
            assert truth is None
            continue
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape, name
        if name == "log_step" and truth.numel() == 1:  # one number may be right by luck: terms of a row or a matrix
            eager = eager + 2.0**-24 * truth.abs() + 2.0**-24 * case.terms
        assert_bounded(leaf.grad, truth, eager, name)


FIXED_OR_LEARNED = [(name, False) for name in FORMATS] + [(name, True) for name in LEARNED]
INPUTS = [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, False)]
IDS_OF_INPUTS = ["fp32", "fp32-clipped", "fp16-clipped", "bf16"]


@pytest.mark.parametrize("dtype, clipped", INPUTS, ids=IDS_OF_INPUTS)
@pytest.mark.parametrize("name, learned", FIXED_OR_LEARNED)
def test_the_linear_is_qlinear_and_its_gradients_the_closed_form(name, learned, dtype, clipped):
    mode = "per_tensor" if dtype == torch.float16 else "per_token"
    case = Linear(name, dtype, learned, clipped, mode=mode)
    leaves = case.leaves()
    y = st.qlinear_train(**case.arguments(leaves))
    assert y.dtype == dtype and y.shape == (*LEAD, N)
    rest = *case.format(), N, mode, case.act_clip, None, "none", dtype
    assert_same_bits(y, ops.qlinear(case.x, *case.packed(), case.bias, None, *rest))
    facts = {"four_level": case.four_level, "group_size": case.group_size, "mode": mode, "clip": case.act_clip}
    truth = oracle.qlinear(
        case.x.float().reshape(M, K).numpy(), case.codes, case.scale, case.mult, **facts, act_scale=None,
        bias=case.bias.numpy(), residual=None, activation="none", dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    assert_equal(y.float().reshape(M, N), truth)
    y.backward(case.grad)
    assert_gradients(case, leaves)
    x, weight = leaves[0].grad, leaves[1].grad
    # Exactly at a clip is outside (paper.md section 1.5), and so is the last level's edge.
    for grad in (x, weight):
        assert bool((grad[..., :2] == 0).all()) == clipped and bool((grad[..., 2] != 0).any())
    assert not learned or bool((weight[:, 3:5] == 0).all())


def test_a_step_that_clip_and_levels_both_bound():
    """The clip inside the last level: there the slope by log s is W^ - clip, and the weight has no gradient."""
    case = Linear("w4", learned=True, clipped=True)
    assert bool((case.edge > WEIGHT_CLIP).any() and (case.edge < WEIGHT_CLIP).any())
    for name in ("w8", "w2f", "w4"):
        case = Linear(name, learned=True, clipped=True)
        case.weight[:, 5] = 1.0
        case.codes, case.scale = oracle.quantize_by_step(
            case.weight.numpy(), case.log_step.exp().numpy(), case.bits, case.quantizer, WEIGHT_CLIP
        )
        leaves = case.leaves()
        st.qlinear_train(**case.arguments(leaves)).backward(case.grad)
        assert_gradients(case, leaves)


def test_only_what_is_wanted_is_computed(monkeypatch):
    """A frozen weight costs no product of its own, a first layer none for its input."""
    called = []
    for name in ("qlinear_grad_input", "qlinear_grad_weight"):
        counted = functools.partial(lambda op, name, *a: called.append(name) or op(*a), getattr(st, name), name)
        monkeypatch.setattr(st, name, counted)
    case = Linear("w4", learned=True)
    for frozen, wanted in (((0,), ["qlinear_grad_weight"]), ((1, 2), ["qlinear_grad_input"]),
                           ((1,), ["qlinear_grad_input", "qlinear_grad_weight"])):  # fmt: skip
        leaves, called[:] = case.leaves(), []
        for index in frozen:
            leaves[index].requires_grad_(False)
        st.qlinear_train(**case.arguments(leaves)).backward(case.grad)
        assert called == wanted and [leaf.grad is None for leaf in leaves] == [i in frozen for i in range(4)]
    leaves = case.leaves()
    leaves[3] = None  # no bias
    st.qlinear_train(**case.arguments(leaves)).backward(case.grad)
    assert_bounded(leaves[1].grad, case.truth()[1], case.truth(torch.float32)[1])


@pytest.mark.parametrize("name, learned", [("w4", False), ("w2f", True), ("w2-tensor", True), ("w4-g64", False)])
def test_empty_batch(name, learned):
    case = Linear(name, torch.bfloat16, learned, clipped=True, lead=(0, 3))
    leaves = case.leaves()
    y = st.qlinear_train(**case.arguments(leaves))
    assert y.shape == (0, 3, N)
    y.sum().backward()
    for leaf in leaves:
        assert leaf is None or (leaf.grad.shape == leaf.shape and not leaf.grad.any())


# ----------------------------------------------------------------------------------------------- embedding

V, D, PAD = 21, 150, 3
IDS = torch.tensor([[5, 3, 5, 20], [0, 5, 3, 20]])


def embedding(case, leaves, ids=IDS, padding_idx=PAD, scale=1.5):
    weight, log_step = leaves
    return st.qembedding_train(
        ids, weight, log_step, *case.packed(), *case.format(), padding_idx, scale, case.weight_clip, case.dtype
    )


@pytest.mark.parametrize("dtype, clipped", INPUTS[1:], ids=IDS_OF_INPUTS[1:])
@pytest.mark.parametrize("name, learned", FIXED_OR_LEARNED)
def test_gradients_of_the_embedding_are_the_closed_form(name, learned, dtype, clipped):
    """Repeated ids add up, the padding row has none, embed_scale multiplies."""
    case = Linear(name, dtype, learned, clipped, k=D)
    for ids, padding_idx, scale in ((IDS, PAD, 1.5), (IDS.int().t(), -1, 1.0)):
        leaves = case.leaves()[1:3]
        y = embedding(case, leaves, ids, padding_idx, scale)
        want = ops.qembedding(ids, *case.packed(), None, *case.format(), V, D, scale, dtype)
        assert_same_bits(y, want)
        grad = torch.randn(*ids.shape, D).to(dtype)
        y.backward(grad)
        found = []
        for kind in (torch.float64, torch.float32):
            grad_w = torch.zeros(V, D, dtype=kind)
            for row, one in zip(ids.flatten().tolist(), grad.reshape(-1, D).to(kind), strict=True):
                grad_w[row] += 0 if row == padding_idx else one * scale
            found.append(through_weight(case, grad_w, case.matrix(kind), case.weight.to(kind)))
        for name_, leaf, true, eager in zip(("weight", "log_step"), leaves, *found, strict=True):
            assert leaf is None or assert_bounded(leaf.grad, true, eager, name_) is None
        weight = leaves[0].grad
        assert bool((weight[PAD] == 0).all()) == (padding_idx == PAD) and bool((weight[[0, 5, 20]] != 0).any(1).all())
        assert not clipped or bool((weight[:, :2] == 0).all())
        assert bool((weight[[i for i in range(V) if i not in IDS]] == 0).all())


def test_embedding_of_nothing():
    case = Linear("w2f", learned=True)
    leaves = case.leaves()[1:3]
    y = embedding(case, leaves, torch.zeros(2, 0, dtype=torch.long))
    assert y.shape == (2, 0, D)
    y.sum().backward()
    assert not leaves[0].grad.any() and not leaves[1].grad.any()


# ------------------------------------------------------------------------------------------- learned steps

RULES = [(2, "ternary"), (2, "four_level"), (4, "absmax"), (4, "mse"), (8, "absmax"), (8, "mse")]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("bits, quantizer", RULES)
def test_quantizing_by_steps_is_the_oracle(bits, quantizer, backend):
    """Ties and borders, dead and broken steps, rows that are not finite, a step for all, clip, 16-bit masters."""
    steps = torch.tensor(
        [0.1, 0.25, 0.0, -1.0, 2.0**-100 / 127, 2.0**-107, float("nan"), float("inf"), 1e-3, 0.3, 3e38]
    )
    weight = torch.randn(len(steps), 137)
    weight[1, :16] = torch.arange(-8, 8) * 0.125  # on the borders, and half way between codes
    weight[4] *= 2.0**-100
    weight[8, 3], weight[9, 136] = float("nan"), float("-inf")
    for dtype, clip in itertools.product((torch.float32, torch.bfloat16), (None, 0.7)):
        w = weight.to(dtype)
        for rows, step in ((slice(None), steps), (slice(0, 8), steps[1:2]), (slice(None), steps[:1])):
            got = st.quantize_by_step(w[rows], step, bits, quantizer, clip, backend)
            with np.errstate(all="ignore"):
                codes, scale = oracle.quantize_by_step(w[rows].float().numpy(), step.numpy(), bits, quantizer, clip)
            assert_equal(got[1], scale, "scale")
            assert_equal(got[0], oracle.pack(codes, bits), "codes", may_be_zero=bool(np.isnan(scale).all()))
    assert np.isnan(scale).all() and not codes.any()  # one broken row breaks the step of the whole matrix
    empty = st.quantize_by_step(torch.randn(0, 5), torch.ones(0), bits, quantizer, backend=backend)
    assert empty[0].shape == (0, 128 * bits // 8) and empty[1].shape == (0,)


@pytest.mark.parametrize("bits, quantizer", RULES[1:])  # ternary's own threshold is 0.7 means, not half a step
def test_steps_of_the_fixed_rule_give_its_codes(bits, quantizer):
    """Learning starts where the fixed rule stands: the scale is the same and so is all but a code or two of 1000."""
    weight = torch.randn(16, 256)
    qweight, scale, _ = ops.quantize_weight(weight, bits, quantizer, "per_channel", -1)
    step = scale * 2 if quantizer == "four_level" else scale
    got, again = st.quantize_by_step(weight, step, bits, quantizer)
    differ = packing.unpack(got, 16, 256, bits) != packing.unpack(qweight, 16, 256, bits)
    assert torch.equal(again, scale) and differ.float().mean() < 2e-3


# ---------------------------------------------------------------------------------------------- refusals


def call_linear(name="w4", learned=False, **changes):
    case = Linear(name, learned=learned)
    return st.qlinear_train(**case.arguments(case.leaves(), **changes))


def call_embedding(weight=None, log_step=None, name="w4"):
    case = Linear(name)
    return embedding(case, (case.weight if weight is None else weight, log_step))


def by_step(weight=None, step=None, bits=4, quantizer="absmax", **more):
    weight = torch.randn(5, 7) if weight is None else weight
    return st.quantize_by_step(weight, torch.ones(5) if step is None else step, bits, quantizer, **more)


REFUSED = {
    "codes of another x": (lambda: call_linear(x=torch.randn(2, 4, K)), r"q must hold the codes of x \[2, 4, 150\]"),
    "mask of other rows": (
        lambda: call_linear(passed=torch.ones(5, 19, dtype=torch.uint8)),
        r"passed must be uint8 \[6, 19\], one bit per input, got torch.uint8 \[5, 19\]",
    ),
    "master of integers": (lambda: call_linear(weight=torch.ones(N, K, dtype=torch.int32)), "weight must be float32"),
    "master of a vector": (
        lambda: call_linear(weight=torch.randn(N)),
        r"weight must be the master matrix \[N, 150\] of the codes, got shape \[21\]",
    ),
    "master of other columns": (
        lambda: call_linear(weight=torch.randn(N, K + 1)),
        r"weight must be the master matrix \[N, 150\] of the codes, got shape \[21, 151\]",
    ),
    "master of other rows": (lambda: call_linear(weight=torch.randn(N + 20, K)), "qweight"),
    "steps and groups": (
        lambda: call_linear("w4-g64", log_step=torch.zeros(N)),
        "log_step needs group_size=-1, got 64: learned steps are per row or per matrix",
    ),
    "steps of other rows": (
        lambda: call_linear(log_step=torch.zeros(1)),
        r"log_step must be float32 \[21\], as weight_scale, got torch.float32 \[1\]",
    ),
    "steps in 16 bits": (lambda: call_linear(log_step=torch.zeros(N).half()), "log_step must be float32"),
    "float codes": (lambda: call_linear(q=torch.randn(*LEAD, K)), "q must be int8"),
    "integers out": (lambda: call_linear(out_dtype=torch.int8), "out_dtype must be float32, float16 or bfloat16"),
    "bias of other outputs": (lambda: call_linear(bias=torch.randn(N + 1)), "bias"),
    "embedding, a vector": (lambda: call_embedding(torch.randn(V)), "weight must be the master matrix"),
    "embedding, other rows": (lambda: call_embedding(torch.randn(V + 20, D)), "qweight"),
    "embedding, steps and groups": (
        lambda: call_embedding(log_step=torch.zeros(V), name="w2f-g32"),
        "log_step needs group_size=-1, got 32",
    ),
    "step per column": (
        lambda: by_step(step=torch.ones(7)),
        r"step must be float32 \[5\], one per row of weight, or \[1\], got torch.float32 \[7\] for weight \[5, 7\]",
    ),
    "step as a matrix": (lambda: by_step(step=torch.ones(5, 1)), r"step must be float32 \[5\]"),
    "step in float64": (lambda: by_step(step=torch.ones(5).double()), "got torch.float64"),
    "3 bits": (lambda: by_step(bits=3), "bits"),
    "ternary in 8 bits": (lambda: by_step(bits=8, quantizer="ternary"), "quantizer"),
    "weight of integers": (lambda: by_step(torch.ones(5, 7, dtype=torch.int8)), "weight"),
    "clip of 0": (lambda: by_step(clip=0.0), "clip"),
    "no column": (lambda: by_step(torch.ones(5, 0)), "in_features must be 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_in_words(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_quantizer_has_no_gradient_of_its_own():
    weight = torch.randn(5, 7, requires_grad=True)
    _, scale = by_step(weight, torch.ones(5, requires_grad=True))
    with pytest.raises(RuntimeError, match="quantize_by_step has no gradient of its own: qlinear_train and"):
        scale.sum().backward()


# -------------------------------------------------------------------------------------------- torch's view


def samples(op):
    """Calls as keyword arguments: every kind of codes, with and without steps, clips, bias, sums."""
    if op == "quantize_by_step":
        for bits, quantizer in RULES:
            for step in (torch.rand(N) * 0.1, torch.rand(1)):
                yield {"weight": torch.randn(N, K), "step": step, "bits": bits, "quantizer": quantizer, "clip": 1.5}
        return
    for i, (name, learned) in enumerate(FIXED_OR_LEARNED):
        case = Linear(name, DTYPES[i % 3], learned, clipped=i % 2 == 1)
        leaves = case.leaves()
        if op == "qlinear_train":
            yield case.arguments(leaves, **({"bias": None} if i % 4 == 3 else {}))
        else:
            names = ("ids", "weight", "log_step", "qweight", "weight_scale", "group_mult", "bits", "four_level",
                     "group_size", "padding_idx", "embed_scale", "weight_clip", "out_dtype")  # fmt: skip
            values = (IDS, *leaves[1:3], *case.packed(), *case.format(), PAD if i % 2 else -1, 1.5, case.weight_clip,
                      case.dtype)  # fmt: skip
            yield dict(zip(names, values, strict=True))


@pytest.mark.parametrize("op", st.SCHEMAS)
def test_opcheck(op):
    for kwargs in list(samples(op))[::5]:  # 5 and the number of cases share no factor: dtypes and clips take turns
        torch.library.opcheck(getattr(torch.ops.dqkernels, op).default, (), kwargs)


@pytest.mark.parametrize("op", st.SCHEMAS)
def test_every_op_has_its_spelling_and_ends_alike(op):
    assert getattr(st, op) is getattr(torch.ops.dqkernels, op).default
    assert [argument.name for argument in getattr(st, op)._schema.arguments][-2:] == ["backend", "strict"]


def calls_of(op):
    """args and kwargs of calls of any op of the package."""
    if op in ops.SCHEMAS:
        return list(test_ops.samples(op))
    if op in gradients.SCHEMAS:
        return [(args, {}) for args in test_gradients.samples(op)]
    return [((), kwargs) for kwargs in samples(op)]


def outcome(op, args, kwargs):
    """Results of an op, and the gradients of its leaves where there are any."""

    def leaf(value):
        same = isinstance(value, torch.Tensor) and value.requires_grad
        return value.detach().clone().requires_grad_() if same else value

    args, kwargs = [leaf(a) for a in args], {name: leaf(a) for name, a in kwargs.items()}
    out = getattr(torch.ops.dqkernels, op).default(*args, **{**kwargs, "backend": "eager"})
    out = list(out) if isinstance(out, tuple | list) else [out]
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    wanted = [o for o in out if o.requires_grad and o.is_floating_point()]
    if leaves and wanted:
        generator = torch.Generator().manual_seed(3)
        total = sum((o.float() * torch.randn(o.shape, generator=generator)).sum() for o in wanted)
        out += [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]
    return out


@pytest.mark.parametrize("op", [*ops.SCHEMAS, *gradients.SCHEMAS, *st.SCHEMAS])
def test_autocast_changes_no_bit(op):
    """Eager multiplies codes as floats: autocast would round their sums to 8 bits. Gradients are taken inside, too."""
    count = 0
    for args, kwargs in calls_of(op):
        want = outcome(op, args, kwargs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = outcome(op, args, kwargs)
        assert len(got) == len(want)
        for mine, theirs in zip(got, want, strict=True):
            assert_same_bits(mine.detach(), theirs.detach(), op, may_be_zero=True)
        count += any(bool(t.any()) for t in want)
    assert count


def test_autocast_would_have_rounded_here():
    """The hazard is real: torch's own product of these codes, under autocast, is not the integer it should be."""
    codes = torch.randint(-127, 128, (64, 64)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = codes @ codes
    assert_equal(codes @ codes, codes.long() @ codes.long())
    assert not torch.equal(rounded.float(), codes @ codes)
