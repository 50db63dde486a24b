"""`dqkernels bench compare`: a planted slowdown is named, a rerun is not, and nothing is compared that is not alike."""

from __future__ import annotations

import copy
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqkernels.bench import compare, protocol, record, schemas
from dqkernels.cli import main

CANDIDATES = {"torch fp32": 100.0, "dqkernels W8 cpu": 40.0, "dqkernels W4 cpu": 30.0}
GROUPS = [(m, n, k, cache) for m in (1, 16) for n, k in ((768, 768), (3072, 768)) for cache in ("cold", "warm")]


def run(seed: int, slower: dict[str, float] | None = None, drift: float = 1.0, n: int = 60, spread: float = 0.06):
    """A record as `bench linear` writes it, of samples with a long tail. slower: factors by candidate."""
    draw = random.Random(seed)
    rows = []
    for m, n_out, k, cache in GROUPS:
        for name, time_us in CANDIDATES.items():
            center = time_us * m**0.5 * drift * (slower or {}).get(name, 1.0)
            samples = [center * (1 + abs(draw.gauss(0, spread)) + 0.02 * draw.random()) * 1e-6 for _ in range(n)]
            rows.append(
                {
                    "tokens": m, "out_features": n_out, "in_features": k, "dtype": "fp32", "candidate": name,
                    "bits": 32 if "torch" in name else int(name.split("W")[1][0]), "cache": cache, "kernel": "x",
                    "backend": None, "weights_bytes": 1000 * len(name), "status": "timed", "reason": None,
                    **protocol.Stats.of(samples).row("us"),
                }
            )  # fmt: skip
    return record.new("linear", settings={}, protocol={}, rows=rows, threads=2)


def moved(result: dict) -> set[str]:
    return {row["label"] for row in result["rows"] if row["verdict"] != "same" and row["what"] == "time"}


def test_a_rerun_is_silent_and_ten_percent_are_named():
    """Whatever the machine's own speed did in between, by a factor that all candidates share. By chance one row of 240
    may be named: its samples are drawn."""
    named_by_chance = 0
    for seed in range(10):
        before, slower = run(seed), run(seed + 200, {"dqkernels W4 cpu": 1.1}, drift=0.8)
        again = compare.compare(before, run(seed + 100, drift=1.4))
        slow = compare.compare(before, slower)
        named = {label for label in moved(slow) if "W4" in label}
        assert len(named) == len(GROUPS) and slow["losses"] >= len(GROUPS)
        named_by_chance += len(moved(again)) + len(moved(slow) - named)
        back = compare.compare(slower, before)
        assert sum(row["verdict"] == "faster" for row in back["rows"]) >= len(GROUPS)
    assert named_by_chance <= 1


def test_noise_hides_what_it_could_have_made():
    """Few samples far apart: ten percent are nothing, twice the time is something."""
    before = run(0, n=4, spread=0.5)
    silent = compare.compare(before, run(1, {"dqkernels W4 cpu": 1.1}, n=4, spread=0.5))
    assert not moved(silent)
    times = 2 * len(GROUPS)
    # And says so: without a word, "0 past the threshold" would read as if nothing could have been lost.
    assert silent["warnings"][0].startswith(f"{times} of {times} times have more noise (up to ")
    assert "than the threshold of 5%: a loss of that size would not be seen" in silent["warnings"][0]
    assert not compare.compare(run(0, spread=0.02), run(1, spread=0.02))["warnings"]
    assert moved(compare.compare(before, run(1, {"dqkernels W4 cpu": 8.0}, n=4, spread=0.5)))


def test_the_threshold_is_of_losses_alone():
    before, after = run(0), run(1, {"dqkernels W4 cpu": 1.1})
    found = compare.compare(before, after, threshold=0.3)
    assert found["losses"] == 0 and len(moved(found)) == len(GROUPS)


def test_a_yardstick_is_no_loss_and_says_what_the_machine_did():
    """Torch alone twice as slow: then everything else is faster beside it, and its own time is told."""
    found = compare.compare(run(0), run(1, drift=2.0))
    assert found["losses"] == 0 and "went by a factor of 2.0" in found["warnings"][0]
    yardsticks = [row for row in found["rows"] if row["what"] == "yardstick"]
    assert len(yardsticks) == len(GROUPS) and {row["verdict"] for row in yardsticks} == {"slower"}


def test_without_a_yardstick_times_stand_for_themselves():
    before, after = run(0), run(1, drift=1.5)
    for each in (before, after):
        each["rows"] = [row for row in each["rows"] if "torch" not in row["candidate"]]
    found = compare.compare(before, after)
    assert found["losses"] == 2 * len(GROUPS) and "16 times stand for themselves" in found["warnings"][0]
    named = compare.compare(before, after, against="dqkernels W8 cpu")
    assert named["losses"] == 0 and {row["against"] for row in named["rows"]} == {None, "dqkernels W8 cpu"}
    with pytest.raises(compare.CompareError, match="against must be a candidate of both records, got 'torch fp32'"):
        compare.compare(before, after, against="torch fp32")


def test_what_was_timed_and_fails_now_is_a_loss():
    before, after = run(0), run(1)
    gone = after["rows"][1]
    for key in [key for key in gone if key.endswith("_us")]:
        del gone[key]
    gone.update(status="refused", reason="not bit-equal")
    found = compare.compare(before, after)
    (lost,) = [row for row in found["rows"] if row["verdict"] == "lost"]
    assert found["losses"] == 1 and lost["reason"] == "refused: not bit-equal" and "W8" in lost["label"]
    gone["status"] = "too slow"
    assert compare.compare(before, after)["losses"] == 1
    gone["status"] = "not reached"
    found = compare.compare(before, after)
    assert found["losses"] == 0 and found["not_timed"] == []  # its bytes are still compared
    assert not [row for row in found["rows"] if row["label"] == lost["label"] and row["what"] == "time"]


