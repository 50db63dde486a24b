"""The GPU lane: everything that needs a card, in order of worth, within a few minutes, from a bare checkout.

    python benchmarks/gpu_lane.py --minutes 8 --out DIR

Builds the extension in place for this card, runs the GPU tests, the sanitizers on a small grid, and the
benchmarks. Each stage is a process with a time limit of its own. Results stand in DIR/gpu_lane.json after
every stage, output in DIR/gpu_lane.log; run again with the same DIR to go on where time ran out. The last
line of stdout is the summary; a lane that ran no GPU test ends with `GPU: not run`. Needs Python and torch;
whatever else is missing is named. One file, long as it is: it runs where nothing of the package imports yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENS = "tests/test_gpu_decode.py"  # whole models: both decode loops write the same tokens
GRID = ROOT / "tests" / "op_grid.py"  # every op through every backend of the device, compared with eager on the CPU
CPU_CHECKS = ROOT / "tests" / "cpu_checks.py"
#: Outcomes that a later run with the same --out does not repeat.
SETTLED = ("passed", "failed", "absent")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TAIL_LINES = 12
_GRACE_S = 15


def load_record_module():
    """dqkernels/bench/record.py by its path: the lane must report even where the package does not import."""
    spec = importlib.util.spec_from_file_location("dqk_record", ROOT / "dqkernels" / "bench" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record = load_record_module()


@dataclass
class Done:
    """How a stage's process ended, and what it printed."""

    code: int
    timed_out: bool
    output: str

    @property
    def tail(self) -> str:
        return "\n".join(self.output.strip().splitlines()[-TAIL_LINES:])


