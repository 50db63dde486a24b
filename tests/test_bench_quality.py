"""`bench quality`: rows, gaps, the record of a run that was stopped, refusals; on a tiny model with few texts."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import documents
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_text import make_tiny

import dqkernels
from dqkernels.bench import demo, plot, quality, record
from dqkernels.cli import main
from dqkernels.metrics.paired import paired_difference
from dqkernels.metrics.rouge import rouge, rougeL

TEXTS = quality.Texts(
    tuple(f"hello world {n} " + "a b c " * n for n in range(1, 7)),
    tuple(f"hello {n} world" for n in range(1, 7)),
    {"source": "made"},
)
SHORT = quality.Task(batch_size=4, options={"max_new_tokens": 6, "num_beams": 1})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("tiny") / "bart"))


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """A packed folder without a tokenizer, as an exported student may be."""
    folder = tmp_path_factory.mktemp("packed") / "student"
    demo.pack(tiny, 4, folder)
    return str(folder)


@pytest.fixture(scope="module")
def ran(tiny, packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("quality") / "made.json"
    lines: list[str] = []
    made = quality.run(tiny, TEXTS, (8, 2), packed=[packed], task=SHORT, device="cpu", out=str(out), tell=lines.append)
    return made, out, lines


def test_rows_and_record(ran):
    made, out, lines = ran
    assert record.read(out) == made and made["kind"] == "quality"
    rows = {row["name"]: row for row in made["rows"]}
    assert list(rows) == ["float", "W8", "W2", "student"] == [line.split(":")[0] for line in lines]
    assert [row["weight_bits"] for row in rows.values()] == [32, 8, 2, 4]
    assert [row["origin"] for row in rows.values()] == ["the float model", "rounded", "rounded", "as given"]
    assert all(row["status"] == "scored" and row["took_s"] >= 0 for row in rows.values())
    assert rows["float"]["file_ratio"] == 1 and "gap_score" not in rows["float"]
    for row in rows.values():
        assert row["file_bytes"] * row["file_ratio"] == pytest.approx(rows["float"]["file_bytes"], rel=1e-3)
        assert len(row["pair_scores_milli"].split()) == 6 and 0 <= row["rougel_score"] <= 100
    assert rows["W2"]["file_bytes"] < rows["student"]["file_bytes"] < rows["W8"]["file_bytes"]
    assert (
        made["settings"]["scored"] == 6 and made["settings"]["model"] == "bart" and made["settings"]["gap"] == "ROUGE-L"
    )


def test_what_is_scored_is_the_model_that_was_saved(ran, tiny, tmp_path):
    """The same, by hand."""
    model, size = demo.pack(tiny, 2, tmp_path / "w2")
    from transformers import AutoTokenizer

    found = SHORT.write(model, AutoTokenizer.from_pretrained(tiny), TEXTS.sources)
    row = next(row for row in ran[0]["rows"] if row["name"] == "W2")
    assert row["file_bytes"] == size and row["rougel_score"] == pytest.approx(
        rouge(found, TEXTS.targets)["rougeL"], abs=1e-3
    )
    wanted = [round(1000 * rougeL(*pair)) for pair in zip(found, TEXTS.targets, strict=True)]
    assert [int(score) for score in row["pair_scores_milli"].split()] == wanted


def test_gaps_are_paired():
    mean, error = paired_difference([10.0, 20.0, 40.0], [9.0, 20.0, 36.0])
    assert mean == pytest.approx(5 / 3) and error == pytest.approx(statistics.stdev([1.0, 0.0, 4.0]) / 3**0.5)
    assert paired_difference([3.0], [1.0]) == (2.0, 0.0)
    for wrong in (([1.0], []), ([], [])):
        with pytest.raises(ValueError, match="scores"):
            paired_difference(*wrong)


def test_gaps_of_a_row_are_those_of_its_pairs():
    base = {"pair_scores_milli": "0 50000 100000"}
    row = quality._scored(SHORT, ["a b", "c", "d e"], ["a b", "c", "x"], base)
    assert row["pair_scores_milli"] == "100000 100000 0"
    assert row["gap_score"] == pytest.approx(50 / 3, abs=1e-3)
    assert row["gap_error"] == pytest.approx(statistics.stdev([100.0, 50.0, -100.0]) / 3**0.5, abs=1e-3)


def test_translations_are_scored_by_bleu_and_chrf():
    pytest.importorskip("sacrebleu")
    task = quality.Task(source_lang="en", target_lang="ro")
    row = quality._scored(task, ["unu doi trei patru", "x"], ["unu doi trei patru", "cinci"], None)
    assert row["pair_scores_milli"].split()[0] == "100000" and row["chrf_score"] < 100 and "bleu_signature" in row
    assert task.translates and not SHORT.translates and "chrF" in quality._protocol_words(task)["gap"]


def test_a_run_that_was_stopped_goes_on(ran, tiny, tmp_path, monkeypatch):
    out = str(tmp_path / "made.json")
    packing = demo.pack

    def stopped(folder, width, *more):
        if width == 2:
            raise KeyboardInterrupt
        return packing(folder, width, *more)

    monkeypatch.setattr(demo, "pack", stopped)
    with pytest.raises(KeyboardInterrupt):
        quality.run(tiny, TEXTS, (8, 2), task=SHORT, device="cpu", out=out)
    half = record.read(out)
    assert [row["status"] for row in half["rows"]] == ["scored", "scored", "not run"]
    widths: list[int] = []
    monkeypatch.setattr(
        demo, "pack", lambda folder, width, *more: (widths.append(width), packing(folder, width, *more))[1]
    )
    made = quality.run(tiny, TEXTS, (8, 2), task=SHORT, device="cpu", out=out, resume=True)
    assert widths == [2] and record.read(out) == made and made["rows"][:2] == half["rows"][:2]

    def timeless(rows):
        return [{key: value for key, value in row.items() if key != "took_s"} for row in rows]

    assert timeless(made["rows"]) == timeless(ran[0]["rows"][:3]), "as if it had not been stopped"
    # A picture of half a record leaves out what was not run.
    (tmp_path / "half.json").write_text(json.dumps(half))
    (picture,) = plot.pictures(plot.load(tmp_path / "half.json"))
    assert len(picture.panels[0].series) == 2


def test_without_the_float_models_row_nothing_is_gone_on_with(ran, tmp_path):
    """Gaps are to that row, pair by pair."""
    made, out = ran[0], tmp_path / "made.json"
    record.write(made, out)
    assert set(quality._earlier(made, str(out))) == {row["name"] for row in made["rows"]}
    record.write({**made, "rows": made["rows"][1:]}, out)
    assert quality._earlier(made, str(out)) == {}


def test_another_record_is_not_gone_on_with(ran, tiny, tmp_path):
    out = tmp_path / "made.json"
    again = {"task": SHORT, "device": "cpu", "out": str(out), "resume": True}
    out.write_text(ran[1].read_text())
    other = quality.Texts(TEXTS.sources[1:], TEXTS.targets[1:], TEXTS.facts)
    with pytest.raises(ValueError, match="resume needs the same scored as in made.json: 6 there, 5 now"):
        quality.run(tiny, other, (8, 2), **again)
    swapped = quality.Texts(TEXTS.sources[::-1], TEXTS.targets[::-1], TEXTS.facts)
    with pytest.raises(ValueError, match="the same pairs_sha256"):
        quality.run(tiny, swapped, (8, 2), **again)
    made = json.loads(out.read_text())
    made["environment"]["source_sha256"] = "0" * 64
    out.write_text(json.dumps(made))
    with pytest.raises(ValueError, match="the same source_sha256"):
        quality.run(tiny, TEXTS, (8, 2), **again)
    out.write_text(json.dumps({**made, "kind": "size"}))
    with pytest.raises(ValueError, match="is of kind 'size'"):
        quality.run(tiny, TEXTS, (8, 2), **again)


def test_other_weights_under_the_same_name_are_not_gone_on_with(ran, tiny, packed, tmp_path):
    """Folders are named without their path: what lies in them is asked for."""
    out, again = tmp_path / "made.json", {"task": SHORT, "device": "cpu", "resume": True}
    out.write_text(ran[1].read_text())
    assert quality.run(tiny, TEXTS, (8, 2), packed=[packed], out=str(out), **again)["rows"] == ran[0]["rows"]
    student, teacher = tmp_path / Path(packed).name, tmp_path / Path(tiny).name
    for folder, source in ((student, packed), (teacher, tiny)):
        shutil.copytree(source, folder)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
        save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="the same packed_sha256"):
        quality.run(tiny, TEXTS, (8, 2), packed=[student], out=str(out), **again)
    with pytest.raises(ValueError, match="the same model_sha256"):
        quality.run(teacher, TEXTS, (8, 2), packed=[packed], out=str(out), **again)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": (3,)}, "bits must be distinct values"),
        ({"bits": (8, 8)}, "bits must be distinct values"),
        ({"embedding_bits": 5}, "embedding_bits must be one of"),
        ({"weight_quantizer": "best"}, "weight_quantizer must be one of"),
        ({"group_size": 7}, "group_size must be one of"),
        ({"packed": ["a/x", "b/x"]}, "packed must be folders with different names"),
        ({"packed": ["a/float"]}, "packed must be folders with different names"),
    ],
)
def test_refusals_before_any_work(given, message, tiny, monkeypatch):
    monkeypatch.setattr(demo, "pack", None)
    with pytest.raises(ValueError, match=message):
        quality.run(tiny, TEXTS, **{"bits": (4,), "task": SHORT, "device": "cpu", **given})


def test_packed_folders_that_are_none(tiny, tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        quality._open_packed(str(tmp_path))
    with pytest.raises(ValueError, match="is float"):
        quality._open_packed(tiny)


def test_a_rule_speaks_for_the_widths_that_know_it():
    of = {"embedding_bits": None, "weight_quantizer": "four_level", "group_size": 64}
    assert quality.config_of(2, **of) == {
        "weight_bits": 2,
        "embedding_bits": 2,
        "weight_quantizer": "four_level",
        "group_size": 64,
    }
    assert quality.config_of(8, **of) == {
        "weight_bits": 8,
        "embedding_bits": 8,
        "weight_quantizer": "auto",
        "group_size": -1,
    }
    assert quality.config_of(4, **{**of, "embedding_bits": 8})["embedding_bits"] == 8


def test_the_shipped_model_with_its_student(tmp_path, monkeypatch):
    """Two real docstrings; the student's folder has no tokenizer of its own."""
    drawn = quality.Texts(
        ("Return the absolute value of the argument. It is a number, and may be a float or an integer.",) * 2,
        ("Return the absolute value.",) * 2, {},
    )  # fmt: skip
    made = quality.run(None, drawn, (), device="cpu", task=quality.Task(options={"num_beams": 1, "max_new_tokens": 8}))
    assert [row["name"] for row in made["rows"]] == ["float", demo.STUDENT]
    assert made["rows"][1]["weight_bits"] == 2 and made["rows"][1]["attention"] == "int8"


