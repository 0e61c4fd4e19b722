"""Outputs: checks the outputs of a configuration, and creates their recorders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from maskcast.engines.bundle import Manifest
from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import Config, OutputConfig, name_sources
from maskcast.pipeline.outputs.files import check_not_input, check_writable, is_pattern
from maskcast.pipeline.outputs.jsonl import STDOUT, JsonlRecorder
from maskcast.pipeline.outputs.recorder import Recorder
from maskcast.pipeline.url import is_local, local_path


def check_outputs(config: Config) -> None:
    """Reject outputs that cannot be written or would overwrite an input, without touching them.

    Raises:
        InputError: a folder is missing or read-only, or a file is an input or another output.
    """
    outputs = config.outputs
    paths = []
    if outputs.save is not None:
        save = Path(outputs.save)
        names = [source.name for source in name_sources(config.sources)]
        paths += [save, *(save.with_stem(f"{save.stem}-{name}") for name in names[1:])]
    if outputs.jsonl is not None and outputs.jsonl != STDOUT:
        paths.append(Path(outputs.jsonl))
    inputs = [local_path(source.url) for source in config.sources if is_local(source.url)]
    for place, path in enumerate(paths):
        check_writable(path)
        if not is_pattern(path):
            check_not_input(path, inputs)
        if path.resolve() in [other.resolve() for other in paths[:place]]:
            raise InputError(f"{path}: two outputs have this name; choose another for one of them")


def make_recorders(
    outputs: OutputConfig,
    manifest: Manifest,
    sources: Sequence[str],
    audio_of: Callable[[str], Path | None],
) -> list[Recorder]:
    """Create the recorders of a configuration. They open their files at the first frame.

    Args:
        outputs: the files to write.
        manifest: the model's manifest.
        sources: the names of the sources, in their order.
        audio_of: returns the file from which to copy a source's audio, or None.
    """
    recorders: list[Recorder] = []
    if outputs.jsonl is not None:
        recorders.append(
            JsonlRecorder(
                outputs.jsonl,
                manifest.labels,
                append=outputs.append,
                segment_s=outputs.segment_s,
                segment_bytes=outputs.segment_bytes,
                keypoints=manifest.keypoints,
            )
        )
    if outputs.save is not None:
        from maskcast.pipeline.outputs.video import VideoRecorder  # loads Pillow

        recorders.append(
            VideoRecorder(
                outputs.save,
                manifest.labels,
                sources=sources,
                segment_s=outputs.segment_s,
                segment_bytes=outputs.segment_bytes,
                trail_s=outputs.trail_s,
                audio_of=audio_of,
                keypoints=manifest.keypoints,
            )
        )
    return recorders
