"""Checks of Triton's writer of int8 caches against the oracle's quantizer, as triton_checks.py does for the GEMM.

By hand: `TRITON_INTERPRET=1 python tests/triton_checks_kv_cache.py`.
"""

import itertools

import numpy as np
import oracle_attention
import torch
import triton_checks
from triton_checks import DTYPES, assert_same, refuses
from triton_checks_attention import qkv, wide

CHECKS = {}
NAN, INF = float("nan"), float("inf")


def check(function):
    CHECKS[function.__name__] = function
    return function


def rubbish(caches, heads, capacity, head_dim):
    """k_cache, k_scale, v_cache, v_scale as numpy arrays that hold what nobody wrote."""
    g = np.random.default_rng(caches + capacity)
    codes = [g.integers(-128, 128, (caches, heads, capacity, head_dim), np.int8) for _ in range(2)]
    scales = [g.standard_normal((caches, heads, capacity), np.float32) for _ in range(2)]
    return [codes[0], scales[0], codes[1], scales[1]]


def assert_written(k, v, caches, capacity, position, mode="per_token", clip=None):
    """One call writes the oracle's codes where they belong, and nothing else."""
    from dqkernels.kernels import kv_cache

    rows, heads, tokens, head_dim = k.shape
    want = rubbish(caches, heads, capacity, head_dim)
    got = [torch.from_numpy(t.copy()).to(k.device) for t in want]
    for x, cache, cache_scale in ((k, *want[:2]), (v, *want[2:])):
        codes, scale = oracle_attention.quantize(wide(x), mode, clip)
        if cache is want[2]:
            scale = np.where((codes == 0).all(axis=-1) & np.isfinite(scale), np.float32(0), scale)
        for row, token in itertools.product(range(rows), range(tokens)):
            at = token + (0 if position is None else position[row])
            if 0 <= at < capacity:
                cache[row, :, at], cache_scale[row, :, at] = codes[row, :, token], scale[row, :, token]
    where = None if position is None else torch.tensor(position, dtype=torch.int32, device=k.device)
    kv_cache.quantize_into_cache(k, v, *got, where, mode, clip)
    for name, mine, theirs in zip(("k_cache", "k_scale", "v_cache", "v_scale"), got, want, strict=True):
        assert_same(mine, torch.from_numpy(theirs), f"{name} of {list(k.shape)}, {position}, {mode}, {clip}, {k.dtype}")


@check
def kv_cache_grid(device):
    """(row, head, token) triples around the 16 of a program, head_dims around powers of two; the rest dealt around."""
    shapes = ((1, 1, 1, 1), (1, 12, 1, 64), (3, 5, 1, 40), (2, 4, 2, 128), (5, 3, 7, 33), (2, 1, 17, 96))
    modes = [("per_token", True), ("per_token", False), ("per_tensor", False)]
    for i, ((rows, heads, tokens, head_dim), (mode, placed)) in enumerate(itertools.product(shapes, modes)):
        dtype, clip, spare = DTYPES[i % 3], (None, 1.5)[i % 2], i % 4
        _, k, v = qkv(i, rows, heads, 1, tokens, head_dim, device, dtype)
        k, v = k.clone(), v.clone()
        v[-1, 0, -1] = 0
        if i % 5 == 0:
            k[0, -1, 0, head_dim // 2], v[-1, -1, 0, 0] = NAN, -INF
        capacity = tokens + spare
        position = [(row * 2 + i) % (spare + 1) for row in range(rows)] if placed else None
        assert_written(k, v, rows + i % 2, capacity, position, mode, clip)


@check
def kv_cache_outside(device):
    """Tokens before the start or behind the end are not written, nor is what they would overwrite."""
    _, k, v = qkv(3, 4, 2, 1, 3, 32, device)
    assert_written(k, v, 4, 6, [-1, 5, 6, -(1 << 30)])
    assert_written(k, v, 4, 6, [3, 4, 2**31 - 4, 0])


@check
def kv_cache_layouts(device):
    """The transposed view of a projection's output, expanded rows, and elements with gaps."""
    g = torch.Generator().manual_seed(4)
    projected = torch.randn(3, 2, 4 * 24, generator=g).to(device)  # [rows, tokens, heads * head_dim]
    k = projected.view(3, 2, 4, 24).transpose(1, 2)
    v = torch.stack([k * 2, k], 4)[..., 0]
    assert_written(k, v, 3, 5, [0, 3, 1])
    assert_written(k[:1].expand(3, 4, 2, 24), k, 3, 5, [0, 3, 1])


@check
def kv_cache_of_nothing(device):
    for rows, tokens in ((0, 3), (2, 0)):
        _, k, v = qkv(5, rows, 2, 1, tokens, 8, device)
        assert_written(k, v, 2, 4, [0] * rows)
        assert_written(k, v, 2, 4, None, "per_tensor")


@check
def kv_cache_backend(device):
    """The backend's function reaches the kernel, and one of more than 128 dimensions is refused by name."""
    from dqkernels import reference
    from dqkernels.backends import triton as backend

    assert backend.supports("quantize_into_cache", mode="per_token", head_dim=128) is None
    assert "head_dim=129" in backend.supports("quantize_into_cache", mode="per_token", head_dim=129)
    _, k, v = qkv(6, 1, 1, 1, 2, 129, device)
    refuses("head_dim", lambda: assert_written(k, v, 1, 2, None))
    _, k, v = qkv(7, 2, 3, 1, 2, 16, device)
    mine, spec = ([torch.from_numpy(t) for t in rubbish(2, 3, 4, 16)] for _ in range(2))
    mine = [t.to(device) for t in mine]
    position = torch.tensor([2, 0], dtype=torch.int32)
    backend.quantize_into_cache(k, v, *mine, position.to(device), mode="per_token", clip=None)
    reference.quantize_into_cache(k.cpu(), v.cpu(), *spec, position, mode="per_token", clip=None)
    for got, want in zip(mine, spec, strict=True):
        assert_same(got, want, "the reference's")


if __name__ == "__main__":
    triton_checks.main(CHECKS)
