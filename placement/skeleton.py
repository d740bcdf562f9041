"""A model's modules and shapes, read from transformers' own code on the meta device: no weights, no checkpoint.

With `anatomy`, the one file beside probe.py that imports torch and transformers; `placement.footprint` imports it when
it is needed. Taking the modules, ties, buffers and exclusions from the code that will load the model keeps the bytes
exact. Once transformers is imported (seconds), a model of 32 layers takes about 30 ms and one of 80 about 65 ms.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from placement.anatomy import Stack, find_stacks, find_units, fused_experts, own_attention
from placement.errors import PlacementError
from placement.footprint import Geometry, Module, Tensor
from placement.headers import Gguf
from placement.kv import RELATIVE_CONTEXT, LayerKv, layer_kv
from placement.recipe import BLOCK, Grouped, Recipe
from placement.source import Source

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
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without weights."""

    modules: tuple[Module, ...]
    """Linears weigh what they would unquantised."""
    geometry: Geometry
    left_out: tuple[str, ...]
    """Vision and audio towers that text-only serving does without."""


def read_skeleton(
    source: Source, dtype: str, recipe: Recipe, *, vision: bool, experts: bool, head: bool, embeddings: bool
) -> Skeleton:
    """The modules of a model, those that `recipe` converts marked.

    Args:
        vision: count the vision or audio tower, which lives with the first layers; otherwise it is left out.
        experts: `recipe` converts fused experts too, as the engine can; transformers leaves them in 16 bits.
        head: the same of the head.
        embeddings: the same of the input embedding.

    Raises:
        PlacementError: transformers can't build it, or its parts can't be told.
    """
    model = _build(source, dtype, vision=vision)
    facts = _facts(model.config)
    geometry = _geometry(model, facts)
    encoder_layers = facts["encoder_layers"] if facts["is_encoder_decoder"] else 0
    stacks = find_stacks(model, encoder_layers, len(geometry.kv) - encoder_layers)
    units = find_units(model, stacks)
    towers = tuple(unit.name for unit in units if unit.tower)
    if vision and not towers:
        raise PlacementError(f"{source.name} has no vision or audio tower to count; leave vision out")
    convertible = _convertible(model, recipe, stacks)
    if experts:
        convertible |= _experts(model, source.name)
    own = _head(model) if head or embeddings else None
    if head:
        if own is None:
            raise PlacementError(f"{source.name} has no linear head to quantise; leave quantize_head out")
        convertible[own] = False
    if embeddings:
        convertible[_embedding(model, source.name)] = False
    held = _by_unit(_tensors(model, dtype, convertible, own), {unit.name for unit in units})
    if homeless := held.pop(""):
        names = ", ".join(tensor.name for tensor in homeless[:3])
        raise PlacementError(f"{type(model).__name__}: no stage would hold {names}")
    parts = {name: (i, module) for i, (name, module) in enumerate(model.named_modules())}
    share = _expert_share(facts)
    modules = tuple(
        Module(
            name=unit.name,
            role=unit.role,
            tensors=held[unit.name],
            work=0 if unit.role == "first" else sum(_multiply_adds(t, share) for t in held[unit.name]),
            stack=unit.stack,
            order=parts[unit.name][0] if unit.name in parts else 0,
            whole=unit.name not in parts or _whole(model, parts[unit.name][1]),
        )
        for unit in units
        if held[unit.name] and (vision or not unit.tower)
    )
    _check_kv(model, modules, geometry)
    return Skeleton(modules, geometry, () if vision else towers)


def _build(source: Source, dtype: str, *, vision: bool) -> PreTrainedModel:
    config = _gguf_config(source.gguf) if source.gguf else dict(copy.deepcopy(source.config))
    config.pop("quantization_config", None)
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise PlacementError(f"transformers knows no model_type {kind}, which {source.name} says it is")
    try:
        typed: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(config)
        with torch.device("meta"):
            model: PreTrainedModel = _auto(typed, vision=vision).from_config(typed, dtype=getattr(torch, dtype))
    except Exception as error:  # noqa: BLE001  a model's own code may raise anything at a config it can't take
        reason = " ".join(str(error).split())
        raise PlacementError(f"transformers can't build {source.name}: {type(error).__name__}: {reason}") from None
    return model


