"""Tiny models that write lively texts, for comparing the decode loop of `dqkernels.decode` with transformers' own."""

from __future__ import annotations

import functools

import torch
from attention_models import peaked
from tiny_models import VOCAB
from torch import nn

from dqkernels import DQConfig, decode, models, quantize_
from dqkernels.decode import engine

CONFIG = DQConfig(weight_bits=4, attention="int8")
FAMILIES = ("bart", "mbart", "marian", "pegasus", "plbart", "m2m_100", "blenderbot", "blenderbot-small")
#: T5 with a ReLU, and its later form (FLAN-T5's) with a gated GELU and a head of its own.
ALL = (*FAMILIES, "t5", "t5_v1_1")
#: Four sources of different lengths, padded on the right.
SOURCES = torch.randint(5, VOCAB, (4, 9), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(9) < torch.tensor([[9], [4], [7], [1]])).long()


def build(family: str, config: DQConfig = CONFIG, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Packed, fused and attached. Its head has weights of its own: with those of the embedding, a random model repeats
    the token it has just read. It ends now and then."""
    model = peaked(family)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.lm_head.weight = nn.Parameter(0.4 * torch.randn(VOCAB, 40))
        model.all_tied_weights_keys.pop("lm_head.weight", None)
        for name, parameter in model.named_parameters():
            if "embed_positions" in name:
                parameter.data.copy_(torch.randn_like(parameter))
    settings = model.generation_config
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias[0, settings.eos_token_id] = 2.0 if family == "pegasus" else 4.0
    elif family == "m2m_100":  # the same by the norm before the head
        row = model.lm_head.weight[settings.eos_token_id].detach()
        model.model.decoder.layer_norm.bias.data += 4.0 * row / row.square().sum()
    settings.forced_eos_token_id = None
    settings.max_length = None
    model = quantize_(model.to(dtype), config)
    if family in models.blocks.FAMILIES:
        models.patch(model)
    return decode.attach(model)


@functools.cache
def lively(family: str) -> nn.Module:
    """`build(family)`, one for all tests that leave it as it is."""
    return build(family)


def given(rows: int = 4, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Sources and their mask, as `generate` takes them."""
    return {"input_ids": SOURCES[:rows, :tokens], "attention_mask": MASK[:rows, :tokens]}


def both(model: nn.Module, inputs: dict | None = None, seed: int = 0, why: str = "", **options):
    """What transformers' loop and this package's give for one call. why: part of why the latter did not run."""
    options = {"max_new_tokens": 11, "do_sample": False, "num_beams": 1, **options}
    inputs = given() if inputs is None else inputs
    state = engine.state_of(model)
    before = state.served, state.passed
    torch.manual_seed(seed)
    with decode.plain(model):
        theirs = model.generate(**inputs, **options)
    assert (state.served, state.passed) == before
    torch.manual_seed(seed)
    ours = model.generate(**inputs, **options)
    assert why in state.last and bool(why) == bool(state.last), state.last
    assert (state.served, state.passed) == ((before[0], before[1] + 1) if why else (before[0] + 1, before[1]))
    return theirs, ours


def alike(model: nn.Module, inputs: dict | None = None, lively: bool = True, **options) -> torch.Tensor:
    """Asserts that both give the same tokens, and that there is something to compare; the tokens."""
    theirs, ours = both(model, inputs, **options)
    assert torch.equal(ours, theirs), f"\n{ours}\n{theirs}"
    if lively:
        assert len(set(ours.flatten().tolist())) > 4, ours
        assert len({tuple(row) for row in ours.tolist()}) > 1, ours
    return ours


#: What `generate` gives when it is asked for everything.
RETURNED = ("sequences", "sequences_scores", "scores", "logits", "beam_indices")


def assert_same_returned(ours, theirs) -> None:
    """Every field of two outputs of `generate`: the same kind, types and values."""
    assert type(ours) is type(theirs)
    for name in RETURNED:
        mine, wanted = getattr(ours, name, None), getattr(theirs, name, None)
        assert type(mine) is type(wanted), name
        if isinstance(wanted, tuple):
            assert len(mine) == len(wanted) and all(map(torch.equal, mine, wanted)), name
        elif wanted is not None:
            assert torch.equal(mine, wanted) and mine.dtype == wanted.dtype, name
