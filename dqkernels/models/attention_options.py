"""Where the options of int8 attention stand on a module, and whether they count. `attention` puts them there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from dqkernels.models.attention import Options

#: What `config._attn_implementation` says while attention is int8.
NAME = "dqkernels_int8"
#: The options, on an attention module.
KEY = "dqkernels_attention"


def in_use(module: nn.Module) -> Options | None:
    """How this attention module computes in int8 now; None where it does not."""
    options = module.__dict__.get(KEY)
    return options if options is not None and module.config._attn_implementation == NAME else None
