"""Seeds, the `gpu` marker, and a last line that cannot be mistaken for a GPU run."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import settings

settings.register_profile("dqkernels", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("dqkernels")
torch.set_num_threads(min(2, os.cpu_count() or 1))

_ran_on_gpu: list[str] = []


def pytest_report_header(config):
    import dqkernels

    # Which tree is under test: the one next to this folder, or an installed one (tests/README.md).
    return f"dqkernels {dqkernels.__version__} from {os.path.dirname(dqkernels.__file__)}; torch {torch.__version__}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
