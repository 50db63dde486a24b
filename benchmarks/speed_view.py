"""What pages say of `benchmarks/results/generate-zen4.json`: whole models on a CPU, and where a peer leads. Rendered.
Of `generate-batches-zen4.json`, more texts at once and longer ones; of `linear-zen4.json`, one layer against every peer
that installs; of an older processor without VNNI (`zen3`), the same three.

python benchmarks/speed_view.py             # every block, on stdout
python benchmarks/speed_view.py --write     # into README.md and docs/
python benchmarks/speed_view.py --check     # exit 1 if a page says something else

A block stands between `<!-- speed: NAME -->` and `<!-- end of speed -->`. Nobody edits one by hand.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from dqkernels.bench import generate_view, record, words
from dqkernels.bench.generate_cells import Cell

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULT = RESULTS / "generate-zen4.json"
BATCHES = RESULTS / "generate-batches-zen4.json"
OLDER, OLDER_BATCHES = RESULTS / "generate-zen3.json", RESULTS / "generate-batches-zen3.json"
LAYERS, OLDER_LAYERS = RESULTS / "linear-zen4.json", RESULTS / "linear-zen3.json"
_BLOCK = re.compile(r"(<!-- speed: ([a-z]+) -->)(.*?)(<!-- end of speed -->)", re.S)
FLOAT = "torch fp32"
#: What is compared, the smaller the better: the field, words for it, its unit, and what a value is divided by.
METRICS = (
    ("latency_ms_per_token", "time per token", "ms", 1),
    ("first_token_ms", "first token", "ms", 1),
    ("weights_bytes", "weights", "MB", 1e6),
    ("peak_bytes", "peak", "MB", 1e6),
    ("process_growth_bytes", "process", "MB", 1e6),
)
Rows = list[dict]


def spelled(candidate: str) -> str:
    """A peer as it writes itself; torchao is no PyTorch."""
    words = candidate.replace("ctranslate2", "CTranslate2").replace("onnxruntime", "ONNX Runtime")
    return re.sub(r"^torch\b", "PyTorch", words)


def name_of(row: dict) -> str:
    """`W4A8`, `CTranslate2 int8`, `PyTorch fp32`; an embedding of other bits is said."""
    if row["family"] not in ("ours", "plain"):
        return spelled(row["candidate"])
    name = f"W{row['weight_bits']}A8"
    if row["embedding_bits"] != row["weight_bits"]:
        name += f", head {row['embedding_bits']}"
    return name if row["family"] == "ours" else f"{name}, Hugging Face's loop"


def figure(row: dict, key: str, divisor: float = 1) -> str:
    """Three digits or all before the point; `-` for what the record does not hold."""
    value = row.get(key)
    if value is None:
        return "-"
    value /= divisor
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}".rstrip(".")


def times(row: dict, other: dict | None, key: str = "latency_ms_per_token") -> str:
    """How often this row's time goes into the other's."""
    if other is None or not row.get(key) or not other.get(key):
        return "-"
    return f"{other[key] / row[key]:.2f}"


def cells_of(result: dict) -> dict[Cell, Rows]:
    """Timed rows by cell; a cell without any is left out."""
    found = {cell: timed(rows) for cell, rows in generate_view.by_cell(result["rows"]).items()}
    return {cell: rows for cell, rows in found.items() if rows}


def timed(rows: Iterable[dict]) -> Rows:
    return [row for row in rows if row["status"] == "timed"]


def of(rows: Rows, candidate: str) -> dict | None:
    return next((row for row in rows if row["candidate"] == candidate), None)


def best_other(rows: Rows, key: str = "latency_ms_per_token") -> dict | None:
    """Whose figure is the smallest of those that are not ours."""
    others = [row for row in rows if row["family"] not in ("ours", "plain") and row.get(key) is not None]
    return min(others, key=lambda row: row[key], default=None)


def ahead(row: dict, rows: Rows) -> str:
    """In words, what somebody else's candidate does better than this one of ours: whose figure is the smallest."""
    if row["family"] not in ("ours", "plain"):
        return ""
    found = []
    for key, what, unit, divisor in METRICS:
        best = best_other(rows, key)
        if best is not None and row.get(key) is not None and best[key] < row[key]:
            found.append(f"{what}: {name_of(best)} ({figure(best, key, divisor)} {unit})")
    return "; ".join(found) or "none"


