"""The Triton kernels in Triton's interpreter, on the CPU: every check of the triton_checks files, 0 mismatches.

TRITON_INTERPRET must be set before Triton is imported, so each file runs in a subprocess and each check reports here.
"""

import atexit
import concurrent.futures
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_files import FILES

ROOT = Path(__file__).resolve().parents[1]


def subprocess_env(**extra):
    """This environment, with the package of this tree first and one thread for numpy."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def run(path, names):
    """{check: "ok" or its traceback} of one file."""
    done = subprocess.run(
        [sys.executable, path, *names],
        env=subprocess_env(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@functools.cache
def started(files):
    """A future for each ((path, names), ...): the files run side by side, one per core."""
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1)))
    futures = {path: pool.submit(run, path, names) for path, names in files}
    atexit.register(pool.shutdown, wait=False, cancel_futures=True)
    return futures


@pytest.mark.parametrize("file, name", [pytest.param(file, name, id=name) for file in FILES for name in file.CHECKS])
def test_in_the_interpreter(file, name, request):
    pytest.importorskip("triton", reason="triton is not installed")
    # -k asked for some of a file's checks: only these run. A check that faults takes its file's others along.
    asked = [item.callspec.params for item in request.session.items if item.originalname == request.node.originalname]
    names = {each: tuple(params["name"] for params in asked if params["file"] is each) for each in FILES}
    files = tuple((each.__file__, chosen) for each, chosen in names.items() if chosen)
    found, seconds = started(files)[file.__file__].result()
    print(seconds)
    assert found[name] == "ok", found[name]


def test_import_stays_away_from_triton():
    """The package and the backend's answers need no Triton; only the kernels do."""
    program = (
        "import sys, dqkernels\nfrom dqkernels.backends import triton as backend\n"
        "backend.available('cpu'), backend.supports('qgemm', group_size=-1)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'triton'], 'triton was imported'\n"
        "sys.modules['triton'] = None\n"
        "try:\n    import dqkernels.kernels.gemm\n"
        "except ImportError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "refused", done.stdout + done.stderr
