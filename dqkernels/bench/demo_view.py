"""What people see of the demo: lines and panels in 80 columns, and demo.png. No measuring here."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WIDTH = 80
#: Lines of a body that a panel shows.
BODY_LINES = 4


class Shower:
    """Prints the demo's sections as they get ready; bars go to stderr."""

    def __init__(self, console=None):
        if console is None:
            from rich.console import Console

            console = Console(highlight=False)
        self.console = console
        self.width = min(max(console.width, 60), 100)

    def line(self, text: str, style: str | None = None) -> None:
        # Wrapped here, because rich cuts a word that is longer than a line and this must not.
        from rich.text import Text

        self.console.print(Text(text, style=style or ""), soft_wrap=False, width=self.width)

    def head(self, text: str) -> None:
        self.console.print()
        self.line(text, "bold")

    def data(self, counts: dict[str, Any], wanted: int) -> None:
        self.line("Held-out docstrings", "bold")
        self.line(
            f"{counts['mined']:,} in the test split of {counts['source']}; {counts['held_out']:,} of them "
            f"the teacher has not seen elsewhere; {counts['scored']} drawn."
        )
        if counts["scored"] < wanted:
            self.line(f"Fewer than the {wanted} wanted: scores are less certain here.", "yellow")

    def teacher(self, parameters: int, size: int) -> None:
        self.head("Packing, saving, loading again")
        self.line(f"teacher  {parameters:,} parameters, {size / 1e6:.2f} MB in fp32")

    def packed(self, row: dict[str, Any], note: str = "") -> None:
        note = note and f", {note}"
        self.line(f"{row['name']:7}  {row['file_mb']:.2f} MB on disk, {row['ratio']:.1f} times smaller{note}")

    @contextlib.contextmanager
    def scoring(self, name: str, count: int) -> Iterator[Callable[[int], None]]:
        from tqdm.auto import tqdm

        # A bar where stderr is a terminal; elsewhere a line when it is done.
        with tqdm(total=count, desc=f"{name:7} summarizes", unit="text", disable=None, leave=False) as bar:
            yield bar.update

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        from tqdm.auto import tqdm

        with tqdm(total=0, desc="timing", bar_format="{desc} ...", disable=None, leave=False):
            yield

    def samples(self, drawn: Sequence[Any], texts: dict[str, list[str]]) -> None:
        from rich.panel import Panel
        from rich.text import Text

        if drawn:
            self.head(
                f"The first {len(drawn)} of the draw, side by side" if len(drawn) > 1 else "The first of the draw"
            )
        label = max(len(name) for name in (*texts, "reference")) + 2
        room = self.width - 4
        for i, pair in enumerate(drawn):
            body = textwrap.wrap(pair.body, room)
            if len(body) > BODY_LINES:
                body = [
                    *body[: BODY_LINES - 1],
                    textwrap.shorten(" ".join(body[BODY_LINES - 1 :]), room, placeholder=" ..."),
                ]
            content = Text("\n".join(body) + "\n", style="dim")
            for name, text in [("reference", pair.head), *((n, texts[n][i]) for n in texts if n != "lead")]:
                lines = textwrap.wrap(text, room - label) or ["(nothing)"]
                content.append("\n" + name.ljust(label), style="bold" if name == "reference" else "cyan")
                content.append(("\n" + " " * label).join(lines), style="not dim")
            title = f"{pair.module}.{pair.qualname}".rstrip(".")
            if len(title) > room - 4:
                title = "..." + title[-(room - 7) :]
            self.console.print(Panel(content, title=Text(title), title_align="left", width=self.width))

    def table(self, result: dict[str, Any]) -> None:
        from rich import box
        from rich.table import Table

        settings = result["settings"]
        table = Table(box=box.SIMPLE, padding=(0, 1), width=None)
        for name in ("", "file MB", "ratio", "R-1", "R-2", "R-L", "ms/token", "kernel"):
            words = name in ("", "kernel")
            table.add_column(name, justify="left" if words else "right", no_wrap=name != "kernel")
        for row in result["rows"]:
            table.add_row(
                row["name"],
                _cell(row["file_mb"], ".2f"),
                _cell(row["ratio"], ".1f"),
                *(_cell(row[key], ".1f") for key in ("rouge1", "rouge2", "rougeL")),
                _cell(row["ms_per_token"], ".2f"),
                row["kernel"] or "-",
            )
        self.head(f"{settings['scored']} held-out docstrings (R-1, R-2, R-L: ROUGE F x 100)")
        self.console.print(table)
        threads = result["environment"]["threads"]
        self.line(
            "lead: the first 12 words of the body, the score to beat. teacher: the float model, 4 bytes a "
            "parameter. W8, W4, W2: weights and embeddings of so many bits, the rest 16; 8-bit activations. "
            "file MB: the written model.safetensors (10^6 bytes); ratio: the teacher's size over it. "
            f"ms/token: greedy, one text at a time, {threads} thread{'' if threads == 1 else 's'}. "
            "Nothing is trained here: W8, W4 and W2 are rounding alone."
        )
        if settings["student_training"]:
            self.line(settings["student_training"])
        if settings["teacher_training"]:
            self.line(settings["teacher_training"])
        gaps = [
            f"{row['name']} {row['rougeL_gap']:+.1f} +- {row['rougeL_gap_error']:.1f}"
            for row in result["rows"]
            if "rougeL_gap" in row
        ]
        self.line(f"R-L less the teacher's, with its standard error over the pairs: {', '.join(gaps)}.")
        for remark in remarks(result["rows"]):
            self.line(remark, "yellow")

    def written(self, json_file: Path, png_file: Path, seconds: float) -> None:
        self.console.print()
        self.line(f"Wrote {json_file} (every docstring and every text) and {png_file} in {seconds:.0f} s.")


