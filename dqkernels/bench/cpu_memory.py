"""What a fresh process grows by when it loads a packed file and generates with it, beside the bytes of the file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from dqkernels.bench import generate_candidates, generate_cells, memory, size
from dqkernels.bench.cpu_parts import CPU, Work

#: Run in the fresh process: all imports first, so that what grows afterwards is the model, its caches and buffers.
_PROGRAM = """
import json, sys
import torch
import transformers.models.{family}.modeling_{family}, transformers.generation
from transformers import AutoModelForSeq2SeqLM
import dqkernels, dqkernels.hf, dqkernels.decode
from dqkernels.bench import memory
from dqkernels.kernels import native

native.native()
torch.set_num_threads({threads})
given = json.load(sys.stdin)
ids = torch.tensor(given["ids"])

def work():
    model = dqkernels.load(given["folder"])
    loaded = memory.status("VmRSS")
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given["options"])
    return loaded, found.tolist()

base = memory.status("VmRSS")
(loaded, tokens), growth = memory.during(work, torch.device("cpu"))
print(json.dumps({{"base": base, "loaded": loaded, "growth": growth.allocated, "tokens": tokens}}))
"""
_SOURCE, _NEW = 256, 64
_TIMEOUT_S = 600


def memory_of_processes(work: Work) -> list[dict]:
    """A row per width: the file, and the growth of a process that loads it and writes 64 tokens about 256."""
    return [_one(work.shape, bits) for bits in work.bits]


def _one(shape: size.Shape, bits: int) -> dict:
    row = {"part": "memory", "candidate": f"dqkernels W{bits}", "bits": bits}
    source = generate_cells.source(shape.name)
    tokens, new = (min(each, (source.positions or each) // 2) for each in (_SOURCE, _NEW))
    model = generate_candidates.set_generation(source.build(source.layers)).requires_grad_(False)
    model = generate_candidates.packed("m", model, bits, bits, torch.float32, CPU, "auto", "int8").model
    ids = torch.randint(4, shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": 1}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        held = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).tolist()
        del model
        given = {"folder": folder, "ids": ids.tolist(), "options": options}
        program = _PROGRAM.format(threads=torch.get_num_threads(), family=shape.family)
        found, reason = memory.by_process(program, given, _TIMEOUT_S)
    row |= {"source_tokens": tokens, "new_tokens": new, "file_bytes": held}
    if reason is not None:
        return {**row, "status": "refused", "reason": reason}
    if found["tokens"] != wanted:
        return {**row, "status": "refused", "reason": "another process writes other tokens"}
    if found["growth"] is None:
        return {**row, "status": "not supported", "reason": "this system does not say what a process takes"}
    row |= {"process_bytes": found["base"], "loaded_bytes": found["loaded"] - found["base"]}
    return {**row, "status": "timed", "reason": None, "growth_bytes": found["growth"]}