# -------------------------------------------------------------------------------------------- the verb


def test_the_verb(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("COLUMNS", "80")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"text": s, "summary": t}) + "\n" for s, t in zip(TEXTS.sources, TEXTS.targets, strict=True))
    )
    out = str(tmp_path / "made.json")
    command = ["bench", "quality", "--model", tiny, "--validation_file", str(pairs), "--bits", "4", "--device", "cpu"]
    command += ["--max_new_tokens", "5", "--num_beams", "1", "--pairs", "4", "--out", out]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "gap" in text and "W4" in text and max(map(len, text.splitlines())) <= 80
    made = record.read(out)
    assert made["settings"]["source"] == "validation of pairs.jsonl" and made["settings"]["scored"] == 4
    assert main(command) == 2 and "give --resume to go on" in capsys.readouterr().err
    assert main([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == made["rows"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "x"], "--model needs pairs"),
        (["--validation_file", "a", "--test_file", "b"], "not both"),
        (["--resume"], "--resume goes on with the record in --out"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--bits", "3"], "--bits must be"),
        (["--split", "best", "--dataset_name", "docstrings"], "--split must be one of train, validation, test"),
        (["--device", "tpu"], "--device must be auto"),
    ],
)
def test_wrong_usage(flags, message, capsys):
    assert main(["bench", "quality", *flags]) == 2
    assert message in capsys.readouterr().err


