"""The compiled core's attention: exact with every instruction set of this CPU, the same bits with each, refusals."""

from __future__ import annotations

import json

import cpu_attention_checks_decode
import programs
import pytest
import torch

from dqkernels import backends, ops
from dqkernels.kernels import cpu_attention, native

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
ISAS = native.native().cpu_isas() if native.native() else ["scalar"]


@pytest.fixture(scope="module")
def reports():
    return {isa: programs.run(cpu_attention_checks_decode, isa) for isa in ISAS}


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_follows_the_oracle(isa, reports):
    done = reports[isa]
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["isa"] == isa
    counts = {name: report[name] for name in cpu_attention_checks_decode.CHECKS}
    assert all(counts.values()), counts


def test_every_instruction_set_gives_the_same_bits(reports):
    digests = {isa: json.loads(done.stdout)["digest"] for isa, done in reports.items() if done.returncode == 0}
    assert len(set(digests.values())) == 1, digests


def test_one_key_too_many_faults():
    assert programs.run(cpu_attention_checks_decode, ISAS[-1], "--trip").returncode < 0  # killed by a signal


def test_auto_takes_the_core():
    facts = {"mode": "per_token", "head_dim": 64}
    for op in ("qattention", "qattention_decode", "quantize_into_cache"):
        assert backends.choose(op, "cpu", strict=True, **facts).backend == "cpu"


