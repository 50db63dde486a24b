"""What `bench generate` runs: models by name or folder, cells (work of one shape), and the named sweeps of cells.

A sweep stands in order of worth: a run that is short of time has its first cells, and names the others.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dqkernels.bench import size
from dqkernels.bench.shapes import PRESETS


@dataclass(frozen=True)
class Cell:
    """One piece of work: so many sources of so many tokens, each of which gets so many new ones, exactly.

    Attributes:
        layers: of the model, encoder-decoder, as `6-3`.
    """

    layers: str
    batch_size: int
    num_beams: int
    source_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        beams = "greedy" if self.num_beams == 1 else f"{self.num_beams} beams"
        return f"batch {self.batch_size}, {beams}, {self.source_tokens}+{self.new_tokens} tokens, layers {self.layers}"

    def row(self) -> dict:
        """Its fields as they stand in a record."""
        return asdict(self)

    @classmethod
    def of(cls, row: dict) -> Cell:
        """The cell that a row of a record belongs to."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class T5Shape(size.Depths):
    """An encoder-decoder of the first T5 family: relative positions, tied head."""

    name: str
    d_model: int
    ffn: int
    vocab: int
    heads: int
    encoder: int
    decoder: int

    def hf_config(self, **changes):
        """The transformers configuration of this shape; needs no network."""
        from transformers import T5Config

        sizes = {"num_layers": self.encoder, "num_decoder_layers": self.decoder, "num_heads": self.heads}
        widths = {"d_model": self.d_model, "d_ff": self.ffn, "d_kv": self.d_model // self.heads}
        return T5Config(vocab_size=self.vocab, decoder_start_token_id=0, **{**sizes, **widths, **changes})

    def model_class(self) -> type:
        """The class of transformers with this shape's head."""
        from transformers import T5ForConditionalGeneration

        return T5ForConditionalGeneration


#: Models that need no download: random weights.
SHAPES: dict[str, size.Shape | T5Shape] = {**size.SHAPES, "t5-base": T5Shape("t5-base", 768, 3072, 32128, 12, 12, 12)}
_LAYERS = re.compile(r"([1-9]\d*)-([1-9]\d*)")


@dataclass(frozen=True)
class Source:
    """Where a float model comes from.

    Attributes:
        name: for tables and records: no path.
        layers: of the model as it is.
        positions: most tokens of either side, or None.
        shape: of random weights, or None for `folder`.
        folder: of a float model, or None.
    """

    name: str
    layers: str
    positions: int | None
    shape: size.Shape | T5Shape | None = None
    folder: Path | None = None

    def build(self, layers: str) -> nn.Module:
        """The model in float32 on the CPU, with other depths where they are asked for (shapes only)."""
        if self.shape is not None:
            return _lively(size.random_model(self.shape.with_layers(*map(int, layers.split("-")))))
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM.from_pretrained(self.folder, dtype=torch.float32, local_files_only=True).eval()

    def model_class(self) -> type:
        """The class of transformers that `build` makes, imported; builds nothing."""
        if self.shape is not None:
            return self.shape.model_class()
        from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]


@torch.no_grad()
def _lively(model: nn.Module) -> nn.Module:
    """Random weights whose texts depend on their source, and change from token to token.

    Plain noise repeats the token it has just read, and the source moves its logits by a tenth or less: proofs and
    comparisons of tokens would see neither another source nor another order of the beams. How much work a call is
    stays as it was: what makes the attention's scores, and so the shares that a kernel may skip, is not touched.
    """
    scale = model.config.d_model**0.5 if getattr(model.config, "scale_embedding", False) else 1.0
    for name, parameter in model.named_parameters():
        if "decoder.embed_positions" in name:
            parameter.mul_(3 * scale)
        elif re.search(r"\bdecoder\..*(_attn\.(v|out)_proj|Attention\.[vo])\.weight$", name):
            parameter.mul_(1.5 / (parameter.std() * parameter.shape[1] ** 0.5))  # nearly as large as what it joins
    return model


