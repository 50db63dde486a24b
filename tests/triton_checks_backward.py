"""Checks of the two backward GEMMs, run like those of triton_checks.py.

Exact where it can be asked for: with small integers as gradients, powers of two as scales and codes as they are, every
product and every sum is exact in each dtype, so that a result may not differ in a single bit. Random values meet a
worst-case bound derived from the roundings that the kernel makes.
"""

import torch
from triton_checks import DTYPES, FORMS, assert_same, main, pack, random_codes

CHECKS = {}

# (M, N, K): around the tiles of 32, 64 and 128, the packing block of 128 and its planes; primes between.
SHAPES = (
    (1, 1, 1), (2, 16, 31), (3, 17, 127), (5, 31, 128), (7, 33, 129), (13, 63, 255), (16, 64, 256), (17, 65, 257),
    (31, 40, 300), (32, 32, 64), (33, 127, 70), (64, 67, 130), (65, 129, 200), (129, 20, 90), (130, 143, 259),
)  # fmt: skip
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def check(function):
    CHECKS[function.__name__] = function
    return function


def weights(generator, n, k, form, group_size, exact, tensor_scale=False):
    """Packed codes, scale and multipliers on the CPU, and the float64 matrix they stand for."""
    bits, four_level = form
    codes = random_codes(generator, n, k, bits, four_level)
    scales = 1 if tensor_scale else n
    scale = torch.rand(scales, generator=generator) * 0.02 + 1e-3
    if exact:
        scale = 2.0 ** torch.randint(-6, 0, (scales,), generator=generator)
    mult = None
    if group_size != -1:
        mult = torch.randint(1, 8, (n, -(-k // group_size)), generator=generator, dtype=torch.uint8)
    level = torch.from_numpy(codes).double() * (2 if four_level else 1) + (1 if four_level else 0)
    if mult is not None:
        level *= mult.double().repeat_interleave(group_size, dim=1)[:, :k]
    return pack(codes, bits, "cpu"), scale.float(), mult, level * scale.float().double().unsqueeze(1)


def mask_of(generator, m, k):
    """A random mask and its bits, packed one at a time."""
    keep = torch.rand(m, k, generator=generator) < 0.7
    packed = torch.zeros(m, -(-k // 8), dtype=torch.uint8)
    for column in range(k):
        packed[:, column // 8] |= keep[:, column].to(torch.uint8) << (column % 8)
    return keep, packed


def assert_close(got, want, magnitude, terms, roundoff, what):
    """|got - want| <= roundings of one operand and of the output, fp32 sums of `terms` products, fp16's subnormals."""
    error = (got.cpu().double() - want).abs()
    bound = magnitude * (2 * roundoff + (terms + 2) * 2.0**-24) + 2.0**-20
    assert bool((error <= bound).all()), f"{what}: {float((error / bound).max()):.2f} times the bound"


def options():
    """Every shape with every dtype; forms, groups and masks rotate, so that all pairs of them occur."""
    for number, shape in enumerate(SHAPES):
        for index, dtype in enumerate(DTYPES):
            form = FORMS[(number + index) % 4]
            group_size = (-1, 32, 64, 128)[(number // 4 + index) % 4] if form[0] < 8 else -1
            yield number * 3 + index, shape, dtype, form, group_size, (number + number // 2 + index) % 2 == 0


def run_input(seed, shape, dtype, form, group_size, masked, exact, device, tensor_scale=False):
    from dqkernels.kernels import backward

    (m, n, k), g = shape, torch.Generator().manual_seed(seed)
    qweight, scale, mult, matrix = weights(g, n, k, form, group_size, exact, tensor_scale)
    draw = torch.randint(-4, 5, (m, n), generator=g) if exact else torch.randn(m, n, generator=g)
    grad = draw.to(dtype)
    keep, passed = mask_of(g, m, k) if masked else (torch.ones(m, k, dtype=torch.bool), None)
    want = (grad.double() @ matrix) * keep
    there = [None if tensor is None else tensor.to(device) for tensor in (grad, qweight, scale, mult, passed)]
    facts = {"bits": form[0], "four_level": form[1], "group_size": group_size, "in_features": k}
    out_dtype = torch.float32 if exact else dtype
    got = backward.grad_input(*there, **facts, out_dtype=out_dtype)
    what = f"grad_x {shape} {dtype} {form} group {group_size} masked {masked}"
    if exact:
        if mult is not None and dtype == torch.bfloat16:
            matrix = matrix.to(dtype).double()  # level * mult has up to 9 bits
            want = (grad.double() @ matrix) * keep
        assert min(m * n, k) < 8 or want.any(), what  # a gradient may be one 0
        assert_same(got, want.float(), what)
    else:
        magnitude = grad.double().abs() @ matrix.abs()
        assert_close(got, want, magnitude, n, UNIT_ROUNDOFF[dtype], what)


@check
def grad_input_is_exact_on_integers(device):
    for case in options():
        run_input(*case, exact=True, device=device)


@check
def grad_input_meets_its_bound(device):
    for case in list(options())[:: 1 if device == "cuda" else 3]:
        run_input(*case, exact=False, device=device)


def run_weight(seed, shape, dtype, exact, device):
    from dqkernels.kernels import backward

    (m, n, k), g = shape, torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    draw = torch.randint(-4, 5, (m, n), generator=g) if exact else torch.randn(m, n, generator=g)
    scale = 2.0 ** torch.randint(-6, 0, (m,), generator=g) if exact else torch.rand(m, generator=g) * 0.02
    grad = draw.to(dtype)
    x = q.double() * scale.float().double().unsqueeze(1)
    want, what = grad.double().t() @ x, f"grad_w {shape} {dtype}"
    arguments = grad.to(device), q.to(device), scale.float().to(device)
    got = backward.grad_weight(*arguments, torch.float32)
    if exact:
        assert_same(got, want.float(), what)
    else:
        assert_close(got, want, grad.double().abs().t() @ x.abs(), m, UNIT_ROUNDOFF[dtype], what)


@check
def grad_weight_is_exact_on_integers_and_meets_its_bound(device):
    for seed, shape, dtype, *_ in options():
        for exact in (True, False) if seed % 3 == 0 or device == "cuda" else (True,):
            run_weight(seed, shape, dtype, exact, device)


@check
def backward_of_nothing(device):
    """M, N or K of zero: shapes are right, and a sum over nothing is zero."""
    from dqkernels.kernels import backward

    qweight, scale = torch.zeros(16, 128, dtype=torch.uint8, device=device), torch.ones(16, device=device)
    facts = {"bits": 8, "four_level": False, "group_size": -1, "in_features": 100, "out_dtype": torch.float32}
    assert backward.grad_input(torch.ones(0, 16, device=device), qweight, scale, None, None, **facts).shape == (0, 100)
    q = torch.ones(0, 5, dtype=torch.int8, device=device)
    got = backward.grad_weight(torch.ones(0, 3, device=device), q, torch.ones(0, device=device), torch.float32)
    assert got.shape == (3, 5) and not got.any()


if __name__ == "__main__":
    main(CHECKS)
