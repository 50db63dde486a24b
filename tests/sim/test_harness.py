"""What harness.py and conftest.py promise to the tests that use them."""

import os
import subprocess
import sys

import numpy as np
import pytest
from harness import ROOT, BuildError, Case, build, changed, difference, given, missing, run_cases

X = np.arange(64, dtype=np.int32)


@pytest.fixture
def program(sim_program):
    return sim_program("self_test.cpp")


def case(mistake, expected, name="racing_store", status=0):
    return Case("the case", name, [mistake], [given(X), changed(np.zeros(64, np.int32))], [expected], status)


def test_a_wrong_element_is_named(program):
    expected = np.zeros(64, np.int32)
    expected[5] = 7
    with pytest.raises(AssertionError, match=r"the case, seed 0, output 0: 1 of 64 elements differ, first at \(5,\)"):
        run_cases(program, [case(0, expected)])


def test_a_result_that_depends_on_the_seed_is_named_even_where_any_bits_would_do(program):
    with pytest.raises(AssertionError, match="the case, seed 1, output 0: 64 of 64 elements differ"):
        run_cases(program, [case(1, None)])


def test_a_report_and_another_status_name_the_case(program):
    with pytest.raises(AssertionError, match=r"(?s)the case, seed 0:.*heap-buffer-overflow.*exit code 1"):
        run_cases(program, [case(1, X, "global_read")])
    with pytest.raises(AssertionError, match="the case, seed 0: Status 0, expected 3"):
        run_cases(program, [case(0, X, "global_read", 3)])


def test_bits_are_compared_not_values():
    floats = np.array([0.0, 1.0, np.nan], np.float32)
    other_nan = np.array([0x00000000, 0x3F800000, 0xFFC00001], np.uint32).view(np.float32)
    assert difference(floats, other_nan) is None
    assert "first at (0,)" in difference(floats, np.array([-0.0, 1.0, np.nan], np.float32))
    assert "expected uint8" in difference(floats, floats.view(np.uint8))


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_compiler_error_is_told_in_its_own_words(tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return missing_name; }\n")
    with pytest.raises(BuildError, match=r"(?s)^g\+\+ .*broken\.cpp:1:21: error: .missing_name. was not declared"):
        build([source])


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_equal_sources_are_built_once(tmp_path):
    source = tmp_path / "tiny.cpp"
    source.write_text(f"int main() {{ return 0; }} // {tmp_path.name} {os.getpid()}\n")
    first = build([source])
    written = first.read_bytes(), first.stat().st_ino
    assert build([source]) == first and (first.read_bytes(), first.stat().st_ino) == written
    source.write_text(source.read_text() + "// another content\n")
    assert build([source]) != first


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("others, last", [([], "sim: 1 cases x 8 schedules"), (["tests/test_pairwise.py"], "GPU: not")])
def test_the_last_line(others, last):
    """Of these tests alone: what ran. Of a run with others: still the word on the GPU, with ours above."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sim/test_simulator.py"]
    done = subprocess.run(
        [*command, *others, "-k", "every_block or pairwise"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(last)
    assert "\nsim: 1 cases x 8 schedules\n" in done.stdout
