"""Steps that nobody asked for, run before the first request: what a step needs for the first time, they need.

Kernels that CUDA loads when they are first launched, pinned memory for as many steps as there may be in flight, the way
from GPU to GPU for as many rows as there may be: the host waits for each of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate

from deployments.engine.attention import RowSpan, positions_of
from deployments.engine.draw import Draw
from deployments.engine.sampling_batch import Row
from deployments.engine.stages import StepRows
from deployments.protocol import Sampling


def rehearsed(*, rows: int, sequences: int, length: int, scratch: int, vocab: int) -> Iterator[tuple[StepRows, Draw]]:
    """Two steps of a slot, of so many rows each: prompts, drawn from greedily; and what follows those that were drawn
    from, with all that sampling knows, beside prompts.

    Args:
        rows: of the largest step.
        sequences: that may decode in a step.
        length: tokens of a sequence; they fit in a block, and are as many as the model takes at most.
        scratch: the block that all of it is written to.
        vocab: width of the logits.
    """
    row = partial(Row, prompt_tokens=1, vocab_size=vocab)
    prompts = _prompts(rows, length, scratch)
    drawn = min(sequences, len(prompts))
    yield _step(prompts, (row(Sampling(max_tokens=2, seed=0, temperature=0.0)),) * drawn, pending=0)
    decodes = [RowSpan(length - 1, 1, (scratch,))] * drawn
    spans = [*decodes, *_prompts(rows - drawn, length, scratch)]
    yield _step(spans, (row(_everything(length, vocab)),) * drawn, pending=drawn)


def _everything(length: int, vocab: int) -> Sampling:
    """Asks for all that the sampler can do."""
    return Sampling(
        max_tokens=length + 1,
        seed=0,
        min_tokens=length,  # one more than were produced after a prompt of one: the end token is masked
        end_ids=(0,),
        temperature=0.8,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        logit_bias=((0, 1.0),),
        logprobs=min(5, vocab),
    )


def _prompts(rows: int, length: int, scratch: int) -> list[RowSpan]:
    """All as long as they can be, but for the last."""
    return [RowSpan(0, min(length, rows - start), (scratch,)) for start in range(0, rows, length)]


def _step(spans: list[RowSpan], drawn: tuple[Row, ...], *, pending: int) -> tuple[StepRows, Draw]:
    """The first of the spans are drawn from; so many of the first rows go on from what the slot's last step drew."""
    positions = positions_of(spans)
    ids = (*range(-1, -1 - pending, -1), *[0] * (len(positions) - pending))
    first = spans[: len(drawn)]
    ends = accumulate(span.count for span in first)
    step = StepRows(ids, positions, tuple(spans), tuple(end - 1 for end in ends))
    lengths, tables = zip(*((span.start + span.count, span.block_table) for span in first), strict=True)
    return step, Draw(drawn, lengths, tables)
