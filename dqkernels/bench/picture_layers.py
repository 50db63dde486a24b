"""Pictures of records of layers and ops (`linear`, `gemm`, `kernels`): time against M, bytes, shares of the floor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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

Shape = tuple[int, int]
#: More panels, rows or columns than these are not read at the width of a README; what is left out is named.
_PANELS, _HEAT_ROWS, _HEAT_COLUMNS, _BARS = 6, 40, 18, 14
_FLOOR = "floor (computed)"


def of_layers(record: dict, machine: str) -> list[Picture]:
    """Pictures of a `linear` or `gemm` record: `latency`, `memory`, `floor`."""
    rows = timed(rows_of(record))
    if not rows:
        return []
    cache = _cache_of(rows)
    rows = [row for row in rows if row.data.get("cache") in (cache, None)]
    made = [_latency(rows, cache, machine), _bytes(rows, machine)]
    heat = _floor_of_layers(rows, cache, machine)
    return [one for one in (*made, heat) if one is not None]


def _cache_of(rows: Iterable[Row]) -> str:
    """Cold where there is any: weights come from memory in a model, which is larger than a cache."""
    return "cold" if any(row.data.get("cache") == "cold" for row in rows) else "warm"


def _shape(row: Row) -> Shape:
    return int(row.number("out_features", 0)), int(row.number("in_features", 0))


def _plain(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows that a picture of times shows, and the candidates it leaves out: a second float type, group-wise weights
    beside those of a scale per channel, and launches that overlap."""
    floats = [
        row.text("candidate") for row in rows if family_of(row.text("candidate"), row.data.get("bits")) == "float"
    ]
    sizes = {row.maybe("group_size") for row in rows}
    grouped = -1 in sizes and len(sizes - {None}) > 1
    kept, gone = [], []
    for row in rows:
        name = row.text("candidate")
        other = name in floats and name != floats[0]
        other |= grouped and row.maybe("group_size") not in (-1, None)
        if other or "overlapped" in name:
            gone.append(name)
        else:
            kept.append(row)
    return kept, list(dict.fromkeys(gone))


