"""Key files, and the keys in them."""

from __future__ import annotations

import hashlib

import pytest
import yaml

from deployments.api.keys import ApiKey, digest, find_key, line_of, new_key, parse_keys, plain_key
from deployments.errors import ConfigError

HASHES = [digest(name.encode()) for name in ("a", "b", "c")]


def line(name: str, sha256: str = HASHES[0], **more: object) -> str:
    return yaml.safe_dump([{"name": name, "sha256": sha256, **more}])


def test_a_new_key_is_random_and_its_line_finds_it() -> None:
    key, other = new_key(), new_key()
    assert key != other
    assert len(key) == 46
    assert key.startswith("hr-")
    entry = ApiKey(name="alice", sha256=digest(key.encode()), weight=2, roles=("api", "admin"), tokens_per_minute=10)
    text = line_of(entry)
    assert key not in text
    assert text.count("\n") == 0
    (read,) = parse_keys(text.encode(), "f")
    assert read == entry
    assert find_key([read], key.encode()) == read
    assert find_key([read], other.encode()) is None


def test_a_tenants_weight_is_that_of_all_its_keys() -> None:
    text = line("a", tenant="t") + line("b", HASHES[1], tenant="t", weight=3) + line("c", HASHES[2])
    assert [key.weight for key in parse_keys(text.encode(), "f")] == [3, 3, None]


def test_defaults_are_left_out_of_a_line() -> None:
    assert line_of(ApiKey(name="a", sha256=HASHES[0])) == f"- {{name: a, sha256: {HASHES[0]}}}"


def test_the_hash_is_what_sha256sum_says() -> None:
    assert digest(b"key") == hashlib.sha256(b"key").hexdigest()
    assert find_key([plain_key("schlüssel")], "schlüssel".encode()) is not None


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In constant time each: also those after the one that matches."""
    import hmac

    compared: list[str] = []
    genuine = hmac.compare_digest

    def watched(a: str, b: str) -> bool:
        compared.append(a)
        return genuine(a, b)

    monkeypatch.setattr("deployments.api.keys.hmac.compare_digest", watched)
    keys = [ApiKey(name=name, sha256=hashed) for name, hashed in zip("abc", HASHES, strict=True)]
    assert find_key(keys, b"a") == keys[0]
    assert compared == HASHES
    compared.clear()
    assert find_key(keys, b"d") is None
    assert compared == HASHES


def test_tenants() -> None:
    own, first, second = (
        ApiKey(name=name, sha256=HASHES[0], tenant=tenant)
        for name, tenant in (("own", None), ("first", "team"), ("second", "team"))
    )
    assert (own.owner, first.owner) == ("own", "team")
    assert first.salt == second.salt != own.salt


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "must be a list"),
        ("a: b", "must be a list"),
        ("- hr-SECRET", "key 1: "),
        ("[", "not YAML at line 1"),
        ("- {name: a, sha256: hr-SECRET}", "key 1: sha256: "),
        ("- {name: a, hash: x}", "hash is not known; there are name, sha256"),
        ("- {hr-SECRET: a}", "a field is not known"),
        ("- 2026-13-45", "not YAML"),
        ("[" * 5_000, "not YAML"),
        ("- {name: a}", "sha256: field required"),
        (f"- {{name: a, sha256: {HASHES[0]}, sha256: {HASHES[1]}}}", ":1: a field is given twice"),
        ("- name: x\n  : hr-SECRET: [", "not YAML at line 2"),
        (line("a b"), "name: "),
        (line("a", HASHES[0].upper()), "sha256: "),
        (line("a", requests_per_minute=0), "requests_per_minute: "),
        (line("a", tokens_per_minute="60"), "tokens_per_minute: "),
        (line("a", roles=["root"]), "roles"),
        (line("a", roles=[]), "roles"),
        (line("a") + line("a", HASHES[1]), "two keys are named a"),
        (line("a") + line("b"), "a and b are the same key"),
        (line("a", tenant="t", weight=1) + line("b", HASHES[1], tenant="t", weight=2), "t has weights 1 and 2"),
    ],
)
def test_a_bad_file_is_refused_without_a_word_of_it(content: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_keys(content.encode(), "keys.yaml")
    assert str(error.value).startswith("keys.yaml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert "SECRET" not in str(error.value)


def test_a_file_that_is_not_text() -> None:
    with pytest.raises(ConfigError, match="not UTF-8 at byte 2"):
        parse_keys(b"- \xff", "keys.yaml")
