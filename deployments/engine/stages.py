"""A stage: the contiguous run of decoder layers on one device, run on transformers' own model code.

A stage calls the decoder's `forward` on a shallow copy whose `layers` are cut to the stage's run. Everything the
forward does around the layers (masks, rotary tables, layer types, scaling) thus stays transformers' code. Two things
make a cut possible anywhere:

- The first layer of a later stage takes its input from the stage before, whatever the forward computed as embedding;
  the last layer of an earlier stage keeps its output, whatever the forward does with it afterwards.
- Submodules that live on another stage (embedding, final norm, projections) are `Absent`: they hand hidden states
  through and turn ids and masks into a scalar zero, at no cost, and nobody reads what comes of it.

The head is the causal model's `forward` on a shallow copy whose decoder hands over the rows to be sampled, so logit
scaling and soft caps stay transformers' code as well.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.attention import Attention, PagedKv, RowSpan, StepLayout
from deployments.engine.invariant import in_runs


class Absent(nn.Module):
    """Stands for a submodule on another stage; hands hidden states [1, T, hidden] through. Its result is never read."""

    def forward(self, first: Tensor, *_: Any, **__: Any) -> Tensor:
        if first.dim() == 3:
            return first
        return first.new_zeros((), dtype=torch.float32)


class _Entry(nn.Module):
    """The first layer of a later stage: runs on what the stage before handed over."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.incoming: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("hidden_states", None)
        return self.layer(self.incoming, *args[1:], **kwargs)


class _Exit(nn.Module):
    """The last layer of an earlier stage: keeps what the next stage needs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.outgoing: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.layer(*args, **kwargs)
        self.outgoing = result[0] if isinstance(result, tuple) else result
        return result


class Rows(nn.Module):
    """The decoder as the head sees it: hands over hidden states [1, rows, hidden] that are already computed."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Handed:
        return _Handed(inputs_embeds)


class _Handed:
    """A decoder's output with nothing but hidden states, under whatever optional fields an architecture reads."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class RunsSteps(Protocol):
    """A stage as a pipeline sees it."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    @property
    def kv(self) -> tuple[PagedKv, ...]:
        """KV blocks of each of its layers that have any, in order."""
        ...

    def run(self, step: StepRows, incoming: Tensor | None, block_size: int) -> Tensor:
        """See `Stage.run`."""
        ...


