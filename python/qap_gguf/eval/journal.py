"""What an evaluation remembers on disk: answers, so that it can go on where it was stopped, and encoded pictures.

The journal is JSON lines (``files/journal.py``): a header with what answers depend on, then one line for each answer,
written at once. A line that cannot be read is an error, but for a last one that was cut off.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from qap_gguf.errors import DataError
from qap_gguf.eval.data import Question
from qap_gguf.eval.methods import Variant
from qap_gguf.eval.runner import Outcome, Setup
from qap_gguf.files.journal import RecordFile

VERSION: Final = 1

Key = tuple[str, str, str, int]


class Journal:
    """Answers of an evaluation, in memory and in a file.

    Args:
        path: the file; made where it is missing.
        header: what every answer depends on, plain values. A file with another header is refused.
        models: name of a setup's model -> :func:`fingerprint` of its file.
        force: start anew where the file belongs to another run.

    Attributes:
        n_known: answers that the file held.

    Raises:
        DataError: the file belongs to another run, is damaged, or cannot be written.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], models: Mapping[str, str] | None = None, force: bool = False
    ) -> None:
        self.path = path
        self._models = {} if models is None else dict(models)
        self._header = json.loads(json.dumps({"version": VERSION, **header}))
        self._known: dict[Key, dict[str, Any]] = {}
        self._force, self._is_ours = force, False
        self._file = RecordFile(path, self._read)
        if not self._is_ours:  # new, or another run's
            self._known.clear()
            self._file.clear()
            self._file.append(json.dumps(self._header).encode() + b"\n")
        self.n_known = len(self._known)

    def _read(self, record: bytes, number: int) -> bool:
        """Take a record of the file: the header, or an answer."""
        try:
            row = json.loads(record)
        except ValueError:
            row = None
        if number == 1:
            self._is_ours = row == self._header
            if not (self._is_ours or self._force):
                theirs = row if isinstance(row, dict) else {}
                differs = [key for key, mine in self._header.items() if theirs.get(key) != mine]
                raise DataError(
                    f"{self.path} belongs to a run with another {', '.join(differs) or 'header'}; choose another "
                    "folder, or say --force to begin anew"
                )
            return True
        if self._is_ours:
            try:
                self._known[row["model"], row["kv"], row["variant"], row["number"]] = row
            except (KeyError, TypeError) as err:
                raise DataError(f"{self.path}, line {number}: no answer; delete the line, or say --force") from err
        return True

    def _model(self, setup: Setup) -> str:
        return f"{setup.model} {self._models[setup.model]}" if setup.model in self._models else setup.model

    def get(self, setup: Setup, variant: Variant, number: int, question: Question) -> Outcome | None:
        """The outcome of question `number`, if it is known."""
        row = self._known.get((self._model(setup), setup.kv, variant.key, number))
        if row is None or len(row["said"]) != len(variant.configs):
            return None
        return Outcome(question, variant, tuple(row["said"]), row["n_kept"], tuple(row["prefill_s"]), setup)

    def add(self, outcome: Outcome, number: int) -> None:
        """Write an outcome down; it is in the file when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        row = {
            "model": self._model(outcome.setup), "kv": outcome.setup.kv, "variant": outcome.variant.key,
            "number": number, "said": outcome.said, "n_kept": outcome.n_kept,
            "prefill_s": [float(f"{second:.4g}") for second in outcome.prefill_s],
        }  # fmt: skip
        self._file.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EmbeddingFolder(MutableMapping[Any, Any]):
    """Encoded pictures by path and early drop, in a folder of this process's own (pickles: nobody else's are read)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Any, Path] = {}

    def __getitem__(self, key: Any) -> Any:
        return pickle.loads(self._files[key].read_bytes())

    def __setitem__(self, key: Any, image: Any) -> None:
        file = self._files.setdefault(key, self._folder / f"{len(self._files)}.pickle")
        file.write_bytes(pickle.dumps(image, protocol=5))

    def __delitem__(self, key: Any) -> None:
        self._files.pop(key).unlink()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
