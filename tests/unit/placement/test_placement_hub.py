"""A Hugging Face id before anything is downloaded: config.json and headers from a hub, and what each failure says."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download
from transformers import AutoModelForCausalLM

from placement.__main__ import main
from placement.errors import PlacementError
from placement.footprint import footprint
from placement.headers import read_safetensors
from placement.hub import read_model
from tests.fakes.hub import SHA, TOKEN, FakeHub, running_hub
from tests.unit.placement.tiny_models import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama_tied", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with running_hub() as state:
        state.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield state


def shard(hub: FakeHub, folder: Path, into: Path) -> int:
    """Put the model on the hub in several files; how many."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(into, max_shard_size="100KB")
    hub.files = {file.name: file.read_bytes() for file in into.iterdir()}
    return sum(name.endswith(".safetensors") for name in hub.files)


def refusal(capsys: pytest.CaptureFixture[str], model: str = "org/tiny") -> str:
    assert main([model, "--cpu", "1GB"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_headers_are_those_of_the_files(hub: FakeHub, folder: Path) -> None:
    config, headers = read_model("org/tiny")
    local = read_safetensors(folder)
    assert json.loads(config) == json.loads((folder / "config.json").read_bytes())
    assert headers.keys() == local.keys()
    for name, header in headers.items():
        here = local[name]
        assert (header.dtype, header.shape, header.bytes, header.offset) == (
            here.dtype,
            here.shape,
            here.bytes,
            here.offset,
        )
        assert header.file.read(header.offset, 16) == here.file.read(here.offset, 16)
    assert all(f"/{SHA}/" in request for request in hub.requests if "safetensors" in request), "one commit throughout"


def test_the_plan_is_that_of_the_folder(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    weighed = footprint("org/tiny")
    assert weighed == footprint(folder, name="org/tiny")
    assert hub.fetched() == {"config.json", "model.safetensors"}
    assert not (tmp_path / "cache").exists(), "nothing is stored"


def test_no_weights_are_fetched(hub: FakeHub) -> None:
    weights = hub.files["model.safetensors"] + bytes(10_000_000)
    hub.files["model.safetensors"] = weights
    footprint("org/tiny")
    assert hub.sent["model.safetensors"] <= 100_000


@pytest.mark.parametrize("ranges", [True, False])
def test_several_files(hub: FakeHub, folder: Path, tmp_path: Path, ranges: bool) -> None:
    assert shard(hub, folder, tmp_path) > 2
    hub.ranges = ranges
    assert footprint("org/tiny", quantization="int8") == footprint(folder, quantization="int8", name="org/tiny")


def test_a_mirror_that_does_not_say_what_is_missing(
    hub: FakeHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.codes = False
    assert shard(hub, folder, tmp_path) > 2
    assert footprint("org/tiny") == footprint(folder, name="org/tiny")
    capsys.readouterr()  # what saving the shards printed
    assert "org/tyny has no config.json" in refusal(capsys, "org/tyny")


def test_a_header_longer_than_the_first_request(hub: FakeHub) -> None:
    entries = {f"{'long ' * 20}{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(1000)}
    header = json.dumps(entries).encode()
    assert len(header) > 100_000
    hub.files["model.safetensors"] = len(header).to_bytes(8, "little") + header + bytes(4)
    _, headers = read_model("org/tiny")
    assert headers.keys() == entries.keys()


def test_a_tie_is_told_by_samples_of_the_weights(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    # The config ties, and the file has a head of its own: transformers then ties nothing.
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    model.save_pretrained(tmp_path, state_dict=state)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hub.files["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    weighed = footprint("org/tiny")
    assert weighed == footprint(tmp_path, name="org/tiny")
    assert weighed.bytes > footprint(folder).bytes
    hub.ranges = False
    with pytest.raises(PlacementError, match=r"no range requests.*hf download org/tiny"):
        footprint("org/tiny")


def test_a_repository_without_safetensors_is_planned_by_its_config(hub: FakeHub, folder: Path) -> None:
    del hub.files["model.safetensors"]
    assert footprint("org/tiny") == footprint(folder / "config.json", name="org/tiny")


def test_a_damaged_header(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files["model.safetensors"] = b"{}"
    assert "model.safetensors of org/tiny is not a whole safetensors file" in refusal(capsys)


def test_a_damaged_config(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files["config.json"] = b"{"
    assert "config.json of org/tiny can't be read" in refusal(capsys)


def test_no_config(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {"tiny.gguf": b"GGUF"}
    assert "org/tiny has no config.json at http" in refusal(capsys)


@pytest.mark.usefixtures("hub")
def test_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "org/tyny")
    assert "there is no folder org/tyny, and http" in message
    assert "no model org/tyny (404)" in message


@pytest.mark.usefixtures("hub")
def test_no_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'a..b' is neither a folder, a file, nor a Hugging Face id" in refusal(capsys, "a..b")


def test_a_gated_model(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.gated = True
    assert f"accept its terms at {hub.url}/org/tiny and set HF_TOKEN" in refusal(capsys)


def test_a_private_model_needs_the_token(
    hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private = True
    assert "HF_TOKEN is not set" in refusal(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    assert "hf_wrong" not in refusal(capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert footprint("org/tiny").model == "org/tiny"


def test_no_network(hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"  # the port of a service that nobody runs
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert f"{nowhere} can't be reached" in refusal(capsys)
    assert hub.requests == []


def test_offline(hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(capsys)
    assert hub.requests == []


def test_a_cached_config_is_enough_where_the_hub_is_not_to_be_had(
    hub: FakeHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_hub_download("org/tiny", "config.json")
    hub.requests.clear()
    footprint("org/tiny")
    assert "model.safetensors" in hub.fetched(), "the headers are not cached"
    assert caplog.records == []
    hub.forbidden = True
    with caplog.at_level(logging.WARNING):
        assert footprint("org/tiny") == footprint(folder / "config.json", name="org/tiny")
    assert "planned from the cached config.json of org/tiny alone" in caplog.text


def test_a_whole_cache_is_not_asked_twice(hub: FakeHub) -> None:
    for name in ("config.json", "model.safetensors"):
        hf_hub_download("org/tiny", name)
    hub.requests.clear()
    footprint("org/tiny")
    assert hub.requests == []
