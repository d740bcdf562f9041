"""How a Serve replica learns that Serve is stopping it, while its streams still run.

Serve (Ray 2.60, pinned in pyproject.toml) has no hook for it: on the controller's word the replica's actor sets a flag,
waits until no request is left, and only then calls `__del__`. The flag is private, and it is the first thing that
changes; the controller has stopped naming the replica to its callers by then, but those are told later.
"""

from __future__ import annotations

from collections.abc import Callable

import ray
from ray._private.worker import global_worker


def stop_flag() -> Callable[[], bool]:
    """A function that tells whether Serve is stopping the replica that this process is.

    Raises:
        AttributeError: this Ray keeps its flag elsewhere. Raised at the replica's start rather than at its end.
    """
    actor_id = ray.get_runtime_context().get_actor_id()
    actors = {actor.hex(): instance for actor, instance in global_worker.actors.items()}
    if actor_id not in actors:
        raise AttributeError(f"actor {actor_id} is not among this worker's {len(actors)} actors")
    serve_replica = actors[actor_id]._replica_impl

    def stopping() -> bool:
        flag: bool = serve_replica._shutting_down
        return flag

    stopping()
    return stopping