@dataclass(frozen=True)
class StepRows:
    """One step as rows of tokens, in plain integers; the same for all stages."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    spans: tuple[RowSpan, ...]
    """One per sequence, in row order."""
    sampled: tuple[int, ...]
    """Rows whose logits are wanted."""

    def cache_slots(self, block_size: int) -> list[int]:
        """For each row the place of its token in the KV cache, counted through all blocks."""
        if len(self.spans) == len(self.ids):
            return [table[at // block_size] * block_size + at % block_size for at, _, table, _ in self.spans]
        return [
            span.block_table[position // block_size] * block_size + position % block_size
            for span in self.spans
            for position in range(span.start, span.start + span.count)
        ]


class Stage:
    """Runs its layers for one step on one device.

    Args:
        model: the loaded causal model; shallow copies are made, its weights are shared.
        layers: first and past-last decoder layer of this stage.
        absent: names of the decoder's submodules that live on another stage.
        own: the stage's own copies of the decoder's submodules (rotary tables), by name.
        device: where the stage's tensors are.
        kv: KV blocks of each of its layers, in order.
        attention: runs the layers so that they attend over them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: tuple[int, int],
        *,
        absent: frozenset[str],
        own: dict[str, nn.Module],
        device: torch.device,
        kv: tuple[PagedKv, ...],
        attention: Attention,
    ) -> None:
        decoder_name, decoder = find_decoder(model)
        list_name, every_layer = find_layers(decoder)
        self.device = device
        self.layers = layers
        self.kv = kv
        self.attention = attention
        self.dtype: torch.dtype = model.dtype
        """Of hidden states."""
        self.is_first = layers[0] == 0
        self.is_last = layers[1] == len(every_layer)
        self.on_forward: Callable[[Tensor], None] | None = None
        """Told the positions, int64 [B, n], of each forward of the layers before it runs; the probe's."""
        self.hidden_size: int = decoder.config.hidden_size  # type: ignore[union-attr, assignment]  # a config's attribute
        self.layer_modules: list[nn.Module] = list(every_layer[layers[0] : layers[1]])
        self._kv_by_layer = dict(zip(range(*layers), kv, strict=True))
        self._takes_positions = _takes(decoder, "position_ids")
        run = list(self.layer_modules)
        for layer, cache in zip(run, kv, strict=True):
            attach_kv(layer, cache)
        self._entry: _Entry | None = None
        self._exit: _Exit | None = None
        if not self.is_last:
            run[-1] = self._exit = _Exit(run[-1])
        if not self.is_first:
            run[0] = self._entry = _Entry(run[0])
        self._decoder = shallow(decoder)
        self._decoder.config = _cut_config(decoder.config, layers)
        self._decoder._modules[list_name] = nn.ModuleList(run)
        self._decoder._modules.update(own)
        for name in absent:
            self._decoder._modules[name] = Absent()
        self._head = with_submodule(model, decoder_name, Rows()) if self.is_last else None

    @property
    def surroundings(self) -> list[nn.Module]:
        """Norms and rotary tables that the decoder applies around its layers, by the names that transformers gives
        their classes."""
        children = self._decoder._modules.values()
        return [each for each in children if each and type(each).__name__.endswith(("Norm", "RotaryEmbedding"))]

    @torch.inference_mode()
    def run(self, step: StepRows, incoming: Tensor | None, block_size: int) -> Tensor:
        """Run the stage's layers.

        Args:
            step: the rows.
            incoming: [1, T, hidden] from the stage before; None on the first stage.
            block_size: tokens per KV block.

        Returns:
            [1, T, hidden] for the next stage, or on the last stage the logits [sampled rows, vocab].
        """
        with current(self.device):
            return self._run(step, incoming, block_size)

    def _run(self, step: StepRows, incoming: Tensor | None, block_size: int) -> Tensor:
        self.attention.prepare(StepLayout(step.spans, block_size))
        source = torch.tensor(step.ids, device=self.device)[None] if incoming is None else incoming.to(self.device)
        hidden = self.hidden(source, torch.tensor(step.positions, device=self.device)[None])
        if not self.is_last:
            return hidden
        if len(step.sampled) < len(step.ids):
            hidden = hidden[:, torch.tensor(step.sampled, dtype=torch.int64, device=self.device)]
        return self.logits(hidden)

    def hidden(self, source: Tensor, positions: Tensor) -> Tensor:
        """Run the layers of a step that the attention backend is prepared for.

        Args:
            source: int64 ids [1, T] on the first stage, else [1, T, hidden] from the stage before; here.
            positions: int64 [1, T], here.

        Returns:
            [1, T, hidden].
        """
        return self.attention.run(self._forward, source, positions, self._kv_by_layer)

    def _forward(self, source: Tensor, positions: Tensor, **options: Any) -> Tensor:
        """The decoder's forward on ids [B, n] or hidden states [B, n, hidden]."""
        if self.on_forward is not None:
            self.on_forward(positions)
        options |= {"position_ids": positions} if self._takes_positions else {}
        if self._entry is None:
            out = self._decoder(input_ids=source, **options)
        else:
            self._entry.incoming = source
            out = self._decoder(inputs_embeds=source, **options)
            self._entry.incoming = None
        if self._exit is None:
            hidden: Tensor = out.last_hidden_state
            return hidden
        outgoing, self._exit.outgoing = self._exit.outgoing, None
        assert outgoing is not None
        return outgoing

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab] of hidden states [1, rows, hidden]; on the last stage alone."""
        if (rows := self.attention.fixed_rows) is None:
            return self._logits(hidden)
        return torch.cat([self._logits(part) for part in in_runs(hidden, rows)])[: hidden.shape[1]]

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self._head is not None, "the head is on the last stage"
        logits: Tensor = self._head(inputs_embeds=hidden, use_cache=False).logits
        return logits[0]

    def attention_calls(self) -> list[int]:
        """Attention calls of each layer so far, replays of captured graphs left out."""
        return [self.attention.calls[cache.keys.data_ptr()] for cache in self.kv]


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, as kernels that are not PyTorch's expect."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def run_stages(stages: Sequence[RunsSteps], step: StepRows, block_size: int) -> Tensor:
    """One step through all stages, one after the other: logits [sampled rows, vocab]."""
    hidden: Tensor | None = None
    for stage in stages:
        hidden = stage.run(step, hidden, block_size)
    assert hidden is not None
    return hidden


def find_decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The stack of decoder layers inside a causal model, with its dotted name."""
    decoder: nn.Module = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder:
            return name, module
    raise LookupError(f"{type(model).__name__}.get_decoder() is not among its submodules")


def find_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers, with its attribute name."""
    count = decoder.config.num_hidden_layers  # type: ignore[union-attr]  # a config's attribute
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name, child
    raise LookupError(f"{type(decoder).__name__} has no list of {count} layers")


def _takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has a parameter of a name."""
    parameters = inspect.signature(type(module).forward).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def attach_kv(layer: nn.Module, cache: PagedKv) -> None:
    """Let the attention modules in `layer` find their KV blocks."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.headroom_kv = cache  # type: ignore[assignment]  # an attribute, no submodule


def detach_kv(model: nn.Module) -> None:
    """Undo `attach_kv` for all layers."""
    for module in model.modules():
        module.__dict__.pop("headroom_kv", None)


def shallow(module: nn.Module) -> nn.Module:
    """A copy with its own table of submodules; parameters, buffers and submodules themselves are shared."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # accelerate leaves one there, bound to the original, when its hooks are removed
    twin._modules = dict(module._modules)
    return twin


def with_submodule(root: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A shallow copy of `root` in which the submodule at dotted `path` is `new`."""
    head, _, rest = path.partition(".")
    twin = shallow(root)
    child = twin._modules[head]
    assert child is not None
    twin._modules[head] = with_submodule(child, rest, new) if rest else new
    return twin


def _cut_config(config: Any, layers: tuple[int, int]) -> Any:
    cut = copy.copy(config)
    cut.num_hidden_layers = layers[1] - layers[0]
    if getattr(config, "layer_types", None):
        cut.layer_types = list(config.layer_types[layers[0] : layers[1]])
    return cut
