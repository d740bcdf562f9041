"""The engine process's main loop, run in this process over a real connection."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from deployments.engine import process
from deployments.engine.messages import Commands, EngineLimits, EngineSpec, Failed, Started, StepReport, Tuning
from deployments.engine.process import serve
from deployments.errors import ConfigError
from deployments.protocol import GenerationRequest
from deployments.settings import PoolSettings
from placement import probe
from tests.unit.engine.tiny import VOCAB, llama, plan_of, request, save


@pytest.fixture
def pipe() -> Iterator[tuple[Connection, Connection]]:
    """The replica's end and the engine's."""
    ours, theirs = Pipe()
    with ours, theirs:
        yield ours, theirs


def pool(**options: Any) -> PoolSettings:
    small = {"device": "cpu", "dtype": "float32", "cpu_device_memory": "8MB", "block_size": 4, "max_batch_tokens": 64}
    return PoolSettings.model_validate(small | {"threads": 1} | options)


def spec(folder: Path, **options: Any) -> EngineSpec:
    return EngineSpec("tiny", folder, pool(**options), 1, folder / "cache")


def messages_of(connection: Connection) -> list[Any]:
    found = []
    while connection.poll():
        found.append(connection.recv())
    return found


def served(pipe: tuple[Connection, Connection], folder: Path, *commands: Commands) -> list[Any]:
    """All that the engine says to a replica that sends its commands at once and closes its end for writing."""
    ours, theirs = pipe
    ours.send(spec(folder))
    for command in commands:
        ours.send(command)
    sent = iter(range(len(commands) + 1))
    receive = theirs.recv

    class Ending:
        """The engine's end, which reports the end of what was sent as a closed pipe does."""

        send, poll = staticmethod(theirs.send), staticmethod(theirs.poll)

        @staticmethod
        def recv() -> Any:
            if next(sent, None) is None:
                raise EOFError
            return receive()

    assert serve(Ending()) == 0  # type: ignore[arg-type]  # all that is used of a connection
    return messages_of(ours)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), llama())


def test_one_report_per_step_until_all_have_ended(pipe: tuple[Connection, Connection], folder: Path) -> None:
    started, *reports = served(pipe, folder, Commands(submit=(request("a", max_tokens=3), request("b", max_tokens=2))))
    assert isinstance(started, Started)
    assert (started.attention, started.plan.model) == ("torch", "tiny")
    assert all(isinstance(report, StepReport) for report in reports)
    assert [[(c.request_id, c.finish_reason) for c in report.chunks] for report in reports] == [
        [("a", None), ("b", None)],
        [("a", None), ("b", "length")],
        [("a", "length")],
    ]
    assert [(dict(report.held), report.gone) for report in reports] == [
        ({"a": 2, "b": 2}, ()),
        ({}, ("b",)),
        ({}, ("a",)),
    ]
    assert reports[-1].cached_blocks == 1, "five tokens of prompt, two of output: one full block"
    assert reports[-1].preemptions == 0


def test_a_request_that_can_not_be_served_ends_at_once(pipe: tuple[Connection, Connection], folder: Path) -> None:
    wrong = Commands(submit=(request("bad", (VOCAB,)), request("good", max_tokens=1)))
    _, report = served(pipe, folder, wrong)
    chunks = {chunk.request_id: chunk for chunk in report.chunks}
    assert (chunks["bad"].finish_reason, chunks["bad"].token_ids) == ("error", ())
    assert f"token {VOCAB}" in str(chunks["bad"].error)
    assert chunks["good"].finish_reason == "length"


def test_abort_beside_submit(pipe: tuple[Connection, Connection], folder: Path) -> None:
    both: tuple[GenerationRequest, ...] = (request("leaves"), request("stays", max_tokens=1))
    _, report = served(pipe, folder, Commands(submit=both, abort=("leaves",)))
    assert [chunk.request_id for chunk in report.chunks] == ["stays"]
    assert report.held == ()


