"""The cases of `test_decode_tokens.py` on a GPU: the decode loop writes the tokens of transformers' own loop there too.

Steps are captured in CUDA graphs, attention and linears run on Triton and CUDA, and what the loop hands to processors,
masks and streamers lies on the device. A few cases run on the CPU as well, so that this file itself is run by everyone.
"""

from __future__ import annotations

import functools

import pytest
import torch
from decode_models import CONFIG, SOURCES, alike, assert_same_returned, both, build
from test_decode_tokens import CONFIGS, INPUTS, KINDS, PROCESSED, Heard, Sums
from transformers import StoppingCriteriaList

from dqkernels import decode, models
from dqkernels.decode import engine

#: Norms behind and before the blocks, positions without a table, T5 with its bias; they share the kernels' variants.
FAMILIES = ("bart", "mbart", "marian", "t5")
ON_A_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
#: With a CPU's form, where that is cheap.
BOTH = ("cpu", ON_A_GPU)
HALF = torch.float16


@functools.cache
def lively(family: str, device: str, dtype: torch.dtype = torch.float32):
    return build(family, CONFIG, dtype).to(device)


def to(device: str, inputs: dict) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def served_by_graphs(model) -> None:
    """The last call ran in our loop, and no capture was refused (on the CPU there is none)."""
    state = engine.state_of(model)
    assert state.last == "" and state.refused == "", (state.last, state.refused)


CASES = [
    (kind, inputs) for inputs in INPUTS for kind in (KINDS if inputs == "padded" else ("greedy", "beams", "samples"))
]


@pytest.mark.parametrize("device", [ON_A_GPU])
@pytest.mark.parametrize("kind, inputs", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens(family, kind, inputs, device):
    model = lively(family, device)
    tokens = alike(model, to(device, INPUTS[inputs]), lively=inputs == "padded", **KINDS[kind])
    assert tokens.device.type == device
    served_by_graphs(model)


@pytest.mark.parametrize("device", [ON_A_GPU])
@pytest.mark.parametrize("kind", ["greedy", "beams", "samples"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_half(family, kind, device):
    """The type in which models run on a GPU, its scores and logits too."""
    model = lively(family, device, HALF)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = both(model, to(device, INPUTS["padded"]), **asked, **KINDS[kind])
    assert_same_returned(ours, theirs)
    served_by_graphs(model)


@pytest.mark.parametrize("device", [ON_A_GPU])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("processor", PROCESSED)
def test_processors(processor, beams, device):
    family = FAMILIES[sorted(PROCESSED).index(processor) % len(FAMILIES)]
    model = lively(family, device)
    alike(model, to(device, INPUTS["padded"]), num_beams=beams, **PROCESSED[processor])
    served_by_graphs(model)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("kind", ["greedy", "beams"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_masks_with_holes(family, kind, device):
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 9, [1] * 9])
    alike(lively(family, device), to(device, {"input_ids": SOURCES, "attention_mask": mask}), **KINDS[kind])


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_prefix_criteria_and_streamers(kind, device):
    """What else comes from the caller, and lies on the device."""
    model, inputs = lively("bart", device), to(device, INPUTS["padded"])
    prefix = {**inputs, "decoder_input_ids": SOURCES[:, :5].to(device)}
    alike(model, prefix, max_new_tokens=6, **KINDS[kind])
    alike(model, inputs, stopping_criteria=StoppingCriteriaList([Sums(3)]), lively=False, **KINDS[kind])
    if kind == "greedy":
        heard = Heard(), Heard()
        with decode.plain(model):
            model.generate(**inputs, streamer=heard[0], max_new_tokens=9, do_sample=False, num_beams=1)
        model.generate(**inputs, streamer=heard[1], max_new_tokens=9, do_sample=False, num_beams=1)
        assert heard[0].heard == heard[1].heard and heard[1].ended == 1
    served_by_graphs(model)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("config", ["W2", "W4 groups", "mixed", "float head"])
def test_packed_in_many_ways(config, device):
    model = build("bart", CONFIGS[config]).to(device)
    for kind in ("greedy", "beams"):
        alike(model, to(device, INPUTS["padded"]), lively=False, **KINDS[kind])
    served_by_graphs(model)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_blocks_are_put_back(family, device):
    """Fused, taken apart and fused again: the tokens of the first and the last are the same, and so are the logits."""
    model, inputs = build(family).to(device), to(device, INPUTS["padded"])

    def logits():
        with torch.no_grad():
            return model(**inputs, decoder_input_ids=inputs["input_ids"][:, :4]).logits

    tokens, before = alike(model, inputs), logits()
    models.unpatch(model)
    apart = logits()
    assert torch.isfinite(apart).all() and apart.device.type == device
    models.patch(model)
    decode.attach(model)
    assert torch.equal(logits(), before) and torch.equal(alike(model, inputs), tokens)
