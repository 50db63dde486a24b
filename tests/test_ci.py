"""`.ci/run` with its tools replaced by stand-ins: where each line runs, what it leaves behind, what it says last."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / ".ci" / "run").exists(), reason="a source archive has no .ci")
TOOLS = ("pip", "pytest", "dqkernels", "ruff", "lint-imports", "clang-format", "git", "python", "python3")
#: One stand-in for every tool: notes its name and folder, and does the little that the script relies on.
STAND_IN = """#!/bin/sh
name=$(basename "$0")
echo "$name $1 $PWD" >> "$NOTES"
case "$name $1" in
  "python3 -m") mkdir -p "$3/bin" && touch "$3/bin/activate" ;;
  "python -") exec "$REAL_PYTHON" "$@" ;;
  "dqkernels demo") printf '{"rows": [%s]}' "$ROWS" > demo.json && touch demo.png ;;
  "pytest "*) printf 'skipped: 0\\n%s\\n' "$LAST_LINE"; exit "$PYTEST_CODE" ;;
esac
"""
SCORES = {"teacher": 20.0, "W8": 20.0, "W4": 20.0, "W2": 15.0, "DQ-2": 19.0}
ROWS = ", ".join(f'{{"name": "{name}", "rougeL": {score}, "ratio": 4.0}}' for name, score in SCORES.items())


def ci(tmp_path, last_line: str, pytest_code: int = 0):
    """Runs a copy of the script in a little repository; the finished process, its notes, and the repository."""
    repository, tools = tmp_path / "repository", tmp_path / "tools"
    (repository / ".ci").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(ROOT / ".ci" / "run", repository / ".ci" / "run")
    shutil.copy(ROOT / "README.md", repository / "README.md")
    for name in TOOLS:
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    given = {"NOTES": str(tmp_path / "notes"), "REAL_PYTHON": sys.executable, "ROWS": ROWS}
    given |= {"LAST_LINE": last_line, "PYTEST_CODE": str(pytest_code), "TMPDIR": str(tmp_path)}
    environment = {**os.environ, **given, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run([str(repository / ".ci" / "run")], env=environment, capture_output=True, text=True)
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    return done, notes, repository


@pytest.mark.parametrize("last_line", ["GPU: not run", "GPU: 12 tests ran"])
def test_both_readme_lines_run_in_copies_of_their_own_and_the_last_line_is_pytests(tmp_path, last_line):
    done, notes, repository = ci(tmp_path, last_line)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == last_line
    folders = {name: Path(words[-1]) for name, *words in notes}
    assert folders["dqkernels"].name == folders["pytest"].name == "src" and folders["dqkernels"] != folders["pytest"]
    assert repository not in (folders["dqkernels"], folders["pytest"])
    # `pip install -e` points at the second copy: what follows must look at the same files.
    assert folders["ruff"] == folders["lint-imports"] == folders["pytest"]
    assert sorted(path.name for path in repository.iterdir()) == [".ci", "README.md"], "the checkout is left as it was"
    assert not list(tmp_path.glob("tmp*")), "and no copy of it stays"


def test_a_failing_pytest_fails_the_run(tmp_path):
    done, notes, _ = ci(tmp_path, "GPU: not run", pytest_code=1)
    assert done.returncode != 0 and "ruff" not in {name for name, *_ in notes}


def test_files_of_a_demo_in_the_root_do_not_make_a_record_dirty():
    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0

    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout")
    assert ignored("demo.json") and ignored("demo.png")
    assert not ignored("benchmarks/results/demo.json") and not ignored("docs/demo.md")
