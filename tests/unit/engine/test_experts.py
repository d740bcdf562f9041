"""Experts that compute all rows: what transformers' own forward does, and a row's bits its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from deployments.engine.experts import INVARIANT, invariant_experts_forward

ROWS, WIDTH, INNER, EXPERTS = 16, 64, 96, 6


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS)
    return MixtralExperts(config)


def gpt_oss() -> nn.Module:
    """Transposed, with biases and limits."""
    config = transformers.GptOssConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS)
    return GptOssExperts(config)


def nemotron_h() -> nn.Module:
    """Without a gate."""
    config = transformers.NemotronHConfig(
        hidden_size=WIDTH, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, moe_latent_size=None
    )
    return NemotronHExperts(config)


def muse_spark() -> nn.Module:
    """With a norm behind each."""
    module = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    config = transformers.MuseSparkTextConfig(
        moe_hidden_size=WIDTH, moe_intermediate_size=INNER, num_local_experts=EXPERTS
    )
    return module.MuseSparkExperts(config)


def filled(experts: Any) -> Any:
    """Random weights, on the module's own forward."""
    draw = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=draw)
    experts.config._experts_implementation = "eager"
    return experts


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the two experts that each visits, and their weights; nobody visits expert 2."""
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(ROWS, WIDTH, generator=draw)
    scores = torch.rand(ROWS, EXPERTS, generator=draw)
    scores[:, 2] = -1
    weights, index = scores.topk(2)
    return hidden, index, weights


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron_h, muse_spark])
@torch.inference_mode()
def test_it_computes_what_the_module_does(make: Any) -> None:
    experts = filled(make())
    expected = experts(*routed())
    experts.config._experts_implementation = INVARIANT
    torch.testing.assert_close(experts(*routed()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_has_the_same_bits_at_any_place_among_any_others(dtype: torch.dtype) -> None:
    experts = filled(mixtral()).to(dtype)
    hidden, index, weights = routed()
    expected = invariant_experts_forward(experts, hidden.to(dtype), index, weights)
    assert expected.dtype == dtype
    draw = torch.Generator().manual_seed(3)
    for _ in range(8):
        order = torch.randperm(ROWS, generator=draw)
        few = order[: ROWS // 4]  # the rest are strangers
        mixed, places = torch.randn(ROWS, WIDTH, generator=draw), torch.randperm(ROWS, generator=draw)[: ROWS // 4]
        chosen = torch.randint(EXPERTS, (ROWS, 1), generator=draw) + torch.tensor([0, 1])
        chosen %= EXPERTS
        shares = torch.rand(ROWS, 2, generator=draw)
        mixed[places], chosen[places], shares[places] = hidden[few], index[few], weights[few]
        found = invariant_experts_forward(experts, mixed.to(dtype), chosen, shares)
        assert torch.equal(found[places], expected[few])


@torch.inference_mode()
def test_the_order_in_which_a_row_names_its_experts_changes_nothing() -> None:
    experts = filled(mixtral())
    hidden, _, _ = routed()
    index = torch.tensor([[4, 0, 3]] * ROWS)
    weights = torch.tensor([[0.5, 0.3, 0.2]] * ROWS)
    one, other = (
        invariant_experts_forward(experts, hidden, index[:, o], weights[:, o]) for o in ([0, 1, 2], [2, 0, 1])
    )
    assert torch.equal(one, other)


@torch.inference_mode()
def test_experts_add_nothing_to_rows_that_do_not_visit_them() -> None:
    """Expert 5 overflows, expert 2 is never computed."""
    experts = filled(mixtral())
    hidden, index, weights = routed()
    index[:8] %= 2  # experts 0 and 1 alone, perhaps one of them twice
    index[8:, 0] = 5
    expected = invariant_experts_forward(experts, hidden, index, weights)
    assert expected.isfinite().all()
    experts.down_proj[5] = float("inf")
    experts.down_proj[2] = float("nan")
    found = invariant_experts_forward(experts, hidden, index, weights)
    assert torch.equal(found[:8], expected[:8])
    assert not found[8:].isfinite().any()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MixtralTopKRouter, transformers.MixtralConfig(hidden_size=WIDTH, num_local_experts=EXPERTS)),
        (
            Qwen3MoeTopKRouter,
            transformers.Qwen3MoeConfig(hidden_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=2),
        ),
    ],
    ids=["Mixtral", "Qwen3 MoE"],
)
@torch.inference_mode()
def test_routers_break_ties_alike_at_any_place(kind: Any, config: Any) -> None:
    """In a row of zeros all experts have the same score."""
    router = kind(config)
    draw = torch.Generator().manual_seed(1)
    router.weight.data.normal_(generator=draw)
    found = []
    for place in range(ROWS):
        hidden = torch.randn(ROWS, WIDTH, generator=draw)
        hidden[place] = 0
        found.append([result[place] for result in router(hidden)])
    for each in found:
        assert all(map(torch.equal, each, found[0]))
