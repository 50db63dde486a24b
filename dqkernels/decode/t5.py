"""The decoders of T5 and FLAN-T5 (and mT5): RMSNorm, no biases, scores with a relative position bias, a gated FFN.

Their blocks are transformers' own around packed linears; the steps here give the bits of calling them one by one. An
fp32 residual is added in a GEMM's epilogue, where the sum is the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from dqkernels.decode import layers
from dqkernels.decode.prepared import Onto, onto, projection
from dqkernels.models import steps

#: Classes with a head -> `model_type`.
CLASSES = {"T5ForConditionalGeneration": "t5", "MT5ForConditionalGeneration": "mt5"}
_PREFIXES = {"t5": "T5", "mt5": "MT5"}
_FFN = ("DenseActDense", "DenseGatedActDense")


def parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The decoder and the head."""
    return model.decoder, model.lm_head


def too_long(model: nn.Module, most: int) -> str | None:
    """As in `bart`: there is no table of positions that could end."""
    return None


def obstacles(model: nn.Module, family: str, device: str, is_beams: bool) -> Iterator[str]:
    """Why this model's decoder is not served, in words. device: its type; is_beams: for a beam search."""
    file, prefix = layers.modeling(family), _PREFIXES[family]
    decoder = model.decoder
    wanted = [("the decoder", decoder, ["Stack"])]
    for i, block in enumerate(decoder.block):
        name = f"decoder.block.{i}"
        wanted.append((name, block, ["Block"]))
        if len(block.layer) != 3:
            yield f"{name} has {len(block.layer)} layers, not 3"
            return
        own, cross, ffn = block.layer
        wanted += [
            (f"{name}.layer.0", own, ["LayerSelfAttention"]),
            (f"{name}.layer.1", cross, ["LayerCrossAttention"]),
        ]
        wanted += [(f"{name}.layer.2", ffn, ["LayerFF"]), (f"{name}.layer.2.DenseReluDense", ffn.DenseReluDense, _FFN)]
        wanted += [(where, attention, ["Attention"]) for where, attention in _attentions(name, block)]
    for name, module, kinds in wanted:
        if layers.altered(module, file, [prefix + kind for kind in kinds]):
            yield f"{name} has a forward of its own"
            return
    for i, block in enumerate(decoder.block):
        for name, attention in _attentions(f"decoder.block.{i}", block):
            head_dim = attention.key_value_proj_dim
            yield from layers.attention_obstacles(name, attention, head_dim, device, is_beams)