def test_bytes_are_exact():
    before, after = run(0), run(1)
    after["rows"][2]["weights_bytes"] += 1000
    found = compare.compare(before, after)
    (larger,) = [row for row in found["rows"] if row["verdict"] == "larger"]
    assert larger["what"] == "weights_bytes" and found["losses"] == 1
    after["rows"][2]["weights_bytes"] = before["rows"][2]["weights_bytes"] + 1
    assert compare.compare(before, after)["losses"] == 0, "told, but below the threshold"


def test_peaks_of_memory_have_moods():
    """Of a few percent, and of a page or two of a small model; an allocation more is something else."""
    for old, new, losses in ((255_000, 304_000, 0), (90e6, 91.5e6, 0), (90e6, 97e6, 1)):
        before, after = run(0), run(0)
        before["rows"][1]["peak_bytes"], after["rows"][1]["peak_bytes"] = old, new
        assert compare.compare(before, after)["losses"] == losses, (old, new)


def test_rows_of_one_record_alone_are_named():
    before, after = run(0), run(1)
    del after["rows"][-1]
    found = compare.compare(before, after)
    assert found["only_before"] == ["16x3072x768 warm, dqkernels W4 cpu"] and found["only_after"] == []


def test_what_is_not_alike_is_refused():
    before, after = run(0), run(1)
    other = {**copy.deepcopy(after), "kind": "gemm"}
    with pytest.raises(compare.CompareError, match="records of one kind can be compared, got 'linear' and 'gemm'"):
        compare.compare(before, other)
    with pytest.raises(compare.CompareError, match="threshold must be a share between 0 and 1, got 5"):
        compare.compare(before, after, threshold=5)
    for row in after["rows"]:
        row["tokens"] += 1
    with pytest.raises(compare.CompareError, match="no row is in both records"):
        compare.compare(before, after)
    before["rows"].append(before["rows"][0])
    with pytest.raises(compare.CompareError, match="the first record has two rows of 1x768x768"):
        compare.compare(before, run(1))


def test_another_machine_is_said():
    before, after = run(0), run(1)
    after["environment"]["cpu_model"] = "another"
    assert compare.compare(before, after)["warnings"][0].endswith("before, another after")


@given(st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_the_ratio_is_of_ratios(ours, theirs):
    """Exact where the samples are: one number each."""
    before = run(0, n=1, spread=0)
    after = copy.deepcopy(before)
    for row in after["rows"]:
        factor = theirs if "torch" in row["candidate"] else ours
        for key in [key for key in row if key.endswith("_us")]:
            row[key] *= factor
    for row in compare.compare(before, after)["rows"]:
        if row["what"] == "time":
            assert row["ratio"] == pytest.approx(theirs / ours, rel=1e-3)


def test_every_committed_record_compares_with_itself():
    """Of every benchmark there is: same, and all that was timed is compared."""
    folder = record._ROOT / "benchmarks" / "results"
    seen = set()
    for path in sorted(folder.glob("*.json")):
        kind, found = schemas.read(path)
        if kind != "record":
            continue  # the demo and the evidence hold texts and scores
        if found["kind"] in ("gpu_lane", "quality", "agreement"):
            continue  # no rows of times
        result = compare.compare(found, found)
        assert {row["verdict"] for row in result["rows"]} == {"same"} and result["losses"] == 0, path.name
        # The memory of `bench cpu` is no time.
        timed = [row for row in found["rows"] if row.get("status") == "timed" and row.get("part") != "memory"]
        assert sum(row["what"] in ("time", "yardstick") for row in result["rows"]) == len(timed), path.name
        seen.add(found["kind"])
    assert {"linear", "gemm", "training", "size"} <= seen


def test_the_verb(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    paths = [str(tmp_path / name) for name in ("before.json", "same.json", "slow.json")]
    for path, found in zip(paths, (run(0), run(1), run(2, {"dqkernels W8 cpu": 1.25})), strict=True):
        record.write(found, path)
    assert main(["bench", "compare", *paths[:2]]) == 0
    assert "0 past the threshold of 5%" in capsys.readouterr().out
    assert main(["bench", "compare", paths[0], paths[2]]) == 1
    screen = capsys.readouterr()
    assert "8 of 48 figures lost more than 5%" in screen.err and screen.out.count("slower !") == 8
    assert max(map(len, screen.out.splitlines())) <= 80
    assert main(["bench", "compare", paths[0], paths[2], "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["losses"] == 8


def test_a_file_that_is_not_there_is_named_by_its_argument(tmp_path, capsys):
    there, absent = str(tmp_path / "there.json"), str(tmp_path / "absent.json")
    record.write(run(0), there)
    for paths, name, what in (
        ((absent, there), "before", f"{absent!r} is not there"),
        ((there, absent), "after", f"{absent!r} is not there"),
        ((there, str(tmp_path)), "after", f"{str(tmp_path)!r} is a folder"),
    ):
        assert main(["bench", "compare", *paths]) == 2
        error = capsys.readouterr().err
        assert f"{name} must be a record of dqkernels bench, {what}" in error and "Errno" not in error
