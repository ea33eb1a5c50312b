"""Limits on pictures, both sides of each, and kinds of picture that only people who mean harm would make."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.children import run_probe
from qap_gguf.vision import images
from qap_gguf.vision.images import load_image

Pixels = npt.NDArray[np.uint8]
RGB: Pixels = np.random.default_rng(1).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with that header and these chunks, true or not."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [(b"IHDR", head), *chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + body


def refusal(source: Any) -> str:
    with pytest.raises(qap.ImageError) as error:
        load_image(source)
    text = str(error.value)
    assert text.startswith("image: ")
    assert "\n" not in text
    return text


# --- the limits ---


def test_pixels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pillow's own limit, which a program may set: at it a picture is read, one pixel more is refused."""
    data = saved(Image.fromarray(RGB), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    sources: list[Any] = [data, tmp_path / "a.png", Image.fromarray(RGB), RGB]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 240)
    for source in sources:
        np.testing.assert_array_equal(load_image(source), RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 239)
    for source in sources:
        assert "pixels" in refusal(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a program's way to say that it trusts its pictures
    for source in sources:
        np.testing.assert_array_equal(load_image(source), RGB)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    """20,000 x 20,000: 400 million pixels by the header. Pillow alone warns above 89 million and fails above 178."""
    row = zlib.compress(bytes(1 + 3 * 20_000))
    assert "too many pixels" in refusal(png(20_000, 20_000, (b"IDAT", row)))
    assert "too many pixels" in refusal(png(9_500, 9_500, (b"IDAT", row)))  # 90 million
    assert "cannot be decoded" in refusal(png(9_000, 9_000, (b"IDAT", row[:20])))  # within the limit, and no pixels


def test_sides() -> None:
    for shape in ((46_000, 1, 3), (1, 46_000, 3)):
        assert load_image(np.zeros(shape, np.uint8)).shape == shape
    for shape in ((46_001, 1, 3), (1, 46_001, 3)):
        assert "sides up to 46000" in refusal(np.zeros(shape, np.uint8))


def test_the_smallest_and_the_longest_are_encoded(vlm: qap.VisionModel) -> None:
    for width, height in ((1, 1), (1, 10_000), (10_000, 1)):
        found = vlm.encode(saved(Image.new("RGB", (width, height), (10, 200, 30)), "PNG"))
        assert found.size == (width, height)
        assert np.isfinite(found.features).all()


def test_bytes_of_a_file(tmp_path: Path) -> None:
    """A file of exactly the limit is read (what follows a PNG's end is nobody's business); a byte more is refused."""
    path = tmp_path / "long.png"
    path.write_bytes(saved(Image.fromarray(RGB), "PNG"))
    os.truncate(path, images.MAX_BYTES)
    np.testing.assert_array_equal(load_image(path), RGB)
    os.truncate(path, images.MAX_BYTES + 1)
    assert str(images.MAX_BYTES + 1) in refusal(path)


def test_bytes_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.fromarray(RGB), "PNG")
    monkeypatch.setattr(images, "MAX_BYTES", len(data))
    np.testing.assert_array_equal(load_image(data), RGB)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    assert str(len(data)) in refusal(data)


def test_only_regular_files(tmp_path: Path) -> None:
    """A pipe that nobody writes to, and a device without an end, would be read for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        for path in (tmp_path / "pipe.png", tmp_path / "s.png", tmp_path, Path("/dev/zero")):
            assert "pipe or device" in refusal(path)
    (tmp_path / "link.png").symlink_to("/dev/zero")
    assert "pipe or device" in refusal(tmp_path / "link.png")


def test_names_that_cannot_be_printed(tmp_path: Path) -> None:
    for name in ("two\nlines.png", "esc\x1b[2J.png"):
        (tmp_path / name).write_bytes(b"no picture")
        assert "\x1b" not in refusal(tmp_path / name)
        assert ascii(name)[1:-1] in refusal(tmp_path / name)


# --- kinds ---


def test_a_program_is_no_picture() -> None:
    """EPS would be handed to Ghostscript; it is not asked."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    assert "expected a picture that Pillow can read" in refusal(eps)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    settings: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    np.testing.assert_array_equal(load_image(data), np.asarray(frames[0]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "La", "RGBa", "PA"])
def test_modes_in_memory(mode: str) -> None:
    """What ``Image.convert("RGB")`` makes of them, transparency laid on white."""
    source = Image.fromarray(RGB).convert("RGBA")
    steps = {"La": ["LA"], "RGBa": ["RGBA"], "PA": ["P"]}.get(mode, [])
    image = source if mode in ("LA", "La", "RGBA", "RGBa") else source.convert("RGB")
    for step in (*steps, mode):
        image = image.convert(step)
    found = load_image(image)
    assert found.shape == (12, 20, 3)
    plain = image.convert("LA") if mode == "La" else image
    expected = plain.convert("RGBA").convert("RGB") if mode in ("La", "PA") else plain.convert("RGB")
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_a_mode_without_a_way_to_rgb() -> None:
    lab = ImageCms.applyTransform(
        Image.fromarray(RGB),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert lab is not None
    try:
        expected = np.asarray(lab.convert("RGB"))
    except ValueError:
        assert "cannot be decoded" in refusal(lab)
    else:
        np.testing.assert_array_equal(load_image(lab), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_that_cannot_be_read_turns_nothing(kind: str) -> None:
    """Every byte of the EXIF block damaged in turn: pixels come out, upright or as they lie."""
    image = Image.fromarray(np.tile(RGB, (2, 2, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    settings: dict[str, Any] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    settings |= {"lossless": True} if kind == "WEBP" else {}
    blob = exif.tobytes()
    shapes = set()
    for at in range(len(blob)):
        damaged = blob[:at] + bytes([blob[at] ^ 0xFF]) + blob[at + 1 :]
        shapes.add(load_image(saved(image, kind, exif=damaged, **settings)).shape)
    assert shapes <= {(24, 40, 3), (40, 24, 3)}
    assert len(shapes) == 2


def test_a_text_chunk_that_unpacks_to_gigabytes() -> None:
    bomb = b"note\0\0" + zlib.compress(bytes(80 * 2**20), 9)
    rows = zlib.compress(bytes(12 * (1 + 60)))
    assert "cannot be decoded" in refusal(png(20, 12, (b"zTXt", bomb), (b"IDAT", rows)))
    assert load_image(png(20, 12, (b"zTXt", b"note\0\0" + zlib.compress(b"a")), (b"IDAT", rows))).shape == (12, 20, 3)


# --- the drop-in library, whose pictures stb_image decodes ---


def test_sides_in_the_stock_handler(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    """clip.h asserts on sides above 46,000: the library refuses the picture before."""
    for width, error in ((46_000, None), (46_001, "ValueError")):
        Image.new("RGB", (width, 1)).save(tmp_path / "long.png")
        (result,) = run_probe("chat", mmproj=packaged.mmproj, image=tmp_path / "long.png", settings=[{}])
        assert result.get("error") == error, result