def test_bench_train_prints_writes_and_judges(tmp_path, capsys, monkeypatch):
    from test_bench_train_step import tiny as tiny_work

    from dqkernels.bench import train_step

    monkeypatch.setattr(train_step, "_MAX_ROUNDS", 2)
    monkeypatch.setattr(train_step, "demo_model", lambda device: tiny_work())
    out = tmp_path / "train.json"
    command = ["bench", "train", "--device", "cpu", "--bits", "4", "--fixed", "--seconds", "900", "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "W4A8" in text and "step_ratio" in text and "GPU: not run" in text
    made = record.read(out)
    assert made["kind"] == "training" and made["settings"]["learned_scale"] is False and made["settings"]["bits"] == [4]
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "training"
    assert main(["bench", "train", "--dtype", "int8"]) == 2 and "--dtype must be" in capsys.readouterr().err
    assert main(["bench", "train", "--seconds", "0"]) == 2
    (picture,) = plot.pictures(plot.load(out))
    assert picture.name == "step" and [one.label for one in picture.panels[0].series] == ["torch autograd", "ours W4A8"]


def test_the_script_is_the_verb():
    text = (Path(dqkernels.__file__).parents[1] / "benchmarks" / "bench_train_step.py").read_text()
    assert 'main(["bench", "train"' in text and torch.__name__ not in text.split('"""')[2]


def test_the_table_in_the_docs_is_its_record():
    (block,) = [
        one.text
        for one in documents.blocks(documents.ROOT / "docs" / "cli.md")
        if one.text.startswith("$ dqkernels bench quality --out quality-zen3.json\n")
    ]
    made = record.read(documents.ROOT / "benchmarks" / "results" / "quality-zen3.json")
    console = Console(width=60, color_system=None)
    with console.capture() as captured:
        console.print(quality.render(made))
    printed = [line.rstrip() for line in captured.get().splitlines()]
    assert block.splitlines()[1:] == printed
