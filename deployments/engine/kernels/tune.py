"""Measure which configuration is fastest for a weight on this GPU, and keep the answers on disk.

The products are timed as they are used (`timing.py`), and so is the crossover: both ways of a product at the same
numbers of rows. The table goes to a folder of the caller's (`tuning_folder`), and is read before the shipped ones;
shapes that either has are not measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from filelock import FileLock
from torch import nn

from deployments.engine.kernels.config import (
    BUCKETS,
    CUT_ROWS,
    Entry,
    GemmConfig,
    Kind,
    Table,
    bucket_of,
    dump_table,
    file_name,
    parse_table,
    table_for,
    use_folder,
)
from deployments.engine.kernels.cut import MOST_ROWS, Cut, groups_of, ranked_cuts
from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8
from deployments.engine.kernels.slab import Slab, ranked_slabs
from deployments.engine.kernels.timing import Weight, time_product
from deployments.engine.kernels.weights import Weight4
from deployments.once import write_whole

log = logging.getLogger(__name__)

CANDIDATES: dict[tuple[Kind, int], tuple[GemmConfig, ...]] = {
    ("4bit", 16): (
        GemmConfig(8, 4, 3, 2),
        GemmConfig(8, 4, 3, 2, 64),
        GemmConfig(4, 4, 5, 2),
        GemmConfig(16, 2, 4, 2, 64),
        GemmConfig(8, 2, 11, 2, 80, ahead=True),
        GemmConfig(8, 4, 3, 2, overlap=True),
        GemmConfig(8, 4, 3, 2, rounded=True),
        GemmConfig(8, 2, 5, 2, rounded=True),
        GemmConfig(4, 4, 5, 2, rounded=True),
        GemmConfig(16, 4, 3, 1, rounded=True),
        GemmConfig(16, 2, 4, 2, 64, rounded=True),
        GemmConfig(8, 2, 11, 2, ahead=True, rounded=True),
        GemmConfig(16, 2, 9, 2, 64, ahead=True, rounded=True),
        GemmConfig(8, 4, 3, 2, rounded=True, overlap=True),
    ),
    ("4bit", 32): (
        GemmConfig(8, 2, 4, 2),
        GemmConfig(8, 2, 4, 2, rounded=True),
        GemmConfig(8, 2, 6, 2, 128, ahead=True, rounded=True),
        GemmConfig(16, 2, 4, 1, rounded=True),
        GemmConfig(8, 2, 4, 2, rounded=True, overlap=True),
    ),
    ("4bit", 64): (
        GemmConfig(8, 2, 3, 2, 128),
        GemmConfig(8, 2, 3, 2, 128, rounded=True),
        GemmConfig(8, 1, 5, 2, 128, rounded=True),
        GemmConfig(8, 2, 4, 2, 128, ahead=True, rounded=True),
        GemmConfig(16, 2, 3, 1, rounded=True),
        GemmConfig(8, 2, 3, 2, 128, rounded=True, overlap=True),
    ),
    ("4bit", 128): (
        GemmConfig(8, 1, 5, 1),
        GemmConfig(8, 1, 3, 1),
        GemmConfig(8, 1, 4, 2, 128, rounded=True),
        GemmConfig(8, 2, 3, 1, rounded=True),
        GemmConfig(16, 2, 3, 1, rounded=True),
        GemmConfig(16, 1, 4, 1, rounded=True),
    ),
    ("8bit", 16): (
        GemmConfig(8, 2, 3, 2),
        GemmConfig(8, 2, 3, 3, 80),
        GemmConfig(8, 1, 5, 3),
        GemmConfig(4, 4, 3, 3),
        GemmConfig(4, 2, 5, 4),
        GemmConfig(4, 2, 4, 5, 80),
        GemmConfig(16, 2, 3, 1),
        GemmConfig(4, 4, 3, 3, overlap=True),
    ),
    ("8bit", 32): (
        GemmConfig(8, 2, 3, 2),
        GemmConfig(4, 2, 4, 3),
        GemmConfig(4, 2, 3, 4, 112),
        GemmConfig(4, 2, 4, 3, overlap=True),
    ),
    ("8bit", 64): (
        GemmConfig(8, 2, 3, 2, 128),
        GemmConfig(8, 1, 5, 2, 128),
        GemmConfig(8, 2, 5, 1),
        GemmConfig(4, 2, 4, 2),
        GemmConfig(8, 1, 5, 2, 128, overlap=True),
    ),
    ("8bit", 128): (
        GemmConfig(8, 2, 3, 1),
        GemmConfig(8, 1, 5, 1),
        GemmConfig(8, 1, 4, 2, 128),
        GemmConfig(16, 2, 3, 1),
    ),
}
"""What is tried for each bucket of rows. Of the 4-bit ones, each needs over 48 KiB of dynamic shared memory beside the
table of pairs: Triton raises the driver's limit of 48 KiB in all only for such."""
CROSSOVER_ROWS = (*BUCKETS, 256)
"""Where dequantising is compared with the small-batch kernel."""

