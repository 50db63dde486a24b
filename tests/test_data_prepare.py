"""Token ids of pairs: what is cut, dropped and counted, what the languages do, and what a batch looks like."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("datasets")

import datasets
import tiny_models
import torch
import transformers
from test_text import make_tokenizer

from dqkernels.data.prepare import collator, model_languages, prepare, set_up, tokenizer_fingerprint

PAIRS = [("a b c", "hello"), ("", "world"), ("hello " * 30, "a " * 20), ("b", None), ("  ", "c"), ("c", "b")]


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def table(pairs=PAIRS):
    return datasets.Dataset.from_dict({"source": [s for s, _ in pairs], "target": [t for _, t in pairs]})


def multilingual(name: str):
    """A real tokenizer class with a vocabulary of four words."""
    pieces = [*((p, 0.0) for p in ("<s>", "<pad>", "</s>", "<unk>")), ("\u2581hello", -1.0), ("\u2581world", -2.0)]
    if name == "NllbTokenizer":
        return transformers.NllbTokenizer(vocab={p: i for i, (p, _) in enumerate(pieces)}, merges=[])
    return getattr(transformers, name)(vocab=pieces)


def test_rows_and_what_became_of_the_pairs(tokenizer):
    rows, lengths = prepare(table(), tokenizer, max_source_length=16, max_target_length=8)
    assert rows.column_names == ["input_ids", "attention_mask", "labels"] and len(rows) == 3
    assert (lengths.pairs, lengths.dropped, lengths.source_cut, lengths.target_cut) == (3, 3, 1, 1)
    full = tokenizer("hello " * 30)["input_ids"]
    assert lengths.longest_source == len(full) > 16 and len(rows[1]["input_ids"]) == 16
    assert rows[1]["input_ids"] == [*full[:15], 2], "cut, with its end token"
    assert len(rows[1]["labels"]) == 8 and rows[1]["labels"][-1] == 2
    assert rows[0]["input_ids"] == tokenizer("a b c")["input_ids"]
    assert rows[2]["labels"] == tokenizer("b")["input_ids"]
    text = str(lengths)
    assert "3 pairs (3 without source or target dropped)" in text and "1 (33.3 %) cut at 16" in text
    counts = [len(tokenizer(s)["input_ids"]) for s in ("a b c", "hello " * 30, "c")]
    assert lengths.mean_source == pytest.approx(sum(counts) / 3)


def test_the_prefix_stands_before_every_source(tokenizer):
    rows, _ = prepare(table([("a", "b")]), tokenizer, source_prefix="hello ")
    assert tokenizer.decode(rows[0]["input_ids"], skip_special_tokens=True) == "hello a"
    assert tokenizer.decode(rows[0]["labels"], skip_special_tokens=True) == "b"


def test_padding_to_the_limits(tokenizer):
    rows, _ = prepare(table([("a", "b")]), tokenizer, max_source_length=6, max_target_length=5, pad_to_max_length=True)
    source, target = tokenizer("a")["input_ids"], tokenizer("b")["input_ids"]
    assert rows[0]["input_ids"] == source + [1] * (6 - len(source))
    assert rows[0]["attention_mask"] == [1] * len(source) + [0] * (6 - len(source))
    assert rows[0]["labels"] == target + [-100] * (5 - len(target))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_source_length": 1}, "max_source_length must be at least 2, got 1"),
        ({"max_target_length": 0}, "max_target_length must be at least 2, got 0"),
        ({"num_proc": 0}, "num_proc must be at least 1, got 0"),
    ],
)
def test_wrong_settings(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(table(), tokenizer, **options)


def test_nothing_left_and_missing_columns(tokenizer):
    with pytest.raises(ValueError, match="none of 2 pairs has both a source and a target"):
        prepare(table([("", "a"), ("b", " ")]), tokenizer)
    with pytest.raises(ValueError, match="columns source and target, they have text, target"):
        prepare(table().rename_column("source", "text"), tokenizer)


def test_processes_do_not_change_the_rows(tokenizer):
    pairs = table([(f"a b {n}", "hello " * (n % 5 + 1)) for n in range(20)] + [("", "x")])
    one, lengths = prepare(pairs, tokenizer, max_target_length=6)
    two, again = prepare(pairs, tokenizer, max_target_length=6, num_proc=2)
    assert one.to_list() == two.to_list() and lengths == again and lengths.dropped == 1


# ---- the cache --------------------------------------------------------------------------


def saved(tmp_path, pairs=PAIRS):
    """A data set on disk: only those are cached."""
    table(pairs).save_to_disk(tmp_path / "pairs")
    return datasets.load_from_disk(str(tmp_path / "pairs"))


def cached(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "pairs").glob("cache-*.arrow")}


def test_a_used_tokenizer_finds_its_rows_in_the_cache(tmp_path, tokenizer):
    """datasets' own name for them hashes the tokenizer with the truncation it was last called with."""
    pairs = saved(tmp_path)
    first, _ = prepare(pairs, tokenizer)
    names = cached(tmp_path)
    tokenizer("a b c", truncation=True, max_length=3, padding="max_length")
    second, _ = prepare(pairs, tokenizer)
    assert len(names) == 1 and cached(tmp_path) == names and first.to_list() == second.to_list()


