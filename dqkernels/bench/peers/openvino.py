"""OpenVINO on a CPU: the layer with int8 weights, which its plugin keeps compressed. Tried with 2026.4.1."""

from __future__ import annotations

import torch
from torch import nn

from dqkernels.bench import candidates
from dqkernels.bench.peers.base import Peer, Weights, load, only

_NAME = "openvino int8 weights"


class Request:
    """x fp32 [M, K] -> [M, N]. A clone is a model of its own, with weights of its own."""

    def __init__(self, weights: Weights):
        library, ops = load("openvino"), load("openvino.opset14")
        self.weights = weights
        n, k = weights.codes.shape
        x = ops.parameter([-1, k], library.Type.f32, name="x")
        # Arrays of its own: a constant may keep pointing at what it was made of.
        codes = ops.convert(ops.constant(weights.codes.numpy().copy()), "f32")
        weight = ops.multiply(codes, ops.constant(weights.scale.numpy().copy()))
        y = ops.add(ops.matmul(x, weight, False, True), ops.constant(weights.bias.numpy().reshape(1, n).copy()))
        # float32 between the codes, as every candidate of a float32 layer; one call at a time on our threads.
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        config.update({"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False})
        self.request = library.Core().compile_model(library.Model([y], [x]), "CPU", config).create_infer_request()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.request.infer([x.numpy()], share_inputs=True)[0])

    def clone(self) -> Request:
        return Request(self.weights)


def linear(layer: nn.Linear) -> candidates.Candidate:
    """One scale per channel; whether the input is quantized as well is the plugin's choice (with VNNI it is)."""
    only(layer, torch.float32)
    weights = Weights.rounded(layer, 127, 8)

    def prove(x: torch.Tensor, y: torch.Tensor) -> str | None:
        return candidates.bounded(weights.float_layer(), candidates.INT8_BOUND)(x, y)

    size = weights.codes.numel() + weights.scale.nbytes
    more = {"foreign": True, "clone": Request.clone}
    return candidates.Candidate(_NAME, Request(weights), 8, size, prove, "openvino CPU plugin", **more)


PEER = Peer("openvino", "pip install --no-deps openvino", "openvino", ("cpu",), linear={_NAME: linear})
