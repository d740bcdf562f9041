"""Which graph a lane runs a step with; the lanes themselves are tests/gpu's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engine.attention import RowSpan
from deployments.engine.forms import Form, forms
from deployments.engine.lane import Lane
from deployments.engine.stages import StepRows


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_step_runs_in_the_first_graph_that_fits(lanes: int) -> None:
    """Decodes of all numbers, alone, beside a chunk, and with one that samples nothing; graphs that are missing too."""
    known = forms(max_batch_tokens=2048, max_sequences=200, lanes=lanes)
    decodes = tuple(form.rows for form in known if form.sequences is None)
    for missing in (None, Form(24), known[-1]):
        graphs = dict.fromkeys(form for form in known if form != missing)
        lane: Any = SimpleNamespace(forms=known, _drawn=decodes, _graphs=graphs)
        for count in range(1, 200):
            for chunk, silent in ((0, 0), (1, 1), (37, 0), (700, 0), (1700, 0)):
                step = rows_of(count, chunk, silent)
                fits = [form for form in graphs if form.fits(step)]
                assert Lane.form(lane, step) == (fits[0] if fits else None)


def rows_of(decodes: int, chunk: int, silent: int) -> StepRows:
    counts = [1] * decodes + [chunk] * (chunk > 0)
    spans = tuple(RowSpan(0, count, tuple(range(200))) for count in counts)
    positions = tuple(p for count in counts for p in range(count))
    return StepRows((0,) * sum(counts), positions, spans, tuple(range(len(counts) - silent)))
