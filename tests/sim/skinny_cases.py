"""The skinny GEMM's cases: options covered pairwise, inputs, and what eager says of them."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import harness
import numpy as np
import pairwise
import torch

from dqkernels import packing, qmath, reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}
MODES = {"per_token": 0, "per_tensor": 1, "static": 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}

FORMS = [(8, "absmax", 0), *itertools.product((4,), ("absmax",), (0, 32, 64, 128))]
FORMS += list(itertools.product((2,), ("ternary", "four_level"), (0, 32, 64, 128)))
VALUES = {
    "form": FORMS,
    "m": (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129),
    "n": (1, 15, 16, 17, 33, 128, 131),
    "k": (1, 7, 31, 64, 127, 128, 129, 200, 256, 384, 392, 511, 640, 769, 1024),
    "x": ("fp16", "bf16", "fp32", "int8"),
    "layout": ("contiguous", "wide rows", "odd rows", "expanded", "unaligned"),
    "mode": ("per_token", "per_tensor", "static"),
    "clip": (None, 1.5),
    "bias": (None, "fp32", "fp16", "bf16"),
    "residual": (None, "fp32", "fp16", "bf16"),
    "activation": ("none", "relu"),
    "y": ("fp16", "bf16", "fp32", "int8"),
    "granularity": ("per_channel", "per_tensor"),
    "plan": ((0, 0), (1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (8, 3)),
    "parts": (1, 2, 3),
}


def allowed(row: dict) -> bool:
    """What no launch takes: many float rows, a group-wise scale per tensor, more splits than 256 codes of K, a plan
    that has no room for the activations."""
    m, x, mode, clip = row.get("m"), row.get("x"), row.get("mode"), row.get("clip")
    if x not in (None, "int8") and m is not None and m > 16:
        return False
    if x == "int8" and ((mode not in (None, "per_token")) or clip is not None):
        return False  # quantized elsewhere
    if m is not None and m > 16 and (mode not in (None, "per_token") or clip is not None):
        return False
    if row.get("granularity") == "per_tensor" and row.get("form", (0, 0, 0))[2]:
        return False
    splits, units = row.get("plan", (0, 0))[1], (row.get("k", 1024) + 255) // 256
    if splits > 1 and (splits - 1) * ((units + splits - 1) // splits) >= units:
        return False
    warps_n, splits = row.get("plan", (0, 0))
    if m is not None and m > 33 and units > 2 and 1 <= warps_n <= 4 and splits == 1:
        return False  # a chunk of 256 codes is too little for so many warps along K
    if m is not None and m > 33 and row.get("n", 1) > 33:
        return False  # the simulator is slow
    return not (m is not None and m > 17 and row.get("k", 1) > 640)


def cases() -> list[SimpleNamespace]:
    """The covering rows; `name` tells them apart."""
    found = []
    for index, row in enumerate(pairwise.covering(VALUES, allowed)):
        case = SimpleNamespace(**row, seed=index)
        bits, rule, group = case.form
        case.name = f"{index}: W{bits} {rule} g{group} m{case.m} n{case.n} k{case.k} {case.x}->{case.y} {case.plan}"
        found.append(case)
    return found


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as an array; bfloat16 as its bits, with the one NaN that kernels write."""
    tensor = tensor.contiguous()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return torch.where(tensor.isnan(), 0x7FC0, tensor.view(torch.int16)).to(torch.int16).numpy()


