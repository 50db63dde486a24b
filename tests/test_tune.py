"""bench/tune.py without a GPU: its device is a stand-in; one cell is really measured, in the interpreter."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from dqkernels import backends
from dqkernels.bench import race, record, tune
from dqkernels.cli import main
from dqkernels.kernels import measured, tiles

ROOT = Path(__file__).resolve().parents[1]
CELLS = tune.cells([(1024, 1024), (768, 3072)], [1, 64, 1024], [4, 2], [-1])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An H200 on which `measure` takes the last candidate; `seen` are the cells that it was asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    facts = types.SimpleNamespace(multi_processor_count=132, major=9, minor=0, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: facts)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    monkeypatch.setattr(backends, "available", functools.cache(lambda name, device: (True, "stand-in")))
    facts_of_record = record.environment()
    monkeypatch.setattr(
        record, "environment", lambda threads=None: {**facts_of_record, "gpu": "NVIDIA H200", "triton": "3.6.0"}
    )
    monkeypatch.setattr(measured, "_triton", lambda: "3.6.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DQKERNELS_TILES", raising=False)
    caches = (tune.protocol.cache_bytes, measured.table_of, tiles.family, tiles.multiprocessors, backends._choose)
    for cache in caches:
        cache.cache_clear()
    seen = []

    def measure(cell, device, seconds):
        seen.append(cell)
        tile = tiles.candidates("sm90", cell.bits)[-1]
        return {**cell._asdict(), **tile._asdict(), "split_k": 1, "median_us": 4.25, "rule_us": 5.5, "is_rule": False,
                "candidates": 9, "refused": [], "mismatched": []}  # fmt: skip

    monkeypatch.setattr(tune, "measure", measure)
    yield seen
    for cache in caches:
        cache.cache_clear()


def test_what_is_measured_is_what_is_taken(gpu):
    steps = []
    found = tune.run(CELLS, progress=lambda *step: steps.append(step))
    path = measured.user_file("NVIDIA H200")
    assert record.read(path) == found and len(found["rows"]) == len(CELLS) == len(gpu) == 12
    assert steps[0] == (0, 12, "W4 1x1024x1024") and steps[-1] == (12, 12, "")
    table = measured.read(path)
    assert (table.gpu, table.capability, table.triton) == ("NVIDIA H200", "9.0", "3.6.0")
    for cell in CELLS:
        assert measured.choose(cell.m, cell.n, cell.k, cell.bits, -1, torch.device("cuda", 0)) == (
            tiles.candidates("sm90", cell.bits)[-1], 1,
        )  # fmt: skip


def test_an_interrupted_run_goes_on(gpu, monkeypatch, tmp_path):
    """What was measured before a kill stands in the file, and only the rest is measured again."""
    whole = tune.measure

    def interrupted(cell, device, seconds):
        if len(gpu) == 5:
            raise KeyboardInterrupt
        return whole(cell, device, seconds)

    out = tmp_path / "h200.json"
    monkeypatch.setattr(tune, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.run(CELLS, out=out)
    assert len(record.read(out)["rows"]) == 5
    monkeypatch.setattr(tune, "measure", whole)
    tune.run(CELLS, out=out)
    assert gpu == CELLS and len(record.read(out)["rows"]) == 12
    tune.run(CELLS[:2], out=out)
    assert len(gpu) == 12 and len(record.read(out)["rows"]) == 12, "what was not asked for again is kept"
    tune.run(CELLS[:2], out=out, fresh=True)
    assert len(gpu) == 14 and len(record.read(out)["rows"]) == 2


def test_a_file_of_another_gpu_or_triton_is_kept(gpu, monkeypatch, tmp_path):
    out = tmp_path / "tiles.json"
    tune.run(CELLS[:1], out=out)
    before, facts = out.read_bytes(), record.environment()
    monkeypatch.setattr(record, "environment", lambda threads=None: {**facts, "triton": "3.9.0"})
    with pytest.raises(
        ValueError, match="was measured on NVIDIA H200 with Triton 3.6.0, this is NVIDIA H200 with Triton 3.9.0"
    ):
        tune.run(CELLS, out=out)
    out.write_text("{}")
    with pytest.raises(ValueError, match="must be a record of kind 'tiles'"):
        tune.run(CELLS, out=out)
    assert out.read_text() == "{}" and before


def test_two_at_once_are_refused(gpu, tmp_path):
    """The lock is that of the process: it ends with it, however it ends."""
    tune.run(CELLS[:1], out=tmp_path / "a.json")
    lock = measured.user_file("NVIDIA H200").with_suffix(".lock")
    program = (
        f"import filelock, sys; l = filelock.FileLock({str(lock)!r}); l.acquire(); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(tune.TuneError, match="another dqkernels tune is measuring"):
            tune.run(CELLS, out=tmp_path / "b.json")
        other.kill()
    tune.run(CELLS, out=tmp_path / "b.json")


def test_the_rule_stays_within_the_noise():
    rule, other = (tiles.candidates("sm90", 4)[i] for i in (0, 1))
    assert race.decide({(rule, 1): 10.0, (other, 1): 9.9}, (rule, 1)) == (rule, 1)
    assert race.decide({(rule, 1): 10.0, (other, 1): 9.7}, (rule, 1)) == (other, 1)


def test_choices():
    cell = tune.Cell(4, -1, 64, 1024, 1024)
    rule = tiles.choose(64, 1024, 1024, 4, -1, "sm90", 132)
    found = list(tune.choices(cell, rule, "sm90"))
    assert found[0] == rule and len(set(found)) == len(found) > 20
    assert {split for _, split in found} == {1, 2, 4, 8}
    assert all(split * tile.block_k <= 1024 and tile.block_m < 256 for tile, split in found)
    large = list(tune.choices(tune.Cell(4, -1, 1024, 1024, 1024), rule, "sm90"))
    assert {split for _, split in large[1:]} == {1}
    for tile, split in found:  # a file that names them is read
        measured._entry("row", {**cell._asdict(), **tile._asdict(), "split_k": split}, "9.0")


def test_cells():
    assert len(tune.cells([(1024, 1024)], [1, 16, 17], [8, 4], [-1, 64])) == 2 + 2 + 2
    assert tune.cells([(1024, 1024), (1000, 1024)], [64], [8], [-1]) == [(8, -1, 64, 1024, 1024)]
    with pytest.raises(ValueError, match="groups are for 2 and 4 bits"):
        tune.cells([(1024, 1024)], [1], [8], [64])
    with pytest.raises(ValueError, match="pairs and tokens numbers above 0"):
        tune.cells([(1024, 0)], [1], [8], [-1])


def test_sizes_of_a_model(tmp_path):
    assert tune.model_sizes("bart-base") == [(768, 768), (3072, 768), (768, 3072), (50265, 768)]
    import tiny_models

    model = tiny_models.make("bart")
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BartForConditionalGeneration"]}))
    assert set(tune.model_sizes(str(tmp_path))) == {(40, 40), (56, 40), (40, 56), (100, 40)}


def test_without_a_gpu_it_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(tune.TuneError, match="on a CUDA GPU, and none can be used here: no CUDA device"):
        tune.run(CELLS)
    assert main(["tune", "bart-base"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "none can be used here" in captured.err
    for arguments, sentence in {
        ("bart-base", "--sizes", "64x64"): "give either MODEL or --sizes",
        ("--sizes", "64"): "--sizes must be OUTxIN with numbers above 0",
        ("--bits", "3"): "--bits must be 2, 4 or 8, comma-separated, got '3'",
        ("--group_size", "48"): "--group_size must be -1, 32, 64 or 128, comma-separated, got '48'",
        ("--backends", "eager"): "--backends must be cuda or triton, comma-separated, got 'eager'",
        ("--seconds", "0"): "--seconds must be above 0",
    }.items():
        assert main(["tune", *arguments]) == 2
        assert sentence in capsys.readouterr().err


def test_other_bits_fail_the_verb(gpu, capsys, monkeypatch):
    real = tune.measure
    monkeypatch.setattr(tune.text, "check_device", torch.device)
    monkeypatch.setattr(tune, "measure", lambda *given: {**real(*given), "mismatched": ["64x64x128 w4 s3"]})
    assert (
        main(["tune", "--sizes", "64x64", "--tokens", "1", "--bits", "4", "--device", "cuda", "--backends", "triton"])
        == 1
    )
    assert "a tile or a plan gave other bits than the rule's" in capsys.readouterr().err


def test_the_verb(gpu, capsys, monkeypatch):
    monkeypatch.setattr(tune.text, "check_device", torch.device)
    arguments = ["tune", "--sizes", "1024x1024", "--tokens", "1,64", "--bits", "4", "--device", "cuda"]
    arguments += ["--backends", "triton"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "64x1024x1024" in captured.out and max(map(len, captured.out.splitlines())) <= 80
    assert "1.29" in captured.out and "wrote " in captured.err
    assert main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2 and len(gpu) == 2, "nothing was measured again"


PROGRAM = """
import json, sys, torch
from dqkernels.bench import protocol, tune
from dqkernels.kernels import gemm, tiles
device, real, calls = torch.device("cpu"), gemm.qgemm, []
protocol.copies_for = lambda size, device: 2
protocol.interleave = lambda samplers, **_: protocol.Outcome(
    {(tile, split): protocol.Stats.of([1e-6 * tile.block_n / split]) for tile, split in samplers})
