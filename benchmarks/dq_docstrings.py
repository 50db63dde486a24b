"""The paper's experiment on data that every machine has: distil and quantize the demo's teacher, and score it.

Docstrings: the body is the source, its first sentence the target, the teacher is the shipped demo model. Rows that
begin with `en-ro` translate program messages, with a teacher trained here (dq_docstrings_tasks.py). Each row is a
recipe, each run a seed of it. A run writes one JSON into `--runs`, and what is there is not run again, so that the
table grows over several calls; a run that was killed goes on from its last checkpoint; rows that were not reached are
listed as `not run`. At the end (and with --collect alone) all runs become `benchmarks/results/dq_docstrings.json`.

    python benchmarks/dq_docstrings.py --list
    python benchmarks/dq_docstrings.py --minutes 60
    python benchmarks/dq_docstrings.py --only dq-2,dq-paper-2 --seeds 0
    python benchmarks/dq_docstrings.py --collect
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import dq_docstrings_tasks as tasks

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).resolve().parent
RUNS = HERE / "results" / "dq_docstrings"
RESULT = HERE / "results" / "dq_docstrings.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqkernels" / "evidence"
VERSION = 1


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the row and of its files.
        shows: what a reader learns from it.
        preset: a recipe of dqkernels.train.presets; `float`: no training, the model as it is.
        bits: of weights and embeddings; 16: float.
        layers: encoder and decoder layers kept; the teacher has 3 and 2.
        seeds: how many of 0, 1, 2 are run.
        rules: changes of DQConfig.
        kd: changes of the preset's KDConfig.
        learned_scale, learning_rate: other than the preset's.
        data: `gold`, `teacher`, or stages of them: `teacher,gold`.
        arguments: changes of the preset's training arguments.
        task: `docstrings` or `en-ro`.
        steps: times `--steps` that it trains.
    """

    name: str
    shows: str
    preset: str
    bits: int
    layers: tuple[int, int] = (3, 2)
    seeds: int = 1
    rules: dict[str, Any] = field(default_factory=dict)
    kd: dict[str, Any] = field(default_factory=dict)
    learned_scale: bool | None = None
    learning_rate: float | None = None
    data: str = "gold"
    arguments: dict[str, Any] = field(default_factory=dict)
    task: str = "docstrings"
    steps: int = 1


#: Learning rates of runs this short: the best of SWEEP by the validation score, for each recipe. Rows with "lr" in
#: their name are the sweep's others.
OURS = PAPERS = 2e-4
SWEEP = (2e-3, 1e-3, 5e-4, 2e-4, 3e-5)

