"""Killed and resumed: the same losses at every step, the same weights, nothing unpickled."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_runs import KILLED, SHARED, examples, killed_run, trainer
from transformers import EarlyStoppingCallback, TrainerCallback

import dqkernels
from dqkernels.train import checkpoints
from dqkernels.train.checkpoints import CheckpointError
from dqkernels.train.losses import KDConfig

RUNS = Path(__file__).with_name("train_runs.py")
LAST = 18  # 11 batches an epoch, two a step: 6 steps an epoch, of which the sixth is a short group; three epochs


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: its folder (a checkpoint every second step), its log, its weights."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run, log = killed_run(folder)
    run.train()
    torch.set_num_threads(threads)
    assert list(log.steps) == list(range(1, LAST + 1)) and sorted(log.evals) == [6, 12, 18]
    return folder, log, run.model.state_dict()


def same_weights(a: dict, b: dict) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def only(whole_folder: Path, step: int, folder: Path) -> Path:
    shutil.copytree(whole_folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.mark.parametrize("step", [2, 6, 10, 12, 16])
def test_a_resumed_run_takes_the_same_steps(step, whole, tmp_path):
    """In the middle of an epoch (2, 10, 16) and between two (6, 12): after the last step, before the evaluation."""
    folder, log, weights = whole
    run, resumed = killed_run(only(folder, step, tmp_path))
    torch.rand(step), random.random()  # a new process stands elsewhere
    run.train(resume_from_checkpoint=True)
    assert list(resumed.steps) == list(range(step + 1, LAST + 1))
    for later, line in resumed.steps.items():
        assert line == log.steps[later], later  # every bit: losses, gradient norm, learning rate
    assert all(line == log.evals[later] for later, line in resumed.evals.items())
    assert same_weights(run.model.state_dict(), weights)


def test_the_resumed_run_writes_the_same_checkpoint(whole, tmp_path):
    folder, _, _ = whole
    run, _ = killed_run(only(folder, 8, tmp_path))
    run.train(resume_from_checkpoint=True)
    for name in ("model.safetensors", checkpoints.STATE_FILE, checkpoints.RNG_FILE):
        ours, theirs = (path / "checkpoint-14" / name for path in (tmp_path, folder))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("sampling", ["group_by_length", "batch_rebalance", "sequential"])
def test_every_order_of_the_data_resumes(sampling, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "train_sampling_strategy": sampling}
    options |= {"kd": KDConfig(), "data": examples(8), "dropout": 0.1}  # 4 steps an epoch
    _, log = _run(tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    _, resumed = _run(tmp_path / "again", resume=True, **options)
    assert resumed.steps == {step: line for step, line in log.steps.items() if step > 6} and resumed.steps


def _run(folder, resume=None, **options):
    run, log = trainer(folder, **options)
    run.train(resume_from_checkpoint=resume)
    return run, log


def test_a_checkpoint_between_two_logs_keeps_the_window(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 5,
        "logging_first_step": False,
        "max_steps": 10,
    }
    _, log = _run(tmp_path, **options)
    assert list(log.steps) == [5, 10]
    shutil.rmtree(tmp_path / "checkpoint-10"), shutil.rmtree(tmp_path / "checkpoint-8")
    _, resumed = _run(tmp_path, resume=True, **options)
    assert resumed.steps == {10: log.steps[10]}
    _, resumed = _run(tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    assert resumed.steps == log.steps


def test_early_stopping_goes_on_counting(tmp_path):
    def run(resume=None):
        made, _ = trainer(
            tmp_path,
            kd=KDConfig(),
            eval_dataset=examples(3, 1),
            compute_metrics=lambda predictions: {"bleu": 0.5},  # never better than the first
            callbacks=[EarlyStoppingCallback(early_stopping_patience=4)],
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            max_steps=9,
            metric_for_best_model="bleu",
            load_best_model_at_end=True,
        )
        made.train(resume_from_checkpoint=resume)
        return made.state

    state = run()
    assert state.global_step == 5 and state.best_global_step == 1
    assert run(str(tmp_path / "checkpoint-3")).global_step == 5


# ------------------------------------------------------------------------------------------------- what is resumed


@pytest.fixture
def log_of(caplog):
    with caplog.at_level(logging.WARNING, logger="dqkernels"):
        yield caplog


def test_torn_checkpoints_are_named_and_passed_over(whole, tmp_path, log_of):
    folder, log, _ = whole
    only(folder, 14, tmp_path), only(folder, 16, tmp_path), only(folder, 18, tmp_path)
    (tmp_path / "checkpoint-18" / checkpoints.MARKER).unlink()
    state = tmp_path / "checkpoint-16" / checkpoints.STATE_FILE
    state.write_bytes(state.read_bytes()[:-1])
    run, resumed = killed_run(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert min(resumed.steps) == 15 and resumed.steps[15] == log.steps[15]
    text = log_of.text
    assert "checkpoint-18, which has no dqkernels_checkpoint.json" in text
    assert "checkpoint-16, which has" in text and "bytes of training_state.safetensors" in text


def test_nothing_to_resume_from_is_an_error(whole, tmp_path):
    run, _ = killed_run(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from in"):
        run.train(resume_from_checkpoint=True)
    (only(whole[0], 2, tmp_path) / "checkpoint-2" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot resume: .*checkpoint-2 has no config.json"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


CHANGED = {
    "learning_rate": ({"learning_rate": 2e-3}, "learning_rate: was 0.001, is now 0.002"),
    "batch": ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: was 2, is now 4"),
    "accumulation": ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: was 2, is now 1"),
    "seed": ({"seed": 6}, "seed: was 5, is now 6"),
    "optimizer": ({"optim": "adafactor"}, "optim: was 'adamw_torch', is now 'adafactor'"),
    "kd": (
        {"kd": KDConfig(logits=0.7)},
        "kd.attention: was 2.0, is now 0.0; kd.hidden: was 0.3, is now 0.0; kd.logits",
    ),
    "data": ({"data": examples(21)}, "train_examples: was 22, is now 21"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_resume_with_other_arguments_is_refused_by_name(what, whole, tmp_path, log_of):

    changes, message = CHANGED[what]
    only(whole[0], 2, tmp_path)
    run, _ = trainer(tmp_path, eval_dataset=examples(5, 1), **{**KILLED, **changes})
    with pytest.raises(CheckpointError, match=f"written with other arguments.*{message}.*resume_changes='warn'"):
        run.train(resume_from_checkpoint=True)


def test_other_arguments_can_be_meant(whole, tmp_path, log_of):

    only(whole[0], 16, tmp_path)
    changes = {"learning_rate": 2e-3, "num_train_epochs": 4, "resume_changes": "warn"}
    run, log = trainer(tmp_path, eval_dataset=examples(5, 1), **{**KILLED, **changes})
    run.train(resume_from_checkpoint=True)
    assert list(log.steps) == list(range(17, 25))
    assert "learning_rate: was 0.001, is now 0.002" in log_of.text
    assert "another length, its schedule changes: num_train_epochs: was 3, is now 4" in log_of.text


def test_no_pickle_is_written_or_read(whole, tmp_path, monkeypatch):
    import pickle

    found = sorted(path.name for path in (whole[0] / "checkpoint-8").iterdir())
    assert found == [
        "config.json",
        checkpoints.MARKER,
        "generation_config.json",
        "model.safetensors",
        "rng_state.safetensors",
        "trainer_state.json",
        "training_arguments.json",
        "training_state.safetensors",
    ]
    only(whole[0], 14, tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin"):
        (tmp_path / "checkpoint-14" / name).write_bytes(b"not a pickle")  # what Trainer would read, were it let

    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for module, names in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "dumps", "Unpickler"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    run, log = killed_run(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert max(log.steps) == LAST
    run.save_model(str(tmp_path / "model"))
    assert not [path for path in (tmp_path / "model").iterdir() if path.suffix not in (".json", ".safetensors")]


def test_saving_a_model_over_itself_leaves_other_files(tmp_path):
    run, _ = trainer(tmp_path)
    (tmp_path / "notes").write_text("mine")
    for _ in range(2):
        run.save_model()
    assert (tmp_path / "notes").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    checkpoints.load_weights(run.model, tmp_path)


def test_an_optimizer_that_cannot_be_stored_says_so_at_the_first_save(tmp_path):
    run, _ = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)

    class Odd(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            optimizer.param_groups[0]["hook"] = print

    run.add_callback(Odd())
    with pytest.raises(TypeError, match=r"state.optimizer.param_groups.0.hook is a builtin_function_or_method"):
        run.train()
    assert not list(tmp_path.glob("*checkpoint*"))


def scored_run(folder: Path, **changes):
    """Six steps, the second of which is the best, with a checkpoint at each."""
    scores = iter([0.1, 0.9, 0.3, 0.4, 0.5, 0.2])
    settings = {"save_total_limit": 2, "max_steps": 6, **changes}
    run, _ = trainer(
        folder,
        kd=KDConfig(),
        eval_dataset=examples(3, 1),
        compute_metrics=lambda predictions: {"bleu": next(scores)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="bleu",
        **settings,
    )
    return run


def test_rotation_while_training_keeps_the_best(tmp_path):
    run = scored_run(tmp_path)
    run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_moved_run_finds_its_best_model(tmp_path):
    """transformers drops the path of before, with a warning; the next save finds the checkpoint by its step."""
    first = scored_run(tmp_path / "old")
    first.train()
    (tmp_path / "old").rename(tmp_path / "new")
    again = scored_run(tmp_path / "new", load_best_model_at_end=True)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-2")
    expected = trainer(tmp_path / "other", kd=KDConfig())[0].model
    checkpoints.load_weights(expected, tmp_path / "new" / "checkpoint-2")
    assert same_weights(again.model.state_dict(), expected.state_dict())
    assert not same_weights(again.model.state_dict(), first.model.state_dict())


# ------------------------------------------------------------------------------------------------------- processes


def environment() -> dict[str, str]:
    root = str(Path(next(iter(dqkernels.__path__))).parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_run_is_resumed_with_the_same_losses(whole, tmp_path):
    """A real SIGKILL, at a step and in a moment that nobody chose."""
    _, expected, weights = whole
    log, target = tmp_path / "log.jsonl", random.Random().randint(3, 13)
    with open(tmp_path / "output", "w") as output:
        child = subprocess.Popen(
            [sys.executable, RUNS, tmp_path / "run", log], env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while len(read(log)) < target and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random.Random().uniform(0, 0.12))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL, (tmp_path / "output").read_text()[-3000:]
    lines = read(log)
    assert target <= len(lines) < LAST
    run, resumed = killed_run(tmp_path / "run")
    run.train(resume_from_checkpoint=True)
    first = min(resumed.steps)
    assert first <= len(lines) + 1 and first % 2 == 1 and max(resumed.steps) == LAST
    for line in lines:  # the other process, before the kill
        assert {k: v for k, v in line.items() if k != "step"} == expected.steps[line["step"]], line["step"]
    for step, line in resumed.steps.items():
        assert line == expected.steps[step], step
    assert same_weights(run.model.state_dict(), weights)


def test_two_processes_are_one_with_the_same_batch(tmp_path):
    """Uneven lengths on the two sides, an epoch's last step with repeats; and a resume in the second epoch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    log = tmp_path / "log.jsonl"
    with open(tmp_path / "output", "w") as output:
        child = subprocess.Popen(
            [*command, RUNS, tmp_path / "two", log, "processes"],
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        code = child.wait(timeout=100)
    finally:
        child.terminate()  # the launcher, which then ends its workers
        child.wait(timeout=60)
    assert code == 0, (tmp_path / "output").read_text()[-3000:]
    lines = {line.pop("step"): line for line in read(log)}
    stored = json.loads((tmp_path / "two" / "found.json").read_text())
    # One process sees 22 examples where two see 24: accelerate repeats the first two of the epoch in the last step.
    # So the data sets here end before that step.
    run, single = trainer(
        tmp_path / "one", eval_dataset=examples(5, seed=1), **{**SHARED, "per_device_train_batch_size": 4}
    )

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    run.add_callback(Stop())
    run.train()
    assert sorted(single.steps) == [1, 2, 3, 4, 5] and sorted(lines) == list(range(1, 13))
    for step, line in single.steps.items():
        for name, value in line.items():
            assert lines[step][name] == pytest.approx(value, rel=2e-5), (step, name)
    resumed = {int(step): line for step, line in stored["resumed"].items()}
    assert resumed == {step: lines[step] for step in (9, 10, 11, 12)}
    assert stored["few"] == 2
    # Of 7 examples in batches of 3, two processes hold 1 and 0 in the last one: each counts once, in loss and metric.
    made, _ = trainer(tmp_path / "eval", eval_dataset=examples(7, seed=1))
    checkpoints.load_weights(made.model, tmp_path / "two" / "final")
    expected = made.evaluate()
    (line,) = (line for line in stored["history"] if "eval_loss" in line and line["step"] == 12)
    assert line["eval_seen"] == 7
    for name in ("eval_loss", "eval_loss_task", "eval_loss_cross_attention"):
        assert line[name] == pytest.approx(expected[name], rel=1e-5), name
