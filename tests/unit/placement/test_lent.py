"""T5's position biases: in the first layer of a stack, read by all of them."""

from __future__ import annotations

from pathlib import Path

from placement.footprint import Footprint, footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import solve
from tests.unit.placement.tiny_models import ENCODER_DECODERS

ENCODER = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
DECODER = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
TABLE = 32 * 4 * 2
"""Buckets, heads, bytes."""


def weighed(name: str, folder: Path) -> Footprint:
    ENCODER_DECODERS[name].save_pretrained(folder)
    return footprint(folder, quantization="nf4", dtype="bfloat16")


def test_a_layer_needs_the_table_of_its_stacks_first(tmp_path: Path) -> None:
    found = [[module.name for module in modules] for modules in weighed("t5", tmp_path).lent]
    assert found == [[], [ENCODER], [], [DECODER], [DECODER]]


def test_other_models_lend_nothing(tmp_path: Path) -> None:
    assert not any(weighed("bart", tmp_path).lent)


def test_each_stage_that_reads_it_holds_it_once(tmp_path: Path) -> None:
    model = weighed("t5", tmp_path)
    plan = solve(
        model,
        virtual_cpu_devices(("9MB",) * 5),
        block_size=4,
        max_batch_tokens=16,
        max_sequences=4,
        max_context=12,
    )
    assert [stage.layers for stage in plan.stages] == [(i, i + 1) for i in range(5)]
    assert [stage.copies for stage in plan.stages] == [(), (ENCODER,), (), (DECODER,), (DECODER,)]
    own = [sum(t.bytes for t in layer.tensors) for layer in model.layers]
    middle = plan.stages[3]
    assert middle.weight_bytes == own[3] + TABLE
    assert sum(term.bytes for term in middle.weights) == middle.weight_bytes
    assert {term.name: term.bytes for term in middle.weights}["shared"] == TABLE
