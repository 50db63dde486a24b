"""Packed format v1 against the formula of docs/design.md section 4: all codes, all byte positions, both ways."""

import numpy as np
import oracle
import pytest
import torch
from compare import assert_equal
from hypothesis import given
from hypothesis import strategies as st

from dqkernels import packing

BITS = (2, 4, 8)


def random_codes(n, k, bits, seed=0):
    low, high = packing.code_range(bits)
    return np.random.default_rng(seed).integers(low, high + 1, (n, k)).astype(np.int8)


@pytest.mark.parametrize("bits", BITS)
def test_code_range_and_shapes(bits):
    assert packing.code_range(bits) == {2: (-2, 1), 4: (-8, 7), 8: (-128, 127)}[bits]
    for n, k, rows, blocks in [(1, 1, 16, 1), (16, 128, 16, 1), (17, 129, 32, 2), (50265, 768, 50272, 6)]:
        assert packing.packed_shape(n, k, bits) == (rows, blocks * 16 * bits)
    assert packing.packed_shape(0, 5, bits) == (0, 16 * bits)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_at_every_position_of_a_block(bits):
    """One code in a field of zeros: exactly its own bits of its own byte are set."""
    low, high = packing.code_range(bits)
    run = 128 * bits // 8
    # Row (c, k) holds code c at k and zeros elsewhere: every code walks through two blocks.
    values = torch.arange(low, high + 1).repeat_interleave(256)
    k = torch.arange(256).repeat(high - low + 1)
    rows = torch.arange(values.numel())
    codes = torch.zeros(values.numel(), 256, dtype=torch.int8)
    codes[rows, k] = values.to(torch.int8)
    expected = torch.zeros(values.numel(), 2 * run, dtype=torch.uint8)
    field = (values % (1 << bits)) << (bits * (k % 128 // run))
    expected[rows, k // 128 * run + k % 128 % run] = field.to(torch.uint8)
    packed = packing.pack(codes, bits)
    assert torch.equal(packed, expected)
    assert torch.equal(packing.unpack(packed, values.numel(), 256, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_value_at_every_byte_position_unpacks_as_the_kernels_read_it(bits):
    """256 rows hold the 256 byte values in every byte of a block; a code is read via the top bits of its byte."""
    run = 128 * bits // 8
    packed = torch.arange(256, dtype=torch.int64).to(torch.uint8).unsqueeze(1).expand(256, run).contiguous()
    codes = packing.unpack(packed, 256, 128, bits)
    rows = packed.numpy()
    expected = np.array([[oracle.code_at(rows[r], k, bits) for k in range(128)] for r in range(256)])
    assert_equal(codes, expected, f"{bits} bits")
    assert_equal(packing.pack(codes, bits), packed, "and back")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, k", [(1, 1), (3, 127), (16, 128), (17, 129), (2, 255), (5, 384), (31, 641)])
def test_pack_is_the_formula(n, k, bits):
    codes = random_codes(n, k, bits)
    packed = packing.pack(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert tuple(packed.shape) == packing.packed_shape(n, k, bits)
    assert_equal(packed, oracle.pack(codes, bits), "pack")
    assert_equal(oracle.pack_fast(codes, bits), oracle.pack(codes, bits), "the oracle's fast form")
    assert_equal(packing.unpack(packed, n, k, bits), codes, "unpack")


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero_when_written_and_ignored_when_read(bits):
    n, k = 5, 130
    codes = torch.from_numpy(random_codes(n, k, bits))
    packed = packing.pack(codes, bits)
    everything = packing.unpack(packed, packing.padded_n(n), packing.padded_k(k), bits)
    assert (everything[n:] == 0).all() and (everything[:, k:] == 0).all()
    # Set every padding bit, in the tail columns and in the tail rows.
    noisy = packing.unpack(packed, packing.padded_n(n), packing.padded_k(k), bits)
    noisy[n:], noisy[:, k:] = -1, -1
    dirty = packing.pack(noisy, bits)
    assert not torch.equal(dirty, packed)
    assert_equal(packing.unpack(dirty, n, k, bits), codes, "padding must not be read")


@given(n=st.integers(0, 40), k=st.integers(1, 300), bits=st.sampled_from(BITS), seed=st.integers(0, 2**31))
def test_round_trip(n, k, bits, seed):
    codes = random_codes(n, k, bits, seed)
    packed = packing.pack(torch.from_numpy(codes), bits)
    assert_equal(packed, oracle.pack_fast(codes, bits), "pack", may_be_zero=True)
    assert_equal(packing.unpack(packed, n, k, bits), codes, "unpack", may_be_zero=True)


def test_pack_takes_any_strides_and_changes_nothing():
    codes = torch.from_numpy(random_codes(20, 150, 4))
    before = codes.clone()
    for other in (codes.t().contiguous().t(), torch.stack([codes, codes], dim=2)[:, :, 0]):
        assert not other.is_contiguous()
        assert_equal(packing.pack(other, 4), packing.pack(codes, 4), "strided")
    assert torch.equal(codes, before)


REFUSED = [
    (lambda: packing.pack(torch.zeros(2, 3, dtype=torch.int8), 3), "bits must be 2, 4 or 8, got 3"),
    (lambda: packing.pack(torch.zeros(2, 3), 4), r"codes must be int8 \[N, K\], got torch.float32 \[2, 3\]"),
    (lambda: packing.pack(torch.zeros(6, dtype=torch.int8), 4), r"codes must be int8 \[N, K\]"),
    (lambda: packing.unpack(torch.zeros(16, 64, dtype=torch.uint8), 2, 3, 5), "bits must be 2, 4 or 8, got 5"),
    (
        lambda: packing.unpack(torch.zeros(16, 64, dtype=torch.int8), 2, 3, 4),
        r"qweight must be uint8 \[16, 64\] for out_features=2, in_features=3, bits=4, got torch.int8",
    ),
    (lambda: packing.unpack(torch.zeros(16, 32, dtype=torch.uint8), 2, 3, 4), r"got torch.uint8 \[16, 32\]"),
    (lambda: packing.unpack(torch.zeros(16, 64, dtype=torch.uint8), 17, 3, 4), r"qweight must be uint8 \[32, 64\]"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_limits_of_a_shape_pass():
    """The positive control of the refusals above: exactly full is not over."""
    full = packing.pack(torch.ones(16, 128, dtype=torch.int8), 2)
    assert tuple(full.shape) == (16, 32) and bool((full == 0b01010101).all())
    assert_equal(packing.unpack(full, 16, 128, 2), torch.ones(16, 128, dtype=torch.int8))
