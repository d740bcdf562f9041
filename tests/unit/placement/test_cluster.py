"""Which GPUs form a replica of which model: toy models on small and large toy GPUs.

A small GPU has 2.3 GB for weights and KV cache beside what the reserve takes, a large one 7.3. A model of N MB at nf4
has N * 2 at int8 and N * 4 at bf16, and an embedding of 100 MB.
"""

from __future__ import annotations

import pytest

from placement.cluster import ClusterPlan, Layout, group_name, plan_cluster
from placement.errors import PlacementError
from placement.hardware import Gpu, Inventory, Node
from placement.wishes import Wish
from tests.unit.placement.toy_cluster import GB, LARGE, SMALL, cluster, weigh, wish


def plan(inventory: Inventory, *wishes: Wish) -> ClusterPlan:
    return plan_cluster(inventory, wishes, weigh)


def pools(layout: Layout) -> list[tuple[str, int, str, str]]:
    return [(pool.wish.name, pool.replicas, group_name(pool.gpus), pool.quantization) for pool in layout.pools]


def test_a_small_model_runs_on_every_gpu() -> None:
    found = plan(cluster((SMALL,) * 4), wish(megabytes=1000))
    assert pools(found.chosen) == [("m", 4, "1xsmall", "nf4")]
    assert [(host.node, host.devices) for host in found.chosen.pools[0].hosts] == [("a", (i,)) for i in range(4)]
    assert found.chosen.idle == ()
    assert found.chosen.exact


def test_a_larger_one_takes_as_many_gpus_as_it_needs() -> None:
    # 3,500 MB and the embedding's 100: not on one GPU with 2.3 GB, on two with 4.6; 6,000: on three with 6.9.
    assert pools(plan(cluster((SMALL,) * 4), wish(megabytes=3500)).chosen) == [("m", 2, "2xsmall", "nf4")]
    found = plan(cluster((SMALL,) * 4), wish(megabytes=6000, goal="latency"))
    assert pools(found.chosen) == [("m", 1, "3xsmall", "nf4")]
    assert [(host.node, host.devices) for host in found.chosen.idle] == [("a", (3,))]


def test_groups_stay_on_one_node() -> None:
    found = plan(cluster((SMALL,), (SMALL, SMALL), (SMALL,)), wish(megabytes=3500))
    assert [host.node for pool in found.chosen.pools for host in pool.hosts] == ["b"]
    assert [host.node for host in found.chosen.idle] == ["a", "c"]
    with pytest.raises(
        PlacementError, match=r"m fits no node; with nf4 on the roomiest, 1xsmall: m? ?toy does not fit"
    ):
        plan(cluster((SMALL,), (SMALL,)), wish(megabytes=3500))


def test_the_first_quantisation_that_fits_the_kind_of_gpu() -> None:
    # int8 is 3,000 MB: on the large GPU, and on two small ones together, so never nf4 on one small one.
    both = plan(cluster((SMALL, SMALL), (LARGE,)), wish(megabytes=1500, quantization=("int8", "nf4")))
    assert pools(both.chosen) == [("m", 1, "2xsmall", "int8"), ("m", 1, "1xlarge", "int8")]
    # On a node with one small GPU nothing but nf4 fits: mixed precisions.
    mixed = plan(cluster((SMALL,), (LARGE,)), wish(megabytes=1500, quantization=("int8", "nf4")))
    assert pools(mixed.chosen) == [("m", 1, "1xlarge", "int8"), ("m", 1, "1xsmall", "nf4")]


def test_a_lesser_quantisation_where_the_concurrency_asks_for_it() -> None:
    # bf16 is 4,000 MB in two groups of two GPUs, with 256 sequences each at most; nf4 runs on each GPU.
    allowed = ("bf16", "nf4")
    assert pools(plan(cluster((SMALL,) * 4), wish(quantization=allowed, concurrency=500)).chosen)[0][1:] == (
        2,
        "2xsmall",
        "bf16",
    )
    found = plan(cluster((SMALL,) * 4), wish(quantization=allowed, concurrency=513))
    assert pools(found.chosen)[0][1:] == (4, "1xsmall", "nf4")
    assert found.chosen.steps == 1


