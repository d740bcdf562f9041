"""Encoder-decoders on CUDA as a replica runs them: T5 and FLAN-T5, on one GPU and on two.

pytest tests/gpu/test_encoder_decoder_gpu.py
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import modules
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from deployments.engine.attention import RowSpan
from deployments.engine.eager_pipeline import EagerPipeline
from deployments.engine.loader import LoadedModel, load, quantization_config
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.pipeline import open_pipeline
from deployments.engine.stages import StepRows, run_stages
from deployments.protocol import GenerationRequest, Sampling
from placement import probe
from placement.footprint import footprint
from placement.plan import Plan, solve
from tests.arrivals import tokens_of
from tests.gpu.teacher import below_best
from tests.gpu.waits import no_waits
from tests.t5 import save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # PyTorch's sync debug mode warns
]

bitsandbytes: Any = modules
VOCAB = 1024
START = 0
"""The decoder's first token."""
OUTPUT = 16
BOUND, COARSE = 0.1, 0.3
"""How far below the best the logit of a chosen token may be, in standard deviations of the logits; and where the
kernels round scaled weights to bfloat16 and the oracle's do not."""
LIMITS = EngineLimits(max_batch_tokens=288, max_sequences=16, prefix_cache=True, threads=1)
_SIZES = {
    "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4,
    "vocab_size": VOCAB, "decoder_start_token_id": START,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "t5": transformers.T5Config(**_SIZES),
    "flan": transformers.T5Config(**_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
CASES = [
    ("t5", "nf4", "bfloat16"),
    ("t5", "int8", "bfloat16"),
    ("t5", "bf16", "bfloat16"),
    ("t5", "fp32", "float32"),
    ("flan", "nf4", "float16"),
    ("flan", "int8", "bfloat16"),
]


@dataclass(frozen=True)
class Case:
    """A checkpoint and how it is served."""

    folder: Path
    plan: Plan
    model: LoadedModel

    def engine(self, pipeline: EagerPipeline | None = None) -> Engine:
        return Engine(self.model, self.plan, LIMITS, pipeline)

    def pipeline(self) -> EagerPipeline:
        made = open_pipeline(self.model, self.plan, LIMITS)
        assert isinstance(made, EagerPipeline)
        return made


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """A loaded case; each once."""
    folders: dict[str, Path] = {}
    made: dict[tuple[str, str, str, int], Case] = {}

    def case(family: str, quantization: str, dtype: str, stages: int) -> Case:
        key = family, quantization, dtype, stages
        gpus = probe.cuda_gpus()
        if len(gpus) < stages:
            pytest.skip(f"needs {stages} GPUs, {len(gpus)} are visible")
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            save(FAMILIES[family], folders[family])
        if key not in made:
            plan = solve(
                footprint(folders[family], quantization=quantization, dtype=dtype),
                gpus[:stages],
                block_size=16,
                max_batch_tokens=LIMITS.max_batch_tokens,
                max_sequences=LIMITS.max_sequences,
                max_context=256,
                max_memory=dict.fromkeys(range(stages), "3GiB"),
            )
            assert len(plan.stages) == stages
            made[key] = Case(folders[family], plan, load(folders[family], plan, device_type="cuda", limits=LIMITS))
        return made[key]

    return case


def plain(case: Case) -> PreTrainedModel:
    """transformers' own, with bitsandbytes' 4-bit linears and dequantised 8-bit ones, whole on the first GPU."""
    options = {} if (config := quantization_config(case.plan)) is None else {"quantization_config": config}
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(
        case.folder, dtype=getattr(torch, case.plan.dtype), device_map={"": 0}, local_files_only=True, **options
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.Linear8bitLt):
            model.set_submodule(name, Dequantised(module, getattr(torch, case.plan.dtype)))
    return model.eval()


class Dequantised(nn.Linear):
    """What an int8 linear stands for: bitsandbytes' own product rounds the activations too, and a weight of 16 bits
    would round what the engine's kernels don't."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="cuda:0", dtype=torch.float32)
        self.out_dtype = dtype
        codes, scales = linear.weight.data.to("cuda:0"), linear.weight.SCB.to("cuda:0")
        with torch.no_grad():
            self.weight.copy_(codes.float() * scales[:, None] / 127)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(self.out_dtype)


@torch.inference_mode()
def shortfalls(model: PreTrainedModel, prompt: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """How far the logit of each chosen token is below the best at its place, in standard deviations: float32 [chosen
    tokens] on the CPU."""
    given = {"input_ids": prompt, "decoder_input_ids": [START, *chosen[:-1]]}
    ids = {name: torch.tensor([list(values)], device="cuda:0") for name, values in given.items()}
    logits = model(**ids, use_cache=False).logits[0].float().cpu()
    return below_best(logits, chosen) / logits.std()


def prompts() -> list[tuple[int, ...]]:
    draw = random.Random(1)
    return [tuple(draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 5, 33, 90, 230)))) for _ in range(12)]


def outputs(engine: Engine, **sampling: object) -> list[tuple[int, ...]]:
    """What each prompt gets; two more requests at each step."""
    requests = [
        GenerationRequest(
            f"{i}", (*prompt, START), Sampling(max_tokens=OUTPUT, seed=i, **({"temperature": 0.0} | sampling))
        )
        for i, prompt in enumerate(prompts())
    ]
    found = list(tokens_of(engine, requests, per_step=2).values())
    assert all(len(chosen) == OUTPUT for chosen in found)
    return found


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("family", "quantization", "dtype"), CASES)
def test_tokens_are_the_plain_forwards_argmax(
    make: Callable[..., Case], family: str, quantization: str, dtype: str, stages: int
) -> None:
    case = make(family, quantization, dtype, stages)
    engine = case.engine()
    found = outputs(engine)
    engine.close()
    oracle = plain(case)
    short = torch.cat([shortfalls(oracle, p, chosen) for p, chosen in zip(prompts(), found, strict=True)])
    bound, equal = (COARSE, 0.7) if quantization == "nf4" and dtype == "bfloat16" else (BOUND, 0.8)
    assert bool((short <= bound).all()), f"chose tokens {short.max():.3f} below the best"
    assert int((short == 0).sum()) >= equal * len(short), f"{int((short == 0).sum())} of {len(short)} are the best"
    assert len(set(found)) > len(found) // 2, "an oracle of one answer would show nothing"


def test_in_float32_tokens_equal_generate(make: Callable[..., Case]) -> None:
    case = make("t5", "fp32", "float32", 1)
    engine = case.engine()
    found = outputs(engine)
    engine.close()
    model, wanted = plain(case), []
    for prompt in prompts():
        ids = torch.tensor([prompt], device="cuda:0")
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=OUTPUT, eos_token_id=None
        )
        wanted.append(out[0, 1:].tolist())
    equal = sum(a == b for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True))
    assert equal >= 0.95 * OUTPUT * len(wanted)


@pytest.mark.parametrize("stages", [1, 2])
def test_sampling_settings_and_too_few_blocks(make: Callable[..., Case], stages: int) -> None:
    """The same tokens again for the same seeds, whoever is beside them; float32, so that rounding decides little."""
    case = make("t5", "fp32", "float32", stages)
    scarce = replace(case, plan=replace(case.plan, num_blocks=24))
    settings = {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2}
    once, again, few = (outputs(each.engine(), **settings) for each in (case, case, scarce))
    for other in (again, few):
        same = sum(a == b for one, two in zip(once, other, strict=True) for a, b in zip(one, two, strict=True))
        assert same >= 0.95 * OUTPUT * len(once)
    assert once != outputs(case.engine())


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("quantization", "dtype"), [("int8", "bfloat16"), ("nf4", "bfloat16")])
def test_no_launch_waits_for_a_gpu(make: Callable[..., Case], quantization: str, dtype: str, stages: int) -> None:
    """New prompts beside decodes, and decodes that continue what has not been read yet."""
    case = make("t5", quantization, dtype, stages)
    pipeline = case.pipeline()
    engine = case.engine(pipeline)
    for i, prompt in enumerate(prompts()[:4]):
        engine.submit(GenerationRequest(f"{i}", (*prompt, START), Sampling(max_tokens=OUTPUT, seed=i, temperature=0.7)))
    launched = []
    launch = pipeline.launch

    def watched(*args: object) -> object:
        with no_waits():
            launched.append(launch(*args))  # type: ignore[arg-type]  # whatever launch takes
        return launched[-1]

    pipeline.launch = watched  # type: ignore[method-assign, assignment]  # of this instance alone
    late = GenerationRequest("late", (*prompts()[4], START), Sampling(max_tokens=OUTPUT, seed=9, temperature=0.0))
    while engine.has_work():
        engine.step()
        if len(launched) > 6 and late is not None:
            engine.submit(late)
            late = None
    assert len(launched) > OUTPUT


def test_what_a_stage_hands_over_lies_where_it_says(make: Callable[..., Case]) -> None:
    """Cut at any place, the stages compute the same: here every stage on its own GPU, against one that has all."""
    rows = StepRows(
        tuple(range(3, 24)), tuple(range(21)), (RowSpan(0, 21, (0, 1), 19),), (19, 20)
    )  # fmt: skip
    logits = [
        run_stages(make("t5", "fp32", "float32", stages).model.stages, rows, 16).float().cpu() for stages in (1, 2)
    ]
    assert logits[0].shape == (2, VOCAB)
    assert float((logits[0] - logits[1]).abs().max()) < 1e-2
