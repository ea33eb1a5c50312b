"""A model's id on the Hugging Face hub in place of a folder: owner/name or owner/name@revision.

Facts: huggingface_hub's snapshot_download, which keeps the files in its own cache, draws its own progress bars, and
obeys HF_HUB_OFFLINE, HF_HUB_CACHE and HF_TOKEN. First the small files come; the weights only when these are understood,
and then one kind of them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from qap_gguf.convert.source.checkpoint import WEIGHT_FILES, read_json
from qap_gguf.convert.source.safetensors_file import one_line
from qap_gguf.errors import ConvertError

__all__ = ["fetch", "model_name"]

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def fetch(src: str | Path, check: Callable[[Path], None] | None = None) -> Path:
    """The folder `src`, or the folder in the hub's cache of the model whose id `src` is.

    A path that exists is taken first, and what does not look like an id is returned as it is.
    check: called with the folder before the weights are fetched; what it raises ends the download.

    Raises ConvertError where the hub does not have the model, does not give it, or cannot be reached, and without the
    extra `hub`.

    Example:
        >>> fetch("some/folder/of/mine")
        PosixPath('some/folder/of/mine')
    """
    path, found = Path(src), _ID.fullmatch(str(src))
    if found is None or path.exists():
        return path
    repo, revision = found[1], found[2]
    try:
        import huggingface_hub
    except ImportError:
        raise ConvertError(
            f"expected a folder {src}, or huggingface_hub to fetch the model of that name, found neither; correct the "
            "path, or pip install huggingface_hub"
        ) from None

    def download(names: list[str]) -> Path:
        with _in_one_line(repo, revision):
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=names, ignore_patterns=["*/*"]
                )
            )

    folder = download(_SMALL)
    if check is not None:
        check(folder)
    for single in WEIGHT_FILES:
        index = folder / f"{single}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            names = sorted({str(place) for place in places.values()}) if isinstance(places, dict) else []
            return download([name for name in names if Path(name).name == name] or [single])
        download([single])
        if (folder / single).is_file():
            return folder
    return folder  # without weights: reading it says so


def model_name(src: str | Path) -> str:
    """The name of the model in the folder `src`, in a snapshot of the hub's cache, or of the hub's id `src`.

    Example:
        >>> model_name("llava-hf/llava-1.5-7b-hf@main"), model_name("models--a--llava/snapshots/0123abc")
        ('llava-1.5-7b-hf', 'llava')
    """
    found = _ID.fullmatch(str(src))
    if found is not None and not Path(src).exists():
        return found[1].rpartition("/")[2]
    folder = Path(src).resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


@contextlib.contextmanager
def _in_one_line(repo: str, revision: str | None) -> Iterator[None]:
    """Turns the hub's errors into ConvertErrors; quietens its remark that a repository has no such file."""
    from huggingface_hub import errors

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except errors.GatedRepoError as err:
        raise ConvertError(
            f"expected access to {repo} on the hub, which wants its terms accepted; accept them there and log in "
            "(hf auth login)"
        ) from err
    except errors.RepositoryNotFoundError as err:
        raise ConvertError(
            f"expected a folder {repo}, or a model of that name on the hub, found neither; check the spelling, or "
            "log in if it is private (hf auth login)"
        ) from err
    except errors.RevisionNotFoundError as err:
        raise ConvertError(
            f"expected revision {revision} of {repo} on the hub, found none; give a branch, a tag or a commit"
        ) from err
    except errors.LocalEntryNotFoundError as err:
        raise ConvertError(
            f"expected a folder {repo}, or the hub for the model of that name, found neither and no whole copy in its "
            "cache; correct the path, connect, or unset HF_HUB_OFFLINE"
        ) from err
    except Exception as err:  # of the network library, which changed over time
        reason = f"{type(err).__name__}: {one_line(err, 200)}"
        raise ConvertError(f"cannot fetch {repo} from the hub ({reason}); try again, or give a folder") from err
    finally:
        log.setLevel(level)
