"""The perplexity of quantised weights in several ways: how a text is scored, and what is a failure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.checkpoint import _tokenizer
from benchmarks.perplexity import CONTENDERS, failures, load, main, products, score
from tests.unit.engine.tiny import IDS, VOCAB, llama, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), llama(tie_word_embeddings=True))


def test_a_text_is_scored_by_windows(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [(31 * i + 7) % 256 for i in range(25)]
    found = score(model, ids, 12, 6)
    nats = 0.0
    for i in range(1, 25):  # the last window that begins early enough to give the most context
        begin = 0 if i < 12 else 6 * -(-(i - 11) // 6)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids[begin:i]])).logits[0, -1]
        nats -= float(logits.log_softmax(-1)[ids[i]])
    assert found.tokens == 24
    assert found.nats == pytest.approx(nats, rel=1e-5)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: sizes.append(given["input_ids"].shape[1]), with_kwargs=True)
    in_steps = score(model, ids, 12, 6, 4)
    assert (in_steps.tokens, in_steps.nats) == (24, pytest.approx(nats, rel=1e-5))
    assert sizes == [4, 4, 3] * 3 + [4, 2], "windows of 12, 12, 12 and 7 tokens, whose last is not fed"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_all_contenders_have_the_same_weights(folder: Path, quantization: str) -> None:
    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    eight = {"load_in_8bit": True, "llm_int8_threshold": 6.0}
    config = BitsAndBytesConfig(**(four if quantization == "nf4" else eight))
    found = {}
    for name, finish in CONTENDERS.items():
        model = load(folder, "cpu", torch.float32, config)
        finish(model, config)
        found[name] = score(model, IDS, 16, 8).nats
    assert found["headroom"] == pytest.approx(found["dequantised"], rel=1e-5)
    bound = 1e-5 if quantization == "nf4" else 0.05  # LLM.int8() rounds activations
    assert found["bitsandbytes"] == pytest.approx(found["dequantised"], rel=bound)
    assert found["headroom, head too"] != pytest.approx(found["headroom"], rel=1e-5)


def test_what_does_not_hold_is_said() -> None:
    good = {"dequantised": 10.0, "bitsandbytes": 10.005, "headroom": 10.001}
    assert failures("nf4", good) == []
    assert failures("int8", good) == []
    worse = {**good, "headroom": 10.02}
    assert failures("fp4", worse) == ["fp4: headroom is +0.150% off bitsandbytes, over 0.1%"]
    assert failures("int8", worse) == [
        "int8: headroom is +0.200% off dequantised, over 0.1%",
        "int8: headroom, 10.0200, is above LLM.int8(), 10.0050",
    ]
    assert len(failures("int8", {**good, "headroom": math.nan})) == 2


def test_kernels_of_products_are_counted_under_short_names() -> None:
    ran = {
        "skinny": 90,
        "void cutlass::Kernel2<gemm_bf16, 3>(Params)": 2,
        "void cutlass::Kernel2<gemm_bf16, 4>(Params)": 1,
        "dequantise_4bit_tiles_kernel": 1,
        "void at::native::vectorized_elementwise_kernel<4>(int)": 400,
        "cudaLaunchKernel": 500,
    }
    assert products(ran) == "90 skinny, 3 cutlass::Kernel2, 1 dequantise_4bit_tiles_kernel"


def test_several_texts_in_steps_of_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _tokenizer(VOCAB).save_pretrained(folder)  # bytes are its tokens
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text in texts:
        text.write_text("alpha beta")
    asked = ["--quantization", "nf4", "--device", "cpu", "--rows", "0,3", "--text", *map(str, texts)]
    assert main([str(folder), *asked]) == 0
    printed = capsys.readouterr().out
    sha256 = "1a989ea86150171c687b0727f218eedbb94c4665a7da9b0add1bf5de607f2bf1"  # of the words, by sha256sum
    assert printed.startswith(f"one.txt: sha256 {sha256}\ntwo.txt: sha256 {sha256}\n")
    for how in ("whole windows", "3 rows a step"):
        assert f"one.txt two.txt, {how}: 21 tokens scored" in printed
    assert printed.endswith("all within bounds\n")
