"""Bytes of a linear by hand, against bitsandbytes itself, and what configs of quantised checkpoints say."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from placement.errors import PlacementError
from placement.recipe import EightBit, FourBit, Grouped, Recipe, compute_dtype, make_recipe, read_recipe


@pytest.mark.parametrize(
    ("shape", "quantization", "double_quant", "expected"),
    [
        # 4096 weights: 2048 packed; 64 blocks * 4; 64 of code.
        ((64, 64), "nf4", False, 2048 + 256 + 64),
        ((64, 64), "fp4", False, 2048 + 256 + 64),
        # 64 one-byte scales; one nested block * 4; codes and offset 1,092.
        ((64, 64), "nf4", True, 2048 + 64 + 4 + 1092),
        # 3 * 7 = 21 weights: 11 bytes, one block.
        ((3, 7), "nf4", False, 11 + 4 + 64),
        # 72 * 300 = 21,600: 338 blocks, two nested ones.
        ((300, 72), "nf4", True, 10_800 + 338 + 8 + 1092),
        ((300, 72), "int8", False, 21_600 + 4 * 300),
        ((300, 72), "bf16", False, 43_200),
    ],
)
def test_bytes_by_hand(shape: tuple[int, ...], quantization: str, double_quant: bool, expected: int) -> None:
    assert make_recipe(quantization, double_quant=double_quant).weight_bytes(shape, 2) == expected


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_bytes_as_bitsandbytes_has_them(block_size: int, kind: str, double_quant: bool) -> None:
    recipe = make_recipe(kind, double_quant=double_quant, block_size=block_size)
    for shape in ((3, 7), (64, 64), (129, 65)):
        packed, state = bnb.quantize_4bit(
            torch.randn(shape), blocksize=block_size, compress_statistics=double_quant, quant_type=kind
        )
        assert recipe.weight_bytes(shape, 4) == packed.nbytes + state_bytes(state)


@pytest.mark.parametrize("storage", ["uint8", "float16", "bfloat16", "float32", "float64"])
def test_other_storage_types(storage: str) -> None:
    read = read_recipe({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": storage})
    for shape in ((64, 64), (36, 72)):
        packed, state = bnb.quantize_4bit(torch.randn(shape), quant_type="fp4", quant_storage=getattr(torch, storage))
        assert read.weight_bytes(shape, 4) == packed.nbytes + state_bytes(state)


def state_bytes(state: Any) -> int:
    """All tensors of a quantisation state, the nested one's too."""
    total = 0
    while state is not None:
        total += sum(value.nbytes for value in vars(state).values() if isinstance(value, torch.Tensor))
        state = state.state2
    return total


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Llama 2 7B's q_proj as GPTQModel stores it: qweight [512, 4096] and qzeros [32, 512] in int32, scales
        # [32, 4096] in float16, g_idx [4096] in int32.
        ({"bits": 4, "group_size": 128}, 512 * 4096 * 4 + 32 * 512 * 4 + 32 * 4096 * 2 + 4096 * 4),
        ({"bits": 4, "group_size": 128, "desc_act": True}, 512 * 4096 * 4 + 32 * 512 * 4 + 32 * 4096 * 2 + 4096 * 4),
        # One group: qzeros [1, 512], scales [1, 4096].
        ({"bits": 4, "group_size": -1}, 512 * 4096 * 4 + 512 * 4 + 4096 * 2 + 4096 * 4),
        # 8 bits: qweight [1024, 4096], qzeros [128, 1024]; 3 bits: [384, 4096] and [32, 384].
        ({"bits": 8, "group_size": 32}, 1024 * 4096 * 4 + 128 * 1024 * 4 + 128 * 4096 * 2 + 4096 * 4),
        ({"bits": 3, "group_size": 128}, 384 * 4096 * 4 + 32 * 384 * 4 + 32 * 4096 * 2 + 4096 * 4),
    ],
)
def test_gptq_bytes(config: dict[str, Any], expected: int) -> None:
    assert read_recipe({"quant_method": "gptq", **config}).weight_bytes((4096, 4096), 2) == expected


