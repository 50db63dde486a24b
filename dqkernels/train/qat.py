"""Quantization-aware training of a model, and the way from it to a packed one: `prepare_qat`, `export`, `load_trained`.

    student = make_student(teacher, decoder_layers=3)
    prepare_qat(student, DQConfig(weight_bits=2, embedding_bits=2), learned_scale=True)
    ...                                                   # any training loop; plain checkpoints
    export(student, "bart-2-2-8")                         # what dqkernels.load reads

A model that is prepared runs the kernels of the packed one, forward, and straight through them, backward. In eval mode
and in the dtype of the export its logits are those of the packed model, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dqkernels import convert, serialize, tying
from dqkernels.checks import FLOAT_DTYPES
from dqkernels.config import DQConfig
from dqkernels.models import attention, blocks
from dqkernels.nn import PackedModule
from dqkernels.train.modules import QATEmbedding, QATLinear, QATModule
from dqkernels.train.student import fix_positions_

#: Where a model's config.json says how it was being trained. Not `quantization_config`: the weights are floats.
CONFIG_KEY = "dqkernels_qat"


def prepare_qat(model: nn.Module, config: DQConfig | None = None, learned_scale: bool = False) -> nn.Module:
    """Makes every `nn.Linear` and token embedding of `model` train through its packed form, in place.

    The choice of layers, bits and rules is that of `quantize_(model, config)`, and evaluation runs in its fused steps.
    Tied weights stay tied and are quantized once; master weights become float32 and stay it. What stays in float, and
    why, is in `model.dqkernels_skipped`. Biases and norms of a model in 16 bits stay in 16 (`DistillationTrainer` makes
    them float32; a loop of your own calls `model.float()`). Sinusoidal positions take no gradient.

    Args:
        model: a float model on any device but meta.
        config: default `DQConfig()` (4-bit linears, 8-bit embeddings and head).
        learned_scale: learn the distance of two levels (LSQ, Esser et al. 2020), from that of the fixed rule on. Then
            `weight_quantizer` says which levels there are.

    Returns:
        `model` itself, in the mode (train or eval) that it was in.

    Raises:
        ValueError: if there is nothing to quantize, the model is packed or prepared already, a weight is not finite or
            on the meta device, or `config` asks for static activations (they are measured after training:
            `dqkernels.calibrate`) or for learned steps with groups.
    """
    config = DQConfig() if config is None else config
    if not isinstance(config, DQConfig):
        raise ValueError(f"config must be a DQConfig, got {type(config).__name__}")
    if isinstance(model, nn.Linear | nn.Embedding):
        raise ValueError("model is a single layer, which has no parent to swap it in: use QATLinear.from_linear")
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError("model is packed and cannot be trained: prepare the float model")
    if is_prepared(model):
        raise ValueError("model is prepared already: prepare_qat takes a float model, once")
    entries = [{"act_granularity": config.act_granularity}, *config.overrides.values()]
    if any(entry.get("act_granularity") == "static" for entry in entries):
        raise ValueError(
            "act_granularity must be 'per_token' or 'per_tensor' while training, got 'static': train, export, then "
            "quantize with static scales measured by dqkernels.calibrate"
        )
    config = attention.resolved(model, config)
    decisions = convert.plan(model, config)
    convert.warn_of_idle(config, decisions)
    if all(decision.layer is None for decision in decisions):
        reasons = sorted({d.reason for d in decisions}) or ["it has no nn.Linear and no token embedding"]
        raise ValueError(f"nothing to quantize in {type(model).__name__}: {'; '.join(reasons)}")
    made: dict[str, QATModule] = {}
    of_module: dict[int, QATModule] = {}
    for decision in (d for d in decisions if d.layer is not None):
        if decision.module.weight.is_meta:
            raise ValueError(f"{decision.name}: weight is on the meta device and has no values: load the weights first")
        new = of_module.get(id(decision.module))
        if new is None:
            owner = None if decision.tied_to is None else made[decision.tied_to]
            try:
                new = _twin(decision, owner, learned_scale)
            except ValueError as error:
                raise ValueError(f"{decision.name}: {error}") from error
            new.backend, new.strict = config.backend, config.strict
            of_module[id(decision.module)] = new
        made[decision.name] = new
    for name, module in made.items():
        convert.set_submodule(model, name, module)
    attention.apply(model, config)
    blocks.apply(model, config)
    fix_positions_(model)
    for dtype in (torch.float16, torch.bfloat16):
        for name, wide in _kept_dtypes(model, dtype).items():
            if name in made:
                made[name].kept_dtypes[dtype] = wide
    model.dqkernels_skipped = {d.name: d.reason for d in decisions if d.layer is None}
    model.dqkernels_qat = config
    if getattr(model, "config", None) is not None:
        setattr(model.config, CONFIG_KEY, {**config.to_dict(), "learned_scale": bool(learned_scale)})
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_qat` was here."""
    return any(isinstance(module, QATModule) for module in model.modules())