Shape = tuple[Kind, int, int]
Measure = Callable[[GemmConfig | Cut | Slab | None, int], float]
"""Microseconds of one product with so many rows; None: the weight is dequantised for it."""
_Choice = TypeVar("_Choice", bound=GemmConfig | Cut | Slab | None)
_MOST_CUTS, _MOST_SLABS = 6, 3
"""Measured of a shape and a number of rows: each takes half a second to compile."""


class OutOfTime(Exception):
    """The limit passed while a shape was being measured."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What tuning asks of a GPU, and of a clock."""

    name: Callable[[torch.device], str]
    microseconds: Callable[[Sequence[Weight], GemmConfig | Cut | Slab | None, int], float]
    """Of one product with so many rows, over weights of one shape in turn."""
    clock: Callable[[], float]
    cuts: Callable[[Weight, int], Sequence[Cut | Slab]] = lambda weight, rows: ()  # noqa: ARG005 - none
    """What is worth measuring for a weight and most rows."""


def tune(model: nn.Module, folder: Path) -> Table:
    """`tune_model` without a limit; the table of the current GPU, which is used from now on."""
    tune_model(model, folder)
    return table_for(torch.cuda.get_device_name())


def tune_model(model: nn.Module, folder: Path, *, limit_s: float = math.inf, bench: Bench | None = None) -> list[Shape]:
    """Tune the products of `model`'s quantised linears, and use the results from now on.

    Each GPU's table in `folder` is completed with the shapes that neither it nor the shipped one has, those of the most
    bytes first; with none lacking, nothing is measured. Processes that tune at once add to the same table.

    Args:
        limit_s: seconds after which no other configuration is tried. What is left stays with the table's default, and
            is measured at the next start.

    Returns:
        What was left.
    """
    bench = bench or GPU
    deadline = bench.clock() + limit_s
    found = quantised_weights(model, bench)
    try:
        for gpu in found:
            discard_damaged(folder / file_name(gpu))
    except OSError as error:
        log.warning("kernels are not tuned: %s can't be written (%s); set HEADROOM_HOME", folder, error.strerror)
        return [shape for shapes in found.values() for shape in shapes]
    use_folder(folder)
    left: list[Shape] = []
    for gpu, shapes in found.items():
        unknown = [shape for shape in shapes if not table_for(gpu).knows(*shape)]
        left += _tune_gpu(gpu, {shape: shapes[shape] for shape in unknown}, folder, deadline, bench)
    return left


def quantised_weights(model: nn.Module, bench: Bench) -> dict[str, dict[Shape, list[Weight]]]:
    """The tiled weights by name of GPU and shape, those of one device alone; shapes of the most bytes first."""
    groups: dict[tuple[str, Shape], list[Weight]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear4 | QuantLinear8) and module.quantised.tiled:
            weight = module.quantised
            kind: Kind = "4bit" if isinstance(weight, Weight4) else "8bit"
            group = groups.setdefault((bench.name(weight.packed.device), (kind, weight.n, weight.k)), [])
            if not group or group[0].packed.device == weight.packed.device:
                group.append(weight)
    found: dict[str, dict[Shape, list[Weight]]] = {}
    for (gpu, shape), group in sorted(groups.items(), key=lambda item: -sum(weight.bytes for weight in item[1])):
        found.setdefault(gpu, {})[shape] = group
    return found


def _tune_gpu(gpu: str, shapes: dict[Shape, list[Weight]], folder: Path, deadline: float, bench: Bench) -> list[Shape]:
    """The shapes that there was no time for."""
    began = bench.clock()
    for done, (shape, weights) in enumerate(shapes.items()):
        log.info("tuning %s for %s: shape %d of %d", _named(shape), gpu, done + 1, len(shapes))

        def measure(config: GemmConfig | Cut | Slab | None, rows: int, weights: list[Weight] = weights) -> float:
            if bench.clock() >= deadline:
                raise OutOfTime
            return bench.microseconds(weights, config, rows)

        try:
            cuts = {rows: bench.cuts(weights[0], rows) for rows in CUT_ROWS}
            entry = tune_shape(shape[0], measure, table_for(gpu).entry(*shape), cuts)
        except OutOfTime:
            left = list(shapes)[done:]
            log.warning(
                "tuning for %s ended after %.0f s with %d of %d shapes measured; %s run in the default configuration "
                "until the next start, which goes on; raise tune_limit_s, or set tune_kernels: false",
                gpu, bench.clock() - began, done, len(shapes), ", ".join(map(_named, left)),
            )  # fmt: skip
            return left
        keep(folder / file_name(gpu), table_for(gpu), shape, entry)
        use_folder(folder)
    return []


