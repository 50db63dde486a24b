"""`generate`, `summarize`, `translate` on the decode loop: the same lines with `--plain`, word by word, in shares."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from test_text import make_tiny

from dqkernels import DQConfig, decode, models, quantize_, text
from dqkernels.cli import main
from dqkernels.decode import engine

WORDS = ("hello", "world", "a", "b", "c")
TEXTS = [" ".join(WORDS[(n * k) % 5] for k in range(1, 2 + n * 7 % 9)) for n in range(1, 12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed folder with int8 attention; with large weights, a random model writes more than one word."""
    folder = make_tiny(tmp_path_factory.mktemp("decode") / "bart", init_std=0.6)
    model, tokenizer = text.open_model(folder)
    out = tmp_path_factory.mktemp("packed") / "w4"
    quantize_(model, DQConfig(weight_bits=4, attention="int8")).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


@pytest.fixture
def opened(monkeypatch):
    """The models that a verb opened, ready for the loop."""
    found, original = [], text.open_model

    def open_model(*arguments, **options):
        model, tokenizer = original(*arguments, **options)
        found.append(decode.attach(models.patch(model)))
        return model, tokenizer

    monkeypatch.setattr(text, "open_model", open_model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("beams", ["1", "3"])
def test_the_same_lines_with_both_loops(folder, opened, tmp_path, capsys, beams):
    source = tmp_path / "in.txt"
    source.write_text("\n".join(TEXTS) + "\n\n")
    command = ["generate", folder, "--input", str(source), "--batch_size", "4", "--max_new_tokens", "7"]
    command += ["--num_beams", beams]
    assert main(command) == 0
    ours = capsys.readouterr().out
    assert main([*command, "--plain"]) == 0
    assert capsys.readouterr().out == ours
    states = [engine.state_of(model) for model in opened]
    assert [(state.served, state.passed) for state in states] == [(3, 0), (0, 0)]
    found = [json.loads(line) for line in ours.splitlines()]
    assert [each["input"] for each in found] == [*TEXTS, ""] and found[-1]["output"] == ""
    assert len({each["output"] for each in found}) > 2


def test_plain_holds_between_lines(folder, opened):
    """A generator that is read slowly does not change what others of this thread do meanwhile."""
    model, tokenizer = text.open_model(folder)
    lines = text.stream_texts(model, tokenizer, TEXTS, plain=True, batch_size=2, max_new_tokens=4)
    first = next(lines)
    ids = torch.tensor([[5, 6, 2]])
    model.generate(ids, max_new_tokens=3)
    assert engine.state_of(model).served == 1
    assert [first, *lines] == text.generate_texts(model, tokenizer, TEXTS, batch_size=2, max_new_tokens=4)
    assert engine.state_of(model).served == 1 + 6


def test_words_as_they_are_written(folder, opened, capsys):
    command = ["generate", folder, "--text", TEXTS[3], "--max_new_tokens", "7"]
    assert main([*command, "--num_beams", "1"]) == 0
    whole = json.loads(capsys.readouterr().out)["output"]
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out.strip() == whole != ""
    assert engine.state_of(opened[1]).served == 1
    for more, message in (
        (["--num_beams", "2"], "--num_beams must be 1 to print words as they are written, got 2"),
        (["--json"], "--stream is for --text on stdout: leave out --input, --output and --json"),
        (["--output", "x"], "--stream is for --text on stdout"),
    ):
        assert main([*command, "--stream", *more]) == 2
        assert message in capsys.readouterr().err


def test_two_processes_write_one_file(folder, tmp_path, capsys):
    pytest.importorskip("accelerate")
    source, out, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    source.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    out.write_text("old\n")

    def command(target):
        more = ["--output", str(target), "--max_new_tokens", "5", "--batch_size", "2", "--device", "cpu"]
        return ["generate", folder, "--input", str(source), *more, "--overwrite"]

    assert main(command(whole)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def start(rank: int, arguments: list[str]) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-m", "dqkernels", *arguments], env=env, **pipes)

    both = [start(rank, command(out)) for rank in range(2)]
    try:
        ended = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], ended
    assert out.read_text() == whole.read_text() and len(out.read_text().splitlines()) == len(TEXTS)
    assert f"wrote {len(TEXTS)} outputs" in ended[0][1] and "wrote" not in ended[1][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_shares_need_files(folder, monkeypatch, capsys):
    from dqkernels import launcher

    monkeypatch.setattr(launcher.Processes, "of_launcher", lambda cpu=False: launcher.Processes(1, 3))
    for given in (["--text", "a"], ["--input", "-"]):
        assert main(["generate", folder, *given]) == 2
        assert "3 processes share an --input file and write an --output file" in capsys.readouterr().err
