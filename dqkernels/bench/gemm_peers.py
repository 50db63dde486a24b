"""Other projects' int8-activation GEMMs, fed with our codes and scales: gemlite, Humming, BitBLAS, where they import.

Written against the sources of gemlite 0.6.0.post2, humming-kernels 0.1.19 and BitBLAS 0.1.0.post1; never run on a GPU
here. What was tried without one: gemlite's GEMM kernels in Triton's interpreter, fed by this adapter, keep the bound at
8, 4 and 2 bits and 1, 4 and 16 rows (its quantizer replaced by torch's); Humming's layer takes the tensors given here,
its `transform` was not reached; BitBLAS was read.

Another version may want other arguments: whatever an adapter or a call raises is the reason why that peer is not
compared, and a peer that computes something else is refused by its proof. All of them quantize the input inside the
timed call: gemlite and Humming by their own kernels, BitBLAS, which has none, by plain torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from dqkernels import packing
from dqkernels.bench import candidates
from dqkernels.bench import rows as shared
from dqkernels.nn import QLinear


class NotCompared(Exception):
    """What a peer does not have; the message is the reason."""


@dataclass
class Weights:
    """A quantized layer as everybody understands it.

    Attributes:
        codes: int8 [N, K], two's complement of `bits` bits.
        scale: fp32 [N, G], G = 1 or K / group_size: weight = codes * scale.
        bias: [N], of the activations' dtype.
        bits: 2, 4 or 8.
        group_size: -1 for one scale per output channel.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    bits: int
    group_size: int

    @classmethod
    def of(cls, packed: QLinear) -> Weights:
        """Of a packed layer without four_level codes."""
        layer = packed.layer
        codes = packing.unpack(packed.qweight, packed.out_features, packed.in_features, layer.bits)
        scale = packed.weight_scale.unsqueeze(1)
        if packed.group_mult is not None:
            scale = scale * packed.group_mult.float()
        return cls(codes, scale, packed.bias, layer.bits, layer.group_size)

    @property
    def offset(self) -> int:
        """What makes the codes unsigned: 2, 8 or 128."""
        return 1 << (self.bits - 1)

    def float_layer(self) -> SimpleNamespace:
        """`weight` fp32 [N, K] and `bias`, as a proof wants them."""
        width = self.codes.shape[1] if self.group_size == -1 else self.group_size
        weight = self.codes.float() * self.scale.repeat_interleave(width, dim=1)[:, : self.codes.shape[1]]
        return SimpleNamespace(weight=weight, bias=self.bias)


# ---------------------------------------------------------------------------------------------------- adapters


class Gemlite(nn.Module):
    """gemlite's own layer, taken apart: its `forward` is bound to the instance, so that clones would share weights."""

    def __init__(self, layer, call: Callable):
        super().__init__()
        names = ("W_q", "scales", "zeros", "meta_scale")
        for name, tensor in zip(names, layer.get_tensor_args(), strict=True):
            self.register_buffer(name, tensor.detach())
        self.register_buffer("bias", layer.bias.detach())
        self.meta, self.call = layer.get_meta_args(), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.bias, [self.W_q, self.scales, self.zeros, self.meta_scale], self.meta)


def gemlite(weights: Weights, tune: bool) -> tuple[nn.Module, str]:
    """Channel-wise only. 8 bits through its helper; 2 and 4 as its helper for ternary weights sets them up."""
    core, helper = importlib.import_module("gemlite.core"), importlib.import_module("gemlite.helper")
    if weights.group_size != -1:
        raise NotCompared("its group-wise weights take float or fp8 activations")
    device, dtype = str(weights.codes.device), weights.bias.dtype
    n, k = weights.codes.shape
    if weights.bits == 8:
        maker = helper.A8W8_int8_dynamic(device=device, dtype=dtype)
        layer = maker.from_weights(weights.codes, bias=weights.bias, scales=weights.scale)
    else:
        layer = core.GemLiteLinearTriton(
            weights.bits,
            group_size=k,
            in_features=k,
            out_features=n,
            input_dtype=core.DType.INT8,
            output_dtype=helper.TORCH_TO_DTYPE[dtype],
            scaled_activations=True,
        )
        codes = (weights.codes.to(torch.int16) + weights.offset).to(torch.uint8)
        layer.pack(codes, scales=weights.scale, zeros=weights.offset, bias=weights.bias)
        layer.W_group_mode, layer.channel_scale_mode = 1, 3  # a shift alone; both scales after the sum
    return Gemlite(layer, core.forward_functional), "gemlite, autotuned by itself"