def search_of(cell: Cell) -> str:
    return "greedy" if cell.num_beams == 1 else f"{cell.num_beams} beams"


def cell_words(cell: Cell, n: int) -> str:
    texts = "One text" if cell.batch_size == 1 else f"{cell.batch_size} texts"
    each = "" if cell.batch_size == 1 else " each"
    return f"{texts} of {cell.source_tokens} tokens{each}, {cell.new_tokens} new ones, {search_of(cell)} (n = {n})"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(row: dict, rows: Rows, heads: list[str], spread: bool) -> list[str]:
    name = name_of(row)
    time = figure(row, "latency_ms_per_token")
    if spread:
        time += f" ({figure(row, 'p20_ms_per_token')} to {figure(row, 'p80_ms_per_token')})"
    shown = [key for key, what, unit, _ in METRICS if unit == "MB" and f"{what}, {unit}" in heads]
    return [
        f"**{name}**" if row["family"] == "ours" else name,
        time,
        times(row, of(rows, FLOAT)),
        times(row, best_other(rows)),
        figure(row, "first_token_ms"),
        *(figure(row, key, 1e6) for key in shown),
        ahead(row, rows),
    ]


def _heads(cells: dict[Cell, Rows]) -> list[str]:
    """Of the columns behind the time: a kind of memory that no row says stands in no table."""
    memory = [
        f"{what}, {unit}"
        for key, what, unit, _ in METRICS
        if unit == "MB" and any(row.get(key) is not None for rows in cells.values() for row in rows)
    ]
    return ["x of fp32", "x of the fastest other", "first token, ms", *memory, "ahead of it"]


def small(result: dict) -> dict[Cell, Rows]:
    """What the README shows: the least batch and the shortest source, every search."""
    cells = cells_of(result)
    if not cells:
        raise SystemExit("the record holds no timed row, so there is no table")
    least = min((cell.batch_size, cell.source_tokens) for cell in cells)
    return {cell: rows for cell, rows in cells.items() if (cell.batch_size, cell.source_tokens) == least}


def readme(result: dict) -> str:
    """One table of one text, and in words what stands where we lose."""
    cells = small(result)
    first = next(iter(cells))
    heads = _heads(cells)
    lines = [_line(["", "", "ms/token", *heads]), "|---" * 3 + "|---" * len(heads) + "|"]
    for cell, rows in cells.items():
        for index, row in enumerate(rows):
            search = f"{search_of(cell)}, n = {row['samples']}" if index == 0 else ""
            lines.append(_line([search, *_row(row, rows, heads, spread=False)]))
    model = result["settings"]["model"].replace("bart", "BART")
    texts = "one text" if first.batch_size == 1 else f"{first.batch_size} texts"
    before = (
        f"{model} of random weights, layers {first.layers}, {texts} of {first.source_tokens} tokens and "
        f"{first.new_tokens} new ones, on {machine(result)}: medians of `benchmarks/results/{RESULT.name}` "
        f"({load(result)}). {encoder(result)}"
    )
    after = (
        "A token's time is that of a whole call over its new tokens. `ahead of it`: what the best of the others does "
        f"better, by the medians alone; `-` is not known and not compared.{process(heads)} More: "
        "[docs/measured.md](docs/measured.md#whole-models-on-a-cpu)."
    )
    return "\n".join([*_wrapped(before), "", *lines, "", *_wrapped(after)])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def process(heads: list[str]) -> str:
    """What the column of that name holds, where it stands."""
    words_ = " `process`: the most that a process of its own held during a call, beyond its imports."
    return words_ if "process, MB" in heads else ""


