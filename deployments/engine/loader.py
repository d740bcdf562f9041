"""Checkpoint + plan -> stages, verified: the bytes are where the plan says, and paged attention computes this model.

`from_pretrained` reads and quantises tensor by tensor onto the devices of the plan's `device_map`. accelerate's hooks,
which would copy the layers' shared arguments again at every layer, are removed: a stage moves its input once.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_utils,
)

from deployments.checkpoint import is_encoder_decoder, read_config
from deployments.engine.bnb_linears import compute_as_planned, shorten_linears
from deployments.engine.cut import Cut
from deployments.engine.eight_bit import quantising_in_place
from deployments.engine.embedding import quantising_embedding, settle_embedding, untied_config
from deployments.engine.encoder_decoder import EncoderDecoderStage, find_encoder
from deployments.engine.encoder_decoder_load import ATTENTION, proven, untie
from deployments.engine.encoder_decoder_probe import samples
from deployments.engine.expert_loading import quantising_experts, settle_experts
from deployments.engine.grouped import check_kernels, grouped_options, settle_grouped
from deployments.engine.grouped_stored import StoredLinear, repack
from deployments.engine.head import quantise_head
from deployments.engine.hooks import remove_hooks
from deployments.engine.laps import Laps
from deployments.engine.load_probe import plain_prompt, probe_ids
from deployments.engine.load_progress import logging_progress
from deployments.engine.messages import EngineLimits, Tuning
from deployments.engine.odd_linears import mend_odd_linears
from deployments.engine.read_ahead import reading_ahead
from deployments.engine.residents import resident_bytes
from deployments.engine.rotary import fix_frequencies
from deployments.engine.settle import expand_segments, make_buffers, settle_layers
from deployments.engine.stages import Stage, find_decoder, find_layers
from deployments.errors import ConfigError
from deployments.once import make_once
from placement.arena import QUANTISED
from placement.export import device_map
from placement.plan import Plan

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedModel:
    """A model cut into stages, ready to run."""

    stages: tuple[Stage, ...] | tuple[EncoderDecoderStage, ...]
    vocab_size: int
    """Width of the logits."""
    attention: str
    """The attention backend in use, and where it is not the fast one why."""
    encodes: bool = False
    """An encoder-decoder: a prompt is the encoder's input and, last, the decoder's first token."""

    def decoder_only(self) -> tuple[Stage, ...]:
        """The stages, for what runs a decoder alone.

        Raises:
            ConfigError: the model is an encoder-decoder.
        """
        stages = tuple(stage for stage in self.stages if isinstance(stage, Stage))
        if len(stages) < len(self.stages):
            raise ConfigError("an encoder-decoder has no perplexity of text that goes on; take a decoder-only model")
        return stages

    def with_encoder(self) -> tuple[EncoderDecoderStage, ...]:
        """The stages of an encoder-decoder; none of another model."""
        return tuple(stage for stage in self.stages if isinstance(stage, EncoderDecoderStage))


def load(
    model_dir: Path,
    plan: Plan,
    *,
    device_type: Literal["cpu", "cuda"],
    cache_dir: Path | None = None,
    limits: EngineLimits | None = None,
) -> LoadedModel:
    """Load the checkpoint in `model_dir` as `plan` says.

    Args:
        cache_dir: where a checkpoint that was quantised on the CPU is kept for the next start; None keeps none. A GPU
            quantises faster than a disk reads, so nothing is kept for one.
        limits: the largest steps, which FlashInfer's buffers are made for; None: no FlashInfer.

    Raises:
        ConfigError: the loaded bytes differ from the plan, or the model does not run on paged attention.
    """
    laps = Laps()
    devices = [
        torch.device(device_type, s.device) if device_type == "cuda" else torch.device("cpu") for s in plan.stages
    ]
    with logging_progress(plan) if device_type == "cuda" else nullcontext():
        model, quantization = _read_as_planned(model_dir, plan, device_type, cache_dir)
        laps.lap("read")
        if model.config.is_encoder_decoder:
            untie(model, plan, devices)
        elif len(devices) > 1:
            _untie(model, devices)
        if quantization is not None and plan.head:
            quantise_head(model, quantization)
        if plan.embeddings:
            settle_embedding(model, plan)
    compute_as_planned(model, plan, limits.int8_threshold if limits else 0.0)
    if device_type == "cuda":
        mend_odd_linears(model)
    settle_grouped(model)
    fix_frequencies(model)
    if plan.experts:
        settle_experts(model, plan, on_gpu=device_type == "cuda")
    if model.config.is_encoder_decoder:
        return _encoder_decoder(model, plan, devices, limits, laps)
    ids = probe_ids(model.config.get_text_config().vocab_size, plan)
    copies = _copies(model, plan, devices)
    if not any(isinstance(module, StoredLinear) for module in model.modules()):
        verify_bytes(model, plan, copies)
        laps.lap("check bytes")
    expected = _settled(model, plan, device_type, limits, copies, laps, lambda: plain_prompt(model, plan, ids))
    stages, attention = Cut(model, plan, devices, copies, limits).proven(ids, expected)
    laps.lap("prove")
    log.info("%s loaded: %s", plan.model, laps)
    return LoadedModel(stages, int(expected.logits.shape[-1]), attention)


def _read_as_planned(
    model_dir: Path, plan: Plan, device_type: Literal["cpu", "cuda"], cache_dir: Path | None
) -> tuple[PreTrainedModel, BitsAndBytesConfig | None]:
    """The model on its devices, and what it was quantised to now; None where it came so, or is not quantised."""
    already = quantised_already(model_dir)
    quantization = None if already else quantization_config(plan)
    if quantization is not None and device_type == "cpu" and cache_dir is not None:
        model_dir, quantization = quantized_copy(model_dir, plan, quantization, cache_dir), None
    where = device_map(plan, device_type)
    if quantization is None:
        model = _read(model_dir, plan.dtype, None, where)
    else:
        with _quantising(plan, model_dir, where) as config:
            model = _read(model_dir, plan.dtype, quantization, where, config)
    if already:
        _check_dtype(model, plan)
    return model, quantization


def _encoder_decoder(
    model: PreTrainedModel, plan: Plan, devices: list[torch.device], limits: EngineLimits | None, laps: Laps
) -> LoadedModel:
    copies = _copies(model, plan, devices)
    verify_bytes(model, plan, copies)
    expected = _settled(model, plan, devices[0].type, limits, copies, laps, lambda: samples(model, plan))
    rounds_by_batch = limits is not None and limits.int8_threshold > 0
    stages = proven(model, plan, devices, copies, expected, rounds_by_batch=rounds_by_batch)
    return LoadedModel(stages, int(expected[0].plain.logits.shape[-1]), ATTENTION, encodes=True)


def _settled(
    model: PreTrainedModel,
    plan: Plan,
    device_type: str,
    limits: EngineLimits | None,
    copies: dict[str, nn.Module],
    laps: Laps,
    expect: Callable[[], T],
) -> T:
    """Make `model`'s linears and memory as they will be served; `expect` runs transformers' own forward of it for the
    probe, at the last moment at which that gives what will be served."""
    kernels = device_type == "cuda" and (limits is None or limits.kernels)
    if stored := any(isinstance(module, StoredLinear) for module in model.modules()):
        check_kernels(plan, kernels=kernels)
    if early := kernels and plan.quantization == "int8":
        _settle(model, plan, kernels=kernels)  # before the plain forward, where bitsandbytes would round activations
        laps.lap("settle")
    expected = expect()
    laps.lap("plain forward")
    remove_hooks(model)
    if stored:
        make_buffers(model, getattr(torch, plan.dtype))
        repack(model, getattr(torch, plan.dtype))
        verify_bytes(model, plan, copies)
    if device_type == "cpu":
        shorten_linears(model)
        return expected
    if not early:
        _settle(model, plan, kernels=kernels)
    laps.lap("settle")
    if kernels and limits is not None and limits.tuning is not None:
        _tune(model, limits.tuning)
        laps.lap("tune")
    expand_segments()
    return expected


def quantization_config(plan: Plan) -> BitsAndBytesConfig | None:
    """What `from_pretrained` is told of the plan's quantisation; None for 16-bit and 32-bit weights."""
    return bitsandbytes_config(plan.quantization, double_quant=plan.double_quant, dtype=plan.dtype)


