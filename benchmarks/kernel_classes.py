"""What a kernel of a step is for, by its name: for `engine_throughput --profile` and for `trace_picture`."""

from __future__ import annotations

_CLASSES = (
    ("fused elementwise", ("triton_",)),  # their names hold those of the operators around them
    ("KV append", ("index_copy", "index_elementwise", "AppendPagedKV", "append_paged")),
    ("attention", ("flashinfer", "attend_kernel", "fmha", "flash_", "MergeStates", "BatchPrefill", "BatchDecode")),
    ("GEMM", ("gemm", "nvjet", "cutlass", "cublas", "splitK", "gemv", "wgmma", "linear_")),
    ("dequantise", ("Dequantize", "dequant")),
    ("sampling", ("argmax", "ArgMax", "reduce_kernel", "softmax", "topk", "sort")),
    ("copies", ("Memcpy", "Memset", "copy_kernel", "direct_copy")),
)
"""Kernel classes, by a part of the kernel's name; the first that matches counts."""

_PRODUCTS = ("skinny", "wide")
"""This project's CUDA kernels, by their whole name."""
OTHER = "other"
CLASSES = (*(name for name, _ in _CLASSES), OTHER)
"""All of them."""


def kernel_class(kernel: str) -> str:
    """One of `CLASSES`."""
    if kernel in _PRODUCTS:
        return "GEMM"
    return next((name for name, parts in _CLASSES if any(part in kernel for part in parts)), OTHER)
