"""Packing against every possible packing, and what must hold of every cluster plan."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.settings import parse_settings
from placement.cluster import ClusterPlan, plan_cluster
from placement.cluster_export import cluster_json, node_resources, serve_args
from placement.errors import PlacementError
from placement.footprint import Footprint
from placement.hardware import Gpu, Inventory, Node
from placement.packing import Counts, Demand, Item, pack
from placement.wishes import Wish
from tests.unit.placement.toy_cluster import GB, weigh, wish

KINDS = (Gpu.of("small", 3 * GB, accelerator_type="S"), Gpu.of("large", 8 * GB, accelerator_type="L"))

counts = st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(any)
demands = st.lists(st.builds(Demand, st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=2)


@st.composite
def items(draw: st.DrawFn, models: int) -> list[Item]:
    item = st.builds(Item, st.integers(0, models - 1), counts, st.integers(1, 3), st.integers(0, 9))
    return draw(st.lists(item, max_size=4))


def fit(needs: Counts, node: Counts) -> bool:
    return all(need <= count for need, count in zip(needs, node, strict=True))


def packings(node: Counts, items: list[Item], start: int = 0) -> list[tuple[int, ...]]:
    """Every multiset of items that a node has room for."""
    found: list[tuple[int, ...]] = [()]
    for i in range(start, len(items)):
        if fit(items[i].needs, node):
            left = tuple(count - need for count, need in zip(node, items[i].needs, strict=True))
            found += [(i, *rest) for rest in packings(left, items, i)]
    return found


def ranked(groups: list[int], items: list[Item], demands: list[Demand]) -> tuple[list[int], list[int]]:
    held, served = [], []
    for model, demand in enumerate(demands):
        mine = [items[i] for i in groups if items[i].model == model]
        held.append(min(sum(item.sequences for item in mine), demand.sequences) * 10**6 // demand.sequences)
        served.append(sum(item.worth for item in mine) * 10**6 // demand.share)
    return sorted(held), sorted(served)


@given(st.data(), st.lists(counts, min_size=1, max_size=3), demands)
def test_packing_equals_brute_force(data: st.DataObject, nodes: list[Counts], demands: list[Demand]) -> None:
    choice = data.draw(items(len(demands)))
    offers = {node: [i for i, item in enumerate(choice) if fit(item.needs, node)] for node in nodes}
    found = pack(nodes, choice, demands, offers, limit=1000)
    assert found.exact
    for node, groups in zip(nodes, found.nodes, strict=True):
        assert groups in packings(node, choice)
    every = [sum(each, ()) for each in product(*(packings(node, choice) for node in nodes))]
    best = max(ranked(list(groups), choice, demands) for groups in every)
    assert ranked([i for groups in found.nodes for i in groups], choice, demands) == best


inventories = st.lists(counts, min_size=1, max_size=3).map(
    lambda nodes: Inventory(
        tuple(
            Node(f"n{i}", tuple(kind for kind, count in zip(KINDS, node, strict=True) for _ in range(count)))
            for i, node in enumerate(nodes)
        )
    )
)
quantizations = st.sampled_from([("nf4",), ("int8", "nf4"), ("bf16", "int8", "nf4")])


@st.composite
def wishes(draw: st.DrawFn) -> list[Wish]:
    count = draw(st.integers(1, 2))
    capacity = draw(st.booleans())
    return [
        wish(
            f"m{i}",
            draw(st.sampled_from([300, 1500, 3500])),
            quantization=draw(quantizations),
            context=draw(st.sampled_from([4, 16, 64])),
            concurrency=draw(st.sampled_from([1, 100, 600])),
            share=draw(st.integers(1, 3)),
            goal="capacity" if capacity else draw(st.sampled_from(["throughput", "latency"])),
        )
        for i in range(count)
    ]


@cache
def weighed(source: str, quantization: str) -> Footprint:
    return weigh(wish("m", int(source)), quantization)


def outcome(inventory: Inventory, wishes: list[Wish]) -> ClusterPlan | None:
    try:
        return plan_cluster(inventory, wishes, lambda w, quantization: weighed(w.source, quantization))
    except PlacementError:
        return None


@settings(deadline=None, max_examples=50)
@given(inventories, wishes())
def test_every_row_is_whole(inventory: Inventory, wishes: list[Wish]) -> None:
    found = outcome(inventory, wishes)
    if found is None:
        return
    gpus = {(node.name, i): gpu for node in inventory.nodes for i, gpu in enumerate(node.gpus)}
    assert any(row is found.chosen for row in found.frontier)
    for row in found.frontier:
        hosts = [(pool, host) for pool in row.pools for host in pool.hosts]
        used = [(host.node, device) for _, host in hosts for device in host.devices]
        idle = [(host.node, device) for host in row.idle for device in host.devices]
        assert Counter(used + idle) == Counter(gpus.keys()), "each GPU is in one group or idle"
        for pool, host in hosts:
            assert [gpus[host.node, device] for device in host.devices] == list(pool.gpus)
            assert len(pool.plan.stages) == len(pool.gpus)
        for model, context in zip(wishes, row.contexts, strict=True):
            mine = [pool for pool in row.pools if pool.wish == model]
            sequences = sum(
                pool.replicas * min(model.max_sequences, pool.plan.capacity_tokens // (model.context or 64))
                for pool in mine
            )
            assert sequences >= model.concurrency
            assert all(pool.plan.max_context == context for pool in mine)
            assert {pool.quantization for pool in mine} <= set(model.quantization)
        for pool in row.pools:
            for stage in pool.plan.stages:
                held = stage.weight_bytes + stage.reserve_bytes + pool.plan.kv_bytes(stage)
                assert held <= stage.budget_bytes <= pool.gpus[stage.device].usable_bytes


@settings(deadline=None, max_examples=50)
@given(inventories, wishes(), st.booleans())
def test_args_are_settings_and_plans_are_deterministic(
    inventory: Inventory, wishes: list[Wish], pin_nodes: bool
) -> None:
    found = outcome(inventory, wishes)
    if found is None:
        return
    again = outcome(inventory, wishes)
    assert again is not None
    assert cluster_json(again, pin_nodes=pin_nodes) == cluster_json(found, pin_nodes=pin_nodes)
    parsed = parse_settings(serve_args(inventory, found.chosen, pin_nodes=pin_nodes))
    assert [model.name for model in parsed.models] == [wish.name for wish in wishes]
    pools = [pool for model in parsed.models for pool in model.pools]
    assert sum(pool.replicas * pool.stage_count for pool in pools) == sum(
        len(host.devices) for pool in found.chosen.pools for host in pool.hosts
    )
    given_out = Counter[str]()
    for resources in node_resources(inventory, found.chosen, pin_nodes=pin_nodes).values():
        given_out.update(resources)
    assert given_out == Counter({name: pool.replicas for pool in pools for name in pool.resources})


@settings(deadline=None, max_examples=50)
@given(inventories, wishes(), counts)
def test_another_node_never_makes_it_worse(inventory: Inventory, wishes: list[Wish], more: Counts) -> None:
    (only,) = wishes[:1]
    before = outcome(inventory, [only])
    if before is None:
        return
    gpus = tuple(kind for kind, count in zip(KINDS, more, strict=True) for _ in range(count))
    after = outcome(Inventory((*inventory.nodes, Node("more", gpus))), [only])
    assert after is not None
    assert after.chosen.steps <= before.chosen.steps
    if after.chosen.steps == before.chosen.steps and only.goal == "throughput":
        assert after.chosen.decode >= before.chosen.decode
