"""`bench gemm`: its plan, proofs, peers, goals, record and table. Nothing here is about speed."""

from __future__ import annotations

import copy
import io
import itertools
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_bench import assert_fits, text_of

from dqkernels import ops, packing
from dqkernels.bench import candidates, floors, gemm, gemm_goals, linear, peers, protocol, record, rows
from dqkernels.cli import main
from dqkernels.config import DQConfig
from dqkernels.kernels import skinny
from dqkernels.nn import QLinear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROUNDS = gemm.ROUNDS  # before the fixture below


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Rounds end the timing, never the clock: these tests pass on a machine that crawls."""
    monkeypatch.setattr(gemm, "ROUNDS", 2)
    monkeypatch.setattr(linear, "_MAX_ROUNDS", 2)
    monkeypatch.setattr(protocol, "MAX_COPIES", 4)


def a_layer(cell: gemm.Cell, bits=(8, 4, 2)) -> gemm.Decode:
    with torch.inference_mode():
        return gemm.Decode(cell, torch.float32, CPU, bits, ["eager"], [], False)


def packed(n: int, k: int, bits: int, group_size: int = -1) -> QLinear:
    config = DQConfig(weight_bits=bits, weight_quantizer="ternary", group_size=group_size)
    layer = candidates.make_linear(n, k, torch.float32, CPU)
    return QLinear.from_linear(layer, config.for_linear("linear"))


# -------------------------------------------------------------------------------------------------- plan


def test_cells_with_a_goal_come_first_then_the_goals_tokens_then_groups():
    cells = gemm.plan(CUDA)
    assert len(cells) == len(set(cells)) == 2 * len(gemm.GPU_SIZES) * len(gemm.GPU_TOKENS)
    assert [str(cell) for cell in cells[:4]] == ["1x8192x8192", "16x8192x8192", "64x8192x8192", "1x1024x1024"]
    concerned = [gemm_goals.concerns(cell.tokens, cell.n, cell.k) for cell in cells if cell.group_size == -1]
    assert concerned == sorted(concerned, reverse=True) and 0 < sum(concerned) < len(concerned)
    assert [cell.group_size for cell in cells] == [-1] * (len(cells) // 2) + [128] * (len(cells) // 2)
    rest = [cell.tokens in gemm_goals.TOKENS for cell in cells[sum(concerned) : len(cells) // 2]]
    assert rest == sorted(rest, reverse=True)


def test_every_goal_has_cells_in_the_default_plan():
    cells = gemm.plan(CUDA)
    for goal in gemm_goals.goals():
        facts = [
            {"tokens": c.tokens, "out_features": c.n, "in_features": c.k, "bits": bits}
            for c, bits in itertools.product(cells, (8, 4, 2))
        ]
        assert any(goal.holds(fact) and gemm_goals.concerns(*list(fact.values())[:3]) for fact in facts), goal.name
    assert set(gemm.GPU_SIZES) >= gemm_goals.BART
    assert gemm.GPU_SIZES[0][0] * gemm.GPU_SIZES[0][1] >= gemm_goals.LARGE


def test_what_is_asked_for_is_the_plan():
    cells = gemm.plan(CUDA, [(64, 32), (1024, 1024)], (4, 16), (4, 2), (64, -1))
    words = ["16x1024x1024", "16x64x32", "4x64x32", "4x1024x1024"]
    assert [str(cell) for cell in cells] == words + [f"{word} g64" for word in words]
    assert gemm.plan(CUDA, [(64, 32)], (4,), (8,)) == [gemm.Cell(4, 64, 32)], "8 bits have no groups"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": [(0, 4)]}, "shapes must be"),
        ({"shapes": [(1, 2, 3)]}, "shapes must be"),
        ({"tokens": (0,)}, "tokens must be"),
        ({"bits": (3,)}, "bits must be"),
        ({"group_sizes": (16,)}, "group_sizes must be"),
        ({"group_sizes": (64,), "bits": (8,)}, "are for 2 and 4 bits"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"backends": ["magic"]}, "backends must be"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        gemm.run(device="cpu", probe=False, **arguments)


# ------------------------------------------------------------------------------------------------- goals


def ours(n, k, tokens, bits, **more) -> dict:
    row = {"tokens": tokens, "out_features": n, "in_features": k, "bits": bits, "group_size": -1, "backend": "cuda"}
    figures = {"median_us": 2.0, "speedup_ratio": 9.0, "host_us": 7.0, "samples": 200}
    return {**row, "cache": "cold", "status": "timed", **figures, **more}


def verdicts(found: list[dict]) -> dict[str, dict]:
    return {line["goal"]: line for line in gemm_goals.judged(found)}


def test_goals_are_those_of_the_table():
    lines = gemm_goals.judged([])
    assert all(line["verdict"] == "not measured" and line["where"] is None for line in lines)
    ratios = [line["wanted_ratio"] for line in lines if "wanted_ratio" in line]
    assert ratios == [6.5, 5.0, 3.3, 3.4, 3.4, 2.4, 1.8, 1.8, 1.5]
    assert [line["wanted_us"] for line in lines if "wanted_us" in line] == [2.5, 2.5, 10.0]


def test_a_goal_is_judged_by_the_worst_of_its_gemms_and_the_fastest_of_ours_there():
    large = "W2A8, N*K >= 64M, M=1"
    rows_ = [ours(8192, 8192, 1, 2, speedup_ratio=6.5)]
    assert verdicts(rows_)[large]["verdict"] == "met", "the limit itself is enough"
    rows_ += [ours(22016, 4096, 1, 2, speedup_ratio=6.4)]
    line = verdicts(rows_)[large]
    assert (line["verdict"], line["found_ratio"]) == ("not met", 6.4)
    assert line["where"] == "22016x4096 W2 cuda, worst of 2"
    rows_ += [ours(22016, 4096, 1, 2, speedup_ratio=7.0, median_us=1.5, backend="triton")]
    assert verdicts(rows_)[large]["found_ratio"] == 6.5 and verdicts(rows_)[large]["verdict"] == "met"
    rows_ = [ours(8192, 8192, 1, 2, candidate="dqkernels W2 cuda overlapped")]
    assert verdicts(rows_)[large]["where"] == "8192x8192 W2 cuda overlapped", "torch's call does not overlap"


def test_goals_of_times_take_the_largest():
    rows_ = [ours(768, 768, 16, 2), ours(4096, 1024, 16, 8, median_us=2.6), ours(768, 768, 1, 4, host_us=10.0)]
    found = verdicts(rows_)
    assert (found["BART layers, any bits, M=16"]["verdict"], found["BART layers, any bits, M=1"]["verdict"]) == (
        "not met",
        "met",
    )
    assert found["host time of a call"]["verdict"] == "met"
    rows_.append(ours(768, 3072, 64, 8, host_us=10.1))
    assert verdicts(rows_)["host time of a call"]["verdict"] == "not met"


@pytest.mark.parametrize(
    "other",
    [
        {"cache": "warm"},
        {"backend": None},  # a peer
        {"group_size": 128},
        {"status": "refused"},
        {"samples": 199},
        {"tokens": 8},
        {"out_features": 4096, "in_features": 11008},  # 45M
    ],
)
def test_what_is_no_measurement_of_a_goal(other):
    row = {**ours(8192, 8192, 1, 4), **other}
    assert all(line["verdict"] == "not measured" for line in gemm_goals.judged([row]))


def test_rounds_suffice_for_the_goals():
    assert ROUNDS >= gemm_goals.SAMPLES == 200


# -------------------------------------------------------------------------------------- proofs and rows


@pytest.mark.parametrize("group_size", [-1, 64])
def test_every_candidate_proves_itself_and_no_other_layer(group_size):
    layer = a_layer(gemm.Cell(5, 40, 192, group_size))
    names = [one.name for one in layer.found]
    widths = ["W8", "W4", "W2"] if group_size == -1 else ["W4g64", "W2g64"]
    wanted = ["torch fp32", *(f"dqkernels {width} eager" for width in widths)]
    assert names == wanted + (["torch _int_mm"] if group_size == -1 else [])
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(2))
    for one in layer.found:
        y = one.bind(one.module, x)()
        assert one.prove(x, y) is None
        if one.backend is not None:
            wrong = y.clone()
            wrong[-1, -1] = torch.nextafter(wrong[-1, -1], torch.tensor(9e9))
            assert "1 of 200 values differ" in one.prove(x, wrong)
            assert one.group_size == group_size


def test_a_multiplier_of_a_group_is_part_of_the_proof():
    one = a_layer(gemm.Cell(5, 40, 192, 64), bits=(4,)).found[1]
    other = copy.copy(one.module)
    other._parameters = {**other._parameters, "group_mult": torch.nn.Parameter(1 + one.module.group_mult, False)}
    x = torch.randn(5, 192)
    assert "differ from the reference" in one.prove(x, other(x))


@pytest.mark.parametrize("columns", [None, 20, 1000])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_the_cpu_recomputes_columns_of_a_large_matrix(columns, group_size):
    module = packed(70, 130, 4, group_size)
    x = torch.randn(40, 130)
    y = module(x)
    assert candidates.proof_on_cpu(module, x, y, columns) is None
    last, first = y.clone(), y.clone()
    last[-1, -1] += 1
    first[0, 0] += 1
    assert "1 of" in candidates.proof_on_cpu(module, x, last, columns)
    # 20 columns from a block of 16 on: 48 to 69 of 70.
    assert (candidates.proof_on_cpu(module, x, first, columns) is None) == (columns == 20)


def test_the_op_itself_is_called_with_its_backend_forced():
    module = packed(40, 192, 4, 64)
    module.backend = "eager"
    x = torch.randn(3, 192)
    call = gemm._our_call(module, x)
    assert call.func is ops.qlinear and torch.equal(call(), module(x))
    module.backend = "triton"
    assert "triton" in gemm._our_call(module, x).args


def test_torch_takes_the_input_in_its_own_type_and_adds_the_bias():
    layer = torch.nn.Linear(8, 4, dtype=torch.float16)
    x = torch.randn(2, 8)
    y = gemm._float_call(layer, x)()
    assert y.dtype == torch.float16 and torch.equal(y, F.linear(x.half(), layer.weight, layer.bias))


def test_ratios_are_to_fp16_on_a_gpu_whatever_the_input_is(monkeypatch):
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    assert gemm._float_types(CUDA, fp16) == [fp16, bf16] == gemm._float_types(CUDA, bf16)
    assert gemm._float_types(CUDA, fp32) == [fp16, bf16, fp32] and gemm._float_types(CPU, fp32) == [fp32]
    monkeypatch.setattr(gemm, "_float_types", lambda device, dtype: [fp16, dtype])
    cell = gemm.Cell(3, 40, 192)
    with torch.inference_mode():
        found = gemm.measure(cell, a_layer(cell, bits=(4,)), 1000, None)
    cold = {row["candidate"]: row for row in found if row.get("cache") == "cold"}
    assert cold["torch fp16"]["speedup_ratio"] == 1.0 and {row["status"] for row in cold.values()} == {"timed"}
    ratio = cold["torch fp16"]["median_us"] / cold["dqkernels W4 eager"]["median_us"]
    assert cold["dqkernels W4 eager"]["speedup_ratio"] == pytest.approx(ratio, rel=1e-3)


def stand_in(name: str, module, **more) -> candidates.Candidate:
    return candidates.Candidate(name, module, 8, 100, lambda x, y: None, "none", **more)


def measured(*others: candidates.Candidate, tokens: int = 4, absent=None) -> dict[str, list[dict]]:
    layer = a_layer(gemm.Cell(tokens, 16, 32), bits=())
    layer.found = [layer.found[0], *others]
    found: dict[str, list[dict]] = {}
    for row in gemm.measure(gemm.Cell(tokens, 16, 32), layer, 1000, floors.H200, absent):
        found.setdefault(row["candidate"], []).append(row)
    return found


class Fails(torch.nn.Module):
    """Works for its first `good` calls."""

    def __init__(self, good: int = 0):
        super().__init__()
        self.calls, self.good = [], good

    def forward(self, x):
        self.calls.append(x)
        if len(self.calls) > self.good:
            raise RuntimeError("no kernel image\nsecond line")
        return x.new_zeros(x.shape[0], 16)


def test_a_candidate_with_too_few_rows_is_not_supported_and_not_called():
    module = Fails()
    found = measured(stand_in("needs 17", module, least_tokens=17), tokens=16)["needs 17"]
    assert [row["status"] for row in found] == ["not supported"] * 2 and not module.calls
    assert found[0]["reason"] == "takes 17 rows and more, x has 16" and "median_us" not in found[0]
    found = measured(stand_in("needs 17", Fails(10**9), least_tokens=17), tokens=17)["needs 17"]
    assert [row["status"] for row in found] == ["timed"] * 2


def test_int_mm_needs_seventeen_rows_on_a_gpu(monkeypatch):
    layer = a_layer(gemm.Cell(4, 16, 32), bits=())
    assert layer.found[-1].name == "torch _int_mm" and layer.found[-1].least_tokens == 0
    weight = SimpleNamespace(shape=(16, 32), is_cuda=True, dtype=torch.float32)
    contest = candidates.Contest(SimpleNamespace(weight=weight))
    monkeypatch.setattr(candidates, "IntMM", lambda linear: None)
    contest._add_int_mm()
    assert contest.found[0].least_tokens == 17


@pytest.mark.parametrize("good", [0, 1])
def test_a_peer_that_raises_is_not_compared_ours_are_refused(good):
    """At its first call, and while it is made ready for the timing."""
    row = measured(stand_in("peer W4", Fails(good), foreign=True))["peer W4"][0]
    assert (row["status"], row["reason"]) == ("not compared", "RuntimeError: no kernel image")
    assert row["foreign"] and "median_us" not in row
    if good == 0:
        assert measured(stand_in("ours", Fails()))["ours"][0]["status"] == "refused"


def test_a_peer_that_computes_something_else_is_refused():
    module = torch.nn.Linear(32, 16).requires_grad_(False)
    wrong = candidates.Candidate("peer", module, 8, 100, lambda x, y: "off", "none", foreign=True)
    assert [(row["status"], row["reason"]) for row in measured(wrong)["peer"]] == [("refused", "off")] * 2


def test_what_is_not_here_has_a_row_in_each_cell():
    found = measured(absent={"gemlite": "not installed"})["gemlite"]
    assert len(found) == 1 and found[0]["status"] == "not compared" and found[0]["reason"] == "not installed"
    assert found[0]["out_features"] == 16 and found[0]["weight_scales"] == "per_channel"


def test_floors_count_the_multipliers_of_groups():
    assert floors.gemm_bytes(1, 8, 256, 4, 64) - floors.gemm_bytes(1, 8, 256, 4) == 8 * 4
    assert floors.gemm_bytes(1, 8, 300, 2, 128) - floors.gemm_bytes(1, 8, 300, 2) == 8 * 3
    group = floors.gemm_floor(floors.A100_40, 1, 8192, 8192, 4, 128).us
    assert group > floors.gemm_floor(floors.A100_40, 1, 8192, 8192, 4).us


# ------------------------------------------------------------------------------------------------- peers


class FakeMatmul:
    """What the sources of BitBLAS say `Matmul` does with int8 inputs and integer weights, without the packing."""

    def __init__(self, config, enable_tuning):
        assert (config.A_dtype, config.accum_dtype, config.out_dtype, config.layout) == ("int8", "int32", "int32", "nt")
        self.bits, self.shape, self.tuned = int(config.W_dtype.removeprefix("int")), (config.N, config.K), enable_tuning

    def transform_weight(self, codes):
        assert codes.dtype == torch.int8 and tuple(codes.shape) == self.shape
        half = 1 << (self.bits - 1)
        assert -half <= int(codes.min()) and int(codes.max()) < half
        return codes.clone()

    def __call__(self, q, weight):
        assert q.dtype == torch.int8
        return (q.double() @ weight.double().t()).to(torch.int32)


class FakeGemlite:
    """gemlite's packed layer: unsigned codes and a shift, or int8 codes as they are."""

    def __init__(self, bits, **more):
        self.bits, self.more = bits, more
        assert (more["group_size"], more["scaled_activations"]) == (more["in_features"], True)
        assert (more["input_dtype"], more["output_dtype"]) == ("INT8", "float32")

    def pack(self, codes, scales, zeros, bias):
        assert codes.dtype == torch.uint8 and int(codes.max()) < 1 << self.bits
        self.tensors = [codes.t().contiguous(), scales.t(), torch.tensor(zeros), torch.tensor(0.0)]
        self.bias = bias

    def get_tensor_args(self):
        return self.tensors

    def get_meta_args(self):
        return [self.W_group_mode, self.channel_scale_mode]

    @staticmethod
    def call(x, bias, tensors, meta):
        assert meta == [1, 3]
        codes, scales, shift, _ = tensors
        q, scale = candidates.quantized_by_hand(x)
        return (q.double() @ (codes.double() - shift)) * scale * scales + bias


