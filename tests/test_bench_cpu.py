"""`bench cpu`: parts on the smallest shape, proofs that refuse, goals from rows made up, resuming, tables. No time is
looked at: every part gets one round."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dqkernels.bench import cpu, cpu_goals, cpu_memory, cpu_parts, generate_cells, memory, protocol, record, size
from dqkernels.cli import main
from dqkernels.kernels import cpu_gemm, native

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
WORK = cpu_parts.Work(size.SHAPES["tiny"], (4,), 1e5)


SHORT = cpu_parts.Work(size.SHAPES["tiny"], (4,), 1e-9)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Rounds end the timing, never the clock, and little is timed in each."""
    once = protocol.interleave
    monkeypatch.setattr(protocol, "interleave", lambda samplers, **more: once(samplers, seconds=1e5, max_rounds=5))
    monkeypatch.setattr(protocol, "MAX_ROTATION_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(cpu_parts, "_SAMPLE_S", 1e-6)
    monkeypatch.setattr(cpu_parts, "_PATIENCE", 1e-9)  # nothing is too slow
    monkeypatch.setattr(cpu_parts, "TOKENS", (3, 256))


def text_of(made: dict) -> str:
    """Every line within 80 columns, and no cell cut off by an ellipsis."""
    console = Console(width=80, record=True, file=open(os.devnull, "w"), color_system=None)
    console.print(cpu.render(made))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text, text
    return text


def by_name(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["candidate"], []).append(row)
    return found


def test_gemv_is_held_against_the_faster_reader():
    rows = cpu_parts.gemv(cpu_parts.Work(WORK.shape, (8, 2), 1e5))
    assert {row["status"] for row in rows} == {"timed"}
    assert len(rows) == 2 * 4 * 2 * 3  # widths, linears, cold and warm, candidates
    for start in range(0, len(rows), 3):
        ours, *readers = rows[start : start + 3]
        fastest = max(readers, key=lambda row: row["gb_per_s"])
        assert ours["reader"] == fastest["candidate"] and fastest["read_fraction"] == 1.0
        assert ours["read_fraction"] == pytest.approx(ours["gb_per_s"] / fastest["gb_per_s"], rel=2e-3)
    cold = [row for row in rows if row["cache"] == "cold"]
    assert all(row["copies"] >= 4 for row in cold) and all(row["copies"] == 1 for row in rows if row not in cold)
    assert {row["weights_bytes"] for row in rows if (row["out_features"], row["bits"]) == (512, 2)} == {512 * 128 // 4}


def test_gemm_stands_beside_torchs_products():
    rows = cpu_parts.gemm(cpu_parts.Work(WORK.shape, (8, 4), 1e5))
    found = by_name(rows)
    assert set(found) == {"dqkernels W8", "dqkernels W4", "torch._int_mm", "torch fp32", "multiply loop"}
    products = [name for name in found if name.startswith(("dqkernels", "torch fp32"))]
    assert {row["status"] for name in products for row in found[name]} == {"timed"}
    for ours, base in zip(found["dqkernels W4"], found["dqkernels W8"], strict=True):
        assert ours["w8_ratio"] == pytest.approx(base["median_us"] / ours["median_us"], rel=2e-3)
        assert base["w8_ratio"] == 1.0 and base["fp32_ratio"] is not None


LOOP = native.native() is not None and getattr(native.native(), "multiply_instruction", lambda: None)()


@pytest.mark.skipif(not LOOP, reason="no multiply loop for this instruction set, or an older core")
def test_gemm_is_held_against_a_loop_that_only_multiplies():
    rows = cpu_parts.gemm(cpu_parts.Work(WORK.shape, (8, 4), 1e5))
    found = by_name(rows)
    for name in ("dqkernels W8", "dqkernels W4", "multiply loop"):
        for row, loop in zip(found[name], found["multiply loop"], strict=True):
            assert row["multiply_fraction"] == pytest.approx(loop["median_us"] / row["median_us"], rel=2e-3)
    assert {row["multiply_fraction"] for row in found["torch fp32"]} == {None}, "it multiplies no bytes"
    assert {row["instruction"] for row in found["multiply loop"]} == {LOOP}
    made = cpu.run("tiny", ["gemm"], (4,), seconds=1e5)
    assert "a loop that only multiplies" in " ".join(text_of(made).split()) and "multiply_loop" in made["protocol"]


@pytest.mark.skipif(not LOOP, reason="no multiply loop for this instruction set, or an older core")
def test_the_loop_multiplies_as_much_as_it_says():
    """Products of one, so their sum is their number: whole blocks, on any number of threads."""
    multiply = native.native().multiply_bytes
    block = multiply(1, 1)
    assert block % 32 == 0 and multiply(0, 1) == 0
    for products in (block, block + 1, 7 * block):
        for threads in (1, 2, 5, 300):
            assert multiply(products, threads) == -(-products // block) * block
    with pytest.raises(ValueError, match="rows must be >= 0"):
        multiply(-1, 1)


def test_without_a_loop_there_is_no_share(monkeypatch):
    """Plain C++, AMX, Arm; and a core from before the loop was there."""
    core = native.native()
    lacking = {name: getattr(core, name) for name in dir(core) if not name.startswith(("_", "multiply"))}
    for more, reason in (({"multiply_instruction": lambda: None}, "no loop for"), ({}, "is older than this benchmark")):
        monkeypatch.setattr(cpu_parts.native, "native", lambda more=more: SimpleNamespace(**lacking, **more))
        found = by_name(cpu_parts.gemm(WORK))
        for row in found["multiply loop"]:
            assert row["status"] == "not supported" and reason in row["reason"] and row["instruction"] is None
        assert {row["multiply_fraction"] for row in found["dqkernels W4"]} == {None}
        assert {row["status"] for row in found["dqkernels W4"]} == {"timed"}


def test_a_loop_that_leaves_products_out_is_refused(monkeypatch):
    core = native.native()
    kept = {name: getattr(core, name) for name in dir(core) if not name.startswith("_")}
    kept |= {"multiply_instruction": lambda: "vpnothing", "multiply_bytes": lambda products, threads: products - 1}
    monkeypatch.setattr(cpu_parts.native, "native", lambda: SimpleNamespace(**kept))
    found = by_name(cpu_parts.gemm(WORK))
    assert {row["status"] for row in found["multiply loop"]} == {"refused"}
    assert {row["multiply_fraction"] for row in found["dqkernels W4"]} == {None}


def test_what_takes_too_long_is_named_and_not_repeated(monkeypatch):
    monkeypatch.setattr(cpu_parts, "_PATIENCE", 1e13)
    found = by_name(cpu_parts.gemm(WORK))
    for slow, ours in zip(found["torch._int_mm"], found["dqkernels W4"], strict=True):
        assert (slow["status"], slow["samples"]) == ("too slow", 1) and "timed once" in slow["reason"]
        assert ours["status"] == "timed" and ours["int_mm_ratio"] == pytest.approx(
            slow["median_us"] / ours["median_us"], rel=2e-3
        )
    short = cpu_parts.Work(WORK.shape, (4,), 1e-9)
    for part, cells in ((cpu_parts.gemm, 6), (cpu_parts.gemv, 4)):
        left = [row for row in part(short) if row["status"] == "not run"]
        assert len(left) == cells - 1 and all("of this part were over" in row["reason"] for row in left)


def test_a_wrong_kernel_is_refused_and_not_timed(monkeypatch):
    """In every part that calls it: one element is off by a rounding."""
    right = cpu_gemm.gemm

    def wrong(x, parts, **options):
        bias = parts[0].bias.clone()
        bias[-1] += 1e-3
        return right(x, [parts[0]._replace(bias=bias)], **options)

    monkeypatch.setattr(cpu_parts.cpu_gemm, "gemm", wrong)
    for part, words in ((cpu_parts.gemv, "calls differ from eager"), (cpu_parts.gemm, "differs from eager")):
        ours = [row for row in part(WORK) if row["candidate"].startswith("dqkernels")]
        assert all(row["status"] == "refused" and words in row["reason"] for row in ours) and ours
        assert not any("median_us" in row for row in ours)
    assert {row["status"] for row in cpu_parts.threads(WORK)} == {"refused"}


def test_a_call_alone_and_behind_torch():
    rows = cpu_parts.threads(WORK)
    assert [row["candidate"] for row in rows] == ["dqkernels W4 alone", "dqkernels W4 behind torch"] * 2
    for alone, behind in zip(rows[::2], rows[1::2], strict=True):
        assert behind["alone_ratio"] == pytest.approx(alone["median_us"] / behind["median_us"], rel=2e-3)


def test_steps_are_proven_against_transformers_loop(monkeypatch):
    rows = cpu_parts.step(SHORT)
    assert [(row["batch_size"], row["num_beams"]) for row in rows] == [(1, 1), (8, 1), (1, 4)]
    assert {row["status"] for row in rows} == {"timed"} and all(row["native_us"] > 0 for row in rows)
    assert all("a step in one native call" in row["kernel"] for row in rows)
    # A gap stands between two runs of one call.
    assert all(row["samples"] % (row["new_tokens"] - 1) == 0 for row in rows)
    monkeypatch.setattr(cpu_parts.native_step, "why_not", lambda *_: "not now")
    assert {(row["status"]) for row in cpu_parts.step(SHORT)} == {"refused"}


def test_a_fresh_process_writes_the_same_tokens(monkeypatch):
    (row,) = cpu_memory.memory_of_processes(WORK)
    assert row["status"] == "timed", row
    assert row["growth_bytes"] >= row["loaded_bytes"] > 0 and row["file_bytes"] > 40_000
    assert row["process_bytes"] > 50_000_000
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: Done('{"tokens": [[1]], "growth": 1}'))
    (row,) = cpu_memory.memory_of_processes(WORK)
    assert row["status"] == "refused" and row["reason"] == "another process writes other tokens"
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: Done("", 3, "a\nOSError: /tmp/some/where: no"))
    (row,) = cpu_memory.memory_of_processes(WORK)
    assert row["reason"].startswith("exit code 3: OSError") and "/tmp" not in row["reason"]


class Done:
    def __init__(self, stdout, returncode=0, stderr=""):
        self.stdout, self.returncode, self.stderr = stdout, returncode, stderr


def test_the_reader_reads_every_byte():
    read = native.native().read_bytes
    for count in (0, 1, 7, 8, 255, 256, 257, 4096 + 3, 300_000, 1 << 20):
        data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
        whole = data[: count // 8 * 8].view(torch.int64).sum().item() + data[count // 8 * 8 :].sum().item()
        for threads in (1, 2, 5):
            assert read([data.data_ptr()] * 2, count, threads) == 2 * whole % 2**64, (count, threads)
    with pytest.raises(ValueError, match="rows must be >= 0"):
        read([data.data_ptr()], -1, 1)
    with pytest.raises(ValueError, match="piece is a null pointer"):
        read([0], 8, 1)


# ---- goals ------------------------------------------------------------------------------------------------------


def gemv_row(fraction: float, n: int = 768, cache: str = "cold", **more) -> dict:
    sizes = {"tokens": 1, "out_features": n, "in_features": 768}
    row = {"part": "gemv", "candidate": "dqkernels W4", "bits": 4, **sizes, "cache": cache, "status": "timed"}
    return {**row, "samples": 50, "read_fraction": fraction, **more}


def model_row(
    candidate: str, bits: int, decode: float, first: float = 10.0, batch: int = 1, beams: int = 1, tokens=256
):
    row = {"part": "generate", "candidate": candidate, "weight_bits": bits, "batch_size": batch, "num_beams": beams}
    row |= {"source_tokens": tokens, "status": "timed", "samples": 9, "decode_ms_per_token": decode}
    return {**row, "family": "ours" if candidate.startswith("dqkernels") else "x", "first_token_ms": first}


def verdict(rows: list[dict], name: str) -> dict:
    (line,) = [line for line in cpu_goals.judged(rows) if line["goal"] == name]
    return line


def test_of_a_goal_the_worst_counts():
    name = "GEMV from memory, of the reader"
    found = verdict([gemv_row(0.95), gemv_row(0.81, n=3072), gemv_row(0.5, cache="warm")], name)
    assert found["verdict"] == "met" and found["found_fraction"] == 0.81
    assert found["where"] == "1x3072x768 W4, worst of 2"
    assert verdict([gemv_row(0.95), gemv_row(0.79)], name)["verdict"] == "not met"
    for row in (gemv_row(0.9, status="refused"), gemv_row(0.9, samples=4), gemv_row(0.9, candidate="read loop")):
        assert verdict([row], name)["verdict"] == "not measured"


def test_goals_of_whole_models_are_ratios_within_a_cell():
    peer = "ctranslate2 int8"
    rows = [model_row("dqkernels 4-4-8", 4, 2.4), model_row("dqkernels 2-2-8", 2, 2.0), model_row(peer, 8, 9.7)]
    rows += [model_row(peer, 8, 1.0, batch=8), model_row("torch fp32", 32, 20.0, first=39.0)]
    assert verdict(rows, "decode W4, batch 1, a token")["found_ms"] == 2.4
    assert verdict(rows, "decode W4, batch 1, a token")["verdict"] == "met"
    over = verdict(rows, "decode W4, batch 1, over CTranslate2 int8")
    assert over["found_ratio"] == pytest.approx(9.7 / 2.4, rel=1e-3) and over["verdict"] == "met"
    assert verdict(rows, "decode W2, batch 1, over CTranslate2 int8")["verdict"] == "not met"
    assert verdict(rows, "decode W4, batch 8, over CTranslate2 int8")["verdict"] == "not measured"
    assert verdict(rows, "encoder W4, 256 tokens, over torch fp32")["found_ratio"] == 3.9
    assert verdict(rows, "encoder W4, 1024 tokens, over torch fp32")["verdict"] == "not measured"


def test_a_process_may_take_its_file_and_sixty_megabytes():
    row = {"part": "memory", "candidate": "dqkernels W4", "bits": 4, "status": "timed", "file_bytes": 70_000_000}
    for growth, word in ((130_000_000, "met"), (130_000_001, "not met")):
        found = verdict([{**row, "growth_bytes": growth}], "process beyond its file")
        assert found["verdict"] == word and found["found_bytes"] == growth - 70_000_000


# ---- the run ----------------------------------------------------------------------------------------------------


def test_a_record_that_is_gone_on_with(tmp_path, monkeypatch, capsys):
    out, reasons, write = tmp_path / "cpu.json", [], record.write

    def written(made, path):
        reasons.append([row["reason"] for row in made["rows"] if row["part"] == "gemm"])
        return write(made, path)

    with monkeypatch.context() as watched:
        watched.setattr(record, "write", written)
        first = cpu.run("tiny", ["gemm", "gemv"], (4,), seconds=1e-9, out=str(out))
    assert reasons == [[generate_cells.NOT_YET], ["1e-09 s were over"]], "a record that is cut off says no more"
    left = [(row["part"], row.get("out_features")) for row in first["rows"] if row["status"] == "not run"]
    assert left == [("gemv", 128), ("gemv", 64), ("gemv", 512), ("gemm", None)], "the first cell is always run"
    text = text_of(first)
    assert "gemm: not run (1e-09 s were over)" in text and "not measured" in text and "64x64" in text
    first = cpu.run("tiny", ["gemv"], (4,), seconds=1e5, out=str(out), resume=True)
    assert all(row["status"] in ("timed", "goal") for row in first["rows"]), "a part that is not whole is run again"
    monkeypatch.setattr(cpu_parts, "packed", lambda *_: pytest.fail("a part that is done stays"))
    kept = cpu.run("tiny", ["gemv"], (4,), seconds=60, out=str(out), resume=True)
    rows = [row for row in first["rows"] if row["part"] == "gemv"]
    assert [row for row in kept["rows"] if row["part"] == "gemv"] == rows and kept["settings"]["parts"] == ["gemv"]
    assert record.read(out)["rows"] == kept["rows"]
    with pytest.raises(ValueError, match=r"resume needs the same bits as in cpu.json: \[4\] there, \[2\] now"):
        cpu.run("tiny", ["gemv"], (2,), out=str(out), resume=True)
    made = json.loads(out.read_text())
    out.write_text(json.dumps({**made, "kind": "gemm"}))
    with pytest.raises(ValueError, match="resume is for a record of bench cpu, cpu.json is of kind 'gemm'"):
        cpu.run("tiny", ["gemv"], (4,), out=str(out), resume=True)


def test_whole_models_are_those_of_bench_generate(monkeypatch):
    asked = {}

    def run(shape, **options):
        asked.update(options, shape=shape)
        rows = [model_row("dqkernels 4-4-8", 4, 2.4), model_row("torch fp32", 32, 9.0)]
        return {"rows": [{**row, "new_tokens": 64, "speedup_ratio": 1.0} for row in rows]}

    monkeypatch.setattr(cpu.generate, "run", run)
    made = cpu.run("tiny", ["generate"], (4,), seconds=77)
    assert asked["shape"] == "tiny" and asked["bits"] == (4,) and 70 < asked["seconds"] <= 77
    assert asked["candidates"] == ("torch", "ours", "ctranslate2", "dynamic")
    text = text_of(made)
    assert "1x1, 256+64" in text and "2.4" in text and "<= 2.5 ms" in text


def test_the_verb(tmp_path, capsys):
    out = tmp_path / "c.json"
    command = ["bench", "cpu", "--shape", "tiny", "--bits", "4", "--parts", "threads", "--seconds", "0.01"]
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "Beside torch's threads" in said.out and "wrote" in said.out + said.err
    assert record.read(out)["kind"] == "cpu"
    for more, words in (
        (["--parts", "magic"], "--parts must be of gemv, step, threads"),
        (["--shape", "huge"], "shape must be one of tiny"),
        (["--bits", "3"], "--bits must be 2, 4 or 8"),
        (["--resume"], "--resume goes on with the record in --out"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--out", str(out)], "is there already: give --resume to go on with it, --overwrite to replace it"),
    ):
        assert main(["bench", "cpu", *more]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
