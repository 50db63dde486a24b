"""What the decode loop of a model does and holds, in words and bytes, for `dqkernels.report`."""

from __future__ import annotations

from torch import nn

from dqkernels.decode import engine, native_hypotheses, native_step, plug


def describe(model: nn.Module) -> str:
    """How `generate` decodes, and why not where transformers' loop does; empty where `attach` was not called."""
    if not plug.is_attached(model):
        return ""
    state = engine.state_of(model)
    reason = next(engine.obstacles(model), None)
    if reason is not None:
        return f"Hugging Face's own loop ({reason})"
    text = "own loop over static int8 caches"
    device = next(model.lm_head.parameters()).device.type
    if device == "cpu":
        text += f", {native_step.describe(model, engine.family_of(model)[0])}"
        why = native_hypotheses.why_not()
        text += "" if why is None else f", beams by torch ({why})"
    if device == "cuda":
        captured = "steps in CUDA graphs, logits processors behind them"
        text += f", {state.refused or (captured if plug.uses_graphs(model) else 'no CUDA graphs (graphs=False)')}"
    if state.beams_by_torch:
        text += f"; beams of the last call by torch: {state.beams_by_torch}"
    if state.processors:
        text += f"; logits processors called at every step of the last call: {', '.join(state.processors)}"
    calls = state.served + state.passed
    if state.passed:
        text += f"; {state.passed} of {calls} calls went to Hugging Face's own loop"
        text += f", the last one ({state.last})" if state.last else f" ({state.last_passed})"
    return text


def memory(model: nn.Module) -> tuple[int, int]:
    """Bytes of the caches that are kept for the next calls, and of what belongs to them: indices, captured steps."""
    if not plug.is_attached(model):
        return 0, 0
    idle = engine.state_of(model).pool.idle()
    return sum(each.cache_bytes() for each in idle), sum(each.workspace_bytes() for each in idle)
