"""The transformers plug-in: packs while `from_pretrained` loads, and saves and reloads packed models.

    model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype="bfloat16", quantization_config=DQConfig(...))
    model.save_pretrained("folder")                               # packed, the tied table once
    model = AutoModelForSeq2SeqLM.from_pretrained("folder")       # equal bits, files checked first

Hooks of `HfQuantizer` that did not change between transformers 5.0 and 5.24, and two things beside them that are
the same from 5.17 to 5.24: `LOADING_ATTRIBUTES_CONFIG_TYPES` (fields of a `quantization_config=` that count for a
packed folder too) and `_adjust_missing_and_unexpected_keys` (what a file lacked, see `_watch_loading`).
`dqkernels/__init__` imports this module when transformers loads its quantizers, so nothing here may need a
finished `transformers`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto as quantizers
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dqkernels import config as plain
from dqkernels import convert, serialize, tying
from dqkernels.checks import FLOAT_DTYPES
from dqkernels.config import FORMAT_VERSION, QUANT_METHOD, RUNTIME_FIELDS, VERSION
from dqkernels.models import attention, blocks
from dqkernels.nn import PackedModule, QEmbedding, QLinear, float_module, take_over


@register_quantization_config(QUANT_METHOD)
class DQConfig(plain.DQConfig, QuantizationConfigMixin):
    """`dqkernels.DQConfig` as transformers wants to see it: what `model.config.quantization_config` holds.

    Same name as the plain one: where a config meets a packed checkpoint, transformers compares class names,
    and warns that the checkpoint's own config is used.
    """

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Strict: an unknown key, version or value raises `serialize.FileFormatError`."""
        config = stored_config(serialize.check_quantization_config(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict, which is what transformers expects in the config of a packed model."""
        return self.to_dict().get(key, default)

    def __setattr__(self, name: str, value: Any) -> None:
        # Frozen but for what is not the model's: transformers sets the loading attributes one by one.
        if name in RUNTIME_FIELDS:
            object.__setattr__(self, name, getattr(plain.DQConfig(**{name: value}), name))
        else:
            super().__setattr__(name, value)


# A DQConfig given for a packed folder: transformers takes `get_loading_attributes()` of it, and warns that the rest
# is ignored. Every DQConfig a user makes is a plain one, of which the adapter is a subclass.
_types = getattr(quantizers, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
quantizers.LOADING_ATTRIBUTES_CONFIG_TYPES = (*_types, plain.DQConfig)


def stored_config(config: plain.DQConfig) -> DQConfig:
    """A plain `DQConfig` (or the adapter itself) as the adapter."""
    if not isinstance(config, plain.DQConfig):
        raise ValueError(f"quantization_config must be a dqkernels.DQConfig, got {type(config).__name__}")
    return DQConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(plain.DQConfig)})


@dataclass
class _Table:
    """A packed table while a float checkpoint is loaded: its owner, and who else reads the same float."""

    owner: str
    module: PackedModule
    tied: list[str] = field(default_factory=list)
    floats: list[str] = field(default_factory=list)
    loaded: bool = False


@register_quantizer(QUANT_METHOD)
class DQHfQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model with a `DQConfig`."""

    requires_calibration = False

    def __init__(self, quantization_config, **kwargs):
        super().__init__(stored_config(quantization_config), **kwargs)
        self._tables: dict[str, _Table] = {}  # by the name of the float weight they come from
        self._skipped: dict[str, str] = {}
        self._watched = False

    def validate_environment(self, *args, device_map=None, **kwargs):
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map offloads to disk, which packed models cannot do: they are small, use 'cpu'")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        return dtype

    # ------------------------------------------------------------------------------------------------ loading

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        """Puts empty packed modules into a model on the meta device, after the files passed their checks."""
        files = list(checkpoint_files or ())
        tensors = serialize.check_files(files, self.quantization_config) if self.pre_quantized else {}
        tying.untie(model, tying.untied_targets(model, files, set(tensors)))
        if not self.pre_quantized:
            self.quantization_config = attention.resolved(model, self.quantization_config)
        elif self.quantization_config.attention == "auto":  # of a file from before it was int8 anywhere
            self.quantization_config = dataclasses.replace(self.quantization_config, attention="float")
        decisions = convert.plan(model, self.quantization_config)
        if not self.pre_quantized:
            convert.warn_of_idle(self.quantization_config, decisions)
        if all(decision.layer is None for decision in decisions):
            raise ValueError(f"nothing to quantize in {type(model).__name__}")
        self._skipped = {d.name: d.reason for d in decisions if d.layer is None}
        kept = model._get_dtype_plan(model.config.dtype)  # T5 keeps `wo` in float32 beside float16
        by_module: dict[int, PackedModule] = {}
        by_name: dict[str, PackedModule] = {}
        for decision in (d for d in decisions if d.layer is not None):
            new = by_module.get(id(decision.module))
            if new is None:
                new = _empty(decision, next((t for p, t in kept.items() if re.search(p, decision.name)), None))
                if decision.tied_to is not None:
                    new.share_(by_name[decision.tied_to])
                new.backend, new.strict = self.quantization_config.backend, self.quantization_config.strict
                by_module[id(decision.module)] = new
            by_name[decision.name] = new
        blocks.apply(model, self.quantization_config)  # before accelerate, which keeps each forward that it finds
        if not self.pre_quantized:
            self._expect_floats(model, decisions, by_name)
        old_names = dict(model.all_tied_weights_keys)
        for name, module in by_name.items():
            convert.set_submodule(model, name, module)
        tying.set_tied_names(model, old_names)
        if self.pre_quantized:
            serialize.check_shapes(model, tensors, model.base_model_prefix)
        self._watch_loading(model)

    def _watch_loading(self, model) -> None:
        """Acts on what a checkpoint lacked: only transformers knows, after its renamings, ties and exceptions.

        It tells nobody but its LOAD REPORT, goes on, and leaves the bias of a packed layer as memory happened to be.
        Marks on the tensors would tell too, but get lost where accelerate moves them to several devices.
        """
        adjust = model._adjust_missing_and_unexpected_keys

        def watched(info) -> None:
            del model._adjust_missing_and_unexpected_keys  # of this instance, for this one load
            self._watched = True
            lacking = info.missing_and_mismatched()
            adjust(info)  # takes out what the architecture itself ignores
            if self.pre_quantized:
                file = model.config.name_or_path or serialize.WEIGHTS_FILE
                serialize.check_complete(model, info.missing_and_mismatched(), info.unexpected_keys, file)
            else:
                _initialise_biases(model, lacking)

        model._adjust_missing_and_unexpected_keys = watched

    def _expect_floats(self, model, decisions: list[convert.Decision], by_name: Mapping[str, PackedModule]) -> None:
        """Gives packed modules a float `weight` slot to load into; notes which table each float belongs to."""
        owners = {d.name: d.tied_to or d.name for d in decisions if d.layer is not None}
        for name, owner in owners.items():
            table = self._tables.setdefault(f"{owner}.weight", _Table(owner, by_name[owner]))
            self._tables[f"{name}.weight"] = table
            if name != owner:
                table.tied.append(name)
            module = by_name[name]
            shape = serialize.rows_columns(module)
            slot = torch.empty(shape, dtype=module.compute_dtype, device="meta")
            module._parameters["weight"] = nn.Parameter(slot, requires_grad=False)
        # A float head (head="float") of a packed embedding still comes from the embedding's floats.
        for target, source in model.all_tied_weights_keys.items():
            if target not in self._tables and source in self._tables:
                self._tables[source].floats.append(target)
                self._tables[target] = self._tables[source]

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return not self.pre_quantized and param_name in self._tables

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        # Floats that are packed on arrival take no place of their own in the model.
        return 0 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self):
        return _pack_op()(self)

    def pack(self, name: str, value: torch.Tensor, missing_keys: set[str]) -> dict[str, torch.Tensor]:
        """Packs the float weight `name`, and returns the tensors that take its place, by full name."""
        table = self._tables[name]
        for module in (table.owner, *table.tied):
            missing_keys.difference_update((f"{module}.weight", f"{module}.act_scale"))
        if table.loaded:  # the file holds a tied weight twice, with equal values (else it would not count as tied)
            return {}
        table.loaded = True
        try:
            table.module.pack_(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        packed = {"qweight": table.module.qweight, "weight_scale": table.module.weight_scale}
        if table.module.group_mult is not None:
            packed["group_mult"] = table.module.group_mult
        return {**{f"{table.owner}.{key}": t for key, t in packed.items()}, **dict.fromkeys(table.floats, value)}

    def _process_model_after_weight_loading(self, model, **kwargs):
        """Drops the float slots, shares what is tied, checks what came from a file."""
        deviation = getattr(model.config, "initializer_range", None) or 0.02
        for table in {id(t): t for t in self._tables.values()}.values():
            if not table.loaded:  # transformers named it MISSING in its report and would initialise it at random
                shape = serialize.rows_columns(table.module)
                table.module.pack_(torch.randn(shape, device=_device(model)) * deviation)
        self._tables = {}
        if not self._watched:
            raise RuntimeError(
                f"transformers {metadata.version('transformers')} no longer tells which tensors a checkpoint lacks: "
                "dqkernels is made for transformers 5.17 to 5.24"
            )
        owners: dict[str, PackedModule] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if not isinstance(module, PackedModule):
                continue
            module._parameters.pop("weight", None)
            source = model.all_tied_weights_keys.get(f"{name}.qweight")
            if source is not None:
                module.share_(owners[source])
            else:
                owners[f"{name}.qweight"] = module
            if isinstance(module, QLinear) and module.act_scale is not None and not self.pre_quantized:
                module.act_scale = torch.full((1,), float("nan"), device=module.qweight.device)
            bias = getattr(module, "bias", None)
            if bias is not None and f"{name}.bias" not in model.all_tied_weights_keys:
                bias.requires_grad_(False)  # as quantize_ leaves it; transformers loads every float with a gradient
        if self.pre_quantized:
            serialize.check_values(model, model.config.name_or_path or serialize.WEIGHTS_FILE)
        attention.apply(model, self.quantization_config, warn=False)
        convert.attach_decode(model, self.quantization_config)
        _finish(model, self._skipped)
        return model

    # ---------------------------------------------------------------------------------------- saving and more

    def get_state_dict_and_metadata(self, model):
        """What save_pretrained writes: every storage once, and the format's version.

        Raises:
            ValueError: if the modules are not what the config says, or a file may not hold what they are (a rank
                above 5, say), so that it would not load again.
        """
        _check_config_describes(model, self.quantization_config)
        serialize.check_values(model, "the model to save")
        state = model.state_dict()
        for target, source in model.all_tied_weights_keys.items():
            if target in state and source in state:
                del state[target]
        serialize.check_savable(state, model.config.to_json_string())
        return state, {"format_version": str(FORMAT_VERSION), "dqkernels_version": VERSION}

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_qat_trainable(self) -> bool:
        # Trainer reads it. Its own sentence would send users to adapters, which packed layers do not train.
        raise ValueError(
            "a packed model cannot be trained: train the float model with dqkernels.train.prepare_qat, then "
            "dqkernels.train.export it"
        )

    @property
    def is_compileable(self) -> bool:
        return True

    @torch.no_grad()
    def _dequantize(self, model, dtype=None):
        """Float linears, embeddings and attention in place of the packed ones; tied ones stay tied."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        weights: dict[int, nn.Parameter] = {}
        modules = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedModule)]
        for name, module in modules:
            # T5 keeps `wo` in float32 beside float16: the wider of the two.
            wide = torch.float32 if module.compute_dtype == torch.float32 else dtype
            if id(module.qweight) not in weights:
                weights[id(module.qweight)] = nn.Parameter(module.dequantize().to(wide))
            convert.set_submodule(model, name, float_module(module, weights[id(module.qweight)]))
        for inner in tying.hf_models(model):
            inner._tied_weights_keys = {
                target.replace(".qweight", ".weight"): source.replace(".qweight", ".weight")
                for target, source in inner._tied_weights_keys.items()
                if not target.endswith(".group_mult")
            }
            inner.all_tied_weights_keys = dict(inner._tied_weights_keys)
        for attribute in ("resize_token_embeddings", "dqkernels_skipped"):
            model.__dict__.pop(attribute, None)
        attention.disable(model)
        # Where accelerate keeps a fused forward it stays: on float linears it runs what it is made of.
        with contextlib.suppress(ValueError):
            blocks.unpatch(model)
        return model


def load(
    folder: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    device=None,
    backend: str = "auto",
    strict: bool = False,
    fused: str | bool = "auto",
) -> nn.Module:
    """Loads a packed model from a local folder; the folder is checked before anything is allocated.

    Args:
        folder: written by `save_pretrained`, `dqkernels.train.export` or the command line.
        dtype: of all that is not packed: float32, float16 or bfloat16; default: what the folder records.
        device: where to; default: the CPU.
        backend, strict, fused: as in `DQConfig`. They are of this machine: a folder does not hold them.

    Returns:
        The model, in eval mode, of the class that the folder's config.json names.

    Raises:
        serialize.FileFormatError: if the folder is not a packed model as this release writes it, or lacks a tensor
            of the model, or holds one that the model has no place for.
        ValueError: if `folder` is not a folder, or `backend`, `strict` or `fused` is no value of these.
    """
    running = plain.DQConfig(backend=backend, strict=strict, fused=fused)
    if not Path(folder).is_dir():
        raise ValueError(
            f"folder must be a local folder, got {os.fspath(folder)!r}; for a model on the Hugging Face hub "
            "use from_pretrained of its Auto class"
        )
    manifest = serialize.check_folder(folder)
    # Here, not above: transformers puts another object in its module's place when its own import ends.
    import transformers

    names = manifest.config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        file = Path(folder) / "config.json"
        serialize.refuse(file, "architectures", names, "one name of a model class of transformers")
    model = model_class.from_pretrained(
        os.fspath(folder),
        dtype="auto" if dtype is None else dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    # Not through quantization_config=, at which transformers warns.
    for target in (model.config.quantization_config, *(m for m in model.modules() if isinstance(m, PackedModule))):
        target.backend, target.strict = backend, strict
    model.config.quantization_config.fused = fused
    attention.configure(model, backend, strict)
    blocks.apply(model, running)
    return model if device is None else model.to(device)


# ---------------------------------------------------------------------------------------------- empty modules


def _empty(decision: convert.Decision, kept_dtype: torch.dtype | None) -> PackedModule:
    """The packed module of one decision on the meta device, hooks taken over."""
    old, layer = decision.module, decision.layer
    dtype = kept_dtype or old.weight.dtype
    if isinstance(old, nn.Embedding):
        # Some families keep the factor in a buffer as well, which has no value on the meta device.
        scale = float(getattr(old, "scalar_embed_scale", getattr(old, "embed_scale", 1.0)))
        shape = (old.num_embeddings, old.embedding_dim, old.padding_idx)
        new = QEmbedding(*shape, layer=layer, embed_scale=scale, dtype=dtype, device="meta")
    else:
        bias = old.bias is not None
        new = QLinear(old.in_features, old.out_features, bias, layer=layer, dtype=dtype, device="meta")
    return take_over(old, new)


def _pack_op() -> type:
    from transformers.core_model_loading import ConversionOps

    class PackWeights(ConversionOps):
        """Float weights in, packed tensors out, one checkpoint tensor at a time."""

        def __init__(self, quantizer: DQHfQuantizer):
            self.quantizer = quantizer

        def convert(self, input_dict, *args, missing_keys=None, **kwargs):
            missing = set() if missing_keys is None else missing_keys
            result = {}
            for name, value in input_dict.items():
                value = value[0] if isinstance(value, list) else value
                if self.quantizer.param_needs_quantization(None, name):
                    result.update(self.quantizer.pack(name, value, missing))
                else:
                    result[name] = value
            return result

    return PackWeights


# ------------------------------------------------------------------------------------------- a finished model


def _finish(model, skipped: Mapping[str, str]) -> None:
    model.dqkernels_skipped = dict(skipped)
    model.resize_token_embeddings = _refuse_resize


def _refuse_resize(*args, **kwargs):
    raise ValueError(
        "the token embedding is packed and cannot be resized: resize the float model "
        "(model.resize_token_embeddings), then quantize it"
    )


def _attach(model: nn.Module, config: plain.DQConfig) -> None:
    """After `quantize_` in memory: the same state as after `from_pretrained(quantization_config=config)`."""
    if not tying.is_hf_model(model):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        model.hf_quantizer = DQHfQuantizer(stored_config(config), pre_quantized=False)
    elif quantizer.quantization_config.quant_method != QUANT_METHOD:
        return  # another method's model, of which we packed the rest: saving it is that method's business
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    model.config.quantization_config = model.hf_quantizer.quantization_config
    for inner in tying.hf_models(model):
        inner.config._is_quantized = True
    for target, source in model.all_tied_weights_keys.items():
        if target.endswith(".bias"):  # BERT's decoder.bias: the packed module came with a copy
            module, _, name = target.rpartition(".")
            setattr(model.get_submodule(module), name, model.get_parameter(source))
    tying.set_tied_names(model, model.all_tied_weights_keys)
    _finish(model, model.dqkernels_skipped)


convert.after_convert.append(_attach)


@torch.no_grad()
def _initialise_biases(model, lacking: set[str]) -> None:
    """Zeros for the biases that a float checkpoint lacks, as the models' own init of a linear does."""
    for name, module in model.named_modules():
        if isinstance(module, QLinear) and module.bias is not None and f"{name}.bias" in lacking:
            module.bias.zero_()


def _check_config_describes(model, config: plain.DQConfig) -> None:
    """Refuses to save a model that its config would rebuild differently (quantized twice, edited by hand)."""
    tied = {t.removesuffix(".qweight"): s.removesuffix(".qweight") for t, s in model.all_tied_weights_keys.items()}
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        chosen = config.for_embedding(name) if isinstance(module, QEmbedding) else config.for_linear(name)
        if name in tied:
            mode = config.act_granularity if chosen is None else chosen.act_granularity
            owner = model.get_submodule(tied[name])
            chosen = dataclasses.replace(owner.layer, act_granularity=mode)
        if chosen != module.layer:
            _refuse_save(name, module.layer, chosen)
    for decision in convert.plan(model, config):
        if decision.layer is not None:
            _refuse_save(decision.name, "a float module", decision.layer)
    attention.check_described(model, config)


def _refuse_save(name: str, found: Any, wanted: Any) -> None:
    raise ValueError(
        f"the model cannot be saved: {name} is {found}, but the model's DQConfig gives {wanted}. Quantize the "
        "float model once, with exceptions in overrides"
    )


def _device(model) -> torch.device:
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
