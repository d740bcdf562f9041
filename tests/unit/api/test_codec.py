"""Prompts and conversations to ids: one BOS, the template's own, and the end tokens."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deployments.api.codec import TextCodec, end_ids
from deployments.errors import BadRequest, ConfigError
from tests.unit.api.conftest import END, TEMPLATE

TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def made(tokenizer: Any, template: str | None = None) -> TextCodec:
    return TextCodec(tokenizer, vocab_size=len(tokenizer), end_ids=(), chat_template=template)


async def test_plain_text_gets_the_tokenizers_special_tokens(tokenizer: Any) -> None:
    ids = await made(tokenizer).encode("hello")
    assert list(ids) == tokenizer("hello").input_ids
    assert ids[0] == tokenizer.bos_token_id


async def test_bos_is_never_doubled(tokenizer: Any) -> None:
    assert await made(tokenizer).encode("<|bos|>hello") == await made(tokenizer).encode("hello")


async def test_conversation_equals_transformers(tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert list(await made(tokenizer).encode_chat(TALK)) == expected


async def test_a_template_that_writes_bos_gives_one(tokenizer: Any) -> None:
    ids = await made(tokenizer, "{{ bos_token }}" + TEMPLATE).encode_chat(TALK)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


async def test_long_text_is_encoded_off_the_event_loop(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, threads = made(tokenizer), []
    encode = codec._ids

    def spy(text: str, *, add_special: bool) -> tuple[int, ...]:
        threads.append(threading.current_thread() is threading.main_thread())
        return encode(text, add_special=add_special)

    monkeypatch.setattr(codec, "_ids", spy)
    await codec.encode("a" * 100)
    await codec.encode("a" * 5000)
    await codec.encode_chat([{"role": "user", "content": "a" * 5000}])
    assert threads == [True, False, False]


async def test_no_template_names_the_setting(tokenizer: Any) -> None:
    bare = made(tokenizer)
    bare._template = None
    with pytest.raises(BadRequest, match="`chat_template`"):
        await bare.encode_chat(TALK)


async def test_the_templates_own_refusal_is_told(tokenizer: Any) -> None:
    strict = made(tokenizer, "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}")
    with pytest.raises(BadRequest, match="No system here") as refusal:
        await strict.encode_chat(TALK)
    assert refusal.value.param == "messages"


async def test_tool_messages_need_a_template_that_renders_them(tokenizer: Any) -> None:
    talk = [*TALK, {"role": "tool", "content": "42", "tool_call_id": "x"}]
    assert await made(tokenizer).encode_chat(talk)
    deaf = made(tokenizer, "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}")
    with pytest.raises(BadRequest, match="role 'tool'") as refusal:
        await deaf.encode_chat(talk)
    assert refusal.value.param == "messages[2].role"


async def test_template_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("only {{ messages[0].content }}")
    ids = await made(tokenizer, str(path)).encode_chat(TALK)
    assert tokenizer.decode(ids) == "only be brief"


def test_bad_templates_end_the_start(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chat_template, line 1"):
        made(tokenizer, "{% for %}")
    with pytest.raises(ConfigError, match="nowhere"):
        made(tokenizer, str(tmp_path / "nowhere.jinja"))


@pytest.mark.parametrize(
    ("generation", "config", "eos", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 1}, 6, (5, 6)),
        ({"eos_token_id": 5}, {}, 7, (5, 7)),
        ({}, {"eos_token_id": 1}, None, (1,)),
        ({}, {"eos_token_id": [1, 2]}, 2, (1, 2)),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, None, (0,)),
        ({}, {}, None, ()),
    ],
)
def test_end_ids(generation: dict[str, Any], config: dict[str, Any], eos: int | None, expected: tuple[int]) -> None:
    assert end_ids(generation, config, eos) == expected


async def test_load_from_a_folder(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    codec = TextCodec.load(tmp_path)
    assert codec.vocab_size == 300
    assert codec.end_ids == (1, 2, tokenizer.convert_tokens_to_ids(END))
    assert await codec.encode_chat(TALK) == await made(tokenizer).encode_chat(TALK)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer in") as refusal:
        TextCodec.load(tmp_path)
    assert "\n" not in str(refusal.value)


async def test_embedded_model(demo_folder: Path) -> None:
    codec = TextCodec.load(demo_folder)
    reference: Any = AutoTokenizer.from_pretrained(str(demo_folder))
    expected = reference.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert list(await codec.encode_chat(TALK)) == expected
    assert list(await codec.encode("The cat  sat,\n déjà vu 😀")) == reference("The cat  sat,\n déjà vu 😀").input_ids
    assert codec.end_ids == (reference.convert_tokens_to_ids("<|im_end|>"),)
    text = "Naïve café — 東京 😀 don't  stop .\n"
    ids = await codec.encode(text)
    detokenizer = codec.detokenizer()
    assert "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()]) == text


def test_code_in_a_tokenizers_folder_is_not_run(tokenizer: Any, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    tokenizer.save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Tokenizer: ...\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokenizer)}))
    assert TextCodec.load(folder).vocab_size == len(tokenizer)
    assert not ran.exists()
