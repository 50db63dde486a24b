"""One training run from its flags to a folder that `dqkernels export` reads; what `dqkernels train` does.

Order of things: all that can be refused is refused before the first model is loaded for long; a stage that is finished
leaves a marker, a step that is done a checkpoint, so that a killed run goes on with --resume_from_checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

from dqkernels import serialize
from dqkernels.data import mixing, prepare, sources
from dqkernels.environment import keep_freed_memory
from dqkernels.metrics import seq2seq
from dqkernels.train import arguments as flags
from dqkernels.train import checkpoints, qat, stages, student
from dqkernels.train.arguments import Arguments, ArgumentsError
from dqkernels.train.losses import KDConfig
from dqkernels.train.trainer import DistillationTrainer

logger = logging.getLogger("dqkernels")

#: Written last into the folder of a finished stage.
STAGE_FILE = "stage.json"
RESULTS_FILE = "all_results.json"
PREDICTIONS_FILE = "predictions.jsonl"


def run(arguments: Arguments) -> dict[str, Any]:
    """Trains, evaluates and saves as the flags say.

    Returns:
        What all_results.json holds: figures of the last evaluation and of the test, steps, and the settings.

    Raises:
        ValueError: for flags, data or models that do not go together, in words.
    """
    import transformers

    args = arguments.training
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise ArgumentsError(f"--output_dir must be a folder, {str(output)!r} is a file")
    if args.fp16 and args.device.type == "cpu":
        raise ArgumentsError("--fp16 does nothing on a CPU: leave it out, or give --bf16")
    plan = _stages(arguments)
    resume = _resume(args, output, plan)
    # What would be refused later is refused now: the loss and the bits of every stage.
    config, learned = arguments.config(), arguments.learned_scale()
    losses = [stage.arguments.kd() for stage in plan]
    _check_metric(arguments, plan, losses)
    for stage in plan:
        stage.arguments.training.label_smoothing_factor = 0.0  # it is in the loss now
    if args.device.type == "cpu":
        keep_freed_memory()
    transformers.set_seed(args.seed)
    teacher, tokenizer = _open(arguments.model.model_name_or_path)
    setup = _set_up(arguments, teacher, tokenizer)
    model = _student(arguments, teacher)
    _set_up(arguments, model, tokenizer)
    if config is not None:
        qat.prepare_qat(model, config, learned)
    described = [_described(arguments, stage, kd, model) for stage, kd in zip(plan, losses, strict=True)]
    folders = _folders(arguments, plan)
    _check_resume(resume, folders, described, [_length(stage) for stage in plan])
    # One process of a machine reads and tokenizes; the others find it in the cache of `datasets`.
    with args.main_process_first(local=True, desc="reading and tokenizing"):
        data = _pairs(arguments, plan, tokenizer, setup, teacher)
    needs_teacher = any(kd.needs_teacher for kd in losses)
    teacher.to(_teacher_dtype(arguments))  # after the student was made of it
    results: dict[str, Any] = {}
    trainer = None
    steps = 0
    for stage, kd, folder, facts, rows in zip(plan, losses, folders, described, data["train"], strict=True):
        marker = _marker(folder) if resume else None
        if marker is not None:
            logger.info("stage %s is finished already: %s", stage.name, folder)
            checkpoints.load_weights(model, folder)
            steps += marker["steps"]
            continue
        stage.arguments.training.output_dir = str(folder)
        trainer = _trainer(stage, kd, model, teacher if needs_teacher else None, tokenizer, data, rows)
        trainer.run_arguments = facts
        start = _has_checkpoint(folder) if resume is True else Path(str(resume)).resolve().parent == folder.resolve()
        trainer.train(resume_from_checkpoint=resume if resume and start else None)
        trainer.save_model(str(folder))
        steps += trainer.state.global_step
        if trainer.is_world_process_zero():
            done = {"stage": stage.name, "steps": trainer.state.global_step, "run": facts, "length": _length(stage)}
            serialize.atomic_write(folder / STAGE_FILE, json.dumps(done).encode())
    if trainer is None:  # everything was finished; the figures below are still asked for
        plan[-1].arguments.training.output_dir = str(folders[-1])
        trainer = _trainer(
            plan[-1], losses[-1], model, teacher if needs_teacher else None, tokenizer, data, data["train"][-1]
        )
    results |= {"steps": steps}
    if data["validation"] is not None:
        results |= trainer.evaluate(metric_key_prefix="eval")
    if args.do_predict:
        results |= _predict(trainer, tokenizer, data, output)
    settings = {
        "model": arguments.model.model_name_or_path,
        "preset": arguments.quantization.preset,
        "quantization": None if config is None else {**config.to_dict(), "learned_scale": learned},
        "kd": [str(kd) for kd in losses],
        "layers": getattr(model.config, "dqkernels_student", None),
        "seed": args.seed,
    }
    results = {**results, "settings": settings}
    if trainer.is_world_process_zero():
        if arguments.data.stages is not None:
            trainer.save_model(str(output))
        tokenizer.save_pretrained(output)
        serialize.atomic_write(output / RESULTS_FILE, (json.dumps(results, indent=1) + "\n").encode())
    return results


def _kind(data: flags.DataArguments) -> str:
    """Which score a run is measured by."""
    return "bleu" if data.task == "translation" or data.source_lang else "rouge"


def _check_metric(arguments: Arguments, plan: list[stages.Stage], losses: list[KDConfig]) -> None:
    """Refuses a --metric_for_best_model that not every stage's evaluation gives, before the hours until one."""
    args, name = arguments.training, arguments.training.metric_for_best_model
    if name is None:
        return
    terms = [f"loss_{term}" for term in losses[0].terms if all(term in kd.terms for kd in losses)]
    known = ["loss", *terms, *(seq2seq.SCORES[_kind(arguments.data)] if args.predict_with_generate else ())]
    if name.removeprefix("eval_") not in known:
        why = "" if args.predict_with_generate else " (scores need --predict_with_generate)"
        raise ArgumentsError(f"--metric_for_best_model must be one of {', '.join(known)}{why}, got {name!r}")
    if arguments.data.early_stopping_patience is not None and args.eval_strategy == "no":
        raise ArgumentsError("--early_stopping_patience needs an --eval_strategy: steps or epoch")
    if name.removeprefix("eval_") in terms:
        for stage in plan:  # transformers takes whatever does not end with `loss` for a score
            stage.arguments.training.greater_is_better = False


