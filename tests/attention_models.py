"""Tiny models whose attention looks somewhere, of every family that can have it in int8."""

from __future__ import annotations

import torch
import transformers
from tiny_models import make
from torch import nn

FIVE = ("bart", "mbart", "marian", "pegasus", "t5")
KIN = {
    "mt5": ("MT5ForConditionalGeneration", "t5"),
    "m2m_100": ("M2M100ForConditionalGeneration", "bart"),
    "plbart": ("PLBartForConditionalGeneration", "bart"),
    "blenderbot": ("BlenderbotForConditionalGeneration", "bart"),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", "bart"),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [11, 12, 13, 2, 1, 1]])
PADDED = {"attention_mask": (IDS != 1).long(), "decoder_attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2])}


def peaked(family: str) -> nn.Module:
    """A tiny model whose attention looks somewhere: as initialised, all its shares are nearly alike."""
    if family in KIN:
        name, like = KIN[family]
        config = getattr(transformers, name.replace("ForConditionalGeneration", "Config"))
        known = {k: v for k, v in make(like).config.to_dict().items() if k not in ("model_type", "architectures")}
        if like != "bart":  # that one has as many as tiny_models says
            known["num_decoder_layers"] = 1
        torch.manual_seed(0)
        model = getattr(transformers, name)(config(**known)).eval()
    else:
        model = make(family)
    factor = 20 if family == "marian" else 12  # its embeddings are not normalised
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_attention_bias.weight"):
                parameter.mul_(10)
            elif name.rpartition(".weight")[0].endswith((".q_proj", ".k_proj", ".v_proj", ".out_proj")):
                parameter.mul_(factor)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    return model


def run(model: nn.Module, padded: bool = True, **kwargs):
    return model(input_ids=IDS, decoder_input_ids=IDS[:, :5], **(PADDED if padded else {}), **kwargs)
