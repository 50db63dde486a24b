"""Int8 attention as an attention implementation of transformers: `ops.qattention` in the place of sdpa.

    names = enable(model, DQConfig(act_granularity="per_token"))     # BART, mBART, Marian, Pegasus, T5 and their kin
    disable(model)                                                   # what was there before

attention="auto" enables it in the families that `blocks` fuses, and in no other.

A model reaches its attention function, and the function that makes its mask, by the name `dqkernels_int8` in its
config. The options of a module stand on the module. transformers is imported by the first `enable`, not before.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dqkernels import backends, checks, ops
from dqkernels.config import DQConfig
from dqkernels.models import blocks
from dqkernels.models.attention_map import attention_map
from dqkernels.models.attention_options import KEY, NAME, in_use

__all__ = [
    "FAMILIES", "NAME", "Options", "apply", "check", "check_described", "configure", "describe", "disable", "enable",
    "in_use", "int8_attention", "on_backend", "resolved", "why_float",
]  # fmt: skip

logger = logging.getLogger("dqkernels")

#: `model_type` -> the class of its attention, in `transformers.models`: all of them hand q, k, v of as many heads to
#: `ALL_ATTENTION_FUNCTIONS` (transformers 5.17 to 5.24), those of T5 with a position bias.
FAMILIES = {
    "bart": "BartAttention",
    "mbart": "MBartAttention",
    "marian": "MarianAttention",
    "pegasus": "PegasusAttention",
    "t5": "T5Attention",
    "mt5": "MT5Attention",
    "m2m_100": "M2M100Attention",
    "plbart": "PLBartAttention",
    "blenderbot": "BlenderbotAttention",
    "blenderbot-small": "BlenderbotSmallAttention",
}
_BEFORE = "dqkernels_attention_before"  # on every module with a config: the implementation it had
_OVERRIDABLE = ("act_granularity", "act_clip")


@dataclass(frozen=True)
class Options:
    """How one attention module computes.

    Attributes:
        name: full name of the module, for messages.
        mode: `per_token` or `per_tensor`.
        clip: of q * softmax_scale, k and v, or None.
        asked: the config's act_granularity; `static` has no scales for q, k, v and becomes `per_token`.
        backend, strict: as in `DQConfig`.
        dropout: what the module had; int8 attention has none.
    """

    name: str
    mode: str
    clip: float | None
    asked: str
    backend: str
    strict: bool
    dropout: float

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that another process pickled finds its attention function here, by name."""
        self.__dict__.update(state)
        _register()


def enable(model: nn.Module, config: DQConfig, warn: bool = True) -> list[str]:
    """Makes every attention of `model` int8, in place: encoder, decoder and cross attention.

    `act_granularity`, `act_clip` (and the overrides that set them for a module of that name), `backend` and `strict`
    of `config` count, whatever its `attention` says. Attention dropout becomes 0, with a warning where it was not. The
    model gets configs of its own, as another model made from the same config object stays as it is.
    `model.set_attn_implementation("sdpa")` switches int8 attention off, until the next `enable`.

    Args:
        model: of a family in `FAMILIES`, or a module that contains only such models; on any device.
        warn: False where nothing is trained any more, and dropout has no meaning.

    Returns:
        Full names of the attention modules.

    Raises:
        ValueError: naming the class that computes its attention otherwise, or the module whose heads are too wide.
    """
    chosen = _chosen(model, config)
    _register()
    dropped = sorted({module.dropout for module, _ in chosen if module.dropout > 0})
    if dropped:
        logger.log(
            logging.WARNING if warn else logging.INFO,
            "attention dropout %s is now 0 in %s: int8 attention has none", ", ".join(map(str, dropped)),
            type(model).__name__,
        )  # fmt: skip
    for module, options in chosen:
        before = module.__dict__.get(KEY)
        dropout = module.dropout if before is None or module.dropout > 0 else before.dropout
        setattr(module, KEY, dataclasses.replace(options, dropout=dropout))
        module.dropout = 0.0
    _switch_on(model)
    return [options.name for _, options in chosen]


def disable(model: nn.Module) -> None:
    """Undoes `enable`: the implementation and the attention dropout of before. Without `enable`, nothing happens."""
    for module in model.modules():
        options = module.__dict__.pop(KEY, None)
        if options is not None:
            module.dropout = options.dropout
        before = module.__dict__.pop(_BEFORE, None)
        # Not where somebody chose another one since, nor twice where modules share a config.
        if before is not None and module.config._attn_implementation == NAME:
            module.config._attn_implementation = before


def check(model: nn.Module, config: DQConfig) -> None:
    """Raises what `enable` would raise, and changes nothing; works on the meta device."""
    _chosen(model, config)