def _stages(arguments: Arguments) -> list[stages.Stage]:
    if arguments.data.stages is not None:
        return stages.read(arguments.data.stages, arguments)
    data = arguments.data
    if data.dataset_name is None and data.train_file is None:
        raise ArgumentsError("no data: give --dataset_name, or --train_file, or --stages")
    return [stages.Stage("train", (stages.source_of(data),), arguments)]


def _resume(args, output: Path, plan) -> str | bool | None:
    """What --resume_from_checkpoint says; refuses to write over a run that was not asked to go on."""
    found = args.resume_from_checkpoint
    if isinstance(found, str) and found.lower() in ("true", "false"):
        found = found.lower() == "true"
    if found:
        if found is True and not has_run(output):
            logger.warning("nothing to resume from in %s yet: starting at the beginning", output)
        return found
    if has_run(output):
        raise ArgumentsError(
            f"--output_dir {output} holds a run already: give --resume_from_checkpoint true to go on with it, or "
            "another folder"
        )
    return None


def has_run(output: Path) -> bool:
    """Whether a folder holds a run, or a part of one, that could be gone on with."""
    started = [output, *output.glob("stage-*")] if output.is_dir() else []
    return any((folder / STAGE_FILE).is_file() or _has_checkpoint(folder) for folder in started)


def _folders(arguments: Arguments, plan) -> list[Path]:
    output = Path(arguments.training.output_dir)
    if arguments.data.stages is None:
        return [output]
    return [output / f"stage-{number}-{stage.name}" for number, stage in enumerate(plan, 1)]


def _described(arguments: Arguments, stage, kd, model) -> dict[str, Any]:
    """What makes a stage this stage, in plain JSON: compared when it is resumed or was finished before."""
    training = stage.arguments.training
    config, data = arguments.config(), stage.arguments.data
    facts = {
        "teacher": arguments.model.model_name_or_path,
        "quantization": None if config is None else config.to_dict(),
        "learned_scale": config is not None and arguments.learned_scale(),
        "layers": getattr(model.config, "dqkernels_student", None),
        "student": arguments.model.student_model_name_or_path,
        "frozen": [arguments.model.freeze_encoder, arguments.model.freeze_embeddings],
        "kd": dataclasses.asdict(kd),
        "sources": [[dict(source.arguments), source.weight] for source in stage.sources],
        "source_prefix": data.source_prefix,
        "lengths": [data.max_source_length, data.max_target_length],
        "learning_rate": training.learning_rate,
        "seed": training.seed,
    }
    return json.loads(json.dumps(facts))  # tuples as they come back from a file