def packed_copy(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The packed model of a prepared one, as a model of its own; `export` without the folder.

    Args:
        model: after `prepare_qat`; it is not changed.
        dtype: of all that is not packed: float32, float16 or bfloat16.

    Raises:
        ValueError: if `model` was not prepared, or its weights are not finite.
    """
    if not is_prepared(model):
        raise ValueError("model has no quantized layer to export: prepare_qat(model, config) comes before training")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    config = model.dqkernels_qat
    for name, module in model.named_modules():
        if isinstance(module, QATModule) and not bool(torch.isfinite(module.packed()[1]).all()):
            raise ValueError(f"{name}: weight has NaN or Inf values: the training diverged")
    new = copy.deepcopy(model)
    for module in new.modules():
        if "_original_forward" in module.__dict__:  # accelerate's autocast around a model that it trained
            for name in ("forward", "_original_forward"):
                module.__dict__.pop(name, None)
    trained = {n: m for n, m in new.named_modules(remove_duplicate=False) if isinstance(m, QATModule)}
    floats: dict[int, nn.Module] = {}
    for name, module in trained.items():
        convert.set_submodule(new, name, floats.setdefault(id(module), module.to_float()))
    decisions = convert.plan(new, config)
    chosen = {d.name: d for d in decisions if d.layer is not None}
    if set(chosen) != set(trained):
        raise ValueError(f"modules changed since prepare_qat: {', '.join(sorted(set(chosen) ^ set(trained)))}")
    packed: dict[str, PackedModule] = {}
    done: dict[int, PackedModule] = {}
    for name, decision in chosen.items():
        module = trained[name]
        if id(module) not in done:
            shared = None if decision.tied_to is None else packed[decision.tied_to]
            done[id(module)] = module.to_packed(dtype, shared)
        packed[name] = done[id(module)]
    del new.dqkernels_qat
    if getattr(new, "config", None) is not None and hasattr(new.config, CONFIG_KEY):
        delattr(new.config, CONFIG_KEY)
    _cast(new, dtype)
    convert.install(new, config, decisions, packed)
    modules = dict(new.named_modules())
    for name, wide in _kept_dtypes(new, dtype).items():  # as loading does
        if isinstance(modules[name], PackedModule):
            modules[name].to(wide)
    return new.eval().requires_grad_(False)


def _kept_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The modules that transformers keeps in another type where a model is loaded in `dtype`: T5's `wo`, in float16."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    found = {}
    for name, _ in model.named_modules():
        wide = next((plan[pattern] for pattern in plan if re.search(pattern, name)), None)
        if wide is not None:
            found[name] = wide
    return found


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """`model.to(dtype)` as loading has it: a buffer that no file holds is what its module makes, in the type it makes.

    Rotary frequencies are float32 in every model, and a cast would round them; M2M100's positions are of the model's
    type. A model of transformers that is made anew, without memory, tells which.
    """
    kept = {
        (module, name): (f"{prefix}.{name}".removeprefix("."), buffer)
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers[name]) is not None and buffer.is_floating_point()
    }
    made: dict[str, torch.Tensor] = {}
    if kept and tying.is_hf_model(model):
        with torch.device("meta"):
            made = dict(type(model)._from_config(copy.deepcopy(model.config), dtype=dtype).named_buffers())
    model.to(dtype)
    for (module, name), (path, buffer) in kept.items():
        module._buffers[name] = buffer.to(made[path].dtype) if path in made else buffer


def export(
    model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Packs a trained model and writes it as `dqkernels.load` and `from_pretrained` read it.

    The codes are those of the training's own forward pass: `model.eval().to(dtype)` and the packed model give equal
    logits, bit for bit, on one backend.

    Args:
        model: a Hugging Face model after `prepare_qat`; it is not changed.
        folder: where to; appears whole or not at all (`serialize.save`).
        tokenizer: saved beside it.
        dtype: of all that is not packed.

    Returns:
        The packed model.

    Raises:
        ValueError: as `packed_copy` and `serialize.save`.
    """
    packed = packed_copy(model, dtype)
    serialize.save(packed, folder, tokenizer=tokenizer)
    return packed


def load_trained(folder: str | os.PathLike, device=None) -> nn.Module:
    """The model of a training checkpoint: as it was trained, ready for `export` or more training.

    Args:
        folder: a checkpoint (or any folder written by `save_pretrained`) of a prepared or a float model.
        device: where to; default: the CPU.

    Returns:
        The model in float32 and eval mode, prepared as its config.json says.

    Raises:
        ValueError: if the folder is none, holds a packed model, names no model class, or lacks or has tensors that
            such a model does not.
    """
    import transformers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder must hold a trained model, {os.fspath(folder)!r} has no config.json")
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"a mapping is wanted, got {type(stored).__name__}")
    except ValueError as error:
        raise ValueError(f"{os.fspath(folder / 'config.json')!r} is no model's config.json: {error}") from None
    if "quantization_config" in stored:
        raise ValueError(f"{os.fspath(folder)!r} is packed already: read it with dqkernels.load")
    names = stored.get("architectures") or [None]
    model_class = getattr(transformers, str(names[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"architectures in config.json must name a model class of transformers, got {names[0]!r}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # learned steps are unknown to it; what is missing is refused below
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(folder)!r}: its weights are no whole safetensors file: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    qat = stored.get(CONFIG_KEY)
    steps = (name for name in info["unexpected_keys"] if name.endswith(".weight_log_step"))
    learned = set() if qat is None else set(steps)
    wrong = [*info["missing_keys"], *(set(info["unexpected_keys"]) - learned), *info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{os.fspath(folder)!r}: missing, unknown or of another shape: {', '.join(map(str, wrong))}")
    if qat is not None:
        prepare_qat(model, *read_qat(qat))
        wanted = {n: p for n, p in model.named_parameters() if n.endswith(".weight_log_step")}
        if set(wanted) != learned:
            difference = ", ".join(sorted(set(wanted) ^ learned))
            raise ValueError(f"{os.fspath(folder)!r}: learned steps missing or without a module: {difference}")
        for file in sorted(folder.glob("*.safetensors")) if wanted else ():
            with safe_open(file, framework="pt") as tensors, torch.no_grad():
                for name in learned & set(tensors.keys()):
                    found = tensors.get_tensor(name)
                    if found.shape != wanted[name].shape:
                        shapes = f"{list(found.shape)}, wanted {list(wanted[name].shape)}"
                        raise ValueError(f"{os.fspath(folder)!r}: {name} has shape {shapes}")
                    wanted[name].copy_(found)
    return (model if device is None else model.to(device)).eval()


def read_qat(stored: Mapping[str, Any]) -> tuple[DQConfig, bool]:
    """`(config, learned_scale)` of what `prepare_qat` left in config.json.

    Raises:
        ValueError: for an unknown key or value, as `DQConfig.from_dict`.
    """
    stored = dict(stored)
    learned = stored.pop("learned_scale", False)
    if not isinstance(learned, bool):
        raise ValueError(f"{CONFIG_KEY}.learned_scale must be true or false, got {learned!r}")
    if stored.get("attention") == "auto":  # of a release in which that was float
        stored["attention"] = "float"
    return DQConfig.from_dict(stored), learned


def _twin(decision: convert.Decision, owner: QATModule | None, learned_scale: bool) -> QATModule:
    if isinstance(decision.module, nn.Embedding):
        return QATEmbedding.from_embedding(decision.module, decision.layer, owner, learned_scale)
    # An owner's steps are the table's; what a tied layer does to its own input is its own.
    layer = decision.layer if owner is None else dataclasses.replace(decision.layer)
    return QATLinear.from_linear(decision.module, layer, owner, learned_scale)
