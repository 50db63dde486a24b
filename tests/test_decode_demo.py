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
