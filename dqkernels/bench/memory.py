"""How much memory a call takes beyond what was there before it: of a GPU's allocator, or of this process."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dqkernels.bench import record

#: In words, for records.
HOW = {
    "cuda": "torch's allocator: most that was allocated during the call beyond what was there before it",
    "cpu": "the process: VmHWM during the call (reset by clear_refs) less VmRSS before it, the heap trimmed first",
}
_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Growth:
    """Bytes, or None where nobody says. `reserved`: of a GPU, what the allocator took from the driver."""

    allocated: int | None
    reserved: int | None = None


def during(call: Callable[[], Any], device: torch.device) -> tuple[Any, Growth]:
    """What `call` returns, and the growth while it ran. What it leaves behind (caches, graphs) counts as well."""
    return _on_gpu(call, device) if device.type == "cuda" else _of_process(call)


def _on_gpu(call: Callable[[], Any], device: torch.device) -> tuple[Any, Growth]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return result, Growth(*(high - low for high, low in zip(most, before, strict=True)))


def _of_process(call: Callable[[], Any]) -> tuple[Any, Growth]:
    _trim()
    try:
        (_PROC / "clear_refs").write_text("5")  # VmHWM starts anew from VmRSS
        before = status("VmRSS")
    except OSError:
        before = None
    result = call()
    most = status("VmHWM") if before is not None else None
    return result, Growth(None if before is None or most is None else max(0, most - before))


def _trim() -> None:
    """Gives the heap's free pages back, or a call would grow into them unseen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


def by_process(program: str, given: dict[str, Any], seconds: float) -> tuple[dict[str, Any], str | None]:
    """What a fresh Python printed last, as JSON, and None; or nothing, and why in words.

    Args:
        program: its source, of this package; takes JSON from stdin.
        given: that JSON.
        seconds: after which it is stopped.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, input=json.dumps(given), timeout=seconds, check=False, **options)
    except subprocess.TimeoutExpired:
        return {}, f"took more than {seconds:g} s"
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no words"])[-1]
        return {}, record.scrub(f"exit code {done.returncode}: {words}")
    try:
        return json.loads(done.stdout.splitlines()[-1]), None
    except (IndexError, ValueError):  # a library ended the process in its own way
        return {}, "ended without a word"


def status(name: str) -> int | None:
    """Bytes of a line of this process's status, such as VmRSS, or None where nobody says."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROC / "status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
