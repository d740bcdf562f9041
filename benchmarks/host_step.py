"""What the host does in a decode step: `python -m benchmarks.host_step [--slots 4] [--sequences 64,256]`.

One thread drives all GPUs of a replica: while it prepares a step they wait, unless they have another one. This prints
how long it takes for steps in which every sequence decodes, without a GPU and without a model: the engine's own loop,
scheduler and blocks, rows and tables packed as for a GPU, ids read as from one. Nothing is launched, uploaded or
computed. CUDA's calls, the sampler's and the message to the replica come on top, so it is less than the host's whole
part of a step, and it does not tell how fast a model is.

Each part is without the parts that it calls. "The rest" is the loop between them, and what stands in for the GPUs. Of
several rounds the fastest is printed, in seconds of CPU time: on an idle machine they are those of the clock.
"""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from deployments.engine import attention_tables, inputs
from deployments.engine.attention import StepLayout
from deployments.engine.budget import Chunks
from deployments.engine.draw import Draw
from deployments.engine.flight import Flight
from deployments.engine.garbage import settle_garbage
from deployments.engine.loader import LoadedModel
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.sampler import Drawn
from deployments.engine.stages import StepRows
from deployments.protocol import GenerationRequest, Sampling
from placement.plan import Plan

PROMPT, STEPS, ROUNDS = 128, 16, 10
"""Tokens of a prompt; steps of a slot in a round, a block's worth; rounds."""
BLOCK, BLOCKS, VOCAB, DRAWN = 16, 2**17, 128_256, 5
END = 2
"""The token that would end a request, and is never drawn."""


class Clock:
    """Seconds by part, each without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time added to a part's."""

        def measured(*args: Any) -> Any:
            before, self._inside, began = self._inside, 0.0, process_time()
            result = function(*args)
            took = process_time() - began
            self.seconds[part] += took - self._inside
            self._inside = before + took
            return result

        return measured


class NoPipeline:
    """Prepares steps for a GPU that is not there, and draws the same token for each row.

    Args:
        slots: micro-batches in flight.
        clock: for the parts that are a pipeline's.
    """

    lookahead, busy_s, chunks = 1, (), Chunks.fixed(2048)

    def __init__(self, slots: int, clock: Clock) -> None:
        self.depth = slots
        self.rows = 0
        """Of the last step."""
        self._tables = np.zeros(2**20, np.int32)
        self._pack_rows = clock.timed("pack rows", _pack_rows)
        self._pack_tables = clock.timed("pack tables", attention_tables.pack)
        self._clock = clock

    def launch(self, slot: int, step: StepRows, draw: Draw) -> Any:
        """Pack the step; what comes of it is there at once."""
        del slot
        self.rows = len(step.ids)
        self._pack_rows(step)
        self._pack_tables(StepLayout(step.spans, BLOCK).padded(0), BLOCK, self._tables)
        ids = torch.full((len(draw.rows),), DRAWN)
        return _Landing(self._clock.timed("read", Flight(Drawn(ids, ids, (), None), None).result))

    def close(self) -> None:
        """There is nothing to let go of."""


class _Landing(NamedTuple):
    result: Callable[[], Any]


def _pack_rows(step: StepRows) -> None:
    inputs.pack(step, len(step.ids), BLOCK, 0, pinned=False)


def decoding(slots: int, sequences: int, clock: Clock) -> tuple[Engine, NoPipeline]:
    """An engine whose slots decode so many sequences each, its parts timed."""
    pipeline = NoPipeline(slots, clock)
    model = cast(LoadedModel, _Model(encodes=False, vocab_size=VOCAB))
    plan = cast(Plan, _Plan("m", "nf4", "bf16", "bf16", BLOCKS, BLOCK, max_context=BLOCKS * BLOCK))
    limits = EngineLimits(max_batch_tokens=2048, max_sequences=slots * sequences, prefix_cache=True, threads=1)
    engine: Any = Engine(model, plan, limits, pipeline)
    for i in range(slots * sequences):
        prompt = tuple((7 * i + j) % 1000 + 3 for j in range(PROMPT))
        sampling = Sampling(max_tokens=BLOCKS, seed=0, temperature=0.0, end_ids=(END,))
        engine.submit(GenerationRequest(f"completion-{i:08}-0-0", prompt, sampling))
    while not all(sequence.decodes for sequence in engine.scheduler._sequences.values()):
        engine.step()
    for part in ("_rows", "_draw", "_land"):
        setattr(engine, part, clock.timed(part[1:], getattr(engine, part)))
    for part in ("schedule", "complete"):
        setattr(engine.scheduler, part, clock.timed(part, getattr(engine.scheduler, part)))
    return engine, pipeline


class _Model(NamedTuple):
    encodes: bool
    vocab_size: int


class _Plan(NamedTuple):
    model: str
    quantization: str
    dtype: str
    kv_dtype: str
    num_blocks: int
    block_size: int
    max_context: int


def measure(slots: int, sequences: int, *, steps: int = STEPS, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of a slot's step by part, the longest first."""
    clock = Clock()
    engine, pipeline = decoding(slots, sequences, clock)
    for _ in range(4 * slots):
        engine.step()
    assert pipeline.rows == sequences, f"a step has {pipeline.rows} rows, expected {sequences}"
    settle_garbage()
    best: Counter[str] | None = None
    for _ in range(rounds):
        clock.seconds.clear()
        began = process_time()
        for _ in range(steps * slots):
            engine.step()
        took = process_time() - began
        clock.seconds["the rest"] = took - clock.seconds.total()
        if best is None or took < best.total():
            best = clock.seconds.copy()
    assert best is not None, "a round at least"
    return {part: seconds / (steps * slots) for part, seconds in best.most_common()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=4, help="as many as a replica has GPUs")
    parser.add_argument("--sequences", default="64,256", help="of a slot, several with commas")
    options = parser.parse_args(arguments)
    print(f"Python {platform.python_version()}")
    for sequences in map(int, options.sequences.split(",")):
        parts = measure(options.slots, sequences)
        whole = {f"{options.slots} slots of {sequences}": sum(parts.values()), **parts}
        for part, seconds in whole.items():
            print(f"{part:16} {1e6 * seconds:7.1f} us a step {1e6 * seconds / sequences:6.2f} us a sequence")


if __name__ == "__main__":
    main()
