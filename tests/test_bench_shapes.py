"""Layers by name, and group-wise weights in `bench linear`: what runs, what is refused, what is recorded."""

from __future__ import annotations

import json

import pytest
import torch
from test_bench import assert_fits

from dqkernels import cli
from dqkernels.bench import gemm, linear, plot, projected, protocol, record
from dqkernels.bench.shapes import PRESETS
from dqkernels.cli import common

CPU = torch.device("cpu")
LLAMA = [(4096, 4096), (11008, 4096), (4096, 11008)]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(linear, "_MAX_ROUNDS", 2)
    monkeypatch.setattr(protocol, "MAX_COPIES", 4)


def run(**more) -> dict:
    more = {"dtype": "float32", "device": "cpu", "backends": ["eager"], "seconds": 1000, "probe": False, **more}
    return linear.run([(3, 32, 192)], **more)


def test_groups_stand_beside_a_scale_per_channel(tmp_path):
    made = run(group_sizes=(-1, 64), out=tmp_path / "linear.json")
    assert record.read(tmp_path / "linear.json") == made and made["settings"]["group_sizes"] == [-1, 64]
    ours = {row["candidate"]: row for row in made["rows"] if row["candidate"].startswith("dqkernels")}
    wanted = {(8, -1), (4, -1), (4, 64), (2, -1), (2, 64)}
    assert {(row["bits"], row["group_size"]) for row in ours.values()} == wanted and len(ours) == len(wanted)
    # Timed, so proven: bit-equal to the reference with these very multipliers.
    assert all(row["status"] == "timed" for row in ours.values())
    sizes = {(row["bits"], row["group_size"]): row["weights_bytes"] for row in ours.values()}
    assert sizes[4, 64] - sizes[4, -1] == 32 * 3, "a byte for each 64 of 192 inputs of a row"
    text = assert_fits(linear.render(made))
    assert "W4A8g64 eager" in text and "W4A8 eager" in text and "W8A8g64" not in text
    assert plot.pictures(plot.load(tmp_path / "linear.json"))


def test_groups_alone():
    names = [row["candidate"] for row in run(bits=(4, 8), group_sizes=[32, 32])["rows"] if row.get("cache") == "cold"]
    assert [name for name in names if name.startswith("dqkernels")] == ["dqkernels W4g32 eager"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_sizes": (48,)}, r"group_sizes must be of -1, 32, 64 and 128, got \[48\]"),
        ({"group_sizes": ()}, r"group_sizes must be of -1, 32, 64 and 128, got \[\]"),
        ({"bits": (8,), "group_sizes": (64,)}, r"group_sizes are for 2 and 4 bits, got \[64\] and bits=\[8\]"),
    ],
)
def test_groups_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**arguments)
    assert run(bits=(8,), group_sizes=(-1, 64))["rows"], "the nearest that is not"


def test_the_preset_is_llama_7b():
    """Its config: hidden_size 4096, intermediate_size 11008, as many heads for keys as for queries."""
    assert list(PRESETS["llama-7b-linear"]) == LLAMA


def test_shapes_by_name():
    assert common.sizes("--shapes", "llama-7b-linear") == LLAMA
    assert common.sizes("--shapes", "768x64, llama-7b-linear") == [(768, 64), *LLAMA]
    assert common.sizes("--shapes", "16xllama-7b-linear,1x2x3", tokens=True) == [*((16, *p) for p in LLAMA), (1, 2, 3)]
    assert common.sizes("--shapes", "llama-7b-linear", tokens=True) == LLAMA
    cells = gemm.plan(CPU, common.sizes("--shapes", "llama-7b-linear"), [1], (4,), [-1])
    assert [str(cell) for cell in cells] == ["1x4096x4096", "1x11008x4096", "1x4096x11008"]


@pytest.mark.parametrize(
    ("bench", "text"),
    [("linear", "0xllama-7b-linear"), ("linear", "llama-8b-linear"), ("gemm", "1xllama-7b-linear"), ("gemm", "1x2x3")],
)
def test_other_names_are_refused(bench, text, capsys):
    assert cli.main(["bench", bench, "--shapes", text, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "--shapes must be NxN" in error and "llama-7b-linear) with numbers above 0" in error
    assert repr(text) in error


def test_the_verb_takes_them(capsys, monkeypatch, tmp_path):
    """Expanded to the rows of this device where no tokens are given; one multiplied by hand, small, and run."""
    monkeypatch.setitem(PRESETS, "tiny-linear", ((16, 128),))
    words = ["--backends", "eager", "--dtype", "float32", "--device", "cpu", "--seconds", "1000", "--json"]
    shapes = ["--shapes", "tiny-linear,2xtiny-linear", "--bits", "4", "--group_sizes", "-1,32"]
    assert cli.main(["bench", "linear", *shapes, *words]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["settings"]["shapes"] == [[1, 16, 128], [16, 16, 128], [128, 16, 128], [2, 16, 128]]
    assert {row.get("group_size") for row in made["rows"] if "W4" in row["candidate"]} == {-1, 32}
    assert cli.main(["bench", "linear", "--group_sizes", "64", "--bits", "8"]) == 2
    assert "--group_sizes are for 2 and 4 bits, got 64 and --bits 8" in capsys.readouterr().err
    assert cli.main(["bench", "linear", "--group_sizes", "48"]) == 2
    assert "--group_sizes must be" in capsys.readouterr().err


def test_projected_knows_them_too(capsys):
    words = ["--shapes", "llama-7b-linear", "--tokens", "1", "--models", "tiny", "--json"]
    assert cli.main(["bench", "projected", *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = {
        (row["out_features"], row["in_features"]) for row in rows if "out_features" in row and row.get("what") != 1
    }
    assert set(LLAMA) <= found
    assert projected.run("h200", LLAMA, [1], [])["rows"]


def test_a_model_it_is_not(capsys):
    assert cli.main(["bench", "generate", "llama-7b-linear"]) == 2
    assert "llama-7b-linear is of single layers: dqkernels bench linear --shapes" in capsys.readouterr().err
