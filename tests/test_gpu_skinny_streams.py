"""The skinny CUDA GEMM on a GPU: repeats, streams, graphs, threads and programmatic dependent launch."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

import pytest
import skinny_calls
import torch
from skinny_calls import assert_expected, call_of, equal, outputs_of, plain, poison, same, weight_of

from dqkernels.kernels import counters, skinny

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SLEEP = 100_000_000  # cycles: 50 ms and more
REPEATS = 100


@pytest.fixture(scope="module", autouse=True)
def usable():
    from dqkernels.backends import cuda

    available, reason = cuda.available("cuda")
    if not available:
        pytest.skip(reason)


#: Split over blocks by force, cut by the rule, and more than one slice of rows.
KINDS = {
    "split": plain((4, "absmax", 64), 5, 200, 2048, y="fp16", bias="fp16", residual="fp16", plan=(2, 4)),
    "rule": plain((2, "four_level", 0), 16, 770, 768, y="fp16", parts=3),
    "rows": plain((8, "absmax", 0), 130, 96, 1024, x="int8", y="fp32", bias="fp32", plan=(4, 2)),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return call_of(KINDS[request.param])


def test_250_repeats_beside_another_load(kind):
    """In whatever order the blocks arrive, and whoever else holds the SMs: the same bits, over poison."""
    call, built = kind
    first = skinny_calls.gemm(call)
    assert_expected(first, built.expected)
    load, stream = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    equals = []
    for repeat in range(250):
        if repeat % 5 == 0:
            with torch.cuda.stream(stream):
                torch.mm(load, load)
        poison(outputs_of(call))
        equals.append(equal(skinny_calls.gemm(call), first))
    assert torch.stack(equals).all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("settled", [False, True])
def test_a_slow_producer_is_waited_for(kind, settled):
    """Our launch goes to the current stream, behind what is queued there; so with the promise of settled weights."""
    call, built = kind
    source, call.x = call.x, torch.zeros_like(call.x)
    stream, ready = torch.cuda.Stream(), torch.cuda.Event()
    for sleep in (0, SLEEP):  # first: loads kernels and takes memory, which may wait for the device
        call.x.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), skinny.settled_weights() if settled else contextlib.nullcontext():
            torch.cuda._sleep(sleep)
            call.x.copy_(source)
            got = skinny_calls.gemm(call)
            ready.record()
    assert not ready.query(), "the call waited for the device"
    stream.synchronize()
    assert_expected(got, built.expected)


def test_packed_a_moment_before():
    """Without the promise, weights that the kernel before has just written are the ones that count."""
    call, built = call_of(plain((4, "absmax", 0), 4, 64, 1024, y="fp16"))
    right = call.parts[0].qweight.clone()
    call.parts[0].qweight.fill_(0x77)
    skinny_calls.gemm(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        call.parts[0].qweight.copy_(right)
        got = skinny_calls.gemm(call)
    stream.synchronize()
    assert_expected(got, built.expected)


def new_inputs(call, factor):
    """Other values in place; NaN and Inf stay what they are."""
    if call.x.dtype == torch.int8:
        call.x.copy_(call.x.roll(1, 0))
    else:
        call.x.copy_(call.x.flip(0) * factor)


def capture(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = skinny_calls.gemm(call)
    return graph, results


def test_graph_capture_and_replay(kind):
    call, built = kind
    assert_expected(skinny_calls.gemm(call), built.expected)
    graph, captured = capture(call)
    for repeat in range(10):
        if repeat:
            new_inputs(call, 0.75)
        for result in captured:
            result.view(torch.uint8).fill_(0xA5)
        graph.replay()
        assert same(captured, skinny_calls.gemm(call)), repeat
    assert skinny_calls.wrong(captured, built.expected) is not None, "the inputs changed and the result did not"


def test_capture_as_the_very_first_call(kind):
    """No plan, no counters, nothing to compile: the first call of all may stand in a graph."""
    call, built = kind
    skinny._plan.cache_clear()
    counters.kept.clear()
    graph, captured = capture(call)
    assert not counters.kept, "counters of the stream were made under capture"
    for _ in range(3):
        for result in captured:
            result.view(torch.uint8).fill_(0xA5)
        graph.replay()
        assert_expected(captured, built.expected)


def test_capture_in_a_fresh_process():
    """Here other tests have launched the kernels before. In a process of its own the driver loads each while it is
    captured."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "as_the_very_first", __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and f"{len(KINDS)} passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_two_graphs_at_once_and_calls_beside_them(kind):
    """Counters and workspace belong to the graph: replays on two streams and eager calls on a third do not meet."""
    call, built = kind
    want = skinny_calls.gemm(call)
    assert_expected(want, built.expected)
    graphs = [capture(call) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    equals = []
    for _ in range(50):
        for (graph, captured), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                for result in captured:
                    result.zero_()
                graph.replay()
                equals.append(equal(captured, want))
        with torch.cuda.stream(streams[2]):
            equals.append(equal(skinny_calls.gemm(call), want))
    torch.cuda.synchronize()
    assert all(equals)


def test_8_threads_with_streams_of_their_own(kind):
    """The first calls of all threads meet in the cache of plans; each has counters of its own."""
    call, built = kind
    skinny._plan.cache_clear()
    counters.kept.clear()
    torch.cuda.synchronize()
    barrier, wrong = threading.Barrier(8), []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                barrier.wait()
                results = [skinny_calls.gemm(call) for _ in range(20)]
                torch.cuda.current_stream().synchronize()
            wrong.extend(filter(None, (skinny_calls.wrong(got, built.expected) for got in results)))
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


def test_8_threads_on_one_stream(kind):
    """The default one, whose counters they share: it orders them."""
    call, built = kind
    counters.kept.clear()
    results, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(20):
            results.append(skinny_calls.gemm(call))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = skinny_calls.gemm(call)
    assert_expected(want, built.expected)
    assert len(results) == 160 and torch.stack([equal(got, want) for got in results]).all()


# ------------------------------------------------------------------------------ programmatic dependent launch


def chain_of(form, plan, count=20, n=256):
    """`count` layers, each fed by the one before; scales keep the values in range."""
    draw = torch.Generator().manual_seed(9)
    layers = []
    row = {"form": form, "n": n, "k": n, "rows": "random", "granularity": "per_channel"}
    for _ in range(count):
        packed, scale, mult = weight_of(row, draw)
        bias = torch.randn(n, generator=draw).half().to(DEVICE)
        mult = None if mult is None else mult.to(DEVICE)
        layers.append(skinny.Part(packed.to(DEVICE), scale.to(DEVICE), mult, bias, None, n))
    bits, rule, group = form
    facts = {"bits": bits, "four_level": rule == "four_level", "group_size": group or -1, "activation": "none",
             "out_dtype": torch.float16, "clip": 20.0, "warps_n": plan[0], "splits": plan[1]}  # fmt: skip

    def chain(x):
        """Every output, each in memory that the ones before it have just left or read."""
        seen = []
        for layer in layers:
            (x,) = skinny.gemm(x, [layer], **facts)
            seen.append(x)
        return seen

    return chain


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("form", "plan", "n"), [
    ((4, "absmax", 0), (0, 0), 256), ((2, "four_level", 32), (1, 1), 272), ((8, "absmax", 0), (2, 2), 512),
    ((4, "absmax", 64), (1, 3), 768)], ids=str)  # fmt: skip
