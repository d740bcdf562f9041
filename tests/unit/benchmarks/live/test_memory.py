from __future__ import annotations

import pytest

from benchmarks.live.memory import role_of, trend


@pytest.mark.parametrize(
    ("words", "role"),
    [
        (["ray::ServeReplica:headroom:ingress"], "ingress"),
        (["ray::ServeReplica:headroom:ledger-smol"], "ledger"),
        (["ray::ServeReplica:headroom:smol-default.generate"], "replica"),
        (["ray::ServeController"], "controller"),
        (["/usr/bin/python", "-m", "deployments.engine.process", "57"], "engine"),
        (["/a/b/haproxy", "-dS", "-f", "haproxy.cfg"], "haproxy"),
        (["/bin/sh", "/tmp/x/haproxy"], None),
        (["ray::IDLE"], None),
        ([], None),
    ],
)
def test_roles_by_command_line(words: list[str], role: str | None) -> None:
    assert role_of(words) == role


def test_a_line_has_its_slope_and_noise_around_it_does_not_change_it() -> None:
    its = trend([(t, 1000 + 2 * t) for t in range(101)])
    assert (its.first, its.last) == (1000, 1200)
    assert its.slope == pytest.approx(2.0)
    assert its.growth == pytest.approx(200 / 1100)
    noisy = trend([(t, 1000 + (50 if t % 2 else -50)) for t in range(100)])
    assert abs(noisy.growth) < 0.01


def test_one_sample_is_no_trend() -> None:
    with pytest.raises(ValueError, match="two samples at different times, there are 1"):
        trend([(0.0, 5)])
