"""The probe layer by layer: deep models whose rounding adds up are served, and faults in them are found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.models.bloom.modeling_bloom import BloomAttention

from deployments.engine import attention_torch, gather, load_probe
from deployments.engine.layer_probe import (
    ByLayer,
    Passed,
    Places,
    Uncomparable,
    check_passed,
    forced,
    recording,
    relative_rms,
)
from deployments.engine.load_probe import ProbeFailed, check_logits
from deployments.engine.loader import LoadedModel, load
from deployments.engine.stages import Stage
from deployments.errors import ConfigError
from placement.plan import Plan
from tests.unit.engine.tiny import LIMITS, VOCAB, llama, plan_of, save

LAYERS = 24
_COMMON = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 128}
MISTRAL = transformers.MistralConfig(**llama(LAYERS).to_dict() | {"model_type": "mistral", "sliding_window": 8})
BLOOM = transformers.BloomConfig(**_COMMON, n_layer=LAYERS, initializer_range=0.1)
T5 = transformers.T5Config(
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_layers=LAYERS // 2,
    num_decoder_layers=LAYERS,
    num_heads=4,
    vocab_size=VOCAB,
    decoder_start_token_id=0,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]


def deep(folder: Path, auto: Any, config: PreTrainedConfig, larger: dict[str, float]) -> Path:
    """A random model, of which some weights are larger: with large scores a softmax hands on what is rounded
    magnified, from layer to layer."""
    torch.manual_seed(11)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for part, factor in larger.items():
                weight.mul_(factor if part in name else 1.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep(tmp_path_factory.mktemp("mistral"), AutoModelForCausalLM, MISTRAL, {"q_proj": 4, "k_proj": 4})


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep(tmp_path_factory.mktemp("bloom"), AutoModelForCausalLM, BLOOM, {"query_key_value": 4})


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    larger = {".q.weight": 24, ".v.weight": 4, ".o.weight": 4, "relative_attention_bias": 16}
    return deep(tmp_path_factory.mktemp("t5"), AutoModelForSeq2SeqLM, T5, larger)


def plan(folder: Path, stages: int = 1, kv_dtype: str | None = None) -> Plan:
    return plan_of(
        folder, stages=stages, quantization="bf16", dtype=None, memory="100MB", max_context=64, kv_dtype=kv_dtype
    )


def loaded(folder: Path, stages: int = 1, *, kv_dtype: str | None = None, **options: Any) -> LoadedModel:
    limits = replace(LIMITS, **options) if options else None
    return load(folder, plan(folder, stages, kv_dtype), device_type="cpu", limits=limits)


# What is right


@pytest.mark.parametrize(
    ("stages", "kv_dtype", "options", "attention"),
    [
        (1, None, {}, "torch"),
        (3, None, {}, "torch"),
        (2, None, {"batch_invariant": True}, "torch, batch-invariant"),
        (1, "fp8", {}, "torch"),
    ],
    ids=["one stage", "three stages", "padded rows", "fp8"],
)
def test_a_deep_model_that_is_right_is_served(
    mistral: Path,
    stages: int,
    kv_dtype: str | None,
    options: dict[str, Any],
    attention: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its logits are over the bound, and no layer is off."""
    with caplog.at_level(logging.INFO):
        model = loaded(mistral, stages, kv_dtype=kv_dtype, **options)
    assert model.attention == attention
    bound = "0.15" if kv_dtype else "0.1"
    assert f"over {bound} by rounding that adds up: layer by layer" in caplog.text
    for stage in model.decoder_only():
        assert stage.on_forward is None
        assert not any(layer._forward_hooks for layer in stage.layer_modules)


