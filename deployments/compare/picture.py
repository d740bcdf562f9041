"""A comparison as a picture: panels of bars, one bar per quantisation, in the same colours throughout.

Plain SVG 1.1 with a style sheet for light and dark surroundings; the same comparison gives the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from deployments.compare.table import level_of, price, seconds, text_scored, title, workload
from deployments.compare.values import Comparison, Failed, Level, Measured
from placement.hardware import format_bytes

_COLOURS = ("#2f6fd0", "#1f9668", "#c9761a", "#b4489a", "#7a68e0", "#75889f")
"""In the order of the rows. All have a contrast of 3 against both backgrounds."""
_STYLE = """
text { font: 13px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1c2430 }
.heading { font-size: 16px; font-weight: 600 }
.strong { font-weight: 600 }
.faint { fill: #5a6675; font-size: 12px }
.background { fill: #fff }
.mark { stroke: #1c2430; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
text { fill: #e4e9f0 }
.faint { fill: #97a3b2 }
.background { fill: #10151c }
.mark { stroke: #e4e9f0 }
}
"""
_MARGIN, _PANEL, _GAP, _NAME, _VALUE = 24, 448, 32, 52, 128
_BAR, _ROW, _HEAD, _TOP = 14, 22, 26, 96
_COLUMNS = 2
_CHARACTER = 7
"""Pixels of an average character, for what must fit in a width."""


@dataclass(frozen=True, slots=True)
class _Bar:
    name: str
    value: float
    label: str
    mark: float | None = None
    """A line across the bar."""


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    bars: tuple[_Bar, ...]

    @property
    def height(self) -> int:
        return _HEAD + _ROW * len(self.bars) + 18


def svg(comparison: Comparison) -> str:
    """The picture, as the text of an SVG file; at least one quantisation was measured."""
    rows = [row for row in comparison.rows if isinstance(row, Measured)]
    panels = _panels(comparison, rows)
    colours = {row.quantization: _COLOURS[i % len(_COLOURS)] for i, row in enumerate(rows)}
    notes = [text_scored(comparison, rows[0]), workload(comparison)]
    notes += [f"{row.quantization}: not measured: {row.reason}" for row in comparison.rows if isinstance(row, Failed)]
    width = 2 * _MARGIN + _COLUMNS * _PANEL + (_COLUMNS - 1) * _GAP
    lines = -(-len(panels) // _COLUMNS)
    bottom = _TOP + lines * panels[0].height
    height = bottom + 18 * len(notes) + _MARGIN
    name, versions = title(comparison).splitlines()
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-labelledby="compare-title">',
            f'<title id="compare-title">{escape(name)}</title>',
            f"<style>{_STYLE}</style>",
            f'<rect class="background" width="{width}" height="{height}"/>',
            _text(_MARGIN, 38, name, "heading"),
            _text(_MARGIN, 60, versions, "faint"),
            *(element for i, panel in enumerate(panels) for element in _drawn(panel, i, colours)),
            *(_text(_MARGIN, bottom + 18 * i, _fitting(note, width), "faint") for i, note in enumerate(notes)),
            "</svg>",
            "",
        )
    )


def _panels(comparison: Comparison, rows: Sequence[Measured]) -> list[_Panel]:
    def over(of: Callable[[Measured], float], label: Callable[[float], str]) -> tuple[_Bar, ...]:
        return tuple(_Bar(row.quantization, of(row), label(of(row))) for row in rows)

    memory = tuple(
        _Bar(row.quantization, row.memory.measured, format_bytes(row.memory.measured), row.memory.planned)
        for row in rows
    )
    panels = [
        _Panel("Memory measured; the line: planned", memory),
        _Panel("Weights", over(lambda row: row.memory.weights, lambda size: format_bytes(int(size)))),
        _Panel("Perplexity, lower is better", over(lambda row: row.quality.perplexity, lambda value: f"{value:.3f}")),
        _Panel("Load", over(lambda row: row.load_s, seconds)),
    ]
    for requests in comparison.workload.concurrency:
        levels = [(row.quantization, level_of(row, requests)) for row in rows]
        panels.append(_Panel(f"Tokens/s, {_requests(requests)}", tuple(_rate(comparison, *each) for each in levels)))
        first = tuple(_Bar(name, level.first_token_s, seconds(level.first_token_s)) for name, level in levels)
        panels.append(_Panel(f"First token, {_requests(requests)}", first))
    return panels


def _rate(comparison: Comparison, name: str, level: Level) -> _Bar:
    cost = comparison.cost_per_million(level)
    label = f"{level.tokens_per_s:,.1f}" + (f" ({price(cost)} per 1M)" if cost is not None else "")
    return _Bar(name, level.tokens_per_s, label)


def _requests(count: int) -> str:
    return f"{count} requests at once" if count > 1 else "1 request"


def _drawn(panel: _Panel, index: int, colours: dict[str, str]) -> Iterator[str]:
    left = _MARGIN + index % _COLUMNS * (_PANEL + _GAP)
    top = _TOP + index // _COLUMNS * panel.height
    room = _PANEL - _NAME - _VALUE
    most = max(max(bar.value, bar.mark or 0) for bar in panel.bars)
    yield _text(left, top + 12, panel.title, "strong")
    for i, bar in enumerate(panel.bars):
        y = top + _HEAD + _ROW * i
        length, mark = (round(room * value / most) if most else 0 for value in (bar.value, bar.mark or 0))
        yield _text(left, y + 11, bar.name)
        yield f'<rect fill="{colours[bar.name]}" x="{left + _NAME}" y="{y}" width="{length}" height="{_BAR}" rx="2"/>'
        if bar.mark is not None:
            x = left + _NAME + mark
            yield f'<line class="mark" x1="{x}" y1="{y - 2}" x2="{x}" y2="{y + _BAR + 2}"/>'
        yield _text(left + _NAME + max(length, mark) + 8, y + 11, bar.label)


def _fitting(text: str, width: int) -> str:
    most = (width - 2 * _MARGIN) // _CHARACTER
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: int, y: int, text: str, style: str = "") -> str:
    style = f' class="{style}"' if style else ""
    return f'<text x="{x}" y="{y}"{style}>{escape(text)}</text>'
