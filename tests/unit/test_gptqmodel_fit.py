"""Which GPTQ and AWQ checkpoints are loaded, and what is said of the others."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from deployments import gptqmodel_fit
from deployments.gptqmodel_fit import why_not
from placement.hardware import DeviceType
from placement.recipe import Grouped, read_recipe

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(gptqmodel_fit, "find_spec", lambda name: ModuleSpec(name, None) if name in packages else None)


def said(config: dict[str, Any], device_type: DeviceType = "cpu") -> str | None:
    recipe = read_recipe(config)
    assert isinstance(recipe, Grouped)
    return why_not(recipe, config, device_type)


@pytest.mark.parametrize(
    "config",
    [
        GPTQ,
        GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2", "desc_act": True},
        GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj"]], "dynamic": None},
        AWQ | {"version": "GEMM"},
        AWQ | {"format": "gemm", "checkpoint_format": "gemm"},
        AWQ,
    ],
)
def test_these_are_loaded(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    install(monkeypatch, "gptqmodel", "optimum")
    assert said(config) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPTQ | {"bits": 3}, "is quantised already to 3 bits, and of gptq 2, 4, 8 bits can be read"),
        (GPTQ | {"dynamic": {"mlp": {"bits": 5}}}, "is quantised already to 5 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "in the format marlin, and of gptq gptq and gptq_v2 can be read"),
        (AWQ | {"version": "gemv_fast", "format": "gemm"}, "in the format gemv_fast, and of awq gemm can be read"),
        (GPTQ | {"lm_head": True}, "its head, too, which transformers does not load"),
        (GPTQ | {"dynamic": {"-:.*mlp.*": {}}}, "(dynamic), which transformers does not load"),
    ],
)
def test_others_are_refused_by_what_they_are(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], reason: str
) -> None:
    install(monkeypatch, "gptqmodel", "optimum")
    assert reason in str(said(config))


def test_gpus_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert said(AWQ, "cuda") is None
    assert "in the format marlin" in str(said(GPTQ | {"checkpoint_format": "marlin"}, "cuda"))


@pytest.mark.parametrize(
    ("here", "absent"), [((), "gptqmodel and optimum"), (("gptqmodel",), "optimum"), (("optimum",), "gptqmodel")]
)
def test_the_extra_is_named_where_it_is_absent(
    monkeypatch: pytest.MonkeyPatch, here: tuple[str, ...], absent: str
) -> None:
    install(monkeypatch, *here)
    assert str(said(GPTQ)).endswith(f"which needs {absent}, not installed here; pip install 'headroom[gptq]'")
