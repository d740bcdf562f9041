"""What is neither weight nor KV, each term named and explained.

Persistent terms are summed. Temporaries that are never held at once count with the largest of them, and the peak of
loading, which passes before the KV cache is allocated, counts only where it is above everything that comes after it.

The terms are those of this project's engine: on GPUs attention by FlashInfer, CUDA graphs, kernels that share buffers;
elsewhere, and where FlashInfer does not fit, paged attention that gathers blocks for PyTorch's SDPA; a sampler that
takes at most `SAMPLE_ROWS` rows at a time. `benchmarks.placement_error` compares their sum with what GPUs hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement import arena, gathered
from placement import encoder_decoder as cross
from placement.experts import dequantised_bytes, largest_fused, waiting_bytes
from placement.flashinfer import gpu_attention, stored_kv
from placement.footprint import Footprint, Module, Tensor
from placement.gathered import Room
from placement.hardware import DeviceType, format_bytes
from placement.kv import dtype_bytes, kv_dtype_bytes
from placement.workload import Workload

SAMPLE_ROWS = 64
"""Rows of logits that the sampler works on at once."""

CONTEXT = "context"
"""Name of the one term that a max_memory cap does not bound."""

GRAPHS = "graphs"
"""Name of the term of which `driver_bytes` are outside PyTorch's allocator; without it, those of no layers are in the
buffers."""

CUDA_CONTEXT_BYTES = 704 * 2**20
"""CUDA context, and the code of PyTorch, cuBLAS, FlashInfer and Triton: 695 MiB on an H200 (driver 580, CUDA 13),
before a step has run."""

_GRAPH_BYTES, _GRAPH_LAYER_BYTES = 64 * 2**20, 7 * 2**18
"""What the driver takes for the kernels that steps run, and of some thirty CUDA graphs for each layer in them.
Measured: 55 MiB without graphs, 79 to 88 with graphs of 16 layers, 101 to 110 with 32."""
_CUBLAS_BYTES = 36 * 2**20
"""PyTorch gives cuBLAS 32 MiB for each stream that it is called on, on Hopper: two where graphs are captured."""
_KERNEL_BYTES, _DEQUANTISED_MOST = 38 * 2**20, 128 * 2**20
"""Partial sums of the quantised products; and a weight dequantised for many rows, in parts where it is larger."""
_SMS, _CTAS_PER_SM, _MOST_CTAS_PER_SM, _TILE = 160, 2, 16, 128
"""Multiprocessors of the largest GPUs; blocks on each that FlashInfer's scheduler counts on, in a prefill and at most;
and rows of a block."""

_SAMPLE_BYTES = 36
"""Per logit of the rows being sampled: float32 scores (4), int32 keys (4), int64 weights, bins and masked weights (8
each), masks (4)."""
_SEGMENT = 256
"""The sampler pads the vocabulary to whole segments."""
_WEIGHT_TABLE_BYTES = 2**19
"""The sampler's."""
_QUANTISE_BYTES = {"nf4": 20, "fp4": 20, "int8": 12}
"""Per weight while the CPU quantises it. 4 bits: float32 copy and scaled, int32 and (fp4) int64 codes;
8 bits: float16 copy and its absolute, float32 scaled and rounded."""
_PADDING = 2
"""Decodes are gathered in groups padded to at most twice their length."""
_FRAGMENTATION_BYTES = 256 * 2**20
"""Left to the allocator, whose segments expand by pages of 20 MiB. Measured on an H200: 175 to 223 MB whether the KV
cache has 7 GB or 146, the memory of CUDA graphs included."""
_EAGER_BYTES, _EAGER_PART = 64 * 2**20, 3
"""The same where there is the gather cache, and no graphs: a sum, and one part in so many of what a forward attends
with, whose tensors don't fit each other's holes. Measured with BLOOM-3B: 0.28 and 0.31 of it."""
_HOLES = {"nf4": 45, "fp4": 45, "int8": 30, "gptq-2bit": 45, "gptq-4bit": 45, "awq-4bit": 45}
"""Per cent of the quantised weights: what the allocator keeps between them while they are loaded, until each layer has
an arena. Measured on an H200 with an 8B shape: 45 in NF4, 27 in int8. Taken for GPTQ and AWQ, whose tensors are as
many: as in NF4."""
_PIECES = 6
"""Tensors of a quantised weight, at most: codes, scales and their table; the same of the scales, and an offset."""


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a stage's reserve: its bytes, and in a sentence why they are held back."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Reserve:
    """The bytes of each term on one device, before its layers are known."""

    context: int
    graphs: int
    fragmentation: int
    activations: int
    buffers: int
    """What the engine keeps: of the pipeline, of attention, of the kernels."""
    logits: int
    """Last stage only."""
    prefill: int
    dequantisation: int
    sampler: int
    """Kept on the last stage: the sampler's table."""
    per_block: int
    """Kept on the last stage per KV block: the ids of its tokens."""
    gather_per_block: int
    """Of decode attention, per KV block held by the running sequences."""
    load_peak: int
    last_load_peak: int = 0
    """Of loading where the last stage is, with the head."""
    graph_logits: int = 0
    """Last stage only: by how much logits in a graph are more than the activations of the largest one."""
    own: Room | None = None
    """Of attention in the model's own code, which takes it instead of `gather_per_block`; None: the engine attends."""

    def held(self, *, last: bool, blocks: int, kv_block_bytes: int) -> int:
        """Everything but weights while `blocks` KV blocks (and the scratch block) are there."""
        kv = (blocks + 1) * kv_block_bytes
        running = self._kept(last, blocks) + self.activations + self._workspace(last, blocks) + kv
        return self.context + self._graphs(last) + self.fragmentation + max(running, self._load_peak(last))

    def terms(self, *, last: bool, blocks: int, kv_block_bytes: int) -> tuple[Term, ...]:
        """The same, less the KV, named. A term of 0 bytes is left out."""
        kept, workspace = self._kept(last, blocks), self._workspace(last, blocks)
        parts = [
            ("attention" if self.own else "decode attention", self._gathered(blocks)),
            ("prefill attention", self.prefill),
            ("dequantisation", self.dequantisation),
        ]
        parts += [("logits and sampling above activations", self._above_activations())] if last else []
        largest = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)
        loading = self._load_peak(last) - kept - self.activations - workspace - (blocks + 1) * kv_block_bytes
        terms = (
            Term(CONTEXT, self.context, "CUDA context, and the code of libraries and kernels"),
            Term(GRAPHS, self._graphs(last), "CUDA graphs, and what the largest of them computes with"),
            Term("fragmentation", self.fragmentation, "what the allocator can't hand out"),
            Term("buffers", kept, "kept by pipeline, attention, kernels and sampler from step to step"),
            Term("activations", self.activations, "hidden states and projections of one step in the widest layer"),
            Term("workspace", workspace, f"the largest of what is never held at once: {largest}"),
            Term("loading", max(0, loading), "the peak of loading, above all that comes after it"),
        )
        return tuple(term for term in terms if term.bytes)

    def _graphs(self, last: bool) -> int:
        return self.graphs + (self.graph_logits if last else 0)

    def _kept(self, last: bool, blocks: int) -> int:
        return self.buffers + (self.sampler + self.per_block * (blocks + 1) if last else 0)

    def _workspace(self, last: bool, blocks: int) -> int:
        """What a step takes beside activations."""
        inside = max(self.prefill, self.dequantisation, self._gathered(blocks))
        return max(inside, self._above_activations()) if last else inside

    def _load_peak(self, last: bool) -> int:
        return max(self.load_peak, self.last_load_peak) if last else self.load_peak

    def _gathered(self, blocks: int) -> int:
        return self.own.taken(blocks) if self.own else blocks * self.gather_per_block

    def _above_activations(self) -> int:
        """Of sampling, which comes when the layers' activations are gone."""
        return max(0, self.logits - self.activations)


