"""kernels/measured.py: whose tiles are taken, and what a file must hold. No GPU: torch's answers are stand-ins."""

from __future__ import annotations

import copy
import json
import types

import pytest
import torch

from dqkernels.kernels import measured, tiles

DEVICE = torch.device("cuda", 0)
RULE = tiles.choose(64, 1024, 1024, 4, -1, "sm90", 132)
OTHER = next((tile, 2) for tile in tiles.candidates("sm90", 4) if tile != RULE[0])


def row(m=64, n=1024, k=1024, bits=4, group_size=-1, choice=OTHER):
    tile, split = choice
    return {"bits": bits, "group_size": group_size, "m": m, "n": n, "k": k, **tile._asdict(), "split_k": split,
            "median_us": 5.5, "rule_us": 7.5, "is_rule": False}  # fmt: skip


def table(*rows, gpu="NVIDIA H200", capability="9.0"):
    return {
        "schema_version": 1,
        "kind": "tiles",
        "environment": {"gpu": gpu, "triton": "3.6.0"},
        "settings": {"compute_capability": capability, "multiprocessors": 132},
        "rows": list(rows),
    }


@pytest.fixture(autouse=True)
def h200(monkeypatch, tmp_path):
    """This machine has an H200, and a home and a package without tables."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    facts = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: facts)
    monkeypatch.setattr(measured, "_triton", lambda: "3.6.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DQKERNELS_TILES", raising=False)
    monkeypatch.setattr(measured, "_SHIPPED", tmp_path / "shipped")
    caches = (measured.table_of, tiles.family, tiles.multiprocessors)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def choose(m=64, n=1024, k=1024, bits=4, group_size=-1):
    return measured.choose(m, n, k, bits, group_size, DEVICE)


def test_without_a_table_the_rule_decides():
    assert choose() == RULE
    assert measured.in_use(DEVICE) == "by rule: nobody has measured the NVIDIA H200 yet (dqkernels tune does)"
    cpu = torch.device("cpu")
    assert measured.choose(64, 1024, 1024, 4, -1, cpu) == tiles.choose(64, 1024, 1024, 4, -1, "sm80", 108)
    assert measured.in_use(cpu) == "by rule: only GPUs have measured tables"


def test_a_table_decides_for_its_buckets_alone():
    put(measured.user_file("NVIDIA H200"), table(row()))
    assert choose() == choose(33) == choose(64, 800, 1000) == OTHER != RULE
    for other in ({"m": 32}, {"m": 65}, {"n": 1025}, {"k": 768}, {"bits": 8}, {"group_size": 64}):
        sizes = {"m": 64, "n": 1024, "k": 1024, "bits": 4, "group_size": -1, **other}
        assert choose(**sizes) == tiles.choose(*sizes.values(), "sm90", 132)
    assert measured.in_use(DEVICE) == "1 measured on this NVIDIA H200 (yours, Triton 3.6.0), else by rule"


def test_more_tokens_than_any_bucket_take_the_last():
    assert [measured.bucket(m, 768, 3072)[0] for m in (1, 16, 17, 8192, 8193, 10**6)] == [16, 16, 32, 8192, 8192, 8192]
    assert measured.bucket(1, 50265, 769) == (16, 50432, 1024)


def test_whose_table(h200, monkeypatch):
    """The variable's before the user's before the shipped one."""
    third = next((tile, 4) for tile in tiles.candidates("sm90", 4) if tile not in (RULE[0], OTHER[0]))
    put(h200 / "shipped" / "nvidia-h200.json", table(row()))
    assert choose() == OTHER and "(shipped," in measured.in_use(DEVICE)
    put(measured.user_file("NVIDIA H200"), table(row(choice=third)))
    measured.refresh()
    assert choose() == third
    monkeypatch.setenv("DQKERNELS_TILES", str(put(h200 / "mine.json", table(row(choice=(OTHER[0], 1))))))
    measured.refresh()
    assert choose() == (OTHER[0], 1) and "(DQKERNELS_TILES," in measured.in_use(DEVICE)
    monkeypatch.setenv("DQKERNELS_TILES", "off")
    measured.refresh()
    assert choose() == RULE and measured.in_use(DEVICE) == "by rule: DQKERNELS_TILES=off"


@pytest.mark.parametrize("other", [{"gpu": "NVIDIA A100-SXM4-80GB", "capability": "8.0"}, {"capability": "9.1"}])
def test_another_gpus_table_is_not_taken(h200, monkeypatch, other):
    monkeypatch.setenv("DQKERNELS_TILES", str(put(h200 / "other.json", table(**other))))
    assert choose() == RULE
    assert "other.json was measured on NVIDIA" in measured.in_use(DEVICE)


def test_another_tritons_table_is_not_taken(monkeypatch):
    """What a tile compiles to changes with the compiler; a patch release does not count."""
    put(measured.user_file("NVIDIA H200"), table(row()))
    assert choose() == OTHER
    measured.refresh()
    monkeypatch.setattr(measured, "_triton", lambda: "3.9.0")
    with pytest.warns(UserWarning, match="chosen by rule: nvidia-h200.json was measured with Triton 3.6.0"):
        assert choose() == RULE
    assert "was measured with Triton 3.6.0, this is 3.9.0: dqkernels tune once more" in measured.in_use(DEVICE)


BAD = {
    "a capability that is no number": (table(capability="\u00b2.0"), "must name the GPU"),
    "not JSON": (None, "is no table of tiles"),
    "too deep": (None, "is no table of tiles"),
    "a list": ([], "must be a record of kind 'tiles' and schema_version 1, got 'list'"),
    "another kind": ({**table(), "kind": "linear"}, "got 'linear' and 1"),
    "another version": ({**table(), "schema_version": 2}, "got 'tiles' and 2"),
    "no rows": ({key: value for key, value in table().items() if key != "rows"}, "lacks its environment"),
    "no GPU": ({**table(), "environment": {}}, "must name the GPU"),
    "a row that is a list": (table([1]), "row 0 must be an object, got list"),
    "no m": (table({key: value for key, value in row().items() if key != "m"}), "row 0: m must be a whole number"),
    "m of 0": (table(row(m=0)), "row 0: m, n, k must be 1 or more"),
    "bits as a string": (table(row(), {**row(), "bits": "4"}), "row 1: bits must be a whole number, got '4'"),
    "bits as a bool": (table({**row(), "bits": True}), "bits must be a whole number, got True"),
    "3 bits": (table(row(bits=3)), "no kernel has bits=3"),
    "groups at 8 bits": (table(row(bits=8, group_size=64)), "no kernel has bits=8 with group_size=64"),
    "a group of 48": (table(row(group_size=48)), "with group_size=48"),
    "a huge tile": (table({**row(), "block_m": 4096}), r"\(4096, .* is no tile of this release"),
    "a tile of no power of two": (table({**row(), "block_k": 200}), "is no tile of this release"),
    "a thousand warps": (table({**row(), "num_warps": 1024}), "is no tile of this release"),
    "3 splits": (table({**row(), "split_k": 3}), "split_k must be one of"),
    "splits of a large M": (table({**row(m=1024), "split_k": 2}), "1 beyond 256 tokens, got 2"),
}


@pytest.mark.parametrize("case", list(BAD), ids=str)
def test_what_a_file_may_not_hold(case, h200, monkeypatch):
    """Refused by name where it was asked for; left aside with a warning where it was found."""
    content, sentence = BAD[case]
    deep = case == "too deep"
    path = measured.user_file("NVIDIA H200")
    put(path, copy.deepcopy(content))
    if content is None:
        path.write_text("[" * 100_000 if deep else "{")
    with pytest.raises(measured.TableError, match=sentence) as error:
        measured.read(path)
    assert "nvidia-h200.json" in str(error.value) and str(h200) not in str(error.value)
    with pytest.warns(UserWarning, match="chosen by rule"):
        assert choose() == RULE
    monkeypatch.setenv("DQKERNELS_TILES", str(path))
    measured.refresh()
    with pytest.raises(measured.TableError, match=sentence):
        choose()
    assert measured.in_use(DEVICE).startswith("none, every GEMM will refuse: nvidia-h200.json")


def test_a_file_that_is_not_there(h200, monkeypatch):
    from dqkernels import environment

    monkeypatch.setenv("DQKERNELS_TILES", str(h200 / "absent.json"))
    with pytest.raises(ValueError, match="DQKERNELS_TILES must be off or a file that dqkernels tune wrote"):
        environment.check()
    with pytest.raises(measured.TableError, match="absent.json is no table of tiles"):
        choose()


def test_every_shipped_table_is_read():
    """None so far; whoever contributes one finds out here whether it holds."""
    folder = measured.Path(measured.__file__).parent / "tables"
    assert (folder / "README.md").is_file()
    for path in folder.glob("*.json"):
        found = measured.read(path, "shipped")
        assert found.entries and path.name == measured.file_name(found.gpu)
