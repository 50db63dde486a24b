"""What a whole process takes while one candidate of `bench generate` works: a fresh process for each.

Within one process candidates cannot be told apart, and what a library holds outside torch's allocator (CTranslate2, the
compiled core, CUDA's own context) is seen by nobody but the system. The model is built in the process like in the
benchmark; what building took is given back before the call, and does not count.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dqkernels.bench import memory, peers, size
from dqkernels.bench.generate_cells import Cell, Source, T5Shape
from dqkernels.bench.generate_lineup import Lineup, Options

_PROGRAM = "from dqkernels.bench import generate_process; generate_process.child()"
#: At most so many seconds for a process, and at least so many where the time that was asked for is nearly over.
_TIMEOUT_S, _LEAST_S = 900.0, 60.0
#: In words, for records.
HOW = {
    "cpu": "VmHWM of a process of its own during one call, and what of it the model, its caches and buffers added to "
    "VmRSS after the imports; libraries count, what building the model took does not",
    "cuda": "VmHWM as on a CPU; device: what the card had in use behind the call more than before the process",
}


def of_candidate(options: Options, name: str, family: str, cell: Cell, seconds: float = _TIMEOUT_S) -> dict[str, Any]:
    """Fields of a row: `process_bytes` in all, `process_growth_bytes` beyond the imports, of a GPU `device_bytes`.

    They are None where the process failed or the system does not say, and `process_reason` says so. seconds: what is
    left of the time that was asked for, behind which the process is stopped.
    """
    keys = ("process_bytes", "process_growth_bytes", *(("device_bytes",) if options.device.type == "cuda" else ()))
    before = _in_use(options.device)
    given = {"options": _plain(options), "name": name, "family": family, "cell": cell.row()}
    given["threads"] = torch.get_num_threads()
    found, reason = memory.by_process(_PROGRAM, given, max(_LEAST_S, min(_TIMEOUT_S, seconds)))
    if reason is None and None in (found["most"], found["imported"]):
        reason = "this system does not say what a process takes"
    if reason is not None:
        return {**dict.fromkeys(keys), "process_reason": reason}
    row = {"process_bytes": found["most"], "process_growth_bytes": max(0, found["most"] - found["imported"])}
    if options.device.type == "cuda":
        row["device_bytes"] = None if before is None or found["device"] is None else max(0, found["device"] - before)
    return row


def child() -> None:
    """The process itself: builds the candidate, lets go of everything else, runs one call; prints JSON."""
    given = json.load(sys.stdin)
    options, name, cell = _options(given["options"]), given["name"], Cell(**given["cell"])
    _import(options, given["family"])
    torch.set_num_threads(given["threads"])
    imported = memory.status("VmRSS")
    call = _call(options, name, cell)
    gc.collect()
    _, growth = memory.during(call, torch.device("cpu"))
    most = None if growth.allocated is None else memory.status("VmHWM")
    print(json.dumps({"imported": imported, "most": most, "device": _in_use(options.device)}))


def _plain(options: Options) -> dict[str, Any]:
    """As JSON has it: a shape by its fields, a folder by its path."""
    source = options.source
    shape = None if source.shape is None else {"t5": isinstance(source.shape, T5Shape), "fields": asdict(source.shape)}
    folder = None if source.folder is None else str(source.folder)
    return {
        **vars(options),
        "source": {"name": source.name, "layers": source.layers, "positions": source.positions, "folder": folder,
                   "shape": shape},
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": str(options.device),
    }  # fmt: skip


def _options(plain: dict[str, Any]) -> Options:
    """The reverse of `_plain`."""
    source = dict(plain["source"])
    folder, shape = source.pop("folder"), source.pop("shape")
    made = None if shape is None else (T5Shape if shape["t5"] else size.Shape)(**shape["fields"])
    given = {
        "source": Source(**source, shape=made, folder=None if folder is None else Path(folder)),
        "dtype": getattr(torch, plain["dtype"]),
        "device": torch.device(plain["device"]),
        "bits": tuple(plain["bits"]),
        "families": tuple(plain["families"]),
    }
    return Options(**{**plain, **given})


def _call(options: Options, name: str, cell: Cell):
    """The call of one candidate, and nothing else that its lineup made."""
    lineup = Lineup(options, cell.layers)
    one = next((get() for known, get in lineup.candidates() if known == name), None)
    if one is None:
        raise RuntimeError(f"candidate {lineup.absent.get(name, 'is not in the lineup')}: {name}")
    return one.bind(lineup.inputs(cell), cell.new_tokens, cell.num_beams)


def _import(options: Options, family: str) -> None:
    """What a program that serves such a model imports, so that it does not count as growth."""
    import transformers.generation  # noqa: F401

    import dqkernels.hf  # noqa: F401
    from dqkernels.kernels import native

    native.native()
    options.source.model_class()
    if family in peers.PEERS and (module := peers.PEERS[family].module) is not None:
        importlib.import_module(module)


def _in_use(device: torch.device) -> int | None:
    """Bytes of the card that anybody holds; None of a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free
