"""The benchmarks' own parts: statistics, records, floors, proofs, sizes. Nothing here is about speed."""

from __future__ import annotations

import copy
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dqkernels import packing
from dqkernels.bench import floors, linear, peers, protocol, record, size

CPU = torch.device("cpu")


def text_of(table, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)
    console.print(table)
    return console.export_text()


def assert_fits(table) -> str:
    """Every line within 80 columns, and no cell cut off by an ellipsis."""
    text = text_of(table)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text, text
    return text


# ---------------------------------------------------------------------------------------- protocol


class FakeClock:
    """A clock that only candidates move."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def candidate(self, log: list[str], name: str, *times: float):
        """A sampler that takes `times` in turn, the last for ever, and reports what it took."""
        left = list(times)

        def sample() -> float:
            took = left.pop(0) if len(left) > 1 else left[0]
            self.now += took
            log.append(name)
            return took

        return sample


def test_percentiles_interpolate_between_neighbours():
    assert [protocol.percentile([10, 20, 30, 40, 50], p) for p in (0, 20, 50, 80, 100)] == [10, 18, 30, 42, 50]
    stats = protocol.Stats.of([4.0, 1.0, 3.0, 2.0])
    assert (stats.median, stats.mean, stats.n) == (2.5, 2.5, 4)
    assert protocol.Stats.of([7.0]) == protocol.Stats(7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="nothing was timed"):
        protocol.Stats.of([])


def test_rows_carry_their_unit():
    row = protocol.Stats.of([1.5e-6, 2.5e-6]).row("us")
    spread = {"p10_us": 1.6, "p20_us": 1.7, "p80_us": 2.3, "p90_us": 2.4}
    assert row == {"median_us": 2.0, **spread, "mean_us": 2.0, "samples": 2}


def test_candidates_take_turns_and_warmup_is_thrown_away():
    clock, log = FakeClock(), []
    found = protocol.interleave(
        {"a": clock.candidate(log, "a", 9.0, 9.0, 1.0), "b": clock.candidate(log, "b", 9.0, 9.0, 2.0)},
        seconds=50,
        max_rounds=3,
        clock=clock,
    )
    assert "".join(log) == "ab" * 5  # two rounds of warm-up, three timed
    assert found.stats["a"] == protocol.Stats(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3)
    assert found.stats["b"].median == 2.0 and found.rounds == 3


def test_time_is_bounded():
    clock, log = FakeClock(), []
    found = protocol.interleave({"a": clock.candidate(log, "a", 1.0)}, seconds=10, clock=clock)
    assert clock.now - 100 == 10 and found.rounds == 8


def test_a_candidate_that_eats_the_budget_is_given_up_by_name():
    clock, log = FakeClock(), []
    found = protocol.interleave(
        {"slow": clock.candidate(log, "s", 40.0), "quick": clock.candidate(log, "q", 0.5)},
        seconds=100,
        max_rounds=2,
        clock=clock,
    )
    assert log.count("s") == 1 and found.stats["quick"].n == 2
    assert found.skipped == {"slow": "one sample takes 40 s of the 1e+02 s for all of them"}


def test_one_round_is_timed_however_late_it_is():
    clock, log = FakeClock(), []
    found = protocol.interleave({"a": clock.candidate(log, "a", 6.0)}, seconds=10, patience=1.0, clock=clock)
    assert log == ["a", "a"] and found.stats["a"].n == 1


def test_cold_rotation_exceeds_three_times_the_cache_within_its_caps(monkeypatch):
    monkeypatch.setattr(protocol, "cache_bytes", lambda device: 10 << 20)
    monkeypatch.setattr(protocol, "MAX_ROTATION_BYTES", {"cpu": 100 << 20})
    assert protocol.copies_for(1 << 20, CPU) == 31
    assert protocol.copies_for(30 << 20, CPU) == 4  # never fewer, whatever the cap
    assert protocol.copies_for(100, CPU) == protocol.MAX_COPIES
    monkeypatch.setattr(protocol, "MAX_ROTATION_BYTES", {"cpu": 20 << 20})
    assert protocol.copies_for(1 << 20, CPU) == 20


def test_a_rotation_goes_on_where_the_last_sample_stopped():
    log: list[int] = []
    calls = [lambda i=i: log.append(i) for i in range(4)]
    one = protocol.sampler(calls, CPU, weight_bytes=7)
    assert one.rotated_bytes == 28 and protocol.sampler(calls[:1], CPU, weight_bytes=7).rotated_bytes == 0
    del log[:]
    one.sample()
    one.sample()
    assert log == [i % 4 for i in range(len(log))] and len(log) > 4


# ------------------------------------------------------------------------------------------ floors

# (device, M, N, K, {bits: printed value}): the table of the design notes, in microseconds as printed there.
FLOORS = [
    (floors.A100_40, 1, 2304, 768, {2: ".29", 4: ".58", 8: "1.2", 16: "2.3"}, "BART-base QKV"),
    (floors.A100_40, 16, 2304, 768, {2: ".35", 4: ".63", 8: "1.2", 16: "2.3"}, "BART-base QKV"),
    (floors.A100_40, 64, 2304, 768, {2: ".51", 4: ".80", 8: "1.4", 16: "2.5"}, "BART-base QKV"),
    (floors.A100_40, 256, 2304, 768, {2: "1.5*", 4: "1.5", 8: "2.0", 16: "3.3"}, "the knee"),
    (floors.A100_40, 1024, 2304, 768, {2: "5.8*", 4: "5.8*", 8: "5.8*", 16: "11.6*"}, "compute"),
    (floors.A100_40, 1, 1024, 1024, {2: ".17", 4: ".34", 8: ".68", 16: "1.35"}, "BART-large"),
    (floors.A100_40, 64, 4096, 4096, {2: "3.4*", 4: "5.9", 8: "11", 16: "22"}, "7B"),
    (floors.H200, 1, 1024, 1024, {2: ".06", 4: ".11", 8: ".22", 16: ".44"}, "BART-large"),
    (floors.H200, 4096, 1024, 1024, {2: "4.3*", 16: "8.7*"}, "compute"),
]


@pytest.mark.parametrize(("device", "m", "n", "k", "printed", "_why"), FLOORS)
def test_floors_are_the_hand_computed_ones(device, m, n, k, printed, _why):
    for bits, text in printed.items():
        floor = floors.gemm_floor(device, m, n, k, bits)
        digits = len(text.strip("*").partition(".")[2])
        # Half of the last printed digit, and a little: 1.147 was printed as 1.15 and then as 1.2.
        assert abs(floor.us - float(text.strip("*"))) <= 0.55 * 10**-digits, (bits, floor)
        assert floor.bound == ("compute" if "*" in text else "memory"), (bits, floor)


def test_floor_of_one_gemm_by_hand():
    # 2304 x 768 codes of 2 bits, 768 bytes of input, 2304 halves out, 2304 + 1 fp32 scales, at 1555 GB/s.
    assert floors.gemm_bytes(1, 2304, 768, 2) == 442_368 + 768 + 4_608 + 9_220
    assert floors.gemm_floor(floors.A100_40, 1, 2304, 768, 2).us == pytest.approx(456_964 / 1.555e6)


def test_unknown_devices_have_no_floor():
    assert floors.device_of("NVIDIA A100-SXM4-40GB") is floors.A100_40
    assert floors.device_of("NVIDIA A100-SXM4-80GB").gb_per_s == 2039
    assert floors.device_of("NVIDIA H100 80GB HBM3").int8_tops == 1979
    assert floors.device_of("NVIDIA H200") is floors.H200
    for name in (None, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L4", "NVIDIA H200 NVL", "A100"):
        assert floors.device_of(name) is None
    assert floors.gemm_floor(None, 1, 64, 64, 2) is None


# ---------------------------------------------------------------------------------------- records


def a_record(**changes) -> dict:
    made = record.new(
        "linear", settings={"bits": [2, 4]}, protocol={"budget_s": 1.5}, rows=[{"median_us": 2.5, "note": None}]
    )
    return {**made, **changes}


def test_records_round_trip_and_replace_atomically(tmp_path):
    path = tmp_path / "results" / "one.json"
    first = a_record()
    record.write(first, path)
    assert record.read(path) == first
    with pytest.raises(record.RecordError):
        record.write(a_record(rows=[{"median": 2.5}]), path)
    assert record.read(path) == first and [p.name for p in path.parent.iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "schema_version is 2, this dqkernels reads schema_version 1"),
        ({"schema_version": "1"}, "schema_version is '1', this dqkernels reads schema_version 1"),
        ({"schema_version": True}, "schema_version is True"),
        ({"rows": [{"median": 2.5}]}, "a key that holds a fraction ends in its unit"),
        ({"rows": [{"median_us": "2.5"}]}, "'2.5' is not of type"),
        ({"rows": [{"median_us": float("nan")}]}, "not measured is null"),
        ({"rows": [{"Median_us": 1}]}, "Median_us"),
        ({"rows": {}}, "is not of type"),
        ({"kind": "poem"}, "poem"),
        ({"settings": {"model": "/home/somebody/bart"}}, "holds a path of this machine"),
        ({"settings": {"list": ["see /tmp/x/y.json"]}}, "holds a path of this machine"),
        ({"settings": {"model": "C:\\Users\\somebody\\bart"}}, "holds a path of this machine"),
        ({"hostname": "box"}, "hostname"),
    ],
)
@pytest.mark.parametrize("library", [True, False])
def test_what_is_refused(change, words, library, monkeypatch, tmp_path):
    if not library:  # machines without jsonschema check with a subset of it, which must refuse the same
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(record.RecordError) as caught:
        record.check(a_record() | change)
    assert words in str(caught.value)
    if "not measured" not in words:
        (tmp_path / "r.json").write_text(json.dumps(a_record() | change))
        with pytest.raises(record.RecordError):
            record.read(tmp_path / "r.json")


def test_environment_is_checked_and_complete():
    made = a_record()
    for key in made["environment"]:
        lacking = copy.deepcopy(made)
        del lacking["environment"][key]
        with pytest.raises(record.RecordError, match=key):
            record.check(lacking)
    assert made["environment"]["torch"] == torch.__version__
    assert made["environment"]["threads"] == torch.get_num_threads()
    with pytest.raises(record.RecordError):
        record.check(made | {"environment": {**made["environment"], "host": "x"}})


def test_text_that_is_no_record(tmp_path):
    for text in ("", "[1]", '{"schema_version": 1, "x": NaN}', "{}"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(record.RecordError):
            record.read(tmp_path / "r.json")


def test_scrub_takes_folders_and_leaves_units():
    found = record.scrub("nvcc at /usr/local/cuda/bin/nvcc moved 4.3 GB/s, 3/4 of it; see tests/test_bench.py")
    assert found == "nvcc at nvcc moved 4.3 GB/s, 3/4 of it; see tests/test_bench.py"


def test_record_module_needs_nothing_of_the_package():
    # The GPU lane loads it by path before anything else is known to work.
    spec = importlib.util.spec_from_file_location("alone", record.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    names = {
        line.split()[1].partition(".")[0]
        for line in Path(record.__file__).read_text().splitlines()
        if line[:7] == "import "
    }
    assert names <= set(sys.stdlib_module_names) and alone.SCHEMA_VERSION == record.SCHEMA_VERSION


# ------------------------------------------------------------------------------------- proofs, linear


@pytest.fixture(scope="module")
def layer() -> linear.Layer:
    return linear.Layer(48, 130, torch.float32, CPU, (8, 4, 2), ["eager"])


@pytest.fixture
def few_copies(monkeypatch):
    """Cold rows without hundreds of megabytes: nothing is measured here."""
    monkeypatch.setattr(protocol, "MAX_COPIES", 4)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Rounds end the timing, never the clock: these tests pass on a machine that crawls."""
    monkeypatch.setattr(linear, "_MAX_ROUNDS", 2)


