"""`headroom k8s`: the Serve config of k8s/base from a config, or an overlay from a cluster plan."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from deployments import __version__
from deployments.config_file import read_config
from deployments.errors import ConfigError
from deployments.k8s import GroupSpec, Worker, cluster_config, dump, overlay, parse_node_labels
from deployments.store import DEMO, HUB_ID
from placement.cluster import Layout
from placement.cluster_command import add_wishes, chosen_plan, parse_cluster
from placement.errors import PlacementError
from placement.plan_command import OneLineParser

BASE = Path("k8s/base")
IMAGE = f"headroom:{__version__}-cuda"


def main(arguments: Sequence[str]) -> int:
    """Write what is asked for, and say what.

    Raises:
        ConfigError: one line.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.config is not None:
            _check_alone(options)
            _write_base(options)
        else:
            _write_overlay(options, arguments)
    except PlacementError as error:
        raise ConfigError(str(error)) from None
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="headroom k8s", description="Files for Kubernetes: see docs/operations.md.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="write the base's serve_config.yaml from this one")
    what.add_argument(
        "--gpus", metavar="NODES", help="write an overlay for these, as `headroom plan cluster` takes them"
    )
    parser.add_argument("--base", type=Path, default=BASE, metavar="FOLDER", help=f"default: {BASE}")
    plan = parser.add_argument_group("with --gpus")
    plan.add_argument("--out", type=Path, metavar="FOLDER", help="of the overlay")
    plan.add_argument("--name", help="what clients name, with --model; default: its last part")
    plan.add_argument("--source", help="what the workers load, with --model; default: the same as planned with")
    plan.add_argument(
        "--node-label",
        action="append",
        default=[],
        metavar="GPU:KEY=VALUE",
        help="label of the nodes with this kind of GPU; default: GPU feature discovery's nvidia.com/gpu.product",
    )
    plan.add_argument("--pod-cpus", type=int, default=4, metavar="N", help="CPUs of a worker; default: 4")
    plan.add_argument("--pod-memory", default="24Gi", metavar="SIZE", help="main memory of a worker; default: 24Gi")
    plan.add_argument("--own-cache", metavar="SIZE", help="a volume per worker (ReadWriteOnce), not one for all")
    plan.add_argument("--image", default=IMAGE, help=f"with its tag; default: {IMAGE}")
    plan.add_argument(
        "--min-replicas",
        type=int,
        metavar="N",
        help="replicas follow demand, from N (0: none while idle) to as many as planned; default: always all",
    )
    add_wishes(parser)
    return parser


def _check_alone(options: argparse.Namespace) -> None:
    """`--config` goes with `--base` and nothing else.

    Raises:
        ConfigError: another option was given; it would change nothing.
    """
    unset = vars(_parser().parse_args(["--config", "any"]))
    given = [key for key, value in vars(options).items() if key not in ("config", "base") and value != unset[key]]
    if given:
        raise ConfigError(f"--{min(given).replace('_', '-')} goes with --gpus; --config writes the base as it is")


def _write_base(options: argparse.Namespace) -> None:
    for model in read_config(options.config).config.application.args.models:
        _check_not_here(model.name, model.source)
    config = cluster_config(yaml.safe_load(options.config.read_text(encoding="utf-8")))
    text = f"# Written by: headroom k8s --config {shlex.quote(str(options.config))}\n{dump(config)}"
    _write(options.base, {"serve_config.yaml": text})


def _write_overlay(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    if options.min_replicas is not None and options.min_replicas < 0:
        raise ConfigError(f"--min-replicas {options.min_replicas}: write 0 or more")
    if options.out is None:
        raise ConfigError("--gpus writes an overlay: say where with --out, such as k8s/overlays/mine")
    inventory = parse_cluster(options.gpus)
    template = worker_template(options.base)
    worker = _worker(options, {gpu.name for gpu in inventory.gpus})
    chosen = _renamed(chosen_plan(inventory, options).chosen, options)
    if options.source is None:
        for pool in chosen.pools:
            _check_not_here(pool.wish.name, pool.wish.source)
    made = overlay(
        inventory,
        chosen,
        template,
        worker=worker,
        base=Path(os.path.relpath(options.base, options.out)).as_posix(),
        header=f"Written by:\nheadroom k8s {shlex.join(arguments)}",
        min_replicas=options.min_replicas,
    )
    _write(options.out, made.files())


def _check_not_here(model: str, source: str) -> None:
    """What is a folder here would be looked for on the hub by workers, if its name could be an id.

    Raises:
        ConfigError: it is one.
    """
    if source != DEMO and HUB_ID.fullmatch(source) and Path(source).is_dir():
        raise ConfigError(
            f"model {model}: source {source!r} is a folder of this machine, which workers don't have: say what they "
            "load with --source, or in a --config name a Hugging Face id"
        )


def _worker(options: argparse.Namespace, kinds: Set[str]) -> Worker:
    if not re.fullmatch(r"[^@\s]+:[\w.-]+", options.image):
        raise ConfigError(
            f"--image {options.image}: name it with its tag, such as registry.example.com/headroom:1.0-cuda"
        )
    for option, size in (("--pod-memory", options.pod_memory), ("--own-cache", options.own_cache)):
        if size is not None and not re.fullmatch(r"[1-9][0-9]*[KMGTP]i", size):
            raise ConfigError(f"{option} {size}: write a whole number with Mi, Gi or Ti, such as 24Gi")
    if options.pod_cpus < 1:
        raise ConfigError(f"--pod-cpus {options.pod_cpus}: a worker needs 1 at least")
    labels = parse_node_labels(options.node_label)
    if strange := labels.keys() - kinds:
        raise ConfigError(f"--node-label {min(strange)}: --gpus has no such GPU; it has {', '.join(sorted(kinds))}")
    return Worker(options.pod_cpus, options.pod_memory, options.image, options.own_cache, labels)


def _renamed(layout: Layout, options: argparse.Namespace) -> Layout:
    """The layout with `--name` and `--source`, which a model may be planned without."""
    given = {key: value for key in ("name", "source") if (value := getattr(options, key)) is not None}
    if given and options.model is None:
        raise ConfigError(f"--{' and --'.join(given)} go with --model; a file of models has its own")
    return replace(layout, pools=tuple(replace(pool, wish=replace(pool.wish, **given)) for pool in layout.pools))


def worker_template(base: Path) -> GroupSpec:
    """The worker group of the base at `base`.

    Raises:
        ConfigError: there is none.
    """
    path = base / "rayservice.yaml"
    try:
        service: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); --base names the repository's k8s/base") from None
    group: GroupSpec = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    return group


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            print(f"wrote {folder / name}", flush=True)
    except OSError as error:
        raise ConfigError(f"{folder} can't be written to: {error.strerror}") from None
