"""Seeds, the `gpu` marker, and a last line that cannot be mistaken for a GPU run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("dqkernels", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("dqkernels")
# .ci/run asks for one thread in each of two workers: two more would spin against them.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))

# It was for this run (.ci/run asks for two workers); runs that tests start are their own.
os.environ.pop("PYTEST_ADDOPTS", None)

_ran_on_gpu: list[str] = []


def _torch_bf16_runs() -> bool:
    """False where torch's own bf16 product dies. Seen on a virtual machine that announces AMX: oneDNN's kernel there
    uses tiles that nobody configured (SIGILL). A crash would take the whole run with it, so a child process tries."""
    cpu = Path("/proc/cpuinfo")
    if "ONEDNN_MAX_CPU_ISA" in os.environ or not cpu.exists() or "amx_bf16" not in cpu.read_text():
        return True
    product = "import torch; x = torch.ones(64, 256, dtype=torch.bfloat16); x @ x.T"
    return subprocess.run([sys.executable, "-c", product], stderr=subprocess.DEVNULL).returncode == 0


_WITHOUT_AMX = not _torch_bf16_runs()
if _WITHOUT_AMX:
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"  # read at torch's first product, and by child processes


def pytest_report_header(config):
    import dqkernels

    # Which tree is under test: the one next to this folder, or an installed one (tests/README.md).
    found = f"dqkernels {dqkernels.__version__} from {os.path.dirname(dqkernels.__file__)}; torch {torch.__version__}"
    if _WITHOUT_AMX:
        return [found, "torch's bf16 product crashes here (AMX): ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 for this run"]
    return found


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def skinny_program():
    """The skinny GEMM on the simulator (tests/sim), running; skips where nothing can be simulated."""
    from skinny_calls import SOURCES, harness

    reason = harness.missing()
    if reason is not None:
        pytest.skip(reason)
    here = Path(harness.__file__).parent
    paths = [harness.ROOT / name if name.startswith("csrc/") else here / name for name in SOURCES]
    running = harness.Program(harness.build(paths))
    yield running
    running.close()


def pytest_runtest_call(item):
    # A skipped test never comes here. The marker is asked for, not `keywords`: a parameter may be called "gpu".
    if item.get_closest_marker("gpu"):
        _ran_on_gpu.append(item.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Outermost, so that these lines stand below pytest's own: skips counted, and last a word on the GPU."""
    result = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        skipped = terminal.stats.get("skipped", [])
        reasons = Counter(report.longrepr[2] if isinstance(report.longrepr, tuple) else "?" for report in skipped)
        terminal.write_line("")
        terminal.write_line(f"skipped: {len(skipped)}")
        for reason, count in sorted(reasons.items()):
            terminal.write_line(f"  {count} x {reason.removeprefix('Skipped: ')}")
        terminal.write_line(f"GPU: {len(_ran_on_gpu)} tests ran" if _ran_on_gpu else "GPU: not run")
    return result
