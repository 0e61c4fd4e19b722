"""The command ``maskcast eval``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from maskcast.builder.extra import builder_extra

_INPUT, _OUTPUT = "Input", "Output"
EXAMPLES = ("maskcast eval default --images val2017/ --annotations instances_val2017.json",)


def evaluate(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or default.")
    ],
    *,
    images: Annotated[
        Path, typer.Option(metavar="FOLDER", rich_help_panel=_INPUT, help="Folder of the images.")
    ],
    annotations: Annotated[
        Path,
        typer.Option(
            metavar="FILE", rich_help_panel=_INPUT, help="Annotations of the images, COCO JSON."
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_INPUT,
            show_default="all",
            help="Use the first N images.",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", rich_help_panel=_OUTPUT, help="Print JSON, with fractions of 1."),
    ] = False,
) -> None:
    """Measure a bundle's accuracy on annotated images.

    Prints COCO's average precision of boxes, masks and keypoints, and the precision, recall and
    false alarms per image at the bundle's score threshold, where a detection is correct if its box
    overlaps an instance with an IoU of at least 0.5. Images without annotations count. Categories
    are matched by name; only those that the model knows are scored.
    """
    with builder_extra():
        from maskcast.builder.evaluation.evaluate import Prediction
        from maskcast.builder.evaluation.evaluate import evaluate as evaluate_predictor
    from rich.console import Console
    from rich.progress import track

    from maskcast.builder.console import print_scores
    from maskcast.engines.bundle import open_bundle
    from maskcast.engines.load import load_engine, predict

    opened = open_bundle(bundle)
    engine = load_engine(opened, pose=opened.poser is not None)
    label_names = engine.manifest.labels
    with_masks = engine.manifest.graphs.segmenter is not None

    def find(rgb: Any) -> Prediction:
        found = predict(rgb, engine, min_score=0.0)
        masks = [found.rle(i) for i in range(len(found))] if with_masks else None
        return Prediction(found.boxes, found.scores, found.labels, masks, found.keypoints)

    def show(entries: list[Any]) -> Iterable[Any]:
        return track(entries, "measuring", console=Console(stderr=True), transient=True)

    try:
        scores = evaluate_predictor(
            find,
            images,
            annotations,
            tuple(label_names[1:]),
            with_masks=with_masks,
            keypoints=engine.manifest.keypoints,
            threshold=engine.manifest.score_threshold,
            limit=limit,
            track=show,
        )
    finally:
        engine.close()
    if as_json:
        typer.echo(json.dumps(scores))
    else:
        print_scores(scores)
