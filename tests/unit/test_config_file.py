"""The config file: what it accepts, and that each mistake is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.config_file import read_config
from deployments.errors import ConfigError
from deployments.settings import ModelSettings

ROOT = Path(__file__).parents[2]

GOOD = """\
http_options:
  port: 8000
applications:
- name: headroom
  import_path: deployments.app:build
  args:
    models:
    - name: m
      source: demo
      pools:
      - replicas: 2
        max_memory: {0: 600MB, 1: 1GB}
"""


def mistake(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize("name", ["serve_config.yaml", "serve_config.two_stage.yaml"])
def test_configs_of_the_repository_are_good(name: str) -> None:
    file = read_config(ROOT / name)
    assert file.config.http_options.port == 8000
    assert file.config.application.args.models[0].source == "demo"


def test_two_stage_config_is_one_replica_of_two_stages() -> None:
    (pool,) = read_config(ROOT / "serve_config.two_stage.yaml").config.application.args.models[0].pools
    assert (pool.replicas, pool.stage_count) == (1, 2)
    assert pool.max_memory == {0: "600MB", 1: "1GB"}


def test_args_are_what_build_takes(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(GOOD, encoding="utf-8")
    file = read_config(path)
    assert file.args["models"][0]["pools"] == [{"replicas": 2, "max_memory": {0: "600MB", 1: "1GB"}}]
    assert file.config.http_options.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("      source: demo", "      sauce: demo", 8, "unknown key models.0.sauce; did you mean source?"),
        ("replicas: 2", "replicas: two", 11, "models.0.pools.0.replicas"),
        ("port: 8000", "port: 80000", 2, "http_options.port"),
        ("0: 600MB", "0: 600XB", 12, "600XB"),
        ("0: 600MB", "2: 600MB", 11, "without gaps"),
        ("deployments.app:build", "other:build", 5, "import_path"),
        ("- name: headroom", "- nam: headroom", 4, "did you mean name?"),
        ("http_options:", "http_option:", 1, "unknown key http_option"),
        ("      source: demo\n", "", 8, "models.0.source is missing"),
        ("      source: demo", "      source: demo\n      source: demo", 10, "source is given twice"),
        ("- replicas: 2", "- replicas: [2", 12, "not YAML"),
    ],
)
def test_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, line: int, says: str) -> None:
    assert old in GOOD
    message = mistake(tmp_path, GOOD.replace(old, new, 1))
    assert message.startswith(f":{line}: ")
    assert says in message


def test_only_causes_are_named_and_not_what_follows(tmp_path: Path) -> None:
    assert ";" not in mistake(tmp_path, GOOD.replace("replicas: 2", "replicas: 0"))


def test_two_mistakes_are_both_named(tmp_path: Path) -> None:
    message = mistake(tmp_path, GOOD.replace("replicas: 2", "replicas: 0").replace("port: 8000", "port: 0"))
    assert ":2: " in message
    assert ":11: " in message


def test_empty_file_says_what_is_needed(tmp_path: Path) -> None:
    assert "applications" in mistake(tmp_path, "")


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config .*nowhere.yaml can't be read: No such file"):
        read_config(tmp_path / "nowhere.yaml")


def test_a_model_takes_what_its_roomiest_pool_takes() -> None:
    def longest(*limits: int | None) -> int:
        pools = [{"name": f"p{i}", "max_context": limit} for i, limit in enumerate(limits)]
        return ModelSettings.model_validate({"name": "m", "source": "demo", "pools": pools}).longest_context(32_768)

    assert longest(4096) == 4096
    assert longest(4096, None) == longest(None) == 32_768
    assert longest(4096, 8192) == 8192
