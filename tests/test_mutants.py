"""Would we notice? A few planted defects on every change; all of them: `python tests/mutants/run.py`."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutants"))
import run as mutants  # noqa: E402

ALL = mutants.load()
QUICK = [mutant for mutant in ALL if mutant.quick]


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies(mutant):
    text = (mutants.ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} moved on: give {mutant.name} its new text"
    assert mutant.old != mutant.new
    for test in mutant.tests:
        if test.startswith("tests/"):
            assert (mutants.ROOT / test).is_file()


@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: mutant.name)
def test_the_tests_notice(mutant):
    """The rest of this suite, in the same run, is the proof that the unchanged tree is green."""
    if "triton" in mutant.tests[0] and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: its checks would be skipped, not red")
    said = mutants.survives(mutant)
    assert said is None, f"{mutant.name} survived ({mutant.why}):\n{said}"


def test_a_mutant_that_does_not_apply_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="gone: `old` occurs 0 times in a.py, wanted once"):
        mutants.plant(tmp_path, mutants.Mutant("gone", "", "a.py", "y = 1", "y = 2", ()))
