"""The Triton kernels in Triton's interpreter, on the CPU: every check of triton_checks*.py, 0 mismatches.

TRITON_INTERPRET must be set before Triton is imported, so each file of checks runs in a subprocess of its own and each
check reports here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_checks
import triton_checks_attention

ROOT = Path(__file__).resolve().parents[1]
FILES = (triton_checks, triton_checks_attention)


def subprocess_env(**extra):
    """This environment, with the package of this tree first and one thread for numpy."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


@pytest.fixture(scope="module")
def outcome(request):
    """{check: "ok" or its traceback} of the checks that this run selected."""
    pytest.importorskip("triton", reason="triton is not installed")
    selected = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    outcomes = {}
    for checks in FILES:
        names = [name for name in checks.CHECKS if name in selected]
        if not names:
            continue
        done = subprocess.run(
            [sys.executable, checks.__file__, *names],
            env=subprocess_env(TRITON_INTERPRET="1"),
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stderr)
        outcomes |= json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.parametrize("name", [name for checks in FILES for name in checks.CHECKS])
def test_in_the_interpreter(name, outcome):
    assert outcome[name] == "ok", outcome[name]


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
