"""K and V of the sources: the bits of each layer's own linears, whichever layers share a call."""

import pytest
import torch
from decode_models import alike, build
from test_decode_native import logits
from torch import nn

from dqkernels import DQConfig, quantize_
from dqkernels.decode import prepared, sources

WIDTH, HEADS = 64, 48


def layers(*bits: int | None, backend: str = "auto") -> list[tuple[nn.Module, nn.Module]]:
    """K's and V's linear of layers of these bits; None: float ones."""
    torch.manual_seed(0)
    found = []
    for width in bits:
        pair = nn.Sequential(nn.Linear(WIDTH, HEADS), nn.Linear(WIDTH, HEADS))
        if width is not None:
            quantize_(pair, DQConfig(weight_bits=width, backend=backend))
        found.append(tuple(pair))
    return found


def calls_of(pairs, hidden, monkeypatch) -> tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]]]:
    """How many linears each call had, and what came of them."""
    seen = []
    inner = prepared.projection

    def projection(linears):
        seen.append(len(linears))
        return inner(linears)

    with monkeypatch.context() as watched:
        watched.setattr(sources, "projection", projection)
        found = list(sources.keys_and_values(pairs, hidden))
    return seen, found


@pytest.mark.parametrize(
    ("bits", "calls"),
    [((4, 4, 4), [6]), ((4, 4, 8, 8, 8, 4), [4, 6, 2]), ((None, 2, 2, None), [2, 4, 2]), ((4,) * 33, [64, 2])],
)
def test_layers_of_one_format_share_a_call(bits, calls, monkeypatch):
    pairs, hidden = layers(*bits), torch.randn(3, 7, WIDTH)
    with torch.no_grad():
        seen, found = calls_of(pairs, hidden, monkeypatch)
        assert seen == calls and len(found) == len(pairs)
        for pair, got in zip(pairs, found, strict=True):
            for linear, each in zip(pair, got, strict=True):
                assert torch.equal(each, linear(hidden))


def test_memory_bounds_what_is_computed_together(monkeypatch):
    """As many layers as fit; one that does not fit alone is computed all the same."""
    pairs, hidden = layers(4, 4, 4, 4, 4), torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)
    one = 10 * 2 * 2 * HEADS
    with torch.no_grad():
        for most, calls in ((5 * one, [10]), (5 * one - 1, [8, 2]), (2 * one, [4, 4, 2]), (one - 1, [2] * 5)):
            monkeypatch.setattr(sources, "BYTES", most)
            seen, found = calls_of(pairs, hidden, monkeypatch)
            assert seen == calls
            assert all(torch.equal(v, linear(hidden)) for (_, linear), (_, v) in zip(pairs, found, strict=True))


def test_a_gpu_shares_where_a_pair_is_not_one_launch():
    pairs = layers(4, 4, 4)
    for rows, groups in ((64, [(0, 1), (1, 2), (2, 3)]), (65, [(0, 3)])):
        hidden = torch.empty(1, rows, WIDTH, device="meta")
        assert list(sources._groups(pairs, hidden)) == groups


def test_a_source_that_is_scaled_as_a_whole(monkeypatch):
    """per_tensor has one scale for all that is given at once, which is the same source for every layer."""
    torch.manual_seed(0)
    pair = quantize_(
        nn.Sequential(nn.Linear(WIDTH, HEADS), nn.Linear(WIDTH, HEADS)), DQConfig(act_granularity="per_tensor")
    )
    hidden = torch.randn(2, 9, WIDTH)
    seen, found = calls_of([tuple(pair)] * 2, hidden, monkeypatch)
    assert seen == [4] and all(torch.equal(k, pair[0](hidden)) for k, _ in found)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_generate_reads_them(family, monkeypatch):
    """Logits of a whole call, with all layers in one and each alone; and a swapped pair is noticed."""
    model = build(family)
    _, wanted = logits(model, 4)
    monkeypatch.setattr(sources, "BYTES", 0)
    assert torch.equal(logits(model, 4)[1], wanted)
    inner = sources.keys_and_values
    monkeypatch.setattr(sources, "keys_and_values", lambda *given: ((v, k) for k, v in inner(*given)))
    assert not torch.equal(logits(model, 4)[1], wanted)


class Adapted(nn.Module):
    """A linear in a module of somebody's own, which says nothing of its sizes."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x) * 1.5


def test_modules_of_others_are_called_one_by_one(monkeypatch):
    """Whatever stands in the place of a projection: alone with its pair, and not asked how wide it is."""
    (k, v), *pairs = layers(4, 4, 4)
    pairs.insert(1, (Adapted(k), v))
    hidden = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        seen, found = calls_of(pairs, hidden, monkeypatch)
        assert seen == [2, 2, 2] and torch.equal(found[1][0], 1.5 * k(hidden))
    model = build("bart")
    attention = model.get_decoder().layers[0].encoder_attn
    attention.k_proj = Adapted(attention.k_proj).eval()
    alike(model)
