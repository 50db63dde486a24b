"""Pictures of records of whole models: `generate`, `model`, `training`, `size`."""

from __future__ import annotations

from collections.abc import Sequence

from dqkernels.bench.picture import (
    Panel,
    Picture,
    Row,
    Series,
    counts,
    family_of,
    listed,
    measured,
    megabytes,
    rows_of,
    short,
    spread,
    timed,
    without_maker,
)

#: The axes of a cell, the ones a picture is drawn along first, and how each is written in a title and on an axis.
_AXES = {
    "batch_size": ("batch {}", "batch (texts at once)"),
    "num_beams": ("{} beams", "beams"),
    "source_tokens": ("{} source tokens", "source tokens"),
    "new_tokens": ("{} new", "new tokens"),
    "layers": ("layers {}", "layers, encoder-decoder"),
}
#: Panels of bars in one picture, and bars in a panel.
_CELLS, _BARS = 3, 16
Cell = tuple[str, ...]


def of_generate(record: dict, machine: str) -> list[Picture]:
    """Pictures of a `generate` or `model` record: `speed` where an axis varies, `latency` by cell, `memory`."""
    rows = timed(rows_of(record))
    cells: dict[Cell, list[Row]] = {}
    for row in rows:
        cells.setdefault(_cell(row), []).append(row)
    if not cells:
        return []
    model = record["settings"].get("model", "a model")
    axis, chosen = _varying(cells)
    made = []
    if axis is not None and len(chosen) > 2:
        made.append(_along(axis, chosen, cells, model, machine))
    made.append(_each(cells, model, machine))
    made.append(_memory(cells, model, machine))
    return [one for one in made if one is not None]


def _cell(row: Row) -> Cell:
    """Where a row stands on each axis, as text."""
    return tuple(row.text(axis) if axis == "layers" else f"{int(row.number(axis, 0))}" for axis in _AXES)


def _varying(cells: dict[Cell, list[Row]]) -> tuple[str | None, list[Cell]]:
    """The axis that varies most while the others stay as in a cell, and the cells along it."""
    best: tuple[str | None, list[Cell]] = (None, [])
    for index, axis in enumerate(_AXES):
        for cell in cells:
            along = [other for other in cells if other[:index] + other[index + 1 :] == cell[:index] + cell[index + 1 :]]
            if axis != "layers":
                along.sort(key=lambda other, at=index: int(other[at]))
            if len(along) > max(len(best[1]), 1):
                best = axis, along
    return best


def _words(cell: Cell, without: str | None = None) -> str:
    parts = []
    for value, (axis, (form, _)) in zip(cell, _AXES.items(), strict=True):
        if axis != without:
            parts.append("greedy" if axis == "num_beams" and value == "1" else form.format(value))
    return ", ".join(parts)


def _name(row: Row) -> str:
    """A candidate; where its loop is named (records of kind `model`) with it."""
    name = without_maker(row.text("candidate"))
    return f"{name}, {row.text('loop')}" if "loop" in row and "," not in name else name


def _family(row: Row) -> str:
    return family_of(row.text("candidate"), row.data.get("weight_bits"))


def _along(axis: str, chosen: Sequence[Cell], cells: dict[Cell, list[Row]], model: str, machine: str) -> Picture:
    """Two panels along the axis that varies most: milliseconds a token, tokens a second."""
    index = list(_AXES).index(axis)
    values = [cell[index] for cell in chosen]
    numeric = axis != "layers"
    ticks = tuple((float(value) if numeric else float(place), value) for place, value in enumerate(values))
    lines: dict[tuple[str, bool], list[tuple[float, Row]]] = {}
    for (place, _), cell in zip(ticks, chosen, strict=True):
        for row in cells[cell]:
            lines.setdefault((_name(row), measured(row)), []).append((place, row))
    panels = []
    keys = [("latency_ms_per_token", "ms per token")]
    if any("tokens_per_s" in row for cell in chosen for row in cells[cell]):
        keys.append(("tokens_per_s", "tokens per second"))
    for key, label in keys:
        series, seen = [], {}
        for (name, real), found in lines.items():
            family = _family(found[0][1])
            seen[family] = seen.get(family, -1) + 1
            points = tuple((place, row.number(key, 0)) for place, row in found if key in row)
            series.append(
                Series(name if real else f"{name} (projected)", family, points, measured=real, variant=seen[family])
            )
        panels.append(Panel("lines", "", _AXES[axis][1], label, tuple(series), ticks, x_log=numeric, y_log=True))
    samples = counts(row.maybe("samples", 0) for cell in chosen for row in cells[cell])
    caption = (f"Median of whole calls of generate over their new tokens, the encoder included, {samples}.",)
    title = f"{model} generating on {machine}: {_words(chosen[0], axis)}"
    alt = f"Time per token and tokens a second of {model} on {machine} against {_AXES[axis][1]}."
    return Picture("speed", title, tuple(panels), len(panels), caption, alt)


