"""Whether fused blocks and int8 attention choose the words of the plain quantized model, on the shipped models.

The plain one is `quantize_` with `fused=False` and attention in float: packed linears and embeddings in transformers'
own blocks. Against it stand the same model fused, with attention in int8 (what `quantize_` gives unasked), and each of
the two alone; and the fused one against transformers' blocks with attention in int8 on both sides. Greedy search;
counted twice: every word behind what the other model wrote (`forced`), and each model left alone (`free`), where all
words behind the first other one may be others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dqkernels.bench import demo, record

BITS = (8, 4, 2)
#: Of greedy words, as the goal has it.
GOAL = 0.99
#: name -> (fused, attention)
FORMS = {
    "plain": (False, "float"),
    "int8 attention": (False, "int8"),
    "fused": (True, "float"),
    "fused, int8 attention": (True, "int8"),
}
#: A form, and what it is held against. The goal is about the first.
COMPARED = (
    ("fused, int8 attention", "plain"),
    ("int8 attention", "plain"),
    ("fused", "plain"),
    ("fused, int8 attention", "int8 attention"),
)
_TOKENS, _SOURCE = 40, 120


def run(
    pairs: int = 128,
    seed: int = 0,
    bits: Sequence[int] = BITS,
    student: bool = True,
    out: str | os.PathLike[str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The record: a row for each model and comparison. `out`: a file to write it into.

    Args:
        pairs, seed: held-out docstrings, drawn as `dqkernels demo` draws them.
        bits: of the shipped teacher, weights and embedding alike.
        student: the shipped 2-bit student too.
        tell: takes a line per row.

    Raises:
        DemoError: as `dqkernels.bench.demo`.
        ValueError: for `bits` or `pairs` out of range.
    """
    bits = demo.check_arguments(0, pairs, bits)
    from transformers import AutoTokenizer

    folder = demo.teacher_folder()
    drawn, counts = demo.draw_pairs(folder, pairs, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = [
        tokenizer(
            [pair.body for pair in drawn[i : i + demo.BATCH_SIZE]], truncation=True, max_length=_SOURCE, padding=True,
            return_tensors="pt",
        )
        for i in range(0, len(drawn), demo.BATCH_SIZE)
    ]  # fmt: skip
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    rows = []
    for name, width in [*((f"W{width}", width) for width in bits), *([(demo.STUDENT, 2)] if student else [])]:
        models = {
            form: student_of(*how) if name == demo.STUDENT else teacher_of(width, *how) for form, how in FORMS.items()
        }
        written = {form: [write(model, batch) for batch in batches] for form, model in models.items()}
        for form, other in COMPARED:
            model = models[form]
            chosen = [choose(model, batch, ids) for batch, ids in zip(batches, written[other], strict=True)]
            counted = count(written[other], written[form], chosen, model.config.pad_token_id)
            row = {"name": name, "form": form, "against": other, "weight_bits": width, **counted}
            row["kernel"] = demo.kernel_of(model)
            row["goal_met"] = min(row["forced_same_fraction"], row["free_same_fraction"]) >= GOAL
            rows.append(row)
            tell(line(row))
    made = record.new(
        "agreement",
        settings={
            "model": "docstring_teacher", "packed": [demo.STUDENT] if student else [], "seed": seed, "device": "cpu",
            "float_dtype": "float32", "max_new_tokens": _TOKENS, "max_source_length": _SOURCE, **counts,
            "goal_fraction": GOAL,
        },
        protocol={
            "plain": "quantize_(fused=False, attention='float'): packed linears in transformers' own blocks and loop",
            "forced": "the largest logit behind each prefix of what the other model wrote",
            "free": "greedy search of each model; the same word at the same place of the other model's text",
            "counted": "words of the other model's text, its end included, padding not",
        },
        rows=rows,
    )  # fmt: skip
    if out is not None:
        record.write(made, out)
    return made


def teacher_of(bits: int, fused: bool, attention: str):
    """The shipped teacher packed by rounding alone, in one of FORMS."""
    from transformers import AutoModelForSeq2SeqLM

    import dqkernels

    model = AutoModelForSeq2SeqLM.from_pretrained(demo.teacher_folder(), dtype=torch.float32).eval()
    config = dqkernels.DQConfig(
        weight_bits=bits, embedding_bits=bits, attention=attention, fused="auto" if fused else False
    )
    return _checked(dqkernels.quantize_(model, config), fused, attention)


def student_of(fused: bool, attention: str):
    """The shipped student, whose file says int8 attention, in one of FORMS."""
    import dqkernels

    model = dqkernels.load(demo.student_folder(), dtype="float32", fused="auto" if fused else False).eval()
    if attention == "float":
        model.set_attn_implementation("sdpa")
    return _checked(model, fused, attention)


def _checked(model, fused: bool, attention: str):
    """The model, if it is in the form that was asked for: or a row would compare a model with itself."""
    from dqkernels.models import blocks

    is_int8 = model.config._attn_implementation not in ("sdpa", "eager")
    if bool(blocks.fused_layers(model)) != fused or is_int8 != (attention == "int8"):
        raise RuntimeError(
            f"wanted fused {fused}, attention {attention}; the model has "
            f"{len(blocks.fused_layers(model))} fused layers and {model.config._attn_implementation}"
        )
    return model


def write(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Greedy ids, [texts, tokens], the start token in front."""
    with torch.no_grad():
        return model.generate(
            **batch, max_new_tokens=_TOKENS, do_sample=False, num_beams=1, no_repeat_ngram_size=0, length_penalty=1.0,
            early_stopping=False, forced_eos_token_id=None,
        )  # fmt: skip


def choose(model, batch: dict[str, torch.Tensor], written: torch.Tensor) -> torch.Tensor:
    """The word of the largest logit behind each prefix of `written` [texts, tokens], [texts, tokens - 1]."""
    with torch.no_grad():
        return model(**batch, decoder_input_ids=written[:, :-1]).logits.argmax(-1)


def count(
    written: Sequence[torch.Tensor], found: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor], padding: int
) -> dict[str, Any]:
    """What agrees, over batches of ids: `written` by the other model, `found` by this, `chosen` behind `written`."""
    words = forced = free = texts = same_texts = 0
    for other, mine, behind in zip(written, found, chosen, strict=True):
        other = other[:, 1:]
        real, length = other != padding, other.shape[1]
        mine = torch.nn.functional.pad(mine[:, 1:], (0, length), value=padding)
        rest = mine[:, length:] == padding  # not of a text that goes on where the other one ended
        mine = mine[:, :length]
        words += int(real.sum())
        forced += int((other == behind)[real].sum())
        free += int((other == mine)[real].sum())
        texts += len(other)
        same_texts += int(((other == mine).all(1) & rest.all(1)).sum())
    return {
        "words": words, "forced_same": forced, "free_same": free, "texts": texts, "texts_same": same_texts,
        "forced_same_fraction": round(forced / words, 4), "free_same_fraction": round(free / words, 4),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['name']:5} {row['form']:22} against {row['against']:15} behind the same words "
        f"{100 * row['forced_same_fraction']:.2f} %, left alone {100 * row['free_same_fraction']:.2f} % of "
        f"{row['words']} words; {row['texts_same']} of {row['texts']} texts"
    )
