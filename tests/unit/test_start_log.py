"""The newest line of the engines that start, out of their workers' log files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deployments.start_log import EVERY_S, StartLog


class Logs:
    """A folder of log files whose times are set, and a clock."""

    def __init__(self, folder: Path, replicas: int = 1) -> None:
        self.folder, self.now, self.writes = folder, 0.0, 0
        self.start = StartLog(folder, replicas, lambda: self.now)

    def write(self, text: str, name: str = "worker-a-01-7.err") -> None:
        self.writes += 1
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(text)
        os.utime(self.folder / name, (self.writes, self.writes))

    def news(self, after_s: float = EVERY_S) -> str | None:
        self.now += after_s
        return self.start.news()


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def test_a_line_is_news_once(logs: Logs) -> None:
    assert logs.news() is None
    logs.write("engine INFO loading weights: 2.90 GB of 5.70 GB (50 %)\nengine INFO attention runs on FlashInfer\n")
    assert logs.news() == "attention runs on FlashInfer"
    assert logs.news() is None
    logs.write("engine WARNING weights are dequantised\n")
    assert logs.news() == "weights are dequantised"


def test_lines_are_some_seconds_apart_and_the_newest_counts(logs: Logs) -> None:
    logs.write("engine INFO one\n")
    assert logs.news(after_s=0.0) == "one"
    logs.write("engine INFO two\n")
    assert logs.news(after_s=EVERY_S / 2) is None
    logs.write("engine INFO three\n")
    assert logs.news(after_s=EVERY_S / 2) == "three"


def test_what_is_no_whole_line_of_an_engine_is_not_shown(logs: Logs) -> None:
    logs.write("(Replica pid=7) engine INFO no\nTraceback\nengine ERROR the engine stops\nengine INFO not yet whol")
    assert logs.news() is None
    logs.write("e\n")
    assert logs.news() == "not yet whole"


def test_of_several_replicas_the_one_that_wrote_last_is_shown(logs: Logs) -> None:
    logs.write("engine INFO of a\n", "worker-a-01-7.err")
    logs.write("engine INFO of b\n", "worker-b-01-8.err")
    logs.write("no engine\n", "worker-c-01-9.err")
    logs.write("engine INFO elsewhere\n", "worker-d-01-9.out")
    assert logs.news() == "of b"
    logs.write("engine INFO of b\n", "worker-a-01-7.err")
    assert logs.news() == "of b", "a's own"


def test_only_a_files_end_is_read(logs: Logs) -> None:
    logs.write("engine INFO long ago\n" + "x" * 10_000 + "\n")
    assert logs.news() is None
    logs.write("engine INFO now\n")
    assert logs.news() == "now"


def test_of_several_replicas_each_line_says_which_one_logged_it(tmp_path: Path) -> None:
    logs = Logs(tmp_path, replicas=3)
    for worker, pool in (("a", "llama3:8b-nf4"), ("b", "llama3:8b-nf4"), ("c", "opt-default")):
        who = f":job_id:01000000\n:actor_name:ServeReplica:headroom:{pool}\n"
        logs.write(who + "a line of transformers\n" * 500, f"worker-{worker}-01-7.err")
    assert logs.news() is None
    said = []
    for worker in "baca":
        logs.write("engine INFO loading\n", f"worker-{worker}-01-7.err")
        said.append(logs.news())
    numbered = ["llama3:8b-nf4 1", "llama3:8b-nf4 2", "opt-default 1", "llama3:8b-nf4 2"]
    assert said == [f"{replica}: loading" for replica in numbered]


def test_a_file_that_names_no_replica_is_still_shown(tmp_path: Path) -> None:
    logs = Logs(tmp_path, replicas=2)
    logs.write("engine INFO loading\n")
    assert logs.news() == "replica 1: loading"