def load(result: dict) -> str:
    """How busy the machine was, in words."""
    found = result["protocol"]["before"]["load_fraction"]
    if found is None:
        return "load before the run not known"
    return f"load before the run {found:.2f} a core" + (
        ", which is busy" if words.busy_words(result["protocol"]) else ""
    )


def machine(result: dict) -> str:
    """Processor, threads and what its instruction sets lack."""
    found = result["environment"]
    missing = [] if any("vnni" in isa for isa in found["cpu_isa"]) else ["no VNNI"]
    best = [
        isa.upper().replace("_", "-")
        for isa in found["cpu_isa"]
        if isa in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8")
    ]
    return f"{found['cpu_model']} ({', '.join(best + missing)}), {words.thread_words(found['threads'])}"


def encoder(result: dict) -> str:
    """Of the call that is nearly all encoder, how we stand to the fastest of the others, over all cells."""
    rates, names = [], []
    for rows in cells_of(result).values():
        other = best_other(rows, "first_token_ms")
        ours = [row for row in rows if row["family"] == "ours" and row.get("first_token_ms")]
        if other is None or not ours:
            continue
        names += [] if name_of(other) in names else [name_of(other)]
        rates += [other["first_token_ms"] / row["first_token_ms"] for row in ours]
    if not rates:
        return "The encoder was not compared with anybody's."
    verdict = "slower" if max(rates) < 1 else "faster" if min(rates) > 1 else "now slower, now faster"
    rate = f"{min(rates):.2f} to {max(rates):.2f}"
    others = ", ".join(names)
    return f"The encoder (first token) is {verdict} than the fastest other's ({others}): {rate} times its speed."


def cells(result: dict) -> str:
    """Every cell as a table with spreads, the ratios in words, and how busy the machine was."""
    said = (
        f"On {machine(result)}, {load(result)}; {result['settings']['weights']} weights. Candidates took turns; the "
        "ratios are of one set of rounds. First token: a call with one new token, nearly all of it encoder. `ahead of "
        "it`: what the best of the others does better, by the medians alone; `-` is not known and not compared."
        f"{process(_heads(cells_of(result)))}"
    )
    parts = ["\n".join(_wrapped(said))]
    heads = _heads(cells_of(result))
    for cell, rows in cells_of(result).items():
        table = [_line(["", "ms per token (p20 to p80)", *heads]), "|---" * (2 + len(heads)) + "|"]
        table += [_line(_row(row, rows, heads, spread=True)) for row in rows]
        table += ["", *ratio_words(rows)]
        parts += [f"{cell_words(cell, rows[0]['samples'])}, layers {cell.layers}:", "\n".join(table)]
    return "\n\n".join([*parts, encoder(result), "\n".join(_wrapped(proof(result)))])


def proof(result: dict) -> str:
    """What was shown of ours before it was timed: how far its logits are off, and whose tokens its loop wrote."""
    ours = [row for rows in cells_of(result).values() for row in rows if row["family"] == "ours"]
    error = max(row["logits_error"] for row in ours)
    same = min(row["equal_tokens_fraction"] for row in ours)
    return (
        f"Our logits differ from the eager backend's on the same codes by up to {error:.2g} of their norm: the "
        "compiled core's LayerNorm rounds otherwise, and codes flip. Of our loop's tokens "
        f"{'all' if same == 1 else f'{same:.1%} and more'} were those of Hugging Face's loop over the same blocks."
    )


def ratio_words(rows: Rows) -> list[str]:
    """`- W4A8 is 2.56 times as fast as ONNX Runtime int8, with 0.34 of its weights.`, of the fastest other."""
    other = best_other(rows)
    if other is None:
        return []
    return [
        f"- {name_of(row)} is {times(row, other)} times as fast as {name_of(other)}, with "
        f"{row['weights_bytes'] / other['weights_bytes']:.2f} of its weights."
        for row in rows
        if row["family"] == "ours"
    ]


def bits(result: dict) -> str:
    """For docs/quantize.md: what W2 and W4 took, greedy, in the first cell."""
    rows = next(rows for cell, rows in small(result).items() if cell.num_beams == 1)
    ours = {row["weight_bits"]: figure(row, "latency_ms_per_token") for row in rows if row["family"] == "ours"}
    return f"W2 took {ours[2]} ms a token and W4 {ours[4]}"


