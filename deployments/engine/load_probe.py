"""The probe at load: a few steps over paged KV, compared with the model's plain forward. No model is served without.

The logits have a bound that most models keep to. Where they are over it, each layer is compared by itself
(`layer_probe.py`): rounding that adds up from layer to layer is no fault.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployments.engine.attention import RowSpan, UnsupportedAttention, positions_of
from deployments.engine.layer_probe import (
    ByLayer,
    Passed,
    Places,
    Uncomparable,
    check_passed,
    forced,
    layers_of,
    recording,
    relative_rms,
)
from deployments.engine.stages import Stage, StepRows, run_stages
from deployments.errors import ConfigError
from placement.plan import Plan

log = logging.getLogger(__name__)

PROBE_TOKENS = 41
"""Enough for a prefill, a prefill with context, a decode and several blocks; odd, so that no block is just full."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""Bound on RMS(paged - plain) / RMS(plain) of the logits. Rounding stays an order below in all but deep models."""
_LAYER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1.5e-2}
"""Bound on what one layer is off, relative to what it adds; decision 0024 has what was measured. Products that round
otherwise stay below, a missing mask, bias or window is several times as much."""
_FP8_TOLERANCE, _FP8_LAYER_TOLERANCE = 0.15, 0.2
"""The same with KV in fp8, whose rounding of 1/16 at most is above that of all compute dtypes."""
_BATCH_TOLERANCE = 0.1
"""Both where the plain forward's larger batch rounds activations to 8 bits otherwise."""


class ProbeFailed(Exception):
    """What the stages compute is not what the model computes; `str()` says how, as the end of a sentence."""


@dataclass(frozen=True)
class Plain:
    """transformers' own forward of one sequence."""

    logits: Tensor
    """float32 [tokens, vocab] on the CPU."""
    layers: tuple[Passed, ...]
    """In the order in which they ran."""


def probe_ids(vocab_size: int, plan: Plan) -> list[int]:
    """The tokens of the probe; never more than the KV cache holds."""
    count = min(PROBE_TOKENS, plan.capacity_tokens, plan.max_context)
    return [(7919 * (i + 1)) % vocab_size for i in range(count)]


def plain_prompt(model: PreTrainedModel, plan: Plan, ids: list[int]) -> Plain:
    """`plain_forward` of a prompt."""
    return plain_forward(model, plan, {"input_ids": ids})


@torch.inference_mode()
def plain_forward(model: PreTrainedModel, plan: Plan, inputs: Mapping[str, list[int]]) -> Plain:
    """transformers' own forward; `inputs` are ids by the names of its arguments.

    Raises:
        ConfigError: it fails.
    """
    embedding = model.get_input_embeddings()
    device = next(itertools.chain(embedding.parameters(), embedding.buffers())).device
    given = {name: torch.tensor([ids], device=device) for name, ids in inputs.items()}
    with recording(layers_of(model)) as passed:
        try:
            logits: Tensor = model(**given, use_cache=False).logits
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{type(model).__name__} can't be served: in {plan.quantization}, transformers' own forward of it "
                f"fails ({reason}); choose another quantization"
            ) from error
    return Plain(logits[0].float().cpu(), tuple(passed))


def probe(
    name: str,
    stages: tuple[Stage, ...],
    plan: Plan,
    ids: list[int],
    expected: Plain,
    *,
    rounds_by_batch: bool = False,
) -> None:
    """Run `ids` as a prefill, a prefill with context, and decodes of one and of two sequences.

    Args:
        expected: of the plain forward.
        rounds_by_batch: what a row is rounded to depends on the others, as with LLM.int8()'s outliers.

    Raises:
        ProbeFailed: the forward failed, did not attend once per layer, or computes something else.
    """
    steps = _steps(plan, ids)
    wanted = torch.cat([expected.logits[list(step.positions)] for step in steps])
    with failing():
        found = _run(stages, plan, steps)
    for stage in stages:
        if set(calls := stage.attention_calls()) != {stage.attention.runs}:
            raise ProbeFailed(f"its layers attend {sorted(set(calls))} times in {stage.attention.runs} forwards")

    def by_layer() -> ByLayer:
        return _by_layer(stages, plan, steps, expected.layers, wanted)

    shown = check_logits(plan, found, wanted, by_layer, rounds_by_batch=rounds_by_batch)
    log.info("%s on paged attention (%s): %s", name, stages[0].attention.name, shown)