def an_input(tokens: int = 5) -> torch.Tensor:
    return torch.randn(tokens, 130, generator=torch.Generator().manual_seed(3))


def test_every_candidate_proves_itself(layer):
    x = an_input()
    for one in layer.found:
        assert one.prove(x, one.module(x)) is None, one.name
    names = [one.name for one in layer.found]
    assert names[:4] == ["torch fp32", "dqkernels W8 eager", "dqkernels W4 eager", "dqkernels W2 eager"]
    there = {name for peer in peers.of("linear") for name in peer.linear} & {*names, *layer.absent}
    for peer in peers.PEERS.values():
        # Timed, or absent with the reason: as a whole, or one way of it.
        assert {peer.name, peer.label} & set(layer.absent) or not peer.has("linear") or there & set(peer.linear)


def test_a_candidate_that_computes_something_else_is_refused(layer):
    x = an_input()
    by_name = {one.name: one for one in layer.found}
    ours, peer, int8 = by_name["dqkernels W4 eager"], by_name["torch fp32"], by_name["torch _int_mm"]

    def last_bit(y):
        y = y.clone()
        y[2, 7] = torch.nextafter(y[2, 7], torch.tensor(9e9))
        return y

    def one_column(y):
        y = y.clone()
        y[:, 11] = y[:, 12]
        return y

    assert ours.prove(x, last_bit(ours.module(x))) == "1 of 240 values differ from the reference"
    assert "float16" in ours.prove(x, ours.module(x).half())
    for one in (peer, int8):
        assert "relative error" in one.prove(x, one.module(x) * 1.05)
        assert "relative error" in one.prove(x, one_column(one.module(x)))
        assert "relative error" in one.prove(x, one.module(x) * float("nan"))
        assert "shape" in one.prove(x, one.module(x)[:, 1:])
    # The float layer with another weight is not the same layer either.
    assert "relative error" in peer.prove(x, ours.module(x))


