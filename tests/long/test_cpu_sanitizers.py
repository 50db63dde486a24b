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
from typing import NamedTuple

import pytest

from dqkernels.kernels import native

pybind11 = pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")

ROOT = Path(__file__).resolve().parents[2]
#: A step's threads come together even where they are more than processors (csrc/cpu/threads.cpp).
FLAGS = {
    "thread": "-DDQK_TEAM_ALWAYS -fsanitize=thread",
    "address": "-DDQK_TEAM_ALWAYS -fsanitize=address,undefined -fno-sanitize-recover=all",
}
LIBRARIES = {"thread": ("libtsan.so",), "address": ("libasan.so", "libubsan.so")}
#: glibc frees what a thread that ended had for its thread-local data, in another thread, by locks of its own.
SUPPRESSED = "race:_dl_deallocate_tls\n"
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_signal_unsafe=0 die_after_fork=0",
    "ASAN_OPTIONS": "detect_leaks=0 exitcode=66 handle_segv=0",  # guard pages fault by themselves
    "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
}
PROGRAMS = {
    "thread": ("native_checks.py", "native_gemm_checks.py", "native_thread_checks.py"),
    "address": (
        "native_checks.py",
        "native_gemm_checks.py",
        "native_thread_checks.py",
        "cpu_norm_checks.py",
        "cpu_attention_checks_decode.py",  # those of prefill too
        "cpu_token_checks.py",
        "cpu_beam_checks.py",
    ),
}
#: Of pytest, under addresses: operands past 2^31 elements, and whole models whose steps and layers are native calls.
TESTS = ("test_cpu_large.py", "test_decode_native.py", "test_models_encoder.py")


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


class Planted(NamedTuple):
    """A mistake that its sanitizer has to find, in the words of `finding`; `cases` of `native_thread_checks.py` run
    into it."""

    file: str
    text: str
    other: str
    cases: tuple[str, ...]
    finding: str


