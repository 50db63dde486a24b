"""The attention contract (docs/design.md, "Attention") in numpy, one query at a time, and how far a backend may stray.

Everything but `exp` is exact or a prescribed rounding, so two backends differ only where their exponentials put a
127 exp(s - m) on different sides of a half integer. Such a key flips its e_j or c_j by one. The oracle names the keys
that can flip (`RELATIVE`); a row without any must be equal bit for bit, in a row with some the outputs differ by at
most |v|_max * flips / sum(e), where |v|_max = 127 vs_max: a flip of c_j adds at most vs_max * 127 to the numerator, a
flip of e_j changes the denominator by one, and |out| <= |v|_max. Expected flips are 2 * RELATIVE * (sum(e) + sum(c)),
so on average the bound is 2^-18 |v|_max, a thousandth of a quantization step. Never imports dqkernels.
"""

from typing import NamedTuple

import numpy as np
import oracle

F32 = np.float32
#: What a backend may err by in 127 exp(x) vs_j / vs_max, relatively, where it does not round to 0 (x > -5.6): the
#: rounded product with log2(e) and its constant 5.6 * 1.5 * 2^-24, ex2.approx 2^-22, three products 1.5 * 2^-23.
RELATIVE = 2.0**-20


class Row(NamedTuple):
    """One query: the fp32 result [head_dim] before the last rounding, and the largest honest deviation from it."""

    out: np.ndarray
    slack: float
    flips: int


