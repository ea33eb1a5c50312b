"""GGUF pairs from the Hugging Face hub: a language model and its mmproj by the id of their repository.

As users of llama.cpp and llama-cpp-python know it: ``owner/name:QUANT`` (``-hf``), or a repository with names or
patterns of files (``from_pretrained``). huggingface_hub does the work: its cache, its progress bars, its tokens, and
``HF_HUB_OFFLINE``. Without network, files that are in the cache are found there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from qap_gguf.arguments import one_line
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.files.parts import part_of

_ID: Final = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?::([\w.-]+))?")
#: What a repository without a wish gives, the first that it has; llama.cpp begins with the same.
_QUANTS: Final = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q4_0", "Q8_0")
#: In names of what is no whole model: importance matrices, and models that draft tokens (common/download.cpp).
_SIDE: Final = ("imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_MMPROJ: Final = ("f16", "bf16", "q8_0", "f32")


@dataclass(frozen=True)
class HubFiles:
    """Paths in the hub's cache.

    Attributes:
        model: the language model; the first of its files where it is split.
        mmproj: the image encoder.
    """

    model: Path
    mmproj: Path


@dataclass(frozen=True)
class HubFile:
    """A file of the hub.

    Attributes:
        name: ``owner/name/file``.
        url: its address.
        path: in the hub's cache; None where the hub can be reached.
    """

    name: str
    url: str
    path: Path | None


@dataclass(frozen=True)
class HubPair:
    """A language model and its mmproj on the hub.

    Attributes:
        model: the language model's files, in order.
        mmproj: the image encoder.
        headers: of requests for them: who asks, and the login, if there is one.
    """

    model: tuple[HubFile, ...]
    mmproj: HubFile
    headers: Mapping[str, str]


def is_id(text: object) -> bool:
    """Whether a text can be the id of a repository with GGUF files; a path of a GGUF file is none.

    Example:
        >>> is_id("someone/llava-GGUF:Q4_K_M"), is_id("models/llava.gguf")
        (True, False)
    """
    return isinstance(text, str) and _ID.fullmatch(text) is not None and not text.lower().endswith(".gguf")


def split_id(text: str) -> tuple[str, str | None]:
    """Repository and quantization of ``owner/name:QUANT``.

    Raises:
        ConfigError: another form.

    Example:
        >>> split_id("someone/llava-GGUF:Q4_K_M"), split_id("someone/llava-GGUF")
        (('someone/llava-GGUF', 'Q4_K_M'), ('someone/llava-GGUF', None))
    """
    found = _ID.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ConfigError(f"expected owner/name or owner/name:QUANT of a hub repository, got {text!r}; check the id")
    return found[1], found[2]


def _is_mmproj(name: str) -> bool:
    return "mmproj" in PurePosixPath(name).name.lower()


def _is_side_file(name: str) -> bool:
    return any(word in PurePosixPath(name).name.lower() for word in _SIDE)


def choose(
    files: Sequence[str], *, quant: str | None = None, filename: str | None = None, mmproj: str | None = None
) -> tuple[list[str], str]:
    """The language model's files, and the mmproj, among the files of a repository.

    Args:
        files: their names.
        quant: quantization in the language model's name; None takes Q4_K_M or what comes close to it.
        filename, mmproj: names or patterns (``*Q4_K_M.gguf``) that leave one file each.

    Raises:
        ModelFileError: there is no such file, or more than one; the message lists what there is.

    Example:
        >>> choose(["a-Q8_0.gguf", "a-Q4_K_M.gguf", "mmproj-a-f16.gguf", "README.md"])
        (['a-Q4_K_M.gguf'], 'mmproj-a-f16.gguf')
    """
    models = [name for name in _firsts(files) if not _is_mmproj(name) and (filename or not _is_side_file(name))]
    if quant is not None and filename is None:
        model = _only([name for name in models if _has_quant(name, quant)], models, "quantization", quant)
    else:
        model = _pick(models, filename, _QUANTS, "filename")
    first = part_of(model)
    if first is None:
        return [model], choose_mmproj(files, mmproj)
    parts = sorted(name for name in files if (part := part_of(name)) and part._replace(number=1) == first)
    return parts, choose_mmproj(files, mmproj)


def choose_mmproj(files: Sequence[str], name: str | None = None) -> str:
    """The mmproj among the files of a repository: that of a name or pattern, or the one in f16.

    Raises:
        ModelFileError: there is no such file, or more than one.
    """
    return _pick([file for file in _firsts(files) if _is_mmproj(file)], name, _MMPROJ, "mmproj")


def _firsts(files: Sequence[str]) -> list[str]:
    """GGUF files, of split ones the first."""
    ggufs = sorted(name for name in files if name.lower().endswith(".gguf"))
    return [name for name in ggufs if (part := part_of(name)) is None or part.number == 1]


def _pick(among: Sequence[str], pattern: str | None, quants: Sequence[str], what: str) -> str:
    if pattern is not None:
        return _only([name for name in among if _fits(name, pattern)], among, what, pattern)
    for quant in quants:
        for name in among:
            if _has_quant(name, quant):
                return name
    return _only(among, among, what, "*.gguf")


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(PurePosixPath(name).name, pattern)


def _has_quant(name: str, quant: str) -> bool:
    """The quantization is a word of the file's name: Q4_K is none of Q4_K_M."""
    return re.search(rf"(?<![a-z0-9]){re.escape(quant)}(?![a-z0-9_])", name, re.IGNORECASE) is not None


