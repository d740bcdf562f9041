"""The benchmark's own arithmetic: prompts, clocks, percentiles, goals; the HTTP side against a scripted answer."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.child import Child, ChildFailed
from benchmarks.client import Answer, LoadFailed, rate, run_clients
from benchmarks.cpu_meter import Part
from benchmarks.report import Baseline, Level, Report, percentile, plot
from benchmarks.workload import CYCLE, prompts


def answer(*, sent: float = 0.0, first: float = 0.1, gap: float = 0.02, tokens: int = 10) -> Answer:
    arrivals = tuple(sent + first + gap * i for i in range(tokens))
    return Answer("p", sent, arrivals, arrivals[-1], 20, tokens, "text")


class TestWorkload:
    def test_is_the_same_each_time_and_cycles_through_lengths(self) -> None:
        made = prompts("tag", 3 * CYCLE)
        assert made == prompts("tag", 3 * CYCLE)
        assert made[:CYCLE] == prompts("tag", CYCLE)
        lengths = [len(text.split()) for text in made[:CYCLE]]
        assert min(lengths) < 15
        assert max(lengths) > 120

    def test_prompts_differ_at_once_so_that_no_prefix_is_shared(self) -> None:
        first_words = [text.split()[0] for tag in ("a", "b") for text in prompts(tag, 3 * CYCLE)]
        assert len(set(first_words)) == len(first_words)


class TestArithmetic:
    def test_percentiles_are_linear_between_ranks(self) -> None:
        assert [percentile([4, 1, 3, 2], p) for p in (0, 50, 90, 100)] == pytest.approx([1, 2.5, 3.7, 4])
        assert math.isnan(percentile([], 50))

    def test_an_answers_times(self) -> None:
        one = answer(sent=5.0, first=0.3, gap=0.02, tokens=3)
        assert one.ttft == pytest.approx(0.3)
        assert one.gaps == pytest.approx([0.02, 0.02])
        assert one.end_to_end == pytest.approx(0.34)

    @pytest.mark.parametrize(
        ("second_sent", "second_took", "busy"),
        [(1.0, 3.0, 4.0), (0.5, 1.5, 2.0), (0.2, 0.3, 1.0), (5.0, 2.0, 3.0)],
        ids=["one after the other", "overlapping", "one within the other", "with a pause between"],
    )
    def test_rate_is_over_the_time_that_any_was_under_way(
        self, second_sent: float, second_took: float, busy: float
    ) -> None:
        answers = [answer(sent=second_sent, first=second_took, gap=0.0), answer(sent=0.0, first=1.0, gap=0.0)]
        assert rate(answers) == pytest.approx(20 / busy)


def stream_body(pieces: Sequence[str], tokens: int) -> bytes:
    events: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None}]
    events += [{"choices": [{"delta": {"content": piece}}], "usage": None} for piece in pieces]
    events.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"


def serve(handler: Any, texts: list[str], clients: int = 2) -> list[Answer]:
    async def run() -> list[Answer]:
        async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(handler)) as http:
            return await run_clients(http, "m", texts, clients=clients, output_tokens=3, done=lambda: None)

    return asyncio.run(run())


class TestClients:
    def test_every_prompt_is_sent_once_and_no_more_at_a_time_than_asked(self) -> None:
        running, most = 0, 0
        seen: list[str] = []

        async def handler(request: httpx.Request) -> httpx.Response:
            nonlocal running, most
            running, most = running + 1, max(most, running + 1)
            await asyncio.sleep(0.001)
            running -= 1
            body = json.loads(request.content)
            assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (3, True, 0)
            seen.append(body["messages"][0]["content"])
            return httpx.Response(200, content=stream_body(["a", "b", "c"], 3))

        answers = serve(handler, [str(i) for i in range(10)], clients=3)
        assert sorted(seen) == [str(i) for i in range(10)]
        assert most == 3
        assert {(a.text, a.prompt_tokens, a.output_tokens, len(a.arrivals)) for a in answers} == {("abc", 7, 3, 3)}

    @pytest.mark.parametrize(
        ("response", "says"),
        [
            (httpx.Response(429, json={"error": {"message": "queue full"}}), "HTTP 429.*queue full"),
            (httpx.Response(200, content=stream_body(["a"], 2)), "asked for 3 tokens"),
            (httpx.Response(200, content=stream_body([], 3)), "0 pieces"),
            (httpx.Response(200, content=b'data: {"error": {"message": "engine died"}}\n\n'), "engine died"),
        ],
    )
    def test_what_was_not_served_as_asked_is_no_measurement(self, response: httpx.Response, says: str) -> None:
        with pytest.raises(LoadFailed, match=says):
            serve(lambda _: response, ["p"])


def report(served: dict[int, float], *, baseline: float, engine: float) -> Report:
    """Levels of one answer of 10 tokens at the given tokens/s, first token after 0.1 s."""
    levels = tuple(
        Level(clients, ((answer(first=0.1, gap=(10 / rate - 0.1) / 9),),)) for clients, rate in served.items()
    )
    return Report(
        {"model": "m"},
        levels,
        Baseline({"1": 4.0, "2": 9.0}, (baseline,), (8.0, 9.0), (0.5, 0.7), (1, 1)),
        (engine,),
        (0.1 - engine,),
    )


class TestGoals:
    def test_met(self) -> None:
        run = report({1: 9.5, 16: 41.0}, baseline=10.0, engine=0.09)
        assert [goal.reached for goal in run.goals()] == pytest.approx([4.1, 0.95, 10.0])
        assert run.meets_all_goals()

    @pytest.mark.parametrize(
        ("served", "baseline", "engine"),
        [
            ({1: 9.5, 16: 39.0}, 10.0, 0.09),
            ({1: 8.5, 16: 41.0}, 10.0, 0.09),
            ({1: 9.5, 16: 41.0}, 10.0, 0.08),
            ({1: 9.5, 4: 41.0}, 10.0, 0.09),
        ],
        ids=["many", "one", "added", "not measured"],
    )
    def test_missed(self, served: dict[int, float], baseline: float, engine: float) -> None:
        assert not report(served, baseline=baseline, engine=engine).meets_all_goals()

    def test_an_unsteady_machine_shows_nothing(self) -> None:
        assert report({1: 9.5, 16: 41.0}, baseline=10.0, engine=0.09).steady
        run = report({1: 19.5, 16: 81.0}, baseline=20.0, engine=0.09)
        assert all(goal.met for goal in run.goals())
        assert not run.meets_all_goals()
        assert "UNSTEADY: the baseline's runs differ by a factor of 2.5" in str(run)

    def test_the_better_of_the_baselines_medians_counts(self) -> None:
        assert Baseline({}, (5.0, 6.0, 9.0), (1.0, 7.0, 8.0), (), (0, 0)).tokens_per_s == 7.0
        assert Baseline({}, (), (3.0,), (), (0, 0)).tokens_per_s == 3.0


class TestOutput:
    run = report({1: 9.5, 16: 41.0}, baseline=10.0, engine=0.09)

    def test_table_and_json_hold_the_figures(self) -> None:
        lines = self.run.table().splitlines()
        assert lines[1].split()[:3] == ["1", "9.5", "100"]
        assert lines[-1].split() == ["generate()", "10.0", "600", "680", "698"]
        assert "MISSED" not in str(self.run)
        written = json.loads(json.dumps(self.run.as_json()))
        assert written["levels"][1]["ttft_s"]["p50"] == pytest.approx(0.1)
        assert written["baseline"]["rate"] == 10.0
        assert [goal["met"] for goal in written["goals"]] == [True, True, True]

    def test_cpu_of_each_part_is_a_table_of_its_own(self) -> None:
        assert "CPU" not in str(self.run)
        parts = (Part("engine", 2, 0.0104, 0.87), Part("clients", 8, 0.0023, 0.31))
        measured = replace(self.run, cpu=parts)
        heads, *rows = measured.cpu_table().splitlines()
        assert heads.startswith("CPU at 16 clients")
        assert [row.split() for row in rows] == [["engine", "2", "10.4", "0.87"], ["clients", "8", "2.3", "0.31"]]
        assert measured.cpu_table() in str(measured)
        written = json.loads(json.dumps(measured.as_json()))["cpu"]
        assert written[1] == {"role": "clients", "processes": 8, "per_request_s": 0.0023, "busiest": 0.31}

    @pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
    def test_plot_is_an_image(self, tmp_path: Path, suffix: str, begins: bytes) -> None:
        plot(self.run, tmp_path / f"plot{suffix}")
        assert (tmp_path / f"plot{suffix}").read_bytes().startswith(begins)


class TestChild:
    def test_a_child_that_ends_is_reported_with_its_log(self, tmp_path: Path) -> None:
        child = Child("benchmarks.no_such_module", tmp_path / "log")
        with pytest.raises(ChildFailed, match="No module named"):
            child.ask(op="load")
        child.close()
