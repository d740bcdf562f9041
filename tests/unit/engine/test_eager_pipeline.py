"""The pipeline of encoder-decoders on GPUs, on the CPU: links and events are stand-ins, all else is as it is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deployments.engine import eager_pipeline
from deployments.engine.eager_pipeline import EagerPipeline, _lengths
from deployments.engine.loader import LoadedModel, load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.sampler import Sampler
from deployments.protocol import GenerationRequest, Sampling
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve
from tests.arrivals import tokens_of
from tests.t5 import save
from tests.unit.placement.tiny_models import ENCODER_DECODERS

LIMITS = EngineLimits(max_batch_tokens=64, max_sequences=8, prefix_cache=False, threads=1)
VOCAB = ENCODER_DECODERS["t5"].vocab_size


class Mailbox:
    """A link in one process: a message per slot, which nobody may overwrite before it was read."""

    made: list[Mailbox]

    def __init__(
        self, source: torch.device, target: torch.device, *, slots: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.way = (source, target)
        self._boxes = [torch.zeros(shape, dtype=dtype) for _ in range(slots)]
        self._reading = [False] * slots
        self.messages = 0
        self.made.append(self)

    def send(self, slot: int, message: Tensor) -> None:
        assert not self._reading[slot], "what was in the box was still being read"
        assert message.dtype == self._boxes[slot].dtype
        self._boxes[slot].fill_(-1)  # of an earlier message nothing is left
        self._boxes[slot][tuple(slice(0, size) for size in message.shape)] = message
        self.messages += 1

    def receive(self, slot: int) -> Tensor:
        self._reading[slot] = True
        return self._boxes[slot]

    def release(self, slot: int) -> None:
        assert self._reading[slot]
        self._reading[slot] = False


class Event:
    def record(self) -> None:
        """Nothing runs ahead here."""


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    Mailbox.made = []
    monkeypatch.setattr(eager_pipeline, "Link", Mailbox)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(ENCODER_DECODERS["t5"], tmp_path_factory.mktemp("t5"))


def loaded(folder: Path, stages: int, pins: dict[str, int] | None = None) -> tuple[LoadedModel, Plan]:
    plan = solve(
        footprint(folder, quantization="fp32"),
        virtual_cpu_devices(("40MB",) * stages),
        block_size=4,
        max_batch_tokens=LIMITS.max_batch_tokens,
        max_sequences=LIMITS.max_sequences,
        max_context=40,
        pins=pins,
    )
    assert len(plan.stages) == stages
    return load(folder, plan, device_type="cpu"), plan


def requests() -> list[GenerationRequest]:
    draw = random.Random(2)
    prompts = [tuple(draw.randrange(2, VOCAB) for _ in range(length)) for length in (5, 1, 30, 9, 2, 17)]
    return [
        GenerationRequest(f"{i}", (*p, 0), Sampling(max_tokens=9, seed=i, temperature=float(i % 2)))
        for i, p in enumerate(prompts)
    ]


def run(engine: Engine, waiting: Sequence[GenerationRequest]) -> dict[str, tuple[int, ...]]:
    found = tokens_of(engine, waiting, per_step=2)
    engine.close()
    return found


def pipeline(model: LoadedModel, plan: Plan) -> EagerPipeline:
    sampler = Sampler(
        model.stages[-1].device, vocab_size=model.vocab_size, num_blocks=plan.num_blocks, block_size=plan.block_size
    )
    return EagerPipeline(model.with_encoder(), sampler, plan, LIMITS)


@pytest.mark.parametrize(
    ("stages", "pins", "links"),
    [(1, {}, 0), (2, {"decoder.block": 1}, 1), (2, {"decoder.block.0": 0}, 2), (4, {}, 4)],
    ids=["one", "decoder apart", "decoder divided", "four"],
)
def test_tokens_are_those_of_the_cpus_pipeline(folder: Path, stages: int, pins: dict[str, int], links: int) -> None:
    """With steps in flight, whose ids come back from the last stage to the one that embeds the decoder's; also where
    blocks run out."""
    model, plan = loaded(folder, stages, pins)
    expected = run(Engine(model, plan, LIMITS), requests())
    assert len(set(expected.values())) > 3
    eager = pipeline(model, plan)
    assert len(Mailbox.made) == links
    assert eager.chunks.beside(0, 0) == eager.chunks.beside(8, 999) >= 1
    assert run(Engine(model, plan, LIMITS, eager), requests()) == expected
    assert all(mailbox.messages for mailbox in Mailbox.made)
    scarce = replace(plan, num_blocks=13)
    engine = Engine(model, scarce, LIMITS, pipeline(model, scarce))
    assert run(engine, requests()) == expected
    assert engine.scheduler.preemptions > 0


def test_steps_to_warm_up_have_the_tokens_they_say() -> None:
    assert _lengths(10, 40) == [10]
    assert _lengths(90, 40) == [40, 40, 10]
    assert _lengths(81, 40) == [40, 40]
