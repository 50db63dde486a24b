"""The Triton kernels on a GPU: the interpreter's checks again, the shapes of BART, graphs, streams, the CPU."""

import pytest
import torch
import triton_checks
import triton_checks_attention
import triton_checks_gemm
import triton_files

CHECKS = {name: check for file in triton_files.FILES for name, check in file.CHECKS.items()}
pytestmark = pytest.mark.gpu

# (N, K): projections and FFN of BART-base and BART-large, and the head, whose odd N defeats wide stores
BART_SHAPES = [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096), (50265, 768)]
TOKENS = [0, 1, 7, 16, 17, 64, 129, 1024]


@pytest.fixture(scope="module", autouse=True)
def backend():
    pytest.importorskip("triton", reason="triton is not installed")
    from dqkernels.backends import triton as backend

    usable, reason = backend.available("cuda")
    if not usable:
        pytest.skip(reason)
    return backend


@pytest.mark.parametrize("name", list(CHECKS))
def test_check(name):
    CHECKS[name]("cuda")


def layer(n, k, form, seed=0, dtype=torch.float16):
    """Arguments of qlinear after x, on the CPU."""
    bits, four_level = form
    g = torch.Generator().manual_seed(seed)
    packed = triton_checks.pack(triton_checks.random_codes(g, n, k, bits, four_level), bits, "cpu")
    weight = [packed, torch.rand(n, generator=g) * 0.02, None, torch.randn(n, generator=g).to(dtype), None]
    facts = {"bits": bits, "four_level": four_level, "group_size": -1, "out_features": n, "activation": "none",
             "out_dtype": dtype, "act_mode": "per_token", "act_clip": None, "act_scale": None}  # fmt: skip
    return weight, facts


def cuda(weight):
    return [None if tensor is None else tensor.cuda() for tensor in weight]


def reference_qlinear(x, weight, act_mode, act_clip, act_scale, **facts):
    from dqkernels import qmath, reference

    quantized = qmath.quantize_activation(x, act_mode, act_clip, act_scale, facts["four_level"])
    return reference.qgemm(*quantized, *weight, **facts)


