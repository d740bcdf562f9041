"""The loader: what it verifies, what it refuses, and the quantised copy it keeps."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file

from deployments.engine import cut, loader
from deployments.engine.bnb_linears import shorten_linears
from deployments.engine.load_probe import Plain
from deployments.engine.loader import load, quantization_config, quantized_copy
from deployments.engine.stages import Stage, run_stages
from deployments.errors import ConfigError
from placement.errors import PlacementError
from placement.plan import Plan
from tests.unit.engine.tiny import VOCAB, llama, plan_of, rows, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), llama())


# What goes on beside a load


@pytest.mark.parametrize(("device_type", "shown"), [("cuda", [1, 0]), ("cpu", [])])
def test_progress_is_logged_while_a_gpu_is_loaded_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device_type: Literal["cpu", "cuda"], shown: list[int]
) -> None:
    changes: list[int] = []

    @contextmanager
    def progress(_: Plan) -> Iterator[None]:
        changes.append(1)
        try:
            yield
        finally:
            changes.append(0)

    def read(*_: object) -> None:
        assert changes == shown[:1]
        raise OSError("no such disk")

    monkeypatch.setattr(loader, "logging_progress", progress)
    monkeypatch.setattr(loader, "_read_as_planned", read)
    with pytest.raises(OSError, match="no such disk"):
        load(folder, plan_of(folder), device_type=device_type)
    assert changes == shown


@pytest.mark.parametrize(("device", "ahead"), [(0, True), ("cpu", False)])
def test_files_are_read_ahead_of_a_gpus_load_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: int | str, ahead: bool
) -> None:
    said: list[object] = []

    @contextmanager
    def reading(model_dir: Path) -> Iterator[None]:
        said.append(model_dir)
        yield
        said.append("ended")

    class Auto:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> torch.nn.Module:
            said.append("loads")
            return torch.nn.Module()

    monkeypatch.setattr(loader, "reading_ahead", reading)
    monkeypatch.setattr(loader, "AutoModelForCausalLM", Auto)
    loader._read(folder, "float32", None, {"": device})
    assert said == ([folder, "loads", "ended"] if ahead else ["loads"])


# Bytes against the plan


def with_first_stage(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, stages=(replace(plan.stages[0], **changes), *plan.stages[1:]))


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "bf16", "fp32"])
def test_what_is_loaded_has_the_planned_bytes(folder: Path, quantization: str) -> None:
    plan = plan_of(folder, quantization=quantization, dtype=None if quantization == "bf16" else "float32")
    assert load(folder, plan, device_type="cpu").vocab_size == VOCAB


def test_other_weights_than_planned_are_refused(folder: Path) -> None:
    plan = plan_of(folder, stages=2)
    have = plan.stages[0].weight_bytes
    with pytest.raises(
        ConfigError, match=f"stage 0 .* holds {have:,} bytes of weights, but its plan says {have + 8:,}"
    ):
        load(folder, with_first_stage(plan, weight_bytes=have + 8), device_type="cpu")


def test_other_kv_than_planned_is_refused(folder: Path) -> None:
    plan = plan_of(folder)
    have, planned = plan.kv_bytes(plan.stages[0]), plan.stages[0].kv_block_bytes
    message = f"stage 0 .* needs {have:,} bytes of KV cache, but its plan says {2 * have:,}"
    with pytest.raises(ConfigError, match=message):
        load(folder, with_first_stage(plan, kv_block_bytes=2 * planned), device_type="cpu")


# A model's own files


def test_code_in_a_models_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    """`trust_remote_code` is off, and no setting turns it on."""
    copy, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder, copy)
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    plan = plan_of(copy)
    assert load(copy, plan, device_type="cpu").vocab_size == VOCAB
    assert not ran.exists()
    config["model_type"] = "evil"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, PlacementError, ValueError)):
        plan_of(copy)
    with pytest.raises((ConfigError, ValueError)):
        load(copy, plan, device_type="cpu")
    assert not ran.exists()


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    """A pickle runs its author's code as it is read."""
    copy, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder, copy)
    for weights in copy.glob("*.safetensors*"):
        weights.unlink()

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(ran), "w")

    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises((ConfigError, OSError)):
        load(copy, plan_of(folder), device_type="cpu")
    assert not ran.exists()


# KV in fp8


def test_fp8_blocks_pass_the_probe_and_hold_a_quarter_of_float32(folder: Path) -> None:
    plan, small = plan_of(folder), plan_of(folder, kv_dtype="fp8")
    assert small.stages[0].kv_block_bytes * 4 == plan.stages[0].kv_block_bytes
    (stage,) = load(folder, small, device_type="cpu").stages
    assert {cache.keys.dtype for cache in stage.kv} == {torch.float8_e4m3fn}


