"""Builds the optional native extension dqkernels._C with CMake. The rest of the package is in pyproject.toml.

DQKERNELS_BUILD       auto (default)  CPU kernels, and CUDA kernels if there is an nvcc; failures are left out
                      cpu, cuda       exactly that, and a failure stops the installation
                      none            no extension: eager and Triton backends only
DQKERNELS_CUDA_ARCHS  e.g. "80;90a"; default: the card in this machine, else every generation that nvcc knows

What was built, and why something was not, is written to dqkernels/_build_info.json beside the extension.
"""

import atexit
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
ARCH = re.compile(r"(\d{2,3})([af]?)(-real|-virtual)?")
# One for each major version: what is compiled for 8.0 runs on 8.6 and 8.9, and nothing here gains from knowing them.
GENERATIONS = (80, 90, 100, 120)
OLDEST = 80  # int8 mma.m16n8k32 and cp.async begin here
TAIL_LINES = 40


class BuildError(Exception):
    """A part could not be built; `tail` holds the last lines the tool printed."""

    def __init__(self, sentence, tail=()):
        super().__init__(sentence)
        self.tail = list(tail)


# ---- choices: pure functions, tested in tests/test_build.py ------------------------------------------------


def parse_mode(text):
    """DQKERNELS_BUILD -> one of MODES; unset or empty is auto."""
    mode = (text or "auto").strip()
    if mode not in MODES:
        raise ValueError(f"DQKERNELS_BUILD={text} is not valid; it must be one of {', '.join(MODES)}")
    return mode


def parse_archs(text, known=None):
    """DQKERNELS_CUDA_ARCHS -> list in CMake's spelling, or None if unset. `known`: what this nvcc knows."""
    if text is None or not text.strip():
        return None
    archs = []
    for item in re.split(r"[;,]", text):
        item = item.strip()
        match = ARCH.fullmatch(item)
        if match is None:
            raise ValueError(
                f"DQKERNELS_CUDA_ARCHS={text}: {item!r} is not an architecture; write for example 80;86;90a, "
                "each optionally with -real or -virtual"
            )
        number = int(match[1])
        if number < OLDEST:
            raise ValueError(f"DQKERNELS_CUDA_ARCHS={text}: the kernels need {OLDEST} or newer, found {item}")
        if known and number not in known:
            options = ", ".join(str(n) for n in sorted(known) if n >= OLDEST)
            raise ValueError(f"DQKERNELS_CUDA_ARCHS={text}: this nvcc knows {options}, not {item}")
        if item not in archs:
            archs.append(item)
    return archs


def parse_known(listing):
    """`nvcc --list-gpu-arch` -> {75, 80, ...}."""
    return {int(n) for n in re.findall(r"compute_(\d+)", listing)}


def parse_cards(listing):
    """`nvidia-smi --query-gpu=compute_cap --format=csv,noheader` -> sorted [86, 90]; junk is ignored."""
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", listing, re.MULTILINE)
    return sorted({int(major) * 10 + int(minor) for major, minor in found})


def real(number):
    """Machine code of one generation. 90a is 90 with the instructions that only Hopper has."""
    return "90a-real" if number == 90 else f"{number}-real"


def choose_archs(cards, known):
    """Machine code for the cards, or for every generation, plus PTX of the newest for cards that come later.

    Returns (archs, reason). No archs: no card here can run the kernels.
    """
    usable = [card for card in cards if card >= OLDEST]
    if cards and not usable:
        return [], f"the card's compute capability {cards[-1] / 10} is below {OLDEST / 10}"
    wanted = [number for number in (usable or GENERATIONS) if number in known]
    if wanted:
        reason = "for the card in this machine" if usable else "no card was seen: for every generation"
        return [real(number) for number in wanted] + [f"{max(wanted)}-virtual"], reason
    older = [number for number in known if OLDEST <= number <= max(usable or GENERATIONS)]
    if not older:
        return [], "this nvcc compiles for none of " + ", ".join(str(n) for n in usable or GENERATIONS)
    return [f"{max(older)}-virtual"], "this nvcc does not know the card yet: PTX only, compiled by the driver"


