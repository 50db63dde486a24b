"""Each hostile folder of `hostile.py` is refused by name before its data is read; mutated headers never crash."""

from __future__ import annotations

import random
import shutil
import struct
import time
import tracemalloc

import pytest
import tiny_models
from hostile import ATTACKS, WEIGHTS

import dqkernels
from dqkernels import DQConfig
from dqkernels.serialize import FileFormatError, check_folder, save


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    save(dqkernels.quantize_(tiny_models.make("bart"), DQConfig(weight_bits=4)), folder)
    return folder


def test_the_good_folder_is_accepted(good):
    manifest = check_folder(good)
    assert manifest.quantization == DQConfig(weight_bits=4, attention="int8")
    assert manifest.tensors["model.shared.qweight"].shape == (112, 128)
    dqkernels.load(good)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    attack, message = ATTACKS[name]
    attack(folder)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=message) as caught:
            check_folder(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20, "refused only after allocating"
    assert str(tmp_path) in str(caught.value), "the error names the file"
    assert len(str(caught.value)) < 700, "the error does not repeat the file"
    with pytest.raises(FileFormatError, match=message):
        dqkernels.load(folder)


def test_a_name_twice_is_found_in_linear_time(tmp_path):
    """Seen: every key was counted in the list of all keys, hours for the 4 MiB that a header may have."""
    names = ", ".join(f'"{i}": 0' for i in range(100_000))
    (tmp_path / "config.json").write_text(f'{{{names}, "99999": 0}}')
    started = time.process_time()
    with pytest.raises(FileFormatError, match="the key '99999' stands there twice"):
        check_folder(tmp_path)
    assert time.process_time() - started < 5


def test_the_link_layout_of_a_hub_cache_is_accepted(good, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", WEIGHTS)):
        shutil.copy(good / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    check_folder(snapshot)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_read_but_never_crash(seed, good, tmp_path):
    """The header and its length take the hits: what is behind them is data, and any byte there is a legal code."""
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    original = (good / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    rng = random.Random(seed)
    refused = 0
    for _ in range(250):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(8 + length)
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at : at + rng.randrange(1, 9)] = b""
            elif kind == 2:
                data[at:at] = rng.choice((b"9", b"0", b'"', b"[", b"{", b"-", b",", b"\x00"))
            else:
                data[at] ^= 1 << rng.randrange(8)
        (folder / WEIGHTS).write_bytes(data)
        try:
            check_folder(folder)
        except FileFormatError:
            refused += 1
    assert refused > 150
