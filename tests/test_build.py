"""The choices of setup.py: what to build, for which architectures, and in which words it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("setuptools")
if not (ROOT / "setup.py").is_file():
    pytest.skip("setup.py is not beside the tests", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("dqkernels_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

NVCC_13 = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121}
NVCC_12_4 = {50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90}


@pytest.mark.parametrize(
    ("text", "mode"), [(None, "auto"), ("", "auto"), ("cuda", "cuda"), (" cpu ", "cpu"), ("none", "none")]
)
def test_mode(text, mode):
    assert build.parse_mode(text) == mode


@pytest.mark.parametrize("text", ["everything", "CUDA", "auto,cpu", "1"])
def test_another_mode_is_refused_with_the_valid_ones(text):
    with pytest.raises(ValueError, match=f"DQKERNELS_BUILD={text} .*auto, cpu, cuda, none"):
        build.parse_mode(text)


def test_plan():
    assert build.plan("none", "nvcc") == []
    assert build.plan("cpu", "nvcc") == [False]
    assert build.plan("cuda", None) == [True]  # and fails, loudly
    assert build.plan("auto", "nvcc") == [True, False]
    assert build.plan("auto", None) == [False]


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        (None, None),
        ("  ", None),
        ("80", ["80"]),
        ("80;90a", ["80", "90a"]),
        ("80, 90a-real ,120-virtual", ["80", "90a-real", "120-virtual"]),
        ("86;86", ["86"]),
        ("100f-real", ["100f-real"]),
    ],
)
def test_archs(text, archs):
    assert build.parse_archs(text, NVCC_13) == archs
    assert build.parse_archs(text) == archs


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("native", "'native' is not an architecture"),
        ("sm_80", "'sm_80' is not an architecture"),
        ("8.0", "'8.0' is not an architecture"),
        ("80;", "'' is not an architecture"),
        ("80-ptx", "'80-ptx' is not an architecture"),
        ("80; rm -rf", "'rm -rf' is not an architecture"),
        ("75", "need 80 or newer, found 75"),
        ("80;95", "this nvcc knows 80, 86, .*, not 95"),
    ],
)
def test_other_archs_are_refused(text, sentence):
    with pytest.raises(ValueError, match="DQKERNELS_CUDA_ARCHS=.*" + sentence):
        build.parse_archs(text, NVCC_13)


def test_listings_are_read():
    assert build.parse_known("compute_75\ncompute_80\ncompute_90a\n") == {75, 80, 90}
    assert build.parse_known("") == set()
    assert build.parse_cards("9.0\n8.6\n9.0\n") == [86, 90]
    assert build.parse_cards("12.0\n") == [120]
    assert build.parse_cards("NVIDIA-SMI has failed\n[N/A]\n") == []


def test_without_a_card_every_known_generation_is_built():
    archs, reason = build.choose_archs([], NVCC_13)
    assert archs == ["80-real", "90a-real", "100-real", "120-real", "120-virtual"]
    assert "no card" in reason
    assert build.choose_archs([], NVCC_12_4)[0] == ["80-real", "90a-real", "90-virtual"]
    assert build.choose_archs([], {70, 75}) == ([], "this nvcc compiles for none of 80, 90, 100, 120")


@pytest.mark.parametrize(
    ("cards", "known", "archs"),
    [
        ([90], NVCC_13, ["90a-real", "90-virtual"]),
        ([80, 86], NVCC_13, ["80-real", "86-real", "86-virtual"]),
        ([75, 86], NVCC_13, ["86-real", "86-virtual"]),  # the older card of two is left out
        ([103], NVCC_13, ["103-real", "103-virtual"]),
        ([120], NVCC_12_4, ["90-virtual"]),  # a card newer than the toolkit: the driver compiles
        ([75], NVCC_13, []),
    ],
)
def test_a_card_decides(cards, known, archs):
    found, reason = build.choose_archs(cards, known)
    assert found == archs
    assert reason


def test_card_too_old_is_named():
    assert build.choose_archs([75], NVCC_13)[1] == "the card's compute capability 7.5 is below 8.0"


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    def tool(folder):
        path = tmp_path / folder / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    named, home, on_path = tool("named"), tool("home/bin"), tool("path")
    monkeypatch.setenv("PATH", str(Path(on_path).parent))
    assert build.find_nvcc({"CUDACXX": named, "CUDA_HOME": str(tmp_path / "home")}) == named
    assert build.find_nvcc({"CUDA_HOME": str(tmp_path / "home")}) == home
    assert build.find_nvcc({"CUDA_PATH": str(tmp_path / "home")}) == home
    assert build.find_nvcc({}) == on_path
    assert build.find_nvcc({"CUDACXX": str(tmp_path / "gone")}) is None  # named and absent: no silent other one


def test_failing_tool_leaves_its_last_lines():
    with pytest.raises(build.BuildError, match="exit code 3") as caught:
        build.stream([sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    assert caught.value.tail == ["why"]
    with pytest.raises(build.BuildError, match=r"exit code 1 \(a.c:1: error: no\)"):
        build.stream([sys.executable, "-c", "print('a.c:1: error: no'); print('stopped'); raise SystemExit(1)"])
    with pytest.raises(build.BuildError, match="could not be run"):
        build.stream([os.devnull + "/nothing"])


# ---- whole builds of the smallest kind: no compiler gets to run --------------------------------------------


def run_build(tmp_path, **env):
    """`setup.py build_ext` into tmp_path; returns the process and what the build wrote down."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DQKERNELS_", "CUDA", "CXX"))}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=300)
    written = tmp_path / "dqkernels" / "_build_info.json"
    return done, json.loads(written.read_text()) if written.is_file() else None


