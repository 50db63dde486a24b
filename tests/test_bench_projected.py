"""`bench projected`: the figures by hand, and that no projection passes for a measurement."""

from __future__ import annotations

import json

import pytest
from test_bench import assert_fits

from dqkernels import cli
from dqkernels.bench import compare, floors, projected, record, size


def rows(result, what, **facts):
    found = [row for row in result["rows"] if row["what"] == what]
    return [row for row in found if all(row[key] == value for key, value in facts.items())]


def test_a_gemm_by_hand():
    """W4, 16 x 4096 x 1024 on a card of 2039 GB/s: packed weights, int8 input, 16-bit output, fp32 scales of rows and
    tokens; the arithmetic of 624 int8 TOPS is far below."""
    moved = 4096 * 1024 // 2 + 16 * 1024 + 2 * 16 * 4096 + 4 * (4096 + 16)
    (row,) = rows(projected.run("a100-80-sxm", [(4096, 1024)], (16,), ()), "gemm", bits=4)
    assert row["moved_bytes"] == moved and row["operations"] == 2 * 16 * 4096 * 1024
    assert row["floor_us"] == round(moved / 2039e3, 3) and row["floor_bound"] == "memory"
    # Of one shape with many rows the peak is what bounds, and only of int8 twice fp16's.
    big = projected.run("a100-80-sxm", [(8192, 8192)], (8192,), ())
    half, *_, two_bits = rows(big, "gemm")
    assert half["floor_us"] == round(2 * 8192**3 / 312e6, 3) and half["floor_bound"] == "compute"
    assert two_bits["bound_ratio"] == 2.0


def test_the_cards_differ_in_bandwidth():
    """An A100 of 40 GB moves 1555 GB/s: the same bytes take longer."""
    small, large = (
        projected.run(card, [(768, 768)], (1,), ())["rows"][0]["floor_us"] for card in ("a100-40", "a100-80-sxm")
    )
    assert small == pytest.approx(large * 2039 / 1555, rel=0.01)
    assert {card.source for card in projected.CARDS.values()} == {"datasheet"}


def test_a_step_is_the_linears_of_a_decoder():
    """6 squares, fc1 and fc2 per layer, and the head: what `size` counts of a decoder, less K and V of the source."""
    shape = size.SHAPES["bart-base"]
    d, layers = shape.d_model, shape.decoder
    (row,) = rows(projected.run(shapes=[(1, 1)], tokens=(1,), models=["bart-base"]), "decode step", bits=16)
    assert row["operations"] == 2 * (layers * (6 * d * d + 2 * d * shape.ffn) + shape.vocab * d)
    each = [floors.gemm_floor(floors.A100_80_SXM, 1, n, k, 16).us for n, k in projected.step_sizes(shape)]
    assert row["floor_us"] == pytest.approx(sum(each), abs=1e-3)


def test_no_row_passes_for_a_measurement(tmp_path, capsys):
    path = tmp_path / "projected.json"
    assert cli.main(["bench", "projected", "--shapes", "768x768", "--tokens", "1", "--out", str(path)]) == 0
    found = record.read(path)
    assert found["kind"] == "projected" and found["protocol"]["measured"] is False
    for row in found["rows"]:
        assert row["status"] == "projected" and not any("median" in key or "samples" in key for key in row)
    assert "PROJECTED, not measured" in capsys.readouterr().out
    with pytest.raises(compare.CompareError, match="no measured row"):
        compare.compare(found, found)
    # Beside a record that was measured it is refused as another kind.
    measured = json.loads(json.dumps(found)) | {"kind": "gemm"}
    with pytest.raises(compare.CompareError, match="records of one kind"):
        compare.compare(found, measured)


def test_the_table_fits():
    text = assert_fits(projected.render(projected.run("a100-80-pcie")))
    assert "1,935 GB/s" in text and "bart-large, a step" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--card", "a100"], "--card must be one of a100-40, a100-80-sxm"),
        (["--models", "bart-huge"], "--models must be of tiny, bart-base"),
        (["--shapes", "768"], "--shapes must be NxN (or llama-7b-linear) with numbers above 0"),
    ],
)
def test_refusals(words, message, capsys):
    assert cli.main(["bench", "projected", *words]) == 2
    assert message in capsys.readouterr().err
