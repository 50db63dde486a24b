"""The ops that `bench kernels` times, one builder each: the data, who can compute it, the bytes, the proof.

A case is one op at one shape. Its first way is the baseline: torch's float op, or a plain copy where torch has none.
Attention has a page of its own, `kernel_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from dqkernels import backends as registry
from dqkernels import gradients, ops, packing, qmath, reference, straight_through
from dqkernels.bench import floors, proofs, protocol
from dqkernels.bench.candidates import CPU_ROWS, short
from dqkernels.config import DEFAULT_QUANTIZER

Tensors = tuple[torch.Tensor, ...]
Prove = Callable[[Any], str | None]
CPU = torch.device("cpu")
COPY = "torch copy"
#: As `protocol.MAX_ROTATION_BYTES`; less on a CPU, where every case fills its copies anew and memory is slow to get.
ROTATION_BYTES = {"cuda": protocol.MAX_ROTATION_BYTES["cuda"], "cpu": 1 << 26}
#: Plain torch on a GPU is tens of launches a call: a graph of thousands of calls would take longer than the timing.
#: Its rotation ends here, and `rotated_bytes` says how much that is.
_SLOW_COPIES = 64


@dataclass
class Way:
    """One way to compute the op.

    Attributes:
        name: as printed.
        call: inputs -> what the op returns.
        inputs: the tensors that a cold rotation has copies of.
        moved_bytes: read and written at least: each input and each output once.
        prove: what `call` returned -> reason why it is wrong, or None.
        kernel: what runs, in words.
        operations: multiplications and additions of matrix products, at the peak that `peak_bits` names.
        peak_bits: as `bits` of `floors.op_floor`.
        backend: ours: the backend forced; else None.
    """

    name: str
    call: Callable[..., Any]
    inputs: Tensors
    moved_bytes: int
    prove: Prove
    kernel: str
    operations: int = 0
    peak_bits: int = 8
    backend: str | None = None

    def floor(self, peak: floors.Device | None) -> floors.Floor | None:
        """The least time this way can take."""
        return floors.op_floor(peak, self.moved_bytes, self.operations, self.peak_bits)


@dataclass
class Case:
    """One op at one shape, and everything here that can compute it.

    Attributes:
        op: name of the op.
        shape: as the plan gives it.
        variant: `per_token`, `W4`, `causal`, ... or nothing.
        dtype: of the float tensors.
        device: where they are.
        names: backends to try.
        ways: the baseline first.
        absent: what cannot, with its reason.
    """

    op: str
    shape: tuple[int, ...]
    variant: str
    dtype: torch.dtype
    device: torch.device
    names: Sequence[str]
    ways: list[Way] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    _clones: dict[int, list[Tensors]] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Of the weights: 4 of `W4`."""
        return int(self.variant.removeprefix("W"))

    @property
    def width(self) -> int:
        """Bytes of a float element."""
        return self.dtype.itemsize

    @property
    def proves_twice(self) -> bool:
        """A device that is no CPU proves itself against its own reference, and a part of it against the CPU's."""
        return self.device.type != "cpu"

    def row(self) -> dict:
        """What names the case in a record."""
        facts = {"op": self.op, "shape": list(self.shape), "variant": self.variant}
        return {**facts, "dtype": short(self.dtype)}

    def draw(self, *shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        """Normal values of the case's dtype, the same on every device."""
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return (values * scale + shift).to(self.dtype).to(self.device)

    def add_torch(self, name: str, call, inputs: Tensors, moved_bytes: int, prove: Prove, **more) -> None:
        """A float op of torch's."""
        self.ways.append(Way(f"torch {name}", call, inputs, moved_bytes, prove, f"torch {name}", **more))

    def add_copy(self, moved_bytes: int) -> None:
        """`copy_` of as many bytes read and written: what the memory of this device gives in this run."""
        source = torch.arange(-(-moved_bytes // 8), dtype=torch.int32, device=self.device)
        inputs = (source, torch.zeros_like(source))

        def prove(copied: torch.Tensor) -> str | None:
            return proofs.bits(copied, source)

        self.ways.append(Way(COPY, lambda here, there: there.copy_(here), inputs, moved_bytes, prove, "torch copy_"))

    def add_ours(self, op: str, facts: dict, call, inputs: Tensors, moved_bytes: int, prove: Prove, **more) -> None:
        """Every backend that can: `call` takes the inputs and the backend's name.

        Args:
            op: as in `backends.OPS`.
            facts: what a backend judges by.
        """
        for name in self.names:
            ours = f"dqkernels {name}"
            if name == "triton" and self.device.type == "cpu":
                self.absent[ours] = "its interpreter is there to be right, not to be timed"
                continue
            reason = registry.refusal(name, op, self.device.type, facts)
            if reason is not None:
                self.absent[ours] = "has no such op" if reason == f"has no {op}" else reason
                continue
            one = functools.partial(_with_backend, call, name)
            self.ways.append(Way(ours, one, inputs, moved_bytes, prove, name, backend=name, **more))

    def calls(self, way: Way, cold: bool) -> list[protocol.CALL]:
        """What a sampler walks through. Cold: over copies of the inputs, and outputs are kept for a whole rotation,
        so that each call writes to memory of its own, too."""
        if not cold:
            return [functools.partial(way.call, *way.inputs)]
        held = sum(t.numel() * t.element_size() for t in way.inputs)
        count = protocol.copies_for(way.moved_bytes, self.device, held, ROTATION_BYTES)
        if way.backend in registry.SLOW and self.device.type == "cuda":
            count = min(count, _SLOW_COPIES)
        clones = self._clones.setdefault(id(way.inputs), [way.inputs])
        clones += [tuple(t.clone() for t in way.inputs) for _ in range(count - len(clones))]
        kept: list[Any] = [None] * count

        def call(index: int) -> None:
            kept[index] = way.call(*clones[index])

        return [functools.partial(call, index) for index in range(count)]


def _with_backend(call, name: str, *inputs: torch.Tensor):
    return call(*inputs, name)


# ----------------------------------------------------------------------------------------------- proofs


def exact(case: Case, wanted: Callable[[], Any], few: Callable[[Sequence[torch.Tensor]], tuple[Any, Any]]) -> Prove:
    """A proof that every bit is the reference's: `wanted()` on the device itself, computed once.

    Where a case proves twice, `few` takes what a way returned and gives a part of it on the CPU, with what the
    reference gives for that part there.
    """
    whole = functools.cache(lambda: _tuple(wanted()))

    def prove(found) -> str | None:
        found = _tuple(found)
        wrong = proofs.all_bits(found, whole())
        if wrong is None and case.proves_twice:
            wrong = proofs.all_bits(*map(_tuple, few(found)))
        return wrong

    return prove


def _tuple(outputs) -> Tensors:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def some_rows(count: int) -> torch.Tensor:
    """Indices of up to 16 rows, the first and the last among them."""
    return torch.linspace(0, count - 1, min(CPU_ROWS, count)).long().unique()


def _rows_of(outputs: Sequence[torch.Tensor], rows: torch.Tensor) -> Tensors:
    """Those rows on the CPU; an output that is empty (a sum that nobody wanted) stays so."""
    return tuple(t.cpu() if t.numel() == 0 else t[rows.to(t.device)].cpu() for t in outputs)


# ------------------------------------------------------------------------------------- activations


def quantize_activation(case: Case) -> None:
    """[tokens, features] by rows or as a whole; what torch has for it is a copy."""
    m, k = case.shape
    x, mode = case.draw(m, k, seed=1), case.variant
    moved = m * k * (case.width + 1) + 4 * m

    def few(found):
        # The row of the largest value: under per_tensor it carries everybody's scale.
        rows = torch.cat([some_rows(m), x.abs().amax(dim=1).argmax().reshape(1).cpu()])
        return _rows_of(found, rows), qmath.quantize_activation(x[rows.to(x.device)].cpu(), mode)

    prove = exact(case, lambda: qmath.quantize_activation(x, mode), few)
    case.add_copy(moved)
    case.add_ours(
        "quantize_activation",
        {"mode": mode},
        lambda x, name: ops.quantize_activation(x, mode, None, False, None, name),
        (x,),
        moved,
        prove,
    )


def layernorm_quantize(case: Case) -> None:
    """[tokens, features] and a residual, per token; F.layer_norm of their sum."""
    m, k = case.shape
    x, residual = case.draw(m, k, seed=1), case.draw(m, k, seed=2)
    weight, bias = case.draw(k, seed=3, scale=0.2, shift=1.0), case.draw(k, seed=4, scale=0.1)
    facts = {"eps": 1e-5, "mode": "per_token", "clip": None, "act_scale": None, "want_sum": False}

    @functools.cache
    def truth() -> torch.Tensor:
        return F.layer_norm(x.double() + residual.double(), (k,), weight.double(), bias.double(), 1e-5)

    @functools.cache
    def eager() -> torch.Tensor:
        return reference.layernorm_quantize(x, residual, weight, bias, **facts)[0]

    def prove(found) -> str | None:
        y, *quantized = found
        wrong = proofs.within(y, truth(), eager()) or proofs.relative(y, truth(), proofs.FLOAT_BOUND[x.dtype])
        if wrong is not None:
            return f"y: {wrong}"
        # The codes are exact given y.
        wrong = proofs.all_bits(quantized, qmath.quantize_activation(y, "per_token"))
        if wrong is None and case.proves_twice:
            rows = some_rows(m)
            there = qmath.quantize_activation(y[rows.to(y.device)].cpu(), "per_token")
            wrong = proofs.all_bits(_rows_of(quantized, rows), there)
        return wrong

    parameters = 2 * k * case.width
    case.add_torch(
        "layer_norm",
        lambda x, residual: F.layer_norm(x + residual, (k,), weight, bias, 1e-5),
        (x, residual),
        3 * m * k * case.width + parameters,
        lambda y: proofs.relative(y, truth(), proofs.FLOAT_BOUND[case.dtype]),
    )
    moved = m * k * (3 * case.width + 1) + 4 * m + parameters
    case.add_copy(moved)
    case.add_ours(
        "layernorm_quantize",
        {"mode": "per_token"},
        lambda x, residual, name: ops.layernorm_quantize(
            x, residual, weight, bias, 1e-5, "per_token", None, False, None, name
        ),
        (x, residual),
        moved,
        prove,
    )


def gelu_quantize(case: Case) -> None:
    """[tokens, features] per token; F.gelu."""
    m, k = case.shape
    x = case.draw(m, k, seed=1, scale=2.0)

    @functools.cache
    def truth() -> torch.Tensor:
        return F.gelu(x.double())

    def prove(found) -> str | None:
        return proofs.gelu_codes(found, truth(), F.gelu(x.float()), x.dtype)

    case.add_torch(
        "gelu", F.gelu, (x,), 2 * m * k * case.width, lambda y: proofs.relative(y, truth(), proofs.FLOAT_BOUND[x.dtype])
    )
    moved = m * k * (case.width + 1) + 4 * m
    case.add_copy(moved)
    case.add_ours(
        "gelu_quantize",
        {"mode": "per_token"},
        lambda x, name: ops.gelu_quantize(x, "per_token", None, False, None, name),
        (x,),
        moved,
        prove,
    )


# ----------------------------------------------------------------------------------------- weights


def quantize_weight(case: Case) -> None:
    """[out_features, in_features] per channel by the default rule of its width; a copy beside it."""
    (n, k), bits, rule = case.shape, case.bits, DEFAULT_QUANTIZER[case.bits]
    weight = case.draw(n, k, seed=1, scale=k**-0.5)

    def call(weight, name):
        return ops.quantize_weight(weight, bits, rule, "per_channel", -1, None, name)

    facts = {"bits": bits, "quantizer": rule, "granularity": "per_channel", "group_size": -1}
    _add_quantizer(case, "quantize_weight", facts, call, (weight,))


def quantize_by_step(case: Case) -> None:
    """The same by a learned step per row: one pass over the weights, and no search."""
    (n, k), bits, rule = case.shape, case.bits, DEFAULT_QUANTIZER[case.bits]
    weight = case.draw(n, k, seed=1, scale=k**-0.5)
    step = weight.float().abs().mean(dim=1) * {8: 0.04, 4: 0.5, 2: 1.3}[bits]

    def call(weight, step, name):
        return straight_through.quantize_by_step(weight, step, bits, rule, None, name)

    _add_quantizer(case, "quantize_by_step", {"bits": bits}, call, (weight, step))


def _add_quantizer(case: Case, op: str, facts: dict, call, inputs: Tensors) -> None:
    """A copy, and ours: inputs by rows -> packed codes and scales, every bit eager's."""
    n, k = case.shape
    moved = sum(t.nbytes for t in inputs) + n * k * case.bits // 8 + 4 * n

    def few(found):
        rows = some_rows(n)
        wanted = call(*(t[rows.to(t.device)].cpu() for t in inputs), "eager")
        return _rows_of(found, rows), (wanted[0][: len(rows)], *wanted[1:])

    prove = exact(case, lambda: call(*inputs, "eager"), few)
    case.add_copy(moved)
    case.add_ours(op, facts, call, inputs, moved, prove)


def packed_weight(case: Case, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes of the case's width (four_level at 2 bits), packed, and fp32 scales: a weight of about k^-0.5."""
    generator = torch.Generator().manual_seed(9)
    low, high = {8: (-127, 127), 4: (-7, 7), 2: (-2, 1)}[case.bits]
    codes = torch.randint(low, high + 1, (n, k), generator=generator, dtype=torch.int8)
    scale = 0.5 + torch.rand(n, generator=generator)
    return packing.pack(codes.to(case.device), case.bits), (scale * k**-0.5 / 2 ** (case.bits - 1)).to(case.device)


def _format(case: Case) -> dict:
    return {"bits": case.bits, "four_level": case.bits == 2, "group_size": -1}


def dequantize_weight(case: Case) -> None:
    """Packed [out_features, in_features] to fp32; a copy beside it."""
    n, k = case.shape
    qweight, scale = packed_weight(case, n, k)
    format_ = _format(case)
    moved = n * k * case.bits // 8 + 4 * n + 4 * n * k

    def few(found):
        rows = some_rows(n).to(case.device)
        part = reference._pad_rows(qweight[rows]).cpu()
        facts = {**format_, "out_features": len(rows), "in_features": k}
        return _rows_of(found, rows), reference.dequantize(part, scale[rows].cpu(), None, **facts)

    facts = {**format_, "out_features": n, "in_features": k}
    prove = exact(case, lambda: reference.dequantize(qweight, scale, None, **facts), few)
    case.add_copy(moved)
    case.add_ours(
        "dequantize_weight",
        {"bits": case.bits, "group_size": -1},
        lambda qweight, scale, name: ops.dequantize_weight(qweight, scale, None, *format_.values(), n, k, name),
        (qweight, scale),
        moved,
        prove,
    )


def qembedding(case: Case) -> None:
    """tokens ids into a packed [num_embeddings, embedding_dim]; F.embedding of the same rows in float."""
    tokens, n, k = case.shape
    qweight, scale = packed_weight(case, n, k)
    format_ = _format(case)
    ids = torch.randint(0, n, (tokens,), generator=torch.Generator().manual_seed(5)).to(case.device)
    facts = {**format_, "embedding_dim": k, "embed_scale": 1.0, "out_dtype": case.dtype}
    table = reference.dequantize(qweight, scale, None, **format_, out_features=n, in_features=k).to(case.dtype)

    def few(found):
        at = some_rows(tokens)
        there = (t.cpu() for t in (ids[at.to(ids.device)], qweight, scale))
        return _rows_of(found, at), reference.qembedding(*there, None, None, **facts)

    prove = exact(case, lambda: reference.qembedding(ids, qweight, scale, None, None, **facts), few)
    written = tokens * (8 + k * case.width)
    wanted = functools.cache(lambda: table[ids])
    case.add_torch(
        "embedding", F.embedding, (ids, table), written + tokens * k * case.width, lambda y: proofs.bits(y, wanted())
    )
    moved = written + tokens * (k * case.bits // 8 + 4)
    case.add_copy(moved)
    case.add_ours(
        "qembedding",
        {"bits": case.bits},
        lambda ids, qweight, scale, name: ops.qembedding(
            ids, qweight, scale, None, None, *format_.values(), n, k, 1.0, case.dtype, name
        ),
        (ids, qweight, scale),
        moved,
        prove,
    )


# ---------------------------------------------------------------------------------------- backward


def _product(case: Case, left: torch.Tensor, right: torch.Tensor, terms: int) -> Prove:
    """A proof that y is `left . right` (float64) but for the roundings of a 16-bit product with fp32 sums.

    One rounding of an operand, one of the output, and the sum of `terms` products, all against the sum of magnitudes;
    and `proofs.relative`, which would see a lost block of terms.
    """

    @functools.cache
    def truth() -> tuple[torch.Tensor, torch.Tensor]:
        roundings = 2 * proofs.UNIT_ROUNDOFF[case.dtype] + (terms + 2) * 2.0**-24
        return left @ right, (left.abs() @ right.abs()) * roundings + 2.0**-24

    def prove(y: torch.Tensor) -> str | None:
        wanted, allowed = truth()
        if y.shape != wanted.shape or y.dtype != case.dtype:
            return f"gives {y.dtype} {list(y.shape)}, wanted {case.dtype} {list(wanted.shape)}"
        wrong = proofs.bounded(y.double() - wanted, allowed)
        return wrong or proofs.relative(y, wanted, proofs.FLOAT_BOUND[case.dtype])

    return prove


def qlinear_grad_input(case: Case) -> None:
    """grad [tokens, out_features] times the packed weight; torch.matmul with that weight in float."""
    m, n, k = case.shape
    qweight, scale = packed_weight(case, n, k)
    format_ = _format(case)
    grad = case.draw(m, n, seed=6)
    weight = reference.dequantize(qweight, scale, None, **format_, out_features=n, in_features=k)
    prove = _product(case, grad.double(), weight.double(), n)
    peak = {"operations": floors.gemm_ops(m, n, k), "peak_bits": 8 * case.width}
    floats = (grad, weight.to(case.dtype))
    case.add_torch("matmul", torch.matmul, floats, (m * n + n * k + m * k) * case.width, prove, **peak)
    case.add_ours(
        "grad_input",
        {"bits": case.bits, "group_size": -1},
        lambda grad, qweight, scale, name: gradients.qlinear_grad_input(
            grad, qweight, scale, None, None, *format_.values(), k, case.dtype, name
        ),
        (grad, qweight, scale),
        (m * n + m * k) * case.width + n * k * case.bits // 8 + 4 * n,
        prove,
        **peak,
    )


def qlinear_grad_weight(case: Case) -> None:
    """grad [tokens, out_features] transposed times the int8 input [tokens, in_features]; torch.matmul in float."""
    m, n, k = case.shape
    grad = case.draw(m, n, seed=6)
    q, scale, _ = qmath.quantize_activation(case.draw(m, k, seed=7), "per_token")
    x = q.float() * scale.unsqueeze(1)
    prove = _product(case, grad.double().t(), x.double(), m)
    peak = {"operations": floors.gemm_ops(m, n, k), "peak_bits": 8 * case.width}
    floats = (grad, x.to(case.dtype))
    bytes_ = (m * n + m * k + n * k) * case.width
    case.add_torch("matmul", lambda grad, x: torch.matmul(grad.t(), x), floats, bytes_, prove, **peak)
    case.add_ours(
        "grad_weight",
        {},
        lambda grad, q, scale, name: gradients.qlinear_grad_weight(grad, q, scale, case.dtype, name),
        (grad, q, scale),
        (m * n + n * k) * case.width + m * k + 4 * m,
        prove,
        **peak,
    )
