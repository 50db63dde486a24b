"""Pairs from files, folders, docstrings, catalogues and (a stand-in for) the hub; every refusal in one line."""

from __future__ import annotations

import csv
import json

import pytest

pytest.importorskip("datasets")

import datasets
import numpy as np
from test_data_gettext import place, write_mo

from dqkernels.data import docstrings, gettext_catalogues, sources
from dqkernels.data.mixing import mix
from dqkernels.data.sources import load_pairs

ROWS = [("a long text", "short"), ("007", "NA"), ('with, comma and "quotes"', "two\nlines"), ("ș ț ă", "null")]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pairs_of(data) -> list[tuple[str, str]]:
    assert data.column_names == ["source", "target"]
    return [(row["source"], row["target"]) for row in data]


def write(path, rows=ROWS, names=("text", "summary")):
    """The same rows in whatever format the ending says."""
    records = [dict(zip(names, row, strict=True)) for row in rows]
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# ---- files ------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_texts(tmp_path, ending):
    """A text that reads like a number or like nothing stays a text."""
    found = load_pairs(train_file=write(tmp_path / f"pairs.{ending}"))
    assert list(found) == ["train"] and pairs_of(found["train"]) == ROWS


@pytest.mark.parametrize(
    ("names", "given", "swapped"),
    [
        (("source", "target"), {}, False),
        (("target", "source"), {}, True),
        (("highlights", "article"), {}, True),
        (("first", "second"), {}, False),
        (("first", "second"), {"text_column": "second"}, True),
        (("first", "second"), {"summary_column": "first"}, True),
        (("target", "source"), {"text_column": "target", "summary_column": "source"}, False),
    ],
)
def test_which_column_is_which(tmp_path, names, given, swapped):
    rows = [("one", "two"), ("three", "four")]
    found = load_pairs(train_file=write(tmp_path / "pairs.jsonl", rows, names), **given)
    assert pairs_of(found["train"]) == [row[::-1] if swapped else row for row in rows]


def test_more_columns_than_two(tmp_path):
    rows = [("one", "two", "three"), ("four", "five", "six")]
    file = write(tmp_path / "named.jsonl", rows, ("id", "summary", "text"))
    assert pairs_of(load_pairs(train_file=file)["train"])[0] == ("three", "two"), "usual names before the first two"
    file = write(tmp_path / "unnamed.jsonl", rows, ("a", "b", "c"))
    assert pairs_of(load_pairs(train_file=file)["train"])[0] == ("one", "two"), "as run_summarization"
    numbered = write(tmp_path / "numbered.jsonl", [(1, "two", "three")], ("id", "b", "c"))
    assert pairs_of(load_pairs(train_file=numbered)["train"]) == [("two", "three")], "the only two of text"


def test_outputs_of_a_teacher_are_training_data(tmp_path):
    rows = [("one", "two", "gold", -0.5, 0)]
    file = write(tmp_path / "teacher.jsonl", rows, ("source", "target", "reference", "score", "rank"))
    assert pairs_of(load_pairs(train_file=file)["train"]) == [("one", "two")]


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_records_of_translations(tmp_path, ending):
    rows = [({"en": "good morning", "ro": "bună dimineața"},), ({"en": "one", "ro": None},)]
    file = write(tmp_path / f"pairs.{ending}", rows, ("translation",))
    found = load_pairs(train_file=file, source_lang="en_XX", target_lang="ro_RO")["train"]
    assert pairs_of(found) == [("good morning", "bună dimineața"), ("one", None)]
    found = load_pairs(train_file=file, source_lang="ro", target_lang="eng_Latn")["train"]
    assert pairs_of(found)[0] == ("bună dimineața", "good morning")
    with pytest.raises(ValueError, match=r"^target_lang must be one of en, ro for .*, got 'de'$"):
        load_pairs(train_file=file, source_lang="en", target_lang="de")
    with pytest.raises(ValueError, match=r"^source_lang must be one of en, ro for .*, got None$"):
        load_pairs(train_file=file)
    with pytest.raises(ValueError, match="must differ"):
        load_pairs(train_file=file, source_lang="en", target_lang="en_XX")


def test_sources_alone_only_where_they_are_enough(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [("one",), ("two",)], ("text",))
    assert pairs_of(load_pairs(train_file=file, need_targets=False)["train"]) == [("one", None), ("two", None)]
    with pytest.raises(ValueError, match=r"text_column and summary_column must be given for .*: it has 'text'"):
        load_pairs(train_file=file)