def test_what_can_not_be_had_is_said() -> None:
    with pytest.raises(
        PlacementError, match=r"m: 1025 sequences of 16 tokens are wished for, the cluster holds 1024; l"
    ):
        plan(cluster((SMALL,) * 4), wish(concurrency=1025))
    with pytest.raises(PlacementError, match="allow nf4 in quantization"):
        plan(cluster((SMALL,) * 4), wish(concurrency=1025, quantization=("int8",)))
    with pytest.raises(PlacementError, match="the cluster holds 0 beside the other models"):
        plan(cluster((LARGE,)), wish("x"), wish("y"))
    with pytest.raises(PlacementError, match="made for 64"):
        plan(cluster((LARGE,)), wish(context=65))


def test_traffic_is_shared_as_wished() -> None:
    x, y = wish("x", 1000), wish("y", 1000, share=3)
    found = plan(cluster((SMALL,) * 4, (SMALL,) * 4), x, y)
    assert pools(found.chosen) == [("x", 2, "1xsmall", "nf4"), ("y", 6, "1xsmall", "nf4")]
    each = found.chosen.pools[0].speed.decode
    assert found.chosen.decode == 8 * each


def test_the_large_model_gets_the_large_gpus() -> None:
    found = plan(cluster((SMALL,) * 2, (LARGE,) * 2), wish("big", 5000), wish("little", 500))
    assert ("big", 2, "1xlarge", "nf4") in pools(found.chosen)
    assert ("little", 2, "1xsmall", "nf4") in pools(found.chosen)


def test_latency_leaves_slow_gpus_alone_until_they_are_needed() -> None:
    nodes = cluster((SMALL, LARGE), (LARGE,))
    assert pools(plan(nodes, wish(goal="latency")).chosen) == [("m", 2, "1xlarge", "nf4")]
    crowded = plan(nodes, wish(goal="latency", concurrency=700)).chosen
    assert pools(crowded) == [("m", 1, "1xsmall", "nf4"), ("m", 2, "1xlarge", "nf4")]


def test_capacity_saves_copies_of_the_weights() -> None:
    # Two GPUs with one copy of 1,700 MB between them have more room than two with one each.
    model = wish(megabytes=1700, context=64, max_sequences=4096)
    assert pools(plan(cluster((SMALL,) * 2), model).chosen)[0][2] == "2xsmall"
    tokens = {
        goal: plan(cluster((SMALL,) * 4), wish(megabytes=1700, goal=goal, max_sequences=10**6)).chosen.kv_tokens
        for goal in ("capacity", "throughput")
    }
    assert tokens["capacity"] >= tokens["throughput"]


def test_no_row_of_the_frontier_surpasses_another() -> None:
    found = plan(cluster((SMALL,) * 4, (LARGE,) * 2), wish(quantization=("bf16", "int8", "nf4"), context=8))
    assert found.chosen in found.frontier
    assert len(found.frontier) > 1
    for row in found.frontier:
        for other in found.frontier:
            if row is not other:
                assert any(a < b for a, b in zip(row.merits, other.merits, strict=True)), (row.merits, other.merits)


def test_gpus_that_differ_by_some_pages_are_alike() -> None:
    gpus = tuple(Gpu.of("small", 4 * GB, free_bytes=4 * GB - 100 * page) for page in range(4))
    found = plan(cluster(gpus), wish(megabytes=3000))
    assert pools(found.chosen) == [("m", 2, "2xsmall", "nf4")]
    for pool in found.chosen.pools:
        assert all(stage.budget_bytes <= 4 * GB - 300 for stage in pool.plan.stages)


def test_only_gpus_are_planned_for() -> None:
    with pytest.raises(PlacementError, match="node a has CPU devices"):
        plan(cluster((Gpu("cpu0", GB, device_type="cpu"),)), wish())
    with pytest.raises(PlacementError, match="no GPU"):
        plan(Inventory((Node("a", ()),)), wish())


def test_group_names() -> None:
    assert group_name((SMALL, LARGE, SMALL)) == "2xsmall+1xlarge"
    assert group_name((Gpu.of("NVIDIA H100 80GB HBM3"),) * 2) == "2xH100"
    assert group_name((Gpu.of("A100", 85 * GB), Gpu.of("24GiB", 24 * 2**30))) == "1xA100 80GB+1x24GiB"
