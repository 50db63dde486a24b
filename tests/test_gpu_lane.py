"""The GPU lane without a GPU: what it says when it ran nothing, how it resumes, what it does not hide."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_lane.py"


def load():
    spec = importlib.util.spec_from_file_location("gpu_lane_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_lane = load()
record = gpu_lane.record
NAMES = [stage.name for stage in gpu_lane.stages()]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_lane(out: Path, seconds: float = 480.0, gpu: str | None = "NVIDIA H200"):
    clock = Clock()
    lane = gpu_lane.Lane(out, out, seconds, clock=clock)
    lane.environment = record.environment(threads=1) | {"gpu": gpu}
    lane.facts = {"compute_capability": "9.0", "nvcc": True}
    lane.head = [{"stage": "environment", "outcome": "passed", "reason": None}]
    return lane, clock


def a_stage(clock: Clock, log: list[str], name: str, took: float, least: float = 10, **row):
    def run(lane, seconds):
        clock.now += took
        log.append(name)
        return {"outcome": "passed", "reason": None, **row}

    return gpu_lane.Stage(name, run, least, 60)


def outcomes(rows: list[dict]) -> dict[str, str]:
    return {row["stage"]: row["outcome"] for row in rows}


# ------------------------------------------------------------------------------------------ no GPU


def test_a_run_without_gpu_says_so_last_and_exits_0(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--minutes", "5"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,  # from anywhere: it finds its checkout by itself
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "GPU: not run"
    assert all(name in done.stdout for name in NAMES)
    written = record.read(tmp_path / "gpu_lane.json")
    assert written["kind"] == "gpu_lane" and written["environment"]["gpu"] is None
    found = outcomes(written["rows"])
    assert found.pop("environment") == "passed" and list(found) == NAMES and set(found.values()) == {"unreached"}
    assert all(row["reason"].startswith("no GPU: ") for row in written["rows"][1:])


def test_require_gpu_makes_it_an_error(tmp_path, monkeypatch, capsys):
    def no_gpu(lane, seconds):
        lane.environment = record.environment(threads=1) | {"gpu": None}
        lane.facts = {"why_no_gpu": "none here"}
        return {"outcome": "passed", "reason": None}

    monkeypatch.setattr(gpu_lane, "stage_environment", no_gpu)
    assert gpu_lane.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "GPU: not run"
    assert gpu_lane.main(["--out", str(tmp_path), "--require-gpu"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "GPU: not run"


def test_an_environment_that_cannot_be_read_is_a_failure(tmp_path, monkeypatch, capsys):
    def broken(lane, seconds):
        raise RuntimeError("driver fell off")

    monkeypatch.setattr(gpu_lane, "stage_environment", broken)
    assert gpu_lane.main(["--out", str(tmp_path)]) == 1
    assert "driver fell off" in capsys.readouterr().out
    assert record.read(tmp_path / "gpu_lane.json")["rows"][0]["outcome"] == "failed"


# ------------------------------------------------------------------------------ time, order, resuming


def test_stages_that_time_does_not_reach_are_named(tmp_path, capsys):
    lane, clock = a_lane(tmp_path, seconds=100)
    log: list[str] = []
    plan = [a_stage(clock, log, name, took=45, least=20) for name in ("first", "second", "third")]
    rows = gpu_lane.run_stages(plan, lane, {}, minutes=8)
    assert log == ["first", "second"]
    assert outcomes(rows) == {"first": "passed", "second": "passed", "third": "unreached"}
    assert rows[2]["reason"] == "10 s left, it needs 20"
    assert "third: unreached, 10 s left, it needs 20" in capsys.readouterr().out


def test_a_stage_gets_its_share_and_never_more_than_is_left(tmp_path):
    lane, _ = a_lane(tmp_path, seconds=70)
    limits = []
    stage = gpu_lane.Stage("x", lambda lane, s: limits.append(s) or {"outcome": "passed", "reason": None}, 1, 60)
    gpu_lane.run_one(stage, lane, minutes=8)
    gpu_lane.run_one(stage, lane, minutes=16)
    assert limits == [60, 70]


def test_a_stage_that_breaks_does_not_end_the_lane(tmp_path):
    lane, clock = a_lane(tmp_path)
    log: list[str] = []

    def broken(lane, seconds):
        raise OSError(f"no such file: {tmp_path}/x")

    plan = [gpu_lane.Stage("broken", broken, 1, 60), a_stage(clock, log, "after", 1)]
    rows = gpu_lane.run_stages(plan, lane, {}, minutes=8)
    assert outcomes(rows) == {"broken": "failed", "after": "passed"}
    assert "OSError" in rows[0]["reason"] and str(tmp_path) not in json.dumps(rows)


def test_it_resumes_where_time_ran_out(tmp_path, capsys):
    lane, clock = a_lane(tmp_path, seconds=100)
    log: list[str] = []
    plan = [a_stage(clock, log, name, took=45, least=20) for name in ("first", "second", "third")]
    gpu_lane.run_stages(plan, lane, {}, minutes=8)
    lane.figures["linear"] = {
        "protocol": {"budget_s": 1.0},
        "settings": {"bits": [2]},
        "rows": [{"median_us": 1.5, "status": "timed"}],
    }
    gpu_lane.write(
        lane, gpu_lane.run_stages([], lane, {}, 8) or [{"stage": "first", "outcome": "passed", "reason": None}], 8
    )

    later, clock = a_lane(tmp_path)
    log.clear()
    before = gpu_lane.earlier(later, gpu_lane.read_old(tmp_path))
    assert before["first"]["outcome"] == "passed"
    assert later.figures["linear"]["rows"] == [{"median_us": 1.5, "status": "timed"}]
    plan = [a_stage(clock, log, name, took=45, least=20) for name in ("first", "second", "third")]
    rows = gpu_lane.run_stages(plan, later, before, minutes=8)
    assert log == ["second", "third"] and rows[0]["resumed"] is True
    assert set(outcomes(rows).values()) == {"passed"}
    assert "first: passed, in an earlier run" in capsys.readouterr().out
    kept = record.read(tmp_path / "gpu_lane.json")["rows"]
    assert {"stage": "bench linear", "median_us": 1.5, "status": "timed"} in kept


def test_what_ran_out_of_time_or_no_longer_holds_is_repeated(tmp_path):
    lane, clock = a_lane(tmp_path)
    log: list[str] = []
    before = {
        "hung": {"stage": "hung", "outcome": "timed out", "reason": None},
        "build": {"stage": "build", "outcome": "passed", "reason": None},
    }
    build = a_stage(clock, log, "build", 1)
    build = gpu_lane.Stage("build", build.run, 1, 60, holds=lambda: False)  # a fresh machine has no extension
    gpu_lane.run_stages([a_stage(clock, log, "hung", 1), build], lane, before, minutes=8)
    assert log == ["hung", "build"]


@pytest.mark.parametrize("key", ["gpu", "source_sha256", "torch", "triton"])
def test_another_machine_or_other_sources_start_afresh(tmp_path, key):
    lane, _ = a_lane(tmp_path)
    gpu_lane.write(lane, [{"stage": "first", "outcome": "passed", "reason": None}], 8)
    assert gpu_lane.earlier(lane, gpu_lane.read_old(tmp_path))
    lane.environment[key] = "0" * 64
    assert gpu_lane.earlier(lane, gpu_lane.read_old(tmp_path)) == {}
    (tmp_path / "gpu_lane.json").write_text("{")
    assert gpu_lane.read_old(tmp_path) is None


# ----------------------------------------------------------------------------------------- processes


def test_a_process_over_its_time_is_stopped_and_its_output_kept(tmp_path):
    lane, _ = a_lane(tmp_path)
    code = "import os, time; print('begun', os.environ['PYTHONPATH'], flush=True); time.sleep(60)"
    done = lane.call([sys.executable, "-c", code], 1.5)
    assert done.timed_out and done.code != 0
    # Whether the interrupt is heard depends on who started us (background shells ignore it); the kill is not.
    assert f"begun {SCRIPT.parent.parent}" in done.output
    assert gpu_lane.ended(done)["outcome"] == "timed out"


def test_pytest_counts_come_from_its_report(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "@pytest.mark.skip(reason='needs a moon')\n"
        "def test_moon(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # and not the project's, with its conftest
    lane, _ = a_lane(tmp_path)
    row = gpu_lane.pytest_stage(str(tmp_path), "-c", str(tmp_path / "pytest.ini"))(lane, 120)
    assert (row["tests"], row["failures"], row["errors"], row["skipped"]) == (3, 1, 0, 1)
    assert row["outcome"] == "failed" and row["reason"] == "1 failures, 0 errors"
    assert row["skip_reasons"] == ["1 x needs a moon"] and "test_bad" in row["tail"]


def a_pytest(tests: int, failures: int = 0, skipped: int = 0, **row) -> dict:
    return {
        "stage": "gpu tests",
        "outcome": "passed",
        "tests": tests,
        "failures": failures,
        "errors": 0,
        "skipped": skipped,
    } | row


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "GPU: not run"),
        ([{"stage": "gpu tests", "outcome": "unreached"}], "GPU: not run"),
        ([a_pytest(5, skipped=5)], "GPU: not run"),
        ([a_pytest(0), {"stage": "bench linear", "outcome": "passed"}], "GPU: not run"),
        ([a_pytest(7, skipped=2)], "GPU: 5 tests passed, 0 failed, 2 skipped"),
        (
            [a_pytest(4, 1, 1, stage="gpu tokens", outcome="failed"), a_pytest(7, skipped=2)],
            "GPU: 7 tests passed, 1 failed, 3 skipped; failed: gpu tokens",
        ),
        (
            [a_pytest(4, stage="gpu tokens"), {"stage": "gpu tests", "outcome": "unreached"}],
            "GPU: 4 tests passed, 0 failed, 0 skipped; unreached: gpu tests",
        ),
        (
            [
                a_pytest(7, 1, outcome="failed"),
                {"stage": "sanitizer memcheck", "outcome": "absent"},
                {"stage": "bench linear", "outcome": "timed out"},
                {"stage": "bench generate", "outcome": "unreached"},
            ],
            "GPU: 6 tests passed, 1 failed, 0 skipped; failed: gpu tests; timed out: bench linear; "
            "absent: sanitizer memcheck; unreached: bench generate",
        ),
    ],
)
def test_the_last_line(rows, line):
    assert gpu_lane.summary(rows) == line


# -------------------------------------------------------------------------------------------- stages


def answer(monkeypatch, lane, code: int, output: str, then=lambda command: None):
    """Makes every process of the lane end like this."""
    commands = []

    def call(command, seconds, **variables):
        commands.append((command, variables))
        then(command)
        return gpu_lane.Done(code, False, output)

    monkeypatch.setattr(lane, "call", call)
    return commands


@pytest.mark.parametrize(
    ("code", "output", "outcome", "reason"),
    [
        (0, "grid: 128 cases, 0 wrong []\n========= ERROR SUMMARY: 0 errors\n", "passed", None),
        (9, "grid: 128 cases, 0 wrong []\n========= ERROR SUMMARY: 3 errors\n", "failed", "3 reports"),
        (0, "grid: 8 cases, 0 wrong []\n= RACECHECK SUMMARY: 2 hazards displayed (0 errors)", "failed", "2 reports"),
        (0, "grid: 128 cases, 0 wrong []\n", "failed", "printed no summary"),
        (1, "Target application returned an error\n", "failed", "exit code 1"),
        (0, "grid: 0 cases, 0 wrong []\n= ERROR SUMMARY: 0 errors\n", "absent", "no kernel of ours"),
    ],
)
def test_sanitizer_reports_are_read(tmp_path, monkeypatch, code, output, outcome, reason):
    lane, _ = a_lane(tmp_path)
    monkeypatch.setattr(gpu_lane, "_tool", lambda name: "compute-sanitizer")
    commands = answer(monkeypatch, lane, code, output)
    row = gpu_lane.sanitizer_stage("racecheck")(lane, 30)
    assert row["outcome"] == outcome and (row["reason"] or "").startswith(reason or "")
    ((command, variables),) = commands
    assert command[1:3] == ["--tool", "racecheck"] and command[-1] == str(gpu_lane.GRID)
    assert variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@pytest.mark.parametrize(
    ("code", "output", "outcome", "reason"),
    [
        (0, {"cpu_isas": ["avx2"], "runs": 7}, "passed", None),
        (
            1,
            {"cpu_isas": ["avx2", "amx_int8"], "runs": 14, "failed": ["amx_int8 x.py"], "other_bits": 2},
            "failed",
            "amx_int8 x.py; 2 programs with other bits",
        ),
        (1, {"cpu_isas": ["avx2"], "runs": 7, "unfinished": ["avx2 x.py"]}, "timed out", "not finished: avx2 x.py"),
        (1, "no compiled core: it was not built\n", "absent", "the core was not built"),
        (1, "Traceback\n", "failed", "exit code 1"),
    ],
)
def test_the_hosts_instruction_sets_are_a_stage(tmp_path, monkeypatch, code, output, outcome, reason):
    lane, _ = a_lane(tmp_path)
    if isinstance(output, dict):
        output = "ok avx2 x.py 1 s\n" + json.dumps({**output, **{key: output.get(key, value) for key, value in
                  (("failed", []), ("unfinished", []), ("other_bits", 0))}}) + "\n"  # fmt: skip
    commands = answer(monkeypatch, lane, code, output)
    row = gpu_lane.stage_cpu(lane, 60)
    assert (row["outcome"], row["reason"]) == (outcome, reason)
    if "cpu_isas" in row:
        assert row["cpu_isas"][0] == "avx2" and row["runs"] == 7 * len(row["cpu_isas"])
    assert commands[0][0][1:] == [str(gpu_lane.CPU_CHECKS), "--seconds", "55"]
    assert next(stage for stage in gpu_lane.stages() if stage.name == "cpu checks").most_s == 60


def test_tokens_come_before_the_many_tests_and_once(tmp_path, monkeypatch):
    """Whole models are what users get; the tests of kernels behind them may use up the time."""
    lane, _ = a_lane(tmp_path)
    found = {}
    for stage in gpu_lane.stages():
        if stage.name in ("gpu tokens", "gpu tests"):
            commands = answer(monkeypatch, lane, 5, "")
            assert stage.run(lane, 30)["outcome"] == "absent"
            found[stage.name] = commands[0][0][-3:]
    assert list(found) == ["gpu tokens", "gpu tests"] and (SCRIPT.parent.parent / gpu_lane.TOKENS).is_file()
    assert found["gpu tokens"] == ["-m", "gpu", gpu_lane.TOKENS]
    assert found["gpu tests"] == ["gpu", "tests", f"--ignore={gpu_lane.TOKENS}"]


def test_the_grid_of_ops_is_a_stage_of_its_own(tmp_path, monkeypatch):
    lane, _ = a_lane(tmp_path)
    for code, output, outcome in (
        (0, "grid: 150 cases, 0 wrong []\n", "passed"),
        (1, "grid: 150 cases, 2 wrong ['triton qlinear']\n", "failed"),
        (0, "no CUDA device\ngrid: 0 cases, 0 wrong []\n", "absent"),
    ):
        commands = answer(monkeypatch, lane, code, output)
        row = gpu_lane.stage_grid(lane, 30)
        assert row["outcome"] == outcome and row["cases"] == (0 if outcome == "absent" else 150)
        assert commands[0][0][1:] == [str(gpu_lane.GRID)]
    order = [name for name in NAMES if name == "op grid" or name.startswith("sanitizer")]
    assert order[0] == "op grid" and len(order) == 5, "the sanitizers would have to compile"


def run_grid(device: str, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, gpu_lane.GRID, device],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_sanitizer_grid_covers_nothing_without_a_gpu():
    done = run_grid("cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "grid: 0 cases, 0 wrong []"


def test_the_sanitizer_grid_reaches_every_op_of_triton():
    """In the interpreter: what the lane runs under compute-sanitizer computes what eager computes."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = run_grid("tiny", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    cases, wrong = map(int, re.match(r"grid: (\d+) cases, (\d+) wrong", done.stdout.splitlines()[-1]).groups())
    assert cases >= 50 and wrong == 0
    assert "triton: " not in done.stdout, "Triton refused an op of the table"


