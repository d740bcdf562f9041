"""The sampler on CUDA: no wait for the device, the CPU's tokens at full size, and scratch within what is stated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.engine.capture import capture
from deployments.engine.forms import few_sizes
from deployments.engine.greedy import GreedyDraws
from deployments.engine.sampler import SCRATCH_BYTES, Sampler
from deployments.engine.sampling import likeliest
from deployments.engine.sampling_batch import padded
from placement.reserve import SAMPLE_ROWS
from tests.contract.sampling_cases import logits
from tests.gpu.waits import no_waits
from tests.unit.engine.drawing import BLOCK, Request, draw_requests, make_draw, note, request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB = 128_256
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "filters": {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "nucleus": {"top_p": 0.9},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "greedy with penalties": {"temperature": 0.0, "presence_penalty": 1.0},
    "bias": {"logit_bias": ((5, 3.0),), "min_tokens": 100, "end_ids": (1, 2)},
    "logprobs": {"logprobs": 5},
}


def mixed(rows: int) -> list[Request]:
    """Every kind in turn, each with a history."""
    kinds = list(KINDS.values())
    return [request([i % VOCAB, 3, 3], [7] * (i % 5), seed=i, **kinds[i % len(kinds)]) for i in range(rows)]


def prepared(requests: list[Request]) -> tuple[Sampler, Any]:
    blocks = sum(-(-len(each.ids) // BLOCK) for each in requests)
    sampler = Sampler(torch.device("cuda"), vocab_size=VOCAB, num_blocks=blocks, block_size=BLOCK)
    draw = make_draw(requests, [each.row(VOCAB) for each in requests])
    note(sampler, requests, draw)
    return sampler, draw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_step_never_waits(dtype: torch.dtype) -> None:
    requests = mixed(100)
    sampler, draw = prepared(requests)
    scores = logits(100, VOCAB, dtype).cuda()
    ids, slots = torch.tensor([3, 4]).cuda(), torch.tensor([0, 1]).cuda()
    with no_waits():
        sampler.note_inputs(ids, slots)
        step = sampler.draw(scores, draw)
        again = sampler.draw(scores, draw)
    assert step.read() == again.read()
    assert not any(token.bad for token in step.read())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_full_step_draws_what_the_cpu_draws(dtype: torch.dtype) -> None:
    requests, scores = mixed(96), logits(96, VOCAB, dtype)
    expected = draw_requests(scores, requests).read()
    got = draw_requests(scores.cuda(), requests).read()
    assert [token.token_id for token in got] == [token.token_id for token in expected]
    for ours, cpus in zip(got, expected, strict=True):
        if cpus.logprob is not None and ours.logprob is not None:
            assert ours.logprob.logprob == pytest.approx(cpus.logprob.logprob, abs=1e-4)
            assert [token for token, _ in ours.logprob.top] == [token for token, _ in cpus.logprob.top]


def test_a_bad_row_fails_alone() -> None:
    requests, scores = mixed(16), logits(16, VOCAB).cuda()
    scores[3, 77] = float("nan")
    scores[4, 78] = float("inf")
    step = draw_requests(scores, requests)
    assert [i for i, token in enumerate(step.read()) if token.bad] == [3, 4]
    assert bool(((step.ids >= 0) & (step.ids < VOCAB)).all())


def test_noting_inputs_can_be_graphed() -> None:
    sampler, _ = prepared([request([1], [2])])
    ids, slots = torch.tensor([8, 9]).cuda(), torch.tensor([0, 1]).cuda()
    sampler.note_inputs(ids, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.note_inputs(ids, slots)
    ids.copy_(torch.tensor([30, 31]))
    graph.replay()
    assert sampler.history.ids[0, :2].tolist() == [30, 31]


def graphed(most: int) -> tuple[Callable[[Tensor], Tensor], Tensor, GreedyDraws]:
    """A head with random weights, the hidden states [1, most, 64] that its graphs read, and these."""
    weight = torch.randn(
        VOCAB, 64, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    hidden = weight.new_zeros(1, most, 64)
    made = partial(capture, pool=torch.cuda.graph_pool_handle(), stream=torch.cuda.Stream())

    def head(rows: Tensor) -> Tensor:
        return (rows @ weight.T)[0]

    return head, hidden, GreedyDraws(head, hidden, few_sizes(most), made)


@torch.inference_mode()
def test_slots_share_the_heads_graphs() -> None:
    """Each step's ids are its own, though the next one's graph runs before they are read; and the host never waits."""
    head, hidden, draws = graphed(16)
    sampler, _ = prepared([request([1], [2])])
    states = [torch.randn_like(hidden) for _ in range(12)]
    sizes = [((16, 13), (8, 8), (16, 16))[i % 3] for i in range(12)]
    expected = [likeliest(head(each[:, :rows]))[0][:n].tolist() for each, (rows, n) in zip(states, sizes, strict=True)]
    torch.cuda._sleep(int(1e8))
    taken = []
    with no_waits():
        for each, (rows, count) in zip(states, sizes, strict=True):
            hidden.copy_(each)
            taken.append(sampler.take(draws.draw(rows, count)))
    assert [drawn.ids.tolist() for drawn in taken] == expected
    assert [[token.token_id for token in drawn.read()] for drawn in taken] == expected


@torch.inference_mode()
def test_the_heads_graphs_hold_logits_once() -> None:
    graphed(1)  # libraries take what they keep at their first calls
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    kept = graphed(256)
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() - before
    logits_bytes = [2 * VOCAB * rows for rows in few_sizes(256)]
    assert max(logits_bytes) < taken < 2.5 * max(logits_bytes) < 0.5 * sum(logits_bytes)
    del kept


@pytest.mark.parametrize("kind", KINDS)
def test_scratch_is_within_what_is_stated(kind: str) -> None:
    requests = [request([1] * 9, [2] * 9, seed=i, **KINDS[kind]) for i in range(2 * SAMPLE_ROWS)]
    sampler, draw = prepared(requests)
    scores = logits(len(requests), VOCAB, torch.bfloat16).cuda()
    sampler.draw(scores, draw).read()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sampler.draw(scores, draw).read()
    used = torch.cuda.max_memory_allocated() - before
    assert used <= SCRATCH_BYTES * SAMPLE_ROWS * padded(VOCAB)


def test_what_a_step_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints milliseconds of the device for 256 rows of each kind; greedy must cost little more than reading logits."""
    scores = logits(256, VOCAB, torch.bfloat16).cuda()
    took: dict[str, float] = {}
    for kind, params in KINDS.items():
        sampler, draw = prepared([request([1] * 9, [2] * 9, seed=i, **params) for i in range(256)])
        for _ in range(3):
            sampler.draw(scores, draw).read()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            sampler.draw(scores, draw)
        end.record()
        end.synchronize()
        took[kind] = start.elapsed_time(end) / 10
    with capsys.disabled():
        print("\n" + "\n".join(f"{kind:24} {ms:7.3f} ms" for kind, ms in took.items()))
    assert took["greedy"] < 0.2 * took["plain"]
