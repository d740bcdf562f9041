"""Checkpoints that bitsandbytes has quantised already: loaded as they are, on one stage and on two, as planned.

The oracle is transformers on the checkpoint as it was saved, in float32 and without an outlier threshold. The engine
gets the same weights under a config that asks for bfloat16 and a threshold, which it must not follow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deployments.engine.loader import load
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from deployments.settings import PoolSettings
from placement import probe
from tests.contract.families import CONFIGS
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, run, save

PROMPTS = make_prompts()
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": FOUR_BIT | {"bnb_4bit_quant_type": "nf4"},
    "nf4, double": FOUR_BIT | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": FOUR_BIT | {"bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4, all but one": FOUR_BIT | {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "up_proj"]},
}


def quantised(name: str, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of a family, quantised by transformers and saved."""
    plain = save(CONFIGS[name], folder / "plain")
    quantization = BitsAndBytesConfig(**KINDS[kind])
    AutoModelForCausalLM.from_pretrained(plain, dtype=dtype, quantization_config=quantization).save_pretrained(
        folder / "quantised"
    )
    return folder / "quantised"


def pool(**options: Any) -> PoolSettings:
    small = {"device": "cpu", "block_size": 4, "max_sequences": 16, "max_batch_tokens": 256, "max_context": 64}
    return PoolSettings.model_validate(small | {"cpu_device_memory": "40MB"} | options)


def ask_for_more(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"bnb_4bit_compute_dtype": "bfloat16", "llm_int8_threshold": 6.0}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Llama", "nf4, double"),
        ("Llama", "nf4, all but one"),
        ("Mistral", "int8"),
        ("OPT 350m", "fp4"),
        ("BLOOM", "nf4"),
    ],
)
def test_greedy_tokens_equal_generate(name: str, kind: str, tmp_path: Path) -> None:
    folder = quantised(name, kind, tmp_path)
    outputs = generated(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), PROMPTS)
    expected = answers(outputs)
    ask_for_more(folder)
    for stages in (1, 2):
        plan, _ = plan_pool("tiny", folder, pool(stages=stages))
        assert (plan.quantization, plan.dtype, len(plan.stages)) == (kind.partition(",")[0], "float32", stages)
        assert run(load(folder, plan, device_type="cpu"), plan, LIMITS, PROMPTS)[0] == expected


def test_the_rest_stays_in_the_dtype_in_which_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "computes_bf16_natively", lambda: True)
    folder = quantised("Llama", "nf4", tmp_path, torch.float16)
    assert plan_pool("tiny", folder, pool())[0].dtype == "float16"
    with pytest.raises(ConfigError, match=r"dtype is bfloat16, but .* stores the rest in float16; leave dtype out"):
        plan_pool("tiny", folder, pool(dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"already quantised \(nf4\), and something else was asked for"):
        plan_pool("tiny", folder, pool(quantization="int8"))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers casts to the config's dtype before 5.23"
)
def test_a_config_that_names_another_dtype_than_the_weights_have_is_found(tmp_path: Path) -> None:
    folder = quantised("Llama", "nf4", tmp_path, torch.float16)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "bfloat16"'))
    plan, _ = plan_pool("tiny", folder, pool())
    with pytest.raises(ConfigError, match=r"in float16, but its plan says bfloat16; correct `dtype`"):
        load(folder, plan, device_type="cpu")
