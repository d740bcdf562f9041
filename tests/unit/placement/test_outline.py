"""A plan in outline."""

from __future__ import annotations

import pickle

from placement.outline import FREE, OUTSIDE, Part, colours, outline
from tests.unit.placement.test_svg import GB, PLAN


def test_parts_add_up_to_the_memory_in_drawing_order() -> None:
    first, second = outline(PLAN).devices
    assert [(part.kind, part.name) for part in first.parts] == [
        ("weights", "embedding"),
        ("weights", "layers"),
        ("kv", "KV cache"),
        ("reserve", "context"),
        ("reserve", "workspace"),
        ("free", FREE),
    ]
    for device, size in ((first, 40 * GB), (second, 20 * GB)):
        assert sum(part.bytes for part in device.parts) == device.memory_bytes == size
    assert second.parts[-1] == Part("outside", OUTSIDE, 8 * GB, "taken by others, or above the cap")


def test_it_is_small_enough_to_send_along() -> None:
    assert len(pickle.dumps(outline(PLAN))) < 2_000


def test_colours_are_in_drawing_order_and_unlike_each_other() -> None:
    devices = outline(PLAN).devices
    found = colours(part for device in devices for part in device.parts)
    assert list(found) == ["embedding", "layers", "head", "KV cache", "context", "workspace", FREE, OUTSIDE]
    assert [name for name, colour in found.items() if colour is None] == [FREE, OUTSIDE]
    drawn = [colour for colour in found.values() if colour]
    assert len(set(drawn)) == len(drawn)
