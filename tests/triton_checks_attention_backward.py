"""Checks of attention's backward kernels against tests/oracle_attention.py, run like those of triton_checks.py.

The bound is that of docs/design.md: error to float64 <= 2x plain torch's + one rounding. To it come, element by
element, what fp32 sums of the oracle's terms may err by (on small shapes plain torch is often exact by luck), and for
dV what a code beside a half integer may change (see oracle_attention.py). By hand:
`TRITON_INTERPRET=1 python tests/triton_checks_attention_backward.py`.
"""

import itertools

import numpy as np
import oracle_attention
import torch
import triton_checks
from triton_checks import DTYPES, assert_same, refuses
from triton_checks_attention import BIASES, MASKS, bias_of, mask_of, qkv, wide

CHECKS = {}
NAN, INF = float("nan"), float("inf")
NAMES = ("dQ", "dK", "dV", "d(bias)")
#: fp32: some 20 roundings on the way of a term, most of them the scores'; sums of a few hundred terms.
FP32_TERMS = 2.0**-19


def check(function):
    CHECKS[function.__name__] = function
    return function


def saved(q, k, v, scale=None, mode="per_token", clip=None):
    """What the forward pass leaves to the backward pass: codes and scales of q, k, v, and the bits of the clip."""
    from dqkernels import packing

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    codes, passed = [], []
    for x in (q.float() * scale, k, v):
        code, one = oracle_attention.quantize(wide(x), mode, clip)
        if x is v:
            one = np.where((code == 0).all(axis=-1) & np.isfinite(one), np.float32(0), one)
        codes += [torch.from_numpy(code).to(torch.int8).to(x.device), torch.from_numpy(one).to(x.device)]
        keep = None if clip is None else (x.abs() < clip).reshape(-1, x.shape[-1])
        passed.append(None if keep is None else packing.pack_bits(keep))
    return codes, passed


def attend_backward(g, codes, passed=(None,) * 3, mask=None, bias=None, causal=False, scale=None, out_dtype=None):
    """The launcher with its defaults filled in; d(bias) is asked for where there is a bias."""
    from dqkernels.kernels import attention_backward

    return attention_backward.qattention_backward(
        g, *codes, mask, bias, *passed, causal=causal, softmax_scale=g.shape[-1] ** -0.5 if scale is None else scale,
        want_bias=bias is not None, out_dtype=out_dtype or g.dtype,
    )  # fmt: skip


def truth_of(g, codes, mask, bias, causal, scale):
    """dQ, dK, dV, d(bias) in float64, the slack of each, and the magnitude of its terms."""
    batch, heads, queries, head_dim = g.shape
    keys = codes[2].shape[2]
    mask = None if mask is None else mask.cpu().expand(batch, heads, queries, keys).numpy()
    seen = np.broadcast_to(oracle_attention.visible_keys(queries, keys, causal, mask), (batch, heads, queries, keys))
    added = None if bias is None else wide(bias.expand(batch, heads, queries, keys))
    numbers = [wide(g).astype(np.float64), *(t.cpu().numpy() for t in codes)]
    numbers[1::2] = [t.astype(np.int64) for t in numbers[1::2]]
    found = [
        oracle_attention.backward(*(x[at] for x in numbers), seen[at], None if bias is None else added[at], scale)
        for at in np.ndindex(batch, heads)
    ]

    def whole(pick):
        return torch.from_numpy(np.stack([pick(one) for one in found])).unflatten(0, (batch, heads))

    truth = [whole(lambda one, i=i: one[i]) for i in range(4)]
    slack = [torch.zeros(()), torch.zeros(()), whole(lambda one: one.slack), torch.zeros(())]
    magnitude = [whole(lambda one, i=i: one.magnitude[i]) for i in range(4)]
    if bias is not None:
        truth[3], magnitude[3] = (x[3].sum_to_size(bias.shape) for x in (truth, magnitude))
    return truth, slack, magnitude


