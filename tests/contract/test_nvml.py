"""The made-up NVML against the real library, and what the probe reads against torch."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

from placement import probe
from tests.fakes import nvml as fake
from tests.fakes.nvml import FakeNvml


@pytest.fixture
def library() -> ModuleType:
    """nvidia-ml-py, which needs no driver to be imported."""
    return pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")


def test_every_faked_name_is_the_librarys(library: ModuleType) -> None:
    names = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) > 20
    for name in names:
        real, ours = getattr(library, name), getattr(FakeNvml, name)
        if inspect.isfunction(ours):
            theirs = inspect.signature(real).parameters
            assert list(inspect.signature(ours).parameters)[1:] == list(theirs), name
        elif inspect.isclass(ours):
            assert issubclass(real, library.NVMLError), name
        else:
            assert real == ours, name


def test_faked_fields_are_the_librarys(library: ModuleType) -> None:
    memory = {name for name, _ in library.c_nvmlMemory_v2_t._fields_}
    assert memory >= {"total", "reserved", "used", "free"}
    process = {name for name, _ in library.c_nvmlProcessInfo_v3_t._fields_}
    assert process >= set(fake.Process.__dataclass_fields__)


def test_without_a_driver_nothing_is_told(library: ModuleType) -> None:
    try:
        library.nvmlInit()
    except library.NVMLError:
        assert probe.nvml_machine() is None
    else:
        library.nvmlShutdown()
        pytest.skip("this machine has a driver; the tests marked gpu ask it")


_MEASURE = """
import json, sys
from placement import probe
machine = probe.nvml_machine()
assert "torch" not in sys.modules
import torch
assert not torch.cuda.is_initialized()
seen = [[g.name, g.memory_bytes, g.free_bytes] for g in machine.gpus]
planned = [g.free_bytes for g in probe.cuda_gpus()]
assert not torch.cuda.is_initialized(), "asking must make no context"
indices = range(torch.cuda.device_count())
after = [[torch.cuda.get_device_name(i), *reversed(torch.cuda.mem_get_info(i))] for i in indices]
with_context = [g.free_bytes for g in probe.cuda_gpus()]
print(json.dumps([seen, planned, after, with_context]))
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("library")
def test_nvml_and_torch_agree() -> None:
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, env=os.environ)
    seen, planned, after, with_context = json.loads(done.stdout.splitlines()[-1])
    assert len(seen) == len(after) > 0
    for (name, memory, free), again, (torch_name, total, torch_free), later in zip(
        seen, planned, after, with_context, strict=True
    ):
        assert name == torch_name
        assert abs(memory - total) <= total // 200
        assert abs(again - free) <= total // 200, "another process must not come or go during this test"
        assert torch_free <= free <= torch_free + 2 * 2**30, "torch counts its own context as taken"
        # Where the container hides process ids, our context stays counted as taken.
        assert torch_free - total // 200 <= later <= free + total // 200
