"""What can compute a linear layer here, and the proof each candidate owes before it is timed.

A candidate of ours has to be bit-equal to the reference on the data it is timed on. A float peer has to stay
within a rounding bound of the float64 layer, an int8 peer within the error of 8-bit codes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dqkernels import backends as registry
from dqkernels import ops, packing, qmath, reference
from dqkernels.bench import proofs, protocol
from dqkernels.config import DQConfig
from dqkernels.nn import QLinear

#: Rows a CPU recomputes when the device under test proved itself against its own reference.
CPU_ROWS = 16
#: Relative error of int8 peers to the float64 layer: codes of one scale per tensor stay below 3% on such data.
INT8_BOUND = 0.03


@dataclass
class Candidate:
    """One way to compute the layer.

    Attributes:
        name: as printed.
        module: x -> y.
        bits: of its weights.
        weight_bytes: of one copy.
        prove: (x, y) -> reason why it does not compute the layer, or None.
        kernel: what runs, in words.
        backend: ours: the backend forced; else None.
        group_size: of its weights; -1 is one scale per output channel.
        least_tokens: fewer rows of x are not supported.
        bind: (module, x) -> the call that is timed.
        foreign: somebody else's package: where it raises it is not compared.
        clone: a copy of the module with weights of its own.
    """

    name: str
    module: Callable[[torch.Tensor], torch.Tensor]
    bits: int
    weight_bytes: int
    prove: Callable[[torch.Tensor, torch.Tensor], str | None]
    kernel: str
    backend: str | None = None
    group_size: int = -1
    least_tokens: int = 0
    bind: Callable[..., protocol.CALL] = functools.partial
    foreign: bool = False
    clone: Callable = lambda module: _clone(module)  # noqa: E731 - stands below

    def absent(self, tokens: int) -> str | None:
        """Why so few rows are not supported, or None."""
        return None if tokens >= self.least_tokens else f"takes {self.least_tokens} rows and more, x has {tokens}"


class IntMM(nn.Module):
    """What one writes by hand today: per-token int8, `torch._int_mm`, the two scales, the bias."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        quantized = qmath.quantize_weight(linear.weight, DQConfig(weight_bits=8).for_linear(""))
        self.codes, self.scale = nn.Parameter(quantized.codes.t(), requires_grad=False), quantized.scale
        self.bias = linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale = quantized_by_hand(x)
        return (torch._int_mm(q, self.codes) * scale * self.scale + self.bias).to(x.dtype)


def quantized_by_hand(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and fp32 scales [..., 1] per token, in plain torch."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).float()
    return torch.round(x / scale).clamp_(-127, 127).to(torch.int8), scale


# ------------------------------------------------------------------------------------------- proofs


def exact(module: QLinear, cpu_columns: int | None = None) -> Callable[[torch.Tensor, torch.Tensor], str | None]:
    """A proof that y is bit for bit what the reference computes from the module's own packed weights.

    `cpu_columns`: the CPU recomputes about so many of the last output columns, not all of them.
    """

    def prove(x: torch.Tensor, y: torch.Tensor) -> str | None:
        wrong = proofs.bits(y, _expected(module, x, x.device))
        if wrong is None and x.device.type != "cpu":
            wrong = proof_on_cpu(module, x, y, cpu_columns)
        return wrong

    return prove


def proof_on_cpu(module: QLinear, x: torch.Tensor, y: torch.Tensor, columns: int | None = None) -> str | None:
    """Whether a few rows of y are what the CPU computes; checks the device's reference too.

    Rows are independent of each other, and so are columns: `columns` takes about so many of the last ones.
    """
    rows = torch.linspace(0, x.shape[0] - 1, min(CPU_ROWS, x.shape[0])).long().to(x.device)
    first = 0 if columns is None else max(0, module.out_features - columns)
    first -= first % packing.BLOCK_N  # packed rows come in blocks
    return proofs.bits(y[rows, first:].cpu(), _expected(module, x[rows], torch.device("cpu"), first))


def _expected(module: QLinear, x: torch.Tensor, device: torch.device, first: int = 0) -> torch.Tensor:
    layer = module.layer
    parts = (module.qweight, module.weight_scale, module.group_mult, module.bias)
    qweight, weight_scale, group_mult, bias = (None if t is None else t[first:].to(device) for t in parts)
    q, scale, row_sum = qmath.quantize_activation(x.to(device), layer.act_granularity, want_sum=True)
    return reference.qgemm(
        q,
        scale,
        row_sum,
        qweight,
        weight_scale,
        group_mult,
        bias,
        None,
        bits=layer.bits,
        four_level=layer.four_level,
        group_size=layer.group_size,
        out_features=module.out_features - first,
        activation="none",
        out_dtype=x.dtype,
    )


def bounded(linear: nn.Linear, bound: float) -> Callable[[torch.Tensor, torch.Tensor], str | None]:
    """A proof that y is the float layer's output within a relative error, as a whole and in every column."""

    def prove(x: torch.Tensor, y: torch.Tensor) -> str | None:
        return proofs.relative(y, float64_layer(linear, x), bound)

    return prove


def float64_layer(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64."""
    return x.double() @ linear.weight.detach().double().t() + linear.bias.detach().double()


# --------------------------------------------------------------------------------------- candidates


def make_linear(n: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Linear:
    """A random float layer, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(k, n, device="meta", dtype=dtype).to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n, k, generator=generator) * k**-0.5)
        linear.bias.copy_(torch.randn(n, generator=generator) * 0.1)
    return linear.requires_grad_(False).to(device)


