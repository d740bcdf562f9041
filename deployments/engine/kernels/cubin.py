"""CUDA kernels, compiled when they are first used by NVRTC, which comes with PyTorch, and kept in the state folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from deployments.home import state_folder
from deployments.once import write_whole

log = logging.getLogger(__name__)


def compiled(name: str, macros: Mapping[str, int], architecture: str, *, anew: bool = False) -> bytes:
    """The kernel of `tiles.cuh` and `<name>.cu` as a cubin, or as it was kept by an earlier start.

    Args:
        architecture: of the GPU, such as sm_90a.
        anew: compile it in any case, and keep that.

    Raises:
        RuntimeError: NVRTC is missing or can't compile the kernel; with its words.
    """
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
    source = b"".join(Path(__file__).with_name(file).read_bytes() for file in ("tiles.cuh", f"{name}.cu"))
    digest = hashlib.sha256(source + "\0".join((torch.version.cuda or "", *options)).encode()).hexdigest()[:32]
    path = state_folder() / "kernels" / f"{name}-{digest}.cubin"
    if not anew and (kept := _kept(path)):
        return kept
    cubin = _compile(name, source, options)
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


def _compile(name: str, source: bytes, options: list[str]) -> bytes:
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, f"{name}.cu".encode(), 0, None, None)
    encoded = [option.encode() for option in options]
    if nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        raise RuntimeError(f"NVRTC could not compile {name}.cu with {' '.join(options)}:\n{text.value.decode()}")
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
