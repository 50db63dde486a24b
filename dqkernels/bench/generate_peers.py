"""Other projects' ways to generate with the same weights: torch's dynamic int8, bitsandbytes, CTranslate2.

Tried on a CPU with bitsandbytes 0.50.2 and CTranslate2 4.8.5; never run on a GPU here. Another version may want other
arguments: whatever an adapter raises is the reason why that peer is not compared, and one that computes something else
is refused by its proof.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from torch import nn

from dqkernels.bench.generate_candidates import BOUNDS, Candidate, Transformers, set_generation


class NotCompared(Exception):
    """What a peer does not have; the message is the reason."""


Adapter = Callable[[nn.Module, torch.dtype, torch.device], Candidate]


def _module(name: str):
    """Somebody else's module."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - an import may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        words = str(error).splitlines()[0] if str(error) else ""
        raise NotCompared("not installed" if absent else f"import failed: {type(error).__name__}: {words}") from error


# -------------------------------------------------------------------------------------- torch's own int8


class DynamicInt8(Transformers):
    """Linears of torch.ao: int8 weights, inputs quantized per call; embeddings stay float."""

    def weights_bytes(self):
        # Its packed weights are no tensors of the state dict.
        kinds = torch.ao.nn.quantized.dynamic.Linear
        linears = [module for module in self.model.modules() if isinstance(module, kinds)]
        tensors = [t for one in linears for t in (one.weight(), one.bias()) if t is not None]
        tensors += [*self.model.parameters(), *self.model.buffers()]
        unique = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
        return sum(unique.values())


def dynamic_int8(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Candidate:
    """`torch.ao.quantization.quantize_dynamic` on every linear."""
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if device.type != "cpu":
        raise NotCompared("runs on a CPU only")
    if quantize is None:
        raise NotCompared(f"torch {torch.__version__} has no torch.ao.quantization.quantize_dynamic")
    made = quantize(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    words = f"transformers generate, torch.ao {torch.backends.quantized.engine}"
    return DynamicInt8("torch dynamic int8", "dynamic", made, BOUNDS["int8"], 8, 32, words)


# ----------------------------------------------------------------------------------------- bitsandbytes


class BitsAndBytes(Transformers):
    """Loaded through transformers, as its users do. Embeddings and head stay float."""

    foreign = True


def bitsandbytes(model: nn.Module, dtype: torch.dtype, device: torch.device, bits: int) -> Candidate:
    """8 bits with outliers in float, or NF4."""
    _module("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every call that inputs are cast
    from transformers import BitsAndBytesConfig

    words = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}[bits]
    config = BitsAndBytesConfig(**words, **({"bnb_4bit_compute_dtype": dtype} if bits == 4 else {}))
    with tempfile.TemporaryDirectory(prefix="dqkernels-bnb-") as folder:
        copy.deepcopy(model).to(dtype).save_pretrained(folder)
        place = device.index if device.index is not None else device.type
        made = type(model).from_pretrained(folder, quantization_config=config, dtype=dtype, device_map={"": place})
    set_generation(made.eval())
    name, bound = {8: ("bitsandbytes int8", "int8"), 4: ("bitsandbytes nf4", "4 bit")}[bits]
    words = "transformers generate, bitsandbytes"
    return BitsAndBytes(name, "bitsandbytes", made, BOUNDS[bound], bits, 8 * dtype.itemsize, words)


# ------------------------------------------------------------------------------------------ CTranslate2


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


class CTranslate2(Candidate):
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
            view = view.to_device(_module("ctranslate2").Device.cpu)
        yield torch.from_numpy(numpy.array(view)).float()


def ctranslate2(model: nn.Module, dtype: torch.dtype, device: torch.device, compute: str) -> Candidate:
    """Through its converter for transformers, into a temporary folder."""
    library, converters = _module("ctranslate2"), _module("ctranslate2.converters")
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
    return CTranslate2(name, translator, names, file_bytes, compute, model.generation_config.eos_token_id)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings and bars of transformers and torch about other people's code are not ours to pass on."""
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


#: By family, in order of worth, then by name.
ADAPTERS: dict[str, dict[str, Adapter]] = {
    "ctranslate2": {
        f"ctranslate2 {compute.replace('float', 'fp')}": functools.partial(ctranslate2, compute=compute)
        for compute in ("float32", "int8", "float16", "int8_float16")
    },
    "bitsandbytes": {
        "bitsandbytes int8": functools.partial(bitsandbytes, bits=8),
        "bitsandbytes nf4": functools.partial(bitsandbytes, bits=4),
    },
    "dynamic": {"torch dynamic int8": dynamic_int8},
}
#: What CTranslate2 is asked for by kind of device; the others are not its best there.
COMPUTE_TYPES = {"cpu": ("float32", "int8"), "cuda": ("float16", "int8_float16")}


def names(family: str, device: torch.device) -> list[str]:
    """The peers of a family that are tried on this device."""
    if family != "ctranslate2":
        return list(ADAPTERS[family])
    return [f"ctranslate2 {compute.replace('float', 'fp')}" for compute in COMPUTE_TYPES[device.type]]


def candidate(family: str, name: str, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Candidate:
    """A peer with the weights of `model`, float32 on the CPU.

    Raises:
        NotCompared: with the reason, whatever went wrong.
    """
    try:
        with _quiet():
            return ADAPTERS[family][name](model, dtype, device)
    except NotCompared:
        raise
    except Exception as error:  # noqa: BLE001 - another version of it may raise anything
        words = str(error).splitlines()[0] if str(error) else ""
        raise NotCompared(f"{type(error).__name__}: {words}") from error
