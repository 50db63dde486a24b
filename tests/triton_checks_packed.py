"""Checks of the Triton kernels that read packed tables, gather and dequantize; and of all row kernels' bounds.

No element differs from the oracle or the specification. Run like triton_checks.py.
"""

import itertools
import math

import numpy as np
import oracle
import torch
from native_checks import guarded
from triton_checks import DTYPES, FORMS, assert_same, main, random_codes
from triton_checks_rows import here
from triton_checks_weight import RULES, WEIGHTS

CHECKS = {}
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check(function):
    CHECKS[function.__name__] = function
    return function


# --------------------------------------------------------------------------------------- gather and dequantize


def table(seed, rows, width, form, group_size, per_tensor):
    """codes, scale, multipliers in numpy, and the same as the tensors of a packed table."""
    bits, four_level = form
    g = torch.Generator().manual_seed(seed)
    codes = random_codes(g, rows, width, bits, four_level)
    scale = (torch.rand(1 if per_tensor else rows, generator=g) * 0.1).numpy()
    if rows > 2 and not per_tensor:
        scale[1], scale[2] = 0.0, np.nan
    mult = None
    if group_size != -1:
        shape = (rows, -(-width // group_size))
        mult = torch.randint(1, 128, shape, generator=g).to(torch.uint8).numpy()
    packed = torch.from_numpy(oracle.pack_fast(codes, bits))
    return (codes, scale, mult), (packed, torch.from_numpy(scale), None if mult is None else torch.from_numpy(mult))


TABLES = [(form, group_size, per_tensor) for form, group_size, per_tensor in itertools.product(
    FORMS, (-1, 32, 64, 128), (False, True)) if group_size == -1 or (form[0] < 8 and not per_tensor)]  # fmt: skip


def assert_gathered(seed, form, group_size, per_tensor, width, ids, position, embed_scale, dtype, device):
    from dqkernels.backends import triton as backend

    bits, four_level = form
    plain, packed = table(seed, 37, width, form, group_size, per_tensor)
    with np.errstate(all="ignore"):
        want = oracle.qembedding(
            ids.numpy(), *plain, four_level=four_level, group_size=group_size, embed_scale=embed_scale,
            position=None if position is None else position.float().numpy(), dtype=_NAMES[dtype],
        )  # fmt: skip
    got = backend.qembedding(
        *here(device, ids, *packed, position), bits=bits, four_level=four_level, group_size=group_size,
        embedding_dim=width, embed_scale=embed_scale, out_dtype=dtype,
    )  # fmt: skip
    assert got.is_contiguous()
    what = f"W{bits} four_level {four_level} group {group_size} width {width} {dtype} ids {list(ids.shape)}"
    assert_same(got, torch.from_numpy(np.ascontiguousarray(want)).to(dtype), what)
    assert width == 1 or want.any()


@check
def embedding_grid(device):
    """Every width, level rule, grouping and scale granularity, over row lengths at the edges of blocks and tiles."""
    for i, (case, width) in enumerate(itertools.product(TABLES, (1, 70, 128, 300))):
        g = torch.Generator().manual_seed(i)
        ids = torch.randint(0, 37, ((5,), (2, 3), (1,))[i % 3], generator=g)
        position = torch.randn(*ids.shape, width, generator=g).to(DTYPES[i // 3 % 3]) if i % 4 else None
        assert_gathered(i, *case, width, ids, position, (1.0, math.sqrt(768))[i % 2], DTYPES[i % 3], device)


@check
def embedding_ids_and_positions(device):
    """ids of every integer type and shape; positions that broadcast over any axis; rows wider than a program."""
    case, width = ((4, False), -1, False), 70
    ids = torch.tensor([[3, 36, 0], [5, 5, 1]])
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        assert_gathered(1, *case, width, ids.to(dtype).t(), None, 2.0, torch.float32, device)
    g = torch.Generator().manual_seed(9)
    for shape in (
        (width,),
        (1, width),
        (3, width),
        (1, 3, width),
        (2, 1, width),
        (2, 3, width),
        (2, 3, 1),
        (3, 1),
        (1,),
    ):
        position = torch.randn(shape, generator=g).half()
        assert_gathered(2, *case, width, ids, position, 1.5, torch.bfloat16, device)
    strided = torch.randn(3, 2 * width, generator=g)[:, ::2]
    assert_gathered(2, *case, width, ids, strided, 1.0, torch.float16, device)
    assert_gathered(3, *case, width, torch.tensor(7), strided[0], 1.0, torch.float32, device)
    assert_gathered(4, (8, False), -1, False, 2500, ids, torch.randn(2500, generator=g), 1.5, torch.float16, device)
    assert_gathered(5, (2, True), 64, False, 2500, torch.arange(37), None, 1.5, torch.float32, device)


@check
def embedding_ids_outside_the_table(device):
    """A row of NaN, and nothing is read there; rows of padding are outside as well."""
    from dqkernels.backends import triton as backend

    _, packed = table(6, 5, 40, (8, False), -1, False)
    packed[1][:3] = 1.0
    ids = torch.tensor([4, 5, -1, 15, 2**40, 0], device=device)
    got = backend.qembedding(
        ids, *here(device, *packed), None, bits=8, four_level=False, group_size=-1, embedding_dim=40, embed_scale=1.0,
        out_dtype=torch.float16,
    )  # fmt: skip
    assert got.isnan().any(dim=1).tolist() == got.isnan().all(dim=1).tolist() == [False, True, True, True, True, False]
    empty = backend.qembedding(
        ids[:0].view(0, 3), *here(device, *packed), None, bits=8, four_level=False, group_size=-1, embedding_dim=40,
        embed_scale=1.0, out_dtype=torch.float16,
    )  # fmt: skip
    assert empty.shape == (0, 3, 40)


@check
def embedding_offsets_beyond_31_bits(device):
    """The last row of a table of more than 2^31 bytes, of which only that row is ever touched."""
    from dqkernels.backends import triton as backend

    width = 65536
    rows = 2**31 // width + 16
    packed = torch.empty(rows, width, dtype=torch.uint8, device=device)
    codes = torch.randint(-127, 128, (width,), generator=torch.Generator().manual_seed(10), dtype=torch.int8)
    packed[-1] = codes.view(torch.uint8).to(device)
    got = backend.qembedding(
        torch.tensor([rows - 1], device=device), packed, torch.ones(1, device=device), None, None, bits=8,
        four_level=False, group_size=-1, embedding_dim=width, embed_scale=1.0, out_dtype=torch.float32,
    )  # fmt: skip
    assert_same(got[0], codes.float(), "the last row")


@check
def dequantize_grid(device):
    """The matrix of every form: the oracle's, and that of the specification."""
    from dqkernels import reference
    from dqkernels.backends import triton as backend

    for i, ((form, group_size, per_tensor), width) in enumerate(itertools.product(TABLES, (1, 129, 300))):
        bits, four_level = form
        rows = (1, 16, 19)[i % 3]
        plain, packed = table(i, rows, width, form, group_size, per_tensor)
        facts = {"bits": bits, "four_level": four_level, "group_size": group_size, "out_features": rows,
                 "in_features": width}  # fmt: skip
        want = torch.from_numpy(oracle.dequantize(*plain, four_level, group_size))
        got = backend.dequantize_weight(*here(device, *packed), **facts)
        assert_same(got, want, f"{form} group {group_size} [{rows}, {width}]")
        assert_same(got, reference.dequantize(*packed, **facts), "the specification")


# ------------------------------------------------------------------------------------------------ out of bounds


def guarded_tensor(tensor, at_end):
    """A copy of a CPU tensor whose end (or start) touches a page that cannot be read: one byte too many faults."""
    if not tensor.numel():
        return tensor
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return torch.from_numpy(guarded(raw, at_end)).view(tensor.dtype).view(tensor.shape)


@check
def rows_at_unreadable_pages(device):
    """Every operand of every op between two walls (of no use on a GPU: there compute-sanitizer looks)."""
    from dqkernels.backends import triton as backend
    from dqkernels.config import LayerConfig

    g = torch.Generator().manual_seed(17)
    for at_end, (rows, k), dtype in itertools.product((True, False), ((1, 1), (3, 129)), DTYPES):

        def place(tensor, at_end=at_end):
            return guarded_tensor(tensor, at_end) if device == "cpu" else tensor.to(device)

        x, residual = (torch.randn(rows, k, generator=g).to(dtype) for _ in range(2))
        norm = torch.randn(2, k, generator=g)
        facts = {"mode": "per_token", "clip": None, "act_scale": None, "want_sum": True}
        for operands in ((x, residual, *norm), (x, None, norm[0], None)):
            inside = [None if t is None else place(t) for t in operands]
            plain = backend.layernorm_quantize(*here(device, *operands), eps=1e-5, **facts)
            for got, want in zip(backend.layernorm_quantize(*inside, eps=1e-5, **facts), plain, strict=True):
                assert_same(got, want.cpu(), f"layernorm [{rows}, {k}]")
        assert_same(
            backend.gelu_quantize(place(x), **facts)[0], backend.gelu_quantize(x.to(device), **facts)[0].cpu(), "gelu"
        )
        for form, group_size in ((FORMS[0], -1), (FORMS[1], 32), (FORMS[3], -1)):
            _, packed = table(rows, rows, k, form, group_size, False)
            inside = [None if t is None else place(t) for t in packed]
            facts_of = {"bits": form[0], "four_level": form[1], "group_size": group_size}
            matrix = backend.dequantize_weight(*inside, **facts_of, out_features=rows, in_features=k)
            ids = place(torch.arange(rows))
            got = backend.qembedding(
                ids,
                *inside,
                place(torch.zeros(k)),
                **facts_of,
                embedding_dim=k,
                embed_scale=1.0,
                out_dtype=torch.float32,
            )
            assert_same(got, matrix.cpu(), f"gather [{rows}, {k}]")
        for bits, quantizer, granularity, group_size in [*WEIGHTS[:5], RULES[0], RULES[6], RULES[8]]:
            layer = LayerConfig(bits, quantizer, granularity, group_size)
            got = backend.quantize_weight(place(x), layer)
            assert_same(got[0], backend.quantize_weight(x.to(device), layer)[0].cpu(), f"weight [{rows}, {k}]")


# ----------------------------------------------------------------------------------------------------- backend


@check
def rows_backend_answers(device):
    """Every op here is offered, with every weight rule."""
    from dqkernels import ops
    from dqkernels.backends import triton as backend

    for op in ("layernorm_quantize", "gelu_quantize", "qembedding", "dequantize_weight", "quantize_weight"):
        assert hasattr(backend, op) and backend.supports(op, bits=4, group_size=64) is None, op
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(16)).to(device)
    for bits, quantizer, granularity, group_size in (*WEIGHTS, *RULES):
        packed = ops.quantize_weight(w, bits, quantizer, granularity, group_size, backend="triton", strict=True)
        mult = packed[2] if group_size != -1 else None
        form = bits, quantizer == "four_level", group_size
        matrix = ops.dequantize_weight(*packed[:2], mult, *form, 5, 40, backend="triton")
        if quantizer == "absmax":
            step = matrix.abs().max() / (127 if bits == 8 else 7)
            assert (matrix - w).abs().max() <= step, "not half a step away"
        assert (matrix - w).norm() < 0.6 * w.norm()
        ids = torch.tensor([[4, 0], [2, 2]], device=device)
        rows = ops.qembedding(ids, *packed[:2], mult, None, *form, 5, 40, 1.0, torch.float32, backend="triton")
        assert_same(rows, matrix[ids].cpu(), f"gather and dequantize, W{bits} group {group_size}")


if __name__ == "__main__":
    main(CHECKS)
