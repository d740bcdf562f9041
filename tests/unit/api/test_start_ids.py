"""What the prompt of an encoder-decoder ends with."""

from __future__ import annotations

import pytest

from deployments.api.codec import start_ids
from deployments.errors import ConfigError

T5 = {"is_encoder_decoder": True, "decoder_start_token_id": 3}


def test_the_generation_config_comes_first() -> None:
    assert start_ids({"decoder_start_token_id": 0}, T5) == (0,)
    assert start_ids({}, T5) == (3,)


def test_other_models_have_none() -> None:
    assert start_ids({"decoder_start_token_id": 0}, {"decoder_start_token_id": 3}) == ()


def test_one_that_is_not_named_is_missed() -> None:
    with pytest.raises(ConfigError, match="set decoder_start_token_id"):
        start_ids({}, {"is_encoder_decoder": True})
