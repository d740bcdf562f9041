from __future__ import annotations

from dataclasses import replace

from benchmarks.live.observer import Account, Look, Observer

FREE = Look("a", "small", 10, 0, 0, 0, 0, 0, 0, 0)


def test_each_way_of_being_over_capacity_is_counted_by_itself() -> None:
    looks = [
        replace(FREE, granted=10, held=3, charged=10, taken_up=2),
        replace(FREE, granted=9, held=10, charged=11, taken_up=3),  # one grew beyond its grant
        replace(FREE, granted=12, held=8, charged=12, taken_up=4, over_at_take_up=1, most_over=2),
        replace(FREE, held=11, charged=11, taken_up=4, over_at_take_up=1, most_over=2, preemptions=1),
        replace(FREE, replica_id="b", granted=5, charged=5, taken_up=7, preemptions=2),
    ]
    assert Account.of(looks) == Account(
        samples=5,
        replicas=2,
        taken_up=11,
        over_at_take_up=1,
        most_over=2,
        over_at_samples=3,
        granted_over=1,
        held_over=1,
        preemptions=3,
        peak_share=1.2,
    )


async def test_idle_is_when_all_were_seen_and_none_has_anything() -> None:
    observer = Observer()
    await observer.see(FREE)
    assert not await observer.idle(2)
    await observer.see(replace(FREE, replica_id="b", granted=1))
    assert not await observer.idle(2)
    await observer.see(replace(FREE, replica_id="b"))
    assert await observer.idle(2)
