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
#: A number as prose has it, no part of a name, a version or a file.
NUMBER = re.compile(r"(?<![\w.\-/`])\d[\d,]*(?:\.\d+)?(?:x\b|\b(?![\w/\-`]))")
#: Times as prose has them: `three times as long`.
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


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


def the_row(name: str, **wanted: object) -> dict:
    """The only timed row of a record that has these fields."""
    (found,) = [row for row in record(name)["rows"] if row["status"] == "timed" and wanted.items() <= row.items()]
    return found


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


def said_of_speed() -> list[str]:
    """Sentences of "How fast" that hold a figure and are not rendered, each from its row and key."""
    one = {"batch_size": 1, "source_tokens": 256, "num_beams": 1}
    loops = {bits: "dqkernels.decode, CUDA graph" for bits in (4, 2)}
    ours = {bits: the_row("decode-h200.json", **one, weight_bits=bits, loop=loop) for bits, loop in loops.items()}
    theirs = the_row("decode-h200.json", **one, candidate="torch fp16")
    w4, w2, hf = (row["latency_ms_per_token"] for row in (ours[4], ours[2], theirs))
    gemm = {"tokens": 1, "out_features": 8192, "in_features": 8192, "cache": "cold", "backend": "triton"}
    ratio = {bits: the_row("gemm-h200.json", **gemm, bits=bits)["speedup_ratio"] for bits in (4, 2)}
    step = the_row("train-step-h200.json", bits=8)["step_ratio"]
    return [
        f"BART-large, one text of 256 tokens, greedy: {w4:.2f} ms a token at W4A8 and {w2:.2f} at W2A8 where "
        f"Hugging Face's loop takes {hf:.1f} (`decode-h200.json`).",
        f"One row through 8192 x 8192: {ratio[4]:.1f}x cuBLAS at W4A8, {ratio[2]:.1f}x at W2A8 (`gemm-h200.json`).",
        f"a training step takes {TIMES[round(step)]} as long as float autograd (`train-step-h200.json`)",
    ]


def test_what_is_said_of_speed_is_of_its_row_and_key():
    """And no figure is left that neither a sentence here nor the rendered table has."""
    text = " ".join(re.sub(r"<!-- speed: .*?<!-- end of speed -->", "", sections()["How fast"], flags=re.S).split())
    for sentence in said_of_speed():
        assert sentence in text, f"README.md does not say what the record does: {sentence}"
        text = text.replace(sentence, "", 1)
    left = [found for found in NUMBER.findall(re.sub(r"<[^>]+>", "", text))]
    assert not left, f"{left} in 'How fast' are bound to no row of a record"


def test_outside_a_graph_the_host_is_the_limit():
    """The README's words of a row at a time: a call costs the caller more than the GPU."""
    rows = [row for row in record("gemm-h200.json")["rows"] if row["status"] == "timed" and row["cache"] == "cold"]
    ours = [row for row in rows if row["candidate"].startswith("dqkernels") and row["tokens"] == 1]
    assert ours and all(row["host_us"] > row["median_us"] for row in ours)


def test_no_other_section_has_a_figure():
    """Or one could be added that nothing here checks."""
    checked = ("How small", "How fast")
    for title, text in sections().items():
        if title in checked or "| teacher |" in text:
            continue
        assert not re.findall(r"\d\.\d+(?:x\b| ?(?:ms|us|GB|MB|s)\b)|\b\d+(?:x| ?(?:ms|us))\b", text), title


@pytest.mark.parametrize(
    "claim", ["7.77x", "a token in 0.31 ms", "for 511 tokens", "10.0 ms", "2.45 ms a token at W2A8"]
)
def test_a_figure_more_is_noticed(claim, monkeypatch):
    """Though a record that is named may hold it, under some key."""
    changed = {**sections(), "How fast": f"{sections()['How fast']} {claim} (`gemm-h200.json`)"}
    monkeypatch.setitem(globals(), "sections", lambda: changed)
    with pytest.raises(AssertionError, match="bound to no row"):
        test_what_is_said_of_speed_is_of_its_row_and_key()


@pytest.mark.parametrize(
    "one, other", [("2.45", "1.95"), ("1.95", "10.0"), ("2.5x", "3.3x"), ("W4A8", "W2A8"), ("three times", "twice")]
)
def test_swapped_figures_are_noticed(one, other, monkeypatch):
    """W4's for W2's, a peer's for ours: both stand in the record, and the sentence is wrong."""
    text = re.sub(r"(<!-- speed: .*?<!-- end of speed -->)", "", sections()["How fast"], flags=re.S)
    assert one in text
    swapped = text.replace(one, "@").replace(other, one).replace("@", other)
    monkeypatch.setitem(globals(), "sections", lambda: {"How fast": swapped})
    with pytest.raises(AssertionError, match="does not say what the record does"):
        test_what_is_said_of_speed_is_of_its_row_and_key()


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
    score = {(row["name"], row["group_size"]): row["rougel_score"] for row in record("quantizers.json")["rows"]}
    two = score["W2 four_level", -1]
    assert f"at 2 bits four_level was {two - score['W2 ternary', -1]:.1f} points above ternary" in text
    assert f"At 2 bits it was worth {score['W2 four_level', 64] - two:.1f} points of ROUGE-L" in text
