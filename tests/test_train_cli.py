"""`dqkernels train`, `export`, `eval` and `distill-data` by command line, on docstrings of the standard library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

import dqkernels
from dqkernels.cli import main
from dqkernels.data import docstrings
from dqkernels.train import arguments, load_trained, presets, stages
from dqkernels.train.arguments import ArgumentsError

TEACHER = Path(docstrings.__file__).parent / "docstring_teacher"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random BART of two layers each with the demo's tokenizer: learns nothing, costs nothing."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_models.save_bart(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Files of real docstrings: train.jsonl and dev.jsonl."""
    folder = tmp_path_factory.mktemp("pairs")
    found = docstrings.mine(packages={"argparse", "asyncio", "ast", "collections", "email", "logging", "typing"})
    assert len(found) >= 40
    for name, part in (("train", found[:24]), ("dev", found[24:30])):
        lines = [json.dumps({"source": p.body, "target": p.head}) + "\n" for p in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def flags(teacher, pairs, out, *more):
    return [
        "train", "--model_name_or_path", str(teacher), "--train_file", str(pairs / "train.jsonl"),
        "--validation_file", str(pairs / "dev.jsonl"), "--max_source_length", "32", "--max_target_length", "12",
        "--num_beams", "1", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4",
        "--eval_strategy", "no", "--save_strategy", "no", "--do_eval", "True", "--disable_tqdm", "True",
        "--use_cpu", "True", "--output_dir", str(out), *more,
    ]  # fmt: skip


def test_distill_train_in_stages_export_eval(teacher, pairs, tmp_path, capsys):
    texts = tmp_path / "teacher.jsonl"
    assert not main([
        "distill-data", "--model", str(teacher), "--train_file", str(pairs / "train.jsonl"), "--output_file",
        str(texts), "--num_beams", "1", "--max_new_tokens", "6", "--batch_size", "8",
    ])  # fmt: skip
    plan = tmp_path / "stages.yaml"
    plan.write_text(
        f"stages:\n- {{name: teacher, train_file: {texts}, max_steps: 2, learning_rate: 1.0e-3}}\n"
        f"- {{name: gold, train_file: {pairs / 'train.jsonl'}, max_steps: 2, learning_rate: 5e-4}}\n"
        f"- {{name: both, max_steps: 1, kd: 'logits', mix: [{{train_file: {texts}, weight: 2}}, "
        f"{{train_file: {pairs / 'train.jsonl'}}}]}}\n"
    )
    out = tmp_path / "out"
    more = (
        "--weight_bits",
        "2",
        "--label_smoothing_factor",
        "0.1",
        "--student_decoder_layers",
        "1",
        "--kd",
        "logits,hidden,attention",
        "--stages",
        str(plan),
    )
    assert not main(flags(teacher, pairs, out, *more, "--json"))
    results = json.loads(capsys.readouterr().out)  # and nothing else: Trainer's own lines are on stderr
    assert {"eval_loss", "eval_rougeL", "steps"} <= set(results) and results["settings"]["layers"]["decoder"] == [1]
    for i, name in enumerate(("teacher", "gold", "both"), 1):
        marker = json.loads((out / f"stage-{i}-{name}" / "stage.json").read_text())
        assert (marker["stage"], marker["steps"]) == (name, 1 if name == "both" else 2)
    assert results["steps"] == 5
    before = (out / "model.safetensors").read_bytes()
    # A run that is there is not written over, and one that is finished is not run again.
    assert main(flags(teacher, pairs, out, *more)) == 2
    assert "--resume_from_checkpoint" in capsys.readouterr().err
    assert not main(flags(teacher, pairs, out, *more, "--resume_from_checkpoint", "true"))
    assert (out / "model.safetensors").read_bytes() == before
    assert json.loads((out / "all_results.json").read_text())["steps"] == 5
    # Finished with other bits, and a checkpoint of nowhere: neither is taken for this run.
    other = [*more[2:], "--weight_bits", "4"]
    assert main(flags(teacher, pairs, out, *other, "--resume_from_checkpoint", "true")) == 2
    assert "was finished with quantization" in capsys.readouterr().err
    plan.write_text(plan.read_text().replace("name: both, max_steps: 1", "name: both, max_steps: 9"))
    assert main(flags(teacher, pairs, out, *more, "--resume_from_checkpoint", "true")) == 2
    assert "stage-3-both was finished with max_steps = 1, this run has 9" in capsys.readouterr().err
    plan.write_text(plan.read_text().replace("name: both, max_steps: 9", "name: both, max_steps: 1"))
    assert main(flags(teacher, pairs, out, *more, "--resume_from_checkpoint", str(tmp_path / "checkpoint-7"))) == 2
    assert "--resume_from_checkpoint" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    packed = tmp_path / "packed"
    assert not main(["export", str(out), str(packed), "--dtype", "float32"])
    assert main(["export", str(out), str(packed)]) == 2  # there already
    trained, loaded = load_trained(out), dqkernels.load(packed, dtype="float32")
    ids = torch.tensor([[0, 77, 78, 79, 2]])
    with torch.no_grad():
        assert torch.equal(trained(input_ids=ids, labels=ids).logits, loaded(input_ids=ids, labels=ids).logits)
    assert loaded.config.quantization_config.attention == "int8" and loaded.config.decoder_layers == 1
    capsys.readouterr()
    predictions = tmp_path / "predictions.jsonl"
    assert not main([
        "eval", str(packed), "--test_file", str(pairs / "dev.jsonl"), "--num_beams", "1", "--max_new_tokens", "5",
        "--output_file", str(predictions), "--json",
    ])  # fmt: skip
    scored = json.loads(capsys.readouterr().out)
    assert scored["pairs"] == 6 and "rougeL" in scored and "rouge" in scored["signature"].lower()
    assert len(predictions.read_text().splitlines()) == 6


def test_a_float_student_and_a_pretrained_one(teacher, pairs, tmp_path, capsys):
    out = tmp_path / "sft"
    assert not main(flags(teacher, pairs, out, "--preset", "sft", "--max_steps", "1", "--student_encoder_layers", "0,"))
    assert main(["export", str(out), str(tmp_path / "packed")]) == 2
    assert "dqkernels quantize" in capsys.readouterr().err
    more = "--student_model_name_or_path", str(out), "--kd", "task=0,logits", "--max_steps", "1"
    assert not main(flags(teacher, pairs, tmp_path / "small", *more, "--weight_bits", "4"))
    assert load_trained(tmp_path / "small").config.encoder_layers == 1


def test_the_best_checkpoint_by_a_term_of_the_loss_has_the_least(teacher, pairs, tmp_path):
    out = tmp_path / "out"
    every = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "loss_task", "--learning_rate", "1e-2")
    more = ("--preset", "sft", "--predict_with_generate", "False", "--max_steps", "2")
    assert not main(flags(teacher, pairs, out, *every, *best, *more))
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [entry["eval_loss_task"] for entry in state["log_history"] if "eval_loss_task" in entry]
    assert len(set(losses)) == 2 and state["best_metric"] == min(losses)


