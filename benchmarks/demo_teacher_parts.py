"""The parts of `train_demo_teacher.py`: its data, its model, its export. No training loop."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from dqkernels.data.docstrings import (
    BASE_DISTRIBUTIONS,
    TEST_PERCENT,
    VALIDATION_PERCENT,
    default_roots,
    fingerprints,
    held_out,
    mine,
    packages_of,
    split_of,
)

BOS, PAD, EOS, UNK = 0, 1, 2, 3


def say(**fields: object) -> None:
    print(
        time.strftime("%H:%M:%S"),
        *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()),
        flush=True,
    )


def atomic(path: Path, write) -> None:
    """Write beside `path`, then rename: a cut-off write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    os.close(handle)
    try:
        write(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        if os.path.exists(name):
            os.unlink(name)


# ---- data -------------------------------------------------------------------------------


def versions_in(folder: str | None) -> list[str]:
    found = metadata.distributions() if folder is None else metadata.distributions(path=[folder])
    return sorted(
        {f"{d.metadata['Name']}=={d.version.partition('+')[0]}" for d in found if d.metadata["Name"]}, key=str.lower
    )


def corpus(args: argparse.Namespace):
    """Training pairs, scored validation and test pairs, and the fingerprints of all that is seen."""
    everything = mine([*default_roots(), *args.corpus], progress=False, body_words=args.train_body_words)
    train = [pair for pair in everything if split_of(pair.module) == "train"]
    tuning = [pair for pair in everything if split_of(pair.module) == "validation"]
    base = packages_of()
    scored = [mine(split=name, packages=base) for name in ("validation", "test")]
    validation = held_out(scored[0], fingerprints(train))
    seen = fingerprints([*train, *tuning])
    test = held_out(scored[1], seen)
    order = lambda pair: hashlib.sha256(f"{pair.module}:{pair.qualname}".encode()).digest()  # noqa: E731
    counts = {
        "train": len(train),
        "validation": len(tuning),
        "validation_scored": len(validation),
        "test_base": len(scored[1]),
        "test_held_out": len(test),
        "fingerprints": len(seen),
    }
    return train, sorted(validation, key=order), sorted(test, key=order), seen, counts


def make_tokenizer(pairs, args: argparse.Namespace) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=20,
    )
    texts = (" ".join([pair.head, *pair.body.split()[:80]]) for pair in pairs)
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=args.source_tokens,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int) -> list[np.ndarray]:
    rows = tokenizer([" ".join(text.split()[:limit]) for text in texts], truncation=True, max_length=limit)["input_ids"]
    return [np.asarray(row, dtype=np.int64) for row in rows]


