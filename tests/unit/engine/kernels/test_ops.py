"""The operators' contracts with PyTorch: schema, fake implementation, tracing."""

from __future__ import annotations

from typing import Any

import torch

from deployments.engine.kernels import ops  # noqa: F401 - registers the operators


def arguments4() -> tuple[Any, ...]:
    x, packed = torch.randn(2, 3, 128), torch.randint(0, 256, (48 * 64, 1), dtype=torch.uint8)
    return (x, packed, torch.rand(96), torch.randn(16), None, None, None, torch.randn(48), 48, 128, 64)


def arguments8() -> tuple[Any, ...]:
    codes = torch.randint(-127, 128, (48, 128), dtype=torch.int8)
    return (torch.randn(5, 128), codes, torch.rand(48), None, 48, 128)


def shifted(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With a second product of two columns, as GPTQ and AWQ have it."""
    return (*arguments[:4], torch.randn(2, 3, 2), torch.randn(48, 2), *arguments[7:])


def test_schema_and_fakes() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.headroom.linear_4bit, arguments4(), test_utils=checks)
    torch.library.opcheck(torch.ops.headroom.linear_8bit, arguments8(), test_utils=checks)
    torch.library.opcheck(torch.ops.headroom.linear_4bit_shifted, shifted(arguments4()), test_utils=checks)


def test_the_second_product_is_added() -> None:
    arguments = arguments4()
    more = shifted(arguments)
    expected = torch.ops.headroom.linear_4bit(*arguments) + more[4] @ more[5].t()
    torch.testing.assert_close(torch.ops.headroom.linear_4bit_shifted(*more), expected)


def test_traced_without_breaks() -> None:
    arguments = arguments4()
    op = torch.ops.headroom.linear_4bit
    compiled = torch.compile(lambda x: op(x, *arguments[1:]) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(arguments[0]), op(*arguments) * 2)
