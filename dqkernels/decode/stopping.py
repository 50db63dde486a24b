"""What stands between logits and the next token: processors and criteria of transformers, called as it calls them.

Those that `generate` makes itself (the length, the end of sequence) are looked at directly: theirs is most of the time
that a loop in Python takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

#: Processors that `generate` makes of the configuration and that speak up at one length, or until one: name of the
#: class -> whether it changes a score of sequences of so many tokens.
SPEAKS: dict[str, Callable[[Any, int], bool]] = {
    "ForcedBOSTokenLogitsProcessor": lambda each, length: length == 1,
    "ForcedEOSTokenLogitsProcessor": lambda each, length: length == each.max_length - 1,
    "MinLengthLogitsProcessor": lambda each, length: length < each.min_length,
    "MinNewTokensLengthLogitsProcessor": lambda each, length: length - each.prompt_length_to_skip < each.min_new_tokens,
}


def is_plain(processors: Any) -> bool:
    """Whether this is transformers' own list, of members that ask for nothing but (ids, scores)."""
    from transformers import LogitsProcessorList

    return type(processors) is LogitsProcessorList and not any(
        len(inspect.signature(each.__call__).parameters) > 2 for each in processors
    )


def is_known(each: Any) -> bool:
    """Whether this is a processor of transformers, with the `__call__` that transformers wrote."""
    from transformers.generation import logits_process

    kind = type(each)
    known = kind is getattr(logits_process, kind.__name__, None)
    return known and kind.__call__.__module__ == logits_process.__name__ and "__call__" not in vars(each)


def processor(processors: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`LogitsProcessorList` as a function of (ids, scores).

    The list looks at the signature of every member at every call; here they are looked at once.
    """
    if not is_plain(processors):
        return processors  # its own errors, and whatever a list of the user's does
    members = list(processors)
    if not members:
        return lambda ids, scores: scores

    def run(ids, scores):
        for each in members:
            scores = each(ids, scores)
        return scores

    return run


def silent(processors: Any) -> Callable[..., bool]:
    """Whether a list leaves the largest score of every row where it is, for sequences of so many tokens, and where that
    is known for these largest ones: (length, largest=()) -> bool. Nobody need call it then.

    Known are those in `SPEAKS`. A minimal length takes nothing but the end of sequence away: it matters where that is
    the largest.
    """
    asked = []
    for each in processors:
        name = type(each).__name__
        if name not in SPEAKS or not is_known(each):
            return lambda length, largest=(): False
        takes = {*each.eos_token_id.reshape(-1).tolist()} if name.startswith("Min") else None
        asked.append((SPEAKS[name], each, takes))
    if not is_plain(processors):
        return lambda length, largest=(): False

    def run(length, largest=()):
        for speaks, each, takes in asked:
            if speaks(each, length) and (takes is None or not largest or not takes.isdisjoint(largest)):
                return False
        return True

    return run


class Stop:
    """Which sequences end: `StoppingCriteriaList`, in the short form where it allows one.

    Attributes:
        simple: whether length and end of sequence are all there is, so that nobody asks for the whole sequences.
        pads: whether finished sequences go on with padding: where a criterion knows an end of sequence.
    """

    def __init__(self, criteria: Any):
        from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

        self.criteria = criteria
        self.pads = any(hasattr(each, "eos_token_id") for each in criteria)
        lengths = [each for each in criteria if type(each) is MaxLengthCriteria]
        ends = [each for each in criteria if type(each) is EosTokenCriteria]
        most = min((each.max_length for each in lengths), default=None)
        # One that would warn, of positions that a model may not have, is asked itself.
        warns = any(
            each.max_position_embeddings is not None and most > each.max_position_embeddings for each in lengths
        )
        self.simple = type(criteria) is StoppingCriteriaList and len(lengths) + len(ends) == len(criteria) and not warns
        self.most = most
        self.ends = [each.eos_token_id for each in ends]
        self._ends: torch.Tensor | None = None

    def quick(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """For `simple` ones. tokens int64 [...], which made sequences of `length` -> bool [...]."""
        if self.most is not None and length >= self.most:
            return torch.ones_like(tokens, dtype=torch.bool)
        if not self.ends:
            return torch.zeros_like(tokens, dtype=torch.bool)
        if self._ends is None:
            self._ends = torch.cat([each.reshape(-1).to(tokens.device) for each in self.ends])
        if self._ends.numel() == 1:
            return tokens == self._ends
        return torch.isin(tokens, self._ends)
