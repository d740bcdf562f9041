"""Steps scheduled while the one before is in flight, and prompts that share steps with decodes."""

from __future__ import annotations

import pytest

from deployments.engine.budget import Chunks
from deployments.engine.scheduler import Scheduler
from deployments.engine.step import StepPlan
from tests.unit.engine.test_scheduler import done, make, plan, prompt, shape


def ahead(num_blocks: int = 64, **limits: int) -> Scheduler:
    return make(num_blocks, lookahead=1, **limits)


def fed(step: StepPlan) -> list[tuple[int, ...]]:
    return [item.ids for item in step.items]


def test_the_next_step_feeds_what_the_host_has_not_read() -> None:
    scheduler = ahead()
    scheduler.add("a", prompt(3), max_tokens=9)
    first, second = plan(scheduler), plan(scheduler)
    assert (shape(first), shape(second)) == ([("a", 0, 3)], [("a", 3, 1)])
    assert fed(second) == [(-1,)]
    assert second.items[0].samples
    assert scheduler.schedule(0) is None, "a third would feed what no step has drawn"
    done(scheduler, first, token=11)
    assert scheduler.sequence("a").output_ids == [11]
    third = plan(scheduler)
    assert (shape(third), fed(third)) == ([("a", 4, 1)], [(-1,)])
    done(scheduler, second, token=12)
    done(scheduler, third, token=13)
    assert fed(plan(scheduler)) == [(13,)], "all of it was read"


def test_pending_ids_name_the_rows_that_sample() -> None:
    scheduler = ahead(max_batch_tokens=8)
    for index, name in enumerate("ab"):
        scheduler.add(name, prompt(1, 1000 * index), max_tokens=9)
    scheduler.add("long", prompt(20, 2000), max_tokens=9)
    first, second = plan(scheduler), plan(scheduler)
    assert shape(first) == [("a", 0, 1), ("b", 0, 1), ("long", 0, 6)]
    assert fed(second)[:2] == [(-1,), (-2,)]
    scheduler.abort("a")
    done(scheduler, first)
    third = plan(scheduler)
    assert fed(third)[0] == (-2,), "b was the second sampled row of the step before, a's being there still"


def test_a_token_read_meanwhile_is_fed_by_its_id() -> None:
    scheduler = ahead(max_batch_tokens=3)
    for index, name in enumerate("abc"):
        scheduler.add(name, prompt(1, 1000 * index), max_tokens=9)
    first = plan(scheduler)
    scheduler._max_batch_tokens = 2
    second = plan(scheduler)
    assert fed(second) == [(-1,), (-2,)], "no budget for c"
    done(scheduler, first, token=7)
    third = plan(scheduler)
    assert shape(third) == [("a", 2, 1), ("c", 1, 1)]
    assert fed(third) == [(-1,), (7,)]


def test_nothing_is_launched_past_max_tokens() -> None:
    scheduler = ahead()
    scheduler.add("a", prompt(3), max_tokens=2)
    first, second = plan(scheduler), plan(scheduler)
    done(scheduler, first)
    assert scheduler.schedule(0) is None
    done(scheduler, second)
    with pytest.raises(RuntimeError, match="finish it"):
        scheduler.schedule(0)
    scheduler.finish("a")
    assert not scheduler.has_work()


def test_blocks_stay_held_until_the_last_step_has_landed() -> None:
    scheduler = ahead()
    scheduler.add("a", prompt(4), max_tokens=9)
    first, second = plan(scheduler), plan(scheduler)
    done(scheduler, first, token=11)
    scheduler.finish("a")  # 11 is an end token
    assert scheduler.has_work()
    assert scheduler._blocks.held("a") == 2
    assert list(scheduler.held()) == []
    assert scheduler.schedule(0) is None
    scheduler.complete(second, [7])
    scheduler.check_integrity()
    assert not scheduler.has_work()
    assert scheduler._blocks.held_blocks == 0


