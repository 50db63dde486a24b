"""Flags of `dqkernels train`: three groups of ours beside transformers' own `Seq2SeqTrainingArguments`.

Names are those of transformers' run_summarization and run_translation where these have one. A preset gives defaults to
all groups; a YAML or JSON file (`--config`) overrides the preset, and a flag overrides the file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqkernels.config import DQConfig

_DTYPES = ("float32", "bfloat16", "float16")
#: Columns of a terminal that the help is made for.
_WIDTH = 80
#: Fields of QuantizationArguments that are fields of DQConfig, by the same name.
_RULES = (
    "weight_bits", "embedding_bits", "weight_quantizer", "embedding_quantizer", "weight_granularity", "group_size",
    "act_granularity", "act_clip", "weight_clip", "attention", "head",
)  # fmt: skip


def _flag(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ModelArguments:
    """What is trained, and what it learns from."""

    model_name_or_path: str = _flag(None, "Fine-tuned float teacher: folder or hub id. The student is made of it.")
    student_model_name_or_path: str | None = _flag(
        None, "Another, pretrained model as the student (other sizes: logits and task terms only)."
    )
    student_encoder_layers: str | None = _flag(
        None, "Layers to keep: a number (spaced as in the paper) or teacher layers from 0, like 0,2,5. Default: all."
    )
    student_decoder_layers: str | None = _flag(None, "The same for the decoder.")
    student_keep: str | None = _flag(None, "Layer that a one-layer student gets: last (the paper) or first.")
    freeze_encoder: bool | None = _flag(None, "Train the decoder alone.")
    freeze_embeddings: bool | None = _flag(None, "Leave token and position embeddings as they are.")
    teacher_dtype: str | None = _flag(
        None, "Float type the teacher runs in: float32, bfloat16 or float16. Default: bfloat16 with --bf16 on a GPU."
    )


@dataclass
class DataArguments:
    """What it is trained and scored on."""

    task: str | None = _flag(None, "summarization or translation: prefixes, languages, and which score (ROUGE, BLEU).")
    dataset_name: str | None = _flag(
        None, "Hub id, a folder, docstrings (installed packages) or gettext (catalogues on this machine)."
    )
    dataset_config_name: str | None = _flag(None, "Its configuration, such as 3.0.0.")
    train_file: str | None = _flag(None, "csv, tsv, json, jsonl or parquet instead of --dataset_name.")
    validation_file: str | None = _flag(None, "The same for validation.")
    test_file: str | None = _flag(None, "The same for the test (--do_predict).")
    text_column: str | None = _flag(None, "Column of the source.")
    summary_column: str | None = _flag(None, "Column of the target.")
    source_lang: str | None = _flag(None, "Language of the source (translation).")
    target_lang: str | None = _flag(None, "Language of the target (translation).")
    source_prefix: str | None = _flag(None, "Put before every source (T5: 'summarize: ').")
    max_source_length: int = _flag(1024, "Tokens of a source; longer ones are cut, and counted.")
    max_target_length: int = _flag(128, "Tokens of a target.")
    val_max_target_length: int | None = _flag(None, "Tokens generated in evaluation; default --max_target_length.")
    num_beams: int | None = _flag(None, "Beams of evaluation and prediction; default: the model's own.")
    max_train_samples: int | None = _flag(None, "Use so many training pairs.")
    max_eval_samples: int | None = _flag(None, "Use so many validation pairs.")
    max_predict_samples: int | None = _flag(None, "Use so many test pairs.")
    preprocessing_num_workers: int | None = _flag(None, "Processes that tokenize.")
    pad_to_multiple_of: int | None = _flag(16, "Lengths of a batch; 16 suits int8 tensor cores.")
    held_out_from: str | None = _flag(
        None, "docstrings: leave out of validation and test what the model in this folder was trained on."
    )
    early_stopping_patience: int | None = _flag(
        None, "Stop after so many evaluations without a better --metric_for_best_model."
    )
    stages: str | None = _flag(
        None, "YAML: an ordered list of stages, each with data, epochs and learning rate (see --help)."
    )


@dataclass
class QuantizationArguments:
    """How the student computes, and what its loss is. What is not given comes from --preset."""

    preset: str | None = _flag(None, "A recipe, listed above. Default: dq-bart-plus.")
    weight_bits: int | None = _flag(None, "Linear layers: 2, 4 or 8. Default: 8.")
    embedding_bits: int | None = _flag(
        None, "Token embedding and tied head: 2, 4, 8, or 16 for float. Default: as linear layers."
    )
    weight_quantizer: str | None = _flag(None, "auto, absmax, mse, ternary or four_level: which levels.")
    embedding_quantizer: str | None = _flag(None, "The same for the embedding.")
    weight_granularity: str | None = _flag(None, "per_channel or per_tensor (the paper).")
    group_size: int | None = _flag(None, "32, 64 or 128 inputs share a multiplier (2 and 4 bits).")
    act_granularity: str | None = _flag(None, "per_token or per_tensor (the paper).")
    act_clip: float | None = _flag(None, "Clamp activations to +-this first (the paper: 2.5); 0: do not.")
    weight_clip: float | None = _flag(None, "Clamp weights to +-this first (the paper: 2.5); 0: do not.")
    attention: str | None = _flag(None, "int8: Q.K and probabilities x V in int8 too; float.")
    head: str | None = _flag(None, "quantized, or float: what the authors' code does, not a small file.")
    learned_scale: bool | None = _flag(None, "Learn the distance of two levels (LSQ).")
    kd: str | None = _flag(None, "Terms of the loss and weights: logits,hidden,attention=3 (task has weight 1).")
    kd_logits: str | None = _flag(None, "kl or mse (the paper).")
    kd_temperature: float | None = _flag(None, "Temperature of kl.")
    kd_masked: bool | None = _flag(None, "False counts padding in the loss, as the authors' code does.")


class ArgumentsError(ValueError):
    """Flags that cannot be understood; the message names one."""


@dataclass(frozen=True)
class Arguments:
    """All flags of a run."""

    model: ModelArguments
    data: DataArguments
    quantization: QuantizationArguments
    training: Any

    def preset(self):
        """The recipe in use."""
        from dqkernels.train.presets import PRESETS

        return PRESETS[self.quantization.preset]

    def config(self) -> DQConfig | None:
        """How the student is quantized; None: not at all.

        Raises:
            ValueError: as DQConfig.
        """
        given = self.quantization
        bits = {name: getattr(given, name) for name in ("weight_bits", "embedding_bits")}
        preset = self.preset()
        if preset.quantize is None:
            rules = {name: getattr(given, name) for name in (*_RULES, "learned_scale")}
            rules = {name: value for name, value in rules.items() if value is not None}
            if rules:
                raise ArgumentsError(
                    f"preset {preset.name} does not quantize, so --{next(iter(rules))} has nothing to say: "
                    "leave it out, or take another --preset"
                )
            return None
        if bits["weight_bits"] == 16:
            raise ArgumentsError("weight_bits must be 2, 4 or 8; to train in float take --preset distill-only or sft")
        weight_bits = bits["weight_bits"] or 8
        config = preset.quantize(weight_bits, bits["embedding_bits"] or weight_bits)
        changes: dict[str, Any] = {name: getattr(given, name) for name in _RULES if getattr(given, name) is not None}
        changes |= {name: None for name in ("act_clip", "weight_clip") if changes.get(name) == 0}
        if changes.get("act_granularity") == "static":
            raise ArgumentsError(
                "--act_granularity must be per_token or per_tensor in training, got 'static': static scales are "
                "measured afterwards, by dqkernels quantize"
            )
        config = dataclasses.replace(config, **changes)
        if config.group_size != -1 and self.learned_scale():
            raise ArgumentsError(
                f"--group_size {config.group_size} has no learned steps, and preset {preset.name} learns them: give "
                "--learned_scale false"
            )
        return config

    def learned_scale(self) -> bool:
        """Whether the steps are learned."""
        given = self.quantization.learned_scale
        return self.preset().learned_scale if given is None else given

    def kd(self):
        """The loss.

        Raises:
            ValueError: as KDConfig.
        """
        from dqkernels.train.losses import KDConfig

        given, kd = self.quantization, self.preset().kd
        settings = {"logits_loss": given.kd_logits, "temperature": given.kd_temperature, "masked": given.kd_masked}
        settings = {name: value for name, value in settings.items() if value is not None}
        if self.training.label_smoothing_factor:
            settings["label_smoothing"] = self.training.label_smoothing_factor
        if given.kd is not None:
            kept = ("logits_loss", "temperature", "masked", "label_smoothing", "encoder_targets", "decoder_targets")
            return KDConfig.parse(given.kd, **{**{name: getattr(kd, name) for name in kept}, **settings})
        return dataclasses.replace(kd, **settings)


def parse(argv: Sequence[str]) -> Arguments:
    """Reads flags: preset, then `--config` file, then the flags themselves; the last one counts.

    Raises:
        ArgumentsError: for an unknown flag, preset or value; the message names it.
    """
    from dqkernels.train.presets import PRESETS

    argv, stored = _without_config(list(argv))
    argv = _flags_of(stored) + argv
    quantization = QuantizationArguments
    first, _ = _parser((quantization,)).parse_known_args(argv)
    name = first.preset or "dq-bart-plus"
    if name not in PRESETS:
        raise ArgumentsError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    parser = _parser((ModelArguments, DataArguments, quantization, _training_class()))
    defaults = {"predict_with_generate": True, "report_to": "none", **PRESETS[name].arguments}
    *groups, rest = parser.parse_args_into_dataclasses(
        _flags_of(defaults) + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ArgumentsError(f"no such option: {rest[0]}; --help lists ours, --help_all transformers' as well")
    model, data, quantization, training = groups
    quantization.preset = name
    _check(model, data, training)
    if not any(word.partition("=")[0].replace("-", "_") == "__output_dir" for word in argv):
        raise ArgumentsError("--output_dir is missing: the folder of checkpoints and of the result")
    if not model.model_name_or_path:
        raise ArgumentsError("--model_name_or_path is missing: the fine-tuned float teacher, a folder or a hub id")
    return Arguments(model, data, quantization, training)


def _check(model: ModelArguments, data: DataArguments, training: Any) -> None:
    """What argparse cannot know."""
    if model.teacher_dtype not in (None, *_DTYPES):
        raise ArgumentsError(f"--teacher_dtype must be one of {', '.join(_DTYPES)}, got {model.teacher_dtype!r}")
    if data.early_stopping_patience is not None and not training.metric_for_best_model:
        raise ArgumentsError(
            "--early_stopping_patience needs --metric_for_best_model (rougeL, bleu, loss), and an --eval_strategy"
        )


def layers(flag: str, text: str | None) -> int | list[int] | None:
    """`3` as a number of layers, `0,2,5` as a list of the teacher's."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*,?", text.replace(" ", "")):
        raise ArgumentsError(f"--{flag} must be a number of layers or teacher layers like 0,2,5, got {text!r}")
    numbers = [int(part) for part in text.split(",") if part.strip()]
    return numbers if "," in text else numbers[0]


