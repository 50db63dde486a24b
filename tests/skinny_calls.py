"""The skinny GEMM's cases as tensors of a device, and a stand-in for `_C.SkinnyPlan` that needs none.

Shared by test_skinny.py (the launcher on the simulator), test_gpu_skinny.py (on a GPU) and op_grid.py (the sanitizers).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent / "sim"))
import harness  # noqa: E402
import skinny_cases as cases  # noqa: E402

from dqkernels import packing, qmath, reference  # noqa: E402
from dqkernels.kernels import counters, native, skinny  # noqa: E402

SOURCES = ("skinny_host.cpp", "csrc/cuda/skinny.cpp", *(f"csrc/cuda/skinny_w{bits}.cu" for bits in (2, 4, 8)))
_BYTES = (4, 2, 2, 1)  # by the code of a dtype, as in api.h


# ---------------------------------------------------------------------------------------- a case on a device


def placed_rows(built, device: str) -> torch.Tensor:
    """X of a built case in the memory layout that the case asks for."""
    case = built.case
    rows = built.q if case.x == "int8" else built.x
    dtype, (m, k) = rows.dtype, rows.shape
    if case.layout == "expanded":
        return rows[:1].to(device).expand(m, k)
    if case.layout == "unaligned":
        room = torch.empty(m * k + 1, dtype=dtype, device=device)[1:].view(m, k)
    else:
        wide = {"wide rows": 16, "odd rows": 3}.get(case.layout, 0)
        room = torch.full((m, k + wide), 77, dtype=torch.int8).to(device, dtype)[:, :k]
    room.copy_(rows)
    return room


def placed(built, device: str) -> SimpleNamespace:
    """The arguments of `skinny.gemm`: `x`, `parts` and the rest as `options`."""

    def there(tensor):
        return None if tensor is None else tensor.to(device)

    case = built.case
    bits, rule, group = case.form
    parts = [
        skinny.Part(
            there(part.weight.packed),
            there(part.weight.scale),
            there(part.weight.mult),
            there(part.bias),
            there(part.residual),
            part.n,
        )
        for part in built.parts
    ]
    scale = built.scale if case.x == "int8" else built.act_scale
    options = {
        "bits": bits,
        "four_level": rule == "four_level",
        "group_size": group or -1,
        "activation": case.activation,
        "out_dtype": torch.int8 if case.y == "int8" else cases.DTYPES[case.y],
        "act_scale": None if scale is None else there(scale.reshape(-1).contiguous()),
        "mode": "per_token" if case.x == "int8" else case.mode,
        "clip": case.clip,
        "out_scale": there(built.out_scale),
        "warps_n": case.plan[0],
        "splits": case.plan[1],
    }
    return SimpleNamespace(x=placed_rows(built, device), parts=parts, options=options)


def gemm(call: SimpleNamespace, **more) -> list[torch.Tensor]:
    return skinny.gemm(call.x, call.parts, **(call.options | more))


def wrong(got, expected) -> str | None:
    """What differs in bits (a NaN equals a NaN), or None."""
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        mine = mine.cpu()
        if mine.dtype != theirs.dtype:
            return f"part {index} is {mine.dtype}, not {theirs.dtype}"
        said = harness.difference(cases.raw(mine), cases.raw(theirs))
        if said is not None:
            return f"part {index}: {said}"
    return None


def plain(form, m, n, k, x="fp16", y="fp32", **more) -> SimpleNamespace:
    """A case beside the covering rows."""
    facts = {
        **{"layout": "contiguous", "mode": "per_token", "clip": None, "bias": None, "residual": None},
        **{"activation": "none", "granularity": "per_channel", "plan": (0, 0), "parts": 1, "seed": 5},
        **more,
    }
    name = f"W{form[0]} {form[1]} g{form[2]} m{m} n{n} k{k} {x}->{y} {facts['plan']}"
    return SimpleNamespace(form=form, m=m, n=n, k=k, x=x, y=y, name=name, **facts)


def norm_case(m: int, k: int, x: str, with_bias: bool = True) -> tuple[SimpleNamespace, skinny.Norm]:
    """W4 behind a LayerNorm whose rows are far from zero, on the CPU."""
    built = cases.build(plain((4, "absmax", 0), m, 17, k, x=x, plan=(2, 0)))
    draw = torch.Generator().manual_seed(k + m)
    built.x = (torch.randn(m, k, generator=draw) * 3 + 40).to(cases.DTYPES[x])
    weight, bias = torch.rand(k, generator=draw) + 0.5, torch.randn(k, generator=draw)
    dtype = cases.DTYPES[x]
    return built, skinny.Norm(weight.to(dtype), bias.to(dtype) if with_bias else None, 1e-5)


def norm_on(norm: skinny.Norm, device: str) -> skinny.Norm:
    return skinny.Norm(norm.weight.to(device), None if norm.bias is None else norm.bias.to(device), norm.eps)


def expected_after_norm(built, normalized: torch.Tensor) -> torch.Tensor:
    """What the GEMM must give for the normalized rows that it stored: their codes exactly."""
    bits, rule, group = built.case.form
    q, scale, _ = qmath.quantize_activation(normalized.cpu(), built.case.mode)
    part = built.parts[0]
    w = part.weight
    form = {"bits": bits, "four_level": rule == "four_level", "group_size": group or -1, "out_features": part.n}
    return reference.qgemm(
        *(q, scale, None, w.packed, w.scale, w.mult, part.bias, None), **form, activation="none",
        out_dtype=cases.DTYPES[built.case.y],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- on a real GPU


def call_of(case):
    """A case on the device with eager's results on the CPU."""
    built = cases.build(case)
    return placed(built, "cuda"), built


