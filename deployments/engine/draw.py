"""What a step asks of the sampler: plain values that the loop builds on the host, one entry per sampled row."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.engine.sampling_batch import Row


@dataclass(frozen=True, slots=True)
class Draw:
    """The sampled rows of one step, in the order of `StepRows.sampled`. All fields are equally long."""

    rows: tuple[Row, ...]
    """The requests' parameters. Rows compare by identity: equal tuples need the same parameters on the device."""
    positions: tuple[int, ...]
    """Tokens (prompt and output) before the one that is drawn. The last of them may be known to the device alone."""
    tables: tuple[tuple[int, ...], ...]
    """Block ids that cover the row's `positions` tokens; token p is in tables[row][p // block_size]."""

    @property
    def plain(self) -> bool:
        """Whether each row's likeliest token is all that the step asks for: then `Sampler.take` does, and nobody needs
        logits."""
        return all(row.plain for row in self.rows)

    def output_count(self, row: int) -> int:
        """Output tokens of a row before the one that is drawn, those that the host does not know yet included."""
        return self.positions[row] - self.rows[row].prompt_tokens