def plan(mode, nvcc):
    """The attempts in order, each True (with CUDA) or False (CPU only)."""
    if mode == "none":
        return []
    if mode == "cpu":
        return [False]
    if mode == "cuda":
        return [True]
    return [True, False] if nvcc else [False]


# ---- the machine -------------------------------------------------------------------------------------------


def output_of(*command):
    """What a command prints, or "" if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def find_tool(name, bin_dir):
    """The wheel that this Python has (off the PATH, perhaps, without build isolation), else the PATH's."""
    try:
        folder = getattr(importlib.import_module(name), bin_dir)
    except (ImportError, AttributeError):
        return shutil.which(name)
    return shutil.which(name, path=folder) or shutil.which(name)


def find_nvcc(env=os.environ):
    """$CUDACXX, then $CUDA_HOME or $CUDA_PATH, then the PATH, then the usual place."""
    if env.get("CUDACXX"):
        return shutil.which(env["CUDACXX"])
    for home in (env.get("CUDA_HOME"), env.get("CUDA_PATH")):
        if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def nvcc_version(nvcc):
    match = re.search(r"release [\d.]+, V([\d.]+)", output_of(nvcc, "--version")) if nvcc else None
    return match[1] if match else None


def compiler_version():
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    lines = output_of(*compiler.split(), "--version").splitlines() if compiler else []
    return lines[0] if lines else None


def stream(command):
    """Runs a command, shows its output as it comes, raises BuildError with the tail if it fails."""
    print("+", " ".join(command), flush=True)
    tail = deque(maxlen=TAIL_LINES)
    try:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        with subprocess.Popen(command, **pipe) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                tail.append(line.rstrip())
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if process.returncode != 0:
        error = next((line.strip() for line in tail if re.search(r"\berror\b", line, re.IGNORECASE)), "")
        sentence = f"{Path(command[0]).name} failed with exit code {process.returncode}"
        raise BuildError(f"{sentence} ({error})" if error else sentence, tail)


class CMakeExtension(Extension):
    def __init__(self, name, optional):
        super().__init__(name, sources=[], optional=optional)


