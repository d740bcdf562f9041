"""One checkpoint loaded again and again in a process: the tokens stay the same, and are `generate()`'s.

Memory that nobody wrote to is NaN meanwhile, so a load that reads some of it, or what a load before left, shows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deployments.engine.loader import bitsandbytes_config, load
from deployments.planning import plan_pool
from tests.contract.families import CONFIGS
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, pool, run, save

PROMPTS = make_prompts()


@pytest.fixture
def nothing_is_zero_by_chance() -> Iterator[None]:
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("nothing_is_zero_by_chance")
@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ("nf4", "float32"),
        ("nf4", "bfloat16"),  # repacked in place by the first forward, on a CPU with AVX512-BF16
        ("int8", "float32"),
    ],
)
def test_each_load_says_the_same(quantization: str, dtype: str, tmp_path: Path) -> None:
    folder = save(CONFIGS["Llama"], tmp_path / "plain")
    settings = pool(quantization=quantization, dtype=dtype, stages=2)
    first_plan, _ = plan_pool("tiny", folder, settings)
    backwards = PROMPTS[::-1]
    said: list[list[dict[str, tuple[int, ...]]]] = []
    for cache_dir in (None, None, tmp_path / "made"):
        plan = first_plan if len(said) != 1 else plan_pool("tiny", folder, settings)[0]
        loaded = load(folder, plan, device_type="cpu", cache_dir=cache_dir)
        said.append([run(loaded, plan, LIMITS, prompts)[0] for prompts in (PROMPTS, backwards)])
        del loaded
        gc.collect()
    assert said[1:] == said[:1] * 2
    if dtype == "float32":  # in bfloat16 rows are rounded by the number of rows beside them
        config = bitsandbytes_config(quantization, double_quant=False, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
        outputs = generated(model, PROMPTS)
        assert said[0] == [answers(outputs), answers(outputs[::-1])]
