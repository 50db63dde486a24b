"""A BART or mBART as two ONNX graphs, written node by node: torch's own exporter wants further packages.

The encoder gives the keys and values that cross-attention reads; the decoder takes one token, what it gave for those
before, and the encoder's. Attention is ONNX Runtime's fused op, as its optimizer for transformers writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dqkernels.bench.peers.base import NotCompared, Weights, load

_ACTIVATIONS = {"gelu": "Gelu", "relu": "Relu"}
_FAMILIES = ("bart", "mbart")


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [N, K] within 7 bits, which no processor's product saturates at, and a scale per row [N]."""
    weights = Weights.rounded(SimpleNamespace(weight=weight, bias=weight), 63, 8)
    return weights.codes, weights.scale.squeeze(1)


class Graph:
    """Nodes in order, and their constants. A name stands for what a node gives.

    Args:
        int8: whether linears and tables have int8 weights, and linears quantize their input at every call.
    """

    def __init__(self, int8: bool):
        self.onnx, self.int8 = load("onnx"), int8
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._kept: dict[Any, str] = {}  # constants by their key
        self._quantized: dict[str, list[str]] = {}  # codes, step and zero point by what was quantized

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **options: Any) -> Any:
        """The name of what it gives, or a list of them."""
        names = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), names, **options))
        return names if outputs > 1 else names[0]

    def constant(self, value: torch.Tensor, key: Any = None) -> str:
        """key: under which it is kept, so that what several nodes read is there once."""
        if key is None or key not in self._kept:
            name = f"constant_{len(self.constants)}"
            array = value.detach().contiguous().numpy()
            self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
            if key is None:
                return name
            self._kept[key] = name
        return self._kept[key]

    def integers(self, *values: int) -> str:
        return self.constant(torch.tensor(values, dtype=torch.int64), ("integers", values))

    def linear(self, x: str, layer: nn.Module, scale: float = 1.0) -> str:
        """`scale * layer(x)`."""
        weight, bias = scale * layer.weight.detach(), scale * layer.bias.detach()
        if not self.int8:
            return self.node("Add", [self.node("MatMul", [x, self.constant(weight.t())]), self.constant(bias)])
        return self._integers(x, *_rounded(weight), bias)

    def _integers(self, x: str, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> str:
        if x not in self._quantized:
            self._quantized[x] = self.node("DynamicQuantizeLinear", [x], 3)
        q, step, zero = self._quantized[x]
        total = self.node("Cast", [self.node("MatMulInteger", [q, self.constant(codes.t()), zero])], to=1)
        y = self.node("Mul", [total, self.node("Mul", [step, self.constant(scale)])])
        return y if bias is None else self.node("Add", [y, self.constant(bias)])

    def norm(self, x: str, norm: nn.LayerNorm) -> str:
        given = [x, self.constant(norm.weight), self.constant(norm.bias)]
        return self.node("LayerNormalization", given, axis=-1, epsilon=norm.eps)

    def rows(self, table: torch.Tensor, ids: str, factor: float = 1.0) -> str:
        """`factor * table[ids]`; of an int8 graph, of codes with a scale per row."""
        if not self.int8:
            x = self.node("Gather", [self.constant(table, table.data_ptr()), ids])
            return x if factor == 1.0 else self.node("Mul", [x, self.constant(torch.tensor(factor))])
        codes, scale = _rounded(table)
        x = self.node("Cast", [self.node("Gather", [self.constant(codes, table.data_ptr()), ids])], to=1)
        return self.node("Mul", [x, self.node("Gather", [self.constant(factor * scale.unsqueeze(1)), ids])])

    def head(self, x: str, table: torch.Tensor, bias: torch.Tensor) -> str:
        """[batch, 1, width] -> logits [batch, vocabulary]."""
        x = self.node("Reshape", [x, self.integers(0, -1)])
        if self.int8:
            codes, scale = _rounded(table)
            y = self._integers(x, codes, scale, None)
        else:
            y = self.node("Gemm", [x, self.constant(table, table.data_ptr())], transB=1)
        return self.node("Add", [y, self.constant(bias)]) if bool(bias.any()) else y

    def heads(self, x: str, count: int, head_dim: int) -> str:
        """[batch, tokens, width] -> [batch, heads, tokens, head_dim]."""
        x = self.node("Reshape", [x, self.integers(0, -1, count, head_dim)])
        return self.node("Transpose", [x], perm=[0, 2, 1, 3])

    def attention(self, inputs: Sequence[str], heads: int, outputs: int = 1) -> Any:
        """ONNX Runtime's, of queries that are scaled already."""
        return self.node("MultiHeadAttention", inputs, outputs, domain="com.microsoft", num_heads=heads, scale=1.0)

    def serialize(self, inputs: dict[str, tuple[int, list]], outputs: dict[str, tuple[str, int, list]]) -> bytes:
        """
        Args:
            inputs: by name: type and shape, sizes that vary by name.
            outputs: by name: what it is the value of, type and shape.
        """
        helper = self.onnx.helper
        ends = [helper.make_tensor_value_info(name, *facts) for name, facts in inputs.items()]
        last = [helper.make_tensor_value_info(name, *facts) for name, (_, *facts) in outputs.items()]
        nodes = self.nodes + [helper.make_node("Identity", [of], [name]) for name, (of, *_) in outputs.items()]
        graph = helper.make_graph(nodes, "bart", ends, last, list(self.constants.values()))
        versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()


class Exported:
    """The two graphs of a model, and what calling them takes.

    Args:
        model: fp32, on the CPU.
        int8: as of `Graph`.

    Attributes:
        encoder, decoder: as files.
        layers, heads, head_dim: of the decoder.
        past, present, cross: names of keys and values, layer by layer, key first.
        offset: what is added to a position.

    Raises:
        NotCompared: for a family or an activation that nobody wrote down here.
    """

    def __init__(self, model: nn.Module, int8: bool):
        config = model.config
        if config.model_type not in _FAMILIES:
            raise NotCompared(f"adapter takes {' and '.join(_FAMILIES)}, got {config.model_type}")
        if config.activation_function not in _ACTIVATIONS:
            raise NotCompared(f"adapter knows {' and '.join(_ACTIVATIONS)}, got {config.activation_function}")
        self.activation = _ACTIVATIONS[config.activation_function]
        self.post_norm = config.model_type == "bart"
        body = model.model
        self.layers, self.heads = len(body.decoder.layers), config.decoder_attention_heads
        self.head_dim = config.d_model // self.heads
        self.offset = body.decoder.embed_positions.offset
        pairs = [f"{which}_{i}" for i in range(self.layers) for which in ("key", "value")]
        self.past, self.present, self.cross = (
            [f"{of}_{pair}" for pair in pairs] for of in ("past", "present", "cross")
        )
        self.encoder = self._encoder(body, Graph(int8), config.encoder_attention_heads)
        self.decoder = self._decoder(model, Graph(int8))

    def _kept(self, of: str) -> list:
        return ["batch", self.heads, of, self.head_dim]

    def _embedded(self, graph: Graph, side: nn.Module, ids: str, places: str) -> str:
        x = graph.rows(side.embed_tokens.weight, ids, float(side.embed_tokens.embed_scale))
        table = graph.constant(side.embed_positions.weight)
        return graph.norm(graph.node("Add", [x, graph.node("Gather", [table, places])]), side.layernorm_embedding)

    def _block(self, graph: Graph, x: str, norm: nn.LayerNorm, inside) -> str:
        """x + inside(norm(x)), or norm(x + inside(x))."""
        out = graph.node("Add", [x, inside(x if self.post_norm else graph.norm(x, norm))])
        return graph.norm(out, norm) if self.post_norm else out

    def _feed_forward(self, graph: Graph, x: str, layer: nn.Module) -> str:
        def inside(x: str) -> str:
            return graph.linear(graph.node(self.activation, [graph.linear(x, layer.fc1)]), layer.fc2)

        return self._block(graph, x, layer.final_layer_norm, inside)

    def _encoder(self, body: nn.Module, graph: Graph, heads: int) -> bytes:
        side = body.encoder
        tokens = graph.node("Gather", [graph.node("Shape", ["ids"]), graph.constant(torch.tensor(1))])
        first = torch.tensor(side.embed_positions.offset)
        last = graph.node("Add", [tokens, graph.constant(first)])
        places = graph.node("Range", [graph.constant(first), last, graph.constant(torch.tensor(1))])
        x = self._embedded(graph, side, "ids", places)
        for layer in side.layers:
            own = layer.self_attn

            def inside(x: str, own=own) -> str:
                q = graph.linear(x, own.q_proj, own.scaling)
                given = [q, graph.linear(x, own.k_proj), graph.linear(x, own.v_proj)]
                return graph.linear(graph.attention(given, heads), own.out_proj)

            x = self._block(graph, x, layer.self_attn_layer_norm, inside)
            x = self._feed_forward(graph, x, layer)
        if not self.post_norm:
            x = graph.norm(x, side.layer_norm)
        outputs = {}
        reading = [layer.encoder_attn for layer in body.decoder.layers]
        linears = [each for own in reading for each in (own.k_proj, own.v_proj)]
        for name, linear in zip(self.cross, linears, strict=True):
            outputs[name] = (graph.heads(graph.linear(x, linear), self.heads, self.head_dim), 1, self._kept("source"))
        return graph.serialize({"ids": (7, ["batch", "source"])}, outputs)

    def _decoder(self, model: nn.Module, graph: Graph) -> bytes:
        side = model.model.decoder
        x = self._embedded(graph, side, "ids", "position")
        outputs: dict[str, tuple[str, int, list]] = {}
        for i, layer in enumerate(side.layers):
            at = slice(2 * i, 2 * i + 2)

            def own(x: str, layer=layer, at=at) -> str:
                block = layer.self_attn
                given = [graph.linear(x, block.q_proj, block.scaling)]
                given += [graph.linear(x, block.k_proj), graph.linear(x, block.v_proj), "", "", "", *self.past[at]]
                out, *kept = graph.attention(given, self.heads, 3)
                for name, of in zip(self.present[at], kept, strict=True):
                    outputs[name] = (of, 1, self._kept("present"))
                return graph.linear(out, block.out_proj)

            def cross(x: str, layer=layer, at=at) -> str:
                block = layer.encoder_attn
                given = [graph.linear(x, block.q_proj, block.scaling), *self.cross[at]]
                return graph.linear(graph.attention(given, self.heads), block.out_proj)

            x = self._block(graph, x, layer.self_attn_layer_norm, own)
            x = self._block(graph, x, layer.encoder_attn_layer_norm, cross)
            x = self._feed_forward(graph, x, layer)
        if not self.post_norm:
            x = graph.norm(x, side.layer_norm)
        logits = graph.head(x, model.lm_head.weight, model.final_logits_bias.flatten())
        token = graph.node("ArgMax", [graph.node("Add", [logits, "forbidden"])], axis=1, keepdims=1)
        size = model.lm_head.weight.shape[0]
        ends = {"token": (token, 7, ["batch", 1]), "logits": (logits, 1, ["batch", size])}
        inputs = {"ids": (7, ["batch", 1]), "position": (7, [1]), "forbidden": (1, [size])}
        inputs |= {name: (1, self._kept("past")) for name in self.past}
        inputs |= {name: (1, self._kept("source")) for name in self.cross}
        return graph.serialize(inputs, ends | outputs)
