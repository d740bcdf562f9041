"""The stages of an encoder-decoder on GPUs that are not there: PyTorch's fake tensors know their device, and have no
values. So a tensor on the wrong device raises, and so does whatever would have to wait for a GPU to know a size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from deployments.engine import encoder_decoder
from deployments.engine.attention import RowSpan
from deployments.engine.cross_batches import CrossStep
from deployments.engine.encoder_decoder import EncoderDecoderStage
from deployments.engine.encoder_decoder_load import _stage, untie
from deployments.engine.stages import StepRows
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve
from tests.unit.placement.tiny_models import ENCODER_DECODERS

BLOCK = 4


class ByOperators(TorchFunctionMode):
    """`tensor[...]` and others by operators: what Python's methods do first wants a GPU, of PyTorch builds without."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__:
            func = {Tensor.__invert__: torch.bitwise_not, Tensor.contiguous: torch.ops.aten.contiguous.default}.get(
                func, func
            )
            return func(*args, **(kwargs or {}))
        found, index = args
        axis, gathered = 0, list[Tensor | None]()
        for part in index if isinstance(index, tuple) else (index,):
            if part is None:
                found = found.unsqueeze(axis)
            elif isinstance(part, int):
                found = found.select(axis, part)
                continue
            elif isinstance(part, slice):
                found = torch.ops.aten.slice.Tensor(found, axis, part.start, part.stop, part.step or 1)
            gathered.append(part if isinstance(part, Tensor) else None)
            axis += 1
        return torch.ops.aten.index.Tensor(found, gathered) if any(g is not None for g in gathered) else found


class Real(CrossStep):
    """Laid out on the host, with values."""

    @classmethod
    def of(cls, step: StepRows, block_size: int) -> CrossStep:
        with unset_fake_temporarily():
            return CrossStep.of(step, block_size)


@pytest.fixture(autouse=True)
def no_real_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_decoder, "current", lambda _: nullcontext())
    monkeypatch.setattr(encoder_decoder, "CrossStep", Real)


@contextmanager
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), ByOperators():
        yield


def planned(name: str, folder: Path, stages: int, dtype: str = "bfloat16") -> Plan:
    ENCODER_DECODERS[name].save_pretrained(folder)
    quantization = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    plan = solve(
        footprint(folder, quantization=quantization),
        virtual_cpu_devices(("40MB",) * stages),
        block_size=BLOCK,
        max_batch_tokens=64,
        max_sequences=4,
        max_context=48,
    )
    assert len(plan.stages) == stages
    return replace(plan, num_blocks=40)


def without_values(name: str, plan: Plan) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(
            ENCODER_DECODERS[name], dtype=getattr(torch, plan.dtype)
        )
    if plan.dtype == "float16":
        for path, module in model.named_modules():
            if path.endswith(".wo"):
                module.float()  # as `from_pretrained` keeps it
    return model.eval().requires_grad_(False)


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    for part in module.modules():
        for name, weight in [*part.named_parameters(recurse=False)]:
            empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
    return module


def cut_on_gpus(model: PreTrainedModel, plan: Plan) -> tuple[EncoderDecoderStage, ...]:
    devices = [torch.device("cuda", index) for index in range(len(plan.stages))]
    own = {f"{i}:{path}": model.get_submodule(path) for i, stage in enumerate(plan.stages) for path in stage.copies}
    copies = {name: copy.deepcopy(module) for name, module in own.items()}
    for name, module in copies.items():
        on_device(module, devices[int(name.partition(":")[0])])
    for stage, device in zip(plan.stages, devices, strict=True):
        for path in stage.modules:
            on_device(model.get_submodule(path), device)
    return tuple(_stage(model, plan, index, device, copies) for index, device in enumerate(devices))


def steps() -> list[StepRows]:
    """Two prompts; one more beside their decodes; decodes; and one that was preempted, with its output."""

    def table(first: int, tokens: int) -> tuple[int, ...]:
        return tuple(range(first, first + -(-tokens // BLOCK)))

    every = [
        (RowSpan(0, 10, table(0, 10), 9), RowSpan(0, 4, table(10, 4), 3)),
        (RowSpan(10, 1, table(0, 11), 9), RowSpan(4, 1, table(10, 5), 3), RowSpan(0, 8, table(20, 8), 7)),
        (RowSpan(11, 1, table(0, 12), 9), RowSpan(5, 1, table(10, 6), 3)),
        (RowSpan(0, 14, table(0, 14), 9),),
    ]
    found = []
    for spans in every:
        positions = tuple(p for span in spans for p in range(span.start, span.start + span.count))
        found.append(StepRows((1,) * len(positions), positions, spans, (0, len(positions) - 1)))
    return found


@pytest.mark.parametrize(
    ("name", "stages", "dtype"),
    [
        ("t5", 1, "bfloat16"),
        ("t5", 2, "float16"),
        ("t5", 5, "bfloat16"),
        ("t5_v1_1", 2, "bfloat16"),
        ("t5_v1_1", 5, "float16"),
    ],
)
def test_every_tensor_is_on_its_stages_device_and_no_size_is_asked_of_one(
    name: str, stages: int, dtype: str, tmp_path: Path
) -> None:
    plan = planned(name, tmp_path, stages, dtype)
    model = without_values(name, plan)
    with fake():
        cut = cut_on_gpus(model, plan)
        for step in steps():
            out = None
            for stage in cut:
                out = stage.run(step, out, BLOCK)
                assert out.device == stage.device
                if stage is not cut[-1]:
                    assert out.shape == (1, len(step.ids), stage.hidden_size)
                    assert out.dtype == stage.hidden_dtype
            assert out is not None
            assert out.shape == (2, ENCODER_DECODERS[name].vocab_size)
    assert cut[0].hidden_dtype == (torch.float32 if dtype == "float16" else torch.bfloat16)


def test_what_waits_for_a_gpu_raises_here() -> None:
    """Or the test above would show nothing."""
    with fake():
        mask = torch.zeros(4, dtype=torch.bool, device="cuda:0")
        values = torch.zeros(4, device="cuda:0")
        with pytest.raises(RuntimeError):
            mask.nonzero()
        with pytest.raises(RuntimeError):
            values[mask]
        with pytest.raises(RuntimeError):
            bool(mask.all())
        with pytest.raises(RuntimeError):
            values + torch.zeros(4, device="cuda:1")


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")])
def test_a_tied_weight_is_on_each_device_that_uses_it(devices: tuple[str, str], tmp_path: Path) -> None:
    """Wherever accelerate left the one that there is."""
    plan = planned("t5", tmp_path, 2)
    model = AutoModelForSeq2SeqLM.from_config(ENCODER_DECODERS["t5"])
    untie(model, plan, [torch.device(device) for device in devices])
    for stage, device in zip(plan.stages, devices, strict=True):
        embeddings = [model.get_submodule(path) for path in stage.modules if path.endswith("embed_tokens")]
        embeddings += [model.get_submodule(path) for path in stage.modules if path in ("shared", "lm_head")]
        assert {each.weight.device.type for each in embeddings} == {device}
        assert len({id(each.weight) for each in embeddings}) == 1, "one for all of a device"
