"""The benchmark of a training step: its rows, what it counts as activations, and what it refuses to time."""

from __future__ import annotations

import copy

import pytest
import torch

from dqkernels import DQConfig
from dqkernels.bench import protocol, record, train_step
from dqkernels.train import prepare_qat

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(train_step, "_MAX_ROUNDS", 2)


def tiny():
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "encoder_attention_heads": 2, "max_position_embeddings": 16}
    return train_step.large_layers(CPU, batch=2, length=8, layers=1, **sizes)


def test_rows_ratios_and_goals(tmp_path):
    path = tmp_path / "train.json"
    made = train_step.run("cpu", (8, 2), work=tiny(), seconds=1000, out=path)
    assert record.read(path) == made and made["kind"] == "training"
    base, *ours = made["rows"]
    assert base["candidate"] == train_step.BASE and "speedup_ratio" not in base and base["tokens"] == 16
    assert [row["candidate"] for row in ours] == ["dqkernels W8A8", "dqkernels W2A8"]
    for row in made["rows"]:
        assert row["status"] == "timed" and row["samples"] == 2 and row["peak_bytes"] is None
    for row in ours:
        assert row["step_ratio"] == pytest.approx(row["median_ms"] / base["median_ms"], rel=1e-3)
        assert row["step_ratio"] * row["speedup_ratio"] == pytest.approx(1, rel=1e-2)
        assert row["goal_step_ratio"] == 1.5 and row["step_goal_met"] == (row["step_ratio"] <= 1.5)
    lines = list(train_step.verdicts(made))
    assert len(lines) == 2 and all("step_ratio" in line and "goal 1.5" in line for line in lines)


def test_the_table_is_narrow_and_names_the_goals():
    from rich.console import Console

    made = train_step.run("cpu", (4,), work=tiny(), seconds=1000)
    console = Console(width=80, record=True, file=open("/dev/null", "w"), color_system=None)
    console.print(train_step.render(made))
    text = console.export_text()
    assert "W4A8" in text and "Goals: step ratio 1.5." in text and "encoder layers of BART-large" in text


def test_goals_of_a_gpu_are_both_judged():
    base = {"median_ms": 12.0, "activation_bytes": 100, "peak_bytes": 200}
    row = {"median_ms": 10.0, "activation_bytes": 61, "peak_bytes": 150}
    train_step.compare(row, base, torch.device("cuda"))
    assert row["speedup_goal_met"] is True and row["activation_goal_met"] is False
    assert row["speedup_ratio"] == 1.2 and row["activation_ratio"] == 0.61 and row["peak_ratio"] == 0.75


def test_activations_are_counted_once_without_parameters():
    """Of a linear of our own: x in float32 for torch; a byte per element for ours, shared by three readers."""
    three = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(3))
    x = torch.randn(100, 64)

    def loss(model):
        return sum(layer(x).sum() for layer in model)

    ours = prepare_qat(copy.deepcopy(three), DQConfig(weight_bits=8))
    plain = train_step.activation_bytes(three, loss, torch.float32, CPU)
    assert plain == 4 * x.numel()
    codes = 3 * (64 * 128 + 64 * 4)  # packed rows of 128 and their scales
    assert train_step.activation_bytes(ours, loss, torch.float32, CPU) == x.numel() + 4 * 100 + codes


def test_a_model_that_is_not_its_export_is_refused_and_never_timed(monkeypatch):
    real = train_step.packed_copy

    def other(model, dtype):
        packed = real(model, dtype)
        with torch.no_grad():
            packed.layers[0].fc1.weight_scale.mul_(1.01)
        return packed

    monkeypatch.setattr(train_step, "packed_copy", other)
    row = train_step.run("cpu", (8,), work=tiny(), seconds=1000)["rows"][1]
    assert row["status"] == "refused" and "outputs differ from the packed copy's" in row["reason"]
    assert "median_ms" not in row


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"bits must be of 8, 4 and 2, got \[3\]"):
        train_step.run("cpu", (3,), work=tiny())
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16"):
        train_step.run("cpu", dtype="int8", work=tiny())


@pytest.mark.gpu
def test_both_dtypes_on_a_gpu():
    made = train_step.run("cuda", (8,), seconds=5)
    assert [row["dtype"] for row in made["rows"]] == ["fp16", "fp16", "bf16", "bf16"]
    assert all(row["status"] == "timed" and row["peak_bytes"] > 0 and row["tokens"] >= 8192 for row in made["rows"])
    assert protocol.pick_device("cuda").type == made["settings"]["device"]
