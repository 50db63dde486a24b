"""Runs of `benchmarks/dq_docstrings.py` take hours: one that is killed goes on, and one that is refused is not lost."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_runs
from transformers import AutoTokenizer

from dqkernels.bench import demo
from dqkernels.train import checkpoints

ROOT = Path(__file__).resolve().parents[1]
RUN = "dq_docstrings/dq-2-s0.json"
ARGS = SimpleNamespace(steps=6, batch=2, save_steps=2)


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("dq_docstrings_under_test", ROOT / "benchmarks" / "dq_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Task:
    """Six pairs of each kind; `rows` of the second stage ends the run where `killed`."""

    def __init__(self, killed: bool = False):
        self.tokenizer = AutoTokenizer.from_pretrained(demo.teacher_folder())
        self.killed = killed

    def rows(self, kind: str):
        if self.killed and kind == "teacher":
            raise KeyboardInterrupt
        return train_runs.examples(6, seed={"gold": 0, "teacher": 1}[kind])


def fit(evidence, folder: Path, killed: bool = False):
    row = evidence.Row("two stages", "", "sft", 16, learning_rate=1e-2, data="gold,teacher")
    student, facts = evidence.fit(ARGS, Task(killed), row, 0, folder, None, train_runs.model())
    return student.state_dict(), facts


def test_a_killed_run_goes_on(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evidence.tasks.time, "monotonic", iter(range(0, 10**6, 100)).__next__
    )  # 100 s from look to look
    whole, facts = fit(evidence, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(evidence, tmp_path / "killed", killed=True)
    first, _ = checkpoints.newest(tmp_path / "killed" / "stage-0")
    assert checkpoints.step_of(first) == 3, "the stage's last step is kept too"
    again, resumed = fit(evidence, tmp_path / "killed")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert facts["learning_rate"] == resumed["learning_rate"]
    assert resumed["train_seconds"] >= facts["train_seconds"] > 0, "the first sitting's seconds are counted"


def test_other_code_or_another_length_starts_over(evidence, tmp_path, monkeypatch):
    args = SimpleNamespace(unfinished=str(tmp_path), steps=6, batch=2)
    row = evidence.Row("dq 2", "", "float", 16)
    names = set()
    for changes in ({}, {"steps": 12}, {"batch": 4}):
        one = SimpleNamespace(**vars(args) | changes)
        with pytest.raises(KeyboardInterrupt), evidence.tasks.unfinished(one, "dq_2", 0, row, "data") as at:
            names.add(at.name)
            raise KeyboardInterrupt
    for recipe, data in ((evidence.Row("dq 2", "", "float", 16, rules={"head": "float"}), "data"), (row, "others")):
        with evidence.tasks.unfinished(args, "dq_2", 0, recipe, data) as at:
            assert at.name not in names
    from dqkernels.bench import record

    there = record.environment()
    with monkeypatch.context() as patch:
        patch.setattr(record, "environment", lambda: {**there, "source_sha256": "0" * 64})
        with evidence.tasks.unfinished(args, "dq_2", 0, row, "data") as at:
            assert at.name not in names
            (at / "model").mkdir()
        assert not at.exists(), "done: its folder is gone"
    assert {path.name for path in tmp_path.iterdir()} == names and len(names) == 3, "what was interrupted is there"
    with evidence.tasks.unfinished(args, "dq_2", 0, row, "data") as at:
        assert at.name in names, "and the same run goes on in it"


def data_of(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


@pytest.mark.parametrize("name", ["dq_docstrings.json", RUN])
def test_a_run_of_hours_that_is_refused_is_not_lost(evidence, tmp_path, name):
    path = tmp_path / Path(name).name
    evidence.write(path, data_of(name))
    assert json.loads(path.read_text()) == data_of(name)
    run = data_of(RUN)
    run["recipe"]["layers"] = tuple(run["recipe"]["layers"])  # as a run has them before it is written
    evidence.write(tmp_path / "run.json", run)
    assert json.loads((tmp_path / "run.json").read_text()) == data_of(RUN)
    bad = {**data_of(name), "cost": 5}
    with pytest.raises(SystemExit, match=r"does not keep its schema, see [\w-]+\.refused: .*cost"):
        evidence.write(path, bad)
    assert json.loads(path.read_text()) == data_of(name), "what was there stays"
    assert json.loads(path.with_suffix(".refused").read_text()) == bad
