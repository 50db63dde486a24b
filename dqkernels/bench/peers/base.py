"""What every adapter is made of: the peer's facts, its import, weights as everybody understands them."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from dqkernels import packing
from dqkernels.bench import candidates
from dqkernels.bench.generate_candidates import Candidate as Generator
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

    @classmethod
    def rounded(cls, linear: nn.Linear, levels: int, bits: int, group_size: int = -1) -> Weights:
        """Of a float layer whose K is divisible by `group_size`: codes -levels..levels, the largest weight the last."""
        weight = linear.weight.detach().float()
        groups = weight.unsqueeze(1) if group_size == -1 else weight.unflatten(1, (-1, group_size))
        scale = groups.abs().amax(dim=2) / levels
        codes = torch.round(groups / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(2)).flatten(1)
        return cls(codes.to(torch.int8), scale, linear.bias.detach(), bits, group_size)

    @property
    def offset(self) -> int:
        """What makes the codes unsigned: 2, 8 or 128."""
        return 1 << (self.bits - 1)

    def dequantize(self) -> torch.Tensor:
        """fp32 [N, K]."""
        width = self.codes.shape[1] if self.group_size == -1 else self.group_size
        return self.codes.float() * self.scale.repeat_interleave(width, dim=1)[:, : self.codes.shape[1]]

    def float_layer(self) -> SimpleNamespace:
        """`weight` fp32 [N, K] and `bias`, as a proof wants them."""
        return SimpleNamespace(weight=self.dequantize(), bias=self.bias)


Linear = Callable[[nn.Linear], candidates.Candidate]
Gemm = Callable[[Weights, bool], tuple[nn.Module, str]]
Generate = Callable[[nn.Module, torch.dtype, torch.device], Generator]


@dataclass(frozen=True)
class Peer:
    """Another project, and what its adapter can do. A bench that it is in has an adapter, or a reason in `without`.

    Attributes:
        name: as `--candidates` of `bench generate` and `bench peers` call it.
        install: the command that brings it without a second torch.
        module: what is imported; None is a part of torch.
        devices: it takes tensors of.
        label: as rows call it where it is not here; default its name.
        linear: of `bench linear`, by candidate: a float layer of any dtype -> candidate.
        gemm: of `bench gemm`: (weights, tune) -> module that takes x [M, K], and what runs in words.
        generate: of `bench generate`, on a kind of device, by candidate: (fp32 model on the CPU, dtype, device) ->
            candidate.
        without: why it is not in a bench in which one would look for it.
    """

    name: str
    install: str
    module: str | None
    devices: tuple[str, ...] = ("cpu", "cuda")
    label: str | None = None
    linear: Mapping[str, Linear] = field(default_factory=dict)
    gemm: Gemm | None = None
    generate: Callable[[str], Mapping[str, Generate]] | None = None
    without: Mapping[str, str] = field(default_factory=dict)

    def has(self, bench: str) -> bool:
        """Whether there is an adapter for it. `bench`: `linear`, `gemm` or `generate`."""
        return bool(getattr(self, bench))


def missing(peer: Peer, device: str) -> str | None:
    """Why a peer cannot be asked at all on this kind of device, or None."""
    if device not in peer.devices:
        return "runs on a CPU only" if peer.devices == ("cpu",) else f"takes CUDA tensors, not {device}"
    try:
        if peer.module is not None:
            load(peer.module)
    except NotCompared as reason:
        return str(reason)
    return None


def load(name: str):
    """Somebody else's module.

    Raises:
        NotCompared: where it is not installed, or does not import.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao says of each file for another card that it cannot load it
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - somebody else's import may raise anything
        # Its own absence; that of what it needs (`--no-deps`) is a failed import that names it.
        package = name.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and package == (error.name or "").partition(".")[0]
        raise NotCompared("not installed" if absent else f"import failed: {raised(error)}") from error
    finally:
        logging.disable(before)


def raised(error: Exception) -> str:
    """An exception as a reason: its type and its first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# ------------------------------------------------------------------------- layers that a library quantized itself

#: How far dequantized weights may lie from the layer's own, relatively: a step of 2 absmax / (2^bits - 1) per channel
#: or group has 0.4% to 0.9% at 8 bits and 6% to 13% at 4 on normal weights.
_WEIGHT_BOUND = {8: 0.02, 4: 0.2}


def quantized(
    name: str, linear: nn.Linear, module, bits: int, weight_bytes: int, kernel: str, weight: Callable, **more
) -> candidates.Candidate:
    """A candidate for a layer whose codes its library chose: they have to be those of this layer, and y theirs.

    Args:
        name, linear, module, bits, weight_bytes, kernel: as in `Candidate`; `linear` is the float layer.
        weight: () -> its weights dequantized, float [N, K]; called by every proof.
    """

    def prove(x: torch.Tensor, y: torch.Tensor) -> str | None:
        # Two questions, for one bound would have to be that of 4-bit weights, and let in a wrong scale.
        own = weight().double()
        wrong = candidates.proofs.relative(own.t(), linear.weight.double().t(), _WEIGHT_BOUND[bits])
        if wrong is not None:
            return f"weights: {wrong}"
        return candidates.bounded(SimpleNamespace(weight=own, bias=linear.bias), candidates.INT8_BOUND)(x, y)

    return candidates.Candidate(name, module, bits, weight_bytes, prove, kernel, foreign=True, **more)


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, of a subclass's those of the tensors inside it: its own dtype is the one it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names = tensor.__tensor_flatten__()[0]
    return sum(held_bytes(inner) for inner in (getattr(tensor, name) for name in names) if inner is not None)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    return sum(held_bytes(tensor) for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())


def only(linear: nn.Linear, *kinds: torch.dtype) -> None:
    """
    Raises:
        NotCompared: for a layer of another dtype.
    """
    if linear.weight.dtype not in kinds:
        raise NotCompared(f"takes {' and '.join(str(kind).removeprefix('torch.') for kind in kinds)} only")


def named(adapter: Callable, **names: dict) -> dict[str, Callable]:
    """Adapters by candidate, each told its name and its own arguments: `named(f, **{"x int8": {"bits": 8}})`."""
    return {name: functools.partial(adapter, name=name, **more) for name, more in names.items()}
