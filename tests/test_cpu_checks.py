"""tests/cpu_checks.py, which runs the core's check programs on a processor that nobody ran before: what it says."""

import json
from pathlib import Path

import cpu_checks
import pytest

from dqkernels.kernels import native

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")


def test_it_runs_every_program_there_is():
    here = Path(__file__).parent
    programs = {path.name for path in here.glob("*_checks*.py") if 'if __name__ == "__main__":' in path.read_text()}
    assert {name for name in programs if name.startswith(("cpu_", "native_"))} == {
        *cpu_checks.PROGRAMS,
        "cpu_checks.py",
    }


def test_it_names_what_failed(tmp_path, monkeypatch, capsys):
    """With programs of its own: all well, other bits, a failure, another instruction set, no time."""
    text = "import json, os, sys; isa = os.environ['DQKERNELS_CPU']; print(json.dumps({'isa': isa, 'digest': DIGEST}))"
    for name, digest in (("same.py", "'d'"), ("other.py", "isa"), ("broken.py", "missing"), ("blind.py", "'d'")):
        body = text.replace("DIGEST", digest)
        (tmp_path / name).write_text(body.replace("'isa': isa", "'isa': 'mmx'") if name == "blind.py" else body)
    monkeypatch.setattr(cpu_checks, "HERE", tmp_path)

    def ends(*names, seconds="60"):
        monkeypatch.setattr(cpu_checks, "PROGRAMS", dict.fromkeys(names, False))
        code = cpu_checks.main(["scalar", "avx2", "--jobs", "1", "--seconds", seconds])
        out = capsys.readouterr().out
        return code, json.loads(out.splitlines()[-1]), out

    code, last, _ = ends("same.py")
    assert code == 0 and last["cpu_isas"] == ["scalar", "avx2"] and last["runs"] == 2
    assert last["failed"] == last["unfinished"] == [] and last["other_bits"] == 0
    code, last, out = ends("same.py", "other.py")
    assert code == 1 and last["other_bits"] == 1 and "other bits: other.py" in out
    code, last, out = ends("broken.py", "same.py")
    assert code == 1 and last["failed"] == ["avx2 broken.py", "scalar broken.py"] and "NameError" in out
    code, last, out = ends("blind.py")
    assert code == 1 and len(last["failed"]) == 2 and "it ran with mmx" in out
    (tmp_path / "same.py").write_text("import time; time.sleep(60)")
    code, last, out = ends("same.py", seconds="2")
    assert code == 1 and last["unfinished"] == ["avx2 same.py", "scalar same.py"] and "no time left" in out