def _latency(rows: Sequence[Row], cache: str, machine: str) -> Picture:
    rows, gone = _plain(rows)
    shapes: dict[Shape, list[Row]] = {}
    for row in rows:
        shapes.setdefault(_shape(row), []).append(row)
    order = sorted(shapes, key=lambda shape: shape[0] * shape[1])
    # The ends of the range say more than its middle.
    shown = (
        order if len(order) <= _PANELS else sorted({*order[: _PANELS // 2], *order[-(_PANELS // 2) :]}, key=order.index)
    )
    many = any(len({row.number("tokens", 0) for row in shapes[shape]}) > 1 for shape in shown)
    if many:
        panels = [_against_tokens(shape, shapes[shape]) for shape in shown]
    else:
        panels = [_bars_of(shape, shapes[shape]) for shape in shown]
    what = "the weights come from memory (cold)" if cache == "cold" else "the weights stay in the cache (warm)"
    caption = [
        f"Median of interleaved rounds, {counts(row.maybe('samples', 0) for row in rows)}; {what}; quantizing the "
        "input is inside the timed call." + ("" if many else " Whiskers: p20 to p80."),
        *_floor_words(rows),
    ]
    if gone:
        caption.append(f"In the record, not here: {listed([without_maker(name) for name in gone], 4)}.")
    if len(shown) < len(order):
        caption.append(f"{len(order) - len(shown)} of {len(order)} shapes are not shown.")
    alt = f"Time of one linear layer against its number of tokens on {machine}, with the floor of the device."
    return Picture("latency", f"One linear layer on {machine}", tuple(panels), 2 if many else 1, (*caption,), alt)


def _floor_words(rows: Iterable[Row]) -> list[str]:
    if not any("floor_us" in row for row in rows):
        return ["The device's floor is not known."]
    return [
        "Floor: bytes over bandwidth or operations over peak, whichever is more; computed, everything else is measured."
    ]


def _against_tokens(shape: Shape, rows: Sequence[Row]) -> Panel:
    lines: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.text("candidate"), measured(row)), []).append(row)
    seen: dict[str, int] = {}
    series = []
    for (name, real), found in lines.items():
        family = family_of(name, found[0].data.get("bits"))
        seen[family] = seen.get(family, -1) + 1
        points = sorted((row.number("tokens", 0), row.number("median_us", 0)) for row in found)
        label = without_maker(name) + ("" if real else " (projected)")
        series.append(Series(label, family, tuple(points), measured=real, variant=seen[family]))
    floors: dict[str, set[tuple[float, float]]] = {}
    for row in rows:
        if "floor_us" in row:
            family = family_of(row.text("candidate"), row.data.get("bits"))
            floors.setdefault(family, set()).add((row.number("tokens", 0), row.number("floor_us", 0)))
    # A width that was timed at one number of tokens has a floor there, not a line.
    most = max(map(len, floors.values()), default=0)
    for family, found in floors.items():
        if len(found) < min(most, 2):
            continue
        label = "" if any(one.label == _FLOOR for one in series) else _FLOOR
        series.append(Series(label, family, tuple(sorted(found)), measured=False))
    places = sorted({point[0] for one in series for point in one.points})
    ticks = tuple((place, f"{place:g}") for place in places)
    title = f"N x K: {shape[0]:,} x {shape[1]:,}"
    return Panel("lines", title, "tokens (M)", "µs per call", tuple(series), ticks, x_log=True, y_log=True)


def _bars_of(shape: Shape, rows: Sequence[Row]) -> Panel:
    """One number of tokens: a bar per candidate, with the floor as a mark on it."""
    rows = rows[:_BARS]
    tokens = rows[0].number("tokens", 0)
    series = []
    for row in rows:
        name, real = without_maker(row.text("candidate")), measured(row)
        time = row.number("median_us", 0)
        note = f"{short(time)} µs"
        if row.maybe("speedup_ratio") not in (None, 1.0):
            note += f", {short(row.number('speedup_ratio'))}x"
        series.append(
            Series(
                name if real else f"{name} (projected)", family_of(row.text("candidate"), row.data.get("bits")),
                ((name, time),), *spread(row, "median_us", "p20_us", "p80_us"), (note,), measured=real,
            )
        )  # fmt: skip
    floors = [(without_maker(row.text("candidate")), row.number("floor_us", 0)) for row in rows if "floor_us" in row]
    if floors:
        series.append(Series(_FLOOR, "floor", tuple(floors), measured=False, lines=False))
    title = f"{tokens:g} x {shape[0]:,} x {shape[1]:,} (M x N x K)"
    return Panel("bars", title, "µs per call", "", tuple(series))


def _bytes(rows: Sequence[Row], machine: str) -> Picture | None:
    """Bytes of the weights of the largest layer, by candidate."""
    rows = [row for row in rows if "weights_bytes" in row and measured(row)]
    if not rows:
        return None
    shape = max((_shape(row) for row in rows), key=math.prod)
    sizes: dict[str, Row] = {}
    for row in rows:
        if _shape(row) == shape and "overlapped" not in row.text("candidate"):
            sizes.setdefault(row.text("candidate"), row)
    base = next(iter(sizes.values())).number("weights_bytes", 0)
    series = []
    for name, row in list(sizes.items())[:_BARS]:
        size = row.number("weights_bytes", 0)
        note = megabytes(size) + ("" if size == base else f", {base / size:.1f}x smaller")
        series.append(
            Series(
                without_maker(name),
                family_of(name, row.data.get("bits")),
                ((without_maker(name), size / 1e6),),
                notes=(note,),
            )
        )
    panel = Panel("bars", f"{shape[0]:,} x {shape[1]:,} (N x K)", "weights, MB (10⁶ bytes)", "", tuple(series))
    caption = (f"Bytes of one layer's weights with their scales, as they lie in memory, against {next(iter(sizes))}.",)
    return Picture(
        "memory", "Weights of one linear layer", (panel,), 1, caption, "Bytes of a layer's weights by candidate."
    )


def _floor_of_layers(rows: Sequence[Row], cache: str, machine: str) -> Picture | None:
    cells: dict[tuple[str, str], float] = {}
    order: dict[str, tuple] = {}
    for row in rows:
        if "floor_fraction" in row and measured(row):
            n, k = _shape(row)
            name = without_maker(row.text("candidate"))
            if row.maybe("group_size") not in (-1, None):
                name += f" g{row.number('group_size'):g}"
            column = f"{row.number('tokens', 0):g}x{n}x{k}"
            order[column] = (n * k, n, row.number("tokens", 0))
            cells.setdefault((name, column), row.number("floor_fraction", 0))
    columns = sorted(order, key=order.get)
    return _heat(cells, columns, cache, f"Share of the floor reached on {machine}", "M x N x K")


def of_kernels(record: dict, machine: str) -> list[Picture]:
    """Pictures of a `kernels` record: `floor`, each op's share of the device's limit on each backend."""
    rows = timed(rows_of(record))
    cache = _cache_of(rows)
    found: dict[str, dict[tuple[str, str], float]] = {"floor_fraction": {}, "copy_fraction": {}}
    columns: list[str] = []
    for row in rows:
        if row.data.get("cache") != cache or not measured(row):
            continue
        shape = row.data.get("shape")
        sizes = "x".join(map(str, shape)) if isinstance(shape, list) else ""
        group = " ".join(filter(None, (row.text("op"), sizes, row.text("variant") if "variant" in row else "")))
        name = without_maker(row.text("candidate"))
        # torch has another op for each of ours: one column holds them all.
        name = "torch's own" if name.startswith("torch ") else name
        columns += [name] if name not in columns else []
        for key, cells in found.items():
            if key in row:
                cells.setdefault((group, name), row.number(key, 0))
    limits = {"floor_fraction": "Share of the floor reached", "copy_fraction": "Share of a copy's bandwidth reached"}
    key = next((key for key, cells in found.items() if cells), None)
    picture = None if key is None else _heat(found[key], columns, cache, f"{limits[key]} on {machine}", "")
    return [] if picture is None else [picture]


def _heat(
    cells: dict[tuple[str, str], float], columns: Sequence[str], cache: str, title: str, x_label: str
) -> Picture | None:
    if len({column for _, column in cells}) < 2:  # one column is a list, and bars show it
        return None
    rows = list(dict.fromkeys(name for name, _ in cells))
    shown, across = rows[:_HEAT_ROWS], [name for name in columns if any(at == name for _, at in cells)][:_HEAT_COLUMNS]
    table = tuple(tuple(cells.get((row, column)) for column in across) for row in shown)
    panel = Panel("heat", "", x_label, "", rows=tuple(shown), columns=tuple(across), cells=table)
    caption = [
        f"Computed least time over the measured median, {cache}: 100% is all that the device can do. "
        "An empty cell was not timed."
        if "floor" in title
        else f"Bytes a second over those of torch's copy_ in the same rounds, {cache}. An empty cell was not timed."
    ]
    if len(rows) > len(shown):
        caption.append(f"{len(rows) - len(shown)} of {len(rows)} rows are not shown.")
    if any(value is not None and value > 1 for line in table for value in line):
        caption.append("Above 100%: the data stayed in a cache, or the machine was busy at the wrong moment.")
    return Picture("floor", title, (panel,), 1, tuple(caption), f"{title}: a table of percentages.")
