"""FlashInfer's paged attention kernels: how they are compiled, planned and run.

The only file that knows FlashInfer's functions, those of version 0.6.14. They are called below FlashInfer's wrapper
classes: a wrapper is bound to one batch size and to one pinned buffer, keeps 16 MB for itself and uploads its own
tables, so that with wrappers neither could a step's uploads be one copy nor its plan serve the stages on other GPUs.

A decode of few query heads per KV head runs on CUDA cores. With `TENSOR_CORE_GROUP` or more it runs as a prefill of one
row per sequence, on tensor cores, where the group's heads fill a tile. In a step with chunks decodes are one call, and
chunks another. Decodes of most kinds of layers are not FlashInfer's: `attention_decodes` has a kernel for them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deployments.engine import attention_decodes
from deployments.engine.attention_tables import Shape, Tables
from deployments.engine.flashinfer_fit import (
    TENSOR_CORE_GROUP,
    Kind,
    Method,
    Room,
    dtype_name,
    fills,
    split_limit,
    tile_of,
)
from deployments.errors import ConfigError
from deployments.home import state_folder

log = logging.getLogger(__name__)

_NHD, _NO_ROTARY, _EVERY_KEY, _CAUSAL = 0, 0, 0, 1
"""FlashInfer's codes: of the blocks' layout, of positions encoded in the kernel, and of masks."""
_TILE_COUNT, _FIRST_ROWS = 0, 8
"""Where a prefill's plan has these: `padded_batch_size`, and the offset of `o_indptr`."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Workspace:
    """Buffers of one kind on one device. Steps follow each other on one stream, so they share them."""

    floats: Tensor
    ints: Tensor


@dataclass(frozen=True)
class Planned:
    """How a kind's kernel runs one step."""

    method: Method
    mask: int
    info: Sequence[int]
    """FlashInfer's: sizes, and offsets into the workspace."""


OWN = Planned("own", _EVERY_KEY, ())
"""Of what `attend_decodes` runs."""


@dataclass(frozen=True)
class Call:
    """What a layer's attention runs with, beside its tensors."""

    kind: Kind
    planned: Planned
    tables: Tables
    """On the device."""
    space: Workspace
    scale: float
    splits: int
    """Of decodes' keys, beyond one for each; those of FlashInfer's kernels are in its plan."""


