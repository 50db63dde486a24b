"""Launching on a GPU: what is compiled when, graphs, host time's first cause, and tiles measured on the spot."""

import pytest
import tiny_models
import torch

import dqkernels
from dqkernels import warmup
from dqkernels.nn import QLinear

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def backend():
    pytest.importorskip("triton", reason="triton is not installed")
    from dqkernels.backends import triton as backend

    usable, reason = backend.available("cuda")
    if not usable:
        pytest.skip(reason)
    return backend


def linear(n, k, bits=4):
    layer = QLinear.from_linear(torch.nn.Linear(k, n).half(), dqkernels.DQConfig(weight_bits=bits, backend="triton"))
    return layer.cuda()


def compiled():
    from dqkernels.kernels import launch

    return launch.compiled()


def test_the_second_call_compiles_nothing():
    layer, x = linear(208, 336), torch.randn(5, 336, device="cuda", dtype=torch.half)
    with torch.inference_mode():
        first, count = layer(x), compiled()
        for rows in (x, x[:3], torch.randn(7, 336, device="cuda", dtype=torch.half)):
            layer(rows)
        assert torch.equal(layer(x), first) and compiled() == count


def test_an_operand_off_16_bytes():
    """It gets a variant of its own, and the aligned one its own again."""
    layer = linear(64, 256)
    memory = torch.randn(4 * 256 + 1, device="cuda", dtype=torch.half)
    with torch.inference_mode():
        odd = memory[1:].view(4, 256)
        want = layer(odd.clone())
        for _ in range(3):
            assert torch.equal(layer(odd), want) and torch.equal(layer(odd.clone()), want)


def test_a_first_call_inside_a_capture_is_refused_and_a_warm_one_is_not():
    # Sizes that no other test compiles: K of 16 more than a multiple of 128, an odd N.
    layer = linear(83, 1168, bits=2)
    x = torch.randn(3, 1168, device="cuda", dtype=torch.half)
    from dqkernels.kernels import gemm, quantize

    for launcher in (gemm._gemm, quantize._quantize):
        launcher.variants.clear()
    for plan in (gemm._plan, quantize._plan):
        plan.cache_clear()
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="for the first time while a CUDA graph is captured"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer(x)
        torch.cuda.synchronize()
        found = warmup.warmup(torch.nn.Sequential(layer), [3])
        assert found.modules == 1 and found.compiled >= 2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, layer(x)) and y.any()


def test_warmup_leaves_nothing_for_the_first_request():
    config = dqkernels.DQConfig(weight_bits=4, embedding_bits=8, backend="triton")
    model = dqkernels.quantize_(tiny_models.make("bart"), config).cuda()
    tokens = (1, 2, 4, 8, 16, 32)
    found = warmup.warmup(model, tokens)
    assert found.modules and not found.skipped
    count = compiled()
    with torch.inference_mode():
        for batch in (1, 2):
            ids = torch.randint(3, 100, (batch, 8), device="cuda")
            model.generate(input_ids=ids, max_new_tokens=4, num_beams=2)
    assert compiled() == count
    assert warmup.warmup(model, tokens).compiled == 0


def test_tiles_are_measured_and_taken(tmp_path, monkeypatch):
    """A small table of this GPU: proven, written, found again, and no bit other than the rule's."""
    from dqkernels.bench import tune
    from dqkernels.kernels import gemm, measured

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DQKERNELS_TILES", raising=False)
    gemm.refresh()
    layer, x = linear(512, 512), torch.randn(16, 512, device="cuda", dtype=torch.half)
    with torch.inference_mode():
        want = layer(x)
    found = tune.run(tune.cells([(512, 512)], [16, 512], [4], [-1, 64]), seconds=0.2)
    assert len(found["rows"]) == 4 and all(row["median_us"] > 0 for row in found["rows"])
    assert not tune.mismatches(found)
    device = torch.device("cuda", torch.cuda.current_device())
    row = found["rows"][0]
    tile, split = measured.choose(16, 512, 512, 4, -1, device)
    assert (tile.block_m, tile.block_n, split) == (row["block_m"], row["block_n"], row["split_k"])
    assert gemm._plan.cache_info().currsize == 0, "the table counts from the next call on"
    assert measured.in_use(device).startswith("4 measured on this ")
    with torch.inference_mode():
        assert torch.equal(layer(x), want)
    monkeypatch.undo()
    gemm.refresh()
