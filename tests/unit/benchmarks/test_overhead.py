"""What serving costs an engine: the arithmetic, and the engine's side of the load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import shape_config
from benchmarks.checkpoint import _tokenizer
from benchmarks.client import Answer, LoadFailed
from benchmarks.closed_loop import closed_loop
from benchmarks.engine_child import EngineRun
from benchmarks.overhead import Overhead, common_step_s, overhead
from benchmarks.report import Report
from benchmarks.serve_load import _parse
from benchmarks.workload import prompts
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.settings import parse_settings
from tests.unit.engine.tiny import LIMITS, llama, plan_of, request, save


def answer(first: float, last: float, *, pieces: int = 11, tokens: int = 31) -> Answer:
    """Pieces of three tokens each, but for the first, evenly apart."""
    gap = (last - first) / (pieces - 1)
    arrivals = tuple(first + gap * i for i in range(pieces))
    return Answer("p", first - 0.1, arrivals, last, 20, tokens, "", (1, *[3] * (pieces - 1)))


def test_the_common_step_is_of_the_time_in_which_all_streams_run() -> None:
    one, late = answer(0.0, 3.0), answer(1.0, 4.0)
    assert common_step_s([one, one]) == pytest.approx(0.1)
    assert common_step_s([one, late]) == pytest.approx(0.1, rel=0.15), "pieces at the edges belong to one side"
    with pytest.raises(LoadFailed, match="never all under way at once"):
        common_step_s([answer(0.0, 1.0), answer(1.5, 2.5)])


ALONE = EngineRun(tokens=6000, seconds=1.0, full_steps=90, full_s=9.0)


def compared(*, seconds: float, step: float) -> Overhead:
    burst = [Answer("p", 0.0, (seconds,), seconds, 20, 3000, "", (1,))] * 2
    return overhead(2, (ALONE, ALONE), burst, [answer(0.0, 30 * step)] * 2)


@pytest.mark.parametrize(
    ("seconds", "step", "met"),
    [(1.1, 0.104, [True, True]), (1.2, 0.104, [False, True]), (1.1, 0.106, [True, False])],
)
def test_goals(seconds: float, step: float, met: list[bool]) -> None:
    found = compared(seconds=seconds, step=step)
    assert (found.engine_tokens_per_s, found.engine_step_s) == (6000.0, 0.1)
    report = Report({"model": "m"}, (), None, (), (), found)
    assert [goal.met for goal in report.goals()] == met
    assert report.meets_all_goals() == all(met)
    assert "engine alone makes 6,000.0 tokens/s" in str(report)
    assert report.as_json()["overhead"]["served_step_s"] == pytest.approx(step)
    assert not Report({}, (), None, (), ()).meets_all_goals(), "nothing was compared"


def test_an_engine_that_never_ran_all_is_no_measurement() -> None:
    none = EngineRun(tokens=9, seconds=1.0, full_steps=0, full_s=0.0)
    with pytest.raises(LoadFailed, match="raise --steady-tokens"):
        overhead(2, (ALONE, none), [], [])


def test_the_engine_has_so_many_requests_at_once_and_its_full_steps_are_counted(tmp_path: Path) -> None:
    folder = save(tmp_path, llama())
    plan = plan_of(folder)
    engine = Engine(load(folder, plan, device_type="cpu"), plan, LIMITS)
    most, times = 0, iter(range(1000))

    def clock() -> float:
        nonlocal most
        most = max(most, engine.scheduler.running + engine.scheduler.waiting)
        return float(next(times))

    run = closed_loop(engine, [request(f"r{i}", (i, 2, 3), max_tokens=6) for i in range(5)], 2, clock)
    assert most == 2
    assert run.tokens == 30
    assert run.seconds == 18, "three after one another, each a step of its prompt and five of one token"
    # Of the first pair and the second the four steps between first and last token; the fifth runs alone.
    assert (run.full_steps, run.full_s) == (8, 8.0)


def test_prompts_of_a_length_share_nothing() -> None:
    made = prompts("r0c64", 64, 128)
    assert {len(text) for text in made} == {128}
    assert len({text[:10] for text in made}) == 64
    assert len(prompts("tag", 1, 5000)[0]) == 5000


def test_random_weights_have_a_word_for_each_id() -> None:
    tokenizer = _tokenizer(1024)
    assert len(tokenizer) == 1024
    assert tokenizer.decode([300, 1023]) == " w300 w1023"
    chat = [{"role": "user", "content": "sixteen letters."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert len(ids) == 16
    assert tokenizer.decode(ids) == "sixteen letters."


def stand_in(monkeypatch: pytest.MonkeyPatch, **done: object) -> None:
    """For the process that writes a checkpoint."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[-2:] == ["benchmarks.checkpoint", "8b"]
        return SimpleNamespace(**done)

    monkeypatch.setattr(shape_config.subprocess, "run", run)


def test_a_shape_is_served_by_a_config_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, returncode=0, stdout="/somewhere/random-8b\n")
    config = yaml.safe_load(shape_config.write_config("8b", "int8", 3, tmp_path).read_text())
    settings = parse_settings(config["applications"][0]["args"])
    assert settings.models[0].source == "/somewhere/random-8b"
    assert (settings.models[0].pools[0].quantization, settings.api.replicas) == ("int8", 3)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [("Traceback ...\nOSError: no space left on device\n", "OSError: no space left"), ("\n", "ended with code -9")],
)
def test_a_shape_that_can_not_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str
) -> None:
    stand_in(monkeypatch, returncode=-9, stderr=stderr)
    with pytest.raises(LoadFailed, match=f"no checkpoint of shape 8b: .*{reason}"):
        shape_config.write_config("8b", "nf4", 1, tmp_path)


@pytest.mark.parametrize("wrong", [["--engine", "--url", "http://h"], ["--goals", "--no-baseline"]])
def test_options_that_contradict_each_other_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        _parse(wrong)
    assert _parse(["--goals", "--no-baseline", "--engine", "--concurrency", "64"]).engine