@pytest.mark.parametrize("form", triton_checks.FORMS, ids=lambda form: f"W{form[0]}{'f' if form[1] else ''}")
@pytest.mark.parametrize("n, k", BART_SHAPES)
def test_bart_shapes_equal_the_reference_on_the_cpu(backend, n, k, form):
    """Also batch invariance: every M is the start of the same batch, so one reference serves all of them."""
    weight, facts = layer(n, k, form)
    x = torch.randn(max(TOKENS), k, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    rows = 129 if n > 10_000 else max(TOKENS)  # the head's product is the CPU's slowest
    want = reference_qlinear(x[:rows], weight, **facts)
    x, there = x.cuda(), cuda(weight)
    for m in [m for m in TOKENS if m <= rows]:
        triton_checks.assert_same(backend.qlinear(x[:m], *there, **facts), want[:m], f"{m}x{n}x{k} {form}")


def test_y_larger_than_2_to_31_elements(backend):
    """The last rows of an output whose offsets need 64 bits equal the same rows computed alone."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    weight, facts = layer(50265, 128, (2, False))
    there = cuda(weight)
    m = 2**31 // 50265 + 300
    x = torch.randn(m, 128, device="cuda", dtype=torch.float16)
    y = backend.qlinear(x, *there, **facts)
    for rows in (slice(0, 5), slice(m - 5, m)):
        assert torch.equal(y[rows], backend.qlinear(x[rows], *there, **facts))


@pytest.mark.parametrize("act_mode", ["per_token", "per_tensor"])
def test_graph_capture_and_replay(backend, act_mode):
    """No allocation outside the pool, no synchronisation: captured once, replayed on new inputs in place."""
    weight, facts = layer(768, 768, (2, True))
    facts["act_mode"], there = act_mode, cuda(weight)
    x = torch.randn(16, 768, device="cuda", dtype=torch.float16)
    backend.qlinear(x, *there, **facts)  # compiles; a first call inside a capture could not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.qlinear(x, *there, **facts)
    for scale in (0.1, 1.0, 100.0):
        x.copy_(torch.randn_like(x) * scale)
        graph.replay()
        assert torch.equal(y, backend.qlinear(x, *there, **facts)) and y.any()


def test_side_stream(backend):
    """Work goes to the current stream: a slow producer on it is waited for."""
    weight, facts = layer(1024, 1024, (4, False))
    there = cuda(weight)
    final = torch.randn(64, 1024, device="cuda", dtype=torch.float16)
    want = backend.qlinear(final, *there, **facts)
    x = torch.zeros_like(final)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(final)
        y = backend.qlinear(x, *there, **facts)
    stream.synchronize()
    assert torch.equal(y, want)


def test_repeats_and_tiles_give_the_same_bits(backend):
    from dqkernels.kernels import gemm, tiles

    weight, facts = layer(1000, 1040, (4, False))
    there = cuda(weight)
    q, scale, _ = backend.quantize_activation(torch.randn(300, 1040, device="cuda"), "per_token")
    arguments = (q, scale, None, there[0], there[1], 4, False, 1000)
    first = gemm.qgemm(*arguments)
    for tile in tiles.table(tiles.family(q.device), 4).values():
        for _ in range(20):
            assert torch.equal(gemm.qgemm(*arguments, tile=tile), first)


@pytest.mark.parametrize("form", [(8, False, -1), (4, False, 64), (2, True, 128)], ids=str)
def test_250_repeats_of_split_k(backend, form):
    """Whichever block arrives last, the bits are the same; 8 splits over memory that other launches have just left."""
    given, codes = triton_checks_gemm.operands(1, 17, 300, 4096, form)
    want = torch.from_numpy(triton_checks_gemm.expected(given, codes, form))
    for repeat in range(250):
        got = triton_checks_gemm.call("cuda", given, codes, form, tile=None, split_k=1 + repeat % 8)
        triton_checks.assert_same(got, want, f"{form}, repeat {repeat}")


def test_split_k_in_a_graph_and_on_two_streams(backend):
    """Counters and slabs belong to the call: replays and neighbours do not meet in them."""
    from dqkernels.kernels import gemm

    form = (4, False, 64)
    given, codes = triton_checks_gemm.operands(2, 16, 768, 4096, form)
    want = torch.from_numpy(triton_checks_gemm.expected(given, codes, form)).cuda()
    there = {name: None if tensor is None else tensor.cuda() for name, tensor in given.items()}
    arguments = {"row_sum": None, "qweight": triton_checks.pack(codes, 4, "cuda"), "bits": 4, "four_level": False,
                 "out_features": 768, "group_size": 64, "split_k": 8, **there}  # fmt: skip
    gemm.qgemm(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gemm.qgemm(**arguments)
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, want)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(gemm.qgemm(**arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in results)


def test_second_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight, facts = layer(64, 64, (8, False))
    x = torch.randn(5, 64, dtype=torch.float16)
    y = backend.qlinear(x.to("cuda:1"), *(None if t is None else t.to("cuda:1") for t in weight), **facts)
    triton_checks.assert_same(y, backend.qlinear(x.cuda(), *cuda(weight), **facts).cpu(), "cuda:1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", triton_checks_attention.LONG, ids=lambda s: f"{s[2]}x{s[3]}")
def test_attention_over_long_texts(backend, shape, dtype):
    """Prefill of up to 4,096 tokens, as the contract has it."""
    rows, _ = triton_checks_attention.assert_long(shape, "cuda", dtype)
    assert rows == shape[0] * shape[1] * shape[2]


def test_attention_in_a_graph_on_a_side_stream_and_again(backend):
    """Captured once and replayed on new inputs, 250 repeats, and a slow producer on another stream."""
    q, k, v = triton_checks_attention.qkv(1, 4, 12, 100, 300, 64, "cuda", torch.float16)
    facts = {"causal": False, "softmax_scale": 0.125, "mode": "per_token", "clip": None}
    mask = torch.rand(4, 1, 1, 300, device="cuda") < 0.8
    first = backend.qattention(q, k, v, mask, None, **facts)
    for _ in range(250):
        assert torch.equal(backend.qattention(q, k, v, mask, None, **facts), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.qattention(q, k, v, mask, None, **facts)
    for scale in (0.1, 1.0, 10.0):
        q.mul_(scale)
        graph.replay()
        assert torch.equal(y, backend.qattention(q, k, v, mask, None, **facts)) and y.any()
    want = backend.qattention(q, k, v, mask, None, **facts)
    late, stream = torch.zeros_like(q), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        y = backend.qattention(late, k, v, mask, None, **facts)
    stream.synchronize()
    assert torch.equal(y, want)