def test_refused_candidates_are_listed_and_never_timed(layer, few_copies):
    broken = copy.copy(layer)
    broken.found = [copy.copy(one) for one in layer.found]
    broken.found[2].module = lambda x: layer.found[1].module(x)
    broken.found[3].module = lambda x: 1 / 0
    rows = linear.measure(5, broken, 1000, floors.A100_40)
    by_name = {row["candidate"]: row for row in rows if row["cache"] == "cold"}
    assert len(rows) == 2 * len(broken.found)
    wrong, raising = by_name["dqkernels W4 eager"], by_name["dqkernels W2 eager"]
    assert wrong["status"] == "refused" and "differ from the reference" in wrong["reason"]
    assert raising["status"] == "refused" and raising["reason"].startswith("ZeroDivisionError")
    assert "median_us" not in wrong and "median_us" not in raising
    assert by_name["torch fp32"]["status"] == "timed" and by_name["torch fp32"]["samples"] == 2


def test_linear_record_and_table(tmp_path, few_copies):
    path = tmp_path / "linear.json"
    made = linear.run(
        [(1, 32, 128), (3, 32, 128)], bits=(4,), dtype="float32", device="cpu", seconds=1000, out=path, probe=False
    )
    assert record.read(path) == made
    timed = [row for row in made["rows"] if row["status"] == "timed"]
    assert {(row["tokens"], row["cache"]) for row in timed} == {(m, c) for m in (1, 3) for c in ("cold", "warm")}
    assert all(row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in timed)
    assert all(row["floor_us"] is None for row in timed)
    assert {row["status"] for row in made["rows"]} <= {"timed", "not compared"}
    text = assert_fits(linear.render(made))
    assert "1x32x128 fp32" in text and "not compared: gemlite" in text and "not known" in text


