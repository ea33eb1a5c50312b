"""Kept image tokens at their own places, against transformers with the same rows removed and `position_ids` kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import qap_gguf as qap
from conftest import Converted
from positions.language_files import Array, nmse
from qap_gguf import _core
from qap_gguf.convert import ConvertResult
from qap_gguf.convert.relabel import relabel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

LOGITS = 1e-5
BEFORE, BETWEEN, AFTER = [1, 300, 45, 301], [302, 46], [303, 47, 304]
#: text, or (rows of the image's first piece, numbers of the kept tokens or None for all)
Part = list[int] | tuple[Array, Array | None]


@dataclass
class Case:
    """One family, converted to f32 with kept positions; transformers' model beside it."""

    hf: Any
    vlm: qap.VisionModel
    plain: qap.VisionModel
    image: qap.ImageEmbedding
    pixels: Array

    @property
    def piece(self) -> Any:
        return self.image.pieces[0]

    @property
    def rows(self) -> Array:
        """All rows of the first piece."""
        return np.ascontiguousarray(self.image.features[: self.piece.n_rows])

    def kept(self, n_keep: int) -> tuple[Array, Array]:
        """Some rows of the first piece, spread unevenly, and the numbers of their tokens."""
        random = np.random.default_rng(n_keep)
        indices = np.sort(random.permutation(self.piece.n_tokens)[:n_keep]).astype(np.int32)
        return np.ascontiguousarray(self.rows[self.piece.rows_of(indices)]), indices

    def ours(self, parts: list[Part], positions: str, n_batch: int = 512, *, plain: bool = False) -> Array:
        """Logits after the prompt."""
        vlm = self.plain if plain else self.vlm
        language, size = vlm._language, (self.pixels.shape[1], self.pixels.shape[0])
        language.reset()
        for part in parts:
            if isinstance(part, list):
                language.prefill(part)
                continue
            chunks = vlm._encoder.tokenize(_core.media_marker(), [size], add_special=False)
            chunk = next(chunk for chunk in chunks if chunk.is_image)
            vlm._encoder.prefill(chunk, part[0], part[1], positions, n_batch)
        return np.asarray(vlm.last_logits())

    def theirs(self, parts: list[Part], *, keep: bool) -> Array:
        """The same by transformers: rows that are not kept are not there, positions are those of `keep`."""
        language = getattr(self.hf.model, "language_model", None) or self.hf.model.text_model
        embed, rows, places, start = self.hf.get_input_embeddings(), [], [], 0
        for part in parts:
            if isinstance(part, list):
                rows.append(embed(torch.tensor(part)))
                places.append(start + np.arange(len(part)))
                start += len(part)
                continue
            rows.append(torch.tensor(part[0]))
            own = np.arange(self.piece.n_rows) if part[1] is None else self.piece.rows_of(part[1])
            places.append(start + (own if keep else np.arange(len(own))))
            start += self.piece.n_rows if keep else len(own)
        embeds = torch.cat(rows)[None]
        with torch.no_grad():
            hidden = language(
                inputs_embeds=embeds,
                position_ids=torch.tensor(np.concatenate(places))[None],
                attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.int64),  # gaps are no new documents
                use_cache=False,
            ).last_hidden_state
            return np.asarray(self.hf.lm_head(hidden)[0, -1].numpy())


def llava(name: str, make_llava: Callable[..., Path], folder: Path) -> tuple[Any, ConvertResult]:
    language = name.partition(", ")[2] or "Llama"
    more = {"head_dim": 16} if language == "Qwen2" else {}
    source = make_llava(text={**more, "rms_norm_eps": 1e-3}, language=language)
    files = qap.convert(source, folder, quantize="F32", keep_positions=False, mmproj_type="f32", name="model")
    return transformers.LlavaForConditionalGeneration.from_pretrained(source).eval(), files


