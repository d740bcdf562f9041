"""`headroom compare`: what it understands, and the run: a process per quantisation, then table, JSON and picture."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter, ValidationError

from deployments import __version__, store
from deployments.compare.picture import svg
from deployments.compare.table import table
from deployments.compare.values import SCHEMA, Answer, Comparison, Failed, Job, Measured, Row, Workload
from deployments.errors import ConfigError
from deployments.home import state_folder
from deployments.settings import PoolSettings, Quantization, describe, mistakes
from placement import probe
from placement.errors import PlacementError
from placement.hardware import DeviceType
from placement.plan_command import OneLineParser, parse_caps

TEXT = Path(__file__).parent / "text" / "darwin_1859_introduction.txt"
"""The introduction of Charles Darwin's On the Origin of Species (1859), which is in the public domain."""
_WINDOW = 1024
_BITSANDBYTES = ("nf4", "fp4", "int8")
_ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)

Measure = Callable[[Job], Row]


def main(arguments: Sequence[str]) -> int:
    """Measure and print; 0 where one quantisation could be measured.

    Raises:
        ConfigError: an option that can't be, or no quantisation could be measured; one line.
    """
    options = _parser().parse_args(arguments)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    device_type = device_of(options.device)
    names = quantizations(options.quantization)
    refuse_idle_options(options, names, device_type)
    pools = [_pool(options, name, device_type) for name in names]
    text = readable(options.text)
    for path in filter(None, (options.json, options.svg)):
        check_writable(path)
    local = store.fetch(options.model, revision=options.revision, home=state_folder(), progress=_say)
    workload = _workload(options, local.max_context)
    jobs = [
        Job(
            model=options.model,
            folder=local.path,
            text=text,
            pool=pool,
            workload=workload,
            cache=state_folder() / "quantized",
        )
        for pool in pools
    ]
    rows = measure_all(jobs, in_child)
    comparison = Comparison(
        schema=SCHEMA,
        model=options.model,
        revision=options.revision,
        text=text.name,
        workload=workload,
        hourly_price=options.hourly_price,
        started=started,
        machine=_machine(device_type),
        versions={"headroom": __version__}
        | {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        rows=rows,
    )
    return _report(comparison, options)


def measure_all(jobs: Sequence[Job], measure: Measure) -> tuple[Row, ...]:
    """One after the other, so that none is beside another; one that fails is a row like the others."""
    rows = []
    for i, job in enumerate(jobs, start=1):
        _say(f"{job.pool.quantization} ({i} of {len(jobs)}): planning, loading, measuring")
        rows.append(measure(job))
    return tuple(rows)


def in_child(job: Job) -> Row:
    """Measure in a process of its own; in a second one where the first had to quantise the checkpoint."""
    answer = _ask(job)
    if isinstance(answer, Measured | Failed):
        return answer
    quantise_s = answer.seconds
    _say(f"{job.pool.quantization}: quantised in {quantise_s:.0f} s, once; measuring")
    answer = _ask(job)
    if isinstance(answer, Measured):
        return answer.model_copy(update={"quantise_s": quantise_s})
    if isinstance(answer, Failed):
        return answer
    return Failed(
        quantization=job.pool.quantization,
        reason=f"the quantised checkpoint did not stay in {job.cache}; see what removes it, or set HEADROOM_HOME",
    )


def _ask(job: Job) -> Answer:
    with tempfile.TemporaryDirectory(prefix="headroom-compare-") as folder:
        question, answer = Path(folder, "job.json"), Path(folder, "answer.json")
        question.write_text(job.model_dump_json(exclude_unset=True), encoding="utf-8")
        command = [sys.executable, "-m", "deployments.compare.child", str(question), str(answer)]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
            env=store.child_environment(),
        )  # fmt: skip
        if done.returncode:
            return Failed(quantization=job.pool.quantization, reason=_how_it_ended(done.returncode, done.stderr))
        return _ANSWER.validate_json(answer.read_text(encoding="utf-8"))


def _how_it_ended(code: int, errors: str) -> str:
    if code == -9:
        return "its process was killed (SIGKILL): main memory ran out; lower --max-memory, or free some"
    return f"its process ended with code {code}: {store.last_line(errors)}"


