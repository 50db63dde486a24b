"""Checks of the Triton kernels against tests/oracle.py, element by element, on a device named by the caller.

test_kernels_triton.py runs them in Triton's interpreter, test_gpu_triton.py on a GPU. By hand:
`TRITON_INTERPRET=1 python tests/triton_checks.py [NAME ...]` prints a line per check, and their outcomes as JSON.
"""

import faulthandler
import itertools
import json
import os
import sys
import time
import traceback

import numpy as np
import oracle
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = ((8, False), (4, False), (2, False), (2, True))  # bits, four_level
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def assert_same(got, want, what):
    """Equal element by element, a NaN matching a NaN; the message shows the first difference."""
    got = got.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {list(got.shape)}"
    differ = ~((got == want) | (got.isnan() & want.isnan()))
    if differ.any():
        at = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {got.numel()} differ, first {at}: {got[at]} != {want[at]}"
        )


def random_codes(generator, n, k, bits, four_level=False):
    """Every code that storage admits, -8 and -128 too."""
    low, high = (-1, 2) if bits == 2 and not four_level else (-(1 << (bits - 1)), 1 << (bits - 1))
    return torch.randint(low, high, (n, k), generator=generator).numpy()


def pack(codes, bits, device):
    return torch.from_numpy(oracle.pack_fast(codes, bits)).to(device)


def floats(tensor):
    return None if tensor is None else tensor.float().numpy()


# ------------------------------------------------------------------------------------------------------- GEMM

# Around every tile edge: M 16/32/64/256 are the buckets, N 16/64/128 the padding and the tiles, K 128/256/512 the
# packing block and the largest BLOCK_K; primes between.
SHAPES = (
    (1, 1, 1), (1, 17, 31), (2, 16, 128), (3, 15, 127), (5, 63, 129), (7, 64, 255), (13, 65, 256), (15, 33, 257),
    (16, 67, 300), (17, 48, 384), (31, 129, 65), (33, 127, 130), (63, 70, 511), (64, 64, 512), (65, 31, 513),
    (67, 130, 200), (129, 129, 129), (257, 143, 259),
)  # fmt: skip


def assert_gemm(seed, m, n, k, form, dtype, bias, activation, residual, per_tensor, device, tile=None):
    """One GEMM of random codes equals the oracle."""
    from dqkernels.kernels import gemm

    bits, four_level = form
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    act_scale = torch.rand(m, generator=g) * 0.02 + 1e-4
    codes = random_codes(g, n, k, bits, four_level)
    weight_scale = torch.rand(1 if per_tensor else n, generator=g) * 0.02
    bias = torch.randn(n, generator=g).to(dtype) if bias else None
    residual = torch.randn(m, n, generator=g).to(dtype) if residual else None
    acc = oracle.accumulate(q.numpy(), codes, None, four_level, -1)
    want = oracle.epilogue(acc, act_scale.numpy(), weight_scale.numpy(), floats(bias), floats(residual), activation)
    assert m * n * k < 100 or want.any(), "the oracle is all zero: the case proves nothing"
    row_sum = q.sum(dim=1, dtype=torch.int32)
    q, act_scale, row_sum, weight_scale, bias, residual = (
        None if t is None else t.to(device) for t in (q, act_scale, row_sum, weight_scale, bias, residual)
    )
    got = gemm.qgemm(
        q, act_scale, row_sum, pack(codes, bits, device), weight_scale, bits, four_level, n,
        bias, activation, residual, dtype, tile,
    )  # fmt: skip
    assert_same(got, torch.from_numpy(want).to(dtype), f"{m}x{n}x{k} {form} {dtype} {tile}")


@check
def gemm_grid(device):
    """18 shapes x 4 weight forms, output types and epilogues dealt around: 72 cases."""
    epilogues = list(itertools.product((False, True), ("none", "relu"), (False, True), (False, True)))
    for i, (shape, form) in enumerate(itertools.product(SHAPES, FORMS)):
        turn = i + i // len(FORMS)
        assert_gemm(i, *shape, form, DTYPES[turn % 3], *epilogues[turn * 7 % len(epilogues)], device)


