"""`headroom`: serve a config, fetch models, plan a placement, compare quantisations, write files for Kubernetes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from deployments import __version__, haproxy, preflight, service, store
from deployments.checkpoint import has_chat_template
from deployments.config_file import ConfigFile, HttpOptions, read_config
from deployments.errors import ConfigError
from deployments.home import state_folder
from deployments.local_ray import LocalRay
from deployments.settings import Settings
from deployments.start_log import StartLog
from deployments.survey import Survey
from placement import probe
from placement.export import table

WATCH_S = 1.0
_COMMANDS = {
    "compare": ("deployments.compare.command", "a model in several quantisations"),
    "k8s": ("deployments.k8s_command", "files for Kubernetes"),
    "key": ("deployments.key_command", "a new API key"),
    "quantize": ("deployments.quantize_command", "a checkpoint that bitsandbytes quantises, for here or elsewhere"),
}
"""Name -> (module with a `main` of its own, what it is for). Imported when asked for: some are slow to import."""


class _Parser(argparse.ArgumentParser):
    """Errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, or 2 with one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["plan"]:
        from placement.__main__ import main as plan

        return plan(arguments[1:], prog="headroom plan")
    try:
        if arguments and arguments[0] in _COMMANDS:
            command = importlib.import_module(_COMMANDS[arguments[0]][0])
            return int(command.main(arguments[1:]))
        options = _arguments().parse_args(arguments)
        if options.command == "serve":
            return serve(
                _with_address(read_config(options.config), options.host, options.port), options.logs, options.dashboard
            )
        if options.command == "prefetch":
            return prefetch(read_config(options.config))
        store.install_demo(_say)
        return 0
    except ConfigError as error:
        print(f"headroom: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("headroom: interrupted", file=sys.stderr)
        return 130


def serve(file: ConfigFile, show_logs: bool = False, dashboard: bool = False) -> int:
    """Check, start, and serve until SIGINT or SIGTERM; 0 when all has ended.

    Raises:
        ConfigError: it can't start, or Ray ended under it; nothing of it runs any more.
        KeyboardInterrupt: a signal before it was ready; likewise.
    """
    begun = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(number, _interrupt)
    home = state_folder()
    check_own_resources(file.config.application.args)
    ready = preflight.check(file, home, os.environ, _say)
    check_accelerators(ready.survey)
    _print_plans(ready.survey)
    ray = LocalRay(home, cpus=probe.cpu_cores(), show_logs=show_logs, dashboard=dashboard)
    try:
        _start(ray, file, show_logs)
        _say(f"ready after {time.monotonic() - begun:.0f} s\n")
        print(_invitation(file, ready.survey, ray), flush=True)
        _watch(ray)
    except KeyboardInterrupt:
        _say("\nstopping (again to stop at once)")
    finally:
        _stop(ray)
        ready.port_claim.close()
        _say(f"stopped; logs of this run are in {home / 'logs'}")
    return 0


def prefetch(file: ConfigFile) -> int:
    """Fetch and convert the models of a config into the state folder and the hub's cache.

    Raises:
        ConfigError: one can't be had.
    """
    for model in file.config.application.args.models:
        local = store.fetch(model.source, revision=model.revision, home=state_folder(), progress=_say)
        _say(f"{model.name}: {local.path}")
    return 0


def check_own_resources(settings: Settings) -> None:
    """Nothing asks for custom resources, which a Ray of our own doesn't have.

    Raises:
        ConfigError: something does; it would wait for ever.
    """
    asked = [(f"pool {pool.name}", pool.resources) for model in settings.models for pool in model.pools]
    for name, resources in [("api", settings.api.resources), *asked]:
        if resources:
            raise ConfigError(
                f"{name} asks for {', '.join(resources)}, which only a Ray cluster can have that was "
                "started with it; remove `resources`, or deploy to that cluster with `serve run`"
            )


def check_accelerators(survey: Survey) -> None:
    """This machine has the kind of GPU that each pool asks for, as far as it is known.

    Raises:
        ConfigError: it doesn't; the pool would wait for ever.
    """
    for planned in survey.pools:
        asked = planned.pool.accelerator_type
        there = {s.gpu.accelerator_type if s.gpu.device_type == "cuda" else "no GPU" for s in planned.plan.stages}
        if asked and (wrong := there - {asked, None}):
            raise ConfigError(
                f"pool {planned.pool.name} asks for accelerator_type {asked}, and this machine has "
                f"{', '.join(sorted(map(str, wrong)))}; change it or remove it"
            )


def _start(ray: LocalRay, file: ConfigFile, show_logs: bool) -> None:
    _say("starting Ray")
    ray.start()
    signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own handler there.
    preflight.check_port(file.config.http_options.host, file.config.http_options.port)  # Minutes may have passed.
    _say("starting Serve and the replicas")
    if haproxy.missed():
        _say(haproxy.MISSING)
    service.deploy(file)
    pools = [pool for model in file.config.application.args.models for pool in model.pools]
    log = None if show_logs else StartLog(ray.log_folder, sum(pool.fewest_replicas for pool in pools))

    def check() -> None:
        _check_alive(ray)
        if log is not None and (line := log.news()) is not None:
            _say(f"  {line}")

    service.wait_until_ready(file, lambda line: _say(f"replicas running: {line}"), check)


def _watch(ray: LocalRay) -> None:
    while True:
        time.sleep(WATCH_S)
        _check_alive(ray)


def _check_alive(ray: LocalRay) -> None:
    if not ray.alive():
        raise ConfigError("Ray's node ended by itself (out of memory, or killed); its logs say why; start again")


def _stop(ray: LocalRay) -> None:
    def now(_signal: int, _frame: FrameType | None) -> None:
        ray.kill()
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, now)
    ray.stop()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _arguments() -> argparse.ArgumentParser:
    parser = _Parser(prog="headroom", description="4-bit and 8-bit language models on Ray Serve.")
    parser.add_argument("--version", action="version", version=f"headroom {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    start = commands.add_parser("serve", help="serve the models of a config until Ctrl-C")
    start.add_argument("config", nargs="?", type=Path, default=Path("serve_config.yaml"), help="default: %(default)s")
    start.add_argument("--host", help="instead of http_options.host; 0.0.0.0 serves the network")
    start.add_argument("--port", type=int, help="instead of http_options.port")
    start.add_argument("--logs", action="store_true", help="print what the replicas log")
    start.add_argument("--dashboard", action="store_true", help="run Ray's dashboard too (0.7 GB of memory)")
    commands.add_parser("fetch-demo", help="install the embedded model (92 MB)")
    fetching = commands.add_parser("prefetch", help="fetch the models of a config")
    fetching.add_argument("config", type=Path)
    for name, (_, about) in _COMMANDS.items():
        commands.add_parser(name, help=f"{about}; `headroom {name} --help`", add_help=False)
    commands.add_parser("plan", help="where a model's layers go; `headroom plan --help`", add_help=False)
    return parser


def _with_address(file: ConfigFile, host: str | None, port: int | None) -> ConfigFile:
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    try:
        http = HttpOptions.model_validate({**file.config.http_options.model_dump(), **given})
    except ValueError:
        raise ConfigError(f"--port {port} is not a port; use 1 to 65535") from None
    return ConfigFile(file.path, file.config.model_copy(update={"http_options": http}), file.args)


def _print_plans(survey: Survey) -> None:
    for planned in survey.pools:
        fewest, most = planned.pool.fewest_replicas, planned.pool.most_replicas
        number = str(most) if fewest == most else f"{fewest} to {most}"
        print(f"\npool {planned.pool.name}, {number} replicas, each:\n{table(planned.plan)}")
    print(flush=True)


def _invitation(file: ConfigFile, survey: Survey, ray: LocalRay) -> str:
    """Where it listens, and a curl line that works when pasted."""
    http, application = file.config.http_options, file.config.application
    url = f"http://{service.reachable_host(http.host)}:{http.port}{application.route_prefix.rstrip('/')}"
    lines = [f"serving on {url}/v1 until Ctrl-C; try:", "", f"  {curl(url, application.args, survey)}", ""]
    if ray.dashboard_url:
        lines.append(f"Ray dashboard: {ray.dashboard_url}")
    lines.append(f"logs: {ray.log_folder}")
    return "\n".join(lines)


def curl(url: str, settings: Settings, survey: Survey) -> str:
    """A line for the shell that asks the first model something."""
    model = settings.models[0]
    prompt: dict[str, Any]
    if model.chat_template or has_chat_template(survey.folders[model.name]):
        path, prompt = "chat/completions", {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    else:
        path, prompt = "completions", {"prompt": "The sky is blue because"}
    body = json.dumps({"model": model.name, **prompt, "max_tokens": 64, "temperature": 0})
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{_authorization(settings)} -d {shlex.quote(body)}"


def _authorization(settings: Settings) -> str:
    if variable := settings.api.api_keys_env:
        return f' -H "Authorization: Bearer ${{{variable}%%,*}}"'
    return ' -H "Authorization: Bearer $KEY"' if settings.api.api_keys_file else ""


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
