"""Train the small BART that `dqkernels demo` ships: docstring body -> first sentence.

The data is what is installed: docstrings of the standard library and of site-packages, and
of the packages in `--corpus` folders. Nothing is downloaded. To rebuild the shipped model,
fill a folder with docstring-rich packages (they are read, never imported), then train:

    pip install --no-deps --no-compile --only-binary :all: --target corpus \\
        scipy pandas scikit-learn sympy networkx scikit-image statsmodels astropy xarray dask \\
        distributed jax flax optax keras sqlalchemy django twisted tornado bokeh plotly seaborn \\
        nltk gensim librosa numba ibis-framework polars lightning torchvision torchaudio timm \\
        diffusers peft accelerate onnx tensorflow
    python benchmarks/train_demo_teacher.py --corpus corpus --minutes 85

The learning rate follows the elapsed fraction of `--minutes` (or of `--steps`), so that a
slower machine gets fewer steps of the same schedule. A run that was cut off goes on with
`--resume`. Every validation refreshes the export folder; the end tunes decoding on the
validation split (the cheapest within --decoding_slack of the best), scores the held-out test
split once, and writes the model card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_teacher_parts import (
    FourBit,
    PooledDropout,
    atomic,
    batches,
    corpus,
    encode,
    encoder_spread,
    export,
    load_state,
    logits_of,
    make_model,
    make_tokenizer,
    pad,
    save_state,
    say,
    splice,
    summarize,
    validation_loss,
)
from transformers import PreTrainedTokenizerFast

from dqkernels.data.docstrings import DocPair, lead, packages_of
from dqkernels.environment import keep_freed_memory
from dqkernels.metrics.rouge import rouge

HERE = Path(__file__).resolve().parent.parent
GREEDY = {"num_beams": 1, "max_new_tokens": 40, "do_sample": False}
BEAMS = {"max_new_tokens": 40, "do_sample": False, "early_stopping": True, "no_repeat_ngram_size": 3}
TUNED = [  # from cheap to dear
    GREEDY,
    {**GREEDY, "no_repeat_ngram_size": 3},
    *({**BEAMS, "num_beams": beams, "length_penalty": penalty} for beams in (2, 4) for penalty in (0.6, 0.8, 1.0, 1.5)),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", action="append", default=[], metavar="DIR", help="a folder of more packages to read; repeatable")
    add("--minutes", type=float, default=85.0, help="wall time of training; the schedule follows it (default 85)")
    add("--steps", type=int, default=0, help="train so many steps instead of --minutes")
    add("--resume", action="store_true", help="go on from the checkpoint in --checkpoints, if there is one")
    add("--checkpoints", default="teacher_checkpoints", metavar="DIR", help="where the run's state is kept")
    add("--checkpoint_minutes", type=float, default=5.0, help="minutes between checkpoints (default 5)")
    add("--eval_minutes", type=float, default=10.0, help="minutes between validations (default 10)")
    add("--export", default=str(HERE / "dqkernels/data/docstring_teacher"), metavar="DIR", help="'' writes no model")
    add("--train_body_words", type=int, default=12, help="fewest words of a TRAINING body (scored ones: 30)")
    add("--vocab_size", type=int, default=4096, help="byte-level BPE entries")
    add("--d_model", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--encoder_layers", type=int, default=3)
    add("--decoder_layers", type=int, default=2, help="few, for decoding speed")
    add("--encoder_ffn_dim", type=int, default=640)
    add("--decoder_ffn_dim", type=int, default=512)
    add("--source_tokens", type=int, default=96)
    add("--target_tokens", type=int, default=48)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=7e-4, help="peak of the warm-up + cosine schedule")
    add("--warmup", type=float, default=0.03, help="fraction of the run")
    add("--warmup_steps", type=int, default=600, help="and at least so many steps, however slow they are")
    add("--weight_decay", type=float, default=0.01)
    add("--dropout", type=float, default=0.1)
    add("--label_smoothing", type=float, default=0.1)
    add("--ema", type=float, default=0.999, help="decay of the averaged weights, which are the ones shipped")
    add("--copy_phase", type=float, default=0.12, help="fraction of the run; see splice()")
    add("--base_repeats", type=int, default=2, help="how often an epoch holds a pair of the scored distributions")
    add("--base_from", type=float, default=0.4, help="fraction of the run from which --base_repeats counts")
    add("--quant_phase", type=float, default=0.0, help="last fraction in which half of the steps see 4-bit weights")
    add("--decoding_slack", type=float, default=0.25, help="ROUGE-L that cheaper decoding may cost on validation")
    add("--bf16", action="store_true", help="bf16 matrix products: faster where the CPU has AMX, slower elsewhere")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    return parser.parse_args()


# ---- the run ----------------------------------------------------------------------------


def train(args, tokenizer, pairs, validation, seen, counts) -> dict:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = make_model(args, len(tokenizer))
    model.set_attn_implementation("eager")  # faster than the fused kernel at these lengths
    F.dropout = PooledDropout(rng)
    if args.minutes < 2 and not args.steps:
        say(note="a trial: too short to learn")
    average = {name: value.clone() for name, value in model.state_dict().items()}
    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    four_bit = FourBit(model)
    sources = encode(tokenizer, [pair.body for pair in pairs], args.source_tokens)
    targets = encode(tokenizer, [pair.head for pair in pairs], args.target_tokens)
    sample = validation[:150]
    rows = [
        encode(tokenizer, [p.body for p in validation], args.source_tokens),
        encode(tokenizer, [p.head for p in validation], args.target_tokens),
    ]
    state_path = Path(args.checkpoints) / "state.safetensors"
    step, epoch, spent = 0, 0, 0.0
    if args.resume and state_path.exists():
        step, epoch, spent = load_state(state_path, model, optimizer, average)
        rng = np.random.default_rng([args.seed, step])
        say(resumed=step, epoch=epoch, minutes=spent / 60)
    size = sum(p.numel() for p in model.parameters())
    lengths = [float(np.mean([len(row) for row in part])) for part in (sources, targets)]
    say(parameters=size, pairs=len(pairs), source=lengths[0], target=lengths[1])
    start = time.monotonic() - spent
    saved = checked = logged = time.monotonic()
    lead_score = rouge([lead(p.body) for p in sample], [p.head for p in sample])["rougeL"]
    tokens, losses, scores, fraction = 0, [], {}, 0.0

    def elapsed() -> float:
        return step / args.steps if args.steps else (time.monotonic() - start) / (60 * args.minutes)

    def save() -> None:
        save_state(state_path, model, optimizer, average, (step, epoch, time.monotonic() - start))

    def validate() -> None:
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(average)
        texts = summarize(model, tokenizer, [p.body for p in sample], args, GREEDY)
        score = rouge(texts, [p.head for p in sample])
        scores["validation, first 150, greedy"] = score
        loss = validation_loss(model, rows, args)
        say(step=step, epoch=epoch, validation_loss=loss, **score, lead_rougeL=lead_score)
        for text, pair in list(zip(texts, sample, strict=True))[:4]:
            print(f"    {text!r} for {pair.head!r}", flush=True)
        model.load_state_dict(kept)
        if args.export:
            export(Path(args.export), average, tokenizer, args, seen, counts, dict(scores), GREEDY)

    base = packages_of()
    scored_ones = np.array([i for i, pair in enumerate(pairs) if pair.module.partition(".")[0] in base], dtype=np.int64)
    while fraction < 1:
        rows_of_epoch = np.arange(len(pairs))
        if fraction >= args.base_from:
            rows_of_epoch = np.concatenate([rows_of_epoch, *[scored_ones] * (args.base_repeats - 1)])
        for group in batches(sources, targets, rows_of_epoch, args.batch, rng):
            fraction = elapsed()
            if fraction >= 1:
                break
            chance = 0.5 * max(0.0, 1 - fraction / args.copy_phase) if args.copy_phase else 0.0
            chosen = [
                splice(sources[i], targets[i], args.source_tokens, rng) if rng.random() < chance else sources[i]
                for i in group
            ]
            source, target = pad(chosen, 16), pad([targets[i] for i in group], 8)
            warm = min(1.0, fraction / max(args.warmup, 1e-9), (step + 1) / max(args.warmup_steps, 1))
            rate = args.lr * max(1e-3, warm * 0.5 * (1 + math.cos(math.pi * fraction)))
            for part in optimizer.param_groups:
                part["lr"] = rate
            model.train()
            quantized = fraction > 1 - args.quant_phase and step % 2 == 0
            if quantized:
                four_bit.__enter__()
            try:
                logits, labels = logits_of(model, source, target, args.bf16)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
                loss.backward()
            finally:
                if quantized:
                    four_bit.__exit__()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            blend = 1 - min(args.ema, step / (step + 20))
            now = model.state_dict()
            torch._foreach_lerp_([average[name] for name in now], list(now.values()), blend)
            tokens += source.numel() + target.numel()
            losses.append(loss.detach())
            if step % 100 == 0:
                mean, seconds = float(torch.stack(losses).mean()), time.monotonic() - logged
                spread = encoder_spread(model, source[:8])
                speed = tokens / seconds
                say(step=step, epoch=epoch, done=fraction, loss=mean, lr=rate, tokens_per_s=speed, spread=spread)
                if not math.isfinite(mean):
                    raise SystemExit("the loss is not finite; lower --lr")
                if spread < 0.02:
                    raise SystemExit("the encoder gives the same output for every word; lower --lr and start anew")
                tokens, losses, logged = 0, [], time.monotonic()
            if time.monotonic() - checked > 60 * args.eval_minutes:
                validate()
                checked = logged = time.monotonic()
                tokens = 0
            if time.monotonic() - saved > 60 * args.checkpoint_minutes:
                save()
                saved = time.monotonic()
        else:
            epoch += 1
    save()
    counts["steps"], counts["epochs"] = step, epoch
    return average


def main() -> None:
    args = parse()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    tokenizer_folder = Path(args.checkpoints) / "tokenizer"
    kept = Path(args.checkpoints) / "corpus.json"
    if args.resume and kept.exists():
        *lists, seen, counts = json.loads(kept.read_text())
        pairs, validation, test = ([DocPair(*fields) for fields in rows] for rows in lists)
    else:
        pairs, validation, test, seen, counts = corpus(args)
        lists = [[dataclasses.astuple(pair) for pair in part] for part in (pairs, validation, test)]
        atomic(kept, lambda name: Path(name).write_text(json.dumps([*lists, seen, counts])))
    say(**counts)
    if args.resume and tokenizer_folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))
    else:
        tokenizer = make_tokenizer(pairs, args)
        tokenizer.save_pretrained(str(tokenizer_folder))
    weights = train(args, tokenizer, pairs, validation, seen, counts)
    if not args.export:
        return
    model = make_model(args, len(tokenizer))
    model.load_state_dict({name: value.half().float() for name, value in weights.items()})
    tuning = validation[:500]
    tuned = []
    for choice in TUNED:
        started = time.monotonic()
        score = rouge(summarize(model, tokenizer, [p.body for p in tuning], args, choice), [p.head for p in tuning])
        say(decoding=json.dumps(choice), rougeL=score["rougeL"], seconds=time.monotonic() - started)
        tuned.append(score["rougeL"])
    # The demo decodes every pair with every width: a little of the score buys its speed.
    enough = max(tuned) - args.decoding_slack
    decoding = next(choice for choice, score in zip(TUNED, tuned, strict=True) if score >= enough)
    heads = [pair.head for pair in test]
    scores = {
        "lead (12 words), test": rouge([lead(p.body) for p in test], heads),
        "teacher, test": rouge(summarize(model, tokenizer, [p.body for p in test], args, decoding), heads),
        "teacher greedy, test": rouge(summarize(model, tokenizer, [p.body for p in test], args, GREEDY), heads),
        "lead (12 words), validation": rouge([lead(p.body) for p in tuning], [p.head for p in tuning]),
        "teacher, validation": rouge(
            summarize(model, tokenizer, [p.body for p in tuning], args, decoding), [p.head for p in tuning]
        ),
    }
    for name, row in scores.items():
        say(scored=name.replace(" ", "_"), **row)
    export(Path(args.export), weights, tokenizer, args, seen, counts, scores, decoding)


if __name__ == "__main__":
    sys.exit(main())
