from __future__ import annotations

from typing import Any

import pytest

from deployments.engine.blocks import BlockManager, IntegrityError
from deployments.engine.budget import Chunks
from deployments.engine.scheduler import Scheduler
from deployments.engine.sequence import TooLong
from deployments.engine.step import StepItem, StepPlan

BLOCK = 4


def make(num_blocks: int = 64, *, chunks: Chunks | int = 64, **limits: int) -> Scheduler:
    defaults = {"slots": 1, "max_batch_tokens": 64, "max_sequences": 64, "lookahead": 0}
    chunks = Chunks.fixed(chunks) if isinstance(chunks, int) else chunks
    return Scheduler(BlockManager(num_blocks, BLOCK), chunks=chunks, **(defaults | limits))


def prompt(length: int, first: int = 0) -> tuple[int, ...]:
    """Distinct prompts for distinct `first` (multiples of 1,000)."""
    return tuple(range(first, first + length))


def plan(scheduler: Scheduler, slot: int = 0) -> StepPlan:
    step = scheduler.schedule(slot)
    assert step is not None
    return step


def done(scheduler: Scheduler, step: StepPlan, token: int = 7) -> None:
    scheduler.complete(step, [token] * step.sampled)
    scheduler.check_integrity()


def shape(step: StepPlan) -> list[tuple[str, int, int]]:
    """(request, start, tokens) of each item."""
    return [(item.request_id, item.start, len(item.ids)) for item in step.items]


def test_one_request_from_prompt_to_end() -> None:
    scheduler = make()
    scheduler.add("a", (5, 6, 7, 8, 9), max_tokens=3)
    assert (scheduler.waiting, scheduler.running) == (1, 0)
    first = plan(scheduler)
    table = tuple(scheduler._blocks.table("a"))
    assert first.items == (StepItem("a", 0, (5, 6, 7, 8, 9), table, samples=True),)
    assert scheduler.sequence("a").in_flight
    done(scheduler, first, token=11)
    second = plan(scheduler)
    assert second.items == (StepItem("a", 5, (11,), table, samples=True),)
    assert second.step > first.step
    done(scheduler, second, token=12)
    assert scheduler.sequence("a").output_ids == [11, 12]
    assert list(scheduler.held()) == [("a", 2)]
    scheduler.finish("a")
    assert not scheduler.has_work()
    assert scheduler.schedule(0) is None
    scheduler.check_integrity()


