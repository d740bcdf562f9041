"""`python -m deployments.drain --deadline SECONDS`: what a worker pod does before it ends (its preStop hook).

It tells Ray that this node goes away; Serve then starts replacements for its replicas elsewhere and lets these finish
what runs. It returns when none is left on this node, when the node is gone, or at the deadline, by which Serve has
stopped them anyway.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

LOOK_S = 1.0
_RAYLET = "raylet"
_REPLICA = "ray::ServeReplica:"
_NODE_ID = "--node_id="
_ASK_S = 60
"""Longest that Ray's head may take to answer."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """What runs in this pod."""

    node_id: str | None
    """Ray's, hexadecimal; None where its daemon doesn't run."""
    replicas: int


def main(argv: Sequence[str] | None = None) -> int:
    """Drain this node; 0 when no replica is left on it, 1 when some is at the deadline or Ray refused."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.drain", description="What a worker pod does before it ends."
    )
    parser.add_argument("--deadline", type=int, required=True, metavar="SECONDS", help="for the replicas to move away")
    deadline_s: int = parser.parse_args(argv).deadline
    begun = time.monotonic()
    node = look(_command_lines())
    if node.node_id is None:
        return 0
    asked = subprocess.run(request(node.node_id, deadline_s), timeout=_ASK_S, check=False)
    if asked.returncode:
        return 1
    left = wait(lambda: look(_command_lines()), deadline_s - (time.monotonic() - begun), time.monotonic, time.sleep)
    if left:
        print(f"{left} replicas are still here after {deadline_s} s", file=sys.stderr)
    return 1 if left else 0


def look(command_lines: Iterator[Sequence[str]]) -> NodeState:
    """What the processes of this pod say."""
    node_id, replicas = None, 0
    for words in command_lines:
        if not words:
            continue
        if words[0].startswith(_REPLICA):
            replicas += 1
        elif words[0].rsplit("/", 1)[-1] == _RAYLET:
            node_id = next((w.removeprefix(_NODE_ID) for w in words if w.startswith(_NODE_ID)), None)
    return NodeState(node_id, replicas)


def request(node_id: str, deadline_s: int) -> list[str]:
    """The command that tells Ray. "Preemption" is the reason that it may not refuse."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "its pod is ending"]
    return ["ray", "drain-node", "--node-id", node_id, *reason, "--deadline-remaining-seconds", str(deadline_s)]


def wait(
    observe: Callable[[], NodeState], limit_s: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> int:
    """Replicas that are left when the node is empty or gone, or `limit_s` has passed."""
    end = clock() + limit_s
    while True:
        node = observe()
        if node.node_id is None or node.replicas == 0:
            return 0
        if clock() >= end:
            return node.replicas
        sleep(LOOK_S)


def _command_lines() -> Iterator[Sequence[str]]:
    for process in psutil.process_iter(["cmdline"]):
        yield process.info["cmdline"] or ()


if __name__ == "__main__":
    sys.exit(main())
