"""The parts of a model on the meta device: its stacks of layers, and where everything else lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from torch import nn
from transformers import PreTrainedModel

from placement.errors import PlacementError
from placement.footprint import Role

_HEADS = ("lm_head", "embed_out", "output", "final_logits_bias")


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
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layers
        and f"{path}.".startswith(f"{within}." * bool(within))
    ]
    if not lists:
        raise PlacementError(f"{type(model).__name__} keeps its {layers} layers in no list of that length")
    return Stack(name, min(lists, key=lambda path: path.count(".")), layers)


def find_units(model: PreTrainedModel, stacks: tuple[Stack, ...]) -> list[Unit]:
    """Every unit of placement, in the order first, layers, shared, last, and within a role by stack.

    Raises:
        PlacementError: a module of unknown place.
    """
    units = [Unit(f"{stack.path}.{i}", "layer", stack.name) for stack in stacks for i in range(stack.layers)]
    multimodal = model.config.get_text_config() is not model.config
    for parent, name, module in _leaves(model, "", tuple(stack.path for stack in stacks)):
        own = next((stack for stack in stacks if stack.parent == parent), None)
        full = f"{parent}.{name}" if parent else name
        units.append(_unit(full, module, own, stacks, multimodal=multimodal))
    roles, names = get_args(Role), [stack.name for stack in stacks]
    return sorted(units, key=lambda unit: (roles.index(unit.role), names.index(unit.stack)))


def _leaves(module: nn.Module, path: str, lists: tuple[str, ...]) -> Iterator[tuple[str, str, nn.Module | None]]:
    """(parent, name, module) of everything beside the stacks; a tensor of a module above a stack is its own leaf."""
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield path, name, None
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if any(listed.startswith(f"{full}.") for listed in lists):
            yield from _leaves(child, full, lists)
        elif full not in lists:
            yield path, name, child


def _unit(
    full: str, module: nn.Module | None, own: Stack | None, stacks: tuple[Stack, ...], *, multimodal: bool
) -> Unit:
    """Where a module lives: `own` is the stack beside which it stands, None for one further out."""
    name = full.rpartition(".")[2]
    first, last = (own, own) if own else (stacks[0], stacks[-1])
    if module is not None and not any(True for _ in module.parameters()):
        return Unit(full, "shared", first.name)
    if own is None and name in _HEADS:
        return Unit(full, "last", last.name)
    if isinstance(module, nn.Embedding) or "embed" in name or (own and name == "project_in"):
        return Unit(full, "first", first.name)
    if own and ("norm" in name or name in ("ln_f", "project_out")):
        return Unit(full, "last", last.name)
    if multimodal and own is None:
        return Unit(full, "first", first.name, tower=True)
    kind = "tensor" if module is None else type(module).__name__
    raise PlacementError(f"module {name} ({kind}) has no known place before or after the layers")
