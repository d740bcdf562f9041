"""`headroom key new`."""

from __future__ import annotations

import pytest

from deployments import cli
from deployments.api.keys import find_key, parse_keys


def test_a_new_key_and_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--tenant", "research", "--weight", "2", "--requests-per-minute", "60", "--tokens-per-minute", "1000"]
    assert cli.main(["key", "new", "batch", *more, "--concurrent-requests", "8", "--role", "admin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    key, line = lines[1], lines[-1]
    (entry,) = parse_keys(line.encode(), "f")
    assert find_key([entry], key.encode()) is entry
    assert entry.model_dump(exclude={"sha256"}) == {
        "name": "batch", "roles": ("admin",), "tenant": "research", "weight": 2, "requests_per_minute": 60,
        "tokens_per_minute": 1000, "concurrent_requests": 8,
    }  # fmt: skip
    assert cli.main(["key", "new", "batch"]) == 0
    assert capsys.readouterr().out.splitlines()[1] != key


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "a b"], "NAME: "),
        (["new", "a", "--weight", "0"], "--weight: "),
        (["new", "a", "--requests-per-minute", "0"], "--requests-per-minute: "),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
