"""What a decode step has besides its layers in csrc/cpu under ASan and UBSan: its two ends, against numpy, and beam
search, against torch, and the threads that a step calls together. A case's seeds are threads.
"""

import subprocess

import harness
import numpy as np
import oracle
import pytest
import torch
from harness import ABSENT, Case, changed, given, run_cases, statuses, wanted

TYPES = {"fp32": 0, "fp16": 1, "bf16": 2}
WIDTHS = (1, 15, 17, 1023, 1025, 2050)
STATUS = {name: i for i, name in enumerate(statuses())}


def storage(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> what lies in memory."""
    if kind == "fp32":
        return values.astype(np.float32)
    return values.astype(np.float16) if kind == "fp16" else oracle.bfloat16_bits(values)


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> float32, through the type."""
    raw = storage(values, kind)
    return (raw.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else raw.astype(np.float32)


@pytest.fixture(scope="module")
def program(sim_program):
    sources = ("isa", "threads", "norm", "norm_scalar", "norm_x86", "quantize", "quantize_x86", "step_ends")
    sources += (
        "decoder_step",
        "beam_search",
        "embedding",
        "gemm",
        "gemm_scalar",
        "gemm_avx2",
        "gemm_avx_vnni",
        "gemm_avx512_vnni",
        "gemm_amx",
    )
    sources += ("attention", "attention_decode", "attention_scalar", "attention_x86", "cache_write")
    return sim_program("step_host.cpp", *(f"csrc/cpu/{name}.cpp" for name in sources))


def test_threads_that_were_called_together_share_the_work():
    """Tasks that wait for each other would wait in vain if a helper took none."""
    if (reason := harness.missing()) is not None:
        pytest.skip(reason)
    binary = harness.build([harness.HERE / "team_self_test.cpp"])
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout == "0 failures\n", done.stdout + done.stderr


@pytest.mark.parametrize("kind", TYPES)
def test_positions(program, kind):
    rng, cases = np.random.default_rng(0), []
    for k in WIDTHS:
        for factor in (1.0, 27.7):
            x, table = (rounded(rng.standard_normal((n, k)).astype(np.float32), kind) for n in (3, 5))
            at = np.array([2, 0, 3], np.int32)
            scaled = x if factor == 1.0 else rounded(x * np.float32(factor), kind)
            buffers = [changed(storage(x, kind)), given(storage(table, kind)), given(at)]
            want = storage(scaled + table[at + 1], kind)
            scalars = (3, k, TYPES[kind], factor, 5, 1)
            cases.append(Case(f"{k} {factor}", "position", scalars, buffers, [want]))
            late = [changed(storage(x, kind)), given(storage(table, kind)), given(at + 1)]
            refused = Case(f"{k} late", "position", scalars, late, [storage(x, kind)], STATUS["bad_id"])
            cases.append(refused)
    assert run_cases(program, cases, (0,)) == len(cases)


@pytest.mark.parametrize("kind", TYPES)
def test_logits(program, kind):
    rng, cases = np.random.default_rng(1), []
    for n in WIDTHS:
        x = rounded(rng.integers(-3, 4, (4, n)).astype(np.float32), kind)  # full of ties
        x[1, n // 2], x[1, n - 1], x[2, 0] = np.nan, np.nan, -np.inf
        for bias in (None, *TYPES):
            added = None if bias is None else rounded(rng.standard_normal(n).astype(np.float32), bias)
            y = x if added is None else x + added
            y = rounded(y, kind) if bias == kind else y
            best = np.argmax(y, axis=1).astype(np.int64)  # of numpy's: the first, and a NaN above all
            buffers = [given(storage(x, kind)), ABSENT if added is None else given(storage(added, bias))]
            buffers += [wanted((4, n), np.float32), wanted(4, np.int64)]
            scalars = (4, n, TYPES[kind], 0 if bias is None else TYPES[bias], int(bias == kind))
            cases.append(Case(f"{n} {bias}", "logits", scalars, buffers, [y, best]))
            cases.append(Case(f"{n} {bias} only", "logits", scalars, [*buffers[:3], ABSENT], [y]))
    assert run_cases(program, cases, (0, 1, 4)) == len(cases)


def test_where_tokens_stand(program):
    tokens, ancestors = np.array([7, 9, 8]), np.full((3, 5), 6, np.int32)
    at = ancestors.copy()
    at[:, 4] = [0, 1, 2]
    small = [wanted(3, np.int64), wanted(3, np.int32), wanted(3, np.int32)]
    want = [tokens, np.full(3, 4, np.int32), np.full(3, 5, np.int32)]
    buffers = [given(tokens), *small, changed(ancestors)]
    cases = [
        Case("last", "place", (3, 5, 4), buffers, [*want, at]),
        Case("no table", "place", (3, 5, 4), [*buffers[:4], ABSENT], want),
        Case("behind", "place", (3, 5, 5), buffers, [None, None, None, ancestors], STATUS["bad_keys"]),
        Case("before", "place", (3, 5, -1), buffers, [None, None, None, ancestors], STATUS["bad_keys"]),
    ]
    assert run_cases(program, cases, (0,)) == len(cases)


def test_candidates(program):
    """Rows that are sorted whole, and those of which a heap is kept; blocks of 512, tasks of 8192."""
    cases = []
    for n in (3, 40, 511, 513, 8200):
        for running in ([0.0, -1e9], [-1.5, -np.inf], [np.nan, 2.0], [np.inf, 0.5]):
            g = torch.Generator().manual_seed(n)
            scores = torch.randint(-3, 1, (4, n), generator=g).float()
            scores[1, n // 2], scores[3, n - 1], scores[3, n - 2], scores[0, :2] = np.nan, 2.0, -np.inf, -np.inf
            more = torch.tensor([running, running[::-1]], dtype=torch.float32)
            value, at = torch.topk((scores.view(2, 2, n) + more.unsqueeze(2)).flatten(1), 5)
            buffers = [given(scores.numpy()), given(more.numpy())]
            buffers += [wanted((2, 5), np.float32), wanted((2, 5), np.int64), wanted((2, 5), np.int64)]
            found = [value.numpy(), (at // n).numpy(), (at % n).numpy()]
            cases.append(Case(f"{n} {running}", "candidates", (2, 2, n, 5), buffers, found))
    scores = np.zeros((2, 2), np.float32)
    small = [given(scores), given(scores[0]), *(wanted((1, 5), t) for t in (np.float32, np.int64, np.int64))]
    cases.append(Case("too few", "candidates", (1, 2, 2, 5), small, [None] * 3, STATUS["bad_size"]))
    assert run_cases(program, cases, (0, 1, 4)) == len(cases)


def test_repeats(program):
    from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

    cases, rng = [], np.random.default_rng(2)
    for length in (1, 2, 7, 30):
        for size in (1, 2, 3, 31):
            tokens, scores = rng.integers(0, 4, (3, length)), rng.standard_normal((3, 5)).astype(np.float32)
            want = NoRepeatNGramLogitsProcessor(size)(torch.from_numpy(tokens), torch.from_numpy(scores))
            buffers = [given(tokens), changed(scores)]
            cases.append(Case(f"{length} {size}", "repeats", (3, length, length, size, 5), buffers, [want.numpy()]))
    assert run_cases(program, cases, (0,)) == len(cases)


@pytest.mark.parametrize("tracks", [True, False])
def test_hypotheses(program, tracks):
    """Every step of a search, over arrays of exactly their size, against the same in torch."""
    from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

    from dqkernels.decode.hypotheses import Hypotheses, Rules
    from dqkernels.decode.stopping import Stop

    rules = Rules(beams=3, kept=6, most=6, filling=1, early=True, penalty=1.0, samples=False, tracks=tracks)
    stop = Stop(StoppingCriteriaList([MaxLengthCriteria(6), EosTokenCriteria(2)]))
    one = Hypotheses(torch.zeros((6, 2), dtype=torch.int64), rules, stop)
    cases, g = [], torch.Generator().manual_seed(1)

    def state():
        running = torch.full((2, 3, 6), 1)
        running[:, :, : one.length] = one.running
        arrays = [running, None, one.scores, one.finished, None, one.finished_scores, one.finished_lengths]
        arrays += [one.is_finished.to(torch.uint8), one.improvable.squeeze(1).to(torch.uint8)]
        if tracks:
            came_from = torch.full((2, 3, 4), -1, dtype=torch.int32)
            came_from[:, :, : one.length - 2] = one.came_from
            arrays[1], arrays[4] = came_from, one.finished_from.int()
        return [None if each is None else each.numpy().copy() for each in arrays]

    while not one.ended:
        scores = torch.log_softmax(torch.randn(6, 9, generator=g) + 0.5 * (torch.arange(9) == 2), -1)
        value, beam, token = (each.numpy() for each in one._candidates(scores))
        before, length = state(), one.length
        parents, tokens = one.extend(scores, None)
        buffers = [ABSENT if each is None else changed(each) for each in before]
        buffers += [given(value), given(beam), given(token), ABSENT, given(np.array([2]))]
        buffers += [wanted(6, np.int64), wanted(6, np.int64), wanted(1, np.uint8)]
        want = [each for each in state() if each is not None]
        want += [parents.numpy(), tokens.numpy(), np.array([not one.ended], np.uint8)]
        scalars = (2, 3, 2, 6, 1, length, 6, int(length == 5), 1, float(length - 1))
        cases.append(Case(f"{length}", "extend", scalars, buffers, want))
        by_mask = [*buffers[:12], given((token == 2).astype(np.uint8)), *buffers[13:]]
        cases.append(Case(f"{length} by mask", "extend", scalars, by_mask, want))
        left = [each for each in before if each is not None] + [None] * 3
        scalars = (*scalars[:5], 6, *scalars[6:])
        cases.append(Case(f"{length} full", "extend", scalars, buffers, left, STATUS["bad_keys"]))
    assert len(cases) > 6 and run_cases(program, cases, (0,)) == len(cases)
