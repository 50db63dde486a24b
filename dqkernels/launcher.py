"""Which of several processes this one is: the shares of `accelerate launch` and `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is, and how they wait for each other."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    wait: Callable[[], None] = lambda: None

    @classmethod
    def of_launcher(cls, cpu: bool = False) -> Processes:
        """As `accelerate launch` or `torchrun` set the environment; one process without them.

        Raises:
            ImportError: in a launch of several without the package accelerate.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            wanted = "several processes need the package accelerate: pip install 'dqkernels[train]'"
            raise ImportError(wanted) from error
        # The longest share may end hours after the shortest: the default of ten minutes would end the run.
        state = PartialState(cpu=cpu, timeout=timedelta(days=14))
        return cls(state.process_index, state.num_processes, state.device, state.wait_for_everyone)
