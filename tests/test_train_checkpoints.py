"""Checkpoints on the disk: values without pickle, whole folders or none, what is resumed from, what is removed."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make

import dqkernels
from dqkernels.train import checkpoints
from dqkernels.train.checkpoints import (
    CheckpointError,
    kept_rng,
    newest,
    pack,
    rng_state,
    rotate,
    set_rng_state,
    unpack,
)

CPU = torch.device("cpu")


def through_a_file(value, tmp_path):
    checkpoints.save_state(tmp_path / "state.safetensors", value)
    return checkpoints.load_state(tmp_path / "state.safetensors")


def test_values_come_back_as_they_were(tmp_path):
    base = torch.arange(12.0)
    value = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2)}, 17: {"empty": torch.zeros(0, 4)}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "amsgrad": False}],
        "odd": (math.inf, -0.0, 5e-324, 2**60, "", [], {}, ()),
        "views": [base[:4], base[2:], base.view(3, 4).T],  # share memory
        "kinds": [torch.tensor([1, -1], dtype=t) for t in (torch.int64, torch.int8, torch.bfloat16, torch.bool)],
        "numpy": np.float64(0.1),
    }
    found = through_a_file(value, tmp_path)

    def same(a, b, path="value"):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), path
        elif isinstance(b, dict):
            assert list(a) == list(b), path
            for key in b:
                same(a[key], b[key], f"{path}.{key}")
        elif isinstance(b, list | tuple):
            assert type(a) is type(b) and len(a) == len(b), path
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                same(x, y, f"{path}.{i}")
        else:
            assert a == b and str(a) == str(b), path

    same(found, {**value, "numpy": 0.1})
    assert math.isnan(through_a_file([math.nan], tmp_path)[0])


@pytest.mark.parametrize("bad", [lambda: 0, object(), {1.5: 0}, torch.eye(3).to_sparse(), {None: 1}, b"bytes"])
def test_what_would_need_pickle_is_refused_by_its_place(bad):
    with pytest.raises(TypeError, match=r"^state\.optimizer\.1 .*without pickle"):
        pack({"optimizer": [0, bad]})


def test_unpack_reads_only_what_pack_writes():
    with pytest.raises(KeyError):
        unpack({"tensor": "state.absent"}, {})
    with pytest.raises(ValueError):
        unpack({"list": [], "dict": []}, {})


def test_an_unreadable_state_has_a_named_error(tmp_path):
    path = tmp_path / "state.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"dqkernels": '{"format_version": 99, "state": {}}'})
    with pytest.raises(CheckpointError, match="format version 99, this release reads 1"):
        checkpoints.load_state(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load_state(path)


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(2).tolist()


def test_random_states_go_on_where_they_stood(tmp_path):
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    draws()  # leaves a second normal number behind in Python and numpy
    state = rng_state(CPU)
    assert all(not tensor.is_floating_point() for tensor in state.values())
    expected = [draws() for _ in range(400)]  # past one refill of both Mersenne twisters
    other = rng_state(CPU)  # of another process, in the row before
    rows = {name: torch.stack([other[name], row]) for name, row in state.items()}
    checkpoints.save_rng(tmp_path / "rng.safetensors", rows)
    draws()
    set_rng_state({name: rows[1] for name, rows in checkpoints.load_rng(tmp_path / "rng.safetensors").items()}, CPU)
    assert [draws() for _ in range(400)] == expected


def test_kept_rng_also_after_an_error():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError), kept_rng(CPU):
        draws()
        raise RuntimeError
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------------------------------------------- folders


def write(run, step, text="weights", **options):
    with checkpoints.writing(run / f"checkpoint-{step}", **options) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "notes").write_text(text)
        (folder / "model.safetensors").write_text(text * 3)
    return run / f"checkpoint-{step}"


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoints.writing(tmp_path / "checkpoint-1") as folder:
        (folder / "model.safetensors").write_text("half")
        assert folder.name != "checkpoint-1"
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    path = write(tmp_path, 1)
    assert checkpoints.why_not(path) is None
    with pytest.raises(KeyboardInterrupt), checkpoints.writing(path) as folder:
        raise KeyboardInterrupt
    assert checkpoints.why_not(path) is None and (path / "sub" / "notes").read_text() == "weights"
    write(tmp_path, 1, "others")
    assert (path / "sub" / "notes").read_text() == "others"
    assert names(tmp_path) == ["checkpoint-1"]
    with pytest.raises(ValueError, match="called checkpoint-N"), checkpoints.writing(tmp_path / "best"):
        pass
    assert names(tmp_path) == ["checkpoint-1"]


SPOILED = {
    "no marker": (lambda p: (p / checkpoints.MARKER).unlink(), "has no dqkernels_checkpoint.json"),
    "empty marker": (lambda p: (p / checkpoints.MARKER).write_text(""), "unreadable dqkernels_checkpoint.json"),
    "other marker": (lambda p: (p / checkpoints.MARKER).write_text("[]"), "unreadable dqkernels_checkpoint.json"),
    "cut": (lambda p: (p / "sub" / "notes").write_text("weigh"), "has 5 of 7 bytes of sub/notes"),
    "gone": (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
    "version": (
        lambda p: (p / checkpoints.MARKER).write_text('{"format_version": 2, "files": {}, "resumable": true}'),
        "has format version 2, this release reads 1",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_an_incomplete_checkpoint_is_passed_over_with_its_reason(how, tmp_path):
    spoil, reason = SPOILED[how]
    older, newer = write(tmp_path, 9), write(tmp_path, 10)  # 10 is newer than 9, and sorts before it as text
    assert newest(tmp_path) == (newer, {})
    spoil(newer)
    found, rejected = newest(tmp_path)
    assert found == older and list(rejected) == [newer] and reason in rejected[newer]


def test_a_model_alone_is_no_place_to_resume_from(tmp_path):
    path = write(tmp_path, 3, resumable=False)
    assert newest(tmp_path) == (None, {path: "holds the model alone (save_only_model=True)"})


@pytest.mark.parametrize(
    ("steps", "limit", "keep", "left"),
    [
        ((1, 2, 3, 4), 2, (4,), (3, 4)),
        ((1, 2, 3, 4), 2, (4, 1), (1, 4)),
        ((1, 2, 3, 4), 1, (4, 1), (1, 4)),
        ((1, 2, 3, 4), 3, (4, 1), (1, 3, 4)),
        ((8, 9, 10), 1, (10,), (10,)),
        ((1, 2), None, (2,), (1, 2)),
        ((1, 2), 0, (2,), (1, 2)),
        ((1,), 1, (1,), (1,)),
    ],
)
def test_rotation(steps, limit, keep, left, tmp_path):
    for step in steps:
        write(tmp_path, step)
    rotate(tmp_path, limit, tuple(tmp_path / f"checkpoint-{step}" for step in keep))
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in left)


def test_rotation_keeps_the_last_that_can_be_resumed_and_what_is_not_ours(tmp_path):
    only = write(tmp_path, 1)
    torn, foreign = write(tmp_path, 2), tmp_path / "checkpoint-7"
    (torn / "model.safetensors").write_text("")
    foreign.mkdir()
    left_over = tmp_path / ".checkpoint-2.123-0123abcd.tmp"
    (left_over / "sub").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    last = write(tmp_path, 3, resumable=False)
    rotate(tmp_path, 1, (last,))
    assert names(tmp_path) == sorted([only.name, last.name, foreign.name, "runs"])


_KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from dqkernels.train import checkpoints
run, kills = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(0)
seen = []
for kill in range(kills):
    begun, tell = os.pipe()
    child = os.fork()
    if not child:
        while True:
            for step in (5, 6):
                mark = os.urandom(4).hex()
                os.write(tell, b"b")
                with checkpoints.writing(run / f"checkpoint-{step}") as folder:
                    for name in ("a", "b", "c"):
                        (folder / name).write_text(mark * 2000)
    for _ in range(rng.randint(2, 4)):  # in the middle of the second to fourth save, whatever the machine's speed
        os.read(begun, 1)
    time.sleep(rng.uniform(0, 0.004))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(begun), os.close(tell)
    for step in (5, 6):
        path = run / f"checkpoint-{step}"
        if path.exists():
            assert checkpoints.why_not(path) is None, checkpoints.why_not(path)
            texts = {(path / name).read_text() for name in ("a", "b", "c")}
            assert len(texts) == 1, "a mixture"
            seen.append(texts.pop()[:8])
left = len(list(run.glob(".checkpoint-*")))
checkpoints.rotate(run, 2, ())
assert not list(run.glob(".checkpoint-*"))
print(json.dumps([len(set(seen)), left]))
"""


