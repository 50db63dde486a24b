"""Every check program of the compiled core with AVX-VNNI, AVX512-VNNI, AMX and Arm's dot product, where there is AVX2.

The core is built anew from a copy of the tree (some minutes on two cores) in which the sources of those sets stand on
models of their instructions (tests/sim/avx512_model.h, amx_model.h, neon_model.h): each begins with one line that
includes the model (those for Arm by themselves, with DQK_NEON_MODEL), and isa.cpp says that the processor has them all.
It is loaded into this Python, and the programs of tests/cpu_checks.py run with each set: guard pages, oracles, threads,
the grid of promise P1, and the same bits from all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_checks import PROGRAMS

from dqkernels.kernels import native

pybind11 = pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")

ROOT = Path(__file__).resolve().parents[2]
SETS = ("avx_vnni", "avx512_vnni", "amx_int8", "dotprod")
#: The sources with a target beyond AVX2, and the model of its instructions.
MODELS = {
    "gemm_avx_vnni.cpp": "avx512_names.h",
    "gemm_avx512_vnni.cpp": "avx512_names.h",
    "attention_x86.cpp": "avx512_names.h",
    "quantize_x86.cpp": "avx512_names.h",
    "multiply_bytes.cpp": "avx512_names.h",
    "gemm_amx.cpp": "amx_model.h",
}
TILES = """
namespace dqk::amx_model {
thread_local Tiles tiles;
std::atomic<int64_t> configured{0};
}  // namespace dqk::amx_model
"""


def test_no_source_with_such_a_target_is_missing():
    beyond = {
        path.name
        for path in (ROOT / "csrc" / "cpu").iterdir()
        if any(word in path.read_text(encoding="utf-8") for word in ("avxvnni", "avx512f", "amx-tile"))
    }
    assert beyond == set(MODELS)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree whose core has every instruction set."""
    if " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2, which the models are made of")
    tree = tmp_path_factory.mktemp("models") / "src"
    left_out = shutil.ignore_patterns(".git", "build", "*.so", "__pycache__", "results", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=left_out)
    for name, model in MODELS.items():
        path = tree / "csrc" / "cpu" / name
        text = f'#include "{tree / "tests" / "sim" / model}"\n{path.read_text(encoding="utf-8")}'
        path.write_text(text + (TILES if name == "gemm_amx.cpp" else ""), encoding="utf-8")
    flags = f"-O2 -DDQK_EVERY_ISA -DDQK_NEON_MODEL= -I{tree / 'tests' / 'sim'}"
    configure = ["cmake", "-S", str(tree), "-B", str(tree / "build"), "-DCMAKE_BUILD_TYPE=Debug", "-DDQK_CUDA=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    build = ["cmake", "--build", str(tree / "build"), "--parallel", str(len(os.sched_getaffinity(0)))]
    for command in (configure, build):
        env = os.environ | {"CXXFLAGS": flags}
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (core,) = (tree / "build").glob("_C*.so")
    shutil.copy2(core, tree / "dqkernels")
    return tree


def test_every_program_passes_with_every_set_and_the_same_bits(tree):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests"), *sys.path])}
    command = [sys.executable, str(tree / "tests" / "cpu_checks.py"), "--seconds", "3000", "scalar", *SETS]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=3100)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cpu_isas"] == ["scalar", *SETS] and found["runs"] == len(PROGRAMS) * (1 + len(SETS))
