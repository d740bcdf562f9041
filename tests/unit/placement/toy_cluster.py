"""Toy models of gigabytes for toy GPUs, whose plans take a millisecond."""

from __future__ import annotations

from placement.footprint import Footprint
from placement.hardware import Gpu, Inventory, Node
from placement.reserve import reserve
from placement.wishes import Wish
from placement.workload import Workload
from tests.unit.placement.toy import toy_footprint

GB, MB = 10**9, 10**6
TAKEN = reserve(toy_footprint([1]), Workload(4, 8, 256, 64, "float16"), device_type="cuda", devices=2).held(
    last=True, blocks=1024, kv_block_bytes=0
)
"""What a GPU's reserve takes, more or less, whatever the constants of the day."""
SMALL = Gpu.of("small", TAKEN + 2300 * MB, accelerator_type="S")
LARGE = Gpu.of("large", TAKEN + 7300 * MB, accelerator_type="L")
PART = {"bf16": 4, "int8": 2, "nf4": 1}
"""Bytes of a model at a quantisation, over its bytes at nf4."""


def weigh(wish: Wish, quantization: str) -> Footprint:
    """`source` is the model's bytes at nf4 in MB: eight layers and an embedding of 100 MB; 40 kB of KV per token."""
    layer = int(wish.source) * 10**6 * PART[quantization] // 8
    footprint = toy_footprint([layer] * 8, embedding=100 * 10**6, kv_heads=[1250] * 8, works=[10**8] * 8)
    return footprint


def cluster(*nodes: tuple[Gpu, ...]) -> Inventory:
    """Nodes a, b, c, ..."""
    return Inventory(tuple(Node(name, gpus) for name, gpus in zip("abcdefgh", nodes, strict=False)))


def wish(name: str = "m", megabytes: int = 1000, **options: object) -> Wish:
    """A wish that `weigh` knows; 64 tokens is what a toy was made for."""
    return Wish(name, str(megabytes), **{"context": 16, "max_batch_tokens": 8, "block_size": 4, **options})  # type: ignore[arg-type]
