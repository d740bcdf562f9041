"""T5 and its kin: greedy tokens equal `generate()` on the same loaded weights, however the work is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from deployments.engine.loader import LoadedModel, load, quantization_config
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.errors import ConfigError
from deployments.protocol import GenerationRequest, Sampling
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve
from tests.arrivals import tokens_of
from tests.contract.families import ENCODER_DECODERS, MT5, VOCAB
from tests.t5 import save

pytestmark = pytest.mark.usefixtures("one_torch_thread")

START = 0
"""The decoder's first token."""
OUTPUT = 8
LIMITS = EngineLimits(max_batch_tokens=144, max_sequences=16, prefix_cache=True, threads=1)


@dataclass(frozen=True)
class Case:
    """A checkpoint at a quantisation, and what `generate()` says on it."""

    folder: Path
    quantization: str
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    def plan(self, stages: int, dtype: str = "float32", kv_dtype: str | None = None) -> Plan:
        return solve(
            footprint(self.folder, quantization=self.quantization, dtype=dtype),
            virtual_cpu_devices(("40MB",) * stages),
            block_size=4,
            max_batch_tokens=LIMITS.max_batch_tokens,
            max_sequences=LIMITS.max_sequences,
            max_context=128,
            kv_dtype=kv_dtype,
        )

    def requests(self) -> list[GenerationRequest]:
        return [
            GenerationRequest(f"{i}", (*prompt, START), Sampling(max_tokens=OUTPUT, seed=i, temperature=0.0))
            for i, prompt in enumerate(self.prompts)
        ]


def make_prompts() -> tuple[tuple[int, ...], ...]:
    draw = random.Random(5)
    return tuple(tuple(draw.randrange(2, VOCAB) for _ in range(length)) for length in (3, 1, 24, 9, 2, 60, 7, 30))


def generated(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=OUTPUT, eos_token_id=None
        )
        outputs.append(tuple(out[0, 1:].tolist()))
    assert len(set(outputs)) > len(prompts) // 2, "an oracle that always says the same would show nothing"
    assert sum(len(set(output)) > 1 for output in outputs) >= len(prompts) // 2
    return tuple(outputs)


@pytest.fixture(
    scope="module",
    params=[
        *((family, quantization) for family in ENCODER_DECODERS for quantization in family.quantizations),
        (MT5, "nf4"),
    ],
    ids=lambda pair: f"{pair[0].name}, {pair[1]}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, name = request.param
    folder, prompts = save(family.config, tmp_path_factory.mktemp("t5")), make_prompts()
    quantization = quantization_config(Case(folder, name, prompts, ()).plan(1))
    options = {} if quantization is None else {"quantization_config": quantization}
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it rounds inside
    return Case(folder, name, prompts, generated(model, prompts))


def run(
    model: LoadedModel, plan: Plan, limits: EngineLimits, requests: Sequence[GenerationRequest]
) -> tuple[dict[str, tuple[int, ...]], Engine]:
    """All requests, two more at each step."""
    engine = Engine(model, plan, limits)
    outputs = tokens_of(engine, requests, per_step=2)
    engine.close()
    return outputs, engine


def test_greedy_tokens_equal_generate(case: Case, tmp_path: Path) -> None:
    """With room for all on one stage, from weights that were quantised once and kept, as in serving; and with too few
    blocks on four stages, of which two share each stack's layers."""
    expected = {f"{i}": ids for i, ids in enumerate(case.outputs)}
    one = case.plan(1)
    outputs, engine = run(load(case.folder, one, device_type="cpu", cache_dir=tmp_path), one, LIMITS, case.requests())
    assert outputs == expected
    assert engine.scheduler.preemptions == 0
    scarce = replace(case.plan(4), num_blocks=19, max_context=76)
    assert [stage.layers for stage in scarce.stages] == [(0, 2), (2, 4), (4, 5), (5, 6)]
    outputs, engine = run(load(case.folder, scarce, device_type="cpu"), scarce, LIMITS, case.requests())
    assert outputs == expected
    assert engine.scheduler.preemptions > 0


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(save(ENCODER_DECODERS[1].config, tmp_path_factory.mktemp("flan")), "fp32", make_prompts(), ())


def test_steps_in_flight_and_resumed_requests_change_nothing(flan: Case) -> None:
    plan = flan.plan(2)
    model = load(flan.folder, plan, device_type="cpu")
    outputs, _ = run(model, plan, LIMITS, flan.requests())
    ahead, _ = run(model, plan, replace(LIMITS, lookahead=1), flan.requests())
    assert ahead == outputs
    resumed = [
        replace(request, prompt_ids=(*request.prompt_ids, *outputs[request.request_id][:3]), resumed_tokens=3)
        for request in flan.requests()
    ]
    rest, _ = run(model, plan, LIMITS, resumed)
    assert rest == {name: ids[3:] for name, ids in outputs.items()}


@pytest.mark.parametrize(
    ("quantization", "dtype", "kv_dtype"),
    [("fp16", "float16", None), ("nf4", "bfloat16", None), ("fp32", "float32", "fp8")],
)
def test_other_dtypes_pass_the_probe_and_stages_change_nothing(
    flan: Case, quantization: str, dtype: str, kv_dtype: str | None
) -> None:
    """In float16, T5 keeps `wo` and what its layers add up in float32; that goes from stage to stage as it is. One
    request at a time, since rounding differs with the rows of a product."""
    case, outputs = replace(flan, quantization=quantization), []
    for stages in (1, 4):
        plan = case.plan(stages, dtype, kv_dtype)
        model = load(case.folder, plan, device_type="cpu")
        outputs.append([run(model, plan, LIMITS, [request])[0] for request in case.requests()[:4]])
    assert outputs[0] == outputs[1]


def test_a_repetition_penalty_is_over_what_the_decoder_has_seen(flan: Case) -> None:
    """As in transformers: the prompt is not counted."""
    plan = flan.plan(1)
    requests = [
        replace(request, sampling=replace(request.sampling, repetition_penalty=4.0)) for request in flan.requests()
    ]
    outputs, _ = run(load(flan.folder, plan, device_type="cpu"), plan, LIMITS, requests)
    model = AutoModelForSeq2SeqLM.from_pretrained(flan.folder).eval()
    for i, prompt in enumerate(flan.prompts):
        out = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=OUTPUT,
            eos_token_id=None,
            repetition_penalty=4.0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        )
        assert outputs[f"{i}"] == tuple(out[0, 1:].tolist()), i


