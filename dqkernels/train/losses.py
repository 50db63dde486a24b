"""The terms of the distillation loss, as sums and counts, so that they add up over any split of a batch.

    loss = sum over terms t of  kd.weight(t) * sums[t] / counts[t]

`counts` come from the batch alone, `sums` from the outputs. Both are added over the micro-batches (and processes) of
one optimizer step, and only then divided: gradient accumulation gives the loss and the gradient of one large batch.

| term | the count's unit | what is added up |
| --- | --- | --- |
| task | target token | cross-entropy, label smoothing as in torch |
| logits | target token | T^2 * KL(teacher / T, student / T), or squared errors averaged over the vocabulary |
| encoder_hidden | source token | squared errors averaged over d_model; embedding output and every layer |
| decoder_hidden | target token | the same |
| encoder_, decoder_, cross_attention | (query, key) pair | squared errors averaged over heads; every layer |
| encoder_last_hidden | example | 8 times the squared errors averaged over tokens and d_model |

A target token is a place where labels != -100, a source token one where attention_mask is set. With masked=False (the
DQ-BART code) every place counts, padding too, in all terms but the task's. Sources: the DQ-BART code (squared errors,
encoder_last_hidden); Shleifer & Rush 2020 (masks, KL with temperature); Hinton et al. 2015 (the factor T^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqkernels.train.formulas import (
    IGNORED,
    CrossEntropy,
    Divergence,
    Squares,
    by_chunks,
    example_mean,
    head_mean,
    token_mean,
)
from dqkernels.train.student import LayerMap, supervised_layers

if TYPE_CHECKING:
    from transformers.modeling_outputs import Seq2SeqLMOutput

#: What a term may be called in KDConfig and in `--kd`.
WEIGHTS = ("task", "logits", "hidden", "attention", "encoder_last_hidden")
LOGITS_LOSSES = ("kl", "mse")
#: Word that stands for `student.supervised_layers` among the layer targets.
SUPERVISED = "supervised"
#: term -> the weight of KDConfig that it takes; a weight of one name speaks for both stacks.
TERMS = {
    "task": "task",
    "logits": "logits",
    "encoder_hidden": "hidden",
    "decoder_hidden": "hidden",
    "encoder_attention": "attention",
    "decoder_attention": "attention",
    "cross_attention": "attention",
    "encoder_last_hidden": "encoder_last_hidden",
}
#: The authors add encoder_last_hidden over the examples of a device's batch, of which they have so many.
AUTHORS_BATCH = 8


@dataclass(frozen=True)
class KDConfig:
    """Which terms the loss has, and their weights. The defaults are plain fine-tuning.

    Args:
        task: weight of the cross-entropy on the labels.
        logits: weight of the term that compares the output distributions. With task=0, logits=1, temperature=1 it is
            word-level distillation (Kim & Rush 2016).
        hidden: weight of the hidden states of both stacks.
        attention: weight of the attention maps: encoder, decoder and cross.
        logits_loss: "kl" or "mse" (DQ-BART).
        temperature: divides both logits of "kl", which is scaled by its square. Above 0.
        masked: False counts padding like any other place (DQ-BART).
        encoder_last_hidden: weight of the DQ-BART code's extra term on the encoder's output. That code adds it
            over the examples of a device's batch of 8 and averages over batches; here it is 8 times the mean, whatever
            the batch.
        label_smoothing: of the task term, from 0 to below 1.
        encoder_targets: the teacher layer that each student encoder layer is compared with; None: the one it was
            copied from; "supervised": `student.supervised_layers`.
        decoder_targets: the same for the decoder.

    Raises:
        ValueError: naming the argument, the value found and the values wanted.
    """

    task: float = 1.0
    logits: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    logits_loss: str = "kl"
    temperature: float = 2.0
    masked: bool = True
    encoder_last_hidden: float = 0.0
    label_smoothing: float = 0.0
    encoder_targets: Sequence[int] | str | None = None
    decoder_targets: Sequence[int] | str | None = None

    def __post_init__(self) -> None:
        for name in WEIGHTS:
            _check_number(name, getattr(self, name), "a finite weight of 0 or more", lambda v: v >= 0)
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"every weight is 0, so there is nothing to train on; the terms are {list(WEIGHTS)}")
        if self.logits_loss not in LOGITS_LOSSES:
            raise ValueError(f"logits_loss must be one of {list(LOGITS_LOSSES)}, got {self.logits_loss!r}")
        _check_number("temperature", self.temperature, "a finite number above 0", lambda v: v > 0)
        _check_number("label_smoothing", self.label_smoothing, "from 0 to below 1", lambda v: 0 <= v < 1)
        if not isinstance(self.masked, bool):
            raise ValueError(f"masked must be true or false, got {self.masked!r}")
        for name in ("encoder_targets", "decoder_targets"):
            value = getattr(self, name)
            if value is None or value == SUPERVISED:
                continue
            if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
                raise ValueError(f"{name} must be a list of teacher layers, {SUPERVISED!r} or None, got {value!r}")
            if not all(type(layer) is int and layer >= 0 for layer in value):
                raise ValueError(f"{name} must hold layer numbers counted from 0, got {list(value)}")
            object.__setattr__(self, name, tuple(value))  # JSON gives lists

    @classmethod
    def parse(cls, text: str, **settings: Any) -> KDConfig:
        """Reads `--kd`: terms with their weights, `logits,hidden,attention=3`.

        A name alone has weight 1. The task keeps weight 1 unless it is given too (`task=0,logits`).

        Args:
            text: as above; spaces do not count.
            settings: the other fields, by name.

        Raises:
            ValueError: for an unknown or repeated name, for what is no number, and as the class does.
        """
        weights: dict[str, float] = {}
        for part in text.split(","):
            name, given, number = (piece.strip() for piece in part.partition("="))
            if name not in WEIGHTS:
                raise ValueError(
                    f"--kd knows the terms {', '.join(WEIGHTS)}, got {name!r} in {text!r}; "
                    "write them like 'logits,hidden,attention=3'"
                )
            if name in weights:
                raise ValueError(f"--kd names {name} twice: {text!r}")
            try:
                weights[name] = float(number) if given else 1.0
            except ValueError:
                raise ValueError(f"--kd gives {name} the weight {number!r}, which is no number: {text!r}") from None
        return cls(**{**weights, **settings})

    def __str__(self) -> str:
        """One line, as `parse` reads it, with the settings that matter behind it."""
        weights = [name if value == 1 else f"{name}={value:g}" for name in WEIGHTS if (value := getattr(self, name))]
        if not self.task:
            weights.insert(0, "task=0")
        settings = []
        if self.logits:
            settings.append(f"KL at T={self.temperature:g}" if self.logits_loss == "kl" else "MSE of logits")
        if self.needs_teacher and not self.masked:
            settings.append("padding counted")
        return ",".join(weights) + (f" ({', '.join(settings)})" if settings else "")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(getattr(self, name) for name in WEIGHTS if name != "task")

    @property
    def needs_hidden(self) -> bool:
        """Whether both models must run with output_hidden_states=True."""
        return self.hidden > 0

    @property
    def needs_attention(self) -> bool:
        """Whether both models must run with output_attentions=True (and an attention that returns maps)."""
        return self.attention > 0

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms with a weight above 0: the keys of `counts` and `sums`."""
        return tuple(term for term in TERMS if self.weight(term) > 0)

    def weight(self, term: str) -> float:
        """Weight of one of the `terms`."""
        return getattr(self, TERMS[term])


