"""A model on a Hugging Face hub: its config.json and the headers of its safetensors files. No weights, nothing stored.

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and proxy settings mean what they mean to huggingface_hub. The token goes
into request headers and nowhere else.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, and not marked as exported
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from placement.errors import PlacementError
from placement.headers import INDEX, SAFETENSORS, Headers, read_index, read_safetensors_file

_BRANCH = "main"
_MOST_JSON_BYTES = 100_000_000
_AT_ONCE = 8
"""Requests."""
_TIMEOUT_S = 10


class HubError(PlacementError):
    """The hub can't be reached, or does not give what was asked of it."""


class _NoSuchFileError(HubError):
    """The repository is there and has no file of that name."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository, read in part (`placement.headers.Stored`)."""

    repo: str
    revision: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} of {self.repo}"

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer where the file ends before.

        Raises:
            HubError: not to be had.
        """
        return _read(self, offset, length)[0]


def read_model(repo: str) -> tuple[bytes, Headers]:
    """config.json, and the headers of all safetensors files, of one commit; no headers where it has none of these.

    Raises:
        HubError: the hub, or the repository, is not to be had.
        PlacementError: a file there is damaged.
    """
    try:
        config, commit = _read(HubFile(repo, _BRANCH, "config.json"), 0, _MOST_JSON_BYTES)
    except _NoSuchFileError:
        raise HubError(
            f"{repo} has no config.json at {constants.ENDPOINT}; give the id of a transformers model, or the path of a "
            "downloaded .gguf file"
        ) from None
    return config, _headers(repo, commit)


def _headers(repo: str, commit: str) -> Headers:
    try:
        return read_safetensors_file(HubFile(repo, commit, SAFETENSORS))
    except _NoSuchFileError:
        pass  # it is in several files, or has none
    try:
        names = read_index(HubFile(repo, commit, INDEX), _MOST_JSON_BYTES)
    except _NoSuchFileError:
        return {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        files = pool.map(lambda name: read_safetensors_file(HubFile(repo, commit, name)), names)
        return {name: header for file in files for name, header in file.items()}


def _read(file: HubFile, offset: int, length: int) -> tuple[bytes, str]:
    """Bytes of `file`, and the commit that they are of (the revision asked for, where the hub names none)."""
    try:
        status, content, commit = _get(file, offset, length)
    except HFValidationError:
        raise HubError(f"{file.repo!r} is neither a folder, a file, nor a Hugging Face id such as org/model") from None
    except HfHubHTTPError as error:
        if _is_missing(error):
            raise _NoSuchFileError(f"{file} is not at {constants.ENDPOINT}; check the repository there") from None
        raise HubError(refusal(file.repo, error)) from None
    except Exception as error:  # noqa: BLE001  its HTTP client (httpx, later httpx2) raises errors of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubError(
            f"{constants.ENDPOINT} can't be reached ({reason}); check the network, HF_ENDPOINT and proxy settings, or "
            "give a folder or a config.json"
        ) from None
    if offset and status != 206:
        raise HubError(
            f"{constants.ENDPOINT} answers no range requests, which {file} must be read with; fetch the model once: "
            f"hf download {file.repo}"
        )
    return content, commit


def _get(file: HubFile, offset: int, length: int) -> tuple[int, bytes, str]:
    """Status, bytes and commit. A server that sends the whole file instead is left after `length` bytes."""
    wanted = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(file.repo, file.name, revision=file.revision)
    content = bytearray()
    with get_session().stream("GET", url, headers=build_hf_headers() | wanted, timeout=_TIMEOUT_S) as response:
        if response.is_error:
            response.read()  # the error quotes it
        hf_raise_for_status(response)
        for part in response.iter_bytes():
            content += part
            if len(content) >= length:
                break
        # Large files are redirected elsewhere; the hub's own answer names the commit.
        commits = [r.headers["x-repo-commit"] for r in (*response.history, response) if "x-repo-commit" in r.headers]
        return response.status_code, bytes(content[:length]), commits[0] if commits else file.revision


def _is_missing(error: HfHubHTTPError) -> bool:
    """Whether the file alone is missing; a mirror that does not say what is gets the benefit of the doubt."""
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return False
    return isinstance(error, EntryNotFoundError) or error.response.status_code == 404


def refusal(where: str, error: Exception) -> str:
    """One line for an answer of the hub's that is not the model `where` (org/model or org/model@revision)."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "the token of HF_TOKEN (or of `hf auth login`)" if get_token() else None
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{where.partition('@')[0]}"
        if token:
            return f"{where} is gated and {token} has no access; accept its terms at {page} with that account"
        return f"{where} is gated; accept its terms at {page} and set HF_TOKEN to a token of that account"
    if isinstance(error, RevisionNotFoundError):
        return f"{where}: no such revision; name a branch, tag or commit of the repository in `revision`"
    if status == 401 and token:
        return f"{constants.ENDPOINT} refused {token} for {where} (401), or there is no such model; check both"
    if isinstance(error, RepositoryNotFoundError):
        mend = f"or {token} has no access to it" if token else "or it is private and HF_TOKEN is not set"
        return f"{constants.ENDPOINT} has no model {where} ({status}), {mend}; check the spelling of its id"
    if status in (401, 403):
        mend = f"check what {token} may read" if token else "set HF_TOKEN"
        return f"{constants.ENDPOINT} denies access to {where} ({status}); {mend}"
    return f"{constants.ENDPOINT} answered {status} for {where}; try later, or set HF_HUB_OFFLINE=1 if it is cached"