def test_the_sanitizer_grid_names_every_op():
    """An op that has no sample would never be seen by a sanitizer."""
    import op_grid
    import torch

    from dqkernels import gradients, kv_cache, ops, straight_through

    named = {sample.name.split()[0] for sample in op_grid.samples(3, 5, 7)}
    wanted = {*ops.SCHEMAS, *gradients.SCHEMAS, *straight_through.SCHEMAS, *kv_cache.SCHEMAS}
    assert named | {"qgemm"} == wanted  # qgemm: the second half of qlinear
    one = torch.ones(4)
    assert op_grid.difference((one,), (one,), 0.0) is None
    assert "1 of 4" in op_grid.difference((torch.tensor([1.0, 1, 1, 2]),), (one,), 0.0)
    assert "1 of 4" in op_grid.difference((torch.tensor([1.0, 1, 1, float("nan")]),), (one,), 0.5)
    assert "float32 [4]" in op_grid.difference((one.half(),), (one,), 0.5)


def test_build_reports_why_cuda_was_left_out(tmp_path, monkeypatch):
    lane, _ = a_lane(tmp_path)
    info = {"cuda": False, "reasons": ["cuda: pybind11 is missing"], "archs": [], "nvcc": "13.0"}
    monkeypatch.setattr(gpu_lane, "built", lambda: info)
    commands = answer(monkeypatch, lane, 0, "")
    row = gpu_lane.stage_build(lane, 60)
    assert row["outcome"] == "failed" and "pybind11 is missing" in row["reason"] and len(commands) == 1
    assert commands[0][0][1:] == ["setup.py", "build_ext", "--inplace"]

    answers = answer(monkeypatch, lane, 1, "error: boom")
    row = gpu_lane.stage_build(lane, 60)
    assert row["outcome"] == "failed" and len(answers) == 2 and row["tail"] == "error: boom"
    assert "--no-build-isolation" in answers[1][0] and "--no-deps" in answers[1][0]

    lane.facts["nvcc"] = False
    assert gpu_lane.stage_build(lane, 60)["outcome"] == "absent"
    lane.facts["nvcc"] = True
    info.update(cuda=True, archs=["90a-real"])
    answer(monkeypatch, lane, 0, "")
    row = gpu_lane.stage_build(lane, 60)
    assert row["outcome"] == "passed" and row["archs"] == ["90a-real"]


