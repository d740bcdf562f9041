"""An encoder-decoder cut into stages, and proven against transformers' own forward before it serves anything."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from deployments.engine.attention import PagedKv
from deployments.engine.encoder_decoder import EncoderDecoderStage, find_encoder, lend_biases
from deployments.engine.encoder_decoder_probe import Sample, probe
from deployments.engine.load_probe import ProbeFailed
from deployments.engine.stages import find_decoder, find_layers
from deployments.errors import ConfigError
from placement.kv import layer_kv
from placement.plan import Plan

log = logging.getLogger(__name__)

ATTENTION = "gather cache (an encoder-decoder)"
"""How it attends, for people to read."""


def untie(model: PreTrainedModel, plan: Plan, devices: Sequence[torch.device]) -> None:
    """Give each stage a weight of its own where another one holds it too: embeddings of both stacks and the head. Which
    device the one weight is on is left to accelerate."""
    holder: dict[int, int] = {}
    for index, (stage, device) in enumerate(zip(plan.stages, devices, strict=True)):
        copies: dict[int, nn.Parameter] = {}
        for module in map(model.get_submodule, stage.modules):
            for name, weight in [*module.named_parameters(recurse=False)]:
                address = weight.data_ptr()
                if weight.device == device and holder.setdefault(address, index) == index:
                    continue
                if address not in copies:
                    copies[address] = nn.Parameter(weight.detach().clone().to(device), requires_grad=False)
                setattr(module, name, copies[address])


def proven(
    model: PreTrainedModel,
    plan: Plan,
    devices: Sequence[torch.device],
    copies: dict[str, nn.Module],
    expected: Sequence[Sample],
    *,
    rounds_by_batch: bool = False,
) -> tuple[EncoderDecoderStage, ...]:
    """Stages that compute what transformers computes.

    Args:
        model: loaded as `plan` says, without hooks.
        copies: modules that a stage holds of its own, by "stage index:name".
        expected: of the same weights.
        rounds_by_batch: as in `probe`.

    Raises:
        ConfigError: they compute something else, or the KV cache is another than the plan's.
    """
    stages = tuple(_stage(model, plan, index, devices[index], copies) for index in range(len(plan.stages)))
    name = type(model).__name__
    try:
        shown = probe(stages, _layers(model), plan, expected, rounds_by_batch=rounds_by_batch)
    except ProbeFailed as error:
        raise ConfigError(f"{name} can't be served: {error}; choose a model of another architecture") from error
    log.info("%s on the gather cache: %s", name, shown)
    return stages


def _stage(
    model: PreTrainedModel, plan: Plan, index: int, device: torch.device, copies: dict[str, nn.Module]
) -> EncoderDecoderStage:
    planned = plan.stages[index]
    own = {name: copies[f"{index}:{name}"] for name in planned.copies}
    for name, stack in (find_encoder(model), find_decoder(model)):
        layers = f"{name}.{find_layers(stack)[0]}."
        first = next((module for module in planned.modules if module.startswith(layers)), None)
        if first is not None:
            lend_biases(model, first, own)
    dtype = getattr(torch, plan.kv_dtype)
    kv = tuple(
        PagedKv(plan.num_blocks, plan.block_size, heads, size, dtype, device)
        for heads, size in _shapes(model)[slice(*planned.layers)]
        if heads
    )
    have, want = sum(cache.bytes for cache in kv), plan.kv_bytes(planned)
    if have != want:
        raise ConfigError(f"stage {index} of {plan.model} needs {have:,} bytes of KV cache, but its plan says {want:,}")
    return EncoderDecoderStage(model, planned.layers, device=device, kv=kv)


def _shapes(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """(heads, head size) of what each layer caches, (0, 0) for the encoder's."""
    config = model.config.get_text_config(decoder=True)
    encoder, decoder = _layers(model)
    facts = {
        "is_encoder_decoder": True,
        "encoder_layers": len(encoder),
        "decoder_layers": len(decoder),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None),
    }
    return tuple((kv.kv_heads, kv.head_dim) for kv in layer_kv(facts))


def _layers(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The encoder's and the decoder's."""
    return [*find_layers(find_encoder(model)[1])[1]], [*find_layers(find_decoder(model)[1])[1]]