def core_call(name, **change):
    """One call of the core by address, with something wrong in it."""
    q = torch.ones(2, 3, 4, 8)
    codes, scales = torch.ones(2, 3, 5, 8, dtype=torch.int8), torch.ones(2, 3, 5)
    lengths, source = torch.tensor([5, 5], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    operand = (q.data_ptr(), 0, q.stride())
    cache = (codes.data_ptr(), codes.stride()[:3], scales.data_ptr(), scales.stride())
    rest = {"sizes": (2, 3, 4, 5, 8), "causal": False, "softmax_scale": 1.0, "mode": 0, "clip": 0.0, "threads": 1}
    out = torch.empty_like(q)
    if name == "attention":
        keys = torch.ones(2, 3, 5, 8)
        key = (keys.data_ptr(), 0, keys.stride())
        arguments = {"q": operand, "k": key, "v": key, "mask": None, "bias": None, "out_ptr": out.data_ptr()} | rest
    elif name == "attention_decode":
        arguments = {
            "q": operand, "k_cache": cache, "v_cache": cache, "caches": 2, "lengths_ptr": lengths.data_ptr(),
            "source_ptr": source.data_ptr(), "source_per_key": False, "bias": None, "out_ptr": out.data_ptr(),
        } | rest  # fmt: skip
    else:
        position = torch.tensor([0, 1], dtype=torch.int32)
        arguments = {
            "k": operand, "v": operand, "k_cache": cache, "v_cache": cache, "caches": 2, "capacity": 5,
            "position_ptr": position.data_ptr(), "sizes": (2, 3, 4, 8), "mode": 0, "clip": 0.0, "threads": 1,
        }  # fmt: skip
        if "positions" in change:
            position.copy_(torch.tensor(change.pop("positions")))
    for what, tensor in (("lengths", lengths), ("source", source)):
        if what in change:
            tensor.copy_(torch.tensor(change.pop(what)))
    getattr(native.native(), name)(**arguments | change)
    return out


@pytest.mark.parametrize("name", ["attention", "attention_decode", "cache_write"])
def test_the_core_takes_what_is_right(name):
    out = core_call(name)
    assert name == "cache_write" or (out == 1).all()


SIZES = "attention needs sizes >= 0, head_dim 1 to 1040, at most 131071 keys"
REFUSED = [
    ("attention", {"sizes": (2, 3, 4, 5, 0)}, SIZES),
    ("attention", {"sizes": (2, 3, 4, 5, 1041)}, SIZES),
    ("attention", {"sizes": (2, 3, 4, 131072, 8)}, SIZES),
    ("attention", {"sizes": (2, 3, -4, 5, 8)}, SIZES),
    ("attention", {"sizes": (2**62, 3, 4, 5, 8)}, "does not fit in 63 bits"),
    ("attention", {"mode": 2}, SIZES),
    ("attention", {"mode": 3}, "mode must be 0"),
    ("attention", {"clip": -1.0}, "clip must be positive"),
    ("attention", {"clip": float("nan")}, "clip must be positive"),
    ("attention", {"out_ptr": 0}, "out_ptr is a null pointer"),
    ("attention", {"q": (0, 0, (96, 32, 8, 1))}, "q_ptr is a null pointer"),
    ("attention", {"q": (2, 0, (96, 32, 8, 1))}, "q_ptr must be aligned to 4 bytes"),
    ("attention", {"k": (8, 0, (96, 32, 8, 2))}, SIZES),
    ("attention", {"v": (8, 0, (96, 32, -8, 1))}, SIZES),
    ("attention", {"k": (8, 1, (96, 32, 8, 1))}, "dtype code must be 0"),
    ("attention", {"q": (8, 3, (96, 32, 8, 1))}, "dtype code must be 0"),
    ("attention", {"bias": (8, 0, (0, 0, -1, 1))}, SIZES),
    ("attention_decode", {"lengths": [5, 6]}, "lengths and positions must lie inside the capacity"),
    ("attention_decode", {"lengths": [-1, 5]}, "lengths and positions must lie inside the capacity"),
    ("attention_decode", {"source": [0, 2]}, "source must name caches that exist"),
    ("attention_decode", {"source": [-1, 1]}, "source must name caches that exist"),
    ("attention_decode", {"caches": 1, "source_ptr": 0}, SIZES),
    ("attention_decode", {"lengths_ptr": 0}, "lengths_ptr is a null pointer"),
    ("attention_decode", {"k_cache": (8, (96, 32, -8), 8, (8, 8, 1))}, SIZES),
    ("cache_write", {"positions": [0, 2]}, "lengths and positions must lie inside the capacity"),
    ("cache_write", {"positions": [-1, 0]}, "lengths and positions must lie inside the capacity"),
    ("cache_write", {"caches": 1}, "source must name caches that exist"),
    ("cache_write", {"capacity": 3}, "lengths and positions must lie inside the capacity"),
    ("cache_write", {"mode": 1}, "mode must be 0"),
    ("cache_write", {"sizes": (2, 3, 4, 1041)}, SIZES),
]


@pytest.mark.parametrize("name, change, sentence", REFUSED)
def test_the_core_refuses_with_one_sentence(name, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        core_call(name, **change)


def test_the_launchers_refuse_what_is_elsewhere():
    q = torch.ones(1, 1, 1, 4)
    with pytest.raises(ValueError, match="k must be on cpu, got meta"):
        cpu_attention.qattention(q, q.to("meta"), q, None, None, False, 1.0, "per_token", None)
    codes, scales = torch.ones(1, 1, 2, 4, dtype=torch.int8), torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="v_scale must be on cpu, got meta"):
        cpu_attention.qattention_decode(
            q, codes, scales, codes, scales.to("meta"), torch.ones(1, dtype=torch.int32), None, None, False, 1.0,
            "per_token", None,
        )  # fmt: skip
    apart = torch.ones(1, 1, 2, 8, dtype=torch.int8)[..., ::2]
    with pytest.raises(ValueError, match="k_cache is written in place: elements of a key must be adjacent"):
        cpu_attention.quantize_into_cache(q, q, apart, scales, codes, scales, None, "per_token", None)


def test_a_failed_allocation_is_an_exception_and_the_next_call_works():
    """No machine has the buffers for 2^40 keys' heads."""
    q = torch.ones(1).expand(1, 1, 1, 1)
    with pytest.raises(MemoryError):
        native.native().attention(
            (q.data_ptr(), 0, (0, 0, 0, 1)), (q.data_ptr(), 0, (0, 0, 0, 1)), (q.data_ptr(), 0, (0, 0, 0, 1)), None,
            None, q.data_ptr(), (2**40, 1, 1, 131071, 1), False, 1.0, 0, 0.0, 1,
        )  # fmt: skip
    x = torch.randn(1, 1, 2, 8)
    assert ops.qattention(x, x, x, None, None, False, 1.0, backend="cpu").any()
