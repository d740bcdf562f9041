"""A tiny model with a tokenizer, as a folder that `headroom compare` takes; and results without measuring any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from deployments.compare.values import Comparison, Failed, Level, Measured, Memory, Quality, Workload
from tests.unit.engine import tiny

WORKLOAD = Workload(concurrency=(1, 3), input=9, output=5, window=32, stride=16)


def folder(path: Path) -> Path:
    """A tiny Llama whose tokenizer knows bytes alone."""
    tiny.save(path, tiny.llama())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    return path


def measured(name: str, **changes: Any) -> Measured:
    """Round numbers."""
    made = Measured(
        quantization=name,
        dtype="float32",
        devices=("CPU",),
        attention="torch",
        quantise_s=None,
        load_s=2.5,
        memory=Memory(weights=100_000_000, kv_cache=500_000_000, reserve=200_000_000, measured=700_000_000,
                      capacity_tokens=12_345),
        quality=Quality(perplexity=12.3456, scored_tokens=99, text_tokens=100),
        levels=tuple(
            Level(requests=n, tokens_per_s=20.0 * n, first_token_s=0.25, token_s=0.05, request_s=1.5) for n in (1, 3)
        ),
    )  # fmt: skip
    return made.model_copy(update=changes)


def comparison(*rows: Measured | Failed, **changes: Any) -> Comparison:
    """Of a model whose name needs escaping in a picture."""
    made = Comparison(
        schema="headroom.compare/1",
        model="a&b",
        revision=None,
        text="text.txt",
        workload=WORKLOAD,
        hourly_price=None,
        started="2026-01-02T03:04:05+00:00",
        machine="CPU, 2 cores",
        versions={"headroom": "1"},
        rows=rows,
    )
    return made.model_copy(update=changes)
