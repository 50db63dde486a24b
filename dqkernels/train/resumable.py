"""A `Seq2SeqTrainer` that can be killed at any moment: its checkpoints are whole or ignored, and hold everything.

The order of the examples is a function of (seed, epoch) alone, never of the global random state or of how many epochs
this process has seen. Checkpoints are those of `dqkernels.train.checkpoints`, without pickle. A run that was killed and
resumed takes the steps that the uninterrupted one would have taken, bit for bit on a CPU.

It overrides methods of `Trainer` that exist alike in transformers 5.17 to 5.24; `HOOKS` names them, and the class
refuses to work where one is gone.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState

from dqkernels.train import checkpoints
from dqkernels.train.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

#: Methods of Trainer that this class and `DistillationTrainer` override or call, beside the documented ones.
HOOKS = (
    "get_batch_samples",
    "_run_epoch",
    "_get_train_sampler",
    "_get_output_dir",
    "_save",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_best_model",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_load_rng_state",
    "_prepare_inputs",
)


class EpochSampler(torch.utils.data.Sampler):
    """A sampler of torch or transformers that draws from a generator, made a function of (seed, epoch).

    Args:
        inner: a sampler with a `generator` attribute.
        seed: of the run.
    """

    def __init__(self, inner: torch.utils.data.Sampler, seed: int):
        self.inner, self.seed, self.epoch = inner, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        digest = hashlib.sha256(f"{self.seed}, {self.epoch}".encode()).digest()
        self.inner.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return iter(self.inner)


class ResumableTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` with complete checkpoints and an exact resume.

    Args:
        args: `Seq2SeqTrainingArguments`.
        resume_changes: "refuse" (a resume with other arguments that change the numbers raises) or "warn".
        kwargs: of `Seq2SeqTrainer`.

    Raises:
        ValueError: for what would write pickles: DeepSpeed, FSDP, tensor or context parallelism, and push_to_hub during
            training.
    """

    def __init__(self, model=None, args=None, *, resume_changes: str = "refuse", **kwargs):
        gone = [name for name in HOOKS if not callable(getattr(Seq2SeqTrainer, name, None))]
        if gone:
            raise RuntimeError(f"this release of transformers has no Trainer.{', Trainer.'.join(gone)}")
        if resume_changes not in ("refuse", "warn"):
            raise ValueError(f"resume_changes must be 'refuse' or 'warn', got {resume_changes!r}")
        self.resume_changes = resume_changes
        if args is not None and args.push_to_hub:
            raise ValueError(
                "push_to_hub=True writes training_args.bin, a pickle, at every checkpoint: call trainer.push_to_hub() "
                "after training"
            )
        super().__init__(model=model, args=args, **kwargs)
        self._refuse_sharding()

    def extra_state(self) -> dict[str, Any]:
        """What a subclass wants in the checkpoint beside the optimizer (see `checkpoints.pack`); all processes call."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes what `extra_state` returned, tensors on the CPU."""

    def extra_arguments(self) -> dict[str, Any]:
        """What must be the same in a resumed run beside the training arguments: `{name: plain JSON}`."""
        return {}

    # ------------------------------------------------------------------------------------------ order of the data

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        if hasattr(sampler, "generator"):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = EpochSampler(sampler, seed)
        self._train_sampler = sampler
        return sampler

    def _run_epoch(self, *args, **kwargs):
        # accelerate forwards set_epoch through two wrappers at most; skipping batches in a process of many takes three.
        if hasattr(getattr(self, "_train_sampler", None), "set_epoch"):
            self._train_sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------ resume

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As of Trainer.

        Args:
            resume_from_checkpoint: True: the newest complete checkpoint of `args.output_dir` (incomplete ones are named
                in a warning); or the folder of one.

        Raises:
            CheckpointError: (a ValueError) if there is none, it is incomplete, or was written with other arguments that
                change the numbers (`resume_changes="warn"` goes on).
        """
        if resume_from_checkpoint is True:
            output = self.args.output_dir
            found, rejected = checkpoints.newest(output)
            for path, reason in rejected.items():
                logger.warning("ignoring %s, which %s", path, reason)
            if found is None:
                raise CheckpointError(f"no complete checkpoint to resume from in {output}")
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            reason = checkpoints.why_not(resume_from_checkpoint)
            if reason is not None:
                raise CheckpointError(f"cannot resume: {resume_from_checkpoint} {reason}")
            self._compare_arguments(Path(resume_from_checkpoint))
            self._restore_callbacks(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _compare_arguments(self, folder: Path) -> None:
        stored = checkpoints.load_arguments(folder / checkpoints.ARGUMENTS_FILE)
        changed, longer = checkpoints.compare_arguments(stored, self._arguments())
        if longer:
            logger.warning("resuming a run of another length, its schedule changes: %s", "; ".join(longer))
        if not changed:
            return
        message = f"{folder} was written with other arguments, which changes the numbers: {'; '.join(changed)}"
        if self.resume_changes == "refuse":
            raise CheckpointError(f"{message}. Use the same ones, or resume_changes='warn'")
        logger.warning(message)

    def _restore_callbacks(self, folder: Path) -> None:
        """Gives callbacks what they had counted (patience of early stopping)."""
        stored = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).stateful_callbacks
        for callback in self.callback_handler.callbacks:
            state = stored.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(state, dict):
                for name, value in state.get("attributes", {}).items():
                    setattr(callback, name, value)

    def _arguments(self) -> dict[str, Any]:
        size = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        return {
            "arguments": self.args.to_dict(),
            "world_size": self.accelerator.num_processes,
            "train_examples": size,
            **self.extra_arguments(),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("loading the best model, of %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = checkpoints.load_state(Path(checkpoint) / checkpoints.STATE_FILE)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])
            scaler = getattr(self.accelerator, "scaler", None)
            if scaler is not None and state["scaler"] is not None:
                scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"the optimizer of {checkpoint} does not fit: {error}") from error
        self.load_extra_state(state["extra"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: `_load_optimizer_and_scheduler` has read it. Trainer's would unpickle a file."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        rows = checkpoints.load_rng(Path(checkpoint) / checkpoints.RNG_FILE)
        processes, index = len(rows["torch_cpu"]), self.accelerator.process_index
        if index >= processes:
            logger.warning(
                "%s has random states of %d processes, none for this one: dropout differs", checkpoint, processes
            )
            return
        checkpoints.set_rng_state({name: row[index] for name, row in rows.items()}, self.args.device)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial))
        target = run / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        # What all processes take part in comes first; then one of them writes.
        rng = {
            name: self.accelerator.gather(row[None].to(self.args.device))
            for name, row in checkpoints.rng_state(self.args.device).items()
        }
        extra = self.extra_state()
        if self.args.should_save:
            resumable = not self.args.save_only_model
            with checkpoints.writing(target, resumable=resumable) as folder:
                self.save_model(str(folder), _internal_call=True)
                if resumable:
                    self._save_training_state(folder, extra)
                    checkpoints.save_rng(folder / checkpoints.RNG_FILE, rng)
                self._export_callbacks()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            logger.info("saved %s", target)
            best = self.state.best_model_checkpoint
            checkpoints.rotate(run, self.args.save_total_limit, (target, *([Path(best)] if best else [])))
        self.accelerator.wait_for_everyone()

    def _save_training_state(self, folder: Path, extra: dict[str, Any]) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "extra": extra,
        }
        checkpoints.save_state(folder / checkpoints.STATE_FILE, state)

    def _export_callbacks(self) -> None:
        found: dict[str, Any] = {}
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: s[0] if len(s) == 1 else s for name, s in found.items()}

    def _save(self, output_dir: str | os.PathLike | None = None, state_dict: dict | None = None) -> None:
        """Model, tokenizer and training arguments (JSON), each file whole or not there."""
        if not self.args.should_save:
            return
        with checkpoints.replacing_files(Path(output_dir or self.args.output_dir)) as folder:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(folder, state_dict=state_dict)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            checkpoints.save_arguments(folder / checkpoints.ARGUMENTS_FILE, self._arguments())
        if not Path(output_dir or self.args.output_dir).name.endswith(".tmp"):  # a checkpoint says its name when whole
            logger.info("saved %s", output_dir)

    def _refuse_sharding(self) -> None:
        parallel = getattr(self.accelerator, "parallelism_config", None)
        kinds = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled,
            "tensor, context or sequence parallelism": getattr(parallel, "non_data_parallel_size", 1) > 1,
        }
        used = [name for name, here in kinds.items() if here]
        if used:
            raise ValueError(
                f"{' and '.join(used)}: optimizer checkpoints of that kind are pickles, which dqkernels neither writes "
                "nor reads. Use plain data parallelism (accelerate launch --multi_gpu)"
            )
