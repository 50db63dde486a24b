"""Whose threads the CPU kernels run on: torch's and no others, as many as torch was told, none for little work; and
that Python goes on meanwhile. What a second pool costs is measured by `dqkernels bench cpu` (part threads), not here.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import native_thread_checks
import programs
import pytest
import torch

from dqkernels.kernels import native

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present"),
    pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc"),
]

#: Prints how many threads there are before, and after each step of "order", computed with as many as "threads".
PROGRAM = """
import json, os, sys
import torch
from dqkernels import DQConfig, ops
from dqkernels.nn import QLinear
from dqkernels.kernels import native

asked = json.loads(sys.argv[1])
torch.set_num_threads(1)
small = QLinear.from_linear(torch.nn.Linear(64, 48), DQConfig(weight_bits=4))
large = QLinear.from_linear(torch.nn.Linear(512, 4096), DQConfig(weight_bits=4))
x, rows, floats = torch.randn(1, 64), torch.randn(64, 512), torch.randn(512, 512)
q = torch.randn(2, 8, 64, 64)
steps = {
    "small": lambda: small(x),
    "large": lambda: large(rows),
    "one row": lambda: large(rows[:1]),
    "attention": lambda: ops.qattention(q, q, q, None, None, False, 0.125),
    "torch": lambda: floats @ floats + torch.exp(floats),
}


def step_of(layer):
    # A decode step of one linear.
    core, out = native.native(), torch.empty(1, layer.out_features)
    step = core.CpuStep()
    tokens, places, lengths = torch.zeros(1, dtype=torch.int64), *torch.zeros(2, 1, dtype=torch.int32)
    step.set_rows(1, 8, tokens.data_ptr(), places.data_ptr(), lengths.data_ptr(), 0)
    row = torch.randn(1, layer.in_features)
    plan = core.CpuPlan(k=layer.in_features, x_dtype=0, mode=0, clip=0.0, bits=4, four_level=False, group_size=0,
                        activation=0, y_dtype=0, n=[layer.out_features], tensor_scale=[False], bias_dtype=[0],
                        residual_dtype=[0])
    parts = [(layer.qweight.data_ptr(), layer.weight_scale.data_ptr(), 0, 0, 0, out.data_ptr())]
    plan.run(1, layer.in_features, row.data_ptr(), 0, 0.0, 1, parts, step)
    kept = layer, out, tokens, places, lengths, row
    return lambda: step.run(asked["threads"], kept[2].data_ptr(), 0, False)


steps |= {"small step": step_of(small), "large step": step_of(large)}
native.native()
count = lambda: len(os.listdir("/proc/self/task"))
found = [count()]
torch.set_num_threads(asked["threads"])
with torch.inference_mode():
    for name in asked["order"]:
        for _ in range(3):
            steps[name]()
        found.append(count())
print(json.dumps(found))
"""


def threads_after(threads, *order):
    """How many threads more than at the start there are after each step, in a fresh process."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "DQKERNELS_BACKEND")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps({"threads": threads, "order": order})],
        env=env, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    start, *rest = json.loads(done.stdout)
    return [each - start for each in rest]


def test_one_pool_with_torch():
    """Whoever comes first, the other adds no thread. A pool beside torch's would."""
    assert threads_after(4, "torch", "large", "attention", "one row") == [3] * 4
    assert threads_after(2, "small", "large", "torch", "attention") == [0, 1, 1, 1], "little work stays with the caller"
    assert threads_after(2, "small step", "large step", "torch") == [0, 1, 1], "a small step too"


def test_one_thread_is_one_thread():
    assert threads_after(1, "large", "attention", "one row", "torch") == [0] * 4


def test_threads_and_callers_change_no_byte():
    """Every kernel that shares its work, over the core's own pool, and by several callers at once."""
    digests = set()
    for isa in sorted({"scalar", native.native().cpu_isas()[-1]}):
        done = programs.run(native_thread_checks, isa, native.native().__file__)
        assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads(done.stdout)
        assert report["isa"] == isa and all(report[name] for name in native_thread_checks.CASES)
        digests.add(report["digest"])
    assert len(digests) == 1


def test_the_same_bytes_by_torchs_openmp(monkeypatch):
    """The same over the runtime that torch brings along, which a step calls together once. No torch is imported."""
    found = [*(Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
    if not found:
        pytest.skip("this torch brings no GNU OpenMP along")
    isa = native.native().cpu_isas()[-1]
    own = programs.run(native_thread_checks, isa, native.native().__file__)
    monkeypatch.setenv("LD_PRELOAD", str(found[0]))
    monkeypatch.setenv("EXPECTED_THREADS", "OpenMP of the process")
    shared = programs.run(native_thread_checks, isa, native.native().__file__)
    assert own.returncode == 0 and shared.returncode == 0, shared.stderr[-3000:]
    assert json.loads(shared.stdout)["digest"] == json.loads(own.stdout)["digest"]


def test_python_goes_on_during_a_call():
    """The GIL is released: this thread runs in the middle of a call that another one is in."""
    from dqkernels import ops

    q = torch.ones(512, 2048, dtype=torch.int8)
    weight = torch.zeros(8192, 2048, dtype=torch.uint8), torch.ones(8192), None, None, None
    span, begun = [], threading.Event()

    def call():
        begun.set()
        span.append(time.perf_counter())
        ops.qgemm(q, torch.ones(512), None, *weight, 8, False, -1, 8192, "none", torch.float32, backend="cpu")
        span.append(time.perf_counter())

    worker = threading.Thread(target=call)
    worker.start()
    begun.wait()
    seen = []
    while worker.is_alive():
        seen.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    quarter = (span[1] - span[0]) / 4
    assert any(span[0] + quarter < moment < span[1] - quarter for moment in seen)