# Headline rows first: a call that runs out of time has run the most telling ones.
ROWS = (
    Row("teacher", "the shipped float model", "float", 16),
    Row("ptq-8", "rounding alone", "float", 8),
    Row("ptq-4", "rounding alone", "float", 4),
    Row("ptq-2", "rounding alone", "float", 2),
    Row("dq-2", "our recipe", "dq-bart-plus", 2, seeds=3, learning_rate=OURS),
    Row("dq-paper-2", "the paper's rules and losses, head quantized", "dq-bart", 2, seeds=3, learning_rate=PAPERS),
    Row("quant-only-2", "our rules, task loss alone", "quant-only", 2, seeds=3, learning_rate=OURS),
    Row("dq-8", "our recipe", "dq-bart-plus", 8, seeds=3, learning_rate=OURS),
    Row("dq-4", "our recipe", "dq-bart-plus", 4, seeds=3, learning_rate=OURS),
    Row("distill-only", "a float student of all layers", "distill-only", 16,
        seeds=3, learning_rate=OURS, arguments={"max_grad_norm": 1.0}),
    Row("dq-2 3-1", "our recipe, one decoder layer", "dq-bart-plus", 2, (3, 1), seeds=3, learning_rate=OURS),
    Row("distill-only 3-1", "a float student of one decoder layer", "distill-only", 16, (3, 1), seeds=3,
        learning_rate=OURS, arguments={"max_grad_norm": 1.0}),
    Row("en-ro teacher", "a float model of program messages", "sft", 16, learning_rate=1e-3, task="en-ro", steps=8,
        arguments={"warmup_steps": 0.05, "weight_decay": 0.01}),
    Row("en-ro ptq-2", "rounding alone", "float", 2, task="en-ro"),
    Row("en-ro dq-2", "our recipe", "dq-bart-plus", 2, learning_rate=OURS, task="en-ro"),
    Row("en-ro dq-paper-2", "the paper's rules and losses, head quantized", "dq-bart", 2, learning_rate=PAPERS,
        task="en-ro"),
    Row("en-ro quant-only-2", "our rules, task loss alone", "quant-only", 2, learning_rate=OURS, task="en-ro"),
    Row("en-ro dq-8", "our recipe", "dq-bart-plus", 8, learning_rate=OURS, task="en-ro"),
    *(Row(f"{name} lr {rate:g}", "learning rate", preset, 2, learning_rate=rate)
      for rate in SWEEP
      for name, preset, chosen in (("dq-paper-2", "dq-bart", PAPERS), ("dq-2", "dq-bart-plus", OURS))
      if rate != chosen),
    Row("quant-only-2 lr 0.001", "learning rate", "quant-only", 2, learning_rate=1e-3),
    Row("dq-8 lr 0.001", "learning rate", "dq-bart-plus", 8, learning_rate=1e-3),
    Row("distill-only lr 0.001", "learning rate", "distill-only", 16, learning_rate=1e-3,
        arguments={"max_grad_norm": 1.0}),
    Row("dq-2 4x", "our recipe, four times the steps", "dq-bart-plus", 2, learning_rate=OURS, steps=4),
    Row("dq-2 4x lr 0.001", "learning rate", "dq-bart-plus", 2, learning_rate=1e-3, steps=4),
    Row("dq-paper-2 clipped", "the paper's, gradients clipped at 1", "dq-bart", 2, learning_rate=PAPERS,
        arguments={"max_grad_norm": 1.0}),
    Row("dq-2 per_tensor", "one scale per matrix instead of per channel", "dq-bart-plus", 2,
        rules={"weight_granularity": "per_tensor"}, learning_rate=OURS),
    Row("quant-only-paper-2", "the paper's rules, task loss alone", "dq-bart", 2, learning_rate=PAPERS,
        kd={"logits": 0.0, "hidden": 0.0, "attention": 0.0, "encoder_last_hidden": 0.0}),
    Row("dq-paper-8", "the paper's rules and losses", "dq-bart", 8, learning_rate=PAPERS),
    Row("quant-only-8", "our rules, task loss alone", "quant-only", 8, learning_rate=OURS),
    Row("quant-only-4", "our rules, task loss alone", "quant-only", 4, learning_rate=OURS),
    Row("dq-2 fixed", "four levels found anew at every step, not learned", "dq-bart-plus", 2, learned_scale=False,
        learning_rate=OURS),
    Row("dq-2 ternary", "ternary per channel instead of four levels", "dq-bart-plus", 2,
        rules={"weight_quantizer": "ternary", "embedding_quantizer": "ternary"}, learned_scale=False,
        learning_rate=OURS),
    Row("dq-2 mse", "MSE of logits instead of KL", "dq-bart-plus", 2, kd={"logits_loss": "mse"}, learning_rate=OURS),
    Row("dq-2 logits", "no hidden and attention terms", "dq-bart-plus", 2, kd={"hidden": 0.0, "attention": 0.0},
        learning_rate=OURS),
    Row("dq-8 3-1", "our recipe, one decoder layer", "dq-bart-plus", 8, (3, 1), learning_rate=OURS),
    Row("dq-4 3-1", "our recipe, one decoder layer", "dq-bart-plus", 4, (3, 1), learning_rate=OURS),
    Row("dq-2 1-1", "our recipe, one layer each", "dq-bart-plus", 2, (1, 1), learning_rate=OURS),
    Row("dq-2 seq-kd", "the teacher's texts instead of gold", "dq-bart-plus", 2, data="teacher", learning_rate=OURS),
    Row("dq-2 seq-kd, gold", "the teacher's texts first (QuillBot)", "dq-bart-plus", 2, data="teacher,gold",
        learning_rate=OURS),
    Row("dq-2 gold, seq-kd", "the reverse", "dq-bart-plus", 2, data="gold,teacher", learning_rate=OURS),
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="show rows and runs, and which are done")
    add("--collect", action="store_true", help="only write the result file from the runs that are there")
    add("--only", default="", help="names of rows, comma-separated (default: all, headline rows first)")
    add("--seeds", default="", help="seeds, comma-separated (default: as many as each row has)")
    add("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    add("--steps", type=int, default=400, help="optimizer steps of a run (default 400)")
    add("--batch", type=int, default=32, help="pairs per step (default 32)")
    add("--runs", default=str(RUNS), help="folder of one JSON per run")
    add("--out", default=str(RESULT), help="file of all runs")
    add("--keep", default=None, metavar="DIR", help="also keep the packed model of every run there, with its record")
    add("--teachers", default=str(CACHE), metavar="DIR", help="where the en-ro teacher is kept once it is trained")
    add(
        "--unfinished", default=str(CACHE / "unfinished"), metavar="DIR", help="of checkpoints, until their run is done"
    )
    add("--save_steps", type=int, default=100, help="steps from checkpoint to checkpoint (default 100)")
    add(
        "--rescore", default=None, metavar="DIR", help="only score the models kept there (--keep) on the pairs of today"
    )
    add("--threads", type=int, default=2)
    add("--test_pairs", type=int, default=tasks.TEST_PAIRS)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------- runs


class Evidence:
    """What all runs share: the tasks, each made when a row first needs it."""

    def __init__(self, args):
        import torch

        from dqkernels.environment import keep_freed_memory

        keep_freed_memory()
        self.args = args
        torch.set_num_threads(args.threads)

    @cached_property
    def docstrings(self) -> tasks.Docstrings:
        return tasks.Docstrings(self.args.test_pairs)

    @cached_property
    def catalogues(self) -> tasks.Catalogues:
        """English-Romanian, with its teacher: the row `en-ro teacher` is trained first where it is not here."""
        from transformers import set_seed

        task = tasks.Catalogues(Path(self.args.teachers), self.args.test_pairs)
        if not (task.folder / "model.safetensors").is_file():
            row = next(row for row in ROWS if row.name == "en-ro teacher")
            print(f"{row.name}: training it in {task.folder}", flush=True)
            task.folder.parent.mkdir(parents=True, exist_ok=True)
            with tasks.unfinished(self.args, slug(row), 0, row, task.data_sha256) as folder:
                set_seed(0)  # the embeddings it starts with are drawn
                student, facts = fit(self.args, task, row, 0, folder, None, task.start())
                done = folder / "teacher"
                student.eval().half().save_pretrained(done)
                task.tokenizer.save_pretrained(done)
                (done / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
                fresh = task.folder.with_name(f".{task.folder.name}-{os.getpid()}")
                shutil.copytree(done, fresh)  # the cache may lie on another disk: whole there, then renamed
                fresh.rename(task.folder)
            del task.tokenizer  # from the folder from now on, as every later call has it
        return task

    def task(self, row: Row) -> tasks.Task:
        return self.catalogues if row.task == "en-ro" else self.docstrings


def train(evidence: Evidence, row: Row, seed: int, folder: Path):
    """Trains one student; returns (packed or float model, facts) and leaves its files in `folder`."""
    import dataclasses

    import torch
    from transformers import set_seed

    import dqkernels
    from dqkernels.train import PRESETS, export, make_student, prepare_qat

    task = evidence.task(row)
    teacher = task.teacher()
    if row.bits == 16 and row.layers == (3, 2) and row.preset in ("float", "sft"):  # a teacher, trained already
        teacher.half().save_pretrained(folder / "model")
        note = task.folder / "training.json"
        return teacher.float(), json.loads(note.read_text()) if note.is_file() else {}
    if row.preset == "float":
        config = dqkernels.DQConfig(weight_bits=row.bits, embedding_bits=row.bits, attention="int8")
        dqkernels.quantize_(teacher.half(), config).save_pretrained(folder / "model")
        return dqkernels.load(folder / "model", dtype="float32"), {"quantization": config.to_dict()}
    preset = PRESETS[row.preset]
    set_seed(seed)
    student = make_student(teacher, *row.layers)
    learned = False
    if preset.quantize is not None:
        config = dataclasses.replace(preset.quantize(row.bits, row.bits), **row.rules)
        learned = preset.learned_scale if row.learned_scale is None else row.learned_scale
        prepare_qat(student, config, learned)
    student, facts = fit(evidence.args, task, row, seed, folder, teacher, student)
    facts["learned_scale"] = learned
    student.eval()
    if preset.quantize is not None:
        export(student, folder / "model", dtype=torch.float16)
        model = dqkernels.load(folder / "model", dtype="float32")
        facts["quantization"] = model.config.quantization_config.to_dict()
        return model, facts
    student.half().save_pretrained(folder / "model")
    return student.float(), facts


def fit(args, task: tasks.Task, row: Row, seed: int, folder: Path, teacher, student):
    """The steps of one row on `student`, in the stages of `row.data`; returns it with what the record says of them.

    Goes on from the newest checkpoint in `folder`; `train_seconds` counts what led to it, and not what a kill lost.
    """
    import dataclasses

    import torch
    from transformers import Seq2SeqTrainingArguments

    from dqkernels.data import prepare
    from dqkernels.train import PRESETS, DistillationTrainer, checkpoints

    preset = PRESETS[row.preset]
    kd = dataclasses.replace(preset.kd, **row.kd)
    rate = row.learning_rate or preset.arguments["learning_rate"]
    kinds = row.data.split(",")
    facts: dict[str, Any] = {"kd": str(kd), "learning_rate": rate, "losses": []}
    clock = tasks.stopwatch()
    for number, kind in enumerate(kinds):
        stage = folder / f"stage-{number}"
        settings = {name: value for name, value in preset.arguments.items() if name != "num_train_epochs"}
        settings |= {
            "learning_rate": rate,
            "max_steps": args.steps * row.steps // len(kinds),
            "per_device_train_batch_size": args.batch,
            "gradient_accumulation_steps": 1,
            "seed": seed,
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "steps",
            "save_steps": args.save_steps,
            "save_total_limit": 1,
            "logging_steps": 25,
            "report_to": "none",
            "disable_tqdm": True,
            "train_sampling_strategy": "group_by_length",
            **row.arguments,
        }
        trainer = DistillationTrainer(
            model=student,
            teacher=teacher if kd.needs_teacher else None,
            kd=kd,
            args=Seq2SeqTrainingArguments(output_dir=str(stage), **settings),
            train_dataset=task.rows(kind),
            data_collator=prepare.collator(task.tokenizer, model=student, pad_to_multiple_of=8),
            processing_class=task.tokenizer,
            callbacks=[clock],
        )
        last, _ = checkpoints.newest(stage) if stage.is_dir() else (None, {})
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        facts["losses"] += [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    facts["train_seconds"] = round(clock.seconds(), 1)
    return student, facts


def run(evidence: Evidence, row: Row, seed: int, folder: Path) -> dict[str, Any]:
    """One run as it stands in the result file."""
    from dqkernels.bench import record

    task = evidence.task(row)
    model, facts = train(evidence, row, seed, folder)
    size = sum(path.stat().st_size for path in folder.glob("model/*.safetensors"))
    kept = Path(evidence.args.keep) / f"{slug(row)}-s{seed}" if evidence.args.keep else None
    if kept is not None:
        shutil.copytree(folder / "model", kept, dirs_exist_ok=True)
    scores = scored(task, model)
    trained = row.preset != "float"
    found = {
        "schema_version": VERSION,
        "row": row.name,
        "task": row.task,
        "recipe": {key: value for key, value in asdict(row).items() if key not in ("name", "seeds", "shows")},
        "weight_bits": row.bits,
        "embedding_bits": row.bits,
        "encoder_layers": row.layers[0],
        "decoder_layers": row.layers[1],
        "seed": seed,
        **scores,
        "bytes": size,
        "steps": evidence.args.steps * row.steps if trained else 0,
        "batch": evidence.args.batch if trained else 0,
        "train": {"pairs": len(task.train), "sha256": task.data_sha256},
        **facts,
        "machine": record.environment(),
    }
    if kept is not None:
        (kept / "recipe.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def scored(task: tasks.Task, model) -> dict[str, Any]:
    """What a record says of the scores: of the test pairs, and of validation, by which learning rates are chosen."""
    started = time.monotonic()
    found = task.score(model, task.test)
    validation = task.score(model, task.validation)[task.score_name]
    return {
        **found,
        f"validation_{task.score_name}": validation,
        "validation_pairs": len(task.validation),
        "score_seconds": round(time.monotonic() - started, 1),
        "test": task.facts,
    }


def rescore(evidence: Evidence, todo: list[tuple[Row, int]], kept: Path) -> None:
    """Scores kept models again where the record is of fewer pairs; what was trained stays."""
    from transformers import AutoModelForSeq2SeqLM

    import dqkernels
    from dqkernels.bench import record

    for row, seed in todo:
        path, folder = Path(evidence.args.runs) / f"{slug(row)}-s{seed}.json", kept / f"{slug(row)}-s{seed}"
        if not path.is_file() or not (folder / "config.json").is_file():
            continue
        found, task = json.loads(path.read_text()), evidence.task(row)
        if found["test"]["scored"] == len(task.test) and "by_pair" in found:
            continue
        packed = "quantization_config" in json.loads((folder / "config.json").read_text())
        load = dqkernels.load if packed else AutoModelForSeq2SeqLM.from_pretrained
        found |= scored(task, load(folder, dtype="float32").eval())
        found["scored_again_at"] = record.environment()["git_commit"]
        write(path, found)
        (folder / "recipe.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{row.name:20} seed {seed}  {task.score_name} {found[task.score_name]:.2f}  scored again", flush=True)


def write(path: Path, found: dict[str, Any]) -> None:
    """A run, or all of them. What does not keep evidence.schema.json is put beside its place, not lost."""
    from dqkernels.bench import schemas
    from dqkernels.serialize import atomic_write

    text = (json.dumps(found, indent=1) + "\n").encode()
    try:
        schemas.check(json.loads(text), "evidence" if "runs" in found else "evidence run")  # as it is read: lists
    except schemas.RecordError as error:
        atomic_write(path.with_suffix(".refused"), text)
        raise SystemExit(f"{path.name} does not keep its schema, see {path.stem}.refused: {error}") from None
    atomic_write(path, text)


def slug(row: Row) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in row.name)


def wanted(args) -> list[tuple[Row, int]]:
    """The runs asked for: seed 0 of every row first within headline rows and others."""
    names = [name.strip() for name in args.only.split(",") if name.strip()]
    if unknown := set(names) - {row.name for row in ROWS}:
        raise SystemExit(f"no such row: {sorted(unknown)[0]!r}; --list shows them")
    rows = [row for row in ROWS if not names or row.name in names]
    seeds = [int(seed) for seed in args.seeds.split(",") if seed.strip()]
    most = max(row.seeds for row in rows)
    order = seeds or range(most)
    return [(row, seed) for seed in order for row in rows if seeds or seed < row.seeds]


def collect(args) -> dict[str, Any]:
    """All runs in the order of ROWS with their distance from the teacher, and what was not run.

    Raises SystemExit where runs do not agree in what must be one in a table: steps, rates, and pairs.
    """
    folder = Path(args.runs)
    runs, missing = [], []
    teachers: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        for seed in range(row.seeds):
            path = folder / f"{slug(row)}-s{seed}.json"
            if not path.is_file():
                missing.append({"row": row.name, "task": row.task, "seed": seed, "status": "not run"})
                continue
            found = json.loads(path.read_text())
            if row.name.endswith("teacher"):
                teachers[row.task] = found
            teacher = teachers.get(row.task, found)
            wanted = {"pairs": len(teacher["by_pair"].split())}
            if row.preset not in ("float", "sft"):
                wanted |= {"steps": args.steps * row.steps, "batch": args.batch, "learning_rate": row.learning_rate}
            has = {**found, "pairs": len(found["by_pair"].split())}
            if other := {key: has[key] for key in wanted if has[key] != wanted[key]}:
                raise SystemExit(f"{path.name} was run with {other}, not {wanted}: runs of one table must agree")
            gap = None if found is teacher else difference(found["by_pair"], teacher["by_pair"])
            rest = {key: value for key, value in found.items() if key != "by_pair"}
            runs.append({"task": row.task, **rest, "gap_to_teacher": gap, "shows": row.shows})
    return {"schema_version": VERSION, "runs": runs, "not_run": missing}


def difference(ours: str, teachers: str) -> dict[str, float]:
    """Mean of score less the teacher's, pair by pair, and its standard error over the pairs."""
    gaps = [float(a) - float(b) for a, b in zip(ours.split(), teachers.split(), strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return {"mean": round(statistics.fmean(gaps), 3), "error": round(error, 3), "pairs": len(gaps)}


def main() -> int:
    args = parse()
    folder = Path(args.runs)
    folder.mkdir(parents=True, exist_ok=True)
    todo = wanted(args)
    if args.list:
        for row, seed in todo:
            done = (folder / f"{slug(row)}-s{seed}.json").is_file()
            print(f"{'done' if done else 'not run':8} {row.name:20} seed {seed}  {row.shows}")
        return 0
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    started = time.monotonic()
    evidence = Evidence(args) if args.rescore else None
    if args.rescore:
        rescore(evidence, todo, Path(args.rescore))
    for row, seed in () if args.collect or args.rescore else todo:
        path = folder / f"{slug(row)}-s{seed}.json"
        if path.is_file():
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print(f"time is up: {row.name} seed {seed} and what follows is not run", flush=True)
            break
        evidence = evidence or Evidence(args)
        begun = time.monotonic()
        data = evidence.task(row).data_sha256
        with tasks.unfinished(args, slug(row), seed, row, data) as working:
            found = run(evidence, row, seed, working)
            write(path, found)
        took, name = time.monotonic() - begun, evidence.task(row).score_name
        print(f"{row.name:20} seed {seed}  {name} {found[name]:.2f}  {found['bytes']} bytes  {took:.0f} s", flush=True)
    write(Path(args.out), collect(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
