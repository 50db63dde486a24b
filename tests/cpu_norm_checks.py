"""Checks of the compiled core's LayerNorm and GELU with quantization, with the instruction set of DQKERNELS_CPU.

`python tests/cpu_norm_checks.py` runs all checks and prints what it counted, and a digest of every result, which is the
same for each instruction set. test_cpu_norm.py starts it as a program, once per set.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading

import numpy as np
import oracle
import torch
import torch.nn.functional as F
from compare import assert_bounded, assert_equal
from cpu_attention_checks import DTYPES, INF, NAN, SEEN, note, same, unaligned
from guarded import guarded_tensor

from dqkernels import reference
from dqkernels.kernels import cpu_norm, native

CHECKS = {}
MODES = ("per_token", "per_tensor", "static")
# Around vectors of 8 and lanes of 8, odd ones, one model width. LayerNorm of one element is its bias.
WIDTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 300, 768, 1041)
STATIC = torch.tensor([0.0213])


def check(function):
    CHECKS[function.__name__] = function
    return function


def norm(x, residual=None, weight=None, bias=None, eps=1e-5, mode="per_token", clip=None, want_sum=True):
    weight = torch.ones(x.shape[-1]) if weight is None else weight
    act_scale = STATIC if mode == "static" else None
    found = cpu_norm.layernorm_quantize(x, residual, weight, bias, eps, mode, clip, act_scale, want_sum)
    return tuple(note(t) for t in found)


def gelu(x, mode="per_token", clip=None, want_sum=True):
    found = cpu_norm.gelu_quantize(x, mode, clip, STATIC if mode == "static" else None, want_sum)
    return tuple(note(t) for t in found)


def assert_codes(found, y, mode, clip, what):
    """q, scale and row_sum are the oracle's of y, exactly."""
    flat = y.float().reshape(-1, y.shape[-1]).numpy()
    want = oracle.quantize_activation(flat, mode, clip, float(STATIC) if mode == "static" else None)
    for got, wanted, name in zip(found, want, ("q", "scale", "row_sum"), strict=True):
        assert_equal(got.reshape(wanted.shape), wanted, f"{what}: {name}", may_be_zero=True)


def truth_of(x, residual, weight, bias, eps):
    """float64, of the sum that the contract takes in fp32."""
    total = x.float() if residual is None else x.float() + residual.float()
    added = None if bias is None else bias.double()
    return F.layer_norm(total.double(), (x.shape[-1],), weight.double(), added, eps)


@check
def norm_grid():
    """Widths x modes; types, residual, bias, clip and offset dealt around."""
    rest = list(itertools.product(DTYPES, ("none", "same", "float"), (True, False), (None, 1.5), (0.0, 30.0)))
    done = 0
    for i, (k, mode) in enumerate(itertools.product(WIDTHS, MODES)):
        dtype, kind, with_bias, clip, offset = rest[i * 5 % len(rest)]
        g = torch.Generator().manual_seed(i)
        x = (torch.randn(2, 3, k, generator=g) * 2 + offset).to(dtype)
        residual = None if kind == "none" else torch.randn(2, 3, k, generator=g)
        residual = residual.to(dtype) if kind == "same" else residual
        weight = torch.rand(k, generator=g) + 0.5
        weight = weight.to(dtype) if i % 2 else weight
        bias = torch.randn(k, generator=g).to(dtype) if with_bias or k == 1 else None
        what = f"{k} {mode} {dtype} residual {kind} bias {with_bias} clip {clip}"
        y, *codes = norm(x, residual, weight, bias, 1e-5, mode, clip)
        assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
        eager = reference.layernorm(x, residual, weight, bias, 1e-5)
        assert_bounded(y, truth_of(x, residual, weight, bias, 1e-5), eager, what)
        assert_codes(codes, y, mode, clip, what)
        bare = norm(x, residual, weight, bias, 1e-5, mode, clip, want_sum=False)
        assert bare[3].shape == (0,)
        for a, b in zip(bare[:3], (y, *codes[:2]), strict=True):
            assert torch.equal(a, b)
        done += 1
    return done


