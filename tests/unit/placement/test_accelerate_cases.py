"""accelerate's published cases for `infer_auto_device_map` and `get_balanced_memory`, run side by side with ours.

Ours sees the same modules and caps, with no reserve and no KV cache: accelerate counts neither. Each case names the
measure by which the two are compared, and states both figures; ours is never the larger one.

    largest     bytes on the fullest GPU: by it the slowest stage is the slowest
    crossings   times that hidden states move to another device in one forward
    left over   bytes that no GPU holds, on the CPU or the disk
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate.utils.modeling import get_balanced_memory, infer_auto_device_map
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from placement.footprint import Footprint, Module, Tensor, footprint
from placement.kv import LayerKv
from placement.solver import Cuts, Goal, best
from tests.unit.placement.toy import as_footprint, toy_problem

Caps = dict[int | str, int]
Placed = list[int | str]
"""The device of every unit, in the order in which they run."""


class Triple(nn.Module):
    """236 bytes: linear1 4*3*4 + 4*4 = 64; batchnorm 4*4*4 + 8 = 72; linear2 5*4*4 + 5*4 = 100."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.batchnorm = nn.BatchNorm1d(4)
        self.linear2 = nn.Linear(4, 5)


class Pair(nn.Module):
    """Two linears of 20*20*4 + 20*4 = 1,680 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 20)
        self.second = nn.Linear(20, 20)


class Prefixed(nn.Linear):
    """8*3*4 + 8*4 = 128 bytes, the weight once more under a name that begins like its own."""

    def __init__(self) -> None:
        super().__init__(3, 8)
        self.weight_submodule = nn.Module()
        self.weight_submodule.parameter = self.weight


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def buffered(**rows: int) -> Triple:
    """`Triple` with buffers of 10 x rows float32 on the modules named."""
    model = Triple()
    for name, count in rows.items():
        if name == "linear3":
            model.linear3 = nn.Linear(4, 5)
        model.get_submodule(name).register_buffer("extra", torch.zeros(10, count))
    return model


def triples() -> nn.Module:
    return nn.Sequential(Triple(), Triple(), Triple())


def pairs() -> nn.Module:
    return named(module1=Pair(), module2=Pair(), module3=Pair())


def three_buffered() -> nn.Module:
    """64 + 80, 72 + 120 and 100 + 120 bytes."""
    return buffered(linear1=2, batchnorm=3, linear2=3)


def four_buffered() -> nn.Module:
    """And 100 + 80."""
    return buffered(linear1=2, batchnorm=3, linear2=3, linear3=2)


def inside_one() -> nn.Module:
    """10*4*4 + 4*4 = 176, 80 and 160 bytes."""
    return named(module=named(linear1=nn.Linear(10, 4), linear2=nn.Linear(4, 4), linear3=nn.Linear(4, 8)))


def alike_inside_one() -> nn.Module:
    """Three of 440 bytes."""
    return named(module=named(a=nn.Linear(10, 10), b=nn.Linear(10, 10), c=nn.Linear(10, 10)))


def tied_triple() -> nn.Module:
    model = Triple()
    model.linear1.weight = model.linear2.weight
    return model


def tied_triples(*ties: tuple[str, str]) -> nn.Module:
    model = named(layer1=Triple(), layer2=Triple(), layer3=Triple())
    for one, other in ties:
        model.get_submodule(one).weight = model.get_submodule(other).weight
    return model


def tied_alternately() -> nn.Module:
    """80, 168, 80 and 168 bytes, the third the same as the first."""
    model = named(linear1=nn.Linear(4, 4), linear2=nn.Linear(6, 6), linear3=nn.Linear(4, 4), linear4=nn.Linear(6, 6))
    model.linear3.weight, model.linear3.bias = model.linear1.weight, model.linear1.bias
    return model


def tied_pair() -> nn.Module:
    model = named(linear1=nn.Linear(10, 10), linear2=nn.Linear(10, 10))
    model.linear2.weight = model.linear1.weight
    return model


def small_buffers() -> nn.Module:
    """10*10*4 + 10*4 + 20 = 460, 4*10*4 + 8 + 20 = 188 and 460 bytes."""
    model = named(linear1=nn.Linear(10, 10), batchnorm=nn.BatchNorm1d(10), linear2=nn.Linear(10, 10))
    for module in model.children():
        module.register_buffer("extra", torch.zeros(5))
    return model


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    caps: Caps
    measure: str
    ours: int
    theirs: int
    whole: tuple[str, ...] = ()
    """Classes that are not split."""
    balanced: bool = False
    """Theirs balances the caps first, as `device_map="auto"` does."""
    fallback: bool = False
    """accelerate's `fallback_allocation`."""
    offload_buffers: bool = False
    """accelerate's: buffers of what is left over don't come to a GPU while it runs."""

    @property
    def goal(self) -> Goal:
        return "latency" if self.measure == "crossings" else "throughput"


