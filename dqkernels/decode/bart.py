"""The decoders of BART and its relatives, whose blocks `models.blocks` has fused."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dqkernels.decode import layers
from dqkernels.decode.prepared import lazily, onto, projection
from dqkernels.models import blocks, steps

#: Classes with a head -> `model_type`.
CLASSES = {
    "BartForConditionalGeneration": "bart",
    "MBartForConditionalGeneration": "mbart",
    "MarianMTModel": "marian",
    "PegasusForConditionalGeneration": "pegasus",
    "PLBartForConditionalGeneration": "plbart",
    "M2M100ForConditionalGeneration": "m2m_100",
    "BlenderbotForConditionalGeneration": "blenderbot",
    "BlenderbotSmallForConditionalGeneration": "blenderbot-small",
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
    if not decoder.layers:
        yield "the decoder has no layers"
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
    bias = _logits_bias(model)
    return layers.Decoder(
        [_layer(layer) for layer in decoder.layers],
        heads=first.num_heads,
        head_dim=first.head_dim,
        embed=_embedding(decoder),
        head=_head(model, head, bias),
        logits_bias=bias,
        limit=_limit(decoder.embed_positions),
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

    def feed_forward():
        inner, outer = based(projection((layer.fc1,), before[2], layer.activation_fn)), onto(layer.fc2)

        def run(x):
            base, (hidden,) = inner(x)
            x = outer(hidden, base)
            return x if behind is None else steps.behind(x, behind, layer.fc2)

        return run

    return layers.Layer(
        qkv=lazily(lambda: based(projection((own.q_proj, own.k_proj, own.v_proj), before[0]))),
        own_out=lazily(lambda: onto(own.out_proj)),
        cross_q=lazily(lambda: based(projection((cross.q_proj,), before[1]))),
        cross_kv=(cross.k_proj, cross.v_proj),
        cross_out=lazily(lambda: onto(cross.out_proj)),
        feed_forward=lazily(feed_forward),
        own=layers.Attend.of(own, own.head_dim),
        cross=layers.Attend.of(cross, cross.head_dim),
        shared=steps.packed(cross.k_proj) and steps.packed(cross.v_proj),
    )


def norms_tokens(decoder: nn.Module) -> bool:
    """Whether the embedding's norm stands before the positions, as in Blenderbot's small form, and not behind them."""
    return any(kind.__name__ == "BlenderbotSmallDecoder" for kind in type(decoder).__mro__)


def skips_padding(positions: nn.Module) -> bool:
    """Whether positions count the tokens that are no padding, as M2M100's do, and not all of them."""
    return not isinstance(positions, nn.Embedding)


def too_long(model: nn.Module, most: int) -> str | None:
    """Why `most` tokens of a row are too many, in words: M2M100's table of positions would have to grow meanwhile. More
    than a table that cannot grow has rows for are refused where they come, as transformers does."""
    positions = model.model.decoder.embed_positions
    if not skips_padding(positions) or most <= _limit(positions):
        return None
    return f"max_length may need {most} positions, and M2M100's table has {_limit(positions)} until it grows"


def _limit(positions: nn.Module) -> int:
    """Positions there are. Those of M2M100 grow; longer texts than it has rows for are left to transformers."""
    if skips_padding(positions):
        return positions.weights.shape[0] - positions.padding_idx - 1
    return positions.num_embeddings - getattr(positions, "offset", 0)


def _places(positions: nn.Module):
    """ids [rows, tokens] and the tokens' positions int64 [tokens] -> what is added to the tokens."""
    if skips_padding(positions):
        grown, padding = positions.weights, positions.padding_idx

        def counted(ids, at):
            real = ids.ne(padding)
            # As transformers counts: within this call, from the length of the cache on.
            return F.embedding((real.cumsum(1) + at[:1]) * real + padding, grown)

        return counted
    table, offset = positions.weight, getattr(positions, "offset", 0)
    return lambda ids, at: F.embedding(at + offset if offset else at, table)


def _embedding(decoder: nn.Module):
    """Tokens, their factor where the decoder has it, positions and the norm, in the steps of transformers."""
    tokens, places, norm_first = decoder.embed_tokens, _places(decoder.embed_positions), norms_tokens(decoder)
    # The one that norms first has a factor, and takes it in its encoder alone.
    scale = 1.0 if norm_first else getattr(decoder, "embed_scale", 1.0)
    norm = getattr(decoder, "layernorm_embedding", None)

    def embed(ids, at):
        x = tokens(ids)
        if scale != 1.0:
            x = x * scale
        if norm_first:
            return norm(x) + places(ids, at)
        x = x + places(ids, at)
        return x if norm is None else norm(x)

    return embed


def _logits_bias(model: nn.Module) -> torch.Tensor | None:
    """The model's, [vocabulary]; None where it is zero, as nearly always, or there is none (M2M100)."""
    bias = getattr(model, "final_logits_bias", None)
    # Adding zeros changes nothing but the sign of a zero; asked once per call.
    return bias.detach().reshape(-1) if bias is not None and bool(bias.any()) else None


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
