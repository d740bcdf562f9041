"""GPTQ and AWQ checkpoints as their formats define them, without any library: written bit by bit, and read back.

A linear's weight W [in, out] is scale[g, out] * (code[in, out] - zero[g, out]), g the group of the input.

GPTQ   qweight int32 [in*k/32, out]: codes of k bits, the first in the lowest bits, down the inputs
       qzeros int32 [groups, out*k/32]: zeros along the outputs, each less one ("gptq") or as it is ("gptq_v2")
       scales float16 [groups, out], g_idx int32 [in]: the group of each input, in any order under act-order
AWQ    qweight int32 [in, out/8], qzeros int32 [groups, out/8]: eight codes of 4 bits along the outputs, output
       8j + ORDER[i] in bits 4i; scales float16 [groups, out]; the inputs of a group are neighbours

Codes are rounded to the nearest: the formats say what a checkpoint stores, not how its codes were found.

`python -m tests.contract.grouped docs/models.md` renews the page's table of `CASES`.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.contract.greedy import save
from tests.page_table import renew

TABLE = "gptq and awq"
"""Its name in docs/models.md."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Grouping:
    """How the linears of a checkpoint are quantised."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    """-1: all inputs."""
    act_order: bool = False
    symmetric: bool = True
    version: str = "gptq"
    """The checkpoint's format: gptq, gptq_v2 (of GPTQ) or gemm (of AWQ, which is never symmetric here)."""

    @property
    def label(self) -> str:
        """Such as gptq 4 bits, groups of 32, act-order."""
        groups = "one group" if self.group_size == -1 else f"groups of {self.group_size}"
        return ", ".join([f"{self.method} {self.bits} bits", groups, *(["act-order"] if self.act_order else [])])

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's quantization_config."""
        sizes = {"bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return {"quant_method": "awq", **sizes, "zero_point": True, "version": self.version}
        named = {"desc_act": self.act_order, "sym": self.symmetric, "checkpoint_format": self.version}
        return {"quant_method": "gptq", **sizes, **named}


CASES = (
    ("Llama", Grouping()),
    ("Llama", Grouping(bits=8, group_size=64, symmetric=False, version="gptq_v2")),
    ("Qwen2", Grouping(bits=2, symmetric=False)),
    ("OPT", Grouping(group_size=64, act_order=True)),
    ("OPT", Grouping(symmetric=False)),
    ("Mistral", Grouping(bits=8, group_size=-1)),
    ("Mistral", Grouping(group_size=128, act_order=True, symmetric=False)),
    ("Mistral", Grouping(method="awq", symmetric=False, version="gemm")),
    ("OPT", Grouping(method="awq", group_size=64, symmetric=False, version="gemm")),
)
"""(family, how its linears are quantised) of the checkpoints that are served in tests."""


@dataclass(frozen=True)
class Codes:
    """One quantised weight before it is packed."""

    codes: Tensor
    """int64 [in, out]."""
    zeros: Tensor
    """int64 [groups, out]."""
    scales: Tensor
    """float16 [groups, out]."""
    g_idx: Tensor
    """int64 [in]."""

    @property
    def weight(self) -> Tensor:
        """float16 [out, in], what the codes stand for."""
        return ((self.codes - self.zeros[self.g_idx]).half() * self.scales[self.g_idx]).t().contiguous()


def checkpoint(config: PreTrainedConfig, grouping: Grouping, folder: Path) -> tuple[Path, Path]:
    """A random model with the linears of its layers quantised, and the model of the weights that they stand for.

    Returns:
        The folder of the quantised checkpoint, and that of the plain one in float16.
    """
    plain, packed_in = folder / "plain", folder / "quantised"
    model = AutoModelForCausalLM.from_pretrained(save(config, folder / "random"), dtype=torch.float16)
    draw = torch.Generator().manual_seed(7)
    packed: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            found = quantised(module.weight.detach().float().t(), grouping, draw)
            module.weight.data = found.weight
            packed |= {f"{name}.{key}": value for key, value in pack(found, grouping).items()}
    model.save_pretrained(plain)
    weights = {name for name in model.state_dict() if f"{name.removesuffix('.weight')}.qweight" in packed}
    tied = set(model.config.tie_word_embeddings * ["lm_head.weight"])
    rest = {name: value.clone() for name, value in model.state_dict().items() if name not in weights | tied}
    packed_in.mkdir()
    save_file(packed | rest, packed_in / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((plain / "config.json").read_text()) | {"quantization_config": grouping.config}
    (packed_in / "config.json").write_text(json.dumps(written))
    return packed_in, plain


def pack(found: Codes, grouping: Grouping) -> dict[str, Tensor]:
    """The tensors of a linear as a checkpoint stores them."""
    if grouping.method == "awq":
        codes, zeros = (values.view(len(values), -1, 8)[..., ORDER].flatten(1) for values in (found.codes, found.zeros))
        return {"qweight": _words(codes, 4), "qzeros": _words(zeros, 4), "scales": found.scales}
    shift = 1 if grouping.version == "gptq" else 0
    return {
        "qweight": _words(found.codes.t(), grouping.bits).t().contiguous(),
        "qzeros": _words(found.zeros - shift, grouping.bits),
        "scales": found.scales,
        "g_idx": found.g_idx.int(),
    }


def _words(values: Tensor, bits: int) -> Tensor:
    """int32 [rows, columns * bits / 32], the first column in the lowest bits."""
    per = 32 // bits
    shifted = values.reshape(len(values), -1, per) << (torch.arange(per) * bits)
    words: Tensor = shifted.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def quantised(weight: Tensor, grouping: Grouping, draw: torch.Generator) -> Codes:
    """float32 [in, out], rounded to the nearest codes; `draw` orders the inputs under act-order."""
    inputs, out = weight.shape
    size = inputs if grouping.group_size == -1 else grouping.group_size
    order = torch.randperm(inputs, generator=draw) if grouping.act_order else torch.arange(inputs)
    g_idx = torch.empty(inputs, dtype=torch.int64)
    g_idx[order] = torch.arange(inputs) // size
    most = (1 << grouping.bits) - 1
    # "gptq" stores a zero less one, so that a zero of 0 would borrow from the zero beside it.
    least = 1 if grouping.version == "gptq" else 0
    scales, zeros = [], []
    for group in range(math.ceil(inputs / size)):
        low, high = weight[g_idx == group].aminmax(dim=0)
        if grouping.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales.append(((high - low) / most).half())
        centre = (most + 1) / 2 if grouping.symmetric else -low / scales[-1].float()
        zeros.append(torch.as_tensor(centre).round().clamp(least, most).long().expand(out))
    scale, zero = torch.stack(scales), torch.stack(zeros)
    codes = (weight / scale[g_idx].float()).round().long() + zero[g_idx]
    return Codes(codes.clamp(0, most), zero, scale, g_idx)


def table() -> str:
    """What is served in tests, in Markdown."""
    lines = ["| model | format | bits | group size | act-order | zeros |", "|---|---|---|---|---|---|"]
    for name, case in CASES:
        zeros = "symmetric" if case.symmetric else "asymmetric"
        method = "AWQ gemm" if case.method == "awq" else f"GPTQ ({case.version})"
        size = "all inputs" if case.group_size == -1 else str(case.group_size)
        act_order = "yes" if case.act_order else "no"
        lines.append(f"| {name} | {method} | {case.bits} | {size} | {act_order} | {zeros} |")
    return "\n".join(lines)


if __name__ == "__main__":
    renew(Path(sys.argv[1]), TABLE, table())
