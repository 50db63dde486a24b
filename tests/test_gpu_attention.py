"""CUDA decode attention on a GPU: the oracle's results over poisoned outputs, eager's at the sizes of beam search,
whatever the cut; repeats, streams and graphs."""

from __future__ import annotations

import attention_calls
import pytest
import torch
from attention_calls import cases
from skinny_calls import poison

from dqkernels import ops
from dqkernels.kernels import counters, cuda_attention

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def usable():
    from dqkernels.backends import cuda

    available, reason = cuda.available("cuda")
    if not available:
        pytest.skip(reason)


def same(a, b) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("case", cases.cases(), ids=lambda case: case.name)
def test_covering_cases(case):
    """The simulator's cases, every kernel and form, over poison; the second call finds the counters of the first."""
    built = cases.build(case)
    results = []
    for _ in range(2):
        poison([(built.operands["q"].shape, built.operands["q"].dtype)])
        results.append(attention_calls.call(built, DEVICE))
        cases.assert_right(built, results[-1])
    assert same(*results)


@pytest.mark.parametrize("built", attention_calls.samples(), ids=lambda built: f"{built.case.name} {built.case.mode}")
def test_what_the_sanitizers_run(built):
    cases.assert_right(built, attention_calls.call(built, DEVICE))


# ------------------------------------------------------------------------- eager's results at the sizes of beam search

#: Sources and beams: one of each, most of each, and both.
SIZES = [(1, 1), (1, 16), (4, 4), (16, 5), (256, 1), (64, 16), (256, 16)]


def operands(sources, beams, kind, heads=2, queries=1, keys=150, capacity=192, head_dim=64, dtype=torch.float32):
    """Of the op: a cache per row (`own`), one per source for all its beams (`shared`), or one per key (`by key`)."""
    g = torch.Generator(DEVICE).manual_seed(sources * 31 + beams)
    rows = sources * beams
    caches = sources if kind == "shared" else rows
    q = torch.randn(rows, heads, queries, head_dim, generator=g, device=DEVICE).to(dtype)
    cache = []
    for _ in range(2):
        cache.append(torch.randint(-127, 128, (caches, heads, capacity, head_dim), generator=g, device=DEVICE).char())
        cache.append(torch.rand(caches, heads, capacity, generator=g, device=DEVICE) * 0.02 + 1e-3)
    lengths = torch.randint(1, keys + 1, (rows,), generator=g, device=DEVICE, dtype=torch.int32)
    lengths[-1] = keys
    source = None
    if kind == "shared":
        source = torch.arange(sources, device=DEVICE, dtype=torch.int32).repeat_interleave(beams)
        lengths = lengths[source * beams].contiguous()
    elif kind == "by key":  # any beam of the row's own source
        own = torch.arange(rows, device=DEVICE)[:, None] // beams * beams
        source = (own + torch.randint(0, beams, (rows, capacity), generator=g, device=DEVICE)).int()
    return (q, *cache, lengths, source, None), (queries > 1, head_dim**-0.5, "per_token", None)


@pytest.mark.parametrize("kind", ["own", "shared", "by key"])
@pytest.mark.parametrize("sources, beams", SIZES)
def test_eager_at_the_sizes_of_beam_search(sources, beams, kind):
    """Codes of shares flip where two exponentials round apart: 2^-19 of their sum on average, some 127 * 40 here. One
    flip moves an output by 127 * vs_max / sum(e) at most, which is a quantized step of the largest value."""
    tensors, facts = operands(sources, beams, kind)
    want = ops.qattention_decode(*tensors, *facts, "eager")
    got = ops.qattention_decode(*tensors, *facts, "cuda")
    assert got.dtype == want.dtype and got.shape == want.shape and got.isfinite().all() and want.abs().max() > 0
    moved = (got - want).abs()
    largest = 127 * tensors[4].max()
    queries = moved.amax(-1) > 1e-6 * largest
    assert int(queries.sum()) <= max(2, queries.numel() // 20), f"{int(queries.sum())} of {queries.numel()} queries"
    assert float(moved.max()) <= float(2 * largest / 127), float(moved.max() / largest)
    assert same(ops.qattention_decode(*tensors, *facts, "cuda"), got)


@pytest.mark.parametrize("kind", ["own", "shared", "by key"])
def test_the_bits_of_a_row_alone(kind):
    """Of 3 sources with 16 beams every row has the bits that it has without the others."""
    tensors, facts = operands(3, 16, kind, queries=2)
    whole = ops.qattention_decode(*tensors, *facts, "cuda")
    q, *cache, lengths, source, bias = tensors
    for row in (0, 15, 16, 47):
        only = slice(row, row + 1)
        caches = [t[only].contiguous() for t in cache] if source is None else cache
        named = None if source is None else source[only].contiguous()
        alone = ops.qattention_decode(q[only], *caches, lengths[only], named, bias, *facts, "cuda")
        assert torch.equal(alone, whole[only]), row


def test_no_cut_changes_a_bit_of_a_long_cache():
    """5,000 keys: the rule splits them on a large GPU; kept scores have no room; every other cut by hand."""
    tensors, facts = operands(2, 3, "shared", keys=5000, capacity=5000)
    want = ops.qattention_decode(*tensors, *facts, "cuda")
    for splits, warps in ((1, 1), (1, 8), (2, 8), (7, 3), (53, 1)):
        got = cuda_attention.qattention_decode(*tensors, *facts, form="redo", splits=splits, warps=warps)
        assert torch.equal(got, want), (splits, warps)


# ------------------------------------------------------------------------------------------ repeats, streams and graphs

KINDS = {"kept": {}, "split": {"splits": 5}, "per_tensor": {"mode": "per_tensor"}}


@pytest.fixture(params=KINDS)
def call(request):
    """A call of no arguments over 3 sources with 4 beams, its operands, and its first result."""
    cut = dict(KINDS[request.param])
    tensors, (causal, scale, mode, clip) = operands(3, 4, "shared", keys=300, capacity=320)
    facts = (causal, scale, cut.pop("mode", mode), clip)

    def run():
        return cuda_attention.qattention_decode(*tensors, *facts, **cut)

    return run, tensors


def test_repeats_beside_another_load(call):
    run, tensors = call
    first, load, stream = run(), torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    equals = []
    for repeat in range(100):
        if repeat % 5 == 0:
            with torch.cuda.stream(stream):
                torch.mm(load, load)
        poison([(first.shape, first.dtype)])
        equals.append((run() == first).all())
    assert torch.stack(equals).all()
    torch.cuda.synchronize()


def test_capture_as_the_very_first_call_and_replay(call):
    """Nothing is compiled, kept or waited for; a replay reads what stands in the operands then."""
    run, tensors = call
    cuda_attention._plan.cache_clear()
    counters.kept.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    assert not counters.kept, "counters of the stream were made under capture"
    results = []
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        results.append(captured.clone())
        assert torch.equal(results[-1], run())
        tensors[0].mul_(-0.75)
    assert not torch.equal(results[0], results[1]), "the inputs changed and the result did not"


def test_two_streams_at_once(call):
    """Workspace and counters belong to the call."""
    run, _ = call
    first = run()
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run())
    torch.cuda.synchronize()
    assert all(torch.equal(result, first) for result in results)