def _marker(folder: Path) -> dict[str, Any] | None:
    """What a finished stage left; None where it is not finished."""
    try:
        return json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _length(stage) -> dict[str, Any]:
    """How long a stage is. A run that was not finished may go on with another length, and says so."""
    return {name: getattr(stage.arguments.training, name) for name in ("num_train_epochs", "max_steps")}


def _check_resume(
    resume: str | bool | None, folders: list[Path], described: list[dict[str, Any]], lengths: list[dict[str, Any]]
) -> None:
    """Refuses to go on with another run than the one that is there, or from a folder that is no part of it."""
    if not resume:
        return
    finished = 0
    for folder, facts, length in zip(folders, described, lengths, strict=True):
        marker = _marker(folder)
        if marker is None:
            break
        finished += 1
        stored, facts = {**marker.get("run", {}), **marker.get("length", {})}, {**facts, **length}
        if changed := [name for name in facts if facts[name] != stored.get(name)]:
            name = changed[0]
            raise ArgumentsError(
                f"{folder} was finished with {name} = {stored.get(name)!r}, this run has {facts[name]!r}: give the "
                "same flags, or another --output_dir"
            )
    if resume is True:
        return
    path = Path(resume)
    reason = checkpoints.why_not(path) if path.is_dir() else "is no folder"
    if reason is None and (finished == len(folders) or path.resolve().parent != folders[finished].resolve()):
        here = "none, for it is finished" if finished == len(folders) else f"one in {folders[finished]}"
        reason = f"is no checkpoint that this run could go on from ({here})"
    if reason is not None:
        raise ArgumentsError(f"--resume_from_checkpoint {path} {reason}")


def _has_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and checkpoints.newest(folder)[0] is not None


def _teacher_dtype(arguments: Arguments):
    """What is asked for; else float32, and bfloat16 on a GPU that trains in it (it runs outside autocast)."""
    import torch

    name, args = arguments.model.teacher_dtype, arguments.training
    if name is None:
        name = "bfloat16" if args.bf16 and args.device.type != "cpu" else "float32"
    return getattr(torch, name)


def _open(name: str):
    from dqkernels import text

    model, tokenizer = text.open_model(name, dtype="float32", device="cpu")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ArgumentsError(f"{name!r} is quantized: training starts from a float model")
    return model, tokenizer


def _set_up(arguments: Arguments, model, tokenizer):
    data = arguments.data
    return prepare.set_up(
        model,
        tokenizer,
        task=data.task,
        source_prefix=data.source_prefix,
        source_lang=data.source_lang,
        target_lang=data.target_lang,
    )


def _student(arguments: Arguments, teacher):
    chosen, preset = arguments.model, arguments.preset()
    depth = [flags.layers(name, getattr(chosen, name)) for name in ("student_encoder_layers", "student_decoder_layers")]
    if chosen.student_model_name_or_path is not None:
        if any(depth):
            raise ArgumentsError(
                "--student_model_name_or_path has its own layers: leave out --student_encoder_layers and "
                "--student_decoder_layers"
            )
        model, _ = _open(chosen.student_model_name_or_path)
    else:
        try:
            model = student.make_student(teacher, *depth, keep=chosen.student_keep or preset.keep).float()
        except ValueError as error:
            named = re.sub(r"^(?=(encoder|decoder)_layers|keep )", "--student_", str(error))
            raise ArgumentsError(named) from error
    frozen = {"encoder": chosen.freeze_encoder, "embeddings": chosen.freeze_embeddings}
    usual = {"encoder": preset.freeze_encoder, "embeddings": preset.freeze_embeddings}
    return student.freeze_(model, **{name: usual[name] if said is None else said for name, said in frozen.items()})


