"""Every family at every quantisation: greedy tokens equal `generate()` on the same weights in float32.

The engine gets sequences of many lengths, prefix hits, prompts in chunks and too few blocks for all, on one stage and
on two. What `test_engine_oracle` does with a few families at length, this does with all of them in short.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deployments.engine.loader import LoadedModel, load, quantization_config
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.errors import ConfigError
from deployments.protocol import GenerationRequest, Sampling
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve
from tests.contract.families import FAMILIES, MARKERS, PAGED, VOCAB, Family, table

OUTPUT = 8
LIMITS = EngineLimits(max_batch_tokens=256, max_sequences=16, prefix_cache=True, threads=1)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """More would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def make_prompts() -> tuple[tuple[int, ...], ...]:
    """Of 1 to 45 tokens; every third starts with the same 21."""
    draw = random.Random(5)
    shared = [draw.randrange(2, VOCAB) for _ in range(21)]
    return tuple(
        tuple((shared if i % 3 == 0 else []) + [draw.randrange(2, VOCAB) for _ in range(length)])
        for i, length in enumerate((3, 1, 40, 24, 9, 2, 11, 17, 33))
    )


def save(family: Family, path: Path) -> Path:
    torch.manual_seed(3)
    for name in ("initializer_range", "init_std"):
        if hasattr(family.config, name):
            setattr(family.config, name, 0.1)  # so that outputs differ from prompt to prompt
    AutoModelForCausalLM.from_config(family.config).save_pretrained(path)
    return path


@pytest.fixture(
    scope="module",
    params=[(family, quantization) for family in FAMILIES for quantization in family.quantizations],
    ids=lambda pair: f"{pair[0].name}, {pair[1]}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, name = request.param
    folder = save(family, tmp_path_factory.mktemp("family"))
    prompts = make_prompts()
    quantization = quantization_config(Case(family, folder, name, prompts, ()).plan(1))
    options = {} if quantization is None else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it rounds inside
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=OUTPUT, eos_token_id=None
        )
        outputs.append(tuple(out[0, len(prompt) :].tolist()))
    assert len(set(outputs)) > len(prompts) // 2, "an oracle that always says the same would show nothing"
    return Case(family, folder, name, prompts, tuple(outputs))


def run(model: LoadedModel, plan: Plan, limits: EngineLimits, case: Case) -> tuple[dict[str, tuple[int, ...]], Engine]:
    """All prompts, two more at each step, and the first again at the end."""
    engine = Engine(model, plan, limits)
    waiting = [
        GenerationRequest(f"{i}", prompt, Sampling(max_tokens=OUTPUT, seed=i, temperature=0.0))
        for i, prompt in enumerate((*case.prompts, case.prompts[0]))
    ]
    outputs: dict[str, tuple[int, ...]] = defaultdict(tuple)
    while waiting or engine.has_work():
        for request in waiting[:2]:
            engine.submit(request)
        del waiting[:2]
        for chunk in engine.step():
            outputs[chunk.request_id] += chunk.token_ids
        engine.check_integrity()
    engine.close()
    return outputs, engine


def loaded(case: Case, plan: Plan) -> LoadedModel:
    model = load(case.folder, plan, device_type="cpu")
    assert model.attention.startswith("torch" if case.family.attention == PAGED else "gather cache")
    return model


def test_greedy_tokens_equal_generate(case: Case) -> None:
    """With room for all on one stage, and with too little of everything on two."""
    expected = {f"{i}": ids for i, ids in enumerate((*case.outputs, case.outputs[0]))}
    one = case.plan(1)
    outputs, _ = run(loaded(case, one), one, LIMITS, case)
    assert outputs == expected
    two = replace(case.plan(2), num_blocks=18, max_context=72)
    chunked = replace(LIMITS, max_batch_tokens=13, prefill_chunk_tokens=5)
    outputs, engine = run(loaded(case, two), two, chunked, case)
    assert outputs == expected
    assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize(
    ("family", "quantization"),
    [(family, name) for family in FAMILIES for name in family.not_in],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_transformers_can_not_run_is_refused(family: Family, quantization: str, tmp_path: Path) -> None:
    case = Case(family, save(family, tmp_path), quantization, (), ())
    with pytest.raises(ConfigError, match=f"{quantization}, transformers' own forward of it fails") as caught:
        load(case.folder, case.plan(1), device_type="cpu")
    assert "\n" not in str(caught.value)


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    shown = page.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()
    assert shown == table(), "run `python -m tests.contract.families docs/models.md`"
