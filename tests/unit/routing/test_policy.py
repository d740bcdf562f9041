from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from deployments.routing.policy import Size, blocks_for, fits_ever, grant_blocks, pick, score


@dataclass(frozen=True)
class Spot:
    name: str
    headroom_blocks: int
    block_size: int = 16
    capacity_blocks: int = 10
    max_context: int = 160
    ahead_tokens: int = 0


SMALL = Size(prompt_tokens=16, max_tokens=16, grant_tokens=32)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_are_rounded_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks


@pytest.mark.parametrize(
    ("prompt", "output", "fits"),
    [(159, 1, True), (160, 1, False), (100, 60, True), (100, 61, False), (1, 159, True)],
)
def test_what_fits_an_empty_replica(prompt: int, output: int, fits: bool) -> None:
    assert fits_ever(Spot("a", 0), Size(prompt, output, prompt + 1)) is fits


def test_a_grant_is_never_larger_than_the_replica() -> None:
    assert grant_blocks(Spot("a", 10), Size(10, 500, 400)) == 10


def test_the_score_is_what_is_left_in_tokens() -> None:
    assert score(Spot("a", 5), SMALL) == (5 - 2) * 16
    assert score(Spot("a", 1), SMALL) == -16
    assert score(Spot("a", 5, ahead_tokens=7), SMALL) == (5 - 2) * 16 - 7


def test_where_half_would_be_left_it_is_what_is_held_that_counts() -> None:
    assert score(Spot("a", 6), SMALL, largest=1600) == 4 * 16
    assert score(Spot("a", 7), SMALL, largest=1600) == 1600 - (10 - 5) * 16
    assert score(Spot("a", 7), SMALL, largest=160) == 5 * 16


@pytest.mark.parametrize(
    ("spots", "chosen"),
    [
        ([Spot("a", 3), Spot("b", 5)], "b"),
        ([Spot("a", 2)], "a"),  # exactly full afterwards
        ([Spot("a", 1), Spot("b", 0)], None),
        ([Spot("half empty", 5), Spot("large, a fifth empty", 20, capacity_blocks=100)], "large, a fifth empty"),
        ([Spot("16", 5, block_size=16), Spot("64", 3, block_size=64)], "64"),  # 48 tokens left against 128
        ([Spot("small, 2 held", 8), Spot("large, 20 held", 80, capacity_blocks=100)], "small, 2 held"),
        ([Spot("small, 4 held", 6), Spot("large, 20 held", 80, capacity_blocks=100)], "large, 20 held"),
        ([Spot("a prompt to compute", 5, ahead_tokens=33), Spot("less room", 3)], "less room"),
        ([Spot("a prompt to compute", 5, ahead_tokens=31), Spot("less room", 3)], "a prompt to compute"),
        ([Spot("roomy but short", 9, max_context=16), Spot("b", 4)], "b"),
        ([], None),
    ],
)
def test_the_most_tokens_left_wins(spots: list[Spot], chosen: str | None) -> None:
    best = pick(spots, SMALL, random.Random(0))
    assert (best.name if best else None) == chosen


def test_ties_are_spread() -> None:
    rng = random.Random(0)
    spots = [Spot("a", 4), Spot("b", 4), Spot("c", 3)]
    chosen = Counter(spot.name for _ in range(200) if (spot := pick(spots, SMALL, rng)) is not None)
    assert set(chosen) == {"a", "b"}
    assert min(chosen.values()) > 60