def counts(batch: Mapping[str, Tensor], kd: KDConfig) -> dict[str, Tensor]:
    """What each active term's sum is divided by, before any model has run.

    Args:
        batch: labels [B, T] with -100 where there is no target, and attention_mask [B, S] (absent: every source token
            counts; then input_ids [B, S] or inputs_embeds [B, S, d] gives S).
        kd: names the terms.

    Returns:
        term -> fp64 scalar on the labels' device. Add them over the micro-batches of a step.

    Raises:
        ValueError: if the batch lacks one of these, or a shape is another.
    """
    valid = _target_tokens(batch)
    source, target = _positions(batch, kd)
    s, t = (None if m is None else m.sum(1, dtype=torch.float64) for m in (source, target))
    units: dict[str, Callable[[], Tensor]] = {
        "task": lambda: valid.sum(dtype=torch.float64),
        "logits": lambda: t.sum(),
        "encoder_hidden": lambda: s.sum(),
        "decoder_hidden": lambda: t.sum(),
        "encoder_attention": lambda: (s * s).sum(),
        "decoder_attention": lambda: (t * t).sum(),
        "cross_attention": lambda: (t * s).sum(),
        "encoder_last_hidden": lambda: torch.tensor(float(len(valid)), dtype=torch.float64, device=valid.device),
    }
    return {term: units[term]() for term in kd.terms}


