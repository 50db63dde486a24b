"""Which weights of a Hugging Face model are one table, and what transformers is told about it.

transformers ties by name: `all_tied_weights_keys` maps a target parameter to its source, and `tie_weights()`
computes it anew from `_tied_weights_keys` of every model inside. After packing, those names are gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import nn

from dqkernels.nn import PackedModule


def untied_targets(model, files: list[str], packed: set[str]) -> list[str]:
    """Names that `model` ties but the files hold with values of their own (T5 v1.1's lm_head).

    Args:
        model: on the meta device, still float.
        files: of the checkpoint.
        packed: names in a packed checkpoint, which holds a tied table once; empty for a float one, where
            weights that are stored twice are compared.
    """
    prefix = model.base_model_prefix
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        if target.endswith(".weight"):
            groups.setdefault(source, []).append(target)
    if not groups:
        return []

    def stored(name: str, names) -> str | None:
        return next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in names), None)

    if packed:
        own = {n.removesuffix(s) + ".weight" for n in packed for s in (".qweight", ".weight") if n.endswith(s)}
        return [t for source, targets in groups.items() if stored(source, own) for t in targets if stored(t, own)]
    found = []
    safe = [safe_open(file, framework="pt") for file in files if os.fspath(file).endswith(".safetensors")]
    where = {name: file for file in safe for name in file.keys()}  # noqa: SIM118, safe_open is no dict
    for source, targets in groups.items():
        present = [(n, stored(n, where)) for n in (source, *targets) if stored(n, where)]
        for name, key in present[1:]:
            first = present[0][1]
            if key != first and not _equal(where[first].get_slice(first), where[key].get_slice(key)):
                found.append(name)
    return found


def _equal(a, b, rows: int = 4096) -> bool:
    """Whether two lazy slices hold the same numbers, a few rows at a time."""
    shape = a.get_shape()
    if shape != b.get_shape():
        return False
    with torch.device("cpu"):  # called while transformers builds on the meta device
        return all(torch.equal(a[i : i + rows], b[i : i + rows]) for i in range(0, shape[0], rows))


def untie(model, targets: list[str]) -> None:
    for target in targets:
        module = model.get_submodule(target.rpartition(".")[0])
        module.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
        for inner in hf_models(model):
            inner.all_tied_weights_keys = {
                t: s for t, s in inner.all_tied_weights_keys.items() if not f".{target}".endswith(f".{t}")
            }


def set_tied_names(model, old_names: Mapping[str, str]) -> None:
    """Makes `tie_weights`, `save_pretrained` and `from_pretrained` see the packed names of what is shared.

    On every model inside, and on the instance: `tie_weights()` computes its mapping anew from
    `_tied_weights_keys` of each, whose class attribute names float weights that are gone. Scales are
    buffers, shared by object.
    """
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    packed = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedModule)}
    for name, module in packed.items():
        owner = first.setdefault(id(module.qweight), name)
        if owner != name:
            names[f"{name}.qweight"] = f"{owner}.qweight"
            if module.group_mult is not None:
                names[f"{name}.group_mult"] = f"{owner}.group_mult"
    for target, source in old_names.items():
        gone = [n for n in (target, source) if n.endswith(".weight") and n.removesuffix(".weight") in packed]
        if not gone:
            names[target] = source
    for prefix, inner in model.named_modules():
        if is_hf_model(inner):
            start = f"{prefix}." if prefix else ""
            own = {
                target.removeprefix(start): source.removeprefix(start)
                for target, source in names.items()
                if target.startswith(start) and source.startswith(start)
            }
            inner._tied_weights_keys = own
            inner.all_tied_weights_keys = dict(own)


def is_hf_model(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def hf_models(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_hf_model(module)]
