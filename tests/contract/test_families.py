"""Every family at every quantisation: greedy tokens equal `generate()` on the same weights in float32.

The engine gets sequences of many lengths, prefix hits, prompts in chunks and too few blocks for all, on one stage and
on two. What `test_engine_oracle` does with a few families at length, this does with all of them in short.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from deployments.engine.loader import LoadedModel, load, quantization_config
from deployments.errors import ConfigError
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve
from tests.contract.families import FAMILIES, PAGED, TABLE, Family, table
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, run, save
from tests.page_table import MODELS, shown

pytestmark = pytest.mark.usefixtures("one_torch_thread")

OLD = Version(transformers.__version__) < Version("5.23")


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    """A load that falls back to the gather cache collects garbage, and need not look through all of transformers."""
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass(frozen=True)
class Case:
    """A checkpoint at a quantisation, and what `generate()` says on it."""

    family: Family
    folder: Path
    quantization: str
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    def plan(self, stages: int) -> Plan:
        return solve(
            footprint(self.folder, quantization=self.quantization, dtype="float32"),
            virtual_cpu_devices(("40MB",) * stages),
            block_size=4,
            max_batch_tokens=256,
            max_sequences=16,
            max_context=128,
        )


@pytest.fixture(
    scope="module",
    params=[(family, quantization) for family in FAMILIES for quantization in family.quantizations],
    ids=lambda pair: f"{pair[0].name}, {pair[1]}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, name = request.param
    folder = save(family.config, tmp_path_factory.mktemp("family"))
    prompts = make_prompts()
    quantization = quantization_config(Case(family, folder, name, prompts, ()).plan(1))
    options = {} if quantization is None else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return Case(family, folder, name, prompts, generated(model, prompts))


def loaded(case: Case, plan: Plan) -> LoadedModel:
    model = load(case.folder, plan, device_type="cpu")
    expected = ["torch" if case.family.attention == PAGED else "gather cache"]
    if OLD and case.quantization == "int8":  # The probe found Gemma 2's logits 0.4 % apart with transformers 5.17.
        expected.append("gather cache")
    assert model.attention.startswith(tuple(expected))
    return model


def test_greedy_tokens_equal_generate(case: Case) -> None:
    """With room for all on one stage, and with too little of everything on two."""
    expected = answers(case.outputs)
    one = case.plan(1)
    outputs, _ = run(loaded(case, one), one, LIMITS, case.prompts)
    assert outputs == expected
    two = replace(case.plan(2), num_blocks=10, max_context=40)
    chunked = replace(LIMITS, max_batch_tokens=16, prefill_chunk_tokens=7)
    outputs, engine = run(loaded(case, two), two, chunked, case.prompts)
    assert outputs == expected
    assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize(
    ("family", "quantization"),
    [(family, name) for family in FAMILIES for name in family.not_in],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_transformers_can_not_run_is_refused(family: Family, quantization: str, tmp_path: Path) -> None:
    case = Case(family, save(family.config, tmp_path), quantization, (), ())
    with pytest.raises(ConfigError, match=f"{quantization}, transformers' own forward of it fails") as caught:
        load(case.folder, case.plan(1), device_type="cpu")
    assert "\n" not in str(caught.value)


def test_the_page_has_the_table() -> None:
    assert shown(MODELS, TABLE) == table(), "renew it: python -m tests.contract.families docs/models.md"
