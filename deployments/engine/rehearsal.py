"""Steps that nobody asked for, run before the first request: what a step needs for the first time, they need.

Pinned memory for as many steps as there may be in flight, kernels that CUDA loads when they are first launched, the
way from GPU to GPU for as many rows as there may be: the host waits for each of these, some until the GPUs are idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate, chain

from deployments.engine.attention import RowSpan
from deployments.engine.draw import Draw
from deployments.engine.sampling_batch import Row
from deployments.engine.stages import StepRows
from deployments.protocol import Sampling

_LIKELIEST = Sampling(max_tokens=2, seed=0, temperature=0.0)
_DRAWN = Sampling(
    max_tokens=2,
    seed=0,
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    logit_bias=((0, 1.0),),
    logprobs=1,
)


def rehearsed(
    *, rows: int, sequences: int, block_size: int, scratch: int, vocab: int
) -> Iterator[tuple[StepRows, Draw]]:
    """Two steps of a slot, of so many rows each: prompts, drawn from greedily; and what follows those that were drawn
    from, with all that sampling knows, beside prompts.

    Args:
        rows: of the largest step.
        sequences: that may decode in a step.
        scratch: the block that all of it is written to.
        vocab: width of the logits.
    """
    row = partial(Row, prompt_tokens=1, vocab_size=vocab)
    prompts = _prompts(rows, block_size, scratch)
    drawn = min(sequences, len(prompts))
    yield _step(prompts, (row(_LIKELIEST),) * drawn, pending=0)
    decodes = [RowSpan(block_size - 1, 1, (scratch,))] * drawn
    yield _step([*decodes, *_prompts(rows - drawn, block_size, scratch)], (row(_DRAWN),) * drawn, pending=drawn)


def _prompts(rows: int, block_size: int, scratch: int) -> list[RowSpan]:
    """Of a block each, the last of what is left."""
    starts = range(0, rows, block_size)
    return [RowSpan(0, min(block_size, rows - start), (scratch,)) for start in starts]


def _step(spans: list[RowSpan], drawn: tuple[Row, ...], *, pending: int) -> tuple[StepRows, Draw]:
    """The first of the spans are drawn from; so many of the first rows go on from what the slot's last step drew."""
    positions = tuple(chain.from_iterable(range(span.start, span.start + span.count) for span in spans))
    ids = (*range(-1, -1 - pending, -1), *[0] * (len(positions) - pending))
    first = spans[: len(drawn)]
    ends = accumulate(span.count for span in first)
    step = StepRows(ids, positions, tuple(spans), tuple(end - 1 for end in ends))
    lengths, tables = zip(*((span.start + span.count, span.block_table) for span in first), strict=True)
    return step, Draw(drawn, lengths, tables)
