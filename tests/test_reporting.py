"""Reports count bytes, not intentions; tables fit 80 columns; info() wakes no device."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import make
from torch import nn

import dqkernels
from dqkernels import DQConfig
from dqkernels.reporting import ENVIRONMENT, auto_class, teacher_bytes


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


@pytest.mark.parametrize("family", ["bart", "t5", "bert"])
@pytest.mark.parametrize("config", [
    DQConfig(head="float"), DQConfig(overrides={"lm_head|decoder$": {"skip": True}}),
], ids=["head", "skip"])  # fmt: skip
def test_a_tied_table_counts_once_where_its_head_stays_float(family, config, tmp_path):
    """The float copy of a packed table is bytes of ours, not of the float model."""
    model = make(family)
    teacher = 4 * sum(p.numel() for p in model.parameters())
    dqkernels.quantize_(model, config)
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for found in (model, loaded):
        report = dqkernels.report(found)
        assert report.float32_bytes == teacher_bytes(found) == teacher
        assert report.total_bytes == storages(found), "the copy is there, and it is counted"
        copy = next(row for row in report.rows if row.name.endswith(("lm_head", "predictions.decoder")))
        assert (copy.packed_bytes, copy.float32_bytes) == (head.weight.numel() * 4, 0)


def test_a_head_with_a_weight_of_its_own_counts_on_its_own():
    """transformers goes on listing it as tied by name; what was in memory decides."""
    model = make("bart")
    model.lm_head.weight = nn.Parameter(torch.randn(100, 40))
    teacher = 4 * sum(p.numel() for p in model.parameters())
    assert dqkernels.report(dqkernels.quantize_(model, DQConfig(head="float"))).float32_bytes == teacher


def test_a_tied_table_packed_in_two_calls_counts_once():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    dqkernels.quantize_(model, DQConfig(overrides={"head": {"skip": True}}))
    assert teacher_bytes(model) == 4 * 40
    dqkernels.quantize_(model)
    assert type(model["head"]) is dqkernels.QLinear and teacher_bytes(model) == 4 * 40


@pytest.mark.parametrize("model", [make("bert"), nn.Sequential(nn.ReLU())], ids=["bert", "nothing"])
def test_a_float_model_is_told_what_to_call(model):
    report = dqkernels.report(model)
    assert report.rows == () and report.codes_bytes == 0
    text = " ".join(str(report).split())
    assert text.startswith(f"{type(model).__name__} (") and "nothing is packed" in text
    assert "dqkernels.quantize_(model, dqkernels.DQConfig())" in text and "module" not in text


def test_attention_has_its_line():
    report = dqkernels.report(dqkernels.quantize_(make("bart")))
    assert "\nAttention: int8 per_token on " in str(report)
    report = dqkernels.report(dqkernels.quantize_(make("t5")))
    assert "\nAttention: float (attention='auto' is int8 in bart, mbart, marian, pegasus" in str(report)
    assert report.to_dict()["attention"].startswith("float")


@pytest.mark.parametrize(("architecture", "wanted"), [
    ("BartForConditionalGeneration", "AutoModelForSeq2SeqLM"), ("MarianMTModel", "AutoModelForSeq2SeqLM"),
    ("BertForMaskedLM", "AutoModelForMaskedLM"), ("LlamaForCausalLM", "AutoModelForCausalLM"),
    ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
    ("GPT2LMHeadModel", "AutoModelForCausalLM"), ("BertModel", "AutoModel"), ("MyOwnModel", "MyOwnModel"),
])  # fmt: skip
def test_the_auto_class_keeps_the_head(architecture, wanted):
    assert auto_class(architecture) == wanted


BUILDS = [
    ({"mode": "auto", "reasons": ["cuda: no nvcc was found"]}, "no CUDA: no nvcc was found"),
    ({"mode": "auto", "reasons": ["cuda: no card was seen", "cuda: cmake failed"]}, "no CUDA: cmake failed"),
    ({"mode": "cpu", "reasons": []}, "no CUDA: built with DQKERNELS_BUILD=cpu"),
    ({}, "no CUDA: the build left no reason"),
]


@pytest.mark.parametrize(("build", "wanted"), BUILDS)
def test_info_says_why_cuda_is_missing(build, wanted, monkeypatch):
    from dqkernels import backends
    from dqkernels.backends import cuda
    from dqkernels.kernels import native

    avx2 = staticmethod(lambda: "avx2")
    core = type("Core", (), {"cpu_isa": avx2, "cpu_gemm_kernel": avx2})
    monkeypatch.setattr(native, "native", lambda: core)
    monkeypatch.setattr(native, "build_info", lambda: {**build, "cpu": True, "cuda": False})
    assert cuda.available("cuda") == (False, f"the compiled core has {wanted}")
    backends.refresh()
    text = " ".join(str(dqkernels.info()).split())
    backends.refresh()
    assert text.count(wanted) >= 1 and "dqkernels info" not in text
    assert f"CPU avx2, {wanted}" in text


@pytest.mark.parametrize(("interpreter", "word"), [("1", "only where asked for by name"), ("0", "TRITON_INTERPRET=1")])
def test_info_lists_triton_on_the_cpu_and_no_selection_takes_it(interpreter, word, monkeypatch):
    from dqkernels import backends

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    monkeypatch.delenv("DQKERNELS_BACKEND", raising=False)
    backends.refresh()
    usable, reason = dqkernels.info().backends["cpu"]["triton"]
    assert usable == (interpreter == "1") and word in reason
    assert backends.choose("qgemm", "cpu", bits=4, group_size=-1).backend != "triton"
    backends.refresh()


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
