"""Small training runs for the trainer's tests; as a program, a run to be killed, or one of several processes.

python tests/train_runs.py OUTPUT LOG [resume]              trains until it is killed or done
python -m torch.distributed.run --nproc_per_node 2 tests/train_runs.py OUTPUT LOG processes
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from tiny_models import VOCAB, make
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from dqkernels.train.losses import KDConfig
from dqkernels.train.trainer import DistillationTrainer

transformers.utils.logging.disable_progress_bar()
ALL_TERMS = KDConfig(task=1.0, logits=0.5, hidden=0.3, attention=2.0)
_DROPOUT = ("dropout", "attention_dropout", "activation_dropout", "dropout_rate")


def model(family: str = "bart", dropout: float = 0.0, noise: float = 0.0) -> torch.nn.Module:
    """A tiny model of random weights; `noise` moves it away from the others of its family."""
    found = make(family)
    if family == "t5":  # its class has no default
        found.config.decoder_start_token_id = found.generation_config.decoder_start_token_id = 0
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in found.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    for module in found.modules():
        if isinstance(module, torch.nn.Dropout):  # T5
            module.p = dropout
        for name in _DROPOUT:  # BART: floats of the layers
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)
    return found


def examples(n: int, seed: int = 0) -> list[dict]:
    """n pairs of token ids, of uneven lengths on both sides."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(2, 13, (), generator=generator))
        return [*torch.randint(4, VOCAB, (length,), generator=generator).tolist(), 2]

    return [{"input_ids": ids(), "labels": ids()} for _ in range(n)]


def collate(features: list[dict]) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        length = max(len(f[name]) for f in features)
        return torch.tensor([[*f[name], *[value] * (length - len(f[name]))] for f in features])

    batch = {"input_ids": padded("input_ids", 1), "labels": padded("labels", -100)}
    batch["attention_mask"] = torch.tensor(
        [[1] * len(f["input_ids"]) + [0] * (batch["input_ids"].shape[1] - len(f["input_ids"])) for f in features]
    )
    return batch


def arguments(output: Path, **changes) -> Seq2SeqTrainingArguments:
    """Losses of every step logged, nothing saved; SGD, whose steps show any error of the gradient as it is."""
    settings = {
        "output_dir": str(output),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "seed": 5,
    }
    return Seq2SeqTrainingArguments(**{**settings, **changes})


class Log(TrainerCallback):
    """Every line of training (and of evaluation, under "eval") in memory, and in a JSON-lines file if one is named."""

    def __init__(self, path: Path | None = None):
        self.path, self.steps, self.evals = path, {}, {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        kept = {k: v for k, v in logs.items() if k.startswith("loss") or k in ("grad_norm", "learning_rate")}
        if "loss" in logs:
            self.steps[state.global_step] = kept
        elif "eval_loss" in logs:
            self.evals[state.global_step] = {k: v for k, v in logs.items() if k.startswith("eval_loss")}
        if self.path and state.is_world_process_zero and "loss" in logs:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": state.global_step, **kept}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def trainer(output, family="bart", kd=ALL_TERMS, dropout=0.0, data=None, log=None, callbacks=(), **changes):
    """A trainer, and the `Log` of its losses."""
    log = Log() if log is None else log
    options = {
        name: changes.pop(name) for name in ("eval_dataset", "resume_changes", "compute_metrics") if name in changes
    }
    prepare = changes.pop("prepare", lambda student: student)
    made = DistillationTrainer(
        model=prepare(model(family, dropout)),
        teacher=model(family, noise=0.05) if kd.needs_teacher else None,
        kd=kd,
        args=arguments(output, **changes),
        train_dataset=examples(22) if data is None else data,
        data_collator=collate,
        callbacks=[log, *callbacks],
        **options,
    )
    return made, log


#: The run that is killed: AdamW, dropout, accumulation with a short last group (11 batches an epoch), evaluation.
KILLED = {
    "dropout": 0.1,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "epoch",
}


def killed_run(output: Path, log: Path | None = None, callbacks=()):
    return trainer(output, log=Log(log), eval_dataset=examples(5, seed=1), callbacks=callbacks, **KILLED)


class Slow(TrainerCallback):
    """Leaves the killer time to hit any step."""

    def on_step_end(self, *args, **kwargs):
        import time

        time.sleep(0.1)


#: The run of several processes: 22 examples, two of them in each of two processes at a step, 6 steps an epoch.
SHARED = {
    "num_train_epochs": 2,
    "eval_strategy": "epoch",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 8,
}


def _processes(output: Path, log: Path) -> None:
    several = {"ddp_backend": "gloo", "ddp_timeout": 60}  # a worker that waits for another ends, and fails the test
    options = {"eval_dataset": examples(7, seed=1), "compute_metrics": seen, **several, **SHARED}
    options |= {"predict_with_generate": True, "generation_max_length": 4}
    made, _ = trainer(output, log=Log(log), **options)
    made.train()
    # In the middle of the second epoch.
    again, resumed = trainer(output, **options)
    again.train(resume_from_checkpoint=str(output / "checkpoint-8"))
    # Parameters behind the last map that is compared have no part in the loss.
    few, _ = trainer(output / "few", kd=KDConfig(task=0, attention=1), max_steps=2, **several)
    few.train()
    if made.args.process_index == 0:
        made.model.save_pretrained(output / "final")
        found = {"resumed": resumed.steps, "history": made.state.log_history, "few": few.state.global_step}
        (output / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads hang now and then when torch takes the groups down; everything is written


def seen(predictions) -> dict[str, int]:
    """A metric: how many predictions there are."""
    return {"seen": len(predictions.predictions)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, path, *how = sys.argv[1:]
    if how == ["processes"]:
        _processes(Path(folder), Path(path))
    else:
        run, _ = killed_run(Path(folder), Path(path), [Slow()])
        run.train(resume_from_checkpoint=True if how == ["resume"] else None)