@check
def norm_special_rows():
    """NaN and Inf spoil their row alone; zeros, constants, huge and tiny rows; any eps."""
    k = 33
    g = torch.Generator().manual_seed(1)
    x = torch.randn(9, k, generator=g)
    clean, *codes = norm(x)
    for bad, at in itertools.product((NAN, INF, -INF), (0, 8, k - 1)):
        spoilt = x.clone()
        spoilt[4, at] = bad
        y, q, scale, row_sum = norm(spoilt)
        assert y[4].isnan().all() and scale[4].isnan() and not q[4].any() and row_sum[4] == 0
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        for got, want in zip((y, q, scale, row_sum), (clean, *codes), strict=True):
            assert torch.equal(got[others], want[others])
        y, q, scale, _ = norm(spoilt, mode="per_tensor")
        assert not q.any() and scale.isnan().all() and not y[others].isnan().any()
    constant = torch.full((2, k), 7.25)
    y, q, scale, _ = norm(constant)
    assert not y.any() and not q.any() and (scale == 1).all()
    for factor in (1e-30, 1e-10, 1e10, 1e18):
        for eps in (1e-12, 1e-5, 0.5):
            eager = reference.layernorm(x * factor, None, torch.ones(k), None, eps)
            y = norm(x * factor, eps=eps)[0]
            assert_bounded(y, truth_of(x * factor, None, torch.ones(k), None, eps), eager, f"{factor} {eps}")
    huge = x * 1e37  # where sums of squares in fp32 overflow, torch gives zeros
    assert_bounded(norm(huge)[0], truth_of(huge, None, torch.ones(k), None, 1e-5), norm(x)[0], "huge")
    return 30


def values_of(x):
    """GELU of each x alone: a row of one element is its code times its scale."""
    q, scale, _ = cpu_norm.gelu_quantize(x.reshape(-1, 1), "per_token", None, None, False)
    return note(q.reshape(-1).float() * scale)


@check
def gelu_values():
    """Error to float64 at most twice torch's, everywhere, and in the tail against the value itself."""
    g = torch.Generator().manual_seed(2)
    for low, high in ((-12.0, 12.0), (-1.0, 1.0), (-6.0, -3.0), (3.0, 6.0), (-1e-3, 1e-3)):
        x = torch.rand(20000, generator=g) * (high - low) + low
        got, truth = values_of(x), F.gelu(x.double())
        # Code and scale are a product of two roundings: 127 * (|y| / 127).
        eager = F.gelu(x).double()
        allowed = 2 * (eager - truth).abs().max() + 2.0**-22 * truth.abs().max()
        assert ((got.double() - truth).abs() <= allowed).all(), (low, high, (got.double() - truth).abs().max(), allowed)
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-38, 3e38, 1e30, -1e30, -3e38, -40.0, 2.0**-90])
    want = torch.tensor([0.0, 0.0, 0.0, 0.0, 3e38, 1e30, 0.0, 0.0, 0.0, 2.0**-91])
    assert torch.allclose(values_of(x), want, rtol=1e-6, atol=0)
    return 100000


@check
def gelu_grid():
    """Widths x modes x types: the codes of the rounded values, and the values as of one element alone."""
    done = 0
    for i, (k, mode, dtype) in enumerate(itertools.product(WIDTHS, MODES, DTYPES)):
        g = torch.Generator().manual_seed(i)
        clip = (None, 1.5)[i % 2]
        x = (torch.randn(2, 4, k, generator=g) * 2).to(dtype)
        x[1, 2] = -3e4  # a row whose GELU is 0
        y = values_of(x.float()).reshape(x.shape)
        near = reference.gelu(x)
        found = gelu(x, mode, clip)
        want = reference.gelu_quantize(x, mode=mode, clip=clip, act_scale=STATIC, want_sum=True)
        assert (found[0].int() - want[0].int()).abs().max() <= 1, (k, mode, dtype)
        assert ((found[0] != want[0]).float().mean() <= 0.01).all() or k < 16
        # In the tail torch's 1 + erf has lost most digits: 127 scales are off by up to half an ulp of |x|.
        assert torch.allclose(found[1], want[1], rtol=2e-6 if dtype == torch.float32 else 2.0**-7, atol=4e-9)
        assert (found[2] == found[0].sum(dim=-1)).all()
        assert gelu(x, mode, clip, want_sum=False)[2].shape == (0,)
        assert (y - near.float()).abs().max() <= 2.0**-6 * near.abs().max()
        done += 1
    bad = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    bad[1, 3], bad[2, 19] = NAN, INF
    q, scale, _ = gelu(bad)
    assert scale.isnan().tolist() == [False, True, True, False] and not q[1:3].any() and q[0].any()
    assert gelu(bad, "per_tensor")[1].isnan().all()
    return done


