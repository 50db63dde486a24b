"""`bench kernels`: its rows, the proofs that stand before the timing, floors, record, table. Nothing about speed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from rich.console import Console

from dqkernels import backends, fused, gradients, ops, straight_through
from dqkernels.bench import floors, kernel_cases, kernels, linear, proofs, protocol, record, rows
from dqkernels.bench.kernel_cases import COPY, Case, Way
from dqkernels.cli import main

CPU, FP32 = torch.device("cpu"), torch.float32

#: Every op and variant, at sizes that no tile divides.
TINY = [
    ("quantize_activation", (5, 40), "per_token"),
    ("quantize_activation", (5, 40), "per_tensor"),
    ("layernorm_quantize", (3, 48), ""),
    ("gelu_quantize", (3, 48), ""),
    ("qlinear_multi", (3, 20, 48), "W4"),
    ("qlinear_multi", (17, 16, 48), "W2"),
    ("quantize_weight", (20, 48), "W8"),
    ("quantize_weight", (20, 48), "W2"),
    ("quantize_by_step", (20, 48), "W4"),
    ("dequantize_weight", (20, 48), "W4"),
    ("qembedding", (7, 50, 48), "W2"),
    ("qattention", (2, 3, 9, 17, 16), ""),
    ("qattention", (1, 2, 9, 9, 16), "causal"),
    ("qattention_decode", (2, 3, 2, 17, 16), ""),
    ("qattention_backward", (2, 3, 9, 17, 16), ""),
    ("qattention_backward", (1, 2, 9, 9, 16), "causal"),
    ("qlinear_grad_input", (6, 20, 48), "W8"),
    ("qlinear_grad_input", (6, 20, 48), "W2"),
    ("qlinear_grad_weight", (6, 20, 48), ""),
]
TINY_IDS = [f"{op} {variant}".strip() for op, _, variant in TINY]
#: Their baseline, then what else of torch's is timed beside them.
PEERS = {
    "quantize_activation": [COPY],
    "layernorm_quantize": ["torch layer_norm", COPY],
    "gelu_quantize": ["torch gelu", COPY],
    "qlinear_multi": ["torch unfused"],
    "quantize_weight": [COPY],
    "quantize_by_step": [COPY],
    "dequantize_weight": [COPY],
    "qembedding": ["torch embedding", COPY],
    "qattention": ["torch sdpa"],
    "qattention_decode": ["torch sdpa", COPY],
    "qattention_backward": ["torch unfused"],
    "qlinear_grad_input": ["torch matmul"],
    "qlinear_grad_weight": ["torch matmul"],
}

#: What runs an op that no backend has as a kernel of its own.
STEPS = {"qlinear_multi": "qgemm"}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Rounds end the timing, never the clock: these tests pass on a machine that crawls."""
    for module in (kernels, linear):
        monkeypatch.setattr(module, "_MAX_ROUNDS", 2)
    monkeypatch.setattr(protocol, "MAX_COPIES", 4)


def a_case(group, dtype=FP32, names=("eager",), device=CPU) -> Case:
    op, shape, variant = group
    case = Case(op, shape, variant, dtype, device, list(names))
    kernels.OPS[op][0](case)
    return case


def text_of(result) -> str:
    console = Console(width=80, record=True, file=open(os.devnull, "w"), color_system=None)
    console.print(kernels.render(result) if "dtypes" in result["settings"] else linear.render(result))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text, text
    return text


