"""How linears are stored, and the bytes of one: from settings, or from a config.json's quantization_config.

For a weight of n = out * in elements, everything that is resident after loading and before the first forward:

    nf4, fp4            ceil(n/2) packed + 4 * ceil(n/b) absmax + 64 code (16 float32), in blocks of b weights
    ... double_quant    ceil(n/2) + ceil(n/b) + 4 * ceil(ceil(n/b)/256) nested absmax
                        + 64 code + 1024 nested code + 4 offset (one of each per linear, none shared)
    int8                n + 4 * out (SCB, float32); CB is the weight itself, not a copy
    gptq, k bits        qweight 4 * (in/32*k) * out, qzeros 4 * ceil(in/g) * (out/32*k), scales 2 * ceil(in/g) * out,
                        g_idx 4 * in, in groups of g inputs
    awq, 4 bits         qweight 4 * in * (out/8), qzeros 4 * (in/g) * (out/8), scales 2 * (in/g) * out
    ... both on GPUs    as in 4-bit blocks of g: ceil(n/2) packed + 4 * (in/g) * out absmax + 64 code;
                        itemsize * (in/g) * out where zeros differ, 4 * in where inputs are in another order

bitsandbytes 0.50 stores the same on CPU and CUDA: blocks of 32 to 4096 (64 unless told), nested blocks of 256, and
under a `quant_storage` of s bytes floor(ceil(n/2)/s) elements of it. GPTQ and AWQ are counted as GPTQModel's linears
register their buffers (int32 packing, float16 scales, zeros packed also where the quantisation is symmetric, g_idx with
or without act-order); what one of its kernels repacks or adds at first use is not in a checkpoint and not counted. On
GPUs they are as this project's kernels take them (`deployments.engine.kernels.grouped`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, get_args

from placement.errors import PlacementError
from placement.kv import dtype_bytes

Quantization = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]
"""What can be asked for; a checkpoint may also bring "gptq-4bit", "awq-4bit" and the like."""

BLOCK = 64
"""Weights that share one scale under nf4 and fp4 unless told: what transformers asks bitsandbytes for."""

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256
_CODE_BYTES, _NESTED_CODE_BYTES, _OFFSET_BYTES = 16 * 4, 256 * 4, 4
_PACKED_BITS, _PACKED_BYTES = 32, 4
_SCALE_BYTES, _ABSMAX_BYTES = 2, 4
_KERNEL_BITS = 4
_STORAGE_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(ABC):
    """One way to store the weights of linears."""

    prequantized: bool = False
    """The checkpoint's own: what is stored is what is loaded, and no other quantisation can be had from it."""
    skip: tuple[str, ...] | None = None
    """Modules that stay as they are, as transformers matches names (start, regex or end); None: its own choice."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As plans and tables print it."""

    @abstractmethod
    def weight_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Resident bytes of the weight [out, in] of a linear, `itemsize` bytes an element before it was quantised."""

    def for_module(self, name: str) -> Recipe | None:
        """The recipe of the linear `name`; None where it stays as it is. What `skip` says is not asked here."""
        del name
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain(Recipe):
    """16 or 32 bits, not quantised."""

    quantization: str

    @property
    def name(self) -> str:
        """bf16, fp16 or fp32."""
        return self.quantization

    def weight_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """All elements."""
        return prod(shape) * itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit(Recipe):
    """bitsandbytes' Linear4bit."""

    kind: str
    """nf4 or fp4."""
    double_quant: bool = False
    block_size: int = BLOCK
    storage_bytes: int = 1
    """Bytes of one element of the packed tensor (quant_storage)."""

    def __post_init__(self) -> None:
        if self.block_size not in _BLOCKS:
            raise PlacementError(
                f"nf4 and fp4 have blocks of {', '.join(map(str, _BLOCKS))} weights, not {self.block_size}"
            )

    @property
    def name(self) -> str:
        """nf4 or fp4."""
        return self.kind

    def weight_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Packed weights, scales and codes; see the module's docstring."""
        del itemsize
        elements = prod(shape)
        blocks = -(-elements // self.block_size)
        packed = (elements + 1) // (2 * self.storage_bytes) * self.storage_bytes
        if not self.double_quant:
            return packed + 4 * blocks + _CODE_BYTES
        state = blocks + 4 * -(-blocks // _NESTED_BLOCK)
        return packed + state + _CODE_BYTES + _NESTED_CODE_BYTES + _OFFSET_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBit(Recipe):
    """bitsandbytes' Linear8bitLt."""

    @property
    def name(self) -> str:
        """int8."""
        return "int8"

    def weight_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """One byte a weight, one float32 a row (of each expert, where `shape` is [experts, out, in])."""
        del itemsize
        return prod(shape) + 4 * prod(shape[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped(Recipe):
    """Weights packed in int32 with a scale and a zero for each group of inputs: GPTQ and AWQ."""

    method: Literal["gptq", "awq"]
    bits: int
    group_size: int
    """Inputs that share a scale; -1: all."""
    lm_head: bool = False
    """The head is quantised too (GPTQModel); otherwise the layers' linears alone are."""
    only: tuple[str, ...] | None = None
    """GPTQ: ends of the names of the linears in a layer that are quantised; None: all."""
    overrides: tuple[tuple[str, int, int], ...] = ()
    """GPTQ: (regex, bits, group size) of the modules that differ; bits 0: not quantised. The first match counts."""
    symmetric: bool = True
    """GPTQ: all zeros are the middle code (`sym`). AWQ's never are."""
    act_order: bool = False
    """GPTQ: the inputs of a group are not neighbours (`desc_act`)."""

    def __post_init__(self) -> None:
        known = (2, 3, 4, 5, 6, 7, 8) if self.method == "gptq" else (4,)
        if self.bits not in known:
            raise PlacementError(
                f"{self.method} of {self.bits} bits is not known; use a checkpoint of {', '.join(map(str, known))} bits"
            )
        if self.group_size != -1 and self.group_size < 1:
            raise PlacementError(f"{self.method} in groups of {self.group_size} makes no sense; it is -1 or positive")

    @property
    def name(self) -> str:
        """Such as gptq-4bit."""
        return f"{self.method}-{self.bits}bit"

    def weight_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """qweight, qzeros, scales and GPTQ's g_idx; see the module's docstring."""
        del itemsize
        out, inputs = shape
        packed = inputs if self.method == "gptq" else out
        if packed % (per := _PACKED_BITS if self.method == "gptq" else _PACKED_BITS // self.bits) or out % per:
            raise PlacementError(
                f"{self.name} packs {per} weights at a time, but a quantised linear is {out} x {inputs}; "
                "the checkpoint must exempt it (modules_to_not_convert, modules_in_block_to_quantize)"
            )
        groups = 1 if self.group_size == -1 else -(-inputs // self.group_size)
        qweight = out * inputs * self.bits // _PACKED_BITS * _PACKED_BYTES
        qzeros = groups * out * self.bits // _PACKED_BITS * _PACKED_BYTES
        g_idx = 4 * inputs if self.method == "gptq" else 0
        return qweight + qzeros + groups * out * _SCALE_BYTES + g_idx

    @property
    def shifted(self) -> bool:
        """Zeros differ, so a GPU keeps what they are off the middle code."""
        return self.method == "awq" or not self.symmetric

    def suits_gpus(self, shape: tuple[int, ...]) -> bool:
        """Whether this project's kernels can read the weight [out, in]: codes of 4 bits at most, in whole groups."""
        return self.bits <= _KERNEL_BITS and shape[-1] % self.group_of(shape[-1]) == 0

    def kernel_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """What a GPU holds of the weight [out, in] where that suits, `itemsize` bytes an element of the compute dtype;
        see the module's docstring."""
        out, inputs = shape
        scales = inputs // self.group_of(inputs) * out
        packed = (out * inputs + 1) // 2 + _ABSMAX_BYTES * scales + _CODE_BYTES
        return packed + itemsize * scales * self.shifted + _PACKED_BYTES * inputs * self.act_order

    def group_of(self, inputs: int) -> int:
        """How many of a linear's inputs share a scale."""
        return inputs if self.group_size == -1 else min(inputs, self.group_size)

    def for_module(self, name: str) -> Recipe | None:
        """What `only` and `overrides` say of the linear `name`."""
        if self.only is not None and not any(name.endswith(end) for end in self.only):
            return None
        for pattern, bits, group_size in self.overrides:
            if re.match(pattern, name):
                return replace(self, bits=bits, group_size=group_size) if bits else None
        return self


_PLAIN = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def make_recipe(
    quantization: str, *, double_quant: bool = False, block_size: int = BLOCK, skip: tuple[str, ...] | None = None
) -> Recipe:
    """The recipe for quantising an unquantised checkpoint while it is loaded.

    Raises:
        PlacementError: an unknown quantisation, or settings that contradict each other.
    """
    if quantization not in get_args(Quantization):
        known = ", ".join(get_args(Quantization))
        raise PlacementError(f"quantization {quantization!r} is not known; use one of {known}")
    if quantization in ("nf4", "fp4"):
        return FourBit(kind=quantization, double_quant=double_quant, block_size=block_size, skip=skip)
    if double_quant:
        raise PlacementError(f"double_quant needs nf4 or fp4, but quantization is {quantization}")
    if block_size != BLOCK:
        raise PlacementError(f"quant_block_size needs nf4 or fp4, but quantization is {quantization}")
    if quantization == "int8":
        return EightBit(skip=skip)
    return Plain(quantization=quantization, skip=skip)


def read_recipe(config: Mapping[str, Any]) -> Recipe:
    """The recipe that `quantization_config` of a config.json describes.

    Raises:
        PlacementError: a method or a setting that isn't planned.
    """
    method = str(config.get("quant_method") or ("bitsandbytes" if _loads_bits(config) else "unnamed")).lower()
    readers = {"bitsandbytes": _bitsandbytes, "gptq": _gptq, "gptqmodel": _gptq, "awq": _awq}
    if method not in readers:
        raise PlacementError(
            f"the checkpoint is quantised with {method}, which is not planned yet; give the unquantised model, or one "
            "quantised with bitsandbytes, GPTQ or AWQ"
        )
    try:
        return readers[method](config)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise PlacementError(f"the checkpoint's quantization_config ({method}) can't be read: {error}") from None


def _loads_bits(config: Mapping[str, Any]) -> int:
    """Bits of a bitsandbytes config; transformers writes the flags with and without an underscore. 0: neither."""
    for bits in (4, 8):
        if config.get(f"load_in_{bits}bit") or config.get(f"_load_in_{bits}bit"):
            return bits
    return 0


def _bitsandbytes(config: Mapping[str, Any]) -> Recipe:
    bits = _loads_bits(config)
    skip = _names(config.get("llm_int8_skip_modules"))
    if bits == 4:
        storage = str(config.get("bnb_4bit_quant_storage") or "uint8")
        if storage not in _STORAGE_BYTES:
            raise PlacementError(f"bnb_4bit_quant_storage {storage!r} is not known; use {', '.join(_STORAGE_BYTES)}")
        return FourBit(
            kind=str(config.get("bnb_4bit_quant_type") or "fp4"),
            double_quant=bool(config.get("bnb_4bit_use_double_quant")),
            block_size=int(config.get("bnb_4bit_blocksize") or BLOCK),
            storage_bytes=_STORAGE_BYTES[storage],
            prequantized=True,
            skip=skip,
        )
    if bits == 8 and not config.get("llm_int8_has_fp16_weight"):
        return EightBit(prequantized=True, skip=skip)
    raise PlacementError(
        "the checkpoint's bitsandbytes config says neither load_in_4bit nor load_in_8bit (or keeps 16-bit weights); "
        "give the unquantised model"
    )


def _gptq(config: Mapping[str, Any]) -> Recipe:
    inside = config.get("modules_in_block_to_quantize")
    bits, group_size = int(config.get("bits") or 4), int(config.get("group_size") or -1)
    return Grouped(
        method="gptq",
        bits=bits,
        group_size=group_size,
        lm_head=bool(config.get("lm_head")),
        only=None if inside is None else _names([name for names in inside for name in _listed(names)]),
        overrides=_dynamic(config.get("dynamic") or {}, bits, group_size),
        symmetric=bool(config.get("sym", True)),
        act_order=bool(config.get("desc_act")),
        prequantized=True,
    )


def _dynamic(rules: Mapping[str, Any], bits: int, group_size: int) -> tuple[tuple[str, int, int], ...]:
    """GPTQModel's `dynamic`: a pattern after "-:" is left out, one after "+:" or nothing has settings of its own."""
    found = []
    for key, own in rules.items():
        pattern = re.compile(key.removeprefix("-:").removeprefix("+:")).pattern
        if key.startswith("-:"):
            found.append((pattern, 0, 0))
        else:
            own = own or {}
            found.append((pattern, int(own.get("bits", bits)), int(own.get("group_size", group_size))))
    return tuple(found)


def _awq(config: Mapping[str, Any]) -> Recipe:
    return Grouped(
        method="awq",
        bits=int(config.get("bits") or config.get("w_bit") or 4),
        group_size=int(config.get("group_size") or config.get("q_group_size") or -1),
        prequantized=True,
        skip=_names(config.get("modules_to_not_convert")),
    )


def _names(names: Any) -> tuple[str, ...] | None:
    return None if names is None else tuple(map(str, names))


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def compute_dtype(recipe: Recipe, dtype: str | None) -> str:
    """The dtype of compute and of what stays unquantised. None: what an unquantised name says; float16 for GPTQ and
    AWQ, whose scales are; else bfloat16.

    Raises:
        PlacementError: a dtype that the recipe can't compute in.
    """
    whole = _PLAIN.get(recipe.name)
    if dtype is None:
        return whole or ("float16" if isinstance(recipe, Grouped) else "bfloat16")
    dtype_bytes(dtype)
    if whole is not None and dtype != whole:
        raise PlacementError(
            f"quantization {recipe.name} computes in {whole}, but dtype is {dtype}; drop one of the two"
        )
    return dtype
