"""One decoder step over static int8 caches: tokens in, logits out.

`Step` is the seam of this package: the loops of `sampling` and `beams` know its four methods, whether it finds the
largest logit of a row, and nothing of caches, layers or devices. `graphs.GraphStep` replays a captured one.
"""

from __future__ import annotations

import torch

from dqkernels import backends, kv_cache, ops
from dqkernels.decode import caches as static
from dqkernels.decode import sources
from dqkernels.decode.caches import Caches
from dqkernels.decode.layers import Attend, Decoder


class Step:
    """A decoder over one set of caches, for one call of `generate`.

    Args:
        decoder: the prepared layers.
        caches: their static caches.
        beams: whether rows will be reordered.
        most: keys of self-attention that this call may reach; the caches grow up to it.

    Attributes:
        wants_best: set by a loop that has a use for `best`.
        finds_best: whether `step` gives it.
        on_core: whether its attention runs on the compiled core's CPU kernels, so that beams are kept there too.
        processors: set by a loop: the classes of logits processors that it calls as transformers does.
        beams_by_torch: set by a loop: why it does not keep its beams in the core, though `on_core`; else empty.
        best: int64 [rows], where the largest of the last step's logits are, as `torch.argmax` has them; written over by
            the next step. None where that was not asked for, or is not found here.
    """

    finds_best = False

    def __init__(self, decoder: Decoder, caches: Caches, beams: bool, most: int):
        self.decoder, self.caches = decoder, caches
        self.beams, self.most = beams, most
        self.wants_best = False
        self.best: torch.Tensor | None = None
        # Plain torch computes all keys that it is shown, so it is shown those that are there; kernels read `lengths`.
        chosen = {_backend(layer.own, caches, beams) for layer in decoder.layers}
        self.exact_windows, self.on_core = "eager" in chosen, chosen == {"cpu"}
        self.processors: tuple[str, ...] = ()
        self.beams_by_torch = ""

    def start(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Takes the sources in.

        Args:
            hidden: [sources, tokens, width], the encoder's output.
            mask: bool [sources, tokens], which of them are visible; None: all.
        """
        caches = self.caches
        beams, tokens = caches.shape.rows // hidden.shape[0], hidden.shape[1]
        order = None
        if mask is None:
            caches.source_lengths.fill_(tokens)
        else:
            order, lengths = visible_first(mask)
            caches.source_lengths.copy_(lengths.repeat_interleave(beams) if beams > 1 else lengths)
        layers = self.decoder.layers
        pairs = sources.keys_and_values([layer.cross_kv for layer in layers], hidden)
        for layer, cache, found in zip(layers, caches.cross, pairs, strict=True):
            if order is not None:  # of the projections, as the rows of a float GEMM may depend on where they stand
                found = [each.gather(1, order.unsqueeze(2).expand_as(each)) for each in found]
            k, v = map(self._heads, found)
            self._write(layer.cross, cache, k, v, None)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [rows, tokens], the first tokens -> logits fp32 [rows, vocabulary] of the one behind them."""
        tokens = ids.shape[1]
        if tokens == 1:
            return self.step(ids[:, 0], 0)
        self._make_room(tokens)
        caches, decoder = self.caches, self.decoder
        caches.ancestors[:, :tokens] = caches.row_numbers.unsqueeze(1)
        caches.lengths.fill_(tokens)
        positions = torch.arange(tokens, device=ids.device)
        bias = None if decoder.prefill_bias is None else decoder.prefill_bias(tokens)
        return self._run(ids, positions, None, None, tokens, bias)

    def step(self, tokens: torch.Tensor, position: int, keep: bool = True) -> torch.Tensor:
        """tokens int64 [rows], all at `position` -> logits fp32 [rows, vocabulary].

        keep: give a tensor of the caller's own; otherwise the next step may write over it.
        """
        self._make_room(position + 1)
        self._place(tokens, position)
        keys = position + 1 if self.exact_windows else self.caches.shape.capacity
        bias = None if self.decoder.bias is None else self.decoder.bias(position, keys)
        caches = self.caches
        ancestors = caches.ancestors[:, :keys] if self.beams else None
        return self._run(caches.tokens, caches.position, caches.positions, ancestors, keys, bias)

    def reorder(self, parents: torch.Tensor) -> None:
        """Makes row r go on from row parents[r] (int64 [rows]): by one gather of the table, no key moves."""
        ancestors = self.caches.ancestors
        ancestors.copy_(ancestors.index_select(0, parents))

    # ---- inside ---------------------------------------------------------------------------------------------

    def _place(self, tokens: torch.Tensor, position: int) -> None:
        """Writes what a step reads into the small tensors of the caches."""
        caches = self.caches
        caches.tokens[:, 0].copy_(tokens)
        caches.position.fill_(position)
        caches.positions.fill_(position)
        caches.lengths.fill_(position + 1)
        if self.beams:
            caches.ancestors[:, position].copy_(caches.row_numbers)

    def _make_room(self, keys: int) -> None:
        capacity = self.caches.shape.capacity
        if keys > capacity:
            self.caches.grow(static.bucket(max(keys, min(2 * capacity, self.most))))

    def _run(
        self,
        ids: torch.Tensor,
        at: torch.Tensor,
        position: torch.Tensor | None,
        ancestors: torch.Tensor | None,
        keys: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The walk over the layers.

        Args:
            ids: int64 [rows, tokens]; at: int64 [tokens], their positions.
            position: int32 [rows], the same per row of one token; None: 0 and up.
            ancestors: int32 [rows, keys], where the keys lie; None: in each row's own cache.
            keys: how many of self-attention are looked at.
            bias: [1, heads, tokens, keys] of their scores, or None.
        """
        caches, heads = self.caches, self._heads
        several = ids.shape[1] > 1
        x = self.decoder.embed(ids, at)
        for layer, own, cross in zip(self.decoder.layers, caches.own, caches.cross, strict=True):
            base, (q, k, v) = layer.qkv(x)
            self._write(layer.own, own, heads(k), heads(v), position)
            seen = own.first(keys)
            x = layer.own_out(_attend(layer.own, heads(q), seen, caches.lengths, ancestors, bias, several), base)
            base, (q,) = layer.cross_q(x)
            seen = cross.first(caches.shape.source_capacity)
            out = _attend(layer.cross, heads(q), seen, caches.source_lengths, caches.source, None, False)
            x = layer.feed_forward(layer.cross_out(out, base))
        return self.decoder.head(x).to(torch.float32).contiguous()

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, width] -> [rows, heads, tokens, head_dim], a view."""
        rows, tokens, _ = x.shape
        if tokens == 1:
            return x.view(rows, self.decoder.heads, 1, self.decoder.head_dim)
        return x.view(rows, tokens, self.decoder.heads, self.decoder.head_dim).transpose(1, 2)

    @staticmethod
    def _write(attend: Attend, cache: static.LayerCache, k, v, position) -> None:
        options = attend.options
        kv_cache.quantize_into_cache(
            k, v, cache.k, cache.k_scale, cache.v, cache.v_scale, position, options.mode, options.clip,
            options.backend, options.strict,
        )  # fmt: skip


def visible_first(mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The order of tokens int64 [sources, tokens] that puts the visible ones in front, None where they stand there, and
    their number, int32 [sources], for a mask bool [sources, tokens].

    Attention over a source knows no order of its keys, so any mask becomes a length.
    """
    lengths = mask.sum(1, dtype=torch.int32)
    if not bool((mask[:, 1:] > mask[:, :-1]).any()):
        return None, lengths
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True), lengths


def _attend(
    attend: Attend,
    q: torch.Tensor,
    seen: tuple[torch.Tensor, ...],
    lengths: torch.Tensor,
    source: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """[rows, heads, tokens, head_dim] -> attention's output [rows, tokens, heads * head_dim]."""
    options = attend.options
    out = ops.qattention_decode(
        q, *seen, lengths, source, bias, causal, attend.scale, options.mode, options.clip,
        options.backend, options.strict,
    )  # fmt: skip
    rows, _, tokens, _ = q.shape
    return out.reshape(rows, 1, -1) if tokens == 1 else out.transpose(1, 2).reshape(rows, tokens, -1)


def _backend(attend: Attend, caches: Caches, beams: bool) -> str:
    options, shape = attend.options, caches.shape
    facts = {"mode": options.mode, "head_dim": shape.head_dim, "by_key": beams}
    where = (shape.device.type, options.backend, options.strict)
    return backends.choose("qattention_decode", *where, **facts).backend