def configure(model: nn.Module, backend: str, strict: bool) -> None:
    """Gives the modules that `enable` prepared another `backend` and `strict`."""
    for module, options in _enabled(model):
        setattr(module, KEY, dataclasses.replace(options, backend=backend, strict=strict))


@contextlib.contextmanager
def on_backend(model: nn.Module, backend: str) -> Iterator[None]:
    """`configure` inside the block; behind it every module has the very options it had, also where they differ."""
    before = list(_enabled(model))
    try:
        configure(model, backend, False)
        yield
    finally:
        for module, options in before:
            setattr(module, KEY, options)


def why_float(model: nn.Module, config: DQConfig) -> str | None:
    """Why attention="auto" leaves that of `model` in float, in words; None where it makes it int8. Works on meta."""
    types = {each.config.model_type for each in _models(model)}
    if not types or not types <= set(blocks.FAMILIES):
        return f"attention='auto' is int8 in {', '.join(blocks.FAMILIES)} alone"
    try:
        check(model, config)
    except ValueError as error:
        return str(error)
    return None


def resolved(model: nn.Module, config: DQConfig) -> DQConfig:
    """`config` with "int8" or "float" in the place of attention="auto": what a model is, which later releases keep."""
    if config.attention != "auto":
        return config
    return dataclasses.replace(config, attention="int8" if why_float(model, config) is None else "float")


def apply(model: nn.Module, config: DQConfig, warn: bool = True) -> None:
    """`enable` for attention="int8", `disable` for "float"; an "auto" that nobody resolved leaves what there is."""
    if config.attention == "int8":
        enable(model, config, warn)
    elif config.attention == "float":
        disable(model)


def check_described(model: nn.Module, config: DQConfig) -> None:
    """Raises ValueError where a model saved with `config` would compute its attention otherwise after loading.

    Int8 attention that `set_attn_implementation` only switched off passes: that is of the process, and in no file.
    """
    found = [dataclasses.astuple(o)[1:3] for _, o in _enabled(model)]
    wanted = [dataclasses.astuple(o)[1:3] for _, o in _chosen(model, config)] if config.attention == "int8" else []
    if found != wanted:
        what = f"is int8 with (mode, clip) = {sorted(set(found), key=str)}" if found else "is in float"
        raise ValueError(
            f"the model cannot be saved: its attention {what}, but its DQConfig says attention={config.attention!r}"
            + (f" with {sorted(set(wanted), key=str)}" if wanted else "")
        )


def describe(model: nn.Module) -> list[tuple[str, list[str]]]:
    """What `enable` prepared and what it is now: `[("int8 per_token on eager (why)", names), ...]`; empty without.

    What counts is `config._attn_implementation`, not what was asked for.
    """
    found: dict[str, list[str]] = {}
    for module, options in _enabled(model):
        now = module.config._attn_implementation
        text = f"float ({now!r} was set in place of int8)" if now != NAME else _words(module, options)
        found.setdefault(text, []).append(options.name)
    return list(found.items())


# ------------------------------------------------------------------------------------------------- the function


