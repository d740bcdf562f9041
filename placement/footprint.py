"""Bytes of every module of a model at every quantisation, from its config alone.

The model is built on the meta device (no weights) by `placement.skeleton`, which imports transformers and torch and is
itself imported only when a footprint is asked for; all else is arithmetic.

What is counted is what a device holds after
`AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(...), dtype=dtype)` and before
the first forward (bitsandbytes repacks on the CPU then): parameters, buffers (persistent or not) and quantisation
state. For a linear of n = out * in weights in bitsandbytes' blocks of 64:

    nf4, fp4            ceil(n/2) packed + 4 * ceil(n/64) absmax + 64 code (16 float32)
    ... double_quant    ceil(n/2) + ceil(n/64) + 4 * ceil(n/(64*256)) nested absmax
                        + 64 code + 1024 nested code + 4 offset (one of each per linear, none shared)
    int8                n + 4 * out (SCB, float32); CB is the weight itself, not a copy

Biases, norms, embeddings, the head, tensors with a fixed dtype and whatever transformers excludes from quantisation
keep their dtype. A checkpoint that stores two different weights where its config ties them is not foreseen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from placement.errors import PlacementError
from placement.kv import LayerKv, dtype_bytes

Quantization = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]
Role = Literal["first", "layer", "shared", "last"]

_WHOLE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_BLOCK, _NESTED_BLOCK = 64, 256
_CODE_BYTES, _NESTED_CODE_BYTES, _OFFSET_BYTES = 16 * 4, 256 * 4, 4


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

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
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

    @property
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


@dataclass(frozen=True, slots=True)
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

    @property
    def layers(self) -> tuple[Module, ...]:
        """The layers of all stacks as one sequence, in the order in which they run: an encoder's come first."""
        return self.with_role("layer")

    @property
    def stacks(self) -> dict[str, tuple[int, int]]:
        """First and past-last layer of each stack, in order; one entry, "layers", for a decoder-only model."""
        names = [layer.stack for layer in self.layers]
        return {name: (names.index(name), len(names) - names[::-1].index(name)) for name in dict.fromkeys(names)}

    @property
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
    def bytes(self) -> int:
        """The whole model on one device."""
        return resident_bytes(self.modules)

    def with_role(self, role: Role) -> tuple[Module, ...]:
        """The modules of one role, in order."""
        return tuple(module for module in self.modules if module.role == role)

    def at(self, quantization: str, *, double_quant: bool = False) -> Footprint:
        """The same model and dtype under nf4, fp4 or int8."""
        if quantization in _WHOLE:
            raise PlacementError(f"{quantization} may change the dtype; build the footprint anew")
        return replace(
            self,
            quantization=quantization,
            double_quant=double_quant,
            modules=tuple(_weigh(module, quantization, double_quant) for module in self.modules),
        )


def resident_bytes(modules: tuple[Module, ...]) -> int:
    """What one device holds for `modules` together: each storage once."""
    return sum({tensor.storage: tensor.bytes for module in modules for tensor in module.tensors}.values())


def linear_bytes(shape: tuple[int, ...], quantization: str, double_quant: bool, itemsize: int) -> int:
    """Resident bytes of a linear's weight [out, in], quantisation state included; see the module's docstring."""
    elements = prod(shape)
    blocks = -(-elements // _BLOCK)
    if quantization in ("nf4", "fp4"):
        if not double_quant:
            return -(-elements // 2) + 4 * blocks + _CODE_BYTES
        state = blocks + 4 * -(-blocks // _NESTED_BLOCK)
        return -(-elements // 2) + state + _CODE_BYTES + _NESTED_CODE_BYTES + _OFFSET_BYTES
    if quantization == "int8":
        return elements + 4 * shape[0]
    return elements * itemsize


def compute_dtype(quantization: str, dtype: str | None, double_quant: bool) -> str:
    """The dtype of compute and of what stays unquantised. None: what an unquantised name says, else bfloat16.

    Raises:
        PlacementError: an unknown quantisation, or settings that contradict each other.
    """
    if quantization not in get_args(Quantization):
        raise PlacementError(
            f"quantization {quantization!r} is not known; use one of {', '.join(get_args(Quantization))}"
        )
    if double_quant and quantization not in ("nf4", "fp4"):
        raise PlacementError(f"double_quant needs nf4 or fp4, but quantization is {quantization}")
    whole = _WHOLE.get(quantization)
    if dtype is None:
        return whole or "bfloat16"
    dtype_bytes(dtype)
    if whole is not None and dtype != whole:
        raise PlacementError(
            f"quantization {quantization} computes in {whole}, but dtype is {dtype}; drop one of the two"
        )
    return dtype


def footprint(
    model_dir: Path,
    *,
    quantization: str = "nf4",
    double_quant: bool = False,
    dtype: str | None = None,
    name: str | None = None,
) -> Footprint:
    """The bytes of every module of the model in `model_dir` (a folder with a config.json), read without weights.

    `name` is what plans and errors call the model; None: the folder's name (a hash, in Hugging Face's cache).
    Imports torch and transformers (seconds, the first time); takes a fraction of a second afterwards.

    Raises:
        PlacementError: no such model, one that is quantised already, or one whose parts can't be told.
    """
    dtype = compute_dtype(quantization, dtype, double_quant)
    config = _read_config(model_dir)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise PlacementError(f"{model_dir} is already quantised ({method}); give the unquantised model")
    from placement.skeleton import read_skeleton

    modules, geometry = read_skeleton(model_dir, dtype)
    weighed = tuple(_weigh(module, quantization, double_quant) for module in modules)
    return Footprint(name or model_dir.name, quantization, double_quant, dtype, weighed, geometry)


def _weigh(module: Module, quantization: str, double_quant: bool) -> Module:
    return replace(
        module,
        tensors=tuple(
            replace(t, bytes=linear_bytes(t.shape, quantization, double_quant, t.itemsize)) if t.linear else t
            for t in module.tensors
        ),
    )


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlacementError(f"{path} does not exist; give a folder with a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise PlacementError(f"{path} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise PlacementError(f"{path} must hold a JSON object")
    return config
