"""Sampling cases that every device draws alike: logits made of integers, parameters, and the ids that come out."""

from __future__ import annotations

import torch
from torch import Tensor

from deployments.engine.randomness import uniform32_tensor
from tests.unit.engine.drawing import Request, request

VOCAB = 5000
ROWS = 8


def logits(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, vocab] on the CPU, the same on every machine: sums of four bytes of a hash, in steps of 1/64 or, in
    bfloat16, what that rounds to. Bell-shaped, with a standard deviation of 2.3 and many ties."""
    keys = torch.arange(rows)[:, None] * 1_000_003
    bits = uniform32_tensor(keys, torch.arange(vocab_size)[None])
    total = sum((bits >> shift) & 255 for shift in (0, 8, 16, 24))
    return ((total - 510) / 64).to(dtype)


def _rows(prompt: list[int] | None = None, output: list[int] | None = None, **params: object) -> list[Request]:
    return [
        request(prompt, output, **{**params, "seed": 2**64 - 1 - i, "choice": i % 3, "position": None if prompt else i})
        for i in range(ROWS)
    ]


_LIKELIEST = [916, 3464, 3145, 2335, 1843, 1847, 2473, 2921]
_PROMPT = _LIKELIEST[:4] + [(37 * i) % VOCAB for i in range(90)]
_OUTPUT = _LIKELIEST[3:7] + [(911 * i * i) % 700 for i in range(45)]

CASES: dict[str, list[Request]] = {
    "greedy": _rows(temperature=0.0),
    "plain": _rows(),
    "hot": _rows(temperature=1.7),
    "cold": _rows(temperature=0.3),
    "top_k": _rows(top_k=40),
    "top_p": _rows(top_p=0.9),
    "top_k and top_p": _rows(top_k=50, top_p=0.8, temperature=1.2),
    "min_p": _rows(min_p=0.1),
    "all filters": _rows(top_k=100, top_p=0.95, min_p=0.02, temperature=0.8),
    "penalties": _rows(_PROMPT, _OUTPUT, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2),
    "greedy with penalties": _rows(_PROMPT, _OUTPUT, temperature=0.0, repetition_penalty=1.2, presence_penalty=1.5),
    "bias and min_tokens": _rows(
        _PROMPT[:3], _OUTPUT[:2], logit_bias=((7, 11.0), (4999, 10.0)), min_tokens=3, end_ids=(11, 4998)
    ),
}
"""Each drawn from the same `logits(ROWS, VOCAB)`."""

EXPECTED = {
    "greedy": [916, 3464, 3145, 2335, 1843, 1847, 2473, 2921],
    "plain": [1708, 3338, 598, 4160, 3462, 930, 770, 1630],
    "hot": [1801, 3230, 529, 4160, 3591, 918, 746, 1463],
    "cold": [916, 4345, 2584, 2854, 1843, 1588, 1284, 2921],
    "top_k": [1150, 3464, 691, 4602, 2774, 980, 770, 1953],
    "top_p": [1694, 3359, 621, 4173, 3435, 930, 770, 1630],
    "top_k and top_p": [1150, 3464, 755, 4105, 2774, 980, 770, 1953],
    "min_p": [1524, 3396, 755, 4262, 3298, 980, 770, 1936],
    "all filters": [1259, 3464, 755, 4210, 3298, 980, 770, 2039],
    "penalties": [1822, 3005, 1373, 1054, 1125, 1173, 348, 2583],
    "greedy with penalties": [2398, 4802, 4007, 1365, 638, 4385, 1330, 2921],
    "bias and min_tokens": [2222, 198, 7, 7, 4999, 7, 7, 7],
}
"""Written down once, on a CPU."""
