"""Wished-for models as people write them."""

from __future__ import annotations

import pytest

from placement.errors import PlacementError
from placement.wishes import Wish, parse_wishes


def test_all_keys() -> None:
    text = """
    models:
    - {name: a, source: org/a, quantization: [int8, nf4], double_quant: true, context: 4096, concurrency: 8, share: 3,
       goal: latency, block_size: 32, max_batch_tokens: 1024, max_sequences: 64}
    - {name: b, source: ./b, quantization: bf16}
    """
    first, second = parse_wishes(text)
    assert first == Wish("a", "org/a", ("int8", "nf4"), True, 4096, 8, 3, "latency", 32, 1024, 64)
    assert second == Wish("b", "./b", ("bf16",))
    assert [first.doubles(q) for q in first.quantization] == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "not YAML"),
        ("models: 3", "the one key `models`, a list"),
        ("models: []", "no model"),
        ("{models: [], nodes: []}", "the one key"),
        ("models: [a]", r"models\[0\] must be a mapping"),
        ("models: [{name: a}]", r"models\[0\]: source is missing"),
        ("models: [{name: a, source: b, colour: red}]", "unknown key colour; known are name, source"),
        ("models: [{name: a, source: b, quantization: int4}]", "model a: quantization 'int4' is not known; use one of"),
        ("models: [{name: a, source: b, quantization: []}]", "at least one, each once"),
        ("models: [{name: a, source: b, quantization: [nf4, nf4]}]", "at least one, each once"),
        ("models: [{name: a, source: b, goal: speed}]", "goal 'speed' is not known"),
        ("models: [{name: a, source: b, context: 0}]", "context must be a whole number of at least 1, got 0"),
        ("models: [{name: a, source: b, share: 0.5}]", "share must be a whole number"),
        ("models: [{name: a, source: b, concurrency: true}]", "concurrency must be"),
        ("models: [{name: a, source: b, double_quant: 1}]", "double_quant must be true or false"),
        ("models: [{name: '', source: b}]", "can't be empty"),
        ("models: [{name: a, source: b}, {name: a, source: c}]", "two have one name"),
        ("models: [{name: a, source: b, goal: capacity}, {name: c, source: c}]", "give capacity to all of them or to"),
    ],
)
def test_refusals_name_the_key(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message) as caught:
        parse_wishes(text)
    assert "\n" not in str(caught.value)