RACE, OVERFLOW = "ThreadSanitizer: data race", "AddressSanitizer: heap-buffer-overflow"
#: A local variable that all threads have in common, or one buffer for all; and buffers or rows too short or too long.
PLANTED = {
    "thread": (
        Planted(
            "csrc/cpu/threads.cpp",
            "next.fetch_add(1, std::memory_order_relaxed)",
            "(*reinterpret_cast<int64_t*>(&next))++",
            ("linear_of_rows",),
            RACE,
        ),
        Planted("csrc/cpu/quantize.cpp", "int32_t sum = 0;", "static int32_t sum; sum = 0;", ("quantizer",), RACE),
        Planted(
            "csrc/cpu/norm.cpp", "float* sum = buffer", "static float* sum; sum = buffer", ("norm_and_codes",), RACE
        ),
        Planted(
            "csrc/cpu/norm.cpp", "uint32_t most = 0;", "static uint32_t most; most = 0;", ("gelu_and_codes",), RACE
        ),
        Planted(
            "csrc/cpu/attention.cpp",
            " " * 16 + "int64_t count = 0;",
            "static int64_t count; count = 0;",
            ("attention",),
            RACE,
        ),
        Planted(
            "csrc/cpu/attention_decode.cpp",
            "int64_t length = 0;",
            "static int64_t length; length = 0;",
            ("attention_over_caches",),
            RACE,
        ),
        Planted(
            "csrc/cpu/cache_write.cpp",
            "const int64_t first = args",
            "static int64_t first; first = args",
            ("writing_into_caches",),
            RACE,
        ),
        Planted("csrc/cpu/embedding.cpp", "EmbeddingRow row =", "static EmbeddingRow row; row =", ("embedding",), RACE),
        Planted("csrc/cpu/decoder_step.cpp", "CpuGemm call =", "static CpuGemm call; call =", ("a_step",), RACE),
        Planted("csrc/cpu/threads.cpp", "working_.load() > 0;", "false;", ("a_step",), RACE),
        Planted(
            "csrc/cpu/step_ends.cpp",
            "float x[kChunk], bias[kChunk], sum[kChunk];",
            "static float x[kChunk], bias[kChunk], sum[kChunk];",
            ("logits_of_16_bits",),
            RACE,
        ),
        Planted("csrc/cpu/beam_search.cpp", "all + source * apart", "all", ("candidates_by_a_heap",), RACE),
        Planted(
            "csrc/cpu/encoder_layer.cpp",
            "CpuPart parts[kMaxParts];",
            "static CpuPart parts[kMaxParts];",
            ("encoder_of_norms_before",),
            RACE,
        ),
    ),
    "address": (
        Planted(
            "csrc/cpu/gemm.cpp",
            "call_scratch.get(prepared_bytes + (together ? code_bytes : 0) + 192)",
            "call_scratch.get(prepared_bytes / 2)",
            ("linear_of_rows",),
            OVERFLOW,
        ),
        Planted(
            "csrc/cpu/norm.cpp",
            "Buffer buffer(3 * Buffer::bytes_of<float>(k));",
            "Buffer buffer(Buffer::bytes_of<float>(k));",
            ("norm_and_codes",),
            OVERFLOW,
        ),
        Planted(
            "csrc/cpu/attention_decode.cpp",
            " + Buffer::bytes_of<int32_t>(args.caches));",
            ");",
            ("attention_of_rows_that_share_a_cache",),
            OVERFLOW,
        ),
        Planted("csrc/cpu/decoder_step.cpp", "r < rows_.rows", "r <= rows_.rows", ("a_step",), OVERFLOW),
        Planted(
            "csrc/cpu/decoder_step.cpp",
            "static_cast<int32_t>(position + 1)",
            "1 << (position + 32)",
            ("a_step",),
            "runtime error: shift exponent",
        ),
        Planted(
            "csrc/cpu/beam_search.cpp",
            " + args.sources * Buffer::bytes_of<Scored>(places));",
            ");",
            ("candidates_by_a_heap",),
            OVERFLOW,
        ),
        Planted(
            "csrc/cpu/encoder_layer.cpp",
            "Buffer buffer(bytes);",
            "Buffer buffer(bytes / 2);",
            ("encoder_of_norms_behind",),
            OVERFLOW,
        ),
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


def run(built, program: str, isa: str, *cases: str) -> subprocess.CompletedProcess[str]:
    _, tree, _ = built
    (core,) = tree.glob("dqkernels/_C*.so")
    arguments = [str(core), *cases] if program.startswith("native_") else []  # others find the core themselves
    return start(built, [str(tree / "tests" / program), *arguments], isa)


def start(built, arguments: list[str], isa: str) -> subprocess.CompletedProcess[str]:
    _, tree, env = built
    env = env | {"DQKERNELS_CPU": isa}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True, timeout=3000)


@pytest.mark.parametrize("isa", ["scalar", "of this machine"])
@pytest.mark.parametrize("program", PROGRAMS["address"])
def test_nothing_is_found(built, program, isa):
    if program not in PROGRAMS[built[0]]:
        pytest.skip("OpenMP's own waiting reads as races")
    done = run(built, program, native.native().cpu_isa() if isa != "scalar" else isa)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert '"isa"' in done.stdout


@pytest.mark.parametrize("file", TESTS)
def test_nothing_is_found_by_pytest(built, file):
    if built[0] != "address":
        pytest.skip("OpenMP's own waiting reads as races")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}"]
    done = start(built, command, native.native().cpu_isa())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    assert " passed" in done.stdout and "skipped: 0" in done.stdout, done.stdout[-2000:]


def test_planted_mistakes_are_found(built):
    """The positive control. It comes last: the tree is not what it was."""
    name, tree, _ = built
    for planted in PLANTED[name]:
        file = tree / planted.file
        whole = file.read_text(encoding="utf-8")
        assert whole.count(planted.text) >= 1, f"{planted.file} holds no {planted.text!r} any more"
        file.write_text(whole.replace(planted.text, planted.other), encoding="utf-8")
        build(tree, name)
        done = run(built, "native_thread_checks.py", "scalar", *planted.cases)
        found = done.stdout[-2000:] + done.stderr[-6000:]
        assert done.returncode != 0 and planted.finding in done.stderr, f"{planted}: {found}"
        file.write_text(whole, encoding="utf-8")