def device_of(wanted: str) -> DeviceType:
    """What "auto" means here; a GPU that is asked for is there.

    Raises:
        ConfigError: it isn't.
    """
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise ConfigError("--device cuda: no CUDA device is visible; use --device cpu, or make one visible")
    return "cpu"


def quantizations(text: str) -> list[Quantization]:
    """The names in `text`, each once.

    Raises:
        ConfigError: an unknown name, or one twice.
    """
    known = {str(name): name for name in get_args(Quantization)}
    names = [name.strip() for name in text.split(",")]
    for i, name in enumerate(names):
        if name not in known:
            raise ConfigError(f"--quantization {text}: {name!r} is not one of {', '.join(known)}")
        if name in names[:i]:
            raise ConfigError(f"--quantization {text}: {name} is there twice")
    return [known[name] for name in names]


def refuse_idle_options(options: argparse.Namespace, names: Sequence[str], device_type: DeviceType) -> None:
    """No option is given that would change nothing.

    Raises:
        ConfigError: one is; by its name.
    """
    if options.kernels is not None and device_type == "cpu":
        raise ConfigError(
            "--kernels chooses between kernels on GPUs, and the CPU always has bitsandbytes'; leave it out"
        )
    if options.kernels is not None and not {"nf4", "fp4", "int8"} & set(names):
        raise ConfigError(
            "--kernels is for quantised weights (nf4, fp4, int8); add one to --quantization, or leave it out"
        )
    if options.threads is not None and device_type == "cuda":
        raise ConfigError(
            "--threads is for the CPU, and this machine's GPUs are used; leave it out, or use --device cpu"
        )
    if options.quantize_experts and not set(_BITSANDBYTES) & set(names):
        raise ConfigError("--quantize-experts is for nf4, fp4 and int8; add one to --quantization, or leave it out")
    if options.int8_threshold is not None and "int8" not in names:
        raise ConfigError("--int8-threshold is for int8; add it to --quantization, or leave it out")
    if options.double_quant and not {"nf4", "fp4"} & set(names):
        raise ConfigError("--double-quant is for nf4 and fp4; add one to --quantization, or leave it out")
    if options.hourly_price is not None and not options.hourly_price > 0:
        raise ConfigError(f"--hourly-price {options.hourly_price:g}: give what an hour of this machine costs, above 0")


def readable(path: Path) -> Path:
    """`path`, absolute, a file of text.

    Raises:
        ConfigError: it isn't.
    """
    try:
        path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--text {path} can't be read: it is not UTF-8") from None
    return path.absolute()


def check_writable(path: Path) -> None:
    """A file can be made there: found out before hours of measuring, not after.

    Raises:
        ConfigError: it can't.
    """
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"{path} can't be written: give a file in a folder that is there and writable")


def _pool(options: argparse.Namespace, name: Quantization, device_type: DeviceType) -> PoolSettings:
    """As a Serve config's pool of this quantisation would be, so that the plan is the one that serves."""
    given: dict[str, object] = {
        "quantization": name,
        "double_quant": options.double_quant and name in ("nf4", "fp4"),
        "quantize_experts": options.quantize_experts and name in _BITSANDBYTES,
        "device": device_type,
        "stages": options.stages,
        "max_memory": _caps(options.max_memory),
        "threads": options.threads,
        "kernels": options.kernels or "headroom",
        "int8_threshold": (options.int8_threshold or 0.0) if name == "int8" else 0.0,
        "max_sequences": max(256, *_numbers(options.concurrency)),
    }
    try:
        return PoolSettings.model_validate(given)
    except ValidationError as error:
        raise ConfigError("; ".join(_option(describe(e)) for e in mistakes(error))) from None


def _option(text: str) -> str:
    """A setting's complaint, as the option's."""
    path, _, complaint = text.partition(": ")
    return complaint if path == "args" else f"--{path.replace('_', '-')}: {complaint}"


