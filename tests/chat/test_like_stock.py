"""At K = N and temperature 0 the handler gives what llama-cpp-python's own handlers give, in the same shapes."""

from __future__ import annotations

import json
from typing import Any

import llama_cpp
import pytest
from llama_cpp import llama_chat_format
from llama_cpp.llama_grammar import LlamaGrammar

import qap_gguf as qap
from chat.conftest import QUESTION, image_url, text, user

TOOL = {
    "type": "function",
    "function": {
        "name": "place",
        "parameters": {"type": "object", "properties": {"row": {"enum": [1, 2]}}, "required": ["row"]},
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "longer": {"max_tokens": 12},
    "repeat penalty": {"max_tokens": 12, "repeat_penalty": 1.4},
    "stop": {"stop": ["column", "."], "max_tokens": 12},
    "seeded": {"temperature": 0.9, "seed": 7, "max_tokens": 6},
    "grammar": {"grammar": LlamaGrammar.from_string('root ::= "row " [1-4]', verbose=False)},
    "json": {"response_format": {"type": "json_object"}, "max_tokens": 10},
    "schema": {"response_format": {"type": "json_object", "schema": {"enum": ["house", "tree"]}}},
    "tools, free": {"tools": [TOOL], "tool_choice": "auto", "max_tokens": 6},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "max_tokens": 4},
    "bias": {"logit_bias": {"1000": 50.0}, "max_tokens": 2},
    "named": {"model": "mine", "max_tokens": 1},
}


FORCED: dict[str, dict[str, Any]] = {
    "tool": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "place"}}},
    "function": {"functions": [TOOL["function"]], "function_call": {"name": "place"}},
}


def plain(completion: Any) -> list[Any]:
    """A completion or its chunks, without what differs from call to call; logprobs to five decimals."""

    def tidy(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: tidy(v, k) for k, v in value.items() if k not in ("id", "created")}
        if isinstance(value, list):
            return [tidy(v) for v in value]
        return round(float(value), 5) if key == "logprob" else value

    return [tidy(part) for part in ([completion] if isinstance(completion, dict) else completion)]


@pytest.fixture(scope="module")
def stock(packaged: qap.PackagedModel) -> Any:
    return llama_chat_format.Llava15ChatHandler(clip_model_path=str(packaged.mmproj), verbose=False)


@pytest.fixture(scope="module")
def ours(packaged: qap.PackagedModel) -> qap.ChatHandler:
    # stock leaves flash attention off in the encoder where the Llama has it off; logprobs see the difference
    cfg = qap.PruneConfig(keep_ratio=1.0)
    return qap.ChatHandler(packaged.mmproj, cfg, chat_format="llava-1-5", flash_attn=False)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_same_as_llava15(
    llama: llama_cpp.Llama, stock: Any, ours: qap.ChatHandler, uri: str, settings: dict[str, Any], stream: bool
) -> None:
    results = []
    for handler in (stock, ours):
        llama.chat_handler = handler
        settings_ = {"temperature": 0.0, **settings}
        messages: Any = user(image_url(uri), text(QUESTION))
        results.append(plain(llama.create_chat_completion(messages, stream=stream, **settings_)))
    assert results[0] == results[1]
    assert len(results[1]) > 2 or not stream


@pytest.mark.parametrize("settings", FORCED.values(), ids=FORCED.keys())
def test_a_forced_tool_as_in_llava15(
    llama: llama_cpp.Llama, stock: Any, ours: qap.ChatHandler, uri: str, settings: dict[str, Any]
) -> None:
    """The same call in the same shape; white space within the arguments is that of llama.cpp's grammar here."""
    found = []
    for handler in (stock, ours):
        llama.chat_handler = handler
        messages: Any = user(image_url(uri), text(QUESTION))
        (whole,) = plain(llama.create_chat_completion(messages, temperature=0.0, **settings))
        del whole["usage"]
        message = whole["choices"][0]["message"]
        for function in (message["function_call"], *(call["function"] for call in message["tool_calls"])):
            function["arguments"] = json.loads(function["arguments"])
        chunks: Any = llama.create_chat_completion(messages, temperature=0.0, stream=True, **settings)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        streamed = "".join(call["function"]["arguments"] for d in deltas for call in d.get("tool_calls") or ())
        found.append((whole, json.loads(streamed)))
    assert found[0] == found[1]


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_same_as_the_handler_for_ggufs_with_a_template(
    llama: llama_cpp.Llama, packaged: qap.PackagedModel, uri: str, n_images: int
) -> None:
    """That one writes no line break after an image, so the question brings it along."""
    template = llama.metadata["tokenizer.chat_template"].replace("<image>\\n", "<image>")
    stock = llama_chat_format.MTMDChatHandler(clip_model_path=str(packaged.mmproj), verbose=False)
    with qap.ChatHandler(packaged.mmproj, qap.PruneConfig(keep_ratio=1.0), chat_template=template) as ours:
        texts = []
        for handler in (stock, ours):
            llama.chat_handler = handler
            messages: Any = [
                {"role": "system", "content": "Be brief."},
                *user(*[image_url({"url": uri}["url"])] * n_images, text("\n" + QUESTION)),
                {"role": "assistant", "content": "house"},
                *user(text("And in row 1, column 1?")),
            ]
            texts.append(plain(llama.create_chat_completion(messages, temperature=0, max_tokens=10)))
    assert texts[0] == texts[1]
