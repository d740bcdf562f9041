"""The engine on a tiny NF4 Llama: how requests end, what they are told, and that none disturbs another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from deployments.engine.attention import RowSpan
from deployments.engine.loader import LoadedModel, load
from deployments.engine.loop import Engine
from deployments.engine.stages import StepRows
from deployments.engine.step import StepItem
from deployments.protocol import TokenChunk
from placement.plan import Plan
from tests.unit.engine.tiny import LIMITS, POISON, VOCAB, drain, generate, ids, llama, plan_of, request, save

Loaded = dict[int, tuple[LoadedModel, Plan]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """By number of stages."""
    folder = save(tmp_path_factory.mktemp("llama"), llama(), poisoned=True)
    plans = {stages: plan_of(folder, stages=stages) for stages in (1, 2)}
    return {stages: (load(folder, plan, device_type="cpu"), plan) for stages, plan in plans.items()}


@pytest.fixture(params=[(1, 0), (1, 1), (2, 0), (2, 1)], ids=lambda p: f"{p[0]}-stage-lookahead-{p[1]}")
def engine(request: pytest.FixtureRequest, loaded: Loaded) -> Iterator[Engine]:
    stages, lookahead = request.param
    yield from started(loaded, stages, lookahead=lookahead)


@pytest.fixture
def single(loaded: Loaded) -> Iterator[Engine]:
    yield from started(loaded, 1, lookahead=0)


@pytest.fixture
def double(loaded: Loaded) -> Iterator[Engine]:
    yield from started(loaded, 2, lookahead=0)


@pytest.fixture
def ahead(loaded: Loaded) -> Iterator[Engine]:
    """One stage, whose steps are launched one ahead."""
    yield from started(loaded, 1, lookahead=1)


def started(loaded: Loaded, stages: int, **limits: Any) -> Iterator[Engine]:
    engine = Engine(*loaded[stages], replace(LIMITS, **limits))
    yield engine
    engine.close()


def run(engine: Engine, *args: Any, **options: Any) -> tuple[int, ...]:
    """The tokens of one request alone."""
    return ids(generate(engine, request("alone", *args, **options))["alone"])


# How requests end


def test_ends_at_max_tokens(engine: Engine) -> None:
    chunks = generate(engine, request("a", max_tokens=5), request("b", max_tokens=1))
    assert {name: len(ids(mine)) for name, mine in chunks.items()} == {"a": 5, "b": 1}
    assert {mine[-1].finish_reason for mine in chunks.values()} == {"length"}


def test_ends_at_an_end_id_which_is_delivered(engine: Engine) -> None:
    free = run(engine, temperature=1.0, max_tokens=12)
    last = next(i for i in range(3, 12) if free[i] not in free[:i])
    chunks = generate(engine, request("a", temperature=1.0, max_tokens=12, end_ids=(255 - free[0], free[last])))["a"]
    assert ids(chunks) == free[: last + 1]
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].token_ids == (free[last],)


def test_an_end_id_as_last_allowed_token_is_a_stop(engine: Engine) -> None:
    (first,) = run(engine, max_tokens=1)
    (chunk,) = generate(engine, request("a", max_tokens=1, end_ids=(first,)))["a"]
    assert (chunk.token_ids, chunk.finish_reason) == ((first,), "stop")


def test_min_tokens_holds_end_ids_back(engine: Engine) -> None:
    even = tuple(range(0, VOCAB, 2))
    held = run(engine, temperature=1.0, max_tokens=60, min_tokens=6, end_ids=even)
    assert 6 < len(held) < 60
    assert [token % 2 for token in held] == [1] * (len(held) - 1) + [0]
    assert len(run(engine, temperature=1.0, max_tokens=60, end_ids=even)) < 6, "else min_tokens had nothing to do"


# What a step is to the pipeline


def test_rows_of_decodes_and_chunks(single: Engine) -> None:
    items = [
        StepItem("decodes", 9, (-1,), (1, 2, 3), samples=True),
        StepItem("begins", 4, (5, 6, 7), (4, 5), samples=False),
        StepItem("whole", 0, (8, 9), (6,), samples=True),
    ]
    spans = (RowSpan(9, 1, (1, 2, 3)), RowSpan(4, 3, (4, 5)), RowSpan(0, 2, (6,)))
    assert single._rows(items) == StepRows((-1, 5, 6, 7, 8, 9), (9, 4, 5, 6, 0, 1), spans, sampled=(0, 5))
    assert single._rows(items[:1]) == StepRows((-1,), (9,), spans[:1], sampled=(0,))
    assert single._rows(items[1:2]) == StepRows((5, 6, 7), (4, 5, 6), spans[1:2], sampled=())


# Leaving


def test_abort_while_waiting(loaded: Loaded) -> None:
    for engine in started(loaded, 1, max_sequences=1):
        engine.submit(request("runs", max_tokens=3))
        engine.submit(request("waits", max_tokens=3))
        engine.step()
        assert dict(engine.held())["waits"] == 0
        engine.abort("waits")
        assert list(drain(engine)) == ["runs"]


def test_abort_while_running_frees_blocks_at_once(single: Engine) -> None:
    single.submit(request("a", max_tokens=50))
    single.step()
    assert single.blocks.held_blocks == 2
    single.abort("a")
    assert single.blocks.held_blocks == 0
    assert not single.has_work()
    single.check_integrity()


def test_abort_in_flight_frees_blocks_when_the_step_is_back(double: Engine) -> None:
    double.submit(request("a", max_tokens=3))
    double.submit(request("b", max_tokens=50))
    assert [chunk.request_id for chunk in double.step()] == ["a"]
    assert double.scheduler.sequence("b").in_flight
    double.abort("b")
    assert dict(double.held()).keys() == {"a"}
    assert double.blocks.held_blocks == 4, "two of each: b's are still being written"
    double.check_integrity()
    assert list(drain(double)) == ["a"]


def test_abort_of_the_unknown_and_the_ended_changes_nothing(engine: Engine) -> None:
    generate(engine, request("a"))
    engine.abort("a")
    engine.abort("never heard of")
    assert len(run(engine)) == 8


def test_an_id_is_free_again_after_its_end(engine: Engine) -> None:
    first = run(engine, frequency_penalty=1.5)
    assert run(engine, frequency_penalty=1.5) == first, "the penalties of the first run are not the second's"


# Sampling


def test_a_seed_decides_whoever_else_is_there(engine: Engine) -> None:
    options: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "max_tokens": 16}
    alone = run(engine, (9, 8, 7), seed=42, **options)
    mates = [request(f"mate{i}", range(i + 1), seed=i, temperature=1.0, max_tokens=3 + 2 * i) for i in range(6)]
    chunks = generate(engine, *mates[:3], request("one", (9, 8, 7), seed=42, **options), *mates[3:])
    assert ids(chunks["one"]) == alone
    assert run(engine, (9, 8, 7), seed=43, **options) != alone


def test_choices_of_one_seed_differ(engine: Engine) -> None:
    assert run(engine, temperature=1.0, choice=0) != run(engine, temperature=1.0, choice=1)


def test_logit_bias_decides(engine: Engine) -> None:
    assert run(engine, logit_bias=((5, 100.0),), max_tokens=4) == (5, 5, 5, 5)


def test_presence_and_frequency_penalties_count_the_output(engine: Engine) -> None:
    # Apart by 50 where the model's own logits are apart by less than 10.
    biased: dict[str, Any] = {"logit_bias": ((5, 200.0), (6, 150.0)), "max_tokens": 4}
    assert run(engine, (5, 6), **biased) == (5, 5, 5, 5)
    assert run(engine, (5, 6), presence_penalty=75.0, **biased) == (5, 6, 5, 5)
    assert run(engine, (5, 6), frequency_penalty=75.0, **biased) == (5, 6, 5, 6)


def test_repetition_penalty_counts_prompt_and_output(engine: Engine) -> None:
    prompt = tuple(range(60))
    free = run(engine, prompt, max_tokens=40)
    assert len(set(free)) < 40 or set(free) & set(prompt), "else there is no repetition to avoid"
    penalised = run(engine, prompt, max_tokens=40, repetition_penalty=1e6)
    assert len(set(penalised)) == 40
    assert not set(penalised) & set(prompt)


def test_logprobs_come_to_who_asked(engine: Engine) -> None:
    chunks = generate(engine, request("asks", logprobs=3), request("chosen", logprobs=0), request("not"))
    assert not any(chunk.logprobs for chunk in chunks["not"])
    for chunk in chunks["asks"]:
        (found,) = chunk.logprobs
        assert (found.token_id,) == chunk.token_ids
        assert found.top[0] == (found.token_id, found.logprob), "greedy: the likeliest was chosen"
        assert found.logprob < 0
        assert [p for _, p in found.top] == sorted((p for _, p in found.top), reverse=True)
        assert len(found.top) == 3
    assert all(len(chunk.logprobs) == 1 and not chunk.logprobs[0].top for chunk in chunks["chosen"])


# The prefix cache


def test_cached_tokens_are_told_once(engine: Engine) -> None:
    prompt = range(17)
    assert [c.cached_tokens for c in generate(engine, request("new", prompt, max_tokens=3))["new"]] == [0, 0, 0]
    again = generate(engine, request("again", prompt, max_tokens=3))["again"]
    assert [chunk.cached_tokens for chunk in again] == [16, 0, 0]
    other = generate(engine, request("other", prompt, max_tokens=3, salt="another tenant"))["other"]
    assert [chunk.cached_tokens for chunk in other] == [0, 0, 0]


# Requests that can't be served


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request("a", (1, VOCAB)), f"token {VOCAB}, but the model's ids are 0 to {VOCAB - 1}"),
        (request("a", (1, -1)), "token -1"),
        (request("a", ()), "0 prompt tokens"),
        (request("a", max_tokens=0), "max_tokens=0"),
        (request("a", range(100), max_tokens=29), "129 tokens, and a request has at most 128"),
        (request("a", temperature=float("nan")), "temperature must be"),
        (request("a", logit_bias=((VOCAB, 1.0),)), f"logit_bias names token {VOCAB}"),
    ],
    ids=["id too high", "id below 0", "no prompt", "no output", "too long", "sampling", "bias"],
)
def test_refuses_and_queues_nothing(single: Engine, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        single.submit(wrong)
    assert not single.has_work()
    assert dict(single.held()) == {}
    assert len(run(single)) == 8


def test_the_longest_request_is_served(single: Engine) -> None:
    assert len(run(single, range(100, 200), max_tokens=28, logit_bias=((POISON, -100.0),))) == 28


def test_refuses_what_no_preemption_could_fit(loaded: Loaded) -> None:
    model, plan = loaded[1]
    engine = Engine(model, replace(plan, num_blocks=8), LIMITS)
    with pytest.raises(ValueError, match=r"needs 33 tokens of KV cache .* has 32;"):
        engine.submit(request("a", range(20), max_tokens=13))
    assert not engine.has_work()


def test_refuses_an_id_in_use_and_leaves_its_owner(single: Engine) -> None:
    single.submit(request("a", max_tokens=3))
    with pytest.raises(ValueError, match="request id a is in use"):
        single.submit(request("a", max_tokens=5))
    assert len(ids(drain(single)["a"])) == 3


# Resuming


RESUMED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 7, "choice": 2, "top_p": 0.95},
    "repetition": {"temperature": 0.9, "repetition_penalty": 1.7},
    "frequency": {"temperature": 0.9, "frequency_penalty": 1.5, "presence_penalty": 0.7},
    "logprobs": {"temperature": 0.7, "logprobs": 2},
}


@pytest.mark.parametrize("sampling", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("cut", [1, 9, 19])
def test_a_resumed_request_goes_on_as_if_nothing_had_happened(single: Engine, sampling: Any, cut: int) -> None:
    whole = request("a", range(30, 43), max_tokens=20, salt="1", **sampling)
    uncut = generate(single, whole)["a"]
    resumed = replace(whole, prompt_ids=whole.prompt_ids + ids(uncut)[:cut], resumed_tokens=cut, salt="2")
    rest = generate(single, resumed)["a"]
    assert ids(rest) == ids(uncut)[cut:]
    assert rest[-1].finish_reason == "length"
    ranked = [(log.token_id, pytest.approx(log.logprob, abs=1e-3)) for c in uncut[cut:] for log in c.logprobs]
    assert [(log.token_id, log.logprob) for c in rest for log in c.logprobs] == ranked


def test_what_was_produced_before_counts_for_min_tokens_and_not_as_cached(single: Engine) -> None:
    free = run(single, range(50, 60), max_tokens=9, temperature=1.0)
    wish = {"max_tokens": 9, "temperature": 1.0, "end_ids": (free[6],), "min_tokens": 7}
    whole = request("a", range(50, 60), **wish)
    uncut = ids(generate(single, whole)["a"])
    rest = generate(single, replace(whole, prompt_ids=whole.prompt_ids + uncut[:5], resumed_tokens=5))["a"]
    assert ids(rest) == uncut[5:]
    assert rest[0].cached_tokens == 0  # blocks of the first run are there: they are not the client's prompt alone


@pytest.mark.parametrize(("resumed", "max_tokens"), [(13, 20), (4, 4), (-1, 20)])
def test_refuses_to_resume_what_has_nothing_left_to_do(single: Engine, resumed: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="to resume from"):
        single.submit(replace(request("a", range(13), max_tokens=max_tokens), resumed_tokens=resumed))
    assert not single.has_work()


# Failures


def test_logits_that_are_not_finite_end_one_request(engine: Engine) -> None:
    good = run(engine, (9, 8, 7), max_tokens=20)
    others = [request(f"good{i}", (9, 8, 7), max_tokens=20, salt=str(i)) for i in range(4)]
    chunks = generate(engine, *others[:2], request("bad", (*range(20), POISON, 1)), *others[2:])
    (error,) = chunks.pop("bad")
    assert error.finish_reason == "error"
    assert error.error is not None
    assert "not finite" in error.error
    assert error.token_ids == ()
    assert {ids(mine) for mine in chunks.values()} == {good}


def test_blocks_of_a_spoiled_request_are_good_as_new(loaded: Loaded) -> None:
    """All blocks are spoiled once: whoever gets them next must not see what was left there."""
    model, plan = loaded[1]
    engine = Engine(model, replace(plan, num_blocks=8), LIMITS)
    good = run(engine, (9, 8, 7), max_tokens=20)
    (error,) = generate(engine, request("bad", [POISON] * 28, max_tokens=4))["bad"]
    assert error.finish_reason == "error"
    assert run(engine, (9, 8, 7), max_tokens=20) == good


@pytest.mark.parametrize("broken", [0, 1])
def test_a_stage_that_raises_ends_the_step(loaded: Loaded, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    model, _ = loaded[2]
    for engine in started(loaded, 2):
        for name in "abc":
            engine.submit(request(name, max_tokens=4))
        engine.step()
        monkeypatch.setattr(model.stages[broken], "run", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            drain(engine)


def test_a_lone_stage_that_raises_ends_the_step(
    single: Engine, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(loaded[1][0].stages[0], "run", fail)
    single.submit(request("a"))
    with pytest.raises(RuntimeError, match="the device is gone"):
        single.step()


# Slots


def test_two_stages_have_two_steps_in_flight(double: Engine) -> None:
    for i in range(4):
        double.submit(request(f"r{i}", max_tokens=4))
    first: list[TokenChunk] = double.step()
    assert [chunk.request_id for chunk in first] == ["r0", "r1"]
    assert double.scheduler.sequence("r2").in_flight
    assert {chunk.request_id for chunk in double.step()} == {"r2", "r3"}
    drain(double)


def test_with_lookahead_a_step_is_in_flight_while_the_one_before_is_read(ahead: Engine) -> None:
    ahead.submit(request("a", max_tokens=3))
    for produced in (1, 2):
        (chunk,) = ahead.step()
        sequence = ahead.scheduler.sequence("a")
        assert chunk.finish_reason is None
        assert (len(sequence.output_ids), sequence.in_flight, sequence.pending) == (produced, 1, 1)
    (chunk,) = ahead.step()
    assert chunk.finish_reason == "length"
    assert not ahead.has_work(), "max_tokens is known: nothing was launched past it"


def test_what_runs_over_an_end_is_not_told(ahead: Engine) -> None:
    free = run(ahead, temperature=1.0, max_tokens=12)
    last = next(i for i in range(2, 6) if free[i] not in free[:i])
    ahead.submit(request("a", temperature=1.0, max_tokens=12, end_ids=(free[last],), salt="a"))
    chunks = [chunk for _ in range(last + 1) for chunk in ahead.step()]
    assert (ids(chunks), chunks[-1].finish_reason) == (free[: last + 1], "stop")
    assert dict(ahead.held()) == {}
    assert ahead.blocks.held_blocks > 0, "the step in flight writes there"
    assert ahead.has_work()
    assert ahead.step() == []
    assert ahead.blocks.held_blocks == 0
    assert not ahead.has_work()


def test_an_abort_with_two_steps_in_flight(ahead: Engine) -> None:
    ahead.submit(request("a", max_tokens=50))
    ahead.submit(request("b", max_tokens=4, salt="b"))
    ahead.step()
    ahead.abort("a")
    assert ahead.blocks.held_blocks == 4
    ahead.check_integrity()
    assert list(drain(ahead)) == ["b"]


def test_a_long_prompt_does_not_stop_those_that_decode(loaded: Loaded) -> None:
    for lookahead in (0, 1):
        for engine in started(loaded, 1, lookahead=lookahead, prefill_chunk_tokens=8):
            for name in "ab":
                engine.submit(request(name, max_tokens=40))
            engine.step()
            engine.submit(request("long", range(100, 200), max_tokens=2, logit_bias=((POISON, -100.0),)))
            told = []
            while not told or "long" not in told[-1]:
                told.append([chunk.request_id for chunk in engine.step()])
            assert told[:-1] == [["a", "b"]] * (len(told) - 1)
            assert len(told) == 100 // 8 + 1 + lookahead
            drain(engine)


def test_a_step_without_work_does_nothing(engine: Engine) -> None:
    assert engine.step() == []
    assert not engine.has_work()
