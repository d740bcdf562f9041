"""The command line of a cluster's plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from placement import cluster_export
from placement.cluster import ClusterPlan, plan_cluster
from placement.errors import PlacementError
from placement.footprint import Footprint, footprint
from placement.hardware import Inventory, Node, parse_gpus, parse_inventory
from placement.plan_command import OneLineParser, read, write
from placement.recipe import Quantization
from placement.solver import Goal
from placement.wishes import Wish, check_together, parse_wishes


def arguments(prog: str) -> argparse.ArgumentParser:
    """What the command understands."""
    parser = OneLineParser(
        prog=prog,
        description="Which GPUs form a replica of which model, at which quantisation, on which node.",
        epilog="tokens/s are estimates (placement/speed.py says how); every byte is planned exactly.",
    )
    parser.add_argument(
        "inventory",
        help="a YAML or JSON file; nodes such as 8xH100+4xL4,4xT4; `local`: this machine; `ray`: the cluster",
    )
    add_wishes(parser)
    parser.add_argument("--pin-nodes", action="store_true", help="replicas land on the nodes planned, by Ray resources")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--emit", metavar="FILE", type=Path, help="write a serve_config.yaml of the chosen row")
    return parser


def add_wishes(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which models, and which row of the frontier."""
    parser.add_argument("models", nargs="?", type=Path, help="a YAML or JSON file; see placement/wishes.py")
    parser.add_argument("--model", metavar="MODEL", help="one model instead: a folder, file or Hugging Face id")
    one = parser.add_argument_group("with --model")
    one.add_argument(
        "--quantization", metavar="NAMES", help=f"allowed, best first, such as int8,nf4; of {', '.join(_names())}"
    )
    one.add_argument("--double-quant", action="store_true", default=None, help="nf4 and fp4: quantise the scales too")
    one.add_argument("--context", type=int, metavar="TOKENS", help="of one sequence, on every replica")
    one.add_argument("--min-concurrency", type=int, metavar="N", help="sequences at once, on all replicas together")
    one.add_argument("--goal", choices=get_args(Goal))
    parser.add_argument("--pick", type=int, metavar="ROW", help="take another row of the frontier")


def run(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        PlacementError: one line.
    """
    plan = chosen_plan(parse_cluster(options.inventory), options)
    inventory = plan.inventory
    pinned = options.pin_nodes
    if options.emit:
        write(options.emit, cluster_export.serve_config(inventory, plan.chosen, pin_nodes=pinned))
    if options.json:
        return cluster_export.cluster_json(plan, pin_nodes=pinned)
    lines = cluster_export.notes(inventory, plan.chosen, pin_nodes=pinned)
    return "\n".join((cluster_export.cluster_table(plan), *lines))


def chosen_plan(inventory: Inventory, options: argparse.Namespace) -> ClusterPlan:
    """The plan for `inventory` that the arguments of `add_wishes` ask for.

    Raises:
        PlacementError: one line.
    """
    return _picked(plan_cluster(inventory, _wishes(options), weigh), options.pick)


def weigh(wish: Wish, quantization: str) -> Footprint:
    """The footprint of a wished model."""
    return footprint(wish.source, quantization=quantization, double_quant=wish.doubles(quantization), name=wish.name)


def _names() -> tuple[str, ...]:
    return get_args(Quantization)


def _wishes(options: argparse.Namespace) -> tuple[Wish, ...]:
    if (options.models is None) == (options.model is None):
        raise PlacementError("say which models to serve: a file of them, or one with --model")
    given = {
        "quantization": tuple(options.quantization.split(",")) if options.quantization else None,
        "double_quant": options.double_quant,
        "context": options.context,
        "concurrency": options.min_concurrency,
        "goal": options.goal,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if options.models is not None:
        if given:
            raise PlacementError(f"{', '.join(given)} can't be given beside a file of models; write it there")
        return parse_wishes(read(options.models, "models"))
    wishes = (Wish(name=Path(options.model).name or "model", source=options.model, **given),)
    check_together(wishes)
    return wishes


def parse_cluster(text: str) -> Inventory:
    """The machines that `text` names: a file, nodes such as 8xH100+4xL4,4xT4, `local` or `ray`.

    Raises:
        PlacementError: none of these.
    """
    if text in ("local", "ray"):
        from placement import probe

        return probe.inventory() if text == "local" else probe.ray_inventory()
    path = Path(text)
    if (path.exists() and not path.is_dir()) or path.suffix in (".yaml", ".yml", ".json"):
        return parse_inventory(read(path, "inventory"))
    return Inventory(tuple(Node(f"node{i}", parse_gpus(part)) for i, part in enumerate(text.split("+"))))


def _picked(plan: ClusterPlan, row: int | None) -> ClusterPlan:
    if row is None:
        return plan
    if not 1 <= row <= len(plan.frontier):
        raise PlacementError(f"--pick {row}: the frontier has rows 1 to {len(plan.frontier)}")
    return ClusterPlan(plan.inventory, plan.frontier[row - 1], plan.frontier)
