"""What pages render of generate-zen4.json: that they say what it says, and what a table makes of other records."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("speed_view_under_test", ROOT / "benchmarks" / "speed_view.py")
view = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = view
_spec.loader.exec_module(view)
RESULT = json.loads(view.RESULT.read_text(encoding="utf-8"))


@pytest.fixture
def pages(tmp_path):
    """A copy of the pages that hold a block."""
    for page in view.PAGES.values():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def change(page: Path, old: str, new: str) -> None:
    text = page.read_text(encoding="utf-8")
    assert old in text
    page.write_text(text.replace(old, new, 1), encoding="utf-8")


def changed(**rows: dict) -> dict:
    """The record with fields of greedy rows changed, by the name that a table gives them (`W4A8`)."""
    made = copy.deepcopy(RESULT)
    for row in made["rows"]:
        if row["num_beams"] == 1:
            row.update(rows.get(view.name_of(row).replace(" ", "_"), {}))
    return made


def lines(text: str) -> dict[str, list[str]]:
    """Cells of a table's first rows, by name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            name = next((cell for cell in cells[:2] if cell and "n = " not in cell), "").strip("*")
            found.setdefault(name, cells)
    return found


def test_every_page_says_what_the_record_says():
    assert view.stale(RESULT) == []


def test_every_timed_row_stands_in_a_table():
    """Of the record as it is: the figures again, computed here."""
    text = view.cells(RESULT)
    timed = [row for row in RESULT["rows"] if row["status"] == "timed"]
    rows = [line for line in text.splitlines() if line.startswith("| ") and " to " in line and "p20" not in line]
    assert len(rows) == len(timed) > 0
    for line, row in zip(rows, timed, strict=True):
        cell = [one for one in timed if one["num_beams"] == row["num_beams"] and one["batch_size"] == row["batch_size"]]
        cell = [one for one in cell if one["source_tokens"] == row["source_tokens"]]
        by_name = {one["candidate"]: one["latency_ms_per_token"] for one in cell}
        fastest = min(one["latency_ms_per_token"] for one in cell if one["family"] not in ("ours", "plain"))
        ratios = [f"{time / row['latency_ms_per_token']:.2f}" for time in (by_name["torch fp32"], fastest)]
        found = [part.strip() for part in line.strip("|").split("|")]
        assert found[2:4] == ratios
        assert float(found[5].replace(",", "")) == pytest.approx(row["weights_bytes"] / 1e6, rel=5e-3)
        assert float(found[1].split(" (")[0].replace(",", "")) == pytest.approx(row["latency_ms_per_token"], rel=5e-3)


def test_where_a_peer_is_ahead_is_said():
    """Of each thing the best of the others, and only where it is better than ours."""
    found = {row["candidate"]: row for row in RESULT["rows"] if row["num_beams"] == 1}
    peer = found["ctranslate2 int8"]
    for name, ours in (("W4A8", "dqkernels 4-4-8"), ("W2A8", "dqkernels 2-2-8")):
        behind = min(row["first_token_ms"] for row in found.values() if row["family"] != "ours")
        said = lines(view.readme(RESULT))[name][-1]
        assert ("first token" in said) == (behind < found[ours]["first_token_ms"])
    faster = changed(CTranslate2_int8={"latency_ms_per_token": 1.0, "first_token_ms": peer["first_token_ms"]})
    assert "time per token: CTranslate2 int8 (1.00 ms)" in lines(view.readme(faster))["W4A8"][-1]
    heavy = changed(W4A8={"peak_bytes": 400_000_000, "first_token_ms": 1.0})
    lightest = min(
        (row for row in found.values() if row["family"] != "ours" and row["peak_bytes"] is not None),
        key=lambda row: row["peak_bytes"],
    )
    peak = view.figure(lightest, "peak_bytes", 1e6)
    assert lines(view.readme(heavy))["W4A8"][-1] == f"peak: {view.name_of(lightest)} ({peak} MB)"
    unknown = changed(W4A8={"peak_bytes": None, "process_growth_bytes": None, "first_token_ms": 1.0})
    assert lines(view.readme(unknown))["W4A8"][-2:] == ["-", "none"]
    assert lines(view.readme(RESULT))["PyTorch fp32"][-1] == "", "of ours alone"


def test_the_words_about_the_encoder_follow_the_figures():
    """The fastest of the others in each cell, whoever that is."""
    assert "now slower, now faster than" in view.encoder(
        changed(W4A8={"first_token_ms": 1.0}, W2A8={"first_token_ms": 400.0})
    )
    others = [row["candidate"] for row in RESULT["rows"] if row["family"] != "ours"]
    for time, verdict in ((1e4, "faster than"), (1.0, "slower than")):
        made = copy.deepcopy(RESULT)
        for row in made["rows"]:
            if row["candidate"] in others and row["status"] == "timed":
                row["first_token_ms"] = time + (row["candidate"] != "ctranslate2 int8")
        assert f"is {verdict} the fastest other's (CTranslate2 int8)" in view.encoder(made)
    made["rows"] = [row for row in made["rows"] if row["family"] == "ours"]
    assert "was not compared" in view.encoder(made)
    assert set(lines(view.readme(made))["W4A8"][4:5]) == {"-"}


