"""Decode attention's cases: options covered pairwise, inputs, and the arguments of the simulator's program."""

from __future__ import annotations

import random
from types import SimpleNamespace

import harness
import numpy as np
import oracle_attention
import pairwise
import torch
import triton_checks_attention as attention
from skinny_cases import CODES, DTYPES, MODES, from_raw, raw

FORMS = {"rule": 0, "keep": 1, "redo": 2}
VALUES = {
    "form": ("rule", "keep", "redo", "split 2", "split 3"),
    "rows": (1, 2, 5, 9, 19),
    "caches": (1, 3),
    "heads": (1, 2),
    "queries": (1, 2, 5, 9, 17),
    "keys": (1, 31, 32, 33, 64, 97, 150),
    "spare": (0, 1, 70),  # of the capacity, behind the last key
    "head_dim": (64, 128, 32, 80, 4, 20, 100),
    "source": ("none", "beams", "one", "by key", "lost"),
    "lengths": ("full", "random", "short"),
    "bias": (None, "heads", "keys"),
    "causal": (False, True),
    "mode": ("per_token", "per_tensor"),
    "clip": (None, 2.5),
    "dtype": ("fp16", "bf16", "fp32"),
    "layout": ("contiguous", "transposed", "shared rows"),
    "aligned": (True, False),
    "values": ("normal", "zeros", "not finite"),
    "warps": (0, 1, 3),
}


