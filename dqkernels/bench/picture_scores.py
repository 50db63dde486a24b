"""Pictures of records of quality: scores against compression ratio (`quality`, the demo, the docstring experiment)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from dqkernels.bench.picture import NOT_NEGATIVE, Panel, Picture, Row, Series, counts, megabytes, rows_of
from dqkernels.bench.record import RecordError

#: Rows of the docstring experiment by the beginning of their names; the longest that fits counts.
FAMILIES = {
    "teacher": "float teacher",
    "ptq": "rounding alone",
    "quant-only": "quantization without a teacher",
    "dq-paper": "DQ, the paper's recipe",
    "dq-": "DQ, our recipe",
    "distill-only": "distillation alone (float)",
}
_SMALLER = "times smaller than the fp32 model (bytes of the written file)"


def of_demo(record: dict, machine: str) -> list[Picture]:
    """Pictures of demo.json: `score` against ratio with the lead as a level, `memory` of the files."""
    rows = rows_of(record)
    settings = Row(record.get("settings"), "settings")
    scored = settings.words("scored")
    lead = next((row.number("rougeL", NOT_NEGATIVE) for row in rows if row.data.get("name") == "lead"), None)
    files = [row for row in rows if "file_mb" in row]
    if not files:
        raise RecordError("rows have no 'file_mb': nothing was packed")
    series = []
    for row in files:
        name, score = row.text("name"), row.number("rougeL", NOT_NEGATIVE)
        ends = _ends(score, row.maybe("rougeL_gap_error", NOT_NEGATIVE))
        family = _of_bits(int(row.number("bits", 0)), "float" if name == "teacher" else "")
        if name.startswith("DQ-"):
            family = "trained"
        series.append(
            Series("", family, ((row.number("ratio", 0), score),), *ends, notes=(f"{name}  {score:.1f}",), lines=False)
        )
    panel = _scatter(
        f"ROUGE-L, {scored} held-out docstrings",
        series,
        () if lead is None else ((f"first 12 words: {lead:.1f}", lead),),
    )
    caption = (
        "W8, W4, W2: rounding alone. DQ-2: the same bytes as W2, distilled and quantized in training. Whiskers: one "
        "standard error, over the pairs, of the difference to the teacher.",
    )
    alt = "ROUGE-L against times smaller: " + ", ".join(
        f"{row.text('name')} {row.number('rougeL'):.1f}" for row in files
    )
    score = Picture("score", "Quality against size: the shipped demo model", (panel,), 1, caption, alt)
    sizes = []
    for row in files:
        name, size, ratio = row.text("name"), row.number("file_mb", 0), row.number("ratio", 0)
        note = f"{size:.2f} MB" + ("" if ratio == 1 else f"  ({ratio:.1f}x smaller)")
        sizes.append(Series(name, _of_bits(int(row.number("bits", 0))), ((name, size),), notes=(note,)))
    bars = Panel("bars", "", "file, MB (10⁶ bytes)", "", tuple(sizes))
    caption = ("Bytes of the written model.safetensors; teacher: 4 bytes a parameter.",)
    return [
        score,
        Picture("memory", "File sizes of the demo model", (bars,), 1, caption, "File sizes of the demo's models."),
    ]


def _of_bits(bits: int, otherwise: str = "") -> str:
    return otherwise or (f"ours {bits}" if bits in (8, 4, 2) else "float")


def _ends(score: float, error: float | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Whiskers of one error to each side, or none."""
    return ((), ()) if not error else ((score - error,), (score + error,))


def _scatter(y_label: str, series: Sequence[Series], levels: tuple = ()) -> Panel:
    places = [x for one in series for x, _ in one.points]
    ticks = tuple((float(x), f"{x}x") for x in (1, 2, 4, 8, 16, 32, 64) if min(places) / 1.5 <= x <= max(places) * 1.5)
    return Panel("lines", "", _SMALLER, y_label, tuple(series), ticks, x_log=True, levels=levels)