def remarks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table shows and a reader might overlook: who does not beat the lead."""
    by_name = {row["name"]: row for row in rows}
    lead, teacher = by_name["lead"]["rougeL"], by_name["teacher"]["rougeL"]
    found = []
    if teacher <= lead:
        found.append(f"The teacher itself does not beat the lead here (ROUGE-L {teacher:.1f} to {lead:.1f}).")
    for row in rows:
        if row["name"] not in ("lead", "teacher") and row["rougeL"] < min(lead, teacher):
            found.append(
                f"{row['name']} is poor: ROUGE-L {row['rougeL']:.1f}, below the lead's {lead:.1f}. "
                "So few bits need training with quantization" + (", as DQ-2 had." if "DQ-2" in by_name else ".")
            )
    return found


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# ---- demo.png -----------------------------------------------------------------------------


def draw(result: dict[str, Any]) -> bytes:
    """demo.png: ROUGE-L against file size with the lead as a dashed line, and bars of the file sizes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["file_mb"] is not None]
    lead = next(row for row in result["rows"] if row["name"] == "lead")["rougeL"]
    colors = {"teacher": "#555555", "W8": "#1f77b4", "W4": "#2ca02c", "W2": "#d62728", "DQ-2": "#9467bd"}
    # Figure and canvas directly, without pyplot: no global state, and no display is ever asked for.
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    scores = [row["rougeL"] for row in rows] + [lead]
    for row in rows:
        left.plot(row["file_mb"], row["rougeL"], "o", markersize=9, color=colors[row["name"]])
        # On the far side of the dashed line, which would cross the label of a score close to the lead.
        below = row["rougeL"] < lead
        left.annotate(
            f"{row['name']}  {row['rougeL']:.1f}",
            (row["file_mb"], row["rougeL"]),
            xytext=(0, -10 if below else 10),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
        )
    left.axhline(lead, linestyle="--", color="black", linewidth=1)
    left.annotate(
        f"lead (first 12 words)  {lead:.1f}",
        (1, lead),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
    )
    left.set_xscale("log")
    sizes = [row["file_mb"] for row in rows]
    left.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    ticks = sorted(set(sizes))
    left.set_xticks(ticks, [f"{size:.2f}" if size < 10 else f"{size:.1f}" for size in ticks])
    left.minorticks_off()
    span = max(max(scores) - min(scores), 1.0)
    left.set_ylim(max(0.0, min(scores) - 0.25 * span), max(scores) + 0.2 * span)
    left.set_xlabel("file, MB (log scale)")
    left.set_ylabel(f"ROUGE-L on {result['settings']['scored']} held-out docstrings")
    left.set_title("Quality against size")
    left.grid(alpha=0.25)
    names = [row["name"] for row in rows]
    bars = right.bar(names, sizes, color=[colors[name] for name in names])
    labels = [f"{row['file_mb']:.2f}" + ("" if row["bits"] == 32 else f"\n{row['ratio']:.1f}x") for row in rows]
    right.bar_label(bars, labels, padding=3, fontsize=9)
    right.set_ylim(0, max(sizes) * 1.2)
    right.set_ylabel("file, MB")
    right.set_title("Size, and times smaller than fp32")
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
