"""More of probe.py: what the rows and the saved bytes of pruned image chunks are. Runs in child processes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dropin.probe import Mtmd, digest, packaged, pruning


def fused_rows(configs: list[dict[str, Any]], flash: bool, model: str | None = None) -> list[dict[str, Any]]:
    """Rows that libmtmd gives for a pruned chunk, beside those that VisionModel.prune keeps; same process."""
    import qap_gguf as qap

    mmproj, default, image = packaged()
    mtmd = Mtmd(mmproj, model or default, flash=flash)
    plain = mtmd.embeddings(mtmd.tokenize(image)[0])
    results = []
    with qap.VisionModel(mmproj, mtmd.llama, flash_attn=flash, n_threads=1) as vlm:
        whole = vlm.encode(image)
        for config in configs:
            cfg = qap.PruneConfig(**config)
            cut = vlm.prune(whole, cfg)
            with pruning(config, "unset"):
                (chunk,) = mtmd.tokenize(image)
            qap.set_default(None)  # tokens are counted when the prompt is tokenized: this changes nothing any more
            rows = mtmd.embeddings(chunk)
            results.append(
                {
                    "chunk": mtmd.describe(chunk),
                    "equal": bool(np.array_equal(rows, cut.features)),
                    "captured is plain": bool(np.array_equal(whole.features, plain)),
                    "rows are plain": bool(np.array_equal(rows, plain[cut.indices])),
                    "kept": cut.indices.tolist(),
                }
            )
    return results


def saved(model: str | None = None) -> dict[str, Any]:
    """A pruned chunk that was saved and loaded, copied, and made a placeholder."""
    import qap_gguf as qap

    mmproj, default, image = packaged()
    mtmd = Mtmd(mmproj, model or default, flash=True)
    lib = mtmd.lib
    with qap.use(qap.PruneConfig(n_keep=18)):
        (chunk,) = mtmd.tokenize(image)
    (dense,) = mtmd.tokenize(image)
    before = mtmd.save(chunk)
    rows = mtmd.embeddings(chunk)
    after = mtmd.save(chunk)
    loaded = lib.mtmd_input_chunk_load(before, len(before))
    again = lib.mtmd_input_chunk_load(after, len(after))
    chunks = {
        "fresh": chunk,
        "loaded": loaded,
        "loaded after encode": again,
        "placeholder": lib.mtmd_input_chunk_get_placeholder(chunk),
        "copy": lib.mtmd_input_chunk_copy(chunk),
        "dense": dense,
        "dense loaded": lib.mtmd_input_chunk_load(mtmd.save(dense), len(mtmd.save(dense))),
    }
    result: dict[str, Any] = {name: mtmd.describe(c) for name, c in chunks.items()}
    result["saved again"] = [mtmd.save(loaded) == before, mtmd.save(again) == after]
    result["dense bytes"] = digest(mtmd.save(dense))
    result["copy is equal"] = bool(np.array_equal(mtmd.embeddings(chunks["copy"]), rows))

    # a placeholder prefills saved embeddings, in as many cells as were kept
    past = ctypes.c_int32()
    pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    status = lib.mtmd_helper_decode_image_chunk(
        mtmd.ctx, mtmd.llama._ctx.ctx, loaded, pointer, 0, 0, 512, ctypes.byref(past),
        lib.mtmd_helper_post_decode_callback(), None,
    )  # fmt: skip
    result["prefill"] = [status, past.value, mtmd.cells()]
    return result


def damaged_saves(seed: int, model: str | None = None, **settings: Any) -> dict[str, Any]:
    """Loading the saved bytes of a pruned chunk cut short or changed; only our part is touched, not upstream's."""
    import qap_gguf as qap

    mmproj, default, image = packaged()
    mtmd = Mtmd(mmproj, model or default, flash=True)
    with qap.use(qap.PruneConfig(n_keep=18, **settings)):
        (chunk,) = mtmd.tokenize(image)
    mtmd.embeddings(chunk)
    whole, dense = mtmd.save(chunk), len(mtmd.save(mtmd.tokenize(image)[0]))
    rng = np.random.default_rng(seed)

    def kept(data: bytes) -> int | None:
        found = mtmd.lib.mtmd_input_chunk_load(data, len(data))
        if found is None:
            return None
        n = int(mtmd.describe(found)["n_tokens"][0])
        mtmd.lib.mtmd_input_chunk_free(found)
        return n

    # upstream's bytes are those of a dense chunk, but for the id, which names the plan
    start = next(n for n in range(dense, len(whole)) if kept(whole[:n]) is not None)
    cut = [kept(whole[:n]) for n in range(start + 1, len(whole))]
    flipped = []
    for _ in range(500):
        data = bytearray(whole)
        for at in rng.integers(start, len(whole), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        flipped.append(kept(bytes(data)))
    return {
        "whole": kept(whole),
        "without our part": kept(whole[:start]),
        "cut": sorted({str(n) for n in cut}),
        "refused": sum(n is None for n in flipped),
        "least": min((n for n in flipped if n is not None), default=1),
        "most": max((n for n in flipped if n is not None), default=1),
    }


def batches(model: str | None = None) -> dict[str, Any]:
    """Pruned and dense images through mtmd_batch, which upstream's server uses, beside one encode at a time."""
    import qap_gguf as qap

    mmproj, default, image = packaged()
    mtmd = Mtmd(mmproj, model or default, flash=True)
    lib = mtmd.lib
    with qap.use(qap.PruneConfig(n_keep=18)):
        pruned = mtmd.tokenize(image, 2)
    dense = mtmd.tokenize(image, 2)
    result: dict[str, Any] = {}
    for name, chunks in {"pruned": pruned, "dense": dense, "mixed": [pruned[0], dense[0]]}.items():
        alone = [mtmd.embeddings(chunk) for chunk in chunks]
        waiting, equal, rounds = list(range(len(chunks))), [], 0
        while waiting and rounds < 5:
            rounds += 1
            batch = lib.mtmd_batch_init(mtmd.ctx)
            taken = [i for i in waiting if lib.mtmd_batch_add_chunk(batch, chunks[i]) == 0]
            status = lib.mtmd_batch_encode(batch)
            for i in taken if status == 0 else []:
                rows = mtmd.read(lib.mtmd_batch_get_output_embd(batch, chunks[i]), chunks[i])
                equal.append(bool(np.allclose(rows, alone[i], rtol=1e-4, atol=1e-5)))
                waiting.remove(i)
            lib.mtmd_batch_free(batch)
        result[name] = {"equal": equal, "left": len(waiting), "rounds": rounds}
    return result


PROBES = (fused_rows, saved, damaged_saves, batches)