def humming(weights: Weights, tune: bool) -> tuple[nn.Module, str]:
    """Its layer, loaded with our codes: unsigned with the middle as zero, 32-bit words along K, 16-bit scales."""
    layers, ops = importlib.import_module("humming.layer"), importlib.import_module("humming.ops")
    device, dtype = weights.codes.device, weights.bias.dtype
    n, k = weights.codes.shape
    layer = layers.HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": f"int{weights.bits}", "group_size": max(0, weights.group_size)},
        input_config={"dtype": "int8"},
        pad_n_to_multiple=64,
        has_bias=True,
        torch_dtype=dtype,
    ).to(device)
    codes = (weights.codes.to(torch.int32) + weights.offset).contiguous()
    packed = ops.pack_weight(codes, weights.bits)
    layer.load_from_tensors({"weight": packed, "weight_scale": weights.scale.to(dtype), "bias": weights.bias})
    layer.transform()
    return layer, "humming, its heuristics"


class Bitblas(nn.Module):
    """int8 x int2/4/8 -> int32 by BitBLAS, between a quantizer and an epilogue in plain torch."""

    def __init__(self, matmul, weights: Weights):
        super().__init__()
        self.matmul = matmul
        self.register_buffer("qweight", matmul.transform_weight(weights.codes))
        self.register_buffer("scale", weights.scale.squeeze(1))
        self.register_buffer("bias", weights.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale = candidates.quantized_by_hand(x)
        return (self.matmul(q, self.qweight) * scale * self.scale + self.bias).to(x.dtype)


def bitblas(weights: Weights, tune: bool) -> tuple[nn.Module, str]:
    """Channel-wise: its integer weights take no scales."""
    library = importlib.import_module("bitblas")
    if weights.group_size != -1:
        raise NotCompared("its integer weights take no group scales")
    n, k = weights.codes.shape
    config = library.MatmulConfig(
        M=[1, 16, 32, 64],
        N=n,
        K=k,
        A_dtype="int8",
        W_dtype=f"int{weights.bits}",
        accum_dtype="int32",
        out_dtype="int32",
        layout="nt",
        with_bias=False,
    )
    matmul = library.Matmul(config=config, enable_tuning=tune)
    words = "tuned" if tune else "default schedule, not tuned"
    return Bitblas(matmul, weights), f"bitblas, {words}; quantizer and epilogue in torch"


ADAPTERS: dict[str, Callable[[Weights, bool], tuple[nn.Module, str]]] = {
    "gemlite": gemlite,
    "humming": humming,
    "bitblas": bitblas,
}


def missing(name: str, device: torch.device) -> str | None:
    """Why a peer cannot be asked at all, or None."""
    if device.type != "cuda":
        return f"takes CUDA tensors, not {device.type}"
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - somebody else's import may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        return "not installed" if absent else f"import failed: {shared.raised(error)}"
    return None


def candidate(name: str, packed: QLinear, tune: bool = False) -> candidates.Candidate:
    """A peer holding the codes of `packed`.

    Raises:
        NotCompared: with the reason, whatever went wrong.
    """
    weights = Weights.of(packed)
    try:
        module, kernel = ADAPTERS[name](weights, tune)
    except NotCompared:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise NotCompared(shared.raised(error)) from error
    n, k = weights.codes.shape
    weight_bytes = math.ceil(n * k * weights.bits / 8) + weights.scale.numel() * 4

    def prove(x: torch.Tensor, y: torch.Tensor) -> str | None:
        # The float matrix is made anew: it is up to sixteen times the codes, and there are many candidates.
        return candidates.bounded(weights.float_layer(), candidates.INT8_BOUND)(x, y)

    label = f"{name} {candidates.format_words(weights.bits, weights.group_size)}"
    more = {"group_size": weights.group_size, "foreign": True}
    return candidates.Candidate(label, module, weights.bits, weight_bytes, prove, kernel, **more)
