"""How a product is cut on a GPU: measured tables shipped as data, a heuristic elsewhere.

A table is `tables/<gpu name in lower case, blanks as _>.json`: {"4bit": {"16": {...}, "32": {...}}, "8bit": {...},
"crossover": {"4bit": 128, "8bit": 128}}. Keys are rows of x, rounded up to a bucket. A folder given to `use_folder`
(tuning's own results) comes before the shipped ones.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Kind = Literal["4bit", "8bit"]
BUCKETS = (16, 32, 64, 128)
"""Rows of x that one launch computes; the matrix units need at least 16."""
PARTIAL_BYTES = 32 * 2**20
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

    @property
    def panel_rows(self) -> int:
        """Rows of a panel."""
        return 16 * self.strips

    @property
    def step_columns(self) -> int:
        """Columns of a step."""
        return 64 * self.blocks


@dataclass(frozen=True, slots=True)
class Table:
    """The configurations of one GPU."""

    configs: dict[tuple[Kind, int], GemmConfig]
    crossover: dict[Kind, int]
    """Rows of x up to which the kernels are used; above, the weight is dequantised for cuBLAS."""

    def config(self, kind: Kind, bucket: int) -> GemmConfig:
        """The configuration for up to `bucket` rows."""
        return self.configs[kind, bucket]


def bucket_of(rows: int) -> int:
    """The smallest bucket that holds `rows`, or the largest."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), BUCKETS[-1])


HEURISTIC = Table(
    configs={
        ("4bit", 16): GemmConfig(8, 4, 3, 2),
        ("4bit", 32): GemmConfig(8, 2, 4, 2, 128),
        ("4bit", 64): GemmConfig(8, 2, 4, 1),
        ("4bit", 128): GemmConfig(8, 2, 3, 1),
        ("8bit", 16): GemmConfig(8, 2, 4, 2),
        ("8bit", 32): GemmConfig(8, 2, 4, 2),
        ("8bit", 64): GemmConfig(8, 2, 4, 1),
        ("8bit", 128): GemmConfig(8, 2, 3, 1),
    },
    crossover={"4bit": 128, "8bit": 128},
)


def use_folder(folder: Path) -> None:
    """Read tables in `folder` before the shipped ones."""
    _tuned[:] = [folder]
    table_for.cache_clear()


def file_name(gpu: str) -> str:
    """The file of a GPU's table, by the name that CUDA gives it."""
    return gpu.lower().replace(" ", "_").replace("/", "_") + ".json"


@cache
def table_for(gpu: str) -> Table:
    """The table of a GPU; the heuristic where none was measured."""
    for folder in (*_tuned, _SHIPPED):
        path = folder / file_name(gpu)
        if path.exists():
            return parse_table(json.loads(path.read_text(encoding="utf-8")))
    log.info("no measured kernel configurations for %s: the heuristic's are used", gpu)
    return HEURISTIC


def parse_table(data: dict[str, Any]) -> Table:
    """A table from its JSON; buckets that it lacks come from the heuristic."""
    configs = dict(HEURISTIC.configs)
    kinds: tuple[Kind, Kind] = ("4bit", "8bit")
    for kind in kinds:
        for rows, fields in data.get(kind, {}).items():
            configs[kind, int(rows)] = GemmConfig(**fields)
    crossover = {kind: int(data.get("crossover", {}).get(kind, HEURISTIC.crossover[kind])) for kind in kinds}
    return Table(configs, crossover)


def dump_table(table: Table) -> dict[str, Any]:
    """The JSON of a table."""
    data: dict[str, Any] = {"crossover": dict(table.crossover)}
    for (kind, bucket), config in sorted(table.configs.items()):
        data.setdefault(kind, {})[str(bucket)] = asdict(config)
    return data
