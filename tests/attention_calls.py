"""Decode attention's cases as tensors of a device, and a stand-in for `_C.AttentionPlan` that needs none.

Shared by test_attention_launch.py (the launcher on the simulator), test_gpu_attention.py (on a GPU) and op_grid.py (the
sanitizers). The cases are those of sim/attention_cases.py.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent / "sim"))
import attention_cases as cases  # noqa: E402
import harness  # noqa: E402

from dqkernels.kernels import counters, cuda_attention, native  # noqa: E402

SOURCES = ("attention_host.cpp", "csrc/cuda/attention_decode.cpp", "csrc/cuda/attention_decode.cu")
#: In the order in which the simulator's program reads them; those of a plan but for its strides.
SCALARS = (
    "dtype rows heads queries head_dim caches capacity q_stride aligned shared by_key bias_dtype bias_stride causal \
softmax_scale mode clip form splits warps sms".split()
)
_BYTES = (4, 2, 2)  # by the code of a dtype, as in api.h


def placed(built, device: str) -> dict:
    """The op's tensors on a device, in the memory layout that the case asks for."""
    case, there = built.case, {}
    for name, tensor in built.operands.items():
        there[name] = None if tensor is None else tensor.to(device)
    if case.layout == "transposed":
        there["q"] = there["q"].transpose(1, 2).contiguous().transpose(1, 2)
    elif case.layout == "shared rows":
        there["q"] = there["q"][:1].expand(there["q"].shape)
    if not case.aligned:
        for name in ("k_cache", "v_cache"):
            cache = there[name]
            room = torch.empty(cache.numel() + 4, dtype=torch.int8, device=device)[4:].view(cache.shape)
            there[name] = room.copy_(cache)
    return there


def call(built, device: str, **cut) -> torch.Tensor:
    """The launcher, cut up as the case says."""
    case = built.case
    split = case.form.startswith("split")
    facts = {"form": "rule" if split else case.form, "splits": int(case.form[-1]) if split else 0} | cut
    facts = {"warps": case.warps, **facts}
    return cuda_attention.qattention_decode(**placed(built, device), **built.facts, **facts)


def samples() -> list[SimpleNamespace]:
    """A tiny call of each kernel, for the sanitizers: every form, cut, source and kind of row."""
    found = []
    for form in ("keep", "redo", "split 2"):
        for head_dim, queries in ((64, 1), (64, 9), (128, 1), (80, 9)):
            source = {1: "by key", 9: "beams"}[queries]
            facts = {"form": form, "source": source, "spare": 3, "lengths": "random", "caches": 2, "bias": "heads"}
            found.append(cases.plain(3, 2, queries, 70, head_dim, **facts))
        if form != "keep":
            found.append(cases.plain(2, 1, 3, 70, 20, form=form, mode="per_tensor", causal=True, dtype="fp32"))
    found.append(cases.plain(3, 1, 1, 40, 64, source="lost", caches=2, mode="per_tensor", dtype="bf16"))
    return [cases.build(case) for case in found]


# ------------------------------------------------------------------------------------ a plan without a GPU


class SimulatedPlan:
    """`_C.AttentionPlan` whose `run` takes addresses of this process and has the simulator compute.

    What the addresses hold is read and written to the sizes that the plan knows: the simulator's buffers end there,
    so that ASan sees a kernel that reads on.
    """

    program: harness.Program | None = None
    made: list[SimulatedPlan] = []
    seed = 0

    def __init__(self, **facts):
        assert {*facts} == {*SCALARS}
        self.facts, self.runs, self.scalars = facts, [], []
        for name in SCALARS:
            value = facts[name]
            if name in ("softmax_scale", "clip"):
                self.scalars.append(float(np.float32(value)))
            else:
                self.scalars += [int(each) for each in (value if isinstance(value, list) else [value])]
        status, (memory,) = self.program.call("memory", self.scalars, [harness.wanted((4,), np.int64)], 0)
        if status:
            raise ValueError(harness.statuses()[status])
        self.workspace_bytes, self.counter_bytes, self.splits, self.warps = (int(value) for value in memory)
        self.made.append(self)

    def run(self, q, k, k_scale, v, v_scale, lengths, source, bias, out, workspace, counters, stream):
        self.runs.append({"workspace": workspace, "counters": counters, "stream": stream})
        f = self.facts
        vectors, keys = f["rows"] * f["heads"] * f["queries"], f["caches"] * f["heads"] * f["capacity"]

        def given(address, count, size):
            return harness.ABSENT if not address else harness.given(read(address, count * size), address % 256)

        axes = (f["rows"], f["heads"], f["queries"], f["capacity"])
        q_reach = sum((n - 1) * stride for n, stride in zip(axes, f["q_stride"], strict=False)) + f["head_dim"]
        bias_reach = sum((n - 1) * stride for n, stride in zip(axes, f["bias_stride"], strict=True)) + 1
        out_bytes = vectors * f["head_dim"] * _BYTES[f["dtype"]]
        buffers = [
            given(q, q_reach, _BYTES[f["dtype"]]),
            given(k, keys * f["head_dim"], 1),
            given(k_scale, keys, 4),
            given(v, keys * f["head_dim"], 1),
            given(v_scale, keys, 4),
            given(lengths, f["rows"], 4),
            given(source, f["rows"] * (f["capacity"] if f["by_key"] else 1), 4),
            given(bias, bias_reach, _BYTES[f["bias_dtype"]]),
            harness.wanted((out_bytes,), np.uint8, out % 256),
            given(workspace, self.workspace_bytes, 1),
        ]
        outputs = [(out, out_bytes)]
        if counters:
            outputs.append((counters, self.counter_bytes))
            buffers.append(harness.changed(read(counters, self.counter_bytes), counters % 256))
        else:
            buffers.append(harness.ABSENT)
        status, results = self.program.call("launch", self.scalars, buffers, self.seed)
        assert status == 0, harness.statuses()[status]
        for (address, size), result in zip(outputs, results, strict=True):
            assert result.nbytes == size
            ctypes.memmove(address, result.tobytes(), size)


def read(address: int, size: int) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(address, size), np.uint8)


def on_this_machine(patch) -> SimpleNamespace:
    """Has the launcher take CPU tensors and `SimulatedPlan` for the core's: no driver, no stream but the number 7.

    patch: pytest's monkeypatch. Returns what the machine says of itself, to be changed: `stream`, `sms`.
    """
    machine = SimpleNamespace(stream=7, sms=4)
    patch.setattr(native, "require", lambda name: SimpleNamespace(AttentionPlan=SimulatedPlan))
    patch.setattr(cuda_attention, "_device_of", lambda q: q.get_device())
    patch.setattr(torch.cuda, "current_device", lambda: -1)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: machine.stream, raising=False)
    properties = lambda device: SimpleNamespace(multi_processor_count=machine.sms)  # noqa: E731
    patch.setattr(torch.cuda, "get_device_properties", properties)
    cuda_attention._plan.cache_clear()
    counters.kept.clear()
    return machine
