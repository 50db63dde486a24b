"""`dqkernels.text`: order, batches by length, prefixes, languages, files; mostly on a model that echoes."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from dqkernels import text
from dqkernels.cli import files

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def make_tokenizer(words=("hello", "world", "a", "b", "c"), limit: int = 64):
    """A byte-level BPE, trained in milliseconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(words)] * 3, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=limit,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_tiny(folder, **config):
    """A tiny random BART with its tokenizer, as a model folder."""
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    settings = dict(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    model = BartForConditionalGeneration(BartConfig(**{**settings, **config}))
    model.generation_config.max_new_tokens = 12
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Echo:
    """Writes back what it reads, and remembers every call."""

    device = torch.device("cpu")

    def __init__(self, **config):
        self.config = SimpleNamespace(**{"max_position_embeddings": 128, **config})
        self.generation_config = SimpleNamespace(
            forced_bos_token_id=None, min_length=0, num_beams=1, max_length=None, max_new_tokens=16
        )
        self.calls: list[tuple[tuple[int, int], dict]] = []

    def eval(self):
        return self

    def generate(self, input_ids, attention_mask, **options):
        assert torch.equal(attention_mask, (input_ids != 1).long())
        self.calls.append((tuple(input_ids.shape), options))
        return input_ids


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_order_is_the_input_order_while_batches_share_a_length(tokenizer):
    texts = ["a " * n + "b" for n in (9, 1, 5, 9, 1, 5, 3)]
    model = Echo()
    assert text.generate_texts(model, tokenizer, texts, batch_size=2) == texts
    widths = [shape[1] for shape, _ in model.calls]
    assert widths == sorted(widths, reverse=True), "longest first"
    assert [shape[0] for shape, _ in model.calls] == [2, 2, 2, 1]


def test_more_texts_than_a_window(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "WINDOW_BATCHES", 2)
    texts = [f"{'b ' * (n % 5)}{n}" for n in range(23)]
    assert text.generate_texts(Echo(), tokenizer, iter(texts), batch_size=3) == texts


def test_a_stream_answers_before_it_is_read_to_its_end(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "WINDOW_BATCHES", 1)
    read = []

    def source():
        for n in range(10):
            read.append(n)
            yield f"text {n}"

    stream = text.stream_texts(Echo(), tokenizer, source(), batch_size=2)
    assert next(stream) == "text 0" and len(read) == 2


@pytest.mark.parametrize("texts", [[], [""], ["", "  ", "\t"]])
def test_nothing_to_say(tokenizer, texts):
    model = Echo()
    assert text.generate_texts(model, tokenizer, texts) == [""] * len(texts)
    assert not model.calls


def test_blank_texts_keep_their_place_and_take_no_prefix(tokenizer):
    outputs = text.generate_texts(Echo(), tokenizer, ["a", "", "b"], source_prefix="say: ")
    assert outputs == ["say: a", "", "say: b"]


def test_long_sources_are_cut_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="dqkernels"):
        outputs = text.generate_texts(Echo(), tokenizer, ["a", "b " * 50], max_source_length=10)
    assert outputs[0] == "a" and len(outputs[1].split()) < 12
    assert "1 source cut at 10 tokens" in caplog.text


def test_the_limit_is_the_least_of_tokenizer_and_positions(tokenizer):
    assert text.source_limit(Echo(), tokenizer) == 64
    assert text.source_limit(Echo(max_position_embeddings=40), tokenizer) == 40
    assert text.source_limit(Echo(max_position_embeddings=None), make_tokenizer(limit=10**30)) == 1024


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_source_length": 1}, "max_source_length must be at least 2, got 1"),
        ({"max_source_length": 129}, "max_source_length must be at most 128, the model's positions, got 129"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 128}, "max_new_tokens must be below 128, the model's positions, got 128"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"task": "poetry"}, "task must be one of ['summarization', 'translation'], got 'poetry'"),
        ({"target_lang": "ro_RO"}, "this one has none"),
    ],
)
def test_wrong_options_are_refused_at_the_call(tokenizer, options, sentence):
    with pytest.raises(ValueError) as caught:
        text.stream_texts(Echo(), tokenizer, ["a"], **options)
    assert sentence in str(caught.value)


def test_one_string_is_no_list_of_texts(tokenizer):
    with pytest.raises(ValueError, match="got one string"):
        text.generate_texts(Echo(), tokenizer, "hello")


