"""A stage of an encoder-decoder (T5): layers of the encoder, of the decoder, or the end of one and the start of other.

A step's rows are all sequences' tokens, as in `stages.Stage`, and hidden states [1, T, hidden] go from stage to stage.
The encoder's layers change the rows of prompts that are new in the step, and leave the others. The decoder's change the
decoder's rows and leave the prompts', which carry the encoder's output from then on: each decoder layer computes its
cross-attention's keys and values from them, once, and keeps them in its KV blocks.

T5's stacks do nothing to hidden states before their layers and only normalise them after, so a stack whose embedding
and norm are `Absent` is a run of layers. The probe at load compares all this with transformers' own forward.

On a GPU nothing here waits for it: all sizes are the host's (`cross_batches`), and masks are made whole, as what is
added to scores, because transformers would look into smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from deployments.engine.attention import PagedKv
from deployments.engine.cross_batches import CrossStep
from deployments.engine.cross_cache import CrossCache
from deployments.engine.gather import Batch
from deployments.engine.stages import (
    Absent,
    Rows,
    StepRows,
    current,
    find_decoder,
    find_layers,
    shallow,
    with_submodule,
)
from deployments.engine.upload import upload


class CutStack:
    """A run of one stack's layers.

    Args:
        stack: the encoder or the decoder; a shallow copy is made, its weights are shared.
        layers: first and past-last layer of the run.
    """

    def __init__(self, stack: nn.Module, layers: tuple[int, int]) -> None:
        list_name, every = find_layers(stack)
        self.embeds = layers[0] == 0
        """Whether it takes ids, not hidden states."""
        self.layers = range(*layers)
        kept = {list_name}
        kept |= {"embed_tokens"} if self.embeds else set()
        kept |= {"final_layer_norm"} if layers[1] == len(every) else set()
        self._stack = shallow(stack)
        self._stack._modules[list_name] = nn.ModuleList(every[slice(*layers)])
        for name in self._stack._modules.keys() - kept - {"dropout"}:
            self._stack._modules[name] = Absent()

    def __call__(self, source: Tensor, **options: Any) -> Tensor:
        """[B, n, hidden] of ids [B, n] or of hidden states [B, n, hidden]."""
        given = {"input_ids": source} if self.embeds else {"inputs_embeds": source}
        out: Tensor = self._stack(**given, **options).last_hidden_state
        return out


class EncoderDecoderStage:
    """Runs its layers for one step on one device.

    Args:
        model: loaded, without hooks; its weights are shared.
        layers: first and past-last layer, the decoder's counted behind the encoder's.
        device: where the stage's tensors are.
        kv: KV blocks of each of its decoder layers, in order.
    """

    def __init__(
        self, model: PreTrainedModel, layers: tuple[int, int], *, device: torch.device, kv: tuple[PagedKv, ...]
    ) -> None:
        _, encoder = find_encoder(model)
        decoder_name, decoder = find_decoder(model)
        encoder_layers, decoder_layers = len(find_layers(encoder)[1]), len(find_layers(decoder)[1])
        self.device = device
        self.layers = layers
        self.kv = kv
        self.dtype: torch.dtype = model.dtype
        """Of what the stacks take and hand over."""
        self.hidden_dtype = reduce(torch.promote_types, _dtypes(encoder, decoder), self.dtype)
        """Of hidden states between layers: in float16, T5 adds them up in float32."""
        self.hidden_size: int = model.config.hidden_size
        self.encoder = _cut(encoder, layers, encoder_layers)
        self.decoder = _cut(decoder, (layers[0] - encoder_layers, layers[1] - encoder_layers), decoder_layers)
        self._kv_by_layer = {} if self.decoder is None else dict(zip(self.decoder.layers, kv, strict=True))
        is_last = layers[1] == encoder_layers + decoder_layers
        self._head = with_submodule(model, decoder_name, Rows()) if is_last else None

    @property
    def embeds_outputs(self) -> bool:
        """Whether it looks up the decoder's ids, which an earlier step may have drawn."""
        return self.decoder is not None and self.decoder.embeds

    @torch.inference_mode()
    def run(self, step: StepRows, incoming: Tensor | None, block_size: int) -> Tensor:
        """Run the stage's layers.

        Args:
            step: the rows, those of a sequence's first step its whole prompt and one token of the decoder at least.
            incoming: [1, T, hidden] from the stage before; None on the first stage.
            block_size: tokens per KV block.

        Returns:
            [1, T, hidden] for the next stage, or on the last stage the logits [sampled rows, vocab].
        """
        with current(self.device):
            rows = upload(CrossStep.of(step, block_size), self.device)
            hidden = self.hidden(rows, None if incoming is None else incoming.to(self.device))
            return hidden if self._head is None else self.logits(rows, hidden)

    def hidden(self, step: CrossStep, incoming: Tensor | None) -> Tensor:
        """[1, T, hidden] in `hidden_dtype`, of a step that is on the stage's device, as is `incoming` (see `run`)."""
        shape = (len(step.ids), self.hidden_size)
        hidden = torch.zeros(shape, dtype=self.hidden_dtype, device=self.device) if incoming is None else incoming[0]
        with _attention_kernels(self.device):
            if self.encoder is not None:
                hidden = self._encode(self.encoder, step, hidden)
            if self.decoder is not None:
                hidden = self._decode(self.decoder, step, hidden)
        return hidden[None]

    def logits(self, step: CrossStep, hidden: Tensor) -> Tensor:
        """[sampled rows, vocab] of hidden states [1, T, hidden]; on the last stage alone."""
        assert self._head is not None, "the head is on the last stage"
        rows = hidden[:, step.sampled].to(self.dtype)
        out = self._head(encoder_outputs=BaseModelOutput(rows), decoder_inputs_embeds=rows, use_cache=False)
        logits: Tensor = out.logits
        return logits[0]

    def _encode(self, encoder: CutStack, step: CrossStep, hidden: Tensor) -> Tensor:
        """`hidden` [T, hidden] with the rows of new prompts run through the encoder's layers."""
        source = step.ids if encoder.embeds else hidden
        for batch in step.encoders:
            found = encoder(source[batch.rows], attention_mask=self._added(batch.mask[:, None]))
            rows = batch.rows.flatten()[batch.kept]
            hidden = hidden.index_copy(0, rows, found.flatten(0, 1)[batch.kept].to(hidden.dtype))
        return hidden

    def _decode(self, decoder: CutStack, step: CrossStep, hidden: Tensor) -> Tensor:
        """`hidden` [T, hidden] with the decoder's rows run through its layers."""
        source = step.ids if decoder.embeds else hidden
        for batch in step.decoders:
            cache = CrossCache(self._kv_by_layer, batch, self.dtype)
            # Where the cache has the encoder's keys, transformers wants to see its output's length alone.
            shape = (*batch.mask.shape, 1)
            encoded = hidden.new_empty(shape) if batch.fresh is None else hidden[batch.fresh.rows]
            found = decoder(
                source[batch.own.rows.view(-1, batch.own.new)],
                attention_mask=self._added(_seen(batch.own)),
                encoder_hidden_states=encoded.to(self.dtype),
                encoder_attention_mask=self._added(batch.mask[:, None]),
                past_key_values=cache.shown,
                use_cache=True,
            )
            cache.check()
            hidden = hidden.index_copy(0, batch.own.rows, found.flatten(0, 1).to(hidden.dtype))
        return hidden

    def _added(self, seen: Tensor) -> Tensor:
        """bool [B, new or 1, keys] as what is added to scores, [B, 1, new or 1, keys]."""
        added = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        return added.masked_fill_(~seen, torch.finfo(self.dtype).min)[:, None]


