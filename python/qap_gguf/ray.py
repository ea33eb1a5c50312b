"""Ray Data: a model in each actor, for ``Dataset.map_batches`` (docs/batch.md). Needs the extra ``ray``.

    ds.map_batches(VisionPredictor, fn_constructor_kwargs={"prompt": "What is this?"}, batch_size=32, num_cpus=4,
                   compute=ray.data.ActorPoolStrategy(size=8))

Each actor has a llama-server of its own, which ends with it. Ray itself is not imported here: what it calls is a class,
and a batch is a dict of arrays, a data frame of pandas or a table of Arrow.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from qap_gguf.batch import BatchModel, BatchResult
from qap_gguf.batch.rows import KEYS
from qap_gguf.errors import ConfigError

#: Columns that are added, in this order, and what stands in them for a row with an error.
COLUMNS: Final[Mapping[str, Any]] = {
    "answer": "", "finish_reason": "", "prompt_tokens": 0, "tokens": 0, "image_tokens": 0, "kept": 0, "encode_s": 0.0,
    "prefill_s": 0.0, "decode_s": 0.0, "error": "",
}  # fmt: skip


class VisionPredictor:
    """Answers a question about the picture of each row of a batch.

    A batch has a column of pictures: paths (``ray.data.from_items``, ``read_parquet``), bytes (``read_binary_files``)
    or arrays, uint8 (height, width, 3) (``read_images``). Columns `prompt`, `system`, `n_keep`, `keep_ratio`,
    `max_tokens` and others that docs/batch.md lists hold for their row. Columns come out as they went in, but for the
    pictures, and with these besides: `answer`, `finish_reason`, `prompt_tokens`, `tokens`, `image_tokens`, `kept`,
    `encode_s`, `prefill_s`, `decode_s`, and `error`, which is empty for a row with an answer.

    Args:
        model, mmproj: GGUF files, at this place on each node; None and None take the packaged pair.
        prompt: the question of rows that have none.
        image_column: the column of pictures.
        keep_images: let that column out too; paths are let out in any case.
        settings: further arguments of :class:`qap_gguf.batch.BatchModel`. `n_threads` is the number of CPUs that Ray
            gives the actor, and `parallel` 4, where they are left out.

    Raises:
        ConfigError, ModelFileError: see :class:`qap_gguf.batch.BatchModel`.

    Example:
        >>> import numpy as np
        >>> import qap_gguf as qap
        >>> from qap_gguf.ray import VisionPredictor
        >>> ask = VisionPredictor(prompt="How many objects are there?", prune=None, n_ctx=512, n_threads=1)
        >>> out = ask({"image": np.array([str(qap.packaged_model().sample), "none.png"]), "label": np.array([7, 8])})
        >>> out["answer"].tolist(), out["label"].tolist(), out["error"][1]
        (['four', ''], [7, 8], "image: expected a file, found none at 'none.png'; check the path")
        >>> ask.close()
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        *,
        prompt: str | None = None,
        image_column: str = "image",
        keep_images: bool = False,
        **settings: Any,
    ) -> None:
        self._column, self._keep = image_column, keep_images
        settings = {"n_threads": _cpus(), "parallel": 4, **settings}
        self._model = BatchModel(model, mmproj, prompt=prompt, **settings)

    def __call__(self, batch: Any) -> Any:
        """The batch with the columns of the answers; of the kind that came in, rows in their order.

        Args:
            batch: a dict of NumPy arrays, a pandas.DataFrame or a pyarrow.Table.

        Raises:
            ConfigError: no column of pictures, or a batch of another kind.
            QapError: llama-server cannot be started any more; Ray then tries the batch in another actor.
        """
        columns, kind = _columns(batch)
        if self._column not in columns:
            raise ConfigError(
                f"image_column: expected a column {self._column!r}, got {', '.join(map(str, columns))}; name yours"
            )
        names = [name for name in columns if name in KEYS and name not in ("id", "image")]
        images = columns[self._column]
        rows = [
            {"id": i, "image": _image(image), **{name: columns[name][i] for name in names}}
            for i, image in enumerate(images)
        ]
        results: list[BatchResult | None] = [None] * len(rows)
        for result in self._model.run(rows):
            results[int(result.id)] = result
        told = {name: [_cell(result, name) for result in results] for name in COLUMNS}
        is_text = len(images) > 0 and isinstance(_image(images[0]), str)
        dropped = () if self._keep or is_text else (self._column,)
        return _like(batch, kind, told, dropped)

    def close(self) -> None:
        """End llama-server; it ends with the process in any case."""
        self._model.close()


def _cpus() -> int | None:
    """CPUs that Ray gives this actor, None where it gives none or this is no actor."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return None
    given = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    return max(1, int(given)) if given else None


def _columns(batch: Any) -> tuple[dict[str, Any], str]:
    """The columns by name, and the kind of the batch."""
    if isinstance(batch, Mapping):
        return dict(batch), "numpy"
    module = type(batch).__module__.partition(".")[0]
    if module == "pandas":
        return {name: batch[name].tolist() for name in batch.columns}, "pandas"
    if module == "pyarrow":
        return {name: batch.column(name).to_pylist() for name in batch.column_names}, "pyarrow"
    raise ConfigError(f"batch: expected arrays, a data frame or a table, got {type(batch).__name__}; see batch_format=")


def _image(value: Any) -> Any:
    """A picture of a cell: NumPy has texts and bytes of its own."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _cell(result: BatchResult | None, name: str) -> Any:
    assert result is not None
    value = getattr(result, name)
    return COLUMNS[name] if value is None else value


def _like(batch: Any, kind: str, told: Mapping[str, list[Any]], dropped: tuple[str, ...]) -> Any:
    """`batch` with further columns, and without some."""
    if kind == "numpy":
        import numpy as np

        kept = {name: values for name, values in batch.items() if name not in (*dropped, *told)}
        kinds = {str: object, int: np.int64, float: np.float64}
        return kept | {name: np.array(values, kinds[type(COLUMNS[name])]) for name, values in told.items()}
    if kind == "pandas":
        return batch.drop(columns=[name for name in dropped if name in batch.columns]).assign(**told)
    for name in (*dropped, *(name for name in told if name in batch.column_names)):
        batch = batch.drop_columns([name])
    for name, values in told.items():
        batch = batch.append_column(name, [values])
    return batch
