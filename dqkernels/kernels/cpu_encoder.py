"""A layer of an encoder as one call of the compiled core: torch tensors in and out of `_C.CpuEncoderLayer`.

No arithmetic here. The layer keeps the memory of its weights and nothing of a run, so several threads may run it at
once (csrc/cpu/encoder_layer.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dqkernels.kernels import cpu_gemm, native


class Norm(NamedTuple):
    """A LayerNorm, and how its result is quantized for the linears behind it.

    weight, bias [width] in fp32, fp16 or bf16, contiguous, bias or None; mode, clip, act_scale as of `cpu_gemm.gemm`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    mode: str = "per_token"
    clip: float | None = None
    act_scale: torch.Tensor | None = None


class Linears(NamedTuple):
    """Linears on one input: their parts, and keywords of `cpu_gemm.kept`. Their input is float unless `coded`."""

    parts: Sequence[cpu_gemm.Part]
    options: dict[str, Any]
    coded: bool = False


class EncoderLayer:
    """`y = layer(x, mask)`, with the bits of its calls made one by one.

    Args:
        post_norm: whether a norm stands behind its block (BART), or before it (mBART).
        norms: of attention, and of the feed-forward.
        linears: Q, K and V; the projection behind attention; the two of the feed-forward, the first of them `coded`,
            and Q, K and V too unless post_norm.
        heads, head_dim, softmax_scale, mode, clip: of the int8 attention.
        dtype: of x and of every result: fp32, fp16 or bf16.

    Raises:
        RuntimeError: where the core is absent.
        ValueError: for what the core refuses.
    """

    def __init__(
        self,
        *,
        post_norm: bool,
        norms: tuple[Norm, Norm],
        linears: tuple[Linears, Linears, Linears, Linears],
        heads: int,
        head_dim: int,
        softmax_scale: float,
        mode: str,
        clip: float | None,
        dtype: torch.dtype,
    ):
        width = heads * head_dim
        inputs = (width, width, width, linears[2].parts[0].out_features)
        kept = [
            cpu_gemm.kept(k, torch.int8 if each.coded else dtype, each.parts, out_dtype=dtype, **each.options)
            for k, each in zip(inputs, linears, strict=True)
        ]
        self.dtype, self.width = dtype, width
        given = [(norm.weight, norm.bias) for norm in norms] + [part[:4] for each in linears for part in each.parts]
        # A parameter's memory may be exchanged under it: what is held is the memory.
        self._kept = [tensor.detach() for tensors in given for tensor in tensors if tensor is not None]
        self._core = native.require("CpuEncoderLayer").CpuEncoderLayer(
            post_norm=post_norm,
            norms=[_norm(each) for each in norms],
            linears=kept,
            heads=heads,
            head_dim=head_dim,
            softmax_scale=softmax_scale,
            mode=native.MODES[mode],
            clip=0.0 if clip is None else clip,
        )

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            x: [batch, tokens, width] of the layer's dtype, on the CPU.
            mask: bool, broadcast to [batch, heads, tokens, tokens]: True where a key is visible; or None.

        Returns:
            [batch, tokens, width].

        Raises:
            ValueError: for an x of another dtype or shape.
            MemoryError: where there is none for what lies between the layer's calls.
        """
        if x.dtype != self.dtype or x.dim() != 3 or x.shape[2] != self.width or x.device.type != "cpu":
            wanted = f"{self.dtype} [batch, tokens, {self.width}] on the CPU"
            raise ValueError(f"x must be {wanted}, got {x.dtype} {list(x.shape)} on {x.device}")
        batch, tokens, _ = x.shape
        x = native.adjacent(x.contiguous())
        out = torch.empty((batch, tokens, self.width), dtype=self.dtype)
        seen = None
        if mask is not None:
            mask = mask.expand(batch, -1, tokens, tokens)
            strides = mask.stride()
            # A mask of one head is that of all.
            seen = mask.data_ptr(), 3, strides if mask.shape[1] > 1 else (strides[0], 0, *strides[2:])
        self._core.run(x.data_ptr(), out.data_ptr(), batch, tokens, seen, None, torch.get_num_threads())
        return out


def _norm(norm: Norm) -> tuple:
    bias = norm.bias
    return (
        norm.weight.data_ptr(),
        native.DTYPES[norm.weight.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else native.DTYPES[bias.dtype],
        norm.eps,
        native.MODES[norm.mode],
        0.0 if norm.clip is None else norm.clip,
        float(norm.act_scale) if norm.mode == "static" else 0.0,
    )