@contextmanager
def failing() -> Iterator[None]:
    """Turns what a forward raises into `ProbeFailed`."""
    try:
        yield
    except UnsupportedAttention as error:
        raise ProbeFailed(str(error)) from error
    except Exception as error:
        raise ProbeFailed(" ".join(f"its forward fails ({type(error).__name__}: {error})".split())) from error


def check_logits(
    plan: Plan, found: Tensor, wanted: Tensor, by_layer: Callable[[], ByLayer], *, rounds_by_batch: bool = False
) -> str:
    """How far float32 logits are off, for people to read.

    Args:
        by_layer: asked where the logits are over the bound of the plan's dtypes.

    Raises:
        ProbeFailed: a part of the model is over its own bound then, or the parts can't be compared.
    """
    error, (bound, layer_bound) = relative_rms(found, wanted), _bounds(plan, rounds_by_batch=rounds_by_batch)
    shown = f"relative RMS error of the logits {error:.1e}"
    if error <= bound:
        return shown
    reason = f"its logits differ from the plain forward's by {error:.2g}, over the bound of {bound:g}"
    try:
        part, most = by_layer().worst()
    except (Uncomparable, ProbeFailed) as untold:
        raise ProbeFailed(f"{reason} (both are relative RMS), and layer by layer {untold}") from untold
    if most > layer_bound:
        raise ProbeFailed(
            f"{reason}, and not by rounding that adds up: where each layer starts from what the plain forward's made, "
            f"{part} differs by {most:.2g}, over the bound of {layer_bound:g} (all are relative RMS)"
        )
    return f"{shown}, over {bound:g} by rounding that adds up: layer by layer {most:.1e} at most ({part})"


def _bounds(plan: Plan, *, rounds_by_batch: bool) -> tuple[float, float]:
    """On the logits, and on each layer by itself."""
    dtype = getattr(torch, plan.dtype)
    bounds = [(_TOLERANCE[dtype], _LAYER_TOLERANCE[dtype])]
    if plan.kv_dtype == "float8_e4m3fn":
        bounds.append((_FP8_TOLERANCE, _FP8_LAYER_TOLERANCE))
    if rounds_by_batch:
        bounds.append((_BATCH_TOLERANCE, _BATCH_TOLERANCE))
    return max(bound for bound, _ in bounds), max(bound for _, bound in bounds)


def _steps(plan: Plan, ids: list[int]) -> list[StepRows]:
    last = len(ids) - 1
    table = tuple(range(-(-len(ids) // plan.block_size)))
    steps = [[(start, end)] for start, end in itertools.pairwise(sorted({0, len(ids) // 2, last, len(ids)}))]
    if last:
        # Decodes of two lengths, as of sequences that share blocks: each writes what is there already.
        earlier = last - max(1, len(ids) // 4)
        steps.append([(last, last + 1), (earlier, earlier + 1)])
    return [_step(parts, ids, table) for parts in steps]


def _step(parts: list[tuple[int, int]], ids: list[int], table: tuple[int, ...]) -> StepRows:
    spans = tuple(RowSpan(start, end - start, table) for start, end in parts)
    positions = positions_of(spans)
    return StepRows(tuple(ids[p] for p in positions), positions, spans, tuple(range(len(positions))))


def _run(stages: tuple[Stage, ...], plan: Plan, steps: Sequence[StepRows]) -> Tensor:
    """The logits of all steps."""
    return torch.cat([run_stages(stages, step, plan.block_size).float().cpu() for step in steps])


def _by_layer(
    stages: tuple[Stage, ...], plan: Plan, steps: Sequence[StepRows], passed: Sequence[Passed], wanted: Tensor
) -> ByLayer:
    layers = [layer for stage in stages for layer in stage.layer_modules]
    check_passed(passed, [1 + max(p for step in steps for p in step.positions)] * len(layers))
    places, found = Places(stages), []
    with failing(), places.followed(), forced(layers, passed, places.where) as errors:
        for step in steps:
            places.begin(len(step.ids))
            found.append(run_stages(stages, step, plan.block_size).float().cpu())
    return ByLayer(errors(), relative_rms(torch.cat(found), wanted))
