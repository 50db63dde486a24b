"""Sizes of layers by name, for the benchmarks of single layers: weights are random, nothing is downloaded."""

from __future__ import annotations

#: (out_features, in_features) of the distinct linears of a model's layer.
PRESETS: dict[str, tuple[tuple[int, int], ...]] = {
    # Llama 7B: q, k, v and o; gate and up; down. The weights that others publish times of.
    "llama-7b-linear": ((4096, 4096), (11008, 4096), (4096, 11008))
}
