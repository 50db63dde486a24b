"""kernels/measured.py: whose tiles are taken, and what a file must hold. No GPU: torch's answers are stand-ins."""

from __future__ import annotations

import copy
import functools
import json
import types

import pytest
import torch

from dqkernels import backends, nn, ops
from dqkernels.config import DQConfig
from dqkernels.kernels import measured, native, plans, skinny, tiles

DEVICE = torch.device("cuda", 0)
RULE = tiles.choose(64, 1024, 1024, 4, -1, "sm90", 132)
OTHER = next((tile, 2) for tile in tiles.candidates("sm90", 4) if tile != RULE[0])


def row(m=64, n=1024, k=1024, bits=4, group_size=-1, choice=OTHER):
    tile, split = choice
    return {"bits": bits, "group_size": group_size, "m": m, "n": n, "k": k, **tile._asdict(), "split_k": split,
            "median_us": 5.5, "rule_us": 7.5, "is_rule": False}  # fmt: skip


PLAN = plans.Plan(2, 4)
KERNELS = measured.cuda_kernels()


def plan_row(m=64, n=1024, k=1024, bits=4, group_size=-1, input="int8", plan=PLAN, faster="cuda", triton_us=6.0):
    return {"kernel": "cuda", "bits": bits, "group_size": group_size, "input": input, "m": m, "n": n, "k": k,
            **plan._asdict(), "median_us": 5.5, "rule_us": 7.5, "is_rule": False, "triton_us": triton_us,
            "faster": faster}  # fmt: skip


