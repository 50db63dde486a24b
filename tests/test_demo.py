"""`dqkernels demo`: what it writes and shows, on a tiny teacher, and on the shipped one without a network."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from test_text import make_tiny

from dqkernels.bench import demo, demo_view
from dqkernels.data import docstrings

ROWS = ["lead", "teacher", "W8", "W4", "W2"]
COLUMNS = {"name", "bits", "file_mb", "ratio", "rouge1", "rouge2", "rougeL", "ms_per_token", "kernel"}


def make_pairs(count: int) -> list[docstrings.DocPair]:
    """Pairs that need no mining."""
    body = "It takes {} arguments and returns a value; " + "words follow that nobody needs to read " * 8
    return [
        docstrings.DocPair(f"package.m{n}", f"f{n}", body.format(n), f"Return value number {n}.") for n in range(count)
    ]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("teacher") / "bart")
    np.save(folder / "seen.npy", np.asarray(docstrings.fingerprints(make_pairs(2)), dtype=np.uint32))
    return folder


@pytest.fixture(scope="module")
def ran(teacher, tmp_path_factory):
    """One run: the result, the folder, and what was on the screen."""
    out, screen = tmp_path_factory.mktemp("demo") / "made", io.StringIO()
    patch = pytest.MonkeyPatch()
    patch.setattr(docstrings, "mine", lambda split, packages=None: make_pairs(14))
    patch.setattr(demo, "SPEED_ROUNDS", 1)
    try:
        console = Console(file=screen, width=80, highlight=False)
        result = demo.run(out, samples=2, pairs=9, teacher=teacher, console=console)
    finally:
        patch.undo()
    return result, out, screen.getvalue()


def test_the_files(ran):
    result, out, _ = ran
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "demo.png"], "and nothing half-written"
    assert json.loads((out / "demo.json").read_text()) == result
    png = (out / "demo.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_the_rows(ran):
    rows = {row["name"]: row for row in ran[0]["rows"]}
    assert list(rows) == ROWS
    for row in rows.values():
        assert COLUMNS <= set(row)
        assert all(0 <= row[key] <= 100 for key in ("rouge1", "rouge2", "rougeL"))
    for name in ("W8", "W4", "W2"):
        gap = rows[name]["rougeL"] - rows["teacher"]["rougeL"]
        assert rows[name]["rougeL_gap"] == pytest.approx(gap, abs=0.02)
        assert rows[name]["rougeL_gap_error"] >= 0
    assert all(rows["lead"][key] is None for key in ("bits", "file_mb", "ratio", "ms_per_token", "kernel"))
    assert [rows[name]["bits"] for name in ROWS[1:]] == [32, 8, 4, 2]
    parameters = ran[0]["settings"]["teacher_parameters"]
    assert rows["teacher"]["file_mb"] == pytest.approx(4 * parameters / 1e6, abs=1e-4)
    sizes = [rows[name]["file_mb"] for name in ROWS[1:]]
    assert sizes == sorted(sizes, reverse=True) and rows["teacher"]["ratio"] == 1.0
    assert all(rows[name]["ms_per_token"] > 0 and rows[name]["kernel"] for name in ROWS[1:])


def test_the_samples_are_every_scored_pair(ran):
    result = ran[0]
    assert len(result["samples"]) == result["settings"]["scored"] == 9
    assert result["settings"]["held_out"] == 12, "two of 14 were seen"
    for sample in result["samples"]:
        assert {"body", "reference", *ROWS} <= set(sample)
        assert sample["lead"] == docstrings.lead(sample["body"])
        assert sample["module"] not in ("package.m0", "package.m1")


def test_the_screen(ran):
    screen = ran[2]
    lines = screen.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in screen, "no colour where there is no terminal"
    assert all(name in screen for name in ROWS) and "demo.json" in screen
    assert sum(line.startswith("╭─") for line in lines) == 2, "a panel per sample"


def test_the_file_is_what_is_scored(teacher, tmp_path):
    """The model that runs was loaded from the folder whose bytes are reported, and is packed."""
    from dqkernels.nn import QEmbedding, QLinear

    model, size = demo.pack(teacher, 2, tmp_path / "w2")
    assert size == (tmp_path / "w2" / "model.safetensors").stat().st_size
    kinds = [type(m) for m in model.modules()]
    assert QLinear in kinds and QEmbedding in kinds
    assert {m.layer.bits for m in model.modules() if isinstance(m, (QLinear, QEmbedding))} == {2}
    assert model.config._name_or_path == str(tmp_path / "w2")


def test_the_draw(teacher, monkeypatch):
    monkeypatch.setattr(docstrings, "mine", lambda split, packages=None: make_pairs(14))
    first, counts = demo.draw_pairs(teacher, 5, 0)
    assert first == demo.draw_pairs(teacher, 5, 0)[0] and first != demo.draw_pairs(teacher, 5, 1)[0]
    assert demo.draw_pairs(teacher, 9, 0)[0][:5] == first, "a longer draw begins with the shorter one"
    assert counts["source"].startswith("standard library") and counts["scored"] == 5
    everything, counts = demo.draw_pairs(teacher, 500, 0)
    assert counts == {"source": "all installed packages", "mined": 14, "held_out": 12, "scored": 12}
    assert len(everything) == 12


def test_the_teachers_own_training_is_told(tmp_path):
    assert demo.training_note(tmp_path) is None
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"arguments": {"quant_phase": 0.15}}))
    assert "15%" in demo.training_note(tmp_path) and "4 bits" in demo.training_note(tmp_path)
    recipe.write_text(json.dumps({"arguments": {}}))
    assert "in float" in demo.training_note(tmp_path)


def test_the_shipped_student_is_packed_and_fits_the_teacher():
    from dqkernels.nn import QEmbedding, QLinear

    model, size = demo.load_student()
    layers = [m for m in model.modules() if isinstance(m, (QLinear, QEmbedding))]
    assert {m.layer.bits for m in layers} == {2} and size < 1.4e6
    assert not any(type(m) is torch.nn.Linear for m in model.modules()), "the head too"
    assert model.config.vocab_size == json.loads((demo.teacher_folder() / "config.json").read_text())["vocab_size"]
    assert model.config.use_cache and model.generation_config.num_beams == 4
    note = demo.student_note()
    assert note.startswith("DQ-2: ") and "preset dq-bart-plus" in note


def test_a_missing_student_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "__file__", str(tmp_path / "docstrings.py"))
    with pytest.raises(demo.DemoError, match="student is not complete in this installation .*config.json is missing"):
        demo.student_folder()


def test_too_few_pairs_are_said(teacher):
    screen = io.StringIO()
    show = demo_view.Shower(Console(file=screen, width=80))
    show.data({"source": "all", "mined": 14, "held_out": 12, "scored": 12}, 320)
    assert "Fewer than the 320 wanted" in screen.getvalue()


def test_a_poor_row_is_called_poor():
    rows = [
        {"name": "lead", "rougeL": 15.0},
        {"name": "teacher", "rougeL": 25.0},
        {"name": "W8", "rougeL": 24.9},
        {"name": "W4", "rougeL": 22.0},
        {"name": "W2", "rougeL": 3.0},
    ]
    found = demo_view.remarks(rows)
    assert len(found) == 1 and found[0].startswith("W2 is poor")
    trained = [*rows, {"name": "DQ-2", "rougeL": 24.0}]
    assert found[0].endswith("training with quantization.")
    assert demo_view.remarks(trained)[0].endswith("training with quantization, as DQ-2 had.")
    rows[1]["rougeL"] = 14.0
    assert "does not beat the lead" in demo_view.remarks(rows)[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"bits": (8, 3)}, "bits must be distinct values"),
        ({"bits": ()}, "bits must be distinct values"),
    ],
)
def test_arguments(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        demo.run(tmp_path, **options)


def test_a_failure_leaves_no_files(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "mine", lambda split, packages=None: make_pairs(6))
    monkeypatch.setattr(demo, "SPEED_ROUNDS", 1)

    def fail(result):
        raise RuntimeError("no ink")

    monkeypatch.setattr(demo_view, "draw", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        demo.run(tmp_path / "out", pairs=2, bits=(8,), teacher=teacher, console=Console(file=io.StringIO()))
    assert not list((tmp_path / "out").iterdir())


NO_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    raise AssertionError("the demo opened a socket")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from dqkernels.cli import main
sys.exit(main(["demo", "--pairs", "4", "--samples", "1", "--out", sys.argv[1], "--json"]))
"""


def test_the_shipped_teacher_offline(tmp_path):
    try:
        demo.teacher_folder()
    except demo.DemoError as error:
        pytest.skip(str(error))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["rows"]] == [*ROWS, demo.STUDENT] and len(result["samples"]) == 4
    student = result["rows"][-1]
    assert student["bits"] == 2 and student["file_mb"] == result["rows"][4]["file_mb"], "the bytes of W2"
    assert "400 steps of 32 pairs" in result["settings"]["student_training"]
    assert (tmp_path / "demo.json").is_file() and (tmp_path / "demo.png").is_file()