def command(result: dict) -> str:
    """The command whose cells and candidates these are."""
    axes = {axis: [] for axis in ("layers", "batch_size", "num_beams", "source_tokens", "new_tokens")}
    for cell in generate_view.by_cell(result["rows"]):
        for axis, values in axes.items():
            value = str(getattr(cell, axis))
            values += [] if value in values else [value]
    found = result["settings"]
    flags = [f"--layers {','.join(axes.pop('layers'))}", f"--bits {','.join(map(str, found['bits']))}"]
    flags += [f"--{axis} {','.join(values)}" for axis, values in axes.items()]
    if found["candidates"]:
        flags.append(f"--candidates {','.join(found['candidates'])}")
    flags += ["--process_memory"] if found.get("process_memory") else []
    flags.append(f"--seconds {result['protocol']['budget_s']:g}")
    return f"dqkernels bench generate {found['model']} {' '.join(flags)}"


def printed(result: dict) -> str:
    """The command and its screen, for docs/cli.md."""
    from rich.console import Console

    screen = io.StringIO()
    Console(file=screen, width=80, color_system=None, force_terminal=False).print(generate_view.render(result))
    asked = command(result)
    cut = asked.rindex(" ", 0, 92)
    lines = [
        f"$ {asked[:cut]} \\",
        f"    {asked[cut + 1 :]}",
        *(line.rstrip() for line in screen.getvalue().splitlines()),
    ]
    return "```\n" + "\n".join(lines).rstrip() + "\n```"


def layers(result: dict) -> str:
    """One layer from memory: how many times as fast as the float one everybody is, by shape; and who leads us."""
    shapes: dict[str, dict[str, float]] = {}
    for row in timed(result["rows"]):
        if row["cache"] == "cold":
            name = f"{row['tokens']} x {row['out_features']} x {row['in_features']}"
            shapes.setdefault(name, {})[row["candidate"]] = row["speedup_ratio"]
    names = list(dict.fromkeys(name for found in shapes.values() for name in found))
    mine = {name: name.removeprefix("dqkernels ").split()[0] + "A8" for name in names if name.startswith("dqkernels")}
    lines = [_line(["", *shapes]), "|---" * (len(shapes) + 1) + "|"]
    for name in names:
        title = f"**{mine[name]}**" if name in mine else spelled(name)
        lines.append(_line([title, *(f"{found[name]:.2f}" if name in found else "-" for found in shapes.values())]))
    words = []
    for name, title in mine.items():
        rivals = [one for one in names if one not in mine]
        wins = {one: sum(found.get(one, 0) > found[name] for found in shapes.values()) for one in rivals}
        ahead_ = [f"{spelled(one)} ({count})" for one, count in wins.items() if count]
        words.append(f"{title}: {', '.join(ahead_) or 'nobody'}")
    before = f"On {machine(result)}, {load(result)}; cold: weights out of memory, the input's quantizing inside."
    after = f"Ahead of ours, and in how many of the {len(shapes)} shapes: {'; '.join(words)}."
    return "\n".join([*_wrapped(before), "", *lines, "", *_wrapped(after)])