def quantize(x: np.ndarray, mode: str, clip: float | None) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., D] -> int64 codes [..., D] and float32 scales [...]."""
    with np.errstate(all="ignore"):
        codes, scale, _ = oracle.quantize_activation(x.reshape(-1, x.shape[-1]), mode, clip, None)
    return codes.astype(np.int64).reshape(x.shape), np.asarray(scale, F32).reshape(x.shape[:-1])


def attend(q, qs, k, ks, v, vs, bias=None) -> Row:
    """One query over its visible keys.

    Args:
        q: int [D], qs: float32. k, v: int [visible, D]; ks, vs: float32 [visible]. bias: float32 [visible] or None.
    """
    if not len(k):
        return Row(np.zeros(v.shape[1], F32), 0.0, 0)
    vs = np.where((v == 0).all(axis=1) & np.isfinite(vs), F32(0), vs)  # a zero row has no say in the largest scale
    with np.errstate(all="ignore"):
        s = (k @ q).astype(F32) * qs * ks
        if bias is not None:
            s = s + bias
        top, v_max = s.max(), vs.max()  # numpy's max keeps a NaN
        if not (top < np.inf and v_max < np.inf):
            return Row(np.full(v.shape[1], np.nan, F32), 0.0, 0)
        t = 127.0 * np.exp((s - (top if top > -np.inf else F32(0))).astype(np.float64))
        u = t * np.minimum(vs * (F32(1) / (v_max if v_max > 0 else F32(1))), F32(1)).astype(np.float64)
    flips = sum(int((np.abs(x - np.floor(x) - 0.5) <= RELATIVE * x).sum()) for x in (t, u))
    e, c = np.rint(t).astype(np.int64), np.rint(u).astype(np.int64)
    weight = max(int(e.sum()), 1)
    out = v_max * (c @ v).astype(F32) / F32(weight)
    return Row(out, flips * 127.0 * float(v_max) / weight * 1.01, flips)


def visible_keys(queries: int, keys: int, causal: bool, mask: np.ndarray | None) -> np.ndarray:
    """bool [..., queries, keys]: query i sees keys up to keys - queries + i, and only where the mask is True."""
    seen = np.ones((queries, keys), bool)
    if causal:
        seen = np.arange(keys)[None, :] <= (keys - queries + np.arange(queries))[:, None]
    return seen if mask is None else seen & mask


def assert_attention(got, q, qs, k, ks, v, vs, visible, bias, dtype: str, what: str) -> tuple[int, int]:
    """`got` [batch, heads, queries, D] within the bound of this page; the number of rows and of possible flips.

    Args:
        got: float array, widened. q, k, v: int codes [batch, heads, tokens, D]; qs, ks, vs: float32 without D.
        visible: bool, bias: float32 or None, both broadcast to [batch, heads, queries, keys].
        dtype: name of the output's type, to which the oracle's rows are rounded.
    """
    epsilon = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    rows = flips = 0
    for at in np.ndindex(q.shape[:3]):
        cell, seen = at[:2], visible[at]
        added = None if bias is None else bias[at][seen]
        row = attend(q[at], qs[at], k[cell][seen], ks[cell][seen], v[cell][seen], vs[cell][seen], added)
        want = oracle.round_to(row.out, dtype)
        rows, flips = rows + 1, flips + row.flips
        if row.flips == 0:
            same = (got[at] == want) | (np.isnan(got[at]) & np.isnan(want))
            assert same.all(), f"{what}, row {at}: {got[at][~same][:4]} != {want[~same][:4]}, and no code can flip"
        else:
            error = np.abs(got[at].astype(np.float64) - want)
            allowed = row.slack + epsilon * np.abs(want)
            assert (error <= allowed).all(), (
                f"{what}, row {at}: off by {error.max()}, {row.flips} flips allow {allowed}"
            )
    return rows, flips


# ------------------------------------------------------------------------------------------------ backward


class Gradients(NamedTuple):
    """Of one head, float64: what the straight-through backward pass is without rounding, and how far it may be off.

    dq [queries, D], dk and dv [keys, D], ds [queries, keys]. `slack` [keys, D]: what flips of e and c may do to dv.
    `magnitude`: sums of the magnitudes of the terms of dq, dk, dv and ds, in their shapes.
    """

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    ds: np.ndarray
    slack: np.ndarray
    magnitude: tuple[np.ndarray, ...]


def backward(g, q, qs, k, ks, v, vs, seen, bias, softmax_scale: float) -> Gradients:
    """The gradients of one head (docs/design.md, "Attention, backward"), of finite values.

    Args:
        g: float64 [queries, D], of the output. q, k, v: int codes; qs, ks, vs: float32 scales, q's with softmax_scale.
        seen: bool [queries, keys]. bias: float32 [queries, keys] or None.
    """
    vs = np.where((v == 0).all(axis=1), F32(0), vs)
    dots, keys = q @ k.T, k.shape[0]
    added = np.zeros(dots.shape, F32) if bias is None else bias
    with np.errstate(all="ignore"):
        # The codes of the shares are the forward's, so from its fp32 scores.
        s = np.where(seen, dots.astype(F32) * qs[:, None] * ks[None, :] + added, -np.inf).astype(F32)
        top = s.max(axis=1, initial=-np.inf, keepdims=True)
        t = 127.0 * np.exp((s - np.where(top == -np.inf, F32(0), top)).astype(np.float64))
        v_max = np.where(seen, vs[None, :], F32(0)).max(axis=1, initial=0, keepdims=True).astype(F32)
        ratio = np.minimum(vs[None, :] * (F32(1) / np.where(v_max > 0, v_max, F32(1))), F32(1))
        u = np.where(seen, t * ratio.astype(np.float64), 0.0)
        e, c = np.rint(t), np.rint(u)
        weight = np.maximum(e.sum(axis=1, keepdims=True), 1.0)
        factor = np.where(vs > 0, v_max.astype(np.float64) / np.where(vs > 0, vs, 1.0), 1.0) / weight
        share = np.where(vs > 0, c, e) * factor
        flip_e, flip_c = (np.abs(x - np.floor(x) - 0.5) <= RELATIVE * x for x in (t, u))
        off = np.where(vs > 0, flip_c, flip_e) * factor + share * flip_e.sum(axis=1, keepdims=True) / weight

        q64, k64, v64 = (x * scale.astype(np.float64)[:, None] for x, scale in ((q, qs), (k, ks), (v, vs)))
        s = np.where(seen, q64 @ k64.T + added, -np.inf)
        top = s.max(axis=1, initial=-np.inf, keepdims=True)
        p = np.exp(s - np.where(top == -np.inf, 0.0, top))
        p = p / np.maximum(p.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    dp = g @ v64.T
    mean = (p * dp).sum(axis=1, keepdims=True)
    ds = p * (dp - mean)
    terms = p * (np.abs(g) @ np.abs(v64).T + (p * (np.abs(g) @ np.abs(v64).T)).sum(axis=1, keepdims=True))
    # An error of the score is one of p, relatively.
    terms = terms * (1.0 + np.abs(np.where(np.isfinite(s), s, 0.0)))
    assert keys == ds.shape[1]
    return Gradients(
        softmax_scale * ds @ k64,
        ds.T @ q64,
        share.T @ g,
        ds,
        off.T @ np.abs(g),
        (abs(softmax_scale) * terms @ np.abs(k64), terms.T @ np.abs(q64), share.T @ np.abs(g), terms),
    )
