"""What only a decode step has in the compiled core: positions and the largest logit, in the bits of torch's own."""

from __future__ import annotations

import json

import cpu_token_checks
import programs
import pytest
import torch

from dqkernels.kernels import cpu_gemm, cpu_token, native
from dqkernels.kernels.cpu_step import Tape

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
ISAS = native.native().cpu_isas() if native.native() else ["scalar"]
AT = torch.tensor([0, 1], dtype=torch.int32)


@pytest.fixture(scope="module")
def reports():
    return {isa: programs.run(cpu_token_checks, isa) for isa in ISAS}


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_torchs_bits(isa, reports):
    done = reports[isa]
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["isa"] == isa
    counts = {name: report[name] for name in cpu_token_checks.CHECKS}
    assert all(counts.values()), counts


def test_every_instruction_set_gives_the_same_bits(reports):
    digests = {isa: json.loads(done.stdout)["digest"] for isa, done in reports.items() if done.returncode == 0}
    assert len(set(digests.values())) == 1, digests


def test_one_element_too_many_faults():
    assert programs.run(cpu_token_checks, ISAS[-1], "--trip").returncode < 0  # killed by a signal


def test_a_position_without_a_row_is_refused_before_anything_is_written():
    x, table = torch.ones(2, 1, 8), torch.ones(4, 8)
    for at, offset in (([3, 4], 0), ([0, 3], 1), ([0, -1], 0)):
        with pytest.raises(IndexError, match=r"ids must lie in 0\.\.rows-1"):
            cpu_token.add_position(x, 1.0, table, torch.tensor(at, dtype=torch.int32), offset)
    assert (x == 1).all()
    cpu_token.add_position(x, 1.0, table, torch.tensor([3, 0], dtype=torch.int32), 0)
    assert (x == 2).all()


@pytest.mark.parametrize(
    ("x", "table", "positions", "sentence"),
    [
        (torch.ones(2, 8), torch.ones(4, 7), AT, "x must be"),
        (torch.ones(3, 8), torch.ones(4, 8), AT, r"positions \[rows\]"),
        (torch.ones(2, 8), torch.ones(4, 8).half(), AT, "table .* of its dtype"),
        (torch.ones(2, 8), torch.ones(4, 8), AT.long(), "positions must be int32, got torch.int64"),
        (torch.ones(8, 2).t(), torch.ones(4, 8), AT, "x must be contiguous"),
        (torch.ones(2, 8), torch.ones(8, 4).t(), AT, "table must be contiguous"),
        (torch.ones(2, 8).double(), torch.ones(4, 8).double(), AT, "x must be float32, float16 or bfloat16"),
        (torch.ones(2, 8, device="meta"), torch.ones(4, 8), AT, "x must be on cpu, got meta"),
    ],
)
def test_positions_refuse_by_name(x, table, positions, sentence):
    with pytest.raises(ValueError, match=sentence):
        cpu_token.add_position(x, 1.0, table, positions, 0)


def test_logits_refuse_by_name():
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \[7\]"):
        cpu_token.finish_logits(torch.ones(2, 8), torch.ones(7), False)
    with pytest.raises(ValueError, match="x must be contiguous"):
        cpu_token.finish_logits(torch.ones(8, 2).t(), None, False)
    with pytest.raises(ValueError, match="bias must be float32, float16 or bfloat16, got torch.float64"):
        cpu_token.finish_logits(torch.ones(2, 8), torch.ones(8).double(), False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n": 0}, "columns >= 1"),
        ({"rows": -1}, "rows must be >= 0"),
        ({"rows": 2**40, "n": 2**30}, "63 bits"),
        ({"dtype": 3}, "dtype code must be 0"),
        ({"bias_dtype": 3}, "dtype code must be 0"),
        ({"x": 0}, "x is a null pointer"),
        ({"y": 2}, "y must be aligned to 4 bytes"),
        ({"best": 4}, "best must be aligned to 8 bytes"),
    ],
)
def test_the_core_refuses_with_one_sentence(change, sentence):
    x, best = torch.ones(2, 8), torch.ones(2, dtype=torch.int64)
    given = {
        "x": x.data_ptr(), "dtype": 0, "rows": 2, "n": 8, "bias": 0, "bias_dtype": 0, "rounded": False,
        "y": x.data_ptr(), "best": best.data_ptr(), "threads": 1,
    }  # fmt: skip
    native.native().finish_logits(**given)
    assert not best.any()
    with pytest.raises(ValueError, match=sentence):
        native.native().finish_logits(**given | change)


