"""The running application: deploy it, follow it until it is ready, and notice a replica that can't start."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from http import client
from typing import TYPE_CHECKING, Any

from deployments.config_file import ConfigFile, HttpOptions
from deployments.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

POLL_S = 0.5


def deploy(file: ConfigFile) -> None:
    """Start Serve and deploy the application; returns before its replicas are up.

    Raises:
        ConfigError: the settings don't make an application.
    """
    from ray import serve

    from deployments.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    config = file.config
    serve.start(
        proxy_location=config.proxy_location,
        http_options=config.http_options.model_dump(),
        logging_config=config.logging_config,
    )
    application = config.application
    target = serve.RunTarget(build(file.args), name=application.name, route_prefix=application.route_prefix)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def wait_until_ready(file: ConfigFile, progress: Callable[[str], None], check: Callable[[], None]) -> None:
    """Follow the start and return once `GET /ready` answers 200.

    Args:
        file: the config that was deployed.
        progress: called with a line whenever something changed.
        check: called at each poll; raises to give up.

    Raises:
        ConfigError: a replica could not start, with its own reason.
    """
    from ray import serve

    application, last = file.config.application, ""
    while True:
        check()
        overview = serve.status()
        if overview.proxies and all(state == "UNHEALTHY" for state in overview.proxies.values()):
            raise ConfigError(f"Serve's proxy could not listen on port {file.config.http_options.port}; see the logs")
        status = overview.applications.get(application.name)
        if status is not None:
            if (reason := failure(status)) is not None:
                raise ConfigError(reason)
            if (line := ", ".join(_states(status))) != last:
                progress(line)
                last = line
            if status.status == "RUNNING" and is_ready(file.config.http_options, application.route_prefix):
                return
        time.sleep(POLL_S)


def is_ready(http: HttpOptions, route_prefix: str) -> bool:
    """Whether `GET /ready` answers 200."""
    connection = http_connection(http)
    try:
        connection.request("GET", route_prefix.rstrip("/") + "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def http_connection(http: HttpOptions) -> client.HTTPConnection:
    """A connection to the service from this machine."""
    return client.HTTPConnection(reachable_host(http.host), http.port, timeout=5)


def reachable_host(host: str) -> str:
    """The host that a client on this machine uses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def failure(status: ApplicationStatusOverview) -> str | None:
    """Why the application can't start, in one line; None while nothing failed.

    One failed start of one replica ends it: Serve would try up to 20 times, and the reason would be the same.
    """
    for name, deployment in status.deployments.items():
        if _has_failed(deployment):
            return f"{name}: {reason_in(deployment.message)}"
    if status.status == "DEPLOY_FAILED":
        return reason_in(status.message)
    return None


def reason_in(message: str) -> str:
    """The last exception in Serve's message, which carries a traceback; a Headroom error without its class."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"(ray\.exceptions\.)?[\w.]+(Error|Exception|DoesNotFit)\b.*: ", line)]
    line = raised[-1] if raised else (lines[-1] if lines else "no reason given")
    return re.sub(r"^(ray\.exceptions\.RayTaskError\(\w+\): )?.*?deployments\.errors\.\w+: ", "", line)


def _has_failed(deployment: DeploymentStatusOverview) -> bool:
    return deployment.status in ("DEPLOY_FAILED", "UNHEALTHY") or "failed to start" in deployment.message


def _states(status: ApplicationStatusOverview) -> Iterator[str]:
    for name, deployment in status.deployments.items():
        counts: dict[Any, int] = dict(deployment.replica_states)
        running = next((n for state, n in counts.items() if state == "RUNNING"), 0)
        yield f"{name} {running}/{sum(counts.values())}"
