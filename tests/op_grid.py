"""A sample call of every op, tiny and odd: one table for the GPU lane's sanitizers, guard pages, graphs and streams.

`python tests/op_grid.py [cuda]` runs it through every backend that takes CUDA tensors and compares it with eager on the
CPU; exit code 1 if anything differs. `TRITON_INTERPRET=1 python tests/op_grid.py cpu` does so in Triton's interpreter,
`tiny` instead of `cpu` with one shape. Needs no pytest.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch

FORMS = ((8, False, -1), (4, False, -1), (4, False, 32), (2, False, -1), (2, True, -1), (2, True, 64))
MODES = (("per_token", False), ("per_tensor", False), ("static", True))  # and whether it takes act_scale


@dataclass(frozen=True)
class Sample:
    """One call: `call(backend, *operands)` gives a tensor or a tuple of them."""

    name: str
    call: Callable
    operands: tuple
    #: 0 where the contract is equal bits; else the share of the largest value that floats may differ by, codes by one.
    within: float = 0.0
    #: Places of the operands whose first axis counts independent rows, as every result's does; () where none do.
    rows: tuple[int, ...] = ()

    def run(self, backend: str) -> tuple[torch.Tensor, ...]:
        results = self.call(backend, *self.operands)
        return results if isinstance(results, tuple) else (results,)

    def placed(self, place: Callable) -> Sample:
        """With every operand where `place(tensor)` puts it."""
        return replace(self, operands=tuple(None if t is None else place(t) for t in self.operands))

    def only(self, rows: slice) -> Sample:
        """The same call on some of its rows."""
        cut = tuple(t[rows] if i in self.rows and t is not None else t for i, t in enumerate(self.operands))
        return replace(self, operands=cut)


def packed(g, n, k, form):
    """qweight, weight_scale, group_mult and what the ops want to know of them, in their order."""
    bits, four_level, group_size = form
    low, high = (-1, 2) if bits == 2 and not four_level else (-(1 << (bits - 1)), 1 << (bits - 1))
    codes = torch.randint(low, high, (n, k), generator=g).numpy()
    mult = None
    if group_size != -1:
        mult = torch.randint(1, 100, (n, -(-k // group_size)), generator=g).to(torch.uint8)
    return (torch.from_numpy(oracle.pack_fast(codes, bits)), torch.rand(n, generator=g) * 0.02 + 1e-3, mult)


def samples(m: int, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> list[Sample]:
    """Every op with M tokens, N outputs and K inputs; operands on the CPU."""
    from dqkernels import ops

    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=g) * 2).to(dtype)

    one = torch.tensor([0.0213])
    found = []
    for mode, static in MODES:
        apart = (0,) if mode != "per_tensor" else ()
        act_scale = one if static else None
        found.append(
            Sample(
                f"quantize_activation {mode}",
                lambda backend, x, s, mode=mode: ops.quantize_activation(x, mode, 2.5, True, s, backend=backend),
                (normal(m, k), act_scale), rows=apart,
            )
        )  # fmt: skip
        found.append(
            Sample(
                f"layernorm_quantize {mode}",
                lambda backend, x, r, w, b, s, mode=mode: ops.layernorm_quantize(
                    x, r, w, b, 1e-5, mode, None, True, s, backend=backend
                ),
                (normal(m, k), normal(m, k) if static else None, normal(k), normal(k), act_scale),
                within=2.0**-6, rows=(0, 1) if apart else (),
            )
        )  # fmt: skip
        found.append(
            Sample(
                f"gelu_quantize {mode}",
                lambda backend, x, s, mode=mode: ops.gelu_quantize(x, mode, 2.5, True, s, backend=backend),
                (normal(m, k), act_scale), within=2.0**-6, rows=apart,
            )
        )  # fmt: skip
    for form in FORMS:
        bits, four_level, group_size = form
        name = f"W{bits}{' four_level' if four_level else ''}{f' group{group_size}' if group_size != -1 else ''}"
        weight = packed(g, n, k, form)
        for mode, static in MODES if group_size == -1 else MODES[:1]:
            found.append(
                Sample(
                    f"qlinear {name} {mode}",
                    lambda backend, x, w, s, mult, b, r, a, form=form, mode=mode: ops.qlinear(
                        x, w, s, mult, b, r, *form, n, mode, 2.5, a, "relu" if r is None else "none", dtype,
                        backend=backend,
                    ),
                    (normal(m, k), *weight, normal(n), normal(m, n) if static else None, one if static else None),
                    rows=(0, 5) if mode != "per_tensor" else (),
                )
            )  # fmt: skip
        found.append(
            Sample(
                f"dequantize_weight {name}",
                lambda backend, *w, form=form: ops.dequantize_weight(*w, *form, n, k, backend=backend), weight,
            )
        )  # fmt: skip
        found.append(
            Sample(
                f"qembedding {name}",
                lambda backend, ids, w, s, mult, p, form=form: ops.qembedding(
                    ids, w, s, mult, p, *form, n, k, 1.5, dtype, backend=backend
                ),
                (torch.randint(0, n, (m,), generator=g), *weight, normal(m, k)), rows=(0, 4),
            )
        )  # fmt: skip
        # Small integers and powers of two, so that float products are exact in any order.
        grad, scale = torch.randint(-4, 5, (m, n), generator=g).to(dtype), torch.full((n,), 0.25)
        passed = torch.randint(0, 256, (m, -(-k // 8)), generator=g).to(torch.uint8)
        mult = None if weight[2] is None else weight[2] % 7 + 1
        found.append(
            Sample(
                f"qlinear_grad_input {name}",
                lambda backend, *o, form=form: ops.gradients.qlinear_grad_input(*o, *form, k, torch.float32, backend),
                (grad, weight[0], scale, mult, passed), rows=(0, 4),
            )
        )  # fmt: skip
    q, steps = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8), torch.full((m,), 0.5)
    found.append(
        Sample(
            "qlinear_grad_weight",
            lambda backend, *o: ops.gradients.qlinear_grad_weight(*o, torch.float32, backend), (grad, q, steps),
        )
    )  # fmt: skip
    for bits, granularity, group_size in ((8, "per_channel", -1), (4, "per_tensor", -1), (4, "per_channel", 32)):
        found.append(
            Sample(
                f"quantize_weight W{bits} {granularity} group{group_size}",
                lambda backend, w, bits=bits, granularity=granularity, group_size=group_size: ops.quantize_weight(
                    w, bits, "absmax", granularity, group_size, 1.5, backend=backend
                ),
                (normal(n, k),),
            )
        )  # fmt: skip
    return found + attention_samples(g, m, n, k, dtype)


def attention_samples(g, queries: int, keys: int, size: int, dtype: torch.dtype) -> list[Sample]:
    """Both attentions, batch 2 and 2 heads; head_dim from K."""
    from dqkernels import ops, reference

    head_dim = size % 97 % 64 + 1
    q, k, v = (torch.randn(2, 2, count, head_dim, generator=g).to(dtype) for count in (queries, keys, keys))
    scale, step = head_dim**-0.5, 1 / 127
    mask = torch.rand(2, 1, 1, keys, generator=g) < 0.8
    bias = torch.randn(1, 2, queries, keys, generator=g).to(dtype)
    found = [
        Sample(
            f"qattention {mode} causal {causal}",
            lambda backend, *o, causal=causal, mode=mode: ops.qattention(*o, causal, scale, mode, 2.5, backend=backend),
            (q, k, v, *rest), within=step, rows=(0, 1, 2, 3) if mode == "per_token" else (),
        )
        for causal, mode, rest in (
            (False, "per_token", (mask, None)), (True, "per_tensor", (None, bias)), (True, "per_token", (None, bias))
        )
    ]  # fmt: skip
    k8, k_scale, _ = ops.quantize_activation(k, "per_token", backend="eager")
    v8, v_scale, _ = ops.quantize_activation(v, "per_token", backend="eager")
    cache = (k8, k_scale, v8, reference.value_scale(v8, v_scale))
    lengths = torch.tensor([keys, keys // 2], dtype=torch.int32)
    beams = torch.tensor([1, 0, 1], dtype=torch.int32)
    of_beams = torch.randn(3, 2, 1, head_dim, generator=g).to(dtype)
    for name, operands, causal in (
        ("its own cache", (q[:, :, :3], *cache, lengths, None, None), True),
        ("beams", (of_beams, *cache, lengths[[0, 1, 0]], beams, bias[:, :, :1]), False),
    ):
        found.append(
            Sample(
                f"qattention_decode {name}",
                lambda backend, *o, causal=causal: ops.qattention_decode(*o, causal, scale, backend=backend),
                operands, within=step, rows=(0, 5, 6) if name == "beams" else (0, 1, 2, 3, 4, 5),
            )
        )  # fmt: skip
    return found


def difference(got, want, within: float) -> str | None:
    """What is wrong with the results, or None."""
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        mine = mine.cpu()
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            return f"result {i} is {mine.dtype} {list(mine.shape)}, not {theirs.dtype} {list(theirs.shape)}"
        if not within:
            bad = (mine != theirs) & ~(mine.isnan() & theirs.isnan())
        elif mine.is_floating_point():
            allowed = within * theirs.double().abs().max() if theirs.numel() else 0
            bad = ~((mine.double() - theirs.double()).abs() <= allowed)
        elif mine.dtype == torch.int8:
            bad = (mine.int() - theirs.int()).abs() > 1
        else:
            continue  # sums of codes that may differ by one each
        if bad.any():
            return f"{int(bad.sum())} of {bad.numel()} elements of result {i}"
    return None


#: (M, N, K): odd; multiples of 16, where loads are wide; a long K, which is split among blocks. The GPU tests compile
#: the last two before the lane's sanitizers come to them.
SHAPES = ((5, 17, 129), (33, 80, 272), (3, 33, 4224))


def run(device: str, backends_of: tuple[str, ...], shapes=SHAPES) -> int:
    """The whole table; prints one line of counts last. Returns 1 if anything differs."""
    from dqkernels import backends

    cases, wrong, refused = 0, [], Counter()
    for seed, shape in enumerate(shapes):
        for sample in samples(*shape, seed):
            there = sample.placed(lambda tensor: tensor.to(device))
            want = sample.run("eager")
            for name in backends_of:
                try:
                    got = there.run(name)
                except backends.BackendError as error:
                    refused[f"{name}: {error}"] += 1
                    continue
                cases += 1
                what = difference(got, want, sample.within)
                if what:
                    wrong.append(f"{name} {sample.name} {'x'.join(map(str, shape))}: {what}")
    for reason, count in refused.items():
        print(f"refused {count}: {reason}")
    print(f"grid: {cases} cases, {len(wrong)} wrong {wrong[:5]}")
    return 1 if wrong else 0


def main() -> int:
    device = sys.argv[1] if sys.argv[1:] else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device\ngrid: 0 cases, 0 wrong []")
        return 0
    with np.errstate(all="ignore"):  # numpy plays the GPU in the interpreter, and warns where a GPU is silent
        if device == "cuda":
            return run(device, ("cuda", "triton"))
        return run("cpu", ("cpu", "triton"), SHAPES[:1] if device == "tiny" else SHAPES)


if __name__ == "__main__":
    sys.exit(main())
