"""`DistillationTrainer`: `Seq2SeqTrainer` with a teacher, and with sums that add up.

The loss is `sum over terms of kd.weight(term) * sums[term] / counts[term]` (`dqkernels.train.losses`), with the counts
of the whole optimizer step: over all accumulated batches and all processes. So four batches of two examples give the
loss and the gradient of one batch of eight, whatever their lengths. transformers 5 averages the means of the batches
where a model's forward takes no `num_items_in_batch` (BART's and T5's take none): a short batch weighs like a long one.

The eval loss is the same formula over the whole eval set, with dropout off. Evaluation leaves every random number
generator as it found it: how often one evaluates does not change the training. Checkpoints, resume and the order of the
data: `dqkernels.train.resumable`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainingArguments

from dqkernels import hf
from dqkernels.data import prepare
from dqkernels.nn import PackedModule
from dqkernels.train import checkpoints, losses
from dqkernels.train.losses import KDConfig
from dqkernels.train.resumable import ResumableTrainer
from dqkernels.train.student import LayerMap, fix_positions_, layer_map_of

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "labels")


class DistillationTrainer(ResumableTrainer):
    """Trains a student, float or quantized (`prepare_qat`), from labels, from a teacher, or both.

    Args:
        model: the student, an encoder-decoder of transformers. One in 16 bits becomes float32, with a warning: an
            optimizer's steps are lost in 16 (`args.bf16` runs the forward pass in bfloat16 all the same).
        teacher: an encoder-decoder with the same vocabulary (and sizes, as the terms need them; see `layer_map_of`), or
            None where no term needs one. It may be packed. It is moved to the training device at its first use, keeps
            its dtype, runs in eval mode without gradients, outside of autocast, and is never saved.
        kd: weights of the loss terms, `KDConfig()` (labels alone) by default.
        args: `Seq2SeqTrainingArguments`.
        kwargs: of `ResumableTrainer` (resume_changes) and `Seq2SeqTrainer` (train_dataset, eval_dataset, data_collator,
            processing_class, compute_metrics, callbacks, ...).

    Logged beside `loss`: every term as `loss_<term>`, unweighted, so `loss` is the weighted sum of them; averaged over
    the steps since the last log, and over processes. In evaluation `eval_loss` and `eval_loss_<term>`.

    Terms of attention maps take an attention implementation that returns maps: "eager", in both models, while training
    and evaluation run. Behind it both have their own again, which is what an exported model runs.

    Raises:
        ValueError: for an empty dataset, one without the columns input_ids and labels, a packed student, a missing or
            unfit teacher, an attention implementation without attention maps where a term needs them,
            label_smoothing_factor (use `KDConfig(label_smoothing=)`), compute_loss_func, and as `ResumableTrainer`.
    """

    loss_is_scaled_for_ga = True  # transformers 5.23 and 5.24; 5.17 asks model_accepts_loss_kwargs, set below

    def __init__(
        self,
        model: nn.Module | None = None,
        teacher: nn.Module | None = None,
        kd: KDConfig | None = None,
        args: Seq2SeqTrainingArguments | None = None,
        **kwargs: Any,
    ):
        self.kd = KDConfig() if kd is None else kd
        #: What else must be the same in a resumed run, plain JSON; `dqkernels train` puts its models and data here.
        self.run_arguments: dict[str, Any] = {}
        _check_arguments(args, kwargs)
        if model is not None:
            _check_student(model)
        if self.kd.needs_teacher and teacher is None:
            raise ValueError(f"{self.kd} compares with a teacher: pass teacher=, or set its weights to 0")
        if teacher is not None and teacher is model:
            raise ValueError("teacher and model are the same object: make_student(teacher) copies it")
        _check_dataset("train_dataset", kwargs.get("train_dataset"))
        evals = kwargs.get("eval_dataset")
        for name, dataset in evals.items() if isinstance(evals, dict) else [("", evals)]:
            _check_dataset(f"eval_dataset[{name!r}]" if name else "eval_dataset", dataset)
        self.teacher = teacher if self.kd.needs_teacher else None
        self._pair: tuple[nn.Module, Any] | None = None  # the student that was checked, and its layer map
        self._switched: list[tuple[PreTrainedModel, str]] | None = None  # whose attention is "eager" for now, and was
        self._window: dict[str, torch.Tensor] = {}  # sums over steps of the terms since the last log
        self._window_start: int | None = None  # the step before its first
        self._eval_sums: dict[str, torch.Tensor] = {}
        self._eval_counts: dict[str, torch.Tensor] = {}
        caches = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        # Trainer switches the model's cache off for good, and saved and exported students would say so. Every forward
        # pass of training asks for none itself.
        if caches is not None:
            self.model.config.use_cache = caches
        self.model_accepts_loss_kwargs = True  # or 5.17 divides by the accumulation steps once more
        with self._attention_maps():
            self._layer_map()

    # ------------------------------------------------------------------------------------------------------ loss

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step, and the counts of all terms over them and over all processes.

        Returns:
            The batches, with decoder_input_ids, and `{term: fp64 scalar}` in place of transformers' number of items.
        """
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(self._with_decoder_inputs(batch))
        if not batches:
            return [], None
        totals: dict[str, torch.Tensor] = {}
        for batch in batches:
            _add(totals, {term: count.to(device) for term, count in losses.counts(batch, self.kd).items()})
        return batches, self._over_processes(totals, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of one batch: its share of the optimizer step's, so that the shares of all batches add up.

        Args:
            model: the student, perhaps wrapped by accelerate.
            inputs: a batch.
            return_outputs: whether to return the student's outputs too.
            num_items_in_batch: the counts of `get_batch_samples`; None: the batch is a step of its own.

        Returns:
            An fp32 scalar, multiplied by the number of processes: their gradients are averaged, not added.
        """
        inputs = self._with_decoder_inputs(inputs)
        whole_step = isinstance(num_items_in_batch, Mapping)
        counts = num_items_in_batch if whole_step else losses.counts(inputs, self.kd)
        sums, outputs = self._sums(model, inputs)
        terms = losses.means(sums, counts)
        if whole_step:
            terms = {term: value * self.accelerator.num_processes for term, value in terms.items()}
            if model.training:
                if self._window_start is None:
                    self._window_start = self.state.global_step
                _add(self._window, {term: value.detach().double() for term, value in terms.items()})
        loss = self._weighted(terms).float()
        if self.kd.task == 0 and self.kd.logits == 0:
            # Parameters behind the last compared tensor get a gradient (of zero) too: DDP waits for one of each.
            loss = loss + 0.0 * outputs.logits[:1, :1].sum()
        return (loss, outputs) if return_outputs else loss

    def _sums(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
        """Runs student and teacher on a batch; the sums of all terms, and the student's outputs."""
        with self._attention_maps():
            return self._sums_of_maps(model, inputs)

    def _sums_of_maps(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
        layer_map = self._layer_map()
        wanted = {name: value for name, value in inputs.items() if name != "labels"}
        wanted |= {"use_cache": False, "return_dict": True}
        if self.kd.needs_hidden:
            wanted["output_hidden_states"] = True
        if self.kd.needs_attention:
            wanted["output_attentions"] = True
        outputs, teacher_outputs = model(**wanted), None
        if self.teacher is not None:
            if next(iter(self.teacher.parameters())).device != self.args.device:
                self.teacher.to(self.args.device)
            self.teacher.eval()
            with torch.no_grad():
                teacher_outputs = self.teacher(**wanted)
        return losses.sums(outputs, teacher_outputs, inputs, self.kd, layer_map), outputs

    def _layer_map(self) -> LayerMap | None:
        """Checks teacher against student, once per student (a `model_init` makes new ones)."""
        if self._pair is None or self._pair[0] is not self.model:
            _check_student(self.model)
            _make_trainable(self.model, self.kd)
            self._switch_attention()
            found = None if self.teacher is None else layer_map_of(self.model, self.teacher, self.kd)
            self._pair = self.model, found
        return self._pair[1]

    @contextlib.contextmanager
    def _attention_maps(self):
        """Where a term needs them, both models return attention maps inside; behind it they attend as they did."""
        if self._switched is not None:
            yield
            return
        self._switched = []
        try:
            self._switch_attention()
            yield
        finally:
            for part, implementation in reversed(self._switched):
                part.set_attn_implementation(implementation)
            self._switched = None

    def _switch_attention(self) -> None:
        if self.kd.needs_attention:
            for who, model in (("student", self.model), ("teacher", self.teacher)):
                _give_attention_maps(model, who, self._switched)

    def _with_decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        if inputs.get("decoder_input_ids") is None and inputs.get("labels") is not None:
            shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:  # M2M100 and NLLB: transformers has none for them
                inputs["decoder_input_ids"] = prepare.shifted(inputs["labels"], self.model.config)
            else:
                inputs["decoder_input_ids"] = shift(labels=inputs["labels"])
        return inputs

    def _weighted(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return sum(self.kd.weight(term) * value for term, value in terms.items())

    def _over_processes(self, values: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
        """fp64 scalars, added ("sum") or averaged ("mean") over processes; all of them must call."""
        if self.accelerator.num_processes == 1 or not values:
            return values
        names = sorted(values)
        stacked = torch.stack([values[name].double().to(self.args.device) for name in names])
        return dict(zip(names, self.accelerator.reduce(stacked, how).unbind(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As of Trainer, with every term of the loss in the lines of training."""
        if "loss" in logs and self._window_start is not None:
            steps = max(self.state.global_step - self._window_start, 1)
            terms = self._over_processes(self._window, "mean")
            terms = {term: value / steps for term, value in terms.items()}
            loss = float(self._weighted(terms))
            if math.isfinite(loss) or not self.args.logging_nan_inf_filter:
                logs["loss"] = loss
            logs.update({f"loss_{term}": float(value) for term, value in sorted(terms.items())})
            self._window, self._window_start = {}, None
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        self._window, self._window_start = {}, None
        with self._attention_maps():
            return super().train(*args, **kwargs)

    train.__doc__ = ResumableTrainer.train.__doc__

    def extra_state(self) -> dict[str, Any]:
        """The logging window: a checkpoint may lie between two logs."""
        return {"window": self._over_processes(self._window, "mean"), "start": self._window_start}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes what `extra_state` returned."""
        self._window = {term: value.to(self.args.device) for term, value in state["window"].items()}
        self._window_start = state["start"]

    def extra_arguments(self) -> dict[str, Any]:
        """The weights of the loss, how the student computes and what it was made of, and `run_arguments`."""
        config = self.model.config
        made = {name: getattr(config, name, None) or {} for name in ("dqkernels_qat", "dqkernels_student")}
        return {"kd": dataclasses.asdict(self.kd), **made, "run": self.run_arguments}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As of Trainer, without learned steps: they are logarithms, and a smaller one is no simpler one."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("weight_log_step")]

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As of Trainer. The loss is the training loss over the whole set, and no random number generator moves.

        Each example counts once, in the loss and in `compute_metrics`, also where accelerate fills the last batches of
        several processes with repeats.
        """
        self._eval_sums, self._eval_counts = {}, {}
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer takes the repeats along
        with checkpoints.kept_rng(self.args.device), self._attention_maps():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self._eval_sums:
            sums = self._over_processes(self._eval_sums, "sum")
            counts = self._over_processes(self._eval_counts, "sum")
            terms = losses.means(sums, counts)
            output.metrics[f"{metric_key_prefix}_loss"] = float(self._weighted(terms))
            output.metrics.update({f"{metric_key_prefix}_loss_{t}": float(v) for t, v in sorted(terms.items())})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """As of Seq2SeqTrainer, with this class's loss.

        Returns:
            (loss of the batch, generated tokens or logits, labels as they came), each perhaps None.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        if labels is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        complete = self._with_decoder_inputs(inputs)
        rows = labels.shape[0]
        own = self._own_rows(rows)
        part = complete
        if own < rows:
            part = {k: v[: max(own, 1)] if torch.is_tensor(v) and v.dim() else v for k, v in complete.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            counts = losses.counts(part, self.kd)
            sums, outputs = self._sums(model, part)
        # Of a batch of repeats alone, zeros are added: every process has to know the names of the terms.
        for totals, values in ((self._eval_sums, sums), (self._eval_counts, counts)):
            _add(totals, values if own else {term: torch.zeros_like(value) for term, value in values.items()})
        loss = losses.total(sums, counts, self.kd)
        if prediction_loss_only or self.args.prediction_loss_only:
            return loss, None, None
        if not self.args.predict_with_generate:
            if own < rows:
                with torch.no_grad(), self.compute_loss_context_manager():
                    outputs = self._sums(model, complete)[1]
            return loss, outputs.logits, labels
        # Seq2SeqTrainer would run the model once more for the model's own loss: it sees no labels.
        free = {name: value for name, value in inputs.items() if name != "labels"}
        given = inputs.get("decoder_input_ids")
        if given is not None and given.shape == labels.shape:  # made from the labels, not a prompt
            free = {k: v for k, v in free.items() if k not in ("decoder_input_ids", "decoder_attention_mask")}
        _, tokens, _ = super().prediction_step(model, free, False, ignore_keys, **gen_kwargs)
        return loss, tokens, labels

    def _own_rows(self, rows: int) -> int:
        """How many rows of an eval batch count: accelerate fills the last batches of all processes with repeats."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)


def _add(totals: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        totals[name] = totals[name] + value.detach() if name in totals else value.detach()


def _check_arguments(args: Any, kwargs: Mapping[str, Any]) -> None:
    if not isinstance(args, Seq2SeqTrainingArguments):
        raise ValueError(f"args must be transformers.Seq2SeqTrainingArguments, got {type(args).__name__}")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not for this loss: use KDConfig(label_smoothing=...)")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func is not for this trainer: its loss is that of KDConfig")


def _check_student(model: nn.Module) -> None:
    if getattr(model, "hf_quantizer", None) is not None or any(isinstance(m, PackedModule) for m in model.modules()):
        hf.DQHfQuantizer.is_qat_trainable.fget(model)  # raises: the sentence is written there
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        raise ValueError(f"model must be an encoder-decoder of transformers, got {type(model).__name__}")


def _make_trainable(model: PreTrainedModel, kd: KDConfig) -> None:
    """Makes a student of 16 bits float32, in place, keeps all its layers where they are compared, and leaves tables
    alone that are made of a formula."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    if found:
        logger.warning(
            "the student has %s parameters and is made float32: the steps of an optimizer are lost in 16 bits; "
            "bf16=True runs its forward pass in bfloat16",
            " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found)),
        )
        model.float()
    if kd.needs_hidden or kd.needs_attention:
        stacks = [module for module in model.modules() if getattr(module, "layerdrop", 0)]
        for stack in stacks:  # M2M100's own configuration says 0.05
            stack.layerdrop = 0.0
        if stacks:
            logger.warning("layerdrop of the student is now 0: every layer is compared with one of the teacher's")
    fix_positions_(model)


def _check_dataset(name: str, dataset: Any) -> None:
    """Raises where a dataset is empty, or is known to lack a column; what cannot be asked is let through."""
    if dataset is None or isinstance(dataset, str):
        return
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    found = getattr(dataset, "column_names", None)
    if found is None and isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        first = dataset[0]
        found = list(first) if isinstance(first, Mapping) else None
    missing = [column for column in COLUMNS if found is not None and column not in found]
    if missing:
        raise ValueError(f"{name} has no column {' and no column '.join(missing)}: it has {', '.join(map(str, found))}")


def _give_attention_maps(model: Any, who: str, switched: list[tuple[PreTrainedModel, str]]) -> None:
    """Makes a model return its attention maps: "eager", or dqkernels' own attention, which returns them too.

    Args:
        switched: takes every part that was switched, and the implementation it had.
    """
    if model is None:
        return
    # One by one: transformers 5.17 leaves out parts that copied the config, such as T5's stacks.
    for part in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        now = part.config._attn_implementation
        if now == "eager" or str(now).startswith("dqkernels"):
            continue
        message = f"attention maps of the {who} ({type(model).__name__}, attn_implementation={now!r}) are needed"
        try:
            part.set_attn_implementation("eager")
        except Exception as error:
            raise ValueError(f"{message}: it cannot be switched to 'eager' ({error})") from error
        if part.config._attn_implementation != "eager":
            raise ValueError(f"{message}: load it with attn_implementation='eager'")
        switched.append((part, now))
        if part is model:
            logger.debug("%s: is 'eager' meanwhile", message)
