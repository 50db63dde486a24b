"""What can generate with a model: Hugging Face's loop over float models, and ours, packed, in it and in our own.

A candidate gives a call to time, the tokens of what the call returned, and, where it can, the logits of every greedy
step, which is what it is proven by. Those of other projects are in `peers`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dqkernels import decode
from dqkernels.bench import protocol, size
from dqkernels.bench.candidates import short
from dqkernels.bench.generate_cells import Cell
from dqkernels.config import DQConfig
from dqkernels.convert import quantize_
from dqkernels.decode import engine
from dqkernels.models import attention as int8_attention
from dqkernels.nn import PackedModule, QLinear

#: Relative error of the logits to those of the float32 model that is allowed. Measured on the shapes here: float32
#: 1e-6, float16 2e-3, bfloat16 2e-2, 8 bits 2e-2 to 2e-1, 4 bits 3e-1; a model that computes something else has about 1
#: and more.
BOUNDS = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8": 0.3, "4 bit": 0.6}
#: Of ours to the eager backend on the same codes. Integer ops are equal; LayerNorm, GELU and softmax may round
#: otherwise in a fused kernel, and one flipped code moves a logit by about a hundredth of its size. Measured: 0 where
#: both run torch's LayerNorm, 0.023 with the compiled core's (BART-base 6-6, 4 bits).
OUR_BOUND = 0.1


class Candidate:
    """One way to generate.

    Attributes:
        name: as printed.
        family: what `--candidates` calls it.
        bound: relative error of its logits that is allowed.
        weight_bits, embedding_bits: of its weights.
        dtype: of what is not quantized, `fp32`, `fp16` or `bf16`.
        foreign: somebody else's package: where it raises it is not compared.
        weight_quantizer: of ours, what made the codes of its linears.
    """

    name: str
    family: str
    bound: float
    weight_bits: int
    embedding_bits: int
    dtype: str
    foreign = False
    weight_quantizer: str | None = None

    def bind(self, inputs: dict, new_tokens: int, num_beams: int) -> protocol.CALL:
        """The call that is timed: `new_tokens` for every source, no fewer."""
        raise NotImplementedError

    def tokens(self, result: Any) -> torch.Tensor:
        """New tokens [batch, new_tokens] of what the call returned, without the start token."""
        raise NotImplementedError

    def logits(self, inputs: dict, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Greedy tokens [batch, new_tokens], and the logits [batch, new_tokens, vocab] they come from, or None."""
        raise NotImplementedError

    def reference(self, inputs: dict, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits that its own are held against, or None: those of the float32 model."""
        return None

    def weights_bytes(self) -> int:
        """Bytes of its weights in memory."""
        raise NotImplementedError

    def cache_bytes(self, inputs: dict, new_tokens: int, num_beams: int) -> int | None:
        """Bytes of keys and values at the end of such a call, or None where nobody says. May run it."""
        return None

    def kernel(self) -> str:
        """What runs, in words."""
        raise NotImplementedError

    def cannot(self, cell: Cell) -> str | None:
        """Why it does not do this work at all, or None."""
        return None

    def end(self) -> int | None:
        """The token that ends a text, which no loop may take before the last step."""
        return None

    def free(self) -> None:
        """Lets go of the caches of the work it has done."""

    def reset(self) -> None:
        """Behind a cell: lets go of whatever was made for it."""
        self.free()


class Transformers(Candidate):
    """`model.generate` as transformers has it. `words` say what runs, `options` go to it."""

    def __init__(
        self,
        name: str,
        family: str,
        model: nn.Module,
        bound: float,
        bits: int,
        embedding_bits: int,
        words: str = "",
        **options: Any,
    ):
        self.name, self.family, self.model, self.bound = name, family, model, bound
        self.weight_bits, self.embedding_bits, self.dtype = bits, embedding_bits, short(model.dtype)
        self.words, self.options = words, options

    def bind(self, inputs, new_tokens, num_beams):
        return functools.partial(self._generate, inputs, new_tokens, num_beams)

    def _generate(self, inputs: dict, new_tokens: int, num_beams: int, **more: Any) -> Any:
        work = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "num_beams": num_beams, "do_sample": False}
        return self.model.generate(**inputs, **work, **self.options, **more)

    def tokens(self, result):
        return result[:, 1:]

    def logits(self, inputs, new_tokens):
        found = self._generate(inputs, new_tokens, 1, return_dict_in_generate=True, output_logits=True)
        return self.tokens(found.sequences), torch.stack(found.logits, dim=1)

    def weights_bytes(self):
        return size.weights_bytes(self.model)

    def cache_bytes(self, inputs, new_tokens, num_beams):
        found = self._generate(inputs, new_tokens, num_beams, return_dict_in_generate=True)
        cache = found.get("cache") or found.get("past_key_values")  # its name since, and before, transformers 5.24
        return None if cache is None else _held(cache)

    def end(self):
        return self.model.generation_config.eos_token_id

    def kernel(self):
        return self.words

    def free(self):
        # A static cache is made as long as the longest before it.
        if hasattr(self.model, "_previous_max_cache_length"):
            del self.model._previous_max_cache_length


class Compiled(Transformers):
    """Static caches, and the decoder's step compiled by torch as transformers does it on a GPU."""

    def __init__(self, name: str, model: nn.Module, bound: float, bits: int, device: torch.device):
        options: dict[str, Any] = {"cache_implementation": "static"}
        if device.type != "cuda":
            from transformers import CompileConfig

            options["compile_config"] = CompileConfig(mode="default")
            options["compile_config"]._compile_all_devices = True  # transformers compiles on GPUs by itself
        words = "transformers generate, static cache, torch.compile"
        super().__init__(name, "compile", model, bound, bits, bits, words, **options)

    def cannot(self, cell):
        return None if cell.num_beams == 1 else "transformers compiles no beam search"

    def reset(self):
        super().reset()
        # Past eight shapes torch would go on without compiling, and not say so.
        torch.compiler.reset()
        for name in ("_compiled_call", "_last_compile_config"):
            if hasattr(self.model, name):
                delattr(self.model, name)


class Plain(Transformers):
    """Ours in Hugging Face's own loop."""

    def _generate(self, inputs, new_tokens, num_beams, **more):
        with decode.plain(self.model):
            return super()._generate(inputs, new_tokens, num_beams, **more)

    @torch.no_grad()
    def reference(self, inputs, tokens):
        """The eager backend on the same codes."""
        with decode.plain(self.model), _backend(self.model, "eager"):
            return teacher_forced(self.model, inputs, tokens)

    def kernel(self):
        return kernels(self.model)


class Engine(Plain):
    """Ours in our own decoding loop, which must not hand the work to Hugging Face's.

    Attributes:
        twin: the same packed model in Hugging Face's loop: what it finds is held against that.
    """

    def __init__(self, twin: Plain):
        name = twin.name.removesuffix(" plain")
        super().__init__(name, "ours", twin.model, twin.bound, twin.weight_bits, twin.embedding_bits)
        self.twin, self.weight_quantizer = twin, twin.weight_quantizer

    def _generate(self, inputs, new_tokens, num_beams, **more):
        return Transformers._generate(self, inputs, new_tokens, num_beams, **more)

    def logits(self, inputs, new_tokens):
        tokens, logits = super().logits(inputs, new_tokens)
        if self.handed_on() is None:
            return tokens, logits
        # For the asking, maybe: those would be Hugging Face's. Its own tokens then.
        return self.tokens(self._generate(inputs, new_tokens, 1)), None

    def handed_on(self) -> str | None:
        """Why Hugging Face's loop ran the last call, or None where ours did."""
        return engine.state_of(self.model).last or None

    def cache_bytes(self, inputs, new_tokens, num_beams):
        idle = engine.state_of(self.model).pool.idle()  # the last used one stands last
        return idle[-1].cache_bytes() if idle else None

    def kernel(self):
        return f"decode engine; {kernels(self.model)}"

    def free(self):
        decode.free(self.model)


# -------------------------------------------------------------------------------------------- building


def float_model(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy on `device` in `dtype`."""
    return copy.deepcopy(model).to(dtype).to(device)


def static(name: str, model: nn.Module, bound: float, bits: int) -> Transformers:
    """Static caches without compiling."""
    options = {"cache_implementation": "static", "disable_compile": True}
    return Transformers(name, "static", model, bound, bits, bits, "transformers generate, static cache", **options)


def packed(
    name: str,
    model: nn.Module,
    bits: int,
    embedding_bits: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    attention: str,
) -> Plain:
    """A packed copy of `model`, in Hugging Face's loop."""
    # Ternary (absmax above 2 bits) packs fastest; the kernels do the same work for any codes.
    config = DQConfig(
        weight_bits=bits,
        embedding_bits=embedding_bits,
        weight_quantizer="ternary",
        backend=backend,
        attention=attention,
    )
    made = quantize_(copy.deepcopy(model).to(dtype), config).to(device)
    one = Plain(name, "plain", made, OUR_BOUND, bits, embedding_bits)
    one.weight_quantizer = next((m.layer.quantizer for m in made.modules() if isinstance(m, QLinear)), None)
    return one


def engine_of(twin: Plain) -> Engine:
    """The same packed model in our own loop.

    Raises:
        ValueError: with the reason why there is none for this model.
    """
    decode.attach(twin.model)
    return Engine(twin)


@contextlib.contextmanager
def _backend(model: nn.Module, name: str) -> Iterator[None]:
    """Every packed module of `model`, and its int8 attention, on one backend."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    saved = [module.backend for module in modules]
    try:
        for module in modules:
            module.backend = name
        with int8_attention.on_backend(model, name):
            yield
    finally:
        for module, before in zip(modules, saved, strict=True):
            module.backend = before


@torch.no_grad()
def teacher_forced(model: nn.Module, inputs: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, new_tokens, vocab] of `model` at each of `tokens` [batch, new_tokens]: one forward pass."""
    start = model.generation_config.decoder_start_token_id
    tokens = tokens.to(inputs["input_ids"].device)
    before = torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)
    return model(**inputs, decoder_input_ids=before).logits


def set_generation(model: nn.Module) -> nn.Module:
    """Plain search for every candidate: no forced tokens, no banned n-grams, whatever the model's own settings are."""
    from transformers import GenerationConfig

    ids = {name: getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    start = getattr(model.config, "decoder_start_token_id", None)
    ids["decoder_start_token_id"] = ids["bos_token_id"] if start is None else start
    model.generation_config = GenerationConfig(**ids)
    return model


def kernels(model: nn.Module) -> str:
    """Which backend runs how many linears: `triton x 96, eager x 1`."""
    found = Counter(m.kernel().partition(" ")[0] for m in model.modules() if isinstance(m, QLinear))
    return ", ".join(f"{name} x {count}" for name, count in found.most_common()) or "torch"


def _held(cache: Any) -> int:
    """Bytes of a transformers cache, each storage once."""
    found: dict[int, int] = {}
    for part in (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)):
        for layer in getattr(part, "layers", ()):
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if isinstance(tensor, torch.Tensor):
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())
