"""`python -m placement MODEL`: where each layer goes and how many KV tokens are left, before anything loads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from placement import export
from placement.errors import PlacementError
from placement.footprint import Quantization, footprint
from placement.hardware import Gpu, parse_gpus, parse_inventory
from placement.kv import DTYPE_BYTES
from placement.plan import Plan, solve
from placement.solver import Goal


class _Parser(argparse.ArgumentParser):
    """Errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan; the exit code: 0, or 2 with one line on stderr."""
    parser = _arguments()
    options = parser.parse_args(argv)
    try:
        plan = _solve(options)
    except PlacementError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(export.to_json(plan))
        return 0
    print(export.table(plan))
    if options.explain:
        print(export.explain(plan))
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = _Parser(prog="placement", description="Where each layer goes and how many KV tokens are left.")
    parser.add_argument("model", type=Path, help="folder with a Hugging Face model's config.json")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="GPUS", help="such as 2x24GiB,1x80GiB; default: this machine's")
    where.add_argument("--cpu", metavar="SIZES", help="virtual devices on the CPU, such as 600MB,1GB")
    where.add_argument("--inventory", metavar="FILE", type=Path, help="GPUs in YAML or JSON")
    parser.add_argument("--quantization", choices=get_args(Quantization), default="nf4")
    parser.add_argument("--double-quant", action="store_true", help="nf4 and fp4: quantise the scales too")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, help="compute dtype")
    parser.add_argument("--kv-dtype", choices=DTYPE_BYTES, help="default: the compute dtype")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="longest sequence; default: the model's")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--max-batch-tokens", type=int, default=512, metavar="TOKENS", help="of one step")
    parser.add_argument("--max-sequences", type=int, default=256, metavar="N", help="running at once")
    parser.add_argument("--max-memory", metavar="CAPS", help="per device, such as 0=600MB,1=1GB")
    parser.add_argument("--goal", choices=get_args(Goal), default="throughput")
    parser.add_argument("--explain", action="store_true", help="say what every reserve is for")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


def _solve(options: argparse.Namespace) -> Plan:
    # The devices first: they are checked in no time, the footprint imports torch.
    devices, caps = _devices(options), _caps(options.max_memory)
    weighed = footprint(
        options.model, quantization=options.quantization, double_quant=options.double_quant, dtype=options.dtype
    )
    return solve(
        weighed,
        devices,
        block_size=options.block_size,
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=options.max_sequences,
        max_context=options.context,
        max_memory=caps,
        goal=options.goal,
        kv_dtype=options.kv_dtype,
    )


def _devices(options: argparse.Namespace) -> tuple[Gpu, ...]:
    if options.gpus:
        return parse_gpus(options.gpus)
    if options.cpu:
        return parse_gpus(options.cpu, device_type="cpu")
    if options.inventory:
        try:
            return parse_inventory(options.inventory.read_text(encoding="utf-8")).gpus
        except OSError as error:
            raise PlacementError(f"inventory {options.inventory} can't be read: {error.strerror}") from None
    from placement import probe

    if gpus := probe.cuda_gpus():
        return gpus
    raise PlacementError("this machine has no CUDA device; say what to plan for: --gpus 2x24GiB or --cpu 600MB,1GB")


def _caps(text: str | None) -> dict[int, str]:
    caps = {}
    for part in text.split(",") if text else ():
        device, _, size = part.partition("=")
        if not device.strip().isdigit() or not size:
            raise PlacementError(f"--max-memory {text!r}: write device=size, such as 0=600MB,1=1GB")
        caps[int(device)] = size
    return caps


if __name__ == "__main__":
    sys.exit(main())
