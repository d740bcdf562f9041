"""Pydantic models of `serve_config.yaml`'s `args`. A wrong key is refused by name (`extra="forbid"`)."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.errors import ConfigError
from deployments.granules import granule_tokens
from placement.errors import PlacementError
from placement.hardware import parse_bytes
from placement.solver import Goal

Quantization = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoscalingSettings(_Strict):
    """As many replicas as demand asks for: KV tokens granted, held and waited for over what a replica holds."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """0: none while nothing is asked; the first request then waits until one is loaded, or for `wait_limit_s`."""
    max_replicas: Annotated[int, Field(ge=1)]
    target_percent: Annotated[int, Field(ge=1, le=100)] = 80
    """Of the replicas' KV cache that is to be in use; where demand is more, the pool grows."""
    slack_percent: Annotated[int, Field(ge=0)] = 20
    """The pool shrinks where fewer replicas would be in use by so much less than the target."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    """For how long more replicas must be needed before they are started."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0
    """For how long fewer must do before some are stopped."""
    downscale_to_zero_delay_s: Annotated[float, Field(ge=0)] | None = None
    """The same for the last one; default: `downscale_delay_s`."""

    @model_validator(mode="after")
    def _in_order(self) -> AutoscalingSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, under min_replicas, {self.min_replicas}")
        if self.slack_percent >= self.target_percent:
            raise ValueError(f"slack_percent is {self.slack_percent}; it must be under target_percent")
        return self


def _custom(resources: dict[str, float]) -> dict[str, float]:
    if taken := {"CPU", "GPU", "memory", "object_store_memory"} & resources.keys():
        raise ValueError(f"resources are Ray's custom ones, not {', '.join(sorted(taken))}; use stages or cpus")
    return resources


Resources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_custom)]


