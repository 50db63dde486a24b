"""A teacher's outputs as data: order, scores, choice, and the same bytes however often it was stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import datasets
import torch
from test_text import make_tiny

from dqkernels import text
from dqkernels.cli import main
from dqkernels.launcher import Processes
from dqkernels.train import parts
from dqkernels.train.distill_data import distill

WORDS = ("hello", "world", "a", "b", "c")
SOURCES = [" ".join(WORDS[(n * k) % 5] for k in range(1, 3 + n * 7 % 11)) for n in range(1, 24)]
REFERENCES = [f"reference {n}" for n in range(len(SOURCES))]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Large random weights: with small ones, a random model writes nothing but special tokens.
    return str(make_tiny(tmp_path_factory.mktemp("teacher") / "bart", init_std=0.6))


@pytest.fixture
def teacher(folder):
    return text.open_model(folder)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Stop(Exception):
    pass


def stopping(model, calls: int, error: type[BaseException] = Stop):
    """The model, which fails after so many batches."""
    generate, count = model.generate, 0

    def once(*arguments, **options):
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return generate(*arguments, **options)

    model.generate = once
    return model


# ---- records ----------------------------------------------------------------------------


def test_greedy_outputs_in_the_order_of_the_sources(teacher, tmp_path):
    done = distill(*teacher, SOURCES, tmp_path / "out.jsonl", references=REFERENCES, batch_size=4)
    records = read(tmp_path / "out.jsonl")
    assert [list(record) for record in records] == [["source", "target", "reference", "score", "rank"]] * len(SOURCES)
    assert [record["source"] for record in records] == SOURCES
    assert [record["reference"] for record in records] == REFERENCES
    expected = [text.generate_texts(*teacher, [source], num_beams=1)[0] for source in SOURCES]
    assert [record["target"] for record in records] == expected and len(set(expected)) > 3
    assert {record["rank"] for record in records} == {0}
    assert (done.sources, done.records, done.without, done.resumed) == (len(SOURCES), len(SOURCES), 0, 0)
    assert "samples/s" in str(done) and done.to_dict()["records"] == len(SOURCES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"], "nothing else is left"


def test_the_score_is_the_mean_log_probability_of_the_output(teacher, tmp_path):
    """By beam search's own figures: with a length penalty of 1 they are the same mean, where nothing is forced."""
    model, tokenizer = teacher
    for name in ("forced_eos_token_id", "forced_bos_token_id"):
        setattr(model.generation_config, name, None)
    distill(model, tokenizer, SOURCES, tmp_path / "out.jsonl", batch_size=5, num_beams=3, num_return_sequences=3)
    records = read(tmp_path / "out.jsonl")
    by_source: dict[str, list] = {}
    for record in records:
        by_source.setdefault(record["source"], []).append(record)
    checked = 0
    for source in dict.fromkeys(SOURCES):
        batch = tokenizer([source], return_tensors="pt")
        found = model.generate(
            **batch,
            num_beams=3,
            num_return_sequences=3,
            length_penalty=1.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        written = [one.strip() for one in tokenizer.batch_decode(found.sequences, skip_special_tokens=True)]
        for record in by_source[source]:
            assert written[record["rank"]] == record["target"]
            tokens = (found.sequences[record["rank"]][1:] != 1).sum().item()
            if tokens == 12:  # ended by length: beam search divides by the same number
                assert record["score"] == pytest.approx(found.sequences_scores[record["rank"]].item(), abs=2e-5)
                checked += 1
    assert checked > 10


def test_the_score_ends_with_the_end_token(teacher, tmp_path):
    """What stands behind the end token (padding, whatever the batch is long) is not part of the output."""
    model, tokenizer = teacher
    lengths = {}

    def generate(input_ids, attention_mask, **options):
        rows = [[2, 10 + n, 20, 2, 1, 1] if n % 2 else [2, 10 + n, 20, 30, 40, 2] for n in range(len(input_ids))]
        lengths.update({tokenizer.decode(row, skip_special_tokens=True).strip(): row for row in rows})
        return torch.tensor(rows)

    model.generate = generate
    distill(model, tokenizer, SOURCES[:4], tmp_path / "out.jsonl", batch_size=4)
    for record in read(tmp_path / "out.jsonl"):
        row = [token for token in lengths[record["target"]] if token != 1]
        batch = tokenizer([record["source"]], return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch, decoder_input_ids=torch.tensor([row[:-1]])).logits
        each = logits.log_softmax(-1)[0, range(len(row) - 1), row[1:]]
        assert record["score"] == pytest.approx(each.mean().item(), rel=1e-5)


def test_no_scores_and_no_references(teacher, tmp_path):
    distill(*teacher, SOURCES[:3], tmp_path / "out.jsonl", with_scores=False)
    assert all(record["score"] is None and record["reference"] is None for record in read(tmp_path / "out.jsonl"))


def test_n_best(teacher, tmp_path):
    distill(*teacher, SOURCES, tmp_path / "out.jsonl", batch_size=4, num_beams=4, num_return_sequences=4)
    records = read(tmp_path / "out.jsonl")
    by_source: dict[int, list[dict]] = {}
    number = -1
    for record in records:
        number += record["rank"] == 0
        by_source.setdefault(number, []).append(record)
    assert [by_source[n][0]["source"] for n in range(len(SOURCES))] == SOURCES
    for found in by_source.values():
        ranks = [record["rank"] for record in found]
        assert ranks == sorted(set(ranks)) and max(ranks) <= 3
        assert len({record["target"] for record in found}) == len(found), "the same text comes once"
    assert max(map(len, by_source.values())) > 1


def shortest(candidate: str, reference: str) -> float:
    return -len(candidate)


def by_number(candidate: str, reference: str) -> float:
    return float(reference.split()[-1])


def test_the_closest_of_the_n_best_and_the_filter(teacher, tmp_path):
    options = {"references": REFERENCES, "batch_size": 4, "num_beams": 4, "num_return_sequences": 4}
    distill(*teacher, SOURCES, tmp_path / "all.jsonl", **options)
    every: dict[str, list[dict]] = {}
    for record in read(tmp_path / "all.jsonl"):
        every.setdefault(record["reference"], []).append(record)
    done = distill(
        *teacher, SOURCES, tmp_path / "some.jsonl", closeness=shortest, quality=by_number, min_quality=9.0, **options
    )
    # min keeps the first of equals, which has the better rank.
    chosen = [min(every[reference], key=lambda record: len(record["target"])) for reference in REFERENCES[10:]]
    assert read(tmp_path / "some.jsonl") == chosen, "above 9, not 9 itself"
    assert done.without == 10 and done.records == len(SOURCES) - 10


def test_blank_sources_have_no_record(teacher, tmp_path):
    sources = ["", SOURCES[0], None, "  ", SOURCES[1]]
    done = distill(*teacher, sources, tmp_path / "out.jsonl", batch_size=2)
    assert [record["source"] for record in read(tmp_path / "out.jsonl")] == SOURCES[:2]
    assert (done.sources, done.records, done.without) == (5, 2, 3)


def test_parquet_holds_the_same_records(teacher, tmp_path):
    for name in ("out.jsonl", "out.parquet", "again.parquet"):
        distill(*teacher, SOURCES, tmp_path / name, references=[None, *REFERENCES[1:]], batch_size=4)
    assert datasets.Dataset.from_parquet(str(tmp_path / "out.parquet")).to_list() == read(tmp_path / "out.jsonl")
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_file": "out.csv"}, "output_file must end in .jsonl or .parquet"),
        ({"output_file": "gone/out.jsonl"}, "output_file must lie in a folder that exists"),
        ({"sources": ["", None]}, "none of 2 sources holds a text"),
        ({"sources": "text"}, "sequences of texts"),
        ({"references": ["a"]}, "1 references for 23 sources"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences must be between 1 and num_beams, 2, got 3"),
        ({"num_return_sequences": 2}, "between 1 and num_beams, 1, got 2"),
        ({"closeness": shortest}, "references must be there for every source to choose by, number 0 has none"),
        ({"quality": shortest, "references": [*REFERENCES[:-1], ""]}, "number 22 has none"),
        ({"max_source_length": 1000}, "max_source_length must be at most 128"),
    ],
)
def test_wrong_settings_leave_nothing(teacher, tmp_path, options, message):
    given = {"sources": SOURCES, "output_file": "out.jsonl", **options}
    given["output_file"] = tmp_path / given["output_file"]
    with pytest.raises(ValueError, match=message):
        distill(*teacher, **given)
    assert not list(tmp_path.iterdir())