def test_three_files_are_three_splits(tmp_path):
    files = {
        f"{split}_file": write(tmp_path / f"{split}.csv", [(f"{split} one", "two")])
        for split in ("train", "validation", "test")
    }
    found = load_pairs(**files)
    assert {split: data[0]["source"] for split, data in found.items()} == {
        split: f"{split} one" for split in ("train", "validation", "test")
    }
    assert list(load_pairs(**files, splits=("test",))) == ["test"]
    del files["test_file"]
    with pytest.raises(ValueError, match="the test split is wanted and the data has none; it has train, validation"):
        load_pairs(**files, splits=("train", "validation", "test"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, r"^train_file must be a file, '.*gone.csv' is not there$"),
        ("a.txt", "text", r"^train_file must end in .csv, .*, got '.*a.txt'$"),
        ("empty.csv", "", r"^train_file '.*empty.csv' is empty$"),
        ("header.csv", "text,summary\n", r"header.csv' is empty$"),
        ("empty.jsonl", "", r"^train_file '.*' is empty$"),
        ("broken.jsonl", '{"text": "a", "summary": "b"}\n{"text": ', r"^train_file '.*' does not read as json: "),
        ("list.jsonl", "[1, 2]\n", r"^(train_file '.*' does not read as json|text_column and summary_column must)"),
        ("no.parquet", "not parquet", r"^train_file '.*' does not read as parquet: "),
        (
            "long.csv",
            "text,summary\na,b,c,d\n",
            r"^train_file '.*' must have 2 fields in every row, line 2 has others$",
        ),
        ("twice.csv", "text,text\na,b\n", r"first line of column names that differ"),
        ("bytes.csv", b"te\xff,summary\n", r"must be UTF-8 text"),
        ("bytes.jsonl", b'{"text": "\xe9", "summary": "b"}\n', r"must be UTF-8 text: .* from byte 0 on$"),
        ("number.jsonl", '{"text": "a", "summary": 1}\n', r"it has 'text' \(string\), 'summary' \(int64\)$"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs(train_file=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_rows_is_empty(tmp_path):
    import pyarrow
    import pyarrow.parquet

    nothing = pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in ("text", "summary")})
    pyarrow.parquet.write_table(nothing, tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"^train_file '.*none.parquet' is empty$"):
        load_pairs(train_file=tmp_path / "none.parquet")


def test_missing_columns_list_what_was_found(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [("one", 2)], ("title", "year"))
    with pytest.raises(
        ValueError, match=r"^text_column 'body' is not in .*; it has 'title' \(string\), 'year' \(int64"
    ):
        load_pairs(train_file=file, text_column="body", summary_column="title")
    with pytest.raises(ValueError, match=r"^summary_column 'head' is not in "):
        load_pairs(train_file=file, text_column="title", summary_column="head")
    with pytest.raises(ValueError, match="must differ, both are 'title'"):
        load_pairs(train_file=file, text_column="title", summary_column="title")
    with pytest.raises(ValueError, match=r"column 'year' of .* must be text"):
        load_pairs(train_file=file, text_column="title", summary_column="year")


def test_a_file_that_changed_is_read_again(tmp_path):
    file = write(tmp_path / "pairs.csv")
    assert len(load_pairs(train_file=file)["train"]) == 4
    write(file, ROWS[:2])
    assert len(load_pairs(train_file=file)["train"]) == 2


@pytest.mark.parametrize("given", [{}, {"dataset_name": "docstrings", "train_file": "a.csv"}])
def test_one_origin_and_not_two(given):
    with pytest.raises(ValueError, match="give either dataset_name or train_file, validation_file or test_file"):
        load_pairs(**given)


# ---- samples ----------------------------------------------------------------------------


def test_samples_and_seeds(tmp_path):
    rows = [(f"text {n}", f"head {n}") for n in range(50)]
    train, test = write(tmp_path / "train.jsonl", rows), write(tmp_path / "test.jsonl", rows)

    def load(**options):
        found = load_pairs(train_file=train, test_file=test, **options)
        return pairs_of(found["train"]), pairs_of(found["test"])

    assert load(max_train_samples=7, max_predict_samples=99) == (rows[:7], rows)
    one = load(max_train_samples=7, max_predict_samples=9, shuffle_seed=1)
    assert one == load(max_train_samples=7, max_predict_samples=9, shuffle_seed=1)
    assert one != load(max_train_samples=7, max_predict_samples=9, shuffle_seed=2)
    assert len(set(one[0])) == 7 and one[0] != rows[:7]
    assert one[1] != rows[:9] and one[1] == sorted(one[1], key=rows.index), "a test sample keeps the order of the file"
    assert sorted(load(shuffle_seed=1)[0]) == sorted(rows) and load(shuffle_seed=1)[1] == rows
    with pytest.raises(ValueError, match="max_predict_samples must be at least 1, got 0"):
        load(max_predict_samples=0)


def test_mix():
    gold = datasets.Dataset.from_dict({"source": [f"g{n}" for n in range(10)], "target": ["x"] * 10})
    teacher = datasets.Dataset.from_dict(
        {"source": [f"t{n}" for n in range(20)], "rank": [0] * 20, "target": [None] * 19 + ["y"]}
    )
    mixed = mix([(gold, 2.5), (teacher, 5)], seed=3)
    assert mixed.column_names == ["source", "target"] and len(mixed) == 30
    counts: dict[str, int] = {}
    for name in mixed["source"]:
        counts[name] = counts.get(name, 0) + 1
    assert sorted(counts[f"g{n}"] for n in range(10)) == [2] * 5 + [3] * 5
    assert sum(count for name, count in counts.items() if name[0] == "t") == 5 == sum(n[0] == "t" for n in counts)
    again = mix([(gold, 2.5), (teacher, 5)], seed=3)
    assert list(again["source"]) == list(mixed["source"]) != list(mix([(gold, 2.5), (teacher, 5)], seed=4)["source"])
    assert len(mix([(gold, 1.0), (teacher, 1)])) == 11, "1.0 is all of it, 1 is one row"
    for parts, message in [
        ([], "at least one"),
        ([(gold, 0)], "above 0, got 0"),
        ([(gold, True)], "above 0"),
        ([(gold.select([]), 1.0)], "part 0 of the mix has no rows"),
        ([(gold, 1.0), (gold.rename_columns({"source": "a", "target": "b"}), 1.0)], "a column in common"),
    ]:
        with pytest.raises(ValueError, match=message):
            mix(parts)


# ---- the hub ----------------------------------------------------------------------------


def stand_in(monkeypatch, splits: dict) -> list:
    """Replaces the hub; the calls that were made."""
    calls = []

    def load_dataset(name, config=None, **options):
        calls.append((name, config))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("name", "config", "row", "called"),
    [
        (
            "abisee/cnn_dailymail",
            None,
            {"article": "s", "highlights": "t", "id": "x"},
            ("abisee/cnn_dailymail", "3.0.0"),
        ),
        ("cnn_dailymail", "2.0.0", {"article": "s", "highlights": "t", "id": "x"}, ("abisee/cnn_dailymail", "2.0.0")),
        ("EdinburghNLP/xsum", None, {"document": "s", "summary": "t", "id": "x"}, ("EdinburghNLP/xsum", None)),
        ("someone/pairs", None, {"id": 1, "b": "s", "a": "t"}, ("someone/pairs", None)),
    ],
)
def test_known_ids_need_no_columns(monkeypatch, name, config, row, called):
    calls = stand_in(monkeypatch, {"train": [row], "validation": [row], "test": [row]})
    found = load_pairs(name, config)
    assert calls == [called] and list(found) == ["train", "validation", "test"]
    assert all(pairs_of(data) == [("s", "t")] for data in found.values())


