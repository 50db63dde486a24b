"""Rows as CSV and Markdown: of every kind of record, and by every verb of `bench`."""

from __future__ import annotations

import csv
import json
import re

import pytest

from dqkernels import cli
from dqkernels.bench import record, schemas, tables
from dqkernels.cli.app import build

RESULTS = record._ROOT / "benchmarks" / "results"
RECORDS = [path.name for path in sorted(RESULTS.glob("*.json")) if schemas.read(path)[0] == "record"]


def split(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


@pytest.mark.parametrize("name", RECORDS)
def test_every_row_of_every_record_is_there(name, tmp_path):
    rows = (found := record.read(RESULTS / name))["rows"]
    tables.write_table(found, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) and set(lines[0]) == {key for row in rows for key in row}
    for line, row in zip(lines, rows, strict=True):
        for key, value in row.items():
            wanted = "" if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
            assert line[key] == wanted, key
    tables.write_table(found, tmp_path / "t.md")
    text = (tmp_path / "t.md").read_text(encoding="utf-8")
    bodies = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    heads = sum(line.startswith("|---") for line in text.splitlines())
    assert len(bodies) - heads == len(rows) and all(len(split(line)) > 1 for line in bodies)
    assert text.count("### ") == (len({row["part"] for row in rows}) if name.startswith("cpu-") else 0)


def test_markdown_by_hand():
    rows = [
        {
            "candidate": "a|b",
            "tokens": 1,
            "median_us": 123.4567,
            "p10_us": 1.0,
            "status": "timed",
            "reason": None,
            "n": [],
        },
        {"candidate": "c", "tokens": 2, "status": "refused", "reason": "two\nlines", "met": True},
    ]
    assert tables.markdown({"rows": rows}).splitlines() == [
        "| candidate | tokens | median_us | status | reason | met |",
        "|---|---:|---:|---|---|---:|",
        r"| a\|b | 1 | 123.46 | timed |  |  |",
        "| c | 2 |  | refused | two lines | yes |",
    ]
    assert tables.markdown({"rows": rows[:1]}).splitlines()[0] == "| candidate | tokens | median_us |", "all timed"
    parts = [{"part": "x", "a": 1}, {"part": "y", "b": 2}, {"part": "x", "a": 3}]
    text = tables.markdown({"kind": "cpu", "rows": parts})
    assert text.split("\n\n")[0] == "### x" and "| 1 |\n| 3 |" in text and text.index("### y") > text.index("| 3 |")


def bench() -> dict:
    return build().commands["bench"].commands


def test_every_verb_has_the_flag():
    assert len(bench()) == 11
    for name, command in bench().items():
        flags = {flag for one in command.params for flag in one.opts}
        assert {"--table", "--overwrite"} <= flags, name


COMPARED = str(RESULTS / "linear-example.json")
CHEAP = {
    "linear": "--shapes 1x16x128 --bits 4 --backends eager --dtype float32 --device cpu --seconds 0.1",
    "size": "--shape tiny",
    "projected": "--card h200 --shapes 64x64 --tokens 1 --models tiny",
    "compare": f"{COMPARED} {COMPARED}",
    "peers": "--device cpu",
}


@pytest.mark.parametrize("verb", CHEAP)
def test_a_verb_writes_it(verb, tmp_path, capsys):
    words = ["bench", verb, *CHEAP[verb].split(), "--json"]
    for ending in (".csv", ".md"):
        path = tmp_path / f"t{ending}"
        assert cli.main([*words, "--table", str(path)]) == 0
        said = capsys.readouterr()
        found = json.loads(said.out)
        assert f"wrote {path}" in said.err
        rows = found["peers"] if verb == "peers" else found["rows"]
        heads = 1 if ending == ".csv" else 2
        assert len(path.read_text(encoding="utf-8").splitlines()) == len(rows) + heads
    assert cli.main([*words, "--table", str(path)]) == 2
    assert "is there already: give --overwrite to replace it" in capsys.readouterr().err
    assert cli.main([*words, "--table", str(path), "--overwrite"]) == 0


@pytest.mark.parametrize("verb", sorted({*CHEAP, "gemm", "kernels", "generate", "cpu", "train", "quality"}))
def test_another_ending_is_refused_before_anything_runs(verb, tmp_path, capsys):
    words = CHEAP.get(verb, "").split()
    assert cli.main(["bench", verb, *words, "--table", str(tmp_path / "t.txt")]) == 2
    assert "--table must end in .csv or .md" in capsys.readouterr().err
    assert cli.main(["bench", verb, *words, "--table", str(tmp_path / "no" / "t.csv")]) == 2
    assert "--table must lie in a folder that exists" in capsys.readouterr().err


def test_going_on_may_replace_the_table_alone(tmp_path, capsys):
    for verb in ("cpu", "quality"):
        assert cli.main(["bench", verb, "--resume", "--overwrite", "--out", str(tmp_path / "x.json")]) == 2
        assert "--overwrite with it is for --table alone" in capsys.readouterr().err
