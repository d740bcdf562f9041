from __future__ import annotations

from collections import Counter

from benchmarks.live.memory import Resident
from benchmarks.soak import QUEUE_LIMIT, Sample, Soak


def soaked(
    *, waiting: float = 3.0, held_at_end: float = 0.0, growth: int = 0, last_pid: int = 7, **outcomes: int
) -> Soak:
    def processes(second: int, pid: int = 7) -> tuple[Resident, ...]:
        return (Resident("ingress", 6, 50_000), Resident("ingress", pid, 50_000 + growth * second))

    samples = [Sample(float(t), processes(t), waiting, 7.0, 9.0) for t in range(100)]
    samples.append(Sample(100.0, processes(100, last_pid), 0.0, held_at_end, 0.0))
    return Soak(Counter({"served": 10, "refused": 2, "left": 3, **outcomes}), samples)


def test_a_clean_run_has_no_fault() -> None:
    assert soaked().faults(0.05) == []
    assert soaked(waiting=QUEUE_LIMIT).faults(0.05) == []


def test_each_fault_is_told_with_its_numbers() -> None:
    assert soaked(waiting=QUEUE_LIMIT + 1).faults(0.05) == [f"{QUEUE_LIMIT + 1} requests waited, and queue_limit is 32"]
    assert soaked(held_at_end=2.0).faults(0.05) == ["after all ended: 0 wait, 2 blocks held, 0 granted"]
    (idle,) = soaked(waiting=0.0).faults(0.05)
    assert idle.startswith("no request was ever seen to wait")
    assert soaked(ReadTimeout=1).faults(0.05) == ["requests ended otherwise: {'ReadTimeout': 1}"]
    (grew,) = soaked(growth=200).faults(0.05)
    assert grew.startswith("ingress grew by 8.7% in the second half")
    (died,) = soaked(last_pid=8).faults(0.05)
    assert died == "processes came or went, so that memory tells nothing: ingress"


def test_the_table_has_a_line_for_each_role() -> None:
    assert "ingress" in soaked(growth=200).table()