def _each(cells: dict[Cell, list[Row]], model: str, machine: str) -> Picture:
    """A panel of bars per cell: milliseconds a token of every candidate."""
    panels = []
    for cell, rows in list(cells.items())[:_CELLS]:
        series = []
        for row in rows[:_BARS]:
            time = row.number("latency_ms_per_token", 0)
            ends = spread(row, "latency_ms_per_token", "p20_ms_per_token", "p80_ms_per_token")
            note = short(time)
            if row.maybe("speedup_ratio") not in (None, 1.0):
                note += f"  ({short(row.number('speedup_ratio'))}x)"
            name, real = _name(row), measured(row)
            name = name if real else f"{name} (projected)"
            series.append(Series(name, _family(row), ((name, time),), *ends, (note,), measured=real))
        panels.append(
            Panel(
                "bars",
                f"{_words(cell)}; {counts(row.maybe('samples', 0) for row in rows)}",
                "ms per token",
                "",
                tuple(series),
            )
        )
    first = next(iter(cells.values()))
    base = next((without_maker(row.text("candidate")) for row in first if row.maybe("speedup_ratio") == 1.0), None)
    caption = ["Median time of whole calls of generate over their new tokens, the encoder included."]
    if any("p20_ms_per_token" in row for row in first):
        caption[0] += " Whiskers: p20 to p80."
    if base is not None:
        caption.append(f"x: the time of {base} over this one's.")
    if len(cells) > _CELLS:
        caption.append(f"{len(cells) - _CELLS} of {len(cells)} cells are not shown.")
    alt = f"Milliseconds per token of {model} on {machine}: {_best(first)}."
    return Picture("latency", f"{model} generating on {machine}", tuple(panels), 1, tuple(caption), alt)


def _best(rows: Sequence[Row]) -> str:
    """For who cannot see the picture: what the first cell says."""
    found = [(row.number("latency_ms_per_token", 0), _name(row)) for row in rows[:_BARS]]
    return listed([f"{name} {short(time)}" for time, name in found], 12)


def _memory(cells: dict[Cell, list[Row]], model: str, machine: str) -> Picture | None:
    """Weights, cache and peak of every candidate, in the first cell and in the one with the largest peak."""
    known = {
        cell: [row for row in rows if "weights_bytes" in row and measured(row)] for cell, rows in cells.items()
    }  # fmt: skip
    known = {cell: rows for cell, rows in known.items() if rows}
    if not known:
        return None
    largest = max(known, key=lambda cell: max(row.maybe("peak_bytes", 0) or 0 for row in known[cell]))
    parts = [("weights_bytes", "weights"), ("cache_bytes", "keys and values"), ("peak_bytes", "peak")]
    process = any(row.maybe("process_growth_bytes", 0) is not None for rows in known.values() for row in rows)
    parts += [("process_growth_bytes", "process")] if process else []
    panels = []
    for cell in dict.fromkeys((next(iter(known)), largest)):
        series = []
        for key, word in parts:
            rows = [row for row in known[cell][:_BARS] if row.maybe(key, 0) is not None]
            points = tuple((_name(row), row.number(key, 0) / 1e6) for row in rows)
            notes = tuple(megabytes(row.number(key, 0)) for row in rows)
            if points:
                series.append(Series(word, f"part {word}", points, notes=notes))
        panels.append(Panel("bars", _words(cell), "MB (10⁶ bytes)", "", tuple(series)))
    gpu = any("peak_reserved_bytes" in row for rows in known.values() for row in rows)
    how = (
        "most that torch's allocator held during a call"
        if gpu
        else "the weights, and how far the process grew during a call"
    )
    caption = [f"Peak: {how}. What has no bar does not say."]
    caption += ["Process: what one of its own held at most during a call, beyond its imports."] if process else []
    alt = f"Memory of {model} on {machine}: {listed([word for _, word in parts], len(parts))}, by candidate."
    return Picture("memory", f"Memory of {model} on {machine}", tuple(panels), 1, tuple(caption), alt)


