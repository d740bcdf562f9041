"""One random number per token, from a hash of (seed, choice, position): no generator, no state, no batch-mates."""

from __future__ import annotations

from torch import Tensor

_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def splitmix64(seed: int, index: int) -> int:
    """Output number `index` (from 0) of the SplitMix64 generator started at `seed`: an unsigned 64-bit integer.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants as in Vigna's
    public-domain `splitmix64.c`. The state is a counter, so any output is reached without those before it.
    """
    z = (seed + (index + 1) * _GAMMA) & _MASK64
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK64
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK64
    return z ^ (z >> 31)


def uniform32(seed: int, choice: int, position: int) -> int:
    """The random number of one token: an integer in [0, 2**32).

    Args:
        seed: of the request, unsigned 64-bit.
        choice: index among the request's `n` choices.
        position: tokens (prompt and output) before the one that is drawn.
    """
    return splitmix64(splitmix64(seed, choice), position) >> 32


def uniform32_tensor(keys: Tensor, positions: Tensor) -> Tensor:
    """`uniform32` for many rows, bit for bit.

    Args:
        keys: int64 [rows], `splitmix64(seed, choice)` as two's complement.
        positions: int64 [rows].

    Returns:
        int64 [rows] in [0, 2**32).
    """
    z = keys + (positions + 1) * signed(_GAMMA)  # int64 arithmetic wraps, as the unsigned one does
    z = (z ^ _shift_right(z, 30)) * signed(_MIX1)
    z = (z ^ _shift_right(z, 27)) * signed(_MIX2)
    return _shift_right(z ^ _shift_right(z, 31), 32)


def signed(value: int) -> int:
    """An unsigned 64-bit integer as the int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    shifted: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)  # torch shifts in copies of the sign
    return shifted
