"""A plan as a picture: one bar per device, to one scale, and below it a table that is legend and figures in one.

Plain SVG 1.1 with a style sheet for light and dark surroundings; the same plan gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from placement.export import capacity, title
from placement.hardware import format_bytes
from placement.outline import Part, colours, parts
from placement.plan import Plan, Stage

_LEGEND = {"layers": "decoder layers", "KV cache": "keys and values of all tokens, and one scratch block"}
"""For the legend, where a part's own words are about one device."""

_STYLE = """
text { font: 13px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1c2430 }
.heading { font-size: 16px; font-weight: 600 }
.strong { font-weight: 600 }
.faint { fill: #5a6675; font-size: 12px }
.number { text-anchor: end; font-variant-numeric: tabular-nums }
.label { text-anchor: middle; font-size: 12px; fill: #fff }
.halo { text-anchor: middle; font-size: 12px; fill: #5a6675; paint-order: stroke; stroke: #fff; stroke-width: 5px }
.background { fill: #fff }
.line { stroke: #d5dbe3 }
.segment { stroke: #fff }
.free { fill: #eef1f5; stroke: #b8c1cc }
.outside { fill: url(#hatch); stroke: #b8c1cc }
.hatch { stroke: #b8c1cc }
@media (prefers-color-scheme: dark) {
text { fill: #e4e9f0 }
.faint { fill: #97a3b2 }
.label { fill: #fff }
.halo { fill: #97a3b2; stroke: #10151c }
.background { fill: #10151c }
.line { stroke: #2b3440 }
.segment { stroke: #10151c }
.free { fill: #1b232d; stroke: #4a5665 }
.outside { stroke: #4a5665 }
.hatch { stroke: #4a5665 }
}
"""

_MARGIN, _LABELS, _COLUMN, _TERMS = 24, 232, 92, 170
_BAR, _BAR_STEP, _ROW, _TOP = 32, 52, 22, 108
_LEAST_WIDTH, _LEAST_WHY = 960, 40
_CHARACTER, _STRONG_CHARACTER = 7, 8
"""Pixels of an average character, for what must fit in a width."""


@dataclass(frozen=True, slots=True)
class _Bar:
    """One device: where its bytes go, in the order in which they are drawn."""

    stage: Stage
    parts: tuple[Part, ...]

    def bytes_of(self, name: str) -> int:
        return sum(part.bytes for part in self.parts if part.name == name)


def svg(plan: Plan) -> str:
    """The picture of `plan`, as the text of an SVG file."""
    bars = [_Bar(stage, parts(plan, stage)) for stage in plan.stages]
    painted = colours(part for bar in bars for part in bar.parts)
    width = max(_LEAST_WIDTH, 2 * _MARGIN + _TERMS + _COLUMN * len(bars))
    bottom = _TOP + _BAR_STEP * len(bars)
    height = bottom + 40 + _ROW * (len(painted) + 3) + _MARGIN
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-labelledby="plan-title plan-description">',
            f'<title id="plan-title">{escape(title(plan))}</title>',
            f'<desc id="plan-description">{escape(_description(plan, bars))}</desc>',
            f"<style>{_STYLE}</style>",
            '<defs><pattern id="hatch" width="8" height="8" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><line class="hatch" y2="8" stroke-width="3"/></pattern></defs>',
            f'<rect class="background" width="{width}" height="{height}"/>',
            _text(_MARGIN, 38, title(plan), "heading"),
            _text(_MARGIN, 60, capacity(plan), "faint"),
            *_bars(bars, painted, width),
            *_table(bars, painted, bottom + 40, width),
            "</svg>",
            "",
        )
    )


