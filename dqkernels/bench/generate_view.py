"""What people see of `bench generate`: two tables of 80 columns (time, memory) and a picture. No measuring here."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from dqkernels.bench import protocol
from dqkernels.bench.generate_cells import NOT_YET, Cell

#: The axes of a cell, the ones a picture is drawn along first.
_AXES = ("batch_size", "source_tokens", "num_beams", "layers", "new_tokens")
_AXIS_WORDS = {
    "batch_size": "batch",
    "source_tokens": "source tokens",
    "num_beams": "beams",
    "layers": "layers, encoder-decoder",
    "new_tokens": "new tokens",
}


def render(result: dict):
    """Two rich tables of a generate record, and what they leave unsaid."""
    from rich.console import Group

    groups = by_cell(result["rows"])
    head = f"{result['settings']['model']} on {protocol.machine_words(result['environment'])}"
    return Group(_times(result, groups, head), "", _memory(result, groups, head))


def by_cell(rows: Iterable[dict]) -> dict[Cell, list[dict]]:
    """Candidates' rows by cell, in their order; cells that were not reached have none."""
    found: dict[Cell, list[dict]] = {}
    for row in rows:
        if "batch_size" in row:
            lines = found.setdefault(Cell.of(row), [])
            if "candidate" in row:
                lines.append(row)
    return found


def _table(title: str, columns: Sequence[str]):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title)
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right", no_wrap=True)
    return table


def _times(result: dict, groups: dict[Cell, list[dict]], head: str):
    table = _table(f"generate, {head}", ("candidate", "ms/token", "p20-p80", "tokens/s", "x", "first ms", "n"))
    for cell, lines in groups.items():
        search, lengths, layers = _cell_words(cell).rsplit(", ", 2)
        table.add_row(search, lengths, layers)  # in one column they would be as wide as two
        for index, line in enumerate(lines):
            table.add_row(*_time_cells(line), end_section=index == len(lines) - 1)
        if not lines:
            table.add_row(" not run", end_section=True)
    settings = result["settings"]
    words = [
        "Cells: batch, search, source+new tokens, layers. Median of whole calls, the encoder included; every candidate "
        f"gives exactly the new tokens. x: the time of torch {settings['dtype']} over this one's. first: a call with "
        f"one new token. n: samples. Weights: {settings['weights']}.",
        *_notes(result),
    ]
    table.caption, table.caption_justify = "\n".join(words), "left"
    return table


def _memory(result: dict, groups: dict[Cell, list[dict]], head: str):
    gpu = result["settings"]["device"] == "cuda"
    timed = [line for lines in groups.values() for line in lines]
    known = {"process": "process_growth_bytes", "device": "device_bytes"}
    more = {head: key for head, key in known.items() if any(line.get(key) is not None for line in timed)}
    if gpu and "device" not in more:  # which has it in it
        more = {"reserved": "peak_reserved_bytes", **more}
    columns = ("candidate", "weights", "cache", "peak", "x", *more)
    table = _table(f"Memory in MB, {head}", columns)
    for cell, lines in groups.items():
        # What did not run says nothing about memory, but for its weights.
        lines = [line for line in lines if any(line.get(key) is not None for key in ("peak_bytes", *more.values()))]
        if lines:
            table.add_row(_cell_words(cell))
        for line in lines:
            ratio = line.get("peak_ratio")
            cells = [f" {_name(line)}", *(_mb(line.get(f"{key}_bytes")) for key in ("weights", "cache", "peak"))]
            cells.append("" if ratio is None else f"{ratio:.2f}")
            table.add_row(*cells, *(_mb(line.get(key)) for key in more.values()), end_section=line is lines[-1])
    how = (
        "most that torch's allocator held during the first call, other candidates left out"
        if gpu
        else "weights, and how far the process grew during the first call"
    )
    words = [
        "MB: 10^6 bytes. cache: keys and values at the end of a call.",
        f"peak: {how}.",
        f"x: of the peak of torch {result['settings']['dtype']}, this share.",
        *(["process: most that one of its own held during a call, beyond its imports."] if "process" in more else []),
        *(["device: what the card had in use behind it, all in."] if "device" in more else []),
        *_without_process(timed),
    ]
    table.caption, table.caption_justify = "\n".join(words), "left"
    return table


