"""Reports count bytes, not intentions; tables fit 80 columns; info() wakes no device."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import make
from torch import nn

import dqkernels
from dqkernels import DQConfig
from dqkernels.reporting import ENVIRONMENT, teacher_bytes


def storages(model) -> int:
    """Bytes of what save_pretrained writes, counted from the tensors themselves."""
    seen = {}
    for tensor in model.state_dict().values():
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


@pytest.mark.parametrize("family", ["bart", "t5", "bert", "llama", "llama_tied"])
def test_bytes_are_those_of_the_tensors(family):
    model = make(family)
    teacher = 4 * sum(p.numel() for p in model.parameters())
    assert teacher_bytes(model) == teacher
    model.to(torch.bfloat16)
    dqkernels.quantize_(model, DQConfig(weight_bits=2))
    report = dqkernels.report(model)
    assert report.float32_bytes == teacher, "the teacher's parameters, tied ones once"
    assert report.total_bytes == storages(model)
    assert report.ratio == teacher / report.total_bytes
    rows = [row for row in report.rows if row.kind != "float"]
    assert sum(row.packed_bytes for row in rows) == report.codes_bytes + report.scales_bytes
    everything = sum(row.float32_bytes for row in report.rows)
    linear = sum(m.weight.numel() for m in make(family).modules() if type(m) is nn.Linear)
    assert everything <= teacher and everything >= 4 * linear / 2


def test_rows_group_name_and_explain():
    config = DQConfig(overrides={r"encoder\.layers\.1\.fc2": {"skip": True}, "fc1": {"weight_bits": 8}})
    report = dqkernels.report(dqkernels.quantize_(make("bart"), config))
    rows = {row.name: row for row in report.rows}
    attention = rows["model.encoder.layers.0-1.self_attn.{k,v,q,out}_proj"]
    assert (attention.count, attention.kind, attention.bits, attention.shape) == (8, "linear", 4, (40, 40))
    assert attention.packed_bytes == 8 * (48 * 64 + 40 * 4)
    assert attention.kernel.startswith(("eager", "cpu")) and "(" in attention.kernel
    assert rows["model.encoder.layers.0-1.fc1"].bits == 8
    assert rows["model.encoder.layers.0.fc2"].kind == "linear"
    skipped = rows["model.encoder.layers.1.fc2"]
    assert (skipped.kind, skipped.bits, skipped.note) == ("float", 32, "overrides: skip")
    head = rows["lm_head"]
    assert (head.packed_bytes, head.note) == (0, "tied to model.shared")
    assert rows["model.encoder.embed_positions"].note == "a position or type embedding"
    assert sum(row.count for row in report.rows) == len(
        [m for m in make("bart").modules() if isinstance(m, nn.Linear | nn.Embedding)]
    )


def test_text_and_json():
    report = dqkernels.report(dqkernels.quantize_(make("t5"), DQConfig(group_size=32)))
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "4 absmax g32" in text and "Tied to shared: encoder.embed_tokens" in text
    assert f"in fp32 {report.float32_bytes / 1e6:,.2f} MB, {report.ratio:.2f} times as much" in text.replace(
        "\n  ", " "
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert data["total_bytes"] == report.total_bytes and data["rows"][0]["shape"] == [100, 40]


def test_a_strict_model_that_cannot_run_is_reported_not_raised(monkeypatch):
    model = dqkernels.quantize_(nn.Sequential(nn.Linear(8, 8)), DQConfig(backend="cuda"))
    assert "none" in dqkernels.report(model).rows[0].kernel


def test_a_float_model_has_nothing_to_report():
    report = dqkernels.report(make("bert"))
    assert report.rows == () and report.codes_bytes == 0
    assert str(report)


def test_info(monkeypatch):
    monkeypatch.setenv("DQKERNELS_CPU", "scalar")
    info = dqkernels.info()
    assert info.versions["torch"] == torch.__version__ or info.versions["torch"] in torch.__version__
    assert info.environment["DQKERNELS_CPU"] == "scalar" and set(info.environment) <= set(ENVIRONMENT)
    usable, reason = info.backends["cpu"]["eager"]
    assert usable and reason
    for found in info.backends.values():
        assert all(isinstance(ok, bool) and why for ok, why in found.values())
    assert info.core["present"] or info.core["reason"]
    assert max(map(len, str(info).splitlines())) <= 80
    data = json.loads(json.dumps(info.to_dict()))
    assert data["backends"]["cpu"]["eager"]["usable"] is True
    if not torch.cuda.is_available():
        assert not torch.cuda.is_initialized()
