"""Kernels by CUDA's driver, which launches them in clusters of blocks and while the kernel before ends."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Argument = ctypes.c_void_p | ctypes.c_int | ctypes.Array[ctypes.c_char]
"""Of a kernel: a tensor's address, a number, or a tensor map."""


def load(name: str, shared: int, make: Callable[..., bytes]) -> ctypes.c_void_p:
    """The kernel `name` on the current device.

    Args:
        shared: bytes of dynamic shared memory of a block, at most.
        make: gives the cubin; with `anew=True` one that was not kept on disk.

    Raises:
        RuntimeError: the driver refuses it; with its words.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    driver = _driver()
    if status := driver.cuModuleLoadData(ctypes.byref(module), make()):
        log.warning("a kernel does not load (%d) and is compiled again, for what was kept may be damaged", status)
        _check(driver.cuModuleLoadData(ctypes.byref(module), make(anew=True)))
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    _check(driver.cuFuncSetAttribute(function, 8, shared))  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return function


def launch(
    kernel: ctypes.c_void_p,
    blocks: int,
    threads: int,
    cluster: int,
    shared: int,
    arguments: Sequence[Argument],
) -> None:
    """On the current stream; blocks may start while the kernel before ends (programmatic dependent launch).

    Args:
        blocks: a multiple of `cluster`, the blocks of a cluster.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
    """
    clusters = _Attribute(4, 0, (cluster, 1, 1))  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    early = _Attribute(6, 0, (1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attributes = (_Attribute * 2)(early, clusters)
    stream = torch.cuda.current_stream().cuda_stream
    config = _Config((blocks, 1, 1), (threads, 1, 1), shared, stream, attributes, 2 if cluster > 1 else 1)
    values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
    _check(_driver().cuLaunchKernelEx(ctypes.byref(config), kernel, values, None))


def tensor_map(x: Tensor, rows: int) -> ctypes.Array[ctypes.c_char]:
    """x [any number, k] of a 16-bit type, for tensor copies of 64 columns of `rows` rows, swizzled by 128 bytes.

    Args:
        x: its rows begin at multiples of 16 bytes.
    """
    buffer = ctypes.create_string_buffer(_MAP_BYTES + 64)
    skipped = -ctypes.addressof(buffer) % 64  # the driver wants it so
    encoded = (ctypes.c_char * _MAP_BYTES).from_buffer(buffer, skipped)
    sizes, box = (ctypes.c_uint64 * 2)(x.shape[1], x.shape[0]), (ctypes.c_uint32 * 2)(64, rows)
    stride, steps = (ctypes.c_uint64 * 1)(x.stride(0) * x.itemsize), (ctypes.c_uint32 * 2)(1, 1)
    # 16-bit numbers of two dimensions; not interleaved, swizzled by 128 bytes (3), fetched by 256 (3), 0 outside (0)
    _check(
        _driver().cuTensorMapEncodeTiled(
            encoded, 1, 2, ctypes.c_void_p(x.data_ptr()), sizes, stride, box, steps, 0, 3, 3, 0
        )
    )
    return encoded


_MAP_BYTES = 128


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


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA's driver: {(text.value or b'unknown error').decode()} ({status})")