@check
def gemm_every_epilogue(device):
    """One shape x every combination of output type, bias, activation, residual and scale granularity: 48 cases."""
    cases = itertools.product(DTYPES, (False, True), ("none", "relu"), (False, True), (False, True))
    for seed, case in enumerate(cases):
        assert_gemm(seed, 5, 37, 140, FORMS[seed % 4], *case, device)


@check
def gemm_every_tile(device):
    """Each tile of the table gives the same bits, on a K with a tail and on one without."""
    from dqkernels.kernels import tiles

    arch = tiles.family(torch.device(device))
    each = [(bits, tile) for (name, bits), table in tiles.CONFIGS.items() for tile in dict.fromkeys(table.values())
            if device == "cpu" or name == arch]  # fmt: skip
    for seed, ((bits, tile), k) in enumerate(itertools.product(each, (320, 512))):
        assert_gemm(seed, 35, 150, k, (bits, bits == 2), DTYPES[seed % 3], True, "none", True, False, device, tile)


@check
def gemm_gelu(device):
    """erf differs by an ulp between libraries: 4 ulp of fp32 on the scale of the input."""
    from dqkernels.kernels import gemm

    g = torch.Generator().manual_seed(3)
    q = torch.randint(-127, 128, (9, 70), generator=g, dtype=torch.int8)
    scale, weight_scale = torch.rand(9, generator=g) * 0.01, torch.rand(40, generator=g) * 0.02
    codes = random_codes(g, 40, 70, 8)
    acc = oracle.accumulate(q.numpy(), codes, None, False, -1)
    plain = oracle.epilogue(acc, scale.numpy(), weight_scale.numpy())
    q, scale, weight_scale = q.to(device), scale.to(device), weight_scale.to(device)
    got = gemm.qgemm(q, scale, None, pack(codes, 8, device), weight_scale, 8, False, 40, activation="gelu").cpu()
    limit = 4 * 2.0**-23 * np.maximum(np.abs(plain), 2.0**-20)
    assert (np.abs(got.double().numpy() - oracle.gelu64(plain)) <= limit).all()


@check
def gemm_extremes(device):
    """The largest sums at the largest K, code -8, a NaN row that stays alone, a zero scale; K one too many."""
    from dqkernels.kernels import gemm

    k, one = 131_071, torch.ones(2, device=device)
    for value, code, bits in ((127, -128, 8), (-127, -8, 4), (127, 1, 2)):
        q = torch.full((2, k), value, dtype=torch.int8, device=device)
        got = gemm.qgemm(q, one, None, pack(np.full((1, k), code), bits, device), one[:1], bits, False, 1)
        assert_same(got, torch.full((2, 1), float(np.float32(value * code * k))), f"K = {k}, W{bits}")
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (3, 50), generator=g, dtype=torch.int8).to(device)
    packed = pack(random_codes(g, 4, 50, 8), 8, device)
    scale = torch.tensor([0.5, float("nan"), 0.25], device=device)
    weight_scale = torch.tensor([1.0, 0.0, 2.0, 1.0], device=device)
    for activation in ("none", "relu", "gelu"):
        got = gemm.qgemm(q, scale, None, packed, weight_scale, 8, False, 4, None, activation)
        assert got[1].isnan().all() and not got[[0, 2]].isnan().any(), activation
        assert (got[[0, 2], 1] == 0).all() and got[0].any(), activation
    long = torch.zeros(1, k + 1, dtype=torch.int8, device=device)
    refuses("131072", lambda: gemm.qgemm(long, one[:1], None, long.expand(16, -1), one[:1], 8, False, 1))
    refuses("too small", lambda: gemm.qgemm(q, scale, None, packed, weight_scale, 8, False, 17))