def sums(
    student: Seq2SeqLMOutput,
    teacher: Seq2SeqLMOutput | None,
    batch: Mapping[str, Tensor],
    kd: KDConfig,
    layer_map: LayerMap | None = None,
) -> dict[str, Tensor]:
    """The numerators: each active term added over the micro-batch, never averaged over it.

    Differences, softmax and their sums are in fp32 whatever the outputs' dtype, the last sum over tokens in fp64. No
    term keeps a copy of the logits or maps for the backward pass: it reads them again, a chunk at a time.

    Transformers returns attention maps after attention dropout; where that is above 0 (T5) a training student's maps
    hold its noise.

    Args:
        student: logits [B, T, V]; with `kd.hidden` encoder_hidden_states, decoder_hidden_states (layers + 1 tensors
            [B, S or T, d]); with `kd.attention` encoder_attentions, decoder_attentions, cross_attentions (one tensor
            [B, heads, queries, keys] per layer); with `kd.encoder_last_hidden` encoder_last_hidden_state [B, S, d].
        teacher: the same of the teacher, run without gradients; None if `kd` needs none.
        batch: as `counts` takes it.
        kd: the terms.
        layer_map: from `layer_map_of`; the targets that `kd` gives come before it. None: one to one.

    Returns:
        term -> fp64 scalar with the graph of the student behind it. Unweighted: see `total`.

    Raises:
        ValueError: if an output that a term needs is missing or has another shape than the other model's.
    """
    if kd.needs_teacher and teacher is None:
        raise ValueError(f"the terms {list(kd.terms)} compare with a teacher, and there is none")
    valid = _target_tokens(batch)
    source, target = _positions(batch, kd)
    found: dict[str, Tensor] = {}
    if kd.task > 0:
        logits = _output(student, "student", "logits")
        _check_places("logits", logits.shape[:2], valid.shape)
        found["task"] = by_chunks(CrossEntropy(kd.label_smoothing), logits.flatten(0, 1), batch["labels"].flatten())
    if kd.logits > 0:
        pair = _pair(student, teacher, "logits")
        _check_places("logits", pair[0].shape[:2], target.shape)
        formula = Squares(token_mean) if kd.logits_loss == "mse" else Divergence(kd.temperature)
        found["logits"] = by_chunks(formula, *(x.flatten(0, 1) for x in pair), target.flatten())
    if kd.hidden > 0:
        for stack, mask in (("encoder", source), ("decoder", target)):
            found[f"{stack}_hidden"] = _hidden(stack, student, teacher, mask, kd, layer_map)
    if kd.attention > 0:
        for name, stack, queries, keys in (
            ("encoder_attention", "encoder", source, source),
            ("decoder_attention", "decoder", target, target),
            ("cross_attention", "decoder", target, source),
        ):
            found[name] = _attention(name, stack, student, teacher, (queries, keys), kd, layer_map)
    if kd.encoder_last_hidden > 0:
        pair = _pair(student, teacher, "encoder_last_hidden_state")
        _check_places("encoder_last_hidden_state", pair[0].shape[:2], source.shape)
        found["encoder_last_hidden"] = AUTHORS_BATCH * by_chunks(Squares(example_mean), *pair, source)
    return found


