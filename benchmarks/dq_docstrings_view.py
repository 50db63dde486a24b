"""The tables of `benchmarks/results/dq_docstrings.json`, for docs/training.md.

python benchmarks/dq_docstrings_view.py                 # the tables, on stdout
python benchmarks/dq_docstrings_view.py --write         # into docs/training.md, and its picture in docs/images
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pictures

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "dq_docstrings.json"
PAGE = HERE.parent / "docs" / "training.md"
BEGIN, END = "<!-- table: benchmarks/dq_docstrings_view.py -->", "<!-- end of table -->"


def of_task(record: dict[str, Any], task: str) -> dict[str, Any]:
    """The runs of one task, and what is missing of it."""
    mine = {key: [one for one in record[key] if one["task"] == task] for key in ("runs", "not_run")}
    return {**record, **mine}


def rows_of(record: dict[str, Any], score: str = "rougeL") -> list[dict[str, Any]]:
    """One dict per row of one task: means over seeds, standard deviation where there are several, bytes, ratio."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        groups.setdefault(run["row"], []).append(run)
    floats = [run for run in record["runs"] if run["row"].endswith("teacher")]
    if not floats:
        raise SystemExit("the teacher's row was not run, and ratios need it: dq_docstrings.py --only teacher")
    teacher = 2 * floats[0]["bytes"]  # stored in 16 bits; ratios are to fp32, as the paper's
    rows = []
    for name, runs in groups.items():
        first = runs[0]
        figures = [key for key in ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "words") if key in first]
        row = {key: statistics.fmean(run[key] for run in runs) for key in figures}
        row["score"] = row[score]
        row["validation"] = statistics.fmean(run[f"validation_{score}"] for run in runs)
        gaps = [run["gap_to_teacher"] for run in runs if run["gap_to_teacher"]]
        row["gap"] = statistics.fmean(gap["mean"] for gap in gaps) if gaps else None
        row["gap_error"] = statistics.fmean(gap["error"] for gap in gaps) if gaps else None
        row["spread"] = statistics.stdev(run[score] for run in runs) if len(runs) > 1 else None
        row |= {key: first[key] for key in ("bytes", "weight_bits", "encoder_layers", "decoder_layers", "steps")}
        rows.append({"row": name, "seeds": len(runs), "ratio": teacher / first["bytes"], **row})
    return rows


#: Heads of the figures of a task, the one that rows are compared by last.
TASKS = {"docstrings": {"rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L"}, "en-ro": {"chrf": "chrF", "bleu": "BLEU"}}


def table(record: dict[str, Any], task: str) -> str:
    """Markdown of one task, at most 100 columns but for the names that were not run."""
    figures = TASKS[task]
    score = list(figures)[-1]
    heads = ["row", "bits", "layers", "MB", "ratio", *figures.values(), "gap", "val.", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows_of(of_task(record, task), score):
        found = [f"{row[key]:.2f}" for key in figures]
        found[-1] += "" if row["spread"] is None else f" ± {row['spread']:.2f}"
        bits = "float" if row["weight_bits"] == 16 else f"{row['weight_bits']}-{row['weight_bits']}-8"
        cells = [row["row"], bits, f"{row['encoder_layers']}-{row['decoder_layers']}", f"{row['bytes'] / 1e6:.2f}"]
        gap = "-" if row["gap"] is None else f"{row['gap']:+.2f} ± {row['gap_error']:.2f}"
        cells += [f"{row['ratio']:.1f}x", *found, gap, f"{row['validation']:.2f}", str(row["seeds"])]
        lines.append("| " + " | ".join(cells) + " |")
    missing: dict[str, list[str]] = {}
    for one in of_task(record, task)["not_run"]:
        missing.setdefault(one["row"], []).append(str(one["seed"]))
    if missing:
        names = "; ".join(f"{name} (seed {', '.join(seeds)})" for name, seeds in missing.items())
        lines += ["", f"Not run: {names}."]
    return "\n".join(lines)


def tables(record: dict[str, Any]) -> str:
    """Both tasks: a table where the teacher was run, else the names of its rows."""
    ready = [task for task in TASKS if any(r["row"].endswith("teacher") for r in of_task(record, task)["runs"])]
    shown = [table(record, task) for task in ready]
    for task in TASKS:
        if task not in ready:
            names = ", ".join(dict.fromkeys(one["row"] for one in of_task(record, task)["not_run"]))
            shown.append(f"Not run, as its teacher was not: {names}.")
    return "\n\n".join(shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", default=str(RESULT))
    parser.add_argument("--write", action="store_true", help="into docs/training.md; draws docs/images")
    args = parser.parse_args()
    record = json.loads(Path(args.result).read_text())
    text = tables(record)
    if not args.write:
        print(text)
        return 0
    page = PAGE.read_text()
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{PAGE.name} has lost the lines {BEGIN!r} and {END!r} that hold the table")
    head, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    pictures.main([])
    return 0


if __name__ == "__main__":
    sys.exit(main())
