"""The baseline: transformers' `generate()`, one prompt after the other, on the same quantised model.

It is given what makes it fastest: the thread count that a sweep finds best, the KV cache, no streaming, no stopping
criteria beyond the length, and token ids ready before the clock starts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.child import answer_lines
from deployments.engine.loader import quantization_config
from placement.export import from_json


class Sequential:
    """One loaded model; `handle` answers the parent's requests."""

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None

    def handle(self, op: str, **arguments: Any) -> dict[str, Any]:
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self._load,
            "sweep": self._sweep,
            "generate": self._generate,
        }
        return operations[op](**arguments)

    def _load(self, path: str, plan: str) -> dict[str, Any]:
        served = from_json(plan)
        options: dict[str, Any] = {"dtype": getattr(torch, served.dtype), "device_map": {"": "cpu"}}
        if (quantization := quantization_config(served)) is not None:
            options["quantization_config"] = quantization
        self._model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return {}

    def _sweep(self, prompts: list[str], output_tokens: int) -> dict[str, Any]:
        """Tokens/s by thread count (powers of two up to all cores, and all cores); the best stays set."""
        cores = len(os.sched_getaffinity(0))
        counts = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
        self._generate(prompts[:1], 4)  # packs bitsandbytes' CPU weights, and warms caches
        rates = {}
        for threads in counts:
            torch.set_num_threads(threads)
            rates[threads] = max(self._generate(prompts, output_tokens)["tokens_per_s"] for _ in range(2))
        best = max(rates, key=lambda threads: rates[threads])
        torch.set_num_threads(best)
        return {"rates": rates}

    def _generate(self, prompts: list[str], output_tokens: int) -> dict[str, Any]:
        encoded = [self._encode(prompt) for prompt in prompts]
        seconds, outputs = [], []
        started = time.perf_counter()
        for ids in encoded:
            before = time.perf_counter()
            with torch.inference_mode():
                output = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    use_cache=True,
                    min_new_tokens=output_tokens,
                    max_new_tokens=output_tokens,
                    eos_token_id=[],
                    pad_token_id=0,
                )
            outputs.append(output[0, ids.shape[1] :].tolist())
            seconds.append(time.perf_counter() - before)
        wall = time.perf_counter() - started
        assert all(len(ids) == output_tokens for ids in outputs)
        return {
            "tokens_per_s": output_tokens * len(prompts) / wall,
            "seconds": seconds,
            "prompt_tokens": [ids.shape[1] for ids in encoded],
            "texts": [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs],
        }

    def _encode(self, prompt: str) -> torch.Tensor:
        encoded = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids: torch.Tensor = encoded["input_ids"].to(self._model.device)
        return ids


if __name__ == "__main__":
    answer_lines(Sequential().handle)
