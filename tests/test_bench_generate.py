"""`bench generate`: its cells, its record on the way, its command line. Nothing here is about speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from generate_cases import CELL, CPU, CUDA, SMALL, a_lineup, a_work, assert_fits, few_rounds, judged, of, run  # noqa: F401 - few_rounds is for every test here

from dqkernels.bench import generate, record, size
from dqkernels.bench import generate_candidates as ours
from dqkernels.bench import generate_cells as cells
from dqkernels.bench import generate_view as view
from dqkernels.bench.generate_cells import Cell
from dqkernels.cli import main


def plan(name="bart-large", device=CUDA, sweep="headline", **axes) -> list[Cell]:
    return cells.plan(cells.source(name), device, sweep, **axes)


def test_cells_with_a_goal_come_first():
    first = plan()[:3]
    assert [(c.batch_size, c.num_beams, c.source_tokens, c.new_tokens) for c in first] == [
        (1, 1, 256, 64),
        (16, 4, 1024, 64),
        (32, 1, 350, 128),
    ]
    assert {c.layers for c in plan()} == {"12-12"}
    assert plan("bart-base", CPU)[0] == Cell("6-6", 1, 1, 256, 64)


def test_the_sweep_of_memory_is_the_table_of_its_goal():
    found = plan(sweep="memory")
    assert {(c.num_beams, c.source_tokens) for c in found} == {(4, 1024)}
    assert sorted(c.batch_size for c in found) == [1, 2, 4, 8, 16, 32, 64] and found[0].batch_size == 16
    assert cells.default_model(CUDA, "memory") == "bart-large" == cells.default_model(CUDA, "headline")
    assert cells.default_model(CPU, "layers") == "bart-base"


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("bart-base", ["6-6", "6-3", "1-1"]),
        ("bart-large", ["12-12", "12-6", "12-3"]),
        ("mbart-large", ["12-12", "12-6", "12-3"]),
        ("t5-base", ["12-12", "12-6", "12-3"]),
        ("tiny", ["2-2", "2-1", "1-1"]),
    ],
)
def test_depths_of_the_sweep_of_layers(name, depths):
    assert list(dict.fromkeys(c.layers for c in plan(name, sweep="layers"))) == depths


def test_lengths_of_a_sweep_are_cut_to_the_model_and_equal_cells_are_one():
    found = plan("tiny", CPU)
    assert {(c.source_tokens, c.new_tokens) for c in found} == {(64, 63)} and len(found) == len(set(found))
    assert max(c.source_tokens for c in plan("t5-base")) == 1024, "T5 has no positions to run out of"


def test_an_axis_that_is_given_takes_its_place_in_every_cell():
    found = plan("bart-base", CPU, batch_size=[1, 2], num_beams=[3], source_tokens=[9], new_tokens=[5])
    assert found == [Cell("6-6", 1, 3, 9, 5), Cell("6-6", 2, 3, 9, 5)]
    found = plan("bart-base", CPU, layers=["6-3"], new_tokens=[5])
    assert found[0] == Cell("6-3", 1, 1, 256, 5) and {c.new_tokens for c in found} == {5}
    assert Cell.of(found[0].row()) == found[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sweep": "all"}, "sweep must be one of headline, layers, memory, got 'all'"),
        ({"batch_size": [0]}, "batch_size must be 1 or more, got \\[0\\]"),
        ({"new_tokens": []}, "new_tokens must be 1 or more"),
        ({"source_tokens": [65]}, "source_tokens must fit the 64 positions of tiny, got 65"),
        ({"new_tokens": [64]}, "new_tokens must fit the 64 positions of tiny, got 64"),
        ({"layers": ["6"]}, "layers must be encoder-decoder such as 6-3, got '6'"),
        ({"layers": ["0-1"]}, "layers must be encoder-decoder"),
        ({"bits": (3,)}, "bits must be of 8, 4 and 2"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"candidates": ["gemlite"]}, "candidates must be of torch, .*got 'gemlite'"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        run(**{**SMALL, **arguments})
    longest = plan("tiny", CPU, source_tokens=[64], new_tokens=[63], batch_size=[2], num_beams=[1])
    assert list(map(str, longest)) == ["batch 2, greedy, 64+63 tokens, layers 2-2"], "the most there is, is accepted"


def test_folders(tmp_path):
    with pytest.raises(ValueError, match="bart-base.*or a folder with a config.json"):
        cells.source(str(tmp_path))
    model = size.random_model(size.SHAPES["tiny"].with_layers(1, 2))
    model.save_pretrained(tmp_path / "mine")
    found = cells.source(str(tmp_path / "mine"))
    assert (found.name, found.layers, found.positions) == ("mine", "1-2", 64)
    made = run(str(tmp_path / "mine"), candidates=["torch"], layers=None)
    assert of(made, "torch fp32")[0]["status"] == "timed" and made["settings"]["weights"] == "from a folder"
    with pytest.raises(ValueError, match="layers of a folder's model are its own, 1-2, got '1-1'"):
        plan(str(tmp_path / "mine"), layers=["1-1"])
    import dqkernels

    dqkernels.quantize_(model).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="packed already"):
        cells.source(str(tmp_path / "packed"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="must hold an encoder-decoder, got a BertConfig"):
        cells.source(str(tmp_path / "bert"))


# ------------------------------------------------------------------------------- record and tables


def test_command_line(tmp_path, capsys):
    path, plot = tmp_path / "generate.json", tmp_path / "generate.png"
    axes = "--layers 1-1 --batch_size 1,2 --num_beams 2 --source_tokens 7 --new_tokens 3".split()
    names = "--candidates torch,plain --bits 4 --embedding_bits 8 --device cpu --seconds 80000".split()
    files = ["--out", str(path), "--plot", str(plot)]
    command = ["bench", "generate", "tiny", *axes, *names]
    assert main([*command, *files]) == 0
    shown = capsys.readouterr()
    assert "4-8-8 plain" in shown.out and "wrote" in shown.err
    made = record.read(path)
    assert made["kind"] == "generate" and made["settings"]["model"] == "tiny"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert list(view.by_cell(made["rows"])) == [Cell("1-1", batch, 2, 7, 3) for batch in (1, 2)]
    for row in made["rows"]:
        assert row["status"] == "timed" and row["samples"] == 2, row
        assert row["p20_ms_per_token"] <= row["latency_ms_per_token"] <= row["p80_ms_per_token"]
        assert row["latency_ms"] == pytest.approx(3 * row["latency_ms_per_token"], rel=1e-3)
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch_size"] * 3 / row["latency_ms"], rel=1e-3)
        assert row["weights_bytes"] <= row["peak_bytes"] and row["cache_bytes"] > 0 and row["first_token_ms"] > 0
    float32, four, bf16 = made["rows"][:3]
    assert [row["candidate"] for row in (float32, four, bf16)] == ["torch fp32", "dqkernels 4-8-8 plain", "torch bf16"]
    assert float32["weights_bytes"] == size.float_bytes(size.SHAPES["tiny"].with_layers(1, 1))
    assert float32["speedup_ratio"] == float32["peak_ratio"] == 1
    assert 2 * four["weights_bytes"] < 2 * bf16["weights_bytes"] == float32["weights_bytes"]
    assert four["weight_bits"] == 4 and four["embedding_bits"] == 8 and bf16["weight_bits"] == 16
    assert [row["weight_quantizer"] for row in (float32, four)] == [None, "absmax"]
    assert float32["logits_error"] < 1e-5 < bf16["logits_error"] < 0.1
    assert_fits(made)
    # What is there is neither forgotten nor measured again unasked.
    assert main([*command, *files]) == 2 and "--resume to go on with it, --overwrite to replace it" in said(capsys)
    before = path.read_text()
    kept = plot.read_bytes()
    assert main([*command, *files, "--resume"]) == 2 and "--plot" in said(capsys) and plot.read_bytes() == kept
    assert (
        main([*command, *files, "--resume", "--overwrite"]) == 0
        and record.read(path)["rows"] == json.loads(before)["rows"]
    )
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2 and "--out" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--batch_size 1,x", "--batch_size must be"),
        ("--new_tokens 64", "--new_tokens must fit the 64 positions of tiny, got 64"),
        ("--sweep all", "--sweep must be one of"),
        ("--candidates me", "--candidates must be of"),
        ("--attention 4bit", "--attention must be auto, int8 or float"),
        ("--embedding_bits 5", "--embedding_bits must be 2, 4, 8 or 16"),
        ("--seconds 0", "--seconds must be above 0"),
        ("--backend tpu", "--backend must be of"),
        ("--resume --overwrite --out x.json", "--overwrite with it is for --table and --plot alone"),
    ],
)
def test_wrong_flags(capsys, arguments, words):
    assert main(["bench", "generate", "tiny", *arguments.split()]) == 2 and words in said(capsys)


def test_a_model_that_is_none_is_said_of_what_the_help_calls_it(capsys):
    assert main(["bench", "generate", "nope"]) == 2
    words = said(capsys)
    assert "MODEL must be one of" in words and "preset_or_path" not in words


def test_a_picture_of_nothing_is_no_error(tmp_path, monkeypatch, capsys):
    row = {"candidate": "a", "status": "refused", "reason": "x"}
    monkeypatch.setattr(generate, "measure", lambda work: [{**work.cell.row(), **row}])
    command = "bench generate tiny --device cpu --layers 1-1 --batch_size 1 --source_tokens 7 --new_tokens 3".split()
    assert main([*command, "--plot", str(tmp_path / "p.png"), "--table", str(tmp_path / "t.csv")]) == 0
    words = said(capsys)
    assert "nothing timed, no picture" in words and [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_caches_are_counted_as_the_arithmetic_says():
    lineup = a_lineup(shape=size.SHAPES["tiny"])
    inputs = lineup.inputs(CELL)
    arguments = (lineup.float32, 1.0, 32)
    dynamic, static = ours.Transformers("a", "torch", *arguments, 32), ours.static("b", *arguments)
    token = 2 * 2 * 64 * 4 * 2 * 2  # two layers of 4 heads of 16, keys and values, float32, two beams of two sources
    assert dynamic.cache_bytes(inputs, 3, 2) == token * (3 + 7)
    # The last token's is never made; some releases of transformers have room for it in a static cache.
    assert static.cache_bytes(inputs, 3, 2) in (token * (3 + 7), token * (4 + 7))
    assert judged(static, lineup) is None


def test_every_candidate_gets_the_same_inputs_without_special_tokens():
    lineup = a_lineup()
    ids = lineup.inputs(Cell("1-1", 50, 1, 60, 3))["input_ids"]
    assert torch.equal(ids, lineup.inputs(Cell("1-1", 50, 1, 60, 3))["input_ids"])
    assert not set(ids.flatten().tolist()) & {0, 1, 2} and len(ids.unique()) > 400


def test_the_settings_of_a_model_do_not_shape_the_work():
    """bart-large-cnn forces tokens, bans trigrams and stops early: none of it is a candidate's own speed."""
    model = size.random_model(size.SHAPES["tiny"])
    model.generation_config.forced_bos_token_id = 0
    model.generation_config.no_repeat_ngram_size = 3
    ours.set_generation(model)
    assert model.generation_config.forced_bos_token_id is None and not model.generation_config.no_repeat_ngram_size
    assert model.generation_config.decoder_start_token_id == 2