# ------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_op_is_proven_and_timed_on_every_backend_that_can(dtype, tmp_path):
    path = tmp_path / "kernels.json"
    made = kernels.run(TINY, dtype=dtype, device="cpu", seconds=1000, out=path, probe=False)
    assert record.read(path) == made and made["kind"] == "kernels"
    for op, shape, variant in TINY:
        found = [r for r in made["rows"] if (r.get("op"), r.get("variant")) == (op, variant) and r["shape"] == [*shape]]
        timed = [r for r in found if r["status"] == "timed"]
        assert not [r for r in found if r["status"] not in ("timed", "not compared")], found
        able = [
            n
            for n in ("cpu", "eager")
            if backends.refusal(n, STEPS.get(op, op.removeprefix("qlinear_")), "cpu", {}) is None
        ]
        wanted = PEERS[op] + [f"dqkernels {name}" for name in able]
        assert [r["candidate"] for r in timed] == [name for name in wanted for _ in ("cold", "warm")]
        for row in timed:
            assert row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["samples"] == 2
            assert row["host_us"] is None and row["floor_us"] is None and row["moved_bytes"] > 0
            assert ("copy_fraction" in row) == (COPY in wanted)
            assert row["rotated_bytes"] == (4 * row["moved_bytes"] if row["cache"] == "cold" else 0)
        base = {r["cache"]: r for r in timed if r["candidate"] == wanted[0]}
        assert all(row["speedup_ratio"] == 1 for row in base.values())
        assert {r["reason"] for r in found if r["status"] == "not compared"} <= {"has no such op"}


