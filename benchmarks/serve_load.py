r"""Load on Headroom over HTTP, against sequential `generate()` and against the bare engine.

    python -m benchmarks.serve_load                          starts `headroom serve serve_config.yaml` itself
    python -m benchmarks.serve_load --url http://host:8000   measures one that runs; --config says what it serves
    python -m benchmarks.serve_load --shape 8b --engine --no-baseline --concurrency 1,64 --output-tokens 128 \
        --prompt-characters 128                              random weights on a GPU, and the engine alone beside it

Every round begins with one client whose requests alternate, prompt by prompt, with the sequential baseline and the bare
engine, so that a slow spell of the machine hits all three; then come the larger numbers of clients. The baseline runs
twice more with no server beside it (before it starts, after it stops), and the better of the two medians counts.
Prompts are chat turns that no cache has seen, answered greedily and with `ignore_eos`, so that all answers are equally
long.

Clients run in --client-processes processes, because one process of Python is soon the bottleneck; the CPU time of each
part of a service that is started here, under the most clients, is in the report.

With --engine the engine alone is measured before the server starts, as the two would not fit on a GPU together: the
largest number of clients, and then as many long answers at once, whose common time gives the time of a step. The
service gets the same loads after its rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm  # type: ignore[import-untyped]  # has no types

from benchmarks.arguments import positive
from benchmarks.child import ROOT, ChildFailed
from benchmarks.client import Answer, LoadFailed
from benchmarks.client_processes import ClientProcesses, client_processes, default_processes
from benchmarks.contenders import Contenders, SequentialRun
from benchmarks.cpu_meter import CpuMeter, Part
from benchmarks.engine_child import EngineChild, EngineRun
from benchmarks.overhead import Overhead, overhead
from benchmarks.report import Baseline, Level, Report, plot
from benchmarks.server import OwnServer
from benchmarks.shape_config import write_config
from benchmarks.subject import Subject
from benchmarks.workload import CYCLE, prompts
from deployments.errors import ConfigError

PAUSE_S = 0.25
"""Between contenders that alternate: the threads of one spin for a while before they sleep."""


@dataclass(slots=True)
class Tally:
    """What the rounds add up to."""

    levels: dict[int, list[tuple[Answer, ...]]]
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
    same: int = 0
    compared: int = 0

    def compare(self, answer: Answer, run: SequentialRun) -> None:
        """Check that both sides saw the same prompt, and count equal answers.

        Raises:
            LoadFailed: the prompt has another length in tokens on the two sides.
        """
        _check_prompts(answer.prompt_tokens, run.prompt_tokens[0])
        self.same += (answer.text,) == run.texts
        self.compared += 1


def _check_prompts(served: int, alone: int) -> None:
    if served != alone:
        raise LoadFailed(
            f"the server counts {served} prompt tokens where what it is compared with has {alone}: --config is not "
            "what the server serves"
        )


class Benchmark:
    """One run: `measure` does all of it."""

    def __init__(self, options: argparse.Namespace, subject: Subject, logs: Path) -> None:
        self._options, self._subject, self._logs = options, subject, logs
        self._tally = Tally({clients: [] for clients in options.concurrency})
        self._contenders: Contenders | None = None
        self._most = max(options.concurrency)
        self._alone: list[tuple[EngineRun, int]] = []
        """The engine's runs of the two loads, and the tokens of their prompts."""
        self._overhead: Overhead | None = None
        self._client_processes = options.client_processes or default_processes(self._most, subject.cores)
        self._first_clients = max(4, self._client_processes)
        """So that no process has its first stream under a load that counts."""
        self._cpu: tuple[Part, ...] = ()
        baseline_answers = (options.rounds + 2 * (options.url is None)) * CYCLE * (not options.no_baseline)
        served_answers = _requests(self._first_clients) + options.rounds * sum(map(_requests, options.concurrency))
        engine_answers = 2 * sum(map(len, self._engine_loads())) * options.engine
        self._bar = tqdm(total=served_answers + baseline_answers + engine_answers, unit="answer")

    def measure(self) -> Report:
        """Raises LoadFailed or ChildFailed."""
        try:
            if not self._options.no_baseline:
                self._bar.set_description("loading the baseline, sweeping its threads")
                self._contenders = Contenders(self._subject, self._logs, self._options.output_tokens)
                self._contenders.load()
            self._run_alone("before")
            self._run_engine()
            self._bar.set_description("starting the server")
            model = self._subject.model.name
            with (
                _serving(self._options, self._logs) as (url, service),
                client_processes(self._client_processes, url, model) as processes,
            ):
                self._run_rounds(processes, CpuMeter(processes.pids, service))
            self._run_alone("after")
            return self._report()
        finally:
            self._bar.close()
            if self._contenders:
                self._contenders.close()

    def _run_alone(self, when: str) -> None:
        if self._contenders and self._options.url is None:
            self._bar.set_description("generate() alone")
            run = self._contenders.generate(prompts(when, CYCLE))
            self._tally.alone.append(run.tokens_per_s)
            self._tally.seconds += run.seconds
            self._bar.update(CYCLE)

    def _engine_loads(self) -> tuple[list[str], list[str]]:
        """Several answers for each client, and a long one for each."""
        return self._prompts("burst", _requests(self._most)), self._prompts("steady", self._most)

    def _run_engine(self) -> None:
        if not self._options.engine:
            return
        self._bar.set_description("loading the engine alone")
        engine = EngineChild(self._subject, self._logs)
        try:
            engine.load()
            self._bar.set_description("the engine alone")
            engine.run(self._prompts("warm-up", self._most), clients=self._most, output_tokens=8)
            for texts, tokens in zip(self._engine_loads(), self._engine_outputs(), strict=True):
                self._alone.append(engine.run(texts, clients=self._most, output_tokens=tokens))
                self._bar.update(len(texts))
        finally:
            engine.close()

    def _engine_outputs(self) -> tuple[int, int]:
        return self._options.output_tokens, self._options.steady_tokens

    def _run_engine_loads(self, processes: ClientProcesses) -> None:
        served: list[list[Answer]] = []
        for texts, tokens in zip(self._engine_loads(), self._engine_outputs(), strict=True):
            served.append(self._load(processes, texts, clients=self._most, output_tokens=tokens))
        for answers, (_, prompt_tokens) in zip(served, self._alone, strict=True):
            _check_prompts(sum(answer.prompt_tokens for answer in answers), prompt_tokens)
        (first, _), (second, _) = self._alone
        self._overhead = overhead(self._most, (first, second), *served)

    def _prompts(self, tag: str, count: int) -> list[str]:
        return prompts(tag, count, self._options.prompt_characters)

    def _run_rounds(self, processes: ClientProcesses, meter: CpuMeter) -> None:
        first = self._prompts("first", _requests(self._first_clients))
        self._load(processes, first, clients=self._first_clients)
        for i in range(self._options.rounds):
            for clients in self._options.concurrency:
                texts = self._prompts(f"r{i}c{clients}", _requests(clients))
                if clients == 1 and self._contenders:
                    answers = self._alternate(processes, texts, self._contenders)
                else:
                    with meter.over(len(texts)) if clients == self._most else nullcontext():
                        answers = self._load(processes, texts, clients=clients)
                self._tally.levels[clients].append(tuple(answers))
        self._cpu = meter.parts()
        if self._options.engine:
            self._run_engine_loads(processes)

    def _load(
        self, processes: ClientProcesses, texts: Sequence[str], *, clients: int, output_tokens: int | None = None
    ) -> list[Answer]:
        self._bar.set_description(f"{clients} clients" if clients > 1 else "1 client")
        tokens = output_tokens or self._options.output_tokens
        return processes.run(texts, clients=clients, output_tokens=tokens, done=self._bar.update)

    def _alternate(self, processes: ClientProcesses, texts: Sequence[str], contenders: Contenders) -> list[Answer]:
        """Each prompt through HTTP, `generate()` and the bare engine, one at a time."""
        tally = self._tally
        answers: list[Answer] = []
        seconds: list[float] = []
        for text in texts:
            [answer] = self._load(processes, [text], clients=1)
            time.sleep(PAUSE_S)
            [first] = contenders.first_tokens([text])
            time.sleep(PAUSE_S)
            run = contenders.generate([text])
            time.sleep(PAUSE_S)
            tally.compare(answer, run)
            tally.engine.append(first)
            tally.added.append(answer.ttft - first)
            answers.append(answer)
            seconds += run.seconds
            self._bar.update()
        tally.seconds += seconds
        tally.beside.append(len(texts) * self._options.output_tokens / sum(seconds))
        return answers

    def _report(self) -> Report:
        tally, plan = self._tally, self._subject.plan
        setup = {
            "model": self._subject.model.name,
            "quantization": plan.quantization,
            "dtype": plan.dtype,
            "stages": len(plan.stages),
            "replicas": self._subject.pool.replicas,
            "threads_per_replica": self._subject.threads,
            "cores": self._subject.cores,
            "machine": platform.platform(),
            "output_tokens": self._options.output_tokens,
            "rounds": self._options.rounds,
            "client_processes": self._client_processes,
        }
        baseline = None
        if self._contenders:
            baseline = Baseline(
                sweep=self._contenders.sweep,
                alone=tuple(tally.alone),
                beside=tuple(tally.beside),
                seconds=tuple(tally.seconds),
                same_text=(tally.same, tally.compared),
            )
        levels = tuple(Level(clients, tuple(rounds)) for clients, rounds in tally.levels.items())
        return Report(setup, levels, baseline, tuple(tally.engine), tuple(tally.added), self._overhead, self._cpu)


