"""The endpoints: each reads its request, and leaves the work to the parts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from deployments import __version__
from deployments.api.auth import Gate
from deployments.api.body import read_json_object
from deployments.api.formats import ChatFormat, CompletionFormat
from deployments.api.jobs import Caller, Job, chat_job, completion_job
from deployments.api.keys import ApiKey, Role
from deployments.api.limits import Limiter
from deployments.api.openapi import document
from deployments.api.responses import GenerationResponse
from deployments.api.schemas import parse_chat, parse_completion
from deployments.api.served import ModelTable, ServedModel
from deployments.api.visit import Visit, visit_of
from deployments.fleet.page import load_page
from deployments.fleet.watch import FleetWatch
from deployments.metrics.meter import IngressMeter
from deployments.metrics.overview import Overview
from deployments.metrics.page import render
from deployments.settings import ApiSettings

_READY_WITHIN_S = 5.0
_log = logging.getLogger(__name__)


class Endpoints:
    """Everything that answers at a path.

    Args:
        meter: counts this ingress's requests.
        draw_seed: gives an unsigned 64-bit seed for a request that names none.
    """

    def __init__(
        self,
        models: ModelTable,
        gate: Gate,
        settings: ApiSettings,
        meter: IngressMeter,
        draw_seed: Callable[[], int],
    ) -> None:
        self._models = models
        self._gate = gate
        self._limiter = Limiter(settings.replicas)
        self._settings = settings
        self._meter = meter
        self._ledger_answered = False
        """Whether any ever did."""
        self._draw_seed = draw_seed
        self._fleet = FleetWatch({model.name: model.dispatcher.observe for model in models.models})
        self._fleet_page = load_page()

    def routes(self) -> list[BaseRoute]:
        """Path to endpoint. Starlette adds HEAD to GET."""
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.show_model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/fleet", self.fleet, methods=["GET"]),
            Route("/fleet/state", self.fleet_state, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
        ]

    async def list_models(self, request: Request) -> Response:
        """Every name and alias."""
        self._admit(request, "api")
        cards = [_card(name, model) for name, model in self._models]
        return JSONResponse({"object": "list", "data": cards})

    async def show_model(self, request: Request) -> Response:
        """One name or alias."""
        self._admit(request, "api")
        name = request.path_params["model"]
        return JSONResponse(_card(name, self._models[name]))

    async def chat(self, request: Request) -> GenerationResponse:
        """`/v1/chat/completions`."""
        caller = self._caller(request)
        body = parse_chat(await self._read(request))
        job = await chat_job(body, self._named(request, body.model), caller)
        return self._respond(request, job, ChatFormat())

    async def complete(self, request: Request) -> GenerationResponse:
        """`/v1/completions`."""
        caller = self._caller(request)
        body = parse_completion(await self._read(request))
        job = await completion_job(body, self._named(request, body.model), caller)
        return self._respond(request, job, CompletionFormat())

    async def health(self, _: Request) -> Response:
        """200: this process answers."""
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        """200 if a replica of every model can take work, else 503; the body says which."""
        models = self._models.models
        states = dict(zip((m.name for m in models), await asyncio.gather(*map(_is_ready, models)), strict=True))
        return JSONResponse({"ready": all(states.values()), "models": states}, 200 if all(states.values()) else 503)

    async def metrics(self, request: Request) -> Response:
        """The whole service's metrics, whichever ingress answers. Asks for an admin's key where there are keys."""
        self._admit(request, "admin")
        models = self._models.models
        seen = await asyncio.gather(*(model.dispatcher.observe() for model in models))
        heard = any(model.dispatcher.ledger_answered for model in models)
        self._ledger_answered |= heard or any(one is not None for one in seen)
        own = None if self._ledger_answered else self._meter.vitals()
        overview = Overview(tuple(zip((model.name for model in models), seen, strict=True)), own)
        page, content_type = render(overview, request.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})

    def _named(self, request: Request, name: str) -> ServedModel:
        """The model of that name; what is wrong with the request from here on counts as that model's."""
        model = self._models[name]
        visit_of(request).model = model.name
        return model

    async def fleet(self, _: Request) -> Response:
        """The live page. There is nothing in it but its code: whoever opens it gives it the key for `/fleet/state`."""
        return HTMLResponse(self._fleet_page.html, headers=self._fleet_page.headers)

    async def fleet_state(self, request: Request) -> Response:
        """What the page shows. Asks for a key where one is set."""
        self._admit(request, "admin")
        return JSONResponse(asdict(await self._fleet.state()), headers={"cache-control": "no-store"})

    async def openapi(self, request: Request) -> Response:
        """What the endpoints take and answer. Open to all: it tells nothing of this service but whether it has keys."""
        gate = self._gate
        made = document(__version__, keyed=gate.asks("api"), admin_keyed=gate.asks("admin"))
        return JSONResponse({**made, "servers": [{"url": request.scope.get("root_path") or "/"}]})

    def _admit(self, request: Request, role: Role) -> ApiKey | None:
        key = self._gate.admit(request.headers.getlist("authorization"), role)
        visit_of(request).key = key.name if key else None
        return key

    def _caller(self, request: Request) -> Caller:
        """Who asks for a generation; counts it against the key's limits."""
        visit = visit_of(request)
        key = self._admit(request, "api")
        if key is None:
            return Caller(visit.engine_id, "", self._draw_seed())
        visit.admission = self._limiter.enter(key)
        return Caller(visit.engine_id, key.salt, self._draw_seed(), tenant=key.owner, weight=key.weight)

    async def _read(self, request: Request) -> dict[str, Any]:
        return await read_json_object(request, self._settings.max_body_bytes, self._settings.body_timeout_s)

    def _respond(self, request: Request, job: Job, format_: ChatFormat | CompletionFormat) -> GenerationResponse:
        visit = visit_of(request)
        _note(visit, job)
        if visit.admission is not None:
            visit.admission.pay(job.prompt_tokens)
        return GenerationResponse(
            job,
            format_,
            visit,
            created=int(time.time()),
            timeout_s=self._settings.request_timeout_s,
            token_gaps=self._meter.of(job.model.name).token_gaps,
            keep_alive_s=self._settings.keep_alive_s,
        )


def _note(visit: Visit, job: Job) -> None:
    visit.choices = len(job.requests)
    visit.prompt_tokens = job.prompt_tokens


def _card(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "headroom",
        "root": model.name,
        "max_model_len": model.max_context,
    }


async def _is_ready(model: ServedModel) -> bool:
    try:
        return await asyncio.wait_for(model.dispatcher.is_ready(), _READY_WITHIN_S)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from answering, the model isn't ready
        _log.warning("model %s: no answer to whether it is ready: %r", model.name, error)
        return False
