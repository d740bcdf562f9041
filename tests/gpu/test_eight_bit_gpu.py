"""int8 on a GPU: the bytes of bitsandbytes' own quantisation there, and no more memory than the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.functional import int8_vectorwise_quant

from deployments.engine.eight_bit import PART_ELEMENTS, int8_parameter, quantising_in_place

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator(device="cuda").manual_seed(n)
    return torch.randn(n, k, device="cuda", generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(48, 64), (14336, 4096), (4096, 14336)])
def test_the_bytes_are_bitsandbytes_own(n: int, k: int, dtype: torch.dtype) -> None:
    made = int8_parameter(weight(n, k, dtype))
    rounded, scales, _ = int8_vectorwise_quant(weight(n, k, dtype).to(torch.float16))
    assert made.device.type == made.SCB.device.type == "cuda"
    assert torch.equal(made.data, rounded)
    assert torch.equal(made.SCB, scales)
    assert made.CB.data_ptr() == made.data_ptr()


def test_beside_weight_and_result_there_is_a_part() -> None:
    whole = weight(14336, 4096, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    int8_parameter(whole)
    result = whole.numel() + 4 * whole.shape[0]
    assert torch.cuda.max_memory_allocated() - before <= result + 3 * PART_ELEMENTS + 2**20  # float16 and int8


def test_a_checkpoint_never_leaves_the_gpu_again(tmp_path: Path) -> None:
    """What `from_pretrained` makes in place is what transformers makes through main memory."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)

    def read() -> dict[str, torch.Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            dtype=torch.bfloat16,
            device_map={"": 0},
            quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
        )
        return dict(model.state_dict())

    expected = read()
    with quantising_in_place():
        found = read()
    assert sum(tensor.dtype == torch.int8 for tensor in found.values()) == 14
    assert all(torch.equal(found[name], expected[name]) for name in expected)
