"""Sizes of encoder-decoder models: the arithmetic of the DQ-BART paper, and files that are really written.

    paper_bytes  = (b_w * (N_linear + N_bias) + b_e * N_embedding + 32 * (N_layernorm + N_positions)) / 8
    packed_bytes = codes in blocks of 16 rows x 128 columns + fp32 scale per row + 16 bits for everything else

Only the paper's rule gives its 16.5x and 27.7x: biases counted at b bits, scales and logits bias free.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import nn

from dqkernels import packing
from dqkernels.bench import record
from dqkernels.config import DQConfig

MIB = 1 << 20
#: In place of weight and embedding bits: a student that is distilled to fewer layers and stays in fp32.
FLOAT_BITS = 32


class Depths:
    """What shapes of every family have: numbers of encoder and decoder layers."""

    encoder: int
    decoder: int

    @property
    def layers(self) -> str:
        """Encoder-decoder, as `6-3`."""
        return f"{self.encoder}-{self.decoder}"

    def with_layers(self, encoder: int, decoder: int) -> Self:
        """The same widths with other depths."""
        return replace(self, encoder=encoder, decoder=decoder)


@dataclass(frozen=True)
class Shape(Depths):
    """An encoder-decoder of the BART family.

    Attributes:
        name: preset name.
        family: `bart` or `mbart` (which adds a final LayerNorm to each side).
        d_model, ffn, vocab, heads: widths.
        positions: rows of each learned position table, BART's offset of 2 included.
        encoder, decoder: layers.
    """

    name: str
    family: str
    d_model: int
    ffn: int
    vocab: int
    positions: int
    heads: int
    encoder: int
    decoder: int

    def hf_config(self, **changes):
        """The transformers configuration of this shape; needs no network."""
        from transformers import BartConfig, MBartConfig

        cls = {"bart": BartConfig, "mbart": MBartConfig}[self.family]
        sides = {
            f"{side}_{key}": value
            for side, depth in (("encoder", self.encoder), ("decoder", self.decoder))
            for key, value in (("layers", depth), ("ffn_dim", self.ffn), ("attention_heads", self.heads))
        }
        return cls(
            d_model=self.d_model,
            vocab_size=self.vocab,
            max_position_embeddings=self.positions - 2,
            **{**sides, **changes},
        )

    def model_class(self) -> type:
        """The class of transformers with this shape's head."""
        from transformers import BartForConditionalGeneration, MBartForConditionalGeneration

        return {"bart": BartForConditionalGeneration, "mbart": MBartForConditionalGeneration}[self.family]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "bart", 64, 128, 512, 66, 4, 2, 2),
        Shape("bart-base", "bart", 768, 3072, 50265, 1026, 12, 6, 6),
        Shape("bart-large", "bart", 1024, 4096, 50265, 1026, 16, 12, 12),
        Shape("mbart-large", "mbart", 1024, 4096, 250027, 1026, 16, 12, 12),
    )
}


@dataclass(frozen=True)
class Counts:
    """Parameters by kind; `rows` are the output channels of all linears (one scale each)."""

    embedding: int
    linear: int
    bias: int
    layernorm: int
    positions: int
    logits_bias: int
    rows: int

    @property
    def total(self) -> int:
        """As the paper counts: without the logits bias, which is a buffer of zeros."""
        return self.embedding + self.linear + self.bias + self.layernorm + self.positions


def matrices(shape: Shape) -> Iterator[tuple[int, int]]:
    """[out_features, in_features] of every linear but the head, which is the embedding."""
    d, f = shape.d_model, shape.ffn
    for _ in range(shape.encoder):
        yield from [(d, d)] * 4 + [(f, d), (d, f)]
    for _ in range(shape.decoder):
        yield from [(d, d)] * 8 + [(f, d), (d, f)]


def counts(shape: Shape) -> Counts:
    """Parameters of the float model."""
    d = shape.d_model
    final_norms = 4 * d if shape.family == "mbart" else 0
    rows = sum(n for n, _ in matrices(shape))
    return Counts(
        embedding=shape.vocab * d,
        linear=sum(n * k for n, k in matrices(shape)),
        bias=rows,
        layernorm=4 * d * shape.encoder + 6 * d * shape.decoder + 4 * d + final_norms,
        positions=2 * shape.positions * d,
        logits_bias=shape.vocab,
        rows=rows,
    )


