"""`dqkernels demo`: the shipped teacher, packed at 8, 4 and 2 bits, on docstrings it has never seen. Offline.

What is scored is what a user gets: each packed model is saved through `save_pretrained`, loaded again through
transformers' Auto class, and that one is run. Nothing is trained here: W8, W4 and W2 show what rounding alone does, and
the row DQ-2 is a student of 2 bits that `dqkernels train` made of the same teacher, shipped packed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqkernels.bench import record
from dqkernels.data import docstrings

#: Names of the output files.
JSON_FILE, PNG_FILE = "demo.json", "demo.png"
BITS = (8, 4, 2)
#: The row of the shipped student.
STUDENT = "DQ-2"
#: Texts a batch holds: enough to keep two cores busy, few enough for a laptop's memory with four beams.
BATCH_SIZE = 64
#: Speed: so many tokens for each of so many texts, and rounds until one of the limits is reached.
SPEED_TOKENS, SPEED_TEXTS, SPEED_ROUNDS, SPEED_SECONDS = 24, 3, 9, 8.0
MB = 1e6


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what is missing."""


def run(
    out_dir: str | os.PathLike[str] = ".",
    samples: int = 3,
    pairs: int = 320,
    seed: int = 0,
    bits: Sequence[int] = BITS,
    *,
    teacher: str | os.PathLike[str] | None = None,
    console=None,
) -> dict[str, Any]:
    """Runs the demo, writes demo.json and demo.png into `out_dir`, and returns what demo.json holds.

    Args:
        out_dir: folder of the two files; made if needed. Each is written whole or not at all.
        samples: docstrings shown side by side; the first ones of the draw, not picked.
        pairs: held-out docstrings to score; all there are, where there are fewer.
        seed: which pairs are drawn.
        bits: widths to pack at, weights and embeddings alike.
        teacher: a model folder with `seen.npy`; default the one that is shipped, with its student.
        console: a rich console for what people read; default stdout.

    Raises:
        DemoError: if the teacher is not in this installation, or no held-out docstring is installed.
        ValueError: for `bits`, `samples` or `pairs` out of range.
    """
    bits = check_arguments(samples, pairs, bits)
    out = check_out(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from dqkernels.bench import demo_view as view

    started = time.monotonic()
    show = view.Shower(console)
    folder = teacher_folder() if teacher is None else Path(teacher)
    drawn, counts = draw_pairs(folder, pairs, seed)
    show.data(counts, pairs)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Floats are computed in float32: most CPUs have no fast 16-bit arithmetic, and the files are what is
    # compared.
    models = {"teacher": AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()}
    parameters = sum(p.numel() for p in models["teacher"].parameters())
    teacher_bytes = 4 * parameters
    rows = {"lead": _row("lead"), "teacher": _row("teacher", 32, teacher_bytes, teacher_bytes, "torch float32")}
    show.teacher(parameters, teacher_bytes)
    with tempfile.TemporaryDirectory(prefix="dqkernels-demo-") as scratch:
        for width in bits:
            name = f"W{width}"
            models[name], file_bytes = pack(folder, width, Path(scratch, name))
            kernel = kernel_of(models[name])
            rows[name] = _row(name, width, file_bytes, teacher_bytes, kernel)
            show.packed(rows[name])
        if teacher is None:
            models[STUDENT], file_bytes = load_student()
            rows[STUDENT] = _row(STUDENT, 2, file_bytes, teacher_bytes, kernel_of(models[STUDENT]))
            show.packed(rows[STUDENT], "as shipped")
        texts = {"lead": [docstrings.lead(pair.body) for pair in drawn]}
        for name, model in models.items():
            with show.scoring(name, len(drawn)) as advance:
                texts[name] = write_texts(model, tokenizer, drawn, advance)
        heads = [pair.head for pair in drawn]
        for name in rows:
            rows[name].update(score(texts[name], heads))
        for name in models:
            if name != "teacher":
                rows[name].update(difference(texts[name], texts["teacher"], heads))
        show.samples(drawn[:samples], texts)
        with show.timing():
            for name, milliseconds in speed(models, tokenizer, drawn).items():
                rows[name]["ms_per_token"] = milliseconds
    result = {
        "schema_version": 1,
        "environment": record.environment(),
        "settings": {
            "bits": list(bits),
            "seed": seed,
            "teacher_parameters": parameters,
            "teacher_training": training_note(folder),
            "student_training": student_note() if teacher is None else None,
            "decoding": _decoding(models["teacher"]),
            "float_dtype": "float32",
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "speed": f"greedy, batch 1, {SPEED_TOKENS} new tokens, encoder included; interleaved, median",
            "ratio": "4 bytes x teacher parameters / bytes of the written model.safetensors",
            **counts,
        },
        "seconds": round(time.monotonic() - started, 1),
        "rows": list(rows.values()),
        "samples": [
            {
                "module": pair.module,
                "qualname": pair.qualname,
                "body": pair.body,
                "reference": pair.head,
                **{name: texts[name][i] for name in rows},
            }
            for i, pair in enumerate(drawn)
        ],
    }
    show.table(result)
    write(out, result)
    show.written(out / JSON_FILE, out / PNG_FILE, result["seconds"])
    return result


# ---- the parts ----------------------------------------------------------------------------


def check_arguments(samples: int, pairs: int, bits: Sequence[int]) -> tuple[int, ...]:
    """`bits` as a tuple; ValueErrors for what makes no sense."""
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if not bits or any(b not in BITS for b in bits) or len(set(bits)) != len(bits):
        raise ValueError(f"bits must be distinct values of {list(BITS)}, got {list(bits)}")
    return tuple(bits)


def check_out(out_dir: str | os.PathLike[str]) -> Path:
    """The output folder; a ValueError where it cannot be one."""
    out = Path(out_dir)
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"out must be a folder, {str(place)!r} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"out must be a folder that can be written to, {str(place)!r} cannot")
    return out


def teacher_folder() -> Path:
    """The shipped teacher.

    Raises:
        DemoError: if this installation has none.
    """
    folder = Path(docstrings.__file__).parent / "docstring_teacher"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "seen.npy"):
        if not (folder / name).is_file():
            raise DemoError(
                f"the demo's teacher is not complete in this installation ({folder.name}/{name} is missing): "
                "install dqkernels again, or train one with benchmarks/train_demo_teacher.py"
            )
    return folder