def poison(shapes) -> None:
    """Leaves free blocks of these (shape, dtype) full of 0xA5 bytes: what is not written shows in the next output.

    Held together and let go, they leave torch's allocator as it was, and it hands out the same ones again. Under 0xA5
    an int8 is -91, a half -0.02, a float -2.9e-16: no result of a test, and no zero.
    """
    blocks = []
    for shape, dtype in shapes:
        for _ in range(3):
            blocks.append(torch.empty(shape, dtype=dtype, device="cuda"))
            blocks[-1].view(torch.uint8).fill_(0xA5)


def outputs_of(call):
    return [((call.x.shape[0], part.out_features), call.options["out_dtype"]) for part in call.parts]


def assert_expected(got, expected, what=""):
    said = wrong(got, expected)
    assert said is None, f"{what}: {said}"


def equal(got, want):
    """A one-element bool tensor on the device: all equal, NaN to NaN; nothing waits here."""
    same = [((a == b) | (a.isnan() & b.isnan())).all() for a, b in zip(got, want, strict=True)]
    return torch.stack(same).all()


def same(got, want) -> bool:
    return bool(equal(got, want))


def weight_of(row, draw):
    """Random codes; the extreme ones where the rows are saturated too."""
    bits, rule, group = row["form"]
    n, k = row["n"], row["k"]
    low, high = {8: (-128, 127), 4: (-8, 7), 2: (-1, 1) if rule == "ternary" else (-2, 1)}[bits]
    codes = torch.randint(low, high + 1, (n, k), generator=draw, dtype=torch.int8)
    if row["rows"] == "saturated":
        codes = torch.where(codes < 0, low, high).to(torch.int8)
    scale = torch.rand(1 if row["granularity"] == "per_tensor" else n, generator=draw) / 50
    most = qmath.mult_max(bits, rule, k) if group else 0
    mult = torch.randint(1, most + 1, (n, -(-k // group)), generator=draw).to(torch.uint8) if group else None
    return [packing.pack(codes, bits), scale, mult]


# ------------------------------------------------------------------------------------ a plan without a GPU


class SimulatedPlan:
    """`_C.SkinnyPlan` whose `run` takes addresses of this process and has the simulator compute.

    What the addresses hold is read and written to the sizes that the plan knows: the simulator's buffers end there,
    so that ASan sees a kernel that reads on.
    """

    program: harness.Program | None = None
    made: list[SimulatedPlan] = []
    seed = 0

    def __init__(self, **facts):
        self.facts, self.runs = facts, []
        overlap, sizes = facts["overlap"], facts["n"]
        order = (
            "m k row_stride x_dtype mode clip norm_eps bits four_level group_size tensor_scale bias_dtype "
            "residual_dtype activation y_dtype warps_n splits sms"
        ).split()
        assert {*order, "overlap", "n"} == {*facts} and isinstance(overlap, bool)
        reals = ("clip", "norm_eps")
        self.scalars = [float(facts[name]) if name in reals else int(facts[name]) for name in order]
        self.scalars += [len(sizes), *sizes, *(1,) * (3 - len(sizes))]
        status, (memory,) = self.program.call("memory", self.scalars, [harness.wanted((4,), np.int64)], 0)
        if status:
            raise ValueError(f"Status {status}")
        self.workspace_bytes, self.counter_bytes, self.warps_n, self.splits = (int(value) for value in memory)
        self.scalars[15:17] = self.warps_n, self.splits
        self.made.append(self)

    def run(self, x, act_scale, norm_weight, norm_bias, norm_y, out_scale, parts, workspace, counters, stream):
        self.runs.append({"workspace": workspace, "counters": counters, "stream": stream})
        f = self.facts
        m, k, element = f["m"], f["k"], _BYTES[f["x_dtype"]]
        if m == 0:
            return
        int8 = f["x_dtype"] == 3
        outputs = []

        def given(address, count, size):
            return harness.ABSENT if not address else harness.given(read(address, count * size), address % 256)

        def wanted(address, count, size):
            if not address:
                return harness.ABSENT
            outputs.append((address, count * size))
            return harness.wanted((count * size,), np.uint8, address % 256)

        buffers = [
            given(x, (m - 1) * f["row_stride"] + k, element),
            given(act_scale, m if int8 else 1, 4),
            given(norm_weight, k, element),
            given(norm_bias, k, element),
            wanted(norm_y, m * k, element),
            given(out_scale, 1, 4),
            given(workspace, self.workspace_bytes, 1),
        ]
        if counters:
            outputs.append((counters, self.counter_bytes))
            buffers.append(harness.changed(read(counters, self.counter_bytes), counters % 256))
        else:
            buffers.append(harness.ABSENT)
        for (qweight, scale, mult, bias, residual, y), n in zip(parts, f["n"], strict=True):
            groups = -(-k // f["group_size"]) if f["group_size"] else 0
            rows, columns = packing.packed_shape(n, k, f["bits"])
            buffers += [
                given(qweight, rows * columns, 1),
                given(scale, 1 if f["tensor_scale"] else n, 4),
                given(mult, n * groups, 1),
                given(bias, n, _BYTES[f["bias_dtype"]]),
                given(residual, m * n, _BYTES[f["residual_dtype"]]),
                wanted(y, m * n, _BYTES[f["y_dtype"]]),
            ]
        status, results = self.program.call("launch", self.scalars, buffers, self.seed)
        assert status == 0, f"Status {status}"
        for (address, size), result in zip(outputs, results, strict=True):
            assert result.nbytes == size
            ctypes.memmove(address, result.tobytes(), size)


def read(address: int, size: int) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(address, size), np.uint8)


def on_this_machine(patch, plan: type) -> SimpleNamespace:
    """Has the launcher take CPU tensors and `plan` for the core's: no driver, no stream but the number 7.

    patch: pytest's monkeypatch. Returns what the machine says of itself, to be changed: `stream`, `major`, and
    the build's `archs`.
    """
    machine = SimpleNamespace(stream=7, major=9, archs="80-real 90a-real 90-virtual")
    require = native.require
    core = SimpleNamespace(SkinnyPlan=plan, build_info=lambda: {"cuda_archs": machine.archs})
    patch.setattr(native, "require", lambda name: core if name == "SkinnyPlan" else require(name))
    patch.setattr(native, "cuda_quantize_rows", qmath.quantize_activation)  # its own tests run it on the simulator
    patch.setattr(skinny, "_device_of", lambda x: x.get_device())
    patch.setattr(torch.cuda, "current_device", lambda: -1)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: machine.stream, raising=False)
    properties = lambda device: SimpleNamespace(multi_processor_count=4, major=machine.major, minor=0)  # noqa: E731
    patch.setattr(torch.cuda, "get_device_properties", properties)
    skinny._plan.cache_clear()
    counters.kept.clear()
    return machine