def test_mode_none_installs_without_the_extension(tmp_path):
    done, info = run_build(tmp_path, DQKERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert (info["mode"], info["cpu"], info["cuda"]) == ("none", False, False)
    assert info["reasons"] == ["DQKERNELS_BUILD=none"]
    assert not list(tmp_path.glob("dqkernels/_C*"))


def test_auto_survives_a_broken_compiler_and_says_so(tmp_path):
    done, info = run_build(tmp_path, CXX="/bin/false", CUDACXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert (info["cpu"], info["cuda"]) == (False, False)
    assert any(r.startswith("cuda: ") for r in info["reasons"])
    assert any(r.startswith("cpu: cmake failed") for r in info["reasons"])
    assert any("compiler" in line for line in info["error_tail"])


def test_a_forced_part_fails_loudly(tmp_path):
    done, info = run_build(tmp_path, DQKERNELS_BUILD="cpu", CXX="/bin/false")
    assert done.returncode != 0 and "DQKERNELS_BUILD=cpu: cmake failed" in done.stderr
    assert info is None
    done, _ = run_build(tmp_path, DQKERNELS_BUILD="cuda", CUDACXX="/nowhere/nvcc")
    assert done.returncode != 0 and "no nvcc was found" in done.stderr


def test_wrong_values_stop_before_anything_is_built(tmp_path):
    done, _ = run_build(tmp_path, DQKERNELS_BUILD="everything")
    assert done.returncode != 0 and "auto, cpu, cuda, none" in done.stderr
    done, _ = run_build(tmp_path, DQKERNELS_CUDA_ARCHS="sm_90")
    assert done.returncode != 0 and "not an architecture" in done.stderr


def test_a_source_distribution_holds_what_builds_and_tests_it(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    teacher = "dqkernels/data/docstring_teacher/model.safetensors"
    wanted = ["CMakeLists.txt", "csrc/include/dqk/api.h", "tests/mutants/core.toml", "benchmarks/gpu_lane.py",
              "docs/cli.md", teacher, teacher.replace("teacher", "student"), "LICENSE", "README.md"]  # fmt: skip
    assert not [name for name in wanted if name not in names]
    assert any(name.startswith("python/") and name.endswith(".cpp") for name in names)
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]
