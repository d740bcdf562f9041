"""Bytes of every module of a model at every quantisation, before anything loads.

The model is built on the meta device (no weights) by `placement.skeleton`, which imports transformers and torch and is
itself imported only when a footprint is asked for; a checkpoint's headers, where they can be read, correct it
(`placement.reconcile`); all else is arithmetic.

What is counted is what a device holds after
`AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(...), dtype=dtype)` and before
the first forward (bitsandbytes repacks on the CPU then): parameters, buffers (persistent or not) and quantisation
state. `placement.recipe` has the formulas. Biases, norms, embeddings, the head, tensors with a fixed dtype, experts
fused into one parameter and whatever else transformers excludes from quantisation keep their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

from placement.errors import PlacementError
from placement.kv import LayerKv, dtype_bytes
from placement.recipe import (
    BLOCK,
    FourBit,
    Grouped,
    Plain,
    Quantization,
    Recipe,
    compute_dtype,
    make_recipe,
    read_recipe,
)
from placement.source import Source, find_source

__all__ = ["Footprint", "Geometry", "Module", "Quantization", "Role", "Tensor", "footprint", "resident_bytes"]

Role = Literal["first", "layer", "shared", "last"]
_Of = TypeVar("_Of", bound=Recipe)
_LENT = ".relative_attention_bias"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter or buffer."""

    name: str
    """Full dotted name."""
    storage: str
    """Tensors of one storage (tied weights) are held once per device."""
    shape: tuple[int, ...]
    itemsize: int
    """Bytes per element while it is not quantised."""
    linear: bool
    """The weight of a linear that a quantisation converts."""
    bytes: int
    """What is resident, quantisation state included."""
    stored: bool = True
    """A checkpoint has it: a parameter or a persistent buffer."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)  # no slots: what is asked for again and again is kept
class Module:
    """One unit of placement: an entry of `device_map`."""

    name: str
    role: Role
    """Where it lives: with the first layer of its stack, a layer itself, copied to every stage, with the last layer of
    its stack."""
    tensors: tuple[Tensor, ...]
    work: int
    """Multiply-adds per token: elements of its matrices (0 for a lookup)."""
    stack: str = "layers"
    """Its stack of layers: "layers" of a decoder-only model, "encoder" or "decoder" of an encoder-decoder."""
    order: int = 0
    """Rises in the order in which the model registers its modules: the order in which `device_map="sequential"`
    takes them."""
    whole: bool = True
    """transformers itself never splits it over devices."""

    @cached_property
    def bytes(self) -> int:
        """What a device holds for this module alone."""
        return resident_bytes((self,))


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of activations."""

    hidden: int
    vocab: int
    heads: int
    max_context: int
    """Tokens of prompt + output that the model was made for."""
    softcap: bool
    """Attention scores pass a tanh, so they exist as a tensor."""
    kv: tuple[LayerKv, ...]
    """Per layer, parallel to `Footprint.layers` (an encoder's layers included)."""
    own_attention: str | None = None
    """Why attention can't run over the KV blocks themselves, as the end of a sentence; None: it can."""
    stretched_to: int | None = None
    """Positions that longrope reaches with other frequencies than up to `max_context`; None: it is not longrope's."""


