"""What surrounds the CUDA kernels: kept binaries that are damaged or can't be read, and x that is not aligned."""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.engine.kernels import cubin, driver, skinny, wide
from deployments.engine.kernels.cut import Cut
from deployments.engine.kernels.slab import Slab
from deployments.engine.kernels.weights import Nested, Weight4, Weight8

CUT = Cut(1, 1, 4, 4, 2)
FORMAT = {"BITS": 4, "HALF": 0, "PER_SCALE": 1, "NESTED": 0}
GOOD = b"a kernel"


@pytest.fixture(autouse=True)
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The options of each compilation."""
    calls: list[list[str]] = []

    def compile_it(name: str, source: bytes, options: list[str]) -> bytes:
        assert f" {name}(".encode() in source
        assert source.startswith(b"// What the kernels over tiled weights share")
        calls.append(options)
        return GOOD

    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    monkeypatch.setattr(cubin, "_compile", compile_it)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return calls


@pytest.fixture(autouse=True)
def no_kernels() -> Iterator[None]:
    kernel = skinny._kernel
    kernel.cache_clear()
    yield
    kernel.cache_clear()


def compiled() -> bytes:
    return cubin.compiled("skinny", skinny.macros(CUT, 1, FORMAT), skinny.architecture())


def test_a_kernel_is_compiled_once_and_kept(compiler: list[list[str]], tmp_path: Path) -> None:
    assert compiled() == compiled() == GOOD
    assert len(compiler) == 1
    assert "--gpu-architecture=sm_90" in compiler[0]
    (path,) = (tmp_path / "kernels").iterdir()
    assert path.read_bytes() == GOOD


def test_an_empty_one_is_compiled_again(compiler: list[list[str]], tmp_path: Path) -> None:
    compiled()
    (path,) = (tmp_path / "kernels").iterdir()
    path.write_bytes(b"")
    assert compiled() == path.read_bytes() == GOOD
    assert len(compiler) == 2


def test_one_that_cannot_be_read_is_compiled_again(
    compiler: list[list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled()
    (path,) = (tmp_path / "kernels").iterdir()
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert compiled() == GOOD
    assert len(compiler) == 2
    assert f"{path} can't be read" in caplog.text
    assert f"{path} can't be written" in caplog.text


def kernel(monkeypatch: pytest.MonkeyPatch, *, loads: bool) -> None:
    def load(_module: Any, cubin: bytes) -> int:
        return 0 if loads and cubin == GOOD else 200

    def describe(_status: int, _text: Any) -> int:
        return 0

    cuda = SimpleNamespace(
        cuModuleLoadData=load,
        cuModuleGetFunction=lambda *_: 0,
        cuFuncSetAttribute=lambda *_: 0,
        cuGetErrorString=describe,
    )
    monkeypatch.setattr(driver, "_driver", lambda: cuda)
    skinny._kernel(torch.device("cpu"), CUT, 1, tuple(FORMAT.items()), 1024)


def test_one_that_does_not_load_is_compiled_again(
    compiler: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled()
    (path,) = (tmp_path / "kernels").iterdir()
    path.write_bytes(GOOD[:4])
    kernel(monkeypatch, loads=True)
    assert len(compiler) == 2
    assert path.read_bytes() == GOOD


def test_one_that_never_loads_is_an_error(compiler: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA's driver: .*\(200\)"):
        kernel(monkeypatch, loads=False)
    assert len(compiler) == 2, "once more, not for ever"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each."""
    seen: list[Any] = []
    monkeypatch.setattr(skinny, "_kernel", lambda *_: ctypes.c_void_p())
    monkeypatch.setattr(wide, "_kernel", lambda *_: ctypes.c_void_p())
    monkeypatch.setattr(driver, "launch", lambda *arguments: seen.append(arguments[-1]))
    monkeypatch.setattr(driver, "tensor_map", lambda x, _rows: ctypes.c_void_p(x.data_ptr()))
    return seen


def parameters(name: str) -> list[str]:
    source = Path(cubin.__file__).with_name(f"{name}.cu").read_text(encoding="utf-8")
    found = re.search(rf"\) {name}\((.*?)\) {{", re.sub(r"/\*.*?\*/", "", source), re.DOTALL)
    assert found is not None
    return [parameter.split()[-1] for parameter in found[1].split(",")]


def test_a_launch_has_the_kernels_parameters(launches: list[Any]) -> None:
    nested = Nested(torch.rand(1), torch.rand(256), torch.rand(2))
    packed, scales = torch.zeros(4, 2, 128, dtype=torch.int32), torch.zeros(2, 64, dtype=torch.uint8)
    weight, x = Weight4(64, 128, 64, packed, scales, torch.rand(16), nested), torch.zeros(3, 128, dtype=torch.bfloat16)
    skinny.skinny_product(x, weight, None, CUT)
    wide.wide_product(x, weight, None, Slab(32, 4, 1))
    tensors = {"tiles": packed, "absmax": scales, "code": weight.code}
    tensors |= {"nested_absmax": nested.absmax, "nested_code": nested.code, "offset": nested.offset}
    for name, arguments in zip(("skinny", "wide"), launches, strict=True):
        given = {key: argument.value for key, argument in zip(parameters(name), arguments, strict=True)}
        assert {key: given[key] for key in tensors} == {key: tensor.data_ptr() for key, tensor in tensors.items()}
        numbers = {"offset_rows": 32, "rows": 3, "n": 64, "columns": 2, "bias": None}
        assert {key: given[key] for key in numbers} == numbers


def test_x_that_is_not_aligned_is_copied(monkeypatch: pytest.MonkeyPatch, launches: list[Any]) -> None:
    weight = Weight8(64, 128, torch.zeros(4, 2, 256, dtype=torch.int32), torch.ones(64))
    whole = torch.arange(2 * 128 + 8).to(torch.bfloat16)
    kept: list[torch.Tensor] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda *args, **kwargs: kept.append(clone(*args, **kwargs)) or kept[-1])
    aligned, shifted = whole[8:].view(2, 128), whole[1:257].view(2, 128)
    for x in (aligned, shifted):
        skinny.skinny_product(x, weight, None, CUT)
        wide.wide_product(x, weight, None, Slab(32, 4, 1))
    assert shifted.is_contiguous()
    seen = [arguments[0].value for arguments in launches]
    assert seen[:2] == [aligned.data_ptr()] * 2
    assert seen[2:] == [copy.data_ptr() for copy in kept]
    assert len(kept) == 2
    assert all(copy.data_ptr() % 16 == 0 and torch.equal(copy, shifted) for copy in kept)


def test_the_wide_kernel_is_compiled_for_its_slab_and_operands(compiler: list[list[str]]) -> None:
    slab = Slab(64, 4, across=2, along=1, cluster=2, slots=5, buffers=1)
    assert cubin.compiled("wide", slab.macros() | FORMAT, "sm_90a") == GOOD
    assert compiler[0][0] == "--gpu-architecture=sm_90a"
    assert {"-DROWS=64", "-DACROSS=2", "-DBUFFERS=1", "-DTHREADS=256", "-DBITS=4"} <= set(compiler[0])
