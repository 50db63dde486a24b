"""kernels/launch.py: which launches share a compiled variant, and what reaches the compiled kernel. No GPU needed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from dqkernels.kernels import launch  # noqa: E402

_STORE = torch.empty(64, dtype=torch.int8)
_BASE = -_STORE.data_ptr() % 16
ALIGNED, ODD = (_STORE[_BASE + offset : _BASE + offset + 16] for offset in (0, 1))
VALUES = [
    None, 0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40, -(2**31), -(2**31) - 1, 0.0, 1.0, 0.5,
    float("inf"), ALIGNED, ODD, ALIGNED.view(torch.uint8), torch.empty(8), torch.empty(8).half(),
    torch.empty(8).bfloat16(), torch.empty(9)[1:], torch.empty(8, dtype=torch.int32), torch.empty(8, dtype=torch.int64),
]  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def _kernel(x_ptr, y_ptr, m, n, scale, BLOCK: tl.constexpr, RELU: tl.constexpr):
    pass


@triton.jit
def _mixed(x_ptr, BLOCK: tl.constexpr, n):
    pass


if not isinstance(_kernel, triton.JITFunction):
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, everyones):
        self.launches, self.everyones = [], everyones

    def run(self, *everything):
        self.launches.append(everything)
        self.everyones.append(everything)


@pytest.fixture
def launcher(monkeypatch):
    """A Launcher whose kernel is compiled by a recorder."""
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    found = launch.Launcher(_kernel)
    found.through_triton, found.direct = [], []

    def through_triton(kernel, grid):
        def call(*arguments, **keywords):
            found.through_triton.append((grid, arguments, keywords))
            return Compiled(found.direct)

        return call

    monkeypatch.setattr(triton.JITFunction, "__getitem__", through_triton)
    found.active = active
    return found


def specialization(value, specialize=True):
    """What Triton itself makes of a run-time argument."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    return native_specialize_impl(CUDABackend, value, False, specialize, True)


@pytest.mark.parametrize("specialize", [True, False])
def test_equal_facts_mean_equal_code(specialize):
    """Two launches share a variant only where Triton would have compiled the same one."""
    values = VALUES if specialize else [value for value in VALUES if isinstance(value, int)]
    pairs = list(itertools.combinations(values, 2))
    for a, b in pairs:
        if launch.fact(a, specialize) == launch.fact(b, specialize):
            assert specialization(a, specialize) == specialization(b, specialize), (a, b)
    assert sum(launch.fact(a, specialize) == launch.fact(b, specialize) for a, b in pairs) > 10


def test_sizes_share_a_variant():
    assert launch.fact(17) == launch.fact(1023) and launch.fact(16) == launch.fact(4096)
    assert len({launch.fact(n) for n in (1, 16, 17, 2**31 + 16, 2**31 + 17)}) == 5


def test_first_call_through_triton_then_direct(launcher):
    constants = {"BLOCK": 128, "RELU": True}
    launcher((3,), ALIGNED, None, 3, 100, 0.5, num_warps=8, num_stages=2, **constants)
    options = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}
    assert launcher.through_triton == [((3,), (ALIGNED, None, 3, 100, 0.5), {**constants, **options})]
    launcher((5, 2), ALIGNED, None, 16, 101, 0.25, num_warps=8, num_stages=2, RELU=True, BLOCK=128)
    assert len(launcher.through_triton) == 1
    (compiled,) = launcher.variants.values()
    assert compiled.launches == [
        (5, 2, 1, 7, "function", "metadata", None, None, None, ALIGNED, None, 16, 101, 0.25, 128, True)
    ]


