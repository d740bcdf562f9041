"""A comparison for a terminal: a line per quantisation, then a line per burst."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.compare.values import Comparison, Failed, Level, Measured
from placement.hardware import format_bytes


def table(comparison: Comparison) -> str:
    """The text, without a newline at its end."""
    measured = [row for row in comparison.rows if isinstance(row, Measured)]
    parts = [title(comparison)]
    if measured:
        parts += [
            _memory(measured),
            text_scored(comparison, measured[0]),
            _speed(comparison, measured),
            workload(comparison),
        ]
    parts += [f"{row.quantization}: not measured: {row.reason}" for row in comparison.rows if isinstance(row, Failed)]
    return "\n\n".join(parts)


def title(comparison: Comparison) -> str:
    """What was compared, where and when."""
    versions = ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
    model = comparison.model + (f"@{comparison.revision}" if comparison.revision else "")
    return f"{model} on {comparison.machine}, {comparison.started}\n{versions}"


def text_scored(comparison: Comparison, row: Measured) -> str:
    """How perplexity was computed."""
    shape, quality = comparison.workload, row.quality
    return (
        f"perplexity: {quality.scored_tokens:,} of the {quality.text_tokens:,} tokens of {comparison.text}, in windows "
        f"of {shape.window:,} every {shape.stride:,}"
    )


def workload(comparison: Comparison) -> str:
    """What the bursts were."""
    shape = comparison.workload
    return (
        f"requests at once, prompts of {shape.input:,} tokens, answers of {shape.output:,}; times are medians over the "
        "requests"
    )


def seconds(duration: float) -> str:
    """In the unit that suits it."""
    return f"{1e3 * duration:.0f} ms" if duration < 1 else f"{duration:.1f} s"


def price(amount: float) -> str:
    """Three digits at least."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.3g}"


def _memory(rows: Sequence[Measured]) -> str:
    heads = ["", "compute", "weights", "KV cache", "planned", "measured", "KV tokens", "load", "perplexity"]
    quantised = any(row.quantise_s is not None for row in rows)
    lines = [[*heads[:8], *(["quantise, once"] if quantised else []), *heads[8:]]]
    for row in rows:
        sizes = (row.memory.weights, row.memory.kv_cache, row.memory.planned, row.memory.measured)
        once = [seconds(row.quantise_s) if row.quantise_s is not None else "–"] if quantised else []
        cells = [row.quantization, row.dtype, *map(format_bytes, sizes), f"{row.memory.capacity_tokens:,}"]
        lines.append([*cells, seconds(row.load_s), *once, f"{row.quality.perplexity:.3f}"])
    return _aligned(lines, left=2)


def _speed(comparison: Comparison, rows: Sequence[Measured]) -> str:
    priced = comparison.hourly_price is not None
    heads = ["", "requests", "tokens/s", "first token", "per token", "request"]
    lines = [[*heads, *(["cost of 1M tokens"] if priced else [])]]
    for requests in comparison.workload.concurrency:
        for row in rows:
            level = level_of(row, requests)
            cost = comparison.cost_per_million(level)
            times = map(seconds, (level.first_token_s, level.token_s, level.request_s))
            cells = [row.quantization, str(requests), f"{level.tokens_per_s:,.1f}", *times]
            lines.append([*cells, *([price(cost)] if cost is not None else [])])
    return _aligned(lines, left=1)


def level_of(row: Measured, requests: int) -> Level:
    """The burst of so many requests."""
    return next(level for level in row.levels if level.requests == requests)


def _aligned(lines: Sequence[Sequence[str]], *, left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligns = "<" * left + ">" * (len(widths) - left)
    rows = ("  ".join(f"{c:{a}{w}}" for c, a, w in zip(line, aligns, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)
