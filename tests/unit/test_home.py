"""Where the state folder is."""

from __future__ import annotations

from pathlib import Path

from deployments.home import state_folder


def test_order_of_the_variables() -> None:
    assert state_folder({"HEADROOM_HOME": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert state_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/headroom")
    assert state_folder({}) == Path.home() / ".cache" / "headroom"


def test_relative_home_is_of_this_folder() -> None:
    assert state_folder({"HEADROOM_HOME": "x"}) == Path.cwd() / "x"