def assert_gradients(q, k, v, g, mask=None, bias=None, causal=False, scale=None, mode="per_token", clip=None):
    """One call meets the bound of this page; returns its gradients."""
    from dqkernels import reference

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    codes, passed = saved(q, k, v, scale, mode, clip)
    got = attend_backward(g, codes, passed, mask, bias, causal, scale)
    here = [None if x is None else x.cpu() for x in (g, *codes, mask, bias, *passed)]
    facts = {"causal": causal, "softmax_scale": scale, "want_bias": bias is not None, "out_dtype": g.dtype}
    eager = reference.qattention_backward(*here, **facts)
    truth, slack, magnitude = truth_of(g, codes, mask, bias, causal, scale)
    what = f"{list(q.shape)} on {k.shape[2]} keys, causal {causal}, {mode}, clip {clip}, {g.dtype}"
    for i, x in enumerate((q * scale, k, v)):
        if clip is not None:
            truth[i] = truth[i] * (x.abs() < clip).cpu()
    for i, name in enumerate(NAMES[: 3 + (bias is not None)]):
        want = truth[i]
        assert got[i].shape == want.shape and got[i].is_contiguous(), f"{name}: {list(got[i].shape)}"
        assert got[i].dtype == (g.dtype if i < 3 else torch.float32)
        error = (got[i].cpu().double() - want).abs()
        rounding = torch.finfo(got[i].dtype).eps / 2 * want.abs().max()
        allowed = 2 * (eager[i].double() - want).abs().max() + rounding + slack[i] + FP32_TERMS * magnitude[i]
        assert bool((error <= allowed).all()), f"{what}: {name} {float((error / allowed).max()):.2f} times the bound"
    return got


def gradient(seed, q):
    """A random gradient in q's shape and type, in the memory layout of a model."""
    batch, heads, queries, head_dim = q.shape
    g = torch.randn(batch, queries, heads, head_dim, generator=torch.Generator().manual_seed(seed + 1000))
    return g.to(q.dtype).to(q.device).transpose(1, 2)


# Around the tiles of 16, 32 and 64, head_dims below, at and between the powers of two.
# (batch, heads, queries, keys, head_dim)
SHAPES = (
    (1, 1, 1, 1, 1), (2, 3, 1, 65, 64), (1, 2, 7, 3, 8), (2, 1, 15, 33, 40), (1, 2, 16, 31, 32), (1, 1, 17, 97, 80),
    (1, 1, 33, 64, 96), (2, 2, 5, 40, 128), (1, 1, 64, 31, 33), (1, 1, 65, 70, 64), (1, 1, 98, 34, 127),
)  # fmt: skip