def _bars(bars: Sequence[_Bar], painted: dict[str, str | None], width: int) -> Iterable[str]:
    left, room = _MARGIN + _LABELS, width - 2 * _MARGIN - _LABELS
    most = max(max(bar.stage.gpu.memory_bytes, bar.stage.budget_bytes) for bar in bars)
    bottom = _TOP + _BAR_STEP * len(bars) - _BAR_STEP + _BAR + 6
    for tick in _ticks(most):
        x = left + tick * room // most
        yield f'<line class="line" x1="{x}" y1="{_TOP - 10}" x2="{x}" y2="{bottom}"/>'
        yield _text(x, _TOP - 16, format_bytes(tick).replace(".00", "").replace(".0", ""), "faint", anchor="middle")
    for i, bar in enumerate(bars):
        y = _TOP + _BAR_STEP * i
        name = f"{bar.stage.device}: {bar.stage.gpu.name}"
        yield _text(_MARGIN, y + 13, _shortened(name, (_LABELS - 12) // _STRONG_CHARACTER), "strong")
        yield _text(_MARGIN, y + 29, f"layers {bar.stage.layers[0]} to {bar.stage.layers[1] - 1}", "faint")
        done = 0
        for part in bar.parts:
            x, end = (left + edge * room // most for edge in (done, done + part.bytes))
            done += part.bytes
            if end > x:
                yield _segment(part, painted[part.name], x, y, end - x)


def _segment(part: Part, colour: str | None, x: int, y: int, width: int) -> str:
    style = f'class="segment" fill="{colour}"' if colour else f'class="{part.name.split()[0]}"'
    rect = f'<rect {style} x="{x}" y="{y}" width="{width}" height="{_BAR}"/>'
    label, size = part.name, format_bytes(part.bytes)
    label = next((text for text in (f"{label} {size}", label) if len(text) * _CHARACTER < width - 8), "")
    text = _text(x + width // 2, y + 20, label, "label" if colour else "halo") if label else ""
    tip = escape(f"{part.name}: {part.bytes:,} bytes. {part.why}")
    return f"<g><title>{tip}</title>{rect}{text}</g>"


def _table(bars: Sequence[_Bar], painted: dict[str, str | None], top: int, width: int) -> Iterable[str]:
    """One row per name: its colour, its bytes on each device and, where there is room, what it is. The sums below."""
    columns = [_MARGIN + _TERMS + _COLUMN * (i + 1) for i in range(len(bars))]
    right, room = columns[-1], (width - _MARGIN - columns[-1] - 24) // _CHARACTER
    for bar, x in zip(bars, columns, strict=True):
        yield _text(x, top, f"device {bar.stage.device}", "number strong")
    for row, (name, colour) in enumerate(painted.items(), start=1):
        y = top + _ROW * row
        style = f'fill="{colour}"' if colour else f'class="{name.split()[0]}"'
        yield f'<line class="line" x1="{_MARGIN}" y1="{y - 16}" x2="{right}" y2="{y - 16}"/>'
        yield f'<rect {style} x="{_MARGIN}" y="{y - 11}" width="12" height="12" rx="2"/>'
        yield _text(_MARGIN + 20, y, name)
        for bar, x in zip(bars, columns, strict=True):
            yield _text(x, y, format_bytes(bar.bytes_of(name)) if bar.bytes_of(name) else "–", "number")
        if room >= _LEAST_WHY:
            why = next(part.why for bar in bars for part in bar.parts if part.name == name and part.bytes)
            yield _text(right + 24, y, _shortened(_LEGEND.get(name, why.partition(":")[0]), room), "faint")
    for row, name in enumerate(("budget", "memory"), start=len(painted) + 1):
        y = top + _ROW * row
        yield f'<line class="line" x1="{_MARGIN}" y1="{y - 16}" x2="{right}" y2="{y - 16}"/>'
        yield _text(_MARGIN + 20, y, name, "strong")
        for bar, x in zip(bars, columns, strict=True):
            size = bar.stage.budget_bytes if name == "budget" else bar.stage.gpu.memory_bytes
            yield _text(x, y, format_bytes(size), "number strong")


def _description(plan: Plan, bars: Sequence[_Bar]) -> str:
    lines = [capacity(plan)]
    for bar in bars:
        parts = ", ".join(f"{part.name} {format_bytes(part.bytes)}" for part in bar.parts if part.bytes)
        lines.append(f"Device {bar.stage.device}, {bar.stage.gpu.name}: {parts}")
    return ". ".join(lines)


def _ticks(most: int) -> Iterable[int]:
    """0 and the multiples of 1, 2 or 5 times a power of ten that divide `most` into 4 to 10 parts."""
    step = 1
    while most // step > 10:
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    return range(0, most + 1, step)


def _shortened(text: str, fits: int) -> str:
    return text if len(text) <= fits else text[: fits - 1] + "…"


def _text(x: int, y: int, text: str, style: str = "", *, anchor: str = "") -> str:
    style = f' class="{style}"' if style else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x}" y="{y}"{style}{anchor}>{escape(text)}</text>'
