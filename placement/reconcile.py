"""What a checkpoint's headers say against what its config says: real ties, real shapes, real quantised bytes.

Headers are looked up under the model's own names, with or without the model's prefix. A tensor that is stored under
another name (transformers renames, fuses and splits some while it loads) keeps what the config says.
"""

from __future__ import annotations

from dataclasses import replace

from placement.errors import PlacementError
from placement.footprint import Module, Tensor
from placement.headers import Gguf, Headers, TensorHeader, same_values
from placement.recipe import Grouped, Recipe

_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BITSANDBYTES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_OFFSET_BYTES = 4
_GROUPED = (".qweight", ".qzeros", ".scales", ".g_idx")


def reconcile(name: str, modules: tuple[Module, ...], headers: Headers, recipe: Recipe) -> tuple[Module, ...]:
    """`modules` with what the safetensors headers know better.

    Args:
        name: the model's, for errors.
        recipe: where it is the checkpoint's own, a linear's weight takes what is stored of it; and where that is
            bitsandbytes', transformers leaves the other weights in the dtype in which they are stored.

    Raises:
        PlacementError: a shape in the checkpoint contradicts the config.
    """
    untied = _untied(modules, headers)
    modules = tuple(
        replace(module, tensors=tuple(replace(t, storage=untied.get(t.name, t.storage)) for t in module.tensors))
        for module in modules
    )
    # A tied tensor is stored under one of its names.
    plain = {
        t.storage: header
        for module in modules
        for t in module.tensors
        if (header := _find(headers, t.name)) is not None
    }
    return tuple(
        replace(
            module,
            tensors=tuple(_reconciled(name, t, headers, plain.get(t.storage), recipe) for t in module.tensors),
        )
        for module in modules
    )


def _find(headers: Headers, name: str) -> TensorHeader | None:
    return headers.get(name) or headers.get(name.partition(".")[2])


def _untied(modules: tuple[Module, ...], headers: Headers) -> dict[str, str]:
    """Tensors that the config ties and the checkpoint stores with values of their own: transformers does not tie them.

    Name -> its own storage.
    """
    groups: dict[str, list[str]] = {}
    for tensor in (t for module in modules for t in module.tensors):
        groups.setdefault(tensor.storage, []).append(tensor.name)
    untied = {}
    for names in groups.values():
        stored = [(name, header) for name in names if (header := _find(headers, name)) is not None]
        for other, header in stored[1:]:
            if not same_values(stored[0][1], header):
                untied[other] = other
    return untied


def _reconciled(model: str, tensor: Tensor, headers: Headers, plain: TensorHeader | None, recipe: Recipe) -> Tensor:
    if recipe.prequantized and tensor.name.endswith(".weight"):
        stored = _quantised_bytes(headers, tensor.name.removesuffix(".weight"))
        if stored is not None:
            return replace(tensor, linear=True, bytes=stored)
        if plain is not None and plain.dtype in _FLOAT_BYTES:
            itemsize = tensor.itemsize if isinstance(recipe, Grouped) else _FLOAT_BYTES[plain.dtype]
            tensor = replace(tensor, linear=False, itemsize=itemsize, bytes=tensor.elements * itemsize)
    if plain is not None and plain.shape not in (tensor.shape, tensor.shape[::-1]):
        raise PlacementError(
            f"{model}: {tensor.name} is {list(plain.shape)} in {plain.file.name}, and {list(tensor.shape)} by "
            "config.json; one of the two belongs to another model"
        )
    return tensor


def _quantised_bytes(headers: Headers, linear: str) -> int | None:
    """Resident bytes of a linear's weight as it is stored quantised; None when it isn't."""
    weight = _find(headers, f"{linear}.weight")
    if weight is not None and _find(headers, f"{linear}.weight.absmax") is not None:
        parts = [_find(headers, f"{linear}.weight{end}") for end in _BITSANDBYTES]
        offset = _OFFSET_BYTES if parts[2] is not None else 0
        return weight.bytes + sum(part.bytes for part in parts if part is not None) + offset
    if weight is not None and (scales := _find(headers, f"{linear}.SCB")) is not None:
        return weight.bytes + scales.bytes
    if _find(headers, f"{linear}.qweight") is not None:
        return sum(part.bytes for end in _GROUPED if (part := _find(headers, f"{linear}{end}")) is not None)
    return None


def check_gguf(name: str, modules: tuple[Module, ...], gguf: Gguf) -> None:
    """Count the file's weights against the model's.

    Raises:
        PlacementError: they differ, so the model that was built from the metadata is not the one in the file.
    """
    tensors = [t for module in modules for t in module.tensors if t.stored]
    named = {t.storage: t.elements for t in tensors}
    tied = len(named) < len(tensors)
    stored = {
        key: t.elements
        for key, t in gguf.tensors.items()
        if not key.startswith("rope_") and not (tied and key == "output.weight")
    }
    have, want = sum(stored.values()), sum(named.values())
    if have != want:
        raise PlacementError(
            f"{name} stores {have:,} weights, but the model of its metadata has {want:,}; this architecture's GGUF is "
            "not understood: use its safetensors model"
        )