@pytest.mark.parametrize("change", ["prefix", "source", "target", "padding", "vocabulary", "pairs"])
def test_whatever_changes_the_rows_is_not_found_in_the_cache(tmp_path, change):
    tokenizer, options = make_tokenizer(), {}
    pairs = saved(tmp_path)
    before, _ = prepare(pairs, tokenizer)
    names = cached(tmp_path)
    if change == "vocabulary":
        tokenizer = make_tokenizer(words=("ab", "abc", "hello hello"))
    elif change == "pairs":
        pairs = saved(tmp_path / "other", [*PAIRS[:-1], ("c", "a")])
    else:
        options = {
            "prefix": {"source_prefix": "b "},
            "source": {"max_source_length": 9},
            "target": {"max_target_length": 9},
            "padding": {"pad_to_max_length": True},
        }[change]
    after, _ = prepare(pairs, tokenizer, **options)
    assert after.to_list() != before.to_list()
    assert change == "pairs" or len(cached(tmp_path) - names) == 1


def test_the_name_is_the_same_in_every_process():
    program = "from test_text import make_tokenizer\nfrom dqkernels.data.prepare import tokenizer_fingerprint\n"
    program += "print(tokenizer_fingerprint(make_tokenizer()))"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenizer_fingerprint(make_tokenizer())


def test_the_name_knows_the_languages():
    tokenizer = multilingual("MBartTokenizer")
    names = set()
    for source, target in (("en_XX", "ro_RO"), ("ro_RO", "en_XX"), ("en_XX", "de_DE")):
        tokenizer.src_lang, tokenizer.tgt_lang = source, target
        names.add(tokenizer_fingerprint(tokenizer))
    assert len(names) == 3


# ---- languages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "languages", "before", "option"),
    [
        ("MBartTokenizer", ("en_XX", "ro_RO"), False, "decoder_start_token_id"),
        ("MBart50Tokenizer", ("en_XX", "ro_RO"), True, "forced_bos_token_id"),
        ("NllbTokenizer", ("eng_Latn", "ron_Latn"), True, "forced_bos_token_id"),
    ],
)
def test_languages_reach_sources_labels_and_the_decoder(name, languages, before, option):
    """mBART-25 ends its labels in `</s> language` and wraps the language to the decoder's start; the others begin
    labels with it."""
    tokenizer = multilingual(name)
    kind = transformers.M2M100ForConditionalGeneration if name == "NllbTokenizer" else None
    kind = kind or transformers.MBartForConditionalGeneration
    settings = {**tiny_models._SEQ2SEQ, "vocab_size": len(tokenizer), "decoder_start_token_id": 2}
    model = kind(kind.config_class(**settings, pad_token_id=1, eos_token_id=2))
    setup = set_up(model, tokenizer, task="translation", source_lang=languages[0], target_lang=languages[1])
    source_id, target_id = map(tokenizer.convert_tokens_to_ids, languages)
    assert setup.source_prefix == "" and setup.generate_options[option] == target_id
    assert getattr(model.generation_config, option) == target_id
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == languages

    rows, _ = prepare(table([("hello world", "world hello world"), ("world", "hello")]), tokenizer)
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    assert source_id in ids and target_id not in ids
    assert labels[-2:] == [2, target_id] if not before else (labels[0], labels[-1]) == (target_id, 2)

    batch = collator(tokenizer, model=model, pad_to_multiple_of=8)([rows[0], rows[1]])
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (2, 8)
    for row, label in zip(batch["decoder_input_ids"].tolist(), rows["labels"], strict=True):
        start = 2 if before else target_id
        assert row[: len(label)] == [start, *label[:-1]], "each row wraps its own last token, not the padding"
    short = batch["labels"][1].tolist()
    assert short[len(rows[1]["labels"]) :] == [-100] * (8 - len(rows[1]["labels"]))
    assert torch.isfinite(model(**batch).loss)


def test_which_models_are_told_of_languages(tokenizer):
    bart = tiny_models.make("bart")
    assert model_languages(bart, tokenizer, "translation", "en", "ro") == (None, None)
    assert set_up(bart, tokenizer, task="translation", source_lang="en", target_lang="ro").generate_options == {}
    bart.config.task_specific_params = {"translation_en_to_ro": {"prefix": "translate English to Romanian: "}}
    setup = set_up(bart, tokenizer, task="translation", source_lang="en", target_lang="ro")
    assert setup.source_prefix == "translate English to Romanian: "
    given = {"task": "translation", "source_lang": "en", "target_lang": "ro", "source_prefix": "x "}
    assert set_up(bart, tokenizer, **given).source_prefix == "x "
    mbart = multilingual("MBartTokenizer")
    assert model_languages(bart, mbart, "translation", "en_XX", "ro_RO") == ("en_XX", "ro_RO")
    with pytest.raises(ValueError, match="must be given together"):
        set_up(bart, mbart, task="translation", source_lang="en_XX")
    with pytest.raises(ValueError, match="target_lang must be one of .*, got 'xx'"):
        set_up(bart, mbart, task="translation", source_lang="en_XX", target_lang="xx")


# ---- batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bart", "marian", "pegasus", "t5"])
def test_batches_are_what_the_family_shifts_itself(tokenizer, family):
    model = tiny_models.make(family)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.decoder_start_token_id = 0  # tiny T5 has none
    rows, _ = prepare(table(), tokenizer, max_source_length=16, max_target_length=8)
    batch = collator(tokenizer, model=model)([rows[number] for number in range(3)])
    longest = [max(len(row[name]) for row in rows) for name in ("input_ids", "labels")]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest[0])
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (3, longest[1])
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == tokenizer.pad_token_id)
    assert torch.equal((batch["labels"] == -100).sum(1), torch.tensor([longest[1] - len(r["labels"]) for r in rows]))
    expected = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], expected) and (expected >= 0).all()


def test_multiples_and_no_model(tokenizer):
    rows, _ = prepare(table(), tokenizer)
    batch = collator(tokenizer, pad_to_multiple_of=16)([rows[0], rows[2]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16) and "decoder_input_ids" not in batch
