"""Draws a `Picture` with matplotlib, for light and dark pages. No reading of records here.

Figures are made directly, without pyplot: no global state, and no display is ever asked for.
"""

from __future__ import annotations

import io
import re
import textwrap
from dataclasses import dataclass

from dqkernels.bench.picture import Panel, Picture, Series

FORMATS = ("png", "svg")
#: Inches, and pixels of one: 1280 across, for the 800 or so of a README.
_WIDTH, _DPI = 8.0, 160
_TEXT = 9.5
#: Strokes of the series of one family; every second has hollow markers.
_STROKES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Style:
    """Colours of a page. Hues are those of Okabe and Ito, told apart by colour-blind readers; lighter on dark pages."""

    name: str
    back: str
    text: str
    faint: str
    blue: str
    green: str
    sky: str
    orange: str
    red: str
    purple: str
    grey: str


STYLES = {
    "light": Style(
        "light", back="#ffffff", text="#1f2328", faint="#d0d7de", blue="#0072b2", green="#009e73", sky="#56b4e9",
        orange="#e69f00", red="#d55e00", purple="#aa4499", grey="#6e7781",
    ),
    "dark": Style(
        "dark", back="#0d1117", text="#e6edf3", faint="#3d444d", blue="#4ba3e3", green="#2fc79a", sky="#9bd8ff",
        orange="#f0b429", red="#ff8552", purple="#e58fc4", grey="#9da7b3",
    ),
}  # fmt: skip
#: Of heat maps: dark to light, the same to who sees no red or green.
_MAP = "cividis"
#: Bars beside one name from which they are thinner, with smaller figures.
_MANY_BARS = 4
#: The hue of each family; what is not here is a peer that nobody foresaw.
_HUES = {
    "float": "grey", "ours": "blue", "ours 8": "blue", "ours 4": "green", "ours 2": "sky", "trained": "red",
    "torch int8": "purple", "ctranslate2": "red", "bitsandbytes": "orange", "gemlite": "orange", "humming": "red",
    "bitblas": "purple", "torchao": "orange", "onnx": "orange", "floor": "text",
    "part weights": "blue", "part keys and values": "orange", "part peak": "grey",
    "part process": "purple",
    "recipe teacher": "text", "recipe ptq": "grey", "recipe quant-only": "red", "recipe dq-paper": "blue",
    "recipe dq-": "green", "recipe distill-only": "purple",
}  # fmt: skip
#: And a marker, for who sees no hues; the rest of the peers have a cross.
_MARKERS = {
    "float": "o", "ours": "h", "ours 8": "s", "ours 4": "^", "ours 2": "D", "trained": "o", "torch int8": "v",
    "ctranslate2": "P", "bitsandbytes": "<", "gemlite": ">", "humming": "p", "recipe teacher": "*", "recipe ptq": "X",
    "recipe quant-only": "v", "recipe dq-paper": "s", "recipe dq-": "o", "recipe distill-only": "D",
}  # fmt: skip


class NoMatplotlib(RuntimeError):
    """matplotlib is not installed; the message says how to get it."""


