"""`bench model`: Hugging Face's `generate` with a fixed number of new tokens, float against packed."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dqkernels.bench import protocol, record
from dqkernels.bench.candidates import short
from dqkernels.bench.size import SHAPES, random_model, weights_bytes
from dqkernels.checks import FLOAT_DTYPES
from dqkernels.config import DQConfig
from dqkernels.convert import quantize_
from dqkernels.nn import PackedModule, QLinear

_MAX_ROUNDS = 50
#: Logits of the timed backend against `eager`. Integer ops are equal; LayerNorm, GELU and softmax may round
#: otherwise in a fused kernel, and one flipped code moves a logit by about a hundredth of its size.
_LOGITS_BOUND = 0.05


def run(
    preset_or_path: str = "bart-base",
    bits: Sequence[int] = (8, 4, 2),
    *,
    embedding_bits: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    batch_size: int = 1,
    source_tokens: int = 128,
    new_tokens: int = 32,
    num_beams: int = 1,
    seconds: float = 60,
    out: str | None = None,
) -> dict:
    """Times generation and gives the record.

    Args:
        preset_or_path: a shape with random weights (`tiny`, `bart-base`, `bart-large`, `mbart-large`;
        nothing is
            downloaded), or the folder of a float encoder-decoder model.
        bits: weight widths of ours.
        embedding_bits: of ours; default the weights' own.
        dtype: of the float model and of what stays float in ours; default bfloat16 on a GPU, float32 on a
        CPU. device: default the GPU if there is one. backend: the one to force, or `auto`. batch_size,
        source_tokens, new_tokens, num_beams: the work; every candidate generates exactly that much.
        seconds: about what the timing takes; building comes on top. out: file for the record, or None.

    Raises:
        ValueError: for an unknown preset, or a folder that holds no float model.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("source_tokens", source_tokens),
        ("new_tokens", new_tokens),
        ("num_beams", num_beams),
    ):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    device = protocol.pick_device(device)
    dtype = _dtype(dtype, device)
    model, name = _float_model(preset_or_path, dtype)
    # T5 spells its depths num_layers and num_decoder_layers.
    depth = [("encoder_layers", "num_layers"), ("decoder_layers", "num_decoder_layers")]
    layers = "-".join(str(next(getattr(model.config, n) for n in names if hasattr(model.config, n))) for names in depth)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max(source_tokens, new_tokens + 1) > limit:
        raise ValueError(f"source_tokens and new_tokens must fit the model's {limit} positions")
    before = protocol.state(device)
    inputs = _inputs(model, batch_size, source_tokens, device)
    work = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "num_beams": num_beams, "do_sample": False}
    rows: list[dict] = []
    samplers: dict[str, protocol.Sampler] = {}
    with torch.inference_mode():
        for width in (None, *bits):
            candidate = copy.deepcopy(model) if width is not None else model
            if width is not None:
                # Ternary (absmax above 2 bits) packs fastest; the kernels do the same work for any codes.
                config = DQConfig(
                    weight_bits=width,
                    embedding_bits=width if embedding_bits is None else embedding_bits,
                    weight_quantizer="ternary",
                    backend=backend,
                )
                quantize_(candidate, config)
            candidate.to(device)
            label = f"torch {short(dtype)}" if width is None else f"dqkernels {config.name}"
            row = {
                "model": name,
                "layers": layers,
                "candidate": label,
                "dtype": short(dtype),
                "weight_bits": 8 * dtype.itemsize if width is None else width,
                "embedding_bits": 8 * dtype.itemsize if width is None else config.embedding_bits,
                "weights_bytes": weights_bytes(candidate),
                "kernel": _kernels(candidate),
            }
            rows.append(row)
            row["status"], row["reason"], row["logits_error"] = _prove(candidate, inputs, work, new_tokens)
            if row["status"] == "timed":
                row["peak_mb"] = _peak_mb(candidate, inputs, work, device)
                call = _generate(candidate, inputs, work)
                samplers[label] = protocol.wall_sampler(call, device)
        outcome = protocol.interleave(
            {label: s.sample for label, s in samplers.items()},
            seconds=seconds,
            max_rounds=_MAX_ROUNDS,
            warmup_rounds=1,
            patience=1.0,
        )
    base = outcome.stats.get(rows[0]["candidate"])
    for row in rows:
        stats = outcome.stats.get(row["candidate"])
        if row["candidate"] in outcome.skipped:
            row.update(status="too slow", reason=outcome.skipped[row["candidate"]])
        if stats is None:
            continue
        times = stats.row("ms")
        row["latency_ms_per_token"] = float(f"{times['median_ms'] / new_tokens:.5g}")
        row["p20_ms_per_token"] = float(f"{times['p20_ms'] / new_tokens:.5g}")
        row["p80_ms_per_token"] = float(f"{times['p80_ms'] / new_tokens:.5g}")
        row["tokens_per_s"] = float(f"{batch_size * new_tokens / stats.median:.5g}")
        row["samples"], row["timer"] = stats.n, samplers[row["candidate"]].timer
        row["speedup_ratio"] = None if base is None else float(f"{base.median / stats.median:.4g}")
    described = protocol.describe(device, seconds, _MAX_ROUNDS, before)
    for key in ("cold", "warm"):  # of single layers; generation finds its caches as it left them
        described.pop(key)
    described["timer"] = "perf_counter around generate, device synchronized"
    described["latency"] = "wall time of one generate call over its new tokens, the encoder included"
    described["peak"] = "GPU: most that was allocated during generate, this model's weights included; CPU: null"
    result = record.new(
        "model",
        settings={
            "model": name,
            "weights": "random" if preset_or_path in SHAPES else "from a folder",
            "bits": list(bits),
            "dtype": short(dtype),
            "device": device.type,
            "backend": backend,
            "batch_size": batch_size,
            "source_tokens": source_tokens,
            "new_tokens": new_tokens,
            "num_beams": num_beams,
            "loop": "transformers generate, dynamic cache",
        },
        protocol=described,
        rows=rows,
    )
    if out is not None:
        record.write(result, out)
    return result


