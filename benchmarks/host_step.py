"""What the host does in a decode step: `python -m benchmarks.host_step [--slots 4] [--sequences 64,256]`.

One thread drives all GPUs of a replica: while it prepares a step they wait, unless they have another one. This prints
how long it takes for steps in which every sequence decodes, without a GPU and without a model: the engine's own loop,
scheduler and blocks, and the pipeline with its lanes, links, tables and draws. Streams, events and graphs are stand-ins
that do nothing, and copies are copies of the CPU's memory. What CUDA's calls take and the message to the replica come
on top, so it is less than the host's whole part of a step, and it does not tell how fast a model is.

Each part is without the parts that it calls, but with about a microsecond for each call that is timed. "The rest" is
the loop between them. Of several rounds the fastest is printed, in seconds of CPU time: on an idle machine they are
those of the clock.
"""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import process_time
from typing import Any, NamedTuple, cast
from unittest.mock import patch

from benchmarks.no_cuda import no_cuda, open_pipeline
from deployments.engine import attention_flashinfer, lane
from deployments.engine.flight import Flight
from deployments.engine.garbage import settle_garbage
from deployments.engine.loader import LoadedModel
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.protocol import GenerationRequest, Sampling
from placement.plan import Plan

PROMPT, STEPS, ROUNDS, CONTEXT = 128, 16, 10, 4096
"""Tokens of a prompt; steps of a slot in a round, a block's worth; rounds."""
BLOCK, BLOCKS, VOCAB = 16, 2**17, 4096
END = 2
"""The token that would end a request, and is never drawn."""


class Clock:
    """Seconds by part, each without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time added to a part's."""

        def measured(*args: Any, **options: Any) -> Any:
            before, self._inside, began = self._inside, 0.0, process_time()
            result = function(*args, **options)
            took = process_time() - began
            self.seconds[part] += took - self._inside
            self._inside = before + took
            return result

        return measured


def decoding(slots: int, sequences: int) -> Engine:
    """An engine whose slots decode so many sequences each; within `no_cuda`."""
    count = slots * sequences
    sizes = {"blocks": BLOCKS, "block_size": BLOCK, "vocab": VOCAB, "max_context": CONTEXT}
    pipeline = open_pipeline(slots, max_sequences=count, max_batch_tokens=2048, **sizes)
    model = cast(LoadedModel, _Model(encodes=False, vocab_size=VOCAB))
    plan = cast(Plan, _Plan("m", "nf4", "bf16", "bf16", BLOCKS, BLOCK, max_context=CONTEXT))
    limits = EngineLimits(max_batch_tokens=2048, max_sequences=count, prefix_cache=True, threads=1)
    engine = Engine(model, plan, limits, pipeline)
    for i in range(count):
        prompt = tuple((7 * i + j) % 1000 + 3 for j in range(PROMPT))
        sampling = Sampling(max_tokens=CONTEXT - PROMPT, seed=0, temperature=0.0, end_ids=(END,))
        engine.submit(GenerationRequest(f"completion-{i:08}-0-0", prompt, sampling))
    while not all(sequence.decodes for sequence in engine.scheduler._sequences.values()):
        engine.step()
    return engine


@contextmanager
def timed(engine: Engine, clock: Clock) -> Iterator[None]:
    """Within, the parts of the engine's steps are timed."""
    pipeline: Any = engine.pipeline
    lanes, links = pipeline._lanes, (*pipeline._links, *filter(None, [pipeline._returns]))
    parts = {
        "schedule": [(engine.scheduler, "schedule")],
        "rows": [(engine, "_rows")],
        "draw": [(engine, "_draw")],
        "launch": [(pipeline, "launch")],
        "lanes": [(each, "run") for each in lanes],
        "load": [(each, "_load") for each in lanes],
        "pack rows": [(lane, "pack")],
        "prepare": [(each.stage.attention, "prepare") for each in lanes],
        "pack tables": [(attention_flashinfer, "pack")],
        "links": [(link, name) for link in links for name in ("send", "receive", "release")],
        "greedy": [(lanes[-1], "likeliest"), (pipeline._draws, "launch_found")],
        "read": [(Flight, "result")],
        "land": [(engine, "_land")],
        "complete": [(engine.scheduler, "complete")],
    }
    with ExitStack() as patches:
        for part, places in parts.items():
            for owner, name in places:
                patches.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        yield


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
    best: Counter[str] | None = None
    with no_cuda():
        engine = decoding(slots, sequences)
        with timed(engine, clock):
            for _ in range(4 * slots):
                engine.step()
            settle_garbage()
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
