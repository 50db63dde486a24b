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

import native_calls
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

#: Calls by name; "small" ones are not worth a second thread.
CALLS = """
import json, os, sys, time
import torch
import native_calls
from dqkernels import DQConfig, ops
from dqkernels.nn import QLinear
from dqkernels.kernels import native

asked = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.set_grad_enabled(False)
small = QLinear.from_linear(torch.nn.Linear(64, 48), DQConfig(weight_bits=4))
large = QLinear.from_linear(torch.nn.Linear(512, 4096), DQConfig(weight_bits=4))
layer, hidden = native_calls.encoder_layer(256, 1024), torch.randn(4, 60, 256)
short, words = native_calls.encoder_layer(64, 64), torch.randn(1, 2, 64)
x, rows, floats = torch.randn(1, 64), torch.randn(64, 512), torch.randn(512, 512)
q = torch.randn(2, 8, 64, 64)
calls = {
    "small": lambda: small(x),
    "large": lambda: large(rows),
    "one row": lambda: large(rows[:1]),
    "attention": lambda: ops.qattention(q, q, q, None, None, False, 0.125),
    "small encoder layer": lambda: short(words, None),
    "encoder layer": lambda: layer(hidden, None),
    "small step": native_calls.decode_step(64, 48),
    "step": native_calls.decode_step(512, 4096),
    "torch": lambda: floats @ floats + torch.exp(floats),
}
native.native()
"""

#: Prints how many threads there are before, and after each call of "order", computed with as many as "threads".
COUNT = """
count = lambda: len(os.listdir("/proc/self/task"))
found = [count()]
torch.set_num_threads(asked["threads"])
for name in asked["order"]:
    for _ in range(3):
        calls[name]()
    found.append(count())
print(json.dumps(found))
"""

#: What a program knows of other threads: the processor time of all of them, and whether they come to rest.
OTHERS = """
import time

def others():
    return time.process_time() - time.thread_time()

def rest():
    # A runtime's threads may spin a while for the next call: some windows, on a machine that has other work.
    for _ in range(25):
        before = others()
        time.sleep(0.2)
        if others() - before < 0.005:
            return True
    return False
"""

#: Prints for each call of "order" what share of its processor time other threads had, computed by one thread beside
#: torch's team of three, and by that team; and whether that came to rest afterwards.
SHARE = """
def share(call):
    mine, theirs = time.thread_time(), others()
    while time.thread_time() - mine < 0.15:
        call()
    return (others() - theirs) / (time.thread_time() - mine)

found = []
for name in asked["order"]:
    torch.set_num_threads(3)
    calls["torch"]()
    assert rest()
    torch.set_num_threads(1)
    alone = share(calls[name])
    torch.set_num_threads(3)
    found.append((alone, share(calls[name]), rest()))
print(json.dumps(found))
"""


def program(text, *arguments):
    """What a program of these parts prints, run in a fresh process."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "DQKERNELS_BACKEND")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH")]))
    command = [sys.executable, "-c", text, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def threads_after(threads, *order):
    """How many threads more than at the start there are after each call, in a fresh process."""
    start, *rest = program(CALLS + COUNT, json.dumps({"threads": threads, "order": order}))
    return [each - start for each in rest]


def test_one_pool_with_torch():
    """Whoever comes first, the other adds no thread. A pool beside torch's would."""
    assert threads_after(4, "torch", "large", "attention", "one row", "encoder layer", "step") == [3] * 6
    assert threads_after(2, "small", "large", "torch", "attention") == [0, 1, 1, 1], "little work stays with the caller"
    assert threads_after(2, "small step", "step", "torch") == [0, 1, 1], "a small step too"
    assert threads_after(2, "small encoder layer", "encoder layer", "torch") == [0, 1, 1], "and a small layer"


def test_one_thread_is_one_thread():
    order = ("large", "attention", "one row", "encoder layer", "step", "torch")
    assert threads_after(1, *order) == [0] * len(order)


def test_torchs_other_threads_work_where_they_may_and_rest():
    """Those that torch has are left alone by whoever is told to take one, and by all once a call is over: nobody waits
    for work on a processor that torch could use."""
    order = ("large", "attention", "encoder layer", "step")
    found = program(CALLS + OTHERS + SHARE, json.dumps({"order": order}))
    for name, (alone, shared, at_rest) in zip(order, found, strict=True):
        assert alone < 0.05 < shared, f"{name}: {alone} with one thread, {shared} with three"
        assert at_rest, f"{name}: a thread goes on"


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


def test_the_cores_own_threads_rest():
    """Without torch, behind calls that shared their work among the core's own pool."""
    text = """
import json, sys
import native_thread_checks as checks

core = checks.load(sys.argv[1])
assert core.cpu_threads() == "own pool"
found = []
for name in ("linear_of_rows", "encoder_of_norms_before", "a_step"):
    run = checks.made(core, name)
    before = others()
    for _ in range(20):
        run(3, 0)
    found.append((name, others() - before, rest()))
print(json.dumps(found))
"""
    for name, worked, at_rest in program(OTHERS + text, native.native().__file__):
        assert worked > 0 and at_rest, f"{name}: {worked} s by others, at rest: {at_rest}"


def operator():
    from dqkernels import ops

    q = torch.ones(512, 2048, dtype=torch.int8)
    weight = torch.zeros(8192, 2048, dtype=torch.uint8), torch.ones(8192), None, None, None
    given = torch.ones(512), None, *weight, 8, False, -1, 8192, "none", torch.float32
    return lambda: ops.qgemm(q, *given, backend="cpu")


def encoder_layer():
    layer, x = native_calls.encoder_layer(512, 2048), torch.randn(4, 512, 512)
    return lambda: layer(x, None)


def step():
    return native_calls.decode_step(2048, 8192, rows=512)


@pytest.mark.parametrize("made", [operator, encoder_layer, step])
def test_python_goes_on_during_a_call(made):
    """The GIL is released: this thread runs in the middle of a call that another one is in."""
    compute, span, begun = made(), [], threading.Event()

    def call():
        begun.set()
        span.append(time.perf_counter())
        compute()
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
