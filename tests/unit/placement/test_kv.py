"""Elements per token for each kind of attention."""

from __future__ import annotations

import pytest

from placement.errors import PlacementError
from placement.kv import LayerKv, dtype_bytes, layer_kv

BASE = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 256}


@pytest.mark.parametrize(
    ("config", "elements"),
    [
        (BASE, 2 * 8 * 32),  # MHA
        ({**BASE, "num_key_value_heads": 2}, 2 * 2 * 32),  # GQA
        ({**BASE, "num_key_value_heads": 1}, 2 * 1 * 32),  # MQA
        ({**BASE, "num_key_value_heads": 8, "multi_query": True}, 2 * 1 * 32),
        ({**BASE, "num_key_value_heads": 2, "head_dim": 128}, 2 * 2 * 128),
    ],
)
def test_elements_per_token(config: dict[str, object], elements: int) -> None:
    assert [kv.elements_per_token for kv in layer_kv(config)] == [elements] * 2


def test_windows_are_information() -> None:
    config = {**BASE, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    assert layer_kv(config) == (LayerKv(8, 32, 64), LayerKv(8, 32, None))
    assert [kv.window for kv in layer_kv({**BASE, "sliding_window": 64})] == [64, 64]


def test_other_caches_are_refused() -> None:
    with pytest.raises(PlacementError, match="kv_lora_rank"):
        layer_kv({**BASE, "kv_lora_rank": 512})
    with pytest.raises(PlacementError, match="linear_attention"):
        layer_kv({**BASE, "layer_types": ["linear_attention", "full_attention"]})


def test_dtype_bytes() -> None:
    assert [dtype_bytes(name) for name in ("bfloat16", "float16", "float32")] == [2, 2, 4]
    with pytest.raises(PlacementError, match="use one of bfloat16"):
        dtype_bytes("bf16")
