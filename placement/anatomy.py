"""The parts of a model on the meta device: its stacks of layers, and where everything else lives."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from placement.errors import PlacementError
from placement.footprint import Role
from placement.kv import LayerKv

_HEADS = (
    "lm_head",
    "embed_out",
    "output",
    "output_projection",
    "cls",
    "final_logits_bias",
)  # where `get_output_embeddings` doesn't tell


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of layers that run one after another."""

    name: str
    """"layers", or of an encoder-decoder "encoder" and "decoder"."""
    path: str
    """Dotted name of the ModuleList."""
    layers: int

    @property
    def parent(self) -> str:
        """Dotted name of the module that runs the list."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Unit:
    """A module (or a tensor that belongs to no module of its own) that is placed whole."""

    name: str
    role: Role
    stack: str
    tower: bool = False
    """Of another modality than text: a vision or audio encoder, or what joins it to the text model."""


def fused_experts(model: nn.Module, block_size: int) -> dict[str, nn.Parameter]:
    """Dotted name -> weights [experts, a, b] of the mixtures of experts whose forward takes one expert's at a time.

    Those are transformers' modules under its experts interface, which leaves a `has_gate` in each. Weights of which an
    expert is no whole number of quantisation blocks are left out.
    """
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        for name, parameter in own_fused_experts(module, block_size).items()
    }


def own_fused_experts(module: nn.Module, block_size: int) -> dict[str, nn.Parameter]:
    """The same of one module, by the names of its own parameters."""
    if not hasattr(module, "has_gate"):
        return {}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter[0].numel() % block_size == 0
    }


def own_attention(model: nn.Module, kv: Iterable[LayerKv]) -> str | None:
    """Why the attention of a decoder-only model can't be given to another function, as the end of a sentence; None: it
    can, as far as its code tells. The engine's probe at load has the last word.

    transformers' models look the function up by a name in `ALL_ATTENTION_FUNCTIONS`; BLOOM, Falcon, MPT, GPT-J and
    others compute attention in code of their own. MLA attends to what it expands from the cached latent.

    Args:
        kv: what its layers cache.
    """
    callers = [module for module in model.modules() if _looks_up_attention(module)]
    if not callers:
        return "its layers do not call transformers' attention function"
    if any(getattr(module, "sinks", None) is not None for module in callers):
        return "its attention has sinks"
    if any(layer.latent for layer in kv):
        return "latent attention is computed otherwise"
    return None


def _looks_up_attention(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def find_stacks(model: PreTrainedModel, encoder_layers: int, layers: int) -> tuple[Stack, ...]:
    """The stacks of layers, in the order in which they run.

    Args:
        encoder_layers: of an encoder-decoder's encoder; 0 for a decoder-only model.
        layers: of the decoder.

    Raises:
        PlacementError: no list of that many layers.
    """
    if not encoder_layers:
        return (_stack(model, "layers", model.get_decoder(), layers),)
    encoder = _stack(model, "encoder", model.get_encoder(), encoder_layers)
    return encoder, _stack(model, "decoder", model.get_decoder(), layers)


def _stack(model: PreTrainedModel, name: str, owner: nn.Module, layers: int) -> Stack:
    within = next((path for path, module in model.named_modules() if module is owner), "")
    lists = [
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    # What `get_decoder` finds is not always the module that has the layers.
    lists = [path for path in lists if path.startswith(f"{within}.")] or lists
    if not lists:
        raise PlacementError(f"{type(model).__name__} keeps its {layers} layers in no list of that length")
    return Stack(name, min(lists, key=lambda path: path.count(".")), layers)


def find_units(model: PreTrainedModel, stacks: tuple[Stack, ...]) -> list[Unit]:
    """Every unit of placement, in the order first, layers, shared, last, and within a role by stack.

    Raises:
        PlacementError: a module of unknown place.
    """
    units = [Unit(f"{stack.path}.{i}", "layer", stack.name) for stack in stacks for i in range(stack.layers)]
    inner = tuple(stack.path for stack in stacks)
    head = model.get_output_embeddings()
    multimodal = model.config.get_text_config() is not model.config
    for parent, name, part in _leaves(model, "", inner):
        own = next((stack for stack in stacks if stack.parent == parent), None)
        full = f"{parent}.{name}" if parent else name
        is_head = isinstance(part, nn.Module) and head is not None and any(child is head for child in part.modules())
        first, last = (own, own) if own else (stacks[0], stacks[-1])
        role = "last" if is_head else _role(name, part, inside=own is not None)
        if role is not None:
            units.append(Unit(full, role, last.name if role == "last" else first.name))
        elif multimodal and own is None:
            units.append(Unit(full, "first", first.name, tower=True))
        else:
            raise PlacementError(
                f"{type(model).__name__}: module {name} ({type(part).__name__}) has no known place before or after the "
                "layers"
            )
    roles, names = get_args(Role), [stack.name for stack in stacks]
    return sorted(units, key=lambda unit: (roles.index(unit.role), names.index(unit.stack)))


def _leaves(module: nn.Module, path: str, lists: tuple[str, ...]) -> Iterator[tuple[str, str, nn.Module | Tensor]]:
    """(parent, name, part) of everything beside the stacks; a tensor of a module above a stack is a part of its own."""
    for tensor_name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield path, tensor_name, tensor
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if any(listed.startswith(f"{full}.") for listed in lists):
            yield from _leaves(child, full, lists)
        elif full not in lists:
            yield path, name, child


def _role(name: str, part: nn.Module | Tensor, *, inside: bool) -> Role | None:
    """Where a part lives, by its name and kind; `inside`: it stands directly beside a list of layers.

    None: it is neither an embedding, nor a norm, nor a head, nor small enough to be copied.
    """
    if name in _HEADS and not inside:
        return "last"
    parameters = part.parameters() if isinstance(part, nn.Module) else [part][: isinstance(part, nn.Parameter)]
    if not any(True for _ in parameters):
        return "shared"
    # Gemma 3n and 4 prepare inputs of all layers beside the embedding.
    if isinstance(part, nn.Embedding) or "embed" in name or (inside and name.startswith(("project_in", "per_layer"))):
        return "first"
    if inside and ("norm" in name or name in ("ln_f", "project_out")):
        return "last"
    return None
