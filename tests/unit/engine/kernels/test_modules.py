"""Modules hold bitsandbytes' weights, compute their product and save them bit for bit; on a CPU by the definition."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from deployments.engine.grouped import check_kernels
from deployments.engine.kernels import modules
from deployments.engine.kernels.fuse import Part, fuse_linears
from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8, replace_linears
from deployments.engine.kernels.weights import dequantise4, dequantise8
from deployments.errors import ConfigError


def linear4(n: int, k: int, *, quant_type: str = "nf4", nested: bool = False, bias: bool = True) -> Any:
    torch.manual_seed(n + k)
    linear: Any = bnb.nn.Linear4bit(k, n, bias, torch.bfloat16, compress_statistics=nested, quant_type=quant_type)
    linear.support_avx512bf16_for_cpu = False  # its forward would repack the weight
    return linear.to("cpu")


def linear8(n: int, k: int, bias: bool = True) -> Any:
    torch.manual_seed(n + k)
    return bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=0.0).to("cpu")


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "k", "tiled"), [(48, 128, True), (24, 96, False)])
def test_4bit_is_the_same_weight(n: int, k: int, tiled: bool, quant_type: str, nested: bool) -> None:
    torch.manual_seed(n + k)
    original = nn.Linear(k, n).weight.detach()  # what linear4 draws
    linear = linear4(n, k, quant_type=quant_type, nested=nested)
    linear.bias.data = linear.bias.data.bfloat16()
    expected = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    saved = linear.state_dict()
    held = linear.weight.nbytes
    ours = QuantLinear4.of(linear)
    assert ours.quantised.tiled == tiled
    dense = dequantise4(ours.quantised, torch.float32)
    assert float((dense - original).norm()) < 0.13 * float(original.norm())
    if k % 64 == 0:  # bitsandbytes 0.50.2 on a CPU dequantises other widths wrongly
        assert torch.allclose(dense, expected, rtol=1e-5, atol=1e-7)
    assert ours.weight.nbytes == held
    same(ours.state_dict(), saved)
    x = torch.randn(2, 3, k, dtype=torch.bfloat16)
    want = x.float() @ dequantise4(ours.quantised, torch.float32).t() + ours.bias.float()
    assert torch.equal(ours(x), want.bfloat16())


@pytest.mark.parametrize(("n", "k", "tiled"), [(48, 128, True), (24, 96, False)])
def test_8bit_is_the_same_weight(n: int, k: int, tiled: bool) -> None:
    linear = linear8(n, k)
    saved = linear.state_dict()
    ours = QuantLinear8.of(linear)
    assert ours.quantised.tiled == tiled
    codes, absmax = saved["weight"], saved["SCB"]
    assert torch.equal(dequantise8(ours.quantised, torch.float32), codes.float() * (absmax / 127)[:, None])
    same(ours.state_dict(), saved)
    x = torch.randn(5, k, dtype=torch.float16)
    want = x.float() @ dequantise8(ours.quantised, torch.float32).t() + ours.bias.half().float()
    assert torch.allclose(ours(x).float(), want, rtol=2e-3, atol=2e-3)


def test_shapes_without_tiles_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    modules._tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        QuantLinear4.of(linear4(24, 96))
        QuantLinear4.of(linear4(24, 96))
    assert [record.message for record in caplog.records] == [
        "the 24x96 linears are dequantised for every product: "
        "tiles need rows in multiples of 16 and columns in multiples of 64"
    ]


class Block(nn.Module):
    def __init__(self, make: Any, rows: tuple[int, int, int] = (256, 128, 64)) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (make(n, 128) for n in rows)
        self.gate_proj, self.up_proj = make(128, 128), make(128, 128)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x), self.gate_proj(x) * self.up_proj(x)]


NESTED = partial(linear4, nested=True)


@pytest.mark.parametrize(
    ("make", "shared"),
    [
        (linear4, 3 * 64),  # five linears' tables of 16 float32 became two
        # And those of 256; three offsets and two became, one for each 64 and 128 rows, seven and two.
        (NESTED, 3 * (64 + 1024) - 4 * 4),
        (linear8, 0),
    ],
)
def test_fused_siblings_compute_and_save_the_same(make: Any, shared: int) -> None:
    block = Block(make)
    saved = block.state_dict()
    for name, child in list(block.named_children()):
        setattr(block, name, QuantLinear8.of(child) if make is linear8 else QuantLinear4.of(child))
    dtype = torch.bfloat16
    x = torch.randn(3, 128, dtype=dtype)
    apart = block(x)
    held = sum(buffer.nbytes for buffer in block.buffers())
    assert fuse_linears(block) == 2
    assert isinstance(block.v_proj, Part)
    for ours, theirs in zip(block(x), apart, strict=True):
        assert torch.equal(ours, theirs)
    assert sum(buffer.nbytes for buffer in block.buffers()) == held - shared
    ours = block.state_dict()
    assert ours.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(ours[name].float(), tensor.to(ours[name].dtype).float()), name


def test_fused_parts_follow_their_input() -> None:
    block = Block(linear4)
    for name, child in list(block.named_children()):
        setattr(block, name, QuantLinear4.of(child))
    apart = [(block.q_proj, block.k_proj)]
    x, y = torch.randn(2, 2, 128, dtype=torch.bfloat16).unbind()
    expected = [apart[0][0](x), apart[0][1](y), apart[0][1](x)]
    fuse_linears(block)
    for ours, theirs in zip([block.q_proj(x), block.k_proj(y), block.k_proj(x)], expected, strict=True):
        assert torch.equal(ours, theirs)


def test_fused_offsets_are_those_of_their_rows() -> None:
    block = Block(lambda n, k: QuantLinear4.of(NESTED(n, k)))
    a, b, c = (float(linear.offset) for linear in (block.q_proj, block.k_proj, block.v_proj))
    assert len({a, b, c}) == 3
    fuse_linears(block)
    whole: Any = block.q_proj.fused.whole
    assert whole.offset.tolist() == [a, a, a, a, b, b, c]
    assert whole.quantised.offset_rows == 64


def test_double_quantised_siblings_that_stay_apart(caplog: pytest.LogCaptureFixture) -> None:
    def make(n: int, k: int, nested: bool = True) -> QuantLinear4:
        return QuantLinear4.of(linear4(n, k, nested=nested))

    mixed, coded = Block(make), Block(make)
    mixed.k_proj = make(128, 128, nested=False)
    coded.k_proj.nested_code = -coded.k_proj.nested_code
    with caplog.at_level(logging.INFO):
        assert [fuse_linears(block) for block in (Block(make, (64, 128, 64)), mixed, coded)] == [1, 1, 1]
    assert [record.getMessage().partition("apart: ")[2] for record in caplog.records if "apart" in record.msg] == [
        "a block of 256 scales would be of two linears (double quantisation)",
        "some are double-quantised",
        "their scales are quantised by different codes",
    ]
    assert isinstance(mixed.q_proj, QuantLinear4)


def test_linears_on_the_cpu_stay_bitsandbytes() -> None:
    block = Block(linear4)
    assert replace_linears(block) == 0
    assert isinstance(block.q_proj, bnb.nn.Linear4bit)


def test_linears_on_a_gpu_that_is_too_old_stay_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    modules._stays.cache_clear()
    linears = [linear4(16, 64), linear8(16, 64)]
    for linear in linears:
        linear._parameters["weight"] = SimpleNamespace(device=torch.device("cuda", 0))
    model = nn.Sequential(*linears)
    with caplog.at_level(logging.WARNING):
        assert replace_linears(model) == 0
    assert list(model) == linears
    assert [record.getMessage() for record in caplog.records] == [
        "linears stay on bitsandbytes' kernels instead of Headroom's: cuda:0 (Tesla T4) has compute capability 7.5, "
        "and they need 8.0"
    ], "once"


def test_grouped_checkpoints_are_refused_on_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (8, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    plan: Any = SimpleNamespace(model="m", stages=[SimpleNamespace(device=0), SimpleNamespace(device=1)])
    with pytest.raises(ConfigError, match=r"cuda:1 \(Tesla T4\) has compute capability 7.5, .* take a GPU of .* 8.0"):
        check_kernels(plan, kernels=True)
    capabilities[1] = (12, 0)
    check_kernels(plan, kernels=True)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="has 128 columns, x has 64"):
        QuantLinear4.of(linear4(48, 128))(torch.randn(2, 64, dtype=torch.bfloat16))
