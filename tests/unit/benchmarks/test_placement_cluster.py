"""The clusters that are timed are what their names say, and can be planned."""

from __future__ import annotations

import pytest

from benchmarks import placement_cluster
from placement.hardware import parse_gpus


@pytest.mark.parametrize("scene", placement_cluster.SCENES)
def test_each_cluster_has_64_gpus(scene: str) -> None:
    nodes, wishes = placement_cluster.SCENES[scene]
    assert sum(len(parse_gpus(node)) for node in nodes) == 64
    assert {wish.source for wish in wishes} <= placement_cluster.SHAPES.keys()


def test_footprints_are_the_models_sizes() -> None:
    # 8.03, 70.6 and 405.9 billion parameters, less their norms.
    sizes = {name: placement_cluster.model(name).bytes / 2e9 for name in placement_cluster.SHAPES}
    assert sizes == {
        "8B": pytest.approx(8.03, 0.01),
        "70B": pytest.approx(70.6, 0.01),
        "405B": pytest.approx(405.9, 0.01),
    }


def test_one_cluster_is_planned() -> None:
    seconds, plan = placement_cluster.run("8 nodes alike, one model", placement_cluster.footprints())
    assert seconds > 0
    assert len(plan.inventory.gpus) == 64
    assert plan.chosen.exact
