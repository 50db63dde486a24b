"""Every file of benchmarks/results keeps a schema, and what would not is refused where it is written."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from dqkernels.bench import demo, record, schemas

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.rglob("*"))
RECORDS = [path for path in FILES if path.is_file()]


def name_of(path: Path) -> str:
    return path.relative_to(RESULTS).as_posix()


def data_of(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("library", [True, False], ids=["jsonschema", "without it"])
@pytest.mark.parametrize("path", RECORDS, ids=name_of)
def test_every_committed_record_keeps_its_schema(path, library, monkeypatch):
    """All of them, folders below included; no file is anything else."""
    if library:
        pytest.importorskip("jsonschema")
    else:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == "jsonschema" else find(name, *a)
        )
    kind, _ = schemas.read(path)
    folder = name_of(path).partition("/")[0] if "/" in name_of(path) else ""
    by_name = {"demo": "demo", "demo-all": "demo", "dq_docstrings": "evidence"}
    assert kind == ("evidence run" if folder == "dq_docstrings" else by_name.get(path.stem, "record"))


def test_every_kind_is_there():
    assert {schemas.read(path)[0] for path in RECORDS} == {"record", "demo", "evidence", "evidence run"}


def at(data: dict, *keys, value=KeyError) -> dict:
    """A copy with one thing changed, or gone."""
    made = found = copy.deepcopy(data)
    for key in keys[:-1]:
        found = found[key]
    if value is KeyError:
        del found[keys[-1]]
    else:
        found[keys[-1]] = value
    return made


DEMO, ALL, RUN = "demo.json", "dq_docstrings.json", "dq_docstrings/dq-2-s0.json"
BAD = {
    "no environment": (DEMO, ("environment",), KeyError),
    "an environment of other keys": (DEMO, ("environment", "hostname"), "here"),
    "a score as a string": (DEMO, ("rows", 1, "rouge1"), "25.4"),
    "a score above 100": (DEMO, ("rows", 1, "rouge2"), 100.5),
    "a score below 0": (ALL, ("runs", 0, "rougeL"), -1.0),
    "a score that is no number": (DEMO, ("rows", 1, "rouge1"), float("nan")),
    "a key that nobody knows": (DEMO, ("rows", 1, "rogue1"), 25.4),
    "3 bits": (RUN, ("weight_bits",), 3),
    "a sample of an unknown model": (DEMO, ("samples", 0, "W3"), "text"),
    "samples without a reference": (DEMO, ("samples", 0, "reference"), KeyError),
    "a path": (DEMO, ("settings", "source"), "/home/someone/texts"),
    "a path in a run": (RUN, ("kd",), "in /home/someone/kd"),
    "no bytes": (ALL, ("runs", 1, "bytes"), KeyError),
    "no gap": (ALL, ("runs", 1, "gap_to_teacher"), KeyError),
    "a gap without its error": (ALL, ("runs", 1, "gap_to_teacher", "error"), KeyError),
    "pairs beside a gap": (ALL, ("runs", 1, "by_pair"), "1.0 2.0"),
    "no pairs in a run alone": (RUN, ("by_pair",), KeyError),
    "pairs that are no figures": (RUN, ("by_pair",), "1.0 two"),
    "another version": (RUN, ("schema_version",), 2),
    "a hash that is none": (RUN, ("train", "sha256"), "abc"),
    "a machine without its commit": (RUN, ("machine", "git_commit"), KeyError),
    "a run that failed": (ALL, ("not_run", 0, "status"), "done"),
}


@pytest.mark.parametrize("library", [True, False], ids=["jsonschema", "without it"])
@pytest.mark.parametrize("case", BAD, ids=str)
def test_what_breaks_a_schema_is_refused(case, library, monkeypatch):
    if library:
        pytest.importorskip("jsonschema")
    else:
        monkeypatch.setattr(record.importlib.util, "find_spec", lambda name, *a: None)
    name, keys, value = BAD[case]
    data = data_of(name)
    schemas.check(data)
    with pytest.raises(schemas.RecordError):
        schemas.check(at(data, *keys, value=value))


def test_what_is_no_file_of_ours_is_said(tmp_path):
    path = tmp_path / "other.json"
    for text, message in (("[]", "got list"), ("{}", "has no 'kind'"), ("{", "Expecting")):
        path.write_text(text)
        with pytest.raises(schemas.RecordError, match=f"other.json: .*{message}"):
            schemas.read(path)
    with pytest.raises(schemas.RecordError, match="must be a file of kind 'demo', got 'evidence'"):
        schemas.check(data_of(ALL), "demo")


def test_the_demo_writes_nothing_else(tmp_path):
    with pytest.raises(schemas.RecordError, match="rouge1"):
        demo.write(tmp_path, at(data_of(DEMO), "rows", 1, "rouge1", value="many"))
    assert list(tmp_path.iterdir()) == []
    demo.write(tmp_path, data_of(DEMO))
    assert json.loads((tmp_path / "demo.json").read_text()) == data_of(DEMO)