def test_kills_while_saving_leave_old_or_new(tmp_path):
    root = next(iter(dqkernels.__path__)) + "/.."
    found = subprocess.run(
        [sys.executable, "-c", _KILLER, tmp_path, "60"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    different, left_over = json.loads(found.stdout)
    assert different > 20 and left_over > 20, "the kills did not hit the saving"


# ------------------------------------------------------------------------------------------------------ contents


@pytest.fixture
def saved(tmp_path):
    make("bart").save_pretrained(tmp_path)
    return tmp_path


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_weights_are_read_strictly_but_for_ties(saved):
    model = make("bart")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(load_file(saved / "model.safetensors")) < len(expected)  # tied ones are written once
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoints.load_weights(model, saved)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.shared.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.encoder.layers.0.fc1.weight"), r"lacks model.encoder.layers.0.fc1.weight"),
        (lambda t: t.pop("model.shared.weight"), r"lacks .*lm_head.weight"),
        (lambda t: t.update(extra=torch.ones(1)), r"has unknown extra"),
        (
            lambda t: t.update({"model.encoder.layers.0.fc1.bias": torch.ones(3)}),
            r"has another shape of model.encoder.layers.0.fc1.bias \[3\]",
        ),
    ],
)
def test_wrong_weights_are_refused_by_name(change, message, saved):
    changed(saved, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_weights(make("bart"), saved)


def test_changed_arguments_are_named():
    stored = {
        "arguments": {"learning_rate": 1e-3, "seed": 1, "num_train_epochs": 3, "logging_steps": 5},
        "kd": {"task": 1.0, "encoder_targets": [0, 1]},
        "world_size": 1,
    }
    same = {**stored, "kd": {"task": 1.0, "encoder_targets": (0, 1)}}
    assert checkpoints.compare_arguments(stored, same) == ([], [])
    now = {
        "arguments": {"learning_rate": 2e-3, "seed": 1, "num_train_epochs": 4, "logging_steps": 6},
        "kd": {"task": 0.5, "encoder_targets": None},
        "world_size": 2,
    }
    changes, longer = checkpoints.compare_arguments(stored, now)
    assert changes == [
        "learning_rate: was 0.001, is now 0.002",
        "kd.encoder_targets: was [0, 1], is now None",
        "kd.task: was 1.0, is now 0.5",
        "world_size: was 1, is now 2",
    ]
    assert longer == ["num_train_epochs: was 3, is now 4"]