def said(capsys) -> str:
    return capsys.readouterr().err


# -------------------------------------------------------------------------------- stopping, going on


def test_what_time_does_not_reach_is_named():
    made = run(batch_size=[1, 2, 4], candidates=["torch"], seconds=1e-9)
    first, *others = made["rows"][:2], *made["rows"][2:]
    assert [row["status"] for row in first] == ["timed", "timed"], "the first cell is measured in any case"
    assert [(row["batch_size"], row["status"]) for row in others] == [(2, "not run"), (4, "not run")]
    assert "not run, for want of time: (2, greedy, 7+3, 1-1)" in assert_fits(made)


def test_candidates_that_time_does_not_reach_are_named():
    lineup = a_lineup(("torch", "plain"))
    rows = generate.measure(a_work(lineup, deadline=0.0))
    assert [row["status"] for row in rows] == ["timed", "not run", "not run"]
    assert rows[1]["candidate"] == "dqkernels 4-4-8 plain" and rows[1]["reason"] == "the time was over"


KILLED = """
import sys, time
from dqkernels.bench import generate
measure = generate.measure
def slow(work):
    if work.cell.batch_size == 2:
        time.sleep(300)  # killed meanwhile
    return measure(work)
generate.measure = slow
generate.run("tiny", bits=(), candidates=["torch"], device="cpu", batch_size=[1, 2], num_beams=[1], source_tokens=[7],
             new_tokens=[3], layers=["1-1"], seconds=1e5, out=sys.argv[1])
"""


