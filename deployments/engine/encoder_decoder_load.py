"""An encoder-decoder cut into stages, and proven against transformers' own forward before it serves anything."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.attention import PagedKv, RowSpan, UnsupportedAttention
from deployments.engine.encoder_decoder import EncoderDecoderStage, find_encoder, lend_biases
from deployments.engine.load_probe import PROBE_TOKENS, ProbeFailed, check_logits, failed, plain_forward
from deployments.engine.stages import StepRows, find_decoder, find_layers, run_stages
from deployments.errors import ConfigError
from placement.kv import layer_kv
from placement.plan import Plan

log = logging.getLogger(__name__)

ATTENTION = "gather cache (an encoder-decoder)"
"""How it attends, for people to read."""


@dataclass(frozen=True)
class Sample:
    """A sequence of the probe, and what transformers says on it."""

    encoder_ids: tuple[int, ...]
    decoder_ids: tuple[int, ...]
    expected: Tensor
    """float32 [decoder tokens, vocab] on the CPU."""
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


def untie(model: PreTrainedModel, plan: Plan, devices: Sequence[torch.device]) -> None:
    """Give each stage a weight of its own where another one holds it too: embeddings of both stacks and the head. Which
    device the one weight is on is left to accelerate."""
    holder: dict[int, int] = {}
    for index, (stage, device) in enumerate(zip(plan.stages, devices, strict=True)):
        copies: dict[int, nn.Parameter] = {}
        for module in map(model.get_submodule, stage.modules):
            for name, weight in [*module.named_parameters(recurse=False)]:
                address = weight.data_ptr()
                if weight.device == device and holder.setdefault(address, index) == index:
                    continue
                if address not in copies:
                    copies[address] = nn.Parameter(weight.detach().clone().to(device), requires_grad=False)
                setattr(module, name, copies[address])


def proven(
    model: PreTrainedModel,
    plan: Plan,
    devices: Sequence[torch.device],
    copies: dict[str, nn.Module],
    expected: Sequence[Sample],
    *,
    rounds_by_batch: bool = False,
) -> tuple[EncoderDecoderStage, ...]:
    """Stages that compute what transformers computes.

    Args:
        model: loaded as `plan` says, without hooks.
        copies: modules that a stage holds of its own, by "stage index:name".
        expected: of the same weights.
        rounds_by_batch: as in `probe`.

    Raises:
        ConfigError: they compute something else, or the KV cache is another than the plan's.
    """
    stages = tuple(_stage(model, plan, index, devices[index], copies) for index in range(len(plan.stages)))
    name = type(model).__name__
    try:
        ratio = probe(stages, plan, expected, rounds_by_batch=rounds_by_batch)
    except ProbeFailed as error:
        raise ConfigError(f"{name} can't be served: {error}; choose a model of another architecture") from error
    log.info("%s on the gather cache: relative RMS error of the logits %.1e", name, ratio)
    return stages


def probe(
    stages: Sequence[EncoderDecoderStage], plan: Plan, expected: Sequence[Sample], *, rounds_by_batch: bool = False
) -> float:
    """Run the samples: the first alone, the second's prompt beside a decode, then both, and the rest.

    Args:
        rounds_by_batch: what a row is rounded to depends on the others, as with LLM.int8()'s outliers.

    Returns:
        The relative RMS error of the logits.

    Raises:
        ProbeFailed: the forward failed, or the logits differ.
    """
    first, *others = expected
    half = max(1, len(first.decoder_ids) // 2)
    steps = [[(first, 0, half)]]
    ends = [len(sample.decoder_ids) for sample in expected]
    for turn in range(max(ends)):
        own = [(first, half + turn, half + turn + 1)]
        own += [(sample, turn, turn + 1) for sample in others]
        steps.append([(sample, start, end) for sample, start, end in own if end <= len(sample.decoder_ids)])
    found, wanted = [], []
    try:
        for parts in filter(None, steps):
            found.append(run_stages(stages, _rows(parts), plan.block_size).float().cpu())
            wanted += [sample.expected[start:end] for sample, start, end in parts]
    except UnsupportedAttention as error:
        raise ProbeFailed(str(error)) from error
    except Exception as error:
        raise failed(error) from error
    return check_logits(plan, torch.cat(found), torch.cat(wanted), rounds_by_batch=rounds_by_batch)


def _rows(parts: Sequence[tuple[Sample, int, int]]) -> StepRows:
    """A step in which all decoder rows are sampled."""
    ids: list[int] = []
    spans: list[RowSpan] = []
    sampled: list[int] = []
    for sample, start, end in parts:
        own, span = sample.part(start, end)
        ids += own
        spans.append(span)
        sampled += range(len(ids) - (end - start), len(ids))
    positions = tuple(p for span in spans for p in range(span.start, span.start + span.count))
    return StepRows(tuple(ids), positions, tuple(spans), tuple(sampled))


def _stage(
    model: PreTrainedModel, plan: Plan, index: int, device: torch.device, copies: dict[str, nn.Module]
) -> EncoderDecoderStage:
    planned = plan.stages[index]
    own = {name: copies[f"{index}:{name}"] for name in planned.copies}
    for name, stack in (find_encoder(model), find_decoder(model)):
        layers = f"{name}.{find_layers(stack)[0]}."
        first = next((module for module in planned.modules if module.startswith(layers)), None)
        if first is not None:
            lend_biases(model, first, own)
    dtype = getattr(torch, plan.kv_dtype)
    kv = tuple(
        PagedKv(plan.num_blocks, plan.block_size, heads, size, dtype, device)
        for heads, size in _shapes(model)[slice(*planned.layers)]
        if heads
    )
    have, want = sum(cache.bytes for cache in kv), plan.kv_bytes(planned)
    if have != want:
        raise ConfigError(f"stage {index} of {plan.model} needs {have:,} bytes of KV cache, but its plan says {want:,}")
    return EncoderDecoderStage(model, planned.layers, device=device, kv=kv)


def _shapes(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """(heads, head size) of what each layer caches, (0, 0) for the encoder's."""
    config = model.config.get_text_config(decoder=True)
    facts = {
        "is_encoder_decoder": True,
        "encoder_layers": len(find_layers(find_encoder(model)[1])[1]),
        "decoder_layers": len(find_layers(find_decoder(model)[1])[1]),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None),
    }
    return tuple((kv.kv_heads, kv.head_dim) for kv in layer_kv(facts))