def test_wmt_follows_the_languages(monkeypatch):
    row = {"translation": {"ro": "bună dimineața", "en": "good morning"}}
    calls = stand_in(monkeypatch, {"train": [row]})
    assert pairs_of(load_pairs("wmt/wmt16", source_lang="en_XX", target_lang="ro_RO")["train"]) == [
        ("good morning", "bună dimineața")
    ]
    assert pairs_of(load_pairs("wmt16", source_lang="ro", target_lang="en")["train"])[0][1] == "good morning"
    assert calls == [("wmt/wmt16", "ro-en")] * 2
    with pytest.raises(ValueError, match="source_lang and target_lang must be given"):
        load_pairs("wmt/wmt16")
    with pytest.raises(ValueError, match="must be English"):
        load_pairs("wmt/wmt16", source_lang="de", target_lang="ro")


def test_the_eli5_substitute_says_so_and_gets_splits(monkeypatch):
    stand_in(monkeypatch, {"train": [{"question": f"why {n}?", "answer": f"so {n}"} for n in range(400)]})
    found = load_pairs("sentence-transformers/eli5")
    assert sum(map(len, found.values())) == 400 and all(
        2 <= len(found[split]) <= 20 for split in ("validation", "test")
    )
    for data in found.values():
        assert "ELI5 substitute" in data.info.description
    questions = [set(data["source"]) for data in found.values()]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]
    with pytest.raises(ValueError, match="sentence-transformers/eli5 is a substitute"):
        load_pairs("eli5")


def test_unknown_columns_of_a_hub_id(monkeypatch):
    stand_in(monkeypatch, {"train": [{"a": "x", "b": "y", "c": "z", "n": [1]}]})
    with pytest.raises(ValueError, match=r"must be given for train split of a/b: it has 'a' \(string\), .*'n' \(list"):
        load_pairs("a/b")
    assert pairs_of(load_pairs("a/b", text_column="c", summary_column="a")["train"]) == [("z", "x")]