def batches(result: dict) -> str:
    """Tokens a second by batch and length, and how we stand to the fastest other: whole calls, and the encoder."""
    found = dict(sorted(cells_of(result).items(), key=lambda item: (item[0].source_tokens, item[0].batch_size)))
    names = [row["candidate"] for row in next(iter(found.values())) if row["family"] == "ours"]
    titles = {row["candidate"]: name_of(row) for rows in found.values() for row in rows}
    heads = ["texts x tokens, search", *(f"{titles[name]}, tokens/s" for name in names)]
    floats = [FLOAT] if FLOAT in titles else []
    heads += ["the fastest other, tokens/s", *(f"{titles[name]}, tokens/s" for name in floats)]
    heads += [f"{titles[name]}: {what}" for name in names for what in ("x of it", "its encoder")]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for cell, rows in found.items():
        other, first = best_other(rows), best_other(rows, "first_token_ms")
        line = [f"{cell.batch_size} x {cell.source_tokens}, {search_of(cell)}, n = {rows[0]['samples']}"]
        line += [figure(of(rows, name) or {}, "tokens_per_s") for name in names]
        line += [f"{figure(other, 'tokens_per_s')} ({name_of(other)})" if other else "-"]
        line += [figure(of(rows, name) or {}, "tokens_per_s") for name in floats]
        for name in names:
            row = of(rows, name) or {}
            line += [times(row, other), times(row, first, "first_token_ms")]
        lines.append(_line(line))
    model = result["settings"]["model"].replace("bart", "BART")
    said = (
        f"On {machine(result)}, {load(result)}; {model} of random weights, "
        f"{next(iter(found)).new_tokens} new tokens each. The encoder: by the time of a call with one new token, "
        "against the fastest other's there."
    )
    return "\n".join([*_wrapped(said), "", *lines])


#: Blocks by name. Those of one line stand within a line of their page.
BLOCKS: dict[str, Callable[[dict], str]] = {
    "readme": readme,
    "cells": cells,
    "bits": bits,
    "command": lambda result: f"`{command(result)}`",
    "printed": printed,
    "batches": lambda result: batches(record.read(BATCHES)),
    "older": lambda result: cells(record.read(OLDER)),
    "olderbatches": lambda result: batches(record.read(OLDER_BATCHES)),
    "layers": lambda result: layers(record.read(LAYERS)),
    "olderlayers": lambda result: layers(record.read(OLDER_LAYERS)),
}
#: The record of each, where it is not RESULT.
RECORDS = {
    "batches": BATCHES,
    "older": OLDER,
    "olderbatches": OLDER_BATCHES,
    "layers": LAYERS,
    "olderlayers": OLDER_LAYERS,
}
#: Where each stands.
PAGES = {
    "readme": "README.md",
    "cells": "docs/measured.md",
    "bits": "docs/quantize.md",
    "command": "docs/benchmark.md",
    "printed": "docs/cli.md",
    "batches": "docs/measured.md",
    "older": "docs/measured.md",
    "olderbatches": "docs/measured.md",
    "layers": "docs/measured.md",
    "olderlayers": "docs/measured.md",
}


def rendered(text: str, result: dict) -> str:
    """A page with its blocks made anew."""

    def made(match: re.Match) -> str:
        body = BLOCKS[match[2]](result)
        # A list or a table cell has no room for a line of its own.
        return f"{match[1]}{body}{match[4]}" if "\n" not in body else f"{match[1]}\n{body}\n{match[4]}"

    return _BLOCK.sub(made, text)


def stale(result: dict, root: Path = ROOT) -> list[str]:
    """What is missing in a page, or not what the record says."""
    found = []
    for name, page in PAGES.items():
        text = (root / page).read_text(encoding="utf-8")
        blocks = [match[0] for match in _BLOCK.finditer(text) if match[2] == name]
        if not blocks:
            found.append(f"{page} has lost its block {name!r}")
        elif any(rendered(block, result) != block for block in blocks):
            of_ = RECORDS.get(name, RESULT).name
            found.append(f"{page}, block {name!r}, is not that of {of_}: run python benchmarks/speed_view.py --write")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="into README.md and docs/")
    group.add_argument("--check", action="store_true", help="exit 1 if a page says something else")
    args = parser.parse_args(arguments)
    result = record.read(RESULT)
    if args.check:
        for line in stale(result):
            print(line)
        return 1 if stale(result) else 0
    for name, page in PAGES.items():
        if args.write:
            text = (ROOT / page).read_text(encoding="utf-8")
            (ROOT / page).write_text(rendered(text, result), encoding="utf-8")
        else:
            print(f"-- {page}: {name}\n{BLOCKS[name](result)}\n")
    if args.write:
        print(*(line for line in stale(result)), sep="\n", end="")
        return 1 if stale(result) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
