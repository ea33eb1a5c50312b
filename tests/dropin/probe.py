"""What runs in the child processes of these tests: libmtmd through llama-cpp-python's ctypes, and its stock handler.

Called as `python -m dropin.probe FUNCTION JSON-ARGUMENTS`; prints what the function returns as JSON. A function that
is told `package: false` leaves qap_gguf alone, and so talks to the stock libmtmd.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MARK = "PROBE-RESULT "
Array = npt.NDArray[np.float32]


def digest(data: bytes | Array) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()).hexdigest()


class Mtmd:
    """A libmtmd context made as the stock handler makes it."""

    def __init__(self, mmproj: str, model: str, *, flash: bool) -> None:
        import llama_cpp
        import llama_cpp.mtmd_cpp as lib

        self.lib: Any = lib
        self.llama = llama_cpp.Llama(model_path=model, n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
        params = lib.mtmd_context_params_default()
        params.print_timings = False
        params.n_threads = 1
        params.flash_attn_type = int(flash)
        self.ctx = lib.mtmd_init_from_file(mmproj.encode(), self.llama.model, params)
        if self.ctx is None:
            raise ValueError("mtmd_init_from_file failed")
        self.n_embd = int(self.llama.n_embd())

    def tokenize(self, image: str, n_images: int = 1) -> list[int]:
        """Image chunks of a prompt with n_images pictures; they live until the process ends."""
        lib, data = self.lib, Path(image).read_bytes()
        buffer = (ctypes.c_uint8 * len(data)).from_buffer(bytearray(data))
        bitmap = lib.mtmd_helper_bitmap_init_from_buf(self.ctx, buffer, len(data), False)
        text = b"a " + lib.mtmd_default_marker() * n_images + b" b"
        chunks = lib.mtmd_input_chunks_init()
        bitmaps = (lib.mtmd_bitmap_p_ctypes * n_images)(*[bitmap] * n_images)
        what = lib.mtmd_input_text(text, len(text), True, True)
        status = lib.mtmd_tokenize(self.ctx, chunks, ctypes.byref(what), bitmaps, n_images)
        if status != 0:
            raise ValueError(f"mtmd_tokenize failed with {status}")
        every = [lib.mtmd_input_chunks_get(chunks, i) for i in range(lib.mtmd_input_chunks_size(chunks))]
        return [c for c in every if lib.mtmd_input_chunk_get_type(c) == lib.MTMD_INPUT_CHUNK_TYPE_IMAGE]

    def embeddings(self, chunk: int) -> Array:
        if self.lib.mtmd_encode_chunk(self.ctx, chunk) != 0:
            raise ValueError("mtmd_encode_chunk failed")
        return self.read(self.lib.mtmd_get_output_embd(self.ctx), chunk)

    def read(self, pointer: Any, chunk: int) -> Array:
        n = self.lib.mtmd_input_chunk_get_n_tokens(chunk)
        return np.array(np.ctypeslib.as_array(pointer, shape=(n, self.n_embd)))

    def describe(self, chunk: int) -> dict[str, Any]:
        """Counts and decoder positions (from 7 on) of an image chunk."""
        lib = self.lib
        tokens = lib.mtmd_input_chunk_get_tokens_image(chunk)
        n = int(lib.mtmd_input_chunk_get_n_tokens(chunk))
        return {
            "n_tokens": [n, int(lib.mtmd_image_tokens_get_n_tokens(tokens))],
            "n_pos": [int(lib.mtmd_input_chunk_get_n_pos(chunk)), int(lib.mtmd_image_tokens_get_n_pos(tokens))],
            "positions": [lib.mtmd_image_tokens_get_decoder_pos(tokens, 7, i).t for i in range(n)],
        }

    def save(self, chunk: int) -> bytes:
        size = ctypes.c_size_t()
        self.lib.mtmd_input_chunk_save(chunk, None, 0, ctypes.byref(size))
        buffer = (ctypes.c_char * size.value)()
        assert self.lib.mtmd_input_chunk_save(chunk, buffer, size.value, ctypes.byref(size)) == 0
        return buffer.raw

    def cells(self) -> int:
        import llama_cpp

        memory = llama_cpp.llama_get_memory(self.llama._ctx.ctx)
        return int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) + 1


def packaged() -> tuple[str, str, str]:
    """The packaged files, found without importing the package."""
    import importlib.util

    spec = importlib.util.find_spec("qap_gguf")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "models" / "tiny_llava"
    return tuple(str(folder / n) for n in ("mmproj-f16.gguf", "tiny-llava-Q4_0.gguf", "sample.png"))  # type: ignore[return-value]


@contextlib.contextmanager
def pruning(default: Any, override: Any) -> Iterator[None]:
    """`default` and `override`: "unset", None, or the fields of a PruneConfig."""
    if default == override == "unset":
        yield
        return
    import qap_gguf as qap

    if default != "unset":
        qap.set_default(None if default is None else qap.PruneConfig(**default))
    with contextlib.ExitStack() as stack:
        if override != "unset":
            stack.enter_context(qap.use(None if override is None else qap.PruneConfig(**override)))
        yield


def failure(err: BaseException) -> dict[str, Any]:
    return {"error": type(err).__name__, "bases": [base.__name__ for base in type(err).__mro__], "text": str(err)}


# --- probes ---


def chat(
    settings: list[dict[str, Any]],
    package: bool = True,
    mmproj: str | None = None,
    n_images: int = 1,
    model: str | None = None,
    image: str | None = None,
) -> list[dict[str, Any]]:
    """Answers of the stock Llava15ChatHandler and the cells of the KV cache, for each of `settings`."""
    if package:
        import qap_gguf  # noqa: F401 - its import puts our libmtmd in place
    import llama_cpp
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    default_mmproj, default_model, sample = packaged()
    url = "data:image/png;base64," + base64.b64encode(Path(image or sample).read_bytes()).decode()
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for _ in range(n_images)]
    content.append({"type": "text", "text": "How many objects are there?"})
    results = []
    with contextlib.ExitStack() as stack:
        try:
            handler = Llava15ChatHandler(clip_model_path=mmproj or default_mmproj, verbose=False)
            llama = llama_cpp.Llama(
                model_path=model or default_model,
                chat_handler=handler,
                n_ctx=2048,
                n_threads=1,
                n_threads_batch=1,
                verbose=False,
            )
            stack.callback(llama.close)
        except Exception as err:
            return [failure(err)]
        for setting in settings:
            try:
                with pruning(setting.get("default", "unset"), setting.get("override", "unset")):
                    answer: Any = llama.create_chat_completion(
                        messages=[{"role": "user", "content": content}], temperature=0.0, max_tokens=1
                    )
                    cells = [int(llama.n_tokens), _cells(llama)]
                    answer = llama.create_chat_completion(
                        messages=[{"role": "user", "content": content}], temperature=0.0, max_tokens=12
                    )
                    results.append({"text": answer["choices"][0]["message"]["content"], "cells": cells})
            except Exception as err:
                results.append(failure(err))
    return results


def _cells(llama: Any) -> int:
    import llama_cpp

    return int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llama._ctx.ctx), 0)) + 1


def embed(
    package: bool = True,
    default: Any = "unset",
    override: Any = "unset",
    mmproj: str | None = None,
    picture: str | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Digests of an image's embeddings and of its saved chunk, without and with flash attention."""
    if package:
        import qap_gguf  # noqa: F401 - its import puts our libmtmd in place
    default_mmproj, default_model, image = packaged()
    result: dict[str, Any] = {}
    for flash in (False, True):
        mtmd = Mtmd(mmproj or default_mmproj, model or default_model, flash=flash)
        with pruning(default, override):
            (chunk,) = mtmd.tokenize(image)
        rows = mtmd.embeddings(chunk)
        result[f"flash={flash}"] = digest(rows)
        result |= {"shape": rows.shape, "finite": bool(np.isfinite(rows).all()), "saved": digest(mtmd.save(chunk))}
        result["chunk"] = mtmd.describe(chunk)
    return result