def _without_process(lines: list[dict]) -> list[str]:
    """A sentence for each reason why a process's memory is not known."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.get("process_reason") is not None:
            names = found.setdefault(line["process_reason"], [])
            names += [name for name in [line["candidate"]] if name not in names]
    return [f"no process memory: {', '.join(names)}: {why}" for why, names in found.items()]


def _cell_words(cell: Cell) -> str:
    beams = "greedy" if cell.num_beams == 1 else f"{cell.num_beams} beams"
    return f"{cell.batch_size}, {beams}, {cell.source_tokens}+{cell.new_tokens}, {cell.layers}"


def _name(line: dict) -> str:
    return line["candidate"].removeprefix("dqkernels ")


def _time_cells(line: dict) -> list[str]:
    if line["status"] != "timed":
        return [f" {_name(line)}", *line["status"].rsplit(" ", 1)]  # `out of memory` in two columns
    ratio, first = line["speedup_ratio"], line["first_token_ms"]
    spread = f"{_short(line['p20_ms_per_token'])}-{_short(line['p80_ms_per_token'])}"
    return [
        f" {_name(line)}",
        _short(line["latency_ms_per_token"]),
        spread,
        _short(line["tokens_per_s"]),
        "" if ratio is None else _short(ratio),
        "" if first is None else _short(first),
        str(line["samples"]),
    ]


def _short(value: float) -> str:
    """Three figures and no exponent: `0.123`, `12.0`, `12,345`."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _mb(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e6:,.1f}" if count < 1e9 else f"{count / 1e6:,.0f}"


def _notes(result: dict) -> list[str]:
    """A sentence for everything that is no figure."""
    found: dict[tuple[str, str], list[str]] = {}
    differ: dict[str, float] = {}
    kernels: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["status"] not in ("timed", "not run"):
            names = found.setdefault((row["status"], row["reason"]), [])
            names += [name for name in [_name(row)] if name not in names]
        elif row["status"] == "timed" and row["family"] in ("plain", "ours"):
            share = row.get("equal_tokens_fraction")
            if share is not None and share < 1:
                differ[_name(row)] = min(share, differ.get(_name(row), 1.0))
            names = kernels.setdefault(row["kernel"], [])
            names += [name for name in [_name(row)] if name not in names]
    lines = [f"{what}: {', '.join(names)}: {why}" for (what, why), names in found.items()]
    missed: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["status"] == "not run":
            why = "not run yet" if row["reason"] == NOT_YET else "not run, for want of time"
            words = f"{why}: ({_cell_words(Cell.of(row))})"
            missed.setdefault(words, []).extend([_name(row)] if "candidate" in row else [])
    lines += [words + (f": {', '.join(names)}" if names else "") for words, names in missed.items()]
    lines += [f"kernels of {', '.join(names)}: {kernel}" for kernel, names in kernels.items()]
    if differ:
        words = ", ".join(f"{name} {share:.1%} equal" for name, share in differ.items())
        lines.append(f"tokens that differ from Hugging Face's loop (ties): {words}")
    elif any(row.get("equal_tokens_fraction") == 1 for row in result["rows"]):
        lines.append("tokens of our loop: those of Hugging Face's, every one.")
    if result["settings"]["device"] == "cpu":
        lines.append("GPU: not run.")
    warning = protocol.busy_words(result["protocol"])
    return lines + ([] if warning is None else [warning])


# ------------------------------------------------------------------------------------------- picture