def of_quality(record: dict, machine: str) -> list[Picture]:
    """The picture of a `quality` record, `score`: against the ratio where rows have one, else a bar per row."""
    rows = [row for row in rows_of(record) if row.data.get("status", "scored") == "scored"]
    if not rows:
        return []
    key, word = ("bleu_score", "BLEU") if "bleu_score" in rows[0] else ("rougel_score", "ROUGE-L")
    settings = record["settings"]
    pairs = settings.get("scored")
    y_label = f"{word}, {pairs} pairs" if pairs is not None else word
    title = f"Quality of {settings.get('model', 'a model')} at fewer bits"
    sized = all("file_ratio" in row for row in rows)
    series = []
    for row in rows:
        name, score = row.text("name"), row.number(key, NOT_NEGATIVE)
        bits = int(row.number("weight_bits", 0))
        grouped = row.maybe("group_size") not in (None, -1)
        label = f"{name}, groups of {row.number('group_size'):g}" if grouped else name
        family = "trained" if row.data.get("origin") == "as given" else _of_bits(bits)
        ends = _ends(score, row.maybe("gap_error", NOT_NEGATIVE))
        if sized:
            note = (f"{label}  {score:.1f}",)
            series.append(Series("", family, ((row.number("file_ratio", 0), score),), *ends, notes=note, lines=False))
        else:
            series.append(Series(label, family, ((label, score),), *ends, notes=(f"{score:.1f}",)))
    if sized:
        panel = _scatter(y_label, series)
    else:
        panel = Panel("bars", "", y_label, "", tuple(series))
    caption = [
        settings["note"]
        if isinstance(settings.get("note"), str)
        else "Weights and embeddings at these bits, activations at 8; rounding alone."
    ]
    given = [row.text("name") for row in rows if row.data.get("origin") == "as given"]
    if given:
        caption.append(f"{', '.join(given)}: packed before, and scored as given.")
    if any(one.low for one in series):
        caption.append(
            f"Whiskers: one standard error, over the pairs, of the difference to the float model{_gap(settings)}."
        )
    alt = f"{word} by bits: " + ", ".join(f"{row.text('name')} {row.number(key):.1f}" for row in rows[:12])
    return [Picture("score", title, (panel,), 1, tuple(caption), alt)]


def _gap(settings: dict) -> str:
    return f" ({settings['gap']})" if isinstance(settings.get("gap"), str) else ""


def family(name: str) -> str:
    """The key of `FAMILIES` that a row of the experiment belongs to."""
    return max((key for key in FAMILIES if name.startswith(key)), key=len, default="ptq")


def of_docstrings(record: dict, machine: str) -> list[Picture]:
    """The picture of dq_docstrings.json, `score`: ROUGE-L against ratio, means over seeds."""
    groups: dict[str, list[Row]] = {}
    for run in rows_of(record, "runs"):
        if run.text("task") == "docstrings" and " lr " not in run.text("row"):  # the sweep is in the table
            groups.setdefault(run.text("row"), []).append(run)
    if "teacher" not in groups:
        raise RecordError("runs have no row 'teacher', and ratios need it")
    # Stored in 16 bits; ratios are to fp32, as the paper's.
    teacher = 2 * groups["teacher"][0].number("bytes", 0)
    points: dict[str, list[tuple]] = {}
    for name, runs in groups.items():
        scores = [run.number("rougeL", NOT_NEGATIVE) for run in runs]
        score = statistics.fmean(scores)
        gaps = [run.sub("gap_to_teacher").number("error", NOT_NEGATIVE) for run in runs if "gap_to_teacher" in run]
        error = statistics.stdev(scores) if len(runs) > 1 else statistics.fmean(gaps) if gaps else None
        first = runs[0]
        bits, layers = (
            int(first.number("weight_bits", 0)),
            (first.words("encoder_layers"), first.words("decoder_layers")),
        )
        note = ("" if bits == 16 else f"{bits} bit") + ("" if layers == ("3", "2") else f" {'-'.join(layers)}")
        points.setdefault(family(name), []).append((teacher / first.number("bytes", 0), score, error, note.strip()))
    # One label for the points of one width, which stand above each other: at the lowest.
    lowest = {}
    for found in points.values():
        for x, score, _, note in found:
            lowest[note] = min(lowest.get(note, (score, x)), (score, x))
    series = []
    for key, label in FAMILIES.items():
        found = sorted(points.get(key, ()))
        if found:
            series.append(
                Series(
                    label, f"recipe {key}", tuple((x, score) for x, score, *_ in found),
                    tuple(score - (error or 0) for _, score, error, _ in found),
                    tuple(score + (error or 0) for _, score, error, _ in found),
                    tuple(note if lowest[note] == (score, x) else "" for x, score, _, note in found), lines=False,
                )
            )  # fmt: skip
    tested = groups["teacher"][0].sub("test").words("scored")
    caption = (
        f"Means over seeds, {counts(len(runs) for runs in groups.values())}; {tested} docstrings that no model was "
        "trained on. Whiskers: one standard deviation over seeds; of one seed, one standard error, over the pairs, of "
        "the difference to the teacher.",
        f"The fp32 teacher: {megabytes(teacher)}.",
    )
    panel = _scatter("ROUGE-L", series)
    alt = "ROUGE-L of students against how many times smaller their files are than the fp32 teacher's."
    return [Picture("score", "Quality against size: what training with quantization gives", (panel,), 1, caption, alt)]
