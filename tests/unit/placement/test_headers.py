"""Headers of safetensors and GGUF files, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file

from placement.errors import PlacementError
from placement.headers import LONG_ARRAY, LocalFile, read_gguf, read_safetensors, read_safetensors_file, same_values

WEIGHTS = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.ones(4, dtype=torch.int32)}


def test_one_file(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    headers = read_safetensors(tmp_path)
    assert {name: (h.dtype, h.shape, h.bytes) for name, h in headers.items()} == {
        "a": ("BF16", (2, 3), 12),
        "b": ("I32", (4,), 16),
    }
    a = headers["a"]
    assert a.file.read(a.offset, a.bytes) == WEIGHTS["a"].view(torch.uint8).numpy().tobytes()


def test_shards(tmp_path: Path) -> None:
    save_file({"a": WEIGHTS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": WEIGHTS["b"]}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(read_safetensors(tmp_path)) == ["a", "b"]
    # A checkpoint that is not all there says nothing.
    (tmp_path / "two.safetensors").unlink()
    assert read_safetensors(tmp_path) == {}


def test_no_checkpoint(tmp_path: Path) -> None:
    assert read_safetensors(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PlacementError, match=r"index.json can't be read.*fetch the model again"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, (9).to_bytes(8, "little") + b"{", (2).to_bytes(8, "little") + b"[]",
     (7).to_bytes(8, "little") + b'{"a":3}'],
)  # fmt: skip
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(PlacementError, match="not a whole safetensors file"):
        read_safetensors(tmp_path)


def test_same_values(tmp_path: Path) -> None:
    big = torch.zeros(200_000)
    late = big.clone()
    late[-1] = 1
    middle = big.clone()
    middle[100_000] = 1
    save_file({"a": big, "b": big.clone(), "late": late, "middle": middle, "half": big.half()}, tmp_path / "x")
    headers = read_safetensors_file(LocalFile(tmp_path / "x"))
    assert same_values(headers["a"], headers["b"])
    for other in ("late", "middle", "half"):
        assert not same_values(headers["a"], headers[other])


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A GGUF file with metadata of several kinds, two tensors in Q8_0, and `tensors` in float32."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_rope_freq_base(1e4)
    writer.add_bool("general.flag", True)
    writer.add_array("general.tags", ["a", "ü"])
    writer.add_token_list([f"t{i}" for i in range(LONG_ARRAY + 1)])
    writer.add_token_types([1] * (LONG_ARRAY + 2))
    writer.add_tensor("q8", np.zeros((5, 68), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    last = np.arange(15, dtype=np.float32).reshape(3, 5)
    write_gguf(path, {"plain": last})
    header = read_gguf(path)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.block_count"] == 3
    assert header.metadata["llama.rope.freq_base"] == 1e4
    assert header.metadata["general.flag"] is True
    assert header.metadata["general.tags"] == ["a", "ü"]
    assert header.metadata["#tokenizer.ggml.tokens"] == LONG_ARRAY + 1
    assert header.metadata["#tokenizer.ggml.token_type"] == LONG_ARRAY + 2
    # 68 bytes a row are two blocks of 34, of 32 weights each.
    q8, plain = header.tensors["q8"], header.tensors["plain"]
    assert (q8.dtype, q8.shape, q8.bytes) == ("Q8_0", (5, 64), 340)
    assert (plain.dtype, plain.shape, plain.bytes) == ("F32", (3, 5), 60)
    assert path.read_bytes()[plain.offset : plain.offset + 60] == last.tobytes()


@pytest.mark.parametrize("length", [0, 3, 4, 20, 100, 2000])
def test_a_gguf_that_is_cut_short(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PlacementError, match="not a whole GGUF file"):
        read_gguf(path)


@pytest.mark.parametrize("content", [b"GGML" + b"\0" * 40, b"GGUF\1\0\0\0" + b"\0" * 40])
def test_other_files_are_no_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(PlacementError, match=r"letters GGUF|version is 1"):
        read_gguf(path)