# ---- on a tape ----------------------------------------------------------------------------------------------


def places(rows: int = 2, capacity: int = 4):
    small = torch.full((2, rows), 9, dtype=torch.int32)
    return torch.full((rows,), 9), small[0], small[1], torch.full((rows, capacity), 9, dtype=torch.int32)


def test_a_run_writes_where_its_tokens_stand():
    tape, (tokens, positions, lengths, ancestors) = Tape(), places()
    tape.set_rows(tokens, positions, lengths, ancestors)
    tape.run(torch.tensor([3, 5]), 2)
    assert tokens.tolist() == [3, 5] and positions.tolist() == [2, 2] and lengths.tolist() == [3, 3]
    assert ancestors.tolist() == [[9, 9, 0, 9], [9, 9, 1, 9]]
    for position in (-1, 4):
        with pytest.raises(ValueError, match=r"CpuStep\.run: lengths and positions must lie inside"):
            tape.run(torch.tensor([3, 5]), position)
    assert positions.tolist() == [2, 2]
    tape.set_rows(tokens, positions, lengths, None)
    tape.run(torch.tensor([3, 5]), 3)
    assert positions.tolist() == [3, 3] and ancestors[0, 3] == 9
    with pytest.raises(ValueError, match=r"tokens must be torch\.int64 \[0\]"):  # which rows, nobody has said
        Tape().run(torch.tensor([3]), 0)
    for wrong in (torch.tensor([3, 5]).int(), torch.tensor([3]), torch.tensor([[3, 5]]), torch.tensor([3, 4, 5])[::2]):
        with pytest.raises(ValueError, match=r"tokens must be torch\.int64 \[2\], contiguous, got "):
            tape.run(wrong, 0)
    assert tokens.tolist() == [3, 5] and positions.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda t: t.int(), r"tokens must be torch.int64 \[2\], contiguous, got torch.int32"),
        (1, lambda t: t[:1], r"positions must be torch.int32 \[2\], contiguous, got torch.int32 \[1\]"),
        (2, lambda t: t.repeat(2)[::2], r"lengths must be .* of strides \[2\]"),
        (3, lambda t: t[:1], r"ancestors must be torch.int32 \[2, 4\]"),
    ],
)
def test_rows_refuse_by_name(which, change, message):
    given = list(places())
    given[which] = change(given[which])
    with pytest.raises(ValueError, match=message):
        Tape().set_rows(*given)


def test_the_largest_is_found_where_it_is_asked_for():
    tape, x = Tape(), torch.tensor([[0.0, 2, 1], [5, 2, 5]])
    y, best = cpu_token.finish_logits(x, torch.tensor([0.0, 0, 3]), False, into=tape)
    assert y.data_ptr() == x.data_ptr() and not best.any() and tape.pool_bytes == best.nbytes
    tape.run()
    assert y.tolist() == [[0, 2, 4], [5, 2, 8]] and best.tolist() == [0, 0]
    x.copy_(torch.tensor([[0.0, 2, 1], [9, 2, 5]]))
    tape.run(wants_best=True)
    assert best.tolist() == [2, 0]


def test_tokens_become_rows_when_it_runs():
    """An id, or a position, without a row is an IndexError then, as layer by layer."""
    from dqkernels import DQConfig
    from dqkernels.nn import QEmbedding

    table = QEmbedding.from_embedding(torch.nn.Embedding(6, 8), DQConfig(weight_bits=8))
    tape, (tokens, positions, lengths, ancestors) = Tape(), places()
    tape.set_rows(tokens, positions, lengths, ancestors)
    options = {"bits": 8, "four_level": False, "group_size": -1, "embedding_dim": 8, "embed_scale": 1.0}
    y = cpu_gemm.embedding(tokens, *table.packed()[:2], None, None, **options, out_dtype=torch.float32, into=tape)
    y.zero_()
    tape.run(torch.tensor([5, 0]), 0)
    assert torch.equal(y, table(torch.tensor([5, 0]))) and y.any()
    with pytest.raises(IndexError, match=r"ids must lie in 0\.\.rows-1"):
        tape.run(torch.tensor([6, 0]), 1)
