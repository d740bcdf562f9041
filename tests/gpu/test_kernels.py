"""The kernels on a CUDA device against float64 products of the dequantised weight."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deployments.engine.kernels import config
from deployments.engine.kernels.repack import why_not_tiled
from deployments.engine.kernels.weights import (
    Nested,
    Weight4,
    Weight8,
    dequantise4,
    dequantise8,
    tile4,
    tile8,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOUND = {torch.bfloat16: 3e-3, torch.float16: 1e-3}
ROWS = (1, 3, 8, 9, 16, 17, 32, 40, 65, 128, 129, 1024)
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.005208333, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25, 0.0, -0.005208333, -0.6666667, -1.0,
    -0.33333334, -0.5, -0.16666667, -0.25,
)  # fmt: skip


def weight4(
    n: int, k: int, *, blocksize: int = 64, nested: bool = False, parts: int = 1, scale: float = 1.0
) -> Weight4:
    """`parts`: of rows with an offset each, where nested; more than one in tiles alone."""
    packed = torch.randint(0, 256, ((n * k + 1) // 2, 1), dtype=torch.uint8, device="cuda")
    blocks = -(-n * k // blocksize)
    code = torch.tensor(FP4 if nested else NF4, device="cuda")
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
        outer = torch.rand(-(-blocks // 256), device="cuda") * scale
        inner = Nested(outer, torch.randn(256, device="cuda"), torch.rand(parts, device="cuda") * scale)
        return Weight4(n, k, blocksize, packed, absmax, code, inner)
    return Weight4(n, k, blocksize, packed, torch.rand(blocks, device="cuda") * scale, code)


def weight8(n: int, k: int, scale: float = 1.0) -> Weight8:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    return Weight8(n, k, codes, torch.rand(n, device="cuda") * scale)


Format = Literal["nf4", "fp4", "nested", "int8"]


def weight_of(kind: Format, n: int, k: int, scale: float = 1.0) -> Weight4 | Weight8:
    """In tiles where the shape allows."""
    if kind == "int8":
        eight = weight8(n, k, scale)
        return eight if why_not_tiled(n, k) else tile8(eight)
    native = why_not_tiled(n, k, 64) is not None
    four = weight4(n, k, nested=kind == "nested", parts=1 if native else n // 16, scale=scale)
    if kind == "fp4":
        four = replace(four, code=torch.tensor(FP4, device="cuda"))
    return four if native else tile4(four)


def dense(weight: Weight4 | Weight8) -> Tensor:
    return dequantise4(weight, torch.float64) if isinstance(weight, Weight4) else dequantise8(weight, torch.float64)


def product(x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None = None) -> Tensor:
    from deployments.engine.kernels.launch import product as compute

    return compute(x, weight, bias)


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def variants(n: int, k: int) -> list[Weight4 | Weight8]:
    """Every format that the shape allows, tiled and not."""
    native: list[Weight4 | Weight8] = [weight4(n, k), weight4(n, k, nested=True), weight8(n, k)]
    if k % 256 == 0:
        native += [weight4(n, k, blocksize=128), weight4(n, k, blocksize=256, nested=True)]
    if n % 16 == 0 and k % 64 == 0:
        tiled = [tile4(w) if isinstance(w, Weight4) else tile8(w) for w in native]
        return [*native, *tiled, tile4(weight4(n, k, nested=True, parts=n // 16))]
    return native


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (592, 704), (2048, 1024), (33, 77)])
def test_products(n: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n + k)
    for weight in variants(n, k):
        wide = dense(weight)
        outs, references = [], []
        for rows in ROWS:
            x = torch.randn(rows, k, device="cuda", dtype=dtype)
            bias = torch.randn(n, device="cuda", dtype=dtype) if rows % 2 else None
            expected = x.double() @ wide.t() + (0 if bias is None else bias.double())
            torch.full((rows, n), torch.nan, device="cuda", dtype=dtype)  # poison what `empty` returns next
            outs.append(product(x, weight, bias))
            references.append(expected)
            assert outs[-1].dtype == dtype
            # Of few outputs the largest decides, and one rounding of it can be twice what they are on the average.
            assert error(outs[-1], expected) < 2 * BOUND[dtype], (type(weight).__name__, weight.tiled, rows)
        assert error(torch.cat(outs), torch.cat(references)) < BOUND[dtype], (type(weight).__name__, weight.tiled)


@dataclass(frozen=True)
class Product:
    """Rows of activations times a weight."""

    kind: Format
    dtype: torch.dtype
    n: int
    k: int
    rows: int
    scale: float
    """Of the weight: the largest that its blocks may have."""
    biased: bool
    spoilt: float | None = None
    """What one activation is made."""
    seed: int = 0


SHAPES = ((16, 64), (592, 704), (2048, 1024), (33, 77), (7, 704), (1000, 77))
"""Few, as kernels are compiled for a shape. The first three are in tiles; (33, 77) has an odd number of weights."""


@st.composite
def products(draw: st.DrawFn) -> Product:
    dtype = draw(st.sampled_from((torch.bfloat16, torch.bfloat16, torch.float16)))
    n, k = draw(st.sampled_from(SHAPES))
    return Product(
        draw(st.sampled_from(("nf4", "fp4", "nested", "int8"))),
        dtype,
        n,
        k,
        rows=draw(st.integers(1, 40) | st.integers(1, 1024)),
        scale=draw(st.sampled_from((1.0, 1e-30, 1e-10, 1e20) if dtype == torch.bfloat16 else (1.0, 0.05))),
        biased=draw(st.booleans()),
        spoilt=draw(st.sampled_from((None, torch.nan, torch.inf, -torch.inf))),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@example(Product("nf4", torch.bfloat16, 592, 704, 1024, 1.0, biased=True, spoilt=torch.nan))
@example(Product("int8", torch.float16, 33, 77, 1, 1.0, biased=False, spoilt=torch.inf))
@given(products())
def test_any_product(case: Product) -> None:
    """Right in every row; NaN and infinity reach all outputs of their row, and no other row."""
    torch.manual_seed(case.seed)
    weight = weight_of(case.kind, case.n, case.k, case.scale)
    wide = dense(weight)
    x = torch.randn(case.rows, case.k, device="cuda", dtype=case.dtype)
    bias = (torch.randn(case.n, device="cuda") * case.scale).to(case.dtype) if case.biased else None
    added = torch.zeros(case.n).to(wide) if bias is None else bias.double()
    expected = x.double() @ wide.t() + added
    size = (x.double() ** 2 @ wide.t() ** 2 + added**2).sqrt()  # of each output, whatever cancels in its sum
    # Of few outputs the largest decides, as in `test_products`.
    bound = BOUND[case.dtype] * (1 if case.rows * case.n >= 4096 else 2)
    torch.full((case.rows, case.n), torch.nan, device="cuda", dtype=case.dtype)
    assert float((product(x, weight, bias) - expected).norm() / size.norm()) < bound
    if case.spoilt is None:
        return
    row = case.seed % case.rows
    x[row, case.seed % case.k] = case.spoilt
    off = product(x, weight, bias) - expected
    assert not off[row].isfinite().any()
    off[row] = 0
    assert float(off.norm() / size.norm()) < bound


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e20])
def test_extreme_scales(scale: float) -> None:
    for weight in (tile4(weight4(256, 512, scale=scale)), tile8(weight8(256, 512, scale=scale))):
        x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
        assert error(product(x, weight), x.double() @ dense(weight).t()) < 3e-3


def test_rows_of_x_may_be_strided() -> None:
    weight = tile4(weight4(256, 512))
    x = torch.randn(7, 1024, device="cuda", dtype=torch.bfloat16)[:, 512:]
    assert error(product(x, weight), x.double() @ dense(weight).t()) < 3e-3


def test_nan_and_infinity_stay_in_their_rows() -> None:
    for weight in (tile4(weight4(256, 512)), tile8(weight8(256, 512))):
        x = torch.randn(20, 512, device="cuda", dtype=torch.bfloat16)
        clean = product(x, weight)
        x[3, 100], x[17, 5] = torch.nan, torch.inf
        out = product(x, weight)
        assert out[3].isnan().all()
        assert not out[17].isfinite().any()
        others = [row for row in range(20) if row not in (3, 17)]
        assert torch.equal(out[others], clean[others])


def test_the_same_call_gives_the_same_bits() -> None:
    for weight in (tile4(weight4(4096, 4096)), tile8(weight8(4096, 4096))):
        for rows in (1, 16, 33, 100):
            x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
            first = product(x, weight)
            assert all(torch.equal(product(x, weight), first) for _ in range(50))


@pytest.mark.parametrize("tiled", [True, False])
def test_of_16_rows_each_has_its_bits_whatever_and_wherever_the_others_are(tiled: bool) -> None:
    """What `batch_invariant` counts on."""
    four, eight = weight4(4096, 1024), weight8(4096, 1024)
    for weight in (tile4(four), tile8(eight)) if tiled else (four, eight):
        x = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
        alone = product(x, weight)
        assert torch.equal(product(x.flip(0), weight), alone.flip(0))
        for row in range(16):
            among = 9 * torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
            place = 5 * row % 16
            among[place] = x[row]
            assert torch.equal(product(among, weight)[place], alone[row]), row
            padded = torch.zeros_like(x)
            padded[0] = x[row]
            assert torch.equal(product(padded, weight)[0], alone[row]), row


def test_empty_input() -> None:
    x = torch.empty(0, 512, device="cuda", dtype=torch.bfloat16)
    assert product(x, tile4(weight4(256, 512))).shape == (0, 256)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_every_candidate_of_this_gpu_or_a_reason(kind: config.Kind) -> None:
    """A configuration may be too large for a GPU; one that runs must be right, full panels or not."""
    from deployments.engine.kernels.launch import small_product
    from deployments.engine.kernels.tune import CANDIDATES

    ran = 0
    for bucket in config.BUCKETS:
        for choice in CANDIDATES[kind, bucket]:
            for n, k, rows in ((1024, 1024, bucket), (592, 704, bucket - 5)):
                weight = tile4(weight4(n, k)) if kind == "4bit" else tile8(weight8(n, k))
                x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
                try:
                    out = small_product(x, weight, None, choice, bucket=bucket)
                except Exception as failure:  # Triton raises several kinds
                    if not any(word in str(failure).lower() for word in ("resource", "invalid", "workspace")):
                        raise
                    continue
                assert error(out, x.double() @ dense(weight).t()) < 3e-3, (bucket, choice)
                ran += 1
    assert ran >= 8


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs clusters of blocks"
)
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize(("n", "k"), [(592, 704), (2048, 4096)])
def test_cuts(n: int, k: int, kind: config.Kind) -> None:
    """All divisions of the work give the product, always the same, whatever the clusters and parts of x."""
    from deployments.engine.kernels.cut import GROUPS, Cut, candidates
    from deployments.engine.kernels.launch import shared_bytes
    from deployments.engine.kernels.skinny import skinny_product

    bits = 4 if kind == "4bit" else 8
    weight = tile4(weight4(n, k, nested=n == 592, parts=n // 16)) if kind == "4bit" else tile8(weight8(n, k))
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    for groups in GROUPS:
        some = list(candidates(n, k, bits, groups, shared_bytes(bias.device)))
        for cut in [*some[:: max(1, len(some) // 8)], Cut(2, 1, 2, 2, 2, 4), Cut(1, 2, 3, 1, 8, 2)]:
            x = torch.randn(8 * groups - 3, k, device="cuda", dtype=torch.bfloat16)
            torch.full((8 * groups - 3, n), torch.nan, device="cuda", dtype=torch.bfloat16)
            out = skinny_product(x, weight, bias, cut)
            assert error(out, x.double() @ dense(weight).t() + bias.double()) < 3e-3, cut
            assert all(torch.equal(skinny_product(x, weight, bias, cut), out) for _ in range(10)), cut


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs warpgroups' products"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize(("n", "k"), [(592, 704), (2048, 4096), (64, 64)])
def test_slabs(n: int, k: int, kind: config.Kind, dtype: torch.dtype) -> None:
    """The same of `wide.cu`; NaN and infinity stay in their rows, whatever lies beside x in memory."""
    from deployments.engine.kernels.launch import shared_bytes
    from deployments.engine.kernels.slab import candidates
    from deployments.engine.kernels.wide import wide_product

    weight = tile4(weight4(n, k, nested=n == 592, parts=n // 16)) if kind == "4bit" else tile8(weight8(n, k))
    bias = torch.randn(n, device="cuda", dtype=dtype)
    for rows in (1, 32, 50, 64, 100, 300):
        some = list(candidates(n, k, 4 if kind == "4bit" else 8, rows, shared_bytes(bias.device)))
        for slab in some[:: max(1, len(some) // 3)]:
            x = torch.full((rows + 1, k + 64), torch.nan, device="cuda", dtype=dtype)[:rows, :k]
            x.copy_(torch.randn(rows, k, device="cuda"))
            torch.full((rows, n), torch.nan, device="cuda", dtype=dtype)
            out = wide_product(x, weight, bias, slab)
            # As in `test_products`: of one row a rounding of the largest decides.
            bound = BOUND[dtype] if rows > 1 else 2 * BOUND[dtype]
            assert error(out, x.double() @ dense(weight).t() + bias.double()) < bound, slab
            assert all(torch.equal(wide_product(x, weight, bias, slab), out) for _ in range(10)), slab
            x[0, k - 1], x[rows // 2, 0] = torch.inf, torch.nan
            spoilt, clean = wide_product(x, weight, bias, slab), [i for i in range(rows) if i not in (0, rows // 2)]
            assert spoilt[rows // 2].isnan().all()
            assert not spoilt[0].isfinite().any()
            assert torch.equal(spoilt[clean], out[clean])


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs warpgroups' products"
)
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_slabs_give_the_same_bits_thousands_of_times(kind: config.Kind) -> None:
    """One product of several thousand was wrong where barriers lay under the sums."""
    from deployments.engine.kernels.slab import Slab
    from deployments.engine.kernels.wide import wide_product

    table = config.table_for("NVIDIA H200")
    entries = [entry for (of, _, _), entry in table.shapes.items() if of == kind]
    slabs = {cut for entry in entries for cut in entry.cuts.values() if isinstance(cut, Slab)}
    assert len(slabs) >= 8
    weight = tile4(weight4(6144, 4096)) if kind == "4bit" else tile8(weight8(6144, 4096))
    for slab in slabs:
        x = torch.randn(3 * slab.rows - 5, 4096, device="cuda", dtype=torch.bfloat16)
        expected = wide_product(x, weight, None, slab)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [wide_product(x, weight, None, slab) for _ in range(16)]
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(250):
            for out in found:
                out.fill_(torch.nan)
            graph.replay()
            for out in found:
                wrong += (out != expected).any()
        assert int(wrong) == 0, slab


@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_under_cuda_graphs_and_compile(kind: Format) -> None:
    from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8, Saved4

    weight = weight_of(kind, 512, 1024)
    module: nn.Module = (
        QuantLinear8(weight, None)
        if isinstance(weight, Weight8)
        else QuantLinear4(weight, None, torch.bfloat16, Saved4("nf4", torch.bfloat16))
    )
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    expected = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, module(x))
    assert not torch.equal(out, expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: module(y) * 2, fullgraph=True)
    assert torch.equal(compiled(x), module(x) * 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one() -> None:
    from deployments.engine.kernels.modules import QuantLinear8

    weight = tile8(weight8(512, 1024))
    there = torch.device("cuda", 1)
    module = QuantLinear8(Weight8(512, 1024, weight.packed.to(there), weight.absmax.to(there)), None)
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(module(x.to(there)).cpu(), product(x, weight).cpu())


def test_growing_the_workspace_under_capture_is_refused() -> None:
    from deployments.engine.kernels import workspace

    have = workspace.prepare(torch.device("cuda")).buffer.numel()
    if have >= workspace.BUFFER_BYTES:
        pytest.skip("the buffer has its largest size already")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"), torch.cuda.graph(graph):
        workspace.prepare(torch.device("cuda"), have + 1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(512, 1024), nn.Linear(512, 1024), nn.Linear(1024, 512)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "nf4 nested", "int8"])
def test_in_place_of_bitsandbytes(quantization: str) -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    from deployments.engine.kernels.fuse import fuse_linears
    from deployments.engine.kernels.modules import replace_linears

    torch.manual_seed(0)
    model = Mlp().bfloat16()
    for name, linear in list(model.named_children()):
        assert isinstance(linear, nn.Linear)
        new: Any
        if quantization == "int8":
            new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, True, False, threshold=0.0)
        else:
            kind, _, nested = quantization.partition(" ")
            new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, True, torch.bfloat16, bool(nested), kind)
        new.load_state_dict(linear.state_dict())
        setattr(model, name, new.bfloat16() if quantization != "int8" else new)
    model = model.cuda()
    model.requires_grad_(False)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(9, 512, device="cuda", dtype=torch.bfloat16)
    theirs = model(x).double()
    assert replace_linears(model) == 3
    ours = model(x).double()
    bound = 3e-2 if quantization == "int8" else 1e-2  # LLM.int8() quantises activations too
    assert error(ours, theirs) < bound
    assert fuse_linears(model) == 1
    assert error(model(x), ours) < 1e-2
    after = model.state_dict()
    assert after.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(after[name], tensor), name


def test_tuning_is_kept_and_read(tmp_path: Path) -> None:
    from deployments.engine.kernels.launch import table_of
    from deployments.engine.kernels.modules import QuantLinear8
    from deployments.engine.kernels.tune import tune

    model = nn.Sequential(QuantLinear8(tile8(weight8(1024, 1024)), None))
    try:
        table = tune(model, tmp_path)
        path = tmp_path / config.file_name(torch.cuda.get_device_name())
        assert config.parse_table(json.loads(path.read_text(encoding="utf-8"))) == table
        assert table_of(torch.device("cuda")).knows("8bit", 1024, 1024)
        written = path.stat().st_mtime_ns
        assert tune(model, tmp_path) == table
        assert path.stat().st_mtime_ns == written
    finally:
        config._tuned.clear()
        config.table_for.cache_clear()
