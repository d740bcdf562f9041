"""What modules hold, found whole and moved into one allocation with nothing lost; on the CPU, as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from deployments.engine.kernels.fuse import fuse_linears
from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8
from deployments.engine.residents import move_to_arena, resident_bytes, resident_tensors
from deployments.engine.settle import settle_layers
from deployments.engine.stages import find_decoder, find_layers
from placement.arena import ALIGNMENT, layout
from placement.footprint import footprint
from tests.unit.engine.memory import PeakBytes
from tests.unit.engine.tiny import IDS, llama, save
from tests.unit.placement import tiny_models

QUANTISATIONS = [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)]


def storages(module: nn.Module) -> set[int]:
    tensors = resident_tensors([module]).values()
    return {tensor.untyped_storage().data_ptr() for group in tensors for tensor in group}


def values(module: nn.Module) -> list[Tensor]:
    return [group[0].detach().clone() for group in resident_tensors([module]).values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), llama(attention_bias=True))


@pytest.mark.parametrize(("quantization", "double_quant"), QUANTISATIONS)
def test_each_layer_is_one_allocation_of_the_planned_bytes(folder: Path, quantization: str, double_quant: bool) -> None:
    model = tiny_models.load(folder, quantization, double_quant, "bfloat16", {"": "cpu"})
    weighed = footprint(folder, quantization=quantization, double_quant=double_quant, dtype="bfloat16")
    layers = list(find_layers(find_decoder(model)[1])[1])
    before = [values(layer) for layer in layers]
    beside = {name: p.data_ptr() for name, p in model.named_parameters() if "layers" not in name}
    settle_layers(model, layers, kernels=False, arenas=True)
    for layer, planned, old in zip(layers, weighed.layers, before, strict=True):
        assert len(storages(layer)) == 1
        assert resident_bytes([layer]) == planned.bytes
        new = [group[0] for group in resident_tensors([layer]).values()]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(old, new, strict=True))
        assert not any(tensor.data_ptr() % 64 for tensor in new)
        (storage,) = {t.untyped_storage().nbytes() for t in new}
        assert storage == layout(t.nbytes for t in new)[1] < planned.bytes + ALIGNMENT * len(new)
    assert len(storages(model)) == len(layers) + len({*beside.values()}) + sum(1 for _ in model.buffers())
    assert beside == {name: p.data_ptr() for name, p in model.named_parameters() if "layers" not in name}


@pytest.mark.parametrize(("quantization", "double_quant"), QUANTISATIONS)
@torch.inference_mode()
def test_the_model_computes_the_same(folder: Path, quantization: str, double_quant: bool) -> None:
    """Also where it has run before, so that bitsandbytes holds its int8 weights elsewhere."""
    ids = torch.tensor([IDS])
    model = tiny_models.load(folder, quantization, double_quant, "bfloat16", {"": "cpu"})
    expected = model(input_ids=ids).logits
    settle_layers(model, find_layers(find_decoder(model)[1])[1], kernels=False, arenas=True)
    for layer in find_layers(find_decoder(model)[1])[1]:
        assert len(storages(layer)) == 1
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert all(len(storages(layer)) == 1 for layer in find_layers(find_decoder(model)[1])[1])


class Block(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, rows in {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 48}.items():
            options: dict[str, Any] = {"has_fp16_weights": False, "threshold": 0.0}
            if kind is bnb.nn.Linear4bit:
                options = {"compute_dtype": torch.bfloat16, "compress_statistics": False, "quant_type": "nf4"}
            linear = kind(128, rows, True, **options).to("cpu")
            setattr(self, name, (QuantLinear4 if kind is bnb.nn.Linear4bit else QuantLinear8).of(linear))
        self.norm = nn.RMSNorm(128, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out: Tensor = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(x)], dim=-1)
        return out


@pytest.mark.parametrize("kind", [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt])
@torch.no_grad()
def test_the_kernels_modules_move_too(kind: type[nn.Module]) -> None:
    block = Block(kind)
    assert fuse_linears(block) == 1
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    expected, saved, held = block(x), block.state_dict(), resident_bytes([block])
    saved = {name: tensor.clone() for name, tensor in saved.items()}
    assert move_to_arena(block) >= held == resident_bytes([block])
    assert len(storages(block)) == 1
    assert torch.equal(block(x), expected)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in block.state_dict().items())


def test_memory_peaks_at_one_arena_more() -> None:
    block = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    with PeakBytes() as counted:
        size = move_to_arena(block)
    assert size == 4 * 256 * 256 * 4 == counted.peak


def test_what_shares_memory_still_shares_it() -> None:
    block = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    block[1].weight.data = block[0].weight.data
    assert move_to_arena(block) == 16 * 16 * 4
    assert block[0].weight.data_ptr() == block[1].weight.data_ptr()


def test_moved_tensors_are_no_views_to_autograd_and_their_old_memory_is_gone() -> None:
    linear = nn.Linear(16, 16)
    move_to_arena(linear)
    assert not linear.weight._is_view()
    assert linear.weight.is_leaf
    assert linear.weight.untyped_storage().nbytes() == 16 * 16 * 4 + ALIGNMENT


def test_transposed_weights_keep_their_values() -> None:
    linear = nn.Linear(8, 16)
    linear.weight.data = torch.randn(8, 16).t()
    old = linear.weight.detach().clone()
    move_to_arena(linear)
    assert torch.equal(linear.weight, old)


def test_a_layer_without_tensors_takes_nothing() -> None:
    assert move_to_arena(nn.Identity()) == 0


def test_a_layer_on_two_devices_is_refused() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="must be on one device, not cpu, meta"):
        move_to_arena(block)
