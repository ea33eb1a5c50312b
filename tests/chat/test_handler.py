"""What the handler does by itself: pruning of a call, images in every form, errors before native code."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_grammar import LlamaGrammar
from PIL import Image

import qap_gguf as qap
from chat.conftest import QUESTION, content, image_url, text, user
from qap_gguf.errors import ConfigError, ImageError, ModelFileError, QapError, UnsupportedError

N = 144


def kept(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str, **settings: Any) -> int:
    handler(llama=llama, messages=user(image_url(uri), QUESTION), max_tokens=1, **settings)
    return handler.stats.n_image_kept


def test_the_nearest_setting_wins(llama: llama_cpp.Llama, packaged: qap.PackagedModel, uri: str) -> None:
    with qap.ChatHandler(packaged.mmproj) as handler:
        assert kept(handler, llama, uri) == N // 4
        qap.set_default(qap.PruneConfig(n_keep=50))
        try:
            assert kept(handler, llama, uri) == 50
            handler.prune = qap.PruneConfig(n_keep=40)
            assert kept(handler, llama, uri) == 40
            with qap.use(qap.PruneConfig(n_keep=30)):
                assert kept(handler, llama, uri) == 30
                with handler.use(qap.PruneConfig(n_keep=20)):
                    assert kept(handler, llama, uri) == 20
                    assert kept(handler, llama, uri, prune=qap.PruneConfig(n_keep=10)) == 10
                    assert kept(handler, llama, uri, prune=None) == N
                    with qap.use(None):
                        assert kept(handler, llama, uri) == N
                    found: list[int] = []
                    thread = threading.Thread(target=lambda: found.append(kept(handler, llama, uri)))
                    thread.start()
                    thread.join()
                    assert found == [40]  # blocks belong to their thread
        finally:
            qap.set_default(None)


def test_a_file_brings_its_own_default(
    llama: llama_cpp.Llama, packaged: qap.PackagedModel, uri: str, tmp_path: Any
) -> None:
    from dropin.gguf_copy import rewrite

    keyed = rewrite(packaged.mmproj, tmp_path / "keyed.gguf", {"qap.version": 1, "qap.n_keep": 12})
    with qap.ChatHandler(keyed) as handler:
        assert kept(handler, llama, uri) == 12
        assert kept(handler, llama, uri, prune=None) == N


def test_images_in_every_form(
    handler: qap.ChatHandler, llama: llama_cpp.Llama, packaged: qap.PackagedModel, uri: str
) -> None:
    picture = Image.open(packaged.sample).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    with qap.VisionModel() as vlm:
        encoded = vlm.encode(packaged.sample)
    forms: list[Any] = [
        image_url(uri),
        {"type": "image_url", "image_url": uri},
        {"type": "input_image", "image_url": uri},
        {"type": "image", "image": picture},
        image_url(str(packaged.sample)),
        image_url(packaged.sample.as_uri()),
        image_url(buffer.getvalue()),
        packaged.sample,
        bytearray(buffer.getvalue()),
        np.asarray(picture),
        encoded,
    ]
    for form in forms:
        answer = handler(llama=llama, messages=user(form, QUESTION), temperature=0)
        assert content(answer) == "house", form
        assert handler.stats.n_image_tokens == N


def test_several_images_are_seen_in_their_order(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str) -> None:
    blank = np.full((192, 192, 3), 255, np.uint8)
    cfg = qap.PruneConfig(n_keep=36, select="dpp")
    ids = []
    for images in ([image_url(uri), blank], [blank, image_url(uri)]):
        handler(llama=llama, messages=user(*images, QUESTION), prune=cfg, max_tokens=1)
        ids.append([token for token in llama.input_ids[: llama.n_tokens].tolist() if token < 0])
    assert len(ids[0]) == 2 * N  # positions: kept tokens stay at theirs
    assert ids[0][:N] == ids[1][N:] != ids[0][N:]
    assert (handler.stats.n_image_tokens, handler.stats.n_image_kept) == (2 * N, 72)


def test_a_text_prompt_after_an_image_reuses_nothing_of_it(
    handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str
) -> None:
    """llama-cpp-python compares token ids with what it evaluated last; an image's positions never match text."""
    words = [5] * 60
    expected = llama.create_completion(words, temperature=0, max_tokens=4)["choices"][0]["text"]  # type: ignore[index]
    handler(llama=llama, messages=user(image_url(uri), QUESTION), max_tokens=1)
    assert llama.create_completion(words, temperature=0, max_tokens=4)["choices"][0]["text"] == expected  # type: ignore[index]


