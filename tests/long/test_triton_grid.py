"""The full grid of the Triton kernels against eager and the oracle: 0 mismatches (docs: tests/README.md).

In Triton's interpreter, in parts of a minute or so, each in a process of its own because TRITON_INTERPRET must be set
before Triton is imported; with `-m gpu` on the device. Every test prints its figures (`pytest -s`), and with
DQKERNELS_GRID_LOG=FILE appends them to a file, a line of JSON each.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pairwise
import pytest
import triton_grid
import triton_grid_ops

from dqkernels.kernels import tiles

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
PARTS = {"linear": 4, "qattention": 2, "quantize_weight": 2}  # the others are done in one
INTERPRETED = [(name, part, PARTS.get(name, 1)) for name in triton_grid.GRIDS for part in range(PARTS.get(name, 1))]


def report(figures):
    """Prints the figures of a grid, keeps them where the log is asked for, and fails with the first failure."""
    failures = figures.pop("failures")
    line = json.dumps(figures | {"failed": len(failures)})
    print(line)
    if log := os.environ.get("DQKERNELS_GRID_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    assert figures["cases"] and not failures, f"{len(failures)} of {figures['cases']} cases:\n{failures[0]}"


@pytest.mark.parametrize("name, part, parts", INTERPRETED, ids=lambda value: str(value))
def test_in_the_interpreter(name, part, parts):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, triton_grid_ops.__file__, name, f"{part + 1}/{parts}"],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(triton_grid.GRIDS))
def test_on_the_device(name):
    report(triton_grid.run(name, "cuda"))


def test_the_grid_is_what_it_claims():
    """At least 200 shapes of linears, M = 0 and 1 among them; each pair of options computes somewhere; each tile."""
    cases = triton_grid.linear_cases()
    shapes = {triton_grid.linear_shape(case) for case in cases}
    assert len(shapes) >= 200 and {0, 1} <= {m for m, _, _ in shapes}
    for modulus in (16, 32, 128):
        for axis in (1, 2):
            residues = {shape[axis] % modulus for shape in shapes}
            assert len(residues) >= min(modulus, 32) * 0.75, (modulus, axis, len(residues))
    computed = [vars(case) for case in cases if case.m != (0, 0)]
    wanted = set(pairwise.wanted(triton_grid.LINEAR, triton_grid.linear_allowed))
    assert wanted <= pairwise.met(triton_grid.LINEAR, computed)
    used = {(case.tile[0], case.form[0], triton_grid.tile_of(case)) for case in cases if case.form[2] == -1}
    for (arch, bits), table in tiles.CONFIGS.items():
        assert all((arch, bits, tile) in used for tile in table.values()), (arch, bits)
    assert {triton_grid.tile_of(case) for case in cases if case.form[2] != -1} >= set(
        tiles.table("sm80", 4, 64).values()
    )
    assert sum(len(every()) for every, _ in triton_grid.GRIDS.values()) >= 800
