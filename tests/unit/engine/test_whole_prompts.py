"""Prompts that are computed in one step, as an encoder needs it."""

from __future__ import annotations

from deployments.engine.blocks import BlockManager
from deployments.engine.budget import Chunks
from deployments.engine.scheduler import Scheduler
from tests.unit.engine.test_scheduler import BLOCK, done, make, plan, prompt, shape


def test_a_prompt_is_never_cut_and_the_next_waits_for_a_step_with_room() -> None:
    scheduler = make(max_batch_tokens=24, max_sequences=4, whole_prompts=True)
    for name in "abc":
        scheduler.add(name, prompt(10), max_tokens=3)
    first = plan(scheduler)
    assert shape(first) == [("a", 0, 10), ("b", 0, 10)]
    done(scheduler, first)
    second = plan(scheduler)
    assert shape(second) == [("a", 10, 1), ("b", 10, 1), ("c", 0, 10)]
    done(scheduler, second)


def test_one_prompt_goes_beside_decodes_however_small_a_chunk_is() -> None:
    scheduler = make(max_batch_tokens=24, max_sequences=4, chunks=2, whole_prompts=True)
    scheduler.add("a", prompt(3), max_tokens=9)
    done(scheduler, plan(scheduler))
    for i, (name, before) in enumerate((("b", "a"), ("c", "ab"))):  # one at a time is no burst
        scheduler.add(name, prompt(10, 1000 * i + 1000), max_tokens=9)
        step = plan(scheduler)
        assert [item[2] for item in shape(step)] == [1] * len(before) + [10]
        assert [item[0] for item in shape(step)] == [*before, name]
        done(scheduler, step)


def test_a_preempted_sequence_is_computed_again_in_one_step() -> None:
    scheduler = Scheduler(
        BlockManager(7, BLOCK, prefix_cache=False),
        slots=1,
        max_batch_tokens=40,
        max_sequences=4,
        chunks=Chunks.fixed(1),
        lookahead=0,
        whole_prompts=True,
    )
    scheduler.add("a", prompt(10), max_tokens=12)
    scheduler.add("b", prompt(9, 1000), max_tokens=9)
    prefills = []
    while scheduler.has_work():
        step = plan(scheduler)
        prefills += [(name, start, tokens) for name, start, tokens in shape(step) if tokens > 1]
        done(scheduler, step)
        for name in [item.request_id for item in step.items]:
            if len(scheduler.sequence(name).output_ids) == scheduler.sequence(name).max_tokens:
                scheduler.finish(name)
    assert scheduler.preemptions > 0
    assert prefills[:2] == [("a", 0, 10), ("b", 0, 9)]
    again = prefills[2:]
    assert len(again) == scheduler.preemptions
    assert all(name == "b" and start == 0 and tokens > 9 for name, start, tokens in again)
