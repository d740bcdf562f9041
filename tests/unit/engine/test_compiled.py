"""Layers through torch.compile: shared code, and a way back. The compiler itself is left out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import IndentedBuffer
from torch._inductor.virtualized import V

from deployments.engine.compiled import FEW_ROWS, RECOMPILE_LIMIT, compile_layers
from deployments.engine.forms import usual


class Layer(nn.Module):
    """Norm, product and residual, as a decoder's layer has them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(x))
        return x + out


class Undecided(Layer):
    """Asks its values which way to go, which no compiler can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that a backend was given, which runs them as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Any], *, options: dict[str, Any] | None = None) -> Any:
        graph.meta["options"] = options
        graphs.append(graph)
        return graph.forward

    limit, overlap = torch._dynamo.config.recompile_limit, torch._inductor.config.triton.enable_pdl
    tag, place = torch.compiler.config.cache_key_tag, TritonKernel._filter_pdl
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield graphs
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit
    torch._inductor.config.triton.enable_pdl = overlap
    torch.compiler.config.cache_key_tag = tag
    TritonKernel._filter_pdl = place  # type: ignore[method-assign]  # as it was


@torch.inference_mode()
def run(layers: list[nn.Module], rows: int) -> Tensor:
    x = torch.linspace(-1, 1, rows * 8).view(rows, 8)
    for layer in layers:
        x = layer(x)
    return x


def attempt(layers: list[nn.Module]) -> None:
    for rows in (1, 2, FEW_ROWS + 1):
        run(layers, rows)


def test_layers_of_one_kind_share_their_code(compiled: list[torch.fx.GraphModule]) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Layer() for _ in range(5)]
    plain = {rows: run(layers, rows) for rows in (1, 2, 3, 17, FEW_ROWS, FEW_ROWS + 1, 200)}
    assert compile_layers(layers, partial(attempt, layers)) is None
    overlapping = [graph.meta["options"] for graph in compiled]
    assert overlapping == [{"triton.enable_pdl": True}] * 2 + [None], "one row, few, and many"
    for rows, expected in plain.items():
        torch.testing.assert_close(run(layers, rows), expected)
    assert len(compiled) == 3, "nothing is compiled once requests come"


def test_a_layer_that_can_not_be_compiled_runs_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Layer(), Undecided(), Layer()]
    plain = run(layers, 3)
    reason = compile_layers(layers, partial(attempt, layers))
    assert reason is not None
    assert "\n" not in reason
    assert "data-dependent" in reason.lower()
    assert reason in caplog.text
    assert all("forward" not in vars(layer) for layer in layers)
    assert torch.equal(run(layers, 3), plain)


def test_whatever_the_attempt_raises_is_the_reason() -> None:
    layers: list[nn.Module] = [Layer()]

    def fails() -> None:
        raise RuntimeError("\n\n  no compiler\nin sight" + "!" * 500)

    assert compile_layers(layers, fails) == "RuntimeError: no compiler"
    assert "forward" not in vars(layers[0])


def test_only_the_given_layers_are_compiled(compiled: list[torch.fx.GraphModule]) -> None:
    ours: list[nn.Module] = [Layer()]
    others: list[nn.Module] = [Layer()]
    compile_layers(ours, partial(attempt, ours))
    count = len(compiled)
    run(others, 5)
    assert len(compiled) == count
    assert "forward" not in vars(others[0])


def test_kinds_and_devices_are_within_the_limit() -> None:
    """Beyond it a layer would be compiled anew no more, and under `fullgraph` its step would fail."""
    compile_layers([], lambda: None)
    assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT
    assert RECOMPILE_LIMIT >= 3 * 2 * 8, "one row, few and many, two kinds of layers, eight GPUs"


class Kernel(TritonKernel):
    """One of Inductor's kernels, for a device that can overlap them or can't."""

    def __init__(self, *, overlaps: bool) -> None:
        self._overlaps = overlaps

    def _enable_pdl_codegen(self) -> bool:  # type: ignore[override]  # static there: it asks the device
        return self._overlaps


def body(*lines: str) -> IndentedBuffer:
    buffer = IndentedBuffer()
    buffer.writelines(lines)
    return buffer


@pytest.mark.parametrize(
    "lines",
    [
        ["a = tl.load(x)", Kernel.GDC_WAIT, Kernel.GDC_LAUNCH, "b = tl.load(y)", Kernel.GDC_WAIT, "tl.store(z, a + b)"],
        ["for i in n:", "    a = tl.load(x)", f"    {Kernel.GDC_WAIT}", f"    {Kernel.GDC_LAUNCH}", "tl.store(z, a)"],
        ["tl.store(z, 0)"],
    ],
)
def test_a_kernel_waits_first_and_then_lets_the_next_one_start(lines: list[str]) -> None:
    compile_layers([], lambda: None)
    code = body(*lines)
    Kernel(overlaps=True)._filter_pdl(code)
    work = [line for line in lines if "gdc_" not in line]
    assert code.getvalue().splitlines() == [Kernel.GDC_WAIT, Kernel.GDC_LAUNCH, *work]


def test_a_kernel_of_a_device_that_overlaps_none_stays_as_it_is() -> None:
    compile_layers([], lambda: None)
    code = body("a = tl.load(x)", "tl.store(z, a)")
    Kernel(overlaps=False)._filter_pdl(code)
    assert code.getvalue().splitlines() == ["a = tl.load(x)", "tl.store(z, a)"]


def test_inductor_asks_for_the_last_form_of_a_whole_kernel() -> None:
    """`_filter_pdl` is no public name: a torch that has another place for it must not go unnoticed."""
    assert "self._filter_pdl(self.body)" in inspect.getsource(TritonKernel.codegen_kernel)


@dataclass(frozen=True)
class Reduction:
    """What Inductor tells of a kernel that sums."""

    reduction_numel: sympy.Expr
    hint: ReductionHint

    def get_reduction_hint(self) -> ReductionHint:
        return self.hint


@pytest.mark.parametrize(
    ("numbers", "hint", "whole"),
    [
        (sympy.Integer(4096), ReductionHint.INNER, True),
        (sympy.Integer(16384), ReductionHint.INNER, True),
        (sympy.Integer(16385), ReductionHint.INNER, False),
        (sympy.Integer(4096), ReductionHint.OUTER_TINY, False),
    ],
)
def test_norms_hold_a_row_in_registers(numbers: sympy.Expr, hint: ReductionHint, whole: bool) -> None:
    chosen: list[bool] = []

    def asks() -> None:
        chosen.append(V.choices.should_use_persistent_reduction(Reduction(numbers, hint), False))

    with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
        assert compile_layers([], asks) is None
        asks()
    assert chosen == [whole, False], "while layers are compiled, and not behind it"


class Rotated(nn.Module):
    """Takes a table whose rows may be as wide as there are rows, as rotary tables are."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x[:, :1] * table


def test_code_for_many_rows_is_not_for_as_many_as_a_table_is_wide(compiled: list[torch.fx.GraphModule]) -> None:
    layers: list[nn.Module] = [Rotated()]
    many = usual(max_batch_tokens=2048, max_sequences=256)[-1].rows

    def runs(rows: int) -> None:
        for width in (64, 128, 256):
            layers[0](torch.ones(rows, 8), torch.ones(rows, width))

    assert compile_layers(layers, partial(runs, many)) is None
    count = len(compiled)
    runs(many + 70)
    runs(1000)
    assert len(compiled) == count
