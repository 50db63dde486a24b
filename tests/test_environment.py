"""The environment variables: what they may hold, in one sentence each, and the same lists as where they are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dqkernels import environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in environment.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("DQKERNELS_BACKEND", "bogus", "DQKERNELS_BACKEND must be one of auto, eager, triton, cuda, cpu, got 'bogus'"),
        ("DQKERNELS_CPU", "avx1024", "DQKERNELS_CPU must be one of scalar, avx2, avx_vnni, .*, got 'avx1024'"),
        ("DQKERNELS_BUILD", "everything", "DQKERNELS_BUILD must be one of auto, cpu, cuda, none, got 'everything'"),
        ("DQKERNELS_CUDA_ARCHS", "80;sm_90", "must list architectures such as 80;86;90a, .* got '80;sm_90'"),
        ("DQKERNELS_CUDA_ARCHS", "80;;90", "DQKERNELS_CUDA_ARCHS must list"),
    ],
)  # fmt: skip
def test_what_is_refused(name, value, sentence, monkeypatch):
    environment.check()
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        environment.check()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("DQKERNELS_BACKEND", ["", "auto", "eager", "triton", "cuda", "cpu"]),
        ("DQKERNELS_CPU", ["", *environment.CPU_ISAS]),
        ("DQKERNELS_BUILD", ["", *environment.BUILD_MODES]),
        ("DQKERNELS_CUDA_ARCHS", ["", " ", "80", "80;86,90a-real", "120-virtual"]),
    ],
)
def test_what_passes(name, values, monkeypatch):
    for value in values:
        monkeypatch.setenv(name, value)
        environment.check()


def test_the_lists_are_those_of_the_places_that_read_them():
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the sources are not beside the tests")
    modes = re.search(r"^MODES = \((.*)\)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    assert tuple(re.findall(r'"(\w+)"', modes)) == environment.BUILD_MODES
    names = re.search(r"kNames\[kIsaCount\] = \{(.*?)\}", (ROOT / "csrc/cpu/isa.cpp").read_text(), re.DOTALL)[1]
    assert tuple(re.findall(r'"(\w+)"', names)) == environment.CPU_ISAS