def _seen(batch: Batch) -> Tensor:
    """bool [B, new, past + new]: the tokens that a new one attends to, all up to its own."""
    keys = torch.arange(batch.past + batch.new, device=batch.mask.device)
    return batch.mask.bool()[:, None] & (keys <= keys[batch.past :, None])


def _attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """On GPUs the kernels that take any length as it comes: cuDNN's would be built anew for each."""
    if device.type != "cuda":
        return nullcontext()
    made: AbstractContextManager[None] = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return made


def _dtypes(*stacks: nn.Module) -> Iterator[torch.dtype]:
    """Of what is not quantised."""
    for stack in stacks:
        yield from (p.dtype for p in stack.parameters() if p.is_floating_point() and not hasattr(p, "quant_state"))


def find_encoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The stack of encoder layers inside a model, with its dotted name."""
    encoder: nn.Module = model.get_encoder()
    name = next(name for name, module in model.named_modules() if module is encoder)
    return name, encoder


def lend_biases(model: nn.Module, layer: str, copies: Mapping[str, nn.Module]) -> None:
    """Give the first of a stage's layers of a stack the table of position biases that the stack's first layer has.

    Args:
        layer: dotted name.
        copies: the stage's own copies of modules, by the name of the original.
    """
    path, _, _ = layer.rpartition(".")
    for name, table in copies.items():
        owner, _, attribute = name.rpartition(".")
        inside = owner.removeprefix(f"{path}.0.")
        if inside != owner:
            attention: Any = model.get_submodule(f"{layer}.{inside}")
            setattr(attention, attribute, table)
            attention.has_relative_attention_bias = True


def _cut(stack: nn.Module, layers: tuple[int, int], count: int) -> CutStack | None:
    start, end = max(0, layers[0]), min(layers[1], count)
    return CutStack(stack, (start, end)) if start < end else None
