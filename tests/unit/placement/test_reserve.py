"""The reserve adds up what stays and takes the largest of what passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deployments.engine.attention_flashinfer import Limits
from deployments.engine.flashinfer_fit import Kind, Room
from deployments.engine.forms import forms
from deployments.engine.residents import move_to_arena
from deployments.engine.sampler import SCRATCH_BYTES
from deployments.engine.sampling import weight_table
from deployments.engine.sampling_batch import padded
from placement import reserve as terms
from placement.arena import ALIGNMENT
from placement.flashinfer import why_not_flashinfer
from placement.footprint import Footprint, Geometry, Module, Tensor, footprint
from placement.hardware import DeviceType
from placement.kv import LayerKv
from placement.reserve import CUDA_CONTEXT_BYTES, SAMPLE_ROWS, Reserve, reserve
from placement.workload import CAPTURED_ROWS, Attention, Workload
from tests.unit.placement import tiny_models
from tests.unit.placement.tiny_models import save
from tests.unit.placement.toy import NOTHING, toy_footprint

MIB = 2**20
WORKLOAD = Workload(block_size=16, max_batch_tokens=8, max_sequences=4, max_context=64, kv_dtype="float16")
HEADS = toy_footprint([10] * 3, kv=(LayerKv(2, 64),) * 3)
"""Three layers that FlashInfer has kernels for: two query heads on two KV heads."""


def total(of: Reserve, *, last: bool, blocks: int, kv: int = 10) -> int:
    return sum(term.bytes for term in of.terms(last=last, blocks=blocks, kv_block_bytes=kv))


def on(
    weighed: Footprint,
    workload: Workload = WORKLOAD,
    *,
    device_type: DeviceType = "cuda",
    attention: Attention | None = None,
    devices: int = 1,
) -> Reserve:
    asked = replace(workload, attention=attention) if attention else workload
    return reserve(weighed, asked, device_type=device_type, devices=devices)


def model(*layers: tuple[Tensor, ...], quantization: str = "fp16", hidden: int = 10, work: int = 0) -> Footprint:
    """In float16, of 4 query heads on 2 KV heads of 64."""
    modules = tuple(Module(f"layers.{i}", "layer", tensors, work) for i, tensors in enumerate(layers))
    kv = (LayerKv(2, 64),) * len(layers)
    geometry = Geometry(hidden=hidden, vocab=300, heads=4, max_context=64, softcap=False, kv=kv)
    return Footprint("toy", quantization, False, "float16", modules, geometry)


def sized(name: str, size: int, *, linear: bool = True) -> Tensor:
    """A vector that takes `size` bytes."""
    return Tensor(f"{name}.weight", f"{name}.weight", (1,), 2, linear, size)


def matrix(name: str, *shape: int, linear: bool = False) -> Tensor:
    return Tensor(f"{name}.weight", f"{name}.weight", shape, 2, linear, 0)


LLAMA = model(
    (matrix("q", 100, 10), matrix("k", 50, 10), matrix("gate", 300, 10), matrix("up", 300, 10), matrix("down", 10, 300))
)


def test_temporaries_count_with_the_largest() -> None:
    # activations 5; the largest of prefill 40, dequantisation 30, decode 2 a block, and at the end, when activations
    # are gone, logits 90.
    parts = replace(NOTHING, activations=5, logits=90, prefill=40, dequantisation=30, gather_per_block=2)
    assert total(parts, last=False, blocks=10) == 5 + 40
    assert total(parts, last=False, blocks=30) == 5 + 60
    assert total(parts, last=True, blocks=30) == 90
    assert total(parts, last=True, blocks=50) == 5 + 100


def test_logits_below_the_activations_take_nothing_more() -> None:
    parts = replace(NOTHING, activations=50, logits=40)
    assert total(parts, last=True, blocks=1) == 50
    assert [term.name for term in parts.terms(last=True, blocks=1, kv_block_bytes=1)] == ["activations"]


def test_the_load_peak_passes_before_the_cache_is_there() -> None:
    # Running: buffers 7 + activations 5 + prefill 40 + 3 blocks of 10 = 82. A peak of 80 is hidden, one of 100 is not.
    running = replace(NOTHING, buffers=7, activations=5, prefill=40)
    assert total(replace(running, load_peak=80), last=False, blocks=2) == 52
    assert total(replace(running, load_peak=100), last=False, blocks=2) == 52 + 18


def test_what_stays_is_there_beside_all_else() -> None:
    # Context 1, graphs 2 and fragmentation 3 are no part of what a load peak of 100 hides; buffers 4 are.
    stays = replace(NOTHING, context=1, graphs=2, fragmentation=3, buffers=4, load_peak=100)
    assert stays.held(last=False, blocks=0, kv_block_bytes=0) == 106


def test_the_last_stage_keeps_the_sampler_and_the_ids() -> None:
    # A table of 100, and 8 for each of 5 blocks and the scratch block.
    parts = replace(NOTHING, sampler=100, per_block=8)
    assert total(parts, last=False, blocks=5) == 0
    assert total(parts, last=True, blocks=5) == 100 + 8 * 6
    for device_type in ("cpu", "cuda"):
        real = on(HEADS, device_type=device_type)
        assert (real.sampler, real.per_block) == (weight_table().nbytes, 4 * WORKLOAD.block_size)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("blocks", [1, 7, 1000])
@pytest.mark.parametrize("load_peak", [0, 300])
def test_terms_and_held_are_one_sum(last: bool, blocks: int, load_peak: int) -> None:
    parts = Reserve(
        context=11,
        graphs=13,
        fragmentation=7,
        activations=5,
        buffers=17,
        logits=90,
        prefill=40,
        dequantisation=30,
        sampler=19,
        per_block=3,
        gather_per_block=2,
        load_peak=load_peak,
        graph_logits=23,
    )
    assert parts.held(last=last, blocks=blocks, kv_block_bytes=10) == total(parts, last=last, blocks=blocks) + 10 * (
        blocks + 1
    )


def test_a_cpu_device_has_neither_context_nor_buffers() -> None:
    cpu, cuda = on(HEADS, device_type="cpu"), on(HEADS)
    assert (cpu.context, cpu.fragmentation, cpu.graphs, cpu.buffers) == (0, 0, 0, 0)
    assert cuda.context == CUDA_CONTEXT_BYTES
    assert cuda.fragmentation == terms._FRAGMENTATION_BYTES
    assert cpu == on(HEADS, device_type="cpu", attention="torch")


def test_what_grows_with_what() -> None:
    small = on(toy_footprint([10]), device_type="cpu")
    longer = on(toy_footprint([10]), replace(WORKLOAD, max_batch_tokens=16), device_type="cpu")
    assert longer.activations == 2 * small.activations
    assert longer.prefill > small.prefill
    assert longer.gather_per_block == small.gather_per_block


def test_logits_and_sampling() -> None:
    # One logit is padded to 256. Float16 hidden states of 8 rows and of the 4 sampled, logits and scratch of these 4.
    assert on(toy_footprint([10])).logits == (8 + 4) * 2 + 256 * (4 * 2 + 4 * SCRATCH_BYTES)
    many = replace(WORKLOAD, max_batch_tokens=1000, max_sequences=500)
    assert on(toy_footprint([10]), many).logits == 1500 * 2 + 256 * (500 * 2 + SAMPLE_ROWS * SCRATCH_BYTES)
    # 300 logits are two segments.
    assert on(LLAMA).logits == (8 + 4) * 10 * 2 + 512 * 4 * (2 + SCRATCH_BYTES)
    assert [-(-size // terms._SEGMENT) * terms._SEGMENT for size in (1, 256, 300)] == [*map(padded, (1, 256, 300))]


def test_flashinfer_gathers_nothing_and_torch_captures_nothing() -> None:
    flashinfer, gathering = on(HEADS, attention="flashinfer"), on(HEADS, attention="torch")
    assert (flashinfer.prefill, flashinfer.dequantisation, flashinfer.gather_per_block) == (0, 0, 0)
    assert gathering.graphs == 0
    assert gathering.prefill > 0
    assert gathering.gather_per_block > 0
    assert flashinfer.buffers > gathering.buffers - terms.driver_bytes(0), "FlashInfer's workspaces"
    cpu = on(HEADS, device_type="cpu")
    assert (gathering.prefill, gathering.gather_per_block) == (cpu.prefill, cpu.gather_per_block)


def test_gpus_have_flashinfer_where_it_has_kernels() -> None:
    assert on(HEADS) == on(HEADS, attention="flashinfer")
    large = toy_footprint([10], kv=(LayerKv(2, 512),))
    assert on(large) == on(large, attention="torch")


def test_flashinfer_has_room_for_heads_as_they_are_stored() -> None:
    odd, stored = (toy_footprint([10], kv=(LayerKv(2, size),)) for size in (80, 128))
    assert on(odd) == on(stored)
    assert on(odd, attention="torch") != on(stored, attention="torch")


def test_layers_without_attention_do_not_matter_to_flashinfer() -> None:
    hybrid = toy_footprint([10] * 2, kv=(LayerKv(2, 64), LayerKv(conv_elements=3, recurrent_elements=5)))
    assert why_not_flashinfer(hybrid, WORKLOAD) is None
    alike = toy_footprint([10] * 2, kv=(LayerKv(2, 64),) * 2)
    for attention in ("flashinfer", "torch"):
        mixed, uniform = on(hybrid, attention=attention), on(alike, attention=attention)
        assert (mixed.buffers, mixed.prefill) == (uniform.buffers, uniform.prefill)


def test_a_model_without_attention_gathers_nothing() -> None:
    recurrent = toy_footprint([10], kv=(LayerKv(recurrent_elements=5),))
    assert on(recurrent, device_type="cpu").prefill == 0
    captures = terms._CUBLAS_BYTES - terms.driver_bytes(0)  # a stream more, and the driver's is among the graphs
    assert on(recurrent).buffers - on(recurrent, attention="torch").buffers - captures < 4096, "a step's tables"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (4, 4, 64), (8, 1, 256), (64, 8, 128), (14, 2, 64), (71, 1, 64)]
)
@pytest.mark.parametrize(("tokens", "sequences", "context"), [(8, 4, 64), (2048, 256, 131_072), (512, 1, 1000)])
def test_flashinfer_workspaces_hold_what_the_engine_allocates(
    heads: int, kv_heads: int, head_dim: int, tokens: int, sequences: int, context: int
) -> None:
    workload = Workload(16, tokens, sequences, context, "float16")
    weighed = toy_footprint([10], kv=(LayerKv(kv_heads, head_dim),))
    weighed = replace(weighed, geometry=replace(weighed.geometry, heads=heads))
    kind = Kind(heads, kv_heads, head_dim, torch.float16, torch.float16, None, None)
    room = Room.of(kind, terms._SMS, sequences=tokens, rows=tokens)
    tables = 4 * Limits(sequences, tokens, -(-(context + 1) // 16)).table_size
    counted = on(weighed, workload).buffers - on(weighed, workload, attention="torch").buffers
    # A stream more, which graphs are captured on; and what the driver takes is among these.
    counted += terms.driver_bytes(0) - terms._CUBLAS_BYTES
    assert room.floats + room.ints + tables <= counted
    assert counted <= 2.2 * room.floats + room.ints + tables + 2**20, "no more than a factor for half-sized tiles"


def test_every_size_of_heads_has_a_workspace_and_every_kind_a_plan() -> None:
    one, other = LayerKv(2, 64), LayerKv(2, 128)
    windowed = replace(one, window=32)
    costs = {
        layers: on(toy_footprint([10] * 2, kv=layers)).buffers
        for layers in ((one, one), (one, windowed), (one, other), (other, other))
    }
    base, plan_more, both, large = costs.values()
    assert 0 < plan_more - base < 2**16, "equal sizes share the parts, and each kind has its plan"
    assert both > large > base


def test_several_devices_have_inboxes() -> None:
    one, two, three = (on(LLAMA, devices=devices).buffers for devices in (1, 2, 3))
    # A step of 8 rows of 10 elements in 2 bytes for each slot, and as many slots as devices.
    assert two - one == 2 * 8 * 10 * 2
    assert three - one == 3 * 8 * 10 * 2


def test_hidden_states_of_graphs_come_in_and_go_out() -> None:
    narrow, wide = (replace(LLAMA, geometry=replace(LLAMA.geometry, hidden=hidden)) for hidden in (10, 30))
    # 8 captured rows in and out, 20 elements more, 2 bytes.
    assert on(wide).buffers - on(narrow).buffers == 2 * 8 * 20 * 2


@pytest.mark.parametrize("tokens", [1, 8, 64, 500, 768, 2048])
@pytest.mark.parametrize("sequences", [1, 16, 256, 1000, 4096])
@pytest.mark.parametrize("devices", [1, 2])
def test_captured_rows_are_those_of_the_engine(tokens: int, sequences: int, devices: int) -> None:
    workload = replace(WORKLOAD, max_batch_tokens=tokens, max_sequences=sequences)
    largest = max(form.rows for form in forms(max_batch_tokens=tokens, max_sequences=sequences, lanes=devices))
    assert largest <= workload.captured_rows(devices) <= max(largest, min(tokens, CAPTURED_ROWS))


def test_graphs_keep_the_activations_of_the_largest() -> None:
    small = on(LLAMA)
    assert small.graphs == terms._GRAPH_BYTES + terms._GRAPH_LAYER_BYTES + small.activations, "8 rows, all captured"
    long = on(LLAMA, replace(WORKLOAD, max_batch_tokens=2 * CAPTURED_ROWS))
    assert 2 * (long.graphs - terms._GRAPH_BYTES - terms._GRAPH_LAYER_BYTES) == long.activations
    deeper = on(model(*(layer.tensors for layer in LLAMA.layers * 3)))
    assert deeper.graphs - small.graphs == 2 * terms._GRAPH_LAYER_BYTES


def test_logits_in_a_graph_count_above_its_activations() -> None:
    """On the last stage: two of them, where the head scales or caps the first."""
    small, twice = on(LLAMA), 2 * 512 * 4 * 2
    assert small.graph_logits == 0, "300 elements thrice in a row: they fit"
    many = on(replace(LLAMA, geometry=replace(LLAMA.geometry, vocab=100 * 512)))
    assert many.graph_logits == 100 * twice - small.activations
    assert [on(HEADS, attention="torch").graph_logits, on(HEADS, device_type="cpu").graph_logits] == [0, 0]
    parts = replace(NOTHING, graphs=13, graph_logits=5)
    assert [total(parts, last=last, blocks=0) for last in (False, True)] == [13, 18]


def test_activations_of_compiled_and_of_plain_layers() -> None:
    # Three hidden states of 10; gate, up and their product of 300; 8 tokens of 2 bytes.
    assert on(LLAMA).activations == 8 * 2 * (3 * 10 + 3 * 300)
    # Four hidden states and every product, the widest twice, in 2 bytes; two norms of 10 in 4.
    plain = 8 * (2 * (4 * 10 + 100 + 50 + 300 + 300 + 10 + 300) + 2 * 4 * 10)
    assert on(LLAMA, attention="torch").activations == plain == on(LLAMA, device_type="cpu").activations


def test_the_widest_layer_counts() -> None:
    wide = (matrix("gate", 5000, 10),)
    assert on(model(LLAMA.layers[0].tensors, wide)).activations == 8 * 2 * (3 * 10 + 2 * 5000)


def test_a_layer_without_matrices_has_hidden_states_alone() -> None:
    empty = model((), (matrix("norm", 10),))
    assert on(empty).activations == 8 * 2 * 3 * 10
    assert on(empty, device_type="cpu").activations == 8 * (2 * 4 * 10 + 2 * 4 * 10)


def test_tokens_gather_the_rows_of_fused_experts_that_they_visit() -> None:
    # 8 experts of gate and up [2 * 6, 10] and down [10, 6]; a token visits 2. Its router is 8 wide.
    experts = (matrix("mlp.experts.gate_up", 8, 12, 10), matrix("mlp.experts.down", 8, 10, 6))
    work = 8 * 10 + 2 * (12 * 10 + 10 * 6)
    weighed = model((matrix("router", 8, 10), *experts), work=work)
    visited = 2 * ((12 + 10) + (10 + 6))
    assert on(weighed).activations == 8 * 2 * (3 * 10 + 8 + 2 * visited)
    assert on(weighed, device_type="cpu").activations == 8 * (2 * (4 * 10 + 8 + 2 * visited) + 2 * 4 * 10)


def test_experts_of_their_own_count_as_often_as_they_are_visited() -> None:
    # 8 experts of gate and up of 6 and down of 10; a token visits 2.
    shapes = {"gate": (6, 10), "up": (6, 10), "down": (10, 6)}
    experts = [matrix(f"mlp.experts.{i}.{name}", *shape) for i in range(8) for name, shape in shapes.items()]
    weighed = model((matrix("router", 8, 10), *experts), work=8 * 10 + 2 * 3 * 60)
    assert on(weighed).activations == 8 * 2 * (3 * 10 + 8 + 2 * (2 * (6 + 6 + 10)))


def test_experts_of_a_real_model(tmp_path: Path) -> None:
    weighed = footprint(save("qwen3_moe", tmp_path), quantization="fp16")
    (gate_up,) = {t.shape for t in weighed.layers[0].tensors if t.name.endswith("experts.gate_up_proj")}
    _, double, hidden = gate_up
    # 2 of 4 experts; q, k, v, o and the router are narrower.
    visited = 2 * ((double + hidden) + (hidden + double // 2))
    widest = max(t.shape[0] for t in weighed.layers[0].tensors if len(t.shape) == 2)
    assert widest < visited
    assert on(weighed, attention="flashinfer").activations == 8 * 2 * (3 * hidden + 2 * visited + widest)


def test_kernels_keep_partial_sums_and_a_dequantised_weight() -> None:
    def kept(elements: int, quantization: str = "nf4") -> int:
        weighed = model((matrix("q", elements, 1, linear=True),), quantization=quantization)
        return on(weighed).buffers

    plain = kept(100, "fp16")
    assert kept(100) - plain == terms._KERNEL_BYTES + 2 * 2 * 100
    assert kept(100, "int8") == kept(100)
    assert kept(10**9) - plain == terms._KERNEL_BYTES + terms._DEQUANTISED_MOST


def test_loading_holds_the_largest_weight_in_the_compute_dtype() -> None:
    weighed = model((matrix("q", 100, 10, linear=True), matrix("norm", 10_000, 10)), quantization="nf4")
    assert on(weighed, device_type="cpu").load_peak == 1000 * (2 + terms._QUANTISE_BYTES["nf4"])
    # The arena of six pieces and a norm, of no bytes in this toy: 7 * 512.
    assert on(weighed).load_peak == 7 * ALIGNMENT
    large = model((matrix("q", 100, 100, linear=True),), quantization="nf4")
    assert on(large).load_peak == 2 * 10_000
    assert on(replace(weighed, quantization="fp16")).load_peak == 0


@pytest.mark.parametrize(("quantization", "share"), [("nf4", 45), ("int8", 30), ("fp16", 0)])
def test_loading_leaves_holes_until_layers_have_arenas(quantization: str, share: int) -> None:
    layer = (sized("q", 12 * MIB), sized("k", 4 * MIB), sized("norm", 8192, linear=False))
    weighed = model(layer, layer, quantization=quantization)
    quantised = 2 * 16 * MIB
    arena = (16 * MIB + 8192 + (6 + 6 + 1) * ALIGNMENT) if share else 0
    for devices in (1, 2):
        assert on(weighed, devices=devices).load_peak == quantised * share // 100 // devices + arena


def test_arenas_are_rounded_to_segments() -> None:
    def rounding(*sizes: int, quantization: str = "nf4") -> int:
        weighed = model(*((sized("q", size),) for size in sizes), quantization=quantization)
        return on(weighed).fragmentation - on(replace(weighed, quantization="fp16")).fragmentation

    padded = 6 * ALIGNMENT
    assert rounding(20 * MIB - padded) == padded
    assert rounding(20 * MIB) == 2 * MIB
    assert rounding(20 * MIB, 12 * MIB + 512) == 2 * MIB + 2 * MIB - 512
    assert rounding(7 * MIB) == 3 * MIB, "two in 20 MiB"
    assert rounding(20 * MIB, quantization="bf16") == 0
    assert on(model((sized("q", 20 * MIB),), quantization="nf4"), device_type="cpu").fragmentation == 0


def test_arenas_are_counted_with_no_less_than_the_engine_makes(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    for quantization, double_quant in (("nf4", False), ("nf4", True), ("int8", False)):
        weighed = footprint(folder, quantization=quantization, double_quant=double_quant)
        loaded = tiny_models.load(folder, quantization, double_quant, "bfloat16", {"": "cpu"})
        for (planned, size), layer in zip(terms._arenas(weighed), loaded.get_decoder().layers, strict=True):
            made = move_to_arena(layer)
            assert planned.bytes < made <= size <= made + 5 * ALIGNMENT * len(planned.tensors)
