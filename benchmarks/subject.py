"""What is measured: the first model of a Serve config, as this machine runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deployments.config_file import read_config
from deployments.home import state_folder
from deployments.planning import plan_pool
from deployments.settings import ModelSettings, PoolSettings, Settings, parse_settings
from deployments.store import fetch
from placement import probe
from placement.hardware import DeviceType
from placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Subject:
    """The served model, as the config has it and as this machine runs it."""

    settings: Settings
    path: Path
    plan: Plan
    device_type: DeviceType

    @classmethod
    def of(cls, config: Path) -> Subject:
        """Fetches the model where it is not here yet. Raises ConfigError."""
        settings = parse_settings(read_config(config).args)
        model = settings.models[0]
        local = fetch(model.source, revision=model.revision, home=state_folder())
        plan, device_type = plan_pool(model.name, local.path, model.pools[0])
        return cls(settings, local.path, plan, device_type)

    @property
    def model(self) -> ModelSettings:
        return self.settings.models[0]

    @property
    def pool(self) -> PoolSettings:
        return self.model.pools[0]

    @property
    def cache_dir(self) -> Path:
        """Where replicas keep the quantised checkpoint."""
        return state_folder() / "quantized"

    @property
    def cores(self) -> int:
        """Cores that this process may use."""
        return probe.cpu_cores()

    @property
    def threads(self) -> int:
        """Torch threads of one replica, by the replica's own rule."""
        replicas = sum(pool.replicas for model in self.settings.models for pool in model.pools)
        return self.pool.threads or max(1, self.cores // (replicas * len(self.plan.stages)))
