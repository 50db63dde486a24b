"""bench/tune_cuda.py without a GPU: the stand-ins of test_tune.py, and kernels that compute on the CPU."""

from __future__ import annotations

import functools
import json
import types

import pytest
import torch
from test_tune import CELLS, gpu  # noqa: F401 - a fixture

from dqkernels import ops, packing, qmath, reference
from dqkernels.bench import protocol, race, record, tune, tune_cuda
from dqkernels.cli import main
from dqkernels.kernels import measured, native, plans, skinny, tiles

BOTH = tune.cells([(1024, 1024)], [1, 4, 64, 1024], [4], [-1], ("triton", "cuda"))
PLAN = plans.Plan(2, 4)


@pytest.fixture
def machine(gpu, monkeypatch):  # noqa: F811
    """The H200 of test_tune.py; `seen` are the plans' cells and the tile that they were compared with."""
    seen = []

    def measure(cell, device, seconds, tile, against_triton):
        seen.append((cell, tile, against_triton))
        loses = against_triton and cell.m > 16
        return {"kernel": "cuda", **cell._asdict(), **PLAN._asdict(), "median_us": 4.5, "rule_us": 5.5,
                "is_rule": False, "candidates": 9, "refused": [], "mismatched": [], "triton_us": 4.0 if loses else None,
                "faster": "triton" if loses else "cuda"}  # fmt: skip

    monkeypatch.setattr(tune_cuda, "measure", measure)
    return types.SimpleNamespace(seen=seen, tiles=gpu)


