"""What a cluster plan becomes: a config that `headroom` reads, resources, JSON and a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.config_file import read_config
from deployments.settings import parse_settings
from placement import cluster_export
from placement.cluster import ClusterPlan, plan_cluster
from placement.export import from_json
from placement.hardware import Gpu, Inventory
from placement.reserve import CONTEXT
from tests.unit.placement.toy_cluster import GB, LARGE, SMALL, cluster, weigh, wish


def planned(inventory: Inventory, **options: object) -> ClusterPlan:
    return plan_cluster(inventory, [wish(megabytes=1500, quantization=("int8", "nf4"), **options)], weigh)


@pytest.fixture(scope="module")
def mixed() -> ClusterPlan:
    return planned(cluster((SMALL,), (LARGE, LARGE)), goal="latency", concurrency=600)


def test_args_are_settings(mixed: ClusterPlan) -> None:
    settings = parse_settings(cluster_export.serve_args(mixed.inventory, mixed.chosen))
    (model,) = settings.models
    assert (model.name, model.source) == ("m", "1500")
    large, small = model.pools
    assert (large.name, large.replicas, large.stages, large.quantization) == ("int8-1xlarge", 2, 1, "int8")
    assert (small.name, small.replicas, small.stages, small.quantization) == ("nf4-1xsmall", 1, 1, "nf4")
    assert (large.accelerator_type, small.accelerator_type, large.resources) == ("L", "S", {})
    assert (large.device, large.goal, large.block_size, large.max_batch_tokens) == ("cuda", "latency", 4, 8)
    assert large.max_context == mixed.chosen.pools[0].plan.max_context >= 16
    assert large.max_memory == {}


def test_double_quantisation_is_said_where_it_applies() -> None:
    plan = planned(cluster((SMALL,), (LARGE,)), double_quant=True)
    settings = parse_settings(cluster_export.serve_args(plan.inventory, plan.chosen))
    assert {p.quantization: p.double_quant for p in settings.models[0].pools} == {"int8": False, "nf4": True}


def test_shared_gpus_are_capped_at_what_was_free() -> None:
    plan = planned(cluster((replace(LARGE, free_bytes=6 * GB),)))
    settings = parse_settings(cluster_export.serve_args(plan.inventory, plan.chosen))
    (stage,) = plan.chosen.pools[0].plan.stages
    context = next(term.bytes for term in stage.reserve if term.name == CONTEXT)
    assert settings.models[0].pools[0].max_memory == {0: stage.budget_bytes - context}
    assert 5 * GB < stage.budget_bytes <= 6 * GB


def test_kinds_that_ray_can_not_tell_apart_need_a_resource() -> None:
    twin = Gpu.of("larger", 12 * GB, accelerator_type="L")
    plan = planned(cluster((LARGE,), (twin,)))
    settings = parse_settings(cluster_export.serve_args(plan.inventory, plan.chosen))
    for pool in settings.models[0].pools:
        assert pool.accelerator_type == "L"
        assert pool.resources == {f"headroom-m-{pool.name}": 1}
    assert cluster_export.node_resources(plan.inventory, plan.chosen) == {
        "a": {"headroom-m-int8-1xlarge": 1},
        "b": {"headroom-m-int8-1xlarger": 1},
    }
    assert cluster_export.notes(plan.inventory, plan.chosen)[0] == (
        "node a: ray start --resources='{\"headroom-m-int8-1xlarge\": 1}'"
    )


def test_unknown_kinds_need_a_resource_only_beside_others() -> None:
    first, second = Gpu.of("8GB", 8 * GB), Gpu.of("12GB", 12 * GB)
    alone = planned(cluster((first,), (first,)))
    assert cluster_export.node_resources(alone.inventory, alone.chosen) == {}
    beside = planned(cluster((first,), (second,)))
    assert list(cluster_export.node_resources(beside.inventory, beside.chosen)) == ["a", "b"]


def test_nodes_can_be_pinned() -> None:
    plan = planned(cluster((LARGE,), (LARGE, LARGE)))
    assert cluster_export.node_resources(plan.inventory, plan.chosen) == {}
    pinned = cluster_export.node_resources(plan.inventory, plan.chosen, pin_nodes=True)
    assert pinned == {"a": {"headroom-m-int8-1xlarge": 1}, "b": {"headroom-m-int8-1xlarge": 2}}


def test_a_node_of_mixed_kinds_is_noted_unless_one_replica_has_it_all() -> None:
    several = planned(cluster((SMALL, LARGE)))
    assert "node a mixes kinds of GPU" in cluster_export.notes(several.inventory, several.chosen)[-1]
    inventory = cluster((SMALL, LARGE))
    whole = plan_cluster(inventory, [wish(megabytes=7500)], weigh)
    assert len(whole.chosen.pools[0].gpus) == 2
    assert not any("mixes" in note for note in cluster_export.notes(inventory, whole.chosen))


def test_the_config_is_read_back(mixed: ClusterPlan, tmp_path: Path) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(cluster_export.serve_config(mixed.inventory, mixed.chosen, pin_nodes=True), encoding="utf-8")
    assert path.read_text().startswith("# node a: ray start --resources=")
    pools = read_config(path).config.application.args.models[0].pools
    assert [pool.replicas for pool in pools] == [2, 1]
    assert all(len(pool.resources) == 1 for pool in pools)


def test_pool_names_differ_and_are_plain() -> None:
    twins = (Gpu.of("X 1", 8 * GB, accelerator_type="X"), Gpu.of("X-1", 12 * GB, accelerator_type="Y"))
    plan = planned(cluster((twins[0],), (twins[1],)))
    assert cluster_export.pool_names(plan.chosen) == ["int8-1xx-1", "int8-1xx-1-2"]


def test_json(mixed: ClusterPlan) -> None:
    document = json.loads(cluster_export.cluster_json(mixed))
    assert document["schema"] == cluster_export.SCHEMA
    row = document["frontier"][document["chosen"]]
    assert row["decode_tokens_per_s"] == mixed.chosen.decode
    assert [pool["hosts"] for pool in row["pools"]] == [
        [{"node": "b", "devices": [0]}, {"node": "b", "devices": [1]}],
        [{"node": "a", "devices": [0]}],
    ]
    parse_settings(document["args"])
    assert from_json(json.dumps(document["plans"]["m/nf4-1xsmall"])) == mixed.chosen.pools[1].plan


def test_table(mixed: ClusterPlan) -> None:
    lines = cluster_export.cluster_table(mixed).splitlines()
    assert lines[0].split() == ["row", "goal", "context", "tokens/s", "alone", "KV", "tokens", "replicas"]
    chosen = next(line for line in lines if line.startswith("*"))
    assert "latency" in chosen
    assert "2 x (1xlarge int8), 1 x (1xsmall nf4)" in chosen
    (where,) = [line for line in lines if line.startswith("m ") and "int8" in line]
    assert where.split()[:6] == ["m", "int8-1xlarge", "b", "2", "0", "1"]
    idle = planned(cluster((SMALL, LARGE)), goal="latency")
    assert cluster_export.cluster_table(idle).splitlines()[-1] == "idle: node a, GPUs 0"