def _auto(config: PreTrainedConfig, *, vision: bool) -> Any:
    """transformers' class that makes a generating model of `config`."""
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if multimodal and (vision or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _gguf_config(gguf: Gguf) -> dict[str, Any]:
    """config.json of a GGUF file, by transformers' own table of names, without its slow reader.

    A guess that is wrong shows: the model's weights are counted against the file's.
    """
    metadata = gguf.metadata
    architecture = str(metadata.get("general.architecture"))
    renamed = architecture.replace("moe", "_moe").replace("-", "_")
    kind = next((name for name in (architecture, renamed) if name in GGUF_CONFIG_MAPPING), None)
    if kind is None:
        raise PlacementError(
            f"GGUF files of architecture {architecture} are not planned yet; use its safetensors model"
        )
    if kind == "llama" and "mistral" in str(metadata.get("general.name")).lower():
        kind = "mistral"
    table: dict[str, Any] = GGUF_CONFIG_MAPPING
    defaults: dict[str, Any] = GGUF_CONFIG_DEFAULTS_MAPPING
    config = dict(defaults.get(kind, {}))
    for key, name in table[kind].items():
        if name not in (None, -1) and f"{architecture}.{key}" in metadata:
            config[name] = metadata[f"{architecture}.{key}"]
    config.setdefault("vocab_size", gguf.tensors["token_embd.weight"].shape[0])
    names = gguf.tensors.keys()
    # As transformers does: the head of those two is tied even where the file has one.
    config["tie_word_embeddings"] = "output.weight" not in names or kind in ("falcon", "bloom")
    if kind == "stablelm":
        config["use_qkv_bias"] = any(name.endswith("attn_q.bias") for name in names)
        config["use_parallel_residual"] = not any("ffn_norm" in name for name in names)
    # The text model alone is in such a file.
    config["model_type"] = f"{kind}_text" if kind in ("gemma3", "gemma4") else kind
    return config


def _by_unit(tensors: list[Tensor], units: set[str]) -> dict[str, tuple[Tensor, ...]]:
    """Unit -> its tensors; "" -> those that are in none."""
    held: dict[str, list[Tensor]] = {name: [] for name in ("", *units)}
    for tensor in tensors:
        name = tensor.name
        while name and name not in units:
            name = name.rpartition(".")[0]
        held[name].append(tensor)
    return {name: tuple(own) for name, own in held.items()}


def _whole(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether transformers keeps a module on one device when it draws up a device_map."""
    return type(module).__name__ in (model._no_split_modules or ()) or not any(True for _ in module.children())


def _multiply_adds(tensor: Tensor, share: tuple[int, int]) -> int:
    """Of one token: the elements of a matrix, of an expert's only as often as a token visits it."""
    if len(tensor.shape) < 2:
        return 0
    visited, experts = share if ".experts." in tensor.name else (1, 1)
    return tensor.elements * visited // experts


def _expert_share(facts: Mapping[str, Any]) -> tuple[int, int]:
    """(experts that a token visits, experts)."""
    counts = (facts.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next((count for count in counts if isinstance(count, int) and count > 0), 1)
    visited = facts.get("num_experts_per_tok") or experts
    return min(int(visited), experts), experts


def _geometry(model: PreTrainedModel, facts: Mapping[str, Any]) -> Geometry:
    config = model.config.get_text_config(decoder=True)
    if not facts["num_attention_heads"] or not facts["num_hidden_layers"]:
        raise PlacementError(
            f"{type(model).__name__} has no attention layers, and its state is not planned yet; serve a model with "
            "attention in its layers"
        )
    kv = _kv(facts)
    longest = _max_context(config)
    original = _before_longrope(config, longest)
    return Geometry(
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        heads=facts["num_attention_heads"],
        max_context=original or longest,
        stretched_to=None if original is None else longest,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        kv=kv,
        own_attention=None if facts["is_encoder_decoder"] else own_attention(model, kv),
    )


def _facts(whole: PreTrainedConfig) -> dict[str, Any]:
    """The whole text config for `layer_kv`: its own names, transformers' standard names for them, and what some
    configs only compute. An encoder-decoder also has `encoder_layers` and `decoder_layers`, whatever its own names."""
    config = whole.get_text_config(decoder=True)
    facts = _named(config)
    facts["is_encoder_decoder"] = whole.is_encoder_decoder
    if whole.is_encoder_decoder:
        both, encoder = _named(whole), _named(whole.get_text_config(encoder=True))
        layers = facts["num_hidden_layers"]
        facts["encoder_layers"] = both.get("encoder_layers") or encoder.get("num_hidden_layers") or layers
        facts["decoder_layers"] = both.get("decoder_layers") or both.get("num_decoder_layers") or layers
    return facts


def _named(config: PreTrainedConfig) -> dict[str, Any]:
    facts = config.to_dict()
    for name in (*config.attribute_map, *_STANDARD):
        # A value that differs from layer to layer is refused; the one in the dict then holds for the others.
        with suppress(RuntimeError):
            facts[name] = getattr(config, name, None)
    return facts


def _kv(facts: Mapping[str, Any]) -> tuple[LayerKv, ...]:
    """What each layer caches, those with settings of their own included."""
    layers = list(layer_kv(facts))
    for index, own in (facts.get("per_layer_config") or {}).items():
        layers[int(index)] = layer_kv({**facts, **own})[int(index)]
    return tuple(layers)


def _max_context(config: PreTrainedConfig) -> int:
    for name in _CONTEXTS:
        if isinstance(value := getattr(config, name, None), int):
            return value
    if config.is_encoder_decoder and hasattr(config, "relative_attention_num_buckets"):
        return RELATIVE_CONTEXT
    raise PlacementError(
        f"{config.model_type}: config.json does not say the longest context; set max_position_embeddings"
    )


def _before_longrope(config: PreTrainedConfig, longest: int) -> int | None:
    """The length beyond which longrope turns all keys of a sequence anew, where that is below `longest`: those in the
    cache would be wrong."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = (rotary, *(each for each in rotary.values() if isinstance(each, dict)))  # one, or one by type of layer
    originals = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((original for original in originals if original < longest), default=None)


def _tensors(model: PreTrainedModel, dtype: str, convertible: Mapping[str, bool], head: str | None) -> list[Tensor]:
    """Every parameter and buffer under each of its names, with the dtype that loading gives it.

    Args:
        head: the weight that gets storage of its own, whatever it is tied to: no checkpoint has it then.
    """
    # transformers matches the keys of its dtype plan (what stays float32) so, against the names in a checkpoint.
    plan = model._get_dtype_plan(getattr(torch, dtype))
    kept = re.compile("|".join(key.replace("*", ".*") for key in plan) or r"(?!)")
    loaded = model.state_dict().keys()
    first_name: dict[int, str] = {}
    found = []
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shared = [tensor for name, tensor in named if name != head]
    for name, tensor in named:
        itemsize = 4 if name in loaded and kept.search(name) else tensor.element_size()
        found.append(
            Tensor(
                name=name,
                storage=name if name == head else first_name.setdefault(id(tensor), name),
                shape=_out_in(tensor.shape, transposed=convertible.get(name, False)),
                itemsize=itemsize,
                linear=name in convertible,
                bytes=tensor.numel() * itemsize,
                stored=name in loaded and not (name == head and any(tensor is other for other in shared)),
            )
        )
    return found


def _out_in(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
    return tuple(reversed(shape)) if transposed else tuple(shape)


def _convertible(model: PreTrainedModel, recipe: Recipe, stacks: tuple[Stack, ...]) -> dict[str, bool]:
    """The weights that transformers converts to `recipe`, and whether they are stored [in, out] (GPT-2's Conv1D).

    Experts fused into 3-D parameters are no linears: transformers leaves them in 16 bits.
    """
    linears = {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }
    if isinstance(recipe, Grouped) and recipe.method == "gptq":
        inside = tuple(f"{stack.path}." for stack in stacks)
        head = [name for name in linears if recipe.lm_head and name.endswith("lm_head")]
        names = [name for name in linears if name.startswith(inside)] + head
    else:
        kept = HfQuantizer.get_modules_to_not_convert(
            model,
            None if recipe.skip is None else list(recipe.skip),
            list(model._keep_in_fp32_modules or ()),
            add_default_skips=isinstance(recipe, Grouped),
        )
        names = [name for name in linears if should_convert_module(name, kept)]
    return {f"{name}.weight": linears[name] for name in names if recipe.for_module(name) is not None}


def _experts(model: PreTrainedModel, name: str) -> dict[str, bool]:
    found = fused_experts(model, BLOCK)
    if not found:
        raise PlacementError(f"{name} has no fused experts to quantise; leave quantize_experts out")
    return dict.fromkeys(found, False)


def _head(model: PreTrainedModel) -> str | None:
    """Dotted name of the head's weight; None: it is no plain linear."""
    head = model.get_output_embeddings()
    found = next((path for path, module in model.named_modules() if module is head and type(module) is nn.Linear), None)
    return None if found is None else f"{found}.weight"


def _embedding(model: PreTrainedModel, name: str) -> str:
    """Dotted name of the input embedding's weight, whose rows are whole blocks."""
    embedding: Any = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    if model.config.is_encoder_decoder or type(embedding) is not nn.Embedding or embedding.embedding_dim % BLOCK:
        kind = "of two stacks" if model.config.is_encoder_decoder else type(embedding).__name__
        raise PlacementError(
            f"{name} has an embedding that is not quantised ({kind}, of {embedding.weight.shape[-1]} elements a row; a "
            f"plain one with a multiple of {BLOCK} is needed); leave quantize_embeddings out"
        )
    return f"{path}.weight"


def _check_kv(model: PreTrainedModel, modules: tuple[Module, ...], geometry: Geometry) -> None:
    """The config's KV heads against the model's own key projections, where it has them apart."""
    layers = [module for module in modules if module.role == "layer"]
    for layer, kv in zip(layers, geometry.kv, strict=True):
        rows = [t.shape[0] for t in layer.tensors if t.name.endswith(".k_proj.weight")]
        if kv.kv_heads and not kv.latent and any(r != kv.kv_heads * kv.head_dim for r in rows):
            raise PlacementError(
                f"{type(model).__name__}: {layer.name} projects keys to {rows[0]}, the config says "
                f"{kv.kv_heads} heads of {kv.head_dim}"
            )
