"""The prompts: short chat turns of about 16 to 200 tokens, the same on every run.

Each prompt begins with a tag of its own. Without it, a prompt that was sent before would be found in the prefix cache,
and the benchmark would measure the cache.
"""

from __future__ import annotations

import itertools

_QUESTIONS = (
    "Why is the sky red at sunset?",
    "What should I check before I buy a used bicycle, and in which order?",
    "Explain to a ten-year-old how a vaccine works. Use one example from everyday life.",
    "I have flour, eggs, milk and two apples. What can I cook in half an hour without an oven?",
    "Write a polite message to a neighbour whose dog barks each night between two and three o'clock.",
    "Which is heavier, a litre of water or a litre of oil, and how could I show it in a kitchen?",
    "Give me three names for a small shop that repairs old radios, and say why each would suit it.",
    "How do I divide 100 euros fairly among three friends who paid 20, 30 and 10 for the same trip?",
)
_CONTEXT = (
    "Some background first.",
    "We are a family of four in a small town near the coast, with two children of seven and eleven.",
    "I work from home three days a week, and the other two I take the early train to the city.",
    "Last year we tried a list on the fridge, but after a few weeks nobody looked at it any more.",
    "My sister, who knows much more about it than I do, says that the usual advice is out of date.",
    "Please keep the answer practical: what to do first, what can wait, and what is not worth the money.",
    "If something depends on the season, assume that it is late autumn and already cold at night.",
    "I don't mind a long answer, but please no lists with more than five points.",
    "And when there is a common mistake that beginners make, warn me about it before I make it.",
)
CYCLE = 8
"""Prompts after which the lengths repeat."""
_CONTEXT_SENTENCES = (0, 0, 1, 2, 3, 5, 7, 9)
"""Sentences of background in prompt 0, 1, ..., of a cycle."""


def prompts(tag: str, count: int, characters: int | None = None) -> list[str]:
    """`count` user messages that differ between tags in their first words alone; all of so many `characters`, if any
    are given."""
    if characters is None:
        return [_message(f"{tag}-{i}", i) for i in range(count)]
    endless = " ".join((*_CONTEXT, *_QUESTIONS))
    return [f"({tag}-{i}) {endless * (1 + characters // len(endless))}"[:characters] for i in range(count)]


def _message(tag: str, index: int) -> str:
    background = itertools.islice(_CONTEXT, _CONTEXT_SENTENCES[index % CYCLE])
    question = _QUESTIONS[(index + index // len(_QUESTIONS)) % len(_QUESTIONS)]
    return " ".join((f"({tag})", *background, question))