def test_cells():
    """An entry each: one row, up to 8, 16, 32, 64; float rows up to 16. Tiles come first, for plans to compare with."""
    found = tune_cuda.cells([(1024, 1024)], [1, 4, 8, 16, 17, 64, 65], [4], [-1])
    assert [(cell.input, cell.m) for cell in found] == [
        ("float", 1), ("int8", 1), ("float", 4), ("int8", 4), ("float", 16), ("int8", 16), ("int8", 17), ("int8", 64),
    ]  # fmt: skip
    kinds = [type(cell).__name__ for cell in tune.cells([(64, 64), (512, 64)], [1, 64], [4], [-1], ("cuda", "triton"))]
    assert kinds == (["Cell"] * 2 + ["PlanCell"] * 3) * 2
    assert tune.cells([(64, 64)], [1], [8, 4], [64], ("cuda",)) == [
        (4, 64, "float", 1, 64, 64), (4, 64, "int8", 1, 64, 64),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at most 64 tokens, got \\[65\\]"):
        tune.cells([(64, 64)], [65], [8], [-1], ("cuda",))
    with pytest.raises(ValueError, match="groups are for 2 and 4 bits"):
        tune.cells([(64, 64)], [1], [8], [64], ("cuda",))


def test_what_is_measured_is_what_is_taken(machine):
    layer = ("cuda", 4, -1, "per_token", "auto", False, False, (0, 64, 1024, 1024))
    assert tune.backends.choose("qgemm", "cuda").backend == "cuda"
    assert "on an H200" in ops.choose_qlinear(*layer)[0].reason
    found = tune.run(BOTH)
    assert "measured faster at up to 64" in ops.choose_qlinear(*layer)[0].reason, "what was chosen before is forgotten"
    path = measured.user_file("NVIDIA H200")
    assert record.read(path) == found and len(found["rows"]) == 3 + 5
    assert found["settings"]["cuda_kernels"] == measured.cuda_kernels()
    table = measured.read(path)
    assert len(table.entries) == 3 and set(table.plans.values()) == {PLAN} and len(table.plans) == 5
    assert measured.plan(1, 1024, 1024, 4, -1, "float", 0) == PLAN
    assert "measured" in measured.triton_is_faster(40, 1024, 1024, 4, -1, 0)
    assert "on an H200" in measured.triton_is_faster(20, 1024, 1024, 4, -1, 0), "of these rows nothing is known"
    # Compared with the tile that the same run had just found for these sizes.
    tile = (tiles.candidates("sm90", 4)[-1], 1)
    assert [(cell.m, cell.input) for cell, *_ in machine.seen] == [
        (1, "float"), (1, "int8"), (4, "float"), (4, "int8"), (64, "int8"),
    ]  # fmt: skip
    assert {given[1:] for given in machine.seen} == {(tile, True)}


def test_an_interrupted_run_goes_on_and_fresh_is_per_backend(machine, monkeypatch, tmp_path):
    whole, out = tune_cuda.measure, tmp_path / "h200.json"

    def interrupted(*given):
        if len(machine.seen) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(tune_cuda, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.run(BOTH, out=out)
    assert len(record.read(out)["rows"]) == 3 + 2
    monkeypatch.setattr(tune_cuda, "measure", whole)
    tune.run(BOTH, out=out)
    assert len(machine.seen) == 5 and len(machine.tiles) == 3 and len(record.read(out)["rows"]) == 8
    only = [cell for cell in BOTH if isinstance(cell, tune_cuda.PlanCell)]
    tune.run(only[:1], out=out, fresh=True)
    assert len(machine.seen) == 6 and len(record.read(out)["rows"]) == 3 + 1, "the tiles were not asked for"
    tune.run(BOTH[:1], out=out, fresh=True)
    assert len(machine.tiles) == 4 and len(record.read(out)["rows"]) == 1 + 1, "nor were the plans"


def test_rows_that_no_longer_hold_are_not_mixed_in(machine, monkeypatch, tmp_path):
    """Plans of other kernels, and comparisons with another Triton; plans alone do not care for Triton."""
    out, only = tmp_path / "h200.json", [cell for cell in BOTH if isinstance(cell, tune_cuda.PlanCell)]
    tune.run(only[:4], out=out)
    facts = record.environment()
    monkeypatch.setattr(record, "environment", lambda threads=None: {**facts, "triton": "3.9.0"})
    tune.run(only, out=out)
    assert len(machine.seen) == 5 and record.read(out)["rows"][-1]["triton_us"] == 4.0
    monkeypatch.setattr(record, "environment", lambda threads=None: {**facts, "triton": "3.10.0"})
    with pytest.raises(ValueError, match="with Triton 3.9.0 with the CUDA kernels of .*, this is .*Triton 3.10.0"):
        tune.run(only, out=out)
    monkeypatch.setattr(record, "environment", lambda threads=None: {**facts, "triton": "3.9.0"})
    tune.run(only, out=out)
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    with pytest.raises(
        ValueError, match="with the CUDA kernels of .*, this is .* \\(interface 99\\): give another file"
    ):
        tune.run(BOTH[:1], out=out)
    tune.run(only, out=out, fresh=True)
    assert record.read(out)["settings"]["cuda_kernels"].endswith("(interface 99)") and len(machine.seen) == 10


def test_which_backends_are_measured(machine, monkeypatch):
    """Those that run here; one that was asked for by name and does not is refused."""
    assert tune.usable_kernels("cuda") == tune.usable_kernels("cuda", ["cuda", "triton"]) == ("triton", "cuda")
    assert tune.usable_kernels("cuda", ["cuda"]) == ("cuda",)
    monkeypatch.setattr(tune.backends, "available", lambda name, device: (name == "triton", "the core has no CUDA"))
    assert tune.usable_kernels("cuda") == ("triton",)
    for asked, word in ((["cuda", "triton"], "cuda cannot"), (["cuda"], "none can")):
        with pytest.raises(tune.TuneError, match=f"and {word} be used here: the core has no CUDA$"):
            tune.usable_kernels("cuda", asked)
    with pytest.raises(tune.TuneError, match="none can be used here: device is cpu"):
        monkeypatch.setattr(tune.backends, "available", lambda name, device: (True, ""))
        tune.usable_kernels("cpu")


def test_without_triton_nothing_is_compared(machine, monkeypatch, tmp_path):
    stand_in = functools.cache(lambda name, device: (name == "cuda", "triton is not installed"))
    monkeypatch.setattr(tune.backends, "available", stand_in)
    only = [cell for cell in BOTH if isinstance(cell, tune_cuda.PlanCell)]
    rows = tune.run(only, out=tmp_path / "a.json")["rows"]
    assert {found[1:] for found in machine.seen} == {(None, False)} and {row["triton_us"] for row in rows} == {None}


def test_the_verb(machine, capsys, monkeypatch):
    monkeypatch.setattr(tune.text, "check_device", torch.device)
    arguments = ["tune", "--sizes", "1024x1024", "--tokens", "1,64", "--bits", "4", "--device", "cuda"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "GEMM tiles on" in out and "CUDA plans on" in out and max(map(len, out.splitlines())) <= 80
    line = next(line for line in out.splitlines() if line.strip().startswith("64x1024x1024") and "int8" in line)
    assert line.split() == ["64x1024x1024", "4", "int8", "n2", "/4", "4.5", "1.22", "4.0", "*"]
    assert main([*arguments, "--backends", "cuda", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2 + 3 and len(machine.seen) == 3


def test_who_is_faster():
    """Triton is taken where it gains more than the noise, and nobody where it was not timed."""
    assert [tune_cuda.faster(10.0, us) for us in (None, 9.9, 10.5, 9.7)] == ["cuda", "cuda", "cuda", "triton"]


def test_the_rules_own_plan():
    """Of the core, whatever table is in use."""
    if not hasattr(native.native(), "SkinnyPlan"):
        pytest.skip(f"no SkinnyPlan: {native.why_absent() or native.why_no_cuda(native.build_info())}")
    for kind in plans.INPUTS:
        for group in (-1, 64):
            cell = tune_cuda.PlanCell(4, group, kind, 16, 4096, 1024)
            rule = tune_cuda.rule_of(cell, 132)
            found = list(tune_cuda.choices(cell, rule))
            assert found[0] == rule and len(set(found)) == len(found) > 8
            assert all(plans.fits(16, 1024, 4, group, plan) for plan in found)


# --------------------------------------------------------------------------- proven before it is timed

RULE, WRONG, FAST = plans.Plan(4, 1), plans.Plan(1, 1), plans.Plan(2, 1)


def computed(x, parts, *, bits, four_level, group_size, activation, out_dtype, act_scale, norm, out_scale, **cut):
    """`skinny.gemm` by the reference."""
    outputs = []
    if norm is not None:
        x = torch.nn.functional.layer_norm(x.float(), x.shape[1:], norm.weight.float(), norm.bias.float(), norm.eps)
        outputs.append(x)
    if x.dtype != torch.int8:
        x, act_scale, _ = qmath.quantize_activation(x, "per_token")
    kind = torch.float32 if out_scale is not None else out_dtype
    for part in parts:
        y = reference.qgemm(
            x, act_scale, None, *part[:5], bits=bits, four_level=four_level, group_size=group_size,
            out_features=part.out_features, activation=activation, out_dtype=kind,
        )  # fmt: skip
        outputs.append(y if out_scale is None else torch.clamp(torch.round(y / out_scale), -127, 127).to(torch.int8))
    return outputs


FORMS = {
    "timed": lambda call: call["out_dtype"] == torch.bfloat16 and call["norm"] is None and call["count"] == 1,
    "full": lambda call: call["out_dtype"] == torch.float32 and not call["four_level"],
    "four_level": lambda call: call["four_level"],
    "two parts": lambda call: call["count"] == 2,
    "int8 out": lambda call: call["out_dtype"] == torch.int8,
    "norm": lambda call: call["norm"] is not None,
}


@pytest.fixture
def kernels(monkeypatch):
    """`WRONG` computes something else where `bad(call)`; `FAST` and it are faster than the rule, in this order."""
    state = types.SimpleNamespace(bad=lambda call: False, timed=[], triton_us=9e-6, triton_wrong=False, missing=None)

    def gemm(x, parts, **call):
        cut = plans.Plan(call["warps_n"], call["splits"])
        if cut == state.missing:
            raise RuntimeError("no room")
        found = computed(x, parts, **call)
        bad = cut == WRONG and state.bad({**call, "count": len(parts)})
        return [*found[:-1], found[-1] + 1] if bad else found

    def triton(cell, tile, form):
        (y,) = tune_cuda._skinny(cell, RULE, form)
        return y + 1 if state.triton_wrong else y

    def interleave(samplers, **_):
        state.timed.append(list(samplers))
        times = {WRONG: 5e-6, FAST: 6e-6, RULE: 8e-6, tune_cuda.TRITON: state.triton_us}
        return protocol.Outcome({choice: protocol.Stats.of([times.get(choice, 1.0)]) for choice in samplers})

    monkeypatch.setattr(skinny, "gemm", gemm)
    monkeypatch.setattr(tune_cuda, "_triton", triton)
    monkeypatch.setattr(tune_cuda, "rule_of", lambda cell, sms: RULE)
    monkeypatch.setattr(protocol, "copies_for", lambda size, device: 2)
    monkeypatch.setattr(protocol, "interleave", interleave)
    return state


def measured_row(bits=2, group_size=-1, input="float", m=3, k=256):
    cell = tune_cuda.PlanCell(bits, group_size, input, m, 20, k)
    return tune_cuda.measure(cell, torch.device("cpu"), 0.01, None, True)


def test_a_right_plan_wins(kernels):
    row = measured_row()
    assert (row["warps_n"], row["splits"], row["median_us"], row["rule_us"], row["is_rule"]) == (1, 1, 5.0, 8.0, False)
    assert not row["mismatched"] and not row["refused"] and row["candidates"] == 4 and row["kernel"] == "cuda"
    assert (row["triton_us"], row["faster"]) == (None, "cuda"), "up to 16 rows nothing is compared"
    measured._plan_entry("row", row)


@pytest.mark.parametrize("form", FORMS)
def test_other_bits_in_any_form_cost_a_plan_its_place(kernels, form):
    kernels.bad = FORMS[form]
    row = measured_row()
    assert row["mismatched"] == ["n1"] and (row["warps_n"], row["splits"]) == FAST
    assert tune.mismatches({"rows": [row]}) == ["cuda W2 float 3x20x256 with n1"]


def test_a_plan_that_does_not_run_is_refused_and_the_rules_must(kernels):
    kernels.missing = WRONG
    row = measured_row(bits=4, group_size=64, input="int8")
    assert row["refused"] == ["RuntimeError: no room"] and (row["warps_n"], row["splits"]) == FAST
    kernels.missing = RULE
    with pytest.raises(RuntimeError, match="no room"):
        measured_row()


def test_triton_runs_beside_the_finalists(kernels):
    """Above 16 rows; it never becomes the plan, and is not believed where it computes something else."""
    row = measured_row(bits=8, input="int8", m=17)
    assert (row["triton_us"], row["faster"], row["warps_n"]) == (9.0, "cuda", 1)
    assert [tune_cuda.TRITON in samplers for samplers in kernels.timed] == [False, True], "not in the quick look"
    kernels.triton_us = 2e-6
    row = measured_row(bits=8, input="int8", m=17)
    assert (row["triton_us"], row["faster"], row["median_us"], row["warps_n"]) == (2.0, "triton", 5.0, 1)
    assert measured._plan_entry("row", row)[1] == plans.Plan(1, row["splits"])
    kernels.triton_wrong = True
    row = measured_row(bits=8, input="int8", m=17)
    assert (row["triton_us"], row["faster"], row["mismatched"]) == (None, "cuda", ["Triton's tile"])


def test_int8_codes_of_the_proof_are_spread():
    """A proof on codes that are all 127, or all 0, would show nothing."""
    for bits, group, kind in ((8, -1, "int8"), (8, -1, "float"), (4, 64, "int8"), (2, -1, "float"), (2, 32, "int8")):
        cell = tune_cuda.PlanCell(bits, group, kind, 4, 64, 512)
        forms, copies = tune_cuda.operands(cell, torch.device("cpu"))
        (form,) = (form for form in forms if form["out_dtype"] == torch.int8)
        part = skinny.Part(*(form[name] for name in ("qweight", "weight_scale", "group_mult", "bias", "residual")), 64)
        (y,) = computed(
            form["x"], [part], bits=bits, four_level=False, group_size=group, activation="none", out_dtype=torch.int8,
            act_scale=form["act_scale"], norm=None, out_scale=form["out_scale"],
        )  # fmt: skip
        assert len(y.unique()) > 60 and (y.abs() == 127).float().mean() < 0.5, (cell, len(y.unique()))
        assert copies[0].shape == packing.packed_shape(64, 512, bits) and len(copies) > 1
        assert len(forms) == 4 + (bits == 2) + (kind == "float")


def test_tritons_own_gemm_is_what_is_compared(monkeypatch):
    """The call itself, with what the tile of the file says: its arguments are those of kernels/gemm.py."""
    gemm = pytest.importorskip("dqkernels.kernels.gemm", reason="triton is not installed")
    given = {}
    monkeypatch.setattr(gemm, "qgemm", lambda *args, **kwargs: given.update(args=args, **kwargs))
    cell = tune_cuda.PlanCell(4, 64, "int8", 17, 20, 256)
    forms, _ = tune_cuda.operands(cell, torch.device("cpu"))
    tile = tiles.candidates("sm90", 4)[0]
    tune_cuda._triton(cell, (tile, 2), forms[0])
    assert (given["tile"], given["split_k"], given["group_size"]) == (tile, 2, 64)
    assert given["args"][:5] == (*(forms[0][name] for name in ("x", "act_scale")), None, forms[0]["qweight"],
                                 forms[0]["weight_scale"])  # fmt: skip
    tune_cuda._triton(cell, None, forms[0])
    assert given["tile"] is None and given["split_k"] is None


def test_the_noise_of_a_median_changes_nothing():
    assert race.decide({RULE: 10.0, FAST: 9.9}, RULE) == RULE and race.decide({RULE: 10.0, FAST: 9.7}, RULE) == FAST
    assert CELLS and all(isinstance(cell, tune.Cell) for cell in CELLS)
