"""The CUDA pipeline on tiny models, with all that a replica uses: FlashInfer, compiled layers, CUDA graphs, kernels.

    pytest tests/gpu/test_cuda_pipeline.py

Cases with more GPUs than there are are skipped. What FlashInfer and torch.compile have not compiled before takes
minutes; the rest is meant to stay under 90 seconds.
"""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from deployments.engine.attention import RowSpan
from deployments.engine.cuda_pipeline import CudaPipeline
from deployments.engine.draw import Draw
from deployments.engine.flashinfer_fit import why_not_here
from deployments.engine.flight import Flight
from deployments.engine.forms import Form, forms
from deployments.engine.link import Link
from deployments.engine.loader import LoadedModel, load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.pipeline import open_pipeline
from deployments.engine.sampling import likeliest
from deployments.engine.sampling_batch import Row
from deployments.engine.stages import StepRows
from deployments.protocol import GenerationRequest, Sampling, TokenChunk
from placement.footprint import footprint
from placement.plan import Plan
from tests.gpu.teacher import BLOCK, LIMITS, below_best, plain_model, plan_on_gpus, shortfalls
from tests.gpu.waits import no_waits
from tests.unit.engine.tiny import save

MISSING = "no CUDA device" if not torch.cuda.is_available() else why_not_here()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MISSING is not None, reason=f"needs FlashInfer on a GPU: {MISSING}"),
    pytest.mark.filterwarnings("default"),  # FlashInfer's imports warn, and so does PyTorch's sync debug mode
]

VOCAB = 1024
OUTPUT = 24
POISON = 77
"""A token whose embedding is made NaN; no prompt has it, and the loader does not feed it."""
BOUND = 0.1
"""How far the logit of a chosen token may be below the best. In the models here logits have a standard deviation of 0.8
and rounding decides gaps up to 0.05; with a wrong key, mask or token gaps reach 0.7 to 4."""
COARSE = 0.25
"""The same where keys and values have 8 bits, or the oracle's activations (bitsandbytes' int8): 0.13."""
RELATIVE = 0.05
"""Bound on RMS(found - expected) / RMS(expected) of logits, where only the rows of products differ."""

_GLU = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GLU),  # two queries per key: FlashInfer decodes on CUDA cores
    "qwen3": transformers.Qwen3Config(**_GLU | {"num_attention_heads": 8}, head_dim=64),  # four: on tensor cores
    # Two kinds of layers; soft caps so low that they show.
    "gemma2": transformers.Gemma2Config(**_GLU, head_dim=64, sliding_window=24, attn_logit_softcapping=0.3),
    "wide": transformers.LlamaConfig(**_GLU, head_dim=128),  # FlashInfer reads fp8 from this head size on
}


@dataclass(frozen=True)
class Case:
    """A model, and how it is served."""

    family: str
    stages: int = 1
    quantization: str = "nf4"
    kv_dtype: str | None = None
    kernels: bool = True
    layers: tuple[int, ...] = ()
    """Of each stage; empty: as the solver splits them."""

    def __str__(self) -> str:
        extras = [self.kv_dtype or "", "" if self.kernels else "bitsandbytes", "-".join(map(str, self.layers))]
        return ",".join([self.family, str(self.stages), self.quantization, *filter(None, extras)])


CASES = [
    *(Case("llama", stages) for stages in (1, 2, 4)),
    Case("llama", 2, layers=(1, 3)),
    Case("llama", quantization="bf16"),
    Case("llama", quantization="int8"),
    Case("llama", kernels=False),
    Case("llama", quantization="int8", kernels=False),
    *(Case("qwen3", stages) for stages in (1, 2, 4)),
    *(Case("gemma2", stages) for stages in (1, 2, 4)),
    *(Case("wide", stages, kv_dtype="fp8") for stages in (1, 2)),
]


