from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray.serve._private.autoscaling_state import _apply_autoscaling_config, _resolve_policy_callable
from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.protocol import Grant
from deployments.routing.admission import Admission
from deployments.routing.autoscaling import CAPACITY, HELD, WAITING, autoscaling_config, desired_replicas
from deployments.routing.reports import ReportSender


def desired(target: int, held: int, waiting: int = 0, running: int | None = None) -> int:
    """Replicas of 1,000 tokens; 80 % of them are to be in use, and 60 % at least."""
    return desired_replicas(
        target=target,
        running=target if running is None else running,
        held_tokens=held,
        waiting_tokens=waiting,
        replica_tokens=1000,
        target_percent=80,
        slack_percent=20,
    )


@pytest.mark.parametrize(
    ("target", "held", "waiting", "expected"),
    [
        (1, 0, 0, 0),
        (1, 1, 0, 1),
        (1, 800, 0, 1),
        (1, 801, 0, 2),
        (2, 801, 0, 2),
        (2, 601, 0, 2),  # on one replica it would be over 60 %
        (2, 600, 0, 1),
        (4, 1200, 0, 2),
        (1, 800, 2400, 4),
        (3, -5, 0, 0),  # grants that share may be charged less than nothing for a moment
    ],
)
def test_grows_above_the_target_and_shrinks_below_the_slack(
    target: int, held: int, waiting: int, expected: int
) -> None:
    assert desired(target, held, waiting) == expected


def test_who_waits_gets_one_replica_more_than_run_even_where_there_is_room_in_all() -> None:
    assert desired(2, 800, 700) == 3  # 75 % of both, and no single one has room for 700
    assert desired(3, 800, 700, running=2) == 3, "the one that starts is the one more"


CONFIG: dict[str, Any] = {
    "min_replicas": 0,
    "max_replicas": 9,
    "target_percent": 80,
    "slack_percent": 20,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "downscale_to_zero_delay_s": None,
}


def context(
    config: AutoscalingConfig, told: dict[str, dict[str, list[int]]], *, target: int, running: int, queued: int = 0
) -> AutoscalingContext:
    """What Serve passes: metric -> replica -> values, each a second after the one before."""
    series = {
        name: {replica: [TimeStampedValue(float(k), v) for k, v in enumerate(values)] for replica, values in of.items()}
        for name, of in told.items()
    }
    return AutoscalingContext(
        deployment_id=DeploymentID("pool"),
        deployment_name="pool",
        app_name="app",
        current_num_replicas=running,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=queued,
        total_queued_requests=queued,
        aggregated_metrics={},
        raw_metrics=series,  # type: ignore[arg-type]  # plain names for replica ids
        capacity_adjusted_min_replicas=config.min_replicas,
        capacity_adjusted_max_replicas=config.max_replicas,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=config,
    )


def decided(told: dict[str, dict[str, list[int]]], *, target: int, running: int, queued: int = 0) -> int:
    """By the policy as Serve's controller gets and wraps it."""
    config = autoscaling_config(**CONFIG)
    policy = _apply_autoscaling_config(_resolve_policy_callable(config.policy))
    return policy(context(config, told, target=target, running=running, queued=queued))[0]


def test_the_policy_sums_what_replicas_hold_and_takes_the_newest_word_of_what_waits() -> None:
    told = {
        HELD: {"a": [0, 700], "b": [900, 800]},
        CAPACITY: {"a": [1000, 1000], "b": [1000, 1000]},
        WAITING: {"a": [0], "b": [0, 2400]},
    }
    assert decided(told, target=2, running=2) == 5  # 1,500 held and 2,400 waiting over 800 each
    told[WAITING] = {"a": [0, 0, 0], "b": [0, 2400]}
    assert decided(told, target=2, running=2) == 2


def test_without_a_word_the_number_stays_while_some_run() -> None:
    assert decided({}, target=3, running=2) == 3
    assert decided({CAPACITY: {"a": []}}, target=3, running=2) == 3
    assert decided({}, target=1, running=0) == 0, "nobody wants the replica that is being started any more"
    assert decided({}, target=0, running=0, queued=2) == 1, "calls that wait at the ingresses start the first one"


def test_the_policy_travels_without_our_packages(tmp_path: Path) -> None:
    pickled = tmp_path / "policy"
    pickled.write_bytes(autoscaling_config(**CONFIG).policy.get_serialized_policy_def())
    script = (
        "import sys; from pathlib import Path; from ray import cloudpickle\n"
        f"policy = cloudpickle.loads(Path({str(pickled)!r}).read_bytes())(80, 20)\n"
        "print(policy.__call__.__name__, any(name.startswith('deployments.') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.split() == ["__call__", "False"], done.stderr


def test_a_replica_tells_what_it_holds_and_can_hold() -> None:
    own = Admission(replica_id="r0", pool="p", epoch=1, block_size=16, capacity_blocks=10, max_context=160)
    own.take_up(Grant("g", "q", "p", "r0", 1, 7, 3, 1e12, shared_blocks=1), 0.0)
    own.hold("g", 5)
    own.share(1)
    sender = ReportSender(own, Mock())
    assert sender.demand() == {HELD: 64, CAPACITY: 160, WAITING: 0}
