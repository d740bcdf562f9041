"""The command line of one replica's plan."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar, get_args

from placement import export
from placement.errors import PlacementError
from placement.footprint import Footprint, footprint
from placement.hardware import Gpu, parse_gpus, parse_inventory
from placement.kv import DTYPE_BYTES
from placement.plan import Plan, solve
from placement.question import Order
from placement.recipe import Quantization
from placement.solver import Goal
from placement.speed import estimate
from placement.svg import svg
from placement.workload import Attention

_T = TypeVar("_T")


class OneLineParser(argparse.ArgumentParser):
    """Errors on one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: {message}\n")


def arguments(prog: str) -> argparse.ArgumentParser:
    """What the command understands."""
    parser = OneLineParser(
        prog=prog,
        description="Where each layer of a model goes and how many KV tokens are left, before anything loads.",
        epilog=f"`{prog} cluster --help`: many models on many nodes.",
    )
    parser.add_argument(
        "model", help="a folder, a config.json, a .gguf file, or a Hugging Face id (no weights are fetched)"
    )
    _device_arguments(parser)
    _model_arguments(parser)
    _demand_arguments(parser)
    parser.add_argument("--goal", choices=get_args(Goal), default="throughput")
    parser.add_argument("--explain", action="store_true", help="say what every reserve is for")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw the plan too")
    return parser


def _device_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="GPUS", help="such as 2x24GiB,1xH100; default: this machine's")
    where.add_argument("--cpu", metavar="SIZES", help="virtual devices on the CPU, such as 600MB,1GB")
    where.add_argument("--inventory", metavar="FILE", type=Path, help="GPUs in YAML or JSON")
    parser.add_argument("--max-memory", metavar="CAPS", help="per device, such as 0=600MB,1=1GB")
    parser.add_argument("--allow-cpu", metavar="SIZE", help="main memory for what the GPUs can't hold, such as 32GB")
    parser.add_argument("--order", choices=get_args(Order), default="given", help="best: devices in any order")
    parser.add_argument(
        "--pin", metavar="MODULE=DEVICE", action="append", default=[], help="such as lm_head=0 or model.layers.3=1"
    )


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    quantizations = get_args(Quantization)
    parser.add_argument("--quantization", choices=quantizations, help="default: the checkpoint's own, else nf4")
    parser.add_argument("--double-quant", action="store_true", help="nf4 and fp4: quantise the scales too")
    parser.add_argument("--quantize-embeddings", action="store_true", help="the input embedding too")
    parser.add_argument("--quantize-head", action="store_true", help="the head too; from a tied embedding a copy")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, help="compute dtype")
    parser.add_argument("--kv-dtype", metavar="DTYPE", help="fp8, bfloat16, ...; default: the compute dtype")
    parser.add_argument(
        "--attention",
        choices=get_args(Attention),
        help="what computes it on GPUs; default: flashinfer, where it has kernels for the model and runs on them all",
    )
    parser.add_argument("--vision", action="store_true", help="count a multimodal model's towers")
    parser.add_argument("--quantize-experts", action="store_true", help="nf4, fp4 and int8: fused experts too")


def _demand_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, metavar="TOKENS", help="longest sequence; it must fit")
    parser.add_argument("--min-context", type=int, metavar="TOKENS", help="what must fit, where that is less")
    parser.add_argument("--min-concurrency", type=int, default=1, metavar="N", help="sequences that must fit at once")
    parser.add_argument("--concurrent-context", type=int, metavar="TOKENS", help="of each; default: --min-context")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--max-batch-tokens", type=int, default=512, metavar="TOKENS", help="of one step")
    parser.add_argument("--max-sequences", type=int, default=256, metavar="N", help="running at once")