@dataclass
class Served:
    """A loaded model, and the pipeline that all tests of its case share."""

    case: Case
    plan: Plan
    limits: EngineLimits
    model: LoadedModel
    pipeline: CudaPipeline
    plain: PreTrainedModel

    def engine(self, **changes: Any) -> Engine:
        """Empty queues and blocks, on the shared pipeline."""
        return Engine(self.model, replace(self.plan, **changes), self.limits, self.pipeline)

    @property
    def bound(self) -> float:
        return COARSE if self.case.kv_dtype == "fp8" or self.case.quantization == "int8" else BOUND


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a family's checkpoint is."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), FAMILIES[family], seed=0)
        return made[family]

    return folder


@pytest.fixture(scope="module", params=CASES, ids=str)
def served(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> Iterator[Served]:
    case: Case = request.param
    stages = [stage for stage, count in enumerate(case.layers) for _ in range(count)]
    plan = plan_on_gpus(
        footprint(folders(case.family), quantization=case.quantization),
        case.stages,
        kv_dtype=case.kv_dtype,
        pins={f"model.layers.{layer}": stage for layer, stage in enumerate(stages)},
    )
    limits = replace(LIMITS, kernels=case.kernels)
    torch._dynamo.reset()  # compiled code of other files' models would count against the limit of layers like these
    model = load(folders(case.family), plan, device_type="cuda", limits=limits)
    pipeline = cast(CudaPipeline, open_pipeline(model, plan, limits))
    yield Served(case, plan, limits, model, pipeline, plain_model(folders(case.family), plan))
    pipeline.close()
    del model, pipeline
    gc.collect()
    torch.cuda.empty_cache()


# -- steps, driven by hand ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `end` of a sequence; fed as `ids` where they are not those of `TEXT`."""

    sequence: int
    start: int
    end: int
    ids: tuple[int, ...] | None = None


_random = random.Random(2)
TEXT = [tuple(_random.choice((i, i + 100, i + 200)) for i in range(100, 196)) for _ in range(12)]
"""Tokens of each sequence; its blocks are its own."""
_BLOCKS = 96 // BLOCK


class Hand:
    """Launches steps by hand, and keeps the logits and which graphs ran.

    Args:
        graphs: whether lanes have their graphs; without, every step is eager.
    """

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch, *, graphs: bool = True) -> None:
        self.logits: list[Tensor] = []
        """float32 [sampled rows, vocab] of each step, on the CPU once `read` was called; by no graph."""
        self.by_graph: list[bool] = []
        """Whether each step was drawn by a graph."""
        self.replayed: list[list[Form]] = [[] for _ in served.pipeline._lanes]
        self._pipeline = served.pipeline
        self.rows = [Row(Sampling(max_tokens=99, seed=0, temperature=0.0), 1, VOCAB) for _ in TEXT]
        """What each sequence asks for."""
        for lane, seen in zip(served.pipeline._lanes, self.replayed, strict=True):
            watched = {form: _Watched(graph, form, seen) for form, graph in lane._graphs.items()} if graphs else {}
            monkeypatch.setattr(lane, "_graphs", watched)
        last = served.pipeline._lanes[-1]
        compute, draw = last.logits, last.likeliest

        def keep(step: StepRows, hidden: Tensor, *, by_graph: bool = False) -> Tensor:
            logits = compute(step, hidden)
            self.logits.append(logits.float())
            self.by_graph.append(by_graph)
            return logits

        def beside(step: StepRows, hidden: Tensor) -> Tensor | None:
            found = draw(step, hidden)
            if found is not None:
                keep(step, hidden, by_graph=True)
            return found

        monkeypatch.setattr(last, "logits", keep)
        monkeypatch.setattr(last, "likeliest", beside)

    def launch(self, slot: int, parts: Sequence[Part]) -> Flight:
        """Queue a step; each part draws a token."""
        ids: list[int] = []
        ends: list[int] = []
        for part in parts:
            ids += part.ids or TEXT[part.sequence][part.start : part.end]
            ends.append(len(ids) - 1)
        tables = tuple(tuple(range(_BLOCKS * part.sequence, _BLOCKS * (part.sequence + 1))) for part in parts)
        spans = tuple(
            RowSpan(part.start, part.end - part.start, table) for part, table in zip(parts, tables, strict=True)
        )
        positions = tuple(position for part in parts for position in range(part.start, part.end))
        rows = tuple(self.rows[part.sequence] for part in parts)
        counts = tuple(part.end for part in parts)
        draw = Draw(rows, counts, tables)
        return self._pipeline.launch(slot, StepRows(tuple(ids), positions, spans, tuple(ends)), draw)

    def play(self, steps: Sequence[Sequence[Part]]) -> list[list[int]]:
        """Steps one after the other, over the slots in turn: the ids that each drew."""
        flights = [self.launch(i % self._pipeline.depth, parts) for i, parts in enumerate(steps)]
        return self.read(flights)

    def read(self, flights: Sequence[Flight]) -> list[list[int]]:
        """What the steps drew; their logits come to the CPU."""
        drawn = [[token.token_id for token in flight.result()] for flight in flights]
        self.logits = [logits.cpu() for logits in self.logits]
        return drawn