def source(preset_or_path: str) -> Source:
    """The shape, or the model in a folder, of which only the config is read here.

    Raises:
        ValueError: for an unknown name, a folder without a float encoder-decoder model.
    """
    if preset_or_path in SHAPES:
        shape = SHAPES[preset_or_path]
        positions = shape.positions - 2 if isinstance(shape, size.Shape) else None
        return Source(shape.name, shape.layers, positions, shape=shape)
    folder = Path(preset_or_path)
    if preset_or_path in PRESETS and not folder.exists():
        raise ValueError(
            f"preset_or_path must be a whole model, {preset_or_path} is of single layers: dqkernels bench linear "
            f"--shapes 1x{preset_or_path}, or bench gemm"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"preset_or_path must be one of {sorted(SHAPES)} or a folder with a config.json, got {preset_or_path!r}"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not config.is_encoder_decoder:
        raise ValueError(f"preset_or_path must hold an encoder-decoder, got a {type(config).__name__}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("preset_or_path is packed already: give the folder of the float model")
    # T5 spells its depths num_layers and num_decoder_layers.
    names = [("encoder_layers", "num_layers"), ("decoder_layers", "num_decoder_layers")]
    layers = "-".join(str(next(getattr(config, n) for n in pair if hasattr(config, n))) for pair in names)
    positions = getattr(config, "max_position_embeddings", None)
    return Source(os.path.basename(os.path.realpath(folder)), layers, positions, folder=folder)


# -------------------------------------------------------------------------------------------- sweeps

#: (batch, beams, source, new). On a GPU the first three are those with a goal: one text; 4 beams over long sources;
#: what others publish of bart-large-cnn (32 sources of 260 to 440 tokens).
_HEADLINE = {
    "cuda": [(1, 1, 256, 64), (16, 4, 1024, 64), (32, 1, 350, 128), (1, 4, 256, 64), (8, 1, 256, 64), (64, 1, 256, 64)],
    "cpu": [(1, 1, 256, 64), (1, 4, 256, 64), (8, 1, 256, 64), (4, 1, 256, 64), (1, 1, 1024, 64), (16, 1, 256, 64)],
}
_LAYER_WORK = {"cuda": [(1, 1, 256, 64), (16, 4, 256, 64)], "cpu": [(1, 1, 256, 64), (4, 4, 256, 64)]}
#: The batch with a goal, then the ends, then what lies between.
_MEMORY_BATCHES = (16, 1, 64, 4, 32, 8, 2)
SWEEPS = {
    "headline": "cells with a goal first, then latency and throughput by batch",
    "layers": "full and shallower models",
    "memory": "4 beams over 1024 source tokens, batch 1 to 64: few samples, for the peak of memory",
}
#: Why a cell has no rows in the record of a run that goes on; in that of one that was killed it stays.
NOT_YET = "the run had not come to it"
#: Samples of a candidate: a sweep of memory needs no statistics of time.
ROUNDS = {"headline": 50, "layers": 50, "memory": 3}
#: The model of a sweep where none is named.
_DEFAULT_MODEL = {"cuda": "bart-large", "cpu": "bart-base"}


def default_model(device: torch.device, sweep: str) -> str:
    """The shape of a sweep where the caller names none."""
    return "bart-large" if sweep == "memory" else _DEFAULT_MODEL[device.type]


def depths(found: Source) -> list[str]:
    """Depths of the sweep `layers`: the model's own, half its decoder, then one layer a side (a quarter of 12)."""
    encoder, decoder = map(int, found.layers.split("-"))
    half, quarter = max(1, decoder // 2), decoder // 4
    last = f"{encoder}-{quarter}" if decoder >= 12 else "1-1"
    return list(dict.fromkeys([found.layers, f"{encoder}-{half}", last]))


def plan(
    found: Source,
    device: torch.device,
    sweep: str = "headline",
    *,
    batch_size: Sequence[int] | None = None,
    num_beams: Sequence[int] | None = None,
    source_tokens: Sequence[int] | None = None,
    new_tokens: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
) -> list[Cell]:
    """The cells of a sweep, in order. An axis that is given takes its place in every cell; equal cells are one.

    Lengths of a sweep are cut to what the model has positions for; lengths that are given have to fit.

    Raises:
        ValueError: for an unknown sweep, a size below 1, lengths beyond the model, depths of a folder's model that are
            not its own.
    """
    if sweep not in SWEEPS:
        raise ValueError(f"sweep must be one of {', '.join(SWEEPS)}, got {sweep!r}")
    given = {"batch_size": batch_size, "num_beams": num_beams, "source_tokens": source_tokens, "new_tokens": new_tokens}
    for name, values in given.items():
        if values is not None and (len(values) == 0 or min(values) < 1):
            raise ValueError(f"{name} must be 1 or more, got {list(values)}")
    _check_lengths(found, source_tokens, new_tokens)
    if sweep == "memory":
        work = [(batch, 4, 1024, 64) for batch in _MEMORY_BATCHES]
    else:
        work = (_HEADLINE if sweep == "headline" else _LAYER_WORK)[device.type]
    chosen = _layers(found, layers) or (depths(found) if sweep == "layers" and found.shape else [found.layers])
    names = list(given)
    cells: dict[Cell, None] = {}
    for depth, numbers in itertools.product(chosen, work):
        base = dict(zip(names, numbers, strict=True))
        if found.positions is not None:
            base["source_tokens"] = min(base["source_tokens"], found.positions)
            base["new_tokens"] = min(base["new_tokens"], found.positions - 1)
        options = ([base[name]] if given[name] is None else given[name] for name in names)
        cells.update(dict.fromkeys(Cell(depth, *values) for values in itertools.product(*options)))
    return list(cells)


def _check_lengths(found: Source, sources: Iterable[int] | None, new: Iterable[int] | None) -> None:
    if found.positions is None:
        return
    # The start token has a position too.
    for name, values, extra in (("source_tokens", sources, 0), ("new_tokens", new, 1)):
        if values is not None and max(values) + extra > found.positions:
            raise ValueError(f"{name} must fit the {found.positions} positions of {found.name}, got {max(values)}")


def _layers(found: Source, layers: Sequence[str] | None) -> list[str] | None:
    if layers is None:
        return None
    for one in layers:
        if not _LAYERS.fullmatch(one):
            raise ValueError(f"layers must be encoder-decoder such as 6-3, got {one!r}")
        if found.shape is None and one != found.layers:
            raise ValueError(f"layers of a folder's model are its own, {found.layers}, got {one!r}")
    return list(layers)
