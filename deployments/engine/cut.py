"""A loaded model cut into stages, on the first way of attending that proves right.

Attention over the blocks themselves, through transformers' attention function, comes first; where a model does not call
it, or asks of it what no backend computes, the gather cache. The probe decides, and its reason is logged.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deployments.engine.attention import IMPLEMENTATION, Attention, PagedKv
from deployments.engine.attention_choice import choose
from deployments.engine.flashinfer_fit import Kind
from deployments.engine.gather import GatherAttention
from deployments.engine.invariant import InvariantAttention, keep_rows_apart
from deployments.engine.load_probe import Plain, ProbeFailed, probe
from deployments.engine.messages import EngineLimits
from deployments.engine.stages import Stage, detach_kv, find_decoder, find_layers
from deployments.errors import ConfigError
from placement.anatomy import own_attention
from placement.flashinfer import stored_kv
from placement.gathered import EXPANDS, Bound, bound
from placement.kv import LayerKv, layer_kv
from placement.plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """What stages are made of.

    Args:
        model: loaded as `plan` says, without hooks.
        devices: of the stages.
        copies: modules a stage holds of its own, by "stage index:name".
        limits: the largest steps; None: not known.
    """

    model: PreTrainedModel
    plan: Plan
    devices: Sequence[torch.device]
    copies: dict[str, nn.Module]
    limits: EngineLimits | None

    def proven(self, ids: list[int], expected: Plain) -> tuple[tuple[Stage, ...], str]:
        """The stages, and how they attend, for people to read.

        Args:
            ids: the probe's tokens.
            expected: the plain forward of them.

        Raises:
            ConfigError: no way of attending computes the same.
        """
        name, own = type(self.model).__name__, self.model.config._attn_implementation
        if self.limits is not None and self.limits.batch_invariant:
            return self._invariant(ids, expected)
        reason = own_attention(self.model, self._shapes())
        if reason is None:
            choice = choose(self.plan, self._kinds(), self.devices, self.limits)
            try:
                return self._probed(choice.backends, IMPLEMENTATION, ids, expected), choice.shown
            except ProbeFailed as error:
                reason = str(error)
            del choice
            detach_kv(self.model)  # with the stages that failed goes their KV cache
            gc.collect()
            log.warning("the plan of %s counted on paged attention, and holds nothing back for the gather cache", name)
        log.warning("%s runs on the gather cache, which is slower: on paged attention %s", name, reason)
        gathers = [GatherAttention(self.plan.num_blocks, device, self._bound()) for device in self.devices]
        try:
            return self._probed(gathers, own, ids, expected), f"gather cache (on paged attention {reason})"
        except ProbeFailed as error:
            raise ConfigError(
                f"{name} can't be served: on paged attention {reason}; on the gather cache {error}; "
                "choose a model of another architecture"
            ) from error

    def _invariant(self, ids: list[int], expected: Plain) -> tuple[tuple[Stage, ...], str]:
        name = type(self.model).__name__
        keep_rows_apart(self.model)
        backends = [InvariantAttention(self.plan.num_blocks, device) for device in self.devices]
        try:
            return self._probed(backends, IMPLEMENTATION, ids, expected), InvariantAttention.name
        except ProbeFailed as error:
            raise ConfigError(
                f"batch_invariant needs paged attention, and on it {name} can't be served: {error}; leave it out, or "
                "choose a model of another architecture"
            ) from error

    def _probed(
        self, attention: Sequence[Attention], implementation: str, ids: list[int], expected: Plain
    ) -> tuple[Stage, ...]:
        self._config._attn_implementation = self.model.config._attn_implementation = implementation
        stages = tuple(self._stage(index, each) for index, each in enumerate(attention))
        rounds = self.limits is not None and self.limits.int8_threshold > 0
        probe(type(self.model).__name__, stages, self.plan, ids, expected, rounds_by_batch=rounds)
        return stages

    @property
    def _config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config()

    def _shapes(self) -> tuple[LayerKv, ...]:
        """What each layer's blocks hold, as the plan counts it."""
        # GPT-2 and others have names of their own for some of the standard ones.
        own_names = {name: getattr(self._config, name) for name in self._config.attribute_map}
        return stored_kv(layer_kv(self._config.to_dict() | own_names), self.plan.kv_dtype, self.plan.attention)

    def _bound(self) -> Bound:
        """Of a forward on the gather cache, the same as the plan's."""
        latent = (module for name, module in self.model.named_modules() if name.endswith(EXPANDS))
        expanded = max((int(module.out_features) for module in latent), default=0)
        return bound(self._config.num_attention_heads, self._shapes(), self.plan.dtype, expanded, self.plan.max_context)

    def _kinds(self) -> tuple[Kind, ...]:
        """How each layer attends, as far as a config tells; the first step shows what is really asked."""
        softcap = getattr(self._config, "attn_logit_softcapping", None)
        dtype, kv_dtype = getattr(torch, self.plan.dtype), getattr(torch, self.plan.kv_dtype)
        heads = self._config.num_attention_heads
        return tuple(Kind(heads, s.kv_heads, s.head_dim, dtype, kv_dtype, s.window, softcap) for s in self._shapes())

    def _stage(self, index: int, attention: Attention) -> Stage:
        planned, plan, device = self.plan.stages[index], self.plan, self.devices[index]
        decoder_name, decoder = find_decoder(self.model)
        layer_list, _ = find_layers(decoder)
        held = {*planned.modules, *planned.copies}
        absent = frozenset(
            name
            for name, child in decoder.named_children()
            if name != layer_list and f"{decoder_name}.{name}" not in held and _has_tensors(child)
        )
        own = {
            name.removeprefix(f"{decoder_name}."): self.copies[f"{index}:{name}"]
            for name in planned.copies
            if name.startswith(f"{decoder_name}.")
        }
        dtype = getattr(torch, plan.kv_dtype)
        kv = tuple(
            PagedKv(plan.num_blocks, plan.block_size, s.kv_heads, s.head_dim, dtype, device, latent=s.latent)
            for s in self._shapes()[slice(*planned.layers)]
        )
        have, want = sum(cache.bytes for cache in kv), plan.kv_bytes(planned)
        if have != want:
            raise ConfigError(
                f"stage {index} of {plan.model} needs {have:,} bytes of KV cache, but its plan says {want:,}"
            )
        return Stage(self.model, planned.layers, absent=absent, own=own, device=device, kv=kv, attention=attention)


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))