def _only(found: Sequence[str], among: Sequence[str], what: str, wish: str) -> str:
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found or among) or "no GGUF file"
    raise ModelFileError(f"{what}: expected one file for {wish}, the repository has {listed}; name one of them")


def fetch_pair(
    repo_id: str,
    *,
    quant: str | None = None,
    filename: str | None = None,
    mmproj: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> HubFiles:
    """Bring a language model and its mmproj into the hub's cache; what is there already is not fetched again.

    Args:
        repo_id: ``owner/name``.
        quant, filename, mmproj: see :func:`choose`.
        revision: a branch, a tag or a commit.
        cache_dir: another cache than the hub's own.

    Raises:
        ConfigError: no repository id, or huggingface_hub is not installed.
        ModelFileError: no such repository or file, no access to it, or no network and no copy in the cache.
    """
    split_id(repo_id)
    files, _ = _files(repo_id, revision, cache_dir)
    models, projector = choose(files, quant=quant, filename=filename, mmproj=mmproj)
    with _in_one_line(repo_id):
        paths = [_download(repo_id, name, revision, cache_dir) for name in [*models, projector]]
    return HubFiles(paths[0], paths[-1])


def fetch_mmproj(
    repo_id: str, name: str | None = None, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Bring an mmproj into the hub's cache; see :func:`choose_mmproj`.

    Raises:
        ConfigError, ModelFileError: see :func:`fetch_pair`.
    """
    split_id(repo_id)
    chosen = choose_mmproj(_files(repo_id, revision, cache_dir)[0], name)
    with _in_one_line(repo_id):
        return _download(repo_id, chosen, revision, cache_dir)


def find_pair(repo_id: str, *, quant: str | None = None) -> HubPair:
    """The files that :func:`fetch_pair` would bring, without bringing them.

    Raises:
        ConfigError, ModelFileError: see :func:`fetch_pair`.
    """
    split_id(repo_id)
    files, cached = _files(repo_id, None, None)
    models, projector = choose(files, quant=quant)
    hub = _hub()

    def file(name: str) -> HubFile:
        path = hub.try_to_load_from_cache(repo_id, name) if cached else None
        url = hub.hf_hub_url(repo_id, name)
        return HubFile(f"{repo_id}/{name}", url, Path(path) if isinstance(path, str) else None)

    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return HubPair(tuple(file(name) for name in models), file(projector), build_hf_headers())


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as err:
        raise ConfigError(f"hub: expected the extra hub ({err}); run pip install huggingface_hub") from err
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    return huggingface_hub


def _download(repo_id: str, name: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    return Path(_hub().hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir))


def _files(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> tuple[list[str], bool]:
    """Files of a repository; of its copy in the cache where the hub is out of reach, and whether it is that."""
    hub = _hub()
    try:
        with _in_one_line(repo_id):
            return list(hub.list_repo_files(repo_id, revision=revision)), False
    except _OutOfReachError as err:
        cached = _cached(hub, repo_id, revision or "main", cache_dir)
        if not cached:
            raise ModelFileError(str(err)) from err
        return cached, True


def _cached(hub: Any, repo_id: str, revision: str, cache_dir: str | Path | None) -> list[str]:
    """Files of a revision that are in the cache."""
    try:
        repos = hub.scan_cache_dir(cache_dir).repos
    except hub.errors.CacheNotFound:
        return []
    return [
        file.file_path.relative_to(found.snapshot_path).as_posix()
        for repo in repos
        if (repo.repo_type, repo.repo_id) == ("model", repo_id)
        for found in repo.revisions
        if revision in found.refs or found.commit_hash == revision
        for file in found.files
    ]


class _OutOfReachError(ModelFileError):
    """The hub gives no answer."""


@contextlib.contextmanager
def _in_one_line(repo_id: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as err:
        raise ModelFileError(
            f"{repo_id}: expected access, the hub asks to accept its terms first; do that there, then hf auth login"
        ) from err
    except errors.RepositoryNotFoundError as err:
        raise ModelFileError(
            f"{repo_id}: expected a repository on the hub, found none; check the id, or hf auth login if it is private"
        ) from err
    except errors.RevisionNotFoundError as err:
        raise ModelFileError(f"{repo_id}: expected that revision on the hub, found none; name another") from err
    except Exception as err:  # connections fail with the errors of one HTTP library or another
        raise _OutOfReachError(
            f"{repo_id}: cannot be fetched from the hub, and no whole copy is in its cache "
            f"({type(err).__name__}: {one_line(err)[:200]}); connect, unset HF_HUB_OFFLINE, or give the files"
        ) from err