def table(*rows, gpu="NVIDIA H200", capability="9.0", cuda=KERNELS):
    return {
        "schema_version": 1,
        "kind": "tiles",
        "environment": {"gpu": gpu, "triton": "3.6.0"},
        "settings": {"compute_capability": capability, "multiprocessors": 132, "cuda_kernels": cuda},
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
    backends.refresh()
    yield tmp_path
    backends.refresh()
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
    "a kernel of nobody": (table({**row(), "kernel": "rocm"}), "kernel must be one of .*, got 'rocm'"),
    "a plan of no kernels": (table(plan_row(), cuda=None), "is a plan, and settings name no cuda_kernels"),
    "3 warps": (table(plan_row(plan=plans.Plan(3, 1))), r"\(3, 1\) is no plan for 64x1024x1024 at bits=4"),
    "a split without work": (table(plan_row(plan=plans.Plan(1, 3))), r"\(1, 3\) is no plan"),
    "no room in shared memory": (table(plan_row(k=4096, bits=2, plan=plans.Plan(1, 1))), r"\(1, 1\) is no plan"),
    "warps as a string": (table({**plan_row(), "warps_n": "2"}), "warps_n must be a whole number, got '2'"),
    "float above 16 rows": (
        table(plan_row(m=17, input="float")),
        "input must be float up to 16 rows .*, got 'float' at 17",
    ),
    "a plan above 64 rows": (table(plan_row(m=65)), "or int8 up to 64, got 'int8' at 65"),
    "another input": (table(plan_row(input="fp8")), "got 'fp8' at 64"),
    "a winner of nobody": (table(plan_row(faster="eager")), "faster must be one of"),
    "a plan of groups at 8 bits": (table(plan_row(bits=8, group_size=64)), "no kernel has bits=8 with group_size=64"),
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


# ------------------------------------------------------------------------------------------------- CUDA plans


def plan(m=64, n=1024, k=1024, bits=4, group_size=-1, input="int8"):
    return measured.plan(m, n, k, bits, group_size, input, 0)


def test_plans_decide_for_their_entries_alone():
    assert plan() == plans.BY_RULE == (0, 0)
    assert measured.in_use(DEVICE, "cuda") == "by rule: nobody has measured the NVIDIA H200 yet (dqkernels tune does)"
    other = plans.Plan(8, 1)
    put(measured.user_file("NVIDIA H200"), table(plan_row(), plan_row(m=1, input="float", plan=other)))
    measured.refresh()
    assert plan() == plan(m=33) == plan(n=800, k=1000) == PLAN
    assert plan(m=1, input="float") == other
    for another in ({"m": 32}, {"m": 65}, {"n": 1025}, {"k": 768}, {"bits": 2}, {"group_size": 64}, {"m": 1}):
        assert plan(**another) == plans.BY_RULE, another
    assert plan(m=2, input="float") == plans.BY_RULE, "one row is an entry of its own"
    assert measured.plan(64, 1024, 1024, 4, -1, "int8", -1) == plans.BY_RULE, "no GPU"
    assert measured.in_use(DEVICE, "cuda") == (
        f"2 measured on this NVIDIA H200 (yours, CUDA kernels {measured.cuda_kernels()}), else by rule"
    )


def test_a_plan_without_room_is_left_to_the_rule():
    """Measured at 33 rows; at 64 two chunks of the activations no longer fit."""
    wide = {"k": 16384, "bits": 4, "plan": plans.Plan(1, 1)}
    assert plans.fits(16, 16384, 4, -1, plans.Plan(1, 1)) and not plans.fits(33, 16384, 4, -1, plans.Plan(1, 1))
    put(measured.user_file("NVIDIA H200"), table(plan_row(m=10, **wide), plan_row(m=20, **wide)))
    assert plan(m=16, k=16384) == plan(m=20, k=16384) == plans.Plan(1, 1)
    assert plan(m=21, k=16384) == plans.BY_RULE


def test_each_kernel_has_its_own_validity(monkeypatch):
    """Plans of another release's kernels are left aside and the tiles beside them stay, and the other way round."""
    path = put(measured.user_file("NVIDIA H200"), table(row(), plan_row(), cuda="0.0.9 (interface 1)"))
    with pytest.warns(UserWarning, match="the plans are chosen by rule: nvidia-h200.json was measured with the CUDA"):
        assert plan() == plans.BY_RULE
    assert choose() == OTHER
    assert "CUDA kernels of 0.0.9 (interface 1), these are" in measured.in_use(DEVICE, "cuda")
    put(path, table(row(), plan_row()))
    measured.refresh()
    monkeypatch.setattr(measured, "_triton", lambda: "3.9.0")
    with pytest.warns(UserWarning, match="a table of tiles is left aside"):
        assert choose() == RULE
    assert plan() == PLAN
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    measured.refresh()
    with pytest.warns(UserWarning, match="a table of plans is left aside"):
        assert plan() == plans.BY_RULE


def test_what_other_kernels_plans_are_is_not_asked(monkeypatch):
    """A later release may know more of them: the tiles beside them are none the worse."""
    put(measured.user_file("NVIDIA H200"), table(row(), plan_row(plan=plans.Plan(16, 99)), cuda="9.0.0 (interface 7)"))
    assert choose() == OTHER


def test_a_file_of_tiles_does_not_hide_shipped_plans(h200):
    put(h200 / "shipped" / "nvidia-h200.json", table(plan_row(), row(choice=(OTHER[0], 1))))
    put(measured.user_file("NVIDIA H200"), table(row()))
    assert choose() == OTHER and plan() == PLAN
    assert "(shipped," in measured.in_use(DEVICE, "cuda") and "(yours," in measured.in_use(DEVICE)


def test_a_file_from_before_there_were_plans(h200):
    old = table(row())
    del old["settings"]["cuda_kernels"]
    put(measured.user_file("NVIDIA H200"), old)
    assert choose() == OTHER and plan() == plans.BY_RULE


@pytest.fixture
def both(monkeypatch):
    """A machine where the CUDA core and Triton can be used."""
    real = backends.available
    stand_in = functools.cache(lambda name, device: (True, "") if device == "cuda" else real(name, device))
    monkeypatch.setattr(backends, "available", stand_in)
    monkeypatch.delenv("DQKERNELS_BACKEND", raising=False)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


class FakeRows:
    """As much of a CUDA tensor as the choice of a backend asks for."""

    is_cuda = True

    def __init__(self, *shape):
        self.shape = shape

    def numel(self):
        return self.shape[0] * self.shape[1]

    def get_device(self):
        return 0


def taken(m, backend="auto", **more):
    facts = backends.gemm_facts(FakeRows(m, 1024), 1024, 4, -1)
    choice, quantizer = ops.choose_qlinear("cuda", act_mode="per_token", backend=backend, **{**facts, **more})
    assert quantizer is None
    return choice.backend


def test_the_dispatch_follows_the_measurement(both, monkeypatch):
    tokens = (1, 8, 9, 16, 17, 32, 33, 64, 65)
    assert [taken(m) for m in tokens] == ["cuda"] * 2 + ["triton"] * 7, "the rule, where nothing was measured"
    put(
        measured.user_file("NVIDIA H200"),
        table(plan_row(faster="triton"), plan_row(m=32), plan_row(m=64, bits=2, triton_us=None)),
    )
    measured.refresh()
    backends._choose.cache_clear()
    assert [taken(m) for m in tokens] == ["cuda"] * 2 + ["triton"] * 2 + ["cuda"] * 2 + ["triton"] * 3
    assert taken(64, bits=2) == "triton", "a plan that was not raced with Triton says nothing about it"
    assert taken(64, backend="cuda") == "cuda", "asked for by name"
    where = backends.gemm_facts(FakeRows(40, 1024), 1024, 4, -1)["where"]
    assert where == (0, 64, 1024, 1024) and backends.gemm_facts(FakeRows(8, 1024), 1024, 4, -1)["where"] is None
    assert "measured faster at up to 64 rows" in backends.choose("qgemm", "cuda", bits=4, where=where).reason
    # A comparison with another Triton is none; the plans stay.
    monkeypatch.setattr(measured, "_triton", lambda: "3.9.0")
    backends._choose.cache_clear()
    assert taken(32) == "triton" and plan(m=32) == PLAN


def test_a_layer_says_what_was_measured(both):
    def kernel(*rows):
        if rows:
            put(measured.user_file("NVIDIA H200"), table(*rows))
        measured.refresh()
        backends._choose.cache_clear()
        return layer.kernel()

    packed = nn.QLinear.from_linear(torch.nn.Linear(1024, 1024), DQConfig(weight_bits=4))
    layer = types.SimpleNamespace(
        qweight=types.SimpleNamespace(device=DEVICE, is_cuda=True, get_device=lambda: 0), layer=packed.layer,
        backend="auto", strict=False, out_features=1024, in_features=1024,
    )  # fmt: skip
    layer.kernel = lambda: nn.QLinear.kernel(layer)
    rule = "first choice for this device; cuda: above 8 rows Triton's tile was faster on an H200"
    assert kernel() == f"cuda to 8 rows, triton above ({rule})"
    assert kernel(plan_row(m=32), plan_row(m=64)) == f"cuda to 8 rows, triton to 16, cuda to 64, triton above ({rule})"
    loses = plan_row(m=32, faster="triton")
    assert kernel(loses) == f"cuda to 8 rows, triton above ({rule})"
    assert kernel(loses, plan_row(m=64)) == f"cuda to 8 rows, triton to 32, cuda to 64, triton above ({rule})"
    measured.user_file("NVIDIA H200").unlink()


def test_the_launcher_takes_the_measured_plan(monkeypatch):
    """The look-up is where a kind of call gets its launch plan: once, and not where the caller chose."""
    made = []

    class SkinnyPlan:
        def __init__(self, **facts):
            made.append((facts["warps_n"], facts["splits"]))

    monkeypatch.setattr(native, "require", lambda name: types.SimpleNamespace(SkinnyPlan=SkinnyPlan))
    facts = types.SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: facts)
    put(
        measured.user_file("NVIDIA H200"),
        table(plan_row(m=8, input="float"), plan_row(group_size=64, plan=plans.Plan(4, 1))),
    )
    skinny.refresh()

    def launch(m=4, dtype=torch.float16, group_size=0, sizes=(512, 512), cut=(0, 0)):
        skinny._plan((m, 1024, 1024, dtype, "per_token", 0.0), 0.0, (4, False, group_size, False), torch.float16,
                     torch.float16, "none", torch.float16, sizes, cut, 0, False)  # fmt: skip
        return made[-1]

    assert launch() == PLAN, "N of the parts together, whatever their number"
    assert launch(sizes=(1024,)) == PLAN and launch(m=64, dtype=torch.int8, group_size=64) == (4, 1)
    assert launch(m=64, dtype=torch.int8) == launch(dtype=torch.int8) == (0, 0)
    assert launch(cut=(1, 2)) == (1, 2) and launch(cut=(0, 2)) == (0, 2)
    count = len(made)
    assert launch(cut=(0, 2)) == (0, 2) and len(made) == count, "kept per kind of call"
    skinny.refresh()


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
        assert found.entries or found.plans
        assert path.name == measured.file_name(found.gpu)