def _attentions(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield f"{name}.layer.0.SelfAttention", block.layer[0].SelfAttention
    yield f"{name}.layer.1.EncDecAttention", block.layer[1].EncDecAttention


def prepare(model: nn.Module) -> layers.Decoder:
    """The decoder of a model without obstacles, for calls from now on until a module changes."""
    decoder, head = parts(model)
    first = decoder.block[0].layer[0].SelfAttention
    bias = _Bias(first) if first.has_relative_attention_bias else None
    return layers.Decoder(
        [_layer(block) for block in decoder.block],
        heads=first.n_heads,
        head_dim=first.key_value_proj_dim,
        embed=lambda ids, at: decoder.embed_tokens(ids),
        head=_head(model, decoder.final_layer_norm, head),
        bias=bias and bias.of_one,
        prefill_bias=bias and bias.of_first,
        bias_at=bias and bias.at,
    )


def _layer(block: nn.Module) -> layers.Layer:
    own, cross, ffn = block.layer
    own_attention, cross_attention = own.SelfAttention, cross.EncDecAttention
    inner, outer = _inner(ffn.DenseReluDense), _onto(ffn.DenseReluDense.wo)

    def based(norm: nn.Module, linears: list[nn.Module]):
        project = projection(linears)
        return lambda x: (x, project(norm(x))[1])

    def feed_forward(x):
        return outer(inner(ffn.layer_norm(x)), x)

    return layers.Layer(
        qkv=based(own.layer_norm, [own_attention.q, own_attention.k, own_attention.v]),
        own_out=_onto(own_attention.o),
        cross_q=based(cross.layer_norm, [cross_attention.q]),
        cross_kv=(cross_attention.k, cross_attention.v),
        cross_out=_onto(cross_attention.o),
        feed_forward=feed_forward,
        own=layers.Attend.of(own_attention, own_attention.key_value_proj_dim),
        cross=layers.Attend.of(cross_attention, cross_attention.key_value_proj_dim),
        shared=steps.packed(cross_attention.k) and steps.packed(cross_attention.v),
    )


def _onto(linear: nn.Module) -> Onto:
    """x, base -> base + linear(x), rounded as by two modules, and in fp16 clamped as a block clamps it."""
    into = onto(linear)

    def run(x, base):
        if x.dtype == base.dtype == torch.float32:
            return into(x, base)
        return _clamped(base + into(x, None))

    return run


def _clamped(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(torch.float16).max
    limit = torch.where(torch.isinf(x).any(), most - 1000, most)
    return torch.clamp(x, min=-limit, max=limit)


def _inner(ffn: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `wo` reads, of the normed input."""
    # Only a ReLU may come before the rounding of its input: it gives the same behind it.
    inside = ffn.act if steps.epilogue(ffn.act) == "relu" else None
    dtype = ffn.wo.weight.dtype if isinstance(ffn.wo.weight, torch.Tensor) else None
    gated = hasattr(ffn, "wi_0")
    project = projection([ffn.wi_0, ffn.wi_1]) if gated else projection([ffn.wi], None, inside)

    def run(x):
        _, (x, *others) = project(x)
        if gated:
            x = ffn.act(x) * others[0]
        elif inside is None:
            x = ffn.act(x)
        # transformers keeps `wo` in fp32 where the rest has 16 bits.
        return x if dtype in (None, x.dtype, torch.int8) else x.to(dtype)

    return run


def _head(model: nn.Module, norm: nn.Module, head: nn.Module):
    alone = layers.alone(head)
    file = layers.modeling("t5")
    # mT5's forward never scales, whatever its config says.
    scales = file is not None and isinstance(model, file.T5ForConditionalGeneration)
    scale = model.model_dim**-0.5 if scales and model.config.scale_decoder_outputs else None

    def logits(x: torch.Tensor) -> torch.Tensor:
        x = norm(x[:, -1:] if alone else x)
        return head(x if scale is None else x * scale)[:, -1]

    return logits


class _Bias:
    """The relative position bias of a decoder's first attention, which all its layers share.

    It depends on how far a key stands behind the query. One row that ends with the query holds it for every position;
    `at` looks it up there by index.
    """

    def __init__(self, attention: nn.Module):
        self.attention = attention
        self.row: torch.Tensor | None = None
        self.safe = _safe(attention.relative_attention_num_buckets, attention.relative_attention_max_distance)

    def of_first(self, tokens: int) -> torch.Tensor:
        """[1, heads, tokens, tokens]: of the first queries, for as many keys."""
        return self.attention.compute_bias(tokens, tokens)

    def of_one(self, position: int, keys: int) -> torch.Tensor:
        """[1, heads, 1, keys]: of the query at `position`, for the first keys; 0 behind it."""
        if not self.safe:
            bias = self.attention.compute_bias(1, position + 1, past_seen_tokens=position)
            return nn.functional.pad(bias, (0, keys - position - 1))
        row = self._row(keys)
        # The last `position + 1` of the row's first half, and then zeros.
        start = row.shape[3] // 2 - position - 1
        return row[..., start : start + keys]

    def at(self, position: torch.Tensor, keys: int) -> torch.Tensor:
        """As `of_one`, for a position int64 [1] on the device; of no use in a capture unless it was called before."""
        row = self._row(keys)
        index = torch.arange(keys, device=row.device) + (row.shape[3] // 2 - 1) - position
        return row.index_select(3, index)

    def _row(self, keys: int) -> torch.Tensor:
        """[1, heads, 1, 2 * n]: n keys up to the query, then zeros; n at least `keys`."""
        if self.row is None or self.row.shape[3] < 2 * keys:
            size = max(keys, 64) if self.row is None else max(keys, self.row.shape[3])
            bias = self.attention.compute_bias(1, size, past_seen_tokens=size - 1)
            self.row = nn.functional.pad(bias, (0, size))
        return self.row


def _safe(buckets: int, most: int) -> bool:
    """Whether no distance lies so close to a border of two buckets that a last digit of its logarithm decides.

    torch computes a logarithm by other instructions where it ends a row than where it is inside, so the bias of such a
    distance would depend on how many keys there are. That of the published models does not.
    """
    exact = buckets // 2
    if exact < 1 or most <= exact:
        return False
    for distance in range(exact, most):
        value = math.log(distance / exact) / math.log(most / exact) * (buckets - exact)
        if abs(value - round(value)) < 1e-4 and distance > exact:
            return False
    return True
