"""The gather cache in a plan: which models get it; what it takes, by hand and against what a forward really takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deployments.engine import gather
from deployments.engine.attention import PagedKv, RowSpan, StepLayout
from deployments.engine.loader import load
from deployments.engine.stages import StepRows
from placement import gathered
from placement.anatomy import own_attention
from placement.flashinfer import why_not_flashinfer
from placement.footprint import Footprint, Tensor, footprint
from placement.hardware import virtual_cpu_devices
from placement.kv import LayerKv
from placement.plan import solve
from placement.reserve import reserve
from placement.workload import Workload
from tests.contract.families import FAMILIES, PAGED, Family
from tests.contract.greedy import save
from tests.unit.engine.memory import PeakBytes
from tests.unit.placement.toy import toy_footprint

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CONFIGS = Path(__file__).parents[2] / "configs"
WORKLOAD = Workload(16, max_batch_tokens=512, max_sequences=64, max_context=256, kv_dtype="bfloat16")
OWN = [family for family in FAMILIES if family.attention != PAGED]


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
    found = reserve(weighed, WORKLOAD, device_type="cuda")
    assert (found.graphs, found.prefill, found.gather_per_block) == (0, 0, 0)
    assert found.own is not None
    assert found == reserve(weighed, replace(WORKLOAD, attention="torch"), device_type="cuda")


@pytest.mark.parametrize("name", ["llama-8b", "gemma-2-9b", "mixtral-8x7b"])
def test_others_are_not(name: str) -> None:
    found = reserve(footprint(CONFIGS / name, quantization="nf4"), WORKLOAD, device_type="cpu")
    assert found.own is None


def test_bytes_by_hand() -> None:
    def token(heads: int, kv: LayerKv, dtype: str = "float16", expanded: int = 0) -> int:
        return gathered.bound(heads, [kv], dtype, expanded, 1).token_bytes

    # 8 heads of 16 in 2 bytes: 8 * 16 * (3 * 2 + 4). With one KV head the cache is handed one.
    assert token(8, LayerKv(8, 16)) == token(8, LayerKv(2, 16)) == 1280
    assert token(8, LayerKv(1, 16)) == 160
    assert token(8, LayerKv(8, 16), "float32") == 8 * 16 * 16
    # A latent of 40 and 256 elements that it is expanded to, both twice.
    assert token(8, LayerKv(1, 40, latent=True), expanded=256) == 2 * 2 * (40 + 256)
    # Three scores in 2 bytes and two in 4 for each head.
    assert gathered.bound(8, [], "float16", 0, 1).pair_bytes == 8 * (3 * 2 + 2 * 4) + 8


def test_a_bound_is_shared_by_tokens_and_pairs() -> None:
    limit = gathered.bound(8, [LayerKv(8, 16)], "float16", 0, 100)
    assert limit == gathered.Bound(1280, 120, gathered.FORWARD_BYTES)
    assert limit.tokens(1) == gathered.FORWARD_BYTES // 1400
    assert limit.tokens(100) == gathered.FORWARD_BYTES // (1280 + 12_000)
    # A row of a million tokens takes more, and can't be divided.
    assert gathered.bound(8, [LayerKv(8, 16)], "float16", 0, 10**6).most == 10**6 * 1400


def test_a_forward_is_bounded_however_long_the_context() -> None:
    toy = mha(8, LayerKv(8, 16))
    short = reserve(toy, replace(WORKLOAD, max_sequences=4), device_type="cuda").own
    assert short is not None
    assert short.scores == 512 * 256 * 120
    assert short.most == short.scores + 4 * 256 * 1280, "all that four sequences have"
    long = reserve(toy, replace(WORKLOAD, max_batch_tokens=4096, max_context=100_000), device_type="cuda").own
    assert long is not None
    assert long.most == gathered.FORWARD_BYTES
    # Ten blocks of 16 tokens of 1,280 bytes, as far as a forward may take them.
    assert short.taken(10) == short.taken(0) + 10 * 16 * 1280
    assert short.taken(64) == short.taken(10**6) == short.most - short.spared


def test_activations_of_other_products_are_not_there_while_a_layer_attends() -> None:
    names = {"self_attention.qkv": 24, "self_attention.dense": 8, "mlp.up": 32, "mlp.down": 8}
    tensors = tuple(
        Tensor(f"h.0.{name}.weight", name, (out, 8), 2, linear=True, bytes=16 * out) for name, out in names.items()
    )
    toy = mha(2, LayerKv(2, 4))
    toy = replace(toy, modules=tuple(replace(module, tensors=tensors) for module in toy.modules))
    # Per row in 2 bytes: four hidden states, and of the products 24 and 8.
    attending = 2 * (4 * toy.geometry.hidden + 24 + 8)
    assert gathered.room(toy, WORKLOAD, attending + 100).spared == 512 * 100
    assert gathered.room(toy, WORKLOAD, attending - 1).spared == 0


@pytest.mark.parametrize("family", OWN, ids=lambda family: family.name)
def test_the_engine_keeps_to_the_bound_of_the_plan(family: Family, tmp_path: Path) -> None:
    folder = save(family.config, tmp_path)
    weighed = footprint(folder, quantization="bf16")
    plan = solve(weighed, virtual_cpu_devices(("400MB",)), block_size=16, max_batch_tokens=64, max_sequences=2)
    (stage,) = load(folder, plan, device_type="cpu").stages
    assert isinstance(stage.attention, gather.GatherAttention)
    assert stage.attention.bound == gathered.planned(weighed, plan.max_context)


@pytest.mark.parametrize(
    "family",
    [family for family in OWN if family.name in ("BLOOM", "Falcon 40B", "GPT-J", "DeepSeek-V2", "GPT-OSS")],
    ids=lambda family: family.name,
)
def test_a_forward_takes_no_more_than_the_plan_holds_back(family: Family, tmp_path: Path) -> None:
    """Decodes of many sequences, a long prompt, and the same where forwards are smaller: all in bfloat16."""
    folder = save(family.config, tmp_path)
    weighed = footprint(folder, quantization="bf16")
    devices = virtual_cpu_devices(("400MB",))
    plan = solve(weighed, devices, block_size=16, max_batch_tokens=512, max_sequences=64, max_context=256)
    found = reserve(weighed, WORKLOAD, device_type="cpu")
    (stage,) = load(folder, replace(plan, num_blocks=320), device_type="cpu").stages
    limit = gathered.planned(weighed, 256)
    pair, token = limit.pair_bytes, limit.token_bytes

    def peak(sequences: int, new: int, past: int) -> int:
        each = -(-(past + new) // 16)
        spans = tuple(RowSpan(past, new, tuple(range(i * each, (i + 1) * each))) for i in range(sequences))
        positions = tuple(range(past, past + new)) * sequences
        with PeakBytes() as counted:
            stage.run(StepRows((7,) * len(positions), positions, spans, (0,)), None, 16)
        return counted.peak

    decodes, prompt = peak(20, 1, 240), peak(1, 120, 120)
    assert found.own is not None
    beside = found.activations - found.own.spared  # of 512 rows, more than there are
    assert decodes <= 20 * 241 * (token + pair) + beside
    assert decodes > 20 * 241 * token // 3, "the bound says something"
    assert prompt <= 120 * 240 * pair + 240 * token + beside
    most = 3 * 241 * (token + pair)
    stage.attention = gather.GatherAttention(320, stage.device, replace(limit, most=most))
    assert peak(20, 1, 240) <= most + beside
    assert peak(1, 120, 120) <= most + beside


@torch.inference_mode()
@pytest.mark.parametrize("name", ["bloom-3b", "gpt-j-6b", "mpt-7b"])
def test_real_shapes_take_no_more_than_the_plan_holds_back(name: str) -> None:
    """Two layers on the meta device, in bfloat16: a long prompt, chunks behind what is cached, and decodes of many."""
    meta, workload = torch.device("meta"), Workload(16, 2048, 256, 2048, "bfloat16")
    weighed = footprint(CONFIGS / name, quantization="bf16")
    held, limit, kv = (
        reserve(weighed, workload, device_type="cuda"),
        gathered.planned(weighed, 2048),
        weighed.geometry.kv,
    )
    config = AutoConfig.from_pretrained(CONFIGS / name)
    config.num_hidden_layers = 2  # GPT-J and MPT know it by other names, and by this one
    config._attn_implementation = "eager"
    with meta:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().get_decoder()
    caches = {i: PagedKv(3000, 16, kv[i].kv_heads, kv[i].head_dim, torch.bfloat16, meta) for i in range(2)}
    attention = gather.GatherAttention(3000, meta, limit)

    def forward(source: torch.Tensor, _: torch.Tensor, **options: Any) -> torch.Tensor:
        found: torch.Tensor = model(inputs_embeds=source, **options).last_hidden_state
        return found

    def peak(sequences: int, new: int, past: int) -> int:
        spans = (RowSpan(past, new, tuple(range(-(-(past + new) // 16)))),) * sequences
        rows = torch.empty(1, sequences * new, weighed.geometry.hidden, dtype=torch.bfloat16, device=meta)
        attention.prepare(StepLayout(spans, 16))
        with PeakBytes() as counted:
            attention.run(forward, rows, rows[..., 0], caches)
        return counted.peak

    assert held.own is not None
    most = held.activations + held.own.taken(3000)
    peaks = [peak(1, 2040, 0), peak(5, 400, 200), peak(100, 1, 900), peak(85, 24, 0)]
    assert max(peaks) <= most
    assert max(peaks) > most // 2, "the bound says something"
