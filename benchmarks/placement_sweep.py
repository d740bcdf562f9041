"""Random models, quantisations and caps against what really loads, byte for byte: on the CPU's virtual devices.

    python -m benchmarks.placement_sweep
    python -m benchmarks.placement_sweep --cases 1000 --seed 7

Each case is planned. Where the plan says yes, a random model of that config is written, and loaded and quantised as the
plan says. Stage by stage, what its modules hold before any forward, and the storages of its KV cache, must be what the
plan says to the byte, and with the plan's reserve within the budget. Then each layer moves into an arena, whose storage
must be as large as it is laid out. A case that differs is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deployments.engine.attention import PagedKv
from deployments.engine.loader import quantization_config
from deployments.engine.residents import move_to_arena, resident_bytes, resident_tensors
from deployments.engine.stages import find_decoder, find_layers
from placement.arena import layout
from placement.errors import DoesNotFit
from placement.export import device_map
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.kv import layer_kv
from placement.plan import Plan, Stage, solve

QUANTISATIONS = ("nf4", "nf4+dq", "fp4", "fp4+dq", "int8", "bf16", "fp16", "fp32")
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "gemma2": transformers.Gemma2Config,
    "phi3": transformers.Phi3Config,
    "gpt_neox": transformers.GPTNeoXConfig,
    "stablelm": transformers.StableLmConfig,
    "mixtral": transformers.MixtralConfig,
    "gpt_oss": transformers.GptOssConfig,
    "deepseek_v2": transformers.DeepseekV2Config,
}
_MLA = {
    "kv_lora_rank": 12,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "moe_intermediate_size": 22,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_LARGEST = 2**62
"""Of a device that everything fits on."""


@dataclass(frozen=True)
class Case:
    """What is planned and loaded."""

    family: str
    config: PreTrainedConfig
    quantization: str
    dtype: str | None
    """None: what the quantisation says."""
    kv_dtype: str
    shares: tuple[float, ...]
    """Budget of each device over what the whole model takes on one device with the least KV cache."""
    conditions: dict[str, int]

    def __str__(self) -> str:
        c = self.config
        shares = ", ".join(f"{share:.2f}" for share in self.shares)
        shape = f"{c.num_hidden_layers} x {c.hidden_size}, {c.vocab_size} tokens, tied {c.tie_word_embeddings}"
        return f"{self.family} ({shape}) {self.quantization} {self.dtype or ''}, KV {self.kv_dtype}, devices {shares}"


def draw(rng: random.Random) -> Case:
    """A random case, the same for equal states of `rng`."""
    family, quantization = rng.choice([*FAMILIES]), rng.choice(QUANTISATIONS)
    weights16 = quantization in ("bf16", "fp16", "fp32")
    devices = rng.randint(1, 4)
    return Case(
        family=family,
        config=config_of(family, tiny_sizes(rng), rng),
        quantization=quantization,
        dtype=None if weights16 else rng.choice(("bfloat16", "float16", "float32")),
        kv_dtype=rng.choice(("bfloat16", "float16", "float32", "fp8")),
        shares=tuple(rng.uniform(0.4, 1.4) for _ in range(devices)),
        conditions={
            "block_size": rng.choice((1, 4, 16)),
            "max_batch_tokens": rng.choice((8, 32)),
            "max_sequences": rng.choice((1, 4)),
            "max_context": rng.choice((32, 100)),
        },
    )


def plan_of(case: Case, folder: Path) -> Plan:
    """The plan; the config is written to `folder`.

    Raises:
        DoesNotFit: on the case's devices.
    """
    case.config.save_pretrained(folder)
    name, _, doubled = case.quantization.partition("+")
    weighed = footprint(folder, quantization=name, double_quant=bool(doubled), dtype=case.dtype)
    wishes: dict[str, Any] = {**case.conditions, "kv_dtype": case.kv_dtype}
    alone = solve(weighed, virtual_cpu_devices((_LARGEST,)), **wishes).stages[0]
    whole = alone.weight_bytes + alone.reserve_bytes + 8 * alone.kv_block_bytes
    return solve(weighed, virtual_cpu_devices(tuple(int(share * whole) for share in case.shares)), **wishes)


def differences(case: Case, plan: Plan, folder: Path) -> list[str]:
    """Load the case as planned; whatever is not as the plan says, in words."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(case.config).save_pretrained(folder)
    quantization = quantization_config(plan)
    options = {} if quantization is None else {"quantization_config": quantization}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, plan.dtype), device_map=device_map(plan, "cpu"), **options
    )
    found = [line for i, stage in enumerate(plan.stages) for line in _stage_differences(model, plan, i, stage)]
    return found + _arena_differences(find_layers(find_decoder(model)[1])[1])