def test_the_fastest_other_is_everybodys_measure():
    """Of each search its own: a peer that leads one need not run the other."""
    for name in ("CTranslate2_int8", "PyTorch_bf16"):
        made = changed(**{name: {"latency_ms_per_token": 0.5}})
        found = lines(view.readme(made))
        assert found[name.replace("_", " ")][4] == "1.00", "its own"
        (ours,) = (row for row in timed_rows(made) if view.name_of(row) == "W4A8" and row["num_beams"] == 1)
        assert found["W4A8"][4] == f"{0.5 / ours['latency_ms_per_token']:.2f}"
        assert f"times as fast as {name.replace('_', ' ')}," in view.cells(made)


def timed_rows(result: dict) -> list[dict]:
    return [row for row in result["rows"] if row["status"] == "timed"]


def test_the_readme_takes_the_smallest_cells_and_the_rest_all():
    made = copy.deepcopy(RESULT)
    made["rows"] += [{**row, "batch_size": 8} for row in RESULT["rows"]]
    made["rows"] += [{**row, "source_tokens": 1024} for row in RESULT["rows"]]
    made["rows"].append({**RESULT["rows"][0], "batch_size": 64, "status": "not run", "reason": "the time was over"})
    assert view.readme(made) == view.readme(RESULT)
    text = view.cells(made)
    assert text.count("W2A8 is ") == 6 and "8 texts of 256 tokens each" in text and "64 texts" not in text
    assert "--batch_size 1,8,64 --num_beams 1,4 --source_tokens 256,1024" in view.command(made)
    made["rows"] = made["rows"][-1:]
    with pytest.raises(SystemExit, match="no timed row"):
        view.readme(made)


def test_more_texts_and_longer_ones_stand_beside_the_peer():
    """A line a cell, its figures computed here again."""
    made = view.record.read(view.BATCHES)
    text = view.batches(made)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "greedy, n = " in line]
    title = next(line for line in text.splitlines() if "tokens/s" in line)
    heads = [part.strip() for part in title.strip("|").split("|")]
    cells = dict(sorted(view.cells_of(made).items(), key=lambda item: (item[0].source_tokens, item[0].batch_size)))
    assert len(rows) == len(cells) >= 3 and {cell.batch_size for cell in cells} >= {1, 8}
    for line, (cell, found) in zip(rows, cells.items(), strict=True):
        parts = dict(zip(heads, (part.strip() for part in line.strip("|").split("|")), strict=True))
        by_name = {row["candidate"]: row for row in found}
        w4 = by_name["dqkernels 4-4-8"]
        others = [row for row in found if row["family"] not in ("ours", "plain")]
        peer, first = (min(others, key=lambda row: row[key]) for key in ("latency_ms_per_token", "first_token_ms"))
        assert parts[heads[0]] == f"{cell.batch_size} x {cell.source_tokens}, greedy, n = {w4['samples']}"
        assert float(parts["W4A8, tokens/s"].replace(",", "")) == pytest.approx(w4["tokens_per_s"], rel=5e-3)
        ratio = peer["latency_ms_per_token"] / w4["latency_ms_per_token"]
        assert parts["W4A8: x of it"] == f"{ratio:.2f}"
        assert parts["the fastest other, tokens/s"].endswith(f"({view.name_of(peer)})")
        assert parts["W4A8: its encoder"] == f"{first['first_token_ms'] / w4['first_token_ms']:.2f}"


def test_process_memory_has_a_column_where_a_row_says_it():
    without = changed()
    for row in without["rows"]:
        row.pop("process_growth_bytes", None)
    assert "process" not in view.readme(without) and "--process_memory" not in view.command(
        {**without, "settings": {**without["settings"], "process_memory": False}}
    )
    made = copy.deepcopy(without)
    made["settings"]["process_memory"] = True
    for row in made["rows"]:
        row["process_growth_bytes"] = 12_300_000 if row["candidate"] == "ctranslate2 int8" else 45_600_000
    text = view.readme(made)
    assert "| process, MB |" in text and "`process`: the most that a process of its own held" in text
    assert lines(text)["W4A8"][-2] == "45.6" and "process: CTranslate2 int8 (12.3 MB)" in lines(text)["W4A8"][-1]
    assert "--process_memory" in view.command(made)


def test_other_embeddings_are_said():
    row = {"family": "ours", "weight_bits": 4, "embedding_bits": 8, "candidate": "dqkernels 4-8-8"}
    assert view.name_of(row) == "W4A8, head 8"
    assert view.name_of({**row, "family": "plain"}) == "W4A8, head 8, Hugging Face's loop"


