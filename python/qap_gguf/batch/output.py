"""The file of results, which a run adds to and another run goes on with.

Rows are appended one by one and are on the disk before the next one is. What they depend on stands beside them, in
``NAME.settings.json``: a run with other settings does not go on with them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from qap_gguf.batch.results import COLUMNS, BatchResult, csv_record
from qap_gguf.errors import ConfigError, DataError
from qap_gguf.files.atomic import replacing, sync
from qap_gguf.files.journal import RecordFile, whole_records
from qap_gguf.files.regular import open_regular, read_text

VERSION: Final = 1
FORMS: Final = (".jsonl", ".ndjson", ".csv")


class Output:
    """Results in a file.

    Args:
        path: ends in .jsonl, .ndjson or .csv.
        settings: what the results depend on, plain values.
        is_openai: rows have the form of OpenAI's batch files.
        restart: take away what is there.
        retry_errors: take the rows with an error away, so that they are asked again.

    Attributes:
        known: ids of the rows that are there.
        n_errors: those among them with an error.

    Raises:
        ConfigError: another ending, or CSV for OpenAI's rows.
        DataError: the file was not written by a run with these settings, is damaged, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        is_openai: bool = False,
        restart: bool = False,
        retry_errors: bool = False,
    ) -> None:
        check_form(path, is_openai)
        self.path, self._is_csv, self._is_openai = path, path.suffix.lower() == ".csv", is_openai
        self.known: set[str] = set()
        self.n_errors = 0
        self._settings = json.loads(json.dumps({"version": VERSION, **settings}, default=str))
        self._beside = path.with_name(f"{path.name}.settings.json")
        is_new = restart or not path.exists() or not path.stat().st_size
        if not is_new:
            self._compare()
        self._file = RecordFile(path, self._refuse_none if restart else self._read, quoted=self._is_csv, durable=True)
        try:
            if is_new:
                self._file.clear()
                self._remember()
            elif retry_errors and self.n_errors:
                self._drop_errors()
            if self._is_csv and not path.stat().st_size:
                self._file.append(csv_record(list(COLUMNS)))
        except OSError as err:
            self._file.close()
            raise DataError(f"{path}: cannot write ({err.strerror or err}); choose another place") from err

    # --- settings ---

    def _compare(self) -> None:
        try:
            found = json.loads(read_text(self._beside))
        except (OSError, ValueError):
            found = None
        if found == self._settings:
            return
        if not isinstance(found, dict):
            raise DataError(
                f"{self.path}: expected a file of this command's with {self._beside.name} beside it, found none; "
                "choose another file, or say --restart to begin anew"
            )
        names = dict.fromkeys((*self._settings, *found))
        differs = [name for name in names if found.get(name) != self._settings.get(name)]
        raise DataError(
            f"{self.path} has rows of a run with another {', '.join(differs)}; choose another file, or say --restart "
            "to begin anew"
        )

    def _remember(self) -> None:
        with replacing(self._beside) as temporary:
            temporary.write_text(json.dumps(self._settings, indent=1, ensure_ascii=False) + "\n", "utf-8")
            sync(temporary)
        sync(self._beside.parent)

    # --- rows that are there ---

    @staticmethod
    def _refuse_none(_record: bytes, _number: int) -> bool:
        return True

    def _read(self, record: bytes, number: int) -> bool:
        if self._is_csv and number == 1:
            if record != csv_record(list(COLUMNS)):
                raise DataError(f"{self.path}: expected the columns {', '.join(COLUMNS)}; say --restart to begin anew")
            return True
        found = self._identify(record)
        if found is None:
            return False
        self.known.add(found[0])
        self.n_errors += found[1]
        return True

    def _identify(self, record: bytes) -> tuple[str, bool] | None:
        """The id of a record, and whether it has an error; None where it is no row of ours."""
        try:
            if self._is_csv:
                cells = dict(zip(COLUMNS, next(csv.reader(io.StringIO(record.decode(), newline=""))), strict=True))
                return cells["id"], bool(cells["error"])
            row = json.loads(record)
            if not self._is_openai:
                return str(row["id"]), row.get("error") is not None
            return str(row["custom_id"]), (row["response"] or {}).get("status_code") != 200
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, csv.Error):
            return None

    def _drop_errors(self) -> None:
        """Write the file anew without the rows that have an error, whole or not at all."""
        with replacing(self.path) as temporary:
            with temporary.open("wb") as new:
                for record in self._records():
                    found = self._identify(record) if record != csv_record(list(COLUMNS)) else ("", False)
                    if found is not None and not found[1]:
                        new.write(record)
            sync(temporary)
        sync(self.path.parent)
        self._file.close()
        self.known, self.n_errors = set(), 0
        self._file = RecordFile(self.path, self._read, quoted=self._is_csv, durable=True)

    def _records(self) -> Iterator[bytes]:
        with open_regular(self.path) as file:
            yield from whole_records(file, quoted=self._is_csv)

    # --- new rows ---

    def add(self, result: BatchResult) -> None:
        """Write a result; it is on the disk when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        self._file.append(result.to_record() if self._is_csv else result.to_line(self._is_openai))
        self.known.add(result.id)
        self.n_errors += result.error is not None

    def count(self) -> int:
        """Rows that are in the file, read from it: after an interruption in the middle of :meth:`add` too."""
        return sum(1 for _ in self._records()) - self._is_csv

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_form(path: Path, is_openai: bool = False) -> None:
    """`path` has an ending that says how rows are written.

    Raises:
        ConfigError: it has another.

    Example:
        >>> check_form(Path("out.txt"))
        Traceback (most recent call last):
        qap_gguf.errors.ConfigError: --out: expected a name that ends in .jsonl, .ndjson or .csv, got out.txt; rename it
    """
    if path.suffix.lower() not in FORMS:
        raise ConfigError(f"--out: expected a name that ends in .jsonl, .ndjson or .csv, got {path.name}; rename it")
    if is_openai and path.suffix.lower() == ".csv":
        raise ConfigError(f"--out: expected JSON lines for OpenAI's rows, got {path.name}; name it .jsonl")