def pad(rows: list[np.ndarray], multiple: int) -> torch.Tensor:
    width = -(-max(map(len, rows)) // multiple) * multiple
    table = np.full((len(rows), width), PAD, dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(table)


def batches(sources, targets, rows: np.ndarray, size: int, rng: np.random.Generator):
    """One epoch of length-bucketed batches of `rows`, in random order."""
    order, window = rng.permutation(rows), size * 40
    groups = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: (len(sources[i]) // 16, len(targets[i])))
        groups += [part[i : i + size] for i in range(0, len(part), size)]
    for index in rng.permutation(len(groups)):
        yield groups[index]


def splice(source: np.ndarray, target: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """The source with its head put in at a random place: the easy task that teaches copying."""
    text, head = source[1:-1], target[1:-1]
    place = int(rng.integers(0, max(1, min(len(text), limit - 2 - len(head)))))
    return np.concatenate([[BOS], np.concatenate([text[:place], head, text[place:]])[: limit - 2], [EOS]])


# ---- model ------------------------------------------------------------------------------


def make_model(args: argparse.Namespace, vocab: int) -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=vocab,
        d_model=args.d_model,
        encoder_layers=args.encoder_layers,
        decoder_layers=args.decoder_layers,
        encoder_attention_heads=args.heads,
        decoder_attention_heads=args.heads,
        encoder_ffn_dim=args.encoder_ffn_dim,
        decoder_ffn_dim=args.decoder_ffn_dim,
        max_position_embeddings=128,
        dropout=args.dropout,
        activation_function="gelu",
        scale_embedding=False,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    model = BartForConditionalGeneration(config)
    # BART's 0.02 is meant for width 1024. Here it left the encoder so quiet that it collapsed to one constant.
    for name, weight in model.named_parameters():
        if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")):
            torch.nn.init.xavier_uniform_(weight, gain=0.5 if "out_proj" in name or "fc2" in name else 1.0)
    return model


@torch.no_grad()
def encoder_spread(model, source: torch.Tensor) -> float:
    """How much encoder outputs differ between places: near 1 in a live encoder, 0 in a collapsed one."""
    model.eval()
    hidden = model.model.encoder(input_ids=source, attention_mask=(source != PAD).long()).last_hidden_state
    return float(hidden[source != PAD].float().std(dim=0).mean())


def logits_of(model, source: torch.Tensor, target: torch.Tensor, bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the positions that count; `bf16` runs the matrix products in it."""
    start, counted = torch.full((len(target), 1), EOS), target != PAD
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        hidden = model.model(
            input_ids=source,
            attention_mask=(source != PAD).long(),
            decoder_input_ids=torch.cat([start, target[:, :-1]], dim=1),
            use_cache=False,
        ).last_hidden_state
        return model.lm_head(hidden[counted]), target[counted]


class PooledDropout:
    """`torch.nn.functional.dropout` from a pool of random masks, read at a random place.

    PyTorch draws its masks on one core, a sixth of a step of so small a model.
    """

    def __init__(self, rng: np.random.Generator, size: int = 1 << 23) -> None:
        self.rng, self.size, self.pools = rng, size, {}

    def __call__(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return x
        pool, used = self.pools.get((p, x.dtype), (None, 0))
        if pool is None or used >= 500:
            pool, used = torch.empty(self.size, dtype=x.dtype).bernoulli_(1 - p).div_(1 - p), 0
        self.pools[p, x.dtype] = (pool, used + 1)
        place = int(self.rng.integers(0, self.size - x.numel()))
        return x * pool[place : place + x.numel()].view(x.shape)


class FourBit:
    """Forward and backward see symmetric 4-bit codes per output row; the update goes to the float weights."""

    def __init__(self, model) -> None:
        self.weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        self.weights = list({id(w): w for w in self.weights if w is not model.get_input_embeddings().weight}.values())

    def __enter__(self) -> None:
        self.kept = [weight.data for weight in self.weights]
        for weight in self.weights:
            scale = weight.data.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 7
            weight.data = (weight.data / scale).round() * scale

    def __exit__(self, *_: object) -> None:
        for weight, data in zip(self.weights, self.kept, strict=True):
            weight.data = data


@torch.no_grad()
def summarize(
    model, tokenizer, texts: list[str], args: argparse.Namespace, decoding: dict, size: int = 64
) -> list[str]:
    model.eval()
    rows = encode(tokenizer, texts, args.source_tokens)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    found = [""] * len(rows)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        source = pad([rows[i] for i in part], 1)
        ids = model.generate(input_ids=source, attention_mask=(source != PAD).long(), **decoding)
        for i, text in zip(part, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            found[i] = text.strip()
    return found


@torch.no_grad()
def validation_loss(model, rows, args: argparse.Namespace) -> float:
    model.eval()
    total = count = 0.0
    for start in range(0, len(rows[0]), args.batch):
        source, target = (pad(part[start : start + args.batch], 8) for part in rows)
        logits, labels = logits_of(model, source, target, args.bf16)
        total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        count += len(labels)
    return total / count


# ---- checkpoints ------------------------------------------------------------------------

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one parameter


def save_state(path: Path, model, optimizer, average: dict, progress: tuple[int, int, float]) -> None:
    """The whole run in one safetensors file; `progress` is (step, epoch, seconds spent)."""
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {f"average.{name}": value for name, value in average.items()}
    tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"{key}.{named[id(parameter)]}": moments[key] for key in _MOMENTS}
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}  # tied ones share memory
    metadata = dict(zip(("step", "epoch", "spent"), map(repr, progress), strict=True))
    atomic(path, lambda name: save_file(tensors, name, metadata))


def load_state(path: Path, model, optimizer, average: dict) -> tuple[int, int, float]:
    """Fill `model`, `optimizer` and `average` from `save_state`'s file; returns its `progress`."""
    with safe_open(path, "pt") as file:
        model.load_state_dict({name: file.get_tensor(f"model.{name}") for name in model.state_dict()})
        for name in average:
            average[name] = file.get_tensor(f"average.{name}")
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in _MOMENTS}
        progress = file.metadata()
    return int(progress["step"]), int(progress["epoch"]), float(progress["spent"])


# ---- export -----------------------------------------------------------------------------


def export(folder: Path, weights: dict, tokenizer, args, seen, counts, scores: dict, decoding: dict) -> None:
    model = make_model(args, len(tokenizer))
    model.load_state_dict(weights)
    model = model.half().eval()
    for name, value in decoding.items():
        setattr(model.generation_config, name, value)
    model.generation_config.max_length = None
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        np.save(Path(scratch, "seen.npy"), np.asarray(seen, dtype=np.uint32))
        recipe = {
            "task": "docstring body -> first sentence",
            "arguments": {
                k: v for k, v in vars(args).items() if k not in ("corpus", "export", "checkpoints", "resume")
            },
            "parameters": sum(p.numel() for p in model.parameters()),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
            "counts": counts,
            "scores": scores,
            "decoding": decoding,
            "base": list(BASE_DISTRIBUTIONS),
            "installed": versions_in(None),
            "corpus": [name for path in args.corpus for name in versions_in(path)],
        }
        Path(scratch, "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
        Path(scratch, "README.md").write_text(card(recipe))
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(scratch).iterdir()):
            os.chmod(path, 0o644)
            os.replace(path, folder / path.name)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(export=folder.name, bytes=size)
    if size > 10_000_000:
        raise SystemExit(f"the exported folder has {size} bytes, more than the 10 MB it may have")


CARD = """---
language: en
library_name: transformers
pipeline_tag: summarization
---
# Docstring teacher

A BART of {parameters:,} parameters ({layers} layers, d {d_model}) that writes the first sentence of a
docstring from the rest of it. It is the float model that the offline demo of dqkernels quantizes;
it summarizes docstrings and nothing else. Sources are cut at {source_tokens} tokens. fp16 weights.

## Scores

ROUGE F (stemmed, mean over pairs). Test: the {test_held_out:,} held-out pairs of the standard library and
of {base}, with their requirements; decoding was tuned on
validation only. The lead is the first 12 words of the body.

| | ROUGE-1 | ROUGE-2 | ROUGE-L |
|---|---|---|---|
{table}

## Data and split

Docstrings of installed packages, mined by `dqkernels.data.docstrings.mine`: {train:,} training pairs
and {validation:,} validation pairs. A pair's split is a hash of its module's dotted name
({test_percent}% test, {validation_percent}% validation), so a module keeps its split in every version of
its package. Of {test_base:,} test pairs, those whose first sentence or body's opening also stands
in training or validation data are left out; `seen.npy` has the 32-bit fingerprints of those
({fingerprints:,}), and `held_out` applies them to whatever versions are installed. Packages that were read:

{data}

## Recipe

`python benchmarks/train_demo_teacher.py --corpus DIR --minutes {minutes:g}`; its `--help` says how to fill
DIR, and `recipe.json` beside this page has every hyper-parameter and version.

## Licence note

The weights were trained on documentation of open-source packages under their own licences (mostly
BSD, MIT, Apache-2.0 and PSF). No text of theirs is shipped here, only weights, a vocabulary and
fingerprints; the model can reproduce short phrases of its training data.
"""


def card(recipe: dict) -> str:
    arguments = recipe["arguments"]
    rows = [
        f"| {name} | {row['rouge1']:.2f} | {row['rouge2']:.2f} | {row['rougeL']:.2f} |"
        for name, row in recipe["scores"].items()
    ]
    titles = ("Installed", recipe["installed"]), ("Corpus folder", recipe["corpus"])
    return CARD.format(
        **{**arguments, **recipe["counts"]},  # both hold `steps`: those asked for, and those taken
        parameters=recipe["parameters"],
        layers=f"{arguments['encoder_layers']}+{arguments['decoder_layers']}",
        base=", ".join(recipe["base"]),
        table="\n".join(rows) or "| not scored yet | | | |",
        test_percent=TEST_PERCENT,
        validation_percent=VALIDATION_PERCENT,
        data="\n\n".join(f"{title}: {', '.join(names)}." for title, names in titles if names),
    )