def test_an_abort_waits_for_all_steps_that_name_it() -> None:
    scheduler = ahead()
    scheduler.add("a", prompt(4), max_tokens=9)
    first, second = plan(scheduler), plan(scheduler)
    scheduler.abort("a")
    scheduler.complete(first, [7])
    assert scheduler._blocks.held("a") == 2
    scheduler.check_integrity()
    scheduler.complete(second, [3])
    assert scheduler._blocks.held_blocks == 0
    assert scheduler._blocks.match_prefix(prompt(5), "") == 4


def test_a_block_is_offered_to_the_prefix_cache_once_its_ids_are_known() -> None:
    scheduler = ahead()
    scheduler.add("a", prompt(3), max_tokens=9)
    first, second = plan(scheduler), plan(scheduler)
    done(scheduler, first, token=11)
    assert scheduler._blocks.match_prefix((*prompt(3), 11, 0), "") == 0, "the fourth is not written yet"
    done(scheduler, second)
    assert scheduler._blocks.match_prefix((*prompt(3), 11, 0), "") == 4


def test_an_overrun_is_not_offered_to_the_prefix_cache() -> None:
    scheduler = ahead()
    scheduler.add("a", prompt(7), max_tokens=9)
    first, second = plan(scheduler), plan(scheduler)
    scheduler.abort("a")
    scheduler.complete(first, [7])
    scheduler.complete(second, [3])  # it wrote the eighth token, whose id the scheduler never learnt
    assert scheduler._blocks.match_prefix((*prompt(7), 3, 0), "") == 4


def test_chunks_of_a_prompt_follow_each_other_into_the_pipeline() -> None:
    scheduler = ahead(max_batch_tokens=4)
    scheduler.add("a", prompt(10), max_tokens=9)
    steps = [plan(scheduler), plan(scheduler)]
    assert [shape(step) for step in steps] == [[("a", 0, 4)], [("a", 4, 4)]]
    done(scheduler, steps[0])
    last = plan(scheduler)
    assert shape(last) == [("a", 8, 2)]
    assert last.items[0].samples


@pytest.mark.parametrize("lookahead", [0, 1])
def test_idle_slots_take_a_prompt_s_next_chunks_but_its_last(lookahead: int) -> None:
    scheduler = make(slots=3, max_batch_tokens=4, lookahead=lookahead)
    scheduler.add("a", prompt(10), max_tokens=9)
    steps = [plan(scheduler, slot) for slot in range(3)]
    assert [shape(step) for step in steps] == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 1)]]
    assert not any(item.samples for step in steps for item in step.items)
    assert scheduler.sequence("a").in_flight == 3
    if not lookahead:
        done(scheduler, steps.pop(0))
    last = plan(scheduler, 0)
    assert (shape(last), last.items[0].samples) == ([("a", 9, 1)], True)
    for step in [*steps, last]:
        done(scheduler, step)
    assert scheduler._blocks.match_prefix(prompt(10), "") == 8


def test_new_prompts_come_before_others_chunks() -> None:
    scheduler = make(slots=2, max_batch_tokens=8)
    scheduler.add("long", prompt(40), max_tokens=9)
    scheduler.add("short", prompt(3, 1000), max_tokens=9)
    assert shape(plan(scheduler, 0)) == [("long", 0, 8)]
    assert shape(plan(scheduler, 1)) == [("short", 0, 3), ("long", 8, 5)]


def test_while_others_decode_a_prompt_advances_by_chunks() -> None:
    scheduler = make(slots=2, chunks=6)
    scheduler.add("a", prompt(3), max_tokens=9)
    scheduler.add("b", prompt(3, 1000), max_tokens=9)
    steps = [plan(scheduler, 0), plan(scheduler, 1)]
    scheduler.add("long", prompt(40, 2000), max_tokens=9)
    done(scheduler, steps[0])
    assert shape(plan(scheduler, 0)) == [("a", 3, 1), ("long", 0, 6)]
    done(scheduler, steps[1])
    assert shape(plan(scheduler, 1)) == [("b", 3, 1), ("long", 6, 6)], "a guest: its budget is the chunk as well"