def help_text(all_flags: bool = False) -> str:
    """The groups of flags with their explanations."""
    groups = [ModelArguments, DataArguments, QuantizationArguments]
    lines = []
    for group in groups:
        lines += ["", *textwrap.wrap(group.__doc__, _WIDTH, break_on_hyphens=False)]
        for one in dataclasses.fields(group):
            default = "" if one.default in (None, False) else f" [{one.default}]"
            lines += described(one.name, one.metadata["help"] + default)
    lines.append("\nFrom transformers.Seq2SeqTrainingArguments; the ones used most:")
    wanted = dict(
        output_dir="Folder of checkpoints and of the result.",
        learning_rate="Peak learning rate.",
        num_train_epochs="Passes over the training pairs (--max_steps: steps instead).",
        per_device_train_batch_size="Pairs per process and micro-batch.",
        gradient_accumulation_steps="Micro-batches per step; the loss is that of one large batch.",
        bf16="bfloat16 autocast.",
        eval_strategy="no, steps or epoch; --eval_steps.",
        save_strategy="no, steps, epoch or best; --save_steps, --save_total_limit.",
        load_best_model_at_end="Keep the best checkpoint by --metric_for_best_model (rougeL, bleu).",
        resume_from_checkpoint="true (the newest complete one) or a folder.",
        predict_with_generate="Score generated texts in evaluation [True].",
        do_predict="Write and score predictions for the test split at the end.",
        report_to="tensorboard, wandb, trackio or none [none].",
        seed="Of the order of the data and of dropout.",
        use_cpu="Do not use a GPU.",
    )
    if all_flags:
        wanted = {one.name: (one.metadata or {}).get("help", "") for one in dataclasses.fields(_training_class())}
    for name, text in wanted.items():
        lines += described(name, str(text))
    return "\n".join(lines)


