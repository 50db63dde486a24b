"""`QATLinear` and `QATEmbedding`: float master weights whose forward pass is the packed one."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dqkernels import autocast, ops, reference, straight_through
from dqkernels.config import LayerConfig
from dqkernels.nn import PackedModule, QEmbedding, QLinear, ScaledWordEmbedding, take_over

#: Where an activation keeps its codes for the next layer that reads it (q, k and v read one tensor).
_CODES = "_dqkernels_codes"
#: Steps of optimizers so far, of any: fused ones write weights without moving their version.
_steps = 0


def _count_step(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class QATModule(nn.Module):
    """A float master `weight`, float32 whatever `.to(dtype)` says, and its packed form, made anew after every step.

    Attributes:
        layer: the resolved quantization.
        weight_log_step: log of the learned steps, fp32 [rows] or [1] (LSQ; in logs, so that the relative change of a
            step per update is what the optimizer's learning rate says, and no step becomes negative); None for fixed
            rules, and in modules that are tied to another one, which holds it.
    """

    layer: LayerConfig
    weight: nn.Parameter

    def _set_up(self, layer: LayerConfig, owner: QATModule | None, learned_scale: bool) -> None:
        self.layer = layer
        self.backend, self.strict = "auto", False
        #: dtype of the model -> the one that transformers keeps this module in: float32 for T5's `wo` in fp16.
        self.kept_dtypes: dict[torch.dtype, torch.dtype] = {}
        # Not as a submodule: its parameters are its own.
        self.__dict__["_owner"] = owner
        self._kept: tuple | None = None
        # A tied table is float32 already, by its owner.
        self.compute_dtype = self.weight.dtype if owner is None else owner.compute_dtype
        if self.weight.dtype != torch.float32:
            self.weight.data = self.weight.data.float()
        step = None
        if learned_scale and owner is None:
            if layer.group_size != -1:
                raise ValueError(f"learned_scale needs group_size=-1, got {layer.group_size}")
            step = nn.Parameter(self._initial_step().log())
        self.register_parameter("weight_log_step", step)

    @torch.no_grad()
    def _initial_step(self) -> torch.Tensor:
        """What the fixed rule finds for the weight as it is: fp32 [rows] or [1].

        absmax's step is its maximum over L; from there a step of 2 or 4 bits would take long to shrink, so those widths
        start at the step of least squared error.
        """
        layer = self.layer
        rule = "mse" if layer.quantizer == "absmax" and layer.bits == 4 else layer.quantizer
        _, scale, _ = ops.quantize_weight(self.weight, layer.bits, rule, layer.granularity, -1, layer.weight_clip)
        step = scale * 2 if layer.four_level else scale
        if not bool(torch.isfinite(step).all()):
            raise ValueError("weight has NaN or Inf values and cannot be quantized")
        # A row of zeros (the padding token's) has step 0, and no log: any step gives it codes near 0.
        live = step > 0
        typical = step[live].mean() if bool(live.any()) else torch.ones_like(step[0])
        return torch.where(live, step, typical)

    def log_step(self) -> torch.Tensor | None:
        """The parameter that this module quantizes by: its own, or its owner's."""
        return (self._owner or self).weight_log_step

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """qweight, weight_scale and group_mult (or None) of the master weight as it is now.

        Kept until the weight changes, an optimizer steps, a backward pass has come through (who writes through `.data`
        writes where torch does not see it), or the module changes between training and evaluation.
        """
        if self._owner is not None:
            return self._owner.packed()
        step = self.weight_log_step
        key = _steps, *((t.data_ptr(), t._version, t.device) for t in (self.weight, step) if t is not None)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._quantize()
        return self._kept[1]

    @torch.no_grad()
    def _quantize(self):
        layer, weight = self.layer, self.weight.detach()
        if weight.dtype != torch.float32:
            raise RuntimeError(
                f"the master weight must be float32 and was cast to {weight.dtype}, by a float layer tied to it "
                "(head='float'): leave the model in float32, under autocast if it must be fast"
            )
        if self.weight_log_step is not None:
            step = self.weight_log_step.detach().exp()
            packed = straight_through.quantize_by_step(
                weight, step, layer.bits, layer.quantizer, layer.weight_clip, self.backend, self.strict
            )
            return *packed, None
        qweight, scale, group_mult = ops.quantize_weight(
            weight, layer.bits, layer.quantizer, layer.granularity, layer.group_size, layer.weight_clip,
            self.backend, self.strict,
        )  # fmt: skip
        return qweight, scale, None if layer.group_size == -1 else group_mult

    def forget(self, *_) -> None:
        """Drops the kept codes; also a hook of gradients."""
        self._kept = None
        if self._owner is not None:
            self._owner._kept = None

    def train(self, mode: bool = True):
        self.forget()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        """Moves as any module; casts all but the master weight and its steps."""
        self.forget()
        masters = {name: self._parameters[name] for name in ("weight", "weight_log_step")}
        for name in masters:
            self._parameters[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters.update(masters)
        for tensor in masters.values():
            if tensor is not None:
                _move(tensor, fn)
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device))
        if probe.dtype.is_floating_point:
            self.compute_dtype = self.kept_dtypes.get(probe.dtype, probe.dtype)
        return self

    def __getstate__(self):
        return {**self.__dict__, "_kept": None}

    def _format(self) -> tuple[int, bool, int]:
        return self.layer.bits, self.layer.four_level, self.layer.group_size

    def _fill(self, new: PackedModule, shared: PackedModule | None) -> PackedModule:
        """The codes as they are, or those of the module that this one is tied to."""
        if shared is not None:
            new.share_(shared)
        else:
            qweight, scale, group_mult = (None if t is None else t.clone() for t in self.packed())
            new.qweight = nn.Parameter(qweight, requires_grad=False)
            new.weight_scale = scale
            if group_mult is not None:
                new.group_mult = nn.Parameter(group_mult, requires_grad=False)
        new.backend, new.strict = self.backend, self.strict
        return take_over(self, new)

    def _describe(self) -> str:
        learned = ", learned scale" if self.log_step() is not None else ""
        return f"bits={self.layer.bits}, {self.layer.quantizer}, {self.layer.granularity}{learned}"