def from_raw(array: np.ndarray, dtype: str) -> torch.Tensor:
    """The inverse of `raw`."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if dtype == "bf16" else tensor


def given(tensor: torch.Tensor | None, offset: int = 0) -> harness.Buffer:
    return harness.ABSENT if tensor is None else harness.given(raw(tensor), offset)


def activations(case, draw: torch.Generator) -> torch.Tensor:
    """Float [m, k] with a zero row, an outlier, and non-finite rows where there are rows enough."""
    x = torch.randn(case.m, case.k, generator=draw) * 2
    if case.m >= 7:
        x[1] = 0
        x[2, -1] = float("nan")
        x[3, 0] = float("inf")
        x[4, case.k // 2] = 300.0
        x[5] = 1e-5 * x[5]
        x[6] = torch.arange(case.k) % 253 - 125.5  # ties, where the scale is 1
        x[6, 0] = 127.0
    if getattr(case, "peaks", False):  # each row's maximum at another place, and negative
        x = torch.ones(case.m, case.k)
        x[torch.arange(case.m), torch.arange(case.m) % case.k] = -300.0
    return x.to(DTYPES.get(case.x, torch.float32))


def weight(case, n: int, draw: torch.Generator) -> SimpleNamespace:
    """Random codes over the whole range of the width, scales and multipliers."""
    bits, rule, group = case.form
    low, high = {8: (-128, 127), 4: (-8, 7), 2: (-1, 1) if rule == "ternary" else (-2, 1)}[bits]
    codes = torch.randint(low, high + 1, (n, case.k), generator=draw, dtype=torch.int8)
    scale = torch.rand(1 if case.granularity == "per_tensor" else n, generator=draw) / 50
    scale[::3] = 0 if scale.numel() > 3 else scale[0]
    mult = None
    if group:
        most = qmath.mult_max(bits, rule, case.k)
        shape = (n, -(-case.k // group))
        mult = torch.randint(1, most + 1, shape, generator=draw).to(torch.uint8)
    return SimpleNamespace(packed=packing.pack(codes, bits), scale=scale, mult=mult)


def laid_out(x: torch.Tensor, layout: str) -> tuple[torch.Tensor, int, int]:
    """The rows in memory, their stride in elements, and the offset of the first byte."""
    m, k = x.shape
    if layout == "expanded":
        return x[:1], 0, 0
    if layout in ("wide rows", "odd rows"):
        stride = k + (16 if layout == "wide rows" else 3)
        room = torch.full(((m - 1) * stride + k,), 77, dtype=torch.int8).to(x.dtype)
        torch.as_strided(room, (m, k), (stride, 1)).copy_(x)
        return room, stride, 0
    return x, k, x.element_size() if layout == "unaligned" else 0


def coded(y: torch.Tensor, out_scale: torch.Tensor) -> torch.Tensor:
    """An fp32 result as the codes of an int8 one; a NaN is 0."""
    codes = qmath.round_half_even((y * (1 / out_scale)).clamp(-127, 127))
    return torch.where(y.isnan(), 0, codes.nan_to_num()).to(torch.int8)


def build(case) -> SimpleNamespace:
    """Inputs, the arguments of the simulator's program, and eager's results."""
    draw = torch.Generator().manual_seed(case.seed)
    shuffled = random.Random(case.seed)
    bits, rule, group = case.form
    four_level = rule == "four_level"
    x = activations(case, draw)
    clip = case.clip
    act_scale = torch.tensor(0.013) if case.mode == "static" else None
    if case.layout == "expanded":
        x = x[:1].expand(case.m, -1)
    if case.x == "int8":
        q, scale, _ = qmath.quantize_activation(x, "per_token")
        rows = q
    else:
        q, scale, _ = qmath.quantize_activation(x, case.mode, clip, act_scale)
        rows, q = x, q
    memory, stride, offset = laid_out(rows, case.layout)
    sizes = [case.n, *shuffled.sample((1, 16, 40), 2)][: case.parts]
    out_dtype = DTYPES.get(case.y, torch.float32)
    out_scale = torch.tensor([0.05]) if case.y == "int8" else None
    parts, expected = [], []
    for n in sizes:
        w = weight(case, n, draw)
        bias = None if case.bias is None else torch.randn(n, generator=draw).to(DTYPES[case.bias])
        residual = None if case.residual is None else torch.randn(case.m, n, generator=draw).to(DTYPES[case.residual])
        y = reference.qgemm(
            q,
            scale,
            None,
            w.packed,
            w.scale,
            w.mult,
            bias,
            residual,
            bits=bits,
            four_level=four_level,
            group_size=group or -1,
            out_features=n,
            activation=case.activation,
            out_dtype=out_dtype,
        )
        y = y if out_scale is None else coded(y, out_scale)
        parts.append(SimpleNamespace(n=n, weight=w, bias=bias, residual=residual))
        expected.append(y)
    scalars = [
        *(case.m, case.k, stride, CODES[case.x], MODES[case.mode], float(clip or 0.0), 0.0),
        *(bits, int(four_level), group, int(case.granularity == "per_tensor"), CODES[case.bias or "fp32"]),
        *(CODES[case.residual or "fp32"], ACTIVATIONS[case.activation], CODES[case.y], *case.plan, 4),
        *(len(parts), *sizes, *(1,) * (3 - len(sizes))),
    ]
    return SimpleNamespace(
        case=case,
        x=x,
        q=q,
        scale=scale,
        act_scale=act_scale,
        memory=memory,
        stride=stride,
        offset=offset,
        scalars=scalars,
        out_scale=out_scale,
        parts=parts,
        expected=expected,
    )


def buffers(
    built, workspace_bytes: int, counter_bytes: int, norm=()
) -> tuple[list[harness.Buffer], list[np.ndarray | None]]:
    """The program's buffers, and what must come back: the counters are zeros again after the launch.

    norm: the buffers norm_weight, norm_bias and norm_y, the last of which comes back before the results.
    """
    act_scale = built.scale if built.case.x == "int8" else built.act_scale
    counters = np.zeros(counter_bytes // 4, np.uint32)
    # An input: of what it holds, nothing may count. A positive sum with this leaves int32, which UBSan reports even if
    # the right result is stored over it later.
    workspace = np.full(workspace_bytes // 4, 0x7FFFFFFF, np.int32)
    given_buffers = [
        given(built.memory, built.offset),
        given(None if act_scale is None else act_scale.reshape(-1)),
        *(norm or (harness.ABSENT,) * 3),
        given(built.out_scale),
        harness.given(workspace) if workspace_bytes else harness.ABSENT,
        harness.changed(counters) if counter_bytes else harness.ABSENT,
    ]
    wanted: list[np.ndarray | None] = [None] if norm else []
    wanted += [counters] if counter_bytes else []
    for part, y in zip(built.parts, built.expected, strict=True):
        w = part.weight
        array = raw(y)
        given_buffers += [given(w.packed), given(w.scale), given(w.mult), given(part.bias), given(part.residual)]
        given_buffers.append(harness.wanted(array.shape, array.dtype))
        wanted.append(array)
    return given_buffers, wanted