# Float32


def linears(stages: tuple[Stage, ...]) -> list[Any]:
    modules = [module for stage in stages for module in stage._decoder.modules()]
    return [module for module in modules if isinstance(module, bitsandbytes.nn.Linear4bit)]


@pytest.mark.parametrize(("dtype", "rounds"), [("float32", False), ("bfloat16", True)])
def test_float32_does_not_round_inside(folder: Path, dtype: str, rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes would take its AVX512-BF16 path wherever the CPU has one."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    nothing = Plain(torch.zeros(1, VOCAB), ())
    monkeypatch.setattr(loader, "plain_prompt", lambda *_: nothing)  # a CPU without the path would crash
    monkeypatch.setattr(cut, "probe", lambda *_, **__: None)
    found = linears(load(folder, plan_of(folder, dtype=dtype), device_type="cpu").stages)
    assert len(found) == 14
    assert {module.support_avx512bf16_for_cpu for module in found} == {rounds}


# The quantised copy


def copy_of(folder: Path, plan: Plan, cache: Path) -> Path:
    quantization = quantization_config(plan)
    assert quantization is not None
    return quantized_copy(folder, plan, quantization, cache)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_quantised_copy_is_made_once_and_is_the_same(folder: Path, quantization: str, tmp_path: Path) -> None:
    plan = plan_of(folder, quantization=quantization)
    copy = copy_of(folder, plan, tmp_path)
    (weights,) = copy.glob("*.safetensors")
    written = weights.stat().st_mtime_ns
    direct = load(folder, plan, device_type="cpu")
    kept = load(folder, plan, device_type="cpu", cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [copy.name]
    assert weights.stat().st_mtime_ns == written
    step = rows([(0, 20, tuple(range(5)))], tuple(range(20)))
    expected = run_stages(direct.stages, step, plan.block_size)
    assert torch.equal(run_stages(kept.stages, step, plan.block_size), expected)


def test_the_copy_holds_what_quantising_gives(folder: Path, tmp_path: Path) -> None:
    name, weight = "model.layers.0.mlp.up_proj.weight", load_file(folder / "model.safetensors")
    copy = load_file(copy_of(folder, plan_of(folder), tmp_path) / "model.safetensors")
    packed, state = bitsandbytes.functional.quantize_4bit(weight[name], blocksize=64, quant_type="nf4")
    assert torch.equal(copy[name], packed)
    assert torch.equal(copy[f"{name}.absmax"], state.absmax)
    int8 = load_file(copy_of(folder, plan_of(folder, quantization="int8"), tmp_path) / "model.safetensors")
    scales = weight[name].half().abs().amax(-1).float()
    assert torch.equal(int8[f"{name.removesuffix('weight')}SCB"], scales)
    step = float(scales.max()) / 127
    torch.testing.assert_close(int8[name] * scales[:, None] / 127, weight[name], rtol=0, atol=0.6 * step)


def test_a_changed_source_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    source, cache = save(tmp_path / "source", llama()), tmp_path / "cache"
    plan = plan_of(source)
    first = copy_of(source, plan, cache)
    assert copy_of(source, plan, cache) == first
    weights = source / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    second = copy_of(source, plan, cache)
    assert second != first
    assert copy_of(source, plan_of(source, quantization="fp4"), cache) not in (first, second)


def test_a_copy_that_fails_leaves_no_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        copy_of(folder, plan_of(folder), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("bias", [False, True])
def test_a_shortened_linear_gives_the_same_bits(bias: bool) -> None:
    torch.manual_seed(0)
    linear = bitsandbytes.nn.Linear4bit(
        64, 96, bias=bias, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        torch.randn(96, 64, dtype=torch.bfloat16),
        requires_grad=False,
        compress_statistics=False,
        quant_type="nf4",
        module=linear,
    ).to("cpu")
    if bias:
        linear.bias = torch.nn.Parameter(torch.randn(96, dtype=torch.bfloat16), requires_grad=False)
    linear.eval()
    rows = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = linear(rows)
        shorten_linears(linear)
        again = linear(rows)
    assert ("forward" in vars(linear)) == getattr(linear.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(again, expected)


@pytest.mark.parametrize(
    ("dtype", "kernels", "told"), [("float32", True, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_float32_on_the_kernels_is_told(
    folder: Path,
    dtype: str,
    kernels: bool,
    told: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loader, "settle_layers", lambda *_, **__: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loader._settle(model, plan_of(folder, dtype=dtype), kernels=kernels)
    assert caplog.text.count("weights are dequantised for every product") == told