def test_wide_figures_still_fit_the_table(few_copies):
    made = linear.run([(1, 16, 128)], bits=(2,), dtype="float32", device="cpu", seconds=1000, probe=False)
    for row in made["rows"]:
        if "cache" in row:
            row.update(tokens=4096, out_features=11008, in_features=4096, median_us=987654.3, speedup_ratio=12.34)
            row.update(floor_fraction=0.99, status="timed")
            row["candidate"] = row["candidate"].replace("eager", "triton")
    assert_fits(linear.render(made))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": [(1, 2)]}, "triples"),
        ({"shapes": [(0, 2, 3)]}, "above 0"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"backends": ["cublas"]}, "cublas"),
    ],
)
def test_linear_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        linear.run(device="cpu", probe=False, **arguments)


def test_groups_beyond_the_time_are_named(few_copies):
    made = linear.run([(1, 16, 128)], bits=(), dtype="float32", device="cpu", seconds=-1.0, probe=False)
    row = made["rows"][0]
    assert row["status"] == "not reached" and row["tokens"] == 1
    assert "not reached: 1x16x128 fp32" in text_of(linear.render(made))


# -------------------------------------------------------------------------------------------- size

BASE, LARGE, MBART = (size.SHAPES[name] for name in ("bart-base", "bart-large", "mbart-large"))

# Shape, then embedding, linear weights, biases, LayerNorm, positions, total, fp32 MiB as printed.
COUNTS = [
    (BASE, 38_603_520, 99_090_432, 101_376, 49_152, 1_575_936, 139_420_416, "531.85"),
    (LARGE, 51_471_360, 352_321_536, 270_336, 126_976, 2_101_248, 406_291_456, "1549.9"),
    (MBART, 256_027_648, 352_321_536, 270_336, 131_072, 2_101_248, 610_851_840, "2330.2"),
]


