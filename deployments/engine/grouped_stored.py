"""GPTQ and AWQ checkpoints for GPUs, without a library of either: read as they are stored, then repacked.

transformers reads them into `StoredLinear`s, which compute with the dequantised weight, slowly: that is the plain
forward that the load's probe compares with. `repack` then puts the kernels' `GroupedLinear4` in their places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deployments.checkpoint import shards
from deployments.engine.grouped_codes import awq_codes, gptq_codes, gptq_zeros
from deployments.engine.kernels.grouped import GroupedLinear4, sum_unit
from deployments.engine.kernels.modules import Saved4
from deployments.engine.kernels.repack import why_not_tiled
from deployments.engine.kernels.weights import Weight4, tile4
from deployments.errors import ConfigError
from deployments.gptqmodel_fit import stored_format
from placement.recipe import Grouped, read_recipe

log = logging.getLogger(__name__)

METHOD = "headroom_grouped"
"""By this name transformers knows how such a checkpoint is read."""
_AT_ONCE = 2**22
"""Weights that are unpacked together: 16 MiB in int32, several times over."""
_WORD_ROWS = 32
"""Outputs come in multiples of it: whole words of codes and zeros."""


def stored_options(model_dir: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config with which transformers reads the checkpoint into `StoredLinear`s.

    Args:
        stored: the checkpoint's own.

    Raises:
        ConfigError: a linear lacks one of its tensors, or there is what this does not read.
    """
    method = "awq" if stored.get("quant_method") == "awq" else "gptq"
    return {"quant_method": METHOD, "stored": stored, "linears": _stored_linears(model_dir, method)}


def _stored_linears(model_dir: Path, method: str) -> list[str]:
    names: set[str] = set()
    for file in shards(model_dir):
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    parts = ("qweight", "qzeros", "scales", *(("g_idx",) if method == "gptq" else ()))
    linears = sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))
    if absent := [f"{linear}.{part}" for linear in linears for part in parts if f"{linear}.{part}" not in names]:
        raise ConfigError(f"{model_dir} lacks {absent[0]}, and {len(absent) - 1} more; fetch the model again")
    lone = [name for name in sorted(names) if name.endswith(".scales") and f"{name[:-6]}qweight" not in names]
    if lone:
        raise ConfigError(f"{lone[0]} scales no linear but an activation, which GPUs don't; set `device: cpu`")
    return linears


@register_quantization_config(METHOD)
class StoredConfig(QuantizationConfigMixin):
    """What `stored_options` says."""

    def __init__(self, quant_method: str, stored: dict[str, Any], linears: list[str]) -> None:
        self.quant_method: Any = quant_method
        self.stored, self.linears = stored, linears


