"""The models that a cluster is to serve, as people write them down.

models:
- name: chat                       # what clients name
  source: org/some-model           # a folder, a config.json, a .gguf file or a Hugging Face id
  quantization: [int8, nf4]        # best first; a group of GPUs takes the first that fits it
  context: 8192                    # tokens that one sequence must be able to have, on every replica
  concurrency: 32                  # sequences of that length at once, on all replicas together
  share: 2                         # of the traffic
  goal: throughput                 # or capacity, latency
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import yaml

from placement.errors import PlacementError
from placement.footprint import Quantization
from placement.solver import Goal


@dataclass(frozen=True, slots=True)
class Wish:
    """One model that is to be served."""

    name: str
    source: str
    """A folder, a config.json, a .gguf file or a Hugging Face id."""
    quantization: tuple[str, ...] = ("nf4",)
    """Allowed, best first. A group of GPUs takes the first under which it holds the context; the later ones also serve
    where the earlier don't give the concurrency."""
    double_quant: bool = False
    """Of nf4 and fp4."""
    context: int | None = None
    """Tokens, prompt and output, that one sequence must be able to have on every replica; None: what the model was
    made for."""
    concurrency: int = 1
    """Sequences of that length at once, on all replicas together."""
    share: int = 1
    """Of the traffic; only the ratios between the models matter."""
    goal: Goal = "throughput"
    """throughput: the most tokens/s; capacity: the most KV tokens; latency: the most tokens/s of groups within 5 % of
    the quickest for a lone sequence."""
    block_size: int = 16
    max_batch_tokens: int = 512
    max_sequences: int = 256
    """Of one replica."""

    def __post_init__(self) -> None:
        where = f"model {self.name}"
        if not self.name or not self.source:
            raise PlacementError(f"{where}: name and source can't be empty")
        if not self.quantization or len(set(self.quantization)) < len(self.quantization):
            raise PlacementError(f"{where}: quantization must name at least one, each once")
        for each in self.quantization:
            _one_of(each, get_args(Quantization), f"{where}: quantization")
        _one_of(self.goal, get_args(Goal), f"{where}: goal")
        if not isinstance(self.double_quant, bool):
            raise PlacementError(f"{where}: double_quant must be true or false, got {self.double_quant!r}")
        for name in ("concurrency", "share", "block_size", "max_batch_tokens", "max_sequences"):
            _at_least_one(getattr(self, name), f"{where}: {name}")
        if self.context is not None:
            _at_least_one(self.context, f"{where}: context")

    def doubles(self, quantization: str) -> bool:
        """Whether double quantisation is meant under `quantization`."""
        return self.double_quant and quantization in ("nf4", "fp4")


def parse_wishes(text: str) -> tuple[Wish, ...]:
    """The models written in YAML (JSON is YAML too); `quantization` may be a list or one name.

    Raises:
        PlacementError: not YAML, a wrong key (by name), a wrong value, or goals that can't be weighed together.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PlacementError(f"models are not YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping) or data.keys() != {"models"} or not isinstance(data["models"], list):
        raise PlacementError("models: a mapping with the one key `models`, a list, is needed")
    wishes = tuple(_wish(entry, f"models[{i}]") for i, entry in enumerate(data["models"]))
    check_together(wishes)
    return wishes


def check_together(wishes: tuple[Wish, ...]) -> None:
    """That `wishes` can be planned for as one.

    Raises:
        PlacementError: none, two of one name, or goals of different units.
    """
    if not wishes:
        raise PlacementError("there is no model to plan for; name at least one")
    if len({wish.name for wish in wishes}) < len(wishes):
        raise PlacementError("models: two have one name; give each its own")
    if len({wish.goal == "capacity" for wish in wishes}) > 1:
        raise PlacementError(
            "models: goal capacity counts KV tokens, the others tokens/s; give capacity to all of them or to none"
        )


def _wish(entry: Any, where: str) -> Wish:
    known = [field.name for field in fields(Wish)]
    if not isinstance(entry, Mapping):
        raise PlacementError(f"{where} must be a mapping with {', '.join(known)}")
    if unknown := sorted(str(key) for key in entry.keys() - set(known)):
        raise PlacementError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    if missing := [key for key in ("name", "source") if key not in entry]:
        raise PlacementError(f"{where}: {', '.join(missing)} is missing")
    allowed = entry.get("quantization", "nf4")
    names = tuple(map(str, allowed)) if isinstance(allowed, list) else (str(allowed),)
    return Wish(**{**entry, "name": str(entry["name"]), "source": str(entry["source"]), "quantization": names})


def _one_of(value: object, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise PlacementError(f"{what} {value!r} is not known; use one of {', '.join(allowed)}")


def _at_least_one(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlacementError(f"{what} must be a whole number of at least 1, got {value!r}")
