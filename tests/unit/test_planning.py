"""From a pool's settings to a plan: devices, dtypes, and what is said when they are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deployments import gptqmodel_fit
from deployments.engine import flashinfer_fit
from deployments.errors import ConfigError
from deployments.planning import plan_pool, step_tokens
from deployments.settings import PoolSettings
from placement import probe
from placement.footprint import footprint
from placement.hardware import Gpu
from tests.unit.engine.tiny import llama, save
from tests.unit.placement.tiny_models import ENCODER_DECODERS, MULTIMODAL

A_GPU = Gpu("Toy", 2 * 10**9, speed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), llama())


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cuda_gpus", lambda: ())
    monkeypatch.setattr(probe, "computes_bf16_natively", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cuda_gpus", lambda: (A_GPU, A_GPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))


def pool(**options: Any) -> PoolSettings:
    return PoolSettings.model_validate({"cpu_device_memory": "8MB", "block_size": 4, "max_sequences": 16} | options)


@pytest.mark.usefixtures("no_gpu")
def test_virtual_devices_take_their_own_size_or_the_common_one(folder: Path) -> None:
    plan, device_type = plan_pool("tiny", folder, pool(stages=2, max_memory={1: "9MB"}))
    assert device_type == "cpu"
    assert [stage.budget_bytes for stage in plan.stages] == [8_000_000, 9_000_000]
    assert (plan.model, plan.quantization, plan.block_size, plan.max_context) == ("tiny", "nf4", 4, 128)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"quantization": "int8"}, "float32"),
        ({"quantization": "bf16"}, "bfloat16"),
        ({"quantization": "fp16"}, "float16"),
        ({"quantization": "fp32"}, "float32"),
    ],
)
def test_compute_dtype_on_a_cpu_without_bf16(folder: Path, options: dict[str, str], dtype: str) -> None:
    assert plan_pool("tiny", folder, pool(**options))[0].dtype == dtype


@pytest.mark.usefixtures("no_gpu")
def test_a_cpu_with_bf16_computes_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "computes_bf16_natively", lambda: True)
    assert plan_pool("tiny", folder, pool())[0].dtype == "bfloat16"


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_taken_where_they_are(folder: Path) -> None:
    plan, device_type = plan_pool("tiny", folder, pool(stages=2, max_memory={0: "1GB"}))
    assert device_type == "cuda"
    assert plan.dtype == "bfloat16"
    assert [stage.gpu.name for stage in plan.stages] == ["Toy", "Toy"]
    context = next(term.bytes for term in plan.stages[0].reserve if term.name == "context")
    assert plan.stages[0].budget_bytes == 1_000_000_000 + context, "a cap bounds everything but the context"


@pytest.mark.usefixtures("two_gpus")
def test_the_goal_reaches_the_solver(folder: Path) -> None:
    stages = {
        goal: len(plan_pool("tiny", folder, pool(stages=2, goal=goal))[0].stages) for goal in ("throughput", "latency")
    }
    assert stages == {"throughput": 2, "latency": 1}


@pytest.mark.usefixtures("two_gpus")
def test_one_stage_takes_one_gpu(folder: Path) -> None:
    assert [stage.device for stage in plan_pool("tiny", folder, pool())[0].stages] == [0]


@pytest.mark.usefixtures("two_gpus")
def test_the_cpu_is_taken_when_asked_for(folder: Path) -> None:
    assert plan_pool("tiny", folder, pool(device="cpu"))[1] == "cpu"


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_are_not_there_are_missed(folder: Path) -> None:
    with pytest.raises(ConfigError, match="pool default needs 3 GPUs, and 2 are visible; lower `stages`, set `device:"):
        plan_pool("tiny", folder, pool(device="cuda", stages=3))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cpu_device_memory": "200KB"},
            r"pool default: tiny does not fit: device 0 needs [\d,]+ bytes and has 200,000",
        ),
        ({"max_context": 129}, "pool default: max_context is 129 tokens, but tiny was made for 128"),
        ({"quantization": "int8", "double_quant": True}, "pool default: double_quant needs nf4 or fp4"),
        ({"quantization": "bf16", "dtype": "float32"}, "pool default: quantization bf16 computes in bfloat16"),
    ],
)
def test_what_can_not_be_planned_is_one_line(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_pool("tiny", folder, pool(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_gpu")
def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pool default: .*config\.json does not exist"):
        plan_pool("tiny", tmp_path, pool())


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
_SMALL_ATTENTION = {**_SMALL, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
_MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
RECURRENT = {
    "short convolutions": transformers.Lfm2Config(**_SMALL_ATTENTION, full_attn_idxs=[1]),
    "Jamba": transformers.JambaConfig(**_SMALL_ATTENTION, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
    "Bamba": transformers.BambaConfig(**_SMALL_ATTENTION, **_MAMBA_2, attn_layer_indices=[1]),
    "Falcon H1": transformers.FalconH1Config(**_SMALL_ATTENTION, **_MAMBA_2, mamba_d_ssm=64),
    "Qwen3-Next": transformers.Qwen3NextConfig(
        **_SMALL_ATTENTION, **_LINEAR, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16
    ),
}
NO_ATTENTION = {
    "Mamba": transformers.MambaConfig(**_SMALL),
    "Mamba 2": transformers.Mamba2Config(**_SMALL, num_heads=4, head_dim=16, expand=2, n_groups=1),
    "RWKV": transformers.RwkvConfig(**_SMALL),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        *((config, "tiny caches recurrent state .* does not serve yet") for config in RECURRENT.values()),
        *((config, ".*no attention layers.*; serve a model with") for config in NO_ATTENTION.values()),
    ],
    ids=[*RECURRENT, *NO_ATTENTION],
)
def test_models_of_other_layers_are_refused_before_anything_loads(
    config: transformers.PreTrainedConfig, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"pool default: {message}") as caught:
        plan_pool("tiny", tmp_path, pool())
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_gpu")
def test_checkpoints_that_the_engine_cannot_load_are_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(gptqmodel_fit, "find_spec", lambda _: None)
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"tiny is quantised already \(gptq-4bit\).* pip install 'headroom\[gptq\]'"):
        plan_pool("tiny", tmp_path, pool())
    config["quantization_config"]["bits"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="tiny is quantised already to 3 bits, and of gptq 2, 4, 8 bits can be read"):
        plan_pool("tiny", tmp_path, pool())
    MULTIMODAL["gemma3_vision"].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"other parts than text \(model.vision_tower, .*serve a text model"):
        plan_pool("tiny", tmp_path, pool())


@pytest.mark.usefixtures("two_gpus")
def test_gpus_take_gptq_and_awq_of_up_to_4_bits_on_our_kernels(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan, _ = plan_pool("tiny", tmp_path, pool(stages=2))
    assert (plan.quantization, plan.dtype) == ("gptq-4bit", "bfloat16")
    linears = [t for layer in footprint(tmp_path).layers for t in layer.tensors if t.linear]
    # 4 bits a weight, a float32 scale for each 32, a table of 16 float32, an int32 for each input.
    held = sum(t.elements // 2 + t.elements // 32 * 4 + 64 + 4 * t.shape[1] for t in linears)
    stored = sum(t.bytes for t in linears)
    as_stored = footprint(tmp_path, dtype="bfloat16").bytes
    one, _ = plan_pool("tiny", tmp_path, pool())
    assert one.stages[0].weight_bytes == as_stored - stored + held
    with pytest.raises(ConfigError, match="which on GPUs Headroom's kernels alone compute with; leave `kernels` out"):
        plan_pool("tiny", tmp_path, pool(kernels="bitsandbytes"))
    config["quantization_config"]["bits"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"\(gptq-8bit\), and GPUs have codes of up to 4 bits in whole groups; set `dev"
    ):
        plan_pool("tiny", tmp_path, pool())


@pytest.mark.usefixtures("no_gpu")
def test_a_step_of_an_encoder_decoder_has_room_for_the_longest_prompt(folder: Path, tmp_path: Path) -> None:
    ENCODER_DECODERS["t5"].save_pretrained(tmp_path)
    assert step_tokens(tmp_path, pool(), "cpu") == 512 + 16
    assert step_tokens(tmp_path, pool(max_context=64), "cpu") == 512
    assert step_tokens(tmp_path, pool(max_context=64, max_batch_tokens=80), "cpu") == 80
    assert step_tokens(folder, pool(max_batch_tokens=1), "cpu") == 1, "other models' prompts come in chunks"
    plan, _ = plan_pool("tiny", tmp_path, pool(max_context=64))
    assert plan.max_context == 64
    with pytest.raises(
        ConfigError, match=r"max_context \(64\) and max_sequences \(16\) together, 80 at least, and is 79"
    ):
        plan_pool("tiny", tmp_path, pool(max_context=64, max_batch_tokens=79))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("asked", "context"), [(None, 512), (64, 64)])
def test_an_encoder_decoder_that_does_not_say_its_longest_context(
    asked: int | None, context: int, tmp_path: Path
) -> None:
    """As mT5 and T5 1.1 are published."""
    ENCODER_DECODERS["t5_v1_1"].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "n_positions"}))
    plan, _ = plan_pool("tiny", tmp_path, pool(max_context=asked, cpu_device_memory="40MB"))
    assert plan.max_context == context


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t5", {"prefix_cache": True}, "a prompt's beginning depends on its end; leave prefix_cache out"),
        ("t5", {"prefill_chunk_tokens": 8}, "whose prompts are computed whole; leave prefill_chunk_tokens out"),
        ("t5", {"batch_invariant": True}, "not computed batch-invariantly yet; leave batch_invariant out"),
        ("bart", {}, "is an encoder-decoder of type bart, and the engine serves t5, mt5 alone"),
    ],
)
def test_what_the_engine_does_not_do_with_an_encoder_decoder(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ENCODER_DECODERS[name].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        plan_pool("tiny", tmp_path, pool(**options))


@pytest.mark.usefixtures("two_gpus")
def test_an_encoder_decoder_is_planned_on_gpus(tmp_path: Path) -> None:
    """Without CUDA graphs and FlashInfer; in steps that have room for the longest prompt."""
    ENCODER_DECODERS["t5"].save_pretrained(tmp_path)
    plan, device_type = plan_pool("tiny", tmp_path, pool(stages=2))
    assert device_type == "cuda"
    assert plan.dtype == "bfloat16"
    assert [stage.device for stage in plan.stages] == [0, 1]
    for stage in plan.stages:
        terms = {term.name: term for term in stage.reserve}
        assert "graphs" not in terms
        assert "never held at once: attention" in terms["workspace"].why


@pytest.mark.usefixtures("two_gpus")
def test_an_encoder_decoder_of_gptq_is_refused_on_gpus(tmp_path: Path) -> None:
    ENCODER_DECODERS["t5"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4}  # in whole words
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantised by GPTQ or AWQ, .*deployments.dequantize .*, or set `device: c"):
        plan_pool("tiny", tmp_path, pool())


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("here", "head_dim", "stored"),
    [(True, 64, 64), (True, 80, 128), (True, 16, None), (False, 64, None), (False, 80, None)],
)
def test_a_plan_counts_on_the_attention_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool, head_dim: int, stored: int | None
) -> None:
    """With heads of the size that FlashInfer stores, and without it as they are."""
    monkeypatch.setattr(flashinfer_fit, "why_not_here", lambda: None if here else "it is not installed")
    llama(head_dim=head_dim).save_pretrained(tmp_path)
    plan, _ = plan_pool("tiny", tmp_path, pool())
    (stage,) = plan.stages
    assert plan.attention == ("flashinfer" if stored else "torch")
    assert ("graphs" in {term.name for term in stage.reserve}) == bool(stored)
    # 4 tokens of 2 layers, keys and values of 2 heads in 2 bytes.
    assert stage.kv_block_bytes == 4 * 2 * 2 * 2 * 2 * (stored or head_dim)


@pytest.mark.usefixtures("two_gpus")
def test_a_quantised_head_on_a_gpu_that_is_too_old_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' kernels would dequantise it whole, and the plan does not count that."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device.index == 0 else (7, 5))
    pool = PoolSettings.model_validate({"device": "cuda", "quantization": "nf4", "quantize_head": True})
    plan_pool("tiny", folder, pool)
    with pytest.raises(ConfigError, match=r"cuda:1 \(Tesla T4\) has compute capability 7\.5, and they need 8\.0"):
        plan_pool("tiny", folder, pool.model_copy(update={"stages": 2}))