@pytest.mark.parametrize("stages", [1, 3])
def test_a_deep_encoder_decoder_that_is_right_is_served(
    t5: Path, stages: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert loaded(t5, stages).encodes
    assert "over 0.1 by rounding that adds up: layer by layer" in caplog.text


def test_a_model_within_the_bound_is_not_asked_layer_by_layer(tmp_path: Path, monkeypatch: Patch) -> None:
    def asked(*_: Any) -> ByLayer:
        raise AssertionError

    monkeypatch.setattr(load_probe, "_by_layer", asked)
    assert loaded(save(tmp_path, llama())).attention == "torch"


# Faults


def scored_otherwise(**changes: Any) -> Fault:
    """Attention over blocks is told another window or scale than the model's."""

    def fault(monkeypatch: Patch) -> None:
        def attend(*args: Any) -> Tensor:
            how = args[-1]
            other = {name: change(how) if callable(change) else change for name, change in changes.items()}
            return original(*args[:-1], replace(how, **other))

        original = attention_torch._attend
        monkeypatch.setattr(attention_torch, "_attend", attend)

    return fault


def no_mask(monkeypatch: Patch) -> None:
    """A prompt's tokens see those behind them."""

    def mask(self: attention_torch.PrefillChunk, keys: int, _window: int | None) -> Tensor:
        return torch.ones(self.count, keys, dtype=torch.bool)

    monkeypatch.setattr(attention_torch.PrefillChunk, "mask", mask)


def another_head(monkeypatch: Patch) -> None:
    original = Stage._logits
    monkeypatch.setattr(Stage, "_logits", lambda self, hidden: 1.1 * original(self, hidden))


def no_alibi(monkeypatch: Patch) -> None:
    """In the stages; the plain forward has it."""

    def attend(self: BloomAttention, *args: Any, alibi: Tensor, **named: Any) -> Any:
        return attention(self, *args, alibi=torch.zeros_like(alibi), **named)

    def run(self: gather.GatherAttention, *args: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(BloomAttention, "forward", attend)
            return original(self, *args)

    attention, original = BloomAttention.forward, gather.GatherAttention.run
    monkeypatch.setattr(gather.GatherAttention, "run", run)


def see_the_padding(monkeypatch: Patch) -> None:
    """In the decodes of two lengths, one row of the probe's."""

    def make(*args: Any) -> gather.Batch:
        batch = original(*args)
        return replace(batch, mask=torch.ones_like(batch.mask))

    original = gather.make_batch
    monkeypatch.setattr(gather, "make_batch", make)


@pytest.mark.parametrize(
    "fault",
    [
        scored_otherwise(window=None),
        scored_otherwise(window=7),
        scored_otherwise(scale=lambda how: how.scale / 2),
        scored_otherwise(softcap=5.0),
        no_mask,
    ],
    ids=["no window", "a window of one less", "half the scale", "a softcap", "no mask"],
)
def test_a_fault_in_a_deep_model_is_found(mistral: Path, fault: Fault, monkeypatch: Patch) -> None:
    """The gather cache, which has none, serves it."""
    fault(monkeypatch)
    attention = loaded(mistral, 2).attention
    assert attention.startswith("gather cache (on paged attention its logits differ from the plain forward's by")
    assert "over the bound of 0.1, and not by rounding that adds up" in attention
    assert "what layer" in attention
    assert "over the bound of 0.05 (all are relative RMS)" in attention


def test_a_fault_of_the_head_is_found(mistral: Path, monkeypatch: Patch) -> None:
    another_head(monkeypatch)
    with pytest.raises(ConfigError, match=r"what the head makes differs by 0\.1, over the bound of 0\.05"):
        loaded(mistral)


@pytest.mark.parametrize("fault", [no_alibi, see_the_padding])
def test_a_fault_of_the_gather_cache_is_found(bloom: Path, fault: Fault, monkeypatch: Patch) -> None:
    assert loaded(bloom).attention.startswith("gather cache")
    fault(monkeypatch)
    with pytest.raises(ConfigError, match=r"on the gather cache its logits .* adds up: .* what layer \d+ adds differs"):
        loaded(bloom)


def test_a_fault_in_a_deep_encoder_decoder_is_found(t5: Path, monkeypatch: Patch) -> None:
    """A stage that begins in the midst of a stack, without the table of position biases."""
    monkeypatch.setattr("deployments.engine.encoder_decoder_load.lend_biases", lambda *_: None)
    with pytest.raises(ConfigError, match=r"its logits .* adds up: .* what layer \d+ adds differs"):
        loaded(t5, 3)


# The parts


class Adds(nn.Module):
    """A layer that adds a constant, and hands on something else beside."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self.added = added

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return hidden_states + self.added, "beside"


def run(layers: list[Adds], hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden, beside = layer(hidden)
        assert beside == "beside"
    return hidden


def through(there: list[Adds], here: list[Adds], given: Tensor, rows: list[int]) -> tuple[Tensor, tuple[float, ...]]:
    """What comes out of `here` for some rows of `given` [1, tokens, hidden], and each layer's error."""
    with recording(there) as passed:
        run(there, given)
    start = given[0, torch.tensor(rows).clamp(min=0)][None]
    with forced(here, passed, lambda _: torch.tensor(rows)) as errors:
        out = run(here, start)
    assert not any(layer._forward_hooks for layer in (*there, *here))
    return out, errors()


def test_each_layer_is_compared_by_itself() -> None:
    there, here = [Adds(1.0), Adds(2.0), Adds(4.0)], [Adds(1.0), Adds(3.0), Adds(4.0)]
    given = torch.arange(12.0).view(1, 4, 3)
    out, errors = through(there, here, given, [2, 0, 3])
    assert errors == (0.0, pytest.approx(0.5, rel=1e-5), 0.0)
    assert torch.equal(out[0], given[0, [2, 0, 3]] + 7.0)


def test_the_worst_forward_counts() -> None:
    """A fault in one row of many shows as it would alone."""
    there, here, given = Adds(1.0), Adds(1.0), torch.zeros(1, 9, 2)
    with recording([there]) as passed:
        there(given)
    rows: list[list[int]] = [list(range(8)), [8], [0]]
    with forced([here], passed, lambda _: torch.tensor(now)) as errors:
        for now, here.added in zip(rows, (1.0, 1.5, 1.0), strict=True):
            here(given[:, now])
    assert errors() == pytest.approx((0.5,), rel=1e-5)


def test_padding_is_not_compared() -> None:
    out, errors = through([Adds(1.0)], [Adds(1.0)], torch.zeros(1, 2, 3), [1, -1])
    assert errors == (0.0,)
    assert through([Adds(1.0)], [Adds(1.5)], torch.zeros(1, 2, 3), [-1, -1])[1] == (0.0,)
    assert torch.equal(out, torch.ones(1, 2, 3))


@pytest.mark.parametrize(("added", "error"), [(2.0, 0.0), (6.0, 0.0), (10.0, (8 - 258 / 64) / 2)])
def test_what_the_sum_rounds_to_is_no_error(added: float, error: float) -> None:
    """Beside 256, bfloat16 has steps of 2. Two roundings here and two there, each of 1/256 of 258 at most."""
    given = torch.full((1, 2, 2), 256.0, dtype=torch.bfloat16)
    _, errors = through([Adds(2.0)], [Adds(added)], given, [0, 1])
    assert errors == pytest.approx((error,))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_off_without_end(wrong: float) -> None:
    assert through([Adds(1.0)], [Adds(wrong)], torch.zeros(1, 1, 2), [0])[1] == (float("inf"),)
    assert relative_rms(torch.tensor([wrong]), torch.ones(1)) == float("inf")
    assert relative_rms(torch.ones(1), torch.zeros(1)) == float("inf")


def test_rows_are_told_by_positions_and_padding_by_their_number() -> None:
    class Told:
        on_forward: Callable[[Tensor], None] | None = None

    stages: Any = (Told(), Told())
    places = Places(stages)
    with places.followed():
        for count in (5, 2):
            places.begin(count)
            for stage in stages:
                seen: list[int] = []
                for first in range(0, count, 3):
                    stage.on_forward(torch.tensor([[first, first + 1, first + 2]]))
                    seen += places.where(0).tolist()
                assert [place for place in seen if place >= 0] == list(range(count))
                assert len(seen) % 3 == 0
    assert [stage.on_forward for stage in stages] == [None, None]


def test_states_that_are_not_of_one_token_each_are_refused() -> None:
    fine = Passed(torch.zeros(5, 4), torch.zeros(5, 4))
    check_passed([fine, fine], [5, 5])
    with pytest.raises(Uncomparable, match="its 3 layers, which pass hidden states 2 times"):
        check_passed([fine, fine], [5, 5, 5])
    folded = Passed(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))
    with pytest.raises(Uncomparable, match=r"layer 1, which makes \[2, 5, 4\] of \[2, 5, 4\] for 5 tokens"):
        check_passed([fine, folded], [5, 5])


# The bounds


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "rounds_by_batch", "logits", "layer"),
    [
        ("float32", "float32", False, 0.001, 0.001),
        ("bfloat16", "bfloat16", False, 0.1, 0.05),
        ("float16", "float16", False, 0.03, 0.015),
        ("bfloat16", "float8_e4m3fn", False, 0.15, 0.2),
        ("float32", "float32", True, 0.1, 0.1),
    ],
)
def test_the_bounds_of_each_dtype(
    mistral: Path, dtype: str, kv_dtype: str, rounds_by_batch: bool, logits: float, layer: float
) -> None:
    these, wanted = replace(plan(mistral), dtype=dtype, kv_dtype=kv_dtype), torch.ones(4)

    def check(error: float, worst: ByLayer) -> str:
        found = wanted * (1 + error)
        return check_logits(these, found, wanted, lambda: worst, rounds_by_batch=rounds_by_batch)

    far, near = ByLayer((0.0, 1.01 * layer), 0.0), ByLayer((0.99 * layer, 0.0), 0.0)
    assert "adds up" not in check(0.99 * logits, far)
    assert "(what layer 0 adds)" in check(1.01 * logits, near)
    with pytest.raises(ProbeFailed, match=rf"over the bound of {logits:g}.* what layer 1 adds .* bound of {layer:g} "):
        check(1.01 * logits, far)
    with pytest.raises(ProbeFailed, match="what the head makes differs by"):
        check(1.01 * logits, ByLayer((0.0,), 2 * layer))


def test_layers_that_cant_be_compared_leave_the_bound_on_the_logits(mistral: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(load_probe, "check_passed", lambda *_: check_passed([], [1]))
    with pytest.raises(
        ConfigError, match=r"over the bound of 0\.1 \(both are relative RMS\), and layer by layer its 1 layers, which"
    ):
        loaded(mistral)
