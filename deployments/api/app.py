"""The HTTP API as one ASGI app."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from deployments.api.access import AccessMiddleware
from deployments.api.auth import open_gate
from deployments.api.endpoints import Endpoints
from deployments.api.headers import REQUEST_ID
from deployments.api.problems import on_http_exception, on_request_error
from deployments.api.served import ModelTable, ServedModel
from deployments.errors import RequestError
from deployments.metrics.meter import IngressMeter
from deployments.settings import ApiSettings

__all__ = ["ServedModel", "create_api"]


def create_api(
    models: Sequence[ServedModel],
    settings: ApiSettings,
    *,
    meter: IngressMeter | None = None,
    environment: Mapping[str, str] = os.environ,
    draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
) -> FastAPI:
    """The app that serves `models`. It needs no Ray: any ASGI server runs it.

    Args:
        meter: counts the requests; default: one of its own.

    Raises:
        ConfigError: two models share a name, or `api_keys_env` or `api_keys_file` holds no keys.
    """
    meter = meter or IngressMeter(uuid.uuid4().hex)
    endpoints = Endpoints(ModelTable(models), open_gate(settings, environment), settings, meter, draw_seed)
    # Bodies are read by deployments.api.body: what FastAPI derives would show none of them. See openapi.py.
    app = FastAPI(title="Headroom", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.routes.extend(endpoints.routes())
    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "retry-after"],
        )
    # Last added is outermost: CORS refusals get their id and line too.
    app.add_middleware(AccessMiddleware, meter=meter)
    return app
