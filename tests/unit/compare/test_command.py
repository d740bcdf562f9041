"""The command: options that can't be are refused by name, and a quantisation that fails is a row."""

from __future__ import annotations

import gc
import json
import subprocess
from pathlib import Path

import pytest

from deployments import cli
from deployments.compare import command
from deployments.compare.child import check, measure, status_bytes
from deployments.compare.values import Comparison, Failed, Job, Measured, Quantised, Workload
from deployments.errors import ConfigError
from deployments.settings import PoolSettings
from placement import probe
from tests.unit.compare import models
from tests.unit.engine import tiny

MEMORY = "0=3MB"
"""bfloat16 needs 2.43 MB with a block of KV cache, float32 3.88."""


def job(tmp_path: Path, quantization: str = "nf4") -> Job:
    pool = PoolSettings.model_validate({"quantization": quantization, "device": "cpu"})
    return Job(
        model="m", folder=tmp_path, text=command.TEXT, pool=pool, workload=models.WORKLOAD, cache=tmp_path / "cache"
    )


@pytest.mark.parametrize("given", [{"batch_invariant": True}, {"tune_kernels": False}])
def test_a_job_travels_with_the_settings_that_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, bool]
) -> None:
    """Those that were not must not count as given: some contradict each other."""
    asked = job(tmp_path)
    asked = asked.model_copy(update={"pool": PoolSettings.model_validate({"device": "cpu"} | given)})

    def answers(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        arrived = Job.model_validate_json(Path(arguments[-2]).read_text(encoding="utf-8"))
        assert arrived == asked
        Path(arguments[-1]).write_text(Failed(quantization="nf4", reason="seen").model_dump_json(), encoding="utf-8")
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(subprocess, "run", answers)
    assert command._ask(asked) == Failed(quantization="nf4", reason="seen")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(ConfigError, match="m is an encoder-decoder, and a text's perplexity"):
        measure(job(tmp_path))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--quantization", "nf4,q4"], "'q4' is not one of nf4, fp4, int8, bf16, fp16, fp32"),
        (["--quantization", "nf4,nf4"], "nf4 is there twice"),
        (["--quantization", ""], "'' is not one of"),
        (["--quantization", "int8", "--double-quant"], "--double-quant is for nf4 and fp4"),
        (["--quantization", "bf16", "--quantize-experts"], "--quantize-experts is for nf4, fp4 and int8"),
        (["--quantization", "nf4", "--int8-threshold", "6"], "--int8-threshold is for int8"),
        (["--int8-threshold", "-1"], "--int8-threshold: Input should be"),
        (["--kernels", "bitsandbytes"], "--kernels chooses between kernels on GPUs"),
        (["--hourly-price", "0"], "--hourly-price 0"),
        (["--hourly-price", "nan"], "--hourly-price nan"),
        (["--concurrency", "1,x"], "--concurrency 1,x"),
        (["--concurrency", "0"], "--concurrency 0"),
        (["--concurrency", "2,2"], "2 is there twice"),
        (["--stages", "0"], "--stages: Input should be"),
        (["--threads", "0"], "--threads: Input should be"),
        (["--max-memory", "1GB"], "--max-memory '1GB': write device=size"),
        (["--max-memory", "0=1GB,2=1GB"], "max_memory must name devices 0, 1"),
        (["--input", "0"], "--input: Input should be"),
        (["--output", "1"], "--output: Input should be"),
        (["--window", "1"], "--window: Input should be"),
        (["--window", "129"], "--window 129: the model was made for 128 tokens"),
        (["--window", "64", "--stride", "65"], "--stride 65: windows of 64 tokens start every 1 to 64"),
        (["--text", "no-such-file"], "--text no-such-file can't be read: No such file"),
        (["--json", "no-such-folder/a.json"], "no-such-folder/a.json can't be written"),
    ],
)
def test_what_can_not_be_is_refused_by_name_before_anything_runs(
    arguments: list[str],
    named: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "in_child", None)
    assert cli.main(["compare", str(model), "--device", "cpu", *arguments]) == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert printed.count("\n") == 1


def test_options_of_the_other_device_are_refused() -> None:
    options = command._parser().parse_args(["m", "--threads", "2"])
    with pytest.raises(command.ConfigError, match="--threads is for the CPU"):
        command.refuse_idle_options(options, ["nf4"], "cuda")
    options = command._parser().parse_args(["m", "--kernels", "headroom"])
    with pytest.raises(command.ConfigError, match="--kernels is for quantised weights"):
        command.refuse_idle_options(options, ["bf16"], "cuda")
    command.refuse_idle_options(options, ["bf16", "int8"], "cuda")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.device_of("auto") == "cpu"
    with pytest.raises(command.ConfigError, match="--device cuda: no CUDA device"):
        command.device_of("cuda")


