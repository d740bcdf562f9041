"""Routing policies against each other, by discrete-event simulation of a fleet that runs short of KV cache.

    python -m benchmarks.routing_sim                                  # equal and unequal replicas, Poisson and bursts
    python -m benchmarks.routing_sim --trace FILE --workloads trace
    python -m benchmarks.routing_sim --fleets 64 --ledgers 4 --others  # the ledger alone, the fleet in four parts
    python -m benchmarks.routing_sim --references clairvoyant          # beside what no router could do better

The ledger is the service's own (`deployments.routing`), its time simulated. What a replica is: benchmarks/routing/
replica.py; how fast: speed.py; the others: baselines.py; the references: clairvoyant.py; what limits all of them:
`Limits` in front.py.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.routing.baselines import BASELINES
from benchmarks.routing.clairvoyant import REFERENCES
from benchmarks.routing.fleet import FLEETS
from benchmarks.routing.front import Limits
from benchmarks.routing.study import Setting, study
from benchmarks.routing.table import as_json, plot, text

WORKLOADS = ("poisson", "bursty", "chats", "trace")
LOADS = (0.5, 0.7, 0.8, 0.9, 1.0)
PER_REPLICA = 400
"""Requests of a run for each replica; at least LEAST and at most MOST in all."""
LEAST, MOST = 3000, 60_000


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", nargs="+", choices=FLEETS, default=["equal", "unequal"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["poisson", "bursty"])
    parser.add_argument("--trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--others", nargs="*", choices=list(BASELINES), default=list(BASELINES), help="to compare with")
    parser.add_argument("--references", nargs="*", choices=list(REFERENCES), default=[], help="that know the future")
    parser.add_argument("--loads", nargs="+", type=float, default=list(LOADS), help="shares of saturation")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--requests", type=int, help="of one run; default: 400 for each replica, 3,000 to 60,000")
    parser.add_argument("--limit", type=float, default=1.0, help="p99 TTFT in s that a sustained load keeps")
    parser.add_argument("--no-sustained", action="store_true", help="don't seek the sustained loads (half the time)")
    parser.add_argument("--ledgers", type=int, default=1, help="ledgers that share the fleet evenly")
    parser.add_argument("--report-delay", type=float, default=Limits().report_delay, help="s from replica to router")
    parser.add_argument("--report-every", type=float, default=Limits().report_every, help="s between reports, at least")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="two seeds, two loads, few requests: does it run?")
    parser.add_argument("--out", type=Path, help="folder for a JSON file and a plot per study")
    chosen = parser.parse_args(argv)
    if "trace" in chosen.workloads and chosen.trace is None:
        parser.error("the workload `trace` needs --trace FILE")
    if chosen.quick:
        chosen.seeds, chosen.loads, chosen.requests = 2, [0.5, 0.9], 300
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    chosen = arguments(argv)
    limits = replace(Limits(), report_delay=chosen.report_delay, report_every=chosen.report_every)
    for fleet in chosen.fleets:
        for workload in chosen.workloads:
            requests = chosen.requests or min(MOST, max(LEAST, PER_REPLICA * len(FLEETS[fleet])))
            setting = Setting(fleet, workload, chosen.trace, requests, limits, chosen.ledgers)
            _study(setting, chosen)


def _study(setting: Setting, chosen: argparse.Namespace) -> None:
    started = time.monotonic()
    done = study(
        setting,
        loads=chosen.loads,
        seeds=chosen.seeds,
        limit=None if chosen.no_sustained else chosen.limit,
        others=[*chosen.others, *chosen.references],
        processes=chosen.processes,
    )
    fleet = f"{setting.fleet} fleet" + (f", {setting.ledgers} ledgers" if setting.ledgers > 1 else "")
    print(f"== {fleet}, {setting.workload}, {setting.requests} requests a run, {chosen.seeds} seeds")
    print(text(done))
    print(f"({time.monotonic() - started:.0f} s)\n", flush=True)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        name = f"routing-{setting.fleet}-{setting.workload}"
        (chosen.out / f"{name}.json").write_text(json.dumps(as_json(done), indent=1), encoding="utf-8")
        plot(done, chosen.out / f"{name}.svg")


if __name__ == "__main__":
    main()
