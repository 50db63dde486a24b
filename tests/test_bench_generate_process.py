"""What a process of its own takes with a candidate of `bench generate`: measured, refused with words, shown."""

from __future__ import annotations

import json

import pytest
import torch
from generate_cases import CELL, CPU, assert_fits, few_rounds, of, run  # noqa: F401 - few_rounds is for every test here

from dqkernels.bench import generate_cells, generate_process, memory, size
from dqkernels.bench.generate_lineup import Options

#: 59 MB in float32, of which most is the table: much beside what a process's first call takes anyhow.
SHAPE = size.Shape("wide", "bart", 256, 512, 50000, 66, 4, 1, 1)


def options(**changes) -> Options:
    source = generate_cells.Source("wide", "1-1", 64, shape=SHAPE)
    given = {
        "source": source,
        "bits": (4,),
        "embedding_bits": 4,
        "dtype": torch.float32,
        "device": CPU,
        "backend": "auto",
    }
    return Options(**{**given, "attention": "int8", "families": ("torch", "plain", "ours"), **changes})


def test_a_packed_model_takes_less_of_a_process_than_the_float_one():
    if memory.status("VmHWM") is None:
        pytest.skip("this system does not say what a process takes")
    names = {"torch fp32": "torch", "dqkernels 4-4-8": "ours"}
    fp32, ours = (generate_process.of_candidate(options(), name, family, CELL) for name, family in names.items())
    assert set(fp32) == set(ours) == {"process_bytes", "process_growth_bytes"}
    table = 4 * SHAPE.vocab * SHAPE.d_model
    assert table < fp32["process_growth_bytes"] < 2 * table, "the weights, once"
    assert ours["process_growth_bytes"] < fp32["process_growth_bytes"] - table / 2, "building it is not counted"
    assert fp32["process_bytes"] > fp32["process_growth_bytes"] + 100e6, "Python and torch are in the whole"


def test_a_process_is_told_what_to_make(tmp_path):
    """As JSON, which every kind of source and option survives."""
    t5 = generate_cells.Source("t5", "1-1", None, shape=generate_cells.T5Shape("t5", 64, 128, 512, 4, 1, 1))
    folder = generate_cells.Source("mine", "2-2", 64, folder=tmp_path)
    for given in (options(), options(source=t5, dtype=torch.bfloat16), options(source=folder, embedding_bits=None)):
        told = json.loads(json.dumps(generate_process._plain(given)))
        assert generate_process._options(told) == given


def test_a_process_that_fails_says_why(monkeypatch):
    found = generate_process.of_candidate(options(bits=(8,)), "dqkernels 4-4-8", "ours", CELL)
    assert found["process_bytes"] is found["process_growth_bytes"] is None
    assert found["process_reason"] == "exit code 1: RuntimeError: candidate is not in the lineup: dqkernels 4-4-8"
    monkeypatch.setattr(generate_process, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(generate_process, "_LEAST_S", 0.2)
    late = generate_process.of_candidate(options(), "x", "ours", CELL, seconds=-5.0)
    assert late["process_reason"] == "took more than 0.2 s"
    monkeypatch.setattr(generate_process, "_PROGRAM", "print('so long')")
    assert generate_process.of_candidate(options(), "x", "ours", CELL)["process_reason"] == "ended without a word"
    program = """print('{"imported": null, "most": null, "device": null}')"""
    monkeypatch.setattr(generate_process, "_PROGRAM", program)
    reason = generate_process.of_candidate(options(), "x", "ours", CELL)["process_reason"]
    assert reason == "this system does not say what a process takes"


def test_rows_and_the_table_have_it_where_it_is_asked_for(monkeypatch):
    asked = []

    def fake(options, name, family, cell, seconds):
        asked.append((name, family, cell))
        if family == "plain":
            return {"process_bytes": None, "process_growth_bytes": None, "process_reason": "out of luck"}
        return {"process_bytes": 987_654_321_000, "process_growth_bytes": 123_456_789_000}

    monkeypatch.setattr(generate_process, "of_candidate", fake)
    without = run()
    assert asked == [] and "process_bytes" not in of(without, "torch fp32")[0]
    assert without["settings"]["process_memory"] is False and "process:" not in assert_fits(without)
    made = run(process_memory=True)
    names = {"torch fp32": "torch", "dqkernels 4-4-8 plain": "plain", "torch bf16": "torch"}
    assert asked == [(*name, CELL) for name in names.items()]
    assert of(made, "torch fp32")[0]["process_growth_bytes"] == 123_456_789_000
    text = assert_fits(made)
    assert "123,457" in text and "process: most that one of its own held" in text
    assert "no process memory: dqkernels 4-4-8 plain: out of luck" in " ".join(text.split())
    made["settings"]["device"] = "cuda"
    for row in made["rows"]:  # as large as a card has it
        row.update(device_bytes=143_000_000_000, peak_bytes=98_765_432_100, peak_reserved_bytes=112_345_678_901)
        row.update(weights_bytes=112_345_678_901, cache_bytes=26_843_545_600)
        row["candidate"] = row["candidate"].replace("torch fp32", "ctranslate2 int8_fp16")
    text = assert_fits(made)
    assert "143,000" in text and "device: what the card had in use" in text and "reserved" not in text
