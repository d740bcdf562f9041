"""From a pool's settings to its plan: which devices this machine offers, and what the solver makes of them."""

from __future__ import annotations

from pathlib import Path

from deployments import gptqmodel_fit
from deployments.checkpoint import is_encoder_decoder, max_context, read_config
from deployments.errors import ConfigError
from deployments.settings import PoolSettings
from placement import probe
from placement.errors import PlacementError
from placement.flashinfer import stored_kv
from placement.footprint import Footprint, footprint
from placement.hardware import DeviceType, Gpu, virtual_cpu_devices
from placement.kv import kv_dtype_name, why_not_served
from placement.plan import Plan, solve
from placement.recipe import Grouped, read_recipe
from placement.source import Source, find_source
from placement.workload import Attention

_FIXED_DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ENCODER_DECODERS = ("t5", "mt5")
"""Model types of which the engine knows what their stacks do around their layers."""


def plan_pool(name: str, model_dir: Path, pool: PoolSettings) -> tuple[Plan, DeviceType]:
    """The plan of one replica of `pool` on this machine's devices, and what they are.

    Imports torch (seconds), loads no weights. `name` is the model's, for messages and the plan.

    Raises:
        ConfigError: the model does not fit, the devices are not there, or the settings contradict each other; one line.
    """
    try:
        gpus = _gpus(pool)
        device_type: DeviceType = "cuda" if gpus else "cpu"
        source = find_source(model_dir)
        weighed = footprint(
            model_dir,
            name=name,
            quantization=_auto(pool.quantization),
            double_quant=pool.double_quant,
            experts=pool.quantize_experts,
            head=pool.quantize_head,
            embeddings=pool.quantize_embeddings,
            dtype=_dtype(pool, device_type, source),
        )
        _check_kernels(name, pool, weighed, device_type)
        _check_served(name, model_dir, pool, weighed, source, device_type)
        plan = solve(
            weighed,
            gpus or _virtual_devices(pool),
            block_size=pool.block_size,
            max_batch_tokens=step_tokens(model_dir, pool, device_type),
            max_sequences=pool.max_sequences,
            max_context=pool.max_context,
            max_memory=pool.max_memory if gpus else None,
            goal=pool.goal,
            kv_dtype=None if pool.kv_dtype == "auto" else pool.kv_dtype,
            attention=_attention(weighed, pool) if gpus else None,
        )
    except PlacementError as error:
        raise ConfigError(f"pool {pool.name}: {error}") from error
    return plan, device_type


def _gpus(pool: PoolSettings) -> tuple[Gpu, ...]:
    """The GPUs of a replica; none where it is served on the CPU.

    Raises:
        ConfigError: there are fewer, or the settings can't be had on GPUs.
    """
    gpus = () if pool.device == "cpu" else probe.cuda_gpus()
    if len(gpus) < pool.stage_count and (gpus or pool.device == "cuda"):
        raise ConfigError(
            f"pool {pool.name} needs {pool.stage_count} GPUs, and {len(gpus)} are visible; "
            "lower `stages`, set `device: cpu`, or make more visible"
        )
    if pool.quantize_head and gpus and not pool.own_kernels:
        raise ConfigError(
            f"pool {pool.name}: quantize_head on GPUs needs `kernels: headroom` and no int8_threshold; "
            "bitsandbytes' kernels would dequantise the whole head at once; change one of the two"
        )
    if pool.quantize_head and gpus and (reason := _why_not_own_kernels(pool.stage_count)):
        raise ConfigError(
            f"pool {pool.name}: quantize_head on GPUs needs Headroom's kernels: {reason}; bitsandbytes' would "
            "dequantise the whole head at once; leave it out"
        )
    return gpus[: pool.stage_count]


def _why_not_own_kernels(gpus: int) -> str | None:
    """Why Headroom's kernels can't run on one of the first GPUs, as a clause; None: they can."""
    import torch

    from deployments.engine.kernels.modules import why_not_on

    return next(filter(None, (why_not_on(torch.device("cuda", index)) for index in range(gpus))), None)


def _check_kernels(name: str, pool: PoolSettings, weighed: Footprint, device_type: DeviceType) -> None:
    """Refuse kernels that don't compute with the model's quantisation."""
    if pool.int8_threshold and weighed.quantization != "int8":
        raise ConfigError(
            f"pool {pool.name}: int8_threshold is for int8, and {name} is served in {weighed.quantization}; "
            "drop it, or set `quantization: int8`"
        )
    if weighed.grouped is not None and device_type == "cuda" and pool.kernels != "headroom":
        raise ConfigError(
            f"pool {pool.name}: {name} is quantised by GPTQ or AWQ, which on GPUs Headroom's kernels alone compute "
            "with; leave `kernels` out"
        )
    if weighed.grouped is not None and device_type == "cuda" and (reason := _why_not_own_kernels(pool.stage_count)):
        raise ConfigError(
            f"pool {pool.name}: {name} is quantised by GPTQ or AWQ, which on GPUs Headroom's kernels alone compute "
            f"with: {reason}; take other GPUs, or `device: cpu`, or serve the unquantised model"
        )


def _check_served(
    name: str, model_dir: Path, pool: PoolSettings, weighed: Footprint, source: Source, device_type: DeviceType
) -> None:
    """Refuse what can be planned, and not loaded or run."""
    if reason := _why_not_loaded(weighed, source, device_type):
        raise ConfigError(f"pool {pool.name}: {name} {reason} (`headroom plan` sizes this one all the same)")
    if "encoder" in weighed.stacks:
        _check_encoder_decoder(name, model_dir, pool, weighed, device_type)
    if reason := why_not_served(weighed.geometry.kv):
        raise ConfigError(
            f"pool {pool.name}: {name} caches {reason}, which the engine does not serve yet; "
            "serve a model with plain attention (`headroom plan` sizes this one all the same)"
        )


