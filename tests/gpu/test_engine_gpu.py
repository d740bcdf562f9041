"""The engine on CUDA as a replica runs it, teacher-forced against the plain forward: some families, and one of them in
every format that bitsandbytes has.

pytest tests/gpu/test_engine_gpu.py
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from deployments.engine.flashinfer_fit import why_not_here
from deployments.engine.loader import load
from placement.footprint import footprint
from tests.gpu.teacher import BOUND, COARSE, LIMITS, check, plain_model, plan_on_gpus, serve
from tests.unit.engine.tiny import save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # FlashInfer's imports warn
]

_COMMON = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024}
_WIDE = _COMMON | {"hidden_size": 384}
_GLU = {**_COMMON, "intermediate_size": 512, "num_key_value_heads": 2, "max_position_embeddings": 512}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GLU, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**_GLU, sliding_window=24),
    "qwen3": transformers.Qwen3Config(**_GLU, head_dim=64),
    "gemma2": transformers.Gemma2Config(**_GLU, head_dim=64, sliding_window=24),
    "opt": transformers.OPTConfig(**_COMMON, ffn_dim=512, word_embed_proj_dim=128, max_position_embeddings=512),
    "gpt_neox": transformers.GPTNeoXConfig(**_COMMON, intermediate_size=512, max_position_embeddings=512),
    "heads_of_96": transformers.GPTNeoXConfig(**_WIDE, intermediate_size=512, max_position_embeddings=512),
}


FORMATS: dict[str, dict[str, Any]] = {
    "fp4": {"quantization": "fp4"},
    "nf4 double": {"quantization": "nf4", "double_quant": True},
    "fp4 double": {"quantization": "fp4", "double_quant": True},
    "nf4 float16": {"quantization": "nf4", "dtype": "float16"},
    "int8 float16": {"quantization": "int8", "dtype": "float16"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint."""
    yield save(tmp_path_factory.mktemp(request.param), FAMILIES[request.param], seed=0)
    torch._dynamo.reset()  # what was compiled for many models counts against the limit of one


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "bf16"])
def test_tokens_are_the_plain_forwards_argmax(family: Path, quantization: str, stages: int) -> None:
    plan = plan_on_gpus(footprint(family, quantization=quantization), stages)
    model = load(family, plan, device_type="cuda", limits=LIMITS)
    assert model.attention == "flashinfer" or why_not_here()
    served = serve(model, plan)
    check(plain_model(family, plan), served, COARSE if quantization == "int8" else BOUND)


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint."""
    yield save(tmp_path / "plain", FAMILIES["llama"], seed=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats(llama: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_on_gpus(footprint(llama, **FORMATS[name]), 1)
    with caplog.at_level(logging.INFO, "deployments.engine"):
        model = load(llama, plan, device_type="cuda", limits=LIMITS)
    assert "28 linears on Headroom's kernels, 8 groups of linears fused" in caplog.text
    served = serve(model, plan)
    check(plain_model(llama, plan), served, COARSE if plan.quantization == "int8" else BOUND)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_checkpoint(llama: Path, quantization: str, stages: int, tmp_path: Path) -> None:
    """Saved by transformers. The oracle is the model that was saved."""
    folder = tmp_path / "quantised"
    plain = plain_model(llama, plan_on_gpus(footprint(llama, quantization=quantization), 1))
    plain.save_pretrained(folder)
    weighed = footprint(folder)
    assert (weighed.quantization, weighed.prequantized) == (quantization, True)
    plan = plan_on_gpus(weighed, stages)
    served = serve(load(folder, plan, device_type="cuda", limits=LIMITS), plan)
    check(plain, served, COARSE if quantization == "int8" else BOUND)


def test_a_load_says_how_far_it_is_and_is_read_ahead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path, FAMILIES["llama"], seed=0)
    plan = plan_on_gpus(footprint(folder, quantization="nf4"), 1)
    gc.collect()  # what other tests left would be freed meanwhile
    with caplog.at_level(logging.INFO, "deployments.engine"):
        load(folder, plan, device_type="cuda", limits=LIMITS)
    shares = [int(share) for share in re.findall(r"loading weights: .+ of .+ \((\d+) %\)", caplog.text)]
    assert shares[-1] >= 95
    assert len(re.findall(r"read ahead of the load: .+ of .+ in", caplog.text)) == 1