def gbnf(text: str) -> LlamaGrammar:
    return LlamaGrammar.from_string(text, verbose=False)


BAD: dict[str, tuple[dict[str, Any], type[QapError], str]] = {
    "no messages": ({"messages": []}, ConfigError, "messages"),
    "a text": ({"messages": "hello"}, ConfigError, "messages"),
    "no role": ({"messages": [{"content": "a"}]}, ConfigError, "role"),
    "a number": ({"messages": user(5)}, ConfigError, "type text or image_url"),
    "audio": ({"messages": user({"type": "input_audio", "input_audio": {}})}, ConfigError, "input_audio"),
    "no url": ({"messages": user({"type": "image_url", "image_url": {}})}, ConfigError, "image_url"),
    "marker": ({"messages": user("a <__media__> b")}, ConfigError, "marker"),
    "surrogate": ({"messages": user("\ud800")}, ConfigError, "surrogate"),
    "null": ({"messages": user("a\x00b")}, ConfigError, "null"),
    "a web address": ({"messages": user(image_url("http://example/a.png"))}, ImageError, "not fetched"),
    "a missing file": ({"messages": user(image_url("no/such.png"))}, ImageError, "no/such.png"),
    "not base64": ({"messages": user(image_url("data:image/png;base64,@@@"))}, ImageError, "base64"),
    "not a picture": ({"messages": user(b"hello")}, ImageError, "picture"),
    "too long": ({"messages": user("word " * 500)}, ConfigError, "n_ctx"),
    "temperature": ({"temperature": float("nan")}, ConfigError, "temperature"),
    "top_p": ({"top_p": 2.0}, ConfigError, "top_p"),
    "repeat_penalty": ({"repeat_penalty": 0.0}, ConfigError, "repeat_penalty"),
    "seed": ({"seed": 2**40}, ConfigError, "seed"),
    "stop": ({"stop": [""]}, ConfigError, "stop"),
    "bias": ({"logit_bias": {"99999999": 1.0}}, ConfigError, "logit_bias"),
    "grammar": ({"grammar": gbnf("root ::= (")}, ConfigError, "GBNF"),
    "deep grammar": ({"grammar": gbnf("root ::= " + "(" * 5000 + '"a"' + ")" * 5000)}, ConfigError, "nested"),
    "long grammar": ({"grammar": gbnf('root ::= "' + "a" * 300_000 + '"')}, ConfigError, "characters"),
    "a grammar that ends nowhere": ({"grammar": gbnf('root ::= "\\x00"'), "max_tokens": 5}, ConfigError, "no token"),
    "no grammar": ({"grammar": 'root ::= "a"'}, ConfigError, "LlamaGrammar"),
    "schema": ({"response_format": {"type": "json_object", "schema": {"$ref": "#/no"}}}, ConfigError, "schema"),
    "format": ({"response_format": {"type": "xml"}}, ConfigError, "response_format"),
    "tool": ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "a"}}}, ConfigError, "tool_choice"),
    "tools": ({"tools": [{}]}, ConfigError, "tools"),
    "prune": ({"prune": 32}, ConfigError, "PruneConfig"),
    "a signal it lacks": ({"prune": qap.PruneConfig(semantic="clip_text")}, UnsupportedError, "semantic"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "kind", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(
    handler: qap.ChatHandler,
    llama: llama_cpp.Llama,
    uri: str,
    settings: dict[str, Any],
    kind: type[QapError],
    words: str,
) -> None:
    arguments = {"messages": user(image_url(uri), QUESTION), "max_tokens": 1, **settings}
    with pytest.raises(kind, match=words) as caught:
        handler(llama=llama, **arguments)
    assert "\n" not in str(caught.value)


def test_a_grammar_with_brackets_in_its_strings(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str) -> None:
    many = "(" * 300
    grammar = gbnf(f'root ::= "{many}" [{many}] # {many}')
    answer = handler(llama=llama, messages=user(image_url(uri), QUESTION), grammar=grammar, temperature=0.5, seed=1)
    assert content(answer) == many + "("


def test_a_handler_without_its_file(packaged: qap.PackagedModel) -> None:
    for path in ("no-such.gguf", packaged.model, packaged.sample):
        with pytest.raises(ModelFileError):
            qap.ChatHandler(path)
    with pytest.raises(ConfigError, match="chat_format"):
        qap.ChatHandler(packaged.mmproj, chat_format="best")


def test_a_response_format_of_openai(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str) -> None:
    schema = {"type": "object", "properties": {"thing": {"enum": ["house", "tree"]}}, "required": ["thing"]}
    for form in ({"type": "json_object", "schema": schema}, {"type": "json_schema", "json_schema": {"schema": schema}}):
        answer = handler(llama=llama, messages=user(image_url(uri), QUESTION), temperature=0, response_format=form)
        assert content(answer).replace(" ", "") in ('{"thing":"house"}', '{"thing":"tree"}')


def test_both_a_bias_and_a_processor(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str) -> None:
    seen: list[int] = []

    def look(_ids: Any, logits: Any) -> Any:
        seen.append(len(logits))
        return logits

    processors: Any = [look]
    answer = handler(
        llama=llama,
        messages=user(image_url(uri), QUESTION),
        logits_processor=processors,
        logit_bias={llama.tokenize(b"tree", add_bos=False)[0]: 100.0},
        max_tokens=2,
    )
    assert seen == [llama.n_vocab()] * 2
    assert content(answer).startswith("tree")
    assert processors == [look]


def test_a_draft_model_gets_no_image_ids(packaged: qap.PackagedModel, uri: str) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    texts = []
    for draft in (None, LlamaPromptLookupDecoding(num_pred_tokens=8, max_ngram_size=1)):
        with qap.ChatHandler(packaged.mmproj) as handler:
            llm = llama_cpp.Llama(
                str(packaged.model),
                chat_handler=handler,
                n_ctx=448,
                n_threads=1,
                n_threads_batch=1,
                draft_model=draft,
                verbose=False,
            )
            messages: Any = user(text("house is here: "), image_url(uri), text("house is here: house is here:"))
            texts.append(content(llm.create_chat_completion(messages, temperature=0, max_tokens=6)))
            llm.close()
    assert texts[0] == texts[1]


def test_a_handler_serves_one_model_after_another(packaged: qap.PackagedModel, uri: str) -> None:
    with qap.ChatHandler(packaged.mmproj) as handler:
        for _ in range(2):
            llm = llama_cpp.Llama(
                str(packaged.model), chat_handler=handler, n_ctx=448, n_threads=1, n_threads_batch=1, verbose=False
            )
            messages: Any = user(image_url(uri), QUESTION)
            assert content(llm.create_chat_completion(messages, temperature=0)) == "house"
            gone = weakref.ref(llm)
            gc.disable()
            try:
                del llm
                assert gone() is None  # no cycle keeps a model alive until the collector comes
            finally:
                gc.enable()
    with pytest.raises(QapError, match="closed"):
        handler(llama=llama_cpp.Llama(str(packaged.model), n_ctx=64, verbose=False), messages=messages)


def test_a_stream_that_was_overtaken_says_so(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str) -> None:
    messages = user(image_url(uri), "List the objects in row order.")
    first = handler(llama=llama, messages=messages, stream=True, temperature=0, max_tokens=20)
    next(first)
    assert content(handler(llama=llama, messages=user(image_url(uri), QUESTION), temperature=0)) == "house"
    with pytest.raises(QapError, match="newer one"):
        list(first)
