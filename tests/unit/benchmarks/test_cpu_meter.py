"""CPU time by role: from processes that use a known amount, and the arithmetic."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from benchmarks import cpu_meter
from benchmarks.cpu_meter import CpuMeter

BUSY_S = 0.3
USES = f"""
import sys, time
sys.stdin.readline()
while time.process_time() < {BUSY_S}: pass
print(flush=True)
sys.stdin.readline()
"""
"""Python that, told so by a line, uses CPU time until it had so much in all."""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {USES!r}, 'deployments.engine.process'])"


@contextmanager
def python(code: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate("\n")


def use(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()


def test_clients_and_the_services_descendants_count_by_what_they_do() -> None:
    with python(USES) as client, python(PARENT) as service:
        while not (family := psutil.Process(service.pid).children()) or "deployments.engine.process" not in (
            family[0].cmdline()
        ):
            time.sleep(0.01)
        name = psutil.Process(service.pid).name()  # what has no role is called by it
        meter = CpuMeter([client.pid], service.pid)
        assert meter.parts() == ()
        with meter.over(4):
            use(service)
        parts = {part.role: part for part in meter.parts()}
        assert {role: part.processes for role, part in parts.items()} == {"clients": 1, "engine": 1, name: 1}
        assert BUSY_S / 2 < 4 * parts["engine"].per_request_s < 2 * BUSY_S
        assert max(parts["clients"].per_request_s, parts[name].per_request_s) < parts["engine"].per_request_s / 2
        assert meter.parts()[0].role == "engine", "what used the most comes first"
        assert 0 < parts["engine"].busiest < 1.5


def test_loads_add_up_and_the_busiest_is_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    instants = iter([10.0, 12.0, 20.0, 22.0])
    monkeypatch.setattr(cpu_meter.time, "perf_counter", lambda: next(instants))
    readings = iter(
        [
            {1: ("ingress", 5.0), 2: ("ray::IDLE", 7.0), 3: ("engine", 1.0)},
            {1: ("ingress", 6.0), 2: ("ingress", 7.5), 3: ("engine", 1.0)},  # 2 was not it before
            {1: ("ingress", 9.0), 2: ("ingress", 9.0), 3: ("engine", 2.0)},
            {1: ("ingress", 10.0), 2: ("ingress", 9.5), 3: ("engine", 2.0), 4: ("engine", 0.5)},
        ]
    )
    monkeypatch.setattr(CpuMeter, "_read", lambda _: next(readings))
    meter = CpuMeter([], None)
    for _ in range(2):
        with meter.over(5):
            pass
    ingress, engine = meter.parts()
    assert (ingress.role, ingress.processes, ingress.per_request_s, ingress.busiest) == ("ingress", 2, 0.3, 0.5)
    assert (engine.role, engine.processes, engine.per_request_s, engine.busiest) == ("engine", 2, 0.05, 0.125)