class FakeGemliteInt8(FakeGemlite):
    def __init__(self, device, dtype):
        assert (device, dtype) == ("cpu", torch.float32)
        self.W_group_mode, self.channel_scale_mode = 1, 3

    def from_weights(self, codes, bias, scales):
        assert codes.dtype == torch.int8
        self.tensors, self.bias = [codes.t(), scales.t(), torch.tensor(0), torch.tensor(0.0)], bias
        return self


class FakeHumming(torch.nn.Module):
    """Humming's layer: unsigned codes whose middle is zero, 16-bit scales [N, groups]."""

    def __init__(self, shape_n, shape_k, weight_config, input_config, pad_n_to_multiple, has_bias, torch_dtype):
        super().__init__()
        assert input_config == {"dtype": "int8"} and has_bias and torch_dtype == torch.float32
        self.bits, self.group = int(weight_config["dtype"].removeprefix("int")), weight_config["group_size"] or shape_k
        assert shape_k % self.group == 0

    def load_from_tensors(self, tensors):
        assert set(tensors) == {"weight", "weight_scale", "bias"} and tensors["weight"].dtype == torch.int32
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def transform(self):
        self.ready = True

    def forward(self, x):
        assert self.ready
        scale = self.weight_scale.repeat_interleave(self.group, dim=1)
        q, x_scale = candidates.quantized_by_hand(x)
        weight = (self.weight.double() - (1 << (self.bits - 1))) * scale
        return (q.double() @ weight.t()) * x_scale + self.bias


