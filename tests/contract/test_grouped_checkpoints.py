"""GPTQ and AWQ checkpoints: planned to the byte, and served as transformers does.

The checkpoints are written by `grouped.py` from the formats' definitions. Those that load one need the extra `gptq`.
The oracle is transformers on the same checkpoint through the same kernels; and for GPTQ, whose products are in the
model's own dtype, the plain model of the weights that the codes stand for.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from deployments.engine.grouped import grouped_config, settle_grouped
from deployments.engine.loader import load
from deployments.planning import plan_pool
from deployments.settings import PoolSettings
from placement.footprint import footprint
from placement.plan import Plan
from tests.contract.families import FAMILIES
from tests.contract.greedy import LIMITS, generated, make_prompts, run
from tests.contract.grouped import Grouping, checkpoint

PROMPTS = make_prompts()
CONFIGS = {family.name: family.config for family in FAMILIES}
CASES = [
    ("Llama", Grouping()),
    ("Llama", Grouping(bits=8, group_size=64, symmetric=False, version="gptq_v2")),
    ("OPT", Grouping(group_size=64, act_order=True)),
    ("OPT", Grouping(symmetric=False)),
    ("Mistral", Grouping(bits=8, group_size=-1)),
    ("Mistral", Grouping(group_size=128, act_order=True, symmetric=False)),
    ("Mistral", Grouping(method="awq")),
    ("OPT", Grouping(method="awq", group_size=64)),
]
NAMES = [
    f"{name}, {case.method} {case.bits} {case.group_size} {case.act_order:d}{case.symmetric:d}" for name, case in CASES
]
needs_gptqmodel = pytest.mark.skipif(
    find_spec("gptqmodel") is None, reason="loading GPTQ and AWQ needs GPTQModel: pip install 'headroom[gptq]'"
)


def pool(**options: Any) -> PoolSettings:
    small = {"device": "cpu", "block_size": 4, "max_sequences": 16, "max_batch_tokens": 256, "max_context": 64}
    return PoolSettings.model_validate(small | {"cpu_device_memory": "40MB"} | options)


def planned(folder: Path, **options: Any) -> Plan:
    return plan_pool("tiny", folder, pool(dtype="float32", **options))[0]


def read(folder: Path, plan: Plan) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=grouped_config(plan)
    )
    settle_grouped(model)
    return model


@pytest.mark.filterwarnings("ignore")  # GPTQModel's and its dependencies', at import
@needs_gptqmodel
@pytest.mark.parametrize(("name", "grouping"), CASES, ids=NAMES)
def test_greedy_tokens_equal_generate(name: str, grouping: Grouping, tmp_path: Path) -> None:
    folder, plain = checkpoint(CONFIGS[name], grouping, tmp_path)
    outputs = generated(read(folder, planned(folder)), PROMPTS)
    if grouping.method == "gptq":
        assert generated(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), PROMPTS) == outputs
    expected = {f"{i}": ids for i, ids in enumerate((*outputs, outputs[0]))}
    for stages in (1, 2):
        plan = planned(folder, stages=stages)
        assert (plan.quantization, len(plan.stages)) == (f"{grouping.method}-{grouping.bits}bit", stages)
        assert run(load(folder, plan, device_type="cpu"), plan, LIMITS, PROMPTS)[0] == expected


@pytest.mark.parametrize(("name", "grouping"), CASES[1::2], ids=NAMES[1::2])
def test_the_config_alone_weighs_what_the_file_does(name: str, grouping: Grouping, tmp_path: Path) -> None:
    folder, _ = checkpoint(CONFIGS[name], grouping, tmp_path)
    for dtype in ("float16", "float32"):
        assert footprint(folder, dtype=dtype).bytes == footprint(folder / "config.json", dtype=dtype, name="x").bytes
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    rotary = 0 if name == "OPT" else 2 * 4 * 8  # two tables of 8 frequencies in float32, which no file stores
    assert footprint(folder, dtype="float16").bytes == stored + rotary
