"""A burst through a real engine, on a clock that counts its readings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from deployments.compare.throughput import Burst, burst, random_prompts
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from tests.unit.engine import tiny


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny.save(tmp_path_factory.mktemp("tiny"), tiny.llama())
    plan = tiny.plan_of(folder, quantization="fp32")
    engine = Engine(load(folder, plan, device_type="cpu"), plan, tiny.LIMITS)
    yield engine
    engine.close()


def test_all_answers_are_counted_and_timed_by_the_clock(engine: Engine) -> None:
    ticks = itertools.count()
    done = burst(engine, 3, 9, 5, clock=lambda: float(next(ticks)))
    assert len(done.first_token_s) == len(done.request_s) == 3
    assert sum(step.tokens for step in done.steps) == 15
    assert done.seconds == len(done.steps) == max(done.request_s)
    assert done.tokens_per_s == 15 / done.seconds
    assert all(last - first == 4 for first, last in zip(done.first_token_s, done.request_s, strict=True))
    assert done.token_s == 1
    assert done.step_ms == 1000


def test_a_request_that_the_engine_does_not_take_is_no_result(engine: Engine) -> None:
    with pytest.raises(ValueError, match="at most"):
        burst(engine, 1, 120, 120)


def test_prompts_differ_from_each_other_and_not_from_run_to_run(engine: Engine) -> None:
    prompts = list(random_prompts(engine, 4, 8, "seed"))
    assert len(set(prompts)) == 4
    assert prompts == list(random_prompts(engine, 4, 8, "seed"))
    assert prompts != list(random_prompts(engine, 4, 8, "other"))


def test_times_belong_to_their_requests() -> None:
    done = Burst(11, 30.0, (1.0, 10.0, 2.0), (11.0, 30.0, 22.0), (), (9.0, 5.0, 5.0, 7.0))
    assert done.token_s == 2.0
    assert done.step_ms == 5.0
