"""tests/cuda/primitives.cu is for a GPU. Here its own logic is checked: with the simulator in the GPU's place, models
are compared with themselves, and every comparison must hold; a broken primitive must be named."""

import subprocess

import harness
import pytest

SOURCE = harness.ROOT / "tests" / "cuda" / "primitives.cu"
SHIM = ("-include", str(harness.HERE / "runtime_on_host.h"))


def ends(source):
    """Exit code and output of the program made of `source`."""
    reason = harness.missing()
    if reason is not None:
        pytest.skip(reason)
    binary = harness.build([source], SHIM)
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_program_passes_where_every_primitive_is_its_model():
    code, said = ends(SOURCE)
    assert code == 0, said
    assert said.count("ok ") >= 12 and said.endswith("\n0 failures\n"), said


def test_the_program_fails_where_one_word_differs(tmp_path):
    text = SOURCE.read_text()
    right, wrong = "out8[2 * i + 1] = w.y", "out8[2 * i + 1] = w.y ^ (i == 5)"
    assert text.count(right) == 1
    (tmp_path / "primitives.cu").write_text(text.replace(right, wrong))
    code, said = ends(tmp_path / "primitives.cu")
    assert code == 1 and "FAILED load_weights8: 1 of 4096 differ, first at 11: got" in said, said
