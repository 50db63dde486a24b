"""Checks of the compiled core as programs of their own: a read past an operand must not take pytest along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(checks, isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of this folder as a program, with DQKERNELS_CPU=`isa`."""
    root = Path(checks.__file__).parents[1]
    env = os.environ | {"DQKERNELS_CPU": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, checks.__file__, *arguments]
    return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=600)