class FlashInferKernels:
    """The kernels on one device.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        _import()
        properties = torch.cuda.get_device_properties(device)
        self._sms: int = properties.multi_processor_count
        self._dependent_launch = properties.major >= 9
        self._own = attention_decodes.can_compile()
        if not self._own:
            log.warning("decodes run on FlashInfer's kernels, which are slower: Triton needs gcc or CC")
        self._arrivals = attention_decodes.counters(device)
        self._floats = lru_cache(maxsize=64)(lambda kind: self.room(kind, sequences=1, rows=1).floats)
        self.model: Hashable = (properties.name, self._sms)
        """Devices of one model can share plans."""

    def room(self, kind: Kind, *, sequences: int, rows: int) -> Room:
        """See `Room.of`."""
        return Room.of(kind, self._sms, sequences=sequences, rows=rows)

    def compile(self, kinds: Iterable[Kind], progress: Progress) -> None:
        """Load the kernels of `kinds`, compiled where the cache has none; `progress` hears of each.

        Raises:
            ConfigError: a kernel does not compile.
        """
        jobs: dict[str, Callable[[], object]] = {}
        for kind in kinds:
            jobs |= _builds(kind)
        progress(f"FlashInfer: loading {len(jobs)} kernels; one that is new takes about a minute to compile, once")
        began = time.monotonic()
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            names = {pool.submit(build): name for name, build in jobs.items()}
            for done, future in enumerate(as_completed(names), start=1):
                if (error := future.exception()) is not None:
                    raise ConfigError(_reason(names[future], error)) from error
                seconds = time.monotonic() - began
                progress(f"FlashInfer: kernel {done} of {len(jobs)} ready after {seconds:.0f} s ({names[future]})")

    def plan(self, kind: Kind, host: Tables, block_size: int, space: Workspace, pinned: Tensor) -> Planned:
        """Distribute a step over the device: work on the host, and a copy of `pinned` to `space` on the current
        stream. `pinned` may be written again only after that copy.

        All steps of as many decodes get the same `info`, so that a captured graph stays true.

        Args:
            host: the step's tables, in host memory.
            pinned: uint8, of the size of `space.ints`.
        """
        decodes = host.shape.decodes
        buffers = (space.floats, space.ints, pinned)
        if kind.method(decodes=decodes) == "decode":
            return Planned("decode", _EVERY_KEY, self._plan_decode(kind, host, block_size, buffers))
        mask = _EVERY_KEY if decodes else _CAUSAL
        return Planned("prefill", mask, self._plan_prefill(kind, host, block_size, buffers))

    def takes_decodes(self, kind: Kind, shape: Shape, splits: int) -> bool:
        """Whether sequences of one row are left to `attend_decodes`, and need no plan."""
        if not self._own or not attention_decodes.takes(kind, shape):
            return False
        return attention_decodes.space_bytes(kind, shape.sequences, splits) <= self._floats(kind)

    def attend_decodes(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        """`append` and `run` in one. Can be captured."""
        attention_decodes.attend(
            *(query, key, value, keys, values, out, call.tables),
            scale=call.scale,
            splits=call.splits,
            space=call.space.floats,
            arrivals=self._arrivals,
            overlap=self._dependent_launch,
        )

    def _plan_decode(self, kind: Kind, host: Tables, block_size: int, buffers: tuple[Tensor, ...]) -> Sequence[int]:
        info: Sequence[int] = _decode_module(kind).plan(
            *buffers,
            host.page_starts,
            host.shape.sequences,
            kind.heads,
            kind.kv_heads,
            block_size,
            True,  # captured
            kind.window_left,
            kind.softcap or 0.0,
            kind.head_dim,
            kind.head_dim,
            torch.empty(0, dtype=kind.dtype),
            torch.empty(0, dtype=kind.kv_dtype),
        )
        return info

    def _plan_prefill(self, kind: Kind, host: Tables, block_size: int, buffers: tuple[Tensor, ...]) -> Sequence[int]:
        shape = host.shape
        parts = self._fill_captured(kind, shape, buffers[2]) if shape.captured else None
        info: Sequence[int] = _prefill_module(kind).plan(
            *buffers,
            host.query_starts,
            host.page_starts,
            host.lengths,
            shape.rows,
            shape.sequences,
            kind.heads,
            kind.kv_heads,
            block_size,
            shape.captured or (shape.decodes and not fills(kind, self._sms, shape)),
            kind.head_dim,
            kind.head_dim,
            not shape.decodes,
            kind.window_left,
            -1,  # parts of a size that fits the device
            shape.captured,  # whether no sequence may be split: in a graph it would take room for all that might be
            0,
        )
        if parts is not None and info[_TILE_COUNT] != parts:
            raise RuntimeError(f"FlashInfer plans {info[_TILE_COUNT]} parts for {shape}, and {parts} were expected")
        if shape.captured and shape.before:
            self._shift_output(shape, info[_FIRST_ROWS], *buffers[1:])
        return info

    def _shift_output(self, shape: Shape, offset: int, ints: Tensor, pinned: Tensor) -> None:
        """Let each sequence's output begin behind the rows before the plan's, which FlashInfer counts from 0.

        The plan's copy may still be under way and take old or new values: one behind it takes the new ones.
        """
        place = slice(offset, offset + 4 * (shape.sequences + 1))
        pinned[place].view(torch.int32).add_(shape.before)
        ints[place].copy_(pinned[place], non_blocking=True)

    def _fill_captured(self, kind: Kind, shape: Shape, pinned: Tensor) -> int:
        """Let the plan's unused entries name the first part of the last sequence, which has no rows.

        The kernel starts a block of threads for each part that a graph's steps might have, and without splits it has
        no list of those that this step has: it would run on what an earlier plan left there.

        Returns:
            How many parts there might be. Their sequences are what the plan begins with.
        """
        tile = tile_of((shape.rows - shape.sequences + 1) * kind.group, kind.head_dim)
        parts = max(split_limit(kind, self._sms), -(-shape.rows * kind.group // tile) + shape.sequences - 1)
        pinned.zero_()
        pinned[: 4 * parts].view(torch.int32).fill_(shape.sequences - 1)
        return parts

    def append(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, tables: Tables) -> None:
        """Write rows [T, kv_heads, head_dim] to the blocks, in one kernel."""
        from flashinfer.page import append_paged_kv_cache

        append_paged_kv_cache(
            key,
            value,
            tables.row_sequences,
            tables.positions,
            (keys, values),
            tables.pages,
            tables.page_starts,
            tables.last_page_tokens,
        )

    def run(self, call: Call, query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Attend over the blocks with the rows that the call's tables name. Can be captured.

        Args:
            query: [T, heads, head_dim], all rows of the step.
            out: [T, heads, head_dim]; the call's rows are written.
        """
        kind, planned, tables, space = call.kind, call.planned, call.tables, call.space
        if not (shape := tables.shape).captured:  # there the plan knows where the rows begin
            end = shape.before + shape.rows
            query, out = query[:end], out[shape.before : end]
        pages = (tables.page_starts, tables.pages, tables.last_page_tokens)
        workspace = (space.floats, space.ints, planned.info)
        softcap = kind.softcap or 0.0
        rope_scale, rope_theta = 1.0, 1e4  # read by kernels that encode positions, which these do not
        if planned.method == "decode":
            _decode_module(kind).run(
                *(*workspace, query, keys, values, *pages, out, None),
                *(_NHD, kind.window_left, self._dependent_launch, None, softcap, call.scale, rope_scale, rope_theta),
            )
        else:
            _prefill_module(kind).paged_run(
                *(*workspace, query, keys, values, tables.query_starts, *pages, out, None),
                *(planned.mask, _NHD, kind.window_left, self._dependent_launch),
                *(None, None, None, None, None, None),  # masks, slopes and items of other variants
                *(softcap, call.scale, None, None, None, rope_scale, rope_theta),
                *(0, space.floats.nbytes),
            )