class PoolSettings(_Strict):
    """Replicas of one model with one shape: one Serve deployment, one plan."""

    name: str = "default"
    replicas: Annotated[int, Field(ge=1)] = 1
    autoscaling: AutoscalingSettings | None = None
    """Instead of `replicas`: a number that follows demand."""
    quantization: Quantization | Literal["auto"] = "auto"
    """auto: the checkpoint's own where it is quantised already, else nf4."""
    double_quant: bool = False
    """NF4/FP4 only: quantise the scales too."""
    quantize_experts: bool = False
    """NF4, FP4 and int8: quantise experts that are fused into one tensor too; else they stay in `dtype`."""
    quantize_head: bool = False
    """NF4, FP4 and int8: quantise the head (`lm_head`) too; else it stays in `dtype`. Where it is tied to the
    embedding, the embedding stays and the head is a quantised copy beside it."""
    quantize_embeddings: bool = False
    """NF4, FP4 and int8: quantise the input embedding too; else it stays in `dtype`. Where the head is tied to it, the
    head stays (or is quantised by `quantize_head`), so it pays where the two are on different devices."""
    int8_threshold: Annotated[float, Field(ge=0)] = 0.0
    """int8 as LLM.int8() computes it: activations in 8 bits too, save features with a value of more than this, which
    stay in 16 bits (6 in the paper). On GPUs steps then wait for the host in every product and run without CUDA graphs.
    0: no such features are looked for; activations are in `dtype` on Headroom's kernels, in 8 bits on bitsandbytes'."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute and KV dtype. auto: bfloat16 where the device computes in it natively, else float32; of a checkpoint that
    is quantised already, the dtype in which it stores what is not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where a GPU is visible, else virtual devices on the CPU."""
    stages: Annotated[int, Field(ge=1)] | None = None
    """GPUs (or virtual CPU devices) of one replica; default: the number of `max_memory` entries, else 1."""
    max_memory: dict[int, str | int] = {}
    """Cap per device, "600MB" or bytes; bounds everything but the CUDA context. A virtual CPU device without an
    entry gets `cpu_device_memory`."""
    goal: Goal = "throughput"
    """What the plan is the best at: throughput, capacity or latency."""
    accelerator_type: Annotated[str, Field(min_length=1)] | None = None
    """The kind of GPU that a replica's node must have, by Ray's name: H100, L4, ..."""
    resources: Resources = {}
    """Custom Ray resources that a replica asks for, to land on nodes that were started with them."""
    cpu_device_memory: str | int = "1GB"
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    """Tokens per KV block."""
    max_context: Annotated[int, Field(ge=1)] | None = None
    """Tokens; default: what the model's config allows."""
    max_sequences: Annotated[int, Field(ge=1)] = 256
    """Most requests a replica runs at once."""
    max_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Token budget of one step of one slot: decodes plus prefill chunks; default: 2,048 on GPUs, 512 on the CPU."""
    prefill_chunk_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens in a step that others decode in, however many; default: as many as keep it within 2.5 times a step
    that only decodes as many, measured at the start on GPUs, 32 on the CPU."""
    kv_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto"
    """dtype of the KV cache; auto: the compute dtype."""
    kernels: Literal["headroom", "bitsandbytes"] = "headroom"
    """Which kernels multiply by quantised weights on GPUs; the CPU always has bitsandbytes'."""
    tune_kernels: bool = True
    """On GPUs, measure at the start how Headroom's kernels are the fastest for weights of shapes that no table has yet,
    and keep the answers in HEADROOM_HOME. Not with `batch_invariant`."""
    tune_limit_s: Annotated[float, Field(gt=0)] = 120.0
    """For how long at most; the next start goes on with what is left."""
    batch_invariant: bool = False
    """A request's tokens and log-probabilities are the same, bit for bit, whatever runs beside it. Slower: 16
    rows at once, on GPUs without CUDA graphs and FlashInfer."""
    prefix_cache: bool = True
    drain_s: Annotated[float, Field(ge=0)] = 60.0
    """How long a replica that is stopped may finish its streams; those left are resumed on another one."""
    surge: bool = False
    """Start a new version's replicas before the old ones stop. Needs the devices twice meanwhile."""
    cpus: Annotated[float, Field(gt=0)] | None = None
    """Ray CPUs a replica asks for; default: a fraction, so that one core starts the whole service."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Torch threads per replica on CPU; default: cores / replicas on this machine, at least 1."""

    @field_validator("max_memory", "cpu_device_memory")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        for size in value.values() if isinstance(value, dict) else (value,):
            try:
                parse_bytes(size)
            except PlacementError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _stages_match_caps(self) -> PoolSettings:
        if self.stages is not None and any(k < 0 or k >= self.stages for k in self.max_memory):
            raise ValueError(f"max_memory names device {max(self.max_memory)}, but stages is {self.stages}")
        if self.stages is None and sorted(self.max_memory) != list(range(len(self.max_memory))):
            raise ValueError("max_memory must name devices 0, 1, ... without gaps, or give `stages`")
        return self

    @model_validator(mode="after")
    def _threshold_of_int8(self) -> PoolSettings:
        if self.int8_threshold and self.quantization not in ("auto", "int8"):
            raise ValueError(
                f"int8_threshold is for int8, and quantization is {self.quantization}; drop one of the two"
            )
        if self.int8_threshold and self.batch_invariant:
            raise ValueError(
                "int8_threshold lets outliers change all rows of a step, and batch_invariant is set; drop one"
            )
        return self

    @model_validator(mode="after")
    def _limits_what_is_tuned(self) -> PoolSettings:
        if "tune_limit_s" in self.model_fields_set and not self.tune_kernels:
            raise ValueError("tune_limit_s is given, but tune_kernels is false; drop one of the two")
        asked = {"tune_kernels", "tune_limit_s"} & self.model_fields_set
        if self.batch_invariant and self.tune_kernels and asked:
            raise ValueError(
                f"{min(asked)} is given, but with batch_invariant nothing is measured, as another start may find "
                "other kernels the fastest, whose last bits differ; drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _accelerators_are_gpus(self) -> PoolSettings:
        if self.accelerator_type and self.device == "cpu":
            raise ValueError(f"accelerator_type is {self.accelerator_type}, but device is cpu; drop one of the two")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_number_of_replicas(cls, values: Any) -> Any:
        if isinstance(values, dict) and "replicas" in values and values.get("autoscaling") is not None:
            raise ValueError("replicas and autoscaling are both given; autoscaling has min_replicas and max_replicas")
        return values

    @property
    def own_kernels(self) -> bool:
        """Whether products by quantised weights run on Headroom's kernels, where there is a GPU."""
        return self.kernels == "headroom" and not self.int8_threshold

    @property
    def tunes(self) -> bool:
        """Whether kernels may be measured at the start."""
        return self.tune_kernels and not self.batch_invariant

    @property
    def fewest_replicas(self) -> int:
        """Replicas that there always are."""
        return self.autoscaling.min_replicas if self.autoscaling else self.replicas

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be."""
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas

    @property
    def max_requests(self) -> int:
        """Requests that a replica takes at once: as many as run, and as many that are ready to follow them."""
        return 2 * self.max_sequences

    def batch_tokens(self, device_type: str) -> int:
        """`max_batch_tokens`, or its default on a kind of device."""
        return self.max_batch_tokens or (2048 if device_type == "cuda" else 512)

    @property
    def stage_count(self) -> int:
        """Devices per replica."""
        return self.stages or len(self.max_memory) or 1


class ModelSettings(_Strict):
    """One served model: what clients name, where its weights are, and its pools."""

    name: str
    aliases: tuple[str, ...] = ()
    source: str
    """"demo" (the embedded model), a Hugging Face id, a local directory, or a .gguf file."""
    revision: str | None = None
    chat_template: str | None = None
    """A Jinja template or the path of one; default: the tokenizer's own."""
    pools: Annotated[tuple[PoolSettings, ...], Field(min_length=1)] = (PoolSettings(),)
    queue_limit: Annotated[int, Field(ge=0)] = 1024
    """Most requests waiting for blocks; one more is refused with 429, or takes the place of the last request of the
    tenant most over its share of the queue, where its own tenant has less than its share."""
    wait_limit_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait for blocks; afterwards 429."""
    tenant_weights: dict[str, Annotated[int, Field(ge=1, le=1000)]] = {}
    """Shares of tenants whose requests wait for blocks: a tenant of weight 2 is granted twice the tokens of one of
    weight 1, which is the default. Tenants are those of the key file, which may give weights too, and each key of the
    environment is one; without keys, requests' `user` names them."""

    def longest_context(self, native: int) -> int:
        """Prompt and output in tokens that the roomiest pool takes; `native`: what the model was made for."""
        return min(native, max(pool.max_context or native for pool in self.pools))

    @property
    def granule_tokens(self) -> int | None:
        """The unit in which prefixes are compared, whole blocks in every pool; None where no pool caches any."""
        if not any(pool.prefix_cache for pool in self.pools):
            return None
        return granule_tokens(pool.block_size for pool in self.pools)

    @field_validator("name", "aliases")
    @classmethod
    def _nameable(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]*", name):
                raise ValueError(f"{name!r} must be letters, digits and . _ : / - and start with one of the first two")
        return value

    @model_validator(mode="after")
    def _pools_differ(self) -> ModelSettings:
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pools of one model need different names, got {names}")
        return self


class ApiSettings(_Strict):
    """The HTTP ingress."""

    replicas: Annotated[int, Field(ge=1)] = 1
    api_keys_env: str | None = None
    """Environment variable with comma-separated API keys, which open everything. Neither it nor a file: no keys."""
    api_keys_file: str | None = None
    """A file of hashed API keys (`headroom key new NAME`), read again when it changes; both kinds are valid."""
    admin_endpoints: Literal["keyed", "open"] = "keyed"
    """Whether `/metrics` and what else watches the service asks for a key of the role admin, where there are keys."""
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 1024 * 1024
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """From a request's head to the end of its body; afterwards 408."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """From the request's arrival to its last token; afterwards it is cancelled."""
    keep_alive_s: Annotated[float, Field(gt=0)] | None = 15.0
    """A stream that was silent for so long gets a comment, so that no proxy takes it for dead; None: never."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 10_000
    """Serve's limit per ingress replica; must exceed running plus waiting requests."""
    resources: Resources = {}
    """Custom Ray resources that ingress replicas and ledgers ask for, so that they keep no node of replicas busy."""
    ledger_limit_s: Annotated[float, Field(gt=0)] = 2.0
    """A ledger that gives no sign for this long is done without: an ingress then places requests by what it last knew
    of the replicas, which take up what they have room for."""


class Settings(_Strict):
    """The whole `args` of the Serve application."""

    models: Annotated[tuple[ModelSettings, ...], Field(min_length=1)]
    api: ApiSettings = ApiSettings()

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        names = [n for model in self.models for n in (model.name, *model.aliases)]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise ValueError(f"model names and aliases must differ: {sorted(twice)}")
        return self


def parse_settings(args: dict[str, Any]) -> Settings:
    """Validate `args`.

    Raises:
        ConfigError: one line naming each wrong key with its path.
    """
    try:
        return Settings.model_validate(args)
    except ValidationError as error:
        raise ConfigError("serve_config: " + "; ".join(describe(e) for e in mistakes(error))) from None


def mistakes(error: ValidationError) -> list[Any]:
    """Pydantic's errors without those that only follow from others: a list is "too short" where its item is wrong."""
    found: list[Any] = list(error.errors())
    return [e for e in found if not any(o is not e and o["loc"][: len(e["loc"])] == e["loc"] for o in found)]


def describe(error: Any) -> str:
    """One of pydantic's errors in a few words: the key's path below `args`, and what is wrong with it."""
    loc = tuple(error["loc"])
    path = ".".join(map(str, loc[3:] if loc[:3] == ("applications", 0, "args") else loc)) or "args"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(str(loc[-1]), _known_keys(), n=1)
        return f"unknown key {path}" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{path} is missing"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}"


def _known_keys() -> list[str]:
    return [
        key
        for part in (Settings, ApiSettings, ModelSettings, PoolSettings, AutoscalingSettings)
        for key in part.model_fields
    ]