def bitsandbytes_config(quantization: str, *, double_quant: bool, dtype: str) -> BitsAndBytesConfig | None:
    """How transformers quantises to `quantization`; None for what isn't.

    An outlier threshold of int8 is set once it is loaded, where one is asked for: it waits for the device in each
    linear, and lets one request's outliers change another's output.
    """
    if quantization in ("nf4", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return None


def verify_bytes(model: PreTrainedModel, plan: Plan, copies: dict[str, nn.Module]) -> None:
    """Compare what each stage holds with the plan, before the first forward repacks CPU weights.

    Args:
        copies: modules a stage holds of its own, by "stage index:name".

    Raises:
        ConfigError: with both numbers, for the first stage that differs.
    """
    for i, stage in enumerate(plan.stages):
        names = [*stage.modules, *stage.copies]
        modules = [copies.get(f"{i}:{name}") or model.get_submodule(name) for name in names]
        have = resident_bytes(modules)
        if have != stage.weight_bytes:
            raise ConfigError(
                f"stage {i} of {plan.model} holds {have:,} bytes of weights, but its plan says {stage.weight_bytes:,}; "
                "the checkpoint does not match its config.json"
            )


def quantized_copy(model_dir: Path, plan: Plan, quantization: BitsAndBytesConfig, cache_dir: Path) -> Path:
    """The checkpoint quantised as planned, as bitsandbytes saves it; made once. On the CPU, quantising takes a hundred
    times as long as reading the result."""
    files = [*sorted(model_dir.glob("*.safetensors")), model_dir / "config.json"]
    stats = [f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files]
    versions = [version(package) for package in ("bitsandbytes", "transformers")]
    kind = [plan.quantization, str(plan.double_quant), plan.dtype, *(["head"] if plan.head else [])]
    key = hashlib.sha256("\n".join([*stats, *versions, *kind]).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        log.info("quantising %s to %s, once", model_dir, plan.quantization)
        read_quantised(model_dir, quantization, plan.dtype, "cpu", head=plan.head).save_pretrained(folder)

    return make_once(cache_dir / f"{plan.quantization}-{key}", make)


def read_quantised(
    model_dir: Path, quantization: BitsAndBytesConfig, dtype: str, device: int | str, *, head: bool
) -> PreTrainedModel:
    """The checkpoint quantised on one device, for `save_pretrained`.

    Args:
        dtype: of what is not quantised.
        head: quantise the head too.
    """
    model = _read(model_dir, dtype, quantization, {"": device})
    if head:
        quantise_head(model, quantization)
    return model


@contextmanager
def _quantising(plan: Plan, model_dir: Path, devices: dict[str, int | str]) -> Iterator[PreTrainedConfig | None]:
    """While a checkpoint is read: quantise as planned what transformers leaves. Yields the config to read it with."""
    with quantising_experts(plan) if plan.experts else nullcontext():
        if not plan.embeddings:
            yield None
            return
        with quantising_embedding(plan, model_dir, devices):
            yield untied_config(model_dir)


def _read(
    model_dir: Path,
    dtype: str,
    quantization: BitsAndBytesConfig | None,
    devices: dict[str, int | str],
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    on_gpu = "cpu" not in devices.values()
    options: dict[str, Any] = (
        grouped_options(model_dir, on_gpu=on_gpu) if quantization is None else {"quantization_config": quantization}
    )
    if config is not None:
        options["config"] = config
    auto = AutoModelForSeq2SeqLM if is_encoder_decoder(model_dir) else AutoModelForCausalLM
    ahead = reading_ahead(model_dir) if on_gpu else nullcontext()
    with ahead, _exact_allocations(), quantising_in_place():
        model: PreTrainedModel = auto.from_pretrained(
            model_dir,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            device_map=devices,
            **options,
        )
    model.train(False)
    return model


@contextmanager
def _exact_allocations() -> Iterator[None]:
    """Keep transformers from reserving what it guesses that a device will hold, in one piece: what the weights leave of
    it can be given back only with them, and the plan counts on it for the KV cache."""
    warm_up = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up


def _settle(model: PreTrainedModel, plan: Plan, *, kernels: bool) -> None:
    if kernels and plan.dtype == "float32" and plan.quantization in QUANTISED:
        log.warning(
            "weights are dequantised for every product: the kernels multiply 16-bit activations, and %s computes in "
            "float32; set dtype to bfloat16 or float16", plan.model
        )  # fmt: skip
    stacks = [find_decoder(model), *([find_encoder(model)] if model.config.is_encoder_decoder else [])]
    layers = [layer for _, stack in stacks for layer in find_layers(stack)[1]]
    if kernels:
        make_buffers(model, getattr(torch, plan.dtype))
    settle_layers(model, layers, kernels=kernels, arenas=plan.quantization in QUANTISED)


def _tune(model: PreTrainedModel, tuning: Tuning) -> None:
    """Before the KV cache takes what is free: the products that are timed need memory for their results."""
    from deployments.engine.kernels.tune import tune_model, tuning_folder

    tune_model(model, tuning_folder(tuning.folder), limit_s=tuning.limit_s)


def quantised_already(model_dir: Path) -> bool:
    """Whether the checkpoint's weights are quantised as they are stored."""
    config = read_config(model_dir)
    return any(part.get("quantization_config") for part in (config, config.get("text_config") or {}))


def _check_dtype(model: PreTrainedModel, plan: Plan) -> None:
    """transformers leaves what a quantised checkpoint did not quantise in the dtype in which it is stored.

    Raises:
        ConfigError: that is another than the plan's.
    """
    if model.dtype != getattr(torch, plan.dtype):
        raise ConfigError(
            f"{plan.model} stores what is not quantised in {str(model.dtype).removeprefix('torch.')}, but its plan "
            f"says {plan.dtype}; correct `dtype` in its config.json"
        )


def _untie(model: PreTrainedModel, devices: list[torch.device]) -> None:
    """Give the head, where it is tied to an embedding on another device, its own weight."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        weight = embedding.weight.detach()  # on either device: the one weight has two entries in the device_map
        embedding.weight = nn.Parameter(weight.to(devices[0]), requires_grad=False)
        head.weight = nn.Parameter(weight.clone().to(devices[-1]), requires_grad=False)


def _copies(model: PreTrainedModel, plan: Plan, devices: list[torch.device]) -> dict[str, nn.Module]:
    """Copies that stages hold of their own (rotary tables, position biases), by "stage index:name"."""
    # A copied hook would still send its inputs to the original's device.
    return {
        f"{i}:{name}": remove_hook_from_module(copy.deepcopy(model.get_submodule(name)), recurse=True).to(devices[i])
        for i, stage in enumerate(plan.stages)
        for name in stage.copies
    }
