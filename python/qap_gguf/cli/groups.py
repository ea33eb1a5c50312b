"""Help in groups: what most people need comes first, what belongs to research last."""

from __future__ import annotations

from typing import Final

import click

#: Group -> its options by parameter name; others stand in the first group.
_GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "Options": (),
    "Model": (
        "model", "mmproj", "hf", "device", "model_device", "threads", "ctx", "kv", "max_image_tokens", "chat_format",
        "parallel",
    ),
    "Pruning": ("n_keep", "keep_ratio", "dense", "select", "encoder_keep"),
    "Output": ("as_json", "quiet", "debug", "help"),
    "Advanced": (
        "alpha", "error", "group_size", "outlier", "outlier_weight", "semantic", "positions", "merge", "encoder_layer",
        "skip_flat_tiles", "duplicates", "seed", "resize", "force_family", "text_tokens", "decode", "logprobs", "cors",
        "max_body_mb", "max_megapixels", "max_image_mb",
        "max_images", "tries", "max_requests", "max_seconds", "routes", "cache_mb", "cache_folder",
    ),
}  # fmt: skip


class GroupedCommand(click.Command):
    """A command whose help lists its options in groups; the order within a group is that of the options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in _GROUPS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                group = next((name for name, members in _GROUPS.items() if param.name in members), "Options")
                rows[group].append(record)
        for name, records in rows.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
