"""The attention cases of `bench kernels`: ours on codes, torch's `scaled_dot_product_attention` on floats.

Shapes are BART's: head_dim 64, and tensors laid out as its projections leave them, [batch, tokens, heads, head_dim]
transposed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dqkernels import gradients, ops, qmath, reference
from dqkernels.bench import proofs
from dqkernels.bench.kernel_cases import CPU, Case, some_rows


def qattention(case: Case) -> None:
    """[batch, heads, queries, keys, head_dim], all keys visible or `causal`; SDPA on the same q, k, v."""
    batch, heads, queries, keys, dim = case.shape
    causal, scale = case.variant == "causal", dim**-0.5
    q, k, v = (
        case.draw(batch, tokens, heads, dim, seed=seed).transpose(1, 2)
        for seed, tokens in enumerate((queries, keys, keys))
    )
    visible = torch.ones(queries, keys, dtype=torch.bool, device=case.device)
    visible = visible.tril(keys - queries) if causal else visible

    def check(y, at: int, rows: torch.Tensor, device: torch.device) -> str | None:
        """Sequence `at` and its query rows, quantized and computed on `device`."""
        quantized = []
        for x in (q[at][:, rows.to(q.device)].float() * scale, k[at], v[at]):
            quantized += qmath.quantize_activation(x.to(device), "per_token")[:2]
        quantized[5] = reference.value_scale(quantized[4], quantized[5])
        seen = visible[rows.to(visible.device)].to(device)
        return proofs.attention(y[at][:, rows.to(y.device)].to(device), *quantized, seen)

    def prove(y: torch.Tensor) -> str | None:
        wrong = _misfit(y, q)
        for one in range(batch):
            wrong = wrong or check(y, one, torch.arange(queries), case.device)
        if wrong is None and case.proves_twice:
            wrong = check(y, batch - 1, some_rows(queries), CPU)
        return wrong

    pairs = int(visible.sum())
    work = {"operations": 4 * batch * heads * pairs * dim}
    moved = 2 * batch * heads * (queries + keys) * dim * case.width
    _add_sdpa(case, (q, k, v), moved, causal, visible, **work)
    case.add_ours(
        "qattention",
        {"mode": "per_token", "head_dim": dim},
        lambda q, k, v, name: ops.qattention(q, k, v, None, None, causal, scale, "per_token", None, name),
        (q, k, v),
        moved,
        prove,
        **work,
    )


def qattention_backward(case: Case) -> None:
    """Gradients of q, k, v: [batch, heads, queries, keys, head_dim]; torch's five float products, not fused.

    SDPA's own backward pass cannot be called without its forward, and would be timed with it.
    """
    batch, heads, queries, keys, dim = case.shape
    causal, scale = case.variant == "causal", dim**-0.5
    counts = (queries, keys, keys, queries)
    q, k, v, grad = (
        case.draw(batch, tokens, heads, dim, seed=seed).transpose(1, 2) for seed, tokens in enumerate(counts)
    )
    codes = []
    for x in (q.float() * scale, k, v):
        codes += qmath.quantize_activation(x, "per_token")[:2]
    codes[5] = reference.value_scale(codes[4], codes[5])
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=case.device).tril(keys - queries).logical_not()

    def unfused(grad, q, k, v):
        score = (q * scale) @ k.mT
        p = (score.masked_fill(hidden, float("-inf")) if causal else score).softmax(dim=-1)
        product = grad @ v.mT
        score = p * (product - (product * p).sum(dim=-1, keepdim=True))
        return (score @ k) * scale, score.mT @ (q * scale), p.mT @ grad

    def near(found, wanted, bound: float) -> str | None:
        for name, got, truth in zip(("dQ", "dK", "dV"), found, wanted, strict=True):
            if got.dtype != case.dtype:
                return f"{name} is {got.dtype}, wanted {case.dtype}"
            wrong = proofs.relative(got, truth, bound)
            if wrong is not None:
                return f"{name}: {wrong}"
        return None

    def prove_float(found) -> str | None:
        # Softmax, dS and the products are rounded to 16 bits one after the other.
        wanted = unfused(*(x.double() for x in (grad, q, k, v)))
        return near(found, wanted, 4 * proofs.FLOAT_BOUND[case.dtype])

    def prove(found) -> str | None:
        facts = {"causal": causal, "softmax_scale": scale, "want_bias": False}
        wanted = reference.qattention_backward(
            grad, *codes, *(None,) * 5, **facts, out_dtype=torch.float64, compute_dtype=torch.float64
        )
        return near(found[:3], wanted[:3], 4 * proofs.FLOAT_BOUND[case.dtype])

    pairs = queries * keys if not causal else int(hidden.logical_not().sum())
    work = {"operations": 10 * batch * heads * pairs * dim, "peak_bits": 8 * case.width}
    moved = batch * heads * dim * case.width * (2 * queries + 2 * keys)  # grad and dQ, dK and dV
    floats = batch * heads * dim * case.width * (queries + 2 * keys)
    case.add_torch("unfused", unfused, (grad, q, k, v), moved + floats, prove_float, **work)
    case.add_ours(
        "qattention_backward",
        {"head_dim": dim},
        lambda grad, *rest: gradients.qattention_backward(
            grad, *rest[:-1], *(None,) * 5, causal, scale, False, case.dtype, rest[-1]
        ),
        (grad, *codes),
        moved + batch * heads * (dim + 4) * (queries + 2 * keys),
        prove,
        **work,
    )


def qattention_decode(case: Case) -> None:
    """One query per beam: [sequences, beams, heads, keys, head_dim] over caches that the beams of a sequence share.

    SDPA gets 16-bit (or wider) caches repeated per beam, as beam search in transformers holds them.
    """
    sequences, beams, heads, keys, dim = case.shape
    rows, scale = sequences * beams, dim**-0.5
    q = case.draw(rows, heads, 1, dim, seed=0)
    k, v = (case.draw(sequences, heads, keys, dim, seed=seed) for seed in (1, 2))
    k8, k_scale, _ = qmath.quantize_activation(k, "per_token")
    v8, v_scale, _ = qmath.quantize_activation(v, "per_token")
    v_scale = reference.value_scale(v8, v_scale)
    lengths = torch.full((rows,), keys, dtype=torch.int32, device=case.device)
    source = torch.arange(sequences, dtype=torch.int32, device=case.device).repeat_interleave(beams)
    visible = torch.ones(1, keys, dtype=torch.bool, device=case.device)

    def check(y, one: int, device: torch.device) -> str | None:
        """All beams of sequence `one`, their queries in a row."""
        of = slice(one * beams, (one + 1) * beams)
        q8, q_scale, _ = qmath.quantize_activation((q[of].float() * scale).to(device), "per_token")
        caches = (t[one].to(device) for t in (k8, k_scale, v8, v_scale))
        q8, q_scale, found = (t.transpose(0, 1).flatten(1, 2) for t in (q8, q_scale, y[of].to(device)))
        return proofs.attention(found, q8, q_scale, *caches, visible.to(device))

    def prove(y: torch.Tensor) -> str | None:
        wrong = _misfit(y, q)
        for one in range(sequences):
            wrong = wrong or check(y, one, case.device)
        if wrong is None and case.proves_twice:
            wrong = check(y, sequences - 1, CPU)
        return wrong

    work = {"operations": 4 * rows * heads * keys * dim}
    floats = (q, *(t.repeat_interleave(beams, dim=0) for t in (k, v)))
    _add_sdpa(case, floats, 2 * rows * heads * (1 + keys) * dim * case.width, False, visible, **work)
    moved = 2 * sequences * heads * keys * (dim + 4) + 2 * rows * heads * dim * case.width
    case.add_copy(moved)
    case.add_ours(
        "qattention_decode",
        {"mode": "per_token", "head_dim": dim},
        lambda q, k8, k_scale, v8, v_scale, name: ops.qattention_decode(
            q, k8, k_scale, v8, v_scale, lengths, source, None, False, scale, "per_token", None, name
        ),
        (q, k8, k_scale, v8, v_scale),
        moved,
        prove,
        **work,
    )


def _misfit(y: torch.Tensor, q: torch.Tensor) -> str | None:
    if y.shape == q.shape and y.dtype == q.dtype:
        return None
    return f"gives {y.dtype} {list(y.shape)}, wanted {q.dtype} {list(q.shape)}"


def _add_sdpa(case: Case, inputs, moved: int, causal: bool, visible: torch.Tensor, operations: int) -> None:
    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def prove(y: torch.Tensor) -> str | None:
        q, k, v = inputs
        wrong = _misfit(y, q)
        for one in range(len(q)):  # a sequence at a time: the scores are float64
            score = (q[one].double() @ k[one].double().mT) * q.shape[-1] ** -0.5
            truth = score.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v[one].double()
            wrong = wrong or proofs.relative(y[one], truth, proofs.FLOAT_BOUND[case.dtype])
            if wrong is not None:
                break
        return wrong

    case.add_torch("sdpa", call, inputs, moved, prove, operations=operations, peak_bits=8 * case.width)
