"""Known GPUs: memory, bandwidth and arithmetic by the name that a driver, Ray or a person gives them.

`rates` also answers for a GPU that is not in the table, by a rule of thumb: its memory is read in 40 ms, and it does
150 operations per byte read. Across the table the first is 19 ms (RTX 5090) to 78 ms (L4), the second 76 (RTX 3090) to
419 (L40S).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

GIB, GB, TFLOPS = 2**30, 10**9, 10**12

READS_PER_S = 25
"""How often a second an unknown GPU reads its whole memory."""
FLOP_PER_BYTE = 150
"""Operations of an unknown GPU per byte it could have read."""

_SAME_SIZE_PERCENT = 10


@dataclass(frozen=True, slots=True)
class Card:
    """One kind of GPU."""

    name: str
    memory_bytes: int
    """What a process sees of it with ECC on, rounded down: a few per cent below the name's figure."""
    bandwidth: int
    """Bytes/s of its memory."""
    flops: int
    """Dense 16-bit FLOP/s of its tensor cores, accumulating in float32."""
    accelerator_type: str
    """Ray's name of it (`ray.util.accelerators`); several kinds may share one."""
    flashinfer: bool = True
    """Whether FlashInfer runs on it: NVIDIA's from Ampere on."""

    @property
    def words(self) -> frozenset[str]:
        """The words that a device's name must have to mean this kind."""
        return _words(self.name) - {"RTX"}


def _card(
    name: str, tenths_gib: int, gb_per_s: int, tflops: int, accelerator_type: str, *, flashinfer: bool = True
) -> Card:
    return Card(name, tenths_gib * GIB // 10, gb_per_s * GB, tflops * TFLOPS, accelerator_type, flashinfer)


# Bandwidth and FLOP/s: the vendors' data sheets (NVIDIA's product briefs and architecture whitepapers, AMD's data
# sheet), without sparsity; where one states the sparse figure alone, half of it. A10G: AWS's G5 page. V100 and T4
# compute float16 only. Of kinds with one name the smallest stands first.
CARDS = (
    _card("B200", 1780, 8000, 2250, "B200"),
    _card("GH200", 940, 4000, 989, "GH200"),
    _card("H200", 1398, 4800, 989, "H200"),
    _card("H200 NVL", 1398, 4800, 835, "H200"),
    _card("H100", 791, 3350, 989, "H100"),
    _card("H100 PCIe", 791, 2000, 756, "H100"),
    _card("H100 NVL", 930, 3900, 835, "H100"),
    _card("A100 40GB", 393, 1555, 312, "A100"),
    _card("A100 80GB", 791, 2039, 312, "A100"),
    _card("A100 80GB PCIe", 791, 1935, 312, "A100"),
    _card("A40", 443, 696, 149, "A40"),
    _card("A30", 235, 933, 165, "A30"),
    _card("A10G", 219, 600, 70, "A10G"),
    _card("A10", 219, 600, 125, "A10"),
    _card("L40S", 443, 864, 362, "L40S"),
    _card("L40", 443, 864, 181, "L40"),
    _card("L4", 219, 300, 121, "L4"),
    _card("T4", 145, 320, 65, "T4", flashinfer=False),
    _card("V100 16GB", 157, 900, 125, "V100", flashinfer=False),
    _card("V100 32GB", 317, 900, 125, "V100", flashinfer=False),
    _card("RTX PRO 6000", 946, 1792, 503, "RTX-PRO-6000"),
    _card("RTX 6000 Ada", 473, 960, 364, "RTX-6000"),
    _card("RTX A6000", 474, 768, 154, "RTX-A6000"),
    _card("RTX 5090", 313, 1792, 209, "GeForce-RTX-5090"),
    _card("RTX 4090", 235, 1008, 165, "GeForce-RTX-4090"),
    _card("RTX 3090", 235, 936, 71, "GeForce-RTX-3090"),
    _card("MI300X", 1915, 5300, 1307, "AMD-Instinct-MI300X-OAM", flashinfer=False),
)

# fmt: off
_BEFORE_AMPERE = tuple(
    frozenset(name.split()) for name in (
        "GTX", "QUADRO", "TITAN", "TESLA", "RTX 2060", "RTX 2070", "RTX 2080", "T4G", "T400", "T500", "T550", "T600",
        "T1000", "T1200", "V100S", "GV100", "GP100", "P100", "P40", "P6", "P4", "M60", "M40", "M10", "M6", "M4", "K80",
    )
)
# fmt: on
"""Words of the names of kinds that are not in the table, of Turing, Volta and older. NVIDIA gave up the names Quadro,
TITAN and Tesla before Ampere, and the GTX with it."""


@cache
def find_card(name: str, memory_bytes: int | None = None) -> Card | None:
    """The kind that `name` means ("NVIDIA H100 80GB HBM3", "GeForce-RTX-4090", "A100-40GB"), or None.

    The kind with the most words of the name wins ("H100 PCIe" before "H100"). A name without its size (Ray's "A100")
    means the kind whose memory is within a tenth of `memory_bytes`, else the smallest.
    """
    words = _words(name)
    fits = [card for card in CARDS if card.words <= words or (_sizeless(card) <= words and not _sizes(words))]
    if memory_bytes is not None:
        near = [c for c in fits if 100 * abs(c.memory_bytes - memory_bytes) <= _SAME_SIZE_PERCENT * c.memory_bytes]
        fits = near or fits
    return max(fits, key=lambda card: (len(_sizeless(card)), -card.memory_bytes), default=None)


def runs_flashinfer(name: str, memory_bytes: int) -> bool:
    """Whether FlashInfer runs on a GPU, as far as its name tells; one that nobody knows is taken to be new."""
    card = find_card(name, memory_bytes)
    return card.flashinfer if card else not any(old <= _words(name) for old in _BEFORE_AMPERE)


def rates(name: str, memory_bytes: int) -> tuple[int, int]:
    """(bytes/s, FLOP/s) of a GPU by its name, else by its memory. A MIG instance has its part of the whole's."""
    card = find_card(name, memory_bytes)
    if card is None:
        bandwidth = READS_PER_S * memory_bytes
        return bandwidth, FLOP_PER_BYTE * bandwidth
    part = min(memory_bytes, card.memory_bytes) if "MIG" in _words(name) else card.memory_bytes
    return card.bandwidth * part // card.memory_bytes, card.flops * part // card.memory_bytes


def _words(name: str) -> frozenset[str]:
    found = re.findall(r"[A-Z0-9.]+", name.upper().replace("RTX", " RTX "))
    return frozenset(re.sub(r"^(\d+)G(I?B)?$", r"\1GB", word) for word in found)


def _sizes(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word for word in words if re.fullmatch(r"\d+GB", word))


def _sizeless(card: Card) -> frozenset[str]:
    return card.words - _sizes(card.words)
