"""The models that one API serves, and how a client's name finds its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deployments.api.codec import TextCodec
from deployments.api.dispatcher import Dispatcher
from deployments.errors import ConfigError, ModelNotFound


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model behind the API."""

    name: str
    aliases: tuple[str, ...]
    text: TextCodec
    dispatcher: Dispatcher
    model_context: int
    """Prompt plus output that the model and its settings allow, in tokens."""
    created: int
    """Unix seconds."""
    wait_limit_s: float
    """Longest wait for blocks."""

    @property
    def max_context(self) -> int:
        """Prompt plus output, in tokens: the lesser of the model's context and what its largest replica holds, which
        may be absent just now. More is refused as too long."""
        return min(self.model_context, self.dispatcher.max_context or self.model_context)

    def context_in(self, pool: str | None) -> int:
        """The same where a request insists on a pool."""
        context = self.dispatcher.context_of(pool) if pool is not None else None
        return min(self.max_context, context or self.max_context)

    def room_after(self, prompt_tokens: int, pool: str | None) -> int:
        """Output tokens, at least 1, that a chat without `max_tokens` asks for: what the prompt leaves of the longest
        context that each replica of a pool serves now, so that it can go to any of them; or of the longest that there
        is, where the prompt alone needs that."""
        context = self.context_in(pool)
        living = self.dispatcher.living_context(pool)
        served = context if living is None or living <= prompt_tokens else min(context, living)
        return max(1, served - prompt_tokens)


class ModelTable:
    """Models by name and alias.

    Raises:
        ConfigError: two models share a name.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.models = tuple(models)
        self._by_name: dict[str, ServedModel] = {}
        for model in models:
            for name in (model.name, *model.aliases):
                if name in self._by_name:
                    raise ConfigError(f"the model name {name} is given twice")
                self._by_name[name] = model

    def __iter__(self) -> Iterator[tuple[str, ServedModel]]:
        return iter(self._by_name.items())

    def __getitem__(self, name: str) -> ServedModel:
        """The model of that name or alias.

        Raises:
            ModelNotFound: names those that are served.
        """
        model = self._by_name.get(name)
        if model is None:
            served = ", ".join(sorted(self._by_name))
            raise ModelNotFound(f"no model {name[:100]!r} is served here; there are: {served}", param="model")
        return model
