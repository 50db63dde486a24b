"""Writing all or nothing, checking values, model cards. Hostile files are in tests/attacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import logits, make
from torch import nn

import dqkernels
from dqkernels import DQConfig, serialize
from dqkernels.serialize import FileFormatError, check_folder, check_values, save, write_model_card


@pytest.fixture
def model():
    return dqkernels.quantize_(make("bart"), DQConfig(weight_bits=4))


class Tokenizer:
    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_save_writes_a_folder_that_loads(model, tmp_path):
    target = save(model, tmp_path / "deep" / "er" / "model", tokenizer=Tokenizer())
    assert sorted(os.listdir(target.parent)) == ["model"], "nothing is left beside it"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(target))
    assert torch.equal(logits(dqkernels.load(target)), logits(model))
    assert oct(target.stat().st_mode) == oct((tmp_path / "deep").stat().st_mode), "not a private folder"


def test_save_replaces_weights_and_keeps_other_files(model, tmp_path):
    target = tmp_path / "model"
    model.save_pretrained(target, max_shard_size="16KB")
    (target / "notes").mkdir()
    (target / "notes" / "a.txt").write_text("mine")
    (target / "tokenizer.json").write_text("{}")
    save(model, target)
    assert (target / "notes" / "a.txt").read_text() == "mine" and (target / "tokenizer.json").exists()
    assert not list(target.glob("model-*")) and not (target / "model.safetensors.index.json").exists()
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_save_leaves_the_old_folder(model, tmp_path):
    target = save(model, tmp_path / "model")
    before = (target / "model.safetensors").read_bytes()

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    model.model.encoder.layers[0].fc1.weight_scale += 1
    with pytest.raises(OSError, match="disk full"):
        save(model, target, tokenizer=Broken())
    assert (target / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["model"]


def test_without_an_exchanging_rename(model, tmp_path, monkeypatch):
    target = save(model, tmp_path / "model")
    monkeypatch.setattr(serialize, "_exchange", lambda a, b: False)
    model.model.encoder.layers[0].fc1.weight_scale.mul_(2)
    save(model, target)
    assert torch.equal(logits(dqkernels.load(target)), logits(model))
    assert os.listdir(tmp_path) == ["model"]


def test_save_through_a_link_writes_where_it_leads(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert save(model, tmp_path / "link") == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()


def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match="no packed module"):
        save(make("bart"), tmp_path / "x")
    with pytest.raises(ValueError, match="Sequential is not a Hugging Face model"):
        save(dqkernels.quantize_(nn.Sequential(nn.Linear(4, 4))), tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save(model, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


_KILL = """
import os, random, signal, sys, time
import torch, transformers
torch.set_num_threads(1)
import dqkernels, tiny_models
from dqkernels.serialize import check_folder, save
transformers.utils.logging.disable_progress_bar()
target, kills = sys.argv[1], int(sys.argv[2])
models = [dqkernels.quantize_(tiny_models.make("llama"), dqkernels.DQConfig(weight_bits=b)) for b in (4, 8)]
started = time.perf_counter()
save(models[0], target)
once = time.perf_counter() - started
rng = random.Random(0)
seen = set()
for _ in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                save(model, target)
    time.sleep(rng.random() * 3 * once)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    manifest = check_folder(target)
    bits = manifest.quantization.weight_bits
    width = manifest.tensors["model.layers.0.mlp.up_proj.qweight"].shape[1]
    assert width == 128 * bits // 8, "config.json of one save, weights of another"
    seen.add(bits)