def test_a_chunk_is_as_large_as_suits_those_that_decode_in_its_step() -> None:
    scheduler = make(slots=2, chunks=Chunks(((1, 2), (2, 4)), ((7, 5), (11, 10)), 0, 1))
    for i, name in enumerate("abc"):
        scheduler.add(name, prompt(3, 1000 * i), max_tokens=9)
    steps = [plan(scheduler, 0), plan(scheduler, 1)]
    assert [shape(step) for step in steps] == [[("a", 0, 3), ("b", 0, 3)], [("c", 0, 3)]]
    scheduler.add("long", prompt(40, 9000), max_tokens=9)
    done(scheduler, steps[0])
    done(scheduler, steps[1])
    assert shape(plan(scheduler, 1)) == [("c", 3, 1), ("long", 0, 6)]
    assert shape(plan(scheduler, 0)) == [("a", 3, 1), ("b", 3, 1), ("long", 6, 9)], "two decode in this slot"


def test_a_chunk_is_larger_beside_decodes_with_long_contexts() -> None:
    """2.5 times 2 us for the decode, and 1.5 times what its context takes, a us a token: 11, 12 and 14 us."""
    scheduler = make(lookahead=1, chunks=Chunks(((1, 2),), ((7, 11), (9, 12), (11, 14), (13, 99)), 10**6, 1))
    scheduler.add("a", prompt(3), max_tokens=9)
    steps = [plan(scheduler)]
    scheduler.add("long", prompt(40, 9000), max_tokens=9)
    for start, chunk in ((3, 6), (4, 8), (5, 10)):
        steps.append(plan(scheduler))
        assert shape(steps[-1])[0] == ("a", start, 1), "a token that is drawn but not read counts"
        assert shape(steps[-1])[1][2] == chunk
        done(scheduler, steps.pop(0))


def test_the_youngest_in_flight_gives_way_when_it_has_landed() -> None:
    scheduler = ahead(num_blocks=4)
    for index, (name, length) in enumerate({"old": 4, "middle": 4, "young": 1}.items()):
        scheduler.add(name, prompt(length, 1000 * index), max_tokens=8)
    first = plan(scheduler)
    second = plan(scheduler)
    assert shape(second) == [("old", 4, 1)]  # it took the last block; young is held back for middle
    assert scheduler.preemptions == 0
    scheduler.check_integrity()
    done(scheduler, first)
    assert shape(plan(scheduler)) == [("old", 5, 1), ("middle", 4, 1)]
    assert scheduler.sequence("young").state == "waiting"


def test_who_was_held_back_goes_on_when_blocks_come_free_otherwise() -> None:
    scheduler = ahead(num_blocks=4)
    for index, (name, length) in enumerate({"old": 4, "middle": 4, "young": 1}.items()):
        scheduler.add(name, prompt(length, 1000 * index), max_tokens=8)
    first, second = plan(scheduler), plan(scheduler)
    scheduler.abort("old")
    scheduler.complete(first, [7, 7, 7])
    assert shape(plan(scheduler)) == [("young", 1, 1)], "old's blocks are about to come free, and do for middle"
    scheduler.complete(second, [7])
    assert shape(plan(scheduler)) == [("middle", 4, 1), ("young", 2, 1)]
    assert scheduler.preemptions == 0


def test_the_youngest_waits_for_its_own_step_before_it_gives_way_itself() -> None:
    scheduler = ahead(num_blocks=3)
    for index, name in enumerate(("old", "young")):
        scheduler.add(name, prompt(3, 1000 * index), max_tokens=8)
    first, second = plan(scheduler), plan(scheduler)
    done(scheduler, first)
    third = plan(scheduler)
    assert shape(third) == [("old", 4, 1)]  # with the last block
    assert scheduler.preemptions == 0
    done(scheduler, second)
    assert shape(plan(scheduler)) == [("old", 5, 1)]
    assert scheduler.sequence("young").state == "waiting"
    assert scheduler.sequence("young").output_ids == [7, 7]


