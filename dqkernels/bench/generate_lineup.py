"""The candidates of `bench generate` on one model: who is asked for, who is here, the inputs they all get."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dqkernels.bench import generate_candidates as ours
from dqkernels.bench import peers, record
from dqkernels.bench.candidates import short
from dqkernels.bench.generate_cells import Cell, Source

#: What `candidates` may name, and what it is.
FAMILIES = {
    "torch": "Hugging Face's loop and dynamic cache, float",
    "plain": "ours in Hugging Face's loop",
    "ours": "ours in our own decoding loop",
    "static": "Hugging Face's loop with static caches, float",
    "compile": "static caches and torch.compile; on a CPU only where it is named",
    "ctranslate2": "its own runtime, float and int8",
    "onnxruntime": "its own runtime on a CPU, float and dynamic int8; greedy, BART and mBART",
    "torchao": "int8 weights with int8 or float activations, int4 weights (CUDA)",
    "bitsandbytes": "8 bits, and NF4",
    "dynamic": "torch's dynamic int8 (CPU)",
}
_Make = Callable[[], ours.Candidate]


@dataclass(frozen=True)
class Options:
    """What a lineup is made of; see `generate.run`."""

    source: Source
    bits: tuple[int, ...]
    embedding_bits: int | None
    dtype: torch.dtype
    device: torch.device
    backend: str
    attention: str
    families: tuple[str, ...]


class Lineup:
    """The candidates of one model, each made when it is first asked for.

    Attributes:
        options: what was asked for.
        layers: of the model.
        base: name of the candidate that ratios are to.
        absent: who is not here, with the reason.
    """

    def __init__(self, options: Options, layers: str):
        self.options, self.layers = options, layers
        # On the CPU: every candidate is made of a copy.
        self.float32 = ours.set_generation(options.source.build(layers)).requires_grad_(False)
        self.base = f"torch {short(options.dtype)}"
        self.absent: dict[str, str] = {}
        self._made: dict[str, ours.Candidate | None] = {}
        self._on_device: dict[torch.dtype, nn.Module] = {}

    def candidates(self) -> Iterator[tuple[str, Callable[[], ours.Candidate | None]]]:
        """Names in order of worth, and how to get each (None: it is not here, and `absent` says why)."""
        base, *others = self._floats()
        wanted = self.options.families
        order: list[tuple[str, str, _Make]] = [("torch", *base)]
        for bits in self.options.bits:
            order += [(family, *self._ours(bits, family)) for family in ("plain", "ours")]
        order += [(family, *self._static(family)) for family in ("static", "compile")]
        order += [(family, *one) for family in FAMILIES if family in peers.PEERS for one in self._peers(family)]
        order += [("torch", *one) for one in others]
        for family, name, make in order:
            if family in wanted:
                yield name, functools.partial(self._get, name, make)

    def _get(self, name: str, make: _Make) -> ours.Candidate | None:
        if name not in self._made:
            try:
                self._made[name] = make()
            except (peers.NotCompared, ValueError) as reason:
                self.absent[name], self._made[name] = record.scrub(str(reason)), None
        return self._made[name]

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The float model on the device."""
        if dtype == torch.float32 and self.options.device.type == "cpu":
            return self.float32
        if dtype not in self._on_device:
            self._on_device[dtype] = ours.float_model(self.float32, dtype, self.options.device)
        return self._on_device[dtype]

    def _floats(self) -> list[tuple[str, _Make]]:
        """The dtype that ratios are to, then what else one would take on this device."""
        gpu = self.options.device.type == "cuda"
        more = (torch.float16, torch.bfloat16, torch.float32) if gpu else (torch.bfloat16,)
        kinds = dict.fromkeys([self.options.dtype, *more])
        return [(f"torch {short(kind)}", functools.partial(self._float, kind)) for kind in kinds]

    def _float(self, kind: torch.dtype) -> ours.Candidate:
        bits = 8 * kind.itemsize
        words = "transformers generate, dynamic cache"
        return ours.Transformers(
            f"torch {short(kind)}", "torch", self.model(kind), ours.BOUNDS[short(kind)], bits, bits, words
        )

    def _static(self, family: str) -> tuple[str, _Make]:
        kind, device = self.options.dtype, self.options.device
        name = f"torch {short(kind)} {'static' if family == 'static' else 'compiled'}"
        arguments = ours.BOUNDS[short(kind)], 8 * kind.itemsize
        if family == "static":
            return name, lambda: ours.static(name, self.model(kind), *arguments)
        return name, lambda: ours.Compiled(name, self.model(kind), *arguments, device)

    def _ours(self, bits: int, family: str) -> tuple[str, _Make]:
        given = self.options
        embedding = bits if given.embedding_bits is None else given.embedding_bits
        name = f"dqkernels {bits}-{embedding}-8 plain"
        rest = (embedding, given.dtype, given.device, given.backend, given.attention)

        def plain() -> ours.Plain:
            return ours.packed(name, self.float32, bits, *rest)

        if family == "plain":
            return name, plain

        def engine() -> ours.Engine:
            twin = self._get(name, plain)
            if twin is None:
                raise peers.NotCompared(f"there is no packed model: {self.absent[name]}")
            return ours.engine_of(twin)

        return name.removesuffix(" plain"), engine

    def _peers(self, family: str) -> list[tuple[str, _Make]]:
        arguments = (self.float32, self.options.dtype, self.options.device)
        known = peers.generators(family, self.options.device)
        return [(name, functools.partial(peers.generate, family, name, *arguments)) for name in known]

    def reference(self, inputs: dict, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the float32 model along `tokens`."""
        return ours.teacher_forced(self.model(torch.float32), inputs, tokens)

    def inputs(self, cell: Cell) -> dict:
        """Random token ids, no special ones among them, no padding."""
        config = self.float32.config
        special = {v for k, v in config.to_dict().items() if k.endswith("_token_id") and isinstance(v, int)}
        allowed = torch.tensor([i for i in range(config.vocab_size) if i not in special])
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(allowed), (cell.batch_size, cell.source_tokens), generator=generator)
        ids = allowed[picks].to(self.options.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