def means(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each term, unweighted: `sums` / `counts`, both of one step or both added up over several.

    A count of 0 (no target token at all) gives 0.

    Returns:
        term -> fp64 scalar.
    """
    return {term: value / counts[term].clamp(min=1) for term, value in sums.items()}


def total(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], kd: KDConfig) -> Tensor:
    """The loss: the weighted sum of `means`, an fp32 scalar.

    With the sums of one micro-batch and the counts of the whole step it is that micro-batch's share of the loss: the
    shares add up, and so do their gradients.
    """
    shares = [kd.weight(term) * value for term, value in means(sums, counts).items()]
    return torch.stack(shares).sum().float()


def _hidden(stack: str, student, teacher, mask: Tensor, kd: KDConfig, layer_map: LayerMap | None) -> Tensor:
    name = f"{stack}_hidden_states"
    ours, theirs = (_output(out, who, name) for out, who in ((student, "student"), (teacher, "teacher")))
    targets = _targets(stack, len(ours) - 1, len(theirs) - 1, kd, layer_map)
    # Entry 0 is the embeddings' output, entry i + 1 the output of layer i.
    pairs = [(ours[0], theirs[0]), *((ours[i + 1], theirs[j + 1]) for i, j in enumerate(targets))]
    for pair in pairs:
        _check_pair(name, *pair)
        _check_places(name, pair[0].shape[:2], mask.shape)
    return torch.stack([by_chunks(Squares(token_mean), *pair, mask) for pair in pairs]).sum()


def _attention(
    name: str, stack: str, student, teacher, masks: tuple[Tensor, Tensor], kd: KDConfig, layer_map: LayerMap | None
) -> Tensor:
    name = f"{name}s"
    ours, theirs = (_output(out, who, name) for out, who in ((student, "student"), (teacher, "teacher")))
    targets = _targets(stack, len(ours), len(theirs), kd, layer_map)
    pairs = [(ours[i], theirs[j]) for i, j in enumerate(targets)]
    for pair in pairs:
        _check_pair(name, *pair)
        _check_places(name, (pair[0].shape[0], *pair[0].shape[2:]), (*masks[0].shape, masks[1].shape[1]))
    return torch.stack([by_chunks(Squares(head_mean), *pair, *masks) for pair in pairs]).sum()


def _targets(stack: str, depth: int, teacher_depth: int, kd: KDConfig, layer_map: LayerMap | None) -> Sequence[int]:
    """The teacher layer of each student layer; ValueError when it is not known or the outputs are of another depth."""
    targets = getattr(kd, f"{stack}_targets")
    if targets == SUPERVISED:
        return supervised_layers(teacher_depth, depth)
    if targets is None and layer_map is not None:
        targets = getattr(layer_map, stack)
    if targets is None and layer_map is None and depth == teacher_depth:
        return range(depth)
    if targets is None:
        raise ValueError(f"no layer map for the {stack}: student {depth} layers, teacher {teacher_depth}")
    if len(targets) != depth or max(targets) >= teacher_depth:
        raise ValueError(
            f"the {stack} map is {list(targets)}, but the student returned {depth} layers and the teacher "
            f"{teacher_depth} (layerdrop must be 0 in distillation)"
        )
    return targets


def _target_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch.get("labels")
    if labels is None or labels.dim() != 2:
        found = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(f"the loss needs labels of shape [batch, target length], got {found}")
    return labels != IGNORED


def _positions(batch: Mapping[str, Tensor], kd: KDConfig) -> tuple[Tensor | None, Tensor]:
    """Masks of what counts in every term but the task: source [B, S] (None if no term asks), target [B, T]."""
    target = _target_tokens(batch)
    source = None
    if kd.hidden or kd.attention or kd.encoder_last_hidden:
        given = next(
            (batch[k] for k in ("attention_mask", "input_ids", "inputs_embeds") if batch.get(k) is not None), None
        )
        if given is None:
            raise ValueError("hidden and attention terms need attention_mask or input_ids in the batch")
        source = torch.ones(given.shape[:2], dtype=torch.bool, device=target.device)
        if given is batch.get("attention_mask"):
            if given.dim() != 2:
                raise ValueError(f"attention_mask must have the shape [batch, source length], got {tuple(given.shape)}")
            source = given != 0
    if not kd.masked:
        target = torch.ones_like(target)
        source = None if source is None else torch.ones_like(source)
    return source, target


def _output(out, who: str, name: str):
    value = getattr(out, name, None)
    if value is None or (isinstance(value, tuple) and (not value or value[0] is None)):
        hint = ""
        if "hidden_states" in name:
            hint = ": run it with output_hidden_states=True"
        elif "attentions" in name:
            hint = ': run it with output_attentions=True and attn_implementation="eager" (sdpa returns no maps)'
        raise ValueError(f"the {who} returned no {name}{hint}")
    return value


def _pair(student, teacher, name: str) -> tuple[Tensor, Tensor]:
    pair = _output(student, "student", name), _output(teacher, "teacher", name)
    _check_pair(name, *pair)
    return pair


def _check_pair(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"{name}: the student's shape is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}")


def _check_places(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise ValueError(f"{name} are of {list(found)} places, labels and attention_mask of {list(wanted)}")


def _check_number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
