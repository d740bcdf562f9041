"""Stages against transformers' own forward, in float32: cut anywhere, the logits stay."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from deployments.engine.attention import RowSpan
from deployments.engine.loader import LoadedModel, load
from deployments.engine.stages import Absent, Stage, StepRows, find_decoder, find_layers, run_stages
from tests.unit.engine.tiny import IDS, VOCAB, llama, plan_of, rows, save

_STANDARD = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCAB}
_GLU = {**_STANDARD, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 128}
_OWN_NAMES = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": llama(4),
    "llama, tied": llama(4, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**_GLU, head_dim=16, sliding_window=6),
    "gpt2": transformers.GPT2Config(**_OWN_NAMES, n_positions=128),
    "opt": transformers.OPTConfig(**_STANDARD, ffn_dim=128, word_embed_proj_dim=32, max_position_embeddings=128),
}
CUTS = [
    *(("llama", n) for n in (1, 2, 3, 4)),
    ("llama, tied", 3),
    ("gemma2", 2),
    ("gemma2", 4),
    ("gpt2", 2),
    ("opt", 3),
]


@dataclass(frozen=True)
class Cut:
    """A model in stages, and what transformers computes for IDS."""

    stages: tuple[Stage, ...]
    block_size: int
    expected: Tensor


@pytest.fixture(scope="module", params=CUTS, ids=lambda case: f"{case[0]}, {case[1]} stages")
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    name, stages = request.param
    folder = save(tmp_path_factory.mktemp("model"), CONFIGS[name])
    plan = plan_of(folder, stages=stages, quantization="fp32")
    assert len(plan.stages) == stages
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    return Cut(load(folder, plan, device_type="cpu").stages, plan.block_size, logits)


def test_chunks_and_decodes_equal_the_plain_forward(cut: Cut) -> None:
    table = (4, 0, 5, 1, 3, 2)
    for start, end in pairwise((0, 9, 16, 21, 22, 23)):
        step = rows([(start, end, table)], tuple(range(end - start)))
        logits = run_stages(cut.stages, step, cut.block_size)
        torch.testing.assert_close(logits, cut.expected[start:end], rtol=1e-4, atol=1e-4)


def test_sequences_of_one_step_do_not_mix(cut: Cut) -> None:
    first, second, third = (0, 1), (2, 3, 4), (5, 6, 7, 8, 9, 10)
    run_stages(cut.stages, rows([(0, 5, first), (0, 10, second)], (4,)), cut.block_size)
    step = rows([(5, 6, first), (0, 21, third), (10, 11, second)], (0, 21, 22))
    logits = run_stages(cut.stages, step, cut.block_size)
    torch.testing.assert_close(logits, cut.expected[[5, 20, 10]], rtol=1e-4, atol=1e-4)


def test_a_step_that_samples_nothing_has_no_logits(cut: Cut) -> None:
    logits = run_stages(cut.stages, rows([(0, 9, (0, 1, 2))], ()), cut.block_size)
    assert logits.shape == (0, VOCAB)


def test_a_failed_step_is_over(cut: Cut) -> None:
    stage = cut.stages[0]
    beyond = StepRows((VOCAB + 1,), (0,), (RowSpan(0, 1, (0,)),), (0,))
    with pytest.raises(IndexError):
        stage.run(beyond, None, cut.block_size)
    step = StepRows((1,), (0,), (RowSpan(0, 1, (0,)),), (0,))
    with pytest.raises(RuntimeError, match="outside a step"):
        stage._decoder(input_ids=torch.tensor([step.ids]), position_ids=torch.tensor([step.positions]), use_cache=False)


def heads_and_embeddings(model: LoadedModel) -> tuple[Tensor, Tensor]:
    """The weight that the last stage's head holds, and that of the first stage's embedding."""
    head: Any = model.stages[-1]._head
    decoder: Any = model.stages[0]._decoder
    return head.lm_head.weight, decoder.embed_tokens.weight


@pytest.mark.parametrize(("stages", "shared"), [(1, True), (2, False)])
def test_tied_weights_are_one_copy_per_device(tmp_path: Path, stages: int, shared: bool) -> None:
    folder = save(tmp_path, llama(2, tie_word_embeddings=True))
    head, embedding = heads_and_embeddings(load(folder, plan_of(folder, stages=stages), device_type="cpu"))
    assert torch.equal(head, embedding)
    assert (head.data_ptr() == embedding.data_ptr()) is shared


def test_every_layer_has_its_kv_in_one_stage(cut: Cut) -> None:
    assert [i for stage in cut.stages for i in range(*stage.layers)] == [0, 1, 2, 3]
    caches = [cache for stage in cut.stages for cache in stage.kv]
    assert len(caches) == len({id(cache) for cache in caches}) == 4


def test_absent_hands_hidden_states_through_and_embeds_nothing() -> None:
    absent, hidden = Absent(), torch.ones(1, 3, 8, dtype=torch.bfloat16)
    assert absent(hidden) is hidden
    zero = absent(torch.tensor([[1, 2, 3]]))
    assert zero.shape == ()
    assert (hidden + zero).dtype == torch.bfloat16
    assert torch.equal(hidden + zero, hidden)


def test_a_model_without_a_list_of_layers_is_named() -> None:
    decoder = nn.Module()
    decoder.config = llama(3)  # type: ignore[assignment]  # a config, no submodule
    decoder.blocks = nn.ModuleList([nn.Identity()])
    with pytest.raises(LookupError, match="Module has no list of 3 layers"):
        find_layers(decoder)


def test_a_decoder_that_is_no_submodule_is_named() -> None:
    model: Any = nn.Module()
    model.get_decoder = nn.Module
    with pytest.raises(LookupError, match=r"Module.get_decoder\(\) is not among its submodules"):
        find_decoder(model)


def test_norms_and_rotary_tables_around_the_layers_are_known(cut: Cut) -> None:
    """Each stage its own: they are compiled where the layers are."""
    has_rotary = type(cut.stages[0]._decoder).__name__ in ("LlamaModel", "Gemma2Model")
    for stage in cut.stages:
        names = [type(module).__name__ for module in stage.surroundings]
        assert sum(name.endswith("RotaryEmbedding") for name in names) == has_rotary
        assert sum(name.endswith("Norm") for name in names) == stage.is_last
        assert not {id(module) for module in stage.surroundings} & {id(m) for m in stage.layer_modules}