TIE2, TIE3 = ("layer3.linear2", "layer1.linear2"), ("layer2.linear2", "layer1.linear2")
TIE_FIRST = ("layer2.linear1", "layer1.linear1")
GB = 10**9
CASES = (
    # Theirs keeps room for the largest layer on device 0: 64 | 72 + 100. Ours 64 + 72 | 100.
    Case("two devices", Triple, {0: 200, 1: 200}, "largest", 136, 172),
    # Theirs leaves device 2 empty.
    Case("three devices", Triple, {0: 200, 1: 172, 2: 200}, "largest", 100, 172),
    # 236 - 48 = 188 bytes in all.
    Case("tied", tied_triple, {0: 200, 1: 200}, "crossings", 0, 0),
    # 236 + 64 + 72 | 100 + 236.
    Case("split inside a block", triples, {0: 500, 1: 500}, "largest", 372, 372),
    Case("whole blocks", triples, {0: 500, 1: 500}, "largest", 472, 472, whole=("Triple",)),
    # Theirs fetches modules with a tied weight to the device that has it, out of order.
    Case("two tied", lambda: tied_triples(TIE2), {0: 400, 1: 500}, "crossings", 1, 2),
    Case("three tied", lambda: tied_triples(TIE2, TIE3), {0: 400, 1: 500}, "crossings", 1, 4),
    # 3 * 236 - 2 * 80 - 48 = 500 bytes in all, which fit device 1.
    Case("two groups tied", lambda: tied_triples(TIE2, TIE3, TIE_FIRST), {0: 400, 1: 500}, "crossings", 0, 4),
    # Theirs 80 | 168 + 168; ours a copy of the tied 80 on each: 80 + 168 | 80 + 168.
    Case("tied alternately", tied_alternately, {0: 250, 1: 400}, "largest", 248, 336),
    Case("one prefix", lambda: named(compute=Prefixed()), {0: 4, "cpu": GB}, "left over", 128, 128, ("Prefixed",)),
    # Ours has the first two on the GPU, 144 + 192 = 336 of 400.
    Case("buffers", three_buffered, {0: 400, "cpu": GB}, "left over", 220, 412),
    Case("buffers, offloaded", three_buffered, {0: 400, "cpu": GB}, "left over", 220, 412, offload_buffers=True),
    # And the others on device 1: 220 + 180 = 400 of 400.
    Case("buffers, two devices", four_buffered, {0: 400, 1: 400, "cpu": GB}, "left over", 0, 400),
    Case("buffers, a small device", four_buffered, {0: 400, 1: 200, "cpu": GB}, "left over", 400, 400),
    Case(
        "buffers, a small device, offloaded",
        four_buffered,
        {0: 400, 1: 200, "cpu": GB},
        "left over",
        400,
        400,
        offload_buffers=True,
    ),
    # Ours has the first two on the GPU, 256 of 256; theirs none, or with its fallback the second.
    Case("nothing fits first", inside_one, {0: 256}, "left over", 160, 416),
    Case("fallback", inside_one, {0: 256}, "left over", 160, 336, fallback=True),
    Case("fallback, nothing fits", alike_inside_one, {0: 30}, "left over", 1320, 1320, fallback=True),
    # Ours two of 1,680 in 5,000, theirs one.
    Case("fallback, some fit", pairs, {0: 5000}, "left over", 4 * 1680, 5 * 1680, fallback=True),
    Case("fallback, tied", tied_pair, {0: 600}, "left over", 0, 0, fallback=True),
    # 460 + 188 of 678; theirs has the 188 alone.
    Case("fallback, buffers", small_buffers, {0: 678}, "left over", 460, 920, fallback=True),
    Case("balanced, as given", Triple, {0: 200, 1: 200}, "largest", 136, 172, balanced=True),
    Case("balanced, device 1 absent", Triple, {0: 200, 2: 200}, "largest", 136, 172, balanced=True),
    Case("balanced, room", Triple, {0: 300, 1: 300}, "largest", 136, 172, balanced=True),
    Case("balanced, unequal", Triple, {0: 300, 1: 500}, "largest", 136, 172, balanced=True),
    Case("balanced, one and the CPU", Triple, {0: 300, "cpu": 1000}, "left over", 0, 0, balanced=True),
    Case("balanced, device 0 shut", Triple, {0: 0, 1: 300, 2: 300}, "largest", 136, 136, balanced=True),
)


