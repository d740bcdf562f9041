"""The picture of a step, of a small trace made by hand; and that the benchmark writes traces that can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.engine_throughput import main as measure
from benchmarks.trace_picture import COLOURS, ENLARGED, LAUNCH, STEP, WAIT, Span, draw, main, panels, read


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 9, "tid": 9, "args": args}


def kernel(name: str, ts: float, dur: float, device: int = 0, stream: int = 7) -> dict[str, Any]:
    return event("kernel", name, ts, dur, device=device, stream=stream)


def events(gpus: int = 1) -> list[dict[str, Any]]:
    """Five steps of 100 us."""
    found = [{"ph": "M", "name": "process_name"}, event("cpu_op", "aten::mm", 0, 5)]
    for start in range(1000, 1500, 100):
        found += [
            event("user_annotation", STEP, start, 99),
            event("gpu_user_annotation", STEP, start, 99),
            event("cuda_runtime", "cudaGraphLaunch", start, 10),
            event("cuda_runtime", "cudaEventSynchronize", start + 20, 70),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", start + 90, 2, device=0, stream=20),
        ]
        for gpu in range(gpus):
            found += [
                kernel("skinny", start + 10, 40, gpu),
                kernel("BatchDecodeWithPagedKVCacheKernel", start + 50, 20, gpu),
                kernel("triton_red_fused_add", start + 70, 15, gpu),
            ]
    return found


def written(folder: Path, found: list[dict[str, Any]], name: str = "step.64.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"traceEvents": found}))
    return path


def test_a_step_is_cut_out_of_the_middle(tmp_path: Path) -> None:
    whole, enlarged = panels(read(written(tmp_path, events()), "64 requests"))
    assert (whole.start, whole.end) == (1200, 1300)
    assert whole.lanes == ["host thread 9", "GPU 0, stream 20", "GPU 0, stream 7"]
    assert {(span.lane[:5], span.kind, span.start, span.end) for span in whole.spans} == {
        ("host ", LAUNCH, 1200, 1210),
        ("host ", WAIT, 1220, 1290),
        ("GPU 0", "copies", 1290, 1292),
        ("GPU 0", "GEMM", 1210, 1250),
        ("GPU 0", "attention", 1250, 1270),
        ("GPU 0", "fused elementwise", 1270, 1285),
    }
    assert enlarged.end - enlarged.start == pytest.approx(100 / ENLARGED)
    assert (enlarged.start + enlarged.end) / 2 == 1250
    assert Span("GPU 0, stream 7", "GEMM", enlarged.start, 1250) in enlarged.spans, "cut at the panel's edge"


def test_two_gpus_have_two_steps(tmp_path: Path) -> None:
    trace = read(written(tmp_path, events(gpus=2)), "2 requests")
    assert trace.window() == (1100, 1300)
    assert panels(trace)[0].lanes == ["host thread 9", "GPU 0, stream 20", "GPU 0, stream 7", "GPU 1, stream 7"]


def test_the_picture_is_to_scale_and_names_its_colours(tmp_path: Path) -> None:
    root = ElementTree.fromstring(draw([read(written(tmp_path, events()), "64 requests")]))
    shapes = root.findall("{http://www.w3.org/2000/svg}rect")
    texts = [text.text for text in root.findall("{http://www.w3.org/2000/svg}text")]
    gemm = [rect for rect in shapes if rect.get("fill") == COLOURS["GEMM"]]
    launch = [rect for rect in shapes if rect.get("fill") == COLOURS[LAUNCH]]
    assert float(gemm[0].get("width", 0)) == pytest.approx(4 * float(launch[0].get("width", 0)), rel=0.01)
    assert float(gemm[0].get("x", 0)) - float(launch[0].get("x", 0)) == pytest.approx(108, abs=0.2), "10 of 100 us"
    assert {"GEMM", "attention", LAUNCH, WAIT, "64 requests: one step, 100 us", "20 us", "GPU 0, stream 7"} <= {*texts}
    assert "sampling" not in texts, "the legend has what is drawn"


def test_neighbours_of_a_kind_are_drawn_as_one(tmp_path: Path) -> None:
    short = [kernel("skinny", 1210 + i / 10, 0.09) for i in range(300)]
    marks = [event("user_annotation", STEP, start, 99) for start in range(1000, 1500, 100)]
    picture = draw([read(written(tmp_path, marks + short), "64 requests")])
    assert picture.count(COLOURS["GEMM"]) < 10


def test_main_writes_all_traces_into_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [written(tmp_path, events(), f"step.{count}.json") for count in (1, 64)]
    out = tmp_path / "step.svg"
    assert main([*map(str, paths), "-o", str(out)]) == 0
    assert "1 request: one step" in out.read_text()
    assert "64 requests: one step" in out.read_text()
    assert str(out) in capsys.readouterr().out


def test_a_trace_without_kernels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark's own, on a machine without GPUs: its steps are marked."""
    sizes = ["--input", "9", "--output", "24", "--concurrency", "1", "--max-batch-tokens", "64", "--profile", "1"]
    trace = tmp_path / "step.json"
    folders = ["--folder", str(tmp_path), "--trace", str(trace)]
    assert measure(["--shape", "tiny", "--quantization", "bf16", *sizes, *folders]) == 0
    assert main([str(tmp_path / "step.1.json"), "-o", str(tmp_path / "step.svg")]) == 2
    assert "has 10 marked steps and kernels of 0 GPUs" in capsys.readouterr().err
    assert not (tmp_path / "step.svg").exists()