@pytest.mark.parametrize(("kind", "seconds"), [("gemm", 52.5), ("linear", 28.0), ("kernels", 35.0)])
def test_bench_rows_become_rows_of_the_lane(tmp_path, monkeypatch, kind, seconds):
    lane, _ = a_lane(tmp_path)
    rows = [{"candidate": "a", "status": "timed", "median_us": 2.5}, {"candidate": "b", "status": "refused"}]
    rows.append({"candidate": "somebody's", "status": "refused", "foreign": True})

    def run_it(command):
        assert f"seconds={seconds}" in command[-1] and "device='cuda'" in command[-1]
        assert f"import {kind};" in command[-1] and f"{kind}.run(" in command[-1]
        made = record.new(kind, settings={"bits": [2]}, protocol={"budget_s": 1.0}, rows=rows, threads=1)
        record.write(made, tmp_path / f"{kind}.json")

    answer(monkeypatch, lane, 0, "", run_it)
    stage = next(stage for stage in gpu_lane.stages() if stage.name == f"bench {kind}")
    row = gpu_lane.run_one(stage, lane, minutes=8)
    assert row["outcome"] == "failed" and row["reason"].startswith("1 candidates did not compute")
    gpu_lane.write(lane, [row], 8)
    kept = record.read(tmp_path / "gpu_lane.json")
    assert [r for r in kept["rows"] if "candidate" in r] == [{"stage": f"bench {kind}", **r} for r in rows]
    assert kept["protocol"] == {kind: {"budget_s": 1.0}}