def paper_bytes(shape: Shape, weight_bits: int, embedding_bits: int) -> float:
    """The rule that reproduces the published ratios."""
    c = counts(shape)
    bits = weight_bits * (c.linear + c.bias) + embedding_bits * c.embedding + 32 * (c.layernorm + c.positions)
    return bits / 8


def paper_ratio(teacher: Shape, student: Shape, weight_bits: int, embedding_bits: int) -> float:
    """fp32 teacher over the student under the paper's rule."""
    return 4 * counts(teacher).total / paper_bytes(student, weight_bits, embedding_bits)


def float_bytes(shape: Shape) -> int:
    """Tensors of the fp32 model's file: what the paper counts, and the logits bias."""
    c = counts(shape)
    return 4 * (c.total + c.logits_bias)


def packed_bytes(shape: Shape, weight_bits: int, embedding_bits: int, rest_bytes: int = 2) -> int:
    """Tensors of our file, exactly: padded codes, fp32 scales per row, `rest_bytes` per value of the rest.

    32 bits are the float model itself.
    """
    if weight_bits == embedding_bits == FLOAT_BITS:
        return float_bytes(shape)
    c = counts(shape)

    def packed(n: int, k: int, bits: int) -> int:
        rows, row_bytes = packing.packed_shape(n, k, bits)
        return rows * row_bytes + 4 * n

    total = sum(packed(n, k, weight_bits) for n, k in matrices(shape))
    total += packed(shape.vocab, shape.d_model, embedding_bits)
    return total + rest_bytes * (c.bias + c.layernorm + c.positions + c.logits_bias)


# ------------------------------------------------------------------------------------------------- real files