def _named(shape: Shape) -> str:
    kind, n, k = shape
    return f"{kind} {n}x{k}"


def tune_shape(
    kind: Kind, measure: Measure, default: Entry, cuts: Mapping[int, Sequence[Cut | Slab]] = MappingProxyType({})
) -> Entry:
    """The fastest configuration of each bucket, and the most rows for which the kernel is not slower than
    dequantising; 0 where no configuration runs. Of `cuts`, by most rows, the fastest that beats both.

    Configurations that can't be built or launched are logged and passed over. From a bucket on of which none runs,
    weights are dequantised, and `default`'s configurations fill the table.

    Raises:
        OutOfTime: by `measure`.
    """
    configs = dict(default.configs)
    runs = 0
    for bucket in BUCKETS:
        times = _times(CANDIDATES[kind, bucket], bucket, measure)
        if not times:
            log.warning("no %s configuration for %d rows runs here; weights are dequantised for them", kind, bucket)
            break
        configs[bucket], runs = min(times, key=times.__getitem__), bucket
    crossover = _crossover(configs, measure, most=math.inf if runs == BUCKETS[-1] else runs)
    best = {rows: _fastest_cut(some, rows, measure, configs, crossover) for rows, some in cuts.items() if some}
    return Entry(configs, crossover, best)


def _fastest_cut(
    cuts: Sequence[Cut | Slab], rows: int, measure: Measure, configs: dict[int, GemmConfig], crossover: int
) -> Cut | Slab | None:
    times = _times(cuts, rows, measure)
    best = min(times, key=times.__getitem__, default=None)
    if best is None:
        return None
    other = configs[bucket_of(rows)] if rows <= crossover else None
    return None if any(times[best] > time for time in _times((other,), rows, measure).values()) else best


def _times(choices: Sequence[_Choice], rows: int, measure: Measure) -> dict[_Choice, float]:
    times: dict[_Choice, float] = {}
    for choice in choices:
        try:
            times[choice] = measure(choice, rows)
        except OutOfTime:
            raise
        except Exception as error:  # noqa: BLE001 - the others may well run
            log.info("%s for %d rows does not run here: %s", choice, rows, error)
    return times


def _crossover(configs: dict[int, GemmConfig], measure: Measure, *, most: float) -> int:
    crossover = 0
    for rows in CROSSOVER_ROWS:
        if rows > most or measure(configs[min(rows, BUCKETS[-1])], rows) > measure(None, rows):
            break
        crossover = rows
    return crossover


def cuts_of(weight: Weight, rows: int) -> Sequence[Cut | Slab]:
    """The first of `ranked_cuts`, of `ranked_slabs`, or of both where either may be faster; none on GPUs without
    clusters."""
    from deployments.engine.kernels.launch import clusters, multiprocessors, shared_bytes, warpgroups

    device = weight.packed.device
    if not clusters(device):
        return ()
    of = (weight.n, weight.k, 4 if isinstance(weight, Weight4) else 8)
    sizes = (multiprocessors(device), shared_bytes(device))
    found: list[Cut | Slab] = []
    if rows <= MOST_ROWS:
        found += ranked_cuts(*of, groups_of(rows), *sizes)[:_MOST_CUTS]
    if rows >= MOST_ROWS and warpgroups(device):
        found += ranked_slabs(*of, rows, *sizes)[:_MOST_SLABS]
    return found


GPU = Bench(torch.cuda.get_device_name, time_product, time.monotonic, cuts_of)


def write_table(table: Table, path: Path) -> None:
    """Written beside and renamed: a reader sees the old table or the new one."""
    write_whole(path, (json.dumps(dump_table(table), indent=1) + "\n").encode())


def tuning_folder(home: Path) -> Path:
    """The folder of tables below `home`: results depend on torch, Triton, the kernels' code and the shipped tables."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *here.glob("*.cu*"), *here.glob("tables/*.json")]):
        digest.update(path.read_bytes())
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return home / f"torch-{version('torch')}-triton-{triton}-{digest.hexdigest()[:8]}"


def discard_damaged(path: Path) -> None:
    """Remove a table that can't be read, so that it is measured again.

    Raises:
        OSError: the folder can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            return
        try:
            parse_table(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s) and is measured again", path, error)
            path.unlink()


def keep(path: Path, base: Table, shape: Shape, entry: Entry) -> None:
    """Add a shape to the table at `path`, which is `base` where there is none; others may add to it meanwhile."""
    with FileLock(path.with_suffix(".lock")):
        have = parse_table(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else base
        write_table(have.with_shape(*shape, entry), path)
