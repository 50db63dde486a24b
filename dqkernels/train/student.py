"""A student made of copied teacher layers, and which teacher layer each of its layers is compared with.

Layers are counted from 0, encoder and decoder apart; `6-3` keeps six encoder and three decoder layers. A pretrained
model of another size can be a student too: it has no map, so only the terms that need none can be formed
(`layer_map_of` says which and why).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from dqkernels.nn import PackedModule

if TYPE_CHECKING:
    from dqkernels.train.losses import KDConfig

STACKS = ("encoder", "decoder")
KEEP = ("last", "first")
#: Key of `student.config` that holds the map, as plain JSON.
CONFIG_KEY = "dqkernels_student"

#: teacher layers -> student layers -> the layers that are copied. No formula gives these tables.
#: 6: the DQ-BART code. 12: Shleifer & Rush 2020 (their table, but for the one layer, where DQ-BART's habit holds).
COPIED_LAYERS: dict[int, dict[int, tuple[int, ...]]] = {
    6: {1: (5,), 2: (0, 5), 3: (0, 2, 5), 4: (0, 2, 3, 5), 5: (0, 1, 3, 4, 5)},
    12: {
        1: (11,),
        2: (0, 6),
        3: (0, 6, 11),
        4: (0, 4, 8, 11),
        6: (0, 2, 4, 7, 9, 11),
        9: (0, 1, 2, 4, 5, 7, 9, 10, 11),
    },
}
#: Where Shleifer & Rush 2020 copy other layers than the above: keep="first".
COPIED_FIRST: dict[int, dict[int, tuple[int, ...]]] = {6: {1: (0,), 4: (0, 1, 3, 5)}, 12: {1: (0,)}}
#: teacher layers -> student layers -> the layers to imitate, which need not be the copied ones (Shleifer & Rush 2020).
SUPERVISED_LAYERS: dict[int, dict[int, tuple[int, ...]]] = {
    6: {1: (5,), 2: (3, 5), 3: (1, 4, 5), 4: (1, 2, 4, 5)},
    12: {1: (11,), 2: (5, 11), 3: (3, 7, 11), 6: (1, 3, 5, 8, 10, 11)},
}


@dataclass(frozen=True)
class LayerMap:
    """Which teacher layer each student layer is compared with.

    Attributes:
        encoder: one teacher index per student encoder layer; None where no match is known.
        decoder: the same for the decoder.
    """

    encoder: tuple[int, ...] | None
    decoder: tuple[int, ...] | None


def copied_layers(teacher_layers: int, student_layers: int, keep: str = "last") -> tuple[int, ...]:
    """Teacher indices to copy into a student of fewer layers, in order.

    The tables above for teachers of 6 and 12 layers. Otherwise, and where a table has no entry, the layers are as far
    apart as they can be, both ends held: index i of k is `i * (L - 1) / (k - 1)`, halves rounded up. A single layer is
    the last one, or the first one with keep="first" (Shleifer's habit).

    Raises:
        ValueError: unless 1 <= student_layers <= teacher_layers and `keep` is "last" or "first".
    """
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {list(KEEP)}, got {keep!r}")
    _check_depth("a student", teacher_layers, student_layers)
    tables = [COPIED_FIRST, COPIED_LAYERS] if keep == "first" else [COPIED_LAYERS]
    for table in tables:
        if student_layers in table.get(teacher_layers, {}):
            return table[teacher_layers][student_layers]
    if student_layers == 1:
        return (0,) if keep == "first" else (teacher_layers - 1,)
    steps = student_layers - 1
    return tuple((2 * i * (teacher_layers - 1) + steps) // (2 * steps) for i in range(student_layers))


def supervised_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Teacher indices to imitate so that each student layer does the work of an equal run of teacher layers.

    Shleifer's tables for teachers of 6 and 12 layers; otherwise student layer i of k imitates the last layer of its
    run, `ceil((i + 1) * L / k) - 1`.

    Raises:
        ValueError: unless 1 <= student_layers <= teacher_layers.
    """
    _check_depth("supervised targets", teacher_layers, student_layers)
    table = SUPERVISED_LAYERS.get(teacher_layers, {})
    if student_layers in table:
        return table[student_layers]
    return tuple(-(-(i + 1) * teacher_layers // student_layers) - 1 for i in range(student_layers))


def _check_depth(what: str, teacher_layers: int, student_layers: int) -> None:
    if isinstance(student_layers, bool) or not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"{what} of a {teacher_layers}-layer teacher: 1 to {teacher_layers} layers, got {student_layers}"
        )


def make_student(
    teacher: nn.Module,
    encoder_layers: int | Sequence[int] | None = None,
    decoder_layers: int | Sequence[int] | None = None,
    *,
    keep: str = "last",
) -> nn.Module:
    """A new model of the teacher's class with fewer layers, each a copy of one of the teacher's.

    Everything outside the layers is copied too: embeddings, norms, head, `generation_config`. What is tied in the
    teacher is tied in the student; nothing is shared between the two, and the teacher does not change. All parameters
    require gradients, whatever the teacher's do (see `freeze_`), but for sinusoidal positions; hooks are left behind.

    Args:
        teacher: an encoder-decoder of transformers: BART, mBART, Marian, Pegasus, T5, or one built alike.
        encoder_layers: how many layers to keep (`copied_layers` says which), the teacher indices themselves, in the
            order in which they are to run, or None for all.
        decoder_layers: the same for the decoder.
        keep: which layer a number of 1 keeps: "last" (DQ-BART) or "first" (Shleifer, with his table for the rest).

    Returns:
        The student in eval mode, on the teacher's device and in its dtype (`DistillationTrainer` makes it float32;
        for a loop of your own `.float()` it first). `student.config.dqkernels_student` holds
        `{"encoder": [teacher index per layer], "decoder": [...]}`, and goes with it through save_pretrained.

    Raises:
        ValueError: if the teacher is no such encoder-decoder or has packed weights, or for layers it does not have.
    """
    stacks = _stacks(teacher)
    packed = [name for name, module in teacher.named_modules() if isinstance(module, PackedModule)]
    if packed or getattr(teacher, "hf_quantizer", None) is not None:
        found = packed[0] if packed else f"by {type(teacher.hf_quantizer).__name__}"
        raise ValueError(
            f"the teacher is quantized already ({found}), so its layers cannot be trained: make the student from "
            "the float model, then quantize it"
        )
    chosen = {}
    for name, wanted in zip(STACKS, (encoder_layers, decoder_layers), strict=True):
        chosen[name] = _chosen(name, wanted, len(_layers(stacks[name])), keep)
    # What deepcopy finds in here it takes as copied already: the layer lists, so that no dropped layer is copied.
    memo: dict[int, Any] = {}
    for config in {id(c): c for c in (teacher.config, *(s.config for s in stacks.values()))}.values():
        copy.deepcopy(config, memo)
    for name, indices in chosen.items():
        layers = _layers(stacks[name])
        # A memo of its own per layer: an index that is given twice makes two layers.
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(layers[i], dict(memo)) for i in indices)
    student = copy.deepcopy(teacher, memo)
    for name, indices in chosen.items():
        _renumber(_layers(_stacks(student)[name]))
        _move_position_bias(_layers(stacks[name]), _layers(_stacks(student)[name]), indices)
    _set_depths(student, {name: len(indices) for name, indices in chosen.items()})
    setattr(student.config, CONFIG_KEY, {name: list(indices) for name, indices in chosen.items()})
    _drop_hooks(student)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    fix_positions_(student)
    return student.eval()


def freeze_(model: nn.Module, encoder: bool = False, embeddings: bool = False) -> nn.Module:
    """Takes parameters out of training, in place (Shleifer's options for students that keep the teacher's encoder).

    Args:
        model: an encoder-decoder, before or after `prepare_qat`.
        encoder: everything that only the encoder has. A token table that the decoder reads too stays trained.
        embeddings: token and position tables of both stacks, and so an output head that is tied to them.

    Returns:
        `model`.

    Raises:
        ValueError: if `model` is no encoder-decoder of transformers.
    """
    stacks = _stacks(model)
    frozen: list[nn.Parameter] = []
    if encoder:
        prefix = next(name for name, module in model.named_modules() if module is stacks["encoder"]) + "."
        # With duplicates: a tied table has a name under every module that reads it.
        named = list(model.named_parameters(remove_duplicate=False))
        elsewhere = {id(p) for name, p in named if not name.startswith(prefix)}
        frozen += [p for name, p in named if name.startswith(prefix) and id(p) not in elsewhere]
    if embeddings:
        tables = [
            getattr(stack, name, None) for stack in stacks.values() for name in ("embed_tokens", "embed_positions")
        ]
        frozen += [p for module in (*tables, *_shared_tables(model)) if module is not None for p in module.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return model


def fix_positions_(model: nn.Module) -> nn.Module:
    """Takes sinusoidal position tables (Marian, Pegasus) out of training, in place.

    They are made of a formula. transformers calls them frozen where it builds a model, forgets it where it loads one,
    and stores none of Marian's: what was trained would be lost in the file, which would compute something
    else than the training did.

    Returns:
        `model`.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and "Sinusoidal" in type(module).__name__:
            module.weight.requires_grad_(False)
    return model


def set_attention_(model: nn.Module, implementation: str) -> nn.Module:
    """`model.set_attn_implementation(implementation)`, in both stacks too, in place.

    Attention maps need "eager". T5's stacks have configs of their own, which transformers 5.17 leaves as they are.

    Returns:
        `model`.

    Raises:
        ValueError: if `model` is no encoder-decoder of transformers, or does not know the implementation.
    """
    for each in (*_stacks(model).values(), model):
        each.set_attn_implementation(implementation)
    return model


def layer_map_of(student: nn.Module, teacher: nn.Module, kd: KDConfig | None = None) -> LayerMap:
    """Which teacher layer each student layer is compared with, after checking that the two models can be compared.

    The layers that were copied (`config.dqkernels_student`), or one to one when there is no such record and the depths
    agree; `kd.encoder_targets` and `kd.decoder_targets` come before both. In stacks that end in a norm of their own
    (mBART, Pegasus, T5) transformers returns the last hidden state after that norm, so the last student layer is
    compared with the last teacher layer there, whichever layer it was copied from.

    Args:
        student, teacher: encoder-decoders of transformers.
        kd: whose terms decide what has to match. None: hidden states and attention maps of both stacks.

    Returns:
        The map; an entry is None where no term of `kd` needs a match and none is known.

    Raises:
        ValueError: naming the term and the reason when one cannot be formed: another depth and no map, a map that
            does not fit, another d_model (hidden), number of heads (attention) or vocabulary (logits).
    """
    hidden = kd is None or kd.needs_hidden
    attention = kd is None or kd.needs_attention
    if hidden or (kd is not None and kd.encoder_last_hidden > 0):
        _check_same("hidden", "d_model", *(int(m.config.hidden_size) for m in (student, teacher)))
    if kd is not None and kd.logits > 0:
        _check_same("logits", "vocabulary", *(_vocabulary(m) for m in (student, teacher)))
    maps: dict[str, tuple[int, ...] | None] = {}
    for name in STACKS:
        if attention:
            _check_same("attention", f"number of {name} heads", *(_heads(m, name) for m in (student, teacher)))
        maps[name] = None
        try:
            maps[name] = _layer_map(name, student, teacher, getattr(kd, f"{name}_targets", None), hidden)
        except ValueError:
            if hidden or attention:
                raise
    return LayerMap(**maps)


def _layer_map(name: str, student, teacher, targets: Sequence[int] | str | None, hidden: bool) -> tuple[int, ...]:
    stacks = _stacks(student)[name], _stacks(teacher)[name]
    depth, teacher_depth = (len(_layers(stack)) for stack in stacks)
    recorded = (getattr(student.config, CONFIG_KEY, None) or {}).get(name)
    if targets == "supervised":
        found, source = supervised_layers(teacher_depth, depth), f"{name}_targets='supervised'"
    elif targets is not None:
        found, source = tuple(targets), f"{name}_targets"
    elif recorded is not None:
        found, source = tuple(recorded), f"config.{CONFIG_KEY}"
    elif depth == teacher_depth:
        found, source = tuple(range(depth)), "one layer each"
    else:
        raise ValueError(
            f"hidden and attention terms need to know which of the teacher's {teacher_depth} {name} layers each of the "
            f"student's {depth} is compared with: make the student with make_student, give {name}_targets, or leave "
            "these terms out"
        )
    if len(found) != depth or not all(0 <= i < teacher_depth for i in found):
        raise ValueError(
            f"{source} maps the {name} layers to {list(found)}, but the student has {depth} of them and the teacher "
            f"{teacher_depth}: one index from 0 to {teacher_depth - 1} per student layer"
        )
    if not hidden or not any(_ends_in_norm(stack) for stack in stacks):
        return found
    if targets is None:
        found = (*found[:-1], teacher_depth - 1)
    if found[-1] != teacher_depth - 1 or teacher_depth - 1 in found[:-1]:
        raise ValueError(
            f"{source} maps the {name} layers to {list(found)}, but this {name} ends in a norm: its last hidden state "
            f"is normalized and no other, so the last student layer, and only that one, can be compared with the "
            f"teacher's last ({teacher_depth - 1}). Give {name}_targets, or leave the hidden term out"
        )
    return found


def _check_same(term: str, what: str, student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(
            f"the {term} term compares value by value, so {what} must agree: student {student}, teacher {teacher}. "
            f"Leave {term} out for this pair"
        )


def _heads(model, name: str) -> int:
    config = model.config
    return int(getattr(config, f"{name}_attention_heads", None) or config.num_attention_heads)


def _vocabulary(model) -> int:
    return int(getattr(model.config, "decoder_vocab_size", None) or model.config.vocab_size)


def _stacks(model) -> dict[str, nn.Module]:
    """The two transformer stacks; ValueError when `model` has not both."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
    stacks = {name: getattr(base, name, None) for name in STACKS}
    if not all(isinstance(s, nn.Module) and hasattr(s, "config") and _layers(s) is not None for s in stacks.values()):
        raise ValueError(
            f"{type(model).__name__} has no encoder and decoder of layers; a student is made of a transformers "
            "encoder-decoder: BART, mBART, Marian, Pegasus, T5"
        )
    return stacks


def _layers(stack: nn.Module) -> nn.ModuleList | None:
    found = getattr(stack, "layers", None)
    if found is None:
        found = getattr(stack, "block", None)  # T5
    return found if isinstance(found, nn.ModuleList) else None


def _ends_in_norm(stack: nn.Module) -> bool:
    """mBART and Pegasus, T5. BART and Marian normalize inside each layer."""
    return any(isinstance(getattr(stack, name, None), nn.Module) for name in ("layer_norm", "final_layer_norm"))


def _chosen(name: str, wanted: int | Sequence[int] | None, depth: int, keep: str) -> tuple[int, ...]:
    if wanted is None:
        return tuple(range(depth))
    if isinstance(wanted, int):
        try:
            return copied_layers(depth, wanted, keep)
        except ValueError as error:
            raise ValueError(f"{name}_layers: {error}") from None
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not all(type(i) is int for i in wanted):
        raise ValueError(f"{name}_layers must be a number, a list of teacher indices or None, got {wanted!r}")
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {list(KEEP)}, got {keep!r}")
    if not wanted or not all(0 <= i < depth for i in wanted):
        raise ValueError(f"{name}_layers must be one or more indices from 0 to {depth - 1}, got {list(wanted)}")
    return tuple(wanted)


def _renumber(layers: nn.ModuleList) -> None:
    """Caches are lists indexed by layer: a copied layer must not look for the place it had in the teacher."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            # None in encoders that never cache (mBART, Marian, Pegasus).
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = index


def _move_position_bias(teacher_layers: nn.ModuleList, layers: nn.ModuleList, indices: Sequence[int]) -> None:
    """T5 computes its relative position bias in the first block and hands it on, whichever block comes first."""
    owners = [i for i, layer in enumerate(teacher_layers) if _position_bias(layer) is not None]
    if owners != [0]:
        return  # no such bias, or one per layer (UMT5), which came with its layer
    for place, (index, layer) in enumerate(zip(indices, layers, strict=True)):
        attention = layer.layer[0].SelfAttention
        attention.has_relative_attention_bias = place == 0
        if place == 0 and index != 0:
            attention.relative_attention_bias = copy.deepcopy(_position_bias(teacher_layers[0]))
        elif place != 0 and index == 0:
            del attention.relative_attention_bias


def _position_bias(layer: nn.Module) -> nn.Module | None:
    sublayers = getattr(layer, "layer", None)
    attention = getattr(sublayers[0], "SelfAttention", None) if sublayers else None
    return getattr(attention, "relative_attention_bias", None)


def _set_depths(student, depths: dict[str, int]) -> None:
    """Tells every config of the student: caches and from_pretrained count layers there."""
    config = student.config
    if hasattr(config, "encoder_layers"):
        config.encoder_layers, config.decoder_layers = depths["encoder"], depths["decoder"]
        return  # the stacks read the same object
    # T5: three configs; the decoder's own calls its depth num_layers.
    for each in (config, *(stack.config for stack in _stacks(student).values())):
        each.num_layers = depths["decoder"] if each.is_decoder else depths["encoder"]
        each.num_decoder_layers = depths["decoder"]
    if depths["decoder"] != depths["encoder"]:
        # `generate` sizes its caches by num_layers, which is the encoder's, unless it finds this name: with a deeper
        # decoder than encoder plain T5 ends in an IndexError there (transformers 5.17 to 5.24).
        config.decoder_layers = depths["decoder"]


def _drop_hooks(student: nn.Module) -> None:
    """Hooks were put on the teacher; transformers puts its own (captured outputs) on again when it needs them."""
    for module in student.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, kind).clear()
        for kind in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
            getattr(module, kind).clear()
        module.__dict__.pop("_output_capturing_hooks_installed", None)


def _shared_tables(model) -> list[nn.Module]:
    """BART's and T5's `shared`, which the stacks' own tables are tied to."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
    return [base.shared] if isinstance(getattr(base, "shared", None), nn.Module) else []
