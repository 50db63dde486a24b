"""The case of `bench kernels` for `fused.qlinear_multi`: a LayerNorm and the projections of Q, K and V behind it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from dqkernels import fused, packing, qmath, reference
from dqkernels.bench import proofs
from dqkernels.bench.kernel_cases import Case, _format, _rows_of, packed_weight, some_rows

_PARTS = 3


def qlinear_multi(case: Case) -> None:
    """tokens through a norm into three linears [out_features, in_features]; F.layer_norm and one F.linear of all."""
    m, n, k = case.shape
    x = case.draw(m, k, seed=1)
    norm = (case.draw(k, seed=3, scale=0.2, shift=1.0), case.draw(k, seed=4, scale=0.1), 1e-5)
    format_ = _format(case)
    rows = packing.padded_n(n)  # a part's padding holds codes as well: nobody may notice
    packed, scale = packed_weight(case, _PARTS * rows, k)

    def parts_of(packed, scale):
        return [(packed[i * rows : i * rows + rows], scale[i * rows : i * rows + n]) for i in range(_PARTS)]

    parts = parts_of(packed, scale)
    bias = case.draw(_PARTS * n, seed=5, scale=0.1)
    biases = list(bias.split(n))
    facts = {**format_, "out_features": n, "activation": "none", "out_dtype": case.dtype}
    float_weight = torch.cat(
        [reference.dequantize(w, s, None, **format_, out_features=n, in_features=k) for w, s in parts]
    ).to(case.dtype)

    @functools.cache
    def truth() -> torch.Tensor:
        return F.layer_norm(x.double(), (k,), norm[0].double(), norm[1].double(), norm[2])

    @functools.cache
    def eager() -> torch.Tensor:
        return F.layer_norm(x, (k,), *norm)

    def prove(found) -> str | None:
        y, *outputs = found
        wrong = proofs.within(y, truth(), eager()) or proofs.relative(y, truth(), proofs.FLOAT_BOUND[x.dtype])
        if wrong is not None:
            return f"y: {wrong}"
        # Given y everything is exact.
        wrong = proofs.all_bits(outputs, wanted(y))
        if wrong is None and case.proves_twice:
            rows = some_rows(m)
            wrong = proofs.all_bits(_rows_of(outputs, rows), wanted(y[rows.to(y.device)].cpu()))
        return wrong

    def wanted(y: torch.Tensor) -> list[torch.Tensor]:
        q, steps, _ = qmath.quantize_activation(y, "per_token")
        return [
            reference.qgemm(q, steps, None, *(t.to(y.device) for t in one), None, b.to(y.device), None, **facts)
            for one, b in zip(parts, biases, strict=True)
        ]

    def float_truth() -> torch.Tensor:
        return F.linear(truth(), float_weight.double(), bias.double())

    moved_x, moved_y = 2 * m * k * case.width, _PARTS * n * (m + 1) * case.width
    case.add_torch(
        "unfused",
        lambda x, weight: F.linear(F.layer_norm(x, (k,), *norm), weight, bias),
        (x, float_weight),
        moved_x + moved_y + float_weight.numel() * case.width,
        lambda y: proofs.relative(y, float_truth(), 4 * proofs.FLOAT_BOUND[case.dtype]),
        operations=2 * m * _PARTS * n * k,
        peak_bits=16 if case.width == 2 else 32,
    )

    def ours(x, packed, scale, name):
        qweight, scales = map(list, zip(*parts_of(packed, scale), strict=True))
        lists = (qweight, scales, [None] * _PARTS, biases)
        rest = ([n] * _PARTS, "per_token", None, None, "none", case.dtype)
        return fused.qlinear_multi(x, *norm, *lists, *format_.values(), *rest, name)

    case.add_ours(
        "qgemm",  # where there is no kernel for all, there is one for its steps
        {"bits": case.bits, "group_size": -1, "many_rows": m > 64},
        ours,
        (x, packed, scale),
        moved_x + moved_y + sum(w.numel() + 4 * n for w, _ in parts),
        prove,
        operations=2 * m * _PARTS * n * k,
    )
