"""`dqkernels plot`: what pictures hold, how they are drawn, the page about records, and records that are hostile."""

from __future__ import annotations

import copy
import importlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dqkernels.bench import picture_draw, picture_layers, plot, plot_page, record
from dqkernels.bench.picture import Panel, Picture, Series, family_of
from dqkernels.cli import main

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
if not RESULTS.is_dir():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)
COMMITTED = sorted(path.name for path in RESULTS.glob("*.json"))


def data_of(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def written(folder: Path, data, name: str = "made.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def pictures_of(folder: Path, data) -> dict[str, Picture]:
    return {one.name: one for one in plot.pictures(plot.load(written(folder, data)))}


# -------------------------------------------------------------------------------------------- what pictures hold


@pytest.mark.parametrize("name", COMMITTED)
def test_every_committed_record_has_pictures_or_says_why_not(name):
    loaded = plot.load(RESULTS / name)
    assert loaded.footer.startswith(f"{name}: ") and loaded.machine in loaded.footer
    if loaded.kind in plot.KINDS:
        found = plot.need_pictures(loaded)
        assert len({one.name for one in found}) == len(found) > 0
        for one in found:
            assert one.title and one.alt and one.caption and re.fullmatch("[0-9a-f]{64}", one.digest())
            for panel in one.panels:
                assert panel.kind == "heat" or panel.series
    else:
        with pytest.raises(
            plot.PlotError, match=f"{name} is of kind {loaded.kind!r}, which has no picture; .*generate"
        ):
            plot.need_pictures(loaded)


def test_bars_of_a_generate_record_are_its_rows():
    (picture,) = [one for one in plot.pictures(plot.load(RESULTS / "generate-zen4.json")) if one.name == "latency"]
    rows = [row for row in data_of("generate-zen4.json")["rows"] if row["status"] == "timed"]
    greedy, beams = ([row for row in rows if row["num_beams"] == count] for count in (1, 4))
    for panel, lines in zip(picture.panels, (greedy, beams), strict=True):
        assert [one.points[0][1] for one in panel.series] == [row["latency_ms_per_token"] for row in lines]
        assert all(one.measured for one in panel.series)
    first = picture.panels[0].series
    assert [(one.low[0], one.high[0]) for one in first] == [
        (r["p20_ms_per_token"], r["p80_ms_per_token"]) for r in greedy
    ]
    assert first[1].label == "ours 4-4-8" and f"({greedy[1]['speedup_ratio']:.3g}x)" in first[1].notes[0]
    spread = [(r["p20_ms_per_token"], r["p80_ms_per_token"]) for r in beams if r["samples"] > 1]
    seen = [(one.low[0], one.high[0]) for one in picture.panels[1].series if one.low]
    assert seen == spread, "one sample has no spread"
    for panel, row in zip(picture.panels, (greedy[1], beams[1]), strict=True):
        assert f"n = {row['samples']}" in panel.title


def test_lines_along_the_batch(tmp_path):
    made = data_of("generate-zen4.json")
    rows = [row for row in made["rows"] if row["num_beams"] == 1]
    made["rows"] = [
        {
            **{key: value for key, value in row.items() if key[:2] not in ("p2", "p8")},
            "batch_size": batch,
            "latency_ms_per_token": row["latency_ms_per_token"] * (1 + batch / 100),
        }
        for batch in (4, 1, 16)
        for row in rows
    ]
    found = pictures_of(tmp_path, made)
    assert list(found) == ["speed", "latency", "memory"]
    times, speeds = found["speed"].panels
    assert times.x_label == "batch (texts at once)" and [text for _, text in times.x_ticks] == ["1", "4", "16"]
    ours = next(one for one in times.series if one.label == "ours 2-2-8")
    (wanted,) = [row["latency_ms_per_token"] for row in rows if row["candidate"] == "dqkernels 2-2-8"]
    assert [x for x, _ in ours.points] == [1, 4, 16] and ours.points[0][1] == pytest.approx(wanted * 1.01)
    assert speeds.y_label == "tokens per second" and "layers 6-6" in found["speed"].title
    assert "batch" not in found["speed"].title


def test_floors_are_computed_and_times_are_measured():
    found = {one.name: one for one in plot.pictures(plot.load(RESULTS / "gemm-h200.json"))}
    rows = data_of("gemm-h200.json")["rows"]
    panel = next(one for one in found["latency"].panels if one.title == "N x K: 8,192 x 8,192")
    floors = [one for one in panel.series if not one.measured]
    assert [one.label for one in floors].count("floor (computed)") == 1
    kept = {(r["candidate"], r["tokens"]): r for r in rows if r.get("cache") == "cold" and r["out_features"] == 8192}
    for one in panel.series:
        if one.measured:
            name = one.label.replace("ours", "dqkernels")
            assert [kept[name, x]["median_us"] for x, _ in one.points] == [y for _, y in one.points]
        else:
            assert {y for _, y in one.points} <= {row["floor_us"] for row in kept.values() if "floor_us" in row}
    heat = found["floor"].panels[0]
    value = heat.cells[heat.rows.index("ours W4 triton")][heat.columns.index("1x8192x8192")]
    assert value == kept["dqkernels W4 triton", 1]["floor_fraction"]
    missing = heat.cells[heat.rows.index("torch _int_mm")][heat.columns.index("1x8192x8192")]
    assert missing is None, "not supported there: no figure, and no 0"
    assert any("ours W8 cuda overlapped" in line for line in found["latency"].caption), "what is left out is named"


@pytest.mark.parametrize(
    "name", ["linear-example.json", "gemm-h200.json", "generate-zen4.json", "train-step-h200.json"]
)
def test_projected_rows_are_never_in_a_series_with_measured_ones(name, tmp_path):
    made = data_of(name)
    for index, row in enumerate(made["rows"]):
        if row["status"] == "timed" and index % 2:
            row["status"] = "projected"
    seen = set()
    for picture in pictures_of(tmp_path, made).values():
        for panel in picture.panels:
            for one in panel.series:
                seen.add(one.measured)
                if (
                    not one.measured
                    and one.label
                    and panel.kind == "bars"
                    and one.lines
                    and "training" not in made["kind"]
                ):
                    assert "(projected)" in one.label
    assert seen == {True, False}
    if name == "gemm-h200.json":
        made["rows"] = [{**row, "status": "projected"} if row["status"] == "timed" else row for row in made["rows"]]
        assert "floor" not in pictures_of(tmp_path, made), "a share of the floor is measured or absent"


def test_scores_of_the_docstring_experiment_are_means_over_seeds(tmp_path):
    made = data_of("dq_docstrings.json")
    base = next(run for run in made["runs"] if run["row"] == "dq-2")
    made["runs"] = [run for run in made["runs"] if run["row"] != "dq-2" or run is base]
    made["runs"].append({**base, "seed": 1, "rougeL": base["rougeL"] + 2})
    (panel,) = pictures_of(tmp_path, made)["score"].panels
    ours = next(one for one in panel.series if one.label == "DQ, our recipe")
    (index,) = [i for i, (x, y) in enumerate(ours.points) if y == pytest.approx(base["rougeL"] + 1)]
    assert ours.high[index] - ours.points[index][1] == pytest.approx(2**0.5), "the deviation of two seeds"
    teacher = next(run for run in made["runs"] if run["row"] == "teacher")
    assert ours.points[index][0] == pytest.approx(2 * teacher["bytes"] / base["bytes"])
    assert not any(run["row"] in str(panel) for run in made["runs"] if " lr " in run["row"])


def test_scores_of_the_demo_stand_over_its_ratios():
    (score, memory) = plot.pictures(plot.load(RESULTS / "demo.json"))
    rows = {row["name"]: row for row in data_of("demo.json")["rows"]}
    drawn = {one.notes[0].split()[0]: one.points[0] for one in score.panels[0].series}
    assert drawn == {name: (row["ratio"], row["rougeL"]) for name, row in rows.items() if name != "lead"}
    assert score.panels[0].levels == (("first 12 words: 17.2", rows["lead"]["rougeL"]),)
    assert [one.points[0][1] for one in memory.panels[0].series] == [
        r["file_mb"] for r in rows.values() if r["file_mb"]
    ]


def test_kernels_are_a_table_of_shares(tmp_path):
    made = data_of("linear-example.json")
    base = {
        "status": "timed",
        "cache": "cold",
        "op": "gelu_quantize",
        "shape": [64, 768],
        "variant": "",
        "dtype": "fp32",
    }
    made["kind"] = "kernels"
    made["rows"] = [
        {**base, "candidate": "torch gelu", "floor_us": 1.0, "floor_fraction": 0.5, "copy_fraction": 0.4},
        {**base, "candidate": "dqkernels cpu", "floor_us": 1.0, "floor_fraction": 0.25},
        {**base, "candidate": "dqkernels cpu", "cache": "warm", "floor_us": 1.0, "floor_fraction": 9.0},
        {**base, "op": "qembedding", "candidate": "dqkernels eager", "floor_us": 1.0, "floor_fraction": 1.5},
    ]
    (picture,) = pictures_of(tmp_path, made).values()
    (heat,) = picture.panels
    assert heat.columns == ("torch's own", "ours cpu", "ours eager") and len(heat.rows) == 2
    assert heat.cells == ((0.5, 0.25, None), (None, None, 1.5))
    assert any("Above 100%" in line for line in picture.caption)
    assert picture_draw.draw(picture).startswith(b"\x89PNG")


def test_what_a_record_says_against_itself_is_in_the_picture():
    (picture,) = plot.pictures(plot.load(RESULTS / "decode-h200.json"))
    assert any("a first trial" in line for line in picture.caption)
    name = "generate-batches-zen4.json"
    load = data_of(name)["protocol"]["before"]["load_fraction"]
    assert f"busy before the run (load {load:.2f}" in plot.load(RESULTS / name).footer


@pytest.mark.parametrize(
    ("name", "bits", "family"),
    [
        ("dqkernels W4 cuda", 4, "ours 4"), ("dqkernels 2-2-8", 2, "ours 2"), ("torch fp16", 16, "float"),
        ("torch _int_mm", 8, "torch int8"), ("torch dynamic int8", 8, "torch int8"), ("dqkernels", None, "ours"),
        ("bitsandbytes nf4", 4, "bitsandbytes"), ("ctranslate2 int8", 8, "ctranslate2"),
    ],
)  # fmt: skip
def test_families(name, bits, family):
    assert family_of(name, bits) == family


# -------------------------------------------------------------------------------------------- hostile records


def changed(name: str, change) -> dict:
    made = data_of(name)
    change(made)
    return made


def set_row(index: int, key: str, value):
    def change(made: dict) -> None:
        rows = made.get("rows", made.get("runs"))
        if value is KeyError:
            del rows[index][key]
        else:
            rows[index][key] = value

    return change


ZEN, LINEAR, TIME = "generate-zen4.json", "linear-example.json", "latency_ms_per_token"
HOSTILE = {
    "another version": (ZEN, lambda made: made.update(schema_version=2), "schema_version"),
    "a version that is a bool": ("demo.json", lambda made: made.update(schema_version=True), "schema_version"),
    "an unknown kind": ("size.json", lambda made: made.update(kind="poem"), "kind"),
    "no environment": ("size.json", lambda made: made.pop("environment"), "environment"),
    "no environment of the demo": ("demo.json", lambda made: made.pop("environment"), "environment"),
    "no rows": ("size.json", lambda made: made.pop("rows"), "rows"),
    "rows that are no list": ("demo.json", lambda made: made.update(rows={"a": 1}), "rows must be a list"),
    "a row that is a text": ("demo.json", lambda made: made["rows"].append("x"), r"rows\[6\] must be an object"),
    "a missing time": (ZEN, set_row(1, TIME, KeyError), rf"rows\[1\] has no '{TIME}'"),
    "a negative time": (ZEN, set_row(1, TIME, -1.0), rf"rows\[1\]\.{TIME} must be a finite number above 0, got -1\.0"),
    "a time beyond all bounds": (ZEN, set_row(0, TIME, 1e300), rf"rows\[0\]\.{TIME}"),
    "an integer beyond all bounds": (ZEN, set_row(0, "weights_bytes", 10**400), r"rows\[0\]\.weights_bytes"),
    "a text for a number": (LINEAR, set_row(0, "tokens", "many"), r"rows\[0\]\.tokens must be .* above 0, got 'many'"),
    "a number for a text": (LINEAR, set_row(2, "candidate", 7), r"rows\[2\]\.candidate must be a string, got 7"),
    "no candidate": ("gemm-h200.json", set_row(0, "candidate", KeyError), r"rows\[0\] has no 'candidate'"),
    "a cell's axis that is a list": (ZEN, set_row(0, "batch_size", [1]), r"rows\[0\]\.batch_size"),
    "a bool for a number": ("train-step-h200.json", set_row(0, "median_ms", True), "median_ms"),
    "whiskers that do not stand around the median": (
        ZEN,
        set_row(0, "p80_ms_per_token", 1.0),
        r"rows\[0\]: .* must rise",
    ),
    "an error below 0": (
        "demo.json",
        set_row(2, "rougeL_gap_error", -0.5),
        "must be a finite number not below 0, got -0.5",
    ),
    "no score": ("quantizers.json", set_row(3, "rougel_score", KeyError), r"rows\[3\] has no 'rougel_score'"),
    "no ratio in the demo": ("demo.json", set_row(2, "ratio", KeyError), r"rows\[2\] has no 'ratio'"),
    "no teacher": ("dq_docstrings.json", lambda made: made.update(runs=made["runs"][1:]), "no row 'teacher'"),
    "no bytes": ("dq_docstrings.json", set_row(1, "bytes", KeyError), r"runs\[1\] has no 'bytes'"),
    "bytes of a file that are 0": ("size.json", set_row(2, "file_bytes", 0), r"rows\[2\]\.file_bytes"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_a_record_that_lacks_something_is_named_with_the_place(case, tmp_path):
    name, change, message = HOSTILE[case]
    path = written(tmp_path, changed(name, change), "bad.json")
    with pytest.raises(plot.PlotError, match=message) as caught:
        plot.run([path], tmp_path / "out", html=tmp_path / "page.html")
    assert str(caught.value).startswith("bad.json"), "the file is named first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json"], "nothing is written"


def leaves(value, path=()):
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


@pytest.mark.parametrize("name", [name for name in COMMITTED if "demo" not in name and "lane" not in name])
def test_any_leaf_may_be_anything(name, tmp_path):
    """A picture, or a PlotError; nothing else is raised, whatever stands where."""
    made, refused = data_of(name), 0
    paths = list(leaves(made.get("rows", made.get("runs"))))
    values = [None, -1, 0, 1e-300, 1e17, True, "x" * 90, [1], {"a": 1}, ""]
    for index, path in enumerate(paths[:: max(1, len(paths) // 40)]):
        bad = copy.deepcopy(made)
        place = bad.get("rows", bad.get("runs"))
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = values[index % len(values)]
        try:
            plot.pictures(plot.load(written(tmp_path, bad)))
        except plot.PlotError as error:
            refused += 1
            assert str(error).startswith("made.json: ")
    assert refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a record"), ("[1]", "a record is a JSON object, got list"), ("{}", "schema_version is None"),
        ('{"schema_version": 1}', "has no 'kind'"), ('{"schema_version": NaN}', "NaN is no figure"),
        ('{"schema_version": 1, "kind": "size", "rows": [Infinity]}', "Infinity is no figure"),
        ("[" * 100_000, "is not a record"), ('{"a": 1', "is not a record"), ("\udcff", "is not a record"),
    ],
)  # fmt: skip
def test_text_that_is_no_record(text, message, tmp_path):
    (tmp_path / "bad.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(plot.PlotError, match=f"^bad.json.*{message}"):
        plot.load(tmp_path / "bad.json")


def test_places_that_are_no_record(tmp_path, monkeypatch):
    with pytest.raises(plot.PlotError, match="it is not there"):
        plot.load(tmp_path / "nothing.json")
    with pytest.raises(plot.PlotError, match="it is a folder"):
        plot.load(tmp_path)
    with pytest.raises(plot.PlotError, match="output_dir must be a folder"):
        plot.run([RESULTS / "size.json"], written(tmp_path, "{}", "file"))
    monkeypatch.setattr(plot, "_LARGEST_BYTES", 10)
    with pytest.raises(plot.PlotError, match="larger than"):
        plot.load(RESULTS / "size.json")


def test_a_record_without_figures_says_so(tmp_path):
    made = data_of("generate-zen4.json")
    made["rows"] = [{**row, "status": "not run", "reason": "60 s were over"} for row in made["rows"]]
    with pytest.raises(plot.PlotError, match=r"made\.json holds no row with a figure"):
        plot.run([written(tmp_path, made)], tmp_path)


# -------------------------------------------------------------------------------------------- drawing


EVIL = "$\\frac{1}{0}$ <script>alert(1)</script> \u202e\x07 " + "w" * 400


def evil_picture() -> Picture:
    bars = Panel("bars", EVIL, EVIL, EVIL, (Series(EVIL, "who knows", ((EVIL, 2.0),), (1.0,), (3.0,), (EVIL,)),))
    series = (
        Series(EVIL, "ours 4", ((1, 2.0), (4, 3.0)), notes=(EVIL, "")),
        Series("b", "x", ((1, 9.0),), measured=False),
    )
    lines = Panel("lines", EVIL, EVIL, EVIL, series, ((1, EVIL),), x_log=True, y_log=True, levels=((EVIL, 2.0),))
    heat = Panel("heat", EVIL, EVIL, EVIL, rows=(EVIL, "b"), columns=("c", EVIL), cells=((0.0, None), (5.0, 1e9)))
    return Picture("evil", EVIL, (bars, lines, heat), 2, (EVIL,), EVIL)


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # labels of 60 w's leave axes no room
@pytest.mark.parametrize("kind", plot.FORMATS)
def test_any_text_is_drawn_as_text(kind):
    picture = evil_picture()
    data = picture_draw.draw(picture, "dark", kind, EVIL)
    assert data.startswith(b"\x89PNG" if kind == "png" else b"<?xml") and (kind == "png" or b"<script" not in data)
    with pytest.raises(KeyError):
        picture_draw.draw(picture, "sepia")


def test_a_drawn_file_is_the_same_every_time_and_carries_its_stamp(tmp_path):
    picture = plot.pictures(plot.load(RESULTS / "train-step-h200.json"))[0]
    for kind in plot.FORMATS:
        for style in plot.STYLES:
            data = picture_draw.draw(picture, style, kind)
            assert data == picture_draw.draw(picture, style, kind)
            (tmp_path / "file").write_bytes(data)
            assert plot.stamp(tmp_path / "file") == f"dqkernels plot {style} sha256:{picture.digest()}"
    (tmp_path / "file").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 40)
    assert plot.stamp(tmp_path / "file") is None


def test_colours_stand_out_on_both_pages():
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for style in picture_draw.STYLES.values():
        assert contrast(style.text, style.back) > 7
        for hue in ("blue", "green", "sky", "orange", "red", "purple", "grey"):
            assert contrast(getattr(style, hue), style.back) > 2, (style.name, hue)
        # The widths of ours stand beside each other: told apart by brightness alone, too.
        assert contrast(style.blue, style.sky) > 1.6 and contrast(style.green, style.sky) > 1.2


def test_pictures_are_as_wide_as_a_readme_wants_them():
    from PIL import Image

    for path in (ROOT / "docs" / "images").glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 1280 and 400 < image.height < 2200, path.name


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(RESULTS / "size.json"), "--output_dir", str(tmp_path)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_plotting_needs_no_torch(tmp_path):
    code = (
        "import sys; from dqkernels.bench import plot; plot.run(sys.argv[1:2], sys.argv[2]); "
        "print({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(RESULTS / "train-step-h200.json"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


# -------------------------------------------------------------------------------------------- files


def test_files_names_and_json(tmp_path, capsys):
    command = ["plot", str(RESULTS / "train-step-h200.json"), "--output_dir", str(tmp_path / "made")]
    assert main([*command, "--json", "--style", "dark"]) == 0
    found = json.loads(capsys.readouterr().out)["written"]
    assert found == [str(tmp_path / "made" / "train-step-h200-step-dark.png")] and Path(found[0]).is_file()
    assert main([*command, "--format", "svg"]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.split()]
    assert names == ["train-step-h200-step-light.svg", "train-step-h200-step-dark.svg"]
    assert main(command) == main(command) == 0, "its own files are replaced"


def test_what_is_not_ours_is_not_replaced(tmp_path, capsys):
    source, target = str(RESULTS / "train-step-h200.json"), tmp_path / "train-step-h200-step-dark.png"
    target.write_bytes(b"a photograph")
    command = ["plot", source, "--output_dir", str(tmp_path)]
    assert main(command) == 2
    assert "is there already, and not by dqkernels plot: give --overwrite" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [target.name] and target.read_bytes() == b"a photograph"
    assert main([*command, "--overwrite"]) == 0 and plot.is_own(target)
    (tmp_path / "page.html").write_text("<p>mine</p>")
    assert main(["plot", source, "--html", str(tmp_path / "page.html")]) == 2
    assert (tmp_path / "page.html").read_text() == "<p>mine</p>"


def test_one_bad_record_of_two_leaves_nothing(tmp_path):
    bad = written(tmp_path, changed("demo.json", set_row(2, "ratio", KeyError)), "bad.json")
    with pytest.raises(plot.PlotError, match=r"bad\.json: rows\[2\]"):
        plot.run([RESULTS / "size.json", bad], tmp_path / "out", html=tmp_path / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.json"]


def test_two_records_of_one_name_are_refused(tmp_path):
    path = written(tmp_path, data_of("size.json"), "size.json")
    with pytest.raises(plot.PlotError, match="different names, 'size' stands there twice"):
        plot.run([RESULTS / "size.json", path], tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--style", "sepia"], "--style must be light, dark or both, got 'sepia'"),
        (["--format", "gif"], "--format must be png or svg, got 'gif'"),
        (["--html", "no/such/folder/page.html"], "--html must lie in a folder that exists"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    assert main(["plot", str(RESULTS / "size.json"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_names_from_outside_stay_in_the_folder(tmp_path):
    made = data_of("train-step-h200.json")
    path = written(tmp_path, made, "..$(x) y.json")
    (found,) = plot.run([path], tmp_path / "out", styles=["light"])
    assert found.parent == tmp_path / "out" and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", found.name)


# -------------------------------------------------------------------------------------------- the page


class Checked(HTMLParser):
    """Tags that balance, and every address of the page."""

    VOID = {"meta", "img", "source", "br"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_the_page_holds_records_pictures_and_what_was_not_compared(tmp_path, capsys):
    names = ["linear-example.json", "gpu-lane-h200.json", "demo.json"]
    page = tmp_path / "page.html"
    assert main(["plot", "--html", str(page), *(str(RESULTS / name) for name in names)]) == 0
    assert capsys.readouterr().out.strip() == str(page) and [p.name for p in tmp_path.iterdir()] == ["page.html"]
    found = Checked(page.read_text(encoding="utf-8"))
    for name in names:
        assert name in found.text
    for word in (
        "not compared",
        "not installed",
        "AMD EPYC",
        "NVIDIA H200",
        "git_commit",
        "cuda graph",
        "perf_counter",
    ):
        assert word in found.text or word == "cuda graph"
    images = [attrs for tag, attrs in found.tags if tag == "img"]
    assert len(images) == 2 + 2 and all(
        one["alt"] and one["src"].startswith("data:image/png;base64,") for one in images
    )
    sources = [attrs for tag, attrs in found.tags if tag == "source"]
    assert len(sources) == len(images) and all(one["media"] == "(prefers-color-scheme: dark)" for one in sources)
    row = data_of("linear-example.json")["rows"][0]
    assert f"{row['median_us']:g}" in found.text
    assert main(["plot", "--html", str(page), str(RESULTS / "size.json")]) == 0, "its own page is replaced"


def test_the_page_asks_for_nothing_outside():
    text = plot_page.page([plot.load(RESULTS / name) for name in ("train-step-h200.json", "decode-h200.json")])
    found = Checked(text)
    for tag, attrs in found.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset"):
            assert name not in attrs or attrs[name].startswith(("data:image/png;base64,", "#"))
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text


def test_the_page_escapes_everything_that_a_record_says(tmp_path):
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&\u202e"
    made = data_of("generate-zen4.json")
    made["environment"]["cpu_model"] = evil
    made["settings"]["model"] = evil
    made["protocol"]["note"] = evil
    made["rows"][0]["candidate"] = evil
    made["rows"][1].update(status="not compared", reason=evil)
    made["rows"].append({"candidate": "x", "status": "not run", "reason": None})
    loaded = plot.load(written(tmp_path, made, "<b onclick=1>.json"))
    found = Checked(plot_page.page([loaded]))
    assert not any(tag in ("script", "b") for tag, _ in found.tags) and "alert('x')" in found.text
    for tag, attrs in found.tags:
        assert not any(name.startswith("on") for name in attrs), tag
        assert tag != "img" or attrs["src"].startswith("data:")


def test_the_page_takes_rows_of_any_shape(tmp_path):
    made = data_of("gpu-lane-h200.json")
    made["rows"] += [{}, {"nested": {"a": [1, None]}, "long_text": "w" * 5000, "flag": True, "big_bytes": 10**15}]
    found = Checked(plot_page.page([plot.load(written(tmp_path, made))]))
    assert "w" * 400 + " ..." in found.text and "1,000,000,000,000,000" in found.text


# -------------------------------------------------------------------------------------------- committed images


@pytest.fixture
def images(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pictures")


def test_the_images_of_the_pages_are_those_of_the_records(images, capsys):
    assert images.stale() == [], "run python benchmarks/pictures.py, look at them, and commit them"
    assert images.main(["--check"]) == 0
    wanted = {path.name for path, *_ in images.wanted()}
    assert {path.name for path in images.FOLDER.iterdir()} == wanted
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    shown = re.findall(r"images/([\w.-]+\.png)", pages)
    assert set(shown) == wanted, "every image is on a page, in light and in dark"
    for light in (name for name in shown if name.endswith("-light.png")):
        assert shown.count(light.replace("-light", "-dark")) == shown.count(light)


def test_an_image_of_another_record_is_noticed(images, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(images, "SHOWN", {"train-step-h200": ("step",)})
    monkeypatch.setattr(images, "FOLDER", tmp_path / "images")
    monkeypatch.setattr(images, "HERE", tmp_path / "benchmarks")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    made = data_of("train-step-h200.json")
    path = written(tmp_path / "benchmarks" / "results", made, "train-step-h200.json")
    assert len(images.stale()) == 2, "nothing is drawn yet"
    assert images.main([]) == 0 and images.stale() == []
    made["rows"][1]["median_ms"] += 0.01
    path.write_text(json.dumps(made))
    assert images.stale() == ["train-step-h200-step-light.png", "train-step-h200-step-dark.png"]
    assert images.main(["--check"]) == 1 and "python benchmarks/pictures.py" in capsys.readouterr().out


def test_the_digest_is_of_every_number():
    picture = plot.pictures(plot.load(RESULTS / "generate-zen4.json"))[0]
    other = copy.deepcopy(picture)
    assert other.digest() == picture.digest()
    object.__setattr__(other.panels[1].series[0], "points", ((other.panels[1].series[0].label, 130.31),))
    assert other.digest() != picture.digest()


def test_a_cold_row_is_preferred_to_a_warm_one(tmp_path):
    made = data_of("linear-example.json")
    panel = pictures_of(tmp_path, made)["latency"].panels[0]
    cold = {r["candidate"]: r["median_us"] for r in made["rows"] if r.get("cache") == "cold"}
    assert panel.series[0].points == (("torch fp32", cold["torch fp32"]),)
    made["rows"] = [row for row in made["rows"] if row.get("cache") != "cold"]
    found = pictures_of(tmp_path, made)["latency"]
    assert "(warm)" in found.caption[0] and found.panels[0].series[0].points[0][1] < cold["torch fp32"]


def test_many_shapes_are_cut_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_layers, "_PANELS", 2)
    found = {one.name: one for one in plot.pictures(plot.load(RESULTS / "gemm-h200.json"))}
    assert [panel.title for panel in found["latency"].panels] == ["N x K: 768 x 768", "N x K: 8,192 x 8,192"]
    assert "3 of 5 shapes are not shown." in found["latency"].caption


def test_record_replace_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a"
    record.replace(path, b"old")
    monkeypatch.setattr(record.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        record.replace(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]
