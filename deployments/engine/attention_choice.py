"""Which attention backend a model gets on this machine, and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deployments.engine.attention import AttentionBackend
from deployments.engine.attention_decodes import splits_beyond
from deployments.engine.attention_flashinfer import Limits, flashinfer_backends
from deployments.engine.attention_torch import TorchAttention
from deployments.engine.flashinfer_fit import Kind, why_not, why_not_here
from deployments.engine.flashinfer_kernels import FlashInferKernels
from deployments.engine.messages import EngineLimits
from placement.plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A backend for each stage."""

    backends: tuple[AttentionBackend, ...]
    shown: str
    """What runs, for people to read; on a GPU that does without FlashInfer with the reason."""


def choose(plan: Plan, kinds: Sequence[Kind], devices: Sequence[torch.device], limits: EngineLimits | None) -> Choice:
    """FlashInfer where it can serve all layers, with its kernels loaded; else PyTorch's own operators.

    Args:
        kinds: of the model's layers.
        devices: of the stages, all of one type.
        limits: the largest steps; None: not known.

    Raises:
        ConfigError: FlashInfer's kernels do not compile.
    """
    if devices[0].type == "cpu":
        return Choice(_torch(plan, devices), "torch")
    reason = _why_not(kinds, limits)
    if reason is not None:
        log.warning("attention runs on PyTorch's own operators, which is slower: FlashInfer is not used, as %s", reason)
        return Choice(_torch(plan, devices), f"torch ({reason})")
    assert limits is not None
    longest = -(-(plan.max_context + 1) // plan.block_size)  # a step launched ahead may overrun the context by a token
    splits = splits_beyond(min(kind.kv_heads for kind in kinds))
    largest = Limits(limits.max_sequences, limits.max_batch_tokens, longest, splits)
    stages = [(device, FlashInferKernels(device)) for device in devices]
    backends = flashinfer_backends(plan.block_size, plan.num_blocks, largest, stages)
    for index, backend in enumerate(backends):  # the first loads for all
        backend.warm(kinds, log.info if index == 0 else log.debug)
    log.info("attention runs on FlashInfer")
    return Choice(backends, "flashinfer")


def _why_not(kinds: Sequence[Kind], limits: EngineLimits | None) -> str | None:
    if limits is None:
        return "the largest step is not known to the loader"
    if limits.int8_threshold:
        return "LLM.int8() with outliers waits for the host in each product, and the plan counts on no CUDA graphs"
    return why_not_here() or next((reason for kind in kinds if (reason := why_not(kind)) is not None), None)


def _torch(plan: Plan, devices: Sequence[torch.device]) -> tuple[AttentionBackend, ...]:
    return tuple(TorchAttention(plan.num_blocks, device) for device in devices)
