"""How a product is cut on a GPU: measured tables shipped as data, a heuristic elsewhere.

A table is `tables/<gpu name in lower case, blanks as _>.json`:

    {"4bit": {"default": {"configs": {"16": {...}, ...}, "crossover": 128}, "28672x4096": {..., "cuts": {"8": {...}}}},
     "8bit": {...}}

The keys of `configs` are rows of x, rounded up to a bucket; `crossover` is the number of rows up to which the kernels
of Triton are used, and above which the weight is dequantised for cuBLAS. The keys of `cuts` are most rows, too, of
`CUT_ROWS`: a `Cut` is for `skinny.cu`, a `Slab` (it has `rows`) for `wide.cu`. null stands where neither is faster than
these two ways, and what is missing is chosen by `choose_cut` and `choose_slab`. `default` serves every shape that has
no entry.
A folder given to `use_folder` (tuning's own results) comes before the shipped tables.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from deployments.engine.kernels.cut import Cut
from deployments.engine.kernels.slab import Slab

log = logging.getLogger(__name__)

Kind = Literal["4bit", "8bit"]
BUCKETS = (16, 32, 64, 128)
"""Rows of x that one launch computes; the matrix units need at least 16."""
CUT_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows of x for which the CUDA kernels' cuts are kept, each for all up to it. More are dequantised."""
PARTIAL_BYTES = 36 * 2**20
"""Workspace for partial sums per device."""
PANELS = 2**16
"""Most panels of one weight."""

_SHIPPED = Path(__file__).parent / "tables"
_tuned: list[Path] = []


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """One way to cut a product."""

    strips: int = 8
    """16-row strips of a panel, and warps of a program."""
    blocks: int = 4
    """64-column blocks of a step."""
    stages: int = 3
    """Steps in flight, the one being computed included."""
    per_multiprocessor: int = 2
    """Programs per multiprocessor."""
    max_registers: int | None = None
    """Per thread; None leaves it to the compiler."""
    ahead: bool = False
    """4 bits: the next step's weights wait in registers instead of shared memory."""
    rounded: bool = False
    """4 bits: scale the 16-bit weights before the product, not the float32 sums after it. One rounding more; no wait
    for the matrix units after each block."""
    overlap: bool = False
    """Start while the kernel before ends (programmatic dependent launch; compute capability 9.0 and above)."""

    @property
    def panel_rows(self) -> int:
        """Rows of a panel."""
        return 16 * self.strips

    @property
    def step_columns(self) -> int:
        """Columns of a step."""
        return 64 * self.blocks


@dataclass(frozen=True, slots=True)
class Entry:
    """One kind of weight, one shape or all others."""

    configs: dict[int, GemmConfig]
    """By bucket of rows."""
    crossover: int
    """Most rows for which the kernels are used."""
    cuts: dict[int, Cut | Slab | None] = field(default_factory=dict)
    """By most rows; None: the other ways are faster."""


@dataclass(frozen=True, slots=True)
class Table:
    """The configurations of one GPU."""

    default: dict[Kind, Entry]
    shapes: dict[tuple[Kind, int, int], Entry] = field(default_factory=dict)

    def entry(self, kind: Kind, n: int, k: int) -> Entry:
        """For a weight [n, k]."""
        return self.shapes.get((kind, n, k), self.default[kind])

    def knows(self, kind: Kind, n: int, k: int) -> bool:
        """Whether the shape has an entry of its own."""
        return (kind, n, k) in self.shapes

    def with_shape(self, kind: Kind, n: int, k: int, entry: Entry) -> Table:
        """This table with one more shape, or another entry for one."""
        return replace(self, shapes={**self.shapes, (kind, n, k): entry})