def test_a_block_table_is_the_same_object_until_it_grows_or_is_another() -> None:
    """What is made of it for a step is found again by that."""
    scheduler = make(num_blocks=6)
    for i, tokens in enumerate((2, 2, 1)):  # the last has as many blocks when it comes back as when it gave way
        scheduler.add(str(i), prompt(tokens, 1000 * i), max_tokens=12)
    seen: list[tuple[int, ...]] = []
    while scheduler.has_work():
        step = plan(scheduler)
        for item in step.items:
            held = tuple(scheduler._blocks.table(item.request_id))
            assert item.block_table == held[: len(item.block_table)]
            assert len(item.block_table) == -(-item.end // BLOCK)
        seen.append(step.items[0].block_table)
        done(scheduler, step)
        for request_id in [item.request_id for item in step.items]:
            if len(scheduler.sequence(request_id).output_ids) == 12:
                scheduler.finish(request_id)
    assert scheduler.preemptions, "a table was lost, and another taken"
    assert seen[0] is seen[1] is seen[2]


def test_a_long_prompt_is_computed_in_chunks_and_samples_at_its_end_only() -> None:
    scheduler = make(max_batch_tokens=4)
    scheduler.add("a", prompt(10), max_tokens=2)
    seen = []
    for _ in range(4):
        step = plan(scheduler)
        seen.append((*shape(step)[0], step.items[0].samples, len(step.items[0].block_table)))
        done(scheduler, step)
    assert seen == [("a", 0, 4, False, 1), ("a", 4, 4, False, 2), ("a", 8, 2, True, 3), ("a", 10, 1, True, 3)]


def test_decodes_come_first_then_running_prefills_then_admissions() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add("decoding", prompt(2), max_tokens=9)
    done(scheduler, plan(scheduler))
    scheduler.add("long", prompt(12, 1000), max_tokens=9)
    scheduler.add("new", prompt(5, 2000), max_tokens=9)
    step = plan(scheduler)
    assert shape(step) == [("decoding", 2, 1), ("long", 0, 7)]
    done(scheduler, step)
    assert shape(plan(scheduler)) == [("decoding", 3, 1), ("long", 7, 5), ("new", 0, 2)]


def test_when_decodes_exceed_the_budget_they_take_turns() -> None:
    scheduler = make(max_batch_tokens=3)
    for name in "abc":
        scheduler.add(name, prompt(1, 1000 * ord(name)), max_tokens=9)
    done(scheduler, plan(scheduler))
    scheduler._max_batch_tokens = 2
    served = []
    for _ in range(6):
        step = plan(scheduler)
        served.append("".join(item.request_id for item in step.items))
        done(scheduler, step)
    assert served == ["ab", "ac", "bc", "ab", "ac", "bc"]


def test_nobody_is_admitted_while_decodes_fill_the_budget() -> None:
    scheduler = make(max_batch_tokens=2)
    for name in "abc":
        scheduler.add(name, prompt(1, 1000 * ord(name)), max_tokens=9)
    for _ in range(3):
        step = plan(scheduler)
        assert [item.request_id for item in step.items] == ["a", "b"]
        done(scheduler, step)
    scheduler.finish("a")
    assert [item.request_id for item in plan(scheduler).items] == ["b", "c"]


def test_a_slot_has_one_step_in_flight() -> None:
    scheduler = make()
    scheduler.add("a", prompt(3), max_tokens=9)
    step = plan(scheduler)
    scheduler.add("b", prompt(3, 1000), max_tokens=9)
    assert scheduler.schedule(0) is None
    done(scheduler, step)
    assert shape(plan(scheduler)) == [("a", 3, 1), ("b", 0, 3)]


def test_slots_are_filled_evenly() -> None:
    scheduler = make(slots=3)
    for index in range(7):
        scheduler.add(f"r{index}", prompt(3, 1000 * index), max_tokens=9)
    steps = [plan(scheduler, slot) for slot in range(3)]
    assert [len(step.items) for step in steps] == [3, 3, 1]
    scheduler.add("r7", prompt(3, 7000), max_tokens=9)
    for step in steps:
        done(scheduler, step)
    assert [len(plan(scheduler, slot).items) for slot in range(3)] == [3, 3, 2]


def test_a_lone_newcomer_goes_to_the_emptiest_slot() -> None:
    scheduler = make(slots=2)
    scheduler.add("a", prompt(3), max_tokens=9)
    done(scheduler, plan(scheduler, 0))
    scheduler.add("b", prompt(3, 1000), max_tokens=9)
    assert shape(plan(scheduler, 0)) == [("a", 3, 1)]
    assert shape(plan(scheduler, 1)) == [("b", 0, 3)]


def test_the_first_slot_does_not_take_every_block_from_the_others() -> None:
    scheduler = make(num_blocks=8, slots=2)
    for index in range(20):
        scheduler.add(f"r{index}", prompt(4, 1000 * index), max_tokens=4)
    assert len(plan(scheduler, 0).items) == 4
    assert len(plan(scheduler, 1).items) == 3  # one block stays free for growth


def test_no_more_than_max_sequences_run() -> None:
    scheduler = make(slots=2, max_sequences=3)
    for index in range(6):
        scheduler.add(f"r{index}", prompt(3, 1000 * index), max_tokens=9)
    assert [len(plan(scheduler, slot).items) for slot in range(2)] == [2, 1]
    assert (scheduler.running, scheduler.waiting) == (3, 3)


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    scheduler = make(num_blocks=4)
    scheduler.add("a", prompt(8), max_tokens=4)
    done(scheduler, plan(scheduler))
    scheduler.add("large", prompt(12, 1000), max_tokens=4)
    scheduler.add("small", prompt(1, 2000), max_tokens=1)
    assert shape(plan(scheduler)) == [("a", 8, 1)]
    assert list(scheduler.held()) == [("a", 3), ("large", 0), ("small", 0)]


def test_an_admission_leaves_one_block_to_those_that_run() -> None:
    scheduler = make(num_blocks=4)
    scheduler.add("a", prompt(3), max_tokens=8)
    scheduler.add("b", prompt(9, 1000), max_tokens=4)
    step = plan(scheduler)
    assert shape(step) == [("a", 0, 3)]  # a and b need all four blocks between them
    done(scheduler, step)
    scheduler.finish("a")
    assert shape(plan(scheduler)) == [("b", 0, 9)]


def test_alone_a_sequence_may_take_every_block() -> None:
    scheduler = make(num_blocks=4)
    scheduler.add("a", prompt(13), max_tokens=3)
    assert shape(plan(scheduler)) == [("a", 0, 13)]


def test_a_prefix_computed_by_one_is_not_computed_by_the_next() -> None:
    scheduler = make()
    scheduler.add("a", prompt(10), max_tokens=9)
    scheduler.add("too early", prompt(10), max_tokens=9)
    step = plan(scheduler)
    assert shape(step) == [("a", 0, 10), ("too early", 0, 10)]
    done(scheduler, step)
    scheduler.add("b", prompt(10), max_tokens=9)
    scheduler.add("other tenant", prompt(10), max_tokens=9, salt="t")
    assert shape(plan(scheduler))[2:] == [("b", 8, 2), ("other tenant", 0, 10)]
    assert scheduler.sequence("b").cached_tokens == 8
    assert scheduler.sequence("other tenant").cached_tokens == 0
    assert scheduler._blocks.table("a")[:2] == scheduler._blocks.table("b")[:2]


def test_a_prompt_that_fits_only_by_its_cached_prefix_is_admitted() -> None:
    scheduler = make(num_blocks=6)
    scheduler.add("a", prompt(13), max_tokens=3)
    done(scheduler, plan(scheduler))
    scheduler.add("b", prompt(13), max_tokens=3)  # four blocks, three of them shared; two are free
    assert shape(plan(scheduler)) == [("a", 13, 1), ("b", 12, 1)]


def squeezed() -> Scheduler:
    """Three sequences of one full block each in one slot, all decoding, with one block free."""
    scheduler = make(num_blocks=4)
    for index, name in enumerate("abc"):
        scheduler.add(name, prompt(4, 1000 * index), max_tokens=12)
    done(scheduler, plan(scheduler))
    return scheduler


def test_when_blocks_run_out_the_youngest_gives_way_and_is_recomputed() -> None:
    scheduler = squeezed()
    step = plan(scheduler)
    assert shape(step) == [("a", 4, 1), ("b", 4, 1)]  # a took the last block, b took c's
    c = scheduler.sequence("c")
    assert (c.state, c.preemptions, c.computed, scheduler.preemptions) == ("waiting", 1, 0, 1)
    done(scheduler, step)
    scheduler.add("d", prompt(1, 4000), max_tokens=1)
    assert shape(plan(scheduler)) == [("a", 5, 1), ("b", 5, 1)]
    scheduler.abort("a")
    scheduler.abort("b")
    scheduler.complete(scheduler._launched[0], [7, 7])
    step = plan(scheduler)
    # c before d, and all of c: b took the block that held its prompt.
    assert shape(step) == [("c", 0, 5), ("d", 0, 1)]
    assert step.items[0].ids == (*prompt(4, 2000), 7)
    assert step.items[0].samples


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=6)
    for index, name in enumerate("ab"):
        scheduler.add(name, prompt(8, 1000 * index), max_tokens=12)
    for _ in range(5):
        done(scheduler, plan(scheduler))
    step = plan(scheduler)
    assert shape(step) == [("a", 12, 1)]
    assert scheduler.sequence("b").preemptions == 1
    done(scheduler, step)
    scheduler.finish("a")
    assert shape(plan(scheduler)) == [("b", 8, 5)]
    assert scheduler.sequence("b").cached_tokens == 0  # of the first admission


