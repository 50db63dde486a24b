"""The Triton interpreter gives the bits of every case of the skinny GEMM, the native quantizer those of its inputs."""

import importlib.util
import json
import os
import subprocess
import sys

import harness
import pytest
import skinny_cases as skinny

from dqkernels.kernels import native


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_eager_native_and_triton_agree_on_every_case():
    """What test_skinny.py holds the CUDA kernel to is what two other implementations give, on the same memory."""
    done = subprocess.run(
        [sys.executable, str(harness.HERE / "skinny_others.py"), "0", "1"],
        env={
            **os.environ,
            **{"PYTHONPATH": os.pathsep.join(filter(None, [str(harness.ROOT), os.environ.get("PYTHONPATH")]))},
            **{"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    failures = figures.pop("failures")
    print(json.dumps(figures))
    cases = skinny.cases()
    floats = sum(case.x != "int8" for case in cases) if native.native() is not None else 0
    assert figures == {"cases": len(cases), "triton": len(cases), "native": floats}
    assert not failures, f"{len(failures)} differ:\n{failures[0]}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_difference_is_told(tmp_path):
    """The comparison itself: another bias, another scale, and both implementations are named."""
    program = (
        "import json, skinny_cases as skinny, skinny_others as others\n"
        "fits = lambda c: (c.x, c.y, c.mode) == ('fp16', 'fp32', 'per_token') and c.m > 1\n"
        "case = next(filter(fits, skinny.cases()))\n"
        "no_core = others.native.native() is None\n"
        "built = skinny.build(case)\n"
        "right = others.triton_difference(built), None if no_core else others.native_difference(built)\n"
        "built.memory.view(-1)[0] += 30\n"
        "wrong = others.triton_difference(built), no_core or others.native_difference(built)\n"
        "print(json.dumps([right, wrong]))\n"
    )
    folders = os.pathsep.join([str(harness.ROOT), str(harness.HERE), str(harness.ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [folders, os.environ.get("PYTHONPATH")])),
             "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    right, wrong = json.loads(done.stdout.splitlines()[-1])
    assert right == [None, None] and all(wrong), (right, wrong)
