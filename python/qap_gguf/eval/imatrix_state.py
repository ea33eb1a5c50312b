"""What a measurement of an importance matrix has summed so far: a file that is replaced in one step.

It holds the sums of each kind of row by themselves, so that the same measurement goes on where it was stopped, and its
result can be written with other weights without measuring again. A GGUF file of our own, not llama.cpp's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qap_gguf.convert.output.imatrix_sums import write_plain
from qap_gguf.errors import ConvertError, DataError, ModelFileError
from qap_gguf.files.atomic import replacing
from qap_gguf.files.gguf import read_gguf
from qap_gguf.language.collector import KINDS, Sums

VERSION = 1
_RUN, _DONE = "qap.imatrix.run", "qap.imatrix.done"
_SUMS, _COUNTS = ".in_sum2", ".counts"


class State:
    """The file beside an imatrix.

    Args:
        out: the imatrix; the file's name is this one with ``.state`` at its end.
        run: what the sums depend on, plain values. The file of another run is refused.
        force: begin anew where the file belongs to another run.

    Attributes:
        path: of the file.
        done: pieces of the data that are in `sums`.
        sums: what they gave, {} at the beginning.

    Raises:
        DataError: the file belongs to another run, or is damaged.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], *, force: bool = False) -> None:
        self.path = out.with_name(f"{out.name}.state")
        self._run = json.loads(json.dumps({"version": VERSION, "kinds": KINDS, **run}))
        self.done = 0
        self.sums: Sums = {}
        if self.path.exists():
            self._read(force)

    def _read(self, force: bool) -> None:
        try:
            keys = read_gguf(self.path).metadata
            found, done = json.loads(str(keys.get(_RUN))), keys.get(_DONE)
        except (ModelFileError, ValueError) as err:
            if force:
                return
            raise DataError(
                f"expected the state of a measurement, got another or a damaged file at {self.path}; say --force to "
                "begin anew"
            ) from err
        if found != self._run or not isinstance(done, int):
            if force:
                return
            theirs = found if isinstance(found, dict) else {}
            differs = [key for key, mine in self._run.items() if theirs.get(key) != mine]
            raise DataError(
                f"{self.path} belongs to a measurement with another {', '.join(differs) or 'form'}; choose another -o, "
                "or say --force to begin anew"
            )
        arrays = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(self.path).tensors}
        for name in [name.removesuffix(_SUMS) for name in arrays if name.endswith(_SUMS)]:
            self.sums[name] = arrays[name + _SUMS], arrays[name + _COUNTS]
        self.done = done

    def save(self, done: int, sums: Sums) -> None:
        """Replace the file.

        Raises:
            DataError: it cannot be written.
        """
        tensors: dict[str, Any] = {}
        for name, (values, counts) in sums.items():
            tensors |= {name + _SUMS: values, name + _COUNTS: counts}
        try:
            with replacing(self.path) as temporary:
                write_plain(temporary, {_RUN: json.dumps(self._run), _DONE: done}, tensors)
        except (OSError, ConvertError) as err:
            raise DataError(
                f"{self.path}: expected to write there, got {err}; free some space or choose another -o"
            ) from err
        self.done, self.sums = done, sums
