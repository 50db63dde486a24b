"""bitsandbytes: 8 bits with outliers in float, and NF4. Tried on a CPU with 0.50.2; never run on a GPU here."""

from __future__ import annotations

import copy
import functools
import logging
import tempfile

import torch
from torch import nn

from dqkernels.bench import candidates
from dqkernels.bench.generate_candidates import BOUNDS, Transformers, set_generation
from dqkernels.bench.peers.base import Peer, load, named, quantized


def linear(layer: nn.Linear, name: str, bits: int) -> candidates.Candidate:
    """Its layers with the settings of `BitsAndBytesConfig`: 8 bits with a threshold of 6 for outliers, or NF4."""
    library = load("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every call that inputs are cast
    (n, k), dtype, device = layer.weight.shape, layer.weight.dtype, layer.weight.device
    weight = layer.weight.detach().clone()
    if bits == 8:
        module = library.nn.Linear8bitLt(k, n, has_fp16_weights=False, threshold=6.0)
        module.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        module = library.nn.Linear4bit(k, n, compute_dtype=dtype, quant_type="nf4")
        module.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    module.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    module = module.to(device).eval()
    held = module.weight
    codes, scale = getattr(held, "CB", None), getattr(held, "SCB", None)  # its first call takes them away

    def dequantized() -> torch.Tensor:
        if bits == 8:
            return codes.float() * scale.float().unsqueeze(1) / 127
        return library.functional.dequantize_4bit(held.data, held.quant_state)

    # Codes, and a scale per channel or per 64 weights.
    size = n * k * bits // 8 + 4 * (n if bits == 8 else n * k // 64)
    more = {"group_size": -1 if bits == 8 else 64, "clone": copy.deepcopy}
    return quantized(name, layer, module, bits, size, "bitsandbytes", dequantized, **more)


class Generator(Transformers):
    """Loaded through transformers, as its users do. Embeddings and head stay float."""

    foreign = True


def generate(model: nn.Module, dtype: torch.dtype, device: torch.device, bits: int) -> Generator:
    """8 bits or NF4 of every linear but the head."""
    load("bitsandbytes")
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
    return Generator(name, "bitsandbytes", made, BOUNDS[bound], bits, 8 * dtype.itemsize, words)


PEER = Peer(
    "bitsandbytes",
    "pip install --no-deps bitsandbytes",
    "bitsandbytes",
    linear=named(linear, **{"bitsandbytes int8": {"bits": 8}, "bitsandbytes nf4": {"bits": 4}}),
    generate=lambda device: {
        "bitsandbytes int8": functools.partial(generate, bits=8),
        "bitsandbytes nf4": functools.partial(generate, bits=4),
    },
)