@dataclass(frozen=True)  # no slots: see Module
class Footprint:
    """A model at one quantisation and dtype."""

    model: str
    quantization: str
    double_quant: bool
    dtype: str
    """Of what is not quantised, and of compute."""
    modules: tuple[Module, ...]
    """First, layers in order, shared, last; within a role by stack."""
    geometry: Geometry
    prequantized: bool = False
    """The checkpoint itself is quantised, so it can't be had at another quantisation."""
    left_out: tuple[str, ...] = ()
    """Vision and audio towers of the checkpoint that are not counted: text-only serving does without."""
    experts: bool = False
    """Fused experts are quantised too."""
    head: bool = False
    """The head is quantised too; where it is tied to the embedding, it is a quantised copy beside it."""
    embeddings: bool = False
    """The input embedding is quantised too, apart from a head that is tied to it."""
    grouped: Grouped | None = None
    """How GPTQ's or AWQ's linears are stored, which is what the modules weigh; on GPUs they weigh what `on_gpus`
    says."""

    @cached_property
    def layers(self) -> tuple[Module, ...]:
        """The layers of all stacks as one sequence, in the order in which they run: an encoder's come first."""
        return self.with_role("layer")

    @cached_property
    def stacks(self) -> dict[str, tuple[int, int]]:
        """First and past-last layer of each stack, in order; one entry, "layers", for a decoder-only model."""
        names = [layer.stack for layer in self.layers]
        return {name: (names.index(name), len(names) - names[::-1].index(name)) for name in dict.fromkeys(names)}

    @cached_property
    def beside(self) -> tuple[tuple[int, Module], ...]:
        """Every module with the role first or last, with the index of the layer on whose device it lives.

        In an encoder-decoder that includes modules in the middle: the encoder's final norm lives with the encoder's
        last layer, the decoder's embedding with its first. Tensors of one storage count once per device.
        """
        ends = {name: {"first": start, "last": end - 1} for name, (start, end) in self.stacks.items()}
        return tuple(
            (ends[module.stack][module.role], module) for module in self.modules if module.role in ("first", "last")
        )

    @property
    def lent(self) -> tuple[tuple[Module, ...], ...]:
        """For each layer the modules inside the first layer of its stack that it does not run without: T5 has a table
        of position biases in the first layer alone, which all layers read."""
        return tuple(
            tuple(_lent(self.layers[start], layer))
            for start, end in self.stacks.values()
            for layer in self.layers[start:end]
        )

    @property
    def bytes(self) -> int:
        """The whole model on one device."""
        return resident_bytes(self.modules)

    def on_gpus(self) -> Footprint:
        """The same model as GPUs hold it: GPTQ's and AWQ's linears are repacked there, all others are as they are.
        Where one of theirs does not suit GPUs, so is the whole model, and `grouped` stays."""
        recipe = self.grouped
        linears = [tensor for module in self.modules for tensor in module.tensors if tensor.linear]
        if recipe is None or not all(_own(recipe, tensor).suits_gpus(tensor.shape) for tensor in linears):
            return self
        modules = tuple(_repacked(module, recipe, dtype_bytes(self.dtype)) for module in self.modules)
        return replace(self, modules=modules, grouped=None)

    def with_role(self, role: Role) -> tuple[Module, ...]:
        """The modules of one role, in order."""
        return tuple(module for module in self.modules if module.role == role)

    def at(self, quantization: str, *, double_quant: bool = False) -> Footprint:
        """The same model and dtype under nf4, fp4 or int8."""
        if self.prequantized:
            raise PlacementError(f"{self.model} is already quantised ({self.quantization}); give the unquantised model")
        if quantization not in ("nf4", "fp4", "int8"):
            raise PlacementError(f"{quantization} may change the dtype; build the footprint anew")
        recipe = make_recipe(quantization, double_quant=double_quant)
        return replace(
            self,
            quantization=quantization,
            double_quant=double_quant,
            modules=tuple(_weigh(module, recipe) for module in self.modules),
        )


def _lent(first: Module, layer: Module) -> Iterator[Module]:
    have = {tensor.name for tensor in layer.tensors}
    for tensor in first.tensors:
        name, _, kind = tensor.name.rpartition(".")
        if name.endswith(_LENT) and f"{layer.name}{name.removeprefix(first.name)}.{kind}" not in have:
            yield Module(name, "shared", (tensor,), 0, layer.stack)


def resident_bytes(modules: tuple[Module, ...]) -> int:
    """What one device holds for `modules` together: each storage once."""
    return sum({tensor.storage: tensor.bytes for module in modules for tensor in module.tensors}.values())


def footprint(
    model: str | Path,
    *,
    quantization: str | None = None,
    double_quant: bool = False,
    quant_block_size: int = BLOCK,
    skip_modules: tuple[str, ...] | None = None,
    dtype: str | None = None,
    vision: bool = False,
    experts: bool = False,
    head: bool = False,
    embeddings: bool = False,
    name: str | None = None,
) -> Footprint:
    """The bytes of every module of `model`, read without weights.

    Imports torch and transformers (seconds, the first time); takes tens of milliseconds afterwards.

    Args:
        model: a folder, a config.json, a .gguf file (its weights dequantised, then quantised as asked), or a Hugging
            Face id; see `find_source`.
        quantization: None: the checkpoint's own, where it is quantised already, else nf4.
        double_quant: nf4 and fp4: quantise the scales too.
        quant_block_size: nf4 and fp4: weights per scale. transformers loads with 64 whatever is said here.
        skip_modules: what is not quantised, as `llm_int8_skip_modules`; it stands in the place of transformers' own
            choice, so it should name the head.
        dtype: of compute and of what is not quantised; None: see `compute_dtype`.
        vision: count the vision or audio tower of a multimodal model, beside the first layers; text-only serving
            leaves it out.
        experts: nf4, fp4 and int8: quantise fused experts too, as the engine can once they are loaded; transformers
            leaves them in `dtype`.
        head: nf4, fp4 and int8: quantise the head too, as the engine can; one that is tied to the embedding becomes a
            quantised copy beside it.
        embeddings: the same of the input embedding; a head that is tied to it is apart then.
        name: what plans and errors call the model; None: its folder, file or id.

    Raises:
        PlacementError: no such model, settings that contradict each other or the checkpoint, or a model whose parts
            can't be told.
    """
    if quantization is not None or double_quant or quant_block_size != BLOCK:
        # Refused before anything is read.
        compute_dtype(make_recipe(quantization or "nf4", double_quant=double_quant, block_size=quant_block_size), dtype)
    source = find_source(model)
    if name is not None:
        source = replace(source, name=name)
    recipe = _recipe(source, quantization, double_quant, quant_block_size, skip_modules)
    dtype = compute_dtype(recipe, dtype)
    return _read(source, recipe, dtype, vision=vision, experts=experts, head=head, embeddings=embeddings)


