"""When an op may be called as the Python function it is, past torch's dispatcher.

The dispatcher hands a call of ours from Python to C++ and back two or three times: longer than a short linear takes on
a CPU. Nobody sees the difference unless somebody listens: a compiler, a tracer, a mode, a profiler, autograd. Autocast
does, too: an op is shielded from it on its way through the dispatcher (`dqkernels.autocast`).
"""

from __future__ import annotations

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def unwatched(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether a call on the CPU tensor `x` may go past the dispatcher; `others`: what else could want a gradient."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or x.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in others)):
        return False
    return not (
        torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
    )
