"""Every command of a page that trains, exports, scores or writes a teacher's texts is run, in the page's order.

The models and sets that a page names are folders here: `abisee/cnn_dailymail` is a set of 24 pairs with that set's
columns, splits and configuration, TEACHER a small BART of six and six layers. A page's YAML is the file it is named as.
Nothing of a command is changed but for `--use_cpu true`, without which transformers refuses bf16 where no GPU is.
tests/test_docs.py runs the cheap commands, and the Python of all pages.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import documents  # noqa: E402

from dqkernels import cli  # noqa: E402
from dqkernels.bench import demo  # noqa: E402

pytest.importorskip("datasets")
pytest.importorskip("rouge_score")

#: Verbs, and how many of their commands each page has at least.
VERBS = {"train", "export", "eval", "distill-data"}
LEAST = {"README.md": 3, "training.md": 5, "cli.md": 4}
CARD = """---
configs:
- config_name: 3.0.0
  default: true
  data_files:
  - {split: train, path: train.jsonl}
  - {split: validation, path: validation.jsonl}
  - {split: test, path: test.jsonl}
---
"""


def lines(pairs, names) -> str:
    return "".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs)


def deep_teacher(folder: Path) -> None:
    """Six and six layers with the shipped teacher's tokenizer: what a page cuts down."""
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(demo.teacher_folder())
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= {f"{kind}_token_id": ids["eos_token_id"] for kind in ("decoder_start", "forced_eos")}
    sizes = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 6), ("ffn_dim", 64), ("attention_heads", 2))
    }
    config = BartConfig(vocab_size=len(tokenizer), d_model=32, max_position_embeddings=1024, **sizes, **ids)
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The sandbox of test_docs, with data to train on."""
    documents.sandbox(tmp_path)
    (tmp_path / "TEACHER").unlink()
    deep_teacher(tmp_path / "TEACHER")
    pairs = [(f"{text} It is the case of number {i}.", f"The case {i}.") for i in range(4) for text in documents.TEXTS]
    hub = tmp_path / "abisee" / "cnn_dailymail"
    hub.mkdir(parents=True)
    (hub / "README.md").write_text(CARD)
    for split, count in (("train", 8), ("validation", 8), ("test", 8)):
        (hub / f"{split}.jsonl").write_text(lines(pairs[:count], ("article", "highlights")))
    for name in ("pairs.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(lines(pairs, ("source", "target")))
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("source", "target"), *pairs[:2]])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so small models two would wait for each other in every product
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LEAST)
def test_the_commands_of_a_page_run(name, folder, capsys):
    page = next(page for page in documents.PAGES if page.name == name)
    for block in documents.blocks(page):
        if block.language == "yaml" and (first := block.text.splitlines()[0]).startswith("# "):
            Path(first.removeprefix("# ").partition(":")[0]).write_text(block.text)
    ran = []
    for call in documents.commands(page):
        if not call.whole or not call.words or call.words[0] not in VERBS or len(call.words) < 3:
            continue
        if call.words[0] == "train" and Path("out").exists():
            Path("out").rename(f"out-{len(ran)}")  # another example of the page: a run is not written over
        extra = ["--use_cpu", "true"] if call.words[0] == "train" else []
        code = cli.main([*call.words, *extra])
        said = capsys.readouterr()
        assert code == 0, f"{call.where}: dqkernels {' '.join(call.words)}\n{said.out[-2000:]}\n{said.err[-2000:]}"
        ran.append(call.words[0])
    assert len(ran) >= LEAST[name] and set(ran) == (VERBS if name != "README.md" else VERBS - {"distill-data"}), ran
    assert list(Path("bart-2-2-8").glob("*.safetensors"))
