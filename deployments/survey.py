"""The plan of every pool, made in a process of its own: planning imports torch, which the one that starts Ray need not.

survey = take(models)           # runs `python -m deployments.survey`, JSON in, JSON out
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.errors import ConfigError
from deployments.settings import ModelSettings, PoolSettings
from deployments.store import LocalModel, child_environment, last_line
from placement.export import from_json, to_json
from placement.plan import Plan


@dataclass(frozen=True, slots=True)
class PlannedPool:
    """A pool and the plan of each of its replicas."""

    model: str
    pool: PoolSettings
    plan: Plan

    @property
    def gpus(self) -> int:
        """GPUs that all its replicas need."""
        return self.pool.most_replicas * sum(stage.gpu.device_type == "cuda" for stage in self.plan.stages)

    @property
    def cpu_bytes(self) -> int:
        """Main memory that all its replicas' weights, reserves and KV caches may take."""
        on_cpu = [stage for stage in self.plan.stages if stage.gpu.device_type == "cpu"]
        return self.pool.most_replicas * sum(s.weight_bytes + s.reserve_bytes + self.plan.kv_bytes(s) for s in on_cpu)


@dataclass(frozen=True, slots=True)
class Survey:
    """What is to run, and the GPUs there are to run it on."""

    pools: tuple[PlannedPool, ...]
    visible_gpus: int
    folders: Mapping[str, Path]
    """Model name -> its folder."""


def take(models: Sequence[tuple[ModelSettings, LocalModel]]) -> Survey:
    """Plan every pool of `models` on this machine's devices.

    Raises:
        ConfigError: a pool does not fit; one line.
    """
    wanted = [(model.name, local.path, pool) for model, local in models for pool in model.pools]
    asked = [
        {"model": name, "folder": str(path), "pool": pool.model_dump_json(exclude_unset=True)}
        for name, path, pool in wanted
    ]
    done = subprocess.run(
        [sys.executable, "-m", "deployments.survey"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    if done.returncode:
        raise ConfigError(last_line(done.stderr))
    answer = json.loads(done.stdout.splitlines()[-1])
    plans = (from_json(plan) for plan in answer["plans"])
    pools = tuple(PlannedPool(name, pool, plan) for (name, _, pool), plan in zip(wanted, plans, strict=True))
    return Survey(pools, answer["gpus"], {model.name: local.path for model, local in models})


def _answer() -> int:
    from deployments.planning import plan_pool
    from placement import probe

    try:
        plans = [
            to_json(
                plan_pool(entry["model"], Path(entry["folder"]), PoolSettings.model_validate_json(entry["pool"]))[0]
            )
            for entry in json.load(sys.stdin)
        ]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"plans": plans, "gpus": len(probe.cuda_gpus())}))
    return 0


if __name__ == "__main__":
    sys.exit(_answer())
