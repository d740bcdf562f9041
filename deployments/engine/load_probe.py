"""The probe at load: a few steps over paged KV, compared with the model's plain forward. No model is served without."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployments.engine.attention import RowSpan, UnsupportedAttention
from deployments.engine.stages import Stage, StepRows, run_stages
from deployments.errors import ConfigError
from placement.plan import Plan

log = logging.getLogger(__name__)

PROBE_TOKENS = 41
"""Enough for a prefill, a prefill with context, a decode and several blocks; odd, so that no block is just full."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""Bound on RMS(paged - plain) / RMS(plain) of the logits. Rounding stays an order below; a missing mask or bias
does not."""
_FP8_TOLERANCE = 0.15
"""The same with KV in fp8, whose rounding of 1/16 at most is above that of all compute dtypes."""

_BATCH_TOLERANCE = 0.1
"""The same where the plain forward's larger batch rounds activations to 8 bits otherwise."""


class ProbeFailed(Exception):
    """What the stages compute is not what the model computes; `str()` says how, as the end of a sentence."""


def probe_ids(vocab_size: int, plan: Plan) -> list[int]:
    """The tokens of the probe; never more than the KV cache holds."""
    count = min(PROBE_TOKENS, plan.capacity_tokens, plan.max_context)
    return [(7919 * (i + 1)) % vocab_size for i in range(count)]


def plain_logits(model: PreTrainedModel, plan: Plan, ids: list[int]) -> Tensor:
    """`plain_forward` of a prompt."""
    return plain_forward(model, plan, {"input_ids": ids})


@torch.inference_mode()
def plain_forward(model: PreTrainedModel, plan: Plan, inputs: Mapping[str, list[int]]) -> Tensor:
    """float32 [tokens, vocab] on the CPU, of transformers' own forward; `inputs` are ids by the names of its arguments.

    Raises:
        ConfigError: it fails.
    """
    embedding = model.get_input_embeddings()
    device = next(itertools.chain(embedding.parameters(), embedding.buffers())).device
    given = {name: torch.tensor([ids], device=device) for name, ids in inputs.items()}
    try:
        logits: Tensor = model(**given, use_cache=False).logits
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{type(model).__name__} can't be served: in {plan.quantization}, transformers' own forward of it fails "
            f"({reason}); choose another quantization"
        ) from error
    return logits[0].float().cpu()


def probe(
    name: str,
    stages: tuple[Stage, ...],
    plan: Plan,
    ids: list[int],
    expected: Tensor,
    *,
    rounds_by_batch: bool = False,
) -> None:
    """Run `ids` as a prefill, a prefill with context, and decodes of one and of two sequences.

    Args:
        expected: float32 [tokens, vocab], the logits of the plain forward.
        rounds_by_batch: what a row is rounded to depends on the others, as with LLM.int8()'s outliers.

    Raises:
        ProbeFailed: the forward failed, did not attend once per layer, or the logits differ.
    """
    try:
        found, wanted = _run(stages, plan, ids, expected)
    except UnsupportedAttention as error:
        raise ProbeFailed(str(error)) from error
    except Exception as error:
        raise failed(error) from error
    for stage in stages:
        if set(calls := stage.attention_calls()) != {stage.attention.runs}:
            raise ProbeFailed(f"its layers attend {sorted(set(calls))} times in {stage.attention.runs} forwards")
    error_ratio = check_logits(plan, found, wanted, rounds_by_batch=rounds_by_batch)
    attention = stages[0].attention.name
    log.info("%s on paged attention (%s): relative RMS error of the logits %.1e", name, attention, error_ratio)


def failed(error: Exception) -> ProbeFailed:
    """What a forward that raised says."""
    return ProbeFailed(" ".join(f"its forward fails ({type(error).__name__}: {error})".split()))


def check_logits(plan: Plan, found: Tensor, wanted: Tensor, *, rounds_by_batch: bool = False) -> float:
    """RMS(found - wanted) / RMS(wanted) of float32 logits.

    Raises:
        ProbeFailed: it is over the bound of the plan's dtypes.
    """
    error_ratio = float((found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())
    bound = _FP8_TOLERANCE if plan.kv_dtype == "float8_e4m3fn" else _TOLERANCE[getattr(torch, plan.dtype)]
    if rounds_by_batch:
        bound = max(bound, _BATCH_TOLERANCE)
    if not error_ratio <= bound:
        raise ProbeFailed(
            f"its logits differ from the plain forward's by {error_ratio:.2g}, over the bound of {bound:g} (both are "
            "relative RMS)"
        )
    return error_ratio


def _run(stages: tuple[Stage, ...], plan: Plan, ids: list[int], expected: Tensor) -> tuple[Tensor, Tensor]:
    """(logits of all steps, what they should be)."""
    last = len(ids) - 1
    table = tuple(range(-(-len(ids) // plan.block_size)))
    steps = [[(start, end)] for start, end in itertools.pairwise(sorted({0, len(ids) // 2, last, len(ids)}))]
    if last:
        # Decodes of two lengths, as of sequences that share blocks: each writes what is there already.
        earlier = last - max(1, len(ids) // 4)
        steps.append([(last, last + 1), (earlier, earlier + 1)])
    found, wanted = [], []
    for parts in steps:
        positions = tuple(position for part in parts for position in range(*part))
        spans = tuple(RowSpan(start, end - start, table) for start, end in parts)
        step = StepRows(tuple(ids[p] for p in positions), positions, spans, tuple(range(len(positions))))
        found.append(run_stages(stages, step, plan.block_size).float().cpu())
        wanted.append(expected[list(positions)])
    return torch.cat(found), torch.cat(wanted)