def _dtype(dtype, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    return kind


def _float_model(preset_or_path: str, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """The float model on the CPU, and a name without a path in it."""
    if preset_or_path in SHAPES:
        return random_model(SHAPES[preset_or_path], dtype), preset_or_path
    folder = Path(preset_or_path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"preset_or_path must be one of {sorted(SHAPES)} or a folder with a config.json, got {preset_or_path!r}"
        )
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError("preset_or_path is packed already: give the folder of the float model")
    return model.eval(), os.path.basename(os.path.realpath(folder))


def _inputs(model: nn.Module, batch_size: int, source_tokens: int, device: torch.device) -> dict:
    """Random token ids, no special ones among them, no padding."""
    special = {v for k, v in model.config.to_dict().items() if k.endswith("_token_id") and isinstance(v, int)}
    allowed = torch.tensor([i for i in range(model.config.vocab_size) if i not in special])
    picks = torch.randint(len(allowed), (batch_size, source_tokens), generator=torch.Generator().manual_seed(0))
    ids = allowed[picks].to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _generate(model: nn.Module, inputs: dict, work: dict):
    return lambda: model.generate(**inputs, **work)


def _prove(model: nn.Module, inputs: dict, work: dict, new_tokens: int) -> tuple[str, str | None, float | None]:
    """(status, reason, error of the logits to the eager backend's): same work, and same numbers as eager."""
    try:
        tokens = model.generate(**inputs, **work)
        if tokens.shape[1] != new_tokens + 1:
            return "refused", f"generated {tokens.shape[1] - 1} new tokens, wanted {new_tokens}", None
        found = model(**inputs, decoder_input_ids=tokens).logits
        if not torch.isfinite(found).all():
            return "refused", "logits are not finite", None
        packed = [m for m in model.modules() if isinstance(m, PackedModule)]
        if not packed:
            return "timed", None, None
        saved = [m.backend for m in packed]
        try:
            for module in packed:
                module.backend = "eager"
            wanted = model(**inputs, decoder_input_ids=tokens).logits
        finally:
            for module, name in zip(packed, saved, strict=True):
                module.backend = name
    except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its refusal, not ours
        return "refused", record.scrub(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"), None
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    if not error <= _LOGITS_BOUND:
        return "refused", f"logits differ from the eager backend's by {error:.2g}", error
    return "timed", None, float(f"{error:.3g}")


def _peak_mb(model: nn.Module, inputs: dict, work: dict, device: torch.device) -> float | None:
    """Most MB (10^6) allocated on the GPU during one generate, other models on it left out; None on a CPU."""
    if device.type != "cuda":
        return None
    others = torch.cuda.memory_allocated(device) - weights_bytes(model)
    torch.cuda.reset_peak_memory_stats(device)
    model.generate(**inputs, **work)
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - others) / 1e6, 1)


def _kernels(model: nn.Module) -> str:
    """Which backend runs how many linears: `triton x 96, eager x 1`."""
    found = Counter(m.kernel().partition(" ")[0] for m in model.modules() if isinstance(m, QLinear))
    return ", ".join(f"{name} x {count}" for name, count in found.most_common()) or "torch"


def render(result: dict):
    """A rich table of a model record."""
    from rich import box
    from rich.table import Table

    settings, environment = result["settings"], result["environment"]
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"generate, {settings['model']} ({result['rows'][0]['layers']}) on {protocol.machine_words(environment)}",
    )
    peak = any(line.get("peak_mb") is not None for line in result["rows"])
    names = ["candidate", "ms/token", "p20-p80", "tokens/s", "x", "weights"] + ["peak MB"] * peak
    for name in names:
        table.add_column(name, justify="left" if name == "candidate" else "right", no_wrap=True)
    words = [
        f"batch {settings['batch_size']}, {settings['num_beams']} beam(s), {settings['source_tokens']} "
        f"source and {settings['new_tokens']} new tokens, transformers' generate, encoder included.",
        f"weights: MB (10^6 bytes) in memory; values: {settings['weights']}.",
    ]
    for line in result["rows"]:
        timed = line["status"] == "timed"
        cells = [line["candidate"], line["status"], "", "", ""]
        if timed:
            ratio = line["speedup_ratio"]
            cells[1:] = [
                f"{line['latency_ms_per_token']:.2f}",
                f"{line['p20_ms_per_token']:.3g}-{line['p80_ms_per_token']:.3g}",
                f"{line['tokens_per_s']:.1f}",
                "" if ratio is None else f"{ratio:.2f}",
            ]
        cells.append(f"{line['weights_bytes'] / 1e6:.1f}")
        if peak:
            cells.append("" if line.get("peak_mb") is None else f"{line['peak_mb']:.0f}")
        table.add_row(*cells)
        if not timed:
            words.append(f"{line['status']}: {line['candidate']} ({line['reason']})")
    kernels: dict[str, list[str]] = {}
    for line in result["rows"][1:]:
        kernels.setdefault(line["kernel"], []).append(line["candidate"].removeprefix("dqkernels "))
    words += [f"kernels of {', '.join(names)}: {kernel}" for kernel, names in kernels.items()]
    warning = protocol.busy_words(result["protocol"])
    words += [] if warning is None else [warning]
    table.caption, table.caption_justify = "\n".join(words), "left"
    return table
