"""What a worker pod does before it ends, on a clock of our own."""

from __future__ import annotations

from collections.abc import Iterator

from deployments.drain import NodeState, look, request, wait


def test_a_node_is_known_by_its_processes() -> None:
    raylet = ["/x/ray/raylet", "--node_manager_port=0", "--node_id=ab12"]
    lines: Iterator[list[str]] = iter([[], raylet, ["ray::ServeReplica:app:pool"], ["ray::IDLE"], ["python", "raylet"]])
    assert look(lines) == NodeState("ab12", 1)
    assert look(iter([["python"]])) == NodeState(None, 0)


def test_the_request_names_node_and_deadline() -> None:
    command = request("ab12", 600)
    assert command[:4] == ["ray", "drain-node", "--node-id", "ab12"]
    assert command[-2:] == ["--deadline-remaining-seconds", "600"]


def waited(states: list[NodeState], limit_s: float) -> tuple[int, float]:
    now, seen = [0.0], iter(states)

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return wait(lambda: next(seen), limit_s, lambda: now[0], sleep), now[0]


def test_it_waits_for_the_last_replica() -> None:
    assert waited([NodeState("a", 2), NodeState("a", 1), NodeState("a", 0)], 60) == (0, 2.0)


def test_it_ends_with_the_node() -> None:
    assert waited([NodeState("a", 2), NodeState(None, 2)], 60) == (0, 1.0)


def test_at_the_deadline_it_says_what_is_left() -> None:
    assert waited([NodeState("a", 2)] * 10, 3) == (2, 3.0)