def student_folder() -> Path:
    """The shipped student: packed, with the teacher's tokenizer.

    Raises:
        DemoError: if this installation has none.
    """
    folder = Path(docstrings.__file__).parent / "docstring_student"
    for name in ("config.json", "model.safetensors", "recipe.json"):
        if not (folder / name).is_file():
            raise DemoError(
                f"the demo's student is not complete in this installation ({folder.name}/{name} is missing): "
                "install dqkernels again, or train one with benchmarks/dq_docstrings.py"
            )
    return folder


def draw_pairs(folder: Path, pairs: int, seed: int) -> tuple[list[docstrings.DocPair], dict[str, Any]]:
    """A sample of the installed packages' test split without what the teacher has seen, and how many there
    were.

    The packages are those that reported scores are measured on, so that two machines differ in versions only;
    where they have too few pairs, all that is installed.
    """
    import numpy as np

    seen = np.load(folder / "seen.npy", allow_pickle=False)
    source = "standard library, torch, transformers and what dqkernels requires"
    mined = docstrings.mine(split="test", packages=docstrings.packages_of())
    kept = docstrings.held_out(mined, seen)
    if len(kept) < pairs:
        source = "all installed packages"
        mined = docstrings.mine(split="test")
        kept = docstrings.held_out(mined, seen)
    if not kept:
        raise DemoError("no docstring of an installed package is left that the teacher has not seen")
    # By hash and not by a generator: the draw of one seed survives a package that comes or goes.
    kept.sort(key=lambda p: hashlib.sha256(f"{seed}:{p.module}:{p.qualname}".encode()).digest())
    drawn = kept[:pairs]
    return drawn, {"source": source, "mined": len(mined), "held_out": len(kept), "scored": len(drawn)}


def pack(teacher: str | os.PathLike[str], bits: int, folder: Path, config: dict[str, Any] | None = None):
    """The teacher at `bits` (or by other fields of a DQConfig), saved into `folder` and loaded again in float32; and
    the bytes of its safetensors files."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    import dqkernels

    model = AutoModelForSeq2SeqLM.from_pretrained(teacher, dtype=torch.float16)
    dqkernels.quantize_(model, dqkernels.DQConfig(**(config or {"weight_bits": bits, "embedding_bits": bits})))
    model.save_pretrained(folder)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    return loaded, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def load_student():
    """The shipped student and the bytes of its model.safetensors."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    folder = student_folder()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    return loaded, (folder / "model.safetensors").stat().st_size


def student_note() -> str:
    """How the shipped student was made, from the record beside it."""
    made = json.loads((student_folder() / "recipe.json").read_text(encoding="utf-8"))
    attention = ", int8 attention too" if made["quantization"]["attention"] == "int8" else ""
    return (
        f"{STUDENT}: the teacher's {made['encoder_layers']}+{made['decoder_layers']} layers at "
        f"{made['weight_bits']} bits, trained with distillation and quantization (preset "
        f"{made['recipe']['preset']}, {made['steps']:,} steps of {made['batch']} pairs){attention}."
    )