class _Watched:
    """A graph that notes its replays."""

    def __init__(self, graph: torch.cuda.CUDAGraph, form: Form, seen: list[Form]) -> None:
        self._graph, self._form, self._seen = graph, form, seen

    def replay(self) -> None:
        self._seen.append(self._form)
        self._graph.replay()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def agree(found: Hand, expected: Hand, drawn: list[list[int]], bound: float) -> None:
    """Step by step: logits within RELATIVE, and what was drawn the best of both, where rounding does not decide."""
    assert len(found.logits) == len(expected.logits) == len(drawn)
    for ours, theirs, ids in zip(found.logits, expected.logits, drawn, strict=True):
        assert ids == ours.argmax(-1).tolist()
        assert relative(ours, theirs) < RELATIVE
        assert float(below_best(theirs, ids).max()) <= bound


PROMPTS = [Part(i, 0, n) for i, n in enumerate((5, 33, 60, 17, 1, 40))]
DECODES = [[Part(p.sequence, p.end + k, p.end + k + 1) for p in PROMPTS] for k in range(4)]
CHUNKED = [*(Part(p.sequence, p.end + 4, p.end + 5) for p in PROMPTS), Part(6, 0, 33), Part(7, 0, 1)]
LATER = [*(Part(p.sequence, p.end + 5, p.end + 6) for p in PROMPTS), Part(6, 33, 96), Part(7, 1, 2)]
SCRIPT = [PROMPTS, *DECODES, CHUNKED, LATER]
GRAPHS = [Form(192, 65, 17), *[Form(8)] * 4, Form(64, 33, 17), Form(128, 49, 17)]


def test_nothing_fell_back(served: Served) -> None:
    assert served.model.attention == "flashinfer"
    for lane in served.pipeline._lanes:
        assert lane.compile_error is None
        assert lane._graphs.keys() == set(forms(max_batch_tokens=256, max_sequences=16))
        assert lane.timed_blocks == served.plan.num_blocks
    assert len({lane.device for lane in served.pipeline._lanes}) == served.case.stages
    layers = [end - start for start, end in (stage.layers for stage in served.model.stages)]
    assert sum(layers) == 4
    assert not served.case.layers or tuple(layers) == served.case.layers
    times = served.pipeline.stage_microseconds(8)
    assert min(times) > 0
    assert times[-1] > served.pipeline._lanes[-1].head_microseconds(8) > 0
    assert all(lane.head_microseconds(8) == 0 for lane in served.pipeline._lanes[:-1])


