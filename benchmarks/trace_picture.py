"""Decode steps as a picture: what the host and each GPU's streams do, from Chrome traces of PyTorch's profiler.

    python -m benchmarks.engine_throughput --profile 1,64 --trace /tmp/step.json
    python -m benchmarks.trace_picture /tmp/step.1.json /tmp/step.64.json -o docs/step.svg

For each trace two panels: a step whole (as many steps as there are GPUs), and a part of its middle, enlarged. Kernels
are coloured by the classes of the profile's table. The picture is SVG without scripts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.kernel_classes import CLASSES, kernel_class

STEP = "engine step"
"""The mark around each call of the engine's `step` in a trace."""

ENLARGED = 16
"""Times, in a trace's second panel."""

LAUNCH, WAIT, HOST = "host launches", "host waits", "host, other CUDA calls"
COLOURS = dict(
    zip(
        (*CLASSES, LAUNCH, WAIT, HOST),
        ("#d98324", "#5b8c5a", "#2f6db5", "#7a4fa3", "#b04a5a", "#c9a227", "#6b7785", "#a8b2bd",
         "#3f7d8c", "#dfe5ec", "#8fa9b3"),
        strict=True,
    )
)  # fmt: skip

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_RUNTIME = ("cuda_runtime", "cuda_driver")
_MARGIN, _LABELS, _WIDTH, _LANE, _HEAD, _FOOT, _LEGEND = 20, 120, 1080, 26, 44, 30, 60
_LEAST = 0.4
"""Pixels; what is nearer to its neighbour of the same colour is drawn with it."""
_STYLE = """
text { font: 12px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1c2430 }
.heading { font-size: 14px; font-weight: 600 }
.faint { fill: #5a6675 }
.background { fill: #fff }
.lane { fill: #f4f6f9 }
.line { stroke: #d5dbe3 }
@media (prefers-color-scheme: dark) {
text { fill: #e4e9f0 }
.faint { fill: #97a3b2 }
.background { fill: #10151c }
.lane { fill: #1b232d }
.line { stroke: #2b3440 }
}
"""


class TraceError(Exception):
    """A trace without what the picture is of."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took its time in a lane; microseconds."""

    lane: str
    kind: str
    """A key of COLOURS."""
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What is drawn of a trace."""

    title: str
    spans: tuple[Span, ...]
    steps: tuple[tuple[float, float], ...]
    """Start and end of each call of the engine's `step`, in order."""
    gpus: int

    def window(self) -> tuple[float, float]:
        """From the middle call of `step` to the start of the one that is as many steps later as there are GPUs."""
        first = (len(self.steps) - self.gpus) // 2
        after = first + self.gpus
        start = self.steps[first][0]
        return start, self.steps[after][0] if after < len(self.steps) else self.steps[-1][1]


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of a trace's time, all of its lanes."""

    title: str
    start: float
    end: float
    spans: tuple[Span, ...]
    """Those within, cut to its time."""

    @property
    def lanes(self) -> list[str]:
        """From top to bottom: the host's first."""
        return sorted({span.lane for span in self.spans}, key=lambda lane: (not lane.startswith("host"), lane))


def read(path: Path, title: str) -> Trace:
    """A trace as PyTorch's profiler writes it.

    Raises:
        TraceError: it has no marked steps, or no kernels.
    """
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    steps = sorted(_times(e) for e in events if e.get("name") == STEP and e.get("cat") == "user_annotation")
    spans = tuple(sorted(filter(None, map(_span, events)), key=lambda span: span.start))
    gpus = len({event["args"]["device"] for event in events if event.get("cat") == "kernel"})
    if not gpus or len(steps) <= gpus:
        raise TraceError(
            f"{path} has {len(steps)} marked steps and kernels of {gpus} GPUs; a picture needs a GPU's kernels, and "
            "more steps than GPUs: write it by benchmarks.engine_throughput --profile N --trace FILE where GPUs are"
        )
    return Trace(title, spans, tuple(steps), gpus)


def panels(trace: Trace) -> tuple[Panel, Panel]:
    """The whole window, and of its middle a part, enlarged."""
    start, end = trace.window()
    middle, half = (start + end) / 2, (end - start) / (2 * ENLARGED)
    what = "one step" if trace.gpus == 1 else f"{trace.gpus} steps"
    return (
        _panel(f"{trace.title}: {what}, {end - start:,.0f} us", trace, start, end),
        _panel(f"{trace.title}: the same, {ENLARGED} times enlarged", trace, middle - half, middle + half),
    )