@pytest.mark.parametrize("name", ["generate", "generate_memory", "generate_layers"])
def test_sweeps_are_kept_as_far_as_they_came(tmp_path, monkeypatch, name):
    """The record lies in the lane's folder, is gone on with, and counts although its process was killed."""
    lane, _ = a_lane(tmp_path)
    path = lane.out / f"{name}.json"
    cell = {"batch_size": 1, "status": "not run", "reason": "9 s were over"}
    rows = [{"candidate": "a", "status": "timed", "latency_ms": 2.5}, cell]

    def run_it(command, seconds):
        assert command[-1].startswith("from dqkernels.bench import generate; generate.run(")
        assert f"out={str(path)!r}, resume=True)" in command[-1] and "seconds=" in command[-1]
        assert ("sweep='memory'" in command[-1], "sweep='layers'" in command[-1]) == (
            name == "generate_memory", name == "generate_layers"
        )  # fmt: skip
        record.write(record.new("generate", settings={}, protocol={}, rows=rows, threads=1), path)
        return gpu_lane.Done(-9, True, "...")

    stage = next(stage for stage in gpu_lane.stages() if stage.name == f"bench {name}")
    monkeypatch.setattr(lane, "call", run_it)
    row = stage.run(lane, 60)
    assert row["outcome"] == "timed out" and row["reason"] == "1 cells or candidates not run, for want of time"
    assert lane.figures[name]["rows"] == rows
    gpu_lane.write(lane, [{"stage": stage.name, **row}], 8)
    kept = record.read(lane.out / "gpu_lane.json")
    assert [r["stage"] for r in kept["rows"] if "status" in r] == [f"bench {name}"] * 2
    path.unlink()
    monkeypatch.setattr(lane, "call", lambda command, seconds: gpu_lane.Done(-9, True, "..."))
    assert stage.run(lane, 60)["outcome"] == "timed out"