@pytest.mark.parametrize(("shape", "embedding", "weights", "bias", "norm", "positions", "total", "mib"), COUNTS)
def test_parameter_counts(shape, embedding, weights, bias, norm, positions, total, mib):
    c = size.counts(shape)
    assert (c.embedding, c.linear, c.bias, c.layernorm, c.positions) == (embedding, weights, bias, norm, positions)
    assert c.total == total
    assert f"{4 * total / size.MIB:.{len(mib.partition('.')[2])}f}" == mib


def test_float_bytes_include_the_logits_bias():
    assert f"{size.float_bytes(BASE) / size.MIB:.2f}" == "532.04"


# Encoder, decoder, weight bits, embedding bits, the paper's ratio and MiB.
PAPER = [
    (BASE, 6, 6, 8, 8, 3.86, 137.6),
    (BASE, 6, 6, 4, 4, 7.40, 71.9),
    (BASE, 6, 6, 2, 2, 13.62, 39.1),
    (BASE, 6, 6, 2, 4, 11.02, 48.3),
    (BASE, 6, 6, 2, 8, 7.98, 66.7),
    (BASE, 6, 3, 8, 8, 4.81, 110.5),
    (BASE, 6, 3, 4, 4, 9.12, 58.3),
    (BASE, 6, 3, 2, 2, 16.50, 32.2),
    (BASE, 6, 1, 2, 2, 19.20, 27.7),
    (BASE, 3, 3, 2, 2, 19.60, 27.1),
    (BASE, 3, 1, 8, 8, 7.37, 72.2),
    (BASE, 3, 1, 2, 2, 23.53, 22.6),
    (BASE, 1, 1, 2, 2, 27.70, 19.2),
    (BASE, 1, 1, 8, 8, 9.07, 58.6),
    (MBART, 12, 12, 8, 8, 3.96, 588.9),
    (MBART, 12, 12, 4, 4, 7.80, 298.7),
    (MBART, 12, 12, 2, 2, 15.17, 153.6),
    (MBART, 12, 12, 2, 4, 10.86, 214.7),
    (MBART, 12, 12, 2, 8, 6.92, 336.7),
    (MBART, 12, 6, 2, 2, 18.00, 129.5),
    (MBART, 12, 3, 2, 2, 19.85, 117.4),
    (MBART, 6, 6, 2, 2, 20.93, 111.4),
]


@pytest.mark.parametrize(("shape", "encoder", "decoder", "weight_bits", "embedding_bits", "ratio", "mib"), PAPER)
def test_the_papers_ratios(shape, encoder, decoder, weight_bits, embedding_bits, ratio, mib):
    student = shape.with_layers(encoder, decoder)
    assert round(size.paper_ratio(shape, student, weight_bits, embedding_bits), 2) == ratio
    assert round(size.paper_bytes(student, weight_bits, embedding_bits) / size.MIB, 1) == mib


def test_distilled_only_ratios():
    for layers, ratio in (((6, 3), 1.26), ((6, 1), 1.51), ((3, 1), 1.97), ((1, 1), 2.46)):
        assert round(size.counts(BASE).total / size.counts(BASE.with_layers(*layers)).total, 2) == ratio


def test_computed_ratios_reach_the_goals():
    for layers, bits, goal in (((6, 6), 8, 3.8), ((6, 6), 4, 7.2), ((6, 6), 2, 13.2), ((6, 3), 2, 16.2)):
        packed = size.packed_bytes(BASE.with_layers(*layers), bits, bits)
        assert size.float_bytes(BASE) / packed >= goal


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_random_models_have_the_counted_parameters(family):
    shape = size.Shape("x", family, 48, 80, 250, 34, 4, 2, 1)
    float_model = size.random_model(shape)
    assert sum(p.numel() for p in float_model.parameters()) == size.counts(shape).total
    assert size.weights_bytes(float_model) == size.float_bytes(shape)
    assert float_model.lm_head.weight is float_model.get_input_embeddings().weight
    tensors = [p for name, p in float_model.named_parameters() if "norm" not in name]
    assert all(float(p.detach().std()) > 0.01 for p in tensors)


