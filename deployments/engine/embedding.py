"""The input embedding, quantised: each row is whole blocks, so a step dequantises the rows of its tokens alone.

The bytes are those that bitsandbytes makes of the whole matrix. It is quantised in parts, on the device that it is for,
from main memory: so a device never holds it in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, core_model_loading
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from deployments.engine.experts import EightBitExperts, FourBitExperts, QuantisedExperts
from placement.plan import Plan
from placement.recipe import BLOCK

_PART_ROWS = 8192
_NESTED_BLOCK = 256


class QuantisedEmbedding(nn.Module):
    """Looks rows up in quantised weights [vocab, 1, hidden]."""

    def __init__(self, rows: QuantisedExperts) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        """[..., hidden] of ids [...]."""
        return self.rows[ids.flatten()].view(*ids.shape, -1)


def untied_config(model_dir: Path) -> PreTrainedConfig:
    """The model's config without ties between embedding and head: `quantising_embedding` gives each its own weight."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


class _Quantise(ConversionOps):
    """Quantises the input embedding, and leaves all else to the operation that was there."""

    def __init__(self, own: Any, loading: _Loading) -> None:
        self._own, self._loading = own, loading

    def convert(self, input_dict: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        """Name -> parameter; of a tied embedding also the head's, as it is."""
        name = self._loading.name
        if name not in input_dict:
            converted: dict[str, Any] = self._own.convert(input_dict, *args, **options)
            return converted
        found = input_dict[name]
        value: Tensor = found[0] if isinstance(found, list) else found
        result = {name: quantised_rows(value, self._loading.plan, self._loading.device(name))}
        if self._loading.tied:
            model = options["model"]
            head = next(path for path, part in model.named_modules() if part is model.get_output_embeddings())
            result[f"{head}.weight"] = value.to(self._loading.device(f"{head}.weight"))
        return result


class _Loading:
    """What is known of the embedding while a checkpoint is loaded."""

    def __init__(self, plan: Plan, devices: dict[str, int | str], *, tied: bool) -> None:
        self.plan, self.tied = plan, tied
        self.name: str | None = None
        """Of its weight, once it was met."""
        self._devices = devices

    def meets(self, model: PreTrainedModel, name: str) -> bool:
        """Whether `name` is the embedding's weight."""
        path, _, attribute = name.rpartition(".")
        if attribute != "weight" or model.get_submodule(path) is not model.get_input_embeddings():
            return False
        self.name = name
        return True

    def device(self, name: str) -> torch.device:
        """Where a weight belongs."""
        path = name
        while path and path not in self._devices:
            path = path.rpartition(".")[0]
        where = self._devices[path]
        return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)


@contextmanager
def quantising_embedding(plan: Plan, model_dir: Path, devices: dict[str, int | str]) -> Iterator[None]:
    """Let `from_pretrained`, with bitsandbytes' config of the plan and `untied_config`, quantise the embedding too.

    Args:
        devices: the device_map that it is given.
    """
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    loading = _Loading(plan, devices, tied=bool(config.get_text_config().tie_word_embeddings))
    kind: Any = Bnb8BitHfQuantizer if plan.quantization == "int8" else Bnb4BitHfQuantizer
    module: Any = core_model_loading
    needs, operation, where = kind.param_needs_quantization, kind.get_quantize_ops, module.get_device
    kind.param_needs_quantization = lambda self, model, name, **options: (
        loading.meets(model, name) or needs(self, model, name, **options)
    )
    kind.get_quantize_ops = lambda self: _Quantise(operation(self), loading)
    module.get_device = lambda device_map, name, **options: (
        "cpu" if name == loading.name else where(device_map, name, **options)
    )
    try:
        yield
    finally:
        kind.param_needs_quantization, kind.get_quantize_ops, module.get_device = needs, operation, where


def settle_embedding(model: PreTrainedModel, plan: Plan) -> None:
    """Put a `QuantisedEmbedding` in the place of the embedding, and quantise it if that is still to be done."""
    embedding: Any = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    weight: Any = embedding.weight
    if not (hasattr(weight, "quant_state") or hasattr(weight, "scales")):
        weight = quantised_rows(weight.detach(), plan, weight.device)
    dtype = getattr(torch, plan.dtype)
    rows = EightBitExperts(weight, dtype) if hasattr(weight, "scales") else FourBitExperts(weight)
    model.set_submodule(path, QuantisedEmbedding(rows))


def quantised_rows(weight: Tensor, plan: Plan, device: torch.device) -> Any:
    """A matrix [vocab, hidden] as a parameter on `device` that `EightBitExperts` and `FourBitExperts` take, a row an
    expert; quantised in parts there."""
    vocab, hidden = weight.shape
    parts = [slice(first, first + _PART_ROWS) for first in range(0, vocab, _PART_ROWS)]
    if plan.quantization == "int8":
        rounded = torch.empty(vocab, 1, hidden, dtype=torch.int8, device=device)
        scales = torch.empty(vocab, 1, dtype=torch.float32, device=device)
        for part in parts:
            rows = weight[part].to(device).float()
            scales[part, 0] = rows.abs().amax(-1)
            factor = 127 / scales[part].clamp(min=torch.finfo(torch.float32).tiny)
            rounded[part, 0] = (rows * factor).round().to(torch.int8)
        eight: Any = nn.Parameter(rounded, requires_grad=False)
        eight.scales = scales
        return eight
    packed = torch.empty(vocab * hidden // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(vocab * hidden // BLOCK, dtype=torch.float32, device=device)
    code: Tensor | None = None
    for part in parts:
        rows = weight[part].to(device).contiguous()
        done, state = functional.quantize_4bit(rows, blocksize=BLOCK, quant_type=plan.quantization)
        first, last = part.start * hidden, min(part.stop, vocab) * hidden
        packed[first // 2 : last // 2] = done
        absmax[first // BLOCK : last // BLOCK] = state.absmax
        code = state.code
    assert code is not None, "an embedding has rows"
    four: Any = nn.Parameter(packed, requires_grad=False)
    four.quant_state = _state(absmax, code.clone(), torch.Size((vocab, 1, hidden)), weight.dtype, plan)
    return four


def _state(absmax: Tensor, code: Tensor, shape: torch.Size, dtype: torch.dtype, plan: Plan) -> Any:
    """bitsandbytes' state, the scales quantised too where the plan says so."""
    options: dict[str, Any] = {"shape": shape, "dtype": dtype, "blocksize": BLOCK, "quant_type": plan.quantization}
    make: Any = functional.QuantState
    if not plan.double_quant:
        return make(absmax=absmax, code=code, **options)
    offset = absmax.mean()
    codes, nested = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
    nested.code = nested.code.clone()
    return make(absmax=codes, code=code, offset=offset, state2=nested, **options)