class BuildExt(build_ext):
    """A fresh build directory per attempt: a failed choice in CMake's cache poisons the next good build."""

    def run(self):
        self.info = {
            "mode": parse_mode(os.environ.get("DQKERNELS_BUILD")),
            "cpu": False,
            "cuda": False,
            "archs": [],
            "nvcc": None,
            "compiler": None,
            "seconds": 0.0,
            "reasons": [],
            "error_tail": [],
        }
        super().run()
        folders = [Path(self.build_lib) / "dqkernels"]
        if self.inplace:
            folders.append(ROOT / "dqkernels")
            if not self.info["cpu"]:  # an extension of an earlier build must not pass for this one's
                (ROOT / self.get_ext_filename("dqkernels._C")).unlink(missing_ok=True)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build_info.json").write_text(json.dumps(self.info, indent=1) + "\n")

    def build_extension(self, ext):
        info, mode, started = self.info, self.info["mode"], time.monotonic()
        nvcc = find_nvcc() if mode in ("auto", "cuda") else None
        info["nvcc"], info["compiler"] = nvcc_version(nvcc), compiler_version()
        if mode == "none":
            info["reasons"].append("DQKERNELS_BUILD=none")
        if mode == "auto" and not nvcc:
            info["reasons"].append("cuda: no nvcc was found")
        for cuda in plan(mode, nvcc):
            part = "cuda" if cuda else "cpu"
            try:
                archs = self.cuda_archs(nvcc) if cuda else []
                self.compile(Path(self.get_ext_fullpath(ext.name)), archs, nvcc)
            except BuildError as error:
                info["reasons"].append(f"{part}: {error}")
                info["error_tail"] = error.tail or info["error_tail"]
                if mode != "auto":
                    raise CompileError(f"DQKERNELS_BUILD={mode}: {error}") from error
                print(f"dqkernels: {part} failed and is left out: {error}", file=sys.stderr, flush=True)
            else:
                info.update(cpu=True, cuda=cuda, archs=archs)
                break
        info["seconds"] = round(time.monotonic() - started, 1)

    def cuda_archs(self, nvcc):
        if not nvcc:
            raise BuildError("no nvcc was found; install the CUDA toolkit, or set CUDA_HOME or CUDACXX")
        known = parse_known(output_of(nvcc, "--list-gpu-arch"))
        if not known:
            raise BuildError("nvcc --list-gpu-arch printed no architectures")
        archs = parse_archs(os.environ.get("DQKERNELS_CUDA_ARCHS"), known)
        if archs is not None:
            return archs
        cards = parse_cards(output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"))
        archs, reason = choose_archs(cards, known)
        if not archs:
            raise BuildError(reason)
        self.info["reasons"].append(f"cuda: {reason}")
        return archs

    def compile(self, target, archs, nvcc):
        """Builds in a temporary directory; the module goes to `target` once it has been seen to load."""
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 is missing (pip install 'pybind11>=3')") from error
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        if not cmake or not ninja:
            raise BuildError("cmake and ninja are needed (pip install 'cmake>=3.24' ninja)")
        with tempfile.TemporaryDirectory(prefix="dqkernels-cmake-") as folder:
            configure = [cmake, "-S", str(ROOT), "-B", folder, "-G", "Ninja"]
            configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
            configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            configure += [f"-DDQK_CUDA={'ON' if archs else 'OFF'}"]
            if archs:
                configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DDQK_CUDA_ARCHS={';'.join(archs)}"]
            stream(configure)
            build = [cmake, "--build", folder]
            if not os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL"):
                build += ["--parallel", str(usable_cores())]
            stream(build)
            built = list(Path(folder).glob("_C.*"))
            if len(built) != 1:
                raise BuildError(f"expected one extension module, the build made {len(built)}")
            stream([sys.executable, "-c", LOAD, str(built[0])])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # a process that has an old one mapped keeps it
            shutil.copy2(built[0], target)


# An extension that links but does not load (an undefined symbol, a missing library) is a failed build.
LOAD = (
    "import importlib.util as u, sys; s = u.spec_from_file_location('dqkernels._C', sys.argv[1]); "
    "m = u.module_from_spec(s); s.loader.exec_module(m); print('loaded, abi', m.abi_version())"
)


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class SourceDistribution(sdist):
    """Adds the sources of the native core, the tests and the scripts to the package's own files."""

    def make_distribution(self):
        for folder in ("benchmarks", "csrc", "docs", "python", "tests"):
            self.filelist.graft(folder)
        for name in ("CHANGELOG.md", "CMakeLists.txt", "LICENSE", ".clang-format"):
            self.filelist.include(name)
        for pattern in ("*.so", "*.o", "*.py[cod]", "_build_info.json"):  # what one machine built never travels
            self.filelist.global_exclude(pattern)
        super().make_distribution()


def main():
    try:
        mode = parse_mode(os.environ.get("DQKERNELS_BUILD"))
        parse_archs(os.environ.get("DQKERNELS_CUDA_ARCHS"))
    except ValueError as error:
        raise SystemExit(f"dqkernels: {error}") from None
    # setuptools' own build folder is fresh too: an old one would bring back a file since renamed, or an
    # extension that was not built this time.
    folder = tempfile.mkdtemp(prefix="dqkernels-build-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    setup(
        ext_modules=[CMakeExtension("dqkernels._C", optional=mode in ("auto", "none"))],
        cmdclass={"build_ext": BuildExt, "sdist": SourceDistribution},
        options={"build": {"build_base": folder}},
    )


if __name__ == "__main__":
    main()