@pytest.mark.parametrize(("weight_bits", "embedding_bits"), [(8, 8), (4, 4), (2, 2), (2, 8), (8, 2)])
def test_written_files_have_the_computed_bytes(weight_bits, embedding_bits, monkeypatch):
    # Odd widths, so that padding is in the figure: 250 rows of 48 columns take 256 of 128.
    shape = size.Shape("x", "bart", 48, 80, 250, 34, 4, 2, 2)
    monkeypatch.setitem(size.SHAPES, "x", shape)
    found = size.measure(size.Case("x", 2, 1, weight_bits, embedding_bits, goal=1e9))
    assert (
        found["memory_bytes"]
        == found["computed_bytes"]
        == size.packed_bytes(shape.with_layers(2, 1), weight_bits, embedding_bits)
    )
    header = found["file_bytes"] - found["computed_bytes"]
    assert 0 < header < 150 * 110  # a hundred tensors, about 110 bytes of JSON each
    assert found["status"] == "missed"


def test_padding_is_counted():
    assert packing.packed_shape(250, 48, 2) == (256, 32)


def test_size_record_and_table(tmp_path):
    cases = [size.Case("tiny", 2, 2, 8, 8, 2.0), size.Case("tiny", 1, 1, 2, 2, 1000.0), size.Case("tiny", 1, 1, 32, 32)]
    made = size.run(cases, teachers=["tiny"], out=tmp_path / "size.json")
    assert record.read(tmp_path / "size.json") == made
    teacher, reached, missed, distilled = made["rows"]
    small = size.SHAPES["tiny"].with_layers(1, 1)
    assert distilled["memory_bytes"] == distilled["computed_bytes"] == size.float_bytes(small)
    assert 0 < distilled["file_bytes"] - size.float_bytes(small) < 20_000
    assert distilled["paper_ratio"] == round(size.counts(size.SHAPES["tiny"]).total / size.counts(small).total, 5)
    assert distilled["status"] == "no goal"
    assert 0 < teacher["file_bytes"] - teacher["teacher_bytes"] < 20_000
    assert (reached["status"], missed["status"]) == ("reached", "missed")
    assert [line.partition(":")[0] for line in size.missed(made)] == ["tiny 1-1 2-2"]
    text = assert_fits(size.render(made))
    assert "NO" in text and text.count("fp32") >= 3, "title, teacher, distilled student"


def test_all_rows_of_the_papers_tables_are_written():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_size.py"
    if not path.is_file():
        pytest.skip("the benchmarks are not beside the tests")
    script = runpy.run_path(str(path), run_name="bench_size")
    found = {
        (c.teacher, c.encoder, c.decoder, c.weight_bits, c.embedding_bits) for c in script["CASES"] + script["MBART"]
    }
    assert {(shape.name, *row) for shape, *row, _, _ in PAPER} <= found
    assert {("bart-base", *layers, 32, 32) for layers in ((6, 3), (6, 1), (3, 1), (1, 1))} <= found
    depths = ((12, 12), (12, 6), (12, 3), (6, 6))
    assert {("mbart-large", *d, w, e) for d in depths for w, e in ((8, 8), (4, 4), (2, 2), (2, 4), (2, 8))} <= found
    for *row, ratio in MBART_DEPTHS:
        encoder, decoder, weight_bits, embedding_bits = row
        student = MBART.with_layers(encoder, decoder)
        assert round(size.paper_ratio(MBART, student, weight_bits, embedding_bits), 2) == ratio


#: mBART at smaller depths: layers, bits, the paper's ratio.
MBART_DEPTHS = [
    (12, 6, 8, 8, 4.73), (12, 6, 4, 4, 9.30), (12, 6, 2, 4, 12.23), (12, 6, 2, 8, 7.45),
    (12, 3, 8, 8, 5.24), (12, 3, 4, 4, 10.29), (12, 3, 2, 4, 13.06), (12, 3, 2, 8, 7.75),
    (6, 6, 8, 8, 5.54), (6, 6, 4, 4, 10.87), (6, 6, 2, 4, 13.52), (6, 6, 2, 8, 7.91),
]  # fmt: skip


def test_size_table_fits_with_the_largest_model():
    rows = [
        size.row(MBART, MBART, size.Case("mbart-large", 12, 12, 8, 8, 3.8), 620_000_000, 620_000_000),
        size.row(MBART, MBART, size.Case("mbart-large", 12, 12, 2, 2), None, None),
    ]
    assert rows[1]["status"] == "not written" and rows[1]["file_ratio"] is None
    assert_fits(size.render({"rows": rows}))