def _requests(clients: int) -> int:
    """Requests of one round: whole cycles of prompt lengths, and at least two for each client."""
    return CYCLE * max(1, -(-2 * clients // CYCLE))


@contextmanager
def _serving(options: argparse.Namespace, logs: Path) -> Iterator[tuple[str, int | None]]:
    """URL, and the pid of `headroom serve` where it is started here."""
    if options.url is not None:
        yield options.url, None
        return
    server = OwnServer(options.config, logs / "server.log")
    try:
        yield server.url, server.pid
    finally:
        server.stop()


def _clients(text: str) -> list[int]:
    counts = sorted({int(part) for part in text.split(",")})
    if not counts or counts[0] < 1:
        raise ValueError
    return counts


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a Headroom that runs; default: start one on a free port")
    parser.add_argument("--config", type=Path, default=ROOT / "serve_config.yaml", help="what is served")
    parser.add_argument("--shape", help="serve random weights of this shape of benchmarks.checkpoint, not --config")
    parser.add_argument("--quantization", default="nf4", help="of --shape; default: %(default)s")
    parser.add_argument("--ingress", type=positive, default=4, help="ingress replicas of --shape; default: %(default)s")
    parser.add_argument("--concurrency", type=_clients, default=[1, 4, 16], help="numbers of clients: 1,4,16")
    parser.add_argument(
        "--client-processes",
        type=positive,
        help="that the clients run in; default: one for each 8 clients, at most a quarter of the cores",
    )
    parser.add_argument("--output-tokens", type=positive, default=64, help="tokens of each answer")
    parser.add_argument("--prompt-characters", type=positive, help="of each prompt; default: as chat turns are")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--engine", action="store_true", help="compare the most clients with the engine alone")
    parser.add_argument(
        "--steady-tokens", type=positive, default=512, help="of the long answers of --engine; default: %(default)s"
    )
    parser.add_argument("--no-baseline", action="store_true", help="only the load: no generate(), no bare engine")
    parser.add_argument(
        "--goals", action="store_true", help="exit with 1 unless every goal was measured, steadily, and met"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("serve_load.png"), help=".png or .svg")
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="of the server and the baseline; default: a new one"
    )
    options = parser.parse_args(arguments)
    if options.goals and options.no_baseline and not options.engine:
        parser.error("--goals compares with the baseline or the engine: drop --no-baseline, or add --engine")
    if options.engine and options.url:
        parser.error("--engine runs the engine alone before the service: drop --url")
    if not options.no_baseline and 1 not in options.concurrency:
        parser.error("the baseline alternates with one client: add 1 to --concurrency, or give --no-baseline")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when a goal is missed under --goals; 2 when nothing could be measured."""
    options = _parse(arguments)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="serve_load-"))
    logs.mkdir(parents=True, exist_ok=True)
    try:
        if options.shape:
            options.config = write_config(options.shape, options.quantization, options.ingress, logs)
        subject = Subject.of(options.config)
        if subject.device_type == "cuda" and not options.no_baseline:
            raise ConfigError("on GPUs the plan leaves the baseline no memory beside the server; pass --no-baseline")
        report = Benchmark(options, subject, logs).measure()
    except (ConfigError, LoadFailed, ChildFailed) as error:
        print(f"serve_load: {error}\nserve_load: the logs are in {logs}", file=sys.stderr)
        return 2
    print(report)
    plot(report, options.plot)
    print(f"plot: {options.plot}")
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return 1 if options.goals and not report.meets_all_goals() else 0


if __name__ == "__main__":
    sys.exit(main())