def need_matplotlib() -> None:
    """Asks for matplotlib before any work.

    Raises:
        NoMatplotlib: where it is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NoMatplotlib(
            "pictures need matplotlib, which is not installed here: pip install matplotlib "
            "(it is one of the packages that `pip install dqkernels` brings)"
        ) from error


def draw(picture: Picture, style: str = "light", kind: str = "png", footer: str = "") -> bytes:
    """The picture as the bytes of a file.

    Args:
        picture: what to show.
        style: of `STYLES`.
        kind: of `FORMATS`.
        footer: a line at the bottom: machine, date, commit.

    Raises:
        NoMatplotlib: where matplotlib is missing.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    look = STYLES[style]
    # Letters as outlines and ids from the content: the same file on every machine with the same matplotlib.
    settings = {"font.size": _TEXT, "font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "dqkernels"}
    with matplotlib.rc_context(settings):
        down = -(-len(picture.panels) // picture.across)
        heights = [
            max(_height(panel) for panel in picture.panels[row * picture.across : (row + 1) * picture.across])
            for row in range(down)
        ]
        words = [line for sentence in (*picture.caption, footer) for line in textwrap.wrap(plain(sentence, 2000), 126)]
        title = textwrap.wrap(plain(picture.title, 300), 82)
        handles, labels = [], []
        legend_rows = -(-len(_legend_of(picture)) // 3)
        below = 0.16 * len(words) + 0.1
        above = 0.22 * len(title) + 0.08
        legend = 0.21 * legend_rows + (0.06 if legend_rows else 0)
        height = sum(heights) + above + below + legend
        figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=look.back, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(
            rect=(0.005, (below + legend) / height, 0.99, 1 - (above + below + legend) / height),
            h_pad=0.06,
            w_pad=0.06,
            hspace=0.03,
        )
        grid = figure.subplots(down, picture.across, squeeze=False, height_ratios=heights)
        for index, axes in enumerate(grid.flat):
            if index >= len(picture.panels):
                axes.set_visible(False)
                continue
            _panel(axes, picture.panels[index], look)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        figure.text(
            0.012,
            1 - 0.06 / height,
            "\n".join(title),
            ha="left",
            va="top",
            fontsize=11.5,
            fontweight="bold",
            color=look.text,
        )
        figure.text(
            0.012,
            0.07 / height,
            "\n".join(words),
            ha="left",
            va="bottom",
            fontsize=8,
            color=look.text,
            alpha=0.85,
            linespacing=1.35,
        )
        if handles:
            figure.legend(
                handles, labels, loc="lower left", bbox_to_anchor=(0.005, below / height), ncols=3, fontsize=8.5,
                frameon=False, labelcolor=look.text, columnspacing=1.4, borderaxespad=0.2, handlelength=2.6,
            )  # fmt: skip
        return _saved(figure, picture, style, kind)


def _saved(figure, picture: Picture, style: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    words = {"Title": picture.title, "Identifier": stamp_of(picture, style)}
    if kind == "svg":
        metadata = {**words, "Creator": "dqkernels plot", "Date": None}
        figure.savefig(buffer, format="svg", facecolor=figure.get_facecolor(), metadata=metadata)
        return buffer.getvalue()
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    # A palette of 256: a third of the bytes, and flat colours lose nothing.
    figure.canvas.draw()
    image = Image.frombuffer("RGBA", figure.canvas.get_width_height(physical=True), figure.canvas.buffer_rgba())
    notes = PngInfo()
    for key, text in words.items():
        notes.add_itxt(key, text)
    flat = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    flat.save(buffer, format="png", optimize=True, pnginfo=notes, dpi=(_DPI, _DPI))
    return buffer.getvalue()


def stamp_of(picture: Picture, style: str) -> str:
    """What a drawn file says of itself: `dqkernels plot light sha256:...`."""
    return f"dqkernels plot {style} sha256:{picture.digest()}"


def plain(text: str, most: int = 60) -> str:
    """Text for matplotlib: one line, no control characters, no longer than `most`, and a $ that starts no formula."""
    text = re.sub(r"[^\S ]+|[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", " ", text)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text.replace("$", r"\$")


# ------------------------------------------------------------------------------------------------------- panels


def _height(panel: Panel) -> float:
    """Inches, its labels included."""
    if panel.kind == "bars":
        groups = _names(panel)
        most = max(1, sum(one.lines for one in panel.series) if _grouped(panel) else 1)
        wrapped = sum(len(_wrapped(name)) - 1 for name in groups)
        each = 0.15 if most < _MANY_BARS else 0.12
        return 0.75 + len(groups) * (0.24 if most == 1 else each * most + 0.08) + 0.09 * wrapped
    if panel.kind == "heat":
        return 0.6 + 0.27 * len(panel.rows) + 0.075 * min(max(map(len, panel.columns)), 30)
    return 2.75 if len(panel.series) > 4 or panel.y_log else 3.4


def _legend_of(picture: Picture) -> list[str]:
    return list(
        dict.fromkeys(_label(one, panel) for panel in picture.panels for one in panel.series if _label(one, panel))
    )


def _label(one: Series, panel: Panel) -> str:
    """What the legend says of a series: nothing where its only bar has its name on the axis."""
    if panel.kind == "bars" and one.points and one.label == one.points[0][0]:
        return ""
    return plain(one.label)


def _panel(axes, panel: Panel, look: Style) -> None:
    axes.set_facecolor(look.back)
    {"bars": _bars, "heat": _heat, "lines": _lines}[panel.kind](axes, panel, look)
    if panel.title:
        axes.set_title(plain(panel.title, 100), fontsize=_TEXT, color=look.text, loc="left")
    axes.set_xlabel(plain(panel.x_label, 90), color=look.text, fontsize=9)
    axes.set_ylabel(plain(panel.y_label, 60), color=look.text, fontsize=9)
    axes.tick_params(colors=look.text, which="both", labelsize=8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom") and panel.kind != "heat")
        spine.set_color(look.faint)


def _colour(family: str, look: Style) -> str:
    return getattr(look, _HUES.get(family, "orange"))


def _lines(axes, panel: Panel, look: Style) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if panel.x_log:
        axes.set_xscale("log", base=2)
    if panel.y_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for text, y in panel.levels:
        axes.axhline(y, linestyle="--", color=look.text, linewidth=1, alpha=0.7)
        axes.annotate(
            plain(text), (0, y), xycoords=("axes fraction", "data"), xytext=(4, -4), textcoords="offset points",
            va="top", fontsize=8.5, color=look.text,
        )  # fmt: skip
    for one in panel.series:
        colour = _colour(one.family, look)
        xs, ys = [x for x, _ in one.points], [y for _, y in one.points]
        marker = _MARKERS.get(one.family, "X")
        options = {"color": colour, "label": _label(one, panel) or None, "zorder": 3, "alpha": 0.9}
        if one.measured:
            options |= {
                "marker": marker,
                "markersize": 10 if marker == "*" else 7 if not one.lines else 5.5,
                "linewidth": 1.6,
            }
            options["linestyle"] = _STROKES[one.variant % len(_STROKES)] if one.lines else "none"
            options["markerfacecolor"] = look.back if one.variant % 2 else colour
        else:  # computed: hollow and dotted, whatever its colour
            options |= {
                "marker": marker if len(xs) < 2 else "",
                "markerfacecolor": "none",
                "markersize": 5,
                "linewidth": 1.2,
                "linestyle": ":",
            }
        if one.low:
            errors = [
                [y - low for y, low in zip(ys, one.low, strict=True)],
                [high - y for y, high in zip(ys, one.high, strict=True)],
            ]
            axes.errorbar(xs, ys, yerr=errors, capsize=3, elinewidth=1.1, **options)
        else:
            axes.plot(xs, ys, **options)
    _notes(axes, panel, look)
    if panel.x_ticks:
        axes.set_xticks([place for place, _ in panel.x_ticks], [plain(text, 20) for _, text in panel.x_ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=look.faint, alpha=0.6, linewidth=0.7)
    axes.set_axisbelow(True)


def _notes(axes, panel: Panel, look: Style) -> None:
    """Texts beside points; room is made at the sides, since a text is no part of what axes are fitted to."""
    noted = sorted(
        (x, y, text, index)
        for index, one in enumerate(panel.series)
        for (x, y), text in zip(one.points, one.notes, strict=False)
        if text
    )
    if not noted:
        return
    ys = [y for x, y, *_ in noted] + [y for _, y in panel.levels]
    ends = [end for one in panel.series for end in (*one.low, *one.high)]
    low, high = min(ys + ends), max(ys + ends)
    span = max(high - low, 1e-9)
    axes.set_ylim(low - 0.16 * span, high + 0.12 * span)
    places: list[tuple[float, float]] = []
    for x, y, text, _ in noted:
        # Where two points of one place are close, the lower one's text goes below it.
        crowded = any(abs(y - other) < 0.11 * span and 0.8 < x / at < 1.25 for at, other in places)
        below = crowded or any(0 < other - y < 0.11 * span and 0.8 < x / at < 1.25 for at, other, *_ in noted)
        places.append((x, y))
        axes.annotate(
            plain(text), (x, y), xytext=(8, -5 if below else 5), textcoords="offset points", ha="left",
            va="top" if below else "bottom", fontsize=8.5, color=look.text, zorder=4,
        )  # fmt: skip
    left, right = axes.get_xlim()
    xs = [x for one in panel.series for x, _ in one.points]
    if panel.x_log and xs:
        axes.set_xlim(min(xs) / 1.25, max(xs) * 1.9)
    else:
        axes.set_xlim(left, right + 0.15 * (right - left))


def _names(panel: Panel) -> list[str]:
    return list(dict.fromkeys(name for one in panel.series for name, _ in one.points))


def _grouped(panel: Panel) -> bool:
    """Several bars beside one name."""
    seen: list[str] = [name for one in panel.series if one.lines for name, _ in one.points]
    return len(seen) > len(set(seen))


def _wrapped(name: str) -> list[str]:
    return textwrap.wrap(plain(name), 34) or [""]


def _bars(axes, panel: Panel, look: Style) -> None:
    names = _names(panel)
    places = {name: len(names) - 1 - index for index, name in enumerate(names)}
    bars = [one for one in panel.series if one.lines]
    grouped = _grouped(panel)
    width = 0.8 / len(bars) if grouped else 0.66
    most = max(max((value, *one.high)) for one in panel.series for _, value in one.points)
    for index, one in enumerate(bars):
        colour = _colour(one.family, look)
        at = [places[name] + ((len(bars) - 1) / 2 - index) * width * grouped for name, _ in one.points]
        lengths = [value for _, value in one.points]
        options = {"color": colour} if one.measured else {"color": "none", "edgecolor": colour, "hatch": "////"}
        axes.barh(
            at, lengths, height=0.9 * width if grouped else width, label=_label(one, panel) or None, zorder=2, **options
        )
        ends = list(one.high) or lengths
        if one.low:
            errors = [
                [v - low for v, low in zip(lengths, one.low, strict=True)],
                [high - v for v, high in zip(lengths, one.high, strict=True)],
            ]
            axes.errorbar(lengths, at, xerr=errors, fmt="none", ecolor=look.text, elinewidth=1.1, capsize=2.5, zorder=3)
        for y, end, value, note in zip(at, ends, lengths, one.notes, strict=False):
            axes.annotate(
                plain(note),
                (max(end, value), y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5 if grouped and len(bars) >= _MANY_BARS else 8.5,
                color=look.text,
            )
    for one in panel.series:
        if not one.lines:
            xs, ys = [value for _, value in one.points], [places[name] for name, _ in one.points]
            axes.plot(xs, ys, linestyle="none", marker="|", markersize=13, markeredgewidth=2,
                      color=_colour(one.family, look), label=_label(one, panel) or None, zorder=4)  # fmt: skip
    axes.set_yticks([places[name] for name in names], ["\n".join(_wrapped(name)) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    longest = max((len(note) for one in bars for note in one.notes), default=0)
    axes.set_xlim(0, most * (1.05 + 0.0125 * longest))
    axes.tick_params(axis="y", length=0)
    axes.grid(color=look.faint, alpha=0.6, linewidth=0.7, axis="x")
    axes.set_axisbelow(True)


def _heat(axes, panel: Panel, look: Style) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    colours = colormaps[_MAP]
    axes.set_xlim(0, len(panel.columns))
    axes.set_ylim(len(panel.rows), 0)
    for y, line in enumerate(panel.cells):
        for x, value in enumerate(line):
            if value is None:
                continue
            colour = to_rgb(colours(min(max(value, 0.0), 1.0)))
            axes.fill_between([x + 0.03, x + 0.97], y + 0.04, y + 0.96, color=colour, linewidth=0)
            # Black or white, by the brightness of the cell.
            bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5
            axes.text(
                x + 0.5,
                y + 0.5,
                _percent(value),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if bright else "white",
            )
    steep = max(map(len, panel.columns)) > 60 / len(panel.columns)
    axes.set_xticks(
        [x + 0.5 for x in range(len(panel.columns))],
        [plain(name, 30) for name in panel.columns],
        rotation=90 if steep else 0,
    )
    axes.set_yticks([y + 0.5 for y in range(len(panel.rows))], [plain(name, 44) for name in panel.rows])
    axes.tick_params(length=0)


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%" if value < 10 else f"{value:.0f}x"
