"""Pictures of every kind: those that Pillow reads come out right, the others are one line of ImageError."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

import qap_gguf as qap
from qap_gguf.vision.images import REFUSED_KINDS, load_image

Refuse = Callable[..., str]
Pixels = npt.NDArray[np.uint8]
GREY: Pixels = np.arange(240, dtype=np.uint8).reshape(12, 20)
RGB: Pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def grey_rgb(values: Pixels) -> Pixels:
    return np.repeat(values[:, :, None], 3, axis=2)


def test_grayscale() -> None:
    np.testing.assert_array_equal(load_image(saved(Image.fromarray(GREY), "PNG")), grey_rgb(GREY))
    np.testing.assert_array_equal(load_image(Image.fromarray(GREY)), grey_rgb(GREY))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    wide = GREY.astype(np.uint16) * 257
    np.testing.assert_array_equal(load_image(saved(Image.fromarray(wide), kind)), grey_rgb(GREY))


def test_32_bits_are_refused_rather_than_guessed() -> None:
    for values in (GREY.astype(np.int32), GREY.astype(np.float32) / 255):
        with pytest.raises(qap.ImageError, match="8 or 16 bits"):
            load_image(Image.fromarray(values))


def test_palette_with_and_without_transparency() -> None:
    image = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(load_image(saved(image, "PNG")), np.asarray(image.convert("RGB")))
    corner = image.getpixel((0, 0))
    clear = load_image(saved(image, "PNG", transparency=corner))
    assert clear[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(load_image(saved(image, "GIF")), np.asarray(image.convert("RGB")))


def test_alpha_is_laid_on_white() -> None:
    alpha = np.zeros((12, 20, 1), np.uint8)
    alpha[:, 10:] = 255
    alpha[0, 0] = 51  # a fifth
    found = load_image(saved(Image.fromarray(np.concatenate([RGB, alpha], axis=2)), "PNG"))
    np.testing.assert_array_equal(found[:, 10:], RGB[:, 10:])
    assert (found[1:, :10] == 255).all()
    assert np.abs(found[0, 0] - (0.2 * RGB[0, 0] + 0.8 * 255)).max() <= 1.0
    both = load_image(Image.fromarray(np.concatenate([GREY[:, :, None], alpha], axis=2)))  # LA
    np.testing.assert_array_equal(both[:, 10:], grey_rgb(GREY)[:, 10:])


def test_cmyk() -> None:
    flat = Image.new("RGB", (32, 32), (200, 60, 30)).convert("CMYK")
    found = load_image(saved(flat, "JPEG", quality=95))
    assert np.abs(found.astype(int) - [200, 60, 30]).max() <= 6


#: Every container that this Pillow writes with EXIF; a kind that it lacks (AVIF in some builds) is left out.
TURNED = [
    ("PNG", {}), ("JPEG", {"quality": 95}), ("MPO", {"quality": 95}), ("WEBP", {"lossless": True}), ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_deflate"}), ("AVIF", {"quality": 95}),
    ("JPEG2000", {}), ("HEIF", {}),
]  # fmt: skip
#: What each kind can hold; 16 bits are checked against our own scaling below.
MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "MPO": ("RGB",),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"),
    "AVIF": ("RGB", "RGBA"),
}


def of_mode(mode: str) -> Image.Image:
    """A picture that no turn leaves as it is."""
    if mode == "I;16":
        return Image.fromarray(GREY.astype(np.uint16) * 257)
    image = Image.fromarray(np.repeat(np.repeat(RGB, 2, axis=0), 2, axis=1))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.where(np.arange(40) < 13, 0, 255).astype(np.uint8)[None].repeat(24, axis=0)))
    return image.convert(mode)


def upright(data: bytes) -> Pixels:
    """What Pillow's own ``exif_transpose`` and a white ground make of a file."""
    with Image.open(io.BytesIO(data)) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.mode == "I;16":
            return grey_rgb(((np.asarray(turned).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
        if turned.mode in ("RGBA", "LA"):
            turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned.convert("RGBA"))
        return np.asarray(turned.convert("RGB"))


@pytest.mark.parametrize(
    ("kind", "settings", "mode"),
    [(kind, settings, mode) for kind, settings in TURNED for mode in MODES.get(kind, ())],
    ids=lambda value: value if isinstance(value, str) else "".join(map(str, value.values())),
)
def test_exif_orientation_in_every_container(kind: str, settings: dict[str, Any], mode: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    seen = set()
    for orientation in (*range(1, 9), *(() if settings.get("compression") else (99,))):  # libtiff writes no 99
        exif = Image.Exif()
        exif[0x0112] = orientation
        more = {"save_all": True, "append_images": [of_mode(mode)]} if kind == "MPO" else {}
        data = saved(of_mode(mode), kind, exif=exif, **settings, **more)
        found = load_image(data)
        np.testing.assert_array_equal(found, upright(data), err_msg=str(orientation))
        seen.add(found.tobytes())
        with Image.open(io.BytesIO(data)) as image:  # not decoded yet, and decoded already
            np.testing.assert_array_equal(load_image(image), found, err_msg=str(orientation))
            np.testing.assert_array_equal(load_image(image), found, err_msg=str(orientation))
    assert len(seen) == 8  # each turn is another picture; 99 is as it lies


def test_every_container_that_can_turn_is_tested() -> None:
    """A kind that keeps what it is given as EXIF and is not in the table above."""
    Image.init()
    turning = set()
    for kind in sorted(set(Image.SAVE) - REFUSED_KINDS):
        exif = Image.Exif()
        exif[0x0112] = 6
        try:
            data = saved(Image.fromarray(RGB), kind, exif=exif)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if image.getexif().get(0x0112) == 6 or image.size == (12, 20):
                    turning.add(image.format)
        except Exception:  # this kind takes no RGB, or is written only
            continue
    assert {"PNG", "JPEG", "WEBP", "TIFF"} <= turning
    assert turning <= {kind for kind, _ in TURNED}


def test_orientation_in_xmp_alone_turns_too() -> None:
    packet = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http:'
        b'//www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http:'
        b'//ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    data = saved(Image.fromarray(RGB), "WEBP", lossless=True, xmp=packet)
    np.testing.assert_array_equal(load_image(data), upright(data))
    assert load_image(data).shape == (20, 12, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])  # Pillow 13's writer of AVIF sequences crashes
def test_the_first_frame_of_many(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    more: dict[str, Any] = {} if kind == "GIF" else {"exif": exif}
    if kind == "WEBP":
        more["lossless"] = True
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    data = saved(first, kind, save_all=True, append_images=[second], **more)
    found = load_image(data)
    np.testing.assert_array_equal(found, upright(data))
    assert found.shape == ((12, 20, 3) if kind == "GIF" else (20, 12, 3))
    with Image.open(io.BytesIO(data)) as image:
        image.seek(1)  # a Pillow image stands at the frame that its owner chose
        second_seen = load_image(image)
        assert not np.array_equal(second_seen, found)


def test_the_model_sees_the_same_in_every_container(vlm: qap.VisionModel, packaged: qap.PackagedModel) -> None:
    with Image.open(packaged.sample) as image:
        image.load()
        plain = image.convert("RGB")
    expected = vlm.encode(packaged.sample).features
    opaque = plain.copy()
    opaque.putalpha(255)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: store it turned back
    things: list[Any] = [
        str(packaged.sample), packaged.sample.read_bytes(), plain, np.asarray(plain),
        np.asfortranarray(np.asarray(plain)),
        saved(opaque, "PNG"), saved(plain, "BMP"), saved(plain, "WEBP", lossless=True), saved(plain, "TIFF"),
        saved(plain.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif),
    ]  # fmt: skip
    for number, thing in enumerate(things):
        np.testing.assert_array_equal(vlm.encode(thing).features, expected, err_msg=str(number))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (3000, 10), (1, 40_000)])
def test_odd_sizes(vlm: qap.VisionModel, size: tuple[int, int]) -> None:
    width, height = size
    found = vlm.encode(np.full((height, width, 3), 90, np.uint8))
    assert found.features.shape == (144, 256)
    assert np.isfinite(found.features).all()
    assert found.size == size
    assert 1 <= found.n_real <= 144  # of a picture that is a line, nearly all is padding
    assert len(vlm.prune(found, qap.PruneConfig(n_keep=18)).indices) == min(18, found.n_real)


def bomb(width: int, height: int) -> bytes:
    """A PNG header that claims a size, with no pixels behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_what_is_no_picture(tmp_path: Path, packaged: qap.PackagedModel, refused: Refuse) -> None:
    png = packaged.sample.read_bytes()
    bad: dict[str, bytes] = {
        "text.png": b"This is not a picture.\n" * 20,
        "empty.png": b"",
        "half.png": png[: len(png) // 2],
        "header.png": png[:40],
        "bomb.png": bomb(60_000, 60_000),
        "large.png": bomb(12_000, 9_000),  # above Pillow's limit for a warning, below that for an error
        "long.png": bomb(100_000, 10),
        "zero.png": bomb(0, 0),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        for thing in (tmp_path / name, data):
            with pytest.raises(qap.ImageError) as error:
                load_image(thing)
            assert "\n" not in str(error.value), name
            assert str(error.value).count("image: ") == 1, error.value
    for name in ("text.png", "empty.png", "half.png", "bomb.png"):
        assert name in refused("--image", tmp_path / name)
    assert "check the path" in refused("--image", tmp_path / "missing.png")
    assert "image" in refused("--image", tmp_path)


BAD_THINGS: dict[str, Any] = {
    "None": None, "number": 3, "list": [[0, 0, 0]], "float array": RGB / 255.0, "two dimensions": GREY,
    "four channels": np.zeros((4, 4, 4), np.uint8), "batch": RGB[None], "no rows": RGB[:0], "no columns": RGB[:, :0],
    "too wide": np.zeros((1, 46_001, 3), np.uint8), "closed": Image.new("RGB", (2, 2)), "empty path": "",
    "nul in path": "a\0b",
}  # fmt: skip
BAD_THINGS["closed"].close()


@pytest.mark.parametrize("thing", BAD_THINGS.values(), ids=BAD_THINGS.keys())
def test_things_that_are_no_images(vlm: qap.VisionModel, thing: Any) -> None:
    with pytest.raises(qap.ImageError, match=r"^image: ") as error:
        vlm.encode(thing)
    assert "\n" not in str(error.value)


def test_damaged_files_of_every_container_raise_nothing_else() -> None:
    rng = np.random.default_rng(5)
    image = Image.fromarray(np.tile(RGB, (3, 2, 1)))
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PPM", "TGA"):
        whole = saved(image, kind)
        for _ in range(80):
            data = bytearray(whole)
            if rng.random() < 0.3:
                data = data[: rng.integers(1, len(data))]
            for at in rng.integers(0, min(len(data), int(rng.choice([60, 300, len(whole)]))), rng.integers(1, 6)):
                data[at] = rng.integers(0, 256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of some damage, which the test run makes an error
                try:
                    found = load_image(bytes(data))
                except qap.ImageError:
                    refused += 1
                else:
                    assert found.dtype == np.uint8
                    assert found.shape[2] == 3
    assert 100 < refused < 700