tune.tiles.candidates = lambda arch, bits, group_size=-1: (
    tiles.Config(16, 64, 128, 4, 5), tiles.Config(16, 32, 128, 2, 4), tiles.Config(16, 16, 128, 4, 3))

def qgemm(*, tile, **rest):
    y = real(tile=tile, **rest)
    if tile.block_n == 16 or (wrong == "no room" and tile.block_n == 32 and y.dtype == torch.float32):
        raise RuntimeError("out of resource: shared memory")
    bad = wrong == "half" and y.dtype == torch.bfloat16 or wrong == "full" and y.dtype == torch.float32
    return y + 1 if tile.block_n == 32 and bad else y

gemm.qgemm = qgemm
for wrong in (None, "half", "full", "no room"):
    print(json.dumps(tune.measure(tune.Cell(4, 64, 3, 40, 256), device, 0.01)))
"""


def test_a_cell_is_proven_before_it_is_timed():
    """With real kernels: other bits or no room for a tile, in any epilogue, cost it its place, and the row says so."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    right, half, full, no_room = (json.loads(line) for line in done.stdout.splitlines())
    reason = "RuntimeError: out of resource: shared memory"
    assert right["refused"] == [reason] and (right["block_n"], right["split_k"], right["median_us"]) == (32, 2, 16.0)
    bad = ["16x32x128 w2 s4", "16x32x128 w2 s4 /2"]
    for row in (half, full):
        assert row["mismatched"] == bad and row["refused"] == [reason] and row["block_n"] == 64
    assert tune.mismatches({"rows": [right, full]}) == ["W4 g64 3x40x256 with " + ", ".join(bad)]
    assert not no_room["mismatched"] and no_room["refused"] == [reason] and no_room["block_n"] == 64
