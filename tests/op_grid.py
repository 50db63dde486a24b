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
WEIGHT_RULES = (
    (8, "absmax", "per_channel", -1),
    (4, "absmax", "per_tensor", -1),
    (4, "absmax", "per_channel", 32),
    (4, "mse", "per_channel", -1),
    (2, "ternary", "per_tensor", -1),
    (2, "four_level", "per_channel", 64),
)
MODES = ("per_token", "per_tensor", "static")


@dataclass(frozen=True)
class Sample:
    """One call of an op: its tensors and its other arguments, by name."""

    name: str
    op: str
    operands: dict[str, torch.Tensor | None]
    facts: dict
    #: 0 where the contract is equal bits; else the share of the largest value that floats may differ by, codes by one.
    within: float = 0.0
    #: The operands whose first axis counts independent rows, as every result's does; () where none do.
    rows: tuple[str, ...] = ()

    def run(self, backend: str) -> tuple[torch.Tensor, ...]:
        """The results; of an op that writes into operands, copies of them with what it wrote."""
        from dqkernels import gradients, kv_cache, ops, straight_through

        home = next(module for module in (ops, gradients, straight_through, kv_cache) if self.op in module.SCHEMAS)
        function, operands = getattr(home, self.op), dict(self.operands)
        written = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for name in written:
            old = operands[name]
            operands[name] = torch.empty(old.shape, dtype=old.dtype, device=old.device).copy_(old)
        results = function(**operands, **self.facts, backend=backend)
        if written:
            return tuple(operands[name] for name in written)
        return results if isinstance(results, tuple) else (results,)

    def placed(self, place: Callable) -> Sample:
        """With every operand where `place(tensor)` puts it."""
        return replace(self, operands={name: None if t is None else place(t) for name, t in self.operands.items()})

    def only(self, rows: slice) -> Sample:
        """The same call on some of its rows."""
        cut = {name: self.operands[name][rows] for name in self.rows if self.operands[name] is not None}
        return replace(self, operands=self.operands | cut)