@pytest.mark.parametrize(
    "more, words",
    [
        (("--weight_bits", "3"), "weight_bits must be one of [2, 4, 8]"),
        (("--preset", "sft", "--weight_bits", "4"), "preset sft does not quantize"),
        (("--preset", "best"), "preset must be one of dq-bart,"),
        (("--kd", "logit"), "--kd knows the terms"),
        (("--learnin_rate", "1"), "no such option: --learnin_rate"),
        (("--student_encoder_layers", "two"), "--student_encoder_layers must be"),
        (("--train_file", "absent.jsonl"), "absent.jsonl"),
        (("--text_column", "body"), "body"),
        (("--stages", "absent.yaml"), "absent.yaml"),
        (("--teacher_dtype", "int8"), "--teacher_dtype must be one of"),
        (("--group_size", "64", "--weight_bits", "2"), "--learned_scale false"),
        (("--preset", "sft", "--learned_scale", "true"), "preset sft does not quantize"),
        (("--early_stopping_patience", "2"), "--metric_for_best_model"),
        (("--resume_from_checkpoint", "nowhere/checkpoint-7"), "--resume_from_checkpoint nowhere/checkpoint-7"),
        (("--student_decoder_layers", "0"), "--student_decoder_layers: a student of a 2-layer teacher: 1 to 2 layers"),
        (("--student_encoder_layers", "0,9"), "--student_encoder_layers must be one or more indices from 0 to 1"),
        (("--act_granularity", "static"), "--act_granularity must be per_token or per_tensor in training"),
        (("--kd_temperature", "0"), "temperature must be a finite number above 0"),
        (("--metric_for_best_model", "rouge9"), "--metric_for_best_model must be one of loss, loss_task, "),
        (("--metric_for_best_model", "loss_logits", "--preset", "sft"), "must be one of loss, loss_task, rouge1,"),
        (
            ("--metric_for_best_model", "rougeL", "--predict_with_generate", "false", "--preset", "sft"),
            "must be one of loss, loss_task (scores need",
        ),
        (("--metric_for_best_model", "rougeL", "--early_stopping_patience", "2"), "needs an --eval_strategy"),
        (("--fp16",), "--fp16 does nothing on a CPU"),
        (("--output_dir", __file__), "--output_dir must be a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_names_the_flag(teacher, pairs, tmp_path, capsys, more, words):
    code = main(flags(teacher, pairs, tmp_path / "out", "--max_steps", "1", *more))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("dqkernels: error: ") and words in said and "Error: " not in said, said
    assert code == 1 if words in ("absent.jsonl", "body") else code == 2, said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_output_folder_must_be_named(teacher, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model_name_or_path", str(teacher), "--train_file", str(pairs / "train.jsonl")]) == 2
    assert "--output_dir is missing" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_interrupted_run_says_what_it_kept(teacher, pairs, tmp_path, capsys, monkeypatch):
    from dqkernels.train.trainer import DistillationTrainer

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    save = "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2", "--weight_bits", "8"
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "get_batch_samples", interrupt)
        assert main(flags(teacher, pairs, out, *save)) == 130
        said = capsys.readouterr().err
        assert "dqkernels: interrupted" in said and "--resume_from_checkpoint" not in said and "Traceback" not in said
    monkeypatch.setattr(DistillationTrainer, "evaluate", interrupt)
    assert main(flags(teacher, pairs, out, *save)) == 130
    said = capsys.readouterr().err
    assert f"what is whole is kept in {out}: --resume_from_checkpoint true goes on from there" in said
    assert f"saved {out / 'checkpoint-1'}" in said and ".tmp" not in said and "nothing was written" not in said


def test_preset_then_file_then_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 0.5\nmax_steps: 7\nweight_bits: 4\n")
    base = ["--model_name_or_path", "x", "--output_dir", str(tmp_path), "--use-cpu", "True"]
    found = arguments.parse([*base, "--config", str(file), "--max-steps", "9"])
    assert (found.training.learning_rate, found.training.max_steps, found.quantization.weight_bits) == (0.5, 9, 4)
    usual = presets.PRESETS["dq-bart-plus"]
    assert found.training.warmup_steps == usual.arguments["warmup_steps"] and found.kd() == usual.kd
    assert arguments.parse(base).training.learning_rate == usual.arguments["learning_rate"]
    with pytest.raises(ArgumentsError, match="config"):
        arguments.parse([*base, "--config"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("stages: []", "at least one stage"),
        ("stages: [{name: a, train_file: x}, {name: a}]", "two stages are called 'a'"),
        ("stages: [{lr: 1}]", "no such key: 'lr'"),
        ("stages: [{output_dir: x}]", "no such key: 'output_dir'"),
        ("stages: [{weight_bits: 2}]", "no such key: 'weight_bits'"),
        ("stages: [{bf16: true}]", "no such key: 'bf16'"),
        ("stages: [{kd: nothing}]", "knows the terms"),
        ("stages: [{name: ../up}]", "name must be"),
        ("stages: [{mix: [{train_file: a, weight: 0}]}]", "weight must be"),
        ("stages: [{mix: a.jsonl}]", "mix must be a list of sources, got 'a.jsonl'"),
        ("stages: [{mix: [{train_file: a}], max_train_samples: 5}]", "max_train_samples beside mix: each source of"),
        ("stages: [{learning_rate: fast}]", "learning_rate must be a number"),
        ("stage: 1", "one key, stages"),
        ("{", "neither YAML nor JSON"),
    ],
)
def test_stages_are_checked_whole_before_the_first(tmp_path, text, words):
    file = tmp_path / "stages.yaml"
    file.write_text(text)
    given = arguments.parse(["--model_name_or_path", "x", "--output_dir", str(tmp_path), "--use_cpu", "True"])
    with pytest.raises(ArgumentsError, match=words.replace("..", r"\.\.")):
        stages.read(file, given)


def test_help_lists_presets_and_flags():
    run = subprocess.run(
        [sys.executable, "-m", "dqkernels", "train", "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    for name in presets.PRESETS:
        assert f"\n{name} " in run.stdout, name
    for flag in ("--model_name_or_path", "--stages", "--kd", "--resume_from_checkpoint", "--student_decoder_layers"):
        assert flag in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 120