def test_the_plans_are_sound_and_cover_the_ops():
    names = set(ops.SCHEMAS) | set(gradients.SCHEMAS) | set(fused.SCHEMAS) | set(straight_through.SCHEMAS)
    assert set(kernels.OPS) <= names
    assert {"layernorm_quantize", "qembedding", "qattention_decode", "qlinear_grad_weight"} <= set(kernels.OPS)
    for place in ("cpu", "cuda"):
        plan = kernels.default_groups(torch.device(place))
        assert {op for op, _, _ in plan} == set(kernels.OPS) and len(plan) == len(set(plan))
        assert [kernels._checked(*group) for group in plan] == plan
        for op in ("quantize_weight", "quantize_by_step", "dequantize_weight", "qembedding", "qlinear_grad_input"):
            assert {variant for name, _, variant in plan if name == op} == set(kernels.WIDTHS)
    large = kernels.default_groups(torch.device("cuda"), ["qattention", "quantize_weight"], [4])
    assert ("qattention", (8, 16, 1024, 1024, 64), "") in large and ("quantize_weight", (4096, 1024), "W4") in large
    assert not [variant for _, _, variant in large if variant in ("W8", "W2")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ops": ["softmax"]}, "softmax"),
        ({"bits": [3]}, "bits must be"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"backends": ["cublas"]}, "cublas"),
        ({"groups": [("softmax", (1, 2), "")]}, "softmax"),
        ({"groups": [("gelu_quantize", (1, 2, 3), "")]}, r"\(tokens, features\)"),
        ({"groups": [("gelu_quantize", (0, 2), "")]}, "above 0"),
        ({"groups": [("quantize_weight", (16, 16), "per_token")]}, "W8"),
        ({"groups": [("qattention", (1, 1, 2, 3, 8), "causal")]}, "as many queries as keys"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        kernels.run(device="cpu", probe=False, **arguments)


def test_what_cannot_be_compared_says_why(monkeypatch):
    made = kernels.run(
        [("gelu_quantize", (3, 8), "")], device="cpu", seconds=1000, backends=["cuda", "cpu", "eager"], probe=False
    )
    reasons = {r["candidate"]: r["reason"] for r in made["rows"] if r["status"] == "not compared"}
    assert reasons["dqkernels cuda"] == "takes cuda tensors, not cpu"
    if "dqkernels cpu" in reasons:  # where the core is built, it still has no GELU
        assert reasons["dqkernels cpu"] == "has no such op" or "core" in reasons["dqkernels cpu"]
    assert "not compared: dqkernels cuda: takes cuda tensors" in " ".join(text_of(made).split())
    # Triton's interpreter can compute on a CPU, and its time says nothing about anything.
    monkeypatch.setattr(backends, "available", lambda name, device_type: (True, "Triton's interpreter"))
    case = a_case(TINY[0], names=["triton", "eager"])
    assert [way.name for way in case.ways] == [COPY, "dqkernels eager"]
    assert "interpreter" in case.absent["dqkernels triton"]


def test_decode_attention_in_cuda_has_a_row_beside_tritons(monkeypatch):
    """By its name, though `auto` would not take it; of heads that it has not the row says so."""
    monkeypatch.setattr(backends, "available", lambda name, device_type: (True, "here"))
    group = ("qattention_decode", (2, 3, 2, 17, 16), "")
    ways = [way.name for way in a_case(group, names=["cuda", "eager"]).ways]
    assert ways == ["torch sdpa", COPY, "dqkernels cuda", "dqkernels eager"]
    case = a_case(("qattention_decode", (2, 3, 2, 17, 18), ""), names=["cuda"])
    assert case.absent["dqkernels cuda"] == "has no qattention_decode of head_dim=18, only multiples of 4 up to 128"


def test_a_weight_rule_without_a_kernel_is_not_compared(monkeypatch):
    monkeypatch.setattr(backends, "refusal", lambda name, op, device, facts: f"no {facts['quantizer']}")
    case = a_case(("quantize_weight", (16, 16), "W2"), names=["cpu"])
    assert case.absent == {"dqkernels cpu": "no four_level"}


def test_groups_beyond_the_time_are_named():
    made = kernels.run(TINY[:2], device="cpu", seconds=-1.0, probe=False)
    assert [r["status"] for r in made["rows"]][:2] == ["not reached"] * 2
    assert "not reached: quantize_activation 5x40 per_token fp32" in " ".join(text_of(made).split())


# ----------------------------------------------------------------------------------------- proofs


def nudged(tensor: torch.Tensor, by: float = 0.01) -> torch.Tensor:
    """One element is another one: the next code, or off by a hundredth of the largest."""
    tensor = tensor.clone()
    flat = tensor.view(-1)
    at = int(flat.double().abs().argmin())
    flat[at] = flat[at] + 1 if not tensor.is_floating_point() else flat[at] + by * flat.abs().max()
    return tensor


def broken(call, index: int, change):
    """`call`, with one of its outputs changed."""

    def wrong(*inputs):
        found = call(*inputs)
        if isinstance(found, torch.Tensor):
            return change(found)
        return tuple(change(one) if i == index else one for i, one in enumerate(found))

    return wrong


@pytest.mark.parametrize("group", TINY, ids=TINY_IDS)
def test_a_candidate_that_computes_something_else_is_refused_and_never_timed(group):
    changes = {"value": nudged, "dtype": lambda y: y.double(), "shape": lambda y: y[1:], "nan": lambda y: y * torch.nan}
    wrong: dict[str, str] = {}

    def build(case: Case) -> None:
        kernels.OPS[case.op][0](case)
        ours = next(way for way in case.ways if way.backend == "eager")
        found = ours.call(*ours.inputs)
        outputs = [found] if isinstance(found, torch.Tensor) else found
        for index, output in enumerate(outputs):
            for what, change in changes.items() if output.numel() else ():
                way = copy.copy(ours)
                way.name, way.call = f"{what} of output {index}", broken(ours.call, index, change)
                wrong[way.name] = what
                case.ways.append(way)
        raising = copy.copy(ours)
        raising.name, raising.call = "raising", lambda *inputs: 1 / 0
        case.ways.append(raising)

    op, shape, variant = group
    found = kernels.measure(Case(op, shape, variant, FP32, CPU, ["eager"]), 1000, floors.A100_40, build)
    by_name = {row["candidate"]: row for row in found if row["cache"] == "cold"}
    assert len(wrong) >= 4 and by_name["raising"]["reason"].startswith("ZeroDivisionError")
    for name in [*wrong, "raising"]:
        row = by_name[name]
        assert row["status"] == "refused" and row["reason"] and "median_us" not in row, (name, row)
    assert all("Error" not in by_name[name]["reason"] for name, what in wrong.items() if what in ("value", "nan"))
    assert by_name["dqkernels eager"]["status"] == "timed" and by_name["dqkernels eager"]["samples"] == 2


@pytest.mark.parametrize("group", [g for g in TINY if PEERS[g[0]][0] != COPY], ids=lambda g: g[0])
def test_a_float_peer_that_computes_something_else_is_refused(group):
    case = a_case(group)
    peer = case.ways[0]
    y = peer.call(*peer.inputs)
    assert peer.prove(y) is None
    for change in (lambda y: y * 1.05, nudged_column, lambda y: y * torch.nan, lambda y: y[..., 1:]):
        wrong = (*y[:-1], change(y[-1])) if isinstance(y, tuple) else change(y)
        assert peer.prove(wrong) is not None


def nudged_column(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[..., 3] = y[..., 4]
    return y


def test_a_copy_that_copies_nothing_is_refused():
    case = a_case(TINY[0])
    source, target = case.ways[0].inputs
    assert case.ways[0].prove(target) is not None and case.ways[0].prove(target.copy_(source)) is None


@pytest.mark.parametrize(
    "group", [g for g in TINY if not any(word in g[0] for word in ("grad", "gelu", "backward"))], ids=str
)
def test_a_device_proves_a_part_against_the_cpu_as_well(group, monkeypatch):
    """A device whose own reference has the defect of its kernel: only the second look can see it."""
    op, shape, variant = group
    case = a_case(group)
    way = case.ways[-1]
    # In the codes that follow from y, in the scales of a weight (its codes end in padding), else in the one output.
    index = 1 if op in ("layernorm_quantize", "quantize_weight", "quantize_by_step", "qlinear_multi") else 0
    bad = broken(way.call, index, last_changed)(*way.inputs)
    name = "attention" if "attention" in op else "all_bits"
    first_look, looks, real = shape[0] if name == "attention" else 1, [], getattr(proofs, name)

    def blind_at_first(*given):
        looks.append(given)
        return None if len(looks) <= first_look else real(*given)

    assert way.prove(bad) is not None
    monkeypatch.setattr(proofs, name, blind_at_first)
    assert way.prove(bad) is None and len(looks) == first_look
    del looks[:]
    monkeypatch.setattr(Case, "proves_twice", True)
    seen = way.prove(bad)
    assert len(looks) == first_look + 1
    assert seen is not None
    del looks[:]
    assert way.prove(way.call(*way.inputs)) is None and len(looks) == first_look + 1


def last_changed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] += 1
    return tensor


def test_rows_of_the_part_hold_the_first_the_last_and_no_more_than_16():
    assert kernel_cases.some_rows(3).tolist() == [0, 1, 2] and kernel_cases.some_rows(1).tolist() == [0]
    found = kernel_cases.some_rows(4096).tolist()
    assert (found[0], found[-1], len(found)) == (0, 4095, 16)


def test_the_bound_of_attention_allows_flips_and_nothing_else():
    """One query whose 127 exp(s - m) lies on a half integer: either code is right there, and at no other place."""
    q8 = torch.tensor([[[1]]], dtype=torch.int8)
    k8 = torch.tensor([[[0], [100]]], dtype=torch.int8)
    v8 = torch.tensor([[[127], [-127]]], dtype=torch.int8)
    one = torch.ones(1, 1)
    seen = torch.ones(1, 2, dtype=torch.bool)
    for code, on_the_edge in ((63.5, True), (63.2, False)):
        # exp(100 ks) is the share of the other key: the first key's score is 0, and the largest.
        k_scale = torch.full((1, 2), float(torch.log(torch.tensor(code / 127, dtype=torch.float64)) / 100))
        given = (q8, one, k8, k_scale, v8, one.expand(1, 2), seen)
        for c in (63, 64, 65):
            y = torch.tensor([[[(127 * 127 - 127 * c) / (127 + c)]]])
            right = c in (63, 64) if on_the_edge else c == 63
            # A flip of e and c together: twice what one of them may move.
            assert (proofs.attention(y, *given) is None) == right, (code, c)


def test_gelu_codes_are_bounded_by_half_a_step():
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    truth = torch.nn.functional.gelu(x.double())
    q, scale, row_sum = ops.gelu_quantize(x, "per_token", backend="eager")
    assert proofs.gelu_codes((q, scale, row_sum), truth, torch.nn.functional.gelu(x), FP32) is None
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    other = ops.quantize_activation(tanh, "per_token", backend="eager")
    assert "times" in proofs.gelu_codes(other, truth, torch.nn.functional.gelu(x), FP32)
    assert proofs.gelu_codes((q, scale * 1.001, row_sum), truth, torch.nn.functional.gelu(x), FP32)[:6] == "scales"


def test_tritons_results_pass_their_proofs():
    """In the interpreter, where nothing is timed: what the GPU lane would refuse is seen here."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", "import test_bench_kernels as t; t.prove_triton()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and done.stdout.endswith(f"{len(TINY)} proven\n"), done.stdout + done.stderr


def prove_triton() -> None:
    proven = 0
    for index, group in enumerate(TINY):
        case = a_case(group, (torch.float32, torch.float16, torch.bfloat16)[index % 3])
        way = case.ways[-1]
        call, name = way.call.args
        assert name == "eager"
        reason = way.prove(call(*way.inputs, "triton"))
        assert reason is None, (group, reason)
        proven += 1
    print(f"{proven} proven")


# ------------------------------------------------------------------------------------ bytes, floors

M, K, N = 5, 40, 20
#: Bytes read and written by hand, fp32: of ours, then of the float peer.
MOVED = {
    ("quantize_activation", (M, K), "per_token"): (4 * M * K + M * K + 4 * M, None),
    ("layernorm_quantize", (M, K), ""): (3 * 4 * M * K + M * K + 4 * M + 2 * 4 * K, 3 * 4 * M * K + 2 * 4 * K),
    ("gelu_quantize", (M, K), ""): (4 * M * K + M * K + 4 * M, 2 * 4 * M * K),
    ("quantize_weight", (N, K), "W2"): (4 * N * K + N * K // 4 + 4 * N, None),
    ("dequantize_weight", (N, K), "W4"): (N * K // 2 + 4 * N + 4 * N * K, None),
    ("qembedding", (M, N, K), "W2"): (8 * M + M * K // 4 + 4 * M + 4 * M * K, 8 * M + 2 * 4 * M * K),
    ("qattention", (2, 3, 7, 9, 8), ""): (2 * 4 * 6 * 8 * (7 + 9), 2 * 4 * 6 * 8 * (7 + 9)),
    # Ours reads each source once for its 4 beams, and a scale per key; SDPA reads every beam's copy.
    ("qattention_decode", (2, 4, 3, 9, 8), ""): (
        2 * 2 * 3 * 9 * (8 + 4) + 2 * 8 * 3 * 8 * 4,
        2 * 8 * 3 * 9 * 8 * 4 + 2 * 8 * 3 * 8 * 4,
    ),
    # The gradient and three results in fp32, beside codes and scales, or beside q, k and v.
    ("qattention_backward", (2, 3, 7, 9, 8), ""): (
        2 * 4 * 6 * 8 * (7 + 9) + 6 * (8 + 4) * (7 + 2 * 9),
        2 * 4 * 6 * 8 * (7 + 9) + 4 * 6 * 8 * (7 + 2 * 9),
    ),
    ("qlinear_grad_input", (M, N, K), "W4"): (4 * M * N + N * K // 2 + 4 * N + 4 * M * K, 4 * (M * N + N * K + M * K)),
    ("qlinear_grad_weight", (M, N, K), ""): (4 * M * N + M * K + 4 * M + 4 * N * K, 4 * (M * N + M * K + N * K)),
}


@pytest.mark.parametrize("group", MOVED, ids=lambda group: group[0])
def test_bytes_are_the_hand_counted_ones(group):
    case = a_case(group)
    ours, peer = MOVED[group]
    by_name = {way.name: way for way in case.ways}
    assert by_name["dqkernels eager"].moved_bytes == ours
    if COPY in by_name:
        source, target = by_name[COPY].inputs
        assert by_name[COPY].moved_bytes == ours
        assert 0 <= source.numel() * 4 + target.numel() * 4 - ours < 8
    if peer is not None:
        assert case.ways[0].moved_bytes == peer
    if group[0] in ("quantize_activation", "gelu_quantize", "layernorm_quantize"):
        way = by_name["dqkernels eager"]
        outputs = way.call(*way.inputs)
        seen = sum(t.numel() * t.element_size() for t in (*way.inputs, *outputs))
        assert ours == seen + (2 * 4 * K if group[0] == "layernorm_quantize" else 0)


def test_floors_of_ops():
    # 10^6 bytes at 1555 GB/s; 10^9 operations at 624 and 312 TOPS, none known for fp32.
    card = floors.A100_40
    assert floors.op_floor(card, 1_000_000) == floors.Floor(pytest.approx(1 / 1.555), "memory")
    assert floors.op_floor(card, 1_000, 1_000_000_000, 8) == floors.Floor(pytest.approx(1e3 / 624), "compute")
    assert floors.op_floor(card, 1_000, 1_000_000_000, 16) == floors.Floor(pytest.approx(1e3 / 312), "compute")
    assert floors.op_floor(card, 1_000, 1_000_000_000, 32).bound == "memory"
    assert floors.op_floor(None, 1_000) is None
    assert floors.gemm_floor(card, 64, 4096, 4096, 2) == floors.op_floor(
        card, floors.gemm_bytes(64, 4096, 4096, 2), floors.gemm_ops(64, 4096, 4096), 2
    )


def test_operations_are_counted_once_and_causal_ones_as_a_triangle():
    square, causal = a_case(("qattention", (2, 3, 8, 8, 16), "")), a_case(("qattention", (2, 3, 8, 8, 16), "causal"))
    assert [way.operations for way in square.ways] == [4 * 6 * 64 * 16] * 2
    assert [way.operations for way in causal.ways] == [4 * 6 * 36 * 16] * 2
    assert [way.peak_bits for way in a_case(next(g for g in TINY if g[0] == "qattention"), torch.bfloat16).ways] == [
        16,
        8,
    ]
    backward = a_case(next(g for g in TINY if g[0] == "qlinear_grad_input"), torch.bfloat16)
    assert {(way.operations, way.peak_bits) for way in backward.ways} == {(2 * 6 * 20 * 48, 16)}


def test_share_of_the_copy_is_bytes_over_bytes_in_the_same_cache():
    made = {
        (COPY, "cold"): {"moved_bytes": 3000, "median_us": 2.0},
        ("ours", "cold"): {"moved_bytes": 3000, "median_us": 2.5},
        ("peer", "cold"): {"moved_bytes": 6000, "median_us": 8.0},
        ("slow", "cold"): {"moved_bytes": 3000},
        (COPY, "warm"): {"moved_bytes": 3000},
        ("ours", "warm"): {"moved_bytes": 3000, "median_us": 1.0},
    }
    kernels._share_of_copy(made)
    assert made["ours", "cold"]["copy_fraction"] == 0.8 and made["ours", "cold"]["copy_gb_per_s"] == 1.5
    assert made["peer", "cold"]["copy_fraction"] == 0.5 and made[COPY, "cold"]["copy_fraction"] == 1
    assert "copy_fraction" not in made["slow", "cold"] and "copy_fraction" not in made["ours", "warm"]


# ----------------------------------------------------------------------------- rotation, outside a graph


def test_cold_calls_read_and_write_memory_of_their_own():
    case = a_case(("gelu_quantize", (4, 64), ""))
    way = case.ways[-1]
    seen, outputs = [], []

    def call(x):
        found = x + 1
        seen.append(x.data_ptr())
        outputs.append(weakref.ref(found))
        return found

    way.call = call
    calls = case.calls(way, cold=True)
    assert len(calls) == 4
    for one in calls:
        one()
    assert len(set(seen)) == 4 and way.inputs[0].data_ptr() == seen[0]
    alive = [ref() for ref in outputs]
    assert len({found.data_ptr() for found in alive}) == 4, "the outputs of a rotation live side by side"
    del alive
    for one in calls:
        one()
    assert [ref() is None for ref in outputs] == [True] * 4 + [False] * 4 and seen[4:] == seen[:4]
    assert len(case.calls(way, cold=False)) == 1


def test_what_is_held_bounds_the_copies(monkeypatch):
    monkeypatch.setattr(protocol, "MAX_COPIES", 2048)
    monkeypatch.setattr(protocol, "cache_bytes", lambda device: 10 << 20)
    most = {"cpu": 64 << 20}
    assert protocol.copies_for(1 << 20, CPU, 0, most) == 31
    assert protocol.copies_for(1 << 20, CPU, 8 << 20, most) == 8  # a call that reads 1 MiB of 8
    assert protocol.copies_for(1 << 20, CPU, 99 << 20, most) == 4
    case = a_case(TINY[0], device=CPU)
    slow = Way("eager", lambda x: x, (torch.ones(1),), 4, lambda y: None, "", backend="eager")
    assert len(case.calls(slow, cold=True)) == 2048
    case.device = torch.device("cuda")
    monkeypatch.setattr(kernel_cases, "ROTATION_BYTES", {"cuda": 1 << 30})
    assert len(case.calls(slow, cold=True)) == kernel_cases._SLOW_COPIES


def test_host_time_leaves_the_device_out_and_eager_time_does_not(monkeypatch):
    log: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: log.append("clock") or float(next(clock)))
    sampler = protocol.EagerSampler(lambda: log.append("call"), torch.device("cuda"), 4)
    took = sampler.sample()
    assert log == ["wait", "clock", *["call"] * 4, "clock", "wait", "clock"] and took == 1 / 4
    assert sampler.whole == [2 / 4]


def test_nothing_is_outside_a_graph_on_a_cpu_and_eager_ops_are_timed_one_by_one(monkeypatch):
    assert protocol.outside_graphs({"a": lambda: None}, CPU, 1.0) == {}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    counts = {"quick": 0, "slow": 0}

    def call(name):
        counts[name] += 1

    calls = {name: lambda name=name: call(name) for name in counts}
    found = protocol.outside_graphs(calls, torch.device("cuda"), 1000.0, alone={"slow"})
    assert set(found) == {"quick", "slow"}
    assert all(one["eager_us"] >= one["host_us"] > 0 for one in found.values())
    assert counts["quick"] == protocol.EAGER_CALLS * counts["slow"]


def test_samples_that_warm_up_are_left_out_of_eager_times(monkeypatch):
    class Sampler(protocol.EagerSampler):
        def sample(self):
            self.whole.append(3e-6 if len(self.whole) >= 2 else 1.0)
            return 2.5e-6

    monkeypatch.setattr(protocol, "EagerSampler", Sampler)
    monkeypatch.setattr(protocol, "_EAGER_ROUNDS", 1)
    found = protocol.outside_graphs({"a": lambda: None}, torch.device("cuda"), 1000.0)
    spread = {"eager_us": 3.0, "eager_p20_us": 3.0, "eager_p80_us": 3.0, "eager_samples": 1}
    assert found == {"a": {"host_us": 2.5, **spread}}


def both(calls, device, seconds, alone):
    return {name: {"host_us": 4.5, "eager_us": 6.5} for name in calls}


def test_every_row_of_a_candidate_gets_its_times_outside_a_graph(monkeypatch):
    monkeypatch.setattr(protocol, "outside_graphs", both)
    made = kernels.run(TINY[:1], device="cpu", seconds=1000, probe=False)
    timed = [row for row in made["rows"] if row["status"] == "timed"]
    assert timed and all(row["host_us"] == 4.5 for row in timed)
    assert {(row["cache"], row["eager_us"]) for row in timed} == {("cold", None), ("warm", 6.5)}
    text = " ".join(text_of(made).split())
    assert " eager " in text and "the device waited for" in text and "of the caller's thread" not in text
    for row in timed:  # as records had it before
        row.pop("eager_us")
    text = " ".join(text_of(made).split())
    assert " host " in text and "of the caller's thread" in text and "the device waited for" not in text
    made = linear.run([(1, 16, 128)], bits=(2,), dtype="float32", device="cpu", seconds=1000, probe=False)
    timed = [row for row in made["rows"] if row["status"] == "timed"]
    assert timed and all(row["host_us"] == 4.5 for row in timed)
    assert {(row["cache"], row["eager_us"]) for row in timed} == {("cold", None), ("warm", 6.5)}
    for row in timed:  # the widest that a GPU gives
        row.update(tokens=4096, out_features=11008, in_features=4096, median_us=98765.4, eager_us=98765.4)
        row["candidate"] = row["candidate"].replace("eager", "triton").replace("dynamic int8", "_int_mm")
    assert " eager" in text_of(made)


def test_linear_rows_have_no_time_outside_a_graph_on_a_cpu():
    made = linear.run([(1, 16, 128)], bits=(2,), dtype="float32", device="cpu", seconds=1000, probe=False)
    timed = [row for row in made["rows"] if row["status"] == "timed"]
    assert timed and all(row["host_us"] is None and row["eager_us"] is None for row in timed)
    assert made["protocol"]["host"] is None and made["protocol"]["eager"] is None
    assert "the device waited for" not in " ".join(text_of(made).split())


# ---------------------------------------------------------------------------- record, table, shell


def test_the_record_keeps_the_schema():
    made = kernels.run(TINY[:1], device="cpu", seconds=1000, probe=False)
    record.check(made)
    for change in ({"kind": "kernel"}, {"rows": [{"host_us": "4"}]}, {"rows": [{"copy": 0.5}]}):
        with pytest.raises(record.RecordError):
            record.check(made | change)


def test_the_widest_table_of_a_gpu_fits():
    made = kernels.run(TINY[:1], device="cpu", seconds=1000, probe=False)
    line = next(row for row in made["rows"] if row.get("candidate") == COPY)
    figures = {"median_us": 98765.4, "eager_us": 98765.4, "speedup_ratio": 12.34, "floor_fraction": 0.99}
    made["rows"] = [
        {**line, **figures, "op": op, "shape": list(shape), "variant": variant, "cache": cache, "candidate": name}
        for op, shape, variant in kernels.default_groups(torch.device("cuda"))
        for name in (*PEERS[op], "dqkernels triton", "dqkernels eager")
        for cache in ("cold", "warm")
    ]
    text = text_of(made)
    for word in ("8x16x1024x1024x64", "causal fp32", "per_tensor fp32", "W2 fp32", "layer_norm", "98,765"):
        assert word in text, word


def test_times_of_any_size_fit_a_cell():
    for time_us, text in ((0.04, "0.0"), (999.94, "999.9"), (1e3, "1,000"), (99_999, "99,999"), (1e5, "100 ms")):
        assert rows.microseconds(time_us) == text
    assert rows.microseconds(None) == "" and rows.microseconds(4e7) == "40 s"
    assert rows.cell({"status": "too slow"}) == "slow" and rows.cell({"status": "refused"}) == "refused"


def test_command_line(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    command = ["bench", "kernels", "--ops", "gelu_quantize", "--backends", "eager", "--seconds", "0.2"]
    assert main([*command, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kind"] == "kernels" and printed == record.read(out)
    assert {row["op"] for row in printed["rows"]} == {"gelu_quantize"}
    for extra, words in (
        (["--ops", "magic"], "--ops must be of"),
        (["--bits", "3"], "--bits must be 2, 4 or 8"),
        (["--backends", "magic"], "--backends must be of"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--out", str(out)], "--overwrite"),
    ):
        assert main([*command, *extra]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.gpu
def test_every_op_on_a_gpu():
    """Proven on the card, captured in a graph, with times outside it: what `bench kernels` of the lane relies on."""
    made = kernels.run(TINY, device="cuda", seconds=1000)
    found = [row for row in made["rows"] if "cache" in row]
    assert not [row for row in found if row["status"] != "timed"]
    assert all(row["host_us"] > 0 for row in found)
    assert all(row["eager_us"] >= row["host_us"] for row in found if row["cache"] == "warm")
    if backends.available("triton", "cuda")[0]:
        ours = [row for row in found if row["backend"] == "triton"]
        assert {row["op"] for row in ours} == set(kernels.OPS)
        assert all("graph replay" in row["timer"] for row in ours)
