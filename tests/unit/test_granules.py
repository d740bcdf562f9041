from __future__ import annotations

import subprocess
import sys

import pytest

from deployments.granules import extend, granule_tokens, prefix_of
from deployments.settings import ModelSettings

PINNED = (9780637718774527550, 12889697093882063225, 889767214406137867)
"""A replica and an ingress of different versions must agree while a service is updated."""


@pytest.mark.parametrize(
    ("block_sizes", "tokens"),
    [((16,), 64), ((16, 32), 64), ((1,), 64), ((3,), 66), ((16, 48), 96), ((128,), 128), ((256, 96), 768)],
)
def test_a_granule_is_whole_blocks_of_every_pool(block_sizes: tuple[int, ...], tokens: int) -> None:
    assert granule_tokens(block_sizes) == tokens


def test_settings_name_the_granule_of_all_pools_of_a_model() -> None:
    pools = [{"name": "a", "block_size": 16}, {"name": "b", "block_size": 48}]
    assert ModelSettings.model_validate({"name": "m", "source": "demo", "pools": pools}).granule_tokens == 96
    uncached = [pool | {"prefix_cache": False} for pool in pools]
    assert ModelSettings.model_validate({"name": "m", "source": "demo", "pools": uncached}).granule_tokens is None


@pytest.mark.parametrize(("length", "granules"), [(0, 0), (1, 0), (64, 0), (65, 1), (128, 1), (129, 2)])
def test_only_whole_granules_count_and_never_the_last_token(length: int, granules: int) -> None:
    prefix = prefix_of(range(length), "", 64)
    assert prefix.granule_tokens == 64
    assert len(prefix.hashes) == granules


def test_hashes_are_the_same_in_every_process() -> None:
    """Ingress and engine are different processes, perhaps of different machines."""
    code = "from deployments.granules import prefix_of; print(prefix_of(range(200), 'salt', 64).hashes)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(prefix_of(range(200), "salt", 64).hashes)
    assert prefix_of(range(200), "salt", 64).hashes == PINNED


def test_a_chain_can_be_extended() -> None:
    hashes: list[int] = []
    for until in (1, 1, 3):
        extend(hashes, range(200), "salt", 64, until=until)
        assert tuple(hashes) == prefix_of(range(200), "salt", 64).hashes[:until]


def test_another_granule_size_makes_other_hashes() -> None:
    ids = [0] * 129
    assert not set(prefix_of(ids, "", 64).hashes) & set(prefix_of(ids, "", 128).hashes)
