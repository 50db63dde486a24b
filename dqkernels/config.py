"""What to quantize and how: `DQConfig`, checked once, frozen, and plain JSON on disk.

Bits are written weights-embeddings-activations (`2-2-8`), layers encoder-decoder (`6-3`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: The one place that states it besides pyproject.toml (a test compares them).
VERSION = "0.1.0"
QUANT_METHOD = "dqkernels"
FORMAT_VERSION = 1

WEIGHT_BITS = (2, 4, 8)
#: 16 leaves the embedding (and a tied lm_head) in the model's own dtype.
EMBEDDING_BITS = (2, 4, 8, 16)
QUANTIZERS_BY_BITS = {2: ("ternary", "four_level"), 4: ("absmax", "mse"), 8: ("absmax", "mse")}
#: Post-training defaults, chosen by the measurement in docs/measured.md ("Which quantizer by default").
DEFAULT_QUANTIZER = {2: "four_level", 4: "absmax", 8: "absmax"}
WEIGHT_QUANTIZERS = ("auto", "absmax", "mse", "ternary", "four_level")
#: The paper's rule of each width (paper.md sections 1.2, 1.3); DEFAULT_QUANTIZER may change with a measurement.
PAPER_QUANTIZER = {2: "ternary", 4: "absmax", 8: "absmax"}
WEIGHT_GRANULARITIES = ("per_channel", "per_tensor")
ACT_GRANULARITIES = ("per_token", "per_tensor", "static")
GROUP_SIZES = (-1, 32, 64, 128)
ATTENTION = ("auto", "int8", "float")
HEADS = ("quantized", "float")
FUSED = ("auto", False)
BACKENDS = ("auto", "eager", "triton", "cuda", "cpu")
#: What an entry of `overrides` may set; `skip` leaves the module in float.
OVERRIDE_KEYS = (
    "weight_bits",
    "embedding_bits",
    "weight_quantizer",
    "embedding_quantizer",
    "weight_granularity",
    "group_size",
    "act_granularity",
    "act_clip",
    "weight_clip",
    "skip",
)
#: What describes the machine that runs a model and not the model: never in a file.
RUNTIME_FIELDS = ("backend", "strict", "fused")
#: Keys that transformers adds to a stored quantization_config; ignored on reading.
_TRANSFORMERS_KEYS = ("quant_method", "modules_to_not_convert")
_PRESET = re.compile(r"dq-bart-(\d+)-(\d+)-(\d+)")


@dataclass(frozen=True)
class LayerConfig:
    """The resolved choice for one module: no `auto`, no regex left.

    Attributes:
        bits: 2, 4 or 8, of the weight codes.
        quantizer: `absmax`, `mse`, `ternary` or `four_level`.
        granularity: `per_channel` (one fp32 scale per output row) or `per_tensor`.
        group_size: -1, or 32/64/128 input features that share one integer multiplier.
        act_granularity: `per_token`, `per_tensor` or `static`.
        act_clip: activations are clamped to [-act_clip, act_clip] first, or None.
        weight_clip: the same for the float weights, or None.
    """

    bits: int
    quantizer: str
    granularity: str = "per_channel"
    group_size: int = -1
    act_granularity: str = "per_token"
    act_clip: float | None = None
    weight_clip: float | None = None

    @property
    def four_level(self) -> bool:
        """True when code c stands for the level c + 1/2."""
        return self.quantizer == "four_level"


@dataclass(frozen=True)
class DQConfig:
    """Configuration of weight and activation quantization.

    Args:
        weight_bits: bits of `nn.Linear` weights: 2, 4 or 8.
        act_bits: bits of activations: 8.
        embedding_bits: bits of the token embedding and of an lm_head tied to it: 2, 4, 8, or 16 to leave both
            in the model's dtype.
        weight_quantizer: `auto` (the measured default of each width), `absmax` or `mse` for 4- and 8-bit
            tensors, `ternary` (TWN) or `four_level` (+-1/2, +-3/2) for 2-bit ones. A tensor of another width
            uses the default of its width.
        embedding_quantizer: the same for the token embedding and a tied head; None: `weight_quantizer`.
        weight_granularity: `per_channel`, or `per_tensor` (DQ-BART's rule; embeddings stay row-wise).
        group_size: -1, or 32/64/128 for group-wise integer multipliers at 2 and 4 bits. 8-bit tensors beside them
            stay per-channel; a config with no 2- or 4-bit tensor at all is refused.
        act_granularity: `per_token`, `per_tensor` (DQ-BART's rule: results depend on batch mates), or `static`
            (run `dqkernels.calibrate` first).
        act_clip: clamp activations to +-act_clip before their maximum is taken (DQ-BART: 2.5).
        weight_clip: clamp weights to +-weight_clip before they are quantized (DQ-BART: 2.5).
        attention: `int8` (Q, K, V and probabilities; refused where `dqkernels.models.attention` cannot), `float`, or
            `auto`: int8 in BART and its relatives (`fused`), float in others. Files hold which of the two it was.
        head: `quantized`, or `float` to leave the output head in float (what the DQ-BART code does).
        overrides: `{regex: {key: value}}`; a module whose full name matches takes these values. Of several
            matching entries the last one that sets a key wins, so their order counts. `{"skip": True}` leaves a
            module in float, a later `{"skip": False}` packs it again.
        strict: raise instead of taking a slower or wider path. Of the machine, not the model: never in a file.
        backend: `auto`, or the one to force: `eager`, `triton`, `cuda`, `cpu`. Never in a file either.
        fused: `auto` computes attention and feed-forward of BART, mBART, Marian, Pegasus, M2M100 (NLLB), PLBart and
            Blenderbot in fused steps at inference (`dqkernels.models.patch`), other models module by module; False does
            so with all. `report()` says what runs, and why. Never in a file either: in fp32 the results do not depend
            on it, but for the last bits of norms on a CPU.

    Raises:
        ValueError: naming the argument, the value found and the values wanted.
    """

    weight_bits: int = 4
    act_bits: int = 8
    embedding_bits: int = 8
    weight_quantizer: str = "auto"
    embedding_quantizer: str | None = None
    weight_granularity: str = "per_channel"
    group_size: int = -1
    act_granularity: str = "per_token"
    act_clip: float | None = None
    weight_clip: float | None = None
    attention: str = "auto"
    head: str = "quantized"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    strict: bool = False
    backend: str = "auto"
    fused: str | bool = "auto"

    #: Read by transformers to find the quantizer plug-in.
    quant_method = QUANT_METHOD

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "overrides"}
        _check_values(values)
        _check_grouping(values)
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides must be a dict of regex -> dict, got {type(self.overrides).__name__}")
        for pattern, entry in self.overrides.items():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"overrides: {pattern!r} is not a regular expression: {error}") from None
            if not isinstance(entry, Mapping):
                raise ValueError(f"overrides[{pattern!r}] must be a dict, got {type(entry).__name__}")
            unknown = sorted(set(entry) - set(OVERRIDE_KEYS))
            if unknown:
                raise ValueError(f"overrides[{pattern!r}] has unknown keys {unknown}; known are {list(OVERRIDE_KEYS)}")
            if not isinstance(entry.get("skip", False), bool):
                raise ValueError(f"overrides[{pattern!r}]['skip'] must be true or false, got {entry['skip']!r}")
            # Here, so that a bad value is refused when written and not when a module first matches.
            try:
                _check_values(entry)
                _check_grouping({**values, **entry})
            except ValueError as error:
                raise ValueError(f"overrides[{pattern!r}]: {error}") from None
        # Plain dicts inside: the config must be JSON and must not change when the caller's dict does.
        object.__setattr__(self, "overrides", {p: dict(e) for p, e in self.overrides.items()})
        self._check_groups_have_a_width()

    def _check_groups_have_a_width(self) -> None:
        """Refuses a group_size that no tensor could use: groups are for 2 and 4 bits."""
        entries = [{f: getattr(self, f) for f in OVERRIDE_KEYS if f != "skip"}, *self.overrides.values()]
        size = next((e["group_size"] for e in entries if e.get("group_size", -1) != -1), None)
        if size is None or any(e.get(key) in (2, 4) for e in entries for key in ("weight_bits", "embedding_bits")):
            return
        raise ValueError(
            f"group_size={size} is for 2 and 4 bits, and nothing here has so few: weight_bits={self.weight_bits}, "
            f"embedding_bits={self.embedding_bits}, overrides. Lower one of them, or leave group_size at -1"
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DQConfig:
        """The DQ-BART paper's exact rules: `dq-bart-W-E-8`, for example `dq-bart-2-2-8`.

        Per-tensor scales for linear weights and activations, row-wise embeddings, clip at +-2.5, TWN ternary
        at 2 bits and absmax above (paper.md sections 1.2 and 1.3), with the tied output head packed too.

        Args:
            name: as above; E of 16 leaves the embedding and a tied head in float.
            changes: fields to set otherwise: `preset("dq-bart-2-2-8", head="float")` is what the authors' code does.

        Raises:
            ValueError: if `name` is not of that form, or a width or a changed value is not supported.
            TypeError: if a change is no field of DQConfig.
        """
        match = _PRESET.fullmatch(name)
        if match is None:
            raise ValueError(f"preset must look like 'dq-bart-2-2-8' (weights-embeddings-activations), got {name!r}")
        weight_bits, embedding_bits, act_bits = (int(bits) for bits in match.groups())
        rules = {
            "weight_bits": weight_bits,
            "embedding_bits": embedding_bits,
            "act_bits": act_bits,
            # A width that is no key is refused by name below.
            "weight_quantizer": PAPER_QUANTIZER.get(weight_bits, "auto"),
            "embedding_quantizer": PAPER_QUANTIZER.get(embedding_bits),
            "weight_granularity": "per_tensor",
            "act_granularity": "per_tensor",
            "act_clip": 2.5,
            "weight_clip": 2.5,
        }
        return cls(**{**rules, **changes})

    @property
    def name(self) -> str:
        """Bits as the paper writes them, weights-embeddings-activations: `2-2-8`."""
        return f"{self.weight_bits}-{self.embedding_bits}-{self.act_bits}"

    def for_linear(self, module_name: str) -> LayerConfig | None:
        """Resolved choice for the `nn.Linear` of this full name; None when it is to stay in float.

        Raises:
            ValueError: if the overrides that match contradict each other; names the module.
        """
        return self._resolve(module_name, is_embedding=False)

    def for_embedding(self, module_name: str) -> LayerConfig | None:
        """Resolved choice for the token embedding of this full name; otherwise as `for_linear`."""
        return self._resolve(module_name, is_embedding=True)

    def _resolve(self, module_name: str, is_embedding: bool) -> LayerConfig | None:
        chosen = {key: getattr(self, key) for key in OVERRIDE_KEYS if key != "skip"}
        for pattern, entry in self.overrides.items():
            if re.search(pattern, module_name):
                chosen.update(entry)
        bits = chosen["embedding_bits" if is_embedding else "weight_bits"]
        if chosen.get("skip") or bits == 16:
            return None
        try:
            _check_grouping(chosen)
        except ValueError as error:
            raise ValueError(f"{module_name}: the overrides that match it contradict each other: {error}") from None
        quantizer = chosen["weight_quantizer"]
        if is_embedding and chosen["embedding_quantizer"] is not None:
            quantizer = chosen["embedding_quantizer"]
        if quantizer not in QUANTIZERS_BY_BITS[bits]:
            quantizer = DEFAULT_QUANTIZER[bits]
        return LayerConfig(
            bits=bits,
            quantizer=quantizer,
            # One scale for a whole vocabulary loses rare words; the paper's code is row-wise here too.
            granularity="per_channel" if is_embedding else chosen["weight_granularity"],
            group_size=-1 if bits == 8 else chosen["group_size"],
            act_granularity=chosen["act_granularity"],
            act_clip=chosen["act_clip"],
            weight_clip=chosen["weight_clip"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, with `quant_method` and `format_version`, as it stands in config.json.

        `overrides` is a list of `[regex, {key: value}]`: their order counts, and transformers writes the keys of
        every JSON object sorted. `backend`, `strict` and `fused` are left out: a file must run on other machines too.
        """
        fields = (f.name for f in dataclasses.fields(self) if f.name not in RUNTIME_FIELDS)
        body = {name: getattr(self, name) for name in fields}
        body["overrides"] = [[p, dict(e)] for p, e in self.overrides.items()]
        return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **body}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers takes from a `quantization_config=` when the folder is packed already."""
        return {name: getattr(self, name) for name in RUNTIME_FIELDS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DQConfig:
        """Reads what `to_dict` wrote; `overrides` may also be a dict, as one writes it by hand.

        Raises:
            ValueError: for another quant_method, another format_version, an unknown key (each by name), or a
                list of overrides that is not one of pairs or has a regex twice.
        """
        data = dict(data)
        method = data.get("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {method!r}")
        version = data.pop("format_version", FORMAT_VERSION)
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version!r}, this dqkernels reads format_version {FORMAT_VERSION}: "
                "use the dqkernels release that wrote the file, or quantize the float model again"
            )
        for key in _TRANSFORMERS_KEYS:
            data.pop(key, None)
        machine = [key for key in RUNTIME_FIELDS if key in data]
        if machine:
            raise ValueError(
                f"quantization_config has unknown keys {machine}: they are of a machine, not of a model. Give them to "
                "dqkernels.load, or in DQConfig(...) to from_pretrained"
            )
        unknown = sorted(set(data) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"quantization_config has unknown keys {unknown}")
        if isinstance(data.get("overrides"), list):
            data["overrides"] = _overrides_of_pairs(data["overrides"])
        return cls(**data)


def _overrides_of_pairs(pairs: list) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for pair in pairs:
        # What stands in a pair is checked with the rest of the config.
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"overrides must be a list of [regex, dict], one of them is {pair!r:.80}")
        if pair[0] in overrides:
            raise ValueError(f"overrides has the regex {pair[0]!r:.80} twice")
        overrides[pair[0]] = pair[1]
    return overrides


_CHOICES = {
    "weight_bits": WEIGHT_BITS,
    "act_bits": (8,),
    "embedding_bits": EMBEDDING_BITS,
    "weight_quantizer": WEIGHT_QUANTIZERS,
    "embedding_quantizer": (None, *WEIGHT_QUANTIZERS),
    "weight_granularity": WEIGHT_GRANULARITIES,
    "group_size": GROUP_SIZES,
    "act_granularity": ACT_GRANULARITIES,
    "attention": ATTENTION,
    "head": HEADS,
    "backend": BACKENDS,
    "strict": (True, False),
    "fused": FUSED,
}


def _check_values(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in _CHOICES:
            _check_choice(name, value, _CHOICES[name])
        elif name in ("act_clip", "weight_clip"):
            _check_clip(name, value)


def _check_grouping(values: Mapping[str, Any]) -> None:
    if values["weight_granularity"] == "per_tensor" and values["group_size"] != -1:
        size = values["group_size"]
        raise ValueError(f"group_size={size} needs weight_granularity='per_channel', got 'per_tensor'")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    # `True == 1` and `8.0 == 8` in Python; a config file must hold the very type.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def _check_clip(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be None or a finite number above 0, got {value!r}")
