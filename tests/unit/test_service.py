"""What Serve's status says, in one line; addresses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from deployments.service import failure, reachable_host, reason_in

TRACEBACK = """\
A replica failed to start with exception. Retrying 5 more time(s). Error:
Traceback (most recent call last):
  File "python/ray/_raylet.pyx", line 1, in ray._raylet.execute_task
ray.exceptions.RayTaskError(ConfigError): ray::ServeReplica:headroom:m-default.initialize_and_get_metadata() (pid=1)
    raise ConfigError(f"pool {pool.name}: {error}") from error
deployments.errors.ConfigError: pool default: m does not fit: device 0 needs 2 bytes and has 1.
"""


@dataclass
class Deployment:
    status: str = "UPDATING"
    message: str = ""


@dataclass
class Application:
    status: str = "DEPLOYING"
    message: str = ""
    deployments: dict[str, Deployment] = field(default_factory=dict)


def test_start_goes_on() -> None:
    assert failure(Application(deployments={"m": Deployment()})) is None  # type: ignore[arg-type]  # Serve's fields


def test_first_failed_start_ends_it_with_the_replicas_own_reason() -> None:
    application = Application(deployments={"ingress": Deployment(), "m-default": Deployment(message=TRACEBACK)})
    assert failure(application) == "m-default: pool default: m does not fit: device 0 needs 2 bytes and has 1."  # type: ignore[arg-type]  # Serve's fields


@pytest.mark.parametrize("status", ["DEPLOY_FAILED", "UNHEALTHY"])
def test_failed_deployment(status: str) -> None:
    application = Application(deployments={"m": Deployment(status, "RuntimeError: out of memory")})
    assert failure(application) == "m: RuntimeError: out of memory"  # type: ignore[arg-type]  # Serve's fields


def test_failed_application() -> None:
    assert failure(Application("DEPLOY_FAILED", "ValueError: bad route")) == "ValueError: bad route"  # type: ignore[arg-type]  # Serve's fields


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Traceback\nKeyError: 'x'\n", "KeyError: 'x'"),
        ("It just died.", "It just died."),
        ("a\nValueError: first\nduring handling\nTypeError: second\n", "TypeError: second"),
        ("", "no reason given"),
    ],
)
def test_reason_is_the_last_exception(message: str, reason: str) -> None:
    assert reason_in(message) == reason


@pytest.mark.parametrize(
    ("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("10.0.0.7", "10.0.0.7")]
)
def test_reachable_host(host: str, reached: str) -> None:
    assert reachable_host(host) == reached