def test_nothing_left_writes_nothing(teacher, tmp_path):
    with pytest.raises(RuntimeError, match="no record is left of 23 sources"):
        distill(*teacher, SOURCES, tmp_path / "out.jsonl", references=REFERENCES, quality=by_number, min_quality=99.0)
    assert not (tmp_path / "out.jsonl").exists()


# ---- stopped and resumed ----------------------------------------------------------------


def test_a_stopped_run_goes_on_and_writes_the_same_bytes(teacher, folder, tmp_path):
    """Also with a line cut short, a line that is no JSON, and the shard of a process that is not there any more."""
    options = {"references": REFERENCES, "batch_size": 4, "num_beams": 2, "num_return_sequences": 2}
    distill(*teacher, SOURCES, tmp_path / "whole.jsonl", **options)
    out, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    for calls in (2, 1):
        model, tokenizer = text.open_model(folder)
        with pytest.raises(Stop):
            distill(stopping(model, calls), tokenizer, SOURCES, out, **options)
        assert not out.exists()
        if calls == 2:
            (kept / "00000.jsonl").rename(kept / "00007.jsonl")
            with open(kept / "00007.jsonl", "ab") as shard:
                shard.write(b'{"index": 0, "records": [{"source": "a torn')
        else:
            with open(kept / "00000.jsonl", "ab") as shard:
                shard.write(b'{"index": 1, "rec\n{"index": 2, "records": []')
    model, tokenizer = text.open_model(folder)
    done = distill(stopping(model, 3), tokenizer, SOURCES, out, **options)  # 6 batches, 3 of them done
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert done.resumed == 12 and "12 of the sources were done before" in str(done)
    assert not kept.exists()


