"""Other projects to compare with, one file each. A new one is a file with a `PEER`, and its name in `PEERS`.

Another version may want other arguments: whatever an adapter or a call raises is the reason why that peer is not
compared, and a peer that computes something else is refused by its proof.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from dqkernels.bench import candidates
from dqkernels.bench.generate_candidates import Candidate as Generator
from dqkernels.bench.peers import (
    bitblas,
    bitsandbytes,
    ctranslate2,
    gemlite,
    humming,
    onnxruntime,
    openvino,
    torch_dynamic,
    torchao,
)
from dqkernels.bench.peers.base import NotCompared, Peer, Weights, missing, raised
from dqkernels.nn import QLinear

__all__ = [
    "BENCHES",
    "PEERS",
    "NotCompared",
    "Peer",
    "Weights",
    "gemm",
    "generate",
    "linear",
    "listed",
    "missing",
    "render",
]

BENCHES = ("linear", "gemm", "generate")
#: By name, in order of worth.
PEERS: dict[str, Peer] = {
    one.PEER.name: one.PEER
    for one in (ctranslate2, onnxruntime, openvino, torchao, bitsandbytes, torch_dynamic, gemlite, humming, bitblas)
}


def of(bench: str) -> list[Peer]:
    """The peers with an adapter for `bench`."""
    return [peer for peer in PEERS.values() if peer.has(bench)]


def listed(device: torch.device) -> list[dict]:
    """A row per peer: its name, the benches it is in, how to install it, and why it is not here (null: it is)."""
    return [
        {
            "peer": peer.name,
            "benches": [bench for bench in BENCHES if peer.has(bench)],
            "devices": list(peer.devices),
            "install": peer.install,
            "reason": missing(peer, device.type),
            "without": dict(peer.without),
        }
        for peer in PEERS.values()
    ]


def render(rows: list[dict], device: torch.device):
    """A rich table of `listed`."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=f"Peers, on {device.type}")
    for name in ("peer", "in bench", "here", "install"):
        table.add_column(name, no_wrap=name in ("peer", "in bench"), overflow="fold")
    for row in rows:
        here = "yes" if row["reason"] is None else row["reason"]
        table.add_row(row["peer"], ", ".join(row["benches"]), here, row["install"])
    words = [f"{row['peer']} in bench {bench}: {why}." for row in rows for bench, why in row["without"].items()]
    table.caption, table.caption_justify = "\n".join(words), "left"
    return table


# ------------------------------------------------------------------------------------------- by bench


def linear(layer: nn.Linear) -> tuple[list[candidates.Candidate], dict[str, str]]:
    """Candidates for a float layer, and who is not among them with the reason."""
    found, absent = [], {}
    device, dtype = layer.weight.device.type, layer.weight.dtype
    for peer in PEERS.values():
        if not peer.has("linear"):
            absent.update({peer.name: peer.without["linear"]} if "linear" in peer.without else {})
            continue
        reason = missing(peer, device)
        if reason is not None:
            absent[peer.label or peer.name] = reason
            continue
        for name, adapter in peer.linear.items():
            try:
                found.append(_made(adapter, layer))
            except NotCompared as error:
                # A layer of another dtype may be compared all the same.
                absent[name if dtype == torch.float32 else f"{name} {candidates.short(dtype)}"] = str(error)
    return found, absent


def gemm(name: str, packed: QLinear, tune: bool = False) -> candidates.Candidate:
    """A peer holding the codes of `packed`.

    Raises:
        NotCompared: with the reason, whatever went wrong.
    """
    weights = Weights.of(packed)
    module, kernel = _made(PEERS[name].gemm, weights, tune)
    n, k = weights.codes.shape
    weight_bytes = math.ceil(n * k * weights.bits / 8) + weights.scale.numel() * 4

    def prove(x: torch.Tensor, y: torch.Tensor) -> str | None:
        # The float matrix is made anew: it is up to sixteen times the codes, and there are many candidates.
        return candidates.bounded(weights.float_layer(), candidates.INT8_BOUND)(x, y)

    label = f"{name} {candidates.format_words(weights.bits, weights.group_size)}"
    more = {"group_size": weights.group_size, "foreign": True}
    return candidates.Candidate(label, module, weights.bits, weight_bytes, prove, kernel, **more)


def generators(name: str, device: torch.device) -> list[str]:
    """The candidates of a peer in `bench generate` on this device."""
    peer = PEERS[name]
    if peer.has("generate") and device.type in peer.devices:
        return list(peer.generate(device.type))
    return [peer.label or name]


def generate(peer: str, name: str, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Generator:
    """A peer with the weights of `model`, float32 on the CPU.

    Raises:
        NotCompared: with the reason, whatever went wrong.
    """
    one = PEERS[peer]
    if not one.has("generate"):
        raise NotCompared(one.without["generate"])
    if device.type not in one.devices and (reason := missing(one, device.type)) is not None:
        raise NotCompared(reason)
    with _quiet():
        return _made(one.generate(device.type)[name], model, dtype, device)


def _made(adapter, *arguments):
    """What an adapter gives, or `NotCompared`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's code: not ours to pass on
            return adapter(*arguments)
    except NotCompared:
        raise
    except Exception as error:  # noqa: BLE001 - another version of it may raise anything
        raise NotCompared(raised(error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nor are messages and bars of transformers."""
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()
