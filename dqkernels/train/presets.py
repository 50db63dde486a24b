"""Recipes by name: which loss, which quantization, which training arguments, and where the numbers come from.

A preset is a starting point: every field of it can be given anew (`dataclasses.replace`, or the flags of
`dqkernels train`). Where a publication states no value, transformers' default stands.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dqkernels.config import DQConfig
from dqkernels.train.losses import KDConfig

#: Chosen for training, where the step follows the weights: not config.DEFAULT_QUANTIZER, which was measured without.
_QUANTIZER = {2: "four_level", 4: "absmax", 8: "absmax", 16: "auto"}
#: Rules -> whether their weight scale is learned (LSQ) or computed from the weights at every step.
LEARNED_SCALE = {"dq-bart": False, "dq-bart-plus": True, "ternarybert": False}


def quantization(
    weight_bits: int = 2, embedding_bits: int = 2, *, rules: str = "dq-bart-plus", **changes: Any
) -> DQConfig:
    """The quantization of a recipe at the bits asked for.

    Attention products are int8 in all of them, and the output head is quantized with the embedding it is tied to.
    (The DQ-BART code leaves the head in fp32: `head="float"` in `changes`.)

    Args:
        weight_bits: of the linears: 2, 4 or 8.
        embedding_bits: of the token embedding and a tied head: 2, 4, 8, or 16 for none.
        rules: "dq-bart": one scale per matrix and per activation tensor, rows for the embedding, clip at +-2.5, TWN
            ternary at 2 bits, absmax above (paper.md section 1.2). "dq-bart-plus": one scale per output channel and
            per token, no clip, four levels at 2 bits. "ternarybert": TernaryBERT's, which DQ-BART's are.
        changes: fields of DQConfig to set otherwise.

    Raises:
        ValueError: for rules or bits that are not there.
        TypeError: if a change is no field of DQConfig.
    """
    if rules not in LEARNED_SCALE:
        raise ValueError(f"rules must be one of {list(LEARNED_SCALE)}, got {rules!r}")
    if rules != "dq-bart-plus":
        return DQConfig.preset(f"dq-bart-{weight_bits}-{embedding_bits}-8", **{"attention": "int8", **changes})
    chosen = {
        "weight_bits": weight_bits,
        "embedding_bits": embedding_bits,
        # A width that is no key is refused by name in DQConfig.
        "weight_quantizer": _QUANTIZER.get(weight_bits, "auto"),
        "embedding_quantizer": _QUANTIZER.get(embedding_bits),
        "weight_granularity": "per_channel",
        "act_granularity": "per_token",
        "attention": "int8",
    }
    return DQConfig(**{**chosen, **changes})


@dataclass(frozen=True)
class Preset:
    """One recipe.

    Attributes:
        name: as `--preset` takes it.
        summary: one line for `--help`.
        kd: the terms of the loss.
        quantize: `quantize(weight_bits, embedding_bits, **changes) -> DQConfig`, or None for a float student.
        learned_scale: whether the weight scales are parameters (`prepare_qat(learned_scale=)`).
        arguments: defaults for Seq2SeqTrainingArguments, by their names there (transformers 5: warmup_steps below 1 is
            a share of all steps, max_grad_norm 0 means no clipping).
        source: where the values come from, and where they differ from it.
        keep: for `make_student`: the layer that a stack of one keeps.
        freeze_encoder, freeze_embeddings: for `freeze_`.
    """

    name: str
    summary: str
    kd: KDConfig
    quantize: Callable[..., DQConfig] | None
    learned_scale: bool
    arguments: Mapping[str, Any]
    source: str
    keep: str = "last"
    freeze_encoder: bool = False
    freeze_embeddings: bool = False

    def with_rules(self, rules: str) -> Preset:
        """This recipe under the quantization of another (see `quantization`).

        Raises:
            ValueError: for unknown rules, or if the recipe does not quantize.
        """
        if self.quantize is None:
            raise ValueError(f"preset {self.name!r} does not quantize, so it takes no rules; got {rules!r}")
        if rules not in LEARNED_SCALE:
            raise ValueError(f"rules must be one of {list(LEARNED_SCALE)}, got {rules!r}")
        return dataclasses.replace(
            self, quantize=partial(quantization, rules=rules), learned_scale=LEARNED_SCALE[rules]
        )


_DQ_BART = {
    "learning_rate": 3e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "num_train_epochs": 20,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
}
#: 2e-4 lies between the 1e-4 (CNN/DM) and 3e-4 (XSUM) of TBT, which trains 2-bit BART with KL too (paper.md 5.2).
#: Gradients are clipped at transformers' default: the rate is 7 times DQ-BART's.
_PLUS = {**_DQ_BART, "learning_rate": 2e-4, "max_grad_norm": 1.0}
_PLUS_KD = KDConfig(logits=1, hidden=1, attention=1, logits_loss="kl", temperature=1.0)

PRESETS: dict[str, Preset] = {
    each.name: each
    for each in (
        Preset(
            name="dq-bart",
            summary="The DQ-BART paper: task, logits (MSE), hidden and attention, unmasked; its per-tensor quantizers",
            kd=KDConfig(logits=1, hidden=1, attention=1, logits_loss="mse", masked=False, encoder_last_hidden=1),
            quantize=partial(quantization, rules="dq-bart"),
            learned_scale=False,
            arguments=dict(_DQ_BART),
            source=(
                "Li et al. 2022 (ACL) and its code: AdamW, no weight decay, linear decay after 5 % warm-up, no "
                "gradient clipping, 3e-5, 20 epochs, 8 per device x 2; all weights 1 (its --weighted: logits 0.8, "
                "hidden, attention and encoder_last_hidden 3). Its head stays in fp32, ours is quantized."
            ),
        ),
        Preset(
            name="dq-bart-plus",
            summary="Our best: task, logits (KL), hidden and attention, masked; four levels per channel, learned scale",
            kd=_PLUS_KD,
            quantize=partial(quantization, rules="dq-bart-plus"),
            learned_scale=True,
            arguments=dict(_PLUS),
            source=(
                "DQ-BART's terms with the padding masked, the soft cross-entropy and the higher rate of TBT (Liu et "
                "al. 2023, ACL), the four 2-bit levels of ParetoQ (Liu et al. 2025) with a learned step (LSQ, Esser et "
                "al. 2020), one activation scale per token."
            ),
        ),
        Preset(
            name="quant-only",
            summary="Quantization without a teacher: task alone, quantized as dq-bart-plus unless told otherwise",
            kd=KDConfig(),
            quantize=partial(quantization, rules="dq-bart-plus"),
            learned_scale=True,
            arguments=dict(_PLUS),
            source="The DQ-BART paper's first baseline (its code's suffix _nodis), with our quantizers and rate.",
        ),
        Preset(
            name="distill-only",
            summary="Distillation without quantization: the terms of dq-bart-plus, a float student",
            kd=_PLUS_KD,
            quantize=None,
            learned_scale=False,
            arguments=dict(_DQ_BART),
            source="The DQ-BART paper's second baseline at its rate, with the terms of dq-bart-plus.",
        ),
        Preset(
            name="sft",
            summary="Shrink and fine-tune: copied layers, task alone, no teacher, float",
            kd=KDConfig(),
            quantize=None,
            learned_scale=False,
            arguments={
                "learning_rate": 3e-5,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 16,
                "gradient_accumulation_steps": 2,
            },
            keep="first",
            source=(
                "Shleifer & Rush 2020, CNN/DM: 3e-5, 2 epochs, batch 32, the encoder kept whole. (XSUM: 3e-4, 6 "
                "epochs, batch 64, encoder and embeddings frozen.)"
            ),
        ),
        Preset(
            name="distilbart-kd",
            summary="DistilBART's KD: 0.8 KL at T=2, 0.2 task, 3 hidden, masked; encoder frozen, float",
            kd=KDConfig(task=0.2, logits=0.8, hidden=3, logits_loss="kl", temperature=2.0),
            quantize=None,
            learned_scale=False,
            arguments={
                "learning_rate": 3e-4,
                "warmup_steps": 500,
                "num_train_epochs": 6,
                "per_device_train_batch_size": 16,
                "gradient_accumulation_steps": 2,
            },
            keep="first",
            freeze_encoder=True,
            freeze_embeddings=True,
            source=(
                "Shleifer & Rush 2020 and the script of distilbart-xsum-12-6: 3e-4, 500 warm-up steps, 6 epochs, batch "
                "16 x 2, encoder and embeddings frozen. Their hidden term compares what goes into each layer; ours "
                "compares what comes out too, so the last layer is taught as well."
            ),
        ),
        Preset(
            name="ternarybert",
            summary="TernaryBERT: logits (soft cross-entropy), hidden and attention without the task; TWN weights",
            kd=KDConfig(task=0, logits=1, hidden=1, attention=1, logits_loss="kl", temperature=1.0, masked=False),
            quantize=partial(quantization, rules="ternarybert"),
            learned_scale=False,
            arguments={
                "learning_rate": 2e-5,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0.1,
                "weight_decay": 0.01,
                "num_train_epochs": 3,
                "per_device_train_batch_size": 32,
            },
            source=(
                "Zhang et al. 2020 (EMNLP) and its code: TWN rows in the embedding, one ternary scale per linear, "
                "8-bit activations, clip at 2.5, linear decay from 2e-5 after 10 % warm-up, weight decay 0.01, 3 "
                "epochs, batch 32 (GLUE). Its attention term compares scores, ours probabilities; its activations "
                "are min-max (asymmetric), ours symmetric."
            ),
        ),
    )
}


def preset(name: str, rules: str | None = None) -> Preset:
    """The preset of that name, under other quantization rules where given.

    Raises:
        ValueError: for an unknown name or unknown rules, or rules for a preset that does not quantize.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {list(PRESETS)}, got {name!r}")
    return PRESETS[name] if rules is None else PRESETS[name].with_rules(rules)


def describe() -> list[str]:
    """Presets for `dqkernels train --help`, names in a column, in lines of a terminal's width."""
    width = max(map(len, PRESETS)) + 2
    lines = []
    for each in PRESETS.values():
        first, *more = textwrap.wrap(each.summary, 80 - width, break_on_hyphens=False)
        lines += [f"{each.name:<{width}}{first}", *(" " * width + line for line in more)]
    return lines