def test_a_start_that_fails_says_why_on_one_line(pipe: tuple[Connection, Connection], folder: Path) -> None:
    ours, theirs = pipe
    ours.send(spec(folder, cpu_device_memory="100KB"))
    assert serve(theirs) == 1
    (failed,) = messages_of(ours)
    assert isinstance(failed, Failed)
    assert failed.message.startswith("pool default: tiny")
    assert "\n" not in failed.message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("two\nlines"), "two lines"),
        (RuntimeError("CUDA error:\n  an illegal access"), "RuntimeError: CUDA error: an illegal access"),
    ],
)
def test_whatever_ends_the_engine_is_told(
    pipe: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def run(_: Connection) -> None:
        raise error

    monkeypatch.setattr(process, "run", run)
    ours, theirs = pipe
    assert serve(theirs) == 1
    assert messages_of(ours) == [Failed(message)]


def test_a_replica_that_closes_its_end_is_no_failure(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    ours.close()
    assert serve(theirs) == 0


@pytest.mark.parametrize(("cores", "replicas", "chosen", "threads"), [(16, 2, None, 4), (2, 3, None, 1), (16, 2, 5, 5)])
def test_threads_are_a_stages_share_of_the_cores(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cores: int, replicas: int, chosen: int | None, threads: int
) -> None:
    monkeypatch.setattr(probe, "cpu_cores", lambda: cores)
    asked = EngineSpec("tiny", folder, pool(threads=chosen, max_sequences=7), replicas, folder)
    limits = process.limits_of(asked, plan_of(folder, stages=2), "cpu")
    assert limits == EngineLimits(max_batch_tokens=64, max_sequences=7, prefix_cache=True, threads=threads)


@pytest.mark.parametrize(("device_type", "tokens"), [("cpu", 512), ("cuda", 2048)])
def test_limits_are_the_pools(folder: Path, device_type: str, tokens: int) -> None:
    own = pool(max_batch_tokens=None, prefix_cache=False, prefill_chunk_tokens=9, kernels="bitsandbytes")
    limits = process.limits_of(EngineSpec("tiny", folder, own, 1, folder), plan_of(folder), device_type)
    assert limits == EngineLimits(
        max_batch_tokens=tokens,
        max_sequences=256,
        prefix_cache=False,
        threads=1,
        prefill_chunk_tokens=9,
        kernels=False,
    )


def test_kernels_are_tuned_where_their_answers_can_be_kept(folder: Path, tmp_path: Path) -> None:
    def tuning(kernels_dir: Path | None, **options: Any) -> Tuning | None:
        spec = EngineSpec("tiny", folder, pool(**options), 1, folder, kernels_dir)
        return process.limits_of(spec, plan_of(folder), "cuda").tuning

    assert tuning(tmp_path, tune_limit_s=7) == Tuning(tmp_path, 7.0)
    assert tuning(tmp_path) == Tuning(tmp_path, 120.0)
    assert tuning(tmp_path, tune_kernels=False) is None
    assert tuning(None) is None
    with pytest.raises(ValueError, match="tune_limit_s is given, but tune_kernels is false"):
        pool(tune_kernels=False, tune_limit_s=7)


@pytest.mark.parametrize("asked", [{"tune_kernels": True}, {"tune_limit_s": 7}])
def test_what_another_start_may_find_faster_is_nothing_for_fixed_bits(
    asked: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    spec = EngineSpec("tiny", folder, pool(batch_invariant=True, tune_kernels=False), 1, folder, tmp_path)
    assert process.limits_of(spec, plan_of(folder), "cuda").tuning is None
    spec = EngineSpec("tiny", folder, pool(batch_invariant=True), 1, folder, tmp_path)
    assert process.limits_of(spec, plan_of(folder), "cuda").tuning is None
    with pytest.raises(ValueError, match=f"{next(iter(asked))} is given, but with batch_invariant nothing is measured"):
        pool(batch_invariant=True, **asked)