def test_nothing_is_lost_on_a_kill(tmp_path):
    path = tmp_path / "generate.json"
    root = str(Path(generate.__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(path)], env=environment)
    try:
        while not path.is_file():
            assert child.poll() is None, "it ended by itself"
            try:
                child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                pass
        child.send_signal(signal.SIGKILL)
        child.wait()
    finally:
        child.kill()
    left = record.read(path)
    assert [row["status"] for row in left["rows"]] == ["timed", "timed", "not run"]
    assert left["rows"][2]["reason"] == cells.NOT_YET, "its time was not over"
    assert "not run yet: (2, greedy," in assert_fits(left)
    arguments = {"bits": (), "candidates": ["torch"], "batch_size": [1, 2], "out": str(path), "resume": True}
    made = run(**arguments)
    assert made["rows"][:2] == left["rows"][:2], "measured again"
    assert [(row["batch_size"], row["status"]) for row in made["rows"][2:]] == [(2, "timed")] * 2
    assert record.read(path) == made
    # A cell that was not asked for now stays in the record.
    wider = run(**{**arguments, "batch_size": [4]})
    assert {row["batch_size"] for row in wider["rows"]} == {1, 2, 4} and wider["rows"][2:] == made["rows"]


def test_going_on_takes_nothing_back(tmp_path, monkeypatch):
    """What was timed stays timed where time runs out before it is again; so do absentees, and a busy start."""
    load, statuses, count = 0.0, {}, 1

    def measure(work):
        work.lineup.absent["peer"] = "not installed"
        rows = [{"candidate": n, "status": s, "reason": None, "samples": count} for n, s in statuses.items()]
        return [{**work.cell.row(), **row} for row in rows]

    monkeypatch.setattr(generate, "measure", measure)
    monkeypatch.setattr(generate.protocol, "state", lambda device: {"load_fraction": load})
    given = {"out": str(tmp_path / "generate.json"), "resume": True, "seconds": 10.0}
    load, statuses = 0.9, {"a": "timed", "b": "refused", "c": "timed", "d": "timed", "e": "not run", "f": "not run"}
    statuses["peer"] = "not run"  # and found to be absent later
    run(**given)
    load, count = 0.1, 2
    statuses = {"a": "not run", "b": "not run", "c": "timed", "d": "refused", "e": "timed", "f": "too slow"}
    made = run(**given)
    *rows, gone = made["rows"]
    found = {row["candidate"]: (row["status"], row["samples"]) for row in rows}
    assert found == {
        "a": ("timed", 1), "b": ("refused", 1), "c": ("timed", 2), "d": ("refused", 2), "e": ("timed", 2),
        "f": ("too slow", 2),
    }  # fmt: skip
    assert gone == {"candidate": "peer", "status": "not compared", "reason": "not installed"}
    assert made["protocol"]["budget_s"] == 20 and made["protocol"]["before"] == {"load_fraction": 0.9}
    assert generate.protocol.busy_words(made["protocol"]) is not None
    load = 0.2
    again = run(**given)  # nothing to do
    assert again["rows"] == made["rows"] and again["protocol"] == made["protocol"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "linear"}, "resume is for a record of bench generate, generate.json is of kind 'linear'"),
        ({"settings": {"bits": [8]}}, r"resume needs the same bits as in generate.json: \[8\] there, \[4\] now"),
        ({"settings": {"model": "bart-base"}}, "the same model .*'bart-base' there, 'tiny' now"),
        ({"environment": {"threads": 99}}, "the same threads as in generate.json: 99 there"),
        ({"environment": {"source_sha256": "0" * 64}}, "the same source_sha256"),
    ],
)
def test_a_record_of_something_else_is_not_gone_on_with(tmp_path, monkeypatch, change, words):
    path = tmp_path / "generate.json"
    monkeypatch.setattr(generate, "measure", lambda work: [{**work.cell.row(), "candidate": "a", "status": "refused"}])
    made = run(out=str(path))
    assert run(out=str(path), resume=True)["rows"] == made["rows"]
    for key, value in change.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    record.write(made, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        run(out=str(path), resume=True)
    assert path.read_bytes() == before