dqkernels.load(target)
print(sorted(seen))
"""


def test_killed_saves_leave_the_old_folder_or_the_new_one(tmp_path):
    path = os.pathsep.join([str(Path(dqkernels.__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", _KILL, str(tmp_path / "model"), "24"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[4, 8]", "the kills came too early or too late to see both"


def test_atomic_write(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    serialize.atomic_write(path, b"old")
    serialize.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"

    def fail(*args):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        serialize.atomic_write(path, b"newer")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.json"]


def test_model_card(model, tmp_path):
    target = save(model, tmp_path / "model")
    card = (target / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    code = card[card.index("```python") :]
    assert code.index("import dqkernels") < code.index("from transformers") < code.index("AutoModelForSeq2SeqLM.from_")
    assert "Unknown quantization type, got dqkernels" in card and "UNEXPECTED" in card
    ratio = dqkernels.report(model).float32_bytes / (target / "model.safetensors").stat().st_size
    assert f"{ratio:.1f} times smaller" in card
    (target / "README.md").write_text("# Mine\n")
    write_model_card(target, DQConfig())
    assert (target / "README.md").read_text() == "# Mine\n"


# ------------------------------------------------------------------------------------------------------- values


def spoiled(change, **settings):
    model = dqkernels.quantize_(make("llama_tied"), DQConfig(**settings))
    layer = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        change(layer)
    return model


@pytest.mark.parametrize(
    "settings, change, message",
    [
        ({}, lambda m: m.weight_scale[3].fill_(-1.0), "weight_scale' is -1.0, wanted finite and not below 0"),
        ({}, lambda m: m.weight_scale[3].fill_(float("nan")), "weight_scale' is nan"),
        ({}, lambda m: setattr(m, "weight_scale", m.weight_scale[:-1]), r"weight_scale' is torch.float32 \[31\]"),
        ({}, lambda m: setattr(m, "weight_scale", m.weight_scale.double()), "torch.float64"),
        ({}, lambda m: setattr(m.qweight, "data", m.qweight[:16]), r"qweight.*got torch.uint8 \[16, 64\]"),
        ({"group_size": 32}, lambda m: m.group_mult[2, 1].fill_(0), r"group_mult' is 0\.\.127, wanted 1\.\.127"),
        ({"group_size": 32}, lambda m: m.group_mult[2, 1].fill_(128), r"group_mult' is .*\.\.128, wanted 1\.\.127"),
        (
            {"weight_bits": 2, "weight_quantizer": "ternary"},
            lambda m: m.qweight[5, 3].fill_(0b01_10_00_11),
            "qweight' is code -2, wanted codes -1..1",
        ),
        ({"weight_bits": 8}, lambda m: m.qweight[31, 55].fill_(0x80), "qweight' is code -128, wanted codes -127..127"),
        ({"act_granularity": "static"}, lambda m: None, "act_scale' is nan, wanted one number between"),
        ({"act_granularity": "static"}, lambda m: m.act_scale.fill_(0.0), "act_scale' is (nan|0.0)"),
    ],
)
def test_values(settings, change, message):
    with pytest.raises(FileFormatError, match=message):
        check_values(spoiled(change, **settings))


def test_legal_values_pass():
    for settings in ({}, {"weight_bits": 2}, {"weight_bits": 2, "weight_quantizer": "ternary", "group_size": 32}):
        check_values(spoiled(lambda m: m.weight_scale[3].fill_(0.0), **settings))
    # -2 is a code of four_level; -8 is counted on where 4-bit sums are bounded.
    check_values(spoiled(lambda m: m.qweight.fill_(0b10_10_10_10), weight_bits=2))
    check_values(spoiled(lambda m: m.qweight.fill_(0x88), weight_bits=4))
    check_values(spoiled(lambda m: m.qweight.fill_(0x81), weight_bits=8))


def test_manifest_of_a_good_folder(model, tmp_path):
    manifest = check_folder(save(model, tmp_path / "model"))
    assert manifest.config == json.loads((tmp_path / "model" / "config.json").read_text())
    assert [path.name for path in manifest.files] == ["model.safetensors"]
    entry = manifest.tensors["model.encoder.layers.0.fc1.qweight"]
    assert (entry.dtype, entry.shape) == ("U8", (64, 64))
    names = [name for name in manifest.tensors if name.startswith(("lm_head", "model.encoder.embed_tokens"))]
    assert names == [], "the tied table stands under one name"


PICKLERS = {"pickle", "marshal", "dill", "cloudpickle", "shelve", "joblib"}
RUNNERS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "torch.save"}


def python_files():
    """The package that is installed, and the scripts beside these tests."""
    root = Path(__file__).resolve().parents[1]
    package = Path(dqkernels.__file__).parent
    return [*package.rglob("*.py"), *(root / "benchmarks").rglob("*.py"), root / "setup.py"]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_code_execution_paths(path):
    """No file that a user hands over can run: no pickle, no eval, no shell, no remote code; loaders start nothing."""
    import ast

    banned = PICKLERS | (
        {"subprocess"} if path.stem in ("manifest", "serialize", "hf", "tying", "reporting") else set()
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not banned & {module.partition(".")[0] for module in modules}, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in RUNNERS, f"line {node.lineno}"
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "shell", "allow_pickle"):
                    assert ast.unparse(keyword.value) == "False", f"line {node.lineno}"