T5_PARAMS = {
    "summarization": {"prefix": "summarize: ", "num_beams": 4, "max_length": 200, "min_length": 30},
    "translation_en_to_de": {"prefix": "translate English to German: ", "num_beams": 4, "max_length": 300},
}


def test_task_parameters_of_the_model(tokenizer):
    model = Echo(task_specific_params=T5_PARAMS)
    assert text.generate_texts(model, tokenizer, ["a"], task="summarization") == ["summarize: a"]
    assert model.calls[-1][1] == {"num_beams": 4, "max_length": 200, "min_length": 30}
    assert text.generate_texts(model, tokenizer, ["a"]) == ["a"]
    assert "min_length" not in model.calls[-1][1]


def test_what_the_caller_says_replaces_the_task(tokenizer):
    model = Echo(task_specific_params=T5_PARAMS)
    text.generate_texts(model, tokenizer, ["a"], task="summarization", max_new_tokens=9, num_beams=2, source_prefix="")
    assert model.calls[-1][1] == {"num_beams": 2, "max_new_tokens": 9, "max_length": None, "min_length": 0}


def test_translation_prefix_of_t5(tokenizer):
    model = Echo(task_specific_params=T5_PARAMS)
    options = {"task": "translation", "source_lang": "en", "target_lang": "de"}
    assert text.generate_texts(model, tokenizer, ["a"], **options) == ["translate English to German: a"]
    with pytest.raises(ValueError, match="en_to_de"):
        text.stream_texts(model, tokenizer, ["a"], **{**options, "target_lang": "ro"})


def test_marian_of_several_targets():
    tokenizer = make_tokenizer()
    tokenizer.supported_language_codes = [">>fra<<", ">>ron<<"]
    assert text.generate_texts(Echo(), tokenizer, ["a"], task="translation", target_lang="ron") == [">>ron<< a"]
    with pytest.raises(ValueError, match="must be one of fra, ron, got 'xxx'"):
        text.stream_texts(Echo(), tokenizer, ["a"], task="translation", target_lang="xxx")


class Languages:
    """The face of a multilingual tokenizer: code before a target (mBART-50, NLLB) or behind (mBART-25)."""

    def __init__(self, before: bool):
        self.inner, self.before = make_tokenizer(), before
        self.lang_code_to_id = {"en_XX": 290, "ro_RO": 291}
        self.src_lang, self.tgt_lang = "en_XX", None
        self.model_max_length = 64
        self.pad, self.batch_decode = self.inner.pad, self.inner.batch_decode

    def __call__(self, texts=None, text_target=None, **options):
        if text_target is not None:
            code = [self.lang_code_to_id[self.tgt_lang]]
            ids = self.inner(text_target)["input_ids"][1:]
            return {"input_ids": code + ids if self.before else ids + code}
        return self.inner(texts, **options)


@pytest.mark.parametrize(("before", "option"), [(True, "forced_bos_token_id"), (False, "decoder_start_token_id")])
def test_language_codes(before, option):
    model, tokenizer = Echo(), Languages(before)
    options = {"task": "translation", "source_lang": "ro_RO", "target_lang": "en_XX"}
    text.generate_texts(model, tokenizer, ["a"], **options)
    assert model.calls[-1][1] == {option: 290}
    assert tokenizer.src_lang == "ro_RO"
    with pytest.raises(ValueError, match="target_lang must be one of en_XX, ro_RO, got 'de'"):
        text.stream_texts(model, tokenizer, ["a"], **{**options, "target_lang": "de"})
    with pytest.raises(ValueError, match="target_lang is needed by this model"):
        text.stream_texts(model, tokenizer, ["a"], task="translation")


@pytest.mark.parametrize(
    ("name", "target", "option"),
    [
        ("MBart50Tokenizer", "en_XX", "forced_bos_token_id"),
        ("MBartTokenizer", "en_XX", "decoder_start_token_id"),
        ("NllbTokenizer", "eng_Latn", "forced_bos_token_id"),
    ],
)
def test_language_codes_of_real_tokenizers(name, target, option):
    import transformers

    pieces = [*((p, 0.0) for p in ("<s>", "<pad>", "</s>", "<unk>")), ("\u2581hello", -1.0), ("h", -3.0)]
    if name == "NllbTokenizer":
        tokenizer = transformers.NllbTokenizer(vocab={p: i for i, (p, _) in enumerate(pieces)}, merges=[])
    else:
        tokenizer = getattr(transformers, name)(vocab=pieces)
    model = Echo()
    options = {"task": "translation", "source_lang": "fra_Latn" if "_L" in target else "ro_RO"}
    text.generate_texts(model, tokenizer, ["hello"], target_lang=target, **options)
    assert model.calls[-1][1] == {option: tokenizer.convert_tokens_to_ids(target)}
    assert tokenizer.src_lang == options["source_lang"]
    with pytest.raises(ValueError, match=r"target_lang must be one of .*, got 'xx'"):
        text.stream_texts(model, tokenizer, ["hello"], target_lang="xx", **options)


