"""What a record says of the machine: load, clocks and throttling, with a stand-in for nvidia-smi."""

from __future__ import annotations

import copy
import json
import os
import stat

import pytest
import torch

from dqkernels.bench import generate, plot, protocol, record, words

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CLOCKS = "1980, 2619, 312.50, 700.00"


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A program that answers as nvidia-smi does: with a field nobody knows it refuses the whole query."""

    def make(**known: str) -> None:
        lines = [f'    *--query-gpu={field}) echo "{answer}"; exit 0;;' for field, answer in known.items()]
        cases = "\n".join(["#!/bin/sh", 'case "$1 " in', *(line.replace(") echo", "\\ ) echo") for line in lines)])
        path = tmp_path / "nvidia-smi"
        path.write_text(f"{cases}\nesac\necho 'Field is not a valid field to query.'; exit 2\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


def fields(reasons: str, name: str = "clocks_event_reasons.active") -> dict[str, str]:
    return {"clocks.sm,clocks.mem,power.draw,power.limit": CLOCKS, name: reasons}


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        ("0x0000000000000000", []),
        ("0x0000000000000001", ["gpu_idle"]),
        ("0x0000000000000004", ["sw_power_cap"]),
        ("0x0000000000000068", ["hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown"]),
        ("0x0000000000000280", ["hw_power_brake_slowdown", "0x200"]),
    ],
)
@pytest.mark.parametrize("field", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_reasons_are_recorded_by_name(card, field, mask, reasons):
    """By the name a new driver has for them and by that of an old one; a bit of a later NVML stays a bit."""
    card(**fields(mask, field))
    found = protocol.state(CUDA)
    assert found["throttle_reasons"] == reasons
    assert (found["sm_clock_mhz"], found["power_watts"]) == (1980.0, 312.5), "beside what was there"
    settings = {"timer": "x", "before": found, "after": found}
    assert record.new("linear", settings={}, protocol=settings, rows=[])["protocol"]["before"] == found


@pytest.mark.parametrize("answer", ["[Not Supported]", "[N/A]", ""])
def test_a_card_that_does_not_say_has_none(card, answer):
    card(**fields(answer))
    found = protocol.state(CUDA)
    assert found["throttle_reasons"] is None and found["sm_clock_mhz"] == 1980.0


def test_without_nvidia_smi_and_on_a_cpu(card, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert protocol.state(CUDA)["throttle_reasons"] is None
    monkeypatch.undo()
    card(**fields("0x4"))
    assert protocol.state(CPU)["throttle_reasons"] is None, "somebody's GPU is not asked about a run on the CPU"


def state(load: float | None = 0.0, reasons: list[str] | None = None) -> dict:
    return {"load_fraction": load, "throttle_reasons": reasons}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (state(), state(), None),
        (state(reasons=["gpu_idle"]), state(reasons=["applications_clocks_setting", "sync_boost"]), None),
        ({"load_fraction": 0.1}, {}, None),
        (state(), state(reasons=["sw_power_cap"]), "The GPU was throttled (sw_power_cap): do not quote these times."),
        (
            state(0.5, ["hw_slowdown"]),
            state(0.9, ["gpu_idle", "hw_slowdown", "sw_power_cap"]),
            "The machine was busy before the run (load 0.50 per core), and the GPU was throttled (hw_slowdown, "
            "sw_power_cap): do not quote these times.",
        ),
        (state(0.5), state(), "The machine was busy before the run (load 0.50 per core): do not quote these times."),
    ],
)
def test_a_throttled_run_is_not_to_be_quoted(before, after, sentence):
    """An idle card and clocks that somebody set slow nothing down; a record from before they were kept says nothing."""
    assert words.busy_words({"before": before, "after": after}) == sentence


def test_pictures_say_it_too(tmp_path):
    made = json.loads((record._ROOT / "benchmarks" / "results" / "gemm-h200.json").read_text())
    assert "throttled" not in plot.Loaded("a", "a.json", "gemm", made, made["environment"]).footer
    made = copy.deepcopy(made)
    made["protocol"]["after"]["throttle_reasons"] = ["sw_thermal_slowdown"]
    footer = plot.Loaded("a", "a.json", "gemm", made, made["environment"]).footer
    assert "the GPU was throttled (sw_thermal_slowdown)" in footer
    made["protocol"]["after"]["throttle_reasons"] = 5
    assert "throttled" not in plot.Loaded("a", "a.json", "gemm", made, made["environment"]).footer


def test_a_run_that_goes_on_keeps_why_the_first_was_throttled():
    def run(before, after):
        return {"budget_s": 1.0, "before": state(0.1, before), "after": state(0.1, after)}

    made = run([], None)
    generate._go_on(made, run(["gpu_idle"], ["sw_power_cap"]), measures=True)
    assert made["before"]["throttle_reasons"] == ["gpu_idle", "sw_power_cap"] and words.slowed_by(made)
    made = run(None, None)
    generate._go_on(made, run(None, None), measures=True)
    assert made["before"]["throttle_reasons"] is None
