"""What the tests of `bench generate` share: the smallest work in which everything happens, and who does it."""

from __future__ import annotations

import os

import pytest
import torch
from rich.console import Console

from dqkernels.bench import generate, size
from dqkernels.bench import generate_candidates as ours
from dqkernels.bench import generate_cells as cells
from dqkernels.bench import generate_lineup as lineups
from dqkernels.bench import generate_proofs as proofs
from dqkernels.bench import generate_view as view
from dqkernels.bench.generate_cells import Cell

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: The smallest work in which everything happens.
SMALL = {"batch_size": [2], "num_beams": [1], "source_tokens": [7], "new_tokens": [3], "layers": ["1-1"]}
CELL = Cell("1-1", 2, 1, 7, 3)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Rounds end the timing, never the clock: these tests pass on a machine that crawls. Nor do they ask much of it:
    two threads would wait for each other in every product of these sizes."""
    monkeypatch.setattr(generate.gc, "collect", lambda: 0)  # half a second a cell in a process full of modules
    monkeypatch.setattr(cells, "ROUNDS", dict.fromkeys(cells.SWEEPS, 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(preset="tiny", **more) -> dict:
    given = {"device": "cpu", "seconds": 1e5, "bits": (4,), "candidates": ["torch", "plain"], **SMALL, **more}
    return generate.run(preset, **given)


def of(made: dict, candidate: str) -> list[dict]:
    return [row for row in made["rows"] if row.get("candidate") == candidate]


def text_of(made: dict, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), color_system=None)
    console.print(view.render(made))
    return console.export_text()


def assert_fits(made: dict) -> str:
    """Every line within 80 columns, and no cell cut off by an ellipsis."""
    text = text_of(made)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text, text
    return text


T5 = cells.T5Shape("t5", 64, 128, 512, 4, 1, 1)
SHAPES = [size.SHAPES["tiny"].with_layers(1, 1), size.Shape("mbart", "mbart", 64, 128, 512, 66, 4, 1, 1), T5]


def a_lineup(families=("torch",), shape=None, **more) -> lineups.Lineup:
    shape = shape or size.SHAPES["tiny"].with_layers(1, 1)
    source = cells.Source(shape.name, shape.layers, None, shape=shape)
    given = {
        "bits": (4,), "embedding_bits": None, "dtype": torch.float32, "device": CPU, "backend": "auto",
        "attention": "auto", "families": tuple(families),
    }  # fmt: skip
    return lineups.Lineup(lineups.Options(source, **{**given, **more}), source.layers)


def a_work(lineup, deadline: float = float("inf"), cell: Cell = CELL, **more) -> generate.Work:
    given = {"seconds": 1.0, "cells_left": 1, "max_rounds": 2, "say": lambda words: None, **more}
    return generate.Work(cell, lineup, deadline, **given)


def judged(one: ours.Candidate, lineup) -> str | None:
    return proofs.function(one, lineup.inputs(CELL), CELL.new_tokens, lineup.reference)[0]
