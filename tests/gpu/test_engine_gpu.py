"""The engine on CUDA as a replica runs it, for six families, teacher-forced against the plain forward."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from deployments.engine.loader import load
from placement.footprint import footprint
from tests.gpu.teacher import LIMITS, check, plain_model, plan_on_gpus, serve
from tests.unit.engine.tiny import save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # FlashInfer's imports warn
]

BOUND = 0.05
OUTPUT = 24
_COMMON = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024}
_GLU = {**_COMMON, "intermediate_size": 512, "num_key_value_heads": 2, "max_position_embeddings": 512}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GLU, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**_GLU, sliding_window=24),
    "qwen3": transformers.Qwen3Config(**_GLU, head_dim=64),
    "gemma2": transformers.Gemma2Config(**_GLU, head_dim=64, sliding_window=24),
    "opt": transformers.OPTConfig(**_COMMON, ffn_dim=512, word_embed_proj_dim=128, max_position_embeddings=512),
    "gpt_neox": transformers.GPTNeoXConfig(**_COMMON, intermediate_size=512, max_position_embeddings=512),
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
    served = serve(load(family, plan, device_type="cuda", limits=LIMITS), plan, OUTPUT)
    check(plain_model(family, plan), served, BOUND)


def test_a_load_says_how_far_it_is_and_is_read_ahead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path, FAMILIES["llama"], seed=0)
    plan = plan_on_gpus(footprint(folder, quantization="nf4"), 1)
    gc.collect()  # what other tests left would be freed meanwhile
    with caplog.at_level(logging.INFO, "deployments.engine"):
        load(folder, plan, device_type="cuda", limits=LIMITS)
    shares = [int(share) for share in re.findall(r"loading weights: .+ of .+ \((\d+) %\)", caplog.text)]
    assert shares[-1] >= 95
    assert len(re.findall(r"read ahead of the load: .+ of .+ in", caplog.text)) == 1