@register_quantizer(METHOD)
class StoredQuantizer(HfQuantizer):
    """Puts `StoredLinear`s where the checkpoint has quantised ones; transformers then reads into them."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config: Any = self.quantization_config
        recipe = read_recipe(config.stored)
        if not isinstance(recipe, Grouped):
            raise TypeError(f"{recipe.name} is neither GPTQ nor AWQ")
        less_one = stored_format(recipe, config.stored) == "gptq"
        for stored in config.linears:
            name, linear = _find(model, stored)
            model.set_submodule(name, StoredLinear(linear, recipe, less_one=less_one))

    def is_serializable(self) -> bool:
        """It is not written again."""
        return False

    @property
    def is_trainable(self) -> bool:
        """It is only read."""
        return False


def _find(model: PreTrainedModel, stored: str) -> tuple[str, nn.Linear]:
    prefix = model.base_model_prefix
    for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if type(module) is nn.Linear:
            return name, module
    raise ConfigError(f"the checkpoint's {stored} is no linear of {type(model).__name__}; serve its unquantised model")


class StoredLinear(nn.Module):
    """A linear as GPTQ or AWQ stores it, on any device; dequantised for every product.

    Args:
        linear: the one whose place it takes, on the meta device.
        recipe: how it is stored, the same for all.
        less_one: GPTQ's zeros are stored less one.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None

    def __init__(self, linear: nn.Linear, recipe: Grouped, *, less_one: bool) -> None:
        super().__init__()
        self.recipe, self.less_one = recipe, less_one
        self.in_features, self.out_features = k, n = linear.in_features, linear.out_features
        self.group_size = recipe.group_of(k)
        groups, per = -(-k // self.group_size), 32 // recipe.bits
        packed = (k // per, n) if recipe.method == "gptq" else (k, n // per)
        self.register_buffer("qweight", torch.empty(packed, dtype=torch.int32, device="meta"))
        self.register_buffer("qzeros", torch.empty(groups, n // per, dtype=torch.int32, device="meta"))
        self.register_buffer("scales", torch.empty(groups, n, dtype=torch.float32, device="meta"))
        g_idx = torch.empty(k, dtype=torch.int32, device="meta") if recipe.method == "gptq" else None
        self.register_buffer("g_idx", g_idx)
        self.bias = linear.bias

    def groups(self) -> Tensor:
        """int64 [in]: the group of each input."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.in_features, device=self.qweight.device) // self.group_size

    def zeros(self) -> Tensor:
        """int32 [groups, out]."""
        if self.recipe.method == "awq":
            return awq_codes(self.qzeros)
        return gptq_zeros(self.qzeros, self.recipe.bits, less_one=self.less_one)

    def codes(self) -> Iterator[tuple[slice, Tensor]]:
        """int32 [in, some outputs], in parts, and which outputs those are."""
        size = max(1, _AT_ONCE // self.in_features // _WORD_ROWS) * _WORD_ROWS
        for start in range(0, self.out_features, size):
            part = slice(start, min(self.out_features, start + size))
            if self.recipe.method == "awq":
                yield part, awq_codes(self.qweight[:, part.start // 8 : part.stop // 8])
            else:
                yield part, gptq_codes(self.qweight[:, part], self.recipe.bits)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[out, in], rounded once."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.qweight.device)
        groups, zeros = self.groups(), self.zeros()
        for part, codes in self.codes():
            weight[part] = ((codes - zeros[:, part][groups]) * self.scales[:, part][groups]).t()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        return nn.functional.linear(x, self.dequantised(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@torch.no_grad()
def repack(model: nn.Module, dtype: torch.dtype) -> int:
    """Put the kernels' linears in the places of the stored ones, one by one. Returns how many they were.

    Args:
        dtype: in which they compute.

    Raises:
        ConfigError: a linear is not what the checkpoint's config says.
    """
    # By name: a list of modules would keep what is replaced, and with it a second copy of the model.
    names = [name for name, module in model.named_modules() if isinstance(module, StoredLinear)]
    for name in names:
        stored: Any = model.get_submodule(name)
        model.set_submodule(name, _repacked(name, stored, dtype))
    if names:
        log.info("%d linears repacked for Headroom's kernels, their codes and scales as they were", len(names))
    return len(names)


def _repacked(name: str, linear: StoredLinear, dtype: torch.dtype) -> GroupedLinear4:
    n, k, recipe = linear.out_features, linear.in_features, linear.recipe
    order, zeros, middle = _order(name, linear), linear.zeros(), 1 << (recipe.bits - 1)
    shift = None
    if recipe.shifted:
        shift = ((middle - zeros) * linear.scales * sum_unit(linear.group_size)).t().to(dtype).contiguous()
    elif not bool((zeros == middle).all()):
        raise ConfigError(f"{name} has zeros other than {middle}, but config.json says `sym: true`; correct it")
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=linear.qweight.device)
    for part, codes in linear.codes():
        rows = (codes if order is None else codes[order]).to(torch.uint8).t()
        packed[part] = rows[:, 0::2] << 4 | rows[:, 1::2]
    table = torch.arange(16, dtype=torch.float32, device=packed.device) - middle
    weight = Weight4(n, k, linear.group_size, packed.view(-1, 1), linear.scales.t().reshape(-1), table)
    if reason := why_not_tiled(n, k, linear.group_size):
        log.warning("%s (%dx%d) is dequantised for every product: %s", name, n, k, reason)
    else:
        weight = tile4(weight)
    saved = Saved4(recipe.name, dtype)
    return GroupedLinear4(weight, linear.bias, dtype, saved, order=order, shift=shift).train(linear.training)


def _order(name: str, linear: StoredLinear) -> Tensor | None:
    """int32 [in]: the inputs sorted by group; None where they are."""
    groups = linear.groups()
    side_by_side = torch.arange(linear.in_features, device=groups.device) // linear.group_size
    if not linear.recipe.act_order:
        if not torch.equal(groups, side_by_side):
            raise ConfigError(f"{name} has act-order's groups, but config.json says `desc_act: false`; correct it")
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], side_by_side):
        raise ConfigError(f"{name} has groups of other sizes than {linear.group_size}; fetch the model again")
    return order.to(torch.int32)