def _import() -> None:
    """Import FlashInfer, its cache of compiled kernels in Headroom's state folder."""
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(state_folder()))
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "warning")
    import flashinfer  # noqa: F401 - for its cache folder, which it reads once, here


def _builds(kind: Kind) -> dict[str, Callable[[], object]]:
    """What loads the modules that `kind` needs, by a name to show."""
    from flashinfer.page import get_page_module

    extras = [name for name, there in (("window", kind.window), ("soft cap", kind.softcap)) if there is not None]
    kv = [] if kind.kv_dtype == kind.dtype else [f"KV {dtype_name(kind.kv_dtype)}"]
    suffix = ", ".join([f"head size {kind.head_dim}", dtype_name(kind.dtype), *kv, *extras])
    builds: dict[str, Callable[[], object]] = {
        "append": get_page_module,
        f"prefill, {suffix}": lambda: _prefill_module(kind),
    }
    if kind.group < TENSOR_CORE_GROUP:
        builds[f"decode, {suffix}"] = lambda: _decode_module(kind)
    return builds


def _prefill_module(kind: Kind) -> Any:
    from flashinfer.prefill import get_batch_prefill_module

    return get_batch_prefill_module("fa2", *_variant(kind), False)


def _decode_module(kind: Kind) -> Any:
    from flashinfer.decode import get_batch_decode_module

    return get_batch_decode_module(*_variant(kind))


def _variant(kind: Kind) -> tuple[Any, ...]:
    """What FlashInfer compiles a module for; it keeps loaded modules by these."""
    dtypes = (kind.dtype, kind.kv_dtype, kind.dtype, torch.int32)
    flags = (kind.window is not None, kind.softcap is not None)
    return (*dtypes, kind.head_dim, kind.head_dim, _NO_ROTARY, *flags)


def _reason(name: str, error: BaseException) -> str:
    lines = " ".join(str(error).split())
    return (
        f"FlashInfer's kernel ({name}) does not compile here: {lines[-600:]}; "
        "it needs nvcc and ninja of a CUDA release that fits PyTorch's; without flashinfer-python, attention runs on "
        "PyTorch's own operators"
    )
