"""CTranslate2: its own runtime and its own search, with weights through its converter for transformers.

Tried on a CPU with 4.8.5; never run on a GPU here.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import nn

from dqkernels.bench.generate_candidates import BOUNDS, Candidate
from dqkernels.bench.peers.base import NotCompared, Peer, load

#: What it is asked for by kind of device; the others are not its best there.
COMPUTE_TYPES = {"cpu": ("float32", "int8"), "cuda": ("float16", "int8_float16")}


class Names:
    """As much of a tokenizer as CTranslate2's converter asks for: a name for every id."""

    bos_token, eos_token, pad_token, unk_token = "<s>", "</s>", "<pad>", "<unk>"
    special_tokens_map: dict = {}

    def __init__(self, config):
        self.names = [f"t{i}" for i in range(config.vocab_size)]
        # Four ids at most are spoken for; the last but one stands in for "unknown".
        special = {name: getattr(config, f"{name}_id", None) for name in ("bos_token", "eos_token", "pad_token")}
        taken = {ident for ident in special.values() if ident is not None}
        special["unk_token"] = next(i for i in range(config.vocab_size) if i not in taken)
        for name, ident in special.items():
            if ident is not None:
                self.names[ident] = getattr(self, name)
        self.unk_token_id = special["unk_token"]
        self.ids = {name: ident for ident, name in enumerate(self.names)}

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def convert_ids_to_tokens(self, ident: int) -> str:
        return self.names[ident]

    def words(self, ids: torch.Tensor) -> list[list[str]]:
        return [[self.names[ident] for ident in row] for row in ids.tolist()]

    def numbers(self, rows: list[list[str]]) -> torch.Tensor:
        return torch.tensor([[self.ids[word] for word in row] for row in rows])


class Generator(Candidate):
    """Its own runtime and its own search, on the same token ids. A pointer to its memory nobody has on a GPU."""

    family, foreign = "ctranslate2", True

    def __init__(self, name: str, translator, names: Names, file_bytes: int, compute: str, end: int | None):
        self.name, self.translator, self.names, self.file_bytes = name, translator, names, file_bytes
        self.compute, self._end = compute, end
        int8 = compute.startswith("int8")
        self.dtype = "fp16" if compute.endswith("float16") else "fp32"
        self.weight_bits = self.embedding_bits = 8 if int8 else int(self.dtype.removeprefix("fp"))
        self.bound = BOUNDS["int8" if int8 else self.dtype]

    def bind(self, inputs, new_tokens, num_beams):
        return functools.partial(self._translate, self.names.words(inputs["input_ids"]), new_tokens, num_beams)

    def _translate(self, words: list[list[str]], new_tokens: int, num_beams: int, **more) -> list:
        length = {"min_decoding_length": new_tokens, "max_decoding_length": new_tokens, "max_input_length": 0}
        return self.translator.translate_batch(words, beam_size=num_beams, **length, **more)

    def tokens(self, result):
        return self.names.numbers([one.hypotheses[0] for one in result])

    def logits(self, inputs, new_tokens):
        found = self._translate(self.names.words(inputs["input_ids"]), new_tokens, 1, return_logits_vocab=True)
        return self.tokens(found), torch.stack([torch.stack([*_steps(one.logits[0])]) for one in found])

    def weights_bytes(self):
        return self.file_bytes

    def end(self):
        return self._end

    def kernel(self):
        return f"ctranslate2 {self.compute}, weights counted on disk"


def _steps(logits: list) -> Iterator[torch.Tensor]:
    """A tensor [vocab] per step of CTranslate2's views."""
    for view in logits:
        if view.device != "cpu":
            view = view.to_device(load("ctranslate2").Device.cpu)
        yield torch.from_numpy(numpy.array(view)).float()


def generate(model: nn.Module, dtype: torch.dtype, device: torch.device, compute: str) -> Generator:
    """Through its converter for transformers, into a temporary folder."""
    library, converters = load("ctranslate2"), load("ctranslate2.converters")
    if compute not in library.get_supported_compute_types(device.type):
        raise NotCompared(f"has no {compute} on this {device.type}")
    source = copy.deepcopy(model)  # quantizing, the converter scales the weights where they lie
    # What its converter reads off checkpoints, and transformers no longer has.
    for key in ("normalize_before", "normalize_embedding"):
        if not hasattr(source.config, key):
            setattr(source.config, key, key == "normalize_embedding" or model.config.model_type == "mbart")
    names = Names(source.config)

    class Converter(converters.TransformersConverter):
        def load_model(self, *_, **__):
            return source

        def load_tokenizer(self, *_, **__):
            return names

        def _load(self):
            spec = super()._load()
            # mBART's would be a language, given as a prefix.
            spec.config.decoder_start_token = names.names[model.generation_config.decoder_start_token_id]
            return spec

    with tempfile.TemporaryDirectory(prefix="dqkernels-ct2-") as folder:
        source.config.save_pretrained(folder)
        made = Converter(folder).convert(str(Path(folder) / "converted"), quantization=compute)
        options = {"device": device.type, "compute_type": compute, "inter_threads": 1}
        options["intra_threads"] = torch.get_num_threads()
        if device.type == "cuda":
            options["device_index"] = device.index or 0
        translator = library.Translator(made, **options)
        file_bytes = (Path(made) / "model.bin").stat().st_size
    name = f"ctranslate2 {compute.replace('float', 'fp')}"
    return Generator(name, translator, names, file_bytes, compute, model.generation_config.eos_token_id)


PEER = Peer(
    "ctranslate2",
    "pip install --no-deps ctranslate2",
    "ctranslate2",
    generate=lambda device: {
        f"ctranslate2 {compute.replace('float', 'fp')}": functools.partial(generate, compute=compute)
        for compute in COMPUTE_TYPES[device]
    },
    without={"linear": "runs whole models only"},
)