@check
def gemm_rounding(device):
    """Outputs on ties and beside them, subnormal and overflowing, in each output type."""
    from dqkernels.kernels import gemm

    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00018000, 0x00008000, 0x3FFFFFFF,
            0x3F801000, 0x3F803000, 0x477FF000, 0x33000000, 0x33000001]  # fmt: skip
    factors = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    packed = pack(np.ones((len(bits), 1), np.int64), 8, device)
    for sign, dtype in itertools.product((1, -1), DTYPES):
        q = torch.full((1, 1), sign, dtype=torch.int8, device=device)
        got = gemm.qgemm(q, torch.ones(1, device=device), None, packed, factors.to(device), 8, False, len(bits),
                         out_dtype=dtype)  # fmt: skip
        assert_same(got, (factors * sign)[None].to(dtype), f"{dtype}")


@check
def unpack_every_byte(device):
    """Every byte value in every plane is code * 2^(8 - bits): the plain twin, and on a GPU the assembly too."""
    from triton_twins import unpack_kernel

    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8).to(device)
    for bits, use_asm in itertools.product((2, 4, 8), (False, True) if device != "cpu" else (False,)):
        for plane in range(8 // bits):
            codes = np.arange(256) >> (bits * plane) & ((1 << bits) - 1)
            codes = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
            got = torch.empty(256, dtype=torch.int8, device=device)
            unpack_kernel[(1,)](packed, got, PLANE=plane, BITS=bits, USE_ASM=use_asm)
            want = torch.from_numpy(codes * 2 ** (8 - bits)).to(torch.int8)
            assert_same(got, want, f"bits {bits}, plane {plane}, asm {use_asm}")


# -------------------------------------------------------------------------------------------------- quantizer


def modes(device):
    return (("per_token", None), ("per_tensor", None), ("static", torch.tensor([0.0213], device=device)))


def assert_quantized(x, mode, clip=None, act_scale=None):
    """Codes, scales and sums equal the oracle's, with and without the sums, and x is left alone."""
    from dqkernels.kernels import quantize

    before = x.clone()
    q, scale, row_sum = quantize.quantize_activation(x, mode, clip, act_scale, want_sum=True)
    assert torch.equal(x.nan_to_num(), before.nan_to_num()) and torch.equal(x.isnan(), before.isnan()), "x changed"
    bare = quantize.quantize_activation(x, mode, clip, act_scale)
    assert torch.equal(bare[0], q) and bare[2].shape == (0,) and bare[2].dtype == torch.int32
    rows = x.cpu().float().numpy().reshape(-1, x.shape[-1])
    static = None if act_scale is None else act_scale.item()
    with np.errstate(all="ignore"):
        codes, scales, sums = oracle.quantize_activation(rows, mode, clip, static)
    what = f"{mode}, {x.dtype}, {list(x.shape)}, clip {clip}"
    assert_same(q, torch.from_numpy(codes).to(torch.int8).reshape(x.shape), f"{what}: codes")
    assert_same(scale, torch.from_numpy(scales).reshape(x.shape[:-1]), f"{what}: scale")
    assert_same(row_sum, torch.from_numpy(sums).to(torch.int32).reshape(x.shape[:-1]), f"{what}: row_sum")
    return q, scale


@check
def quantize_grid(device):
    """Shapes x modes x clip, the input types dealt around."""
    g = torch.Generator().manual_seed(1)
    shapes = ((1, 1), (3, 5), (2, 3, 127), (1, 128), (4, 129), (2, 1000), (5,), (2, 2, 2, 33))
    for i, (shape, (mode, act_scale), clip) in enumerate(itertools.product(shapes, modes(device), (None, 2.5))):
        x = (torch.randn(shape, generator=g) * 3).to(DTYPES[(i + i // 6) % 3]).to(device)
        assert_quantized(x, mode, clip, act_scale)


@check
def quantize_ties(device):
    """x * inv lands on k + 1/2 for every k: half to even, both signs."""
    halves = torch.cat([torch.tensor([127.0]), torch.arange(-126, 127) + 0.5])
    for dtype in DTYPES[:2]:  # a bf16 holds no 126.5
        q, scale = assert_quantized(halves[None].to(dtype).to(device), "per_token")
        assert scale.item() == 1.0 and q[0, [1, 127, 128]].tolist() == [-126, 0, 2]


@check
def quantize_special_rows(device):
    """NaN and Inf at the first, a middle and the last place; zero, -0.0, tiny and huge rows; an outlier."""
    g = torch.Generator().manual_seed(2)
    k = 130
    x = torch.randn(14, k, generator=g)
    bads = itertools.product((float("nan"), float("inf"), float("-inf")), (0, k // 2, k - 1))
    for row, (bad, place) in enumerate(bads):
        x[row, place] = bad
    x[9] = 0.0
    x[10] = -0.0
    x[11] *= 2.0**-110
    x[12] = x[12].sign() * 3.4e38
    x[13, 3] = 1e30
    for (mode, act_scale), clip in itertools.product(modes(device), (None, 2.5)):
        assert_quantized(x.to(device), mode, clip, act_scale)
        assert_quantized(x[9:].to(device), mode, clip, act_scale)
        assert_quantized(x.to(torch.float16).to(device), mode, clip, act_scale)
    edge = 2.0**-100
    below = float(np.nextafter(np.float32(edge), np.float32(0)))
    q, scale = assert_quantized(torch.tensor([[edge, -edge / 2], [below, 0.0]], device=device), "per_token")
    assert q.tolist() == [[127, -64], [0, 0]] and scale[1].item() == 1.0


@check
def quantize_layouts(device):
    """Transposed, sliced, strided, expanded and unaligned inputs."""
    base = torch.randn(3, 4, 70, generator=torch.Generator().manual_seed(3)).to(device)
    views = (base[:, ::2, 3:], base[:, :2, :20].transpose(0, 2), base[..., ::3], base[0, 0].expand(5, 70),
             base[:, :, :1].expand(3, 4, 9), base[..., :1])  # fmt: skip
    for x, (mode, act_scale) in itertools.product(views, modes(device)):
        assert_quantized(x, mode, None, act_scale)


@check
def quantize_long_rows(device):
    """Rows longer than the registers hold are read twice."""
    x = torch.randn(3, 8209, generator=torch.Generator().manual_seed(4))
    x[1, 8200] = float("inf")
    x[2, 8208] = 50.0
    for mode, act_scale in modes(device):
        assert_quantized(x.to(device), mode, 2.5, act_scale)
        assert_quantized(x[::2].to(device), mode, None, act_scale)


# ---------------------------------------------------------------------------------------------------- backend


def linear(x, seed, n, form, mode="per_token", clip=None, act_scale=None):
    """The backend's qlinear on x, and the oracle's."""
    from dqkernels.backends import triton as backend

    bits, four_level = form
    g = torch.Generator().manual_seed(seed)
    codes = random_codes(g, n, x.shape[-1], bits, four_level)
    weight_scale, bias = torch.rand(n, generator=g) * 0.1, torch.randn(n, generator=g)
    residual = torch.randn(*x.shape[:-1], n, generator=g)
    y = backend.qlinear(
        x, pack(codes, bits, x.device), weight_scale.to(x.device), None, bias.to(x.device), residual.to(x.device),
        bits=bits, four_level=four_level, group_size=-1, out_features=n, act_mode=mode, act_clip=clip,
        act_scale=act_scale, activation="relu", out_dtype=torch.float16,
    )  # fmt: skip
    rows = x.cpu().float().numpy().reshape(-1, x.shape[-1])
    static = None if act_scale is None else act_scale.item()
    q, scale, _ = oracle.quantize_activation(rows, mode, clip, static)
    acc = oracle.accumulate(q, codes, None, four_level, -1)
    with np.errstate(all="ignore"):
        want = oracle.epilogue(
            acc, scale, weight_scale.numpy(), bias.numpy(), residual.reshape(len(rows), n).numpy(), "relu"
        )
    return y, torch.from_numpy(want).to(torch.float16).reshape(y.shape)


@check
def qlinear_end_to_end(device):
    """Quantizer and GEMM together in every mode and weight form; a NaN row marks itself and no other."""
    x = torch.randn(2, 9, 150, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16).to(device)
    x[1, 4, 77] = float("nan")
    for (mode, act_scale), form in itertools.product(modes(device), FORMS):
        y, want = linear(x, 6, 21, form, mode, 2.5, act_scale)
        assert_same(y, want, f"{mode}, {form}")
        if mode != "per_tensor":
            assert y.isnan().any(dim=-1).sum() == 1 and y[1, 4].isnan().all()


@check
def empty_inputs(device):
    """M = 0 gives empties of the right shape and type."""
    from dqkernels.kernels import quantize

    for mode, act_scale in modes(device):
        x = torch.empty(2, 0, 5, device=device)
        q, scale, row_sum = quantize.quantize_activation(x, mode, None, act_scale, want_sum=True)
        assert q.shape == (2, 0, 5) and scale.shape == row_sum.shape == (2, 0)
    y = linear(torch.empty(0, 3, 20, device=device), 0, 7, (4, False))[0]
    assert y.shape == (0, 3, 7) and y.dtype == torch.float16


def refuses(word, call):
    try:
        call()
    except ValueError as error:
        assert word in str(error), error
    else:
        raise AssertionError(f"nothing was refused; expected a ValueError with {word!r}")


@check
def backend_refusals(device):
    """Groups that do not exist are refused by name; the backend is available here, not on devices it does not know."""
    from dqkernels.backends import triton as backend

    usable, reason = backend.available(device)
    assert usable and reason and not backend.available("meta")[0]
    for bits, group_size in ((8, -1), (4, -1), (2, -1), (4, 32), (2, 64), (4, 128)):
        assert backend.supports("qgemm", bits=bits, group_size=group_size) is None
    assert "group_size=64" in backend.supports("qgemm", bits=8, group_size=64)
    assert "group_size=16" in backend.supports("qgemm", bits=4, group_size=16)


@check
def equals_reference(device):
    """The plain-torch specification gives the same bits, op by op."""
    from dqkernels import qmath, reference
    from dqkernels.backends import triton as backend

    g = torch.Generator().manual_seed(7)
    for i, ((m, n, k), form) in enumerate(itertools.product(((1, 20, 70), (19, 33, 130)), FORMS)):
        bits, four_level = form
        x = torch.randn(m, k, generator=g).to(DTYPES[i % 3])
        mine = backend.quantize_activation(x.to(device), "per_token", 2.5, None, four_level)
        spec = qmath.quantize_activation(x, "per_token", 2.5, None, four_level)
        for got, want in zip(mine, spec, strict=True):
            assert_same(got, want, "quantize_activation")
        packed = pack(random_codes(g, n, k, bits, four_level), bits, "cpu")
        weight = (packed, torch.rand(n, generator=g), None, torch.randn(n, generator=g), None)
        facts = {"bits": bits, "four_level": four_level, "group_size": -1, "out_features": n, "activation": "relu",
                 "out_dtype": x.dtype}  # fmt: skip
        there = [None if t is None else t.to(device) for t in weight]
        want = reference.qgemm(*spec, *weight, **facts)
        assert_same(backend.qgemm(*mine, *there, **facts), want, f"qgemm {form}")
        assert_same(backend.qgemm(mine[0], mine[1], None, *there, **facts), want, f"qgemm {form}, no row_sum")


def main(checks):
    """Runs the checks named on the command line, else all; their outcomes are the last line."""
    faulthandler.enable()  # a read past an operand may end in a fault
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1: these checks run on the CPU"
    outcome = {}
    for name, function in checks.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        start = time.perf_counter()
        try:
            with np.errstate(all="ignore"):  # numpy plays the GPU here, and warns where a GPU is silent
                function("cpu")
            outcome[name] = "ok"
        except Exception:
            outcome[name] = traceback.format_exc()
            print(outcome[name], file=sys.stderr)
        verdict = "ok" if outcome[name] == "ok" else "FAILED"
        print(f"{name}: {verdict}, {time.perf_counter() - start:.1f} s", file=sys.stderr)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(CHECKS)