def int8_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ops.qattention` with the contract of transformers' own attention functions.

    Args:
        module: an attention module that `enable` prepared.
        query: [batch, heads, queries, head_dim]; key, value: [batch, heads, keys, head_dim].
        attention_mask: bool [batch, 1 or heads, queries, keys], True where visible; or float, added to the
            scores, which hides keys where it is -inf or the lowest number of its type.
        dropout: 0.
        scaling: of the scores; None: 1/sqrt(head_dim).
        is_causal: None: the module's. Counts, as in transformers' sdpa function, only for several queries without a
            mask; of more keys than queries (an empty static cache) the first ones are meant.
        position_bias: T5's, float [1 or batch, heads, queries, keys], added to the scores.
        kwargs: of them `output_attentions` counts.

    Returns:
        [batch, queries, heads, head_dim] in query's dtype, and the probabilities [batch, heads, queries, keys] in
        query's dtype where `output_attentions` asks for them, else None.

    Raises:
        ValueError, backends.BackendError: naming the module, for what int8 attention does not do.
    """
    options = getattr(module, KEY, None)
    if options is None:
        raise ValueError(
            f"{type(module).__name__} was not prepared for int8 attention: call dqkernels.models.attention.enable("
            f"model, config), or quantize with DQConfig(attention='int8'), rather than ask for {NAME!r} by name"
        )
    if dropout:
        raise ValueError(f"{options.name}: int8 attention has no dropout, got {dropout}; set the module's to 0")
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(queries > 1 and attention_mask is None and causal)
    if causal and keys > queries:
        # transformers makes no mask here, as its causal triangle starts at the first key; the op's ends at the last.
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    if attention_mask is not None and attention_mask.is_floating_point():
        position_bias = attention_mask if position_bias is None else position_bias + attention_mask
        # The lowest number of its type is how such a mask says hidden; merely unlikely keys would still share vs_max.
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    how = {"mode": options.mode, "clip": options.clip, "backend": options.backend, "strict": options.strict}
    try:
        out = ops.qattention(query, key, value, attention_mask, position_bias, causal, scale, **how)
    except (ValueError, backends.BackendError) as error:
        raise type(error)(f"{options.name}: {error}") from error
    weights = None
    if kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)):
        weights = attention_map(
            query, key, attention_mask, position_bias, causal=causal, softmax_scale=scale, **how
        ).to(query.dtype)  # fmt: skip
    return out.transpose(1, 2).contiguous(), weights


def _register() -> None:
    """Tells transformers the name, with the function that makes the mask: without it a mask is None, in silence."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, int8_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


# ---------------------------------------------------------------------------------------------------- its modules


def _chosen(model: nn.Module, config: DQConfig) -> list[tuple[nn.Module, Options]]:
    """Every attention module of `model` with its options; raises ValueError as `enable` says."""
    models = _models(model)
    other = next((m for m in models if m.config.model_type not in FAMILIES), None if models else model)
    chosen = []
    rules = _rules(config)
    for name, module in model.named_modules():
        # `blocks` puts a class of its own, of the same name, in place of the one it is made from.
        kind = getattr(type(module), "dqkernels_base", type(module))
        base = next((cls for cls in kind.__mro__ if _is_attention(cls)), None)
        if base is None or other is not None:
            continue
        if kind.forward is not base.forward:
            other = module
            continue
        head_dim = _head_dim(module)
        if head_dim > checks.MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: head_dim must be at most {checks.MAX_HEAD_DIM} for int8 attention, got {head_dim}"
            )
        layer = rules.for_linear(name)
        mode = "per_tensor" if layer.act_granularity == "per_tensor" else "per_token"
        where = layer.act_clip, layer.act_granularity, config.backend, config.strict
        chosen.append((module, Options(name, mode, *where, dropout=module.dropout)))
    if other is not None or not chosen:
        raise ValueError(
            f"attention='int8' is not for {type(other or model).__name__}: of transformers' models, those of "
            f"{', '.join(FAMILIES)} have it. attention='auto' leaves others in float"
        )
    return chosen


def _models(model: nn.Module) -> list[nn.Module]:
    """The models of transformers inside `model`, itself among them."""
    modeling = sys.modules.get("transformers.modeling_utils")  # not imported: no module is one of its models
    return [m for m in model.modules() if modeling is not None and isinstance(m, modeling.PreTrainedModel)]


def _rules(config: DQConfig) -> DQConfig:
    """`config` with what attention takes from it: `skip` and bits of an override are of weights."""
    overrides = {p: {k: e[k] for k in _OVERRIDABLE if k in e} for p, e in config.overrides.items()}
    return DQConfig(act_granularity=config.act_granularity, act_clip=config.act_clip, overrides=overrides)


def _is_attention(cls: type) -> bool:
    return cls.__module__.startswith("transformers.models.") and cls.__name__ in FAMILIES.values()


def _head_dim(module: nn.Module) -> int:
    return module.key_value_proj_dim if hasattr(module, "key_value_proj_dim") else module.head_dim


def _enabled(model: nn.Module) -> Iterator[tuple[nn.Module, Options]]:
    for module in model.modules():
        options = module.__dict__.get(KEY)
        if options is not None:
            yield module, options


def _switch_on(model: nn.Module) -> None:
    """Writes NAME into every config inside `model`: of T5, encoder and decoder have configs of their own.

    (`set_attn_implementation` of transformers 5.17 leaves these out.)
    """
    owners = [m for m in model.modules() if hasattr(m.__dict__.get("config"), "_attn_implementation_internal")]
    own: dict[int, tuple[Any, Any]] = {}  # the old one too: as long as it lives, no other object has its id
    for module in owners:
        if _BEFORE in module.__dict__:
            continue
        old = module.config
        if id(old) not in own:
            own[id(old)] = old, copy.deepcopy(old)
        setattr(module, _BEFORE, old._attn_implementation)
        module.config = own[id(old)][1]
    for module in owners:
        module.config._attn_implementation = NAME


def _words(module: nn.Module, options: Options) -> str:
    facts = {"mode": options.mode, "head_dim": _head_dim(module)}
    device = next(module.parameters()).device.type
    try:
        choice = backends.choose("qattention", device, options.backend, options.strict, **facts)
        kernel = f"{choice.backend} ({choice.reason})"
    except backends.BackendError as error:
        kernel = f"none ({error})"
    mode = options.mode if options.asked == options.mode else f"{options.mode} ({options.asked} has no scales for it)"
    clip = "" if options.clip is None else f", clip {options.clip:g}"
    return f"int8 {mode}{clip} on {kernel}"
