"""Which words fused blocks and int8 attention choose: what is counted, that each form is what it says, the record."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dqkernels.bench import agreement, record

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_counted():
    """By hand: padding is no word, its end is one; a text that goes on is another text."""
    plain = torch.tensor([[0, 5, 6, 2, 1], [0, 7, 8, 9, 2], [0, 5, 2, 1, 1]])
    alone = torch.tensor([[0, 5, 9, 6, 2, 1], [0, 7, 8, 9, 2, 1], [0, 5, 2, 1, 1, 4]])
    behind = torch.tensor([[5, 9, 2, 3], [7, 8, 9, 2], [5, 2, 3, 3]])
    found = agreement.count([plain], [alone], [behind], padding=1)
    assert found == {
        "words": 9, "forced_same": 8, "free_same": 7, "texts": 3, "texts_same": 1, "forced_same_fraction": 0.8889,
        "free_same_fraction": 0.7778,
    }  # fmt: skip
    twice = agreement.count([plain, plain], [alone[:, :4], plain], [behind, plain[:, 1:]], padding=1)
    assert twice["words"] == 18 and twice["texts_same"] == 4 and twice["forced_same"] == 17
    assert twice["free_same"] == 1 + 3 + 2 + 9, "a text that ends early has nothing to agree with"


def test_a_row_for_each_comparison(tmp_path):
    told = []
    made = agreement.run(3, bits=(8,), student=True, out=tmp_path / "agreement.json", tell=told.append)
    assert record.read(tmp_path / "agreement.json") == made and len(told) == 8
    assert [(row["name"], row["form"], row["against"]) for row in made["rows"]] == [
        (name, *pair) for name in ("W8", "DQ-2") for pair in agreement.COMPARED
    ]
    assert all(row["texts"] == 3 and row["words"] > 20 and row["forced_same_fraction"] > 0.5 for row in made["rows"])
    assert made["settings"]["goal_fraction"] == 0.99
    with pytest.raises(ValueError, match="bits must be distinct"):
        agreement.run(3, bits=(3,))


def test_a_model_in_another_form_is_refused():
    """Or a row would compare a model with itself, and all words would agree."""
    model = agreement.teacher_of(4, True, "int8")
    with pytest.raises(RuntimeError, match="wanted fused False, attention int8; the model has [1-9]"):
        agreement._checked(model, False, "int8")
    with pytest.raises(RuntimeError, match="attention float"):
        agreement._checked(model, True, "float")


def test_the_page_says_what_the_record_says():
    found = record.read(ROOT / "benchmarks" / "results" / "agreement.json")
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    section = page.partition("## The same words as the plain quantized model?")[2].partition("\n## ")[0]
    shown = re.findall(r"(\d+\.\d\d) / (\d+\.\d\d)", section)
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    assert names == ["W8", "W4", "W2", "DQ-2"] and len(found["rows"]) == 16 == len(shown)
    for row, pair in zip(found["rows"], shown, strict=True):
        assert pair == tuple(f"{100 * row[f'{how}_same_fraction']:.2f}" for how in ("forced", "free")), row["name"]
        counts = (row["forced_same"] / row["words"], row["free_same"] / row["words"])
        assert row["goal_met"] == (min(counts) >= 0.99)
    goal = [row for row in found["rows"] if (row["form"], row["against"]) == agreement.COMPARED[0]]
    assert ("**NOT met** at any width" in section) == (not any(row["goal_met"] for row in goal))
