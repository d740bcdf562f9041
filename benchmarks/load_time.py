"""How long a checkpoint takes to load, against reading its files: `python -m benchmarks.load_time`.

    python -m benchmarks.load_time                                      8B shape in NF4, int8 and bf16, one GPU
    python -m benchmarks.load_time --quantization nf4 --rounds 3
    python -m benchmarks.load_time --shape tiny --quantization bf16     on the CPU, to try it

Of each quantisation the least of `--rounds`, read and loaded by turns, cold and then from the page cache; each read and
load is printed as it is done. The goal is for cold files: loaded within 1.5 times the time to read them. Exit code 1
where it is missed, or where the files can't be shown to be cold: the kernel is asked which of their pages it still has.
What a disk or a virtual machine's host caches by itself is not seen; GB/s tell.

- Read: the safetensors files one after the other, by one thread, in blocks of 16 MiB into one buffer.
- Loaded: the engine's own `load` of what a pool with that quantisation plans here, each time in a process of its own.
  It ends with stages whose bytes and logits are verified. Kernels that it loads count; the imports before it, CUDA's
  context, tuning, and `torch.compile` and graphs after it do not. One load is not counted: kernels that are new are
  compiled in it. Lines of the loader's own say how much was read ahead, and how long each part of a load took.

On the CPU weights in 16 bits stay mapped, and the probe's first forward brings their pages: it runs there to be tried.
Quantised ones are refused: they are quantised once, and what loads is a copy of other files (decision 0002).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.arguments import positive
from benchmarks.checkpoint import FOLDER, SHAPES, write
from benchmarks.page_cache import drop, resident
from deployments.engine.loader import load, quantised_already, quantization_config
from deployments.engine.messages import EngineSpec
from deployments.engine.process import limits_of
from deployments.engine.read_ahead import reading_ahead
from deployments.errors import ConfigError
from deployments.home import state_folder
from deployments.planning import plan_pool
from deployments.settings import PoolSettings, Quantization

GOAL = 1.5
_BLOCK_BYTES = 16 * 2**20
_COLD, _CACHED = 0.01, 0.99
"""Most of the files that may be in the page cache for cold, and least that must be."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One read, or one load."""

    seconds: float
    resident: float
    """Share of the files in the page cache before it, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Found:
    """Reads and loads of one quantisation, all cold or all from the page cache."""

    quantization: str
    cold: bool
    size: int
    """Bytes of the files."""
    reads: tuple[Taken, ...]
    loads: tuple[Taken, ...]

    @property
    def ratio(self) -> float:
        """Time to load over time to read."""
        return _least(self.loads) / _least(self.reads)

    @property
    def met(self) -> bool:
        """Whether the goal is; never where the files were not shown to be cold, and always where there is none."""
        return not self.cold or (self._as_asked() and self.ratio <= GOAL)

    def __str__(self) -> str:
        parts = (_pace("read", self.size, _least(self.reads)), _pace("loaded", self.size, _least(self.loads)))
        return f"{self.quantization}, {self._where()}: {', '.join(parts)}: {self.ratio:.2f} times{self._verdict()}"

    def _where(self) -> str:
        if self._as_asked():
            return "cold" if self.cold else "page cache"
        shares = [taken.resident for taken in (*self.reads, *self.loads)]
        if self.cold:
            return f"not shown to be cold ({100 * max(shares):.0f} % of the files stayed in the page cache)"
        return f"page cache (which had only {100 * min(shares):.0f} % of the files)"

    def _verdict(self) -> str:
        if not self.cold:
            return ""
        return f", goal {GOAL}: {('met' if self.met else 'missed') if self._as_asked() else 'not judged'}"

    def _as_asked(self) -> bool:
        taken = (*self.reads, *self.loads)
        return all(t.resident <= _COLD if self.cold else t.resident >= _CACHED for t in taken)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; exit code 1 where a goal is missed, or can't be judged."""
    options = _arguments().parse_args(argv)
    print(f"the checkpoint is kept in {options.folder}, and written first where it is not there yet", flush=True)
    folder = _apart(write, options.shape, options.folder)
    met = True
    try:
        for quantization in options.quantization:
            pool = PoolSettings(quantization=quantization, stages=options.stages)
            for found in _measure(folder, pool, options.rounds):
                print(found, flush=True)
                met = met and found.met
    except ConfigError as error:
        sys.exit(str(error))
    return 0 if met else 1


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Loading a checkpoint, against reading its files.")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the checkpoint is kept")
    parser.add_argument(
        "--quantization",
        type=_quantizations,
        default="nf4,int8,bf16",
        help="of a pool; one or several, with commas between",
    )
    parser.add_argument("--stages", type=positive, default=1, help="GPUs of the replica")
    parser.add_argument("--rounds", type=positive, default=2, help="of which the least counts")
    return parser