def _pairs(arguments: Arguments, plan, tokenizer, setup, model) -> dict[str, Any]:
    """Tokenized pairs: `train` a list with one set per stage, `validation` and `test` one each, or None."""
    data, args = arguments.data, arguments.training
    places = getattr(model.config, "max_position_embeddings", None)  # T5 has none: any length will do
    for name in ("max_source_length", "max_target_length"):
        if places is not None and getattr(data, name) > places:
            logger.warning("--%s is %d and the model has %d positions: cut there", name, getattr(data, name), places)
            for each in (data, *(stage.arguments.data for stage in plan)):
                setattr(each, name, places)
    tokens = {
        "source_prefix": setup.source_prefix,
        "max_source_length": data.max_source_length,
        "max_target_length": data.max_target_length,
        "num_proc": data.preprocessing_num_workers,
    }

    def tokenized(pairs, name: str):
        rows, lengths = prepare.prepare(pairs, tokenizer, **tokens)
        for line in str(lengths).splitlines():
            logger.info("%s: %s", name, line)
        return rows

    found: dict[str, Any] = {"train": []}
    for stage in plan:
        parts = []
        for source in stage.sources:
            pairs = sources.load_pairs(**source.arguments, splits=("train",), shuffle_seed=args.seed)["train"]
            parts.append((pairs, source.weight))
        mixed = parts[0][0] if len(parts) == 1 else mixing.mix(parts, args.seed)
        found["train"].append(tokenized(mixed, f"stage {stage.name}"))
    scored = args.eval_strategy != "no" or args.do_eval or data.validation_file is not None
    wanted = {"validation": scored, "test": args.do_predict}
    common = {
        key: getattr(data, key)
        for key in ("dataset_name", "dataset_config_name", "text_column", "summary_column", "source_lang",
                    "target_lang", "held_out_from", "max_eval_samples", "max_predict_samples")
    }  # fmt: skip
    for split, need in wanted.items():
        found[split] = None
        file = getattr(data, f"{split}_file")
        if not need:
            continue
        if data.dataset_name is None and file is None:
            raise ArgumentsError(f"no {split} data: give --{split}_file")
        origin = dict(common)
        if file is not None:
            origin |= {"dataset_name": None, "dataset_config_name": None, f"{split}_file": file, "held_out_from": None}
        pairs = sources.load_pairs(**origin, splits=(split,), shuffle_seed=args.seed)[split]
        found[split] = tokenized(pairs, split)
    return found


def _trainer(stage, kd, model, teacher, tokenizer, data: dict[str, Any], train_rows) -> DistillationTrainer:
    arguments, args = stage.arguments, stage.arguments.training
    longest = arguments.data.val_max_target_length or args.generation_max_length or arguments.data.max_target_length
    args.generation_max_length = longest
    args.generation_num_beams = arguments.data.num_beams or args.generation_num_beams
    args.remove_unused_columns = True
    kind = _kind(arguments.data)
    return DistillationTrainer(
        model=model,
        teacher=teacher,
        kd=kd,
        args=args,
        train_dataset=train_rows,
        eval_dataset=data["validation"],
        data_collator=prepare.collator(tokenizer, model=model, pad_to_multiple_of=arguments.data.pad_to_multiple_of),
        processing_class=tokenizer,
        compute_metrics=seq2seq.compute_metrics_for(tokenizer, kind) if args.predict_with_generate else None,
        callbacks=_early_stop(arguments.data.early_stopping_patience),
    )


def _early_stop(patience: int | None) -> list:
    if patience is None:
        return []
    if patience < 1:
        raise ArgumentsError(f"--early_stopping_patience must be at least 1, got {patience}")
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(early_stopping_patience=patience)]


def _predict(trainer, tokenizer, data: dict[str, Any], output: Path) -> dict[str, Any]:
    found = trainer.predict(data["test"], metric_key_prefix="predict")
    if trainer.is_world_process_zero() and trainer.args.predict_with_generate:
        import numpy as np

        ids = np.where(found.predictions < 0, tokenizer.pad_token_id, found.predictions)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        lines = [json.dumps({"prediction": text.strip()}, ensure_ascii=False) + "\n" for text in texts]
        output.mkdir(parents=True, exist_ok=True)
        serialize.atomic_write(output / PREDICTIONS_FILE, "".join(lines).encode())
    return dict(found.metrics)


def describe(arguments: Arguments) -> list[str]:
    """What a run will do, in lines for people."""
    config = arguments.config()
    bits = "float" if config is None else f"{config.name} (weights-embeddings-activations)"
    return [
        f"preset    {arguments.quantization.preset}",
        f"teacher   {arguments.model.model_name_or_path}",
        f"student   {bits}, layers "
        f"{arguments.model.student_encoder_layers or 'all'}-{arguments.model.student_decoder_layers or 'all'}",
        f"loss      {arguments.kd()}",
    ]