def test_offline_is_one_line_that_helps(monkeypatch):
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set: unset it, or give train_file") as caught:
        load_pairs("abisee/cnn_dailymail")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionError("Couldn't reach the Hub"), ConnectionError, "the hub is not reachable: check the network"),
        (RuntimeError("Dataset scripts are no longer supported, but found a.py"), ValueError, "no code of data sets"),
        (
            ValueError("Config name is missing.\nPick one of ['a']"),
            ValueError,
            "does not load: Config name is missing.$",
        ),
        (FileNotFoundError("Dataset 'a/b' doesn't exist"), ValueError, "does not load: Dataset 'a/b' doesn't exist"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, error, kind, message):
    import huggingface_hub.constants

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind, match=message):
        load_pairs("a/b")


def test_folders(tmp_path):
    """A folder of files, one that save_to_disk wrote, and one with a script, which is not run."""
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl")
    assert pairs_of(load_pairs(str(tmp_path / "files"))["train"]) == ROWS
    saved = datasets.Dataset.from_list([{"text": "one", "summary": "two"}])
    datasets.DatasetDict({"valid": saved}).save_to_disk(tmp_path / "saved")
    assert pairs_of(load_pairs(str(tmp_path / "saved"))["validation"]) == [("one", "two")]
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="is a script, and no code of data sets is run"):
        load_pairs(str(tmp_path / "script"))
    assert not (tmp_path / "ran").exists()


# ---- docstrings and catalogues ----------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Sixty modules with a docstring each; some repeat the head of module 0."""
    root = tmp_path / "site"
    (root / "made").mkdir(parents=True)
    (root / "made" / "__init__.py").write_text("")
    for n in range(60):
        head = "Sort the items of every list here." if n % 10 == 0 else f"Sort the items of list number {n} here."
        body = " ".join(f"word{n}x{m}" for m in range(40))
        (root / "made" / f"m{n}.py").write_text(f'"""{head}\n\n{body}\n"""\n')
    monkeypatch.setattr(docstrings, "default_roots", lambda: [root])
    monkeypatch.setattr(docstrings, "packages_of", lambda *names: frozenset({"made"}))
    return root


def test_docstrings(package):
    found = load_pairs("docstrings")
    assert all(len(data) for data in found.values()) and 40 <= sum(map(len, found.values())) <= 60
    heads = [set(data["target"]) for data in found.values()]
    assert not heads[0] & heads[1] and not heads[0] & heads[2] and not heads[1] & heads[2]
    alone = load_pairs("docstrings", splits=("test",))
    assert pairs_of(alone["test"]) == pairs_of(found["test"]), "whatever else is asked for"
    assert pairs_of(load_pairs("docstrings", "all", splits=("train",))["train"]) == pairs_of(found["train"])


def test_docstrings_that_a_teacher_has_seen(package, tmp_path):
    before = pairs_of(load_pairs("docstrings", splits=("test",))["test"])
    seen = [pair for pair in docstrings.mine(split="test") if pair.head == before[0][1]]
    np.save(tmp_path / "seen.npy", np.array(docstrings.fingerprints(seen), np.uint32))
    for given in (tmp_path, tmp_path / "seen.npy"):
        assert pairs_of(load_pairs("docstrings", splits=("test",), held_out_from=given)["test"]) == before[1:]
    with pytest.raises(ValueError, match="held_out_from must be a model folder with a seen.npy"):
        load_pairs("docstrings", held_out_from=package)
    with pytest.raises(ValueError, match="docstrings only"):
        load_pairs("gettext", held_out_from=tmp_path)
    with pytest.raises(ValueError, match="must be base or all"):
        load_pairs("docstrings", "small")


def test_gettext(tmp_path, monkeypatch):
    entries = {f"item {n} opens its own message": f"mesajul {n}" for n in range(100)}
    write_mo(place(tmp_path, "ro", "tool"), entries)
    monkeypatch.setattr(gettext_catalogues, "default_folders", lambda: [tmp_path])
    found = load_pairs("gettext", source_lang="en_XX", target_lang="ro_RO")
    assert sum(map(len, found.values())) == 100
    assert pairs_of(found["train"])[0][0].split()[1] == pairs_of(found["train"])[0][1].split()[1]
    back = load_pairs("gettext", source_lang="ro", target_lang="en", splits=("test",))
    assert pairs_of(back["test"]) == [pair[::-1] for pair in pairs_of(found["test"])]
    with pytest.raises(ValueError, match="source_lang and target_lang must be given"):
        load_pairs("gettext")
    with pytest.raises(ValueError, match="one of source_lang and target_lang must be English"):
        load_pairs("gettext", source_lang="ro", target_lang="de")
    with pytest.raises(ValueError, match=r"target_lang must be .*; there are ro \(100\)"):
        load_pairs("gettext", source_lang="en", target_lang="de")


def test_without_the_package_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'dqkernels\[train\]'"):
        sources.load_pairs("docstrings")