def of_training(record: dict, machine: str) -> list[Picture]:
    """The picture of a `training` record: `step`, time and activations of a step."""
    rows = timed(rows_of(record))
    if not rows:
        return []
    several = len({row.text("dtype") for row in rows}) > 1
    times, sizes = [], []
    for row in rows[:_BARS]:
        name = without_maker(row.text("candidate")) + (f", {row.text('dtype')}" if several else "")
        family = (
            "float"
            if not row.text("candidate").startswith("dqkernels")
            else family_of(row.text("candidate"), row.data.get("bits"))
        )
        time, size = row.number("median_ms", 0), row.maybe("activation_bytes", 0)
        note = short(time) + ("" if "step_ratio" not in row else f"  ({short(row.number('step_ratio', 0))}x)")
        ends = spread(row, "median_ms", "p20_ms", "p80_ms")
        times.append(Series(name, family, ((name, time),), *ends, (note,), measured=measured(row)))
        if size is not None:
            note = megabytes(size) + (
                "" if "activation_ratio" not in row else f"  ({row.number('activation_ratio', 0):.2f}x)"
            )
            sizes.append(Series(name, family, ((name, size / 1e6),), notes=(note,), measured=measured(row)))
    panels = [Panel("bars", "time of a step", "ms", "", tuple(times))]
    if sizes:
        panels.append(Panel("bars", "activations kept for the backward pass", "MB (10⁶ bytes)", "", tuple(sizes)))
    work = record["settings"].get("work", "a model")
    caption = (
        f"Forward, backward and AdamW, the quantization of every weight included; median, "
        f"{counts(row.maybe('samples', 0) for row in rows)}. Whiskers: p20 to p80. x: of float autograd's, below 1 is "
        "less.",
    )
    title = f"A training step on {machine}: {work}"
    return [
        Picture("step", title, tuple(panels), 1, caption, f"Time and activation bytes of a training step on {machine}.")
    ]


def of_size(record: dict, machine: str) -> list[Picture]:
    """The picture of a `size` record: `memory`, files against the fp32 teacher's, with the paper's count as marks."""
    models: dict[str, list[Row]] = {}
    for row in rows_of(record):
        if "file_bytes" in row:
            models.setdefault(row.text("model"), []).append(row)
    panels = []
    for model, rows in models.items():
        series, marks = [], []
        for row in rows[: _BARS + 4]:
            weights, embeddings = int(row.number("weight_bits", 0)), int(row.number("embedding_bits", 0))
            name = f"{row.words('layers')}  " + ("fp32" if weights == 32 else f"{weights}-{embeddings}-8")
            size = row.number("file_bytes", 0)
            note = megabytes(size) + (
                "" if row.data.get("status") == "teacher" else f"  ({row.number('file_ratio', 0):.1f}x smaller)"
            )
            family = "float" if weights == 32 else f"ours {weights}"
            series.append(Series(name, family, ((name, size / 1e6),), notes=(note,)))
            if "paper_bytes" in row and weights != 32:
                marks.append((name, row.number("paper_bytes", 0) / 1e6))
        if marks:
            series.append(Series("the paper's count (computed)", "floor", tuple(marks), measured=False, lines=False))
        panels.append(
            Panel(
                "bars",
                f"{model}: layers, bits (weights-embeddings-activations)",
                "file, MB (10⁶ bytes)",
                "",
                tuple(series),
            )
        )
    if not panels:
        return []
    caption = (
        "Bytes of written safetensors files, random weights of real shapes, against 4 bytes a parameter of the fp32 "
        "teacher.",
    )
    return [
        Picture(
            "memory", "Packed files against the fp32 model's", tuple(panels), 1, caption, "Sizes of packed model files."
        )
    ]