@check
def attention_backward_grid(device):
    """11 shapes x 4 masks; bias, causal, scale granularity, clip and type dealt around: 44 cases."""
    rest = list(itertools.product(BIASES, (False, True), ("per_token", "per_tensor"), (None, 1.5), DTYPES))
    for i, (shape, mask) in enumerate(itertools.product(SHAPES, MASKS)):
        bias, causal, mode, clip, dtype = rest[(i * 31 + i // 4) % len(rest)]
        batch, heads, queries, keys, _ = shape
        g = torch.Generator().manual_seed(i)
        q, k, v = qkv(i, *shape, device, dtype)
        got = assert_gradients(
            q, k, v, gradient(i, q), mask_of(mask, g, batch, heads, queries, keys, device),
            bias_of(bias, g, heads, queries, keys, device), causal, None, mode, clip,
        )  # fmt: skip
        assert keys < 3 or all(x.any() for x in got[:3]), shape


@check
def attention_backward_every_tile(device):
    """Each tile of the table, on several of them in both directions."""
    for i, (dtype, head_dim) in enumerate(itertools.product(DTYPES, (32, 64, 128))):
        q, k, v = qkv(i, 1, 1, 70, 68, head_dim, device, dtype)
        bias = torch.randn(1, 1, 70, 68, generator=torch.Generator().manual_seed(i)).to(device)
        assert_gradients(
            q, k, v, gradient(i, q), None, bias, causal=i % 2 == 0, mode=("per_token", "per_tensor")[i % 2]
        )


@check
def attention_backward_batch_and_padding_change_no_bit(device):
    """A sequence alone, beside others, padded with hidden rubbish and with queries of gradient 0, and run again."""
    q, k, v = qkv(3, 3, 2, 9, 40, 40, device, torch.bfloat16)
    g = gradient(3, q)
    mask = torch.rand(3, 1, 1, 40, generator=torch.Generator().manual_seed(4)).to(device) < 0.8
    codes, _ = saved(q, k, v)
    whole = attend_backward(g, codes, mask=mask)[:3]
    assert all(x.any() for x in whole)
    for name, got, want in zip(NAMES, attend_backward(g, codes, mask=mask), whole, strict=False):
        assert_same(got, want.cpu(), f"{name} repeated")
    for i in range(3):
        one = slice(i, i + 1)
        alone = attend_backward(g[one], [x[one] for x in codes], mask=mask[one])
        for name, got, want in zip(NAMES, alone, whole, strict=False):
            assert_same(got, want[one].cpu(), f"{name} of sequence {i} alone")
    hidden = torch.cat([mask, torch.zeros(3, 1, 1, 37, dtype=torch.bool, device=device)], 3)
    longer = [torch.cat([x, torch.full((3, 2, 37, *x.shape[3:]), 99, device=device).to(x.dtype)], 2) for x in codes]
    more = [torch.cat([x, torch.ones(3, 2, 60, *x.shape[3:], device=device).to(x.dtype)], 2) for x in codes[:2]]
    zeros = torch.cat([g, torch.zeros(3, 2, 60, 40, dtype=g.dtype, device=device)], 2)
    for scale in (1.0, 1e30, NAN):
        longer[3][:, :, 40:] = longer[5][:, :, 40:] = scale
        got = attend_backward(g, codes[:2] + longer[2:], mask=hidden)
        assert_same(got[0], whole[0].cpu(), f"dQ, keys padded with {scale}")
        rows = attend_backward(zeros, more + longer[2:], mask=hidden.expand(3, 1, 69, 77).contiguous())
        for name, x, y, want in zip(NAMES, got, rows, whole, strict=False):
            count = want.shape[2]
            assert_same(y[:, :, :count], want.cpu(), f"{name}, keys and queries padded with {scale}, a mask per query")
            assert not y[:, :, count:].any() and not x[:, :, count:].any(), f"{name}: padding has a gradient"


@check
def attention_backward_causal(device):
    """A causal mask is a triangle of a mask, for more and for fewer queries than keys."""
    for queries, keys in ((20, 70), (70, 70), (70, 20)):
        q, k, v = qkv(5, 1, 2, queries, keys, 32, device)
        g = gradient(5, q)
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        bias = torch.randn(queries, keys, generator=torch.Generator().manual_seed(6)).to(device)
        got = assert_gradients(q, k, v, g, None, bias, causal=True)
        codes, _ = saved(q, k, v)
        for name, x, want in zip(NAMES, attend_backward(g, codes, mask=triangle, bias=bias), got, strict=True):
            assert_same(x, want.cpu(), f"{name}, {queries} x {keys}")
        first = max(queries - keys + 1, 0)  # the first query that sees two keys: one share is 1 whatever its score
        assert not got[0][:, :, :first].any() and got[0][:, :, first:].any(dim=-1).all()
        assert got[1].any(dim=-1).all(), "the last query sees every key"


@check
def attention_backward_special_values(device):
    """A query that the forward spoils spoils its dQ and what it sees; zero rows of V have a gradient; huge scores."""
    q, k, v = qkv(7, 1, 1, 6, 40, 16, device)
    g = gradient(7, q)
    mask = torch.ones(6, 40, dtype=torch.bool, device=device)
    mask[2, 35], mask[3], mask[4, 1:] = False, False, False
    clean = assert_gradients(q, k, v, g, mask)
    assert not clean[0][0, 0, 3].any() and clean[0][0, 0, [0, 1, 2, 5]].any(dim=-1).all()
    bias = torch.zeros(6, 40, device=device)
    for bad, which in itertools.product((NAN, INF), (*range(3), "bias", "gradient")):
        spoilt, there, incoming = [q.clone(), k.clone(), v.clone()], bias.clone(), g.clone()
        if which == "bias":
            there[1, 35] = bad
        elif which == "gradient":
            incoming[0, 0, 1, 3] = bad
        else:
            spoilt[which][0, 0, 1 if which == 0 else 35, 3] = bad
        codes, _ = saved(*spoilt)
        rows = [0, 1, 5] if which in (1, 2) else [1]  # query 2 does not look at key 35, 3 at none, 4 only at key 0
        got = attend_backward(incoming, codes, mask=mask, bias=there)
        keys = mask[rows].any(dim=0)
        what = f"{bad} in {which}"
        assert got[0][0, 0].isnan().all(dim=-1).nonzero().flatten().tolist() == rows, what
        assert torch.equal(got[1][0, 0].isnan().all(dim=-1), keys), what
        if which != "gradient":  # 0 * NaN may reach all keys
            assert torch.equal(got[2][0, 0].isnan().all(dim=-1), keys), what
        spared = [i for i in range(6) if i not in rows]
        assert_same(got[0][:, :, spared], clean[0][:, :, spared].cpu(), what)
        assert torch.equal(got[3].isnan(), mask & torch.tensor([i in rows for i in range(6)], device=device)[:, None])
    # Nobody but query 4 sees key 0, so that a spoilt query 1 spares it.
    mask[[0, 1, 2, 5], 0] = False
    spoilt = q.clone()
    spoilt[0, 0, 1, 3] = NAN
    clean, got = (attend_backward(g, saved(x, k, v)[0], mask=mask) for x in (q, spoilt))
    for i in (1, 2):
        assert_same(got[i][:, :, :1], clean[i][:, :, :1].cpu(), f"{NAMES[i]} of a key that no spoilt query sees")
    for scale in (0.0, 1e-30, 1e25):
        assert_gradients(q * scale, k * 100, v, g, mask)
        assert_gradients(q, k, v * scale, g, mask)
    for value in (-INF, -3.4e38):
        for at in (slice(0, 1), slice(None)):
            bias = torch.zeros(40, device=device)
            bias[at] = value
            got = attend_backward(g, saved(q, k, v)[0], mask=mask, bias=bias)
            assert not any(x.isnan().any() for x in got)
    zero_row = v.clone()
    zero_row[0, 0, 5] = 0
    got = assert_gradients(q, k, zero_row, g, mask)
    assert got[2][0, 0, 5].any(), "a zero row of V learns"
    got = assert_gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), g, mask)
    assert got[2].any() and not got[0].any() and not got[1].any()


