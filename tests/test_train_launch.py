"""`accelerate launch -m dqkernels train` with two processes (gloo): the whole program, not its trainer alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from test_train_resume import environment

import dqkernels
from dqkernels.cli import main
from dqkernels.data import docstrings
from dqkernels.train import load_trained

pytest.importorskip("accelerate")
psutil = pytest.importorskip("psutil")  # accelerate needs it

#: Rows of one step of all processes; and of the data, whose last evaluation step is not full.
BATCH, TRAIN, DEV = 4, 20, 7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random teacher that writes another text for each source, pairs of docstrings, and two stages."""
    folder = tmp_path_factory.mktemp("made")
    tiny_models.save_bart(
        folder / "teacher", encoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        dropout=0.0, attention_dropout=0.0, init_std=1.0, tie_word_embeddings=True,
    )  # fmt: skip
    found = docstrings.mine(packages={"argparse", "asyncio", "ast", "collections", "email", "logging", "typing"})
    for name, part in (("train", found[:TRAIN]), ("dev", found[TRAIN : TRAIN + DEV])):
        lines = [json.dumps({"source": pair.body, "target": pair.head}) + "\n" for pair in part]
        assert len(lines) == (TRAIN if name == "train" else DEV)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "stages.yaml").write_text(
        "stages:\n- {name: one, max_steps: 1}\n- {name: two, max_steps: 3, learning_rate: 5.0e-4}\n"
    )
    return folder


def command(made: Path, out: Path, processes: int, *more: str) -> list[str]:
    return [
        "train", "--model_name_or_path", str(made / "teacher"), "--train_file", str(made / "train.jsonl"),
        "--validation_file", str(made / "dev.jsonl"), "--test_file", str(made / "dev.jsonl"), "--do_predict", "True",
        "--stages", str(made / "stages.yaml"), "--weight_bits", "4", "--student_decoder_layers", "1", "--num_beams",
        "1", "--max_source_length", "24", "--max_target_length", "8", "--per_device_train_batch_size",
        str(BATCH // processes), "--per_device_eval_batch_size", "2", "--logging_steps", "1", "--eval_strategy", "no",
        "--do_eval", "True", "--save_strategy", "steps", "--save_steps", "1", "--disable_tqdm", "True",
        "--use_cpu", "True", "--report_to", "none", "--output_dir", str(out), "--json", *more,
    ]  # fmt: skip


def launch(arguments: list[str], cache: Path, said: Path) -> subprocess.Popen:
    """Two processes, as accelerate starts them; their lines of stderr go into `said`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--num_processes", "2", "--num_machines", "1", "--multi_gpu", "--mixed_precision", "no"]
    several += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    program = [sys.executable, "-m", "accelerate.commands.launch", *several, "-m", "dqkernels", *arguments]
    env = {**environment(), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    with open(said, "a") as errors:
        return subprocess.Popen(
            [*program, "--ddp_backend", "gloo", "--ddp_timeout", "60"], env=env, stdout=subprocess.PIPE, stderr=errors,
            text=True,
        )  # fmt: skip


def end(child: subprocess.Popen) -> None:
    """Kills the launcher and its workers, which have sessions of their own, if they are there."""
    try:
        found = psutil.Process(child.pid)
        family = [found, *found.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(family, timeout=30)
    child.wait()


def losses(folder: Path) -> dict[int, float]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {line["step"]: line["loss"] for line in history if "loss" in line}


def test_two_processes_are_killed_and_resumed(made, tmp_path, capsys, monkeypatch):
    """Stages, evaluation, prediction and export; equal to one process with the same global batch."""
    out, said = tmp_path / "two", tmp_path / "said"
    arguments = command(made, out, 2)
    child = launch(arguments, tmp_path / "cache", said)
    try:
        deadline = time.monotonic() + 200
        while not (out / "stage-2-two" / "checkpoint-1").exists():  # it is whole when it has this name
            assert child.poll() is None and time.monotonic() < deadline, said.read_text()[-3000:]
            time.sleep(0.01)
    finally:
        end(child)
    assert json.loads((out / "stage-1-one" / "stage.json").read_text())["steps"] == 1
    killed = said.read_text()
    # One of the two reads and tokenizes, and says so.
    assert killed.count("tokenize:   0%") == 3, "of training, validation, test"
    assert killed.count(f"stage one: {TRAIN} pairs") == 1 and "Traceback" not in killed
    assert not (out / "stage-2-two" / "stage.json").exists()
    child = launch([*arguments, "--resume_from_checkpoint", "true"], tmp_path / "cache", said)
    try:
        printed, _ = child.communicate(timeout=200)
    finally:
        end(child)
    resumed = said.read_text()[len(killed) :]
    assert child.returncode == 0, resumed[-3000:]
    assert resumed.count("stage one is finished already") == 1 and "Traceback" not in resumed
    assert not (out / "stage-1-one" / "checkpoint-2").exists() and (out / "stage-2-two" / "checkpoint-3").exists()
    results = json.loads(printed)  # of the first process alone
    assert results == json.loads((out / "all_results.json").read_text()) and results["steps"] == 4

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    alone = tmp_path / "one"
    assert not main(command(made, alone, 1))
    single = json.loads(capsys.readouterr().out)
    # Codes that rounding flips move the later ones a little.
    for stage, steps in (("stage-1-one", 1), ("stage-2-two", 3)):
        mine, theirs = losses(out / stage), losses(alone / stage)
        assert list(mine) == list(theirs) == list(range(1, steps + 1))
        assert mine == pytest.approx(theirs, rel=1e-3), stage
    assert mine[1] != mine[2]
    first = losses(out / "stage-1-one")[1]
    assert first == pytest.approx(losses(alone / "stage-1-one")[1], rel=2e-5)
    assert results["eval_loss"] == pytest.approx(single["eval_loss"], rel=1e-3)

    # What two processes predicted together: a text for each row of the file, in its order, padding rows left out.
    packed = tmp_path / "packed"
    assert not main(["export", str(out), str(packed), "--dtype", "float32"])
    capsys.readouterr()
    predicted = [json.loads(line)["prediction"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed)
    sources = [json.loads(line)["source"] for line in (made / "dev.jsonl").read_text().splitlines()]
    trained, loaded = load_trained(out), dqkernels.load(packed, dtype="float32")
    for text, source in zip(predicted, sources, strict=True):
        ids = tokenizer([source], truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            labels = ids[:, :4]
            assert torch.equal(
                trained(input_ids=ids, labels=labels).logits, loaded(input_ids=ids, labels=labels).logits
            )
        written = loaded.generate(input_ids=ids, max_length=8, num_beams=1, do_sample=False)
        assert tokenizer.decode(written[0], skip_special_tokens=True).strip() == text
    assert len(set(predicted)) > 3, predicted
