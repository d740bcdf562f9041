"""Which way of attending a model gets, and that none is served on one that computes something else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from deployments.engine import attention_torch, cut, gather
from deployments.engine.loader import LoadedModel, load
from deployments.engine.stages import run_stages
from deployments.errors import ConfigError
from tests.unit.engine.tiny import IDS, VOCAB, llama, plan_of, rows, save

_COMMON = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 128}
BLOOM = transformers.BloomConfig(**_COMMON, n_layer=2, initializer_range=0.1)
FALCON = transformers.FalconConfig(**_COMMON, num_hidden_layers=2)
GPT_OSS = transformers.GptOssConfig(
    **_COMMON,
    num_hidden_layers=2,
    intermediate_size=128,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=1,
    eos_token_id=1,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


def loaded(folder: Path, config: PreTrainedConfig) -> LoadedModel:
    save(folder, config)
    return load(folder, plan_of(folder, quantization="fp32", max_context=64), device_type="cpu")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BLOOM, "its layers do not call transformers' attention function"),
        (FALCON, "its layers do not call transformers' attention function"),
        (GPT_OSS, "its attention has sinks"),
    ],
    ids=["no hook", "needs a mask", "sinks"],
)
def test_what_paged_attention_does_not_compute_gets_the_gather_cache(
    tmp_path: Path, config: PreTrainedConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(tmp_path, config)
    assert re.match(rf"gather cache \(on paged attention {reason}", model.attention)
    assert "\n" not in model.attention
    assert any("runs on the gather cache, which is slower" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BLOOM, r"its layers attend \[0\] times in 4 forwards"),
        (FALCON, r"its forward fails \(TypeError"),
        (GPT_OSS, "GptOssAttention passes s_aux, which paged attention does not compute"),
    ],
    ids=["no hook", "needs a mask", "sinks"],
)
def test_the_probe_finds_what_nobody_foresaw(
    tmp_path: Path,
    config: PreTrainedConfig,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cut, "own_attention", lambda *_: None)
    model = loaded(tmp_path, config)
    assert re.match(rf"gather cache \(on paged attention {reason}", model.attention)
    assert any("holds nothing back for the gather cache" in message for message in caplog.messages)


def mistral(folder: Path) -> LoadedModel:
    """Of a window that the probe's tokens leave."""
    return loaded(
        folder, transformers.MistralConfig(**llama().to_dict() | {"model_type": "mistral", "sliding_window": 8})
    )


def forget_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_window(*args: Any) -> Any:
        return original(*args[:-1], replace(args[-1], window=None))

    original = attention_torch._attend
    monkeypatch.setattr(attention_torch, "_attend", without_window)


def see_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_padding(*args: Any) -> gather.Batch:
        batch = original(*args)
        return replace(batch, mask=torch.ones_like(batch.mask))

    original = gather.make_batch
    monkeypatch.setattr(gather, "make_batch", without_padding)


def test_a_backend_that_is_right_is_kept(tmp_path: Path) -> None:
    assert mistral(tmp_path).attention == "torch"


def test_a_backend_that_is_wrong_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model then runs on the gather cache, and is right."""
    forget_the_window(monkeypatch)
    model = mistral(tmp_path)
    assert re.match(r"gather cache \(on paged attention its logits differ from the plain forward's by", model.attention)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    found = run_stages(model.stages, rows([(0, 23, tuple(range(6)))], tuple(range(23))), 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["torch", "gather cache"])
def test_blocks_are_made_as_the_plan_counts_them_whatever_attends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """Heads of 48 in blocks made for FlashInfer, which then can't be used; the probe compares logits."""
    save(tmp_path, llama(head_dim=48))
    plan = plan_of(tmp_path, quantization="fp32", max_context=64)
    (stage,) = plan.stages
    padded = replace(stage, kv_block_bytes=stage.kv_block_bytes * 64 // 48)
    monkeypatch.setattr(cut, "own_attention", lambda *_: "is tried" if attention == "gather cache" else None)
    model = load(tmp_path, replace(plan, attention="flashinfer", stages=(padded,)), device_type="cpu")
    assert model.attention.startswith(attention)
    assert {kv.keys.shape[-1] for kv in model.stages[0].kv} == {64}


def test_a_model_that_is_wrong_on_both_is_refused_with_both_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the probe's steps only the decodes of two lengths are padded."""
    see_the_padding(monkeypatch)
    with pytest.raises(
        ConfigError,
        match=r"BloomForCausalLM can't be served: on paged attention its layers do not call .*; on the gather "
        r"cache its logits differ from the plain forward's by .* over the bound of 0\.001",
    ) as caught:
        loaded(tmp_path, BLOOM)
    assert "\n" not in str(caught.value)


def test_a_layer_that_attends_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: gather.GatherLayer, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
        original(self, key, value)
        return original(self, key, value)

    original = gather.GatherLayer.update
    monkeypatch.setattr(gather.GatherLayer, "update", twice)
    with pytest.raises(ConfigError, match=r"on the gather cache its layers attend \[8\] times in 4 forwards"):
        loaded(tmp_path, BLOOM)