@check
def every_half():
    """All patterns of both 16-bit types, each as a row, finite or not."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype).reshape(-1, 1)
        q, scale, _ = gelu(x)
        truth = F.gelu(x.double())[:, 0]
        finite = x[:, 0].isfinite()
        assert torch.equal(scale.isfinite(), finite)
        # One rounding to the type, and what erf may lose where it is nearly -1.
        error = (q[:, 0].double() * scale.double() - truth).abs()
        assert (error <= 2.0 ** (-10 if dtype == torch.float16 else -7) * truth.abs() + 1e-7)[finite].all()
        wide = torch.ones(1024, 17, dtype=dtype)
        wide[:, 3] = x[::64, 0]  # each exponent with several mantissas
        y, *codes = norm(wide)
        assert_codes(codes, y, "per_token", None, f"{dtype}")
    return 2 * (65536 + 1024)


@check
def company_and_layouts():
    """A row's bits do not depend on the other rows, nor on strides; no input changes; no rows are none."""
    g = torch.Generator().manual_seed(4)
    x, residual = torch.randn(64, 75, generator=g), torch.randn(64, 75, generator=g)
    weight, bias = torch.rand(75, generator=g), torch.randn(75, generator=g)
    whole, codes = norm(x, residual, weight, bias), gelu(x)
    for rows in (slice(0, 1), slice(5, 6), slice(0, 17), slice(63, 64)):
        for got, want in zip(norm(x[rows], residual[rows], weight, bias), whole, strict=True):
            assert torch.equal(got, want[rows])
        for got, want in zip(gelu(x[rows]), codes, strict=True):
            assert torch.equal(got, want[rows])
    before = x.clone(), residual.clone()
    apart = torch.stack([x, x], 2)[..., 0], torch.stack([residual, residual], 2)[..., 1]
    within = torch.cat([x, x], 1)[:, :75], torch.cat([residual, residual], 1)[:, 75:]
    turned = x.t().contiguous().t(), residual.t().contiguous().t()
    for one, two in ((x, residual), apart, within, turned, (unaligned(x), unaligned(residual))):
        for got, want in zip(
            norm(one, two, torch.stack([weight, weight], 1)[:, 0], unaligned(bias)), whole, strict=True
        ):
            same(got.float(), want.float(), "a layout")
        for got, want in zip(gelu(one), codes, strict=True):
            same(got.float(), want.float(), "a layout")
    three = norm(x.reshape(4, 16, 75), residual.reshape(4, 16, 75), weight, bias)
    assert torch.equal(three[0].reshape(64, 75), whole[0])
    expanded = norm(x[:1].expand(3, 75), residual[:1].expand(3, 75), weight, bias)
    assert torch.equal(expanded[0], whole[0][:1].expand(3, 75))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    for mode in MODES:
        assert norm(x[:0], residual[:0], weight, mode=mode)[0].shape == (0, 75) and gelu(x[:0], mode)[0].shape == (
            0,
            75,
        )
    return 20


@check
def threads_change_nothing():
    """1, 2 and 5 threads of ours, and 8 of Python's at once: the same bits."""
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(600, 300, generator=g), torch.rand(300, generator=g)

    def calls():
        return [
            t
            for mode in MODES
            for found in (
                cpu_norm.layernorm_quantize(x, x, weight, None, 1e-5, mode, None, STATIC, True),
                cpu_norm.gelu_quantize(x, mode, None, STATIC, True),
            )
            for t in found
        ]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    want = calls()
    for count in (2, 5):
        torch.set_num_threads(count)
        assert all(map(torch.equal, calls(), want)), f"{count} threads"
    wrong = []

    def work():
        for _ in range(3):
            if not all(map(torch.equal, calls(), want)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(before)
    assert not wrong
    return 8


@check
def guard_pages():
    """Each operand against a page that cannot be read, before and behind it; results too."""
    g = torch.Generator().manual_seed(6)
    core, done = native.native(), 0
    for at_end, (m, k), dtype in itertools.product((True, False), ((1, 1), (3, 17), (5, 31), (2, 64), (4, 9)), DTYPES):
        x, residual = (torch.randn(m, k, generator=g).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(k, generator=g).to(dtype) for _ in range(2))
        for mode in MODES:
            want = norm(x, residual, weight, bias, mode=mode)
            there = [
                guarded_tensor(t, at_end) for t in (x, residual, weight, bias, *(torch.zeros_like(t) for t in want))
            ]
            code = native.DTYPES[dtype]
            rows = [(t.data_ptr(), code, k) for t in there[:4]]
            codes = native.MODES[mode], 0.0, float(STATIC), *(t.data_ptr() for t in there[5:])
            core.norm_quantize(*rows, 1e-5, there[4].data_ptr(), m, k, codes, 1)
            for got, wanted in zip(there[4:], want, strict=True):
                assert torch.equal(got, wanted)
            want = gelu(x, mode)
            core.gelu_quantize(rows[0], m, k, codes, 1)
            for got, wanted in zip(there[5:], want, strict=True):
                assert torch.equal(got, wanted)
            done += 2
    return done


def trip_the_guard():
    """The positive control: one element too many must fault."""
    x, out = guarded_tensor(torch.ones(1, 17), True), torch.zeros(64)
    pointer = out.data_ptr()
    native.native().gelu_quantize((x.data_ptr(), 0, 18), 1, 18, (0, 0.0, 0.0, pointer, pointer, 0), 1)


if __name__ == "__main__":
    if sys.argv[1:] == ["--trip"]:
        trip_the_guard()
        sys.exit(0)
    with np.errstate(all="ignore"):
        counts = {name: function() for name, function in CHECKS.items() if name in sys.argv[1:] or not sys.argv[1:]}
    print(json.dumps({"isa": native.native().cpu_isa(), "digest": SEEN.hexdigest(), **counts}))