def test_the_youngest_preempts_itself_and_never_an_older_one() -> None:
    scheduler = make(num_blocks=3)
    scheduler.add("a", prompt(5), max_tokens=7)
    done(scheduler, plan(scheduler))
    scheduler.add("b", prompt(1, 1000), max_tokens=2)
    assert shape(plan(scheduler)) == [("a", 5, 1)]  # b needs a spare block: not admitted
    scheduler = make(num_blocks=4)
    scheduler.add("a", prompt(5), max_tokens=7)
    scheduler.add("b", prompt(4, 1000), max_tokens=8)
    done(scheduler, plan(scheduler))
    for _ in range(4):
        done(scheduler, plan(scheduler))  # b takes the last block, then a wants it
    assert scheduler.sequence("a").preemptions == 0
    assert scheduler.sequence("b").preemptions == 1


def test_an_older_sequence_waits_for_a_younger_one_in_flight() -> None:
    scheduler = make(num_blocks=3, slots=2)
    scheduler.add("old", prompt(4), max_tokens=8)
    scheduler.add("young", prompt(4, 1000), max_tokens=8)
    first, second = plan(scheduler, 0), plan(scheduler, 1)
    done(scheduler, first)
    done(scheduler, second)
    young = plan(scheduler, 1)  # takes the last block
    assert shape(young) == [("young", 4, 1)]
    assert scheduler.schedule(0) is None
    assert scheduler.sequence("old").state == "running"
    assert scheduler.preemptions == 0
    done(scheduler, young)
    assert shape(plan(scheduler, 0)) == [("old", 4, 1)]
    assert scheduler.sequence("young").state == "waiting"