def packed(g, n, k, form):
    """Packed weights as operands, and their form as facts."""
    bits, four_level, group_size = form
    low, high = (-1, 2) if bits == 2 and not four_level else (-(1 << (bits - 1)), 1 << (bits - 1))
    codes = torch.randint(low, high, (n, k), generator=g).numpy()
    mult = None
    if group_size != -1:
        mult = torch.randint(1, 100, (n, -(-k // group_size)), generator=g).to(torch.uint8)
    weight = {"qweight": torch.from_numpy(oracle.pack_fast(codes, bits)),
              "weight_scale": torch.rand(n, generator=g) * 0.02 + 1e-3, "group_mult": mult}  # fmt: skip
    return weight, {"bits": bits, "four_level": four_level, "group_size": group_size}


def samples(m: int, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> list[Sample]:
    """Every op with M tokens, N outputs and K inputs; operands on the CPU."""
    g = torch.Generator().manual_seed(seed)
    found = [*row_samples(g, m, k, dtype), *attention_samples(g, m, n, k, dtype), *cache_samples(g, m, k, dtype)]
    for form in FORMS:
        found += packed_samples(g, m, n, k, form, dtype)
    q, steps = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8), torch.full((m,), 0.5)
    operands = {"grad": torch.randint(-4, 5, (m, n), generator=g).to(dtype), "q": q, "act_scale": steps}
    found.append(Sample("qlinear_grad_weight", "qlinear_grad_weight", operands, {"out_dtype": torch.float32}))
    for bits, quantizer, granularity, group_size in WEIGHT_RULES:
        facts = {
            "bits": bits,
            "quantizer": quantizer,
            "granularity": granularity,
            "group_size": group_size,
            "clip": 1.5,
        }
        name = f"quantize_weight W{bits} {quantizer} {granularity} group{group_size}"
        found.append(Sample(name, "quantize_weight", {"weight": normal(g, dtype, n, k)}, facts))
    return [*found, *train_samples(g, m, n, k, dtype)]


def normal(g, dtype, *shape):
    return (torch.randn(*shape, generator=g) * 2).to(dtype)


def act_scale_of(mode):
    return torch.tensor([0.0213]) if mode == "static" else None


def row_samples(g, m, k, dtype):
    for mode in MODES:
        facts, static = {"mode": mode, "want_sum": True}, {"act_scale": act_scale_of(mode)}
        x, independent = {"x": normal(g, dtype, m, k)}, () if mode == "per_tensor" else ("x",)
        name, more = f"quantize_activation {mode}", {"clip": 2.5}
        yield Sample(name, "quantize_activation", x | static, facts | more, rows=independent)
        yield Sample(f"gelu_quantize {mode}", "gelu_quantize", x | static, facts | more, 2.0**-6, independent)
        residual = normal(g, dtype, m, k) if mode == "static" else None
        norm = {"residual": residual, "weight": normal(g, dtype, k), "bias": normal(g, dtype, k)}
        independent = (*independent, "residual") if independent else ()
        name, more = f"layernorm_quantize {mode}", {"eps": 1e-5, "clip": None}
        yield Sample(name, "layernorm_quantize", x | norm | static, facts | more, 2.0**-6, independent)


def packed_samples(g, m, n, k, form, dtype):
    """What reads packed weights of one form."""
    weight, facts = packed(g, n, k, form)
    group = f" group{form[2]}" if form[2] != -1 else ""
    form_name = f"W{form[0]}{' four_level' if form[1] else ''}{group}"
    for mode in MODES if form[2] == -1 else MODES[:1]:
        residual = normal(g, dtype, m, n) if mode == "static" else None
        more = {"out_features": n, "act_mode": mode, "act_clip": 2.5, "out_dtype": dtype,
                "activation": "relu" if residual is None else "none"}  # fmt: skip
        operands = {"x": normal(g, dtype, m, k), "bias": normal(g, dtype, n), "residual": residual}
        rows = () if mode == "per_tensor" else ("x", "residual")
        static = {"act_scale": act_scale_of(mode)}
        yield Sample(f"qlinear {form_name} {mode}", "qlinear", weight | operands | static, facts | more, rows=rows)
    more = {"out_features": n, "in_features": k}
    yield Sample(f"dequantize_weight {form_name}", "dequantize_weight", weight, facts | more)
    more = {"num_embeddings": n, "embedding_dim": k, "embed_scale": 1.5, "out_dtype": dtype}
    operands = {"ids": torch.randint(0, n, (m,), generator=g), "position": normal(g, dtype, m, k)}
    rows = ("ids", "position")
    yield Sample(f"qembedding {form_name}", "qembedding", weight | operands, facts | more, rows=rows)
    # Small integers and powers of two, so that float products are exact in any order.
    mult = weight["group_mult"]
    exact = {"weight_scale": torch.full((n,), 0.25), "group_mult": None if mult is None else mult % 7 + 1}
    passed = torch.randint(0, 256, (m, -(-k // 8)), generator=g).to(torch.uint8)
    operands = {"grad": torch.randint(-4, 5, (m, n), generator=g).to(dtype), "passed": passed}
    name, more = f"qlinear_grad_input {form_name}", {"in_features": k, "out_dtype": torch.float32}
    rows = ("grad", "passed")
    yield Sample(name, "qlinear_grad_input", weight | exact | operands, facts | more, rows=rows)


def train_samples(g, m, n, k, dtype):
    """The quantizer with learned steps, and the forward pass of the ops of training."""
    for bits, quantizer, count in ((8, "absmax", n), (4, "mse", 1), (2, "ternary", n), (2, "four_level", n)):
        operands = {"weight": normal(g, dtype, n, k), "step": torch.rand(count, generator=g) * 4 / 2**bits + 1e-3}
        facts = {"bits": bits, "quantizer": quantizer, "clip": 1.5}
        rows = "per_tensor" if bits == 4 else "per_channel"
        yield Sample(f"quantize_by_step W{bits} {quantizer} {rows}", "quantize_by_step", operands, facts)
    for form in ((4, False, -1), (2, True, 64)):
        packed_, facts = packed(g, n, k, form)
        master = {"weight": normal(g, dtype, n, k), "log_step": None} | packed_
        facts |= {"weight_clip": None, "out_dtype": dtype}
        codes = {
            "q": torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8),
            "act_scale": torch.rand(m, generator=g) * 0.02 + 1e-3, "row_sum": None, "passed": None,
        }  # fmt: skip
        operands = {"x": normal(g, dtype, m, k), "bias": normal(g, dtype, n)} | codes | master
        name = f"W{form[0]}{' four_level' if form[1] else ''}"
        yield Sample(f"qlinear_train {name}", "qlinear_train", operands, facts, rows=("x", "q", "act_scale"))
        operands = {"ids": torch.randint(0, n, (m,), generator=g)} | master
        more = {"padding_idx": -1, "embed_scale": 1.5}
        yield Sample(f"qembedding_train {name}", "qembedding_train", operands, facts | more, rows=("ids",))


def attention_samples(g, queries, keys, size, dtype):
    """Both attentions, batch 2 and 2 heads; head_dim from K. They may differ by one step of a quantized value."""
    from dqkernels import ops, reference

    head_dim, step = size % 97 % 64 + 1, 1 / 127
    q, k, v = (torch.randn(2, 2, count, head_dim, generator=g).to(dtype) for count in (queries, keys, keys))
    mask = torch.rand(2, 1, 1, keys, generator=g) < 0.8
    bias = torch.randn(1, 2, queries, keys, generator=g).to(dtype)
    facts = {"softmax_scale": head_dim**-0.5, "clip": 2.5}
    for causal, mode, mask_or_none, bias_or_none in (
        (False, "per_token", mask, None), (True, "per_tensor", None, bias), (True, "per_token", None, bias)
    ):  # fmt: skip
        operands = {"q": q, "k": k, "v": v, "mask": mask_or_none, "bias": bias_or_none}
        rows = () if mode == "per_tensor" else ("q", "k", "v", "mask")
        name, more = f"qattention {mode} causal {causal}", {"causal": causal, "mode": mode}
        yield Sample(name, "qattention", operands, facts | more, step, rows)
    yield attention_backward_sample(g, q, k, v, mask, bias)
    cache = {}
    for name, x in (("k", k), ("v", v)):
        codes, scale, _ = ops.quantize_activation(x, "per_token", backend="eager")
        scale = reference.value_scale(codes, scale) if name == "v" else scale
        cache |= {f"{name}_cache": codes, f"{name}_scale": scale}
    lengths, rows = torch.tensor([keys, keys // 2], dtype=torch.int32), ("q", "lengths")
    own = {"q": q[:, :, :3].contiguous(), "lengths": lengths, "source": None, "bias": None}
    facts |= {"mode": "per_token"}
    yield Sample("qattention_decode its own cache", "qattention_decode", own | cache, facts | {"causal": True}, step,
                 (*rows, *cache))  # fmt: skip
    beams = {"q": torch.randn(3, 2, 1, head_dim, generator=g).to(dtype), "lengths": lengths[[0, 1, 0]],
             "source": torch.tensor([1, 0, 1], dtype=torch.int32), "bias": bias[:, :, :1].contiguous()}  # fmt: skip
    yield Sample("qattention_decode beams", "qattention_decode", beams | cache, facts | {"causal": False}, step,
                 (*rows, "source"))  # fmt: skip
    behind = torch.arange(keys) >= own["lengths"].unsqueeze(1)
    source = torch.randint(0, 2, (2, keys), generator=g).masked_fill(behind, 99).int()
    yield Sample("qattention_decode by key", "qattention_decode", own | cache | {"source": source},
                 facts | {"causal": True}, step, (*rows, "source"))  # fmt: skip


def cache_samples(g, tokens, size, dtype):
    """New keys and values for 3 rows of 2 heads, into caches of rubbish; a zero row among the values."""
    head_dim, capacity = size % 97 % 64 + 1, tokens + 2
    k, v = (normal(g, dtype, 3, tokens, 2, head_dim).transpose(1, 2) for _ in range(2))
    v[1, 0, 0] = 0
    operands = {"k": k, "v": v}
    for name in ("k", "v"):
        operands[f"{name}_cache"] = torch.randint(-128, 128, (3, 2, capacity, head_dim), generator=g).to(torch.int8)
        operands[f"{name}_scale"] = torch.rand(3, 2, capacity, generator=g)
    position = {"position": torch.tensor([0, 2, 1], dtype=torch.int32)}
    name, rows = "quantize_into_cache", tuple(operands)
    yield Sample(f"{name} per_token", name, operands | position, {"act_mode": "per_token", "clip": 2.5},
                 rows=(*rows, "position"))  # fmt: skip
    yield Sample(f"{name} per_tensor", name, operands | {"position": None}, {"act_mode": "per_tensor"})


def attention_backward_sample(g, q, k, v, mask, bias):
    """The same gradients as eager's but for the order of float sums and one step of a share."""
    from dqkernels import ops, reference

    operands = {"grad": normal(g, q.dtype, *q.shape), "mask": mask, "bias": bias}
    for name, x in (("q", q * q.shape[-1] ** -0.5), ("k", k), ("v", v)):
        codes, scale, _ = ops.quantize_activation(x, "per_token", 2.5, backend="eager")
        scale = reference.value_scale(codes, scale) if name == "v" else scale
        passed = reference.pack_bits((x.abs() < 2.5).reshape(-1, x.shape[-1]))
        operands |= {f"{name}8": codes, f"{name}_scale": scale, f"{name}_passed": passed}
    facts = {"causal": True, "softmax_scale": q.shape[-1] ** -0.5, "want_bias": True, "out_dtype": torch.float32}
    return Sample("qattention_backward", "qattention_backward", operands, facts, 2.0**-5)


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

    cases, wrong = 0, []
    if device == "cuda" and backends.available("cuda", "cuda")[0]:
        for calls in (skinny_calls, attention_calls):
            count, found = calls()
            cases, wrong = cases + count, wrong + found
    refused = Counter()
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


def skinny_calls() -> tuple[int, list[str]]:
    """The skinny CUDA GEMM at the edges of its slices, cuts forced and groups too, and behind a LayerNorm: the number
    of calls and what is wrong. Beside `samples`, whose ops cannot ask for a cut or a norm."""
    import skinny_calls as calls

    count, wrong = 0, []
    for m in (1, 8, 16, 17, 64, 65):
        for form, plan in (((8, "absmax", 0), (2, 2)), ((4, "absmax", 32), (8, 1)), ((2, "four_level", 64), (1, 3)),
                           ((4, "absmax", 0), (4, 2))):  # fmt: skip
            x = "int8" if m > 16 else "fp16"
            case = calls.plain(form, m, 33, 700, x=x, y="fp16", bias="fp16", residual="fp32", plan=plan, parts=2)
            built = calls.cases.build(case)
            said = calls.wrong(calls.gemm(calls.placed(built, "cuda")), built.expected)
            wrong += [f"skinny {case.name}: {said}"] if said else []
            count += 1
    for m, k in ((1, 129), (16, 700)):
        built, norm = calls.norm_case(m, k, "fp16")
        normalized, y = calls.gemm(calls.placed(built, "cuda"), norm=calls.norm_on(norm, "cuda"))
        said = calls.wrong([y], [calls.expected_after_norm(built, normalized)])
        wrong += [f"skinny norm {m}x{k}: {said}"] if said else []
        count += 1
    return count, wrong


def attention_calls() -> tuple[int, list[str]]:
    """CUDA decode attention in every form, cut and kind of row: the number of calls and what is wrong. Beside
    `samples`, whose op cannot ask for a cut."""
    import attention_calls as calls

    built, wrong = calls.samples(), []
    for each in built:
        try:
            calls.cases.assert_right(each, calls.call(each, "cuda"))
        except AssertionError as error:
            wrong.append(f"attention {each.case.name}: {str(error).splitlines()[0]}")
    return len(built), wrong


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
