"""The compiled core's CPU part under ThreadSanitizer, and under AddressSanitizer with UndefinedBehaviorSanitizer.

The core is built anew for each from a copy of the tree (some minutes on two cores) and loaded into this Python, with
the sanitizer's library loaded first. Under threads run the checks that need no torch: then the pool is the core's own,
which was built with it, and not OpenMP's, whose waiting ThreadSanitizer takes for races. The first finding ends a
program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dqkernels.kernels import native

pybind11 = pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"thread": "-fsanitize=thread", "address": "-fsanitize=address,undefined -fno-sanitize-recover=all"}
LIBRARIES = {"thread": ("libtsan.so",), "address": ("libasan.so", "libubsan.so")}
#: glibc frees what a thread that ended had for its thread-local data, in another thread, by locks of its own.
SUPPRESSED = "race:_dl_deallocate_tls\n"
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_signal_unsafe=0 die_after_fork=0",
    "ASAN_OPTIONS": "detect_leaks=0 exitcode=66 handle_segv=0",  # guard pages fault by themselves
    "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
}
PROGRAMS = {
    "thread": ("native_checks.py", "native_gemm_checks.py"),
    "address": ("native_checks.py", "native_gemm_checks.py", "cpu_norm_checks.py", "cpu_attention_checks.py"),
}
WITH_TORCH = ("cpu_norm_checks.py", "cpu_attention_checks.py")  # these find the core themselves


def libraries(name: str) -> list[str]:
    """Where the compiler keeps a sanitizer's libraries; a test without them is skipped."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    found = []
    for library in LIBRARIES[name]:
        done = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True)
        path = done.stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"{compiler} has no {library}")
        found.append(os.path.realpath(path))
    return found


#: A mistake of each kind, which its sanitizer has to find: (file, text, its replacement, words of the finding).
PLANTED = {
    "thread": (
        "csrc/cpu/threads.cpp",
        "next.fetch_add(1, std::memory_order_relaxed)",
        "(*reinterpret_cast<int64_t*>(&next))++",
        "ThreadSanitizer: data race",
    ),
    "address": (
        "csrc/cpu/gemm.cpp",
        "call_scratch.get(prepared_bytes + (together ? code_bytes : 0) + 192)",
        "call_scratch.get(prepared_bytes / 2)",
        "AddressSanitizer: heap-buffer-overflow",
    ),
}


def build(tree: Path, name: str) -> Path:
    """Builds the CPU part of the core with a sanitizer, or again what changed; returns its path.

    CMake itself, as setup.py has it, which would load what it built: a Python that began without the sanitizer's
    library cannot.
    """
    folder = tree / "build"
    env = os.environ | {"CXXFLAGS": f"-O1 -fno-omit-frame-pointer {FLAGS[name]}"}
    configure = ["cmake", "-S", str(tree), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Debug", "-DDQK_CUDA=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", str(len(os.sched_getaffinity(0)))]):
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (core,) = folder.glob("_C*.so")
    assert {"thread": b"__tsan_read8", "address": b"__asan_report_load8"}[name] in core.read_bytes()
    return Path(shutil.copy2(core, tree / "dqkernels"))


@pytest.fixture(scope="module", params=FLAGS)
def built(request, tmp_path_factory):
    """(name, a copy of the tree with a core built for that sanitizer, the environment its programs run in)."""
    name = request.param
    preload = libraries(name)
    tree = tmp_path_factory.mktemp(name) / "src"
    left_out = shutil.ignore_patterns(".git", "build", "*.so", "__pycache__", "results", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=left_out)
    build(tree, name)
    suppressed = tree / "suppressed.txt"
    suppressed.write_text(SUPPRESSED, encoding="utf-8")
    options = {**OPTIONS, "TSAN_OPTIONS": f"{OPTIONS['TSAN_OPTIONS']} suppressions={suppressed}"}
    paths = os.pathsep.join([str(tree), str(tree / "tests"), *sys.path])
    return name, tree, os.environ | options | {"LD_PRELOAD": " ".join(preload), "PYTHONPATH": paths}


def run(built, program: str, isa: str) -> subprocess.CompletedProcess[str]:
    _, tree, env = built
    (core,) = tree.glob("dqkernels/_C*.so")
    arguments = [] if program in WITH_TORCH else [str(core)]
    command = [sys.executable, str(tree / "tests" / program), *arguments]
    env = env | {"DQKERNELS_CPU": isa}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=3000)


@pytest.mark.parametrize("isa", ["scalar", "of this machine"])
@pytest.mark.parametrize("program", PROGRAMS["address"])
def test_nothing_is_found(built, program, isa):
    if program not in PROGRAMS[built[0]]:
        pytest.skip("OpenMP's own waiting reads as races")
    done = run(built, program, native.native().cpu_isa() if isa != "scalar" else isa)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert '"isa"' in done.stdout


def test_a_planted_mistake_is_found(built):
    """The positive control. It comes last: the tree is not what it was."""
    name, tree, _ = built
    file, text, other, words = PLANTED[name]
    whole = (tree / file).read_text(encoding="utf-8")
    assert text in whole, f"{file} holds no {text!r} any more"
    (tree / file).write_text(whole.replace(text, other), encoding="utf-8")
    build(tree, name)
    done = run(built, "native_gemm_checks.py", "scalar")
    assert done.returncode != 0 and words in done.stderr, done.stdout[-2000:] + done.stderr[-6000:]