def test_preempted_sequences_wait_in_order_of_arrival() -> None:
    scheduler = make(num_blocks=5, slots=2)
    for index, name in enumerate("abc"):
        scheduler.add(name, prompt(4, 1000 * index), max_tokens=12)
    steps = [plan(scheduler, 0), plan(scheduler, 1)]
    assert [shape(step) for step in steps] == [[("a", 0, 4), ("b", 0, 4)], [("c", 0, 4)]]
    for step in steps:
        done(scheduler, step)
    scheduler.add("d", prompt(4, 3000), max_tokens=12)
    young = plan(scheduler, 1)
    assert shape(young) == [("c", 4, 1)]
    old = plan(scheduler, 0)
    assert shape(old) == [("a", 4, 1)]  # the last block; b waits in its slot for c
    assert scheduler.preemptions == 0
    done(scheduler, young)
    assert scheduler.schedule(1) is None  # c would go on, but gives way to b
    done(scheduler, old)
    for position in range(5, 9):
        old = plan(scheduler, 0)
        assert shape(old) == [("a", position, 1), ("b", position - 1, 1)]
        done(scheduler, old)
    assert [s.request_id for s in scheduler._queues.waiting] == ["c", "d"]
    assert shape(plan(scheduler, 0)) == [("a", 9, 1)]  # b needs a third block, and is the youngest itself
    assert [s.request_id for s in scheduler._queues.waiting] == ["b", "c", "d"]
    assert scheduler.preemptions == 2


def test_abort_frees_at_once_what_no_step_names() -> None:
    scheduler = make()
    scheduler.add("a", prompt(5), max_tokens=9)
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    scheduler.add("b", prompt(5), max_tokens=9)
    done(scheduler, plan(scheduler))
    assert scheduler.abort("b")
    assert scheduler._blocks.held_blocks == 0
    assert not scheduler.has_work()
    assert not scheduler.abort("never seen")
    scheduler.check_integrity()


def test_abort_in_flight_frees_when_the_step_completes() -> None:
    scheduler = make()
    scheduler.add("a", prompt(5), max_tokens=9)
    scheduler.add("b", prompt(5, 1000), max_tokens=9)
    step = plan(scheduler)
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert scheduler._blocks.held("a") == 2
    assert scheduler.running == 1
    assert list(scheduler.held()) == [("b", 2)]
    with pytest.raises(ValueError, match="request id a is in use"):
        scheduler.add("a", prompt(5), max_tokens=9)
    scheduler.check_integrity()
    scheduler.complete(step, [7, 7])
    assert scheduler._blocks.held("a") == 0
    with pytest.raises(KeyError):
        scheduler.sequence("a")
    scheduler.check_integrity()
    scheduler.add("a", prompt(5), max_tokens=9)
    assert shape(plan(scheduler)) == [("b", 5, 1), ("a", 4, 1)]  # its KV was written and is found


def test_what_a_spoiled_request_wrote_is_not_cached() -> None:
    scheduler = make()
    for index, name in enumerate("ab"):
        scheduler.add(name, prompt(5, 1000 * index), max_tokens=9)
    scheduler.complete(plan(scheduler), [7, 7], ["a"])
    scheduler.finish("a")
    scheduler.check_integrity()
    assert [scheduler._blocks.match_prefix(prompt(5, 1000 * index), "") for index in range(2)] == [0, 4]
    assert list(scheduler.held()) == [("b", 2)]