class QATLinear(QATModule, nn.Linear):
    """`nn.Linear` that computes what `QLinear` will: int8 activations times the codes of its weight, with gradients.

    Shapes: input [..., in_features] float32, float16 or bfloat16 -> [..., out_features] in the input's dtype (under
    autocast in that of autocast).
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, layer: LayerConfig, owner: QATModule | None = None, learned_scale: bool = False
    ) -> QATLinear:
        """The quantized twin of a float layer, which goes on sharing its parameters and hooks.

        Args:
            linear: its `weight` becomes float32 if it is not.
            layer: the resolved quantization.
            owner: the module whose table this one is tied to (an lm_head's embedding); None for a table of its own.
            learned_scale: learn the steps (LSQ) from those of the fixed rule on.

        Raises:
            ValueError: for weights that are not finite, or learned steps with groups.
        """
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new._set_up(layer, owner, learned_scale)
        return take_over(linear, new)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype == torch.float32 != self.compute_dtype:
            # T5 casts to `wo.weight.dtype`, the master's; the packed layer's is the model's, so nothing is lost here.
            input = input.to(self.compute_dtype)
        layer, out_dtype = self.layer, autocast.output_dtype(input)
        packed, form = self.packed(), self._format()
        if not torch.is_grad_enabled():
            act = layer.act_granularity, layer.act_clip, None, "none", out_dtype
            return ops.qlinear(
                input, *packed, self.bias, None, *form, self.out_features, *act, self.backend, self.strict
            )
        q, act_scale, row_sum, passed = self._codes_of(input)
        output = straight_through.qlinear_train(
            input, self.weight, self.log_step(), self.bias, q, act_scale, row_sum, passed, *packed, *form,
            layer.weight_clip, out_dtype, self.backend, self.strict,
        )  # fmt: skip
        if output.requires_grad:
            output.register_hook(self.forget)
        return output

    def _codes_of(self, input: torch.Tensor):
        """The input's codes, scales, sums and mask of the clip; once for all layers that read one tensor."""
        layer = self.layer
        key = layer.act_granularity, layer.act_clip, input._version
        kept = None if torch.compiler.is_compiling() else getattr(input, _CODES, None)
        if kept is None or kept[0] != key:
            with torch.no_grad():
                rounded = ops.quantize_activation(
                    input, layer.act_granularity, layer.act_clip, True, None, self.backend, self.strict
                )
                passed = None
                if layer.act_clip is not None:
                    passed = reference.pack_bits((input.abs() < layer.act_clip).reshape(-1, self.in_features))
            kept = key, (*rounded, passed)
            if not torch.compiler.is_compiling():
                setattr(input, _CODES, kept)
        q, act_scale, row_sum, passed = kept[1]
        return q, act_scale, row_sum if layer.four_level and layer.group_size == -1 else None, passed

    def to_packed(self, dtype: torch.dtype, shared: PackedModule | None = None) -> QLinear:
        """The `QLinear` of the codes as they are, its bias in `dtype`."""
        bias = self.bias is not None
        new = QLinear(self.in_features, self.out_features, bias, layer=self.layer, dtype=dtype, device="meta")
        if bias:
            new.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), requires_grad=False)
        return self._fill(new, shared)

    def to_float(self) -> nn.Linear:
        """An `nn.Linear` on the same parameters."""
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        new.weight, new.bias = self.weight, self.bias
        return take_over(self, new)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self._describe()}, act={self.layer.act_granularity}"


