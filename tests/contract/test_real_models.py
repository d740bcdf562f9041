"""Models that transformers' documentation and this one name, by their configs alone: what they weigh, and the caps
under which they are planned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from placement.errors import PlacementError
from placement.footprint import Footprint, footprint
from placement.hardware import parse_gpus
from placement.plan import Plan, solve

CONFIGS = Path(__file__).parents[1] / "configs"

WEIGHTS = {
    "bloom-3b": 3_002_557_440,
    "deepseek-v2-lite": 15_706_484_224,
    "falcon-7b": 6_921_720_704,
    "gemma-2-9b": 9_241_705_984,
    "gpt-j-6b": 6_050_882_784,
    "llama-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "mpt-7b": 6_649_286_656,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "t5-11b": 11_307_321_344,
    "zephyr-7b-beta-awq": 7_241_732_096,
}
"""Parameters, as the models' own pages count them."""


def weights(weighed: Footprint) -> int:
    return sum({t.storage: t.elements for module in weighed.modules for t in module.tensors if t.stored}.values())


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_config_has_the_weights_of_its_model(name: str) -> None:
    assert weights(footprint(CONFIGS / name)) == WEIGHTS[name]


def test_every_config_is_tested() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == WEIGHTS.keys()


# The caps of transformers' documentation


def capped(name: str, quantization: str, caps: dict[int, str]) -> Plan:
    """One sequence at a time over two GPUs under `max_memory`."""
    weighed = footprint(CONFIGS / name, quantization=quantization)
    return solve(
        weighed,
        parse_gpus("2x24GiB"),
        max_memory=caps,
        block_size=16,
        max_context=2048,
        max_sequences=1,
        max_batch_tokens=128,
    )


@pytest.mark.parametrize(
    ("quantization", "caps", "ratio"),
    [
        ("nf4", {0: "600MB", 1: "1GB"}, 0.6),
        ("fp4", {0: "600MB", 1: "1GB"}, 0.6),
        ("int8", {0: "1GB", 1: "2GB"}, 0.5),
    ],
)
def test_documented_caps_are_refused_and_the_smallest_of_their_ratio_that_fit_are_named(
    quantization: str, caps: dict[int, str], ratio: float
) -> None:
    """They hold it together: the second device alone would need a larger cap, though each holds the embedding."""
    with pytest.raises(PlacementError, match="does not fit: device 0 needs") as caught:
        capped("bloom-3b", quantization, caps)
    named = re.search(r"max_memory: 0=(\d+)MB,1=(\d+)MB, in the same ratio", " ".join(str(caught.value).split()))
    assert named is not None
    first, second = int(named[1]), int(named[2])
    assert first / second == pytest.approx(ratio, abs=1e-3)
    plan = capped("bloom-3b", quantization, {0: f"{first}MB", 1: f"{second}MB"})
    assert plan.capacity_tokens >= plan.block_size
    assert len(plan.stages) == 2
    with pytest.raises(PlacementError, match="does not fit"):
        capped("bloom-3b", quantization, {0: f"{first - 2}MB", 1: f"{second - 2 - round(2 / ratio)}MB"})


def test_blooms_embedding_alone_exceeds_the_documented_caps() -> None:
    (embedding,) = (m for m in footprint(CONFIGS / "bloom-3b").modules if m.name.endswith("word_embeddings"))
    assert embedding.bytes == 250_880 * 2_560 * 2 > 1_000_000_000


# What is special about the others


def test_opt_350m_projects_in_and_out_in_4_bits() -> None:
    tensors = {t.name: t for m in footprint(CONFIGS / "opt-350m").modules for t in m.tensors}
    for name in ("model.decoder.project_in.weight", "model.decoder.project_out.weight"):
        assert tensors[name].bytes == 1024 * 512 // 2 + 4 * 1024 * 512 // 64 + 64, name


def test_t5_11b_keeps_3_billion_weights_unquantised() -> None:
    weighed = footprint(CONFIGS / "t5-11b", quantization="int8")
    kept = [t for m in weighed.layers for t in m.tensors if t.name.endswith(".wo.weight")]
    assert sum(t.elements for t in kept) == 48 * 65_536 * 1_024
    assert not any(t.linear for t in kept)
    plan = solve(weighed, parse_gpus("2x24GiB"), block_size=16, max_context=512, max_sequences=4, max_batch_tokens=128)
    encoder = weighed.stacks["encoder"][1]
    assert 0 < plan.stages[0].layers[1] < 2 * encoder
    assert all(kv.cross_elements for kv in weighed.geometry.kv[encoder:])


def test_zephyr_awq_weighs_what_its_file_does() -> None:
    weighed = footprint(CONFIGS / "zephyr-7b-beta-awq")
    assert (weighed.quantization, weighed.prequantized) == ("awq-4bit", True)
    assert weighed.bytes // 10_000_000 == 415
