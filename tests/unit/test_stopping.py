"""The flag that Serve sets, on a worker that only looks like one; tests/integration has the real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments import stopping


class ActorId:
    def __init__(self, name: str) -> None:
        self._name = name

    def hex(self) -> str:
        return self._name


@pytest.fixture
def serve_replica(monkeypatch: pytest.MonkeyPatch) -> Any:
    replica = SimpleNamespace(_shutting_down=False)
    actors = {ActorId("other"): object(), ActorId("ours"): SimpleNamespace(_replica_impl=replica)}
    monkeypatch.setattr(stopping, "global_worker", SimpleNamespace(actors=actors))
    monkeypatch.setattr(stopping.ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "ours"))
    return replica


def test_the_flag_is_followed(serve_replica: Any) -> None:
    stopped = stopping.stop_flag()
    assert not stopped()
    serve_replica._shutting_down = True
    assert stopped()


def test_a_ray_that_keeps_it_elsewhere_fails_at_the_start(serve_replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    del serve_replica._shutting_down
    with pytest.raises(AttributeError):
        stopping.stop_flag()
    monkeypatch.setattr(stopping.global_worker, "actors", {})
    with pytest.raises(AttributeError, match="not among this worker's 0 actors"):
        stopping.stop_flag()
