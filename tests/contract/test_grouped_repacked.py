"""GPTQ and AWQ checkpoints as GPUs hold them, on the CPU: read without a library, repacked, fused.

What the kernels compute on a GPU is `ops`' definition here; tests/gpu/test_grouped_gpu.py serves them on one.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deployments.engine import grouped_stored, loader
from deployments.engine.grouped import check_kernels, grouped_options
from deployments.engine.grouped_stored import StoredLinear, repack
from deployments.engine.hooks import remove_hooks
from deployments.engine.kernels.fuse import Part, fuse_linears
from deployments.engine.kernels.grouped import GroupedLinear4
from deployments.engine.loader import load
from deployments.engine.residents import move_to_arena, resident_bytes
from deployments.engine.settle import buffer_bytes
from deployments.errors import ConfigError
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import solve
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, run
from tests.contract.grouped import CASES, Grouping, checkpoint
from tests.contract.test_grouped_checkpoints import CONFIGS

SUITED = [(name, grouping) for name, grouping in CASES if grouping.bits <= 4]
LABELS = [f"{name}, {grouping.label}" for name, grouping in SUITED]


def read(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **grouped_options(folder, on_gpu=True)
    )
    return model.eval()


def of_kind(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(2, 50, dtype=torch.int64).view(2, 24)
    found: Tensor = model(ids, use_cache=False).logits
    return found


def check_close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()) < bound


@pytest.mark.parametrize(("name", "grouping"), SUITED, ids=LABELS)
def test_repacked_linears_compute_what_the_codes_stand_for(name: str, grouping: Grouping, tmp_path: Path) -> None:
    folder, plain = checkpoint(CONFIGS[name], grouping, tmp_path)
    model = read(folder)
    stored = len(of_kind(model, StoredLinear))
    expected = logits(model)
    # The plain checkpoint's weights were rounded to float16.
    check_close(expected, logits(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)), 2e-3)
    assert repack(model, torch.float32) == stored == len(of_kind(model, GroupedLinear4)) > 0
    weighed = footprint(folder, dtype="float32").on_gpus()
    assert weighed.grouped is None
    assert resident_bytes([model]) == weighed.bytes
    check_close(logits(model), expected, 1e-5)
    groups = fuse_linears(model)
    # The layers' inputs are 64 wide: one group of 64 or more, in whatever order.
    tiled = grouping.group_size % 64 == 0
    assert groups == ((1 if name == "OPT" else 2) * model.config.num_hidden_layers if tiled else 0)
    for layer in model.get_decoder().layers:
        move_to_arena(layer)
    check_close(logits(model), expected, 1e-5)


@pytest.mark.parametrize(("name", "grouping"), [SUITED[4], SUITED[-1]], ids=[LABELS[4], LABELS[-1]])
def test_the_engine_serves_them(name: str, grouping: Grouping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that `load` does with one for GPUs, with the CPU in their place."""
    buffers: list[dict[torch.device, int]] = []
    monkeypatch.setattr(loader, "make_buffers", lambda *arguments: buffers.append(buffer_bytes(*arguments)))
    monkeypatch.setattr(loader, "grouped_options", lambda where, **_: grouped_options(where, on_gpu=True))
    folder, _ = checkpoint(CONFIGS[name], grouping, tmp_path)
    oracle, prompts = read(folder), make_prompts()
    repack(oracle, torch.float32)
    outputs = generated(oracle, prompts)
    expected = answers(outputs)
    for stages in (1, 2):
        monkeypatch.setattr(loader, "check_kernels", check_kernels)
        plan = solve(
            footprint(folder, dtype="float32").on_gpus(),
            virtual_cpu_devices(("40MB",) * stages),
            block_size=4,
            max_batch_tokens=LIMITS.max_batch_tokens,
            max_sequences=LIMITS.max_sequences,
            max_context=64,
        )
        assert len(plan.stages) == stages
        with pytest.raises(ConfigError, match="on GPUs Headroom's kernels alone compute with; set `kernels: headroom`"):
            load(folder, plan, device_type="cpu")
        monkeypatch.setattr(loader, "check_kernels", lambda *_, **__: None)
        buffers.clear()
        assert run(load(folder, plan, device_type="cpu"), plan, LIMITS, prompts)[0] == expected
        assert [list(made) for made in buffers] == [[torch.device("cpu")]], "made while the linears are as stored"


def test_each_linear_is_let_go_of_once_it_is_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read(checkpoint(CONFIGS["Llama"], Grouping(), tmp_path)[0])
    for module in model.modules():  # as on several GPUs
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    logits(model)
    remove_hooks(model)
    linears = [weakref.ref(linear) for linear in of_kind(model, StoredLinear)]
    one_by_one, there = grouped_stored._repacked, []

    def counted(*arguments: Any) -> GroupedLinear4:
        there.append(sum(linear() is not None for linear in linears))
        return one_by_one(*arguments)

    monkeypatch.setattr(grouped_stored, "_repacked", counted)
    repack(model, torch.float32)
    assert there == list(range(len(linears), 0, -1))


def test_linears_of_one_order_are_one_product(tmp_path: Path) -> None:
    folder, _ = checkpoint(CONFIGS["Mistral"], Grouping(group_size=64, act_order=True, symmetric=False), tmp_path)
    weights = load_file(folder / "model.safetensors")
    for key in weights:
        if key.endswith("g_idx"):  # as GPTQ does it, whose order is the input's
            weights[key] = (torch.arange(len(weights[key])) * 7 % len(weights[key]) // 64).int()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = read(folder)
    expected = logits(model)
    repack(model, torch.float32)
    assert fuse_linears(model) == 2 * model.config.num_hidden_layers
    check_close(logits(model), expected, 1e-5)
    layer: Any = model.get_decoder().layers[0]
    layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend="eager")  # raises at a break
    check_close(logits(model), expected, 1e-5)
    part = of_kind(model, Part)[0]
    with pytest.raises(NotImplementedError, match="copy the one that it was loaded from"):
        part.state_dict()


@pytest.mark.parametrize(
    ("grouping", "told", "reason"),
    [
        (Grouping(symmetric=False), {"sym": True}, "zeros other than 8, but config.json says `sym: true`"),
        (Grouping(act_order=True), {"desc_act": False}, "act-order's groups, but config.json says `desc_act: false`"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(
    grouping: Grouping, told: dict[str, bool], reason: str, tmp_path: Path
) -> None:
    folder, _ = checkpoint(CONFIGS["Llama"], grouping, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= told
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=reason):
        repack(read(folder), torch.float32)


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint(CONFIGS["OPT"], Grouping(method="awq", symmetric=False, version="gemm"), tmp_path)
    whole = load_file(folder / "model.safetensors")
    name = next(key for key in whole if key.endswith(".qzeros"))
    for tensors, reason in (
        ({key: value for key, value in whole.items() if key != name}, f"lacks {name}, and 0 more"),
        (whole | {"model.decoder.layers.0.act.scales": torch.ones(4)}, "scales no linear but an activation"),
        (
            {key.replace("fc1", "elsewhere"): value for key, value in whole.items()},
            "elsewhere is no linear of OPTForCausalLM",
        ),
    ):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=reason):
            read(folder)


def test_eight_bits_are_left_to_the_cpu(tmp_path: Path) -> None:
    folder, _ = checkpoint(CONFIGS["Mistral"], replace(SUITED[0][1], bits=8, group_size=-1), tmp_path)
    weighed = footprint(folder)
    assert weighed.on_gpus() == weighed
