"""A model's modules and shapes, read from transformers' own code on the meta device: no weights, no checkpoint.

The one file beside probe.py that imports torch and transformers; `placement.footprint` imports it when it is needed.
Taking the modules, ties, buffers and exclusions from the code that will load the model keeps the bytes exact.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from placement.errors import PlacementError
from placement.footprint import Geometry, Module, Role, Tensor
from placement.kv import layer_kv

_STANDARD = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_dim",
    "multi_query",
    "layer_types",
    "layers_block_type",
    "sliding_window",
    "attention_chunk_size",
    "kv_lora_rank",
    "is_encoder_decoder",
)


def read_skeleton(model_dir: Path, dtype: str) -> tuple[tuple[Module, ...], Geometry]:
    """The modules of the model in `model_dir`, their linears not yet quantised, and its geometry.

    Raises:
        PlacementError: transformers can't build it, or its parts can't be told.
    """
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except (ValueError, KeyError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise PlacementError(f"transformers can't build {model_dir.name}: {reason}") from None
    geometry = _geometry(model)
    tensors = _tensors(model, dtype)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    modules = tuple(
        Module(name, role, held, _work(held, role), order=order[name], whole=_whole(model, name))
        for name, role in _roles(model, len(geometry.kv))
        if (held := tuple(t for t in tensors if t.name.startswith(f"{name}.")))
    )
    placed = {tensor.name for module in modules for tensor in module.tensors}
    if homeless := [t.name for t in tensors if t.name not in placed]:
        raise PlacementError(f"{type(model).__name__}: no stage would hold {', '.join(homeless[:3])}")
    _check_kv(model, modules, geometry)
    return modules, geometry


def _whole(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers keeps a module on one device when it draws up a device_map."""
    module = model.get_submodule(name)
    return type(module).__name__ in (model._no_split_modules or ()) or not any(True for _ in module.children())


def _work(tensors: tuple[Tensor, ...], role: Role) -> int:
    return 0 if role == "first" else sum(t.elements for t in tensors if len(t.shape) > 1)


def _geometry(model: PreTrainedModel) -> Geometry:
    config = model.config.get_text_config(decoder=True)
    facts = _facts(config)
    if not facts["num_attention_heads"] or not facts["num_hidden_layers"]:
        raise PlacementError(f"{type(model).__name__} has no attention layers: its state is not planned yet")
    return Geometry(
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        max_context=_max_context(config),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        kv=layer_kv(facts),
    )


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    """The whole text config for `layer_kv`: its own names, transformers' standard names for them, and what some
    configs only compute. An encoder-decoder also has `encoder_layers` and `decoder_layers`, whatever its own names."""
    facts = config.to_dict() | {name: getattr(config, name, None) for name in (*config.attribute_map, *_STANDARD)}
    if facts["is_encoder_decoder"]:
        facts.setdefault("encoder_layers", facts["num_hidden_layers"])
        facts.setdefault("decoder_layers", facts.get("num_decoder_layers") or facts["num_hidden_layers"])
    return facts


def _max_context(config: PreTrainedConfig) -> int:
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise PlacementError(
        f"{config.model_type}: config.json does not say the longest context; set max_position_embeddings"
    )


def _tensors(model: PreTrainedModel, dtype: str) -> list[Tensor]:
    """Every parameter and buffer under each of its names, with the dtype that loading gives it."""
    convertible = _convertible(model)
    # transformers matches the keys of its dtype plan (what stays float32) so, against the names in a checkpoint.
    plan = model._get_dtype_plan(getattr(torch, dtype))
    kept = re.compile("|".join(key.replace("*", ".*") for key in plan) or r"(?!)")
    loaded = model.state_dict().keys()
    first_name: dict[int, str] = {}
    found = []
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        itemsize = 4 if name in loaded and kept.search(name) else tensor.element_size()
        found.append(
            Tensor(
                name=name,
                storage=first_name.setdefault(id(tensor), name),
                shape=_out_in(tensor.shape, transposed=convertible.get(name, False)),
                itemsize=itemsize,
                linear=name in convertible,
                bytes=tensor.numel() * itemsize,
            )
        )
    return found


def _out_in(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
    return tuple(reversed(shape)) if transposed else tuple(shape)


def _convertible(model: PreTrainedModel) -> dict[str, bool]:
    """The weights that transformers hands to bitsandbytes, and whether they are stored [in, out] (GPT-2's Conv1D)."""

    kept = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def _roles(model: PreTrainedModel, layers: int) -> list[tuple[str, Role]]:
    """Every unit of placement with its role, in the order first, layers, shared, last."""

    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise PlacementError(f"{type(model).__name__} keeps its {layers} layers in no list of that length")
    stack = min(lists, key=lambda name: name.count("."))
    units: list[tuple[str, Role]] = [(f"{stack}.{i}", "layer") for i in range(layers)]
    parts = stack.split(".")
    for depth in reversed(range(len(parts))):
        parent = ".".join(parts[:depth])
        for name, child in model.get_submodule(parent).named_children():
            if name != parts[depth]:
                full = f"{parent}.{name}" if parent else name
                units.append((full, _role(name, child, inside=depth == len(parts) - 1)))
    return sorted(units, key=lambda unit: get_args(Role).index(unit[1]))


def _role(name: str, module: nn.Module, *, inside: bool) -> Role:
    """Where a sibling of the layer stack lives; `inside`: a direct one, as opposed to the head beside the decoder."""

    if not any(True for _ in module.parameters()):
        return "shared"
    if not inside:
        if name in ("lm_head", "embed_out", "output"):
            return "last"
    elif isinstance(module, nn.Embedding) or "embed" in name or name == "project_in":
        return "first"
    elif "norm" in name or name in ("ln_f", "project_out"):
        return "last"
    raise PlacementError(f"module {name} ({type(module).__name__}) has no known place before or after the layers")


def _check_kv(model: PreTrainedModel, modules: tuple[Module, ...], geometry: Geometry) -> None:
    """The config's KV heads against the model's own key projections, where it has them apart."""
    layers = [module for module in modules if module.role == "layer"]
    for layer, kv in zip(layers, geometry.kv, strict=True):
        rows = [t.shape[0] for t in layer.tensors if t.name.endswith(".k_proj.weight")]
        if any(r != kv.kv_heads * kv.head_dim for r in rows):
            raise PlacementError(
                f"{type(model).__name__}: {layer.name} projects keys to {rows[0]}, the config says "
                f"{kv.kv_heads} heads of {kv.head_dim}"
            )
