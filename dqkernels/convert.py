"""`quantize_`, the one place that assembles: walks a model, packs its linears and embeddings, swaps them, fuses."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from dqkernels import checks, decode, qmath, reporting
from dqkernels.config import DQConfig, LayerConfig
from dqkernels.models import attention, blocks
from dqkernels.nn import PackedModule, QEmbedding, QLinear

logger = logging.getLogger("dqkernels")

#: Lookups that add to hidden states rather than name tokens: small, sensitive, and never tied to a head.
_POSITION = re.compile(r"position|relative_attention|token_type|segment|(^|\.)wpe$", re.IGNORECASE)
#: Linears that their owner never calls; TransformerEncoderLayer does so in eval mode, on its fast path.
_READ_DIRECTLY = {nn.MultiheadAttention: ("out_proj",), nn.TransformerEncoderLayer: ("linear1", "linear2")}
#: The same in classes of transformers, by name, as none of them may be imported for it.
_READ_BY_CLASS = {
    "ProphetNetDecoder": ("ngram_embeddings",),
    "DebertaEncoder": ("rel_embeddings",),
    "DebertaV2Encoder": ("rel_embeddings",),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
}
#: Called after a model was converted; `dqkernels.hf` adds what save_pretrained needs to know.
after_convert: list[Callable[[nn.Module, DQConfig], None]] = []


@dataclass(frozen=True)
class Decision:
    """What happens to one module.

    Attributes:
        name: full name in the model.
        module: the module found there.
        layer: how it is packed, or None when it stays as it is.
        reason: why it stays, or which rule packs it.
        tied_to: name of the module whose packed table it shares, or None.
    """

    name: str
    module: nn.Module
    layer: LayerConfig | None
    reason: str
    tied_to: str | None = None


def quantize_(model: nn.Module, config: DQConfig | None = None) -> nn.Module:
    """Replaces every `nn.Linear` and token embedding of `model` by its packed form, in place.

    Attention and feed-forward of BART, mBART, Marian, Pegasus, M2M100 (NLLB), PLBart and Blenderbot run in fused steps
    from then on, and attention in int8 (`dqkernels.models`). Where it is int8 (T5 too, with attention="int8"),
    `model.generate` runs a loop over int8 caches that writes the same tokens (`dqkernels.decode`;
    `decode.plain(model)` is transformers' own).

    Tied weights stay tied: an lm_head that shares the embedding's weight shares its packed table. Everything is
    packed before anything is swapped, so an error leaves the model as it was. Modules that are packed already
    stay as they are, and a warning on the logger `dqkernels` counts them; what is skipped, and why, is in
    `dqkernels.report(model)`.

    Args:
        model: any `nn.Module` with float32, float16 or bfloat16 weights, on any device but meta.
        config: what to do; default `DQConfig()` (4-bit linears, 8-bit embeddings and head).

    Returns:
        `model` itself, in eval-ready form (packed weights take no gradient).

    Raises:
        ValueError: if there is nothing to quantize, a weight is not finite or on the meta device (the message
            names the module), or `config` asks for attention="int8" of a class that does not have it (the message
            names the class; see `dqkernels.models.attention`), or under `strict` a transformers is unknown to the fused
            blocks.
    """
    config = DQConfig() if config is None else config
    if not isinstance(config, DQConfig):
        raise ValueError(f"config must be a DQConfig, got {type(config).__name__}")
    if isinstance(model, nn.Linear | nn.Embedding):
        raise ValueError("model is a single layer, which has no parent to swap it in: use QLinear.from_linear")
    present = sum(isinstance(module, PackedModule) for module in model.modules())
    if not present:  # else "auto" leaves attention as it was made with them
        config = attention.resolved(model, config)
    decisions = plan(model, config)
    warn_of_idle(config, decisions)
    if present:
        logger.warning(
            "%s has %d packed module%s already, left as found: bits %s do not reach them; quantize the float model",
            type(model).__name__,
            present,
            "" if present == 1 else "s",
            config.name,
        )
    if all(decision.layer is None for decision in decisions):
        if present:
            if config.attention == "int8":
                logger.warning("its attention stays too: attention='int8' is for the float model")
            return model
        reasons = sorted({d.reason for d in decisions}) or ["it has no nn.Linear and no token embedding"]
        raise ValueError(f"nothing to quantize in {type(model).__name__}: {'; '.join(reasons)}")
    return install(model, config, decisions, _pack_all(decisions, config))


def install(
    model: nn.Module, config: DQConfig, decisions: list[Decision], packed: Mapping[str, PackedModule]
) -> nn.Module:
    """Swaps the packed modules in, by full name, and leaves on `model` what reports and files need to know.

    The last step of `quantize_`, and of `train.export`, which packs by another way.
    """
    # report() counts a table once, also where one reader was packed and another left in float.
    model.dqkernels_float_copies = {**reporting.float_copies(model), **_float_copies(decisions)}
    for name, module in packed.items():
        set_submodule(model, name, module)
    attention.apply(model, config, warn=False)
    blocks.apply(model, config)
    attach_decode(model, config)
    model.dqkernels_skipped = {d.name: d.reason for d in decisions if d.layer is None}
    for hook in after_convert:
        hook(model, config)
    return model


def attach_decode(model: nn.Module, config: DQConfig) -> None:
    """Puts the decode loop behind `model.generate` where attention is int8: its caches hold codes, not floats."""
    if config.attention == "int8" and decode.serves(model):
        decode.attach(model)


def plan(model: nn.Module, config: DQConfig) -> list[Decision]:
    """What `quantize_(model, config)` does to each linear and embedding; changes nothing; works on meta.

    Raises:
        ValueError: for attention="int8" of another model, and what `blocks.apply` refuses under `strict`. Every way to
            a packed model comes through here.
    """
    if config.attention == "int8":
        attention.check(model, config)
    blocks.check(model, config)
    decisions: list[Decision] = []
    first_of: dict[Any, Decision] = {}
    head = _output_head(model) if config.head == "float" else None
    tied_names = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
    }
    read_directly = _read_directly(model)
    modules = list(model.named_modules(remove_duplicate=False))
    # Embeddings first: a table shared with a head is packed at the embedding's bits.
    modules.sort(key=lambda item: not isinstance(item[1], nn.Embedding))
    for name, module in modules:
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        is_embedding = isinstance(module, nn.Embedding)
        reason = _why_not(name, module, read_directly)
        if reason is None and module is head:
            reason = "head='float'"
        if reason is not None:
            decisions.append(Decision(name, module, None, reason))
            continue
        # Tied by object in memory, or by name while transformers still has empty weights: names say what was
        # tied when the model was made, and a head that got a weight of its own since then is not.
        keys = (id(module.weight), ("name", tied_names.get(name, name)))[: 2 if module.weight.is_meta else 1]
        first = next((first_of[key] for key in keys if key in first_of), None)
        layer = config.for_embedding(name) if is_embedding else config.for_linear(name)
        if first is not None and first.module is not module and (layer is not None or first.layer is None):
            if first.layer is None:
                decision = Decision(name, module, None, f"tied to {first.name}, which stays in float")
            else:
                # The table is the owner's; what this layer does to its own input is its own.
                shared = dataclasses.replace(
                    first.layer, act_granularity=layer.act_granularity, act_clip=layer.act_clip
                )
                decision = Decision(name, module, shared, f"tied to {first.name}", tied_to=first.name)
        elif layer is None:
            stays = "embedding_bits=16" if is_embedding and config.embedding_bits == 16 else "overrides: skip"
            decision = Decision(name, module, None, stays)
        else:
            decision = Decision(name, module, layer, f"{layer.bits}-bit {layer.quantizer}")
        decisions.append(decision)
        for key in keys:
            first_of.setdefault(key, decision)
    return decisions


def warn_of_idle(config: DQConfig, decisions: list[Decision]) -> None:
    """Says which `overrides` match no linear and no embedding: a name that was mistyped would change nothing."""
    names = {decision.name for decision in decisions}
    idle = [pattern for pattern in config.overrides if not any(re.search(pattern, name) for name in names)]
    if idle:
        logger.warning(
            "overrides: %s match%s none of the %d linears and embeddings, such as %s",
            ", ".join(map(repr, idle)),
            "es" if len(idle) == 1 else "",
            len(names),
            next(iter(sorted(names)), "none"),
        )


def _float_copies(decisions: list[Decision]) -> dict[str, str]:
    """Modules left in float whose weight is packed in another module: float name -> name of the packed one."""
    packed: dict[int, str] = {}
    for decision in decisions:
        if decision.layer is not None:
            packed.setdefault(id(decision.module.weight), decision.name)
    left = ((d.name, id(d.module._parameters.get("weight"))) for d in decisions if d.layer is None)
    return {name: packed[weight] for name, weight in left if weight in packed}


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _pack_all(decisions: list[Decision], config: DQConfig) -> dict[str, PackedModule]:
    """Packed modules by name; one module object for one float module, however many names it has."""
    by_name: dict[str, PackedModule] = {}
    by_module: dict[int, PackedModule] = {}
    chosen = [d for d in decisions if d.layer is not None]
    for decision in tqdm(chosen, desc="quantize", unit="layer", disable=None, leave=False):
        new = by_module.get(id(decision.module))
        if new is None:
            tied = by_name[decision.tied_to] if decision.tied_to is not None else None
            try:
                new = build(decision, tied)
            except ValueError as error:
                raise ValueError(f"{decision.name}: {error}") from error
            new.backend, new.strict = config.backend, config.strict
            by_module[id(decision.module)] = new
        by_name[decision.name] = new
    return by_name


def build(decision: Decision, tied: PackedModule | None) -> PackedModule:
    """The packed form of one decided module."""
    if isinstance(decision.module, nn.Embedding):
        return QEmbedding.from_embedding(decision.module, decision.layer, tied)
    return QLinear.from_linear(decision.module, decision.layer, tied)


def _why_not(name: str, module: nn.Module, read_directly: dict[str, str]) -> str | None:
    """Why this linear or embedding cannot be packed; None when it can."""
    if "weight" not in module._parameters or parametrize.is_parametrized(module):
        return "its weight is computed (parametrization or weight norm)"
    if module.weight.dtype not in checks.FLOAT_DTYPES:
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}"
    if name in read_directly:
        return f"{read_directly[name]} reads its weight directly"
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} has a forward of its own"
        if not 0 < module.in_features <= qmath.MAX_K or module.out_features == 0:
            return f"in_features={module.in_features}, out_features={module.out_features} are out of range"
        return None
    if _POSITION.search(name):
        return "a position or type embedding"
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    if type(module).forward is not nn.Embedding.forward and not scaled:
        return f"{type(module).__name__} has a forward of its own"
    if module.max_norm is not None:
        return "max_norm changes its weight at every lookup"
    return None


def _read_directly(model: nn.Module) -> dict[str, str]:
    """Linears and embeddings whose owner takes their weight and does not call them: full name -> the owner's class."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owners = [
            (f"nn.{owner.__name__}", leaves) for owner, leaves in _READ_DIRECTLY.items() if isinstance(module, owner)
        ]
        owners += [(kind.__name__, _READ_BY_CLASS.get(kind.__name__, ())) for kind in type(module).__mro__]
        for owner, leaves in owners:
            found.update({f"{name}.{leaf}".removeprefix("."): owner for leaf in leaves})
    return found


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Measures `act_scale` of every layer quantized with `act_granularity="static"`, in place.

    Runs `model` over `batches` with per-token activations and keeps max|input| / 127 of each layer (after
    `act_clip`).

    Args:
        model: a model converted with `DQConfig(act_granularity="static")`.
        batches: each a dict of keyword arguments, a tuple of positional ones, or one tensor.

    Returns:
        `model` itself.

    Raises:
        ValueError: if no layer is static, `batches` is empty, a layer saw a NaN or Inf, or a layer never ran;
            nothing is changed then.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QLinear) and module.layer.act_granularity == "static"
    }
    if not layers:
        raise ValueError("model has no layer with act_granularity='static': there is nothing to calibrate")
    largest: dict[str, float] = {}

    def record(name: str, clip: float | None):
        def hook(module, args, kwargs):
            values = (args[0] if args else kwargs["input"]).detach()
            amax = float(values.abs().amax()) if values.numel() else 0.0
            if not amax < float("inf"):  # also catches NaN
                raise ValueError(f"{name}: a calibration batch gives NaN or Inf activations")
            largest[name] = max(largest.get(name, 0.0), amax if clip is None else min(amax, clip))

        return hook

    saved = {name: module.layer for name, module in layers.items()}
    handles = []
    was_training = {module: module.training for module in model.modules()}
    count = 0
    try:
        model.eval()
        for name, module in layers.items():
            module.layer = dataclasses.replace(module.layer, act_granularity="per_token")
            handles.append(module.register_forward_pre_hook(record(name, module.layer.act_clip), with_kwargs=True))
        for batch in tqdm(batches, desc="calibrate", unit="batch", disable=None, leave=False):
            count += 1
            if isinstance(batch, dict) or hasattr(batch, "keys"):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for name, module in layers.items():
            module.layer = saved[name]
        for module, mode in was_training.items():
            module.training = mode
    if count == 0:
        raise ValueError("batches is empty: calibration needs at least one batch")
    missing = sorted(set(layers) - set(largest))
    if missing:
        raise ValueError(f"these layers never ran during calibration: {', '.join(missing)}")
    for name, module in layers.items():
        amax = torch.tensor([largest[name]], dtype=torch.float32, device=module.qweight.device)
        module.act_scale = torch.where(amax < qmath.ZERO_AMAX, 1.0, qmath.divide_by(amax, float(qmath.ACT_MAX)))
    return model
