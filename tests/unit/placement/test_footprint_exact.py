"""The footprint against really loaded models, byte for byte, before their first forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM

from placement.errors import PlacementError
from placement.export import device_map
from placement.footprint import Footprint, footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import solve
from tests.unit.placement.tiny_models import (
    ALL,
    CONFIGS,
    ENCODER_DECODERS,
    LAYERS,
    MULTIMODAL,
    held_bytes,
    load,
    save,
)

WHOLE = {"": "cpu"}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder of every tiny model; filled as tests ask."""
    return {name: tmp_path_factory.mktemp(name) for name in ALL}


def saved(folders: dict[str, Path], name: str) -> Path:
    """The model `name`, saved once."""
    folder = folders[name]
    return folder if (folder / "config.json").is_file() else save(name, folder)


def assert_two_stages(folder: Path, quantization: str, double_quant: bool) -> None:
    """Load as a plan of two stages says, and compare module by module, stage by stage and in all."""
    dtype = DTYPES.get(quantization, "bfloat16")
    weighed = footprint(folder, quantization=quantization, double_quant=double_quant, dtype=dtype)
    devices = virtual_cpu_devices(("40MB", "40MB"))
    plan = solve(weighed, devices, block_size=4, max_batch_tokens=16, max_sequences=4, max_context=64)
    assert len(plan.stages) == 2
    model = load(folder, quantization, double_quant, dtype, device_map(plan, "cpu"))
    for module in weighed.modules:
        assert held_bytes(model, [module.name]) == module.bytes, module.name
    for stage in plan.stages:
        assert held_bytes(model, (*stage.modules, *stage.copies)) == stage.weight_bytes
    assert held_bytes(model, [""]) == weighed.bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_two_stages_hold_what_was_planned(folders: dict[str, Path], name: str) -> None:
    assert_two_stages(saved(folders, name), "nf4", True)


# GPT-2's Conv1D, fused qkv, fused experts, shared experts with MLA, a recurrent state.
@pytest.mark.parametrize("name", ["gpt2", "falcon", "mixtral", "deepseek_v2", "qwen3_next"])
def test_two_stages_in_8_bits(folders: dict[str, Path], name: str) -> None:
    assert_two_stages(saved(folders, name), "int8", False)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "bf16", "fp32", "fp16"])
def test_two_stages_at_every_other_quantisation(folders: dict[str, Path], quantization: str) -> None:
    assert_two_stages(saved(folders, "llama_tied"), quantization, False)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_counted(folders: dict[str, Path], name: str) -> None:
    weighed = footprint(saved(folders, name), quantization="nf4")
    assert len(weighed.layers) == len(weighed.geometry.kv) == LAYERS
    assert weighed.stacks == {"layers": (0, LAYERS)}


def assert_held(weighed: Footprint, folder: Path, quantization: str, dtype: str) -> None:
    model = load(folder, quantization, weighed.double_quant, dtype, WHOLE)
    for module in weighed.modules:
        assert held_bytes(model, [module.name]) == module.bytes, module.name
    assert held_bytes(model, [module.name for module in weighed.modules]) == weighed.bytes


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("nf4", "float16"), ("int8", "bfloat16"), ("fp16", "float16")],
)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders(folders: dict[str, Path], name: str, quantization: str, dtype: str) -> None:
    folder = saved(folders, name)
    weighed = footprint(folder, quantization=quantization, dtype=dtype)
    assert_held(weighed, folder, quantization, dtype)
    assert weighed.stacks == {"encoder": (0, 2), "decoder": (2, 5)}
    assert len(weighed.geometry.kv) == 5


