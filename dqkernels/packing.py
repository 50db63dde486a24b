"""Packed format v1: planar 2/4/8-bit codes in uint8, in plain torch. Mirrors csrc/include/dqk/format.h.

K is padded to a multiple of 128 and N to a multiple of 16, with code 0. With P = 8 / bits planes, K-block b of
row n takes L = 128 / P bytes, and byte j holds plane p in bits [bits * p, bits * p + bits):

    byte j of block b, plane p  =  code of k = 128 * b + p * L + j

so a plane is a contiguous run of K and activations are never permuted. Codes are two's complement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK_K = 128
BLOCK_N = 16


def padded_k(k: int) -> int:
    """K rounded up to a whole number of 128-code blocks."""
    return -(-k // BLOCK_K) * BLOCK_K


def padded_n(n: int) -> int:
    """N rounded up to a multiple of 16 rows."""
    return -(-n // BLOCK_N) * BLOCK_N


def packed_shape(n: int, k: int, bits: int) -> tuple[int, int]:
    """Shape of the uint8 tensor that holds [n, k] codes of `bits` bits."""
    return padded_n(n), padded_k(k) * bits // 8


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code that storage admits: two's complement of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs int8 codes.

    Args:
        codes: int8 [N, K], each within `code_range(bits)`.
        bits: 2, 4 or 8.

    Returns:
        uint8 [ceil16(N), ceil128(K) * bits / 8]; padding holds code 0.

    Raises:
        ValueError: for another shape, dtype or width.
    """
    _check_bits(bits)
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8 [N, K], got {codes.dtype} {list(codes.shape)}")
    n, k = codes.shape
    planes, run, blocks = 8 // bits, BLOCK_K * bits // 8, padded_k(k) // BLOCK_K
    padded = codes.new_zeros(padded_n(n), padded_k(k))
    padded[:n, :k] = codes
    fields = padded.view(torch.uint8).view(padded_n(n), blocks, planes, run) & ((1 << bits) - 1)
    packed = fields[:, :, 0].clone()
    for plane in range(1, planes):
        packed |= fields[:, :, plane] << (bits * plane)
    return packed.reshape(packed_shape(n, k, bits))


def unpack(qweight: torch.Tensor, n: int, k: int, bits: int) -> torch.Tensor:
    """The inverse of `pack`: sign-extended int8 codes [n, k].

    Raises:
        ValueError: if `qweight` is not the uint8 tensor that [n, k] codes of `bits` bits pack to.
    """
    check_packed(qweight, n, k, bits)
    planes, run = 8 // bits, BLOCK_K * bits // 8
    blocks = qweight[:n].reshape(n, padded_k(k) // BLOCK_K, run)
    # Into the top bits and back: the arithmetic shift of int8 extends the sign.
    fields = [(blocks << (8 - bits - bits * plane)).view(torch.int8) >> (8 - bits) for plane in range(planes)]
    return torch.stack(fields, dim=2).reshape(n, padded_k(k))[:, :k].contiguous()


def check_packed(qweight: torch.Tensor, n: int, k: int, bits: int) -> None:
    """Raises ValueError unless `qweight` has the dtype and shape of [n, k] codes of `bits` bits."""
    _check_bits(bits)
    wanted = packed_shape(n, k, bits)
    if qweight.dtype != torch.uint8 or tuple(qweight.shape) != wanted:
        raise ValueError(
            f"qweight must be uint8 {list(wanted)} for out_features={n}, in_features={k}, bits={bits}, "
            f"got {qweight.dtype} {list(qweight.shape)}"
        )


def _check_bits(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits!r}")


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool [M, K] -> uint8 [M, ceil(K / 8)]; element k is bit k % 8 of byte k // 8."""
    m, k = mask.shape
    bits = F.pad(mask, (0, -k % 8)).reshape(m, -(-k // 8), 8).to(torch.int32)
    return (bits << torch.arange(8, device=mask.device)).sum(dim=-1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of `pack_bits`: bool [M, k]."""
    bits = packed.to(torch.int32).unsqueeze(-1) >> torch.arange(8, device=packed.device)
    return (bits & 1).flatten(1)[:, :k].bool()
