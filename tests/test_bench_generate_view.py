"""What people see of `bench generate`: tables, pictures, files; and how memory is measured."""

from __future__ import annotations

import copy
import csv
import functools

import pytest
import torch
from generate_cases import CELL, CPU, CUDA, assert_fits, few_rounds, of, run  # noqa: F401 - few_rounds is for every test here

from dqkernels.bench import compare, memory, record
from dqkernels.bench import generate_view as view
from dqkernels.bench import tables as files
from dqkernels.bench.generate_cells import Cell

# ------------------------------------------------------------------------------------------- memory


def test_growth_is_what_a_call_took_and_kept():
    kept, growth = memory.during(lambda: torch.ones(8 << 20), CPU)
    if growth.allocated is None:
        pytest.skip("this kernel does not let VmHWM start anew")
    assert growth.reserved is None

    def grown(call) -> list[int]:
        """Of several times: a kernel may take idle pages away in between, or give some to another thread."""
        return sorted(memory.during(call, CPU)[1].allocated for _ in range(5))

    assert 32e6 < grown(lambda: torch.ones(8 << 20))[-1] < 48e6
    assert grown(lambda: kept.add_(1))[0] < 8e6
    assert 32e6 < grown(lambda: float((kept + 1).sum()))[-1] < 48e6, "freed again, and still a peak"


