"""Frames of a video, by libmtmd's own reader (mtmd-helper.h), which runs ffmpeg and ffprobe of the system.

What is ours is :func:`novelty`: how much of a frame differs from the one before it. Prior work that gives repeated
frames fewer tokens: vLLM's efficient video sampling (EVS), VidCom2 (arXiv 2505.14454).
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from qap_gguf.errors import ConfigError, ImageError, UnsupportedError

Frame = npt.NDArray[np.uint8]
SUFFIXES: Final = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv")
CELLS: Final = 24  #: a frame is compared in 24 x 24 cells, about the patches of a tower
CHANGED: Final = 6.0  #: mean difference of a cell's colours, 0..255, from which it counts as changed
_MOST_SECONDS: Final = 3600.0
_PROBE_S: Final = 60


def check_every(seconds: Any) -> float:
    """Seconds between frames, checked.

    Example:
        >>> check_every(2)
        2.0
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0.01 <= seconds <= _MOST_SECONDS:
        raise ConfigError(f"every: expected seconds in 0.01..{_MOST_SECONDS:g}, got {seconds!r}; 1 is a frame a second")
    return float(seconds)


def _size(path: Path) -> tuple[int, int]:
    """Width and height as ffprobe has them: libmtmd's reader makes room for what a header claims, whatever it is."""
    if not (shutil.which("ffprobe") and shutil.which("ffmpeg")):
        raise UnsupportedError("video: expected ffmpeg and ffprobe on this machine, found none; install ffmpeg")
    words = [
        "ffprobe",
        "-v",
        "error",
        "-select_streams",
        "v:0",
        "-show_entries",
        "stream=width,height",
        "-of",
        "csv=p=0",
    ]
    try:
        done = subprocess.run(
            [*words, str(path)], capture_output=True, text=True, errors="replace", check=False, timeout=_PROBE_S
        )
        width, height = (int(word) for word in done.stdout.split("\n")[0].strip(",").split(","))
    except (OSError, ValueError, subprocess.TimeoutExpired) as err:
        raise ImageError(f"{path}: expected a video that ffprobe reads, got another file; check it") from err
    return width, height


def frames(path: Path, every: float) -> Iterator[tuple[float, Frame]]:
    """The frames of a video, one after another.

    Args:
        path: a file that ffmpeg reads. ffmpeg is no guard: files of strangers belong into a sandbox.
        every: seconds between frames.

    Returns:
        (seconds from the beginning, pixels of shape (height, width, 3)).

    Raises:
        ImageError: no video, or frames larger than Pillow's limit on pixels.
        UnsupportedError: no ffmpeg on this machine.
    """
    import llama_cpp.mtmd_cpp as lib

    every = check_every(every)
    path = path.resolve()  # begins with a slash: neither an option of ffmpeg nor one of its protocols
    if not path.is_file():
        raise ImageError(f"video: expected a file, found none at {path}; check the path")
    width, height = _size(path)
    most = Image.MAX_IMAGE_PIXELS or math.inf
    if not (width > 0 and height > 0 and width * height <= most):
        raise ImageError(f"{path}: expected frames of at most {most:g} pixels, got {width} x {height}; scale it down")
    params = lib.mtmd_helper_video_init_params(1.0 / every, None, 0)
    video = lib.mtmd_helper_video_init(None, str(path).encode(), params)
    if video is None:
        raise ImageError(f"{path}: expected a video that ffmpeg reads, got another file; check it")
    chars = ctypes.POINTER(ctypes.c_char_p)
    free = ctypes.CDLL(None).free
    free.argtypes, free.restype = [ctypes.c_void_p], None
    try:
        bitmap, text, n = ctypes.c_void_p(), ctypes.c_void_p(), 0
        while lib.mtmd_helper_video_read_next(video, ctypes.byref(bitmap), ctypes.cast(ctypes.byref(text), chars)) == 0:
            if not bitmap.value:
                free(text)  # "Video:", which we have no use for
                continue
            frame: Any = bitmap.value
            try:
                shape = (lib.mtmd_bitmap_get_ny(frame), lib.mtmd_bitmap_get_nx(frame), 3)
                data = ctypes.string_at(lib.mtmd_bitmap_get_data(frame), lib.mtmd_bitmap_get_n_bytes(frame))
            finally:
                lib.mtmd_bitmap_free(frame)
            yield n * every, np.frombuffer(data, np.uint8).reshape(shape)
            n += 1
    finally:
        lib.mtmd_helper_video_free(video)
    if n == 0:
        raise ImageError(f"{path}: expected frames, ffmpeg found none; check the file")


def novelty(before: Frame | None, frame: Frame) -> float:
    """The part of a frame's 24 x 24 cells whose colours differ from those of the frame before it, in [0, 1].

    Args:
        before, frame: pixels of shape (height, width, 3); None stands before the first frame.

    Example:
        >>> import numpy as np
        >>> black = np.zeros((48, 48, 3), np.uint8)
        >>> half = black.copy()
        >>> half[:24] = 200
        >>> novelty(None, black), novelty(black, black), novelty(black, half)
        (1.0, 0.0, 0.5)
    """
    if before is None or before.shape != frame.shape:
        return 1.0
    now, then = (
        np.asarray(Image.fromarray(pixels).resize((CELLS, CELLS), Image.Resampling.BOX), np.float32)
        for pixels in (frame, before)
    )
    return float((np.abs(now - then).mean(axis=2) >= CHANGED).mean())