def test_nobody_is_admitted_while_an_older_one_waits_for_a_block() -> None:
    scheduler = make(num_blocks=4, slots=2)
    scheduler.add("old", prompt(4), max_tokens=8)
    scheduler.add("young", prompt(5, 1000), max_tokens=8)
    for step in [plan(scheduler, 0), plan(scheduler, 1)]:
        done(scheduler, step)
    for _ in range(4):
        done(scheduler, plan(scheduler, 0))
    scheduler.add("new", prompt(1, 2000), max_tokens=1)
    young = plan(scheduler, 1)
    assert scheduler.schedule(0) is None, "old needs a third block"
    scheduler.abort("young")
    scheduler.complete(young, [7])
    assert scheduler._blocks.free_blocks == 2
    assert scheduler.schedule(1) is None, "new would fit, and is not admitted"
    assert shape(plan(scheduler, 0)) == [("old", 8, 1)]


def test_nobody_takes_the_block_that_an_older_one_waits_for() -> None:
    scheduler = make(num_blocks=5, slots=2)
    for index, (name, length) in enumerate({"old": 4, "other": 4, "taker": 4, "young": 1}.items()):
        scheduler.add(name, prompt(length, 1000 * index), max_tokens=8)
    for step in [plan(scheduler, 0), plan(scheduler, 1)]:
        done(scheduler, step)
    step = plan(scheduler, 1)
    assert shape(step) == [("taker", 4, 1), ("young", 1, 1)]
    assert scheduler.schedule(0) is None, "old needs a second block, and so does other"
    done(scheduler, step)
    for position in range(5, 8):
        step = plan(scheduler, 1)
        assert shape(step) == [("taker", position, 1)], "young is held back"
        done(scheduler, step)
    scheduler.abort("other")
    assert scheduler._blocks.free_blocks == 1
    assert scheduler.schedule(1) is None, "taker needs a third block"
    assert shape(plan(scheduler, 0)) == [("old", 4, 1)]


def test_a_prompt_in_chunks_is_held_back_as_well() -> None:
    scheduler = ahead(num_blocks=5, max_batch_tokens=8, chunks=1)
    scheduler.add("old", prompt(4), max_tokens=8)
    scheduler.add("young", prompt(12, 1000), max_tokens=8)
    steps = [plan(scheduler), plan(scheduler)]
    for position in range(5, 8):
        done(scheduler, steps.pop(0))
        steps.append(plan(scheduler))
        assert shape(steps[-1]) == [("old", position, 1), ("young", position, 1)]
    done(scheduler, steps.pop(0))
    assert scheduler.schedule(0) is None, "old needs a third block"
    done(scheduler, steps.pop(0))
    assert shape(plan(scheduler)) == [("old", 8, 1)]
    assert scheduler.sequence("young").preemptions == 1


def test_what_follows_a_spoiled_step_is_not_cached_either() -> None:
    scheduler = ahead()
    scheduler.add("a", prompt(7), max_tokens=9)
    first, second = plan(scheduler), plan(scheduler)
    scheduler.complete(first, [7], ["a"])
    scheduler.finish("a")
    scheduler.check_integrity()
    assert scheduler._blocks.held("a") == 2, "the token that fills the second block is being written"
    scheduler.complete(second, [7])
    assert scheduler._blocks.held_blocks == scheduler._blocks.cached_blocks == 0
    assert not scheduler.has_work()


def test_steps_complete_in_launch_order() -> None:
    scheduler = ahead()
    scheduler.add("a", prompt(4), max_tokens=9)
    plan(scheduler)
    second = plan(scheduler)
    with pytest.raises(ValueError, match="step 2 of slot 0 is not the oldest in flight"):
        scheduler.complete(second, [7])


def test_lookahead_is_one_step_at_most() -> None:
    with pytest.raises(ValueError, match="lookahead=2 must be 0 or 1"):
        make(lookahead=2)
