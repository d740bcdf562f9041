"""transformers takes what a plan exports: `device_map` as it is, and caps from which it draws up the same one.

Run on tiny models with random weights; devices are numbers here, nothing is put on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from accelerate.utils import check_device_map
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, modeling_utils
from transformers.quantizers.auto import AutoHfQuantizer

from placement import DoesNotFit, Footprint, Gpu, PlacementError, device_map, footprint, solve
from placement.plan import Plan
from placement.sequential import sequential_max_memory
from tests.unit.placement.tiny_models import CONFIGS, save

BLOOM = Path(__file__).resolve().parent.parent / "configs" / "bloom-3b"
QUANTIZATIONS = ("nf4", "int8", "bf16")
UNTIED = ("llama", "mistral", "gpt_neox", "phi3", "mixtral")
TIED = ("llama_tied", "gpt2", "gemma2", "falcon", "opt")
SPEEDS = ((1,), (1, 1), (1, 3), (3, 1), (1, 1, 2), (2, 1, 1, 1))
"""Of the devices; the solver gives a faster one more layers."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny model per architecture."""
    folder = tmp_path_factory.mktemp("models")
    for name in (*UNTIED, *TIED):
        save(name, folder / name)
    return folder


def plan_for(weighed: Footprint, speeds: tuple[int, ...]) -> Plan:
    gpus = [Gpu(f"gpu{i}", 10**10, speed=speed) for i, speed in enumerate(speeds)]
    return solve(weighed, gpus, block_size=16, max_batch_tokens=64, max_sequences=4)


class _Stopped(Exception):
    pass


def transformers_map(monkeypatch: pytest.MonkeyPatch, folder: Path, quantization: str, **asked: Any) -> dict[str, int]:
    """The device_map that `from_pretrained` goes on with; it is stopped before it reads weights."""
    drawn: list[dict[str, int]] = []
    original = modeling_utils._get_device_map

    def stop(*args: Any) -> NoReturn:
        drawn.append(original(*args))
        raise _Stopped

    config = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "bf16": None,
    }[quantization]
    options = {"quantization_config": config, "dtype": torch.bfloat16, **asked}
    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "_get_device_map", stop)
        with pytest.raises(_Stopped):
            AutoModelForCausalLM.from_pretrained(folder, **options)
    return drawn[0]


def device_of(name: str, devices: dict[str, int]) -> int:
    """The device of a module, by the longest entry that names it or a parent."""
    parts = name.split(".")
    return next(devices[key] for i in range(len(parts), -1, -1) if (key := ".".join(parts[:i])) in devices)


def shared(weighed: Footprint) -> set[str]:
    """Modules of which every stage has a copy."""
    return {module.name for module in weighed.with_role("shared")}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", UNTIED)
def test_sequential_reproduces_the_plan(
    monkeypatch: pytest.MonkeyPatch, models: Path, name: str, quantization: str
) -> None:
    weighed = footprint(models / name, quantization=quantization)
    splits = set()
    for speeds in SPEEDS:
        plan = plan_for(weighed, speeds)
        splits.add(tuple(stage.layers for stage in plan.stages))
        caps = sequential_max_memory(plan, weighed)
        drawn = transformers_map(monkeypatch, models / name, quantization, device_map="sequential", max_memory=caps)
        for stage in plan.stages:
            for module in set(stage.modules) - shared(weighed):
                assert device_of(module, drawn) == stage.device, (speeds, caps)
    assert len(splits) >= 4, "the speeds must ask for different splits"


@pytest.mark.parametrize("name", UNTIED)
def test_the_caps_hold_against_small_changes(monkeypatch: pytest.MonkeyPatch, models: Path, name: str) -> None:
    """A quarter of a layer more or less on each device changes nothing: the caps are in the middle of what does."""
    weighed = footprint(models / name)
    plan = plan_for(weighed, (1, 1))
    quarter = min(t.elements for t in weighed.layers[0].tensors if t.linear) // 8
    assert quarter > 100
    for change in (-quarter, quarter):
        caps = {device: cap + change for device, cap in sequential_max_memory(plan, weighed).items()}
        drawn = transformers_map(monkeypatch, models / name, "nf4", device_map="sequential", max_memory=caps)
        for stage in plan.stages:
            assert all(device_of(m, drawn) == stage.device for m in set(stage.modules) - shared(weighed))


@pytest.mark.parametrize("name", TIED)
def test_tied_ends_stay_on_one_device(monkeypatch: pytest.MonkeyPatch, models: Path, name: str) -> None:
    weighed = footprint(models / name)
    caps = sequential_max_memory(plan_for(weighed, (1,)), weighed)
    drawn = transformers_map(monkeypatch, models / name, "nf4", device_map="sequential", max_memory=caps)
    assert set(drawn.values()) == {0}
    with pytest.raises(PlacementError, match="to which it is tied; load with the plan's device_map"):
        sequential_max_memory(plan_for(weighed, (1, 1)), weighed)


@pytest.mark.parametrize("name", [*UNTIED, *TIED])
def test_a_device_map_covers_every_parameter_with_no_entry_too_many(
    monkeypatch: pytest.MonkeyPatch, models: Path, name: str
) -> None:
    weighed = footprint(models / name, quantization="int8")
    plan = plan_for(weighed, (1, 1))
    devices = device_map(plan)
    assert set(devices.values()) == {0, 1}
    model = on_meta(models / name)
    check_device_map(model, devices)  # accelerate's: every parameter has a device
    assert all(model.get_submodule(module) is not None for module in devices)
    drawn = transformers_map(monkeypatch, models / name, "int8", device_map=devices)
    assert drawn == devices


@pytest.mark.parametrize(("quantization", "caps"), [("nf4", {0: "600MB", 1: "1GB"}), ("int8", {0: "1GB", 1: "2GB"})])
def test_transformers_own_example_fits_neither_here_nor_there(quantization: str, caps: dict[int, str]) -> None:
    """BLOOM-3B on the caps of transformers' documentation; docs/placement.md says why."""
    gpus = [Gpu("gpu", 24 * 2**30)] * 2
    weighed = footprint(BLOOM, quantization=quantization)
    with pytest.raises(DoesNotFit):
        solve(weighed, gpus, block_size=16, max_batch_tokens=128, max_sequences=1, max_memory=caps)
    config = BitsAndBytesConfig(load_in_4bit=quantization == "nf4", load_in_8bit=quantization == "int8")
    model, quantizer = on_meta(BLOOM), AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map="auto")
    with pytest.raises(ValueError, match="dispatched on the CPU or the disk"):
        modeling_utils._get_device_map(model, "auto", dict(caps), quantizer)


def on_meta(folder: Path) -> PreTrainedModel:
    """The model without weights."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_device_map_loads(models: Path, quantization: str) -> None:
    """On the CPU, where all devices are one; `tests/gpu` loads on several."""
    weighed = footprint(models / "llama", quantization=quantization)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if quantization != "bf16":
        four = quantization == "nf4"
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four)
    devices = device_map(plan_for(weighed, (1, 1)), "cpu")
    model = AutoModelForCausalLM.from_pretrained(models / "llama", device_map=devices, **options)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}, "what no entry names would stay on meta"


def test_every_model_here_is_known() -> None:
    assert {CONFIGS[name].tie_word_embeddings for name in TIED} == {True}
    assert {CONFIGS[name].tie_word_embeddings for name in UNTIED} == {False}