def _stage_differences(model: PreTrainedModel, plan: Plan, index: int, stage: Stage) -> list[str]:
    weights = resident_bytes(model.get_submodule(name) for name in (*stage.modules, *stage.copies))
    shapes = layer_kv(model.config.to_dict())[slice(*stage.layers)]
    dtype, cpu = getattr(torch, plan.kv_dtype), torch.device("cpu")
    caches = [
        PagedKv(plan.num_blocks, plan.block_size, s.kv_heads, s.head_dim, dtype, cpu, latent=s.latent) for s in shapes
    ]
    kv = sum(tensor.untyped_storage().nbytes() for cache in caches for tensor in (cache.keys, cache.values))
    held = weights + kv + stage.reserve_bytes
    checks = {
        f"weights {weights:,}, planned {stage.weight_bytes:,}": weights == stage.weight_bytes,
        f"KV cache {kv:,}, planned {plan.kv_bytes(stage):,}": kv == plan.kv_bytes(stage),
        f"holds {held:,} of {stage.budget_bytes:,}": held <= stage.budget_bytes,
    }
    return [f"stage {index}: {text}" for text, right in checks.items() if not right]


def _arena_differences(layers: Iterable[nn.Module]) -> list[str]:
    found = []
    for i, layer in enumerate(layers):
        sizes, size = [size for _, size in resident_tensors([layer])], move_to_arena(layer)
        tensors = [tensor for group in resident_tensors([layer]).values() for tensor in group]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        if not size == layout(sizes)[1] == sum(storages.values()):
            found.append(f"layer {i}: storages of {[*storages.values()]} bytes, laid out {layout(sizes)[1]:,}")
    return found


def tiny_sizes(rng: random.Random) -> dict[str, Any]:
    """Of a model that loads in no time, of odd widths."""
    group, kv_heads, head_dim = rng.choice((1, 2, 4)), rng.choice((1, 2)), rng.choice((8, 12, 16))
    heads = group * kv_heads
    return {
        "hidden_size": heads * head_dim,
        "num_hidden_layers": rng.randint(1, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": rng.randint(10, 150),
        "vocab_size": rng.randint(40, 300),
        "max_position_embeddings": 128,
        "tie_word_embeddings": rng.random() < 0.5,
    }


def config_of(family: str, sizes: Mapping[str, Any], rng: random.Random) -> PreTrainedConfig:
    """A model of these sizes, as far as its family knows them."""
    sizes = {**sizes, **{f"{kind}_token_id": 0 for kind in ("bos", "eos", "pad")}}
    if family in ("mixtral", "gpt_oss"):
        sizes |= {"num_local_experts": rng.choice((2, 3)), "num_experts_per_tok": 2}
    if family == "llama":
        sizes["attention_bias"] = rng.random() < 0.5
    if family == "deepseek_v2":
        sizes |= {**_MLA, "num_key_value_heads": sizes["num_attention_heads"], "n_routed_experts": rng.choice((2, 4))}
    if family in ("gpt_neox", "phi3", "stablelm", "deepseek_v2"):
        del sizes["head_dim"]
    if family == "gpt_neox":
        del sizes["num_key_value_heads"]
    return FAMILIES[family](**sizes)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found; exit code 1 when a plan and what was loaded differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rng, stages, refused, differ = random.Random(options.seed), Counter[int](), 0, 0
    for number in range(options.cases):
        case = draw(rng)
        with tempfile.TemporaryDirectory() as folder:
            try:
                plan = plan_of(case, Path(folder))
            except DoesNotFit:
                refused += 1
                continue
            stages[len(plan.stages)] += 1
            if found := differences(case, plan, Path(folder)):
                differ += 1
                print(f"case {number}: {case}: {'; '.join(found)}", flush=True)
    placed = stages.total()
    split = ", ".join(f"{count} on {n}" for n, count in sorted(stages.items()))
    print(f"seed {options.seed}: {options.cases} cases, {refused} refused, {placed} placed (by stages: {split})")
    print(f"{placed - differ} of {placed} hold what was planned to the byte, within their budgets")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