def _quantizations(text: str) -> list[str]:
    there, asked = ("auto", *get_args(Quantization)), text.split(",")
    if unknown := [name for name in asked if name not in there]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; there are {', '.join(there)}")
    return asked


def _measure(folder: Path, pool: PoolSettings, rounds: int) -> Iterator[Found]:
    """Cold first: what that reads is in the page cache then."""
    files = _files(folder)
    size = sum(path.stat().st_size for path in files)
    print(f"\n{pool.quantization}: files of {size / 1e9:.2f} GB; the first load does not count", flush=True)
    _shown("loaded", False, size, _apart(loaded, folder, pool, False))
    taken: dict[bool, list[tuple[Taken, Taken]]] = {True: [], False: []}
    for _ in range(rounds):
        for cold, pairs in taken.items():
            done = _shown("read", cold, size, read(files, cold))
            pairs.append((done, _shown("loaded", cold, size, _apart(loaded, folder, pool, cold))))
    for cold, pairs in taken.items():
        reads, loads = zip(*pairs, strict=True)
        yield Found(pool.quantization, cold, size, reads, loads)


def _shown(done: str, cold: bool, size: int, taken: Taken) -> Taken:
    """What was taken, printed at once: a run that is cut short has said what it found."""
    where, there = "cold" if cold else "page cache", f"{100 * taken.resident:.0f} % of the files were cached before"
    print(f"  {where}: {_pace(done, size, taken.seconds)}, {there}", flush=True)
    return taken


def _pace(done: str, size: int, seconds: float) -> str:
    return f"{done} in {seconds:.2f} s ({size / 1e9 / seconds:.2f} GB/s)"


def read(files: Sequence[Path], cold: bool) -> Taken:
    """All of them, one after the other."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    there = _ready(files, cold)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return Taken(time.perf_counter() - began, there)


def loaded(folder: Path, pool: PoolSettings, cold: bool) -> Taken:
    """By the engine's loader, as its process does. For a process of its own.

    Raises:
        ConfigError: the pool can't be had here, or would load a copy that was quantised before.
    """
    spec = EngineSpec(folder.name, folder, pool, replicas_here=1, cache_dir=state_folder() / "quantized")
    plan, device_type = plan_pool(spec.name, spec.model_dir, spec.pool)
    if device_type == "cpu" and quantization_config(plan) is not None and not quantised_already(folder):
        raise ConfigError(
            f"without a GPU {plan.quantization} is quantised once and read from a copy then, so reading the checkpoint "
            "says nothing of loading it; ask for --quantization bf16"
        )
    limits = limits_of(spec, plan, device_type)
    if device_type == "cuda":
        for stage in plan.stages:
            torch.cuda.synchronize(stage.device)  # makes the context
    logging.basicConfig(format=f"    {'cold' if cold else 'page cache'}: %(message)s", stream=sys.stdout)
    for module in (load.__module__, reading_ahead.__module__):
        logging.getLogger(module).setLevel(logging.INFO)
    disable_progress_bar()
    there = _ready(_files(folder), cold)
    began = time.perf_counter()
    load(folder, plan, device_type=device_type, cache_dir=spec.cache_dir, limits=limits)
    return Taken(time.perf_counter() - began, there)


def _ready(files: Sequence[Path], cold: bool) -> float:
    """Files to be read cold are dropped from the page cache. The share of them that is there."""
    if cold:
        drop(files)
    return resident(files)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _least(taken: Sequence[Taken]) -> float:
    return min(t.seconds for t in taken)


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, from a process of its own: a process that used a GPU keeps some of its memory, and what it loaded
    once, and while it maps a file, that file's pages stay in the page cache."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    sys.exit(main())
