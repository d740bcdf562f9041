"""Fetching from a Hugging Face hub: what is fetched, what is kept, and what each failure says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from deployments import store
from deployments.errors import ConfigError
from tests.fakes.hub import SHA, TOKEN, FakeHub, running_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with running_hub() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield state


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., store.LocalModel]:
    def run(source: str = "org/tiny", revision: str | None = None) -> store.LocalModel:
        return store.fetch(source, revision=revision, home=tmp_path / "home")

    return run


def test_fetches_what_serving_needs_and_no_pickle(hub: FakeHub, fetch: Callable[..., store.LocalModel]) -> None:
    local = fetch()
    assert local.max_context == 128
    assert hub.fetched() == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (local.path / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_second_fetch_downloads_nothing(hub: FakeHub, fetch: Callable[..., store.LocalModel]) -> None:
    first = fetch()
    hub.requests.clear()
    assert fetch() == first
    assert hub.fetched() == set()


@pytest.mark.usefixtures("hub")
def test_revision_is_a_commit(fetch: Callable[..., store.LocalModel]) -> None:
    assert fetch(revision=SHA).path == fetch().path


@pytest.mark.usefixtures("hub")
def test_cached_model_needs_no_network(fetch: Callable[..., store.LocalModel], monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # The port of "discard": nobody listens.
    assert fetch() == first


def test_offline_takes_the_cache_and_asks_nobody(
    hub: FakeHub, fetch: Callable[..., store.LocalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == first
    assert hub.requests == []


def test_token_opens_a_private_model(
    hub: FakeHub, fetch: Callable[..., store.LocalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch().max_context == 128


def refusal(fetch: Callable[..., store.LocalModel], *args: str | None) -> str:
    with pytest.raises(ConfigError) as caught:
        fetch(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def test_unauthorised_without_token_names_the_variable(hub: FakeHub, fetch: Callable[..., store.LocalModel]) -> None:
    hub.private = True
    assert "HF_TOKEN is not set" in refusal(fetch)


def test_wrong_token_is_blamed_and_not_shown(
    hub: FakeHub, fetch: Callable[..., store.LocalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    message = refusal(fetch)
    assert "HF_TOKEN" in message
    assert "401" in message
    assert "hf_wrong" not in message


def test_gated_names_the_page_of_its_terms(hub: FakeHub, fetch: Callable[..., store.LocalModel]) -> None:
    hub.gated = True
    message = refusal(fetch)
    assert "gated" in message
    assert f"{hub.url}/org/tiny" in message


def test_gated_with_a_token_asks_for_access(
    hub: FakeHub, fetch: Callable[..., store.LocalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "has no access" in refusal(fetch)


def test_forbidden(hub: FakeHub, fetch: Callable[..., store.LocalModel]) -> None:
    hub.forbidden = True
    assert "403" in refusal(fetch)


@pytest.mark.usefixtures("hub")
def test_unknown_model_asks_for_the_spelling(fetch: Callable[..., store.LocalModel]) -> None:
    message = refusal(fetch, "org/tyny")
    assert "no model org/tyny (404)" in message


@pytest.mark.usefixtures("hub")
def test_wrong_revision_names_the_setting(fetch: Callable[..., store.LocalModel]) -> None:
    message = refusal(fetch, "org/tiny", "v9")
    assert "org/tiny@v9" in message
    assert "`revision`" in message


def test_broken_download_can_be_resumed(hub: FakeHub, fetch: Callable[..., store.LocalModel]) -> None:
    hub.cut = "model.safetensors"
    assert "broke off" in refusal(fetch)
    hub.cut = None
    assert fetch().max_context == 128


def test_damaged_weights_are_noticed(hub: FakeHub, fetch: Callable[..., store.LocalModel]) -> None:
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-3]
    assert "its header needs" in refusal(fetch)


def test_pickles_only_is_refused_before_any_download(hub: FakeHub, fetch: Callable[..., store.LocalModel]) -> None:
    del hub.files["model.safetensors"]
    assert "pickles only" in refusal(fetch)
    assert hub.fetched() == set()


@pytest.mark.usefixtures("hub")
def test_offline_and_not_cached(fetch: Callable[..., store.LocalModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(fetch)


@pytest.mark.usefixtures("hub")
def test_no_network_and_not_cached(fetch: Callable[..., store.LocalModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached" in refusal(fetch)


def test_environment_is_what_users_of_the_hub_know(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN are read when huggingface_hub is imported: so in a process of its own."""
    hub.private = True
    code = "from deployments import store; from deployments.home import state_folder; "
    code += "print(store.fetch('org/tiny', home=state_folder()).path)"
    environ = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HEADROOM_HOME": str(tmp_path),
    }
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        environ.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "hf" / "hub"))
    assert TOKEN not in done.stdout + done.stderr