@pytest.fixture(scope="module", params=["llava", "llava, Mistral", "llava, Qwen2", "llava-next", "smolvlm", "internvl"])
def case(
    request: pytest.FixtureRequest,
    make_llava: Callable[..., Path],
    converted: Converted,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Case]:
    from families.checkpoints import FAMILIES

    name, folder = request.param, tmp_path_factory.mktemp("places")
    if name.startswith("llava") and name != "llava-next":
        (hf, files), (width, height) = llava(name, make_llava, folder), (28, 28)
    else:
        hf, _, files = converted(name)
        width, height = (200, 90) if name == "llava-next" else FAMILIES[name].image
    new = relabel(files.model, folder / "new.gguf")
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    settings: dict[str, Any] = {"n_ctx": 1024, "type_k": 0, "type_v": 0, "flash_attn": False, "verbose": False}
    first, second = (llama_cpp.Llama(str(path), **settings, n_threads=1) for path in (new, files.model))
    with (
        qap.VisionModel(files.mmproj, first, flash_attn=False, n_threads=1) as vlm,
        qap.VisionModel(files.mmproj, second, flash_attn=False, n_threads=1) as plain,
    ):
        yield Case(hf, vlm, plain, vlm.encode(pixels), pixels)
    first.close()
    second.close()


def test_the_file_says_what_a_place_is(case: Case) -> None:
    assert (case.vlm._encoder.places, case.plain._encoder.places) == ("index", "none")
    n = case.image.n_tokens
    cut = case.vlm.prune(case.image, qap.PruneConfig(n_keep=n // 2, positions="keep"))
    assert cut.positions.shape == (n // 2,)
    first = case.piece.token_rows(cut.pieces[0].indices)
    np.testing.assert_array_equal(first, cut.positions[: len(first)])
    assert case.vlm._encoder._native.tiles_why_not() is None
    with pytest.raises(qap.UnsupportedError, match="qap-gguf convert --keep-positions MODEL OUT"):
        case.plain.prune(case.image, qap.PruneConfig(n_keep=n // 2, positions="keep"))


def test_dense_is_what_the_original_file_gives(case: Case) -> None:
    parts: list[Part] = [BEFORE, (case.rows, None), AFTER]
    got, want = case.ours(parts, "auto"), case.ours(parts, "auto", plain=True)
    assert nmse(got, want) <= 1e-10
    assert case.vlm._language.n_past == case.plain._language.n_past
    assert nmse(got[: case.hf.lm_head.out_features], case.theirs(parts, keep=True)[: len(got)]) <= LOGITS


@pytest.mark.parametrize("part", [1, 2, 8], ids=["all", "half", "eighth"])
@pytest.mark.parametrize("positions", ["keep", "auto", "compact"])
def test_pruned_logits_equal_transformers(case: Case, part: int, positions: str) -> None:
    kept = case.kept(max(1, case.piece.n_tokens // part))
    parts: list[Part] = [BEFORE, kept, AFTER]
    want = case.theirs(parts, keep=positions != "compact")
    got = case.ours(parts, positions)[: len(want)]
    other = case.theirs(parts, keep=positions == "compact")
    error, wrong = nmse(got, want), nmse(got, other)
    print(f"\nNMSE {error:.1e} ({positions}), with the other positions {wrong:.1e}")
    assert error <= LOGITS
    assert part == 1 or wrong > 100 * LOGITS  # the two can be told apart
    text = len(BEFORE) + len(AFTER)
    assert case.vlm._language.n_past == text + (len(kept[0]) if positions == "compact" else case.piece.n_rows)
    assert case.vlm._language.n_kv == text + len(kept[0])


def test_all_tokens_kept_is_dense_bit_for_bit(case: Case) -> None:
    every = np.arange(case.piece.n_tokens, dtype=np.int32)
    dense = case.ours([BEFORE, (case.rows, None), AFTER], "auto")
    np.testing.assert_array_equal(case.ours([BEFORE, (case.rows, every), AFTER], "keep"), dense)


@pytest.mark.parametrize("n_batch", [512, 3])
def test_two_pictures_with_text_before_between_and_behind(case: Case, n_batch: int) -> None:
    n = case.piece.n_tokens
    parts: list[Part] = [BEFORE, case.kept(n // 2), BETWEEN, (case.rows, None), BETWEEN, case.kept(n // 4), AFTER]
    want = case.theirs(parts, keep=True)
    assert nmse(case.ours(parts, "keep", n_batch)[: len(want)], want) <= LOGITS


def test_a_picture_at_the_beginning(case: Case) -> None:
    parts: list[Part] = [case.kept(case.piece.n_tokens // 2), AFTER]
    want = case.theirs(parts, keep=True)
    assert nmse(case.ours(parts, "keep")[: len(want)], want) <= LOGITS
