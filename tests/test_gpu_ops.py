"""Every op on Triton, on a GPU: graphs, streams, threads, repeats, batch mates. The calls are those of op_grid.py."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import op_grid
import pytest
import torch
from test_kernels_triton import subprocess_env

pytestmark = pytest.mark.gpu
NAMES = [sample.name for sample in op_grid.samples(3, 5, 7)]


@pytest.fixture(scope="module", autouse=True)
def usable():
    pytest.importorskip("triton", reason="triton is not installed")
    from dqkernels.backends import triton as backend

    available, reason = backend.available("cuda")
    if not available:
        pytest.skip(reason)


@functools.cache
def table(m, n, k):
    return {sample.name: sample for sample in op_grid.samples(m, n, k)}


def on_device(name, m=33, n=80, k=272):
    return table(m, n, k)[name].placed(lambda tensor: tensor.cuda())


def same(got, want):
    """A one-element bool tensor on the device: all results equal, NaN to NaN; nothing waits here."""
    equal = [((a == b) | (a.isnan() & b.isnan())).all() for a, b in zip(got, want, strict=True)]
    return torch.stack(equal).all()


@pytest.mark.parametrize("name", NAMES)
def test_equals_eager_on_the_cpu(name):
    for shape in ((1, 1, 1), (33, 80, 272)):
        wrong = op_grid.difference(on_device(name, *shape).run("triton"), table(*shape)[name].run("eager"),
                                   table(*shape)[name].within)  # fmt: skip
        assert wrong is None, wrong


@pytest.mark.parametrize("name", NAMES)
def test_graph_capture_and_replay(name):
    """Nothing allocates outside the pool or waits for the device; replays read what stands in the operands then."""
    sample = on_device(name)
    for _ in range(2):  # compiles; then the path that later calls take
        sample.run("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample.run("triton")
    first = [result.clone() for result in sample.run("triton")]
    for change in (lambda x: x, lambda x: x * 0.5, lambda x: x.flip(0)):
        for tensor in sample.operands.values():
            if tensor is not None and tensor.is_floating_point():
                tensor.copy_(change(tensor))
        for result in captured:
            result.zero_()
        graph.replay()
        assert same(captured, sample.run("triton"))
    assert not same(captured, first), "the operands changed and the result did not"


@pytest.mark.parametrize("name", NAMES)
def test_two_streams_at_once(name):
    """Counters, maxima and slabs belong to the call: neighbours do not meet in them."""
    samples = [on_device(name), on_device(name, 17, 48, 272)]
    wanted = [sample.run("triton") for sample in samples]
    streams = [torch.cuda.Stream() for _ in samples]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    equal = []
    for _ in range(20):
        for sample, want, stream in zip(samples, wanted, streams, strict=True):
            with torch.cuda.stream(stream):
                equal.append(same(sample.run("triton"), want))
    torch.cuda.synchronize()
    assert all(equal)


@pytest.mark.parametrize("name", NAMES)
def test_250_repeats(name):
    """A K of 4,224, which the GEMM splits among blocks: in whatever order they arrive, the bits are the same."""
    sample = on_device(name, 3, 33, 4224)
    want = sample.run("triton")
    assert torch.stack([same(sample.run("triton"), want) for _ in range(250)]).all()


@pytest.mark.parametrize("name", [sample.name for sample in op_grid.samples(3, 5, 7) if sample.rows])
def test_rows_do_not_depend_on_their_batch(name):
    sample = on_device(name)
    whole = sample.run("triton")
    count = sample.operands[sample.rows[0]].shape[0]
    for rows in (slice(0, 1), slice(1, None), slice(count // 2, count)):
        assert same(sample.only(rows).run("triton"), [result[rows] for result in whole]), rows


FIRST_USE = """
import json, threading
import op_grid, torch
wanted = ("qlinear W4 per_tensor", "layernorm_quantize per_token", "qembedding W2 four_level", "qattention per_token",
          "qattention_decode beams", "quantize_weight W8", "qlinear_grad_weight")
table = [sample for sample in op_grid.samples(5, 17, 129) if sample.name.startswith(wanted)]
assert len(table) >= len(wanted), len(table)
there = [sample.placed(lambda tensor: tensor.cuda()) for sample in table]
torch.cuda.synchronize()
barrier, wrong = threading.Barrier(8), []

def work():
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            barrier.wait()
            results = [sample.run("triton") for sample in there]
            torch.cuda.current_stream().synchronize()
        for sample, got in zip(table, results):
            found = op_grid.difference(got, sample.run("eager"), sample.within)
            wrong.extend([f"{sample.name}: {found}"] if found else [])
    except Exception as error:
        wrong.append(repr(error))

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(wrong))
"""


def test_first_use_from_8_threads(tmp_path):
    """A process of its own and an empty cache: the first calls of all threads meet in the compiler."""
    path = os.pathsep.join([str(Path(__file__).parent), subprocess_env()["PYTHONPATH"]])
    environment = subprocess_env(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path)
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
