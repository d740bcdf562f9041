"""The live fleet as Serve applications: two ingress replicas with the service's own API, and paced replicas.

`grants`: a ledger and two pools of different capacity, wired as in `deployments.app`. `serve`: the same replicas as one
deployment with Serve's default router, because that router knows no pools.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from benchmarks.live.direct import DirectDispatcher
from benchmarks.live.fleet import CONTEXT, FLEET, INGRESSES, MODEL, POOLS, Routing, Rules
from benchmarks.live.replica import PacedReplica
from benchmarks.routing.fleet import ReplicaSpec
from deployments import store
from deployments.api.app import create_api
from deployments.api.codec import TextCodec
from deployments.api.served import ServedModel
from deployments.home import state_folder
from deployments.metrics.meter import IngressMeter
from deployments.routing.dispatch import ServeDispatcher
from deployments.routing.ledger_deployment import ledger_application
from deployments.routing.refusals import LedgerConfig
from deployments.routing.router import router_config
from deployments.settings import ApiSettings

_OPTIONS: dict[str, Any] = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0.01}}


@serve.ingress()
class LiveIngress:
    """`deployments.ingress.Ingress` with another dispatcher where Serve routes.

    Args:
        rules: of the run.
        ledger: handle of it; None where Serve routes.
        pools: name -> handle.
    """

    async def __init__(self, rules: Rules, ledger: Any | None, pools: Mapping[str, Any]) -> None:
        folder = await asyncio.to_thread(lambda: store.fetch("demo", home=state_folder()).path)
        ingress_id = uuid.uuid4().hex
        dispatcher: ServeDispatcher | DirectDispatcher
        if ledger is None:
            dispatcher = DirectDispatcher(next(iter(pools.values())), CONTEXT)
        else:
            dispatcher = ServeDispatcher(MODEL, ingress_id, ledger, pools)
            dispatcher.start()
        self._meter = IngressMeter(ingress_id)
        text = await asyncio.to_thread(TextCodec.load, folder)
        self._model = ServedModel(MODEL, (), text, dispatcher, CONTEXT, int(time.time()), rules.wait_limit_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api([self._model], ApiSettings(), meter=self._meter)


def build(routing: Routing, rules: Rules, observer: str) -> Application:
    """The application of one routing."""
    ledger, pools = None, {}
    if routing == "grants":
        config = LedgerConfig(MODEL, pools=tuple(POOLS), expected_replicas=len(FLEET), queue_limit=rules.queue_limit)
        ledger = ledger_application(config)
        for name, specs in POOLS.items():
            pools[name] = _pool(name, specs, rules, ledger, observer)
    else:
        pools["all"] = _pool("all", FLEET, rules, None, observer)
    front = serve.deployment(name="ingress", num_replicas=INGRESSES, **_OPTIONS)(LiveIngress)
    return front.bind(rules, ledger, pools)


def _pool(
    name: str, specs: tuple[ReplicaSpec, ...], rules: Rules, ledger: Application | None, observer: str
) -> Application:
    router = {} if ledger is None else {"request_router_config": router_config()}
    deployment = serve.deployment(
        name=f"pool-{name}",
        num_replicas=len(specs),
        logging_config={"enable_access_log": False},
        graceful_shutdown_timeout_s=1,
        **_OPTIONS,
        **router,
    )
    return deployment(PacedReplica).bind(name, specs, rules, ledger, observer)
