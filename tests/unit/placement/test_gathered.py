"""The gather cache in a plan: which models get it; what it takes, by hand and against what a forward really takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deployments.engine import gather
from deployments.engine.attention import RowSpan
from deployments.engine.loader import load
from deployments.engine.stages import StepRows
from placement import gathered
from placement.anatomy import own_attention
from placement.footprint import Footprint, footprint
from placement.hardware import virtual_cpu_devices
from placement.kv import LayerKv
from placement.plan import solve
from placement.reserve import reserve, why_not_flashinfer
from placement.workload import Workload
from tests.contract.families import FAMILIES, PAGED, Family
from tests.contract.greedy import save
from tests.unit.engine.memory import PeakBytes
from tests.unit.placement.toy import toy_footprint

CONFIGS = Path(__file__).parents[2] / "configs"
WORKLOAD = Workload(16, max_batch_tokens=512, max_sequences=64, max_context=256, kv_dtype="bfloat16")
OWN = [family for family in FAMILIES if family.attention != PAGED]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """More would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mha(heads: int, kv: LayerKv, dtype: str = "float16") -> Footprint:
    made = toy_footprint([10], kv=(kv,))
    geometry = replace(made.geometry, heads=heads, own_attention="it has its own code")
    return replace(made, dtype=dtype, geometry=geometry)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_plan_knows_what_the_probe_will_find(family: Family) -> None:
    """`tests/contract/test_families.py` holds the families' attention against the probe."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family.config)
    latent = LayerKv(1, 40, latent=hasattr(family.config, "kv_lora_rank"))
    assert (own_attention(model, (latent,)) is None) == (family.attention == PAGED)


@pytest.mark.parametrize("name", ["bloom-3b", "falcon-7b", "gpt-j-6b", "mpt-7b", "deepseek-v2-lite"])
def test_real_models_with_attention_of_their_own_are_planned_so(name: str) -> None:
    weighed = footprint(CONFIGS / name, quantization="nf4")
    assert weighed.geometry.own_attention is not None
    assert why_not_flashinfer(weighed, WORKLOAD) == weighed.geometry.own_attention
    found = reserve(weighed, WORKLOAD, device_type="cuda", budget_bytes=10**9)
    assert (found.graphs, found.prefill) == (0, 0)
    assert found.scores > 0
    assert found == reserve(weighed, replace(WORKLOAD, attention="torch"), device_type="cuda", budget_bytes=10**9)


@pytest.mark.parametrize("name", ["llama-8b", "gemma-2-9b", "mixtral-8x7b"])
def test_others_are_not(name: str) -> None:
    found = reserve(footprint(CONFIGS / name, quantization="nf4"), WORKLOAD, device_type="cpu", budget_bytes=10**9)
    assert (found.scores, found.gathered_blocks) == (0, None)


def test_bytes_by_hand() -> None:
    # 8 heads of 16 in 2 bytes: 8 * 16 * (3 * 2 + 4). With one KV head the cache is handed one.
    assert gathered.token_bytes(mha(8, LayerKv(8, 16))) == 1280
    assert gathered.token_bytes(mha(8, LayerKv(2, 16))) == 1280
    assert gathered.token_bytes(mha(8, LayerKv(1, 16))) == 160
    assert gathered.token_bytes(mha(8, LayerKv(8, 16), "float32")) == 8 * 16 * 16
    assert gathered.pair_bytes(mha(8, LayerKv(8, 16))) == 8 * 12 + 8


def test_a_forward_is_bounded_however_long_the_context() -> None:
    toy = mha(8, LayerKv(8, 16))
    short = reserve(toy, WORKLOAD, device_type="cuda", budget_bytes=10**9)
    assert short.scores == 512 * 256 * (8 * 12 + 8)
    assert short.gathered_blocks == gathered.TOKENS // 16
    long = replace(WORKLOAD, max_batch_tokens=4096, max_context=100_000)
    found = reserve(toy, long, device_type="cuda", budget_bytes=10**9)
    assert found.scores == gathered.PAIRS * (8 * 12 + 8)
    assert found.gathered_blocks == 100_000 // 16
    # Ten blocks of 16 tokens of 1,280 bytes; no more than those that a forward gathers.
    base = found.held(last=False, blocks=0, kv_block_bytes=0)
    assert found.held(last=False, blocks=10, kv_block_bytes=0) == base + 10 * 16 * 1280
    most = found.held(last=False, blocks=6250, kv_block_bytes=0)
    assert most == found.held(last=False, blocks=10**6, kv_block_bytes=0)


@pytest.mark.parametrize(
    "family",
    [family for family in OWN if family.name in ("BLOOM", "Falcon 40B", "GPT-J", "DeepSeek-V2", "GPT-OSS")],
    ids=lambda family: family.name,
)
def test_a_forward_takes_no_more_than_the_plan_holds_back(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes of many sequences, a long prompt, and the same where forwards are smaller: all in bfloat16."""
    folder = save(family.config, tmp_path)
    weighed = footprint(folder, quantization="bf16")
    devices = virtual_cpu_devices(("400MB",))
    plan = solve(weighed, devices, block_size=16, max_batch_tokens=512, max_sequences=64, max_context=256)
    found = reserve(weighed, WORKLOAD, device_type="cpu", budget_bytes=10**9)
    (stage,) = load(folder, replace(plan, num_blocks=320), device_type="cpu").stages
    pair, token = gathered.pair_bytes(weighed), gathered.token_bytes(weighed)

    def peak(sequences: int, new: int, past: int) -> int:
        each = -(-(past + new) // 16)
        spans = tuple(RowSpan(past, new, tuple(range(i * each, (i + 1) * each))) for i in range(sequences))
        positions = tuple(range(past, past + new)) * sequences
        with PeakBytes() as counted:
            stage.run(StepRows((7,) * len(positions), positions, spans, (0,)), None, 16)
        return counted.peak

    decodes, prompt = peak(20, 1, 240), peak(1, 120, 120)
    beside = found.activations  # of 512 rows, more than there are
    assert decodes <= 20 * 241 * (token + pair) + beside
    assert decodes > 20 * 241 * token // 3, "the bound says something"
    assert prompt <= 120 * 240 * pair + 240 * token + beside
    for name, bound in (("most_tokens", 2 * 241), ("most_pairs", 24 * 240)):
        monkeypatch.setattr(gather, name, lambda _, bound=bound: bound)
    stage.attention = gather.GatherAttention(320, stage.device, 256)
    assert peak(20, 1, 240) <= 2 * 241 * (token + pair) + beside
    assert peak(1, 120, 120) <= 24 * 240 * pair + 240 * token + beside