def _read(
    source: Source, recipe: Recipe, dtype: str, *, vision: bool, experts: bool, head: bool, embeddings: bool
) -> Footprint:
    """The footprint of a checkpoint by the recipe that it will have; see `footprint`."""
    from placement.reconcile import check_gguf, reconcile
    from placement.skeleton import read_skeleton

    for asked, setting in ((experts, "quantize_experts"), (head, "quantize_head"), (embeddings, "quantize_embeddings")):
        if asked:
            _check_quantises(source, recipe, setting)
    skeleton = read_skeleton(source, dtype, recipe, vision=vision, experts=experts, head=head, embeddings=embeddings)
    modules = tuple(_weigh(module, recipe) for module in skeleton.modules)
    if source.gguf is not None:
        check_gguf(source.name, modules, source.gguf)
    else:
        modules = reconcile(source.name, modules, source.headers, recipe)
    return Footprint(
        model=source.name,
        quantization=recipe.name,
        double_quant=isinstance(recipe, FourBit) and recipe.double_quant,
        dtype=dtype,
        modules=modules,
        geometry=skeleton.geometry,
        prequantized=recipe.prequantized,
        left_out=skeleton.left_out,
        experts=experts,
        head=head,
        embeddings=embeddings,
        grouped=recipe if isinstance(recipe, Grouped) else None,
    )


def _check_quantises(source: Source, recipe: Recipe, setting: str) -> None:
    if recipe.prequantized or isinstance(recipe, Plain):
        raise PlacementError(
            f"{setting} needs nf4, fp4 or int8 and a checkpoint that is not quantised yet, but {source.name} is "
            f"to be loaded in {recipe.name}; leave it out"
        )


def _recipe(
    source: Source, quantization: str | None, double_quant: bool, block_size: int, skip: tuple[str, ...] | None
) -> Recipe:
    """The checkpoint's own recipe, or the one that was asked for."""
    if (stored := source.quantization) is None:
        return make_recipe(quantization or "nf4", double_quant=double_quant, block_size=block_size, skip=skip)
    recipe = read_recipe(stored)
    doubled = isinstance(recipe, FourBit) and recipe.double_quant
    if quantization not in (None, recipe.name) or double_quant > doubled or skip is not None or block_size != BLOCK:
        raise PlacementError(
            f"{source.name} is already quantised ({recipe.name}{' with double quantisation' if doubled else ''}), and "
            "something else was asked for; leave the quantisation out, or give the unquantised model"
        )
    return recipe


def _weigh(module: Module, recipe: Recipe) -> Module:
    tensors = tuple(_weighed(t, recipe) if t.linear else t for t in module.tensors)
    if isinstance(recipe, Grouped):
        biases = {f"{t.name.removesuffix('weight')}bias" for t in tensors if t.linear}
        tensors = tuple(replace(t, itemsize=2, bytes=2 * t.elements) if t.name in biases else t for t in tensors)
    return replace(module, tensors=tensors)


def _repacked(module: Module, recipe: Grouped, itemsize: int) -> Module:
    biases = {f"{tensor.name.removesuffix('weight')}bias" for tensor in module.tensors if tensor.linear}
    sizes = {
        tensor.name: _own(recipe, tensor).kernel_bytes(tensor.shape, itemsize)
        for tensor in module.tensors
        if tensor.linear
    } | {tensor.name: itemsize * tensor.elements for tensor in module.tensors if tensor.name in biases}
    return replace(module, tensors=tuple(replace(t, bytes=sizes.get(t.name, t.bytes)) for t in module.tensors))


def _weighed(tensor: Tensor, recipe: Recipe) -> Tensor:
    return replace(tensor, bytes=_own(recipe, tensor).weight_bytes(tensor.shape, tensor.itemsize))


def _own(recipe: _Of, tensor: Tensor) -> _Of:
    """A linear's own recipe."""
    found: Any = recipe.for_module(tensor.name.removesuffix(".weight")) or recipe
    own: _Of = found
    return own
