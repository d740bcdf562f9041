"""The HTTP ingress: the Serve deployment that runs the API over one dispatcher per model."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import store
from deployments.api.app import create_api
from deployments.api.codec import TextCodec
from deployments.api.served import ServedModel
from deployments.home import state_folder
from deployments.metrics.meter import IngressMeter
from deployments.metrics.pacing import seldom
from deployments.routing.dispatch import ServeDispatcher
from deployments.settings import ModelSettings, Settings


@serve.ingress()
class Ingress:
    """Text in, text out; knows no torch.

    Args:
        settings: the application's.
        ledgers: model name -> handle of its ledger.
        pools: model name -> pool name -> handle of its replicas.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: Settings,
        ledgers: Mapping[str, DeploymentHandle[Any]],
        pools: Mapping[str, Mapping[str, DeploymentHandle[Any]]],
    ) -> None:
        self._settings = settings
        self._dispatchers: list[ServeDispatcher] = []
        ingress_id = uuid.uuid4().hex
        self._meter = IngressMeter(ingress_id)
        self._models = [
            await self._served(
                model,
                ServeDispatcher(
                    model.name,
                    ingress_id,
                    ledgers[model.name],
                    pools[model.name],
                    vitals=seldom(self._meter.vitals),
                    ledger_limit_s=settings.api.ledger_limit_s,
                    granule_tokens=model.granule_tokens,
                ),
            )
            for model in settings.models
        ]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._models, self._settings.api, meter=self._meter)

    async def __del__(self) -> None:
        """Called by Serve when it stops this replica: the ledgers hear what they have not been told yet."""
        await asyncio.gather(*(dispatcher.close() for dispatcher in self._dispatchers))

    async def _served(self, model: ModelSettings, dispatcher: ServeDispatcher) -> ServedModel:
        local = await asyncio.to_thread(store.fetch, model.source, revision=model.revision, home=state_folder())
        dispatcher.start()
        self._dispatchers.append(dispatcher)
        return ServedModel(
            name=model.name,
            aliases=model.aliases,
            text=await asyncio.to_thread(TextCodec.load, local.path, model.chat_template),
            dispatcher=dispatcher,
            model_context=model.longest_context(local.max_context),
            created=int(time.time()),
            wait_limit_s=model.wait_limit_s,
        )
