"""Modules that hold packed weights: `QLinear` and `QEmbedding`. They compute nothing; `ops` does."""

from __future__ import annotations

import torch
from torch import nn

from dqkernels import backends, checks, ops, packing
from dqkernels.config import DQConfig, LayerConfig
from dqkernels.kernels import plans
from dqkernels.kernels.measured import TableError

#: Hooks and bookkeeping that a replacement module takes over from the module it replaces.
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

#: Elements of a float matrix that are quantized at once.
_PACK_ELEMENTS = 1 << 19


class PackedModule(nn.Module):
    """A packed weight matrix: `qweight`, `weight_scale`, and `group_mult` when group-wise.

    `qweight` and `group_mult` are uint8 parameters without gradient. `weight_scale` is a float32 buffer: as a
    parameter it would be the first floating one of a BART, and transformers would read the model's dtype off it.
    It stays float32 under `.half()` and `.to(dtype)`, and modules that share it go on sharing it.
    """

    def __init__(self, rows: int, columns: int, layer: LayerConfig, dtype: torch.dtype, device=None):
        super().__init__()
        self.layer = layer
        self.backend, self.strict = "auto", False
        self.compute_dtype = dtype
        shape = packing.packed_shape(rows, columns, layer.bits)
        scales = 1 if layer.granularity == "per_tensor" else rows
        self.qweight = _frozen(torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(scales, dtype=torch.float32, device=device))
        if layer.group_size == -1:
            self.register_parameter("group_mult", None)
        else:
            groups = -(-columns // layer.group_size)
            self.group_mult = _frozen(torch.ones(rows, groups, dtype=torch.uint8, device=device))

    @property
    def _rows(self) -> int:
        raise TypeError("PackedModule is abstract")

    @property
    def _columns(self) -> int:
        raise TypeError("PackedModule is abstract")

    @property
    def weight(self) -> torch.Tensor:
        """For code that asks a linear for `weight.dtype` or `.device` (T5's `wo`, `_init_weights`).

        One NaN seen through the right shape and dtype, so that it takes no memory and no computation with it goes
        unnoticed; the floats themselves are `dequantize()`. While transformers loads a float checkpoint it is the
        float parameter that is about to be packed.
        """
        slot = self._parameters.get("weight")
        if slot is not None:
            return slot
        # The shape matters: transformers pads or cuts the bias of a tied head to `weight.shape[0]`.
        stand_in = torch.full((1,), float("nan"), dtype=self.compute_dtype, device=self.qweight.device)
        stand_in = stand_in.expand(self._rows, self._columns)
        stand_in._is_hf_initialized = True
        return stand_in

    def dequantize(self) -> torch.Tensor:
        """The float matrix these codes stand for: fp32 [rows, columns]."""
        return ops.dequantize_weight(*self.packed(), *self._format(), self._rows, self._columns)

    def pack_(self, weight: torch.Tensor) -> None:
        """Quantizes a float matrix [rows, columns] into this module, in place.

        Raises:
            ValueError: for another shape, a weight that is not finite, or one on the meta device.
        """
        if weight.is_meta:
            raise ValueError(
                "weight is on the meta device and has no values to quantize: load the weights first, or give "
                "from_pretrained the quantization_config"
            )
        if tuple(weight.shape) != (self._rows, self._columns):
            raise ValueError(f"weight must be [{self._rows}, {self._columns}], got {list(weight.shape)}")
        layer = self.layer
        # Rows are quantized on their own, so a few at a time give the same bits and no temporaries of the size of a
        # 250,000-word table. A scale per tensor needs the whole matrix at once.
        rows = self._rows
        if layer.granularity == "per_channel":
            rows = max(_PACK_ELEMENTS // self._columns // packing.BLOCK_N, 1) * packing.BLOCK_N
        parts = []
        for chunk in weight.detach().split(max(rows, 1)):
            parts.append(
                ops.quantize_weight(
                    chunk, layer.bits, layer.quantizer, layer.granularity, layer.group_size, layer.weight_clip
                )
            )
            if not torch.isfinite(parts[-1][1]).all():
                raise ValueError("weight has NaN or Inf values and cannot be quantized")
        qweight, scale, group_mult = (torch.cat(part) for part in zip(*parts, strict=True))
        self.qweight = _frozen(qweight)
        self.weight_scale = scale
        if layer.group_size != -1:
            self.group_mult = _frozen(group_mult)

    def share_(self, other: PackedModule) -> None:
        """Makes this module read the packed table of `other` (an lm_head tied to the embedding)."""
        if other._format() != self._format() or (other._rows, other._columns) != (self._rows, self._columns):
            raise ValueError(
                "modules that share a packed table must agree in (bits, four_level, group_size) and shape, got "
                f"{self._format()} [{self._rows}, {self._columns}] and "
                f"{other._format()} [{other._rows}, {other._columns}]"
            )
        self.qweight, self.weight_scale, self.group_mult = other.qweight, other.weight_scale, other.group_mult
        # One tensor in a file, under the name of its owner.
        self._non_persistent_buffers_set.add("weight_scale")

    def packed_bytes(self) -> int:
        """Bytes of codes, scales and multipliers."""
        return sum(t.numel() * t.element_size() for t in self.packed() if t is not None)

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """qweight, weight_scale, and group_mult or None."""
        return self.qweight, self.weight_scale, self.group_mult

    def _format(self) -> tuple[int, bool, int]:
        return self.layer.bits, self.layer.four_level, self.layer.group_size

    def _apply(self, fn, recurse=True):
        """Moves and casts as any module, but keeps scales float32 and shared."""
        kept = {name: self._buffers.pop(name) for name in ("weight_scale", "act_scale") if name in self._buffers}
        try:
            super()._apply(fn, recurse)
            moved = {name: None if old is None else _moved(old, fn) for name, old in kept.items()}
        except BaseException:
            self._buffers.update(kept)  # a device without memory, or without a driver: still a whole module
            raise
        self._buffers.update(moved)
        cast = fn(torch.empty(0, dtype=self.compute_dtype, device=self._probe_device(fn)))
        if cast.dtype.is_floating_point:
            self.compute_dtype = cast.dtype
        return self

    def _probe_device(self, fn) -> torch.device:
        # `to_empty` and `.to` work from any device; the qweight's own (already moved) is always a legal one.
        return self.qweight.device

    def _describe(self) -> str:
        layer = self.layer
        parts = [f"bits={layer.bits}", layer.quantizer, layer.granularity]
        if layer.group_size != -1:
            parts.append(f"group_size={layer.group_size}")
        return ", ".join(parts)


class QLinear(PackedModule):
    """`y = activation(x . W^T + bias)` with packed 2/4/8-bit W and int8 activations.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        layer: the resolved quantization of this layer.
        dtype: of the bias, and of `weight.dtype` as other code sees it.

    Shapes: input x [..., in_features] in float32, float16 or bfloat16; y [..., out_features] in x's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layer: LayerConfig,
        dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__(out_features, in_features, layer, dtype, device)
        self.in_features, self.out_features = in_features, out_features
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        static = layer.act_granularity == "static"
        # NaN until calibrated: ops refuse it on the CPU, and on a GPU every output is NaN.
        scale = torch.full((1,), float("nan"), dtype=torch.float32, device=device) if static else None
        self.register_buffer("act_scale", scale)

    @classmethod
    def from_linear(cls, linear: nn.Linear, layer: LayerConfig | DQConfig, tied: PackedModule | None = None) -> QLinear:
        """Packs an `nn.Linear`; hooks, bias and training flag are taken over.

        Args:
            linear: the float layer; it is not changed.
            layer: the resolved quantization, for example `DQConfig(weight_bits=4).for_linear("fc1")`; or a
                `DQConfig`, whose choice for a linear without a name is taken, with its `backend` and `strict`.
            tied: a packed module whose table this layer shares instead of packing its own.

        Raises:
            ValueError: for weights that are not finite or on the meta device, in_features > 131,071, or a
                `layer` that is neither kind or leaves the linear in float.
        """
        layer, backend, strict = _resolved(layer, is_embedding=False)
        weight = linear.weight
        # A tied table is adopted whole below; an empty one of the right shape costs nothing on the meta device.
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            layer=layer,
            dtype=weight.dtype,
            device=weight.device if tied is None else torch.device("meta"),
        )
        if tied is None:
            new.pack_(weight)
        else:
            new.share_(tied)
            if new.act_scale is not None:
                new.act_scale = torch.full((1,), float("nan"), dtype=torch.float32, device=weight.device)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        new.backend, new.strict = backend, strict
        return take_over(linear, new)

    @property
    def _rows(self) -> int:
        return self.out_features

    @property
    def _columns(self) -> int:
        return self.in_features

    # `input`, as nn.Linear and nn.Embedding call it: a call by keyword goes on working.
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        checks.check_width(input, self.in_features)
        return ops.linear(
            input,
            self.qweight,
            self.weight_scale,
            self.group_mult,
            self.bias,
            None,
            *self._format(),
            self.out_features,
            layer.act_granularity,
            layer.act_clip,
            self.act_scale,
            "none",
            input.dtype,
            self.backend,
            self.strict,
        )

    def kernel(self) -> str:
        """The backend that runs this layer where it is now, and the reason: `eager (cpu: has no qgemm)`."""
        layer = self.layer
        device = self.qweight.device.type
        try:
            facts = device, layer.bits, layer.group_size, layer.act_granularity, self.backend, self.strict
            ranges = [(ops.FEW_ROWS, False, None), (None, True, None)]
            if self.qweight.is_cuda:  # as `backends.gemm_facts` has them
                index, (n, k) = self.qweight.get_device(), (self.out_features, self.in_features)
                measured = [(m, False, (index, m, n, k)) for m in plans.ROWS if m > plans.FASTER_ROWS]
                ranges[:1] = [(plans.FASTER_ROWS, False, None), *measured]
            found = [(last, *_kernels(*ops.choose_qlinear(*facts, *rest))) for last, *rest in ranges]
        except (backends.BackendError, TableError) as error:
            return f"none ({error})"
        return _by_rows(found)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._describe()}, act={self.layer.act_granularity}"
        )


def _by_rows(found: list[tuple[int | None, str, str]]) -> str:
    """`cuda to 32 rows, triton above (reason; reason)` of (last number of rows, kernels, reason): the first reason, and
    that of the first change, or where nothing changes that of the last if it is another."""
    runs = [one for one, after in zip(found, [*found[1:], None], strict=True) if after is None or one[1] != after[1]]
    reason = found[0][2]
    if len(runs) > 1:
        changed = next(why for (*_, name, why), before in zip(found[1:], found, strict=False) if name != before[1])
        reason += f"; {changed}"
    if len(runs) == 1:
        if found[-1][2] != reason:
            reason += f"; above {found[-2][0]} rows {found[-1][2]}"
        return f"{runs[0][1]} ({reason})"
    words = [f"{name} to {last}" for last, name, _ in runs[:-1]]
    words[0] += " rows"
    return f"{', '.join(words)}, {runs[-1][1]} above ({reason})"


def _kernels(gemm: backends.Choice, quantizer: backends.Choice | None) -> tuple[str, str]:
    """Names of both in one word, and the reason."""
    with_quantizer = "" if quantizer is None or quantizer.backend == gemm.backend else f"+{quantizer.backend}"
    return gemm.backend + with_quantizer, gemm.reason


class QEmbedding(PackedModule):
    """Token embedding read from a packed table: `level * weight_scale * embed_scale`, one rounding.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in `nn.Embedding`.
        layer: the resolved quantization.
        embed_scale: factor of BART's scaled word embedding; 1.0 otherwise.
        dtype: of the output, and of `weight.dtype` as other code sees it.

    Shapes: input int64 or int32 [...], ids of rows -> [..., embedding_dim].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        layer: LayerConfig,
        embed_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__(num_embeddings, embedding_dim, layer, dtype, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.embed_scale = padding_idx, embed_scale

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, layer: LayerConfig | DQConfig, tied: PackedModule | None = None
    ) -> QEmbedding:
        """Packs an `nn.Embedding` (or a scaled word embedding of BART); arguments as `QLinear.from_linear`."""
        layer, backend, strict = _resolved(layer, is_embedding=True)
        new = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            layer=layer,
            embed_scale=float(getattr(embedding, "embed_scale", 1.0)),
            dtype=embedding.weight.dtype,
            device=embedding.weight.device if tied is None else torch.device("meta"),
        )
        if tied is None:
            new.pack_(embedding.weight)
        else:
            new.share_(tied)
        new.backend, new.strict = backend, strict
        return take_over(embedding, new)

    @property
    def _rows(self) -> int:
        return self.num_embeddings

    @property
    def _columns(self) -> int:
        return self.embedding_dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.qembedding(
            input,
            *self.packed(),
            None,
            *self._format(),
            self.num_embeddings,
            self.embedding_dim,
            self.embed_scale,
            self.compute_dtype,
            self.backend,
            self.strict,
        )

    def kernel(self) -> str:
        """The backend that gathers rows where this module is now, and the reason."""
        try:
            choice = backends.choose(
                "qembedding", self.qweight.device.type, self.backend, self.strict, bits=self.layer.bits
            )
        except backends.BackendError as error:
            return f"none ({error})"
        return f"{choice.backend} ({choice.reason})"

    def extra_repr(self) -> str:
        scale = f", embed_scale={self.embed_scale:g}" if self.embed_scale != 1.0 else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}{scale}"