def test_a_chain_with_dependent_launch(form, plan, n, m):
    """Each GEMM starts while the one before it ends and must not read its output, workspace or counters too early."""
    chain = chain_of(form, plan, n=n)
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    want = chain(x)
    assert all(bool(y.isfinite().all()) and bool(y.any()) for y in want)
    torch.cuda.synchronize()
    equals = []
    with skinny.settled_weights():
        for _ in range(REPEATS):
            equals.append(equal(chain(x), want))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(x)
    for _ in range(REPEATS):
        for y in captured:
            y.view(torch.uint8).fill_(0xA5)
        graph.replay()
        equals.append(equal(captured, want))
    assert torch.stack(equals).all(), [bool(one) for one in equals]
    x.mul_(-0.5)
    graph.replay()
    assert same(captured, chain(x)) and not same(captured, want)


def test_a_chain_that_keeps_nothing():
    """Only the last output is held: the allocator gives each GEMM the memory that the one before it reads."""
    chain = chain_of((4, "absmax", 0), (2, 0), n=768)
    x = torch.randn(4, 768, generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    want = chain(x)[-1]
    equals = []
    with skinny.settled_weights():
        for _ in range(REPEATS):
            equals.append(equal([chain(x)[-1]], [want]))
    assert torch.stack(equals).all()


def test_dependent_launch_behind_a_slow_producer_that_is_not_ours():
    """torch's kernels do not signal: the first GEMM of a chain waits for their end."""
    chain = chain_of((4, "absmax", 0), (0, 0), count=3)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    want = chain(x)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), skinny.settled_weights():
        torch.cuda._sleep(SLEEP)
        late.copy_(x)
        got = chain(late)
        late.zero_()  # behind the chain: its readers are done
    stream.synchronize()
    assert same(got, want)


def test_the_bindings_stream_is_the_one_it_was_given():
    """A launch on a side stream does not wait for the default one."""
    call, built = call_of(KINDS["rule"])
    skinny_calls.gemm(call)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        skinny_calls.gemm(call)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP * 5)
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(stream):
        results = skinny_calls.gemm(call)
    stream.synchronize()
    assert not busy.query(), "the default stream was over first: nothing was shown"
    torch.cuda.synchronize()
    assert_expected(results, built.expected)
