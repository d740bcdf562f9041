"""An encoder-decoder in a plan: by hand, and against what its steps really take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, T5Config

from deployments.engine import cross_batches
from deployments.engine.attention import RowSpan
from deployments.engine.loader import load
from deployments.engine.stages import StepRows
from placement import encoder_decoder as cross
from placement.errors import PlacementError
from placement.flashinfer import why_not_flashinfer
from placement.footprint import Footprint, footprint
from placement.hardware import parse_gpus, virtual_cpu_devices
from placement.plan import solve
from placement.reserve import reserve
from placement.workload import Workload
from tests.unit.engine.memory import PeakBytes

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CONFIGS = Path(__file__).parents[2] / "configs"
WORKLOAD = Workload(16, max_batch_tokens=512, max_sequences=32, max_context=256, kv_dtype="bfloat16")


def t5(quantization: str = "int8", dtype: str | None = "bfloat16") -> Footprint:
    """T5-11B: 24 layers in each stack, 128 heads of 128, hidden states of 1,024, a feed-forward of 65,536."""
    return footprint(CONFIGS / "t5-11b", quantization=quantization, dtype=dtype)


def test_bytes_of_a_row_by_hand() -> None:
    # The feed-forward is more than attention: 65,536 * max(4 * 2, (1 + 1) * 2).
    assert cross.activation_bytes(t5()) == 1024 * (6 * 2 + 8 + 2 * 2) + 65_536 * 8
    # In float16 `wo` stays in float32, and so do hidden states between layers.
    assert cross.activation_bytes(t5("fp16", None)) == 1024 * (6 * 4 + 8 + 2 * 2) + 65_536 * 8
    assert (cross.hidden_bytes(t5()), cross.hidden_bytes(t5("fp16", None))) == (2, 4)


def test_bytes_of_a_block_by_hand() -> None:
    token = 2 * 128 * 128 * 2 + 128 * (2 * 2 + 8) + 64
    assert cross.room(t5(), WORKLOAD).per_block == 2 * 16 * token
    narrow = replace(WORKLOAD, kv_dtype="float8_e4m3fn")
    assert cross.room(t5(), narrow).per_block == 2 * 16 * (token + 128 * 128), "one of keys and values in 8 bits too"


def test_what_is_gathered_at_once_is_bounded() -> None:
    most = cross.TOKENS // (2 * 16)
    found = reserve(t5(), WORKLOAD, device_type="cuda")
    assert found.own is not None
    assert (found.graphs, found.own.most) == (0, most * found.own.per_block)
    full = found.held(last=False, blocks=most, kv_block_bytes=0)
    assert found.held(last=False, blocks=10**6, kv_block_bytes=0) == full
    long = replace(WORKLOAD, max_context=100_000)
    room = cross.room(t5(), long)
    assert room.most == 100_000 // (2 * 16) * room.per_block


def test_hidden_states_wait_in_the_dtype_that_they_have_between_layers() -> None:
    found = {
        quantization: [reserve(weighed, WORKLOAD, device_type="cuda", devices=devices).buffers for devices in (1, 2)]
        for quantization, weighed in (("bf16", t5("bf16", None)), ("fp16", t5("fp16", None)))
    }
    inboxes = {name: two - one for name, (one, two) in found.items()}
    assert inboxes == {"bf16": 2 * 512 * 1024 * 2, "fp16": 2 * 512 * 1024 * 4}


def test_flashinfer_is_not_counted_on() -> None:
    assert why_not_flashinfer(t5(), WORKLOAD) == "an encoder-decoder attends to what is gathered from the blocks"
    with pytest.raises(PlacementError, match="attends to what is gathered from the blocks; use torch"):
        solve(t5(), parse_gpus("1xH200"), block_size=16, max_batch_tokens=512, max_sequences=32, attention="flashinfer")


@pytest.mark.parametrize(("gated", "quantization"), [(False, "bf16"), (True, "fp16"), (True, "fp32")])
def test_a_step_takes_no_more_than_the_plan_holds_back(
    gated: bool, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of one length and of several, decodes of many sequences, and the same gathered in parts."""
    config = T5Config(
        d_model=64, d_kv=16, d_ff=384, num_layers=2, num_decoder_layers=2, num_heads=8, vocab_size=128,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    weighed = footprint(tmp_path, quantization=quantization)
    plan = solve(
        weighed, virtual_cpu_devices(("90MB",)), block_size=16, max_batch_tokens=512, max_sequences=32, max_context=256
    )
    workload = replace(WORKLOAD, kv_dtype=plan.kv_dtype)
    found = reserve(weighed, workload, device_type="cuda")
    (stage,) = load(tmp_path, replace(plan, num_blocks=512), device_type="cpu").stages
    layout = cross.layout_bytes(workload) + 24 * 512

    def peak(*spans: RowSpan) -> int:
        positions = tuple(p for span in spans for p in range(span.start, span.start + span.count))
        with PeakBytes() as counted:
            stage.run(StepRows((7,) * len(positions), positions, spans, (0,)), None, 16)
        return counted.peak

    def table(sequence: int) -> tuple[int, ...]:
        return tuple(range(16 * sequence, 16 * sequence + 16))

    prompt = found.activations + found.prefill + layout
    for lengths in ((256, 256), (128,) * 4, (250, 130, 60, 40, 30), (2,) * 32):
        taken = peak(*(RowSpan(0, length, table(i), length - 1) for i, length in enumerate(lengths)))
        assert taken <= prompt, lengths
    assert peak(*(RowSpan(0, 256, table(i), 128) for i in range(2))) <= prompt, "preempted, and computed again"
    assert peak(*(RowSpan(0, 256, table(i), 255) for i in range(2))) > prompt // 8, "the bound says something"

    token = cross.room(weighed, workload).per_block // (2 * 16)
    decodes = [RowSpan(255, 1, table(i), 200 + i) for i in range(24)]
    beside = 24 * cross.activation_bytes(weighed) + layout
    whole = peak(*decodes)
    assert whole <= 24 * 256 * token + beside
    assert whole > 24 * 256 * token // 4, "the bound says something"
    monkeypatch.setattr(cross_batches, "most_tokens", lambda _: 1024)
    assert peak(*decodes) <= 1024 * token + beside < whole
