"""Counts over all steps of one engine, kept by its replica from the reports. One pass per report, no clock."""

from __future__ import annotations

from deployments.engine.messages import Measured, StepReport
from deployments.metrics.histogram import TOKEN_BOUNDS, Histogram
from deployments.protocol import GenerationRequest


class EngineTally:
    """Since the start of the engine."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache."""
        self.output_tokens = 0
        self.steps = Histogram(TOKEN_BOUNDS)
        """Seconds."""
        self.last = Measured()

    def submitted(self, request: GenerationRequest) -> None:
        """A request went to the engine."""
        self.prompt_tokens += len(request.prompt_ids)

    def reported(self, report: StepReport) -> None:
        """A step's report came."""
        self.last = report.measured
        if report.measured.step_s:
            self.steps.add(report.measured.step_s)
        for chunk in report.chunks:
            self.output_tokens += len(chunk.token_ids)
            self.cached_tokens += chunk.cached_tokens