def reserve(footprint: Footprint, workload: Workload, *, device_type: DeviceType, devices: int = 1) -> Reserve:
    """The reserve of one of the replica's `devices`."""
    cuda = device_type == "cuda"
    own, encodes = footprint.geometry.own_attention is not None, cross.encodes(footprint)
    gathers = not cuda or gpu_attention(footprint, workload) == "torch"
    load_peak = _cuda_load_peak_bytes if cuda else _cpu_load_peak_bytes
    widest = (_activation_bytes if gathers else _compiled_activation_bytes)(footprint)
    visited = dequantised_bytes(footprint) if cuda and footprint.experts else 0
    room = gathered.room(footprint, workload, widest) if own else None
    captured = 0 if gathers else workload.captured_rows(devices) * widest + visited
    return Reserve(
        context=CUDA_CONTEXT_BYTES if cuda else 0,
        graphs=0 if gathers else driver_bytes(len(footprint.layers)) + captured,
        fragmentation=_fragmentation_bytes(footprint, room) if cuda else 0,
        activations=workload.max_batch_tokens * widest,
        buffers=_buffer_bytes(footprint, workload, devices, gathers=gathers) if cuda else 0,
        logits=_logit_bytes(footprint, workload, dequantises=not cuda),
        prefill=_prefill_bytes(footprint, workload) if gathers and not own else 0,
        dequantisation=max(visited, _dequantisation_bytes(footprint) if gathers else 0),
        sampler=_WEIGHT_TABLE_BYTES,
        per_block=4 * workload.block_size,
        gather_per_block=_gather_bytes(footprint, workload) if gathers and not own and not encodes else 0,
        load_peak=load_peak(footprint, devices, head=False),
        last_load_peak=load_peak(footprint, devices, head=True),
        graph_logits=0 if gathers else max(0, _graph_logit_bytes(footprint, workload) - captured),
        own=cross.room(footprint, workload) if encodes else room,
    )