def take_over(old: nn.Module, new: PackedModule) -> PackedModule:
    """Gives `new` the hooks and the training flag of `old`, so that what watched `old` watches `new`."""
    for name in _HOOKS:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    new.train(old.training)
    return new


class ScaledWordEmbedding(nn.Embedding):
    """An embedding times `embed_scale`, as BART's."""

    def __init__(self, *args, embed_scale: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


def float_module(module: PackedModule, weight: nn.Parameter) -> nn.Module:
    """The linear or embedding of torch that `module` was, on `weight`; `model.dequantize()` puts it in its place."""
    if isinstance(module, QEmbedding):
        shape = (module.num_embeddings, module.embedding_dim, module.padding_idx)
        if module.embed_scale != 1.0:
            new = ScaledWordEmbedding(*shape, device="meta", embed_scale=module.embed_scale)
        else:
            new = nn.Embedding(*shape, device="meta")
    else:
        new = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        new.bias = module.bias
    new.weight = weight
    return take_over(module, new)


def _resolved(layer: LayerConfig | DQConfig, is_embedding: bool) -> tuple[LayerConfig, str, bool]:
    """The choice for one module without a name, and backend and `strict`, of which a `LayerConfig` says nothing."""
    if isinstance(layer, LayerConfig):
        return layer, "auto", False
    if not isinstance(layer, DQConfig):
        raise ValueError(f"layer must be a LayerConfig or a DQConfig, got {type(layer).__name__}")
    chosen = layer.for_embedding("") if is_embedding else layer.for_linear("")
    if chosen is None:
        why = "embedding_bits=16" if is_embedding and layer.embedding_bits == 16 else "overrides skip a module named ''"
        raise ValueError(f"layer leaves this module in float ({why}): there is nothing to pack")
    return chosen, layer.backend, layer.strict


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _moved(scale: torch.Tensor, fn) -> torch.Tensor:
    """`fn(scale)` without its cast, once per tensor: modules that shared `scale` share the result."""
    done = getattr(scale, "_dqkernels_moved", None)
    probe = fn(torch.empty(0, dtype=torch.uint8, device=scale.device))
    if probe.device == scale.device:
        return scale
    if done is not None and done.device == probe.device:
        return done
    moved = torch.empty_like(scale, device=probe.device) if scale.is_meta else scale.to(probe.device)
    scale._dqkernels_moved = moved
    return moved