def described(flag: str, text: str, column: int = 33) -> list[str]:
    """`  --flag   text`, in lines of a terminal's width."""
    name, body = f"  --{flag}", textwrap.wrap(" ".join(text.split()), _WIDTH - column, break_on_hyphens=False) or [""]
    first = [f"{name:<{column}}{body[0]}"] if len(name) < column else [name, " " * column + body[0]]
    return [*first, *(" " * column + line for line in body[1:])]


@functools.cache
def _training_class() -> type:
    from transformers import Seq2SeqTrainingArguments

    return Seq2SeqTrainingArguments


def _parser(groups):
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str):
            raise ArgumentsError(message.removeprefix("argument "))

    return Parser(groups, add_help=False, allow_abbrev=False)


def _without_config(argv: list[str]) -> tuple[list[str], Mapping[str, Any]]:
    """Takes `--config FILE` out and reads the file."""
    for i, word in enumerate(argv):
        name, given, value = word.partition("=")
        if name != "--config":
            continue
        if not given and i + 1 == len(argv):
            raise ArgumentsError("--config needs a YAML or JSON file")
        path = Path(value if given else argv[i + 1])
        return argv[:i] + argv[i + (1 if given else 2) :], read_mapping(path)
    return argv, {}


def read_mapping(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON file that holds one mapping.

    Raises:
        ArgumentsError: if it is not there, cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentsError(f"{path}: {error.strerror or error}") from None
    try:
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except Exception as error:
        raise ArgumentsError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise ArgumentsError(f"{path} must hold a mapping of names to values, got {type(found).__name__}")
    return found


def _flags_of(values: Mapping[str, Any]) -> list[str]:
    """A mapping as flags."""
    words: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words
