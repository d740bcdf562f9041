"""The probe of an encoder-decoder: two sequences over paged KV, compared with the model's plain forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.attention import RowSpan, positions_of
from deployments.engine.cross_batches import CrossStep
from deployments.engine.encoder_decoder import EncoderDecoderStage
from deployments.engine.layer_probe import ByLayer, Passed, check_passed, forced, relative_rms
from deployments.engine.load_probe import PROBE_TOKENS, Plain, check_logits, failing, plain_forward
from deployments.engine.stages import StepRows, run_stages
from deployments.errors import ConfigError
from placement.plan import Plan


@dataclass(frozen=True)
class Sample:
    """A sequence of the probe, and transformers' own forward of it."""

    encoder_ids: tuple[int, ...]
    decoder_ids: tuple[int, ...]
    plain: Plain
    """Its logits are those of the decoder's tokens."""
    blocks: tuple[int, ...]

    def part(self, computed: int, until: int) -> tuple[list[int], RowSpan]:
        """The sequence's ids and rows of a step that brings its decoder from `computed` tokens to `until`."""
        ids, encoded = [*self.encoder_ids, *self.decoder_ids], len(self.encoder_ids)
        start, end = encoded + computed if computed else 0, encoded + until
        return ids[start:end], RowSpan(start, end - start, self.blocks, encoded)


def samples(model: PreTrainedModel, plan: Plan) -> tuple[Sample, ...]:
    """Two sequences of different lengths, or one where the KV cache has no room for both.

    Raises:
        ConfigError: transformers' own forward fails.
    """
    most = min(PROBE_TOKENS, plan.capacity_tokens, plan.max_context)
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    found: list[Sample] = []
    held = 0
    for total in (most, most // 2):
        blocks = tuple(range(held, held + -(-total // plan.block_size)))
        held += len(blocks)
        if total < 2 or held > plan.num_blocks:
            break
        ids = tuple(7919 * (total + i) % vocab for i in range(total))
        encoded = max(1, 2 * total // 3)
        found.append(_sample(model, plan, ids[:encoded], ids[encoded:], blocks))
    if not found:
        raise ConfigError(f"{plan.model} needs room for 2 tokens, one of them the decoder's; raise max_context")
    return tuple(found)


def _sample(
    model: PreTrainedModel, plan: Plan, encoder: tuple[int, ...], decoder: tuple[int, ...], blocks: tuple[int, ...]
) -> Sample:
    inputs = {"input_ids": list(encoder), "decoder_input_ids": list(decoder)}
    return Sample(encoder, decoder, plain_forward(model, plan, inputs), blocks)


_Parts = Sequence[tuple[Sample, int, int]]
"""Of a step: samples, each with the first and the past-last of its decoder's tokens."""
_Stacks = tuple[Sequence[nn.Module], Sequence[nn.Module]]
"""The layers of the encoder and of the decoder."""


def probe(
    stages: Sequence[EncoderDecoderStage],
    stacks: _Stacks,
    plan: Plan,
    expected: Sequence[Sample],
    *,
    rounds_by_batch: bool = False,
) -> str:
    """Run the samples: the first alone, the second's prompt beside a decode, then both, and the rest.

    Args:
        stacks: the layers of the encoder and of the decoder, which the stages run.
        rounds_by_batch: what a row is rounded to depends on the others, as with LLM.int8()'s outliers.

    Returns:
        How far the logits are off, for people to read.

    Raises:
        ProbeFailed: the forward failed, or computes something else.
    """
    steps = _steps(expected)
    wanted = torch.cat([sample.plain.logits[start:end] for parts in steps for sample, start, end in parts])
    with failing():
        found = torch.cat([_run(stages, parts, plan) for parts in steps])

    def by_layer() -> ByLayer:
        return _by_layer(stages, stacks, plan, expected, wanted)

    return check_logits(plan, found, wanted, by_layer, rounds_by_batch=rounds_by_batch)


def _by_layer(
    stages: Sequence[EncoderDecoderStage], stacks: _Stacks, plan: Plan, expected: Sequence[Sample], wanted: Tensor
) -> ByLayer:
    layers = [layer for stack in stacks for layer in stack]
    for sample in expected:
        lengths = (len(sample.encoder_ids), len(sample.decoder_ids))
        check_passed(sample.plain.layers, [n for n, stack in zip(lengths, stacks, strict=True) for _ in stack])
    passed = [Passed.joined(parts) for parts in zip(*(sample.plain.layers for sample in expected), strict=True)]
    places, found = _Places(expected, stacks), []
    with failing(), forced(layers, passed, places.where) as errors:
        for parts in _steps(expected):
            places.begin(parts, plan.block_size)
            found.append(_run(stages, parts, plan))
    return ByLayer(errors(), relative_rms(torch.cat(found), wanted))


class _Places:
    """Which tokens the rows are that a layer works on, those of all samples counted one behind the other."""

    def __init__(self, samples: Sequence[Sample], stacks: _Stacks) -> None:
        self._stacks = stacks
        self._firsts: dict[tuple[int, ...], tuple[int, int]] = {}
        encoded = decoded = 0
        for sample in samples:
            self._firsts[sample.blocks] = encoded, decoded
            encoded, decoded = encoded + len(sample.encoder_ids), decoded + len(sample.decoder_ids)
        self._calls: list[Iterator[Tensor]] = []

    def begin(self, parts: _Parts, block_size: int) -> None:
        """A step comes, through all stages."""
        step = CrossStep.of(_rows(parts), block_size)
        at = torch.tensor([place for part in parts for place in self._of(*part)])
        encoder = [at[batch.rows].where(batch.mask, -1).flatten() for batch in step.encoders]
        decoder = [at[batch.own.rows] for batch in step.decoders]
        calls = zip((encoder, decoder), self._stacks, strict=True)
        self._calls = [iter(batches) for batches, stack in calls for _ in stack]

    def where(self, layer: int) -> Tensor:
        """See `forced`. A stack's layers are called once for each of its batches, in their order."""
        return next(self._calls[layer])

    def _of(self, sample: Sample, start: int, end: int) -> list[int]:
        encoded, decoded = self._firsts[sample.blocks]
        prompt = [] if start else [encoded + i for i in range(len(sample.encoder_ids))]
        return [*prompt, *(decoded + i for i in range(start, end))]


def _steps(expected: Sequence[Sample]) -> list[_Parts]:
    first, *others = expected
    half = max(1, len(first.decoder_ids) // 2)
    steps = [[(first, 0, half)]]
    for turn in range(max(len(sample.decoder_ids) for sample in expected)):
        own = [(first, half + turn, half + turn + 1)]
        own += [(sample, turn, turn + 1) for sample in others]
        steps.append([(sample, start, end) for sample, start, end in own if end <= len(sample.decoder_ids)])
    return [parts for parts in steps if parts]


def _run(stages: Sequence[EncoderDecoderStage], parts: _Parts, plan: Plan) -> Tensor:
    """float32 logits [decoder tokens, vocab] of a step."""
    return run_stages(stages, _rows(parts), plan.block_size).float().cpu()


def _rows(parts: _Parts) -> StepRows:
    """A step in which all decoder rows are sampled."""
    ids: list[int] = []
    spans: list[RowSpan] = []
    sampled: list[int] = []
    for sample, start, end in parts:
        own, span = sample.part(start, end)
        ids += own
        spans.append(span)
        sampled += range(len(ids) - (end - start), len(ids))
    return StepRows(tuple(ids), positions_of(spans), tuple(spans), tuple(sampled))
