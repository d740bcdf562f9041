"""The engine's own process: `python -m deployments.engine.process FD`, started by a replica, ending with it.

A replica's process runs asyncio, whose hold on the interpreter lock must not be in the step. Here one thread reads
commands, steps, and writes one report per step.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from transformers.utils.logging import disable_progress_bar

from deployments.engine.garbage import settle_garbage
from deployments.engine.holdings import Holdings
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.engine.memory_watch import MemoryWatch
from deployments.engine.messages import (
    Commands,
    EngineLimits,
    EngineSpec,
    Failed,
    Measured,
    Started,
    StepReport,
    Tuning,
)
from deployments.errors import HeadroomError
from deployments.planning import plan_pool, step_tokens
from deployments.protocol import TokenChunk
from placement import probe
from placement.hardware import DeviceType
from placement.plan import Plan

log = logging.getLogger("headroom.engine")


def main(argv: list[str]) -> int:
    """Serve one engine over the connection whose file descriptor is `argv[1]`."""
    logging.basicConfig(level=logging.INFO, format="engine %(levelname)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the replica ends this one
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    disable_progress_bar()
    # It recommends a package that fetches kernels from a hub at run time.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # It says at each int8 product that it casts to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with Connection(int(argv[1])) as connection:
        return serve(connection)


def serve(connection: Connection) -> int:
    """`run`, with the reason of its end as the last message; the exit code."""
    try:
        run(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the replica closed its end or died
    except HeadroomError as error:
        connection.send(Failed(" ".join(str(error).split())))
    except Exception as error:
        log.exception("the engine stops")
        connection.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())}"))
    return 1


def run(connection: Connection) -> None:
    """Load, then step until the connection ends.

    Raises:
        EOFError: the other end closed.
    """
    spec: EngineSpec = connection.recv()
    began = time.monotonic()
    plan, device_type = plan_pool(spec.name, spec.model_dir, spec.pool)
    limits = limits_of(spec, plan, device_type)
    model = load(spec.model_dir, plan, device_type=device_type, cache_dir=spec.cache_dir, limits=limits)
    engine = Engine(model, plan, limits)
    settle_garbage()
    connection.send(Started(plan, model.attention, time.monotonic() - began))
    memory, holdings = MemoryWatch([stage.device for stage in model.stages]), Holdings()
    while True:
        chunks = _take_commands(connection, engine)
        idle, stepped_at = not engine.has_work(), time.monotonic()
        chunks += engine.step()
        measured = _measure(engine, memory, 0.0 if idle else time.monotonic() - stepped_at)
        if not engine.has_work():
            engine.check_integrity()
        connection.send(_report(engine, holdings, chunks, measured))


def _report(engine: Engine, holdings: Holdings, chunks: list[TokenChunk], measured: Measured) -> StepReport:
    blocks = engine.blocks
    held, gone = holdings.news(engine.held())
    return StepReport(
        chunks=tuple(chunks),
        held=held,
        cached_blocks=blocks.cached_blocks,
        preemptions=engine.scheduler.preemptions,
        shared_blocks=blocks.shared_blocks,
        granules=blocks.take_granule_news(),
        measured=measured,
        gone=gone,
    )


def _measure(engine: Engine, memory: MemoryWatch, step_s: float) -> Measured:
    return Measured(
        step_s=step_s,
        held_blocks=engine.blocks.held_blocks,
        running=engine.scheduler.running,
        waiting=engine.scheduler.waiting,
        busy_s=engine.busy_s,
        gpu_bytes=memory.taken(),
    )


def limits_of(spec: EngineSpec, plan: Plan, device_type: DeviceType) -> EngineLimits:
    """What an engine of `spec` is started with."""
    share = max(1, probe.cpu_cores() // (spec.replicas_here * len(plan.stages)))
    return EngineLimits(
        max_batch_tokens=step_tokens(spec.model_dir, spec.pool, device_type),
        max_sequences=spec.pool.max_sequences,
        prefix_cache=spec.pool.prefix_cache,
        granule_tokens=spec.granule_tokens,
        threads=spec.pool.threads or share,
        prefill_chunk_tokens=spec.pool.prefill_chunk_tokens,
        kernels=spec.pool.own_kernels,
        int8_threshold=spec.pool.int8_threshold,
        batch_invariant=spec.pool.batch_invariant,
        tuning=_tuning(spec),
    )


def _tuning(spec: EngineSpec) -> Tuning | None:
    if spec.kernels_dir is None or not spec.pool.tunes:
        return None
    return Tuning(spec.kernels_dir, spec.pool.tune_limit_s)


def _take_commands(connection: Connection, engine: Engine) -> list[TokenChunk]:
    """Apply what came in, waiting for it while the engine is idle; the refused requests' terminal chunks."""
    refused = []
    wait = not engine.has_work()
    while wait or connection.poll():
        wait = False
        commands: Commands = connection.recv()
        for request in commands.submit:
            try:
                engine.submit(request)
            except ValueError as error:
                refused.append(TokenChunk(request.request_id, finish_reason="error", error=str(error)))
        for request_id in commands.abort:
            engine.abort(request_id)
    return refused


def end_with(parent: int) -> None:
    """End this process when its parent is gone, also while it loads or hangs in a step. For a thread of its own."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