def random_model(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> nn.Module:
    """The transformers model of this shape with random weights, made directly in `dtype`. No download."""
    with _default_dtype(dtype), torch.device("meta"):
        model = shape.model_class()(shape.hf_config(**config))
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1 << 20, generator=generator).mul_(0.02)
    circle = torch.cat([noise, noise])  # from any place on, as long as the noise
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            # One stretch of noise, entered at another place per tensor: ten times faster, and no two rows
            # alike.
            flat = parameter.view(-1)
            offset = int(torch.randint(noise.numel(), (1,), generator=generator))
            for start in range(0, flat.numel(), noise.numel()):
                part = flat[start : start + noise.numel()]
                first = -(offset + start // 7) % noise.numel()
                part.copy_(circle[first : first + part.numel()])
        for name, buffer in model.named_buffers():
            if name.endswith("final_logits_bias"):
                buffer.zero_()
    return model.eval()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with every storage once, under its first name (tied tables and heads count once)."""
    seen: set[tuple] = set()
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))
        if tensor.numel() == 0 or key not in seen:
            kept[name] = tensor
        seen.add(key)
    return kept


def weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, tied ones once."""
    return sum(t.numel() * t.element_size() for t in unique_tensors(model).values())


def write_model(model: nn.Module, folder: str | os.PathLike) -> int:
    """Writes the model as the package writes it, and returns the bytes of its safetensors files on disk."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from dqkernels.serialize import save
    except ImportError:
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in unique_tensors(model).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        save(model, folder)
    return sum(os.stat(path).st_size for path in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Case:
    """One student file; 32-32 bits are an fp32 student. `goal` is the least ratio of the file to its fp32 teacher's,
    or None."""

    teacher: str
    encoder: int
    decoder: int
    weight_bits: int
    embedding_bits: int
    goal: float | None = None

    @property
    def student(self) -> Shape:
        return SHAPES[self.teacher].with_layers(self.encoder, self.decoder)


def measure(case: Case) -> dict:
    """Makes the student with random weights in bf16, packs it, writes it, and compares bytes: one row.

    The file is gone when this returns: at most one student and its file exist at a time.
    """
    from dqkernels.convert import quantize_

    teacher, student = SHAPES[case.teacher], case.student
    if case.weight_bits == case.embedding_bits == FLOAT_BITS:
        return row(teacher, student, case, *_write_float(student))
    # Ternary (absmax above 2 bits) packs fastest; the rule that picks the codes has no say in their bytes.
    config = DQConfig(weight_bits=case.weight_bits, embedding_bits=case.embedding_bits, weight_quantizer="ternary")
    model = quantize_(random_model(student, torch.bfloat16), config)
    in_memory = weights_bytes(model)
    with tempfile.TemporaryDirectory() as folder:
        on_disk = write_model(model, folder)
    return row(teacher, student, case, on_disk, in_memory)


def row(teacher: Shape, student: Shape, case: Case, file_bytes: int | None, memory_bytes: int | None) -> dict:
    """The record row of one case; nulls where nothing was written."""
    reference = float_bytes(teacher)
    file_ratio = None if file_bytes is None else round(reference / file_bytes, 5)
    return {
        "model": teacher.name,
        "layers": student.layers,
        "weight_bits": case.weight_bits,
        "embedding_bits": case.embedding_bits,
        "teacher_bytes": reference,
        "paper_bytes": paper_bytes(student, case.weight_bits, case.embedding_bits),
        "paper_ratio": round(paper_ratio(teacher, student, case.weight_bits, case.embedding_bits), 5),
        "computed_bytes": packed_bytes(student, case.weight_bits, case.embedding_bits),
        "file_bytes": file_bytes,
        "memory_bytes": memory_bytes,
        "file_ratio": file_ratio,
        "memory_ratio": None if memory_bytes is None else round(reference / memory_bytes, 5),
        "goal_ratio": case.goal,
        "status": "not written" if file_ratio is None else _verdict(file_ratio, case.goal),
    }


def _verdict(ratio: float, goal: float | None) -> str:
    return "no goal" if goal is None else "reached" if ratio >= goal else "missed"


def measure_teacher(name: str) -> dict:
    """Writes one fp32 teacher, to show that the arithmetic of `float_bytes` is that of a real file."""
    shape = SHAPES[name]
    on_disk, in_memory = _write_float(shape)
    return {
        "model": name,
        "layers": shape.layers,
        "weight_bits": 32,
        "embedding_bits": 32,
        "teacher_bytes": float_bytes(shape),
        "file_bytes": on_disk,
        "memory_bytes": in_memory,
        "file_ratio": round(float_bytes(shape) / on_disk, 6),
        "status": "teacher",
    }


def _write_float(shape: Shape) -> tuple[int, int]:
    """Bytes of the fp32 model's files on disk and of its weights in memory."""
    model = random_model(shape)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(os.stat(path).st_size for path in Path(folder).glob("*.safetensors")), weights_bytes(model)


def run(cases: Iterable[Case], teachers: Iterable[str] = ("bart-base",), out: str | None = None) -> dict:
    """Writes every case and gives the record.

    Args:
        cases: the students.
        teachers: fp32 models written as well.
        out: file for the record, or None.
    """
    rows: list[dict] = []
    result: dict = {}
    steps = [functools.partial(measure_teacher, name) for name in teachers]
    steps += [functools.partial(measure, case) for case in cases]
    for step in steps:
        rows.append(step())
        result = record.new(
            "size",
            settings={"rest": "bfloat16", "scales": "float32 per channel", "weights": "random, real shapes"},
            protocol={
                "rule": "file_bytes: os.stat of the written safetensors files. teacher_bytes: 4 bytes per "
                "parameter of the fp32 model and its logits bias, without the header of its file."
            },
            rows=rows,
        )
        if out is not None:  # after every file: mBART takes minutes, and what is measured stays measured
            record.write(result, out)
    return result


def render(result: dict):
    """A rich table of a size record."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title="Packed files against the fp32 teacher's file",
        caption="bits: weights-embeddings; the rest is bfloat16. paper: the ratio by the paper's rule, which "
        "leaves scales out. file: bytes on disk (os.stat).",
        caption_justify="left",
    )
    for name in ("model", "layers", "bits", "paper", "file bytes", "ratio", "goal", ""):
        left = name in ("model", "layers", "bits", "")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for line in result["rows"]:
        bits = f"{line['weight_bits']}-{line['embedding_bits']}"
        written = line["file_bytes"] is not None
        table.add_row(
            line["model"],
            line["layers"],
            "fp32" if line["weight_bits"] == FLOAT_BITS else bits,
            f"{line['paper_ratio']:.2f}" if "paper_ratio" in line else "",
            f"{line['file_bytes']:,}" if written else "not written",
            f"{line['file_ratio']:.2f}" if written else "",
            f"{line['goal_ratio']:.1f}" if line.get("goal_ratio") is not None else "",
            {"reached": "yes", "missed": "NO"}.get(line["status"], ""),
        )
    return table


def missed(result: dict) -> list[str]:
    """The goals a size record misses, in words."""
    return [
        f"{line['model']} {line['layers']} {line['weight_bits']}-{line['embedding_bits']}: "
        f"{line['file_ratio']}x, goal {line['goal_ratio']}x"
        for line in result["rows"]
        if line["status"] == "missed"
    ]
