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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deployments.engine.grouped import grouped_options, settle_grouped
from deployments.engine.loader import load
from deployments.planning import plan_pool
from deployments.settings import PoolSettings
from placement.footprint import footprint
from placement.plan import Plan
from tests.contract.families import CONFIGS, VOCAB
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, run, save
from tests.contract.grouped import CASES, TABLE, Grouping, checkpoint, pack, quantised, table
from tests.page_table import MODELS, shown

PROMPTS = make_prompts()
NAMES = [f"{name}, {case.label}" for name, case in CASES]
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # of what GPTQModel imports
    "ignore::FutureWarning",
    "ignore:Implicitly cleaning up <TemporaryDirectory '/tmp/gptqmodel_",  # GPTQModel makes one at each load
    "ignore::pytest.PytestUnraisableExceptionWarning",  # and so says it
)
needs_gptqmodel = pytest.mark.skipif(
    find_spec("gptqmodel") is None, reason="loading GPTQ and AWQ needs GPTQModel: pip install 'headroom[gptq]'"
)


def pool(**options: Any) -> PoolSettings:
    small = {"device": "cpu", "block_size": 4, "max_sequences": 16, "max_batch_tokens": 256, "max_context": 64}
    return PoolSettings.model_validate(small | {"cpu_device_memory": "40MB"} | options)


def planned(folder: Path, **options: Any) -> Plan:
    return plan_pool("tiny", folder, pool(dtype="float32", **options))[0]


def read(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **grouped_options(folder)
    )
    settle_grouped(model)
    return model


def check_served(folder: Path, quantization: str) -> tuple[tuple[int, ...], ...]:
    """The engine's tokens on one stage and on two are transformers'; these."""
    outputs = generated(read(folder), PROMPTS)
    expected = answers(outputs)
    for stages in (1, 2):
        plan = planned(folder, stages=stages)
        assert (plan.quantization, len(plan.stages)) == (quantization, stages)
        assert run(load(folder, plan, device_type="cpu"), plan, LIMITS, PROMPTS)[0] == expected
    return outputs


@needs_gptqmodel
@pytest.mark.parametrize(("name", "grouping"), CASES, ids=NAMES)
def test_greedy_tokens_equal_generate(name: str, grouping: Grouping, tmp_path: Path) -> None:
    folder, plain = checkpoint(CONFIGS[name], grouping, tmp_path)
    outputs = check_served(folder, f"{grouping.method}-{grouping.bits}bit")
    if grouping.method == "gptq":
        assert generated(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), PROMPTS) == outputs


@needs_gptqmodel
def test_what_gptqmodel_quantises_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it writes logs/ where it runs
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # fewer, as on two cores, and 7.6.0 does not start
    from gptqmodel import GPTQModel, QuantizeConfig

    plain = save(CONFIGS["Llama"], tmp_path / "plain")
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t2"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t1", eos_token="t1").save_pretrained(plain)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, VOCAB, (1, 48), generator=draw) for _ in range(24)]
    settings = QuantizeConfig(bits=4, group_size=32, desc_act=True, sym=False, device="cpu")
    model = GPTQModel.load(str(plain), settings, dtype=torch.float16)
    model.quantize([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts], batch_size=1)
    model.save(str(tmp_path / "quantised"))
    check_served(tmp_path / "quantised", "gptq-4bit")


@needs_gptqmodel
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptqmodel_packs_the_same(method: str) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    version = "gemm" if method == "awq" else "gptq_v2"
    grouping = Grouping(method=method, act_order=method == "gptq", symmetric=False, version=version)
    draw = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(64, 96, bias=False)
    found = quantised(torch.randn(64, 96, generator=draw), grouping, draw)
    linear.weight.data = (found.codes - found.zeros[found.g_idx]).t() * found.scales.float()[found.g_idx].t()
    shape = {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "in_features": 64, "out_features": 96}
    packer = (TorchLinear if method == "gptq" else AwqTorchLinear)(**shape, bias=False, register_buffers=True)
    pack_as = packer.pack_original if method == "gptq" else packer.pack
    pack_as(linear, found.scales.float().t(), found.zeros.float().t(), found.g_idx.int())
    for name, tensor in pack(found, grouping).items():
        torch.testing.assert_close(getattr(packer, name), tensor, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "grouping"), CASES[1::2], ids=NAMES[1::2])
def test_the_config_alone_weighs_what_the_file_does(name: str, grouping: Grouping, tmp_path: Path) -> None:
    folder, _ = checkpoint(CONFIGS[name], grouping, tmp_path)
    for dtype in ("float16", "float32"):
        assert footprint(folder, dtype=dtype).bytes == footprint(folder / "config.json", dtype=dtype, name="x").bytes
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    rotary = 0 if name == "OPT" else 2 * 4 * 8  # two tables of 8 frequencies in float32, which no file stores
    assert footprint(folder, dtype="float16").bytes == stored + rotary


def test_the_page_lists_these_cases() -> None:
    assert shown(MODELS, TABLE) == table(), "renew it: python -m tests.contract.grouped docs/models.md"
