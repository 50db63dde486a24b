"""The CPU kernels past 2^31 elements: operands in sparse mappings, of which only what is touched takes memory.

Two rows lie more than 2^31 elements apart, or a table has more than 2^31 codes; an offset of 32 bits would come out at
the first row, at zeros, or outside the mapping. What is computed as a whole, as the result of a GEMM, cannot be sparse:
its size is held to 63 bits by the refusals of test_cpu_gemm.py and test_native.py; that of what is done row by row, to
the ends of whole results by long/test_cpu_large_results.py.
"""

import mmap

import native_calls
import oracle
import pytest
import torch
from compare import assert_equal

from dqkernels import kv_cache, ops, reference
from dqkernels.kernels import cpu_norm, cpu_token, native

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")

FAR = 2**31 + 64  # elements


def sparse(count, dtype):
    """Zeros [count] that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except (OSError, AttributeError) as error:
        pytest.skip(f"no sparse mapping of {count * dtype.itemsize} bytes here: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def apart(rows, far=FAR):
    """The same values, each row `far` elements from the one before it."""
    count = (rows.shape[0] - 1) * far + rows[0].numel()
    strides = (far, *rows[0].contiguous().stride())
    found = sparse(count, rows.dtype).as_strided(rows.shape, strides)
    return found.copy_(rows)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_rows_of_a_gemm(dtype):
    """x [2, 300] into 4-bit weights: float rows are quantized where they lie, rows of codes are read there."""
    n, k = 37, 300
    codes = torch.randint(-7, 8, (n, k), generator=torch.Generator().manual_seed(1))
    weight = (torch.from_numpy(oracle.pack_fast(codes.numpy(), 4)), torch.rand(n) * 0.01 + 1e-3, None, None, None)
    form = {"bits": 4, "four_level": False, "group_size": -1, "out_features": n}
    if dtype == torch.int8:
        x = torch.randint(-127, 128, (2, k), generator=torch.Generator().manual_seed(2)).to(torch.int8)
        scale = torch.tensor([0.5, 0.25])
        given = (scale, None, *weight, *form.values(), "none", torch.float32)
        run = lambda x, backend: ops.qgemm(x, *given, backend=backend)  # noqa: E731
    else:
        given = (*weight, *form.values(), "per_token", None, None, "none", torch.float32)
        run = lambda x, backend: ops.qlinear(x, *given, backend=backend)  # noqa: E731
        x = random(2, k, seed=2, dtype=dtype)
    assert_equal(run(apart(x), "cpu"), run(x, "eager"), "rows apart")


@pytest.mark.parametrize("mode", ["per_token", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_norm_and_of_gelu(dtype, mode):
    """x and residual [3, 300]; the residual in fp32, as its rows have offsets of their own."""
    x, residual = random(3, 300, seed=1, dtype=dtype), random(3, 300, seed=2)
    codes = mode, None, None, True
    run = lambda x, residual: cpu_norm.layernorm_quantize(x, residual, torch.ones(300), None, 1e-5, *codes)  # noqa: E731
    near, far = run(x, residual), run(apart(x), apart(residual))
    for name, mine, theirs in zip(("y", "q", "scale", "row_sum"), far, near, strict=True):
        assert_equal(mine, theirs, name)
    near, far = cpu_norm.gelu_quantize(x, *codes), cpu_norm.gelu_quantize(apart(x), *codes)
    for name, mine, theirs in zip(("q", "scale", "row_sum"), far, near, strict=True):
        assert_equal(mine, theirs, name)
    assert far[0][1:].any(1).all() and not torch.equal(far[0][1], far[0][2])


@pytest.fixture(scope="module")
def table():
    """More than 2^31 codes of 8 bits, zeros but for its last row; (qweight, scale, that row's values)."""
    width = 128
    rows = 2**31 // width + 16
    qweight = sparse(rows * width, torch.uint8).view(rows, width)
    last = torch.arange(width, dtype=torch.uint8) % 127 + 1
    qweight[-1] = last
    scale = torch.zeros(rows)  # fresh zeros of this size are not touched either
    scale[-1] = 0.25
    return qweight, scale, last.float() * 0.25


def test_a_table_of_a_gemm(table):
    """The last of its output features stands behind 2^31 codes."""
    qweight, scale, last = table
    rows, width = qweight.shape
    q = torch.full((1, width), 3, dtype=torch.int8)
    y = ops.qgemm(
        q, torch.ones(1), None, qweight, scale, None, None, None, 8, False, -1, rows, "none", torch.float32,
        backend="cpu",
    )  # fmt: skip
    assert y.shape == (1, rows) and y[0, -1] == 3 * last.sum()
    assert not y[0, :-1].any()


def test_a_table_of_an_embedding(table):
    qweight, scale, last = table
    rows, width = qweight.shape
    got = ops.qembedding(
        torch.tensor([0, rows - 1, rows - 2]), qweight, scale, None, None, 8, False, -1, rows, width, 1.0,
        torch.float32, backend="cpu",
    )  # fmt: skip
    assert_equal(got[1], last, "the last row")
    assert not got[0].any() and not got[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_table_of_positions(dtype):
    """Its last row, and the one before it, behind 2^31 elements."""
    k = 4096
    table = sparse((2**31 // k + 2) * k, dtype).view(-1, k)
    table[-2:], x = random(2, k, seed=1, dtype=dtype), random(3, 1, k, seed=2, dtype=dtype)
    positions = torch.tensor([table.shape[0] - 3, 5, table.shape[0] - 4], dtype=torch.int32)
    want = x.clone()
    want[0], want[2] = want[0] + table[-1], want[2] + table[-2]
    assert_equal(cpu_token.add_position(x, 1.0, table, positions, 2), want, "positions")


def test_the_largest_logit():
    """Of rows, the last of which begins behind 2^31 elements; then of one row that is longer than that."""
    rows, n = 129, 2**24 + 2**9
    logits = sparse(rows * n, torch.float32)
    many = logits.view(rows, n)
    assert (rows - 1) * n > 2**31
    many[0, 7], many[-1, -1] = 1.0, 2.0
    y, best = cpu_token.finish_logits(many, None, False)
    assert y.data_ptr() == logits.data_ptr() and best.tolist() == [7, *[0] * (rows - 2), n - 1]
    assert cpu_token.finish_logits(logits.view(1, -1), None, False)[1].tolist() == [logits.numel() - 1]


@pytest.mark.parametrize(("axis", "tokens"), [(0, 300), (1, 300), (2, 3)])
def test_the_mask_of_an_encoder_layer(axis, tokens):
    """Those of two sequences, which are so long that the layer takes one after the other, of heads, and of queries."""
    layer = native_calls.encoder_layer(128, 96)
    x, mask = random(2, tokens, 128, seed=1), random(2, 2, tokens, tokens, seed=2) > 0.0
    far = apart(mask.transpose(0, axis).contiguous()).transpose(0, axis)
    assert far.stride(axis) == FAR and torch.equal(far, mask)
    assert_equal(layer(x, far), layer(x, mask), "the layer's output")


def test_prefill_attention():
    """q, k, v [2, 1, 5, 64] fp16, and a mask and a bias, each with its second batch far away."""
    q, k, v = (random(2, 1, 5, 64, seed=seed, dtype=torch.float16) for seed in (1, 2, 3))
    bias = random(2, 1, 5, 5, seed=4)
    mask = random(2, 1, 5, 5, seed=5) > -1.0
    near = ops.qattention(q, k, v, mask, bias, False, 0.125, backend="cpu")
    far = ops.qattention(*map(apart, (q, k, v)), apart(mask), apart(bias), False, 0.125, backend="cpu")
    assert_equal(far, near, "batches apart")
    want = reference.qattention(q, k, v, mask, bias, causal=False, softmax_scale=0.125, mode="per_token", clip=None)
    torch.testing.assert_close(far, want, atol=2e-3, rtol=2e-3)


def test_caches_written_and_read():
    """The last of 258 caches [32, 4096, 64] begins behind 2^31 codes: all are written at their ends, then read for one
    step through views of these."""
    rows, heads, capacity, dim = 258, 32, 4096, 64
    assert (rows - 1) * heads * capacity * dim > 2**31
    caches = [
        sparse(rows * heads * capacity * each, dtype).view(rows, heads, capacity, *([dim] if each > 1 else []))
        for each, dtype in ((dim, torch.int8), (1, torch.float32)) * 2
    ]
    small = [each[:, :, -9:].clone() for each in caches]
    k, v = (random(rows, heads, 4, dim, seed=seed) for seed in (1, 2))
    position = torch.full((rows,), 3, dtype=torch.int32)
    position[-1] = 2
    kv_cache.quantize_into_cache(k, v, *small, position, backend="cpu")
    kv_cache.quantize_into_cache(k, v, *caches, position + (capacity - 9), backend="cpu")
    ends = [each[:, :, -9:] for each in caches]
    for name, mine, theirs in zip(("k", "k scale", "v", "v scale"), ends, small, strict=True):
        assert_equal(mine.contiguous(), theirs, name)
    assert ends[0][-1, 0, 2:6].any() and not ends[0][-1, 0, :2].any() and not caches[0][0, :, :9].any()
    q, lengths = random(rows, heads, 1, dim, seed=3), position + 4
    step = [ops.qattention_decode(q, *each, lengths, None, None, False, 0.125, backend="cpu") for each in (ends, small)]
    assert_equal(*step, "a step")
    near = ops.qattention_decode(q, *small, lengths, None, None, False, 0.125, backend="eager")
    torch.testing.assert_close(step[0], near, atol=1e-4, rtol=1e-4)