def _fragmentation_bytes(footprint: Footprint, room: Room | None) -> int:
    """With the rounding of all layers' arenas, as if the device held every layer."""
    rounding = sum(arena.taken(size) - layer.bytes for layer, size in _arenas(footprint))
    return rounding + (_EAGER_BYTES + room.most // _EAGER_PART if room else _FRAGMENTATION_BYTES)


def _arenas(footprint: Footprint) -> list[tuple[Module, int]]:
    """The layers that have an arena, and its bytes at most: each tensor's end may be padded."""
    if footprint.quantization not in arena.QUANTISED:
        return []
    pieces = [sum(_PIECES if tensor.linear else 1 for tensor in layer.tensors) for layer in footprint.layers]
    return [
        (layer, layer.bytes + count * arena.ALIGNMENT) for layer, count in zip(footprint.layers, pieces, strict=True)
    ]


def driver_bytes(layers: int) -> int:
    """What the driver keeps for kernels that have run, and for CUDA graphs of so many layers."""
    return _GRAPH_BYTES + _GRAPH_LAYER_BYTES * layers


def _compiled_activation_bytes(footprint: Footprint) -> int:
    """Per token, in the compute dtype: residual, normed, a block's result, and of the layer's projections the two
    widest with what is made of them (gate, up and their product)."""
    outs = [sorted(_widths(layer)) for layer in footprint.layers]
    widest = max((sum(out[-2:]) + sum(out[-1:]) for out in outs), default=0)
    return dtype_bytes(footprint.dtype) * (3 * footprint.geometry.hidden + widest)


def _widths(layer: Module) -> list[int]:
    """Elements per token that each of a layer's products results in; those of all experts that a token visits are one.
    Experts fused into [experts, a, b] also gather the rows that they work on, so a token takes a + b of each."""
    matrices = [tensor for tensor in layer.tensors if len(tensor.shape) > 1]
    experts = [tensor for tensor in matrices if ".experts." in tensor.name]
    widths = [tensor.shape[0] for tensor in matrices if ".experts." not in tensor.name]
    if experts:
        elements = sum(tensor.elements for tensor in experts)
        visited = layer.work - sum(tensor.elements for tensor in matrices) + elements
        widths.append(-(-visited * sum(map(_expert_rows, experts)) // elements))
    return widths


def _expert_rows(tensor: Tensor) -> int:
    return tensor.shape[0] * sum(tensor.shape[1:]) if len(tensor.shape) == 3 else tensor.shape[0]


def _buffer_bytes(footprint: Footprint, workload: Workload, devices: int, *, gathers: bool) -> int:
    """What a GPU's stage keeps beside weights and KV: the ids, positions and cache slots of a step (int64), hidden
    states that come in (a step for each slot) and go out, cuBLAS', the kernels' and FlashInfer's workspaces; without
    graphs also what the driver takes."""
    step = workload.max_batch_tokens
    rows = 2 * workload.captured_rows(devices) + (devices * step if devices > 1 else 0)
    size, tables = dtype_bytes(footprint.dtype), 24 * step
    if cross.encodes(footprint):
        size, tables = cross.hidden_bytes(footprint), cross.layout_bytes(workload)
    kept = tables + rows * footprint.geometry.hidden * size + _CUBLAS_BYTES * (1 if gathers else 2)
    if footprint.quantization in arena.QUANTISED:
        kept += _KERNEL_BYTES + min(
            _DEQUANTISED_MOST, 2 * dtype_bytes(footprint.dtype) * _largest_quantised(footprint, head=True)
        )
    return kept + (driver_bytes(0) if gathers else _flashinfer_bytes(footprint, workload))


def _flashinfer_bytes(footprint: Footprint, workload: Workload) -> int:
    """Tables of a step, int32; for each kind of layer the plans of a step's decodes and of its chunks; and for each
    size of heads the parts of split sequences before they are merged, float32, which layers share. Upper bounds of what
    the engine takes for them (`deployments.engine.flashinfer_fit.Room`)."""
    heads, rows = footprint.geometry.heads, workload.max_batch_tokens
    tables = workload.max_sequences * -(-(workload.max_context + 1) // workload.block_size) + 8 * rows + 64
    kinds = {kv for kv in stored_kv(footprint.geometry.kv, workload.kv_dtype, "flashinfer") if kv.kv_heads}
    plans = sum(2 * _plan_bytes(heads, kv.kv_heads, rows) for kv in kinds)
    parts = sum(_part_bytes(heads, *size) for size in {(kv.kv_heads, kv.head_dim) for kv in kinds})
    return 4 * tables + plans + parts


def _plan_bytes(heads: int, kv_heads: int, rows: int) -> int:
    """For each block of threads three indices and a flag, for each row and sequence an offset."""
    ctas = max(2, _MOST_CTAS_PER_SM * _SMS // kv_heads, rows * heads // (16 * kv_heads) + rows + 1)
    return 13 * ctas + 8 * rows + 1024


def _part_bytes(heads: int, kv_heads: int, head_dim: int) -> int:
    """Heads of more than 64 to a KV head fill the tiles of a decode too, two to a block."""
    rows = _TILE * (2 if heads // kv_heads > 64 else 1)
    return 4 * rows * heads * max(1, _CTAS_PER_SM * _SMS // kv_heads) * (head_dim + 1) + 512


def _activation_bytes(footprint: Footprint) -> int:
    """Per token: input, residual, normed and output in the compute dtype and twice in float32 (norms), every
    projection's result, and once more the widest (the activation function's)."""
    size, hidden = dtype_bytes(footprint.dtype), footprint.geometry.hidden
    if cross.encodes(footprint):
        per_token = cross.activation_bytes(footprint)
    else:
        outs = [_widths(layer) for layer in footprint.layers]
        widest = max((sum(out) + max(out, default=0) for out in outs), default=0)
        per_token = size * (4 * hidden + widest) + 2 * 4 * hidden
    if footprint.quantization == "int8":
        # Inputs once more in float16 and int8, results once more in int32 and float16.
        shapes = [t.shape for layer in footprint.layers for t in layer.tensors if t.linear]
        per_token += max((3 * s[-1] + 6 * s[-2] for s in shapes), default=0)
    return per_token


def _logit_bytes(footprint: Footprint, workload: Workload, *, dequantises: bool) -> int:
    """A step's last hidden states, those of the sampled rows and their logits in the compute dtype, and the larger of
    what makes them and what samples them: a quantised head's product, and the sampler's scratch for `SAMPLE_ROWS`.

    Args:
        dequantises: linears take a dequantised weight of their own, and share no buffer.
    """
    size, step = dtype_bytes(footprint.dtype), workload.max_batch_tokens
    rows, vocab = _sampled_rows(workload), _vocab(footprint)
    hidden = (step + rows) * footprint.geometry.hidden * size
    product = _head_product_bytes(footprint, rows) if dequantises else 0
    return hidden + vocab * rows * size + max(product, vocab * min(rows, SAMPLE_ROWS) * _SAMPLE_BYTES)


def _graph_logit_bytes(footprint: Footprint, workload: Workload) -> int:
    """Twice the logits of a step's sampled rows, as heads that scale or cap them hold them."""
    return 2 * _vocab(footprint) * _sampled_rows(workload) * dtype_bytes(footprint.dtype)


def _sampled_rows(workload: Workload) -> int:
    return min(workload.max_sequences, workload.max_batch_tokens)


def _vocab(footprint: Footprint) -> int:
    """In whole segments."""
    return -(-footprint.geometry.vocab // _SEGMENT) * _SEGMENT


def _head_product_bytes(footprint: Footprint, rows: int) -> int:
    """Of a quantised head: its weight dequantised; int8 as in `_activation_bytes`. 0 where it is not quantised."""
    heads = [t for module in footprint.with_role("last") for t in module.tensors if t.linear]
    largest = max((t.elements for t in heads), default=0)
    if footprint.quantization != "int8":
        return dtype_bytes(footprint.dtype) * largest
    return 4 * largest + rows * max((3 * t.shape[-1] + 6 * t.shape[-2] for t in heads), default=0)


def _prefill_bytes(footprint: Footprint, workload: Workload) -> int:
    """A chunk of a prompt against the longest context: gathered keys and values repeated to all query heads, and the
    mask as kept (bool, per kind of window), per query head of one KV head (bool), and as SDPA adds it."""
    geometry, size = footprint.geometry, dtype_bytes(footprint.dtype)
    pairs = workload.max_batch_tokens * workload.max_context
    kinds = {kv for kv in geometry.kv if kv.kv_heads}
    windows = len({kv.window for kv in kinds})
    # There as a tensor: they pass a tanh, or an encoder-decoder adds its biases.
    scores = pairs * geometry.heads * (2 * size + 2 * 4) if geometry.softcap or cross.encodes(footprint) else 0
    return max(
        (
            pairs * (windows + (1 + size) * (geometry.heads // kv.kv_heads))
            + workload.max_context * kv.elements_per_token * size * (1 + geometry.heads // kv.kv_heads)
            + scores
            for kv in kinds
        ),
        default=0,
    )


def _gather_bytes(footprint: Footprint, workload: Workload) -> int:
    """Keys, values and mask of one block in one layer, gathered for a decode step and padded."""
    geometry, size = footprint.geometry, kv_dtype_bytes(workload.kv_dtype)
    per_token = max(kv.elements_per_token for kv in geometry.kv) * size + 1 + size
    per_token += geometry.heads * (2 * size + 2 * 4) if geometry.softcap else 0
    return _PADDING * workload.block_size * per_token


def _dequantisation_bytes(footprint: Footprint) -> int:
    """The largest quantised weight, back in the compute dtype (int8: in float32) for one product."""
    size = 4 if footprint.quantization == "int8" else dtype_bytes(footprint.dtype)
    return size * _largest_quantised(footprint, head=False)


def _cpu_load_peak_bytes(footprint: Footprint, devices: int, *, head: bool) -> int:
    """The largest weight while it is quantised: in the compute dtype, and with what bitsandbytes computes it from.
    transformers quantises one tensor at a time; what stays as it is is mapped from the checkpoint, not read. Fused
    experts are quantised once all are loaded: until then they are in the compute dtype, as if in equal shares."""
    scratch = _QUANTISE_BYTES.get(footprint.quantization, 0)
    return -(-waiting_bytes(footprint) // devices) + _largest_quantised(footprint, head=head) * (
        dtype_bytes(footprint.dtype) + scratch
    )


def _cuda_load_peak_bytes(footprint: Footprint, devices: int, *, head: bool) -> int:
    """Holes between quantised weights, counted as if the devices held equal shares of the model; and beside them the
    largest weight in the compute dtype while it is quantised, or later a layer that is copied to its arena. Experts
    that a checkpoint has one by one are there three times while they are fused: as read, as stacked, as joined."""
    quantised = sum(t.bytes for layer in footprint.layers for t in layer.tensors if t.linear)
    holes = quantised * _HOLES.get(footprint.quantization, 0) // 100 // devices
    copied = max((size for _, size in _arenas(footprint)), default=0)
    largest = max(3 * largest_fused(footprint), _largest_quantised(footprint, head=head))
    return holes + max(copied, largest * dtype_bytes(footprint.dtype))


def _largest_quantised(footprint: Footprint, *, head: bool) -> int:
    """Elements of the largest weight in a layer, or beside the last one too, that the quantisation converts. An
    embedding is quantised part by part."""
    if footprint.quantization not in arena.QUANTISED:
        return 0
    modules = (*footprint.layers, *(footprint.with_role("last") if head else ()))
    return max((t.elements for module in modules for t in module.tensors if t.linear), default=0)