class Contest:
    """A float layer and what can compute it; `linear.Layer` and `gemm.Decode` fill it.

    Attributes:
        key: ((out_features, in_features), dtype).
        linear: the float layer.
        found: what can be timed.
        absent: what cannot, with its reason.
    """

    def __init__(self, linear: nn.Linear):
        self.key = (tuple(linear.weight.shape), linear.weight.dtype)
        self.linear = linear
        self.found: list[Candidate] = []
        self.absent: dict[str, str] = {}
        self._copies: dict[str, list] = {}

    def copies(self, one: Candidate) -> list:
        """The candidate's module and as many clones as a cold rotation needs."""
        if one.name not in self._copies:
            count = protocol.copies_for(one.weight_bytes, self.linear.weight.device)
            self._copies[one.name] = [one.module] + [one.clone(one.module) for _ in range(count - 1)]
        return self._copies[one.name]

    def _add(self, one: Candidate) -> None:
        self.found.append(one)

    def _add_float(self, linear: nn.Linear, **more) -> None:
        dtype, weight_bytes = linear.weight.dtype, linear.weight.nbytes
        proof = bounded(linear, proofs.FLOAT_BOUND[dtype])
        bits = 8 * dtype.itemsize
        self._add(Candidate(f"torch {short(dtype)}", linear, bits, weight_bytes, proof, "torch.nn.Linear", **more))

    def _add_backends(self, packed: QLinear, names: Sequence[str] | None, **more) -> None:
        """Those named; by default the device's own, of which the slow ones run only where nothing else does."""
        asked, count = names, len(self.found)
        if asked is None:
            order = registry.ORDER.get(self.linear.weight.device.type, ("eager",))
            asked = [name for name in order if name not in registry.SLOW]
        for name in asked:
            self._add_backend(packed, name, **more)
        if names is None and len(self.found) == count:
            for name in registry.SLOW:
                self._add_backend(packed, name, **more)

    def _add_backend(self, packed: QLinear, backend: str, cpu_columns: int | None = None, **more) -> None:
        layer = packed.layer
        name = f"dqkernels {format_words(layer.bits, layer.group_size)} {backend}"
        device = self.linear.weight.device.type
        try:
            choices = ops.choose_qlinear(device, layer.bits, layer.group_size, "per_token", backend)
        except registry.BackendError as error:
            self.absent[name] = str(error)
            return
        kernel = "+".join(dict.fromkeys(c.backend for c in choices if c is not None))
        module = copy.copy(packed)
        module.backend = backend
        proof = exact(module, cpu_columns)
        more = {"backend": backend, "group_size": layer.group_size, **more}
        self._add(Candidate(name, module, layer.bits, packed.packed_bytes(), proof, kernel, **more))

    def _add_int_mm(self) -> None:
        (n, k), weight = self.linear.weight.shape, self.linear.weight
        if weight.is_cuda and (n % 8 or k % 8):
            self.absent["torch _int_mm"] = "on CUDA it takes N and K divisible by 8"
            return
        proof, kernel = bounded(self.linear, INT8_BOUND), "eager quantizer, torch._int_mm"
        least = 17 if weight.is_cuda else 0  # so says torch, on CUDA
        self._add(Candidate("torch _int_mm", IntMM(self.linear), 8, n * k, proof, kernel, least_tokens=least))


def _clone(module: nn.Module) -> nn.Module:
    """A copy with its own weights: what the cold rows walk through. Cheap: there may be a thousand."""
    if next(module.children(), None) is not None:
        return copy.deepcopy(module)
    new = copy.copy(module)
    new._parameters = {
        name: p if p is None else nn.Parameter(p.detach().clone(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    new._buffers = {name: b if b is None else b.clone() for name, b in module._buffers.items()}
    return new


def format_words(bits: int, group_size: int = -1) -> str:
    """`W4`, or `W4g64` with a multiplier per 64 weights of a row."""
    return f"W{bits}" + (f"g{group_size}" if group_size != -1 else "")


def short(dtype: torch.dtype) -> str:
    """`fp32`, `fp16`, `bf16`."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
