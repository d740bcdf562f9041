"""`headroom k8s`: what it writes, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import cli
from deployments.errors import ConfigError
from deployments.k8s import cluster_config, parse_node_labels

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "tests/configs/llama-8b")
WITHOUT_SOURCE = ["--model", CONFIG, "--context", "8192", "--base", str(ROOT / "k8s/base")]
LLAMA = [*WITHOUT_SOURCE, "--source", "org/llama"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["k8s", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_an_overlay_of_a_gpu_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = ["--gpus", "24GiB", "--out", str(tmp_path)]
    assert "--node-label '24GiB:KEY=VALUE'" in refused([*gpus, *LLAMA], capsys)
    more = ["--node-label", "24GiB:example.com/gpu=mine", "--own-cache", "50Gi", "--image", "r.example.com:5000/h:1"]
    assert cli.main(["k8s", *gpus, *LLAMA, *more, "--pod-memory", "32Gi", "--pod-cpus", "6"]) == 0
    ((patch,), kustomization) = (
        yaml.safe_load((tmp_path / name).read_text(encoding="utf-8")) for name in ("workers.yaml", "kustomization.yaml")
    )
    (group,) = patch["value"]
    pod = group["template"]["spec"]
    assert pod["nodeSelector"] == {"example.com/gpu": "mine"}
    assert pod["containers"][0]["resources"]["requests"] == {"cpu": "6", "memory": "32Gi", "nvidia.com/gpu": "1"}
    claim = pod["volumes"][-1]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "50Gi"}}}
    assert kustomization["images"] == [{"name": "headroom", "newName": "r.example.com:5000/h", "newTag": "1"}]


def test_pools_that_follow_demand(tmp_path: Path) -> None:
    given = ["--gpus", "L4+L4", *LLAMA, "--quantization", "nf4", "--out", str(tmp_path), "--min-replicas"]
    assert cli.main(["k8s", *given, "1"]) == 0
    ((patch,), kustomization, config) = (
        yaml.safe_load((tmp_path / name).read_text(encoding="utf-8"))
        for name in ("workers.yaml", "kustomization.yaml", "serve_config.yaml")
    )
    front, group = patch["value"]
    assert (front["replicas"], front["minReplicas"], front["maxReplicas"]) == (1, 1, 1)
    assert front["rayStartParams"]["resources"] == '"{\\"headroom-front\\": 1}"'
    assert "nvidia.com/gpu" not in front["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 0, 2)
    assert [c.rpartition("/")[2] for c in kustomization["components"]] == ["serve-config", "autoscaling"]
    args = config["applications"][0]["args"]
    assert args["api"]["resources"] == {"headroom-front": 0.001}
    (pool,) = args["models"][0]["pools"]
    assert (pool["autoscaling"], "replicas" in pool) == ({"min_replicas": 1, "max_replicas": 2}, False)
    assert "wait_limit_s" not in args["models"][0], "there always is a replica"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "L4", *LLAMA], "--out"),
        (["--gpus", "L4", *LLAMA, "--out", "x", "--image", "headroom"], "with its tag"),
        (["--gpus", "L4", *LLAMA, "--out", "x", "--pod-memory", "lots"], "--pod-memory lots"),
        (["--gpus", "L4", *LLAMA, "--out", "x", "--pod-cpus", "0"], "--pod-cpus 0"),
        (["--gpus", "L4", *LLAMA, "--out", "x", "--node-label", "L4"], "GPU:KEY=VALUE"),
        (["--gpus", "L4", *LLAMA, "--out", "x", "--node-label", "T4:a=b"], "--node-label T4: --gpus has no such GPU"),
        (["--gpus", "L4", *LLAMA, "--out", "x", "--base", "/nowhere"], "k8s/base"),
        (["--gpus", "L4", *LLAMA, "--out", "x", "--min-replicas", "-1"], "--min-replicas -1"),
        (["--gpus", "L4", *LLAMA, "--out", "x", "--min-replicas", "2"], "is planned with 1"),
        (["--gpus", "L4+", *LLAMA, "--out", "x"], "write count x size or name"),
        (["--gpus", "", *LLAMA, "--out", "x"], "write count x size or name"),
        (["--config", "/nowhere.yaml"], "can't be read"),
        (["--config", "any.yaml", "--image", "r/h:1"], "--image goes with --gpus"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_mixed_replica_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*LLAMA, "--context", "131072", "--quantization", "bf16"]
    assert "which counts the GPUs" in refused(["--gpus", "L4,A10", "--out", str(tmp_path), *given], capsys)


def test_a_config_for_the_base_says_its_device() -> None:
    given = {"applications": [{"args": {"models": [{"name": "m", "source": "demo"}]}}], "http_options": {"port": 1}}
    made = cluster_config(given)
    assert made["applications"][0]["args"]["models"] == [{"name": "m", "source": "demo", "pools": [{"device": "cpu"}]}]
    assert made["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert "pools" not in given["applications"][0]["args"]["models"][0]  # type: ignore[index]


def test_node_labels() -> None:
    assert parse_node_labels(["L4:a.b/c=d", "RTX 4090:e=f:g"]) == {"L4": ("a.b/c", "d"), "RTX 4090": ("e", "f:g")}


def test_prefetch_fetches_every_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    models = "{models: [{name: m, source: /nowhere}]}"
    config.write_text(f"applications:\n- import_path: deployments.app:build\n  args: {models}\n", encoding="utf-8")
    assert cli.main(["prefetch", str(config)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_workers_with_a_cache_of_their_own_leave_no_claim_behind(tmp_path: Path) -> None:
    given = ["--gpus", "L4+L4", *LLAMA, "--quantization", "nf4", "--out", str(tmp_path), "--min-replicas", "0"]
    assert cli.main(["k8s", *given, "--own-cache", "50Gi"]) == 0
    assert "claimName" not in (tmp_path / "workers.yaml").read_text(encoding="utf-8")


def test_a_model_that_only_this_machine_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = ["--gpus", "L4", "--out", str(tmp_path / "out"), "--quantization", "nf4"]
    assert "below /models" in refused([*gpus, *WITHOUT_SOURCE], capsys)
    monkeypatch.chdir(ROOT / "tests")
    here = ["--model", "configs/llama-8b", *WITHOUT_SOURCE[2:]]
    assert "say what they load with --source" in refused([*gpus, *here], capsys), "it could be an id of the hub"
    config = tmp_path / "c.yaml"
    for source, said in (("configs/llama-8b", "a folder of this machine"), ("./x.gguf", "below /models")):
        models = [{"name": "m", "source": source}]
        text = yaml.safe_dump({"applications": [{"import_path": "deployments.app:build", "args": {"models": models}}]})
        config.write_text(text, encoding="utf-8")
        assert said in refused(["--config", str(config), "--base", str(tmp_path / "out")], capsys)
    cached = [*WITHOUT_SOURCE, "--source", "/models/llama"]
    assert "with --own-cache each worker has an empty one" in refused([*gpus, *cached, "--own-cache", "1Gi"], capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    config.write_text(text.replace("./x.gguf", "demo"), encoding="utf-8")
    assert cli.main(["k8s", "--config", str(config), "--base", str(tmp_path / "base")]) == 0, "the embedded model"
    monkeypatch.chdir(ROOT / "tests")
    assert cli.main(["k8s", *gpus, *cached]) == 0
    assert cli.main(["k8s", *gpus, *here, "--source", "configs/llama-8b"]) == 0, "the hub's, if one says so"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"source": "/data/llama"}, "below /models"),
        ({"source": "llama.GGUF"}, "below /models"),
        ({"source": "~/llama"}, "below /models"),
        ({"source": "a/b/c"}, "below /models"),
        ({"source": "demo", "chat_template": "chat.jinja"}, "chat_template 'chat.jinja' is a file"),
        ({"source": "demo"}, None),
        ({"source": "org/llama", "chat_template": "{{ messages }}"}, None),
        ({"source": "/models/llama.gguf", "chat_template": "/models/chat.jinja"}, None),
    ],
)
def test_what_workers_load_is_the_hubs_or_in_their_cache(model: dict[str, str], said: str | None) -> None:
    config = {"applications": [{"args": {"models": [{"name": "m", **model}]}}]}
    if said is None:
        (made,) = cluster_config(config)["applications"][0]["args"]["models"]
        assert made == {"name": "m", **model, "pools": [{"device": "cpu"}]}
    else:
        with pytest.raises(ConfigError, match=said):
            cluster_config(config)


def test_what_the_bases_workers_do_not_have_is_refused() -> None:
    def config(api: dict[str, Any], pool: dict[str, Any]) -> dict[str, Any]:
        args = {"models": [{"name": "m", "source": "demo", "pools": [pool]}], "api": api}
        return {"applications": [{"route_prefix": "/llm", "args": args}], "http_options": {"request_timeout_s": 9}}

    made = cluster_config(config({"api_keys_file": "keys.yaml"}, {}))
    assert made["applications"][0]["args"]["api"] == {"api_keys_file": "/etc/headroom/keys.yaml"}
    assert made["applications"][0]["route_prefix"] == "/llm"
    assert made["http_options"] == {"request_timeout_s": 9, "host": "0.0.0.0", "port": 8000}
    for api, pool, said in (
        ({"api_keys_env": "KEYS"}, {}, "api has api_keys_env"),
        ({"resources": {"x": 1}}, {}, "api has resources"),
        ({}, {"resources": {"x": 1}}, "pool default has resources"),
    ):
        with pytest.raises(ConfigError, match=said):
            cluster_config(config(api, pool))
