"""Who computes what: a product's work divided evenly and always the same way. Integers only.

The output's rows are cut in *panels* and each panel's columns of the weight in *steps*. All steps of all panels, in a
row, are divided among the programs (thread blocks) as evenly as integers allow ("stream-K", Osama et al. 2023), so
every multiprocessor streams the same number of bytes whatever the shape. A panel whose steps lie with several programs
is summed, in the order of its columns, by whichever of them finishes last: the order is fixed, so the bits are too.
The division depends on the weight's shape and the configuration, not on the number of rows of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

_INT32 = 2**31


@dataclass(frozen=True, slots=True)
class Schedule:
    """`panels * steps` units of work on `programs` programs."""

    panels: int
    steps: int
    """Per panel."""
    programs: int

    @property
    def units(self) -> int:
        """All steps of all panels."""
        return self.panels * self.steps

    def span(self, program: int) -> tuple[int, int]:
        """The units [begin, end) of one program."""
        return program * self.units // self.programs, (program + 1) * self.units // self.programs

    def owner(self, unit: int) -> int:
        """The program whose span holds `unit`."""
        return ((unit + 1) * self.programs - 1) // self.units

    def contributors(self, panel: int) -> range:
        """The programs that hold steps of `panel`, in the order of its columns."""
        return range(self.owner(panel * self.steps), self.owner((panel + 1) * self.steps - 1) + 1)

    def slot(self, program: int, panel: int) -> int:
        """Where `program` leaves its partial sum of `panel`: a program has at most one panel that began before its
        span (slot 2p) and one that ends after it (slot 2p + 1)."""
        return 2 * program + (self.span(program)[0] < panel * self.steps)


def make_schedule(n: int, k: int, *, panel_rows: int, step_columns: int, programs: int) -> Schedule:
    """The schedule of a weight [n, k] on at most `programs` programs.

    Raises:
        ValueError: the work does not fit the kernels' 32-bit integers.
    """
    panels, steps = -(-n // panel_rows), -(-k // step_columns)
    programs = min(programs, panels * steps)
    if (panels * steps + 1) * programs >= _INT32:
        raise ValueError(f"{panels} panels of {steps} steps on {programs} programs overflow 32 bits")
    return Schedule(panels, steps, programs)