@pytest.mark.parametrize(
    "change",
    [{"x": ODD}, {"y": ALIGNED}, {"n": 16}, {"n": 1}, {"BLOCK": 64}, {"RELU": False}, {"num_warps": 8}, {"device": 1}],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_code_makes_another_variant(launcher, change):
    def run(x=ALIGNED, y=None, n=100, BLOCK=128, RELU=True, num_warps=4, device=0):
        launcher.active.get_current_device = lambda: device
        launcher((1,), x, y, 1, n, 0.5, num_warps=num_warps, BLOCK=BLOCK, RELU=RELU)

    run()
    run(**change)
    run()
    run(**change)
    assert len(launcher.through_triton) == len(launcher.variants) == 2


def test_a_profiler_gets_tritons_own_launch(launcher, monkeypatch):
    """Also one that is removed again."""
    arguments = ((1,), ALIGNED, None, 3, 100, 0.5)
    hook = launch.knobs.runtime.launch_enter_hook
    listener = lambda metadata: None  # noqa: E731
    for _ in range(2):
        launcher(*arguments, BLOCK=128, RELU=True)
    if hook is None or not hasattr(hook, "add"):
        pytest.skip("this Triton has no chain of hooks")
    hook.add(listener)
    try:
        launcher(*arguments, BLOCK=128, RELU=True)
    finally:
        hook.remove(listener)
    launcher(*arguments, BLOCK=128, RELU=True)
    assert len(launcher.through_triton) == 2


def test_wrong_names_are_refused(launcher):
    with pytest.raises(TypeError, match="_kernel has no parameter GELU"):
        launcher((1,), ALIGNED, None, 3, 100, 0.5, BLOCK=128, RELU=True, GELU=True)
    with pytest.raises(KeyError, match="RELU"):
        launcher((1,), ALIGNED, None, 3, 100, 0.5, BLOCK=128)
    with pytest.raises(TypeError, match="_mixed: constexpr parameters must come last"):
        launch.Launcher(_mixed)


def test_eight_threads(launcher):
    """Started at once on a cold cache: every launch arrives, one variant stays."""
    barrier, each = threading.Barrier(8), 50

    def work():
        barrier.wait()
        for n in range(each):
            launcher((1,), ALIGNED, None, n, 2 * n + 17, 0.5, BLOCK=128, RELU=True)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    arrived = [run[2:4] for _, run, _ in launcher.through_triton] + [run[11:13] for run in launcher.direct]
    assert sorted(arrived) == sorted((n, 2 * n + 17) for n in range(each) for _ in threads)
    assert len(launcher.through_triton) <= len(threads) and len(launcher.variants) == 1


def test_bound_launch(launcher):
    """Directly from the second aligned call on; an odd address takes a variant of its own, and a profiler Triton's."""
    bound = launcher.bind((3,), BLOCK=128, RELU=True, num_warps=8, num_stages=2)
    bound(ODD, None, 3, 100, 0.5)
    bound(ALIGNED, None, 3, 100, 0.5)
    assert len(launcher.through_triton) == len(launcher.variants) == 2 and not launcher.direct
    bound(ALIGNED, None, 3, 100, 0.25)
    assert launcher.direct == [
        (3, 1, 1, 7, "function", "metadata", None, None, None, ALIGNED, None, 3, 100, 0.25, 128, True)
    ]
    bound(ODD, None, 3, 100, 0.25)
    assert len(launcher.through_triton) == 2 and launcher.direct[-1][9] is ODD


def test_bound_launch_under_a_profiler(launcher, monkeypatch):
    bound = launcher.bind((1,), BLOCK=128, RELU=True)
    for _ in range(2):
        bound(ALIGNED, None, 3, 100, 0.5)
    monkeypatch.setattr(launch, "_hooked", lambda: True)
    bound(ALIGNED, None, 3, 100, 0.5)
    assert len(launcher.through_triton) == 2 and len(launcher.direct) == 1


def test_a_plan_is_kept_for_one_set_of_facts(launcher, monkeypatch):
    """What the GEMM, the quantizer and the norms keep a launch for decides every fact that Triton compiles for."""
    from dqkernels.kernels import gemm, norm, quantize

    plans = (gemm._plan, quantize._plan, norm._layernorm_plan, norm._gelu_plan)
    for plan in plans:
        plan.cache_clear()
    seen = {}

    def call(bound, *arguments):
        facts = tuple(map(launch.fact, arguments, bound.launcher._specialized)) + bound.grid
        assert seen.setdefault(id(bound), facts) == facts
        counts[id(bound)] = counts.get(id(bound), 0) + 1

    counts = {}
    monkeypatch.setattr(launch.Bound, "__call__", call)
    g = torch.Generator().manual_seed(0)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=g))]

    for _ in range(1500):
        m, n, k = pick(1, 2, 16, 17, 300), pick(1, 16, 17), pick(1, 16, 17, 32, 4096)
        bits = pick(2, 4, 8)
        group = -1 if bits == 8 else pick(-1, 32)
        four_level, out_dtype = bits == 2 and pick(True, False), pick(torch.float16, torch.int8)
        kind = pick(torch.float16, torch.float32)
        gemm.qgemm(
            torch.zeros(m, k, dtype=torch.int8), torch.zeros(m), torch.zeros(m, dtype=torch.int32),
            torch.zeros((n + 15) // 16 * 16, (k + 127) // 128 * 16 * bits, dtype=torch.uint8),
            torch.zeros(pick(1, n)), bits, four_level, n, pick(None, torch.zeros(n, dtype=kind)), pick("none", "gelu"),
            pick(None, torch.zeros(m, n, dtype=kind)), out_dtype, split_k=pick(None, 2),
            group_mult=None if group == -1 else torch.zeros(n, -(-k // group), dtype=torch.uint8), group_size=group,
            out_scale=torch.ones(1) if out_dtype == torch.int8 else None,
        )  # fmt: skip
        x = pick(torch.zeros(m, k, dtype=kind), torch.zeros(m, 2 * k, dtype=kind)[:, :k], torch.zeros(k, m).T)
        mode = pick("per_token", "per_tensor", "static")
        amax_bits = torch.zeros(1, dtype=torch.int32) if mode == "per_tensor" else None
        quantize.quantize_rows(x, mode, pick(None, 2.5), torch.ones(1), pick(True, False), amax_bits)
        norm.gelu_quantize(x, mode, None, torch.ones(1), pick(True, False))
        other = pick(None, torch.zeros(m, k, dtype=kind), torch.zeros(m, 2 * k, dtype=kind)[:, :k])
        weights = torch.zeros(k, dtype=pick(kind, torch.float32)), pick(None, torch.zeros(k, dtype=kind))
        norm.layernorm_quantize(x, other, *weights, 1e-5, mode, None, torch.ones(1), pick(True, False))
    assert len(seen) > 300 and sum(count > 1 for count in counts.values()) > 200
    for plan in plans:
        plan.cache_clear()


def test_no_compilation_while_a_graph_is_captured(launcher, monkeypatch):
    """CUDA would end the capture with an error that names nothing."""
    launcher((1,), ALIGNED, None, 3, 100, 0.5, BLOCK=128, RELU=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launcher((1,), ALIGNED, None, 3, 100, 0.5, BLOCK=128, RELU=True)  # a known one is launched
    with pytest.raises(RuntimeError, match="_kernel meets these shapes or types for the first time.*warmup"):
        launcher((1,), ALIGNED, None, 3, 100, 0.5, BLOCK=64, RELU=True)


COLD_START = """
import json, os, triton_sass
go, start = os.pipe()
results = []
for _ in range(8):
    result, mine = os.pipe()
    if not os.fork():
        os.close(start)
        os.read(go, 1)  # nothing to read: returns when nobody holds the other end any more
        kernel = triton_sass.quantize_kernel(80, "*fp16", "per_token", 1024)
        os.write(mine, kernel.hash.encode() + b" " + str(len(kernel.asm["cubin"])).encode())
        assert kernel.asm["cubin"][:4] == bytes([127]) + b"ELF"
        os._exit(0)
    os.close(mine)
    results.append(result)
os.close(start)  # and now all eight begin
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in results]
found = triton_sass.quantize_kernel(80, "*fp16", "per_token", 1024)
print(json.dumps([codes, [os.read(result, 999).decode() for result in results], triton_sass.counts(found)]))
"""


def test_eight_processes_on_one_cold_cache(tmp_path):
    """Released at once on an empty folder, all of them compile or read a whole kernel, and leave nothing half done."""
    from test_kernels_triton import subprocess_env

    path = os.pathsep.join([str(Path(__file__).parent), subprocess_env()["PYTHONPATH"]])
    environment = subprocess_env(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COLD_START], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes, kernels, counts = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * 8 and len(set(kernels)) == 1 and len(kernels[0].split()) == 2, (codes, kernels)
    assert counts["registers"] > 0 and counts["spills"] == 0  # nvdisasm reads what was left in the folder
    assert list(tmp_path.rglob("*.cubin")) and not list(tmp_path.rglob("tmp.*"))