def test_complete_refuses_what_does_not_match_and_changes_nothing() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add("a", prompt(3), max_tokens=9)
    scheduler.add("chunked", prompt(9, 1000), max_tokens=9)
    step = plan(scheduler)
    for tokens in ([], [1, 2]):
        with pytest.raises(ValueError, match=f"step 1 of slot 0 samples 1 tokens, got {len(tokens)}"):
            scheduler.complete(step, tokens)
        scheduler.check_integrity()
    done(scheduler, step)
    with pytest.raises(ValueError, match="is not the oldest in flight"):
        scheduler.complete(step, [1])


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    scheduler = make(num_blocks=3)
    with pytest.raises(TooLong, match=r"needs 13 tokens of KV cache .* the replica has 12") as caught:
        scheduler.add("a", prompt(8), max_tokens=5)
    assert (caught.value.need, caught.value.have) == (13, 12)
    assert isinstance(caught.value, ValueError)
    scheduler.add("a", prompt(8), max_tokens=4)
    for _ in range(4):
        done(scheduler, plan(scheduler))
    assert scheduler.preemptions == 0
    assert len(scheduler.sequence("a").output_ids) == 4


def test_a_sequence_with_all_its_tokens_must_be_finished_before_the_next_step() -> None:
    scheduler = make()
    scheduler.add("a", prompt(3), max_tokens=1)
    done(scheduler, plan(scheduler))
    with pytest.raises(RuntimeError, match="request a has its 1 tokens"):
        scheduler.schedule(0)
    scheduler.finish("a")
    assert scheduler.schedule(0) is None
    with pytest.raises(KeyError):
        scheduler.finish("a")


@pytest.mark.parametrize(
    ("request_id", "ids", "max_tokens", "message"),
    [("a", (1,), 1, "in use"), ("b", (), 1, "0 prompt tokens"), ("b", (1,), 0, "max_tokens=0")],
)
def test_add_refuses_bad_requests(request_id: str, ids: tuple[int, ...], max_tokens: int, message: str) -> None:
    scheduler = make()
    scheduler.add("a", (1,), max_tokens=1)
    with pytest.raises(ValueError, match=message):
        scheduler.add(request_id, ids, max_tokens=max_tokens)
    assert scheduler.waiting == 1


@pytest.mark.parametrize("limit", ["slots", "max_batch_tokens", "max_sequences"])
def test_limits_below_one_are_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit}=0"):
        make(**{limit: 0})


def test_check_integrity_finds_each_kind_of_damage() -> None:
    def forgotten_flight(scheduler: Scheduler) -> None:
        scheduler.sequence("a").in_flight = False

    def forgotten_table(scheduler: Scheduler) -> None:
        scheduler._blocks.close("a")

    def lost_from_queue(scheduler: Scheduler) -> None:
        scheduler._queues.waiting.clear()

    def slot_of_a_waiting_one(scheduler: Scheduler) -> None:
        scheduler.sequence("c").slot = 0

    def out_of_order(scheduler: Scheduler) -> None:
        scheduler.add("d", prompt(1), max_tokens=1)
        scheduler._queues.waiting.reverse()

    def wrong_slot(scheduler: Scheduler) -> None:
        scheduler.sequence("a").slot = 1

    def forgotten_sequences(scheduler: Scheduler) -> None:
        scheduler._sequences.clear()

    expected: dict[Any, str] = {
        forgotten_flight: "sequences in flight differ",
        forgotten_table: "block tables differ",
        lost_from_queue: "queues differ",
        slot_of_a_waiting_one: "a waiting sequence has a slot",
        out_of_order: "not in order of arrival",
        wrong_slot: "another slot than it says",
        forgotten_sequences: "held while idle",
    }
    for damage, message in expected.items():
        scheduler = make(slots=2, max_sequences=2)
        for index, name in enumerate("abc"):
            scheduler.add(name, prompt(5, 1000 * index), max_tokens=9)
        plan(scheduler, 0), plan(scheduler, 1)
        scheduler.check_integrity()
        damage(scheduler)
        with pytest.raises(IntegrityError, match=message):
            scheduler.check_integrity()