def libraries() -> dict[str, Any]:
    """Native libraries of a process that has used the stock handler and a VisionModel."""
    answers = chat([{}])
    import qap_gguf as qap

    with qap.VisionModel() as vlm:
        vlm.encode(qap.packaged_model().sample)
    return {"paths": qap.info()["libraries"], "answers": answers}


def in_threads() -> dict[str, Any]:
    """Tokens of an image in this thread and in another one, inside `use` and outside of it."""
    import qap_gguf as qap

    mmproj, model, image = packaged()
    mtmd = Mtmd(mmproj, model, flash=True)

    def count() -> int:
        return int(mtmd.describe(mtmd.tokenize(image)[0])["n_tokens"][0])

    def elsewhere() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(count()))
        thread.start()
        thread.join()
        return found[0]

    counts: dict[str, Any] = {"plain": [count(), elsewhere()]}
    with qap.use(qap.PruneConfig(n_keep=10)):
        counts["use"] = [count(), elsewhere()]
        with qap.use(qap.PruneConfig(n_keep=5)):
            counts["inner use"] = [count(), elsewhere()]
        counts["after it"] = [count(), elsewhere()]
    qap.set_default(qap.PruneConfig(n_keep=20))
    counts["default"] = [count(), elsewhere()]
    with contextlib.suppress(RuntimeError), qap.use(None):
        counts["use(None)"] = [count(), elsewhere()]
        raise RuntimeError
    counts["after an exception"] = [count(), elsewhere()]
    qap.set_default(None)
    counts["no default"] = [count(), elsewhere()]
    return counts


def vision(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case a VisionModel, an encode and an answer; or what was raised instead.

    A case may name mmproj, model, image, prompt, n_ctx and, as `prune`, the fields of a PruneConfig.
    """
    import qap_gguf as qap

    mmproj, model, image = packaged()
    results: list[dict[str, Any]] = []
    for case in cases:
        try:
            with qap.VisionModel(
                case.get("mmproj", mmproj), case.get("model", model), n_ctx=case.get("n_ctx", 2048), n_threads=1
            ) as vlm:
                found = vlm.encode(Path(case.get("image", image)))
                cfg = qap.PruneConfig(**case["prune"]) if "prune" in case else None
                text = vlm.generate([found, case.get("prompt", "How many objects are there?")], prune=cfg, max_tokens=4)
                results.append({"text": text, "n_tokens": found.n_tokens, "size": found.size})
        except Exception as err:
            results.append(failure(err))
    return results


def main() -> None:
    # the other probes live beside this file, to keep both short
    from dropin import probe_chunks

    name, arguments = sys.argv[1:]
    functions = {f.__name__: f for f in (chat, embed, libraries, in_threads, vision, *probe_chunks.PROBES)}
    print(MARK + json.dumps(functions[name](**json.loads(arguments))), flush=True)


if __name__ == "__main__":
    main()