@pytest.mark.parametrize(
    "page, old, new",
    [
        ("README.md", "| **W4A8** |", "| **W2A8** |"),
        ("README.md", "| greedy, n = ", "| sampled, n = "),
        ("README.md", "ONNX Runtime int8 (", "nobody ("),
        ("docs/measured.md", "| 8 x 256, greedy", "| 9 x 256, greedy"),
        ("docs/measured.md", "- W4A8 is ", "- W8A8 is "),
        ("docs/quantize.md", "W2 took", "W4 took"),
        ("docs/benchmark.md", "--num_beams 1,4", "--num_beams 1"),
        ("docs/cli.md", "  4-4-8  ", "  2-2-8  "),
    ],
)
def test_a_page_that_was_changed_is_noticed(pages, page, old, new):
    """Swapped rows, a peer that is no longer said to be ahead, other words."""
    change(pages / page, old, new)
    (line,) = view.stale(RESULT, pages)
    assert line.startswith(page) and "python benchmarks/speed_view.py --write" in line


def test_swapped_figures_are_noticed(pages):
    """W4's for W2's: every one of them stands in the record."""
    text = (pages / "README.md").read_text(encoding="utf-8")
    rows = [re.search(rf"\| \*\*{name}\*\* \| ([\d.]+)", text)[1] for name in ("W4A8", "W2A8")]
    swapped = (
        text.replace(f"| {rows[0]} |", "@").replace(f"| {rows[1]} |", f"| {rows[0]} |").replace("@", f"| {rows[1]} |")
    )
    (pages / "README.md").write_text(swapped, encoding="utf-8")
    assert view.stale(RESULT, pages)[0].startswith("README.md, block 'readme', is not that of")


def test_a_lost_block_is_named(pages):
    change(pages / "docs" / "quantize.md", "<!-- speed: bits -->", "")
    assert view.stale(RESULT, pages) == ["docs/quantize.md has lost its block 'bits'"]


def test_the_program(pages, monkeypatch, capsys):
    monkeypatch.setattr(view, "ROOT", pages)
    monkeypatch.setattr(view.stale, "__defaults__", (pages,))
    assert view.main(["--check"]) == 0 and view.main([]) == 0
    assert "-- docs/quantize.md: bits" in capsys.readouterr().out
    change(pages / "README.md", "W4A8", "W9A8")
    assert view.main(["--check"]) == 1 and "README.md, block 'readme'" in capsys.readouterr().out
    assert view.main(["--write"]) == 0 and view.main(["--check"]) == 0
    assert (pages / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_bits_follow_speed_less_than_size():
    """What docs/quantize.md says of this record."""
    cell = {row["weight_bits"]: row for row in RESULT["rows"] if row["num_beams"] == 1 and row["family"] == "ours"}
    faster, smaller = (cell[4][key] / cell[2][key] for key in ("latency_ms_per_token", "weights_bytes"))
    assert 1 < faster < smaller


def test_one_layer_against_every_peer():
    """What README.md says of one layer in words, and the ratios, from the medians themselves."""
    made = json.loads(view.LAYERS.read_text(encoding="utf-8"))
    text = view.layers(made)
    for peer in ("ONNX Runtime int4", "openvino int8 weights", "torchao int8 weights", "bitsandbytes int8"):
        assert f"| {peer} | " in text
    assert "PyTorch dynamic int8 (6); W4A8: PyTorch _int_mm (1), PyTorch dynamic int8 (1);" in text.replace("\n", " ")
    found = {}
    for row in view.timed(made["rows"]):
        if row["cache"] == "cold":
            found.setdefault((row["tokens"], row["out_features"]), {})[row["candidate"]] = row["speedup_ratio"]
    ours = {bits: f"dqkernels W{bits} cpu" for bits in (8, 4, 2)}
    for (tokens, columns), ratios in found.items():
        best = max(ratio for name, ratio in ratios.items() if name not in ours.values())
        assert ratios["torch dynamic int8"] > ratios[ours[8]]
        if tokens < 128:
            assert ratios[ours[4]] > best and ratios[ours[2]] > best
        elif columns == 3072:
            assert ratios["torch dynamic int8"] > max(ratios[name] for name in ours.values())
    cold = {row["candidate"]: row for row in view.timed(made["rows"]) if row["cache"] == "cold" and row["tokens"] == 16}
    assert f"{cold['torch fp32']['median_us'] / cold['dqkernels W4 cpu']['median_us']:.2f}" in text
    older = json.loads(view.OLDER_LAYERS.read_text(encoding="utf-8"))
    said = view.layers(older).replace("\n", " ")
    assert "W8A8: ONNX Runtime int8 dynamic (3), ONNX Runtime int4 (3), PyTorch dynamic int8 (6);" in said
    assert "W4A8: nobody; W2A8: nobody." in said
    slower = copy.deepcopy(older)
    for row in slower["rows"]:
        if row["candidate"] == "dqkernels W4 cpu":
            row["speedup_ratio"] /= 9
    assert "W4A8: nobody" not in view.layers(slower).replace("\n", " ")


def test_what_was_proven_follows_the_record():
    made = copy.deepcopy(RESULT)
    assert view.proof(made) in view.cells(made).replace("\n", " ")
    ours = [row for row in made["rows"] if row["family"] == "ours"]
    ours[0]["logits_error"], ours[1]["equal_tokens_fraction"] = 0.125, 0.984
    assert "by up to 0.12 of their norm" in view.proof(made) and "98.4% and more were those" in view.proof(made)
