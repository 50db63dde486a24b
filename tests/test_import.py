"""What importing does, in fresh interpreters: nothing visible, with any optional part absent, in any order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

import dqkernels
from dqkernels import DQConfig

_PATH = os.pathsep.join([str(Path(dqkernels.__file__).parents[1]), str(Path(__file__).parent)])
_BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
_USE = """
import dqkernels
import torch
from torch import nn
model = dqkernels.quantize_(nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8)))
model(torch.randn(3, 40))
text = str(dqkernels.report(model)) + str(dqkernels.info())
assert "4 absmax" in text
"""


def run(code: str, *arguments: str, block: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh interpreter; the process must end with 0."""
    code = (_BLOCK.format(blocked=block) if block else "") + code
    env = {**os.environ, "PYTHONPATH": _PATH, "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_import_loads_nothing_heavy():
    result = run(
        "import sys, dqkernels\n"
        "heavy = {'torch', 'transformers', 'numpy', 'triton', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert sorted(dqkernels.__all__) == sorted(n for n in dir(dqkernels) if n in dqkernels.__all__)\n"
        "try: dqkernels.quantise\n"
        "except AttributeError as error: print(error)\n"
    )
    assert "has no attribute 'quantise'" in result.stdout and result.stderr == ""


def test_no_cuda_context_no_network_and_a_home_that_cannot_be_written():
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import dqkernels
for name in dqkernels.__all__:
    getattr(dqkernels, name)
import torch
assert "transformers.quantizers.auto" in sys.modules and not torch.cuda.is_initialized()
"""
    run(code + _USE + "assert not torch.cuda.is_initialized()", HOME="/proc/nobody", TRITON_CACHE_DIR="/proc/nobody")


@pytest.mark.parametrize("absent", ["triton", "matplotlib", "rouge_score", "accelerate", "sentencepiece", "jsonschema"])
def test_every_optional_part_may_be_absent(absent):
    run(_USE, block=(absent,))


def test_without_transformers():
    code = _USE + "try: dqkernels.load('x')\nexcept ImportError as error: print(error)"
    assert "transformers" in run(code, block=("transformers",)).stdout


_REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["dqkernels"].__name__ == "DQHfQuantizer"
assert issubclass(AUTO_QUANTIZATION_CONFIG_MAPPING["dqkernels"], dqkernels.DQConfig)
import sys
assert not any(type(finder).__name__ == "_RegisterAfterTransformers" for finder in sys.meta_path)
"""


@pytest.mark.parametrize(
    "order",
    [
        "import dqkernels, transformers",
        "import transformers, dqkernels",
        "import transformers.quantizers.auto, dqkernels",
        "from transformers import PreTrainedModel; import dqkernels",
        "import dqkernels; from dqkernels.hf import DQHfQuantizer",
        "import dqkernels.hf",
    ],
)
def test_registered_in_either_order(order):
    run(f"{order}\n{_REGISTERED}")


def test_transformers_survives_a_plug_in_that_cannot_load():
    code = """
import sys, dqkernels
sys.modules["dqkernels.hf"] = None
from transformers import BartConfig, BartModel
print(BartModel.__name__)
"""
    result = run(code)
    assert "BartModel" in result.stdout
    assert "transformers cannot read or write packed models here" in result.stderr


def test_packed_checkpoint_without_import_dqkernels_says_so(tmp_path):
    """Nothing of ours runs here: this is what transformers shows a user who forgot the import."""
    dqkernels.quantize_(tiny_models.make("bart"), DQConfig()).save_pretrained(tmp_path)
    code = """
import sys
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
assert "dqkernels" not in sys.modules
print(type(model.lm_head).__name__)
"""
    result = run(code, str(tmp_path))
    assert result.stdout.strip() == "Linear"
    assert "Unknown quantization type, got dqkernels" in result.stderr
    assert "LOAD REPORT" in result.stderr
    assert "UNEXPECTED" in result.stderr and "qweight" in result.stderr
    assert "MISSING" in result.stderr and "fc1.weight" in result.stderr
