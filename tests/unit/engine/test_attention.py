"""The attention hook and its operator: what is refused, what reaches the backend, and that layers share a graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from deployments.engine.attention import (
    AttentionBackend,
    PagedKv,
    RowSpan,
    Scoring,
    StepLayout,
    UnsupportedAttention,
    paged_attention,
)
from deployments.engine.attention_torch import TorchAttention

CPU = torch.device("cpu")
HEAD_DIM = 8
FP8 = torch.float8_e4m3fn


class Recorder(AttentionBackend):
    """Keeps what it was asked."""

    name = "recorder"
    capturable = False

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Scoring]] = []

    def prepare(self, layout: StepLayout) -> None:
        raise AssertionError(f"{layout} is not of interest")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: Scoring) -> Tensor:
        assert key.dtype == value.dtype == keys.dtype == values.dtype
        self.asked.append((key, how))
        return query.transpose(1, 2).clone()


def unused_kv(dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM) -> PagedKv:
    return PagedKv(5, 4, 1, head_dim, dtype, CPU)


@torch.inference_mode()
def one_row(kv: PagedKv, mask: Tensor | None = None, fill: float = 1.0, **options: Any) -> Tensor:
    row = torch.full((1, 1, 1, HEAD_DIM), fill)
    return paged_attention(SimpleNamespace(headroom_kv=kv), row, row, row, mask, **options)[0]  # type: ignore[arg-type]  # all that is read of a module


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "alibi", "head_mask"])
def test_refuses_what_it_would_leave_out(name: str) -> None:
    with pytest.raises(UnsupportedAttention, match=f"SimpleNamespace passes {name}"):
        one_row(unused_kv(), **{name: torch.zeros(1)})


def test_refuses_a_prebuilt_mask_and_dropout() -> None:
    with pytest.raises(UnsupportedAttention, match="passes a prebuilt mask"):
        one_row(unused_kv(), torch.zeros(1, 1, 1, 1))
    with pytest.raises(UnsupportedAttention, match="passes dropout"):
        one_row(unused_kv(), dropout=0.1)


def test_takes_neutral_extras_and_counts_calls_of_each_layer() -> None:
    backend, first, second = Recorder(), unused_kv(), unused_kv()
    with backend.step():
        one_row(first, s_aux=None, is_causal=True)
        one_row(second)
        one_row(second)
    assert [backend.calls[kv.keys.data_ptr()] for kv in (first, second)] == [1, 2]


def test_hands_on_how_to_score() -> None:
    backend = Recorder()
    with backend.step():
        one_row(unused_kv())
        one_row(unused_kv(), scaling=0.3, sliding_window=24, softcap=5.0)
    assert [how for _, how in backend.asked] == [Scoring(HEAD_DIM**-0.5, None, None), Scoring(0.3, 24, 5.0)]


def test_heads_get_zeros_up_to_the_size_of_the_blocks() -> None:
    """The operator sees them, and nothing else does: neither the scale nor what comes out."""
    backend = Recorder()
    with backend.step():
        out = one_row(unused_kv(FP8, 2 * HEAD_DIM))
    ((key, how),) = backend.asked
    assert key.flatten().tolist() == [1.0] * HEAD_DIM + [0.0] * HEAD_DIM
    assert how.scale == HEAD_DIM**-0.5
    assert out.tolist() == [[[[1.0] * HEAD_DIM]]]
    assert out.is_contiguous()


def test_outside_a_step_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="outside a step"):
        one_row(unused_kv())


def test_a_failed_step_is_over() -> None:
    backend = Recorder()
    with pytest.raises(ZeroDivisionError), backend.step():
        raise ZeroDivisionError
    test_outside_a_step_is_a_mistake()


def test_each_thread_has_its_own_step() -> None:
    outer, inner = Recorder(), Recorder()

    def other_stage() -> None:
        with inner.step():
            one_row(unused_kv())

    with outer.step():
        thread = threading.Thread(target=other_stage)
        thread.start()
        thread.join()
        one_row(unused_kv())
    assert (len(outer.asked), len(inner.asked)) == (1, 1)


def test_fp8_blocks_get_rounded_rows_that_saturate() -> None:
    backend = Recorder()
    with backend.step():
        one_row(unused_kv(FP8), fill=1.06)
        one_row(unused_kv(FP8), fill=-1e4)
        one_row(unused_kv(FP8), fill=float("nan"))
    keys = [key for key, _ in backend.asked]
    assert {key.dtype for key in keys} == {FP8}
    assert [key.flatten()[0].item() for key in keys[:2]] == [1.0, -448.0]
    assert keys[2].float().isnan().all(), "an overflow upstream must stay visible"


def test_bytes_count_the_scratch_block() -> None:
    kv = PagedKv(3, 4, 2, HEAD_DIM, torch.float16, CPU)
    assert kv.bytes == 2 * (3 + 1) * 4 * 2 * HEAD_DIM * 2


def test_padding_rows_are_first_tokens_in_the_scratch_block() -> None:
    layout = StepLayout((RowSpan(5, 2, (3, 1)),), 4, padding=2)
    assert layout.padded(9) == (RowSpan(5, 2, (3, 1)), RowSpan(0, 1, (9,)), RowSpan(0, 1, (9,)))


def test_padding_of_a_graph_for_chunks_is_one_sequence_and_the_missing_ones_are_empty() -> None:
    span, empty = RowSpan(5, 2, (3, 1)), RowSpan(0, 0, ())
    assert StepLayout((span,), 4, padding=6, sequences=4).padded(9) == (span, RowSpan(0, 6, (9, 9)), empty, empty)
    assert StepLayout((span,), 4, padding=0, sequences=2).padded(9) == (span, empty)


class Layer(nn.Module):
    """A decoder layer in small: something to fuse on both sides of the hook."""

    def __init__(self, kv: PagedKv) -> None:
        super().__init__()
        self.headroom_kv = kv
        self.sliding_window = 3

    def forward(self, hidden: Tensor) -> Tensor:
        rows = (hidden * 2)[:, None]
        return paged_attention(self, rows, rows, rows, None, sliding_window=self.sliding_window)[0][:, :, 0] + 1


@torch.inference_mode()
def run_layers(layers: list[Layer], run: Callable[[Layer, Tensor], Tensor]) -> Tensor:
    """Two chunks of a prompt, then two decodes, through all layers: what the last gives."""
    backend = TorchAttention(5, CPU)
    outs = []
    for start, count in ((0, 3), (3, 5), (8, 1), (9, 1)):
        backend.prepare(StepLayout((RowSpan(start, count, (4, 0, 2)),), 4))
        hidden = torch.full((1, count, HEAD_DIM), start + 0.5)
        with backend.step():
            for layer in layers:
                hidden = run(layer, hidden)
        outs.append(hidden)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("head_dim", [HEAD_DIM, 2 * HEAD_DIM])
@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_layers_compiled_share_their_code_and_compute_the_same(dtype: torch.dtype, head_dim: int) -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = ([Layer(unused_kv(dtype, head_dim)) for _ in range(3)] for _ in range(2))
    expected = run_layers(plain, Layer.forward)
    out = run_layers(compiled, torch.compile(Layer.forward, backend="aot_eager", fullgraph=True, dynamic=True))
    assert torch.equal(out, expected)
    assert counters["stats"]["unique_graphs"] == 2, "one for single rows and one for several, whichever the layer"
    for one, other in zip(plain, compiled, strict=True):
        assert torch.equal(one.headroom_kv.keys.view(torch.uint8), other.headroom_kv.keys.view(torch.uint8))
        assert one.headroom_kv.keys.float().abs().sum() > 0
    torch._dynamo.reset()


def test_the_operator_says_what_it_mutates() -> None:
    schema = torch.ops.headroom.paged_attention.default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == [
        "keys",
        "values",
    ]
