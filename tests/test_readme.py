"""README.md says nothing that no record holds (docs/design.md, P8), and its Python runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    """With the shipped teacher in the place of the hub's model, which needs a network."""
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.S | re.M)
    hub = 'name = "facebook/bart-large-cnn"'
    assert len(blocks) == 2 and hub in blocks[0] and "quantize_" in blocks[1], "say here what a new block needs"
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks[0].replace(hub, f"name = {str(demo.teacher_folder())!r}"), names)  # noqa: S102 - our own README
    assert "int8 per_token" in dqkernels.report(names["model"]).attention and (tmp_path / "bart-w4a8").is_dir()
    names["model"] = names["AutoModelForSeq2SeqLM"].from_pretrained(demo.teacher_folder())
    exec(blocks[1], names)  # noqa: S102
    assert {module.layer.bits for module in names["model"].modules() if isinstance(module, QLinear)} == {8}
