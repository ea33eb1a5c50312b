"""The plug-in for lmms-eval: its tasks, answered by a GGUF pair with all image tokens or with fewer.

    lmms_eval --model qap_gguf --model_args pretrained=model.gguf,mmproj=mmproj.gguf,n_keep=64 --tasks pope

lmms-eval finds it by the entry point ``lmms_eval.models`` of this package and imports this module only when asked for
that model. The arguments are fields of :class:`~qap_gguf.PruneConfig` and settings of :class:`~qap_gguf.VisionModel`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from lmms_eval.api.model import lmms
from tqdm import tqdm

from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SETTINGS: Final = {"ctx": "n_ctx", "threads": "n_threads", "kv": "kv", "seed": "seed", "resize": "resize"}
_SETTINGS_SAME: Final = ("device", "model_device", "max_image_tokens", "force_family", "verbose")
_PRUNE: Final = frozenset(field.name for field in dataclasses.fields(PruneConfig)) - {"seed"}


def parts_of(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """lmms-eval's typed messages as ``VisionModel.chat`` takes them.

    Raises:
        ConfigError: a video or a sound.
    """
    turns = []
    for message in messages:
        parts: list[Any] = []
        for part in message["content"]:
            if part["type"] not in ("text", "image"):
                raise ConfigError(f"messages: expected text and images, got {part['type']}; choose another task")
            parts.append(part["text"] if part["type"] == "text" else part["url"])
        turns.append({"role": message["role"], "content": parts})
    return turns


def stop_texts(until: str | Sequence[str] | None) -> list[str]:
    """The stop texts of a task; an empty one stops nothing.

    Example:
        >>> stop_texts("END"), stop_texts(["a", ""]), stop_texts(None)
        (['END'], ['a'], [])
    """
    texts = [until] if isinstance(until, str) else list(until or [])
    return [text for text in texts if text]


class QapGguf(lmms):  # type: ignore[misc]  # untyped where lmms-eval is not installed
    """A GGUF pair as a chat model of lmms-eval.

    Args:
        pretrained: the language model's file; None takes the packaged pair.
        mmproj: its mmproj file.
        dense: keep all image tokens.
        batch_size: answers are made one at a time, whatever it is.
        settings: ``ctx``, ``threads``, ``kv``, ``seed``, ``resize``, ``device``, ``model_device``,
            ``max_image_tokens``, ``force_family``, ``verbose`` and the fields of a PruneConfig. Without any
            of those the model's own default holds (``VisionModel.default_prune``).

    Raises:
        ConfigError: an unknown setting, or one outside its range.
        ModelFileError: as for VisionModel.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        mmproj: str | None = None,
        dense: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        system_prompt: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        from qap_gguf.model import VisionModel

        opened = {name: settings.pop(word) for word, name in _SETTINGS.items() if word in settings}
        opened |= {name: settings.pop(name) for name in _SETTINGS_SAME if name in settings}
        if settings.keys() - _PRUNE:
            known = ", ".join(sorted({*_SETTINGS, *_SETTINGS_SAME, *_PRUNE, "dense", "pretrained", "mmproj"}))
            raise ConfigError(f"model_args: expected {known}, got {', '.join(sorted(settings.keys() - _PRUNE))}")
        if dense and settings:
            raise ConfigError(f"model_args: dense keeps every token, so {', '.join(settings)} has no meaning; drop one")
        self._chosen: dict[str, Any] = {}
        if dense:
            self._chosen["prune"] = None
        elif settings:
            self._chosen["prune"] = PruneConfig.from_dict(settings)
        positions = settings.get("positions", "auto")
        self._system = system_prompt
        self.model = VisionModel(mmproj, pretrained, positions=positions, **{"n_ctx": 4096, **opened})

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in their order."""
        return [self._answer(request.args) for request in tqdm(requests, desc="qap_gguf", disable=self.rank != 0)]

    def _answer(self, args: tuple[Any, ...]) -> str:
        _, messages_of, wishes, doc, task, split = args
        messages = messages_of(self.task_dict[task][split][doc])
        if self._system:
            messages = self._apply_system_prompt(list(messages), self._resolve_system_prompt(self._system))
        answer: str = self.model.chat(parts_of(messages), **self._chosen, **_sampling(wishes))
        return answer.strip()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval's own chat models answer such tasks by generating too."""
        raise NotImplementedError(
            "qap_gguf: expected a task that generates; `qap-gguf eval` scores choices by likelihood"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("qap_gguf: expected a task of one round, got several")


def _sampling(wishes: Mapping[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "max_tokens": int(wishes.get("max_new_tokens") or 1024),
        "temperature": float(wishes.get("temperature") or 0.0),
        "stop": stop_texts(wishes.get("until")),
    }
    if not wishes.get("do_sample", True):
        chosen["temperature"] = 0.0
    if wishes.get("top_p") and chosen["temperature"]:
        chosen["top_p"] = float(wishes["top_p"])
    return chosen