def bucket_of(rows: int) -> int:
    """The smallest bucket that holds `rows`, or the largest."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), BUCKETS[-1])


def cut_rows_of(rows: int) -> int | None:
    """The smallest of `CUT_ROWS` that holds `rows`; None beyond the largest."""
    return next((most for most in CUT_ROWS if rows <= most), None)


HEURISTIC = Table(
    {
        "4bit": Entry(
            {
                16: GemmConfig(8, 4, 3, 2),
                32: GemmConfig(8, 2, 4, 2, 128),
                64: GemmConfig(8, 2, 4, 1),
                128: GemmConfig(8, 2, 3, 1),
            },
            crossover=128,
        ),
        "8bit": Entry(
            {
                16: GemmConfig(8, 2, 4, 2),
                32: GemmConfig(8, 2, 4, 2),
                64: GemmConfig(8, 2, 4, 1),
                128: GemmConfig(8, 2, 3, 1),
            },
            crossover=128,
        ),
    }
)
"""For GPUs that have `HEURISTIC_BYTES` of shared memory for a block: capability 8.0, 8.7, 9.0 and 10.x."""
HEURISTIC_BYTES = 148 * 2**10
"""Of the largest configuration, 4 bits with double quantisation and 128 rows: 116 KiB, as Triton 3.6 lays it out for
capability 9.0, and the table of pairs."""
_SMALLER = {64: GemmConfig(8, 2, 3, 1), 128: GemmConfig(8, 1, 3, 1)}
"""4 bits, for GPUs with 99 KiB (capability 8.6, 8.9 and 12.x): 52 and 58 KiB and the table. The heuristic's others take
96 KiB at most."""


def use_folder(folder: Path) -> None:
    """Read tables in `folder` before the shipped ones."""
    _tuned[:] = [folder]
    table_for.cache_clear()


def file_name(gpu: str) -> str:
    """The file of a GPU's table, by the name that CUDA gives it."""
    return gpu.lower().replace(" ", "_").replace("/", "_") + ".json"


def fitted(table: Table, shared: int) -> Table:
    """`table` for a GPU that has `shared` bytes of shared memory for a block: with smaller configurations in place of
    those of the heuristic that take more. What was measured has run there, and stays."""
    entry, heuristic = table.default["4bit"], HEURISTIC.default["4bit"]
    if shared >= HEURISTIC_BYTES or entry != heuristic:
        return table
    smaller = replace(heuristic, configs=heuristic.configs | _SMALLER)
    return replace(table, default={**table.default, "4bit": smaller})


@cache
def table_for(gpu: str, shared: int | None = None) -> Table:
    """The table of a GPU, `fitted` to its shared memory where that is given; the heuristic where none was measured."""
    if shared is not None:
        return fitted(table_for(gpu), shared)
    for folder in (*_tuned, _SHIPPED):
        path = folder / file_name(gpu)
        if path.exists():
            return parse_table(json.loads(path.read_text(encoding="utf-8")))
    log.info("no measured kernel configurations for %s: the heuristic's are used", gpu)
    return HEURISTIC


def parse_table(data: dict[str, Any]) -> Table:
    """A table from its JSON; a kind that has no default gets the heuristic's."""
    default, shapes = dict(HEURISTIC.default), {}
    kinds: tuple[Kind, Kind] = ("4bit", "8bit")
    for kind in kinds:
        for shape, fields in data.get(kind, {}).items():
            configs = {int(rows): GemmConfig(**config) for rows, config in fields["configs"].items()}
            cuts = {int(rows): cut and _cut(cut) for rows, cut in fields.get("cuts", {}).items()}
            entry = Entry(configs, int(fields["crossover"]), cuts)
            if shape == "default":
                default[kind] = entry
            else:
                n, k = map(int, shape.split("x"))
                shapes[kind, n, k] = entry
    return Table(default, shapes)


def _cut(fields: dict[str, int]) -> Cut | Slab:
    return Slab(**fields) if "rows" in fields else Cut(**fields)


def dump_table(table: Table) -> dict[str, Any]:
    """The JSON of a table."""
    data: dict[str, Any] = {kind: {"default": _dump_entry(entry)} for kind, entry in table.default.items()}
    for (kind, n, k), entry in table.shapes.items():
        data[kind][f"{n}x{k}"] = _dump_entry(entry)
    return data


def _dump_entry(entry: Entry) -> dict[str, Any]:
    configs = {str(bucket): asdict(config) for bucket, config in entry.configs.items()}
    cuts = {str(rows): cut and asdict(cut) for rows, cut in entry.cuts.items()}
    return {"configs": configs, "crossover": entry.crossover} | ({"cuts": cuts} if cuts else {})