def training_note(folder: Path) -> str | None:
    """What a reader of the table must know of the teacher's training: whether it has met quantization."""
    try:
        arguments = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["arguments"]
        phase = float(arguments.get("quant_phase", 0))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if phase <= 0:
        return "The teacher was trained in float, without a thought of quantization."
    return (
        f"In the last {100 * phase:.0f}% of the teacher's training every second step saw its linear weights "
        "rounded to 4 bits; no other quantization."
    )


def kernel_of(model) -> str:
    """The kernels that run the packed linear layers here: usually one name."""
    from dqkernels.nn import QLinear

    names = {module.kernel().partition(" (")[0] for module in model.modules() if isinstance(module, QLinear)}
    return ", ".join(sorted(names))


def write_texts(model, tokenizer, drawn: Sequence[docstrings.DocPair], advance) -> list[str]:
    """What a model writes for each body, decoded as its generation_config says."""
    from dqkernels.text import generate_texts

    bodies = [pair.body for pair in drawn]
    return generate_texts(model, tokenizer, bodies, batch_size=BATCH_SIZE, progress=advance, warn_cut=False)


def score(texts: Sequence[str], heads: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, 2 and L, rounded as they are shown."""
    from dqkernels.metrics.rouge import rouge

    return {name: round(value, 2) for name, value in rouge(texts, heads).items()}


def difference(texts: Sequence[str], teacher: Sequence[str], heads: Sequence[str]) -> dict[str, float]:
    """ROUGE-L minus the teacher's, pair by pair: the mean, and its standard error."""
    from dqkernels.metrics.paired import paired_difference
    from dqkernels.metrics.rouge import rougeL

    mine, theirs = ([rougeL(*pair) for pair in zip(these, heads, strict=True)] for these in (texts, teacher))
    mean, error = paired_difference(mine, theirs)
    return {"rougeL_gap": round(mean, 2), "rougeL_gap_error": round(error, 2)}


def speed(models: dict[str, Any], tokenizer, drawn: Sequence[docstrings.DocPair]) -> dict[str, float]:
    """Median milliseconds per generated token: greedy, one text at a time, models taking turns."""
    import torch

    from dqkernels.bench.protocol import Stats
    from dqkernels.text import source_limit

    first = next(iter(models.values()))
    limit = source_limit(first, tokenizer)
    inputs = [
        tokenizer(pair.body, truncation=True, max_length=limit, return_tensors="pt", return_token_type_ids=False)
        for pair in drawn[:SPEED_TEXTS]
    ]
    # Equal lengths, so that the models are compared on equal work whatever they would have said.
    options = {
        "num_beams": 1,
        "do_sample": False,
        "min_new_tokens": SPEED_TOKENS,
        "max_new_tokens": SPEED_TOKENS,
        "early_stopping": None,
        "length_penalty": None,
    }
    taken: dict[str, list[float]] = {name: [] for name in models}
    begun = time.perf_counter()
    with torch.inference_mode():
        for turn in range(-1, SPEED_ROUNDS):  # the first turn warms up
            for name, model in models.items():
                start = time.perf_counter()
                for batch in inputs:
                    model.generate(**batch, **options)
                if turn >= 0:
                    taken[name].append((time.perf_counter() - start) / (SPEED_TOKENS * len(inputs)))
            if turn >= 0 and time.perf_counter() - begun > SPEED_SECONDS:
                break
    return {name: round(1e3 * Stats.of(values).median, 3) for name, values in taken.items()}


def write(out: Path, result: dict[str, Any]) -> None:
    """demo.json, which keeps demo.schema.json, and demo.png, each by a temporary file and a rename.

    Raises:
        RecordError: for a result that does not keep the schema; nothing is written then.
    """
    from dqkernels.bench import schemas
    from dqkernels.bench.demo_view import draw
    from dqkernels.serialize import atomic_write

    schemas.check(result, "demo")
    atomic_write(out / PNG_FILE, draw(result))
    atomic_write(out / JSON_FILE, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())


def _row(
    name: str,
    bits: int | None = None,
    file_bytes: int | None = None,
    teacher_bytes: int | None = None,
    kernel: str | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "bits": bits,
        "file_mb": None if file_bytes is None else round(file_bytes / MB, 4),
        "ratio": None if file_bytes is None else round(teacher_bytes / file_bytes, 3),
        "rouge1": None,
        "rouge2": None,
        "rougeL": None,
        "ms_per_token": None,
        "kernel": kernel,
    }


def _decoding(model) -> dict[str, Any]:
    """What of the generation_config differs from the defaults of transformers."""
    chosen = model.generation_config.to_diff_dict()
    return {k: v for k, v in chosen.items() if not k.endswith("_token_id") and k != "transformers_version"}
