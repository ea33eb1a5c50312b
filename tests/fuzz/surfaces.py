"""What strangers and careless programs hand to this package, made from seeds: one class for each surface.

A surface makes a case (plain JSON, so that it can be kept in corpus/) and runs it: the answer is a result that holds
what is promised, or an error of ours in one line. Anything else is an AssertionError. tools/fuzz/fuzz_surfaces.py runs
them for long.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol

import numpy as np

import qap_gguf as qap
from qap_gguf.config import ERRORS, METADATA_TYPES, OUTLIERS, SELECTORS
from qap_gguf.errors import QapError

Case = Any
SECONDS = 20

#: Values that JSON can hold and that nobody expects.
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 65536, 2**31, 2**63, 10**30, -(2**63), 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "5", "\0", "two\nlines", "caf\u00e9", "\ud83d\udc36", "a" * 5000, [], {}, [1], [[[]]],
    {"a": 1}, ["a", "b"],
)  # fmt: skip


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A case that takes longer than 20 seconds is a finding too."""

    def late(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line(err: QapError) -> None:
    """Our errors say something, in one line."""
    text = str(err)
    if not text.strip() or "\n" in text or len(text) > 4000:
        raise AssertionError(f"expected one line of error, got {text[:400]!r}") from err


class Checkpoint:
    """Edits of a checkpoint's JSON files and damage to the bytes of any of its files, converted to F16."""

    name: ClassVar[str] = "checkpoint"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(path.name for path in folder.iterdir() if path.is_file())
        self.json = {name: json.loads((folder / name).read_text()) for name in self.files if name.endswith(".json")}
        raw = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        self.header, self.data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def make(self, rng: random.Random) -> Case:
        """One to three edits: a value in JSON, a value in the safetensors header, or bytes."""
        return [self._edit(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]

    def _edit(self, rng: random.Random) -> Case:
        if rng.random() < 0.35:
            name = rng.choice(self.files)
            size = (self.folder / name).stat().st_size
            at = rng.randrange(min(size, rng.choice((16, 400, size))))
            if rng.random() < 0.3:
                return {"file": name, "cut": at}
            return {"file": name, "at": at, "bytes": rng.randbytes(rng.choice((1, 1, 4, 8))).hex()}
        if rng.random() < 0.4:
            return {"file": "model.safetensors", "path": some_path(rng, self.header), **change(rng)}
        name = rng.choice(list(self.json))
        return {"file": name, "path": some_path(rng, self.json[name]), **change(rng)}

    def write(self, case: Case, target: Path) -> None:
        """The checkpoint with the edits, in a new folder."""
        shutil.copytree(self.folder, target)
        parsed: dict[str, Any] = {}
        for edit in case:
            name = edit["file"]
            path = target / name
            if "path" in edit:
                header = name == "model.safetensors"
                value = parsed.setdefault(name, json.loads(json.dumps(self.header if header else self.json[name])))
                parsed[name] = replace_at(value, edit["path"], edit)
                text = json.dumps(parsed[name]).encode()
                path.write_bytes(struct.pack("<Q", len(text)) + text + self.data if header else text)
            elif "cut" in edit:
                path.write_bytes(path.read_bytes()[: edit["cut"]])
            elif "text" in edit:
                path.write_bytes(edit["text"].encode() * edit.get("times", 1))
            else:
                data, new = path.read_bytes(), bytes.fromhex(edit["bytes"])
                path.write_bytes(data[: edit["at"]] + new + data[edit["at"] + len(new) :])

    def run(self, case: Case) -> str:
        """Convert; what comes of it is a pair that the gate lets pass, or an error that leaves nothing behind."""
        with tempfile.TemporaryDirectory() as work:
            self.write(case, Path(work) / "in")
            out = Path(work) / "out"
            try:
                with limited():
                    made = qap.convert(Path(work) / "in", out, quantize="F16", name="m")
            except QapError as err:
                one_line(err)
                if out.exists():
                    raise AssertionError(f"left behind: {sorted(path.name for path in out.iterdir())}") from err
                return "refused"
            from qap_gguf.files.gguf import check_pair

            check_pair(made.mmproj, made.model, 64)
            return "converted"


def some_path(rng: random.Random, value: Any) -> list[Any]:
    """A place in a JSON value, deeper ones as likely as shallow ones."""
    path: list[Any] = []
    while isinstance(value, (dict, list)) and value and (not path or rng.random() < 0.8):
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        path.append(key)
        value = value[key]
    return path


def change(rng: random.Random) -> dict[str, Any]:
    """What becomes of the place: dropped, added to, or another value."""
    what = rng.randrange(4)
    if what == 0:
        return {"drop": True}
    if what == 1:
        return {"add": rng.choice((-1, 1, 64, 2**31))}
    return {"value": rng.choice(ODD)}


def replace_at(value: Any, path: list[Any], edit: dict[str, Any]) -> Any:
    """`value` with the place at `path` changed; places that an earlier edit removed are left alone."""
    if not path:
        if "add" in edit:
            return (
                value + edit["add"] if isinstance(value, (int, float)) and not isinstance(value, bool) else edit["add"]
            )
        return edit.get("value")
    key, *rest = path
    try:
        inner = value[key]
    except (KeyError, IndexError, TypeError):
        return value
    if not rest and "drop" in edit:
        del value[key]
    else:
        value[key] = replace_at(inner, rest, edit)
    return value


class SentencePiece:
    """Damage to a tokenizer.model, which the converter reads by itself."""

    name: ClassVar[str] = "sentencepiece"

    def __init__(self) -> None:
        self.whole = sentencepiece_model()

    def make(self, rng: random.Random) -> Case:
        """Bytes replaced, a cut, or a repeated stretch."""
        at = rng.randrange(len(self.whole))
        what = rng.randrange(4)
        if what == 0:
            return {"cut": at}
        if what == 1:
            return {"at": at, "bytes": "80", "times": rng.choice((1, 10, 200_000))}
        return {"at": at, "bytes": rng.randbytes(rng.choice((1, 1, 2, 5))).hex(), "times": 1}

    def run(self, case: Case) -> str:
        """Read it; a vocabulary has 256 bytes and as many scores as tokens."""
        from qap_gguf.convert.tokenizers.spm import from_model

        if "cut" in case:
            data = self.whole[: case["cut"]]
        else:
            new = bytes.fromhex(case["bytes"]) * case["times"]
            data = self.whole[: case["at"]] + new + self.whole[case["at"] + len(new) :]
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "tokenizer.model"
            path.write_bytes(data)
            try:
                with limited():
                    vocabulary = from_model(path)
            except QapError as err:
                one_line(err)
                return "refused"
        if len(vocabulary.tokens) != len(vocabulary.scores):
            raise AssertionError("tokens and scores differ in number")
        return "read"


def sentencepiece_model() -> bytes:
    """A small tokenizer.model: unknown, begin, end, all bytes, and some pieces (protobuf, written by hand)."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{i:02X}>", 0.0, 6) for i in range(256))]
    pieces += [(text, -float(i), 1) for i, text in enumerate(("\u2581", "a", "b", "ab", "\u2581a", "\u2581ab"))]
    out = b""
    for text, score, kind in pieces:
        body = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
        body += b"\x18" + bytes([kind])
        out += b"\x0a" + bytes([len(body)]) + body
    trainer, normalizer = b"\x18\x02", b"\x18\x01\x20\x00\x28\x01"
    return out + b"\x12" + bytes([len(trainer)]) + trainer + b"\x1a" + bytes([len(normalizer)]) + normalizer


class Metadata:
    """``qap.*`` keys of any value, as a program that reads the file's metadata passes them on."""

    name: ClassVar[str] = "metadata"

    def make(self, rng: random.Random) -> Case:
        """Some keys with values that are right, nearly right, or odd."""
        near = ("dpp", "int4", "none", "auto", "average", 0.5, 1.0, 18, 128, True, 1)
        keys = rng.sample([*METADATA_TYPES, "qap.unknown", "qap.", "general.name"], rng.randrange(1, 6))
        case = {key: rng.choice((*ODD, *near)) for key in keys}
        if rng.random() < 0.8:
            case["qap.version"] = 1
        return case

    def run(self, case: Case) -> str:
        """A config that goes through its own keys unchanged, or an error."""
        try:
            config = qap.PruneConfig.from_metadata(case)
        except QapError as err:
            one_line(err)
            return "refused"
        if config is None:
            return "none"
        if qap.PruneConfig.from_metadata(config.to_metadata()) != config:
            raise AssertionError(f"{config} does not survive its own keys")
        return "read"


class Arguments:
    """Arguments of score, select and PruneConfig: arrays of any shape, type, order and content, and odd settings."""

    name: ClassVar[str] = "arguments"

    def make(self, rng: random.Random) -> Case:
        """A seed for the arrays, and what is odd about them."""
        settings: dict[str, Any] = {}
        known = {
            "keep_ratio": (0.1, 1.0), "n_keep": (1, 5), "alpha": (0.0, 0.5, "dynamic"), "error": ERRORS,
            "group_size": (1, 7, 128), "outlier": OUTLIERS, "outlier_weight": (0.0, 1.0), "select": SELECTORS,
            "semantic": ("auto", "none"), "seed": (0, 1), "merge": ("none", "average"),
        }  # fmt: skip
        for key in rng.sample(list(known), rng.randrange(4)):
            settings[key] = rng.choice(ODD) if rng.random() < 0.15 else rng.choice(known[key])
        odd_types = ("float64", "float16", "int32", "complex64", "object", "bool")
        return {
            "seed": rng.randrange(2**32),
            "shape": [rng.choice((1, 2, 3, 17, 64)), rng.choice((1, 5, 32, 128, 256))],
            "dtype": "float32" if rng.random() < 0.9 else rng.choice(odd_types),
            "scale": rng.choice((0.0, 1e-38, 1e-20, 1.0, 1.0, 1e4, 1e20, 1e31)),
            "order": "C" if rng.random() < 0.9 else rng.choice(("F", "strided", "reversed")),
            "poison": None if rng.random() < 0.9 else rng.choice(("nan", "inf", "-inf")),
            "semantic": rng.choice((None, None, "ones", "random", "short", "nan")),
            "settings": settings,
            "n_keep": 1 if rng.random() < 0.6 else rng.choice((2, 5, 0, -1, 10**9, 1.5, True, "3", None)),
            "method": rng.choice(SELECTORS) if rng.random() < 0.8 else rng.choice(ODD),
        }

    def run(self, case: Case) -> str:
        """Scores within their ranges and exactly K ascending indices, or an error."""
        rng = np.random.default_rng(case["seed"])
        x = _array(case, rng)
        semantic = _semantic(case["semantic"], case["shape"][0], rng)
        ends = []
        try:
            cfg = qap.PruneConfig(**case["settings"])
            weights = np.ones(case["shape"][1], np.float32) if cfg.error == "model" else None
            scores = qap.score(x, cfg, semantic, channel_weights=weights, n_threads=1)
        except QapError as err:
            one_line(err)
            ends.append("refused")
            total: Any = rng.random(case["shape"][0]).astype(np.float32)
        else:
            total = scores.total
            for part in (scores.total, scores.sensitivity, scores.semantic):
                if not ((part >= -1e-6) & (part <= 1 + 1e-6)).all():
                    raise AssertionError(f"expected scores in [0, 1], got {part.min()} to {part.max()}")
            ends.append("scored")
        try:
            kept = qap.select(total, case["n_keep"], features=x, method=case["method"])
        except QapError as err:
            one_line(err)
            ends.append("refused")
        else:
            if len(kept) != case["n_keep"] or (np.diff(kept) <= 0).any() or kept[0] < 0 or kept[-1] >= len(total):
                raise AssertionError(f"expected {case['n_keep']} ascending indices, got {kept}")
            ends.append("selected")
        return " and ".join(ends)


def _array(case: Case, rng: np.random.Generator) -> Any:
    with np.errstate(all="ignore"):
        x: Any = (rng.standard_normal(case["shape"]) * case["scale"]).astype(np.float32)
    if case["poison"] is not None:
        x[rng.integers(x.shape[0]), rng.integers(x.shape[1])] = float(case["poison"])
    if case["order"] == "F":
        x = np.asfortranarray(x)
    elif case["order"] == "strided":
        x = np.repeat(x, 2, axis=1)[:, ::2]
    elif case["order"] == "reversed":
        x = x[::-1]
    if case["dtype"] != "float32":
        with np.errstate(all="ignore"):
            x = np.nan_to_num(x).astype(case["dtype"])
    return x


def _semantic(kind: str | None, n: int, rng: np.random.Generator) -> Any:
    if kind is None:
        return None
    if kind == "random":
        return rng.standard_normal(n).astype(np.float32)
    return np.full(n + (kind == "short"), np.nan if kind == "nan" else 1.0, np.float32)


class Questions:
    """Lines of the file that ``qap-gguf eval`` reads."""

    name: ClassVar[str] = "questions"

    def make(self, rng: random.Random) -> Case:
        """Rows with odd values, and lines that are no JSON."""
        rows: list[Any] = []
        for _ in range(rng.randrange(1, 4)):
            row: Any = {"image": "a.png", "question": "How many?", "answer": "four", "kind": "count"}
            for key in rng.sample([*row, "extra"], rng.randrange(3)):
                row[key] = rng.choice(ODD)
            rows.append(rng.choice((row, row, row, rng.choice(ODD), json.dumps(row)[: rng.randrange(40)])))
        return rows

    def run(self, case: Case) -> str:
        """Questions with texts, or an error."""
        from qap_gguf.eval import load_questions

        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "a.png").write_bytes(qap.packaged_model().sample.read_bytes())
            lines = [row if isinstance(row, str) else json.dumps(row) for row in case]
            (Path(work) / "q.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
            try:
                with limited():
                    found = load_questions(Path(work) / "q.jsonl")
            except QapError as err:
                one_line(err)
                return "refused"
        if not found or not all(isinstance(question.text, str) and question.text for question in found):
            raise AssertionError(f"expected questions with texts, got {found}")
        return "read"


class Surface(Protocol):
    """What makes cases and runs them."""

    name: ClassVar[str]

    def make(self, rng: random.Random) -> Case:
        """A case, plain JSON."""

    def run(self, case: Case) -> str:
        """How it ended; AssertionError where a promise is broken."""
