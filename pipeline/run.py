"""``maskcast.run``: run a pipeline in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskcast.engines.engine import Engine
from maskcast.pipeline.configuration.config import (
    Config,
    ModelConfig,
    OutputConfig,
    PublishConfig,
    SourceConfig,
)
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.stages.record import OnFrame
from maskcast.pipeline.stats import Stats

Source = SourceConfig | str | Path | Mapping[str, Any]
_ONE_SOURCE = (SourceConfig, str, Path, Mapping)


def run(
    sources: Source | Sequence[Source],
    *,
    on_frame: OnFrame | None = None,
    model: str | Engine = "default",
    publish: str | None = None,
    save: str | Path | None = None,
    jsonl: str | Path | None = None,
    limit: int | None = None,
    pose: bool = False,
) -> Stats:
    """Run a model on sources until they end, and call a function with every frame.

    .. code-block:: python

        def show(frame, instances, published):
            print(frame.source, frame.index, len(instances))


        maskcast.run("clip.mp4", on_frame=show)

    For everything else that can be configured, use ``Config`` and ``Pipeline``.

    Args:
        sources: one source or several: a path, a URL, a mapping with the keys of a source in a
            configuration, or ``SourceConfig``.
        on_frame: called with every frame, its instances and what was published.
        model: a bundle's name or folder, or an engine, which is left open.
        publish: endpoint to publish on, "tcp://127.0.0.1:5555"; None publishes nothing.
        save: annotated video to write.
        jsonl: JSON lines to write.
        limit: number of frames to read from each source; None for all.
        pose: estimate keypoints; the model must have a poser, and an engine must have it loaded.

    Returns:
        The final figures.

    Raises:
        InputError: a source, the model, the endpoint or an output cannot be used.
        Exception: what ``on_frame`` raises ends the run.
    """
    config = Config(
        sources=[sources] if isinstance(sources, _ONE_SOURCE) else sources,
        model=ModelConfig(bundle="default" if isinstance(model, Engine) else model, pose=pose),
        publish=None if publish is None else PublishConfig(endpoint=publish),
        outputs=OutputConfig(
            save=None if save is None else str(save), jsonl=None if jsonl is None else str(jsonl)
        ),
    )
    engine = model if isinstance(model, Engine) else None
    pipeline = Pipeline(config, engine, on_frame=on_frame, limit=limit)
    pipeline.run()
    return pipeline.stats()