def test_graphs_compute_what_eager_steps_do(served: Served) -> None:
    with pytest.MonkeyPatch.context() as patch:
        by_graph = Hand(served, patch)
        drawn = by_graph.play(SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        eager = Hand(served, patch, graphs=False)
        eager.play(SCRIPT)
    assert by_graph.replayed == [GRAPHS] * served.case.stages
    assert eager.replayed == [[]] * served.case.stages
    assert by_graph.by_graph == [False, *[True] * 4, False, False], "steps that only decode"
    assert not any(eager.by_graph)
    agree(by_graph, eager, drawn, served.bound)


def test_hand_made_steps_are_the_plain_forward(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or graphs and eager steps could be wrong alike."""
    hand = Hand(served, monkeypatch)
    drawn = hand.play(SCRIPT)
    for parts, ids in zip(SCRIPT, drawn, strict=True):
        for part, token in zip(parts, ids, strict=True):
            gap = shortfalls(served.plain, TEXT[part.sequence][: part.end], [token])
            assert float(gap) <= served.bound, part


@torch.inference_mode()
def test_the_heads_graphs_draw_what_the_head_does(served: Served) -> None:
    """Bit for bit, for every number of rows; a row of NaN is bad."""
    lane = served.pipeline._lanes[-1]
    assert lane._greedy is not None
    assert lane._outgoing is not None
    lane._outgoing.normal_()
    lane._outgoing[0, 1] = float("nan")
    pairs = []
    with torch.cuda.device(lane.device):
        for rows in lane._drawn:
            ids, good = likeliest(lane.stage.logits(lane._outgoing[:, :rows]))
            pairs.append((lane._greedy.draw(rows, rows), torch.stack((ids, torch.where(good, ids, -1)))))
    assert [found.shape[1] for found, _ in pairs] == [1, 2, 4, 8, 16]
    for found, expected in pairs:
        assert torch.equal(found, expected)
        assert (found[1] < 0).nonzero()[:, 0].tolist() == ([1] if found.shape[1] > 1 else [])


def test_a_request_that_samples_takes_its_step_off_the_heads_graph(served: Served) -> None:
    """And leaves the others' tokens as they were."""
    with pytest.MonkeyPatch.context() as patch:
        alone = Hand(served, patch)
        expected = alone.play([PROMPTS, *DECODES])
    with pytest.MonkeyPatch.context() as patch:
        beside = Hand(served, patch)
        beside.rows[2] = Row(Sampling(max_tokens=99, seed=0, temperature=1.0, top_k=3), 1, VOCAB)
        found = beside.play([PROMPTS, *DECODES])
    assert alone.by_graph == [False, *[True] * 4]
    assert not any(beside.by_graph)
    for logits, ids, greedy_ids in zip(beside.logits, found, expected, strict=True):
        assert ids[2] in logits[2].topk(3).indices
        assert ids[:2] + ids[3:] == greedy_ids[:2] + greedy_ids[3:]


def test_pending_ids_are_the_ones_drawn(served: Served) -> None:
    """Five decodes of every slot launched before any is read, the rows in another order each time."""
    depth = served.pipeline.depth
    groups = [[p for p in PROMPTS if p.sequence % depth == slot] for slot in range(depth)]
    steps: list[tuple[int, list[Part]]] = []
    for k in range(5):
        for slot, group in enumerate(groups):
            turned = group[k % len(group) :] + group[: k % len(group)]
            before = [] if k == 0 else [part.sequence for part in steps[-depth][1]]
            steps.append((slot, [_decode(p, k, before) for p in turned]))
    with pytest.MonkeyPatch.context() as patch:
        ahead = Hand(served, patch)
        drawn = ahead.read([ahead.launch(slot, parts) for slot, parts in steps])
    known: list[tuple[int, list[Part]]] = []
    for i, (slot, parts) in enumerate(steps):
        last = drawn[i - depth] if i >= depth else []
        known.append((slot, [replace(p, ids=p.ids and (last[-1 - p.ids[0]],)) for p in parts]))
    with pytest.MonkeyPatch.context() as patch:
        told = Hand(served, patch)
        told.read([told.launch(slot, parts) for slot, parts in known])
    agree(ahead, told, drawn, served.bound)


def _decode(prompt: Part, k: int, before: list[int]) -> Part:
    """A sequence's prompt, then its k-th token, which a row of the step before drew."""
    if not before:
        return prompt
    return Part(prompt.sequence, prompt.end + k - 1, prompt.end + k, (-1 - before.index(prompt.sequence),))


def test_the_host_waits_for_no_step(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in PyTorch, which tells, nor in what it calls: with the device held up, a launch comes back."""
    hand = Hand(served, monkeypatch)
    pending = [Part(p.sequence, p.end, p.end + 1, (-1 - i,)) for i, p in enumerate(PROMPTS)]
    hand.read([hand.launch(0, parts) for parts in (PROMPTS, pending, CHUNKED, PROMPTS, pending, CHUNKED)])
    torch.cuda.synchronize()
    cycles = int(1.5e9)  # most of a second
    flights = []
    for parts in (PROMPTS, pending, CHUNKED):
        with no_waits():
            with torch.cuda.device(served.pipeline._lanes[0].device):
                torch.cuda._sleep(cycles)
            flights.append(hand.launch(0, parts))
        assert not flights[-1].done.query(), "the step was over when its launch came back"
        hand.read(flights)


# -- the engine on top -------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of some requests."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[str, TokenChunk] = field(default_factory=dict)
    cached: int = 0

    def take(self, chunks: Sequence[TokenChunk]) -> None:
        for chunk in chunks:
            assert chunk.request_id not in self.ends, "a terminal chunk was followed by another"
            self.tokens[chunk.request_id] += chunk.token_ids
            self.cached += chunk.cached_tokens
            if chunk.finish_reason is not None:
                self.ends[chunk.request_id] = chunk


def greedy(name: str, prompt: Sequence[int], **options: Any) -> GenerationRequest:
    salt = options.pop("salt", "")
    sampling = Sampling(**{"max_tokens": OUTPUT, "seed": 0, "temperature": 0.0, **options})
    return GenerationRequest(name, tuple(prompt), sampling, salt=salt)


def prompts(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(100, VOCAB) for _ in range(draw.choice((5, 33, 90)))) for _ in range(count)]


def drain(engine: Engine, waiting: Sequence[GenerationRequest] = (), per_step: int = 3) -> Outcome:
    """Submit some requests before each step, so that prompts meet decodes, and run until all have ended."""
    outcome, left = Outcome(), list(waiting)
    while left or engine.has_work():
        for request in left[:per_step]:
            engine.submit(request)
        del left[:per_step]
        outcome.take(engine.step())
        engine.check_integrity()
    assert engine.blocks.held_blocks == 0
    return outcome


def check(served: Served, asked: Sequence[tuple[int, ...]], outcome: Outcome) -> None:
    """Teacher-forced: every token is the plain forward's best, but for rounding; four in five exactly."""
    exact = 0
    for i, prompt in enumerate(asked):
        chosen = outcome.tokens[f"{i}"]
        assert (len(chosen), outcome.ends[f"{i}"].finish_reason) == (OUTPUT, "length")
        short = shortfalls(served.plain, prompt, chosen)
        assert bool((short <= served.bound).all()), f"chose tokens up to {short.max():.3f} below the best"
        exact += int((short == 0).sum())
    assert exact >= 0.8 * OUTPUT * len(asked)


def test_tokens_are_the_plain_forwards_best(served: Served) -> None:
    asked = prompts(12)
    engine = served.engine()
    outcome = drain(engine, [greedy(f"{i}", prompt) for i, prompt in enumerate(asked)])
    assert outcome.cached == 0
    check(served, asked, outcome)
    again = drain(engine, [greedy(f"{i}", prompt) for i, prompt in enumerate(asked)])
    assert again.cached == sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in asked)
    check(served, asked, again)


def test_preemption_changes_nothing(served: Served) -> None:
    asked = prompts(12, seed=3)
    engine = served.engine(num_blocks=30)
    check(served, asked, drain(engine, [greedy(f"{i}", prompt) for i, prompt in enumerate(asked)], per_step=12))
    assert engine.scheduler.preemptions > 0


def test_an_end_token_stops_though_the_next_step_is_in_flight(served: Served) -> None:
    """Alone, so that the same steps run twice; with salts, so that the second finds nothing of the first."""
    prompt = prompts(1, seed=4)[0]
    engine = served.engine()
    whole = drain(engine, [greedy("whole", prompt, salt="a")]).tokens["whole"]
    end = whole[7]
    outcome = drain(engine, [greedy("ends", prompt, salt="b", end_ids=(end,))])
    assert outcome.tokens["ends"] == whole[: whole.index(end) + 1]
    assert outcome.ends["ends"].finish_reason == "stop"


def test_an_abort_in_flight_leaves_the_others_alone(served: Served) -> None:
    asked = prompts(8, seed=5)
    engine, outcome = served.engine(), Outcome()
    for i, prompt in enumerate(asked):
        engine.submit(greedy(f"{i}", prompt))
    while min(len(outcome.tokens[f"{i}"]) for i in range(8)) < 3:
        outcome.take(engine.step())
    left = {f"{i}": len(outcome.tokens[f"{i}"]) for i in (1, 4, 6)}
    for name in left:
        engine.abort(name)
    while engine.has_work():
        outcome.take(engine.step())
        engine.check_integrity()
    assert {name: len(outcome.tokens[name]) for name in left} == left, "an aborted request said more"
    assert engine.blocks.held_blocks == 0
    for i in sorted({*range(8)} - {1, 4, 6}):
        assert outcome.ends[f"{i}"].finish_reason == "length"
        assert float(shortfalls(served.plain, asked[i], outcome.tokens[f"{i}"]).max()) <= served.bound


def test_a_request_whose_logits_are_nan_ends_alone(served: Served) -> None:
    decoder: Any = served.model.stages[0]._decoder
    embedding = decoder.get_input_embeddings()
    before = embedding.weight[POISON].clone()
    engine, asked = served.engine(), prompts(4, seed=6)
    try:
        with torch.inference_mode():
            embedding.weight[POISON] = float("nan")
        spoiled = greedy("spoiled", (*asked[0][:4], POISON))
        outcome = drain(engine, [spoiled, *(greedy(f"{i}", prompt) for i, prompt in enumerate(asked))])
        assert outcome.ends["spoiled"].finish_reason == "error"
        assert outcome.tokens["spoiled"] == []
        check(served, asked, outcome)
    finally:
        with torch.inference_mode():
            embedding.weight[POISON] = before


@pytest.mark.parametrize("stage", [0, -1], ids=["first", "last"])
def test_what_a_stage_raises_the_engine_raises(served: Served, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    engine = served.engine()
    engine.submit(greedy("a", prompts(1)[0]))
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(served.model.stages[stage].attention, "prepare", fails)
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        engine.step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_a_link_carries_each_message_as_it_was_sent() -> None:
    """Though its source is overwritten at once, and its reader is late."""
    source, target = torch.device("cuda", 0), torch.device("cuda", 1)
    link = Link(source, target, slots=3, shape=(1, 64, 256), dtype=torch.bfloat16)
    message = torch.zeros(1, 64, 256, dtype=torch.bfloat16, device=source)
    found = []
    for i in range(60):
        slot, rows = i % 3, 1 + i % 64
        message.fill_(i)
        link.send(slot, message[:, :rows])
        message.fill_(-1)
        with torch.cuda.device(target):
            torch.cuda._sleep(100_000)
            found.append(link.receive(slot).clone())
        link.release(slot)
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(found))
    assert [tensor.shape[1] for tensor in found] == [1 + i % 64 for i in range(60)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("way", [(0, 1), (1, 0)])
def test_a_link_waits_for_nothing_that_its_reader_computes(way: tuple[int, int]) -> None:
    """Else one GPU would stand still while the other computes."""
    source, target = (torch.device("cuda", index) for index in way)
    link = Link(source, target, slots=2, shape=(1, 64, 256), dtype=torch.bfloat16)
    message = torch.ones(1, 64, 256, dtype=torch.bfloat16, device=source)
    link.send(0, message)
    torch.cuda.synchronize(source)
    torch.cuda.synchronize(target)
    with torch.cuda.device(target):
        torch.cuda._sleep(4_000_000_000)  # cycles: two seconds and more
        busy = torch.cuda.Event()
        busy.record()
    link.send(1, message)
    torch.cuda.synchronize(source)
    assert not busy.query()
    torch.cuda.synchronize(target)
