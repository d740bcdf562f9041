from __future__ import annotations

from deployments.protocol import NO_CHANGE, CachedGranules
from deployments.routing.granule_log import MOST_OWED, GranuleLog


def told() -> GranuleLog:
    """A log of granules 1 (used) and 2 (idle), all acknowledged."""
    log = GranuleLog()
    assert log.note(CachedGranules(used=(1,), idle=(2,)))
    assert log.report(1) == CachedGranules(whole=True, used=(1,), idle=(2,))
    log.acknowledge(1)
    return log


def test_only_changes_follow_an_acknowledged_whole() -> None:
    log = told()
    assert log.report(2) == NO_CHANGE
    assert not log.note(NO_CHANGE)
    log.note(CachedGranules(used=(3,), idle=(1,), gone=(2,)))
    assert log.report(3) == CachedGranules(used=(3,), idle=(1,), gone=(2,))


def test_a_change_is_repeated_until_a_report_with_it_is_acknowledged() -> None:
    log = told()
    log.note(CachedGranules(used=(3,)))
    assert log.report(2).used == (3,)
    log.note(CachedGranules(used=(4,)))
    assert log.report(3).used == (3, 4)
    log.acknowledge(2)
    assert log.report(4).used == (4,)
    log.acknowledge(4)
    assert log.report(5) == NO_CHANGE


def test_what_changed_again_since_is_not_acknowledged() -> None:
    log = told()
    log.note(CachedGranules(used=(2,)))
    log.report(2)
    log.note(CachedGranules(gone=(2,)))
    log.acknowledge(2)
    assert log.report(3) == CachedGranules(gone=(2,))


def test_the_whole_is_owed_again_until_that_is_acknowledged() -> None:
    log = told()
    log.report(2)
    log.owe_all()
    log.acknowledge(2)  # of a report from before
    for sequence in (3, 4):
        assert log.report(sequence) == CachedGranules(whole=True, used=(1,), idle=(2,))
    log.acknowledge(3)
    assert log.report(5) == NO_CHANGE


def test_over_a_long_outage_the_whole_takes_the_place_of_all_changes() -> None:
    log = told()
    for granule in range(10, 3 * MOST_OWED):
        log.note(CachedGranules(used=(granule,)))
        log.note(CachedGranules(gone=(granule,)))
    assert log.report(2) == CachedGranules(whole=True, used=(1,), idle=(2,))