GEMM_PEERS = [peer.name for peer in peers.of("gemm")]


@pytest.fixture
def fakes(monkeypatch):
    def plant(name, **members):
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)

    plant("bitblas", Matmul=FakeMatmul, MatmulConfig=SimpleNamespace)
    plant("gemlite")
    dtypes = {torch.float32: "float32"}
    plant("gemlite.helper", A8W8_int8_dynamic=FakeGemliteInt8, TORCH_TO_DTYPE=dtypes)
    core = {"GemLiteLinearTriton": FakeGemlite, "DType": SimpleNamespace(INT8="INT8")}
    plant("gemlite.core", forward_functional=FakeGemlite.call, **core)
    plant("humming")
    plant("humming.layer", HummingLayer=FakeHumming)
    plant("humming.ops", pack_weight=lambda codes, bits: codes)


@pytest.mark.parametrize("name", GEMM_PEERS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_peers_hold_our_codes(fakes, name, bits):
    one = peers.gemm(name, packed(48, 256, bits))
    x = torch.randn(5, 256)
    assert one.name == f"{name} W{bits}" and one.foreign and one.backend is None
    assert one.prove(x, one.module(x)) is None
    # A clone for the cold rows: the same function of tensors of its own.
    clone = candidates._clone(one.module)
    assert torch.equal(clone(x), one.module(x))
    for mine, its in zip(one.module.buffers(), clone.buffers(), strict=True):
        assert mine.data_ptr() != its.data_ptr()
    for buffer in clone.buffers():
        buffer.zero_()
    assert one.prove(x, one.module(x)) is None and one.prove(x, clone(x)) is not None
    # The layer next to it is not the same layer.
    assert "relative error" in peers.gemm(name, packed(48, 256, 12 - bits if bits != 2 else 4)).prove(
        x, one.module(x) + 0.1
    )


def test_groups_where_a_peer_has_them(fakes):
    module = packed(48, 256, 4, 64)
    one = peers.gemm("humming", module)
    x = torch.randn(5, 256)
    assert one.prove(x, one.module(x)) is None and one.name == "humming W4g64"
    torch.testing.assert_close(peers.Weights.of(module).float_layer().weight, module.dequantize())
    for name in ("gemlite", "bitblas"):
        with pytest.raises(peers.NotCompared, match="its"):
            peers.gemm(name, module)


def test_weights_are_those_of_the_packed_layer():
    for bits in (8, 4, 2):
        module = packed(24, 130, bits)
        weights = peers.Weights.of(module)
        assert weights.scale.shape == (24, 1) and int(weights.codes.abs().max()) <= weights.offset
        assert torch.equal(weights.float_layer().weight, module.dequantize())
        assert torch.equal(packing.pack(weights.codes, bits), module.qweight)


def test_another_version_of_a_peer_is_a_reason_and_no_crash(fakes, monkeypatch):
    monkeypatch.setattr(sys.modules["bitblas"], "Matmul", lambda **arguments: {}["gone\nand more"])
    with pytest.raises(peers.NotCompared, match="KeyError: 'gone"):
        peers.gemm("bitblas", packed(16, 128, 2))
    monkeypatch.delattr(sys.modules["humming.layer"], "HummingLayer")
    with pytest.raises(peers.NotCompared, match="AttributeError"):
        peers.gemm("humming", packed(16, 128, 2))


def test_peers_of_a_layer_are_candidates_or_have_a_reason(fakes):
    with torch.inference_mode():
        cell = gemm.Cell(4, 48, 256, 64)
        layer = gemm.Decode(cell, torch.float32, CPU, (8, 4), ["eager"], GEMM_PEERS, False)
        assert [one.name for one in layer.found] == ["torch fp32", "dqkernels W4g64 eager", "humming W4g64"]
        assert set(layer.absent) == {"gemlite W4g64", "bitblas W4g64"}
        found = {row["candidate"]: row for row in gemm.measure(cell, layer, 1000, None)}
    assert {row["status"] for row in found.values()} == {"timed", "not compared"}
    assert found["humming W4g64"]["median_us"] > 0 and found["bitblas W4g64"]["status"] == "not compared"


# ------------------------------------------------------------------------------------- record and table


def test_record_and_table(tmp_path):
    path = tmp_path / "gemm.json"
    where = {"device": "cpu", "backends": ["eager"], "probe": False}
    made = gemm.run([(32, 128)], (1, 3), (4,), (-1, 64), seconds=1000, out=path, **where)
    assert record.read(path) == made and made["kind"] == "gemm"
    assert made["settings"]["cells"] == ["1x32x128", "3x32x128", "1x32x128 g64", "3x32x128 g64"]
    timed = [row for row in made["rows"] if row["status"] == "timed"]
    assert {row["candidate"] for row in timed} >= {"torch fp32", "dqkernels W4 eager", "dqkernels W4g64 eager"}
    assert {row["samples"] for row in timed} == {2}
    assert all(row["p10_us"] <= row["median_us"] <= row["p90_us"] for row in timed)
    assert all(row["rotated_bytes"] == 4 * row["weights_bytes"] for row in timed if row["cache"] == "cold")
    text = assert_fits(gemm.render(made))
    assert text.count("gemlite") >= 4 and "W4g64A8 eager" in text and "3x32x128 g64" in text
    assert "floor unknown" in text and "Goals (GPU: not run)" in text and text.count("not measured") == 12


def test_a_cpu_meets_no_goal(monkeypatch):
    monkeypatch.setattr(gemm_goals, "SAMPLES", 1)
    made = gemm.run([(768, 768)], (1,), (2,), device="cpu", backends=["eager"], seconds=1000, probe=False)
    assert any(row.get("backend") == "eager" and row["status"] == "timed" for row in made["rows"])
    assert {line["verdict"] for line in made["protocol"]["goals"]} == {"not measured"}


def test_cells_that_time_does_not_reach_are_named():
    made = gemm.run([(32, 128)], (1, 3), (4,), device="cpu", seconds=-1.0, probe=False)
    assert [row["status"] for row in made["rows"]] == ["not reached"] * 2
    assert "not reached: 1x32x128, 3x32x128: -1 s were over" in " ".join(text_of(gemm.render(made)).split())


def test_the_table_of_a_gpu_fits_with_large_figures():
    """Every column, the longest names and figures that a card can give; made up, and in no record."""
    made = gemm.run([(50265, 128)], (64,), (2,), (-1,), device="cpu", backends=["eager"], seconds=1000, probe=False)
    made["settings"]["device"], made["environment"]["gpu"] = "cuda", "NVIDIA H200"
    made["protocol"]["floor"]["device"] = "H200"
    figures = {"median_us": 12345.6, "p10_us": 12000.4, "p90_us": 13000.6, "eager_us": 1234.5, "floor_us": 345.6}
    for row in made["rows"]:
        row.update({"in_features": 11008, "weight_scales": "group_size=128"})
        if row["status"] == "timed":
            row.update(figures, speedup_ratio=12.34, floor_fraction=1.234)
    timed = [row for row in made["rows"] if row.get("backend") == "eager"]
    for row in timed:
        row["candidate"] = "dqkernels W2g128 triton"
    timed[0]["timer"] = "cuda events (cannot be captured in a graph)"
    best = [ours(8192, 8192, m, 2, speedup_ratio=16.54) for m in (1, 16)] + [ours(22016, 4096, 1, 2)]
    made["protocol"]["goals"] = gemm_goals.judged(best)
    text = assert_fits(gemm.render(made))
    assert "64x50265x11008 g128" in text and "W2g128A8 triton" in text and "12,000-13,001" in text
    assert "not in a graph, so not to be compared: dqkernels W2g128 triton" in " ".join(text.split())
    assert "GPU: not run" not in text and " met" in text and "eager" in text


def test_cells_with_too_few_samples_are_named(monkeypatch):
    made = gemm.run([(32, 128)], (1, 3), (), device="cpu", seconds=1000, probe=False)
    assert "fewer than" not in text_of(gemm.render(made))
    next(row for row in made["rows"] if row["tokens"] == 3 and row["status"] == "timed")["samples"] = 1
    assert "fewer than 2 samples: 3x32x128" in text_of(gemm.render(made))


def test_statuses_stand_in_the_cells():
    line = {"floor_us": 1.0, "host_us": None}
    for status in ("not supported", "not compared", "refused", "too slow"):
        assert gemm._cells({**line, "status": status}, {**line, "status": status}, ["host_us"])[1] == status


def test_command_line(tmp_path, capsys):
    command = ["bench", "gemm", "--shapes", "32x64", "--tokens", "2", "--bits", "4", "--group_sizes", "32"]
    assert main([*command, "--device", "cpu", "--backends", "eager", "--seconds", "5", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["kind"] == "gemm" and made["settings"]["cells"] == ["2x32x64 g32"]
    assert main(["bench", "gemm", "--group_sizes", "64", "--bits", "8"]) == 2
    assert "--group_sizes are for 2 and 4 bits" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_nowhere_else(monkeypatch, terminal):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(rows.progress("bench x", [3, 4], lambda one: f"group {one}")) == [3, 4]
    said = stream.getvalue()
    assert ("bench x" in said and "group 4" in said) if terminal else said == ""


@pytest.mark.parametrize("name", ["linear", "kernels", "gemm"])
def test_benchmarks_of_calls_show_progress(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "stderr", Terminal())
    from dqkernels.bench import kernels

    if name == "linear":
        linear.run([(1, 16, 128)], bits=(), dtype="float32", device="cpu", seconds=-1, probe=False)
    elif name == "kernels":
        kernels.run([("gelu_quantize", (3, 48), "")], device="cpu", seconds=-1, probe=False)
    else:
        gemm.run([(16, 128)], (1,), device="cpu", seconds=-1, probe=False)
    words = {"linear": "1x16x128 fp32", "kernels": "gelu_quantize 3x48 fp32", "gemm": "1x16x128"}[name]
    assert f"bench {name}" in sys.stderr.getvalue() and words in sys.stderr.getvalue()


def test_an_overlapped_call_makes_its_promise_only_while_it_lasts(monkeypatch):
    seen = []
    monkeypatch.setattr(gemm.ops, "qlinear", lambda *given: seen.append(getattr(skinny._local, "settled", False)))
    layer = QLinear.from_linear(torch.nn.Linear(32, 16), DQConfig(weight_bits=4).for_linear("linear"))
    x = torch.randn(1, 32)
    gemm._our_call(layer, x)()
    gemm._overlapped_call(layer, x)()
    gemm._our_call(layer, x)()
    assert seen == [False, True, False]