_FAMILY_COLORS = {
    "torch": "#555555",
    "static": "#8a8a8a",
    "compile": "#b0a080",
    "plain": "#9ecae1",
    "ours": "#1f77b4",
    "ctranslate2": "#d62728",
    "onnxruntime": "#9467bd",
    "bitsandbytes": "#ff9f40",
    "dynamic": "#8c564b",
}
#: Widths of ours, and kinds of one family, by brightness.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(result: dict) -> bytes:
    """A PNG: on the left tokens a second (of the memory sweep, its peak) along the axis that varies most; on the right
    milliseconds a token of every candidate in the first cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {cell: lines for cell, lines in by_cell(result["rows"]).items() if any(map(_timed, lines))}
    if not groups:
        raise ValueError("the record holds no timed row, so there is nothing to draw")
    # Figure and canvas directly, without pyplot: no global state, and no display is ever asked for.
    figure = Figure(figsize=(10, 4.8), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    _draw_along(left, result, groups)
    _draw_bars(right, next(iter(groups)), next(iter(groups.values())))
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(
        f"{result['settings']['model']} generating on {protocol.machine_words(result['environment'])}", fontsize=11
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_plot(result: dict, path: str | Path) -> None:
    """`draw` into a file."""
    Path(path).write_bytes(draw(result))


def _timed(line: dict) -> bool:
    return line["status"] == "timed"


def series(groups: dict[Cell, list[dict]], key: str) -> tuple[str, Cell, dict[str, list[tuple]]]:
    """The axis that varies most while the others stay as in a cell; that cell; points (value, figure) by candidate."""
    best: tuple[int, str, Cell] | None = None
    for axis in _AXES:
        for cell in groups:
            count = len({getattr(other, axis) for other in groups if _same_but(cell, other, axis)})
            if best is None or count > best[0]:
                best = count, axis, cell
    _, axis, cell = best
    points: dict[str, list[tuple]] = {}
    for other, lines in groups.items():
        if _same_but(cell, other, axis):
            for line in filter(_timed, lines):
                if line.get(key) is not None:
                    points.setdefault(line["candidate"], []).append((getattr(other, axis), line[key]))
    return axis, cell, points


def _same_but(one: Cell, other: Cell, axis: str) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _AXES if name != axis)


def _draw_along(axes, result: dict, groups: dict[Cell, list[dict]]) -> None:
    memory = result["settings"]["sweep"] == "memory"
    axis, cell, points = series(groups, "peak_bytes" if memory else "tokens_per_s")
    families = {line["candidate"]: line["family"] for lines in groups.values() for line in lines if "family" in line}
    values = sorted({value for found in points.values() for value, _ in found}, key=_sort_key)
    if axis == "layers":
        values = list(dict.fromkeys(value for found in points.values() for value, _ in found))
    places = {value: place for place, value in enumerate(values)}
    seen: dict[str, int] = {}
    for name, found in points.items():
        family = families[name]
        index = seen[family] = seen.get(family, -1) + 1
        found = sorted(found, key=lambda point: places[point[0]])
        scale = 1e9 if memory else 1
        axes.plot(
            [places[value] for value, _ in found],
            [figure / scale for _, figure in found],
            color=_FAMILY_COLORS[family],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=("-", "--", ":", "-.")[index % 4],
            markersize=5,
            linewidth=1.5,
            label=name.removeprefix("dqkernels "),
        )
    axes.set_yscale("log")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(places.values()), [str(value) for value in places])
    axes.set_xlim(-0.3, max(len(places) - 0.7, 0.3))
    axes.set_xlabel(_AXIS_WORDS[axis])
    axes.set_ylabel("peak memory, GB" if memory else "tokens/s")
    others = [f"{cell_words}" for name, cell_words in _fixed(cell) if name != axis]
    axes.set_title(", ".join(others), fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="best", frameon=True, framealpha=0.9)


def _sort_key(value) -> tuple:
    return (0, value, "") if isinstance(value, int) else (1, 0, value)


def _fixed(cell: Cell) -> list[tuple[str, str]]:
    beams = "greedy" if cell.num_beams == 1 else f"{cell.num_beams} beams"
    return [
        ("batch_size", f"batch {cell.batch_size}"),
        ("num_beams", beams),
        ("source_tokens", f"{cell.source_tokens} source tokens"),
        ("new_tokens", f"{cell.new_tokens} new"),
        ("layers", f"layers {cell.layers}"),
    ]


def _draw_bars(axes, cell: Cell, lines: Sequence[dict]) -> None:
    lines = sorted(filter(_timed, lines), key=lambda line: -line["latency_ms_per_token"])
    names = [_name(line) for line in lines]
    times = [line["latency_ms_per_token"] for line in lines]
    low = [time - line["p20_ms_per_token"] for time, line in zip(times, lines, strict=True)]
    high = [line["p80_ms_per_token"] - time for time, line in zip(times, lines, strict=True)]
    colors = [_FAMILY_COLORS[line["family"]] for line in lines]
    bars = axes.barh(names, times, color=colors, xerr=[low, high], error_kw={"elinewidth": 1, "ecolor": "black"})
    axes.bar_label(bars, [_short(time) for time in times], padding=6, fontsize=8)
    axes.set_xlim(0, max(times) * 1.18)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("ms per token (encoder included), median, p20 to p80")
    axes.set_title(", ".join(words for _, words in _fixed(cell)), fontsize=9)
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)