def test_one_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    def fake(job: Job) -> Measured | Failed:
        if job.pool.quantization == "fp4":
            return Failed(quantization="fp4", reason="no")
        return models.measured(job.pool.quantization)

    rows = command.measure_all([job(tmp_path, name) for name in ("nf4", "fp4", "int8")], fake)
    assert [(row.quantization, row.kind) for row in rows] == [
        ("nf4", "measured"),
        ("fp4", "failed"),
        ("int8", "measured"),
    ]


def test_a_process_that_quantised_is_followed_by_one_that_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [Quantised(seconds=7.0), models.measured("nf4")]
    monkeypatch.setattr(command, "_ask", lambda _: answers.pop(0))
    row = command.in_child(job(tmp_path))
    assert isinstance(row, Measured)
    assert row.quantise_s == 7.0
    monkeypatch.setattr(command, "_ask", lambda _: Quantised(seconds=7.0))
    again = command.in_child(job(tmp_path))
    assert isinstance(again, Failed)
    assert "did not stay" in again.reason


def test_a_process_that_ends_by_itself_is_a_reason() -> None:
    assert "main memory ran out" in command._how_it_ended(-9, "")
    assert command._how_it_ended(1, "Traceback\n  line\nValueError: x\n").endswith("with code 1: ValueError: x")


def test_a_workload_that_the_plan_has_no_room_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny.plan_of(tiny.save(tmp_path, tiny.llama()))
    fits = job(tmp_path)
    check(fits, plan)
    for change, named in (({"input": 128}, "--input or --output"), ({"window": 129}, "--window")):
        workload = Workload.model_validate(models.WORKLOAD.model_dump() | change)
        with pytest.raises(command.ConfigError, match=named):
            check(fits.model_copy(update={"workload": workload}), plan)
    monkeypatch.setattr(probe, "available_memory", lambda: 1000)
    with pytest.raises(command.ConfigError, match=r"1\.00 kB are available"):
        check(fits, plan)


def test_resident_memory_is_read_in_bytes() -> None:
    assert 10_000_000 < status_bytes("VmRSS") <= status_bytes("VmHWM")
    with pytest.raises(command.ConfigError, match="has no VmNone"):
        status_bytes("VmNone")


def test_the_default_text_is_long_enough_to_say_something() -> None:
    text = command.TEXT.read_text(encoding="utf-8")
    assert len(text) > 10_000
    assert text.startswith("When on board H.M.S. 'Beagle,'")


def test_what_is_measured_was_not_quantised_by_the_same_process(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("all work and no play " * 4, encoding="utf-8")
    wanted = job(model).model_copy(update={"cache": tmp_path / "cache", "text": text})
    first = measure(wanted)
    assert isinstance(first, Quantised)
    assert first.seconds > 0
    try:
        second = measure(wanted)
    finally:
        gc.unfreeze()
    assert isinstance(second, Measured)
    assert second.quantization == "nf4"
    assert (second.quality.text_tokens, second.quality.scored_tokens) == (84, 83)
    assert [level.requests for level in second.levels] == [1, 3]
    assert second.memory.capacity_tokens >= 128
    assert second.memory.weights < second.memory.planned <= 1_000_000_000


def test_compared_for_real(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """bfloat16 fits; float32 does not, and is a row with its reason."""
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    text, found, drawn = tmp_path / "short.txt", tmp_path / "found.json", tmp_path / "drawn.svg"
    text.write_text("all work and no play " * 4, encoding="utf-8")
    sizes = ["--concurrency", "1,3", "--input", "9", "--output", "5", "--window", "32", "--max-memory", MEMORY]
    files = ["--text", str(text), "--json", str(found), "--svg", str(drawn)]
    names = ["--device", "cpu", "--quantization", "bf16,fp32", "--hourly-price", "2"]
    assert cli.main(["compare", str(model), *names, *sizes, *files]) == 0

    made = Comparison.model_validate(json.loads(found.read_text(encoding="utf-8")))
    bf16, fp32 = made.rows
    assert isinstance(bf16, Measured)
    assert isinstance(fp32, Failed)
    assert "3,884,480 bytes" in fp32.reason
    assert bf16.quantise_s is None
    assert bf16.quality.text_tokens == 84
    assert bf16.quality.scored_tokens == 83
    assert 10 < bf16.quality.perplexity < 10_000, "of a random model, 256 or so"
    assert [level.requests for level in bf16.levels] == [1, 3]
    assert min(min(level.tokens_per_s, level.first_token_s, level.request_s) for level in bf16.levels) > 0
    assert bf16.memory.measured > bf16.memory.weights
    assert drawn.read_text(encoding="utf-8").startswith("<svg")
    printed = capsys.readouterr().out
    assert f"fp32: not measured: {fp32.reason}" in printed
    assert f"{bf16.quality.perplexity:.3f}" in printed
