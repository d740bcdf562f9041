"""Table, picture and JSON of results that were not measured."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from deployments.compare.picture import svg
from deployments.compare.table import price, seconds, table
from deployments.compare.values import Comparison, Failed
from tests.unit.compare.models import comparison, measured

FAILED = Failed(quantization="fp32", reason="it needs 2.00 GB & more")
SLOWER = measured("int8", load_s=5.0)


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_a_line_per_quantisation_and_one_per_burst() -> None:
    lines = table(comparison(measured("nf4"), SLOWER, FAILED)).splitlines()
    assert [cells(line) for line in lines if line.startswith(("nf4", "int8"))] == [
        ["nf4", "float32", "100.0 MB", "500.0 MB", "800.0 MB", "700.0 MB", "12,345", "2.5 s", "12.346"],
        ["int8", "float32", "100.0 MB", "500.0 MB", "800.0 MB", "700.0 MB", "12,345", "5.0 s", "12.346"],
        ["nf4", "1", "20.0", "250 ms", "50 ms", "1.5 s"],
        ["int8", "1", "20.0", "250 ms", "50 ms", "1.5 s"],
        ["nf4", "3", "60.0", "250 ms", "50 ms", "1.5 s"],
        ["int8", "3", "60.0", "250 ms", "50 ms", "1.5 s"],
    ]
    assert "perplexity: 99 of the 100 tokens of text.txt, in windows of 32 every 16" in lines
    assert lines[-1] == "fp32: not measured: it needs 2.00 GB & more"


def test_costs_and_quantising_are_shown_where_there_are_any() -> None:
    plain = table(comparison(measured("nf4")))
    assert "cost" not in plain
    assert "quantise" not in plain
    found = table(comparison(measured("nf4", quantise_s=33.3), SLOWER, hourly_price=3.6))
    assert "quantise, once" in found
    assert "33.3 s" in found
    assert cells(next(line for line in found.splitlines() if line.startswith("nf4") and " 1 " in line))[-1] == "50.00"


def test_a_price_an_hour_over_the_tokens_of_an_hour() -> None:
    made = comparison(measured("nf4"), hourly_price=3.6)
    row = made.rows[0]
    assert row.kind == "measured"
    assert [made.cost_per_million(level) for level in row.levels] == [
        pytest.approx(3.6 / (20 * 3600) * 1e6),
        pytest.approx(3.6 / (60 * 3600) * 1e6),
    ]


def test_all_failed_is_a_table_of_reasons() -> None:
    assert table(comparison(FAILED)).splitlines()[-1].startswith("fp32: not measured")


def test_json_comes_back_as_it_was() -> None:
    made = comparison(measured("nf4"), FAILED, hourly_price=1.5)
    assert Comparison.model_validate_json(made.model_dump_json(by_alias=True)) == made
    assert '"schema":"headroom.compare/1"' in made.model_dump_json(by_alias=True)


def test_the_picture_has_a_bar_for_each_value_to_scale() -> None:
    root = ElementTree.fromstring(svg(comparison(measured("nf4"), SLOWER, FAILED, hourly_price=3.6)))
    space = "{http://www.w3.org/2000/svg}"
    bars = [rect for rect in root.iter(f"{space}rect") if rect.get("fill")]
    assert len(bars) == 2 * (4 + 2 * 2), "two quantisations; four panels, and two for each burst"
    widths = [int(bar.get("width", "")) for bar in bars]
    assert widths[6] == pytest.approx(widths[7] / 2, abs=1), "loads in half the time"
    texts = [text.text or "" for text in root.iter(f"{space}text")]
    assert "a&b on CPU, 2 cores, 2026-01-02T03:04:05+00:00" in texts
    assert "20.0 (50.00 per 1M)" in texts
    assert any(text.startswith("fp32: not measured") for text in texts)
    assert len(list(root.iter(f"{space}line"))) == 2, "what was planned, beside what was measured"


def test_amounts_are_readable() -> None:
    assert [seconds(s) for s in (0.0123, 0.9, 1.26, 75.0)] == ["12 ms", "900 ms", "1.3 s", "75.0 s"]
    assert [price(p) for p in (1234.5, 2.0, 0.01234)] == ["1,234.50", "2.00", "0.0123"]
