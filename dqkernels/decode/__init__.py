"""`model.generate` of a packed encoder-decoder by a loop of our own: static int8 caches, one step per token.

    decode.attach(model)                 # in place; generate(...) takes what it took and gives what it gave
    with decode.plain(model):            # transformers' own loop over the same blocks
        model.generate(...)
    decode.free(model)                   # the caches that are kept for the next call

Greedy search, sampling and beam search with every processor and stopping criterion of transformers. A call that is
none of these, or that asks for what a step does not have, runs in transformers' own loop, and
`dqkernels.report(model)` names the reason.
"""

from dqkernels.decode.describe import describe, memory
from dqkernels.decode.plug import attach, detach, free, is_attached, plain, serves

__all__ = ["attach", "describe", "detach", "free", "is_attached", "memory", "plain", "serves"]
