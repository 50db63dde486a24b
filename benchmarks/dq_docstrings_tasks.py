"""What `dq_docstrings.py` trains and scores on: docstrings, and English-Romanian message catalogues.

A task has a float teacher with its tokenizer, pairs in three splits, and its own score. Both kinds of pairs lie on
the machine already; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

TEST_PAIRS, TEST_DRAW = 2000, 1  # of each task all there are: some 1,260 docstrings, 930 messages
VALIDATION_PAIRS = 480
SOURCE_TOKENS, TARGET_TOKENS = 96, 48


class Task:
    """Pairs of one kind and their teacher.

    Attributes:
        name: as rows and records have it.
        score_name: the figure that rows are compared by.
        folder: the teacher's model folder, with its tokenizer.
        train, validation, test: lists of (source, target).
        facts: about the test pairs, for the record.
    """

    name: str
    score_name: str
    folder: Path
    train: list[tuple[str, str]]
    validation: list[tuple[str, str]]
    test: list[tuple[str, str]]
    facts: dict[str, Any]
    #: How the teacher writes texts for sequence-level KD: greedily, as QuillBot's recipe has it.
    distill_options: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 40}

    def __init__(self) -> None:
        self._tokenized: dict[str, Any] = {}

    def teacher(self):
        """The float teacher, fp32, in eval mode; a new one at each call."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM.from_pretrained(self.folder, dtype="float32").eval()

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def data_sha256(self) -> str:
        """Of the training pairs: two runs are comparable where it is the same."""
        return hashlib.sha256(repr(self.train).encode()).hexdigest()

    def rows(self, kind: str):
        """Tokenized training pairs: `gold`, or the teacher's texts for the same sources."""
        from datasets import Dataset

        from dqkernels.data import prepare

        if kind not in self._tokenized:
            targets = [target for _, target in self.train] if kind == "gold" else self._teacher_texts()
            # A word is a token or more: what is cut off here would be cut off as tokens.
            sources = [" ".join(source.split()[:SOURCE_TOKENS]) for source, _ in self.train]
            pairs = Dataset.from_dict({"source": sources, "target": targets})
            limits = {"max_source_length": SOURCE_TOKENS, "max_target_length": TARGET_TOKENS}
            self._tokenized[kind] = prepare.prepare(pairs, self.tokenizer, **limits)[0]
        return self._tokenized[kind]

    def _teacher_texts(self) -> list[str]:
        """Made once per machine, resumable."""
        from dqkernels.train.distill_data import distill

        out = Path(tempfile.gettempdir()) / f"dq_{self.name}_teacher_{os.getuid()}_{self.data_sha256[:12]}.jsonl"
        if not out.is_file():
            sources = [source for source, _ in self.train]
            distill(self.teacher(), self.tokenizer, sources, out, batch_size=64, **self.distill_options)
        return [json.loads(line)["target"] for line in out.read_text().splitlines()]

    def score(self, model, pairs: list[tuple[str, str]]) -> dict[str, Any]:
        """Scores of `pairs`, decoded as the teacher's generation_config says, and the mean length in words."""
        from dqkernels.text import generate_texts

        texts = generate_texts(model, self.tokenizer, [s for s, _ in pairs], batch_size=64, warn_cut=False)
        references = [target for _, target in pairs]
        words = round(sum(len(text.split()) for text in texts) / len(texts), 2)
        return self.figures(texts, references) | {"words": words, "by_pair": self.by_pair(texts, references)}

    def figures(self, texts: list[str], references: list[str]) -> dict[str, Any]:
        raise NotImplementedError

    def by_pair(self, texts: list[str], references: list[str]) -> str:
        """A score of every pair, in the order of `test`: two models are compared pair by pair, which no draw blurs."""
        raise NotImplementedError


@contextmanager
def unfinished(args, name: str, seed: int, recipe: object, data: str) -> Iterator[Path]:
    """The folder of a run's checkpoints and model, removed once what is made of it is written.

    Its name holds a hash of all that shapes the numbers: the package's sources, these two scripts, the recipe, the
    pairs, steps and batch. What another one began is not gone on with, and lies there until somebody removes it.

    Args:
        args: with `unfinished`, `steps` and `batch`.
        name, seed: of the run.
        recipe: its row.
        data: of the pairs, `Task.data_sha256`.
    """
    from dqkernels.bench import record

    scripts = [Path(__file__), Path(__file__).with_name("dq_docstrings.py")]
    shape = (record.environment()["source_sha256"], *(path.read_text() for path in scripts), recipe, data)
    digest = hashlib.sha256(repr((*shape, args.steps, args.batch)).encode()).hexdigest()[:12]
    folder = Path(args.unfinished) / f"{name}-s{seed}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def stopwatch():
    """A callback whose `seconds()` are those of training, of the steps before a kill and a resume too."""
    from transformers.trainer_callback import ExportableState, TrainerCallback

    class Stopwatch(TrainerCallback, ExportableState):
        def __init__(self):
            self.before, self.started = 0.0, None

        def seconds(self) -> float:
            return self.before + (0.0 if self.started is None else time.monotonic() - self.started)

        def state(self) -> dict[str, Any]:  # into every checkpoint, and from the one that is gone on with
            return {"args": {}, "attributes": {"before": self.seconds()}}

        def on_train_begin(self, args, state, control, **kwargs):
            self.started = time.monotonic()

        def on_train_end(self, args, state, control, **kwargs):
            self.before, self.started = self.seconds(), None

    return Stopwatch()


