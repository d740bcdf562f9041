"""What is neither weight nor KV, each term named and explained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a stage's reserve: its bytes, and in a sentence why they are held back."""

    name: str
    bytes: int
    why: str
