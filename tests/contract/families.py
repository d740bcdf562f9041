"""The architectures whose tokens are compared with `generate()`, in small. docs/models.md is printed from these.

`python -m tests.contract.families docs/models.md` renews the table.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from tests.page_table import renew

VOCAB = 256
LAYERS = 2
PAGED, GATHER = "paged", "gather cache"
TABLE = "families"
"""Its name in docs/models.md."""
BITSANDBYTES = ("nf4", "fp4", "int8")
"""Every family is tested in all three, and unquantised."""


@dataclass(frozen=True)
class Family:
    """Models of one architecture with one kind of attention."""

    name: str
    example: str
    """A model on the Hugging Face hub that is made so."""
    features: str
    """What is special about it, as the table says it."""
    attention: str
    """How it must turn out to attend."""
    config: PreTrainedConfig
    not_in: tuple[str, ...] = ()
    """Quantisations that transformers itself can't run it in on a CPU; they are refused."""

    @property
    def quantizations(self) -> tuple[str, ...]:
        """What it is served in."""
        return tuple(name for name in ("fp32", *BITSANDBYTES) if name not in self.not_in)


_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GQA = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2}
_ENDS = {name: _COMMON[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
_WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, **_ENDS}
_EXPERTS = {**_COMMON, "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
_MLA = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

FAMILIES = (
    Family("Llama", "meta-llama/Llama-3.1-8B", "GQA", PAGED, transformers.LlamaConfig(**_GQA)),
    Family(
        "Mistral",
        "mistralai/Mistral-7B-v0.1",
        "sliding window",
        PAGED,
        transformers.MistralConfig(**_GQA, sliding_window=12),
    ),
    Family("Qwen2", "Qwen/Qwen2.5-7B", "biases", PAGED, transformers.Qwen2Config(**_GQA)),
    Family("Qwen3", "Qwen/Qwen3-8B", "normed queries and keys", PAGED, transformers.Qwen3Config(**_GQA, head_dim=16)),
    Family(
        "Gemma 2",
        "google/gemma-2-9b",
        "soft caps, windows",
        PAGED,
        transformers.Gemma2Config(**_GQA, **_WINDOWS, head_dim=16),
    ),
    Family(
        "Gemma 3",
        "google/gemma-3-1b-it",
        "windows, two rotary tables",
        PAGED,
        transformers.Gemma3TextConfig(**_GQA, **_WINDOWS, head_dim=16),
    ),
    Family(
        "Phi-3",
        "microsoft/Phi-3-mini-4k-instruct",
        "fused projections",
        PAGED,
        transformers.Phi3Config(**_GQA, original_max_position_embeddings=256),
    ),
    Family("Phi-2", "microsoft/phi-2", "partial rotary", PAGED, transformers.PhiConfig(**_GQA)),
    Family("StableLM", "stabilityai/stablelm-2-1_6b", "partial rotary", PAGED, transformers.StableLmConfig(**_GQA)),
    Family("Cohere", "CohereForAI/c4ai-command-r-v01", "parallel block", PAGED, transformers.CohereConfig(**_GQA)),
    Family(
        "Cohere 2",
        "CohereForAI/c4ai-command-r7b-12-2024",
        "windows, layers without positions",
        PAGED,
        transformers.Cohere2Config(**_GQA, **_WINDOWS),
    ),
    Family(
        "Granite", "ibm-granite/granite-3.3-8b-instruct", "scaled residuals", PAGED, transformers.GraniteConfig(**_GQA)
    ),
    Family("StarCoder 2", "bigcode/starcoder2-7b", "biases", PAGED, transformers.Starcoder2Config(**_GQA)),
    Family("OLMo 2", "allenai/OLMo-2-1124-7B", "post-norm", PAGED, transformers.Olmo2Config(**_GQA)),
    Family(
        "OPT",
        "facebook/opt-125m",
        "learned positions",
        PAGED,
        transformers.OPTConfig(**_COMMON, ffn_dim=128, word_embed_proj_dim=64),
    ),
    Family(
        "OPT 350m",
        "facebook/opt-350m",
        "projections in and out, post-norm",
        PAGED,
        transformers.OPTConfig(**_COMMON, ffn_dim=128, word_embed_proj_dim=32, do_layer_norm_before=False),
    ),
    Family("GPT-2", "openai-community/gpt2", "transposed weights", PAGED, transformers.GPT2Config(**_GPT2)),
    Family(
        "GPT-NeoX",
        "EleutherAI/pythia-6.9b",
        "fused projections",
        PAGED,
        transformers.GPTNeoXConfig(**_COMMON, intermediate_size=128),
    ),
    Family(
        "BioGPT",
        "microsoft/biogpt",
        "scaled embeddings",
        PAGED,
        transformers.BioGptConfig(**_COMMON, intermediate_size=128),
    ),
    Family(
        "Mixtral",
        "mistralai/Mixtral-8x7B-v0.1",
        "mixture of experts",
        PAGED,
        transformers.MixtralConfig(**_GQA, num_local_experts=4),
    ),
    Family(
        "Qwen3 MoE",
        "Qwen/Qwen3-30B-A3B",
        "mixture of experts",
        PAGED,
        transformers.Qwen3MoeConfig(**_EXPERTS, num_key_value_heads=2, num_experts=4, head_dim=16),
    ),
    Family(
        "BLOOM",
        "bigscience/bloom-3b",
        "ALiBi",
        GATHER,
        transformers.BloomConfig(hidden_size=64, n_layer=LAYERS, n_head=4, seq_length=256, **_ENDS),
    ),
    Family("Falcon 7B", "tiiuae/falcon-7b", "MQA", GATHER, transformers.FalconConfig(**_COMMON)),
    Family(
        "Falcon 40B",
        "tiiuae/falcon-40b",
        "GQA",
        GATHER,
        transformers.FalconConfig(**_COMMON, new_decoder_architecture=True, num_kv_heads=2),
    ),
    Family(
        "Falcon RW",
        "tiiuae/falcon-rw-1b",
        "ALiBi",
        GATHER,
        transformers.FalconConfig(**_COMMON, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    ),
    Family(
        "MPT",
        "mosaicml/mpt-7b",
        "ALiBi",
        GATHER,
        transformers.MptConfig(d_model=64, n_layers=LAYERS, n_heads=4, max_seq_len=256, expansion_ratio=2, **_ENDS),
    ),
    Family("GPT-J", "EleutherAI/gpt-j-6b", "parallel block", GATHER, transformers.GPTJConfig(**_GPT2, rotary_dim=8)),
    Family(
        "CodeGen",
        "Salesforce/codegen-350M-mono",
        "fused projections",
        GATHER,
        transformers.CodeGenConfig(**_GPT2, rotary_dim=8),
    ),
    Family(
        "GPT-Neo",
        "EleutherAI/gpt-neo-1.3B",
        "windows",
        GATHER,
        transformers.GPTNeoConfig(
            hidden_size=64,
            num_layers=LAYERS,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=12,
            max_position_embeddings=256,
            **_ENDS,
        ),
    ),
    Family(
        "XGLM",
        "facebook/xglm-564M",
        "sinusoidal positions",
        GATHER,
        transformers.XGLMConfig(
            d_model=64, num_layers=LAYERS, attention_heads=4, ffn_dim=128, max_position_embeddings=256, **_ENDS
        ),
    ),
    Family(
        "DeepSeek-V2",
        "deepseek-ai/DeepSeek-V2-Lite",
        "MLA, mixture of experts",
        GATHER,
        transformers.DeepseekV2Config(**_MLA, q_lora_rank=None),
        not_in=("int8",),
    ),
    Family(
        "DeepSeek-V3",
        "deepseek-ai/DeepSeek-V3",
        "MLA, mixture of experts",
        GATHER,
        transformers.DeepseekV3Config(**_MLA, q_lora_rank=32, n_group=1, topk_group=1),
        not_in=("int8",),
    ),
    Family(
        "GPT-OSS",
        "openai/gpt-oss-20b",
        "sinks, windows, mixture of experts",
        GATHER,
        transformers.GptOssConfig(
            **_GQA,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=12,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
)

CONFIGS = {family.name: family.config for family in FAMILIES}
"""Of each family, by its name."""
_T5: dict[str, Any] = {
    "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4,
    "vocab_size": VOCAB, "n_positions": 128, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_T5_GATED = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
ENCODER_DECODERS = (
    Family("T5", "google-t5/t5-11b", "encoder-decoder", GATHER, transformers.T5Config(**_T5)),
    Family("FLAN-T5", "google/flan-t5-xxl", "encoder-decoder", GATHER, transformers.T5Config(**_T5_GATED)),
)
MT5 = Family("mT5", "google/mt5-xl", "encoder-decoder", GATHER, transformers.MT5Config(**_T5_GATED))
"""Tested in NF4 alone, and so not in the table."""


def table() -> str:
    """The support table in Markdown."""
    lines = [
        "| family | such as | attention | runs on | 16/32 bits | NF4 | FP4 | int8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in (*FAMILIES, *ENCODER_DECODERS):
        cells = ["yes" if name in family.quantizations else "no" for name in ("fp32", *BITSANDBYTES)]
        lines.append(
            " | ".join((f"| {family.name}", f"`{family.example}`", family.features, family.attention, *cells)) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    renew(Path(sys.argv[1]), TABLE, table())
