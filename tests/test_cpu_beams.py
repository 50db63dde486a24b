"""Beam search in the compiled core: candidates in torch's order, and refusals by name.

`test_decode_hypotheses.py` holds its hypotheses to those in plain torch.
"""

from __future__ import annotations

import json

import cpu_beam_checks
import programs
import pytest
import torch

from dqkernels.kernels import cpu_beams, native

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
ISAS = native.native().cpu_isas() if native.native() else ["scalar"]


@pytest.mark.parametrize("isa", sorted({"scalar", ISAS[-1]}))
def test_the_bits_and_the_order_of_torch(isa):
    done = programs.run(cpu_beam_checks, isa)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    counts = {name: report[name] for name in cpu_beam_checks.CHECKS}
    assert report["isa"] == isa and all(counts.values()), counts


def test_one_score_too_many_faults():
    assert programs.run(cpu_beam_checks, ISAS[-1], "--trip").returncode < 0  # killed by a signal


def test_the_order_of_this_torch_is_asked(monkeypatch):
    assert cpu_beams.orders_as_torch()
    cpu_beams.orders_as_torch.cache_clear()
    real = torch.topk

    def stable(x, k):  # an order that another torch may have: of equal ones the first
        values, index = x.sort(descending=True, stable=True)
        return values[:k], index[:k]

    monkeypatch.setattr(torch, "topk", stable)
    assert not cpu_beams.orders_as_torch(), "the probe has no ties that tell"
    monkeypatch.setattr(torch, "topk", real)
    cpu_beams.orders_as_torch.cache_clear()


def beams(**changes):
    given = {"ids": torch.zeros(6, 2, dtype=torch.int64), "beams": 3, "kept": 6, "most": 5, "filling": 1}
    return cpu_beams.Beams(**given | {"end_tokens": [2], "tracks": False} | changes)


def test_hypotheses_refuse_by_name():
    for change in ({"most": 2}, {"kept": 2}, {"beams": 4}):
        with pytest.raises(ValueError, match="rows must be sources"):
            beams(**change)
    found = beams()
    with pytest.raises(ValueError, match=r"scores must be torch.float32 \[6, 9\], contiguous, got torch.float64"):
        found.choose(torch.zeros(6, 9).double())
    with pytest.raises(ValueError, match=r"contiguous, got torch.float32 \[6, 9\] of strides \[1, 6\]"):
        found.choose(torch.zeros(9, 6).t())
    with pytest.raises(ValueError, match="columns >= 1"):
        found.choose(torch.zeros(6, 1))  # three scores, of which six are wanted
    found.choose(torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"ends must be torch.bool \[2, 6\]"):
        found.extend(torch.zeros(2, 5, dtype=torch.bool), False, 1.0, 1.0, False)
    found.beam[1, 3] = 3
    with pytest.raises(IndexError, match=r"ids must lie in 0\.\.rows-1"):
        found.extend(None, False, 1.0, 1.0, False)
    assert found.length == 2 and not found.scores.any()
    found.beam[1, 3] = 2
    for _ in range(3):
        found.extend(None, False, 1.0, 1.0, False)
    with pytest.raises(ValueError, match="lengths and positions must lie inside"):
        found.extend(None, False, 1.0, 1.0, False)


def test_the_others_refuse_by_name():
    with pytest.raises(ValueError, match="columns >= 1"):
        cpu_beams.top_k(torch.zeros(3), 4)
    assert cpu_beams.top_k(torch.zeros(3), 3)[1].tolist() == torch.topk(torch.zeros(3), 3)[1].tolist()
    with pytest.raises(ValueError, match="x must be torch.float32"):
        cpu_beams.top_k(torch.zeros(3).half(), 1)
    tokens, scores = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"tokens must be torch.int64, elements of a row adjacent, got torch.int32"):
        cpu_beams.ban_repeats(tokens.int(), 2, scores)
    with pytest.raises(ValueError, match="elements of a row adjacent"):
        cpu_beams.ban_repeats(torch.zeros(3, 2, dtype=torch.int64).t(), 2, scores)
    with pytest.raises(ValueError, match=r"scores must be torch.float32 \[2, 5\]"):
        cpu_beams.ban_repeats(tokens, 2, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="columns >= 1"):
        cpu_beams.ban_repeats(tokens, 0, scores)
    assert not scores.any()
    cpu_beams.ban_repeats(tokens, 1, scores)
    assert scores[:, 0].isneginf().all() and not scores[:, 1:].any()
