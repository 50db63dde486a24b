"""A decode step that was captured once in a CUDA graph and is replayed for every token.

All that changes from token to token stands in the small tensors of the caches (tokens, position, lengths, ancestors),
at addresses that stay, so one graph serves every position of a set of caches, and every later call that gets that set.
Logits processors, the choice of the next token and the reordering of beams run behind it, outside the graph.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from dqkernels.decode.caches import Caches
from dqkernels.decode.layers import Decoder
from dqkernels.decode.step import Step
from dqkernels.kernels import skinny

logger = logging.getLogger("dqkernels")

#: Calls ahead of a capture: the first one compiles, the second one finds everything compiled and allocated.
WARM_UP = 2
_capturing = threading.Lock()


class Captured:
    """A function without arguments, in a CUDA graph of its own memory pool.

    Attributes:
        output: what it returned; overwritten by every `replay`.
        pool_bytes: what the graph keeps.
    """

    def __init__(self, body: Callable[[], torch.Tensor], device: torch.device):
        self.body = body  # and with it every tensor that the graph reads
        with _capturing, torch.cuda.device(device), skinny.settled_weights():
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    body()
            torch.cuda.current_stream(device).wait_stream(stream)
            before = torch.cuda.memory_reserved(device)
            self.graph = torch.cuda.CUDAGraph()
            # Another thread may allocate meanwhile: only what this one does is recorded, and judged.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.output = body()
            self.pool_bytes = max(torch.cuda.memory_reserved(device) - before, 0)

    def replay(self) -> torch.Tensor:
        """Runs the graph in the current stream."""
        self.graph.replay()
        return self.output


class Repeated:
    """Where there is no graph: the same function over the same tensors, whose output stands in one place too."""

    def __init__(self, body: Callable[[], torch.Tensor], device: torch.device):
        self.body, self.output, self.pool_bytes = body, body(), 0

    def replay(self) -> torch.Tensor:
        return self.output.copy_(self.body())


class GraphStep(Step):
    """As `Step`, with the step itself replayed; the first tokens are run as they come.

    Args:
        weights: what tells whether a graph was captured over the weights of now, from `weights_of`.
        refused: told why a capture failed; steps are run one by one from then on.
        capture: `Captured`, or `Repeated`.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Caches,
        beams: bool,
        most: int,
        weights: tuple[Any, ...],
        refused: Callable[[str], None],
        capture: Callable[[Callable[[], torch.Tensor], torch.device], Any] = Captured,
    ):
        super().__init__(decoder, caches, beams, most)
        self.weights, self.refused, self.capture = weights, refused, capture
        self.graphs = True

    def step(self, tokens: torch.Tensor, position: int, keep: bool = True) -> torch.Tensor:
        if not self.graphs:
            return super().step(tokens, position)
        self._make_room(position + 1)
        self._place(tokens, position)
        kept = self.caches.captured.get(self.beams)
        if kept is None or kept[0] != self.weights:
            self.caches.captured.pop(self.beams, None)  # its memory first
            try:
                kept = self.weights, self.capture(self._whole, self.caches.shape.device)
            except RuntimeError as error:
                self.graphs = False
                reason = f"no CUDA graph: {str(error).strip().splitlines()[0]}"
                logger.warning("%s; decode steps are launched one by one", reason)
                self.refused(reason)
                return super().step(tokens, position)
            self.caches.captured[self.beams] = kept
        return kept[1].replay().clone()

    def _whole(self) -> torch.Tensor:
        """A step at whatever position the small tensors say."""
        caches, decoder = self.caches, self.decoder
        keys = caches.shape.capacity
        bias = None if decoder.bias_at is None else decoder.bias_at(caches.position, keys)
        ancestors = caches.ancestors if self.beams else None
        return self._run(caches.tokens, caches.position, caches.positions, ancestors, keys, bias)


def weights_of(*modules: torch.nn.Module) -> tuple[Any, ...]:
    """Address, kind and version of every tensor of some modules, under every name that it has: the same as before where
    a graph may be replayed."""
    found = []
    for module in modules:
        named = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
        for _, tensor in itertools.chain(*named):
            version = None if tensor.is_inference() else tensor._version
            found.append((tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), version))
    return tuple(found)
