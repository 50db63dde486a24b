"""The shipped teacher on real docstrings: the decode loop writes the tokens of transformers' own loop."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from dqkernels import DQConfig, decode, models, quantize_
from dqkernels.bench import demo
from dqkernels.data import docstrings
from dqkernels.decode import engine


@pytest.fixture(scope="module")
def teacher():
    """Packed at 4 bits, its attention int8; and its tokenizer."""
    folder = demo.teacher_folder()
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    models.patch(quantize_(model, DQConfig(weight_bits=4, attention="int8")))
    return decode.attach(model), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sources(teacher):
    """Bodies of functions of numpy and torch, short and long ones together."""
    found = sorted({pair.body for pair in docstrings.mine(split="test", packages=["numpy", "torch"])}, key=len)
    assert len(found) > 40
    some = found[:: len(found) // 12][:12]
    return teacher[1](some, truncation=True, max_length=120, padding=True, return_tensors="pt")


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}], ids=["greedy", "4 beams"])
def test_the_same_tokens(teacher, sources, options):
    model, tokenizer = teacher
    given = {"input_ids": sources["input_ids"], "attention_mask": sources["attention_mask"], "max_new_tokens": 20}
    with decode.plain(model):
        theirs = model.generate(**given, do_sample=False, **options)
    served = engine.state_of(model).served
    ours = model.generate(**given, do_sample=False, **options)
    assert engine.state_of(model).served == served + 1
    assert torch.equal(ours, theirs)
    texts = tokenizer.batch_decode(ours, skip_special_tokens=True)
    assert len(set(texts)) > 8 and all(len(text.split()) > 1 for text in texts), texts


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "3 beams", "sample", "samples"],
)
def test_strings_that_end_a_text(teacher, sources, options):
    """`stop_strings`: found across the borders of tokens, by a criterion of transformers that reads the tokenizer."""
    model, tokenizer = teacher
    given = {name: sources[name][:6] for name in ("input_ids", "attention_mask")}
    given |= {"max_new_tokens": 16, "do_sample": False, "num_beams": 1, **options}
    ends = {"stop_strings": ["the", "an array", "of a"], "tokenizer": tokenizer}
    found = []
    for more in ({}, ends):
        torch.manual_seed(0)
        with decode.plain(model):
            theirs = model.generate(**given, **more)
        served = engine.state_of(model).served
        torch.manual_seed(0)
        ours = model.generate(**given, **more)
        assert engine.state_of(model).served == served + 1, engine.state_of(model).last
        assert torch.equal(ours, theirs)
        found.append(tokenizer.batch_decode(ours, skip_special_tokens=True))
    free, ended = found
    assert any(map(str.endswith, ended, [tuple(ends["stop_strings"])] * len(ended))) and ended != free, ended


#: Of greedy tokens, int8 attention on both sides. The goal is 0.99, and benchmarks/results/agreement.json says that it
#: is missed (98.8 at 8 bits); this is what 800 tokens of whichever docstrings lie here tell from a mistake.
AGREEMENT = 0.98


@pytest.mark.parametrize("bits", [8, 4])
def test_fused_blocks_choose_the_tokens_of_their_modules(bits):
    """On a CPU the fused norms round otherwise than torch's: codes flip, and of two near words the other is chosen.

    Every word is chosen behind what the unfused model wrote: behind another word all later ones may be others.
    """
    tokenizer = AutoTokenizer.from_pretrained(demo.teacher_folder())
    found = [pair.body for pair in docstrings.mine(split="test", packages=["numpy", "torch"])][:64]
    given = tokenizer(found, truncation=True, max_length=120, padding=True, return_tensors="pt")
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    chosen, written = [], None
    for fuse in (False, "auto"):
        model = AutoModelForSeq2SeqLM.from_pretrained(demo.teacher_folder(), dtype=torch.float32).eval()
        quantize_(model, DQConfig(weight_bits=bits, attention="int8", fused=fuse))
        assert bool(models.blocks.fused_layers(model)) == (fuse == "auto")
        with torch.no_grad():
            if written is None:
                written = model.generate(**given, max_new_tokens=20, do_sample=False, num_beams=1)
            chosen.append(model(**given, decoder_input_ids=written[:, :-1]).logits.argmax(dim=-1))
    real = written[:, 1:] != model.config.pad_token_id
    assert real.sum() > 500
    assert (chosen[0] == chosen[1])[real].double().mean() >= AGREEMENT