@check
def attention_backward_of_small_gradients(device):
    """fp16: nothing is lost inside where a gradient's dS is smaller than fp16's numbers."""
    q, k, v = qkv(8, 1, 1, 40, 90, 64, device, torch.float16)
    g = gradient(8, q) * 2.0**-13
    codes, _ = saved(q, k, v)
    got = attend_backward(g, codes, out_dtype=torch.float32)
    truth, slack, _ = truth_of(g, codes, None, None, False, 0.125)
    assert truth[3].abs().median() * codes[3].median().cpu() < 2.0**-20, "fp16 holds dS: the case proves little"
    for name, x, want, spare in zip(NAMES[:3], got, truth, slack, strict=False):
        error = (x.cpu().double() - want).abs()
        assert bool((error <= 2.0**-11 * want.abs().max() + spare).all()), f"{name}: {float(error.max())}"


@check
def attention_backward_layouts(device):
    """Sliced, expanded and element-strided gradients; masks and biases broadcast along any dimension."""
    q, k, v = qkv(9, 2, 2, 6, 20, 24, device)
    g = gradient(9, q)
    codes, _ = saved(q, k, v)
    want = [x.cpu() for x in attend_backward(g, codes)[:3]]
    views = {
        "contiguous": g.contiguous(),
        "rows within longer rows": torch.cat([g, g], 3)[..., :24],
        "every other element": torch.stack([g, g], 4)[..., 0],
    }
    for what, view in views.items():
        for name, got, x in zip(NAMES, attend_backward(view, codes), want, strict=False):
            assert_same(got, x, f"{name}, {what}")
    strided = [torch.stack([x, x], -1)[..., 0] for x in codes]
    for name, got, x in zip(NAMES, attend_backward(g, strided), want, strict=False):
        assert_same(got, x, f"{name}, codes by strides")
    ones = g[:, :, :1, :1].expand(2, 2, 6, 24)
    assert_same(attend_backward(ones, codes)[0], attend_backward(ones.contiguous(), codes)[0].cpu(), "a sum's gradient")
    generator = torch.Generator().manual_seed(9)
    for shape in itertools.product((1, 2), (1, 2), (1, 6), (1, 20)):
        mask = (torch.rand(shape, generator=generator) < 0.8).to(device)
        assert_gradients(q, k, v, g, mask, torch.randn(shape, generator=generator).to(device))
    flipped = torch.randn(20, 6, generator=generator).to(device).T
    assert_gradients(q, k, v, g, flipped > 0, flipped)


@check
def attention_backward_of_nothing(device):
    """No batch, query or key: zeros or empties."""
    for batch, queries, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        q, k, v = qkv(10, batch, 2, queries, keys, 8, device, torch.float16)
        bias = torch.ones(2, queries, keys, device=device)
        got = attend_backward(q, saved(q, k, v)[0], bias=bias)
        for x, like in zip(got, (q, k, v, bias), strict=True):
            assert x.shape == like.shape and x.dtype == like.dtype and not x.any()


@check
def attention_backward_backend(device):
    """Through autograd and the op, with the reference beside it; a long head is refused by name."""
    from dqkernels import ops
    from dqkernels.backends import triton as backend

    assert backend.supports("qattention_backward", head_dim=128) is None
    assert "head_dim=129" in backend.supports("qattention_backward", head_dim=129)
    q, k, v = qkv(11, 1, 1, 3, 5, 129, device)
    refuses("head_dim", lambda: attend_backward(q, saved(q, k, v)[0]))
    for mode, clip in (("per_token", None), ("per_tensor", 1.0)):
        found = []
        q, k, v = qkv(12, 1, 2, 20, 35, 24, device)
        bias = torch.randn(2, 20, 35, generator=torch.Generator().manual_seed(12)).to(device)
        for name in ("triton", "eager"):
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, bias)]
            out = ops.qattention(*leaves[:3], None, leaves[3], True, 0.2, mode, clip, backend=name)
            out.backward(gradient(12, q))
            found.append([x.grad for x in leaves])
        for name, got, want in zip(NAMES, *found, strict=True):
            assert (got - want).abs().max() <= 1e-4 * want.abs().max() and want.any(), f"{name} {mode}"


if __name__ == "__main__":
    triton_checks.main(CHECKS)
