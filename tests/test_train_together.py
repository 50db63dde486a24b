"""The trainer and a quantized student together: sums, resume, best checkpoint, export, learned steps, processes."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from test_train_resume import environment
from tiny_models import logits
from train_runs import KILLED, examples, trainer

import dqkernels
from dqkernels import DQConfig
from dqkernels.train import export, load_trained, packed_copy, prepare_qat
from dqkernels.train.checkpoints import CheckpointError

CONFIG = DQConfig(weight_bits=2, embedding_bits=4, attention="int8")
prepared = functools.partial(prepare_qat, config=CONFIG, learned_scale=True)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(made) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


@pytest.mark.parametrize("family", ["bart", "mbart", "t5"])
def test_four_batches_are_one_large_batch(family, tmp_path):
    """One step: per-token codes do not look at the batch. (Later steps may differ by a code that rounding flips.)"""
    found = []
    for size, steps in ((8, 1), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        made, log = trainer(tmp_path, family, max_steps=1, learning_rate=0.02, prepare=prepared, **split)
        made.train()
        found.append((log.steps[1], parameters(made)))
    (loss, whole), (other, parts) = found
    assert all(abs(loss[name] - other[name]) <= 3e-6 * abs(loss[name]) + 1e-9 for name in loss)
    assert all(torch.allclose(whole[name], parts[name], atol=2e-6) for name in whole)


@pytest.mark.parametrize("step", [4, 6])
def test_resumed_in_the_middle_and_between_epochs(tmp_path, step):
    run, log = trainer(tmp_path / "whole", eval_dataset=examples(5, 1), prepare=prepared, **KILLED)
    run.train()
    again, resumed = trainer(tmp_path / "again", eval_dataset=examples(5, 1), prepare=prepared, **KILLED)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert list(resumed.steps) == list(range(step + 1, 19)) and all(
        resumed.steps[n] == log.steps[n] for n in resumed.steps
    )
    mine, theirs = parameters(again), parameters(run)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # A checkpoint is a trained model: it exports, to the bits that the trainer's own model has.
    last = tmp_path / "whole" / "checkpoint-18"
    model = load_trained(last)
    export(model, tmp_path / "packed", dtype=torch.float32)
    packed = dqkernels.load(tmp_path / "packed", dtype="float32")
    assert torch.equal(logits(run.model.eval()), logits(packed))


def test_resuming_with_other_bits_or_data_is_refused(tmp_path):
    """Learned steps of two bits have the shapes of those of four: nothing else would tell."""
    run, _ = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, prepare=prepared)
    run.train()
    wider = functools.partial(prepare_qat, config=DQConfig(weight_bits=4, embedding_bits=4), learned_scale=True)
    again, _ = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, prepare=wider)
    with pytest.raises(CheckpointError, match="dqkernels_qat.weight_bits: was 2, is now 4"):
        again.train(resume_from_checkpoint=True)
    again, _ = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, prepare=prepared)
    again.run_arguments = {"sources": "others"}
    with pytest.raises(CheckpointError, match="run.sources: was None, is now 'others'"):
        again.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_brings_its_steps_back(tmp_path):
    """load_best_model_at_end: weights and learned steps of that evaluation, not of the last."""
    scores = iter([0.9, 0.1])
    made, _ = trainer(
        tmp_path, eval_dataset=examples(5, 1), prepare=prepared, num_train_epochs=2, learning_rate=0.05,
        save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, compute_metrics=lambda found: {"score": next(scores)},
    )  # fmt: skip
    made.train()
    best = load_trained(made.state.best_model_checkpoint)
    wanted = dict(best.named_parameters())
    assert any(name.endswith("weight_log_step") for name in wanted)
    assert all(torch.equal(p, wanted[name]) for name, p in parameters(made).items())
    assert torch.equal(logits(made.model.eval()), logits(best))


def test_learned_steps_move_and_do_not_decay(tmp_path):
    made, _ = trainer(
        tmp_path, max_steps=2, prepare=prepared, optim="adamw_torch", weight_decay=0.1, learning_rate=1e-2
    )
    before = parameters(made)
    decayed = made.get_decay_parameter_names(made.model)
    steps = [name for name in before if name.endswith("weight_log_step")]
    assert steps and not set(steps) & set(decayed) and any(name.endswith("fc1.weight") for name in decayed)
    made.train()
    after = parameters(made)
    assert all(not torch.equal(before[name], after[name]) for name in steps)


def test_bf16_training_exports_what_it_trained(tmp_path):
    """A step under autocast, finite and not nothing; the export is that of the checkpoint, without the autocast."""
    made, log = trainer(tmp_path, max_steps=2, bf16=True, prepare=prepared)
    before = parameters(made)
    made.train()
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in parameters(made).values())
    assert any(not torch.equal(p, before[name]) for name, p in parameters(made).items()) and len(log.steps) == 2
    made.save_model(str(tmp_path / "saved"))
    wanted = logits(load_trained(tmp_path / "saved"))
    assert wanted.dtype == torch.float32 and torch.equal(logits(packed_copy(made.model, torch.float32)), wanted)


def test_accelerates_wrapper_is_not_exported():
    """After bf16 training the student's `forward` is accelerate's, an attribute of the instance."""
    model = prepared(tiny_models.make("bart")).eval()
    wanted = logits(packed_copy(model, torch.float32))
    model._original_forward, model.forward = model.forward, lambda *args, **kwargs: None
    packed = packed_copy(model, torch.float32)
    assert "forward" not in packed.__dict__ and torch.equal(logits(packed), wanted)


def test_two_processes_train_a_quantized_student(tmp_path):
    """DDP waits for a gradient of every parameter, tied heads and learned steps too; gloo, two steps, equal weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    with open(tmp_path / "output", "w") as output:
        child = subprocess.Popen([*command, str(tmp_path)], env=environment(), stdout=output, stderr=subprocess.STDOUT)
    try:
        code = child.wait(timeout=100)
    finally:
        child.terminate()  # the launcher, which then ends its workers
    assert code == 0, (tmp_path / "output").read_text()[-3000:]
    made, log = trainer(tmp_path / "one", max_steps=2, per_device_train_batch_size=4, prepare=prepared)
    made.train()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert abs(lines[0]["loss"] - log.steps[1]["loss"]) < 2e-5 * abs(log.steps[1]["loss"])
    stored = torch.load(tmp_path / "weights.pt", weights_only=True)
    theirs = parameters(made)
    assert stored.keys() == theirs.keys()
    assert all(torch.allclose(stored[name], theirs[name], atol=1e-3) for name in theirs)


def _process(output: str) -> None:
    import os
    from pathlib import Path

    from train_runs import Log

    torch.set_num_threads(1)
    folder = Path(output)
    several = {"ddp_backend": "gloo", "ddp_timeout": 60}
    made, _ = trainer(folder / "two", log=Log(folder / "log.jsonl"), max_steps=2, prepare=prepared, **several)
    made.train()
    if made.is_world_process_zero():
        torch.save(parameters(made), folder / "weights.pt")
    os._exit(0)  # gloo may hang while it is torn down


if __name__ == "__main__":
    _process(sys.argv[1])