def test_a_run_can_start_over(teacher, folder, tmp_path):
    model, tokenizer = text.open_model(folder)
    with pytest.raises(Stop):
        distill(stopping(model, 2), tokenizer, SOURCES, tmp_path / "out.jsonl", batch_size=4)
    done = distill(*teacher, SOURCES, tmp_path / "out.jsonl", batch_size=8, resume=False)
    assert done.resumed == 0 and len(read(tmp_path / "out.jsonl")) == len(SOURCES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"batch_size": 3}, "batch_size: 4, now 3"),
        ({"with_scores": False}, "with_scores: True, now False"),
        ({"sources": SOURCES[::-1]}, "texts"),
        ({"references": REFERENCES}, "texts"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"source_prefix": "a "}, "source_prefix: '', now 'a '"),
        ({"model": 1}, "model"),
        ({"references": REFERENCES, "quality": by_number}, "texts"),
    ],
)
def test_parts_of_another_run_are_not_mixed_in(teacher, folder, tmp_path, change, named):
    model, tokenizer = text.open_model(folder)
    given = {"sources": SOURCES, "batch_size": 4}
    with pytest.raises(Stop):
        distill(stopping(model, 2), tokenizer, output_file=tmp_path / "out.jsonl", **given)
    before = (tmp_path / "out.jsonl.parts" / "00000.jsonl").read_bytes()
    if change.pop("model", None):
        with torch.no_grad():
            teacher[0].model.decoder.layers[0].fc1.weight[3, 3] += 0.01
    with pytest.raises(ValueError, match=f"parts of a run with another {named}.* no_resume to start over"):
        distill(*teacher, output_file=tmp_path / "out.jsonl", **{**given, **change})
    assert (tmp_path / "out.jsonl.parts" / "00000.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(teacher, tmp_path):
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts" / "thesis.tex").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(ValueError, match="something else is there"):
            distill(*teacher, SOURCES, tmp_path / "out.jsonl", resume=resume)
    assert (tmp_path / "out.jsonl.parts" / "thesis.tex").exists()


def test_two_runs_do_not_write_one_shard(teacher, folder, tmp_path):
    model, tokenizer = text.open_model(folder)
    with pytest.raises(Stop):
        distill(stopping(model, 1), tokenizer, SOURCES, tmp_path / "out.jsonl", batch_size=4)
    with parts.shard_of_process(tmp_path / "out.jsonl.parts", 0):
        for resume in (True, False):
            with pytest.raises(ValueError, match="is being written by another run"):
                distill(*teacher, SOURCES, tmp_path / "out.jsonl", batch_size=4, resume=resume)
    assert distill(*teacher, SOURCES, tmp_path / "out.jsonl", batch_size=4).resumed == 4


def test_a_process_that_ended_early_is_noticed(teacher, tmp_path):
    with pytest.raises(RuntimeError, match="11 sources have no outputs in .*: did a process end early"):
        distill(*teacher, SOURCES, tmp_path / "out.jsonl", batch_size=3, processes=Processes(0, 2))
    assert not (tmp_path / "out.jsonl").exists()


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'dqkernels\[train\]'"):
        Processes.of_launcher()


# ---- in processes of their own ----------------------------------------------------------

_SLOW = """
import sys, time
from dqkernels import text
import transformers
generate = transformers.GenerationMixin.generate
def slow(self, *arguments, **options):
    time.sleep(0.15)
    return generate(self, *arguments, **options)
transformers.GenerationMixin.generate = slow
from dqkernels.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def pairs(tmp_path):
    rows = zip(SOURCES, REFERENCES, strict=True)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": s, "summary": t}) + "\n" for s, t in rows), encoding="utf-8")
    return path


def verb(folder, pairs, out, *more: str) -> list[str]:
    return ["distill-data", "--model", folder, "--train_file", str(pairs), "--output_file", str(out), "--num_beams",
            "2", "--batch_size", "2", "--device", "cpu", *more]  # fmt: skip


def start(arguments, *, program: str | None = None, **environment: str) -> subprocess.Popen:
    path = os.pathsep.join(sys.path)
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = ["-c", program] if program else ["-m", "dqkernels"]
    return subprocess.Popen(
        [sys.executable, *command, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_and_given_again_and_shared_among_two_processes(folder, pairs, tmp_path, capsys):
    """Three ways to the same bytes: in one go, killed and resumed, and by two processes over gloo."""
    assert main(verb(folder, pairs, tmp_path / "whole.jsonl")) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    cache = {"HF_HOME": str(tmp_path / "home")}

    out, shard = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.parts" / "00000.jsonl"
    process = start(verb(folder, pairs, out), program=_SLOW, **cache)
    deadline = time.monotonic() + 240
    while not (shard.exists() and shard.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    written = shard.read_bytes().count(b"\n")
    assert 4 <= written < len(SOURCES)
    capsys.readouterr()
    assert main([*verb(folder, pairs, out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] in range(written - written % 2, written + 3)
    assert out.read_bytes() == whole

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        start(
            verb(folder, pairs, tmp_path / "shared.jsonl"),
            **cache,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], ended
    assert (tmp_path / "shared.jsonl").read_bytes() == whole
    assert "wrote 23 records" in ended[0][1] and "wrote" not in ended[1][1], "the first process reports"


# ---- the verb ---------------------------------------------------------------------------


def wrong(capsys, *arguments: str, code: int = 2) -> str:
    """Runs what must fail; its one line on stderr."""
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("dqkernels: error: ")]
    assert len(lines) == 1 and captured.out == "" and "Traceback" not in captured.err
    return lines[0].removeprefix("dqkernels: error: ")


def test_verb_chooses_filters_and_takes_a_sample(folder, pairs, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    more = ["--num_return_sequences", "2", "--select", "best_rouge", "--max_samples", "5", "--no_scores", "--json"]
    assert main(verb(folder, pairs, out, *more)) == 0
    found = datasets.Dataset.from_parquet(str(out)).to_list()
    assert [row["source"] for row in found] == SOURCES[:5] and {row["score"] for row in found} == {None}
    captured = capsys.readouterr()
    assert json.loads(captured.out)["records"] == 5 and "wrote 5 records of 5 sources" in captured.err
    message = wrong(capsys, *verb(folder, pairs, tmp_path / "none.jsonl", "--min_rouge2", "10"), code=1)
    assert message.startswith("no record is left of 23 sources")


def test_verb_takes_sources_alone(folder, tmp_path):
    (tmp_path / "in.csv").write_text("text\nhello world\na b\n")
    assert main(verb(folder, tmp_path / "in.csv", tmp_path / "out.jsonl")) == 0
    assert [(row["source"], row["reference"]) for row in read(tmp_path / "out.jsonl")] == [
        ("hello world", None),
        ("a b", None),
    ]


def test_verb_refuses_in_one_line(folder, pairs, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    for more, message in [
        (["--select", "best"], "--select must be one of all, best_rouge, best_chrf, got 'best'"),
        (["--select", "best_rouge"], "--select chooses among several outputs: give --num_return_sequences"),
        (["--num_return_sequences", "3"], "--num_return_sequences must be at most --num_beams, 2, got 3"),
        (["--split", "dev"], "--split must be one of train, validation, test, got 'dev'"),
        (["--split", "test"], "the test split is wanted and the data has none; it has train"),
        (["--max_samples", "0"], "--max_samples must be at least 1, got 0"),
        (["--text_column", "body"], "--text_column 'body' is not in "),
        (["--dataset_name", "docstrings"], "give either --dataset_name or --train_file"),
    ]:
        assert message in wrong(capsys, *verb(folder, pairs, out, *more))
    assert "must end in .jsonl or .parquet" in wrong(capsys, *verb(folder, pairs, tmp_path / "out.txt"))
    assert "is not there" in wrong(capsys, *verb(folder, tmp_path / "gone.csv", out))
    out.write_text("precious")
    assert "is there already: give --overwrite" in wrong(capsys, *verb(folder, pairs, out))
    assert out.read_text() == "precious" and not (tmp_path / "out.jsonl.parts").exists()
    arguments = verb(folder, pairs, tmp_path / "hub.jsonl")
    arguments[arguments.index("--train_file") : arguments.index("--train_file") + 2] = ["--dataset_name", "a/b"]
    assert "HF_HUB_OFFLINE is set" in wrong(capsys, *arguments)


def test_verb_interrupted_says_what_is_kept(folder, pairs, tmp_path, capsys, monkeypatch):
    opened = text.open_model

    def open_model(*arguments, **options):
        model, tokenizer = opened(*arguments, **options)
        return stopping(model, 2, KeyboardInterrupt), tokenizer

    monkeypatch.setattr(text, "open_model", open_model)
    out = tmp_path / "out.jsonl"
    assert main(verb(folder, pairs, out)) == 130
    assert f"what was done is kept in {out}.parts" in capsys.readouterr().err
    monkeypatch.setattr(text, "open_model", opened)
    message = wrong(capsys, *verb(folder, pairs, out, "--max_source_length", "9"))
    assert "--output_file has parts of a run with another --max_source_length: 64, now 9" in message
    assert message.endswith("or another --output_file, or --no_resume to start over")
    assert main([*verb(folder, pairs, out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 4


def test_help_teaches(capsys):
    assert main(["distill-data", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("--num_beams", "best_rouge", "--min_rouge2", "accelerate launch", "--no_resume", "gettext", "gold"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 100
