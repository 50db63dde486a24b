"""Which schema a file of `benchmarks/results` keeps: a record's, or that of the demo or of the evidence.

The demo and the paper's experiment hold texts and scores rather than rows of times, so they have schemas of their own
(`demo.schema.json`, `evidence.schema.json`). Plain Python, as `record` is: nothing here needs torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dqkernels.bench import record
from dqkernels.bench.record import RecordError

_HERE = Path(__file__).parent
#: What a run has by itself, and what it has in the file of all runs.
_ALONE, _IN_TABLE = ("by_pair", "task"), ("gap_to_teacher", "shows", "task")
#: Texts of other people's packages, which may name any folder.
_TEXTS = ("samples",)


def kind_of(data: Any) -> str:
    """`record`, `demo`, `evidence` (all runs) or `evidence run` (one of them).

    Raises:
        RecordError: for what is none of these.
    """
    if not isinstance(data, dict):
        raise RecordError(f"a record is a JSON object, got {type(data).__name__}")
    if "kind" in data:
        return "record"
    for kind, keys in (("demo", ("rows", "samples")), ("evidence", ("runs", "not_run")), ("evidence run", ("row",))):
        if all(key in data for key in keys):
            return kind
    raise RecordError("it has no 'kind', and is neither a demo.json nor of the evidence")


def check(data: Any, kind: str | None = None) -> str:
    """Raises RecordError unless `data` keeps its schema, its figures are finite and no path is in it; gives its kind.

    Args:
        data: a parsed file.
        kind: which it must be; default what `kind_of` finds.
    """
    found = kind_of(data)
    if kind is not None and found != kind:
        raise RecordError(f"it must be a file of kind {kind!r}, got {found!r}")
    if found == "record":
        record.check(data)
        return found
    record.validate(data, schema_of(found))
    record.check_leaves({key: value for key, value in data.items() if key not in _TEXTS}, units=False)
    for where, _, value in record.leaves({key: data[key] for key in _TEXTS if key in data}):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecordError(f"{where} is {value}")
    return found


def read(path: str | Path) -> tuple[str, dict]:
    """Kind and content of a file of any of the schemas, checked.

    Raises:
        RecordError: naming the file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return check(data), data
    except ValueError as error:
        raise RecordError(f"{Path(path).name}: {error}") from None


def schema_of(kind: str) -> dict:
    """The JSON schema of one of the kinds without rows of times, whole: the machine's part is that of a record."""
    base = json.loads((_HERE / "record.schema.json").read_text(encoding="utf-8"))
    name = "demo" if kind == "demo" else "evidence"
    schema = json.loads((_HERE / f"{name}.schema.json").read_text(encoding="utf-8"))
    schema.setdefault("$defs", {})["environment"] = base["properties"]["environment"]
    if kind == "demo":
        return schema
    run = schema["$defs"]["run"]
    mine, others = (_ALONE, _IN_TABLE) if kind == "evidence run" else (_IN_TABLE, _ALONE)
    for key in set(others) - set(mine):
        del run["properties"][key]
    # The first runs alone did not name their task.
    run["required"] += [key for key in mine if kind == "evidence" or key != "task"]
    return schema if kind == "evidence" else {"$ref": "#/$defs/run", "$defs": schema["$defs"]}
