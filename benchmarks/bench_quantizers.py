"""Which weight quantizer by default: every rule of every width on the demo's teacher, without training.

Packs the shipped teacher by each rule, embedding and head included, and scores it on held-out docstrings of
installed packages. Writes results/quantizers.json; docs/measured.md quotes it.

python benchmarks/bench_quantizers.py [--pairs 320] [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import dqkernels
from dqkernels.bench import demo, record
from dqkernels.config import QUANTIZERS_BY_BITS
from dqkernels.nn import PackedModule

GROUPED = 64  # the one group size tried: 32 and 128 lie around it


def weight_error(model: torch.nn.Module, teacher: torch.nn.Module) -> float:
    """Squared error of all packed weights, relative to the sum of their squares."""
    floats = dict(teacher.named_modules())
    error = total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            weight = floats[name].weight.detach().double()
            error += float((module.dequantize().double() - weight).square().sum())
            total += float(weight.square().sum())
    return error / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=320, help="held-out docstrings to score (default 320)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "quantizers.json"))
    given = parser.parse_args()
    folder = demo.teacher_folder()
    drawn, counts = demo.draw_pairs(folder, given.pairs, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load() -> torch.nn.Module:
        return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()

    teacher = load()
    heads = [pair.head for pair in drawn]
    choices = [
        {"weight_bits": bits, "weight_quantizer": rule, "group_size": group}
        for bits in (8, 4, 2)
        for rule in QUANTIZERS_BY_BITS[bits]
        for group in ((-1,) if bits == 8 else (-1, GROUPED))
    ]
    rows = []
    for choice in tqdm([None, *choices], desc="quantizers", unit="model"):
        model = load()
        if choice is not None:
            bits = choice["weight_bits"]
            dqkernels.quantize_(model, dqkernels.DQConfig(embedding_bits=bits, attention="float", **choice))
        texts = demo.write_texts(model, tokenizer, drawn, lambda *_: None)
        rows.append(
            {
                "name": "float" if choice is None else f"W{choice['weight_bits']} {choice['weight_quantizer']}",
                "weight_bits": 32 if choice is None else choice["weight_bits"],
                "group_size": -1 if choice is None else choice["group_size"],
                "weight_error_ratio": 0.0 if choice is None else weight_error(model, teacher),
                **{f"{name.lower()}_score": value for name, value in demo.score(texts, heads).items()},
            }
        )
    result = record.new(
        "quality",
        settings={"model": "docstring_teacher", "embedding": "same bits as weights", **counts},
        protocol={"score": "ROUGE F, stemmed, mean over pairs", "decoding": "generation_config of the teacher"},
        rows=rows,
    )
    record.write(result, given.out)
    table = Table(title=f"no training, {counts['scored']} held-out docstrings")
    for column in ("rule", "group", "weight error", "R-1", "R-2", "R-L"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for row in rows:
        group = "-" if row["group_size"] == -1 else str(row["group_size"])
        scores = [f"{row[f'{name}_score']:.2f}" for name in ("rouge1", "rouge2", "rougel")]
        table.add_row(row["name"], group, f"{row['weight_error_ratio']:.5f}", *scores)
    Console().print(table)


if __name__ == "__main__":
    main()
