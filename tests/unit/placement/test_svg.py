"""The picture of a plan: valid, to scale, complete, readable on light and on dark."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

from placement.hardware import Gpu
from placement.outline import KV, RESERVES, WEIGHTS
from placement.plan import Plan, Stage
from placement.reserve import Term
from placement.svg import svg

GB = 10**9
STAGES = (
    Stage(0, Gpu("big & <new>", 40 * GB), (0, 6), ("embed",), (), 9 * GB,
          (Term("context", GB, "CUDA context"), Term("workspace", 2 * GB, "the largest: logits")), 10**8, 40 * GB,
          (Term("embedding", GB, "embed"), Term("layers", 8 * GB, "6 layers"))),
    Stage(1, Gpu("small", 20 * GB, free_bytes=12 * GB), (6, 8), ("head",), (), 3 * GB,
          (Term("context", GB, "CUDA context"),), 10**7, 12 * GB,
          (Term("layers", 2 * GB, "2 layers"), Term("head", GB, "norm, head"))),
)  # fmt: skip
PLAN = Plan("toy", "nf4", False, "bfloat16", "bfloat16", 16, 99, 1000, STAGES)
NAMESPACE = "{http://www.w3.org/2000/svg}"


def segments(plan: Plan) -> list[tuple[str, int, int, int]]:
    """(tooltip, x, y, width) of every segment."""
    found = []
    for group in ElementTree.fromstring(svg(plan)).iter(f"{NAMESPACE}g"):
        tip, rect = group.find(f"{NAMESPACE}title"), group.find(f"{NAMESPACE}rect")
        assert tip is not None
        assert rect is not None
        found.append((tip.text or "", *(int(rect.attrib[key]) for key in ("x", "y", "width"))))
    return found


def test_every_byte_has_its_segment() -> None:
    assert [tip.partition(" bytes")[0] for tip, *_ in segments(PLAN)] == [
        "embedding: 1,000,000,000",
        "layers: 8,000,000,000",
        "KV cache: 10,000,000,000",  # 100 blocks of 10**8
        "context: 1,000,000,000",
        "workspace: 2,000,000,000",
        "free: 18,000,000,000",  # 40 - 9 - 10 - 3
        "layers: 2,000,000,000",
        "head: 1,000,000,000",
        "KV cache: 1,000,000,000",
        "context: 1,000,000,000",
        "free: 7,000,000,000",  # 12 - 3 - 1 - 1
        "outside the budget: 8,000,000,000",
    ]


def test_bars_are_to_one_scale_without_gaps() -> None:
    bars: dict[int, list[tuple[str, int, int]]] = {}
    for tip, x, y, width in segments(PLAN):
        bars.setdefault(y, []).append((tip, x, width))
    assert len(bars) == 2
    lengths = []
    for bar in bars.values():
        assert all(x + width == after for (_, x, width), (_, after, _) in pairwise(bar))
        lengths.append(bar[-1][1] + bar[-1][2] - bar[0][1])
        for tip, _, width in bar:
            size = int(tip.split(": ")[1].partition(" ")[0].replace(",", ""))
            assert abs(width - size * lengths[0] // (40 * GB)) <= 1
    assert lengths[1] == lengths[0] // 2


def test_the_table_has_every_figure() -> None:
    texts = [text.text for text in ElementTree.fromstring(svg(PLAN)).iter(f"{NAMESPACE}text")]
    start = texts.index("device 0")
    rows = " | ".join(str(text) for text in texts[start:])
    assert "device 0 | device 1 | embedding | 1.00 GB | – | embed | layers | 8.00 GB | 2.00 GB" in rows
    assert "workspace | 2.00 GB | – | the largest | free" in rows
    assert "budget | 40.0 GB | 12.0 GB | memory | 40.0 GB | 20.0 GB" in rows


def test_many_devices_widen_the_picture() -> None:
    many = replace(PLAN, stages=tuple(replace(STAGES[0], device=i) for i in range(16)))
    picture = ElementTree.fromstring(svg(many))
    width = int(picture.attrib["width"])
    assert width > int(ElementTree.fromstring(svg(PLAN)).attrib["width"])
    assert all(int(text.attrib["x"]) < width for text in picture.iter(f"{NAMESPACE}text"))


def test_it_says_what_it_shows_to_a_screen_reader() -> None:
    picture = ElementTree.fromstring(svg(PLAN))
    assert picture.attrib["role"] == "img"
    described = {child.attrib.get("id"): child.text or "" for child in picture}
    title, description = (described[name] for name in picture.attrib["aria-labelledby"].split())
    assert title.startswith("toy: nf4")
    assert "Device 0, big & <new>: embedding 1.00 GB" in description


def test_the_same_plan_gives_the_same_picture() -> None:
    assert svg(PLAN) == svg(replace(PLAN))


def test_colours_stand_out_on_light_and_on_dark() -> None:
    backgrounds = re.findall(r"\.background \{ fill: (#\w+) \}", svg(PLAN))
    assert len(backgrounds) == 2
    for colour in (*WEIGHTS.values(), *KV.values(), *RESERVES):
        for other in (*backgrounds, "#ffffff"):  # white is the labels'
            assert contrast(colour, other) >= 3, (colour, other)


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