def as_units(model: nn.Module, whole: tuple[str, ...]) -> Footprint:
    """Every module without children, or of a class that is not split, as a layer whose work is its bytes."""
    units: list[Module] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{unit.name}.") for unit in units)
        if inside or (any(True for _ in module.children()) and type(module).__name__ not in whole):
            continue
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors = tuple(
            Tensor(f"{name}.{key}", str(id(t)), tuple(t.shape), t.element_size(), False, t.nbytes)
            for key, t in state.items()
        )
        units.append(Module(name, "layer", tensors, sum(t.bytes for t in tensors)))
    return as_footprint(units, (LayerKv(),) * len(units))


def ours(model: Footprint, caps: Caps, goal: Goal) -> Placed:
    """What does not fit the GPUs goes to the CPU; a case without one (theirs takes the disk) has all it needs there."""
    gpus = [device for device in caps if device != "cpu"]
    cpu = caps.get("cpu", model.bytes)
    split = best(toy_problem(model, [*(caps[gpu] for gpu in gpus), cpu], last_resort=True), goal)
    assert split is not None
    return placed(split.cuts, [*gpus, "cpu"])


def placed(cuts: Cuts, names: list[int | str]) -> Placed:
    return [names[cut.device] for cut in cuts for _ in range(cut.start, cut.end)]


def theirs(case: Case, model: nn.Module, units: Footprint) -> Placed:
    caps = dict(case.caps)
    if case.balanced:
        caps = get_balanced_memory(model, max_memory=caps, no_split_module_classes=list(case.whole))
    found = infer_auto_device_map(
        model,
        max_memory=caps,
        no_split_module_classes=list(case.whole),
        fallback_allocation=case.fallback,
        offload_buffers=case.offload_buffers,
    )
    return [lookup(found, unit.name) for unit in units.layers]


def lookup(device_map: Mapping[str, int | str], name: str) -> int | str:
    return next(d for key, d in device_map.items() if not key or name == key or name.startswith(f"{key}."))


def held(model: Footprint, where: Placed) -> dict[int | str, int]:
    """Bytes per device; what is tied counts once on each."""
    storages: dict[int | str, dict[str, int]] = {device: {} for device in where}
    for device, unit in zip(where, model.layers, strict=True):
        storages[device] |= {tensor.storage: tensor.bytes for tensor in unit.tensors}
    return {device: sum(sizes.values()) for device, sizes in storages.items()}


def measured(measure: str, model: Footprint, where: Placed) -> int:
    if measure == "crossings":
        return sum(one != other for one, other in pairwise(where))
    on = held(model, where)
    if measure == "largest":
        return max(size for device, size in on.items() if isinstance(device, int))
    return sum(size for device, size in on.items() if not isinstance(device, int))


@pytest.mark.filterwarnings("ignore:Current model requires")  # of buffers that theirs leaves on the CPU
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_the_same_or_better(case: Case) -> None:
    model = case.model()
    units = as_units(model, case.whole)
    where = ours(units, case.caps, case.goal)
    assert measured(case.measure, units, where) == case.ours
    assert measured(case.measure, units, theirs(case, model, units)) == case.theirs
    assert case.ours <= case.theirs
    for device, size in held(units, where).items():
        assert size <= case.caps.get(device, units.bytes)


def test_what_fits_nowhere_is_refused_where_theirs_takes_the_disk() -> None:
    model = Triple()
    with pytest.warns(UserWarning, match="Current model requires"):
        assert infer_auto_device_map(model, get_balanced_memory(model, {0: 0, "cpu": 100})) == {"": "disk"}
    assert best(toy_problem(as_units(model, ()), (0, 100), last_resort=True), "throughput") is None


def test_t0pp(tmp_path: Path) -> None:
    """T5 of 11 billion weights in 16 bits (`wo` in 32) on two GPUs and a CPU of 10 GB each: ours leaves the CPU
    a block less."""
    config = T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=64,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        n_positions=512,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float16)
    kept = {name: torch.float32 for name, _ in model.named_parameters() if "wo" in name}
    caps: Caps = {0: 10 * GB, 1: 10 * GB, "cpu": 10 * GB}
    found = infer_auto_device_map(
        model, caps, no_split_module_classes=["T5Block"], dtype=torch.float16, special_dtypes=kept
    )
    weighed = footprint(tmp_path, quantization="fp16")
    problem = toy_problem(weighed, (10 * GB, 10 * GB, 10 * GB), last_resort=True)
    split = best(problem, "throughput")
    assert split is not None
    blocks = [sum(name.count(".block.") and device == d for name, device in found.items()) for d in (0, 1, "cpu")]
    assert blocks == [19, 17, 12]
    assert [(cut.device, cut.end - cut.start) for cut in split.cuts] == [(0, 20), (1, 17), (2, 11)]
    assert found["encoder.embed_tokens"] == 0
    assert split.cuts[0].start == 0, "so is ours"
    assert all(problem.weight_bytes(cut) <= 10 * GB for cut in split.cuts)