def _workload(options: argparse.Namespace, max_context: int) -> Workload:
    window = min(_WINDOW, max_context) if options.window is None else options.window
    stride = max(1, window // 2) if options.stride is None else options.stride
    if window > max_context:
        raise ConfigError(f"--window {window}: the model was made for {max_context:,} tokens at most")
    if not 1 <= stride <= window:
        raise ConfigError(f"--stride {stride}: windows of {window} tokens start every 1 to {window} tokens")
    given = {
        "concurrency": _numbers(options.concurrency),
        "input": options.input,
        "output": options.output,
        "window": window,
        "stride": stride,
    }
    try:
        return Workload.model_validate(given)
    except ValidationError as error:
        raise ConfigError("; ".join(_option(describe(e)) for e in mistakes(error))) from None


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--concurrency {text}: write numbers of requests from 1 up, with commas between")
    numbers = tuple(map(int, parts))
    if twice := next((number for number in numbers if numbers.count(number) > 1), None):
        raise ConfigError(f"--concurrency {text}: {twice} is there twice")
    return numbers


def _caps(text: str | None) -> dict[int, str]:
    try:
        return parse_caps(text)
    except PlacementError as error:
        raise ConfigError(str(error)) from None


def _report(comparison: Comparison, options: argparse.Namespace) -> int:
    print(f"\n{table(comparison)}", flush=True)
    if options.json:
        _write(options.json, comparison.model_dump_json(by_alias=True, indent=1) + "\n")
    if not any(isinstance(row, Measured) for row in comparison.rows):
        raise ConfigError("no quantisation could be measured; the table says why")
    if options.svg:
        _write(options.svg, svg(comparison))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}") from None
    _say(f"wrote {path}")


def _machine(device_type: DeviceType) -> str:
    """What it ran on, in words. Asked afterwards: asking may take memory on the GPUs."""
    if device_type == "cpu":
        return f"CPU, {probe.cpu_cores()} cores of {platform.machine()}"
    names = [gpu.name for gpu in probe.cuda_gpus()]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="headroom compare",
        description="Memory, load time, tokens/s, latency, perplexity and cost of one model in several quantisations, "
        "each measured on this machine: see docs/compare.md.",
    )
    parser.add_argument("model", help="demo, a Hugging Face id, a folder, or a .gguf file")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--quantization", default="nf4,fp4,int8,bf16", metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--double-quant", action="store_true", help="nf4 and fp4: quantise the scales too")
    parser.add_argument("--quantize-experts", action="store_true", help="nf4, fp4, int8: fused experts too")
    parser.add_argument(
        "--int8-threshold",
        type=float,
        metavar="VALUE",
        help="int8: as LLM.int8() with this outlier threshold, such as 6",
    )
    parser.add_argument(
        "--concurrency", default="1,4,16", metavar="N,N,...", help="requests at once; default: %(default)s"
    )
    parser.add_argument("--input", type=int, default=128, metavar="TOKENS", help="of a prompt; default: %(default)s")
    parser.add_argument("--output", type=int, default=64, metavar="TOKENS", help="of an answer; default: %(default)s")
    parser.add_argument("--hourly-price", type=float, metavar="PRICE", help="of this machine: gives the cost of tokens")
    text = parser.add_argument_group("perplexity")
    text.add_argument("--text", type=Path, default=TEXT, metavar="FILE", help="default: 10 kB of Darwin, 1859")
    text.add_argument(
        "--window", type=int, metavar="TOKENS", help=f"default: {_WINDOW}, or the model's longest context"
    )
    text.add_argument("--stride", type=int, metavar="TOKENS", help="default: half a window")
    where = parser.add_argument_group("devices, as in a pool's settings")
    where.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    where.add_argument("--stages", type=int, metavar="N")
    where.add_argument(
        "--max-memory", metavar="CAPS", help="per device, such as 0=600MB,1=1GB; default on the CPU: 1GB"
    )
    where.add_argument("--kernels", choices=("headroom", "bitsandbytes"), help="on GPUs")
    where.add_argument("--threads", type=int, metavar="N", help="on the CPU, per stage")
    out = parser.add_argument_group("files")
    out.add_argument("--json", type=Path, metavar="FILE")
    out.add_argument("--svg", type=Path, metavar="FILE")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