def test_awq_bytes() -> None:
    # A down_proj of 4096 x 11008: qweight [11008, 512] and qzeros [86, 512] in int32, scales [86, 4096] in float16.
    read = read_recipe({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"})
    assert read.weight_bytes((4096, 11008), 2) == 11008 * 512 * 4 + 86 * 512 * 4 + 86 * 4096 * 2
    # AutoAWQ's own names for the same.
    assert read_recipe({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}) == read


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
             "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]},
            FourBit(kind="nf4", double_quant=True, prequantized=True, skip=("lm_head",)),
        ),
        ({"load_in_8bit": True}, EightBit(prequantized=True)),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "lm_head": True,
             "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]},
            Grouped(method="gptq", bits=4, group_size=64, lm_head=True, prequantized=True,
                    only=("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")),
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["mlp.gate"]},
            Grouped(method="awq", bits=4, group_size=128, prequantized=True, skip=("mlp.gate",)),
        ),
    ],
)  # fmt: skip
def test_configs_are_read(config: dict[str, Any], expected: Recipe) -> None:
    assert read_recipe(config) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Packed, a float32 scale for each 128 inputs of an output, a table of 16 float32.
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 8_388_608 + 524_288 + 64),
        ({"quant_method": "gptq", "bits": 2, "group_size": -1}, 8_388_608 + 4 * 4096 + 64),
        # What the zeros are off, in the compute dtype, and the order of the inputs in int32.
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": True},
            8_388_608 + 524_288 + 64 + 2 * 131_072 + 4 * 4096,
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 8_388_608 + 524_288 + 64 + 2 * 131_072),
    ],
)
def test_gptq_and_awq_bytes_on_gpus(config: dict[str, Any], expected: int) -> None:
    recipe = read_recipe(config)
    assert isinstance(recipe, Grouped)
    assert recipe.suits_gpus((4096, 4096))
    assert recipe.kernel_bytes((4096, 4096), 2) == expected


def test_what_does_not_suit_gpus() -> None:
    assert not Grouped(method="gptq", bits=8, group_size=128).suits_gpus((4096, 4096))
    assert not Grouped(method="gptq", bits=4, group_size=128).suits_gpus((4096, 4160))
    assert Grouped(method="gptq", bits=4, group_size=128).suits_gpus((4096, 64)), "one group of all inputs"


def test_gptq_modules_may_differ() -> None:
    recipe = read_recipe({
        "quant_method": "gptq", "bits": 4, "group_size": 128, "modules_in_block_to_quantize": ["up_proj", "down_proj"],
        "dynamic": {r"-:.*\.0\..*up_proj": {}, r".*down_proj": {"bits": 8, "group_size": 32}},
    })  # fmt: skip
    assert recipe.for_module("model.layers.0.mlp.up_proj") is None
    assert recipe.for_module("model.layers.1.mlp.up_proj") == recipe
    assert recipe.for_module("model.layers.1.mlp.gate_proj") is None
    other = recipe.for_module("model.layers.1.mlp.down_proj")
    assert isinstance(other, Grouped)
    assert (other.bits, other.group_size) == (8, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quantised with fp8, which is not planned yet"),
        ({}, "quantised with unnamed"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "keeps 16-bit weights"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "complex64"}, "bnb_4bit_quant_storage 'complex64'"),
        ({"load_in_4bit": True, "bnb_4bit_blocksize": 100}, "blocks of 32, 64, .*, not 100"),
        ({"quant_method": "awq", "bits": 3}, "awq of 3 bits is not known; use a checkpoint of 4 bits"),
        ({"quant_method": "gptq", "bits": 16}, "gptq of 16 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -2}, "groups of -2"),
        ({"quant_method": "gptq", "bits": "four"}, "quantization_config .gptq. can't be read: invalid literal"),
        ({"quant_method": "gptq", "dynamic": {"-:(": {}}}, "can't be read: missing"),
        ({"quant_method": "gptq", "dynamic": ["a"]}, "can't be read: 'list' object"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message) as caught:
        read_recipe(config)
    assert "\n" not in str(caught.value)


def test_a_linear_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(PlacementError, match="packs 32 weights at a time, but a quantised linear is 64 x 72"):
        Grouped(method="gptq", bits=4, group_size=128).weight_bytes((64, 72), 2)


@pytest.mark.parametrize(
    ("quantization", "dtype", "expected"),
    [
        ("nf4", None, "bfloat16"),
        ("nf4", "float32", "float32"),
        ("fp32", None, "float32"),
        ("fp16", "float16", "float16"),
    ],
)
def test_compute_dtype(quantization: str, dtype: str | None, expected: str) -> None:
    assert compute_dtype(make_recipe(quantization), dtype) == expected


def test_compute_dtype_of_gptq() -> None:
    recipe = Grouped(method="gptq", bits=4, group_size=128)
    assert compute_dtype(recipe, None) == "float16"
    assert compute_dtype(recipe, "bfloat16") == "bfloat16"
    assert compute_dtype(recipe, "float32") == "float32"


@pytest.mark.parametrize(
    ("quantization", "dtype", "options", "message"),
    [
        ("int4", None, {}, "use one of nf4"),
        ("nf4", "half", {}, "use one of bfloat16"),
        ("bf16", "float32", {}, "computes in bfloat16, but dtype is float32"),
        ("int8", None, {"double_quant": True}, "double_quant needs nf4 or fp4"),
        ("int8", None, {"block_size": 128}, "quant_block_size needs nf4 or fp4"),
        ("nf4", None, {"block_size": 65}, "not 65"),
    ],
)
def test_contradictions_are_refused(
    quantization: str, dtype: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        compute_dtype(make_recipe(quantization, **options), dtype)