# ---- files --------------------------------------------------------------------------------


def test_lines_of_text(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes("\ufefffirst\r\n\nthird \u2028 still third\nlast".encode())
    assert list(files.read_texts(path)) == ["first", "", "third \u2028 still third", "last"]


def test_json_lines(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\nlines"}\n')
    assert files.column_of(path) == "text" and files.column_of("in.txt") is None
    assert list(files.read_texts(path, "text")) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"body": "x", "head": "y"}', "line 2 has no column 'text'; it has 'body', 'head'"),
        ("{}", "line 2 has no column 'text'; it has none"),
        ('{"text": 3}', "line 2: column 'text' must be a string, got int"),
        ("[1]", "line 2 must be a JSON object, got list"),
        ('{"text": ', "line 2 is not JSON"),
    ],
)
def test_json_lines_that_are_none(tmp_path, line, sentence):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(files.InputError) as caught:
        list(files.read_texts(path, "text"))
    assert sentence in str(caught.value) and "in.jsonl" in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(files.InputError, match="must be UTF-8"):
        list(files.read_texts(path))


def test_atomic_file(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_file(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"] and target.read_text() == "old"
    with files.atomic_file(target) as path:
        path.write_text("new")
        assert target.read_text() == "old" and ".partial-" in path.name
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"] and target.read_text() == "new"


def test_a_folder_that_must_not_be_replaced(tmp_path):
    files.check_new_folder(tmp_path / "new", overwrite=False)
    folder = tmp_path / "home"
    folder.mkdir()
    files.check_new_folder(folder, overwrite=False)
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="--overwrite"):
        files.check_new_folder(folder, overwrite=False)
    with pytest.raises(ValueError, match="no config.json"):
        files.check_new_folder(folder, overwrite=True)
    with pytest.raises(ValueError, match="does not"):
        files.check_new_folder(tmp_path / "no" / "such", overwrite=False)
    with pytest.raises(ValueError, match="something else"):
        files.check_new_folder(folder / "letter.txt", overwrite=True)


# ---- real models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "bart")


def test_batches_do_not_change_a_real_models_words(tiny):
    model, tokenizer = text.open_model(tiny, dtype="float32", device="cpu")
    texts = ["hello world", "a b c " * 9, "", "hello"]
    one = text.generate_texts(model, tokenizer, texts, batch_size=1, num_beams=2)
    assert one == text.generate_texts(model, tokenizer, texts, batch_size=4, num_beams=2)
    assert one[2] == "" and all(one[i] for i in (0, 1, 3))


def test_calibration_batches_drive_the_decoder(tiny):
    model, tokenizer = text.open_model(tiny, dtype="float32", device="cpu")
    batches = text.calibration_batches(model, tokenizer, ["hello", "", "a b c"], batch_size=1)
    assert len(batches) == 2
    for batch in batches:
        assert batch["decoder_input_ids"].shape[1] >= 1
        model(**batch)
    with pytest.raises(ValueError, match="not blank"):
        text.calibration_batches(model, tokenizer, ["", " "])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer", "has no tokenizer: copy"),
        ("model.safetensors", "has no safetensors weights that load"),
        ("cut", "has no safetensors weights that load"),
        ("gpt2", "must be an encoder-decoder such as BART or T5"),
    ],
)
def test_folders_that_do_not_open(tmp_path, change, sentence):
    folder = make_tiny(tmp_path / "bart")
    if change == "tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif change == "cut":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "gpt2":
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    else:
        (folder / change).unlink()
    with pytest.raises(ValueError) as caught:
        text.open_model(folder, device="cpu")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_devices_and_dtypes_that_are_none():
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'tpu'"):
        text.check_device("tpu")
    with pytest.raises(ValueError, match="got 'cuda:99'"):
        text.check_device("cuda:99")
    with pytest.raises(ValueError, match="dtype must be one of"):
        text.check_dtype("int8")
