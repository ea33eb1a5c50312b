"""Encodes the packaged sample once for each config, and tells what was copied to the host: by our own count, and by
count_reads.c, which test_bytes.py has preloaded into this process.

    python probe.py '[{"n_keep": 18}, null]'      # null: a dense encode that notes the attention
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.language.llama import LanguageModel
from qap_gguf.language.opener import open_llama
from qap_gguf.vision.images import load_image


def main(configs: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """One row for each config."""
    qap.set_image_cache(0)  # every encode is counted
    counter = ctypes.CDLL(None)
    for name in ("count_bytes", "count_largest"):
        getattr(counter, name).restype = ctypes.c_longlong
    files = qap.packaged_model()
    llama = open_llama(files.model, n_ctx=64, n_threads=1, verbose=False)
    encoder = _core.Encoder(
        mmproj=str(files.mmproj), model=LanguageModel(llama).model_address, device="CPU", n_threads=1, flash_attn=None,
        max_tokens=None, verbose=False,
    )  # fmt: skip
    pixels = load_image(files.sample)
    rows = []
    for config in configs:
        with qap.use(None if config is None else qap.PruneConfig(**config)):
            chunks = encoder.tokenize(_core.media_marker(), [pixels], add_special=False, parse_special=True)
        (chunk,) = [chunk for chunk in chunks if chunk.is_image]
        counter.count_reset()
        features = encoder.encode(chunk, capture=config is None)
        counted, largest = counter.count_bytes(), counter.count_largest()
        report = chunk.report()
        assert report is not None
        arrays = {name: int(a.size) for name, a in report.items() if getattr(a, "dtype", None) == "float32"}
        rows.append(
            {
                "n_total": report["n_total"], "n_keep": report["n_keep"], "n_embd": int(features.shape[1]),
                "arrays": arrays, "reported": report["bytes_read"], "counted": counted, "largest": largest,
            }
        )  # fmt: skip
    encoder.close()
    llama.close()
    return rows


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
