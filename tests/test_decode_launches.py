"""How many kernels a decoder layer of one decode step is made of, op by op (docs/design.md, *Launches*).

On the CPU with plain torch in place of the kernels: the calls are those of a GPU, where one of our ops is one launch
for up to 8 rows, and one of torch's that makes no view is one too. Nobody has counted on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import tiny_models
import torch
from decode_models import ALL, build
from test_decode_caches import running
from torch.utils._python_dispatch import TorchDispatchMode

from dqkernels import DQConfig

#: The blocks' ops: q, k, v behind their norm; the writer of the cache; two attentions; five projections.
OURS = {"qlinear_multi": 3, "quantize_into_cache": 1, "qattention_decode": 2, "qlinear": 3}
#: Norm behind the last block: no linear of the layer stands there to take it along.
POST_NORM = ("bart", "marian", "plbart", "blenderbot-small")
GOAL = 8


class Calls(TorchDispatchMode):
    """Counts what would be launched: every op but those that only look at memory in another way."""

    def __init__(self):
        super().__init__()
        self.open, self.found = False, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if self.open and not is_view:
            self.found[func._schema.name.partition("::")[2]] += 1
            for each in args if func.namespace == "dqkernels" and "attention" in str(func) else ():
                # A launcher copies caches, scales and tables that are not.
                assert not isinstance(each, torch.Tensor) or each.dim() == 4 or each.is_contiguous()
        return func(*args, **(kwargs or {}))


def of_a_layer(family: str, dtype: torch.dtype, monkeypatch, beams: int = 1) -> Counter:
    """Ops of a layer in one step of four rows; the same for both layers, or it raises."""
    monkeypatch.setitem(tiny_models._SEQ2SEQ, "decoder_layers", 2)
    model = build(family, DQConfig(weight_bits=4, attention="int8", backend="eager"), dtype)
    found = []
    with torch.no_grad(), running(model, beams) as step:
        rows = step.caches.shape.rows
        step.prefill(torch.zeros(rows, 1, dtype=torch.long))
        assert len(step.decoder.layers) == 2
        step.exact_windows = False  # plain torch alone asks for fewer keys than there is room for
        calls, plain = Calls(), step.decoder

        def embed(ids, at):
            x = plain.embed(ids, at)
            calls.open = True
            return x

        def head(x):
            calls.open = False
            return plain.head(x)

        def stops(x, run):  # between two layers
            found.append(calls.found)
            calls.found = Counter()
            return run(x)

        first, second = plain.layers
        layers = [first, dataclasses.replace(second, qkv=lambda x: stops(x, second.qkv))]
        step.decoder = dataclasses.replace(plain, embed=embed, head=head, layers=layers)
        with calls:
            step.step(torch.full((rows,), 7), 1)
        found.append(calls.found)
    assert len(found) == 2 and found[0] == found[1], found
    return found[0]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", [family for family in ALL if not family.startswith("t5")])
def test_a_layer_of_bart_and_its_relatives(family, dtype, beams, monkeypatch):
    """Nine, one above the goal: the writer of the caches has a launch of its own. Ten behind a norm of its own."""
    found = of_a_layer(family, dtype, monkeypatch, beams)
    wanted = Counter(OURS)
    if family in POST_NORM:
        wanted["native_layer_norm"] = 1
    assert found == wanted
    assert found.total() == (10 if family in POST_NORM else 9) > GOAL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_a_layer_of_t5(family, dtype, monkeypatch):
    """Its norms are no LayerNorms, its blocks those of transformers: many small kernels of torch beside ours."""
    found = of_a_layer(family, dtype, monkeypatch)
    assert {name: count for name, count in found.items() if name in OURS} == OURS
    assert (found["isinf"] > 0) == (dtype == torch.float16)
    assert found.total() > 3 * GOAL, found


def test_an_activation_that_no_epilogue_has_is_one_more(monkeypatch):
    """Marian's published models have SiLU."""
    from transformers import MarianConfig

    assert MarianConfig().activation_function == "gelu"
    monkeypatch.setitem(tiny_models._SEQ2SEQ, "activation_function", "swish")
    found = of_a_layer("marian", torch.float16, monkeypatch)
    assert found == Counter(OURS) + Counter(native_layer_norm=1, silu=1)