def test_a_prompt_without_the_decoders_first_token_is_refused(flan: Case) -> None:
    plan = flan.plan(1)
    engine = Engine(load(flan.folder, plan, device_type="cpu"), plan, LIMITS)
    with pytest.raises(ValueError, match="2 at least; it has 1"):
        engine.submit(GenerationRequest("r", (5,), Sampling(max_tokens=1, seed=0)))
    engine.close()


def test_a_stage_that_computes_something_else_is_refused(flan: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the table that the first decoder layer has on another stage."""
    monkeypatch.setattr("deployments.engine.encoder_decoder_load.lend_biases", lambda *_: None)
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration can't be served: its logits differ"):
        load(flan.folder, flan.plan(2), device_type="cpu")


def test_int8_with_a_threshold_is_proven_by_the_bound_of_its_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features beyond the threshold are those of all rows of a step, and the plain forward's steps are larger."""
    (family,) = (family for family in ENCODER_DECODERS if family.name == "FLAN-T5")
    folder = save(family.config, tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                weight[5] = 4.0
    model.save_pretrained(folder)
    plan = Case(folder, "int8", (), ()).plan(1)
    assert load(folder, plan, device_type="cpu", limits=replace(LIMITS, int8_threshold=6.0)).encodes
    monkeypatch.setattr("deployments.engine.load_probe._BATCH_TOLERANCE", 0.0)
    with pytest.raises(ConfigError, match="its logits differ"):
        load(folder, plan, device_type="cpu", limits=replace(LIMITS, int8_threshold=6.0))


def test_the_bytes_of_each_stage_are_the_plans(flan: Case) -> None:
    """`load` compares them; here a plan that says less by T5's table of position biases is refused."""
    plan = flan.plan(2)
    assert [stage.copies for stage in plan.stages] == [
        (),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias",),
    ]
    table = 32 * 4 * 4
    wrong = replace(plan.stages[1], weight_bytes=plan.stages[1].weight_bytes - table)
    with pytest.raises(ConfigError, match=r"stage 1 of .* its plan says"):
        load(flan.folder, replace(plan, stages=(plan.stages[0], wrong)), device_type="cpu")
