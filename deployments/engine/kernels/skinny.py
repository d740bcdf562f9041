"""Products of a few rows with a tiled weight by the CUDA kernel of `skinny.cu`. Needs a GPU of capability 9.0 or above.

The kernel is compiled by NVRTC, which comes with PyTorch, when a shape is first used, and kept in the state folder.
It is launched through CUDA's driver, for clusters and for programmatic dependent launch: blocks start, and
read weights, while the kernel before ends.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from deployments.engine.kernels.cut import GROUPS, Cut, groups_of
from deployments.engine.kernels.weights import Weight4, Weight8
from deployments.home import state_folder
from deployments.once import write_whole

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("skinny.cu")


def skinny_product(x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None, cut: Cut) -> Tensor:
    """x [rows, k] times a tiled weight, plus bias [n] -> [rows, n] in x's dtype. At most `MOST_ROWS` rows.

    Raises:
        RuntimeError: NVRTC is missing or can't compile the kernel, or the driver refuses it; with its words.
    """
    rows, n, k = x.shape[0], weight.n, weight.k
    if x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # `contiguous` would keep one that is not aligned
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    groups = groups_of(rows)
    bits, nested, per_scale = 8, None, 1
    if isinstance(weight, Weight4):
        bits, nested, per_scale = 4, weight.nested, weight.blocksize // 64
    shared = cut.shared_bytes(k, bits, groups)
    kernel = _kernel(x.device, cut, bits, groups, x.dtype == torch.float16, per_scale, nested is not None, shared)
    code = weight.code if isinstance(weight, Weight4) else None
    extra = (None, None, None) if nested is None else (nested.absmax, nested.code, nested.offset)
    pointers = (x, weight.packed, weight.absmax, *extra, code, bias, out)
    numbers = (rows, n, k // 64, x.stride(0), cut.row_bytes(k))
    addresses = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in pointers]
    _launch(kernel, cut.blocks(n), cut, shared, [*addresses, *map(ctypes.c_int, numbers)])
    return out


@cache
def _kernel(
    _device: torch.device, cut: Cut, bits: int, groups: int, half: bool, per_scale: int, nested: bool, shared: int
) -> ctypes.c_void_p:
    """Loaded on the current device, which `_device` names: each has kernels of its own."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    driver = _driver()
    make = partial(compiled, cut, bits, groups, half=half, per_scale=per_scale, nested=nested)
    if status := driver.cuModuleLoadData(ctypes.byref(module), make()):
        log.warning("a kernel does not load (%d) and is compiled again, for what was kept may be damaged", status)
        _check(driver.cuModuleLoadData(ctypes.byref(module), make(anew=True)))
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, b"skinny"))
    _check(driver.cuFuncSetAttribute(function, 8, shared))  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return function


def compiled(
    cut: Cut, bits: int, groups: int, *, half: bool, per_scale: int, nested: bool, anew: bool = False
) -> bytes:
    """The kernel for the current GPU, or as it was kept by an earlier start.

    Args:
        groups: of 8 rows of x that a launch computes.
        half: float16, not bfloat16.
        per_scale: 64-column blocks that share a 4-bit scale.
        nested: 4-bit scales are double-quantised.
        anew: compile it in any case, and keep that.
    """
    macros = {
        **{name.upper(): value for name, value in asdict(cut).items()},
        "BITS": bits, "GROUPS": groups, "ROUNDED": int(groups == GROUPS[-1]), "HALF": int(half),
        "PER_SCALE": per_scale, "NESTED": int(nested),
    }  # fmt: skip
    major, minor = torch.cuda.get_device_capability()
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
    source = SOURCE.read_bytes()
    name = hashlib.sha256(source + "\0".join((torch.version.cuda or "", *options)).encode()).hexdigest()[:32]
    path = state_folder() / "kernels" / f"skinny-{name}.cubin"
    if not anew and (kept := _kept(path)):
        return kept
    cubin = _compile(source, options)
    _keep(path, cubin)
    return cubin


def _kept(path: Path) -> bytes:
    """Empty where there is none, or none that can be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        log.warning("a kernel is compiled again: %s can't be read (%s)", path, error.strerror)
        return b""


def _keep(path: Path, cubin: bytes) -> None:
    try:
        write_whole(path, cubin)
    except OSError as error:
        log.warning("a compiled kernel is not kept: %s can't be written (%s); set HEADROOM_HOME", path, error.strerror)


def _compile(source: bytes, options: list[str]) -> bytes:
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"skinny.cu", 0, None, None)
    encoded = [option.encode() for option in options]
    if nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        raise RuntimeError(f"NVRTC could not compile {SOURCE.name} with {' '.join(options)}:\n{text.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


@cache
def _nvrtc() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    folders = [Path(folder) / "nvidia" for folder in sys.path]
    found = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
    for candidate in (name, *found):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise RuntimeError(
        f"{name} was not found beside PyTorch; install the package nvidia-cuda-nvrtc of its CUDA version"
    )


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


def _launch(
    kernel: ctypes.c_void_p, blocks: int, cut: Cut, shared: int, arguments: list[ctypes.c_void_p | ctypes.c_int]
) -> None:
    cluster = _Attribute(4, 0, (cut.cluster, 1, 1))  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    early = _Attribute(6, 0, (1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attributes = (_Attribute * 2)(early, cluster)
    stream = torch.cuda.current_stream().cuda_stream
    config = _Config((blocks, 1, 1), (cut.threads, 1, 1), shared, stream, attributes, 2 if cut.cluster > 1 else 1)
    values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
    _check(_driver().cuLaunchKernelEx(ctypes.byref(config), kernel, values, None))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA's driver: {(text.value or b'unknown error').decode()} ({status})")
