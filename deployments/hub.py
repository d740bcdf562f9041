"""A Hugging Face repository -> a local safetensors folder, with each failure as one line that says how to mend it.

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub, whose cache is used as
it is: what another program fetched is not fetched again. The token goes into request headers and nowhere else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from deployments.errors import ConfigError
from placement.hub import refusal

PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.safetensors")
"""What serving needs: configs, tokenizer, chat template, weights. No pickles: loading one runs its author's code."""
_SUBFOLDERS = "*/*"
"""Other formats of the same model (onnx/, original/)."""

Progress = Callable[[str], None]


def download(repo_id: str, revision: str | None, progress: Progress) -> Path:
    """The folder of `repo_id` at `revision` in huggingface_hub's cache, fetched where it is not whole yet.

    Raises:
        ConfigError: not to be had: unknown, gated, wrong revision, no safetensors, offline, broken off, disk full.
    """
    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        if constants.HF_HUB_OFFLINE:
            return _cached(repo_id, revision)
        return _fetch(repo_id, revision, where, progress)
    except HFValidationError:
        raise ConfigError(
            f"source {repo_id!r} is neither a folder, a .gguf file, nor a Hugging Face id such as org/model"
        ) from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{where} is not (wholly) in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set; fetch it once "
            "with HF_HUB_OFFLINE unset"
        ) from None
    except HfHubHTTPError as error:
        raise ConfigError(refusal(where, error)) from None


def _fetch(repo_id: str, revision: str | None, where: str, progress: Progress) -> Path:
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=10)
    except HfHubHTTPError:
        raise
    except Exception as error:  # noqa: BLE001  its HTTP client (httpx, later httpx2) raises errors of its own
        return _cached_without_network(repo_id, revision, where, error)
    files = {entry.rfilename: entry.size or 0 for entry in info.siblings or () if _wanted(entry.rfilename)}
    _check_weights(where, [entry.rfilename for entry in info.siblings or ()])
    folder = _cached_snapshot(repo_id, revision)
    if folder and folder.name == info.sha and all((folder / name).is_file() for name in files):
        return folder
    _check_disk(where, sum(files.values()))
    progress(f"fetching {where}: {len(files)} files, {sum(files.values()) / 1e6:,.0f} MB")
    try:
        # By its name, not by info.sha: the cache then knows the name too, for a start without network.
        return _snapshot(repo_id, revision)
    except HfHubHTTPError:
        raise
    except Exception as error:  # noqa: BLE001  see above; the message keeps the cause
        raise ConfigError(
            f"the download of {where} from {constants.ENDPOINT} broke off: {_line(error)}; start again, what is whole "
            "is kept"
        ) from None


def _wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PATTERNS) and not fnmatch(name, _SUBFOLDERS)


def _check_weights(where: str, names: list[str]) -> None:
    if any(_wanted(name) and name.endswith(".safetensors") for name in names):
        return
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise ConfigError(
            f"{where} has its weights as pickles only (.bin), which may run code when loaded; use a repository or "
            "revision with .safetensors"
        )
    if any(name.endswith(".gguf") for name in names):
        raise ConfigError(f"{where} has .gguf files only; download one and give its path as the source")
    raise ConfigError(f"{where} has no .safetensors weights; give the id of a language model")


def _check_disk(where: str, need: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    if (have := shutil.disk_usage(cache).free) < need:
        raise ConfigError(
            f"{where} needs {need / 1e9:.1f} GB in {cache}, {have / 1e9:.1f} GB are free; free some or set HF_HOME"
        )


def _snapshot(repo_id: str, revision: str | None, *, local_files_only: bool = False) -> Path:
    # The same patterns whether it is fetched or found: the cache compares with them whether a snapshot is whole.
    return Path(
        snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(PATTERNS),
            ignore_patterns=[_SUBFOLDERS],
            local_files_only=local_files_only,
        )
    )


def _cached(repo_id: str, revision: str | None) -> Path:
    return _snapshot(repo_id, revision, local_files_only=True)


def _cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    try:
        return _cached(repo_id, revision)
    except LocalEntryNotFoundError:
        return None


def _cached_without_network(repo_id: str, revision: str | None, where: str, error: Exception) -> Path:
    try:
        return _cached(repo_id, revision)
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{constants.ENDPOINT} can't be reached ({_line(error)}) and {where} is not in the cache "
            f"{constants.HF_HUB_CACHE}; check the network, HF_ENDPOINT and proxy settings"
        ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