class Docstrings(Task):
    """A docstring's body -> its first sentence; the teacher is the shipped demo model.

    Training and test pairs come from the standard library, torch, transformers and what dqkernels requires. The test
    pairs are those that neither the teacher nor any student has seen (or a draw of them, by hash).
    """

    name, score_name = "docstrings", "rougeL"
    distill_options = {**Task.distill_options, "no_repeat_ngram_size": 3}

    def __init__(self, test_pairs: int = TEST_PAIRS):
        import numpy as np

        from dqkernels.bench import demo
        from dqkernels.data import docstrings

        super().__init__()
        self.folder = demo.teacher_folder()
        packages = docstrings.packages_of()
        mined = docstrings.mine(split="test", packages=packages)
        held = docstrings.held_out(mined, np.load(self.folder / "seen.npy", allow_pickle=False))
        held.sort(key=lambda p: hashlib.sha256(f"{TEST_DRAW}:{p.module}:{p.qualname}".encode()).digest())
        test = held[:test_pairs]
        self.facts = {
            "source": "standard library, torch, transformers and what dqkernels requires",
            "mined": len(mined), "held_out": len(held), "scored": len(test),
        }  # fmt: skip
        # For choosing learning rates. The teacher was tuned on such pairs, which is the same for all rows.
        train = docstrings.mine(split="train", packages=packages)
        mined = docstrings.mine(split="validation", packages=packages)
        unseen = docstrings.held_out(mined, docstrings.fingerprints(train))
        validation = unseen[:: max(len(unseen) // VALIDATION_PAIRS, 1)][:VALIDATION_PAIRS]
        self.train, self.validation, self.test = (
            [(pair.body, pair.head) for pair in pairs] for pairs in (train, validation, test)
        )

    def figures(self, texts, references):
        from dqkernels.metrics.rouge import rouge

        return {name: round(value, 3) for name, value in rouge(texts, references).items()}

    def by_pair(self, texts, references):
        from dqkernels.metrics.rouge import rougeL

        return " ".join(f"{rougeL(text, reference):.1f}" for text, reference in zip(texts, references, strict=True))


class Catalogues(Task):
    """English program messages -> Romanian, from the catalogues of installed programs; the score is BLEU.

    Its teacher is the row `en-ro teacher`, trained here: the shipped demo model's layers under a tokenizer of these
    pairs. It is kept in `teachers`, and trained when it is not there.
    """

    name, score_name = "en-ro", "bleu"

    def __init__(self, teachers: Path, test_pairs: int = TEST_PAIRS):
        from dqkernels.data import gettext_catalogues

        super().__init__()

        def pairs(split: str, most: int | None) -> list[tuple[str, str]]:
            found = [(pair.source, pair.target) for pair in gettext_catalogues.messages("ro", split=split)]
            found.sort(key=lambda pair: hashlib.sha256(f"{TEST_DRAW}:{pair[0]}".encode()).digest())
            return found[:most]

        self.train, self.validation = pairs("train", None), pairs("validation", VALIDATION_PAIRS)
        self.test = pairs("test", test_pairs)
        self.facts = {"source": "message catalogues of this machine, en -> ro", "scored": len(self.test)}
        self.folder = teachers / f"en-ro-{self.data_sha256[:12]}"

    def start(self):
        """An untrained teacher and its tokenizer, saved as `folder` needs it once it is trained.

        Byte-level BPE of both languages; embeddings are new, the layers those of the demo model.
        """
        import torch
        from tokenizers import ByteLevelBPETokenizer
        from tokenizers.processors import TemplateProcessing
        from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedTokenizerFast

        from dqkernels.bench import demo

        model = AutoModelForSeq2SeqLM.from_pretrained(demo.teacher_folder(), dtype="float32")
        trained = ByteLevelBPETokenizer()
        # In the order of BART's ids, which the model's config has: 0 <s>, 1 <pad>, 2 </s>, 3 <unk>, 4 <mask>.
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        texts = [text for pair in self.train for text in pair]
        vocabulary = model.config.vocab_size
        trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
        trained.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=trained._tokenizer,
            bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>",
            model_max_length=model.config.max_position_embeddings,
        )  # fmt: skip
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight
            embedding.normal_(0.0, model.config.init_std)
            embedding[model.config.pad_token_id].zero_()
        model.generation_config = GenerationConfig(
            num_beams=1, max_new_tokens=TARGET_TOKENS, decoder_start_token_id=2, forced_eos_token_id=2,
            bos_token_id=0, pad_token_id=1, eos_token_id=2,
        )  # fmt: skip
        self.tokenizer = tokenizer
        return model

    def figures(self, texts, references):
        from dqkernels.metrics.bleu import bleu

        found = bleu(texts, references)
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}

    def by_pair(self, texts, references):
        """chrF, as BLEU is of a whole corpus."""
        from sacrebleu.metrics import CHRF

        chrf = CHRF()
        scores = (chrf.sentence_score(t, [r]).score for t, r in zip(texts, references, strict=True))
        return " ".join(f"{score:.1f}" for score in scores)
