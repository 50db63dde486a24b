"""The decoders of BART, mBART, Marian and Pegasus, whose blocks `models.blocks` has fused."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dqkernels.decode import layers
from dqkernels.decode.prepared import onto, projection
from dqkernels.models import blocks, steps

#: Classes with a head -> `model_type`.
CLASSES = {
    "BartForConditionalGeneration": "bart",
    "MBartForConditionalGeneration": "mbart",
    "MarianMTModel": "marian",
    "PegasusForConditionalGeneration": "pegasus",
}
_POSITIONS = ("LearnedPositionalEmbedding", "SinusoidalPositionalEmbedding")


def parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The decoder and the head."""
    return model.model.decoder, model.lm_head


def obstacles(model: nn.Module, family: str, device: str, is_beams: bool) -> Iterator[str]:
    """Why this model's decoder is not served, in words. device: its type; is_beams: for a beam search."""
    file, prefix = layers.modeling(family), blocks.FAMILIES[family][0]
    decoder = model.model.decoder
    if layers.altered(model.model, file, [prefix + "Model"]) or layers.altered(decoder, file, [prefix + "Decoder"]):
        yield "the decoder has a forward of its own"
    if layers.altered(decoder.embed_positions, file, [prefix + name for name in _POSITIONS]):
        yield f"its positions are a {type(decoder.embed_positions).__name__}"
    found = []
    for i, layer in enumerate(decoder.layers):
        if not blocks.is_fused(layer) and layers.altered(layer, file, [prefix + "DecoderLayer"]):
            yield f"decoder.layers.{i} has a forward of its own"
            return
        found += [(f"decoder.layers.{i}.{name}", getattr(layer, name)) for name in ("self_attn", "encoder_attn")]
    for name, attention in found:
        yield from layers.attention_obstacles(name, attention, attention.head_dim, device, is_beams)
    for i, layer in enumerate(decoder.layers):
        if not blocks.is_fused(layer):
            yield f"decoder.layers.{i} is not fused: dqkernels.models.patch(model) fuses it"
            return
    for name, attention in found:
        if not blocks.is_fused(attention):
            yield f"{name} has a forward of its own"


def prepare(model: nn.Module) -> layers.Decoder:
    """The decoder of a model without obstacles, for calls from now on until a module changes."""
    decoder, head = parts(model)
    first = decoder.layers[0].self_attn
    positions = decoder.embed_positions
    bias = _logits_bias(model)
    return layers.Decoder(
        [_layer(layer) for layer in decoder.layers],
        heads=first.num_heads,
        head_dim=first.head_dim,
        embed=_embedding(decoder),
        head=_head(model, head, bias),
        logits_bias=bias,
        limit=positions.num_embeddings - getattr(positions, "offset", 0),
    )


def _layer(layer: nn.Module) -> layers.Layer:
    own, cross = layer.self_attn, layer.encoder_attn
    norms = [layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm]
    if type(layer).dqkernels_post:
        before, behind, adds_normed = [None, *norms[:-1]], norms[-1], True
    else:
        before, behind, adds_normed = norms, None, False

    def based(project):
        """`project`, with what the block's output is added to in the first place."""
        return project if adds_normed else lambda x: (x, project(x)[1])

    inner, outer = based(projection((layer.fc1,), before[2], layer.activation_fn)), onto(layer.fc2)

    def feed_forward(x):
        base, (hidden,) = inner(x)
        x = outer(hidden, base)
        return x if behind is None else steps.behind(x, behind, layer.fc2)

    return layers.Layer(
        qkv=based(projection((own.q_proj, own.k_proj, own.v_proj), before[0])),
        own_out=onto(own.out_proj),
        cross_q=based(projection((cross.q_proj,), before[1])),
        cross_kv=projection((cross.k_proj, cross.v_proj)),
        cross_out=onto(cross.out_proj),
        feed_forward=feed_forward,
        own=layers.Attend.of(own, own.head_dim),
        cross=layers.Attend.of(cross, cross.head_dim),
        shared=steps.packed(cross.k_proj) and steps.packed(cross.v_proj),
    )


def _embedding(decoder: nn.Module):
    """Tokens, their factor where the decoder has it, positions and the norm behind, in the steps of transformers."""
    tokens, positions = decoder.embed_tokens, decoder.embed_positions
    table, offset = positions.weight, getattr(positions, "offset", 0)
    scale = getattr(decoder, "embed_scale", 1.0)
    norm = getattr(decoder, "layernorm_embedding", None)

    def embed(ids, at):
        x = tokens(ids)
        if scale != 1.0:
            x = x * scale
        x = x + F.embedding(at + offset if offset else at, table)
        return x if norm is None else norm(x)

    return embed


def _logits_bias(model: nn.Module) -> torch.Tensor | None:
    """The model's, [vocabulary]; None where it is zero, as nearly always."""
    bias = model.final_logits_bias
    # Adding zeros changes nothing but the sign of a zero; asked once per call.
    return bias.detach().reshape(-1) if bool(bias.any()) else None


def _head(model: nn.Module, head: nn.Module, bias: torch.Tensor | None):
    norm = getattr(model.model.decoder, "layer_norm", None)
    alone = layers.alone(head)

    def logits(x: torch.Tensor) -> torch.Tensor:
        if alone:
            x = x[:, -1:]
        if norm is not None:
            x = norm(x)
        out = head(x)[:, -1]
        return out if bias is None else out + bias

    return logits