def run(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        PlacementError: one line.
    """
    # The devices first: they are checked in no time, the footprint imports torch.
    devices, caps, pins = _devices(options), parse_caps(options.max_memory), _pins(options.pin)
    weighed = footprint(
        options.model,
        quantization=options.quantization,
        double_quant=options.double_quant,
        head=options.quantize_head,
        embeddings=options.quantize_embeddings,
        dtype=options.dtype,
        vision=options.vision,
        experts=options.quantize_experts,
    )
    plan = _solve(options, weighed, devices, caps, pins)
    if options.svg:
        write(options.svg, svg(plan))
    if options.json:
        return export.to_json(plan)
    lines = [export.table(plan), *_left_empty(devices, plan), *_speed(weighed, plan)]
    return "\n".join((*lines, export.explain(plan)) if options.explain else lines)


def _solve(
    options: argparse.Namespace,
    weighed: Footprint,
    devices: tuple[Gpu, ...],
    caps: dict[int, str],
    pins: dict[str, int | str],
) -> Plan:
    return solve(
        weighed,
        devices,
        goal=options.goal,
        block_size=options.block_size,
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=options.max_sequences,
        max_context=options.context,
        min_context=options.context if options.min_context is None else options.min_context,
        min_concurrency=options.min_concurrency,
        concurrent_context=options.concurrent_context,
        max_memory=caps,
        kv_dtype=options.kv_dtype,
        attention=options.attention,
        pins=pins,
        allow_cpu=options.allow_cpu,
        order=options.order,
    )


def _left_empty(devices: tuple[Gpu, ...], plan: Plan) -> list[str]:
    """Which devices the goal does without, in words."""
    used = {stage.device for stage in plan.stages}
    empty = [str(index) for index in range(len(devices)) if index not in used]
    return [f"nothing is placed on device {', '.join(empty)}"] if empty else []


def _speed(weighed: Footprint, plan: Plan) -> list[str]:
    """The estimate in words; none for virtual devices, whose speed is the machine's."""
    if all(stage.gpu.device_type == "cpu" for stage in plan.stages):
        return []
    speed = estimate(weighed, plan)
    return [
        f"estimated tokens/s: {speed.decode:,} with {speed.sequences} sequences of {speed.context:,} tokens, "
        f"{speed.single:,} alone, {speed.prefill:,} in prefill"
    ]


def _devices(options: argparse.Namespace) -> tuple[Gpu, ...]:
    if options.gpus:
        return parse_gpus(options.gpus)
    if options.cpu:
        return parse_gpus(options.cpu, device_type="cpu")
    if options.inventory:
        return parse_inventory(read(options.inventory, "inventory")).gpus
    from placement import probe

    if gpus := probe.inventory().gpus:
        return gpus
    raise PlacementError("this machine has no CUDA device; say what to plan for: --gpus 2x24GiB or --cpu 600MB,1GB")


def read(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        PlacementError: it can't be read.
    """
    return _file(lambda: path.read_text(encoding="utf-8"), f"{what} {path} can't be read")


def write(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        PlacementError: it can't be written.
    """
    _file(lambda: path.write_text(text, encoding="utf-8"), f"{path} can't be written")


def _file(act: Callable[[], _T], failed: str) -> _T:
    try:
        return act()
    except OSError as error:
        raise PlacementError(f"{failed}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlacementError(f"{failed}: not UTF-8") from None


def parse_caps(text: str | None) -> dict[int, str]:
    """What `--max-memory` says: device -> size.

    Raises:
        PlacementError: it is not written so.
    """
    caps: dict[int, str] = {}
    for part in text.split(",") if text else ():
        device, _, size = part.partition("=")
        if not device.strip().isdecimal() or not size:
            raise PlacementError(f"--max-memory {text!r}: write device=size, such as 0=600MB,1=1GB")
        if int(device) in caps:
            raise PlacementError(f"--max-memory {text!r}: device {int(device)} is given twice")
        caps[int(device)] = size
    return caps


def _pins(texts: list[str]) -> dict[str, int | str]:
    pins: dict[str, int | str] = {}
    for text in texts:
        module, _, device = text.rpartition("=")
        if not module or not (device.isdecimal() or device == "cpu"):
            raise PlacementError(f"--pin {text!r}: write module=device, such as lm_head=0, or =cpu with --allow-cpu")
        if module in pins:
            raise PlacementError(f"--pin {text!r}: {module} is pinned twice")
        pins[module] = device if device == "cpu" else int(device)
    return pins