@dataclass
class Lane:
    """What stages share: the folders, the time left, the facts of the machine."""

    out: Path
    scratch: Path
    deadline: float
    environment: dict | None = None
    head: list[dict] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    figures: dict[str, dict] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    def left(self) -> float:
        return self.deadline - self.clock()

    def call(self, command: list[str], seconds: float, **variables: str) -> Done:
        """Runs a command in the checkout; its output goes to the log.

        Interrupted first, killed if that is not enough: an interrupted pytest still writes what it has seen.
        """
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(ROOT) + (os.pathsep + others if others else "")
        with open(self.out / "gpu_lane.log", "a+", encoding="utf-8", errors="replace") as log:
            log.write(f"\n=== {' '.join(command)}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            timed_out = False
            try:
                process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                timed_out = True
                for kind, grace in ((signal.SIGINT, _GRACE_S), (signal.SIGKILL, None)):
                    try:
                        os.killpg(process.pid, kind)
                        process.wait(timeout=grace)
                    except ProcessLookupError:
                        process.wait()
                    except subprocess.TimeoutExpired:
                        continue
                    break
            log.seek(start)
            return Done(process.returncode, timed_out, log.read())


@dataclass(frozen=True)
class Stage:
    """One step. `least_s`: not started with less time than that; `most_s`: its share of an 8-minute lane."""

    name: str
    run: Callable[[Lane, float], dict]
    least_s: float
    most_s: float
    #: False when an earlier run's result no longer holds on this machine.
    holds: Callable[[], bool] = lambda: True


def ended(done: Done, **more) -> dict:
    """The row of a process: passed, failed or timed out, with the end of its output unless it passed."""
    outcome = "timed out" if done.timed_out else "passed" if done.code == 0 else "failed"
    row = {"outcome": outcome, "reason": None if outcome == "passed" else f"exit code {done.code}", **more}
    return row if row["outcome"] == "passed" else {"tail": done.tail, **row}


def absent(reason: str) -> dict:
    return {"outcome": "absent", "reason": reason}


# ------------------------------------------------------------------------------------------- stages


def stage_environment(lane: Lane, seconds: float) -> dict:
    """Versions, card, tools. A process of its own: a driver that hangs must not hang the lane."""
    done = lane.call([sys.executable, __file__, "--environment"], seconds)
    lines = [line for line in done.output.splitlines() if line.startswith('{"environment"')]
    if done.code != 0 or not lines:
        return ended(done, outcome="failed" if not done.timed_out else "timed out")
    found = json.loads(lines[-1])
    lane.environment, lane.facts = found["environment"], found["facts"]
    return ended(done, **found["facts"])


def print_environment() -> None:
    facts: dict = {"compute_capability": None, "gpu_memory_mb": None, "why_no_gpu": None}
    try:
        import torch

        if torch.cuda.is_available():
            facts["compute_capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
            facts["gpu_memory_mb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e6, 1)
        elif torch.version.cuda is None:
            facts["why_no_gpu"] = f"torch {torch.__version__} is built without CUDA"
        else:
            facts["why_no_gpu"] = "torch.cuda.is_available() is False"
    except ImportError as error:
        facts["why_no_gpu"] = f"torch does not import: {error}"
    for tool in ("nvcc", "ncu", "compute-sanitizer", "cmake", "ninja"):
        facts[tool.replace("-", "_")] = _tool(tool) is not None
    for module in ("pytest", "pybind11", "hypothesis", "rich", "jsonschema", "transformers"):
        facts[f"has_{module}"] = importlib.util.find_spec(module) is not None
    facts = {key: record.scrub(value) if isinstance(value, str) else value for key, value in facts.items()}
    print(json.dumps({"environment": record.environment(), "facts": facts}))


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def stage_build(lane: Lane, seconds: float) -> dict:
    """The extension, in place, for this card: setup.py asks nvidia-smi which one that is."""
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    attempts = ([sys.executable, "setup.py", "build_ext", "--inplace"], pip)
    end, reasons = lane.clock() + seconds, []
    for command in attempts:
        done = lane.call(command, end - lane.clock(), DQKERNELS_BUILD="auto")
        info = built()
        if done.code == 0 and info is not None and info.get("cuda"):
            return ended(done, archs=info["archs"], nvcc_version=info["nvcc"], command=" ".join(command[1:4]))
        reasons += (info or {}).get("reasons") or [f"{' '.join(command[1:3])}: exit code {done.code}"]
        if done.timed_out or done.code == 0:
            break  # it ran to its end and left CUDA out for a reason that pip cannot change
    row = ended(done, tail=done.tail)
    no_compiler = not lane.facts.get("nvcc")
    row.update(outcome="absent" if no_compiler else row["outcome"] if done.timed_out else "failed")
    row["reason"] = "no nvcc on this machine" if no_compiler else "; ".join(reasons)
    return row


def built() -> dict | None:
    """What setup.py wrote beside the extension; None unless one for this very Python is there too."""
    path = ROOT / "dqkernels" / "_build_info.json"
    extension = path.with_name("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    both = path.is_file() and extension.is_file()
    return json.loads(path.read_text(encoding="utf-8")) if both else None


def pytest_stage(*arguments: str) -> Callable[[Lane, float], dict]:
    """pytest with the counts of its junit report. Nothing selected is `absent`, not `passed`."""

    def run(lane: Lane, seconds: float) -> dict:
        if importlib.util.find_spec("pytest") is None:
            return absent("pytest is not installed")
        report = lane.scratch / "junit.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = lane.call([*command, *workers(), *arguments], seconds)
        counts = junit_counts(report)
        row = ended(done, **counts)
        if done.code == 5 or (done.code == 0 and counts["tests"] == counts["skipped"]):
            row.update(outcome="absent", reason="no test was selected, or every one was skipped")
        elif row["outcome"] == "failed" and counts["tests"]:
            row["reason"] = f"{counts['failures']} failures, {counts['errors']} errors"
        return row

    return run


def workers() -> list[str]:
    """pytest's arguments for several processes: GPU tests mostly wait for compilers, which run on the CPU's cores."""
    cores = os.cpu_count() or 1
    if cores < 4 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(cores // 2, 8)), "--dist", "worksteal"]


def junit_counts(report: Path) -> dict:
    """Tests, failures, errors, skips and their reasons; zeros where pytest wrote no report."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "skip_reasons": []}
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return counts
    for key in ("tests", "failures", "errors", "skipped"):
        counts[key] = sum(int(suite.get(key, 0)) for suite in suites)
    reasons = Counter(skip.get("message", "") for suite in suites for skip in suite.iter("skipped"))
    counts["skip_reasons"] = [f"{count} x {reason}" for reason, count in reasons.most_common()]
    return counts


def stage_cpu(lane: Lane, seconds: float) -> dict:
    """The compiled core's check programs with every instruction set of this host: machines with cards have VNNI and
    AMX, which others lack. The best set first, so that time runs out on what is run elsewhere."""
    command = [sys.executable, str(CPU_CHECKS), "--seconds", f"{max(1.0, seconds - 5):.0f}"]
    done = lane.call(command, seconds, OMP_NUM_THREADS="2")
    lines = [line for line in done.output.splitlines() if line.startswith('{"cpu_isas"')]
    if not lines:
        absent_core = "no compiled core" in done.output
        return absent("the core was not built") if absent_core else ended(done)
    found = json.loads(lines[-1])
    row = ended(done, cpu_isas=found["cpu_isas"], runs=found["runs"], failures=len(found["failed"]))
    if found["failed"] or found["other_bits"]:
        other = [f"{found['other_bits']} programs with other bits"] if found["other_bits"] else []
        row["reason"] = "; ".join([*found["failed"], *other])
    elif found["unfinished"]:
        row.update(outcome="timed out", reason=f"not finished: {', '.join(found['unfinished'])}")
    return row


def stage_primitives(lane: Lane, seconds: float) -> dict:
    """tests/cuda/*.cu: programs that check one primitive each; built for this card, exit code 0 is a pass."""
    programs = sorted((ROOT / "tests" / "cuda").glob("*.cu"))
    if not programs:
        return absent("there are no programs in tests/cuda")
    if _tool("nvcc") is None:
        return absent("no nvcc on this machine")
    end = lane.clock() + seconds
    capability = lane.facts["compute_capability"]
    arch = "90a" if capability == "9.0" else capability.replace(".", "")
    flags = [f"-arch=sm_{arch}", "-std=c++17", "-fmad=false"]
    flags += [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}"]
    for index, source in enumerate(programs):
        binary = lane.scratch / source.stem
        done = lane.call([_tool("nvcc"), *flags, "-o", str(binary), str(source)], end - lane.clock())
        if done.code == 0:
            done = lane.call([str(binary)], end - lane.clock())
        if done.code != 0:
            return ended(done, tests=index + 1, failures=1, reason=f"{source.name}: exit code {done.code}")
    return ended(done, tests=len(programs), failures=0)


def grid_row(done: Done, **more) -> dict:
    """The row of a run of GRID: absent where nothing of ours takes CUDA tensors."""
    cases = re.search(r"grid: (\d+) cases", done.output)
    row = ended(done, cases=int(cases.group(1)) if cases else 0, **more)
    if row["outcome"] == "passed" and row["cases"] == 0:
        row.update(outcome="absent", reason="no kernel of ours takes CUDA tensors here")
    return row


def stage_grid(lane: Lane, seconds: float) -> dict:
    """Every op, tiny and odd, against eager. The sanitizers then find the kernels compiled."""
    return grid_row(lane.call([sys.executable, str(GRID)], seconds))


def sanitizer_stage(tool: str) -> Callable[[Lane, float], dict]:
    """compute-sanitizer on the same calls; no caching allocator: its large blocks would hide overruns."""

    def run(lane: Lane, seconds: float) -> dict:
        sanitizer = _tool("compute-sanitizer")
        if sanitizer is None:
            return absent("no compute-sanitizer on this machine")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        command += ["--target-processes", "all", sys.executable, str(GRID)]
        done = lane.call(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = [int(n) for n in re.findall(r"SUMMARY: (\d+) (?:error|hazard)", done.output)]
        row = grid_row(done, reports=sum(found) if found else None)
        if row["outcome"] == "passed" and (not found or any(found)):
            row.update(outcome="failed", reason=f"{sum(found)} reports" if found else "printed no summary")
            row["tail"] = done.tail
        elif row["outcome"] == "failed" and any(found):
            row["reason"] = f"{sum(found)} reports"
        return row

    return run


def bench_stage(name: str, call: str, share: float, module: str | None = None) -> Callable[[Lane, float], dict]:
    """A benchmark of the package; its rows become rows of the lane's record. `module`: of a sweep, whose record grows
    in the lane's folder: a later run goes on with it, and what was measured before the time was over counts."""
    sweep, module = module is not None, module or name

    def run(lane: Lane, seconds: float) -> dict:
        path = (lane.out if sweep else lane.scratch) / f"{name}.json"
        if not sweep:
            path.unlink(missing_ok=True)
        code = f"from dqkernels.bench import {module}; {module}.{call.format(seconds=round(seconds * share, 1))}"
        done = lane.call([sys.executable, "-c", code.replace("OUT", repr(str(path)))], seconds)
        if (done.code != 0 and not (sweep and done.timed_out)) or not path.is_file():
            return ended(done, **({} if done.code != 0 else {"outcome": "failed", "reason": "wrote no record"}))
        found = record.read(path)
        lane.figures[name] = {key: found[key] for key in ("protocol", "settings", "rows")}
        refused = sum(row["status"] == "refused" and not row.get("foreign") for row in found["rows"])
        row = ended(done, rows=len(found["rows"]), refused=refused)
        if refused:  # another project's version that computes something else is its own affair
            row.update(outcome="failed", reason=f"{refused} candidates did not compute the same function")
        elif missed := sum(row["status"] == "not run" for row in found["rows"]):
            row["reason"] = f"{missed} cells or candidates not run, for want of time"
        return row

    return run


def stage_tune(lane: Lane, seconds: float) -> dict:
    """Tiles of BART's layers into DIR/tiles.json, a table to be used and contributed; as many as time reaches."""
    path = lane.out / "tiles.json"
    tune = ["tune", "--bits", "4,2", "--tokens", "16,64,256,1024,4096", "--seconds", "0.3", "--out", str(path)]
    done = lane.call([sys.executable, "-m", "dqkernels", *tune], seconds)
    sizes = len(record.read(path)["rows"]) if path.is_file() else 0
    row = ended(done, sizes=sizes)
    if done.timed_out and sizes:
        row.update(outcome="passed", reason=f"{sizes} sizes in the time there was; dqkernels tune goes on from there")
    return row


def stages() -> list[Stage]:
    """In order of worth: what users get before the parts it is made of."""
    call = "run(device='cuda', seconds={seconds}, out=OUT)"
    gemm, linear, kernels = (bench_stage(name, call, 0.7) for name in ("gemm", "linear", "kernels"))
    ends = "device='cuda', seconds={seconds}, out=OUT, resume=True)"
    few = f"candidates=('torch', 'static', 'plain', 'ours'), {ends}"  # what the goals are about, and are held against
    memory = bench_stage("generate_memory", f"run(sweep='memory', bits=(4,), {few}", 0.6, "generate")
    layers = bench_stage("generate_layers", f"run(sweep='layers', bits=(4, 2), {few}", 0.6, "generate")
    rest = pytest_stage("-m", "not gpu and not slow", "tests", "--ignore=tests/test_gpu_lane.py")
    return [
        Stage("build", stage_build, 30, 180, holds=lambda: (built() or {}).get("cuda", False)),
        Stage("cpu checks", stage_cpu, 15, 60),
        Stage("gpu tokens", pytest_stage("-m", "gpu", TOKENS), 20, 60),
        Stage("gpu tests", pytest_stage("-m", "gpu", "tests", f"--ignore={TOKENS}"), 20, 220),  # mostly compiling
        Stage("primitives", stage_primitives, 15, 40),
        Stage("op grid", stage_grid, 20, 90),
        Stage("sanitizer memcheck", sanitizer_stage("memcheck"), 20, 45),
        Stage("bench generate", bench_stage("generate", f"run({ends}", 0.6, "generate"), 30, 100),
        Stage("bench generate_memory", memory, 30, 60),
        Stage("bench gemm", gemm, 20, 75),
        Stage("bench linear", linear, 20, 40),
        Stage("bench kernels", kernels, 20, 50),
        Stage("bench train_step", bench_stage("train_step", call, 0.4), 30, 55),
        Stage("bench generate_layers", layers, 30, 60),
        *(Stage(f"sanitizer {tool}", sanitizer_stage(tool), 20, 45) for tool in SANITIZERS if tool != "memcheck"),
        Stage("tune", stage_tune, 45, 60),
        Stage("device-independent tests", rest, 30, 150),
    ]


# --------------------------------------------------------------------------------------------- lane


def run_one(stage: Stage, lane: Lane, minutes: float) -> dict:
    """One stage within its share of the time; a stage that breaks is a row, not the end of the lane."""
    limit = min(stage.most_s * max(1.0, minutes / 8), lane.left())
    start = lane.clock()
    try:
        row = stage.run(lane, limit)
    except Exception as error:
        row = {"outcome": "failed", "reason": f"the lane itself: {type(error).__name__}: {error}"}
    row = {"stage": stage.name, **row, "took_s": round(lane.clock() - start, 1), "limit_s": round(limit, 1)}
    return {key: clean(value) for key, value in row.items()}


def run_stages(plan: list[Stage], lane: Lane, before: dict[str, dict], minutes: float) -> list[dict]:
    """Runs what time allows; `before`: rows of an earlier run. Writes the record after each stage."""
    rows = [{"stage": stage.name, "outcome": "unreached", "reason": "not begun"} for stage in plan]
    for index, stage in enumerate(plan):
        old = before.get(stage.name)
        if old is not None and old["outcome"] in SETTLED and stage.holds():
            rows[index] = {**old, "resumed": True}
        elif lane.left() < stage.least_s:
            reason = f"{max(0.0, lane.left()):.0f} s left, it needs {stage.least_s:.0f}"
            rows[index] = {"stage": stage.name, "outcome": "unreached", "reason": reason}
        else:
            rows[index] = run_one(stage, lane, minutes)
            write(lane, rows, minutes)
        row = rows[index]
        words = [row["outcome"], "in an earlier run" if row.get("resumed") else "", row["reason"] or ""]
        print(f"{stage.name}: {', '.join(word for word in words if word)}", flush=True)
    return rows


def clean(value):
    """No path of this machine in a record."""
    if isinstance(value, str):
        return record.scrub(value)
    return [clean(item) for item in value] if isinstance(value, list) else value


def write(lane: Lane, rows: list[dict], minutes: float) -> None:
    """DIR/gpu_lane.json: stages, then the rows of the benchmarks. It is the state to resume from as well."""
    figures = [{"stage": f"bench {n}", **row} for n, f in lane.figures.items() for row in f["rows"]]
    made = record.new(
        "gpu_lane",
        settings={"lane_s": round(60 * minutes, 1), **{n: f["settings"] for n, f in lane.figures.items()}},
        protocol={n: f["protocol"] for n, f in lane.figures.items()},
        rows=[*lane.head, *rows, *figures],
    )
    made["environment"] = lane.environment or made["environment"]
    record.write(made, lane.out / "gpu_lane.json")


def read_old(out: Path) -> dict | None:
    """The record of an earlier run with this --out, or None."""
    try:
        return record.read(out / "gpu_lane.json")
    except (OSError, record.RecordError):
        return None


def earlier(lane: Lane, old: dict | None) -> dict[str, dict]:
    """Rows of an earlier run, if it saw the same card, the same sources and the same versions."""
    if old is None:
        return {}
    same = ("gpu", "source_sha256", "torch", "triton", "python")
    if any(old["environment"][key] != (lane.environment or {}).get(key) for key in same):
        return {}
    for name in old["protocol"]:
        rows = [row for row in old["rows"] if row["stage"] == f"bench {name}" and "outcome" not in row]
        rows = [{key: value for key, value in row.items() if key != "stage"} for row in rows]
        lane.figures[name] = {"protocol": old["protocol"][name], "settings": old["settings"][name], "rows": rows}
    return {row["stage"]: row for row in old["rows"] if "outcome" in row}


def summary(rows: list[dict]) -> str:
    """The last line. Without one executed GPU test it says so and nothing else."""
    counted = [row for row in rows if row["stage"] in ("gpu tokens", "gpu tests")]
    tests, failures, errors, skipped = (
        sum(row.get(key, 0) for row in counted) for key in ("tests", "failures", "errors", "skipped")
    )
    ran, bad = tests - skipped, failures + errors
    if ran <= 0:
        return "GPU: not run"
    parts = [f"{ran - bad} tests passed, {bad} failed, {skipped} skipped"]
    for outcome in ("failed", "timed out", "absent", "unreached"):
        names = [row["stage"] for row in rows if row["outcome"] == outcome]
        parts += [f"{outcome}: {', '.join(names)}"] if names else []
    return "GPU: " + "; ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path("gpu_lane_out"))
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run in --out has done")
    parser.add_argument("--require-gpu", "--require_gpu", action="store_true", help="exit 1 without a GPU")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)  # a process of the lane's own
    given = parser.parse_args(argv)
    if given.environment:
        print_environment()
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    old = None if given.fresh else read_old(given.out)
    with tempfile.TemporaryDirectory(prefix="gpu-lane-") as scratch:
        lane = Lane(given.out.resolve(), Path(scratch), time.monotonic() + 60 * given.minutes)
        lane.head = [run_one(Stage("environment", stage_environment, 0, 60), lane, given.minutes)]
        plan = stages()
        no_gpu = (lane.environment or {}).get("gpu") is None
        if no_gpu:
            reason = f"no GPU: {lane.facts.get('why_no_gpu') or lane.head[0]['reason']}"
            rows = [{"stage": stage.name, "outcome": "unreached", "reason": reason} for stage in plan]
            print(f"{reason}; unreached: {', '.join(stage.name for stage in plan)}")
        else:
            before = earlier(lane, old)
            for path in [] if before else lane.out.glob("generate*.json"):
                path.unlink()  # of another machine, or of other sources
            rows = run_stages(plan, lane, before, given.minutes)
        write(lane, rows, given.minutes)
    for row in rows:
        for reason in row.get("skip_reasons", ()):
            print(f"skipped in {row['stage']}: {reason}")
    print(summary(rows))
    if lane.head[0]["outcome"] != "passed" or (no_gpu and given.require_gpu):
        return 1
    return 1 if any(row["outcome"] in ("failed", "timed out") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
