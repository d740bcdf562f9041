"""How long a step of a simulated replica takes.

    seconds = launch + per_token * tokens + per_sequence * sequences + per_kv_token * KV tokens read

The defaults are an 8B Llama shape in NF4 on one H200, from docs/log.md (2026-11-21, second row of the engine's table):

    launch        4.2 ms     one sequence makes 236 tokens/s: weights and launch, whatever the batch
    per_token     25 us      a step of 512 rows takes 17 ms: (17 - 4.2) / 512
    per_kv_token  0.043 us   128 KiB of KV a token (32 layers, 8 KV heads of 128, 16 bit) at 71 % of 4.29 TB/s
    per_sequence  14 us      what is left of 13.5 ms a step at 128 sequences (9,457 tokens/s, one prompt token computed
                             for each token decoded)

At the other sizes of that row the formula gives 4.8, 6.5, 8.8 and 22.7 ms for 8, 32, 64 and 256 sequences; measured
were 4.6, 6.0, 8.6 and 24.9. Left out: attention among a prompt's own tokens, which at 4,096 tokens adds about a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """Coefficients, in seconds."""

    launch: float = 4.2e-3
    per_token: float = 25e-6
    per_sequence: float = 14e-6
    per_kv_token: float = 0.043e-6

    def step(self, tokens: int, sequences: int, kv_tokens: int) -> float:
        """Seconds of one step."""
        return self.launch + self.per_token * tokens + self.per_sequence * sequences + self.per_kv_token * kv_tokens


STANDARD = Speed()
"""The 8B model on one H200."""
