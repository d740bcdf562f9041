"""What is demanded in blocks, and pins of modules as pins of layers."""

from __future__ import annotations

import pytest

from placement.errors import PlacementError
from placement.question import LAST_RESORT, Demand, pin_layers
from tests.unit.placement.toy import toy_encoder_decoder, toy_footprint


def test_every_sequence_has_blocks_of_its_own() -> None:
    assert Demand(context=17).blocks(16) == 2
    assert Demand(requests=3, length=17).blocks(16) == 6, "not the 4 that 51 tokens would fill"
    assert Demand(context=100, requests=3, length=17).blocks(16) == 7
    assert Demand(context=100, requests=3, length=17).within(10) == Demand(10, 3, 10)


def test_modules_beside_the_layers_pin_their_layer() -> None:
    model = toy_footprint([10] * 3)

    def pinned(**pins: int | str) -> tuple[int | None, ...]:
        named = {name.replace("_", "."): device for name, device in pins.items()}
        return pin_layers(model, named, 3, last_resort=True, order="given")

    assert pinned() == ()
    assert pinned(embed=1) == (1, None, None)
    assert pinned(head="cpu") == (None, None, LAST_RESORT)
    assert pinned(layers_1=0) == (None, 0, None)
    assert pinned(layers=1) == (1, 1, 1)
    with pytest.raises(PlacementError, match="device 2, but there are only devices 0 to 1"):
        pinned(head=2)


def test_an_encoder_decoder_has_ends_in_its_middle() -> None:
    model = toy_encoder_decoder([10, 10], [10, 10])
    pins = {"encoder.norm": 0, "decoder.embed": 1}
    assert pin_layers(model, pins, 2, last_resort=False, order="given") == (None, 0, 1, None)
    assert pin_layers(model, {"decoder": 1}, 2, last_resort=False, order="given") == (None, None, 1, 1)