def test_growth_is_null_where_nobody_says(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    assert memory.during(lambda: 5, CPU) == (5, memory.Growth(None, None))


# --------------------------------------------------------------------------------------------- view


def a_row(cell: Cell, candidate: str, family: str, latency: float, **more) -> dict:
    """As large as figures get."""
    return {
        **cell.row(), "candidate": candidate, "family": family, "foreign": False, "dtype": "fp16", "weight_bits": 4,
        "embedding_bits": 8, "weights_bytes": 2_443_407_360, "kernel": "decode engine; cuda x 193", "logits_error": 0.1,
        "cache_bytes": 26_843_545_600, "peak_bytes": 98_765_432_100, "peak_reserved_bytes": 112_345_678_901,
        "status": "timed", "reason": None, "latency_ms": latency * cell.new_tokens, "latency_ms_per_token": latency,
        "p20_ms_per_token": 0.98 * latency, "p80_ms_per_token": 1.03 * latency, "first_token_ms": 1234.5,
        "decode_ms_per_token": latency, "tokens_per_s": cell.batch_size * 1e3 / latency, "samples": 50,
        "timer": "perf_counter", "speedup_ratio": 123.4, "peak_ratio": 0.35, **more,
    }  # fmt: skip


@functools.cache
def some_record() -> dict:
    return run(candidates=["torch"], bits=())


def a_record(rows: list[dict], **settings) -> dict:
    made = copy.deepcopy(some_record())
    made["settings"].update({"model": "mbart-large", "device": "cuda", "dtype": "fp16", **settings})
    made["environment"]["gpu"] = "NVIDIA H200"
    made["rows"] = rows
    record.check(made)
    return made


def candidates_of(cell: Cell, latency: float = 1234.5) -> list[dict]:
    names = [("torch fp16", "torch"), ("dqkernels 4-8-8 plain", "plain"), ("dqkernels 4-8-8", "ours")]
    names += [("bitsandbytes int8", "bitsandbytes"), ("ctranslate2 int8_fp16", "ctranslate2")]
    names += [("torch fp16 compiled", "compile"), ("torch fp16 static", "static"), ("torch dynamic int8", "dynamic")]
    return [a_row(cell, name, family, latency / (1 + i)) for i, (name, family) in enumerate(names)]


def test_the_tables_of_a_gpu_fit_with_large_figures():
    wide = Cell("12-12", 256, 16, 1024, 128)
    rows = candidates_of(wide)
    rows[2]["equal_tokens_fraction"] = 0.9876
    rows[3] = {**rows[3], "status": "out of memory", "reason": "OutOfMemoryError: CUDA out of memory."}
    del rows[3]["latency_ms_per_token"], rows[3]["peak_bytes"]
    rows.append({**wide.row(), "candidate": "torch fp32", "status": "not run", "reason": "the time was over"})
    text = assert_fits(a_record(rows))
    assert "out of memory: bitsandbytes int8" in text and "4-8-8 98.8% equal" in text.replace("\n", " ")
    assert "reserved" in text and "NVIDIA H200" in text and "98,765" in text


def test_pictures_of_every_sweep():
    def picture(rows, **settings):
        made = view.draw(a_record(rows, **settings))
        assert made.startswith(b"\x89PNG") and len(made) > 10_000

    batches = [row for b in (1, 4, 64) for row in candidates_of(Cell("12-12", b, 1, 256, 64), 20.0 + b)]
    picture(batches)
    picture(batches, sweep="memory")
    picture([row for d in ("12-12", "12-6", "12-3") for row in candidates_of(Cell(d, 1, 1, 256, 64))], sweep="layers")
    picture(candidates_of(Cell("12-12", 1, 1, 256, 64)))
    with pytest.raises(ValueError, match="no timed row"):
        view.draw(a_record([{**CELL.row(), "status": "not run", "reason": "x"}]))


def test_rows_go_into_files_for_others(tmp_path):
    made = a_record(
        [
            a_row(CELL, "torch fp16", "torch", 2.5),
            {**CELL.row(), "candidate": "b", "status": "refused", "reason": "logits | differ, by 2"},
            {"candidate": "ctranslate2 int8", "status": "not compared", "reason": "not installed"},
        ]
    )
    files.write_table(made, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["candidate"] for row in rows] == ["torch fp16", "b", "ctranslate2 int8"]
    assert float(rows[0]["latency_ms_per_token"]) == 2.5 and rows[1]["latency_ms_per_token"] == ""
    assert rows[1]["reason"] == "logits | differ, by 2" and rows[0]["peak_bytes"] == "98765432100"
    files.write_table(made, tmp_path / "t.md")
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[2].startswith("| torch fp16 | 2 | 1 | 7 | 3 | 1-1 | 2.5 | 2.45 | ")
    assert r"| refused: logits \| differ, by 2 |" in lines[3] and "not compared: not installed" in lines[4]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    with pytest.raises(ValueError, match=r"table must end in .csv or .md, got 't.txt'"):
        files.write_table(made, "t.txt")


def test_two_records_are_compared_by_the_float_model():
    """Whatever family a candidate is of; and what time did not reach is not lost."""
    before = a_record(candidates_of(CELL, 10.0))
    after = copy.deepcopy(before)
    for row in after["rows"]:
        row.update({key: 3 * row[key] for key in row if key.endswith("_ms_per_token")})  # another machine
    ours, dynamic, bitsandbytes = (after["rows"][i] for i in (2, 7, 3))
    ours.update({key: 2 * ours[key] for key in ours if key.endswith("_ms_per_token")}, cache_bytes=1)
    dynamic.update(status="not run", reason="the time was over", latency_ms_per_token=None)
    bitsandbytes.update(status="refused", reason="x", latency_ms_per_token=None)
    moved = {(row["label"], row["what"]): row["verdict"] for row in compare.compare(before, after)["rows"]}
    moved = {key: verdict for key, verdict in moved.items() if verdict != "same" and key[1] != "yardstick"}
    assert moved == {
        ("dqkernels 4-8-8", "time"): "slower",
        ("dqkernels 4-8-8", "cache_bytes"): "smaller",
        ("bitsandbytes int8", "time"): "lost",
    }


def test_a_picture_is_drawn_along_the_axis_with_most_cells():
    work = [(1, 1, 256), (1, 4, 256), (8, 1, 256), (64, 1, 256), (1, 1, 1024)]
    rows = [row for b, k, s in work for row in candidates_of(Cell("6-6", b, k, s, 64), 10.0)]
    axis, cell, points = view.series(view.by_cell(rows), "tokens_per_s")
    assert axis == "batch_size" and (cell.num_beams, cell.source_tokens) == (1, 256)
    assert points["torch fp16"] == [(1, 100.0), (8, 800.0), (64, 6400.0)]
    layers = [row for d in ("6-6", "6-3", "1-1") for row in candidates_of(Cell(d, 1, 1, 256, 64))]
    assert view.series(view.by_cell(layers), "peak_bytes")[0] == "layers"


def test_figures_have_three_digits_and_no_exponent():
    shown = [view._short(value) for value in (0.01234, 0.5, 9.999, 12, 99.94, 99.96, 123456.7)]
    assert shown == ["0.0123", "0.500", "10.0", "12.0", "99.9", "100", "123,457"]


@pytest.mark.gpu
def test_every_candidate_on_a_gpu(tmp_path):
    made = run(
        device="cuda", candidates=["torch", "plain", "ours", "static"], num_beams=[1, 2], seconds=60, new_tokens=[6]
    )
    timed = [row for row in made["rows"] if row["status"] == "timed"]
    assert {"torch fp16", "torch fp32", "torch bf16", "dqkernels 4-4-8 plain"} <= {row["candidate"] for row in timed}
    assert not [row for row in made["rows"] if row["status"] == "refused"], made["rows"]
    for row in timed:
        assert row["peak_reserved_bytes"] >= row["weights_bytes"] and row["peak_bytes"] > row["weights_bytes"]
    record.check(made)
    assert_fits(made)