def allowed(row: dict) -> bool:
    """What no launch takes: more splits than there are tiles of keys, kept scores of rows that 16-byte loads cannot
    read; and what would take the simulator long."""
    keys, spare, form = row.get("keys", 150), row.get("spare", 70), row.get("form", "rule")
    head_dim, aligned = row.get("head_dim", 64), row.get("aligned", True)
    if form == "keep" and (head_dim % 16 or not aligned):
        return False
    tiles, splits = -(-(keys + spare) // 32), int(form[-1]) if form.startswith("split") else 1
    if (splits - 1) * -(-tiles // splits) >= tiles:
        return False
    if row.get("rows", 1) * row.get("queries", 1) * row.get("heads", 1) > 100:
        return False
    return not (row.get("rows", 1) * row.get("queries", 1) > 40 and keys > 64)


def cases() -> list[SimpleNamespace]:
    """The covering rows; `name` tells them apart."""
    found = []
    for index, row in enumerate(pairwise.covering(VALUES, allowed)):
        case = SimpleNamespace(**row, seed=index)
        case.name = (
            f"{index}: {case.form} {case.rows}x{case.heads}x{case.queries} on {case.keys} d{case.head_dim} "
            f"{case.source} {case.dtype}"
        )
        found.append(case)
    return found


def plain(rows, heads, queries, keys, head_dim, **more) -> SimpleNamespace:
    """A case by hand."""
    facts = {
        **{"form": "rule", "caches": rows, "spare": 0, "source": "none", "lengths": "full", "bias": None},
        **{"causal": False, "mode": "per_token", "clip": None, "dtype": "fp16", "layout": "contiguous"},
        **{"aligned": True, "values": "normal", "warps": 0, "seed": 7, "sms": 4},
        **more,
    }
    name = f"{facts['form']} {rows}x{heads}x{queries} on {keys} d{head_dim} {facts['source']}"
    return SimpleNamespace(rows=rows, heads=heads, queries=queries, keys=keys, head_dim=head_dim, name=name, **facts)


def build(case) -> SimpleNamespace:
    """Tensors of the op by name, `facts` (its other arguments), and which sources are no cache."""
    draw, g = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    dtype, capacity = DTYPES[case.dtype], case.keys + case.spare
    caches = case.rows if case.source == "none" else case.caches
    _, k, v = attention.qkv(case.seed, caches, case.heads, 1, case.keys, case.head_dim, "cpu", torch.float32)
    q = torch.randn(case.rows, case.heads, case.queries, case.head_dim, generator=g).to(dtype)
    if case.values == "zeros":
        q[-1, -1], k[0, 0, -1], v[-1, :, case.keys // 2] = 0, 0, 0
    elif case.values == "not finite":
        q[0, -1, -1, 2], k[-1, 0, -1, 1], v[0, -1, case.keys // 2, 0] = float("inf"), float("nan"), float("-inf")
    if case.layout == "transposed":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif case.layout == "shared rows":
        q = q[:1].expand(q.shape)
    cache = attention.cache_of(k, v, capacity, case.mode, case.clip)
    lengths = {"full": [case.keys] * case.rows, "random": [draw.randint(0, case.keys) for _ in range(case.rows)]}
    lengths = lengths.get(case.lengths, [0] + [max(1, case.keys // 3)] * (case.rows - 1))
    source = None
    if case.source in ("beams", "lost"):
        source = torch.tensor([draw.randrange(caches) for _ in range(case.rows)])
    elif case.source == "one":
        source = torch.full((case.rows,), caches - 1)
    elif case.source == "by key":
        source = attention.ancestors(g, case.rows, caches, capacity)
        behind = torch.arange(capacity) >= torch.tensor(lengths)[:, None]
        source = torch.where(behind, torch.randint(-9, 99, source.shape, generator=g), source)
    known = source
    if case.source == "lost":
        source = source.clone()
        source[::3] = torch.tensor([-1, caches, 1 << 30])[torch.arange(len(source[::3])) % 3]
    bias = attention.bias_of(case.bias or "none", g, case.heads, case.queries, capacity, "cpu")
    names = ("k_cache", "k_scale", "v_cache", "v_scale")
    operands = {"q": q, **dict(zip(names, cache, strict=True)), "lengths": torch.tensor(lengths, dtype=torch.int32)}
    operands |= {"source": None if source is None else source.int(), "bias": bias}
    facts = {"causal": case.causal, "softmax_scale": case.head_dim**-0.5, "mode": case.mode, "clip": case.clip}
    lost = torch.zeros(case.rows, dtype=torch.bool)
    if case.source == "lost":
        lost[::3] = True
    return SimpleNamespace(case=case, operands=operands, facts=facts, known=known, lost=lost)


def assert_right(built, out: torch.Tensor) -> int:
    """The oracle's result within its bound on what exp may flip, NaN in rows without a cache; the possible flips."""
    o, case = built.operands, built.case
    rows, heads, queries, head_dim = o["q"].shape
    scaled = attention.wide(o["q"]) * np.float32(head_dim**-0.5)
    with np.errstate(all="ignore"):
        q8, qs = oracle_attention.quantize(scaled, case.mode, case.clip)
    cache = [o[name].numpy() for name in ("k_cache", "k_scale", "v_cache", "v_scale")]
    source = list(range(rows)) if built.known is None else built.known.tolist()
    k8, ks, v8, vs = attention.gathered(cache, o["lengths"].tolist(), source)
    last = o["lengths"].numpy()[:, None] - (queries - 1 - np.arange(queries) if case.causal else np.zeros(queries, int))
    seen = np.arange(k8.shape[2]) < last[:, None, :, None]
    seen = np.broadcast_to(seen, (rows, heads, queries, k8.shape[2]))
    bias = None if o["bias"] is None else attention.wide(o["bias"].expand(seen.shape))
    got, lost = attention.wide(out).copy(), built.lost.numpy()
    assert np.isnan(got[lost]).all(), f"{case.name}: a row without a cache is not NaN"
    at = np.flatnonzero(~lost)
    if not len(at):
        return 0
    bias = bias if bias is None else bias[at]
    _, flips = oracle_attention.assert_attention(
        got[at], q8[at], qs[at], k8[at].astype(np.int64), ks[at], v8[at].astype(np.int64), vs[at], seen[at], bias,
        {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[case.dtype], case.name,
    )  # fmt: skip
    return flips


def arguments(built) -> tuple[list, list[harness.Buffer]]:
    """The program's scalars, and its buffers up to `out`."""
    o, case = built.operands, built.case
    rows, heads, queries, head_dim = o["q"].shape
    caches, _, capacity, _ = o["k_cache"].shape
    bias, bias_strides = o["bias"], (0, 0, 0, 0)
    if bias is not None:
        bias_strides = bias.expand(rows, heads, queries, capacity).stride()
    splits = int(case.form[-1]) if case.form.startswith("split") else 0
    scalars = [
        *(CODES[case.dtype], rows, heads, queries, head_dim, caches, capacity, *o["q"].stride()[:3]),
        *(int(case.aligned), int(o["source"] is not None and o["source"].dim() == 1), int(case.source == "by key")),
        *(CODES["fp32" if bias is None or bias.dtype == torch.float32 else "bf16"], *bias_strides, int(case.causal)),
        *(float(np.float32(head_dim**-0.5)), MODES[case.mode], float(case.clip or 0.0), FORMS.get(case.form, 2)),
        *(splits, case.warps, getattr(case, "sms", 4)),
    ]
    reach = o["q"].untyped_storage().size() // o["q"].element_size() - o["q"].storage_offset()
    memory = o["q"].as_strided((reach,), (1,))
    offset = 0 if case.aligned else 4
    given = [
        harness.given(raw(memory)),
        *(harness.given(o["k_cache"].numpy(), offset), harness.given(o["k_scale"].numpy())),
        *(harness.given(o["v_cache"].numpy(), offset), harness.given(o["v_scale"].numpy())),
        harness.given(o["lengths"].numpy()),
        harness.ABSENT if o["source"] is None else harness.given(o["source"].numpy()),
        harness.ABSENT if bias is None else harness.given(raw(bias)),
    ]
    return scalars, given


def launch(program, built, seed: int = 0, status: int = 0) -> torch.Tensor:
    """The result; its counters came back as zeros, and nothing of the workspace counts."""
    scalars, given = arguments(built)
    said, (memory,) = program.call("memory", scalars, [harness.wanted((4,), np.int64)], seed)
    assert said == status, harness.statuses()[said]
    if said:
        return None
    workspace, counters = int(memory[0]), int(memory[1])
    rest = np.zeros(counters // 4, np.uint32)
    q = built.operands["q"]
    out = harness.wanted(tuple(q.shape), raw(q[:1, :1, :1, :1]).dtype)
    buffers = [
        *given,
        out,
        harness.given(np.full(workspace // 4, 0x7F9FFFFF, np.int32)) if workspace else harness.ABSENT,
        harness.changed(rest) if counters else harness.ABSENT,
    ]
    said, outputs = program.call("launch", scalars, buffers, seed)
    assert said == 0, harness.statuses()[said]
    assert all(not left.any() for left in outputs[1:]), "counters did not return to zero"
    return from_raw(outputs[0], built.case.dtype)
