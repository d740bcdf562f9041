"""`batch_invariant` on a CUDA device: a row's logits have the same bits in any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from deployments.engine.attention import RowSpan
from deployments.engine.invariant import ROWS
from deployments.engine.loader import LoadedModel, load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.stages import StepRows, run_stages
from deployments.planning import plan_pool
from deployments.protocol import GenerationRequest, Sampling
from deployments.settings import PoolSettings
from placement.plan import Plan
from tests.gpu.test_engine_gpu import FAMILIES
from tests.unit.engine.tiny import drain, ids, llama, save

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BLOCK = 16
LIMITS = EngineLimits(max_batch_tokens=256, max_sequences=32, prefix_cache=True, threads=1, batch_invariant=True)
IDS = tuple((37 * i + 5) % 256 for i in range(90))


_SHAPE: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1024}
_EXPERTS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "num_experts_per_tok": 2,
}
CONFIGS = FAMILIES | {
    "llama": llama(**_SHAPE),
    "mixtral": MixtralConfig(**_SHAPE, **_EXPERTS, num_local_experts=8),
    "qwen3_moe": Qwen3MoeConfig(**_SHAPE, **_EXPERTS, head_dim=64, moe_intermediate_size=256, num_experts=16),
}


@pytest.fixture(
    params=[
        ("llama", "nf4"),
        ("llama", "int8"),
        ("llama", "bf16"),
        ("mistral", "nf4"),
        ("qwen3", "nf4"),
        ("gemma2", "nf4"),
        ("opt", "int8"),
        ("gpt_neox", "nf4"),
        ("mixtral", "nf4+experts"),
        ("mixtral", "bf16"),
        ("qwen3_moe", "int8+experts"),
        ("qwen3_moe", "nf4"),
    ],
    ids=" ".join,
)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LoadedModel, Plan]:
    name, way = request.param
    quantization, _, experts = way.partition("+")
    folder = save(tmp_path, CONFIGS[name])
    small = {"device": "cuda", "max_batch_tokens": 256, "max_sequences": 32, "quantization": quantization}
    asked = {"batch_invariant": True, "quantize_experts": bool(experts), "max_memory": {0: "4GB"}}
    plan, _ = plan_pool("tiny", folder, PoolSettings.model_validate(small | asked))
    return load(folder, plan, device_type="cuda", limits=LIMITS), plan


def compute(model: LoadedModel, *parts: tuple[int, int, int]) -> list[Tensor]:
    """The logits of each part (start, end, first block) of copies of IDS, in one step."""
    spans = tuple(RowSpan(start, end - start, tuple(range(first, first + 6))) for start, end, first in parts)
    positions = tuple(p for start, end, _ in parts for p in range(start, end))
    step = StepRows(tuple(IDS[p] for p in positions), positions, spans, tuple(range(len(positions))))
    return list(run_stages(model.stages, step, BLOCK).split([end - start for start, end, _ in parts]))


def test_rows_have_the_same_bits_in_any_step(loaded: tuple[LoadedModel, Plan]) -> None:
    model, _ = loaded
    (whole,) = compute(model, (0, 90, 0))
    cut, other, rest = compute(model, (0, 7, 6), (0, 61, 12), (0, 1, 18))
    assert torch.equal(cut, whole[:7])
    assert torch.equal(other, whole[:61])
    assert torch.equal(rest, whole[:1])
    for position in range(61, 90):
        mates = [(p, p + 1, 0) for p in range(position % 20)]
        *_, one = compute(model, *mates, (position, position + 1, 12))
        assert torch.equal(one[0], whole[position]), position


def test_requests_are_answered_alike_alone_and_together(loaded: tuple[LoadedModel, Plan]) -> None:
    model, plan = loaded
    engine = Engine(model, plan, LIMITS)
    asked = [
        GenerationRequest(f"{i}", IDS[i : 20 + 3 * i], Sampling(max_tokens=12, seed=i, temperature=0.9, logprobs=2))
        for i in range(12)
    ]
    alone = {}
    for request in asked:
        engine.submit(request)
        alone |= drain(engine)
    for request in asked:
        engine.submit(request)
    together = drain(engine)
    for key, chunks in alone.items():
        assert ids(chunks) == ids(together[key])
        assert [chunk.logprobs for chunk in chunks] == [chunk.logprobs for chunk in together[key]]
    engine.close()


@torch.inference_mode()
def test_routers_break_ties_alike_at_any_place() -> None:
    """In a row of zeros all experts have the same score."""
    router = MixtralTopKRouter(CONFIGS["mixtral"]).to("cuda", torch.bfloat16)
    torch.manual_seed(1)
    router.weight.data.normal_()
    found = []
    for place in range(ROWS):
        hidden = torch.randn(ROWS, 512, device="cuda", dtype=torch.bfloat16)
        hidden[place] = 0
        found.append([result[place] for result in router(hidden)])
    for each in found:
        assert all(map(torch.equal, each, found[0]))