def test_tiles_are_measured_as_far_as_time_reaches(tmp_path, monkeypatch):
    """A table of fewer sizes is a table; none is a failure."""
    lane, _ = a_lane(tmp_path)
    path = tmp_path / "tiles.json"

    def run_it(command):
        assert command[1:4] == ["-m", "dqkernels", "tune"] and command[-2:] == ["--out", str(path)]

    monkeypatch.setattr(lane, "call", lambda command, s: (run_it(command), gpu_lane.Done(130, True, "..."))[1])
    assert gpu_lane.stage_tune(lane, 60)["outcome"] == "timed out"
    record.write(record.new("tiles", settings={}, protocol={}, rows=[{"bits": 4}, {"bits": 2}], threads=1), path)
    row = gpu_lane.stage_tune(lane, 60)
    assert (row["outcome"], row["sizes"]) == ("passed", 2) and row["reason"].startswith("2 sizes in the time")
    monkeypatch.setattr(lane, "call", lambda command, s: gpu_lane.Done(1, False, "no room"))
    assert gpu_lane.stage_tune(lane, 60)["outcome"] == "failed"


def test_worth_comes_first_and_every_stage_can_be_reached():
    assert NAMES[:4] == ["build", "cpu checks", "gpu tokens", "gpu tests"] and NAMES[-1] == "device-independent tests"
    benches = [name.removeprefix("bench ") for name in NAMES if name.startswith("bench ")]
    assert benches[:3] == ["generate", "generate_memory", "gemm"], "what users get comes first"
    assert benches[3:] == ["linear", "kernels", "train_step", "generate_layers"]
    assert NAMES[NAMES.index("bench generate") - 1] == f"sanitizer {gpu_lane.SANITIZERS[0]}"
    assert NAMES[NAMES.index("tune") - 1] == f"sanitizer {gpu_lane.SANITIZERS[-1]}"
    assert all(stage.least_s <= stage.most_s for stage in gpu_lane.stages())