def draw(traces: Sequence[Trace]) -> str:
    """The picture as the text of an SVG file."""
    parts: list[str] = []
    top = _MARGIN
    for trace in traces:
        for panel in panels(trace):
            parts += _draw_panel(panel, top)
            top += _HEAD + _LANE * len(panel.lanes) + _FOOT
    kinds = {span.kind for trace in traces for panel in panels(trace) for span in panel.spans}
    parts += _legend([kind for kind in COLOURS if kind in kinds], top)
    width, height = 2 * _MARGIN + _LABELS + _WIDTH, top + _LEGEND
    description = "; ".join(panel.title for trace in traces for panel in panels(trace))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-labelledby="step-title step-description">',
        '<title id="step-title">Decode steps: what the host and each GPU do</title>',
        f'<desc id="step-description">{escape(description)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="background" width="{width}" height="{height}"/>',
    )
    return "\n".join((*head, *parts, "</svg>", ""))


def _times(event: dict[str, Any]) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _span(event: dict[str, Any]) -> Span | None:
    category, name = event.get("cat"), event["name"]
    if category in _DEVICE:
        kind = kernel_class(name) if category == "kernel" else "copies"
        return Span(f"GPU {event['args']['device']}, stream {event['args']['stream']}", kind, *_times(event))
    if category in _RUNTIME:
        kind = WAIT if "Synchronize" in name else LAUNCH if "Launch" in name else HOST
        return Span(f"host thread {event['tid']}", kind, *_times(event))
    return None


def _panel(title: str, trace: Trace, start: float, end: float) -> Panel:
    within = (span for span in trace.spans if span.start < end and span.end > start)
    return Panel(title, start, end, tuple(Span(s.lane, s.kind, max(s.start, start), min(s.end, end)) for s in within))


def _draw_panel(panel: Panel, top: float) -> Iterator[str]:
    left, scale = _MARGIN + _LABELS, _WIDTH / (panel.end - panel.start)
    yield _text(_MARGIN, top + 14, panel.title, "heading")
    first = top + _HEAD
    bottom = first + _LANE * len(panel.lanes)
    for tick in _ticks(panel.end - panel.start):
        x = left + tick * scale
        yield f'<line class="line" x1="{x:.1f}" y1="{first - 6}" x2="{x:.1f}" y2="{bottom}"/>'
        yield _text(x, first - 10, f"{tick:,.0f} us" if tick else "0", "faint", anchor="middle")
    for row, lane in enumerate(panel.lanes):
        y = first + _LANE * row
        yield _text(_MARGIN, y + 16, lane.partition(" thread")[0], "")
        yield f'<rect class="lane" x="{left}" y="{y + 2}" width="{_WIDTH}" height="{_LANE - 4}"/>'
        for kind, start, end in _joined((s for s in panel.spans if s.lane == lane), _LEAST / scale):
            x, width = left + (start - panel.start) * scale, max(_LEAST, (end - start) * scale)
            yield f'<rect fill="{COLOURS[kind]}" x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{_LANE - 4}"/>'


def _joined(spans: Iterable[Span], gap: float) -> Iterator[tuple[str, float, float]]:
    """Kind, start and end of a lane's spans; those of a kind that are nearer than `gap` to each other are one."""
    pending: tuple[str, float, float] | None = None
    for span in spans:
        if pending is not None and span.kind == pending[0] and span.start - pending[2] < gap:
            pending = (span.kind, pending[1], max(pending[2], span.end))
            continue
        if pending is not None:
            yield pending
        pending = (span.kind, span.start, span.end)
    if pending is not None:
        yield pending


def _legend(kinds: Sequence[str], top: float) -> Iterator[str]:
    x = float(_MARGIN)
    for kind in kinds:
        yield f'<rect fill="{COLOURS[kind]}" x="{x:.0f}" y="{top + 6}" width="12" height="12" rx="2"/>'
        yield _text(x + 17, top + 16, kind)
        x += 17 + 6.6 * len(kind) + 20


def _ticks(length: float) -> Iterator[float]:
    """0 and the multiples of 1, 2 or 5 times a power of ten up to `length`, 5 to 13 of them."""
    step, factors = 1e-3, (2, 2.5, 2)
    i = 0
    while length / step > 12:
        step, i = step * factors[i % 3], i + 1
    return (step * n for n in range(int(length / step) + 1))


def _text(x: float, y: float, text: str, style: str = "faint", *, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 where a trace has nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace_picture", description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="+", help="of engine_throughput: NAME.1.json, NAME.64.json, ...")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the picture, .svg")
    options = parser.parse_args(arguments)
    try:
        traces = [read(path, _title(path)) for path in options.traces]
    except TraceError as error:
        print(f"trace_picture: {error}", file=sys.stderr)
        return 2
    options.out.write_text(draw(traces))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    return 0


def _title(path: Path) -> str:
    """ "64 requests" of step.64.json."""
    count = path.stem.rpartition(".")[2]
    return {"1": "1 request"}.get(count, f"{count} requests") if count.isdigit() else path.stem


if __name__ == "__main__":
    sys.exit(main())