def step_tokens(model_dir: Path, pool: PoolSettings, device_type: DeviceType) -> int:
    """Most tokens of a step: the pool's `max_batch_tokens`, or its default on a kind of device.

    An encoder takes a prompt in one step, so there it is the longest sequence beside `max_sequences` decodes at least.

    Raises:
        ConfigError: the pool's own is less than that.
    """
    tokens = pool.batch_tokens(device_type)
    if not is_encoder_decoder(model_dir):
        return tokens
    context = pool.max_context or max_context(model_dir)
    need = context + pool.max_sequences
    if pool.max_batch_tokens is not None and tokens < need:
        raise ConfigError(
            f"pool {pool.name}: an encoder takes a prompt in one step, so max_batch_tokens must be max_context "
            f"({context}) and max_sequences ({pool.max_sequences}) together, {need} at least, and is {tokens}; leave "
            "it out, or lower one of the others"
        )
    return max(tokens, need)


def _check_encoder_decoder(
    name: str, model_dir: Path, pool: PoolSettings, weighed: Footprint, device_type: DeviceType
) -> None:
    """Refuse what the engine does not do with an encoder-decoder."""
    kind = read_config(model_dir)["model_type"]
    asked = pool.model_fields_set & {"prefix_cache", "prefill_chunk_tokens"}
    if kind not in _ENCODER_DECODERS:
        reason = f"is an encoder-decoder of type {kind}, and the engine serves {', '.join(_ENCODER_DECODERS)} alone"
    elif weighed.grouped is not None and device_type == "cuda":
        reason = (
            "is an encoder-decoder quantised by GPTQ or AWQ, which GPUs don't compute with yet; "
            f"{gptqmodel_fit.DEQUANTISE}, or set `device: cpu`"
        )
    elif "prefill_chunk_tokens" in asked and pool.prefill_chunk_tokens is not None:
        reason = "is an encoder-decoder, whose prompts are computed whole; leave prefill_chunk_tokens out"
    elif "prefix_cache" in asked and pool.prefix_cache:
        reason = "is an encoder-decoder, where a prompt's beginning depends on its end; leave prefix_cache out"
    elif pool.batch_invariant:
        reason = "is an encoder-decoder, whose steps are not computed batch-invariantly yet; leave batch_invariant out"
    else:
        return
    raise ConfigError(f"pool {pool.name}: {name} {reason} (`headroom plan` sizes this one all the same)")


def _attention(weighed: Footprint, pool: PoolSettings) -> Attention:
    """What the engine will compute attention with on this machine's GPUs; the two need different memory."""
    if pool.batch_invariant:
        return "torch"
    import torch

    from deployments.engine.flashinfer_fit import Kind, why_not, why_not_here

    if weighed.geometry.own_attention or "encoder" in weighed.stacks or pool.int8_threshold:
        return "torch"
    kv_dtype = weighed.dtype if pool.kv_dtype == "auto" else kv_dtype_name(pool.kv_dtype)
    computed, stored = getattr(torch, weighed.dtype), getattr(torch, kv_dtype)
    heads, layers = weighed.geometry.heads, stored_kv(weighed.geometry.kv, kv_dtype, "flashinfer")
    kinds = (Kind(heads, kv.kv_heads, kv.head_dim, computed, stored, None, None) for kv in layers)
    return "torch" if why_not_here() or any(why_not(kind) for kind in kinds) else "flashinfer"


def _why_not_loaded(weighed: Footprint, source: Source, device_type: DeviceType) -> str | None:
    """What the loader can't do with this checkpoint yet, with the mend; None when it loads it."""
    stored = source.quantization
    recipe = None if stored is None else read_recipe(stored)
    if isinstance(recipe, Grouped) and (reason := gptqmodel_fit.why_not(recipe, stored or {}, device_type)):
        return reason
    if isinstance(recipe, Grouped) and device_type == "cuda" and weighed.on_gpus().grouped is not None:
        return gptqmodel_fit.why_not_on_gpus(recipe)
    if weighed.left_out:
        return (
            f"has other parts than text ({', '.join(weighed.left_out)}), which the engine can't load the text model "
            "without yet; serve a text model"
        )
    return None


def _virtual_devices(pool: PoolSettings) -> tuple[Gpu, ...]:
    sizes = (pool.max_memory.get(i, pool.cpu_device_memory) for i in range(pool.stage_count))
    return virtual_cpu_devices(tuple(sizes))


def _dtype(pool: PoolSettings, device_type: DeviceType, source: Source) -> str | None:
    """The compute dtype; None leaves it to an unquantised name such as bf16.

    Raises:
        ConfigError: another than the one in which a quantised checkpoint stores the rest, and so loads it.
    """
    if source.quantization is not None and not isinstance(read_recipe(source.quantization), Grouped):
        return _stored(pool, source)
    if pool.dtype != "auto":
        return pool.dtype
    if pool.quantization in _FIXED_DTYPE:
        return None
    return "bfloat16" if device_type == "cuda" or probe.computes_bf16_natively() else "float32"


def _auto(name: str) -> str | None:
    return None if name == "auto" else name


def _stored(pool: PoolSettings, source: Source) -> str | None:
    parts = (source.config, source.config.get("text_config") or {})
    names = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    stored = next((str(name).removeprefix("torch.") for name in names if name), None)
    if pool.dtype != "auto" and stored not in (None, pool.dtype):
        raise ConfigError(
            f"pool {pool.name}: dtype is {pool.dtype}, but the checkpoint is quantised already and stores the rest in "
            f"{stored}; leave dtype out, or give the unquantised model"
        )
    return stored or _auto(pool.dtype)