class QATEmbedding(QATModule, nn.Embedding):
    """`nn.Embedding` that reads the codes of its table, as `QEmbedding` will, with gradients for the table.

    Shapes: input int64 or int32 [...] -> [..., embedding_dim] in the dtype that the module was last cast to.
    """

    embed_scale: float

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, layer: LayerConfig, owner: QATModule | None = None, learned_scale: bool = False
    ) -> QATEmbedding:
        """As `QATLinear.from_linear`; BART's scaled word embedding keeps its factor."""
        new = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        new.weight = embedding.weight
        new.embed_scale = float(getattr(embedding, "embed_scale", 1.0))
        new._set_up(layer, owner, learned_scale)
        return take_over(embedding, new)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        packed, form = self.packed(), self._format()
        if not torch.is_grad_enabled():
            size = self.num_embeddings, self.embedding_dim, self.embed_scale
            return ops.qembedding(input, *packed, None, *form, *size, self.compute_dtype, self.backend, self.strict)
        output = straight_through.qembedding_train(
            input, self.weight, self.log_step(), *packed, *form,
            -1 if self.padding_idx is None else self.padding_idx, self.embed_scale, self.layer.weight_clip,
            self.compute_dtype, self.backend, self.strict,
        )  # fmt: skip
        if output.requires_grad:
            output.register_hook(self.forget)
        return output

    def to_packed(self, dtype: torch.dtype, shared: PackedModule | None = None) -> QEmbedding:
        """The `QEmbedding` of the codes as they are."""
        size = self.num_embeddings, self.embedding_dim, self.padding_idx
        new = QEmbedding(*size, layer=self.layer, embed_scale=self.embed_scale, dtype=dtype, device="meta")
        return self._fill(new, shared)

    def to_float(self) -> nn.Embedding:
        """A float embedding on the same table, with the same factor."""
        size = self.num_embeddings, self.embedding_dim, self.padding_idx
        if self.embed_scale == 1.0:
            new = nn.Embedding(*size, device="meta")
        else:
            new = ScaledWordEmbedding(*size, device="meta", embed_scale=self.embed_scale)
        new.weight = self.weight
        return take_over(self, new)

    def extra_repr(self) -> str:
        scale = f", embed_scale={self.embed_scale:g}" if not math.isclose(self.embed_scale, 1.0) else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}{scale}"


def _move(tensor: nn.Parameter, fn) -> None:
    """`fn` without its cast, in place: modules that are tied to `tensor` stay so."""
    device = fn(torch.empty(0, dtype=torch.uint8, device=tensor.device)).device
    if tensor.device == device:
        return
    tensor.data = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.data.to(device)
    if tensor.grad is not None:
        tensor.grad.data = tensor.grad.data.to(device)