def test_the_parts_of_t5_live_with_their_stack(folders: dict[str, Path]) -> None:
    weighed = footprint(saved(folders, "t5"), quantization="nf4", dtype="float16")
    assert [(at, module.name) for at, module in weighed.beside] == [
        (0, "shared"),
        (0, "encoder.embed_tokens"),
        (2, "decoder.embed_tokens"),
        (1, "encoder.final_layer_norm"),
        (4, "decoder.final_layer_norm"),
        (4, "lm_head"),
    ]
    # The embedding has four names and one storage.
    assert weighed.bytes == sum(m.bytes for m in weighed.modules) - 3 * 200 * 72 * 2
    # T5 keeps `wo` unquantised, in float32 where the rest is float16.
    wo = {t.bytes for m in weighed.layers for t in m.tensors if t.name.endswith("wo.weight")}
    assert wo == {72 * 162 * 4}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_towers_are_left_out_or_counted(folders: dict[str, Path], name: str) -> None:
    folder, quantization = saved(folders, name), "nf4"
    model = load(folder, quantization, False, "bfloat16", WHOLE)
    text = footprint(folder, quantization=quantization)
    whole = footprint(folder, quantization=quantization, vision=True)
    assert whole.left_out == ()
    assert held_bytes(model, [""]) == whole.bytes
    assert text.left_out
    assert held_bytes(model, text.left_out) == whole.bytes - text.bytes
    assert len(text.layers) == LAYERS
    assert not {module.name for module in text.modules} & set(text.left_out)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    "skip", [("lm_head", "mlp.down_proj"), ("model.layers.1",), ("lm_head", r"model.layers.\d.self_attn")]
)
def test_skipped_modules(folders: dict[str, Path], quantization: str, skip: tuple[str, ...]) -> None:
    folder = saved(folders, "llama")
    weighed = footprint(folder, quantization=quantization, skip_modules=skip)
    model = load(folder, quantization, False, "bfloat16", WHOLE, list(skip))
    assert held_bytes(model, [""]) == weighed.bytes
    assert weighed.bytes != footprint(folder, quantization=quantization).bytes


# In a dtype other than the stored one, older versions of transformers load these with other dtypes.
_CAST = [
    ("llama", "nf4", True, "float32"),
    ("llama", "fp4", False, "float32"),
    ("llama_tied", "int8", False, "float32"),
]


@pytest.mark.parametrize(
    ("name", "quantization", "double_quant", "dtype"),
    [
        ("llama", "nf4", False, "bfloat16"),
        ("llama", "nf4", True, "bfloat16"),
        ("llama", "int8", False, "bfloat16"),
        ("gpt2", "nf4", True, "bfloat16"),
        *(_CAST if Version(transformers.__version__) >= Version("5.23") else ()),
    ],
)
def test_checkpoints_that_are_quantised_already(
    folders: dict[str, Path], tmp_path: Path, name: str, quantization: str, double_quant: bool, dtype: str
) -> None:
    load(saved(folders, name), quantization, double_quant, "bfloat16", WHOLE).save_pretrained(tmp_path)
    weighed = footprint(tmp_path, dtype=dtype)
    assert (weighed.quantization, weighed.double_quant, weighed.prequantized) == (quantization, double_quant, True)
    assert held_bytes(load(tmp_path, None, False, dtype, WHOLE), [""]) == weighed.bytes
    if dtype == "bfloat16":
        # The dtype in which it is stored: then the config alone says as much.
        assert footprint(tmp_path / "config.json", dtype=dtype, name=weighed.model) == weighed
    with pytest.raises(PlacementError, match="already quantised"):
        weighed.at("nf4")


def test_ties_that_the_checkpoint_contradicts(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(folders, "llama_tied"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    weighed = footprint(tmp_path, quantization="nf4")
    assert held_bytes(load(tmp_path, "nf4", False, "bfloat16", WHOLE), [""]) == weighed.bytes
    assert weighed.bytes == footprint(config, quantization="nf4").bytes + 200 * 72 * 2


def test_equal_copies_stay_tied(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(folders, "llama_tied"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    weighed = footprint(tmp_path, quantization="nf4")
    assert held_bytes(load(tmp_path, "nf4", False, "bfloat16", WHOLE), [""]) == weighed.bytes
    assert weighed.bytes == footprint(config, quantization="nf4").bytes
