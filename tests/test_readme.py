"""README.md says nothing that no record holds (docs/design.md, P8), and its Python runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import documents
import pytest

import dqkernels
from dqkernels.bench import demo
from dqkernels.nn import QLinear

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
#: A number as prose has it, no part of a name, a version or a file, and what it counts.
NUMBER = re.compile(r"(?<![\w.\-/`])(\d[\d,]*(?:\.\d+)?)(x\b| ms\b| us\b|\b(?![\w/\-`]))")
#: Endings of a record's keys that hold such a number.
KEYS = {"x": ("_ratio",), " ms": ("_ms", "_ms_per_token"), " us": ("_us",)}


def record(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def sections() -> dict[str, str]:
    """Text by heading, code blocks left out."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.S | re.M)
    parts = re.split(r"^#+ (.+)$", prose, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(text: str) -> list[list[str]]:
    """The rows of the only table of a text, without its header."""
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"\s*\|\s*", line)] for line in lines[2:]]


def shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def numbers(found: object, endings: tuple[str, ...], key: str = "") -> set[float]:
    """Every number of a record under a key that ends so."""
    if isinstance(found, dict):
        return set().union(*(numbers(value, endings, name) for name, value in found.items()))
    if isinstance(found, list):
        return set().union(*(numbers(value, endings, key) for value in found))
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return {float(found)} if is_number and key.endswith(endings) else set()


def test_the_demo_table_is_its_record():
    (text,) = [text for text in sections().values() if "| teacher |" in text]
    assert "`benchmarks/results/demo.json`" in text
    rows = {row["name"]: row for row in record("demo.json")["rows"]}
    found = table(text)
    assert [line[0] for line in found] == list(rows)
    for name, *cells in found:
        row = rows[name]
        scores = [shown(row[key], 1) for key in ("rouge1", "rouge2", "rougeL")]
        sizes, speed = [shown(row["file_mb"], 2), shown(row["ratio"], 1)], shown(row["ms_per_token"], 2)
        assert cells == [*sizes, *scores, speed, row["kernel"] or "-"], name


def test_the_table_of_sizes_is_its_record():
    text = sections()["How small"]
    assert "`benchmarks/results/size.json`" in text
    rows = record("size.json")["rows"]
    for layers, bits, size, ratio, paper in table(text):
        weights, embeddings, acts = map(int, bits.split("-"))
        wanted = {"model": "bart-base", "layers": layers, "weight_bits": weights, "embedding_bits": embeddings}
        (row,) = [row for row in rows if wanted.items() <= row.items()]
        assert acts == 8 and size == shown(row["file_bytes"] / 1e6, 1)
        assert (ratio, paper) == (f"{row['file_ratio']:.2f}x", f"{row['paper_ratio']:.2f}x")
    assert f"{rows[0]['teacher_bytes'] / 1e6:.0f} MB of fp32" in text


def test_what_is_said_of_speed_stands_in_the_records_it_names():
    text = sections()["How fast"]
    names = re.findall(r"`(?:benchmarks/results/)?([\w-]+\.json)`", text)
    assert names, "it names its records"
    for found, unit in NUMBER.findall(text):
        value, digits = float(found.replace(",", "")), len(found.partition(".")[2])
        known = set().union(*(numbers(record(name), KEYS.get(unit, ("",))) for name in names))
        assert any(round(each, digits) == value for each in known), f"{found}{unit} stands in none of {names}"


def test_no_other_section_has_a_figure():
    """Or one could be added that nothing here checks."""
    checked = ("How small", "How fast")
    for title, text in sections().items():
        if title in checked or "| teacher |" in text:
            continue
        assert not re.findall(r"\d\.\d+(?:x\b| ?(?:ms|us|GB|MB|s)\b)|\b\d+(?:x| ?(?:ms|us))\b", text), title


@pytest.mark.parametrize("claim", ["7.77x", "a token in 0.31 ms", "for 511 tokens"])
def test_this_notices(claim, monkeypatch):
    """A figure that no record holds."""
    changed = {**sections(), "How fast": f"{sections()['How fast']} {claim} (`gemm-h200.json`)"}
    monkeypatch.setitem(globals(), "sections", lambda: changed)
    with pytest.raises(AssertionError, match="stands in none of"):
        test_what_is_said_of_speed_stands_in_the_records_it_names()


def test_its_python_runs(tmp_path, monkeypatch):
    """As it stands; where it runs, the hub's model is a folder with the teacher that ships (tests/documents.py)."""
    page = documents.PAGES[0]
    first, second = (block.text for block in documents.blocks(page) if block.language == "python")
    assert "quantize_" in second, "say here what a new block needs"
    monkeypatch.chdir(documents.sandbox(tmp_path))
    names: dict = {}
    exec(first, names)  # noqa: S102 - our own README
    assert "int8 per_token" in dqkernels.report(names["model"]).attention and (tmp_path / "bart-w4a8").is_dir()
    names["model"] = names["AutoModelForSeq2SeqLM"].from_pretrained(demo.teacher_folder())
    exec(second, names)  # noqa: S102
    assert {module.layer.bits for module in names["model"].modules() if isinstance(module, QLinear)} == {8}


def test_what_the_guide_says_of_bits_stands_in_the_records_it_names():
    """docs/quantize.md, "Which bits": the table, and the figures beside it."""
    text = " ".join((ROOT / "docs" / "quantize.md").read_text(encoding="utf-8").split())
    rows = {row["name"]: row for row in record("demo-all.json")["rows"]}
    assert f"less the float model's {rows['teacher']['rougeL']:.2f}" in text
    for name in ("W8", "W4", "W2"):
        gap = f"{rows[name]['rougeL_gap']:.2f} +- {rows[name]['rougeL_gap_error']:.2f}"
        assert f"| {name} | {rows[name]['ratio']:.1f}x | {gap} |" in text
    runs = {(run["row"], run["seed"]): run for run in record("dq_docstrings.json")["runs"]}
    gap = runs["dq-2", 0]["gap_to_teacher"]
    assert f"{-gap['mean']:.2f} +- {gap['error']:.2f} below the teacher" in text and "row `dq-2`, seed 0)" in text
    cells = [row for row in record("generate-zen3.json")["rows"] if row["num_beams"] == 1]
    per_token = {row["candidate"]: row["latency_ms_per_token"] for row in cells}
    w2, w4 = (per_token[f"dqkernels {bits}"] for bits in ("2-2-8", "4-4-8"))
    assert f"W2 took {w2:.2f} ms a token and W4 {w4:.1f} (`benchmarks/results/generate-zen3.json`)" in text
    score = {(row["name"], row["group_size"]): row["rougel_score"] for row in record("quantizers.json")["rows"]}
    two = score["W2 four_level", -1]
    assert f"at 2 bits four_level was {two - score['W2 ternary', -1]:.1f} points above ternary" in text
    assert f"At 2 bits it was worth {score['W2 four_level', 64] - two:.1f} points of ROUGE-L" in text
