"""Console: what the offline commands print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from maskcast.engines.bundle import Bundle

if TYPE_CHECKING:
    from maskcast.builder.build import Report
    from maskcast.builder.tensorrt.process import Built


@contextmanager
def build_progress(console: Console) -> Iterator[Report]:
    """Show the steps of a build on a terminal; print nothing elsewhere."""
    if not console.is_terminal:
        yield lambda step, done, total: None
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show_step(step: str, done: int, total: int) -> None:
            progress.update(task, description=step, completed=done, total=total or None)

        yield show_step


def print_plan(console: Console, graph: str, built: Built) -> None:
    """Print the size of a plan, and the time and memory that TensorRT needed for it."""
    print_line(
        console,
        f"{graph}: {built.plan_bytes / 1e6:.1f} MB in {built.build_s:.1f} s, peak memory "
        f"{built.peak_rss_bytes / 1e6:.0f} MB, version {built.version}",
    )


def print_bundle(console: Console, bundle: Bundle, seconds: float) -> None:
    """Print what was built and how to run it."""
    manifest, path = bundle.manifest, bundle.path
    size_mb = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    print_line(
        console,
        f"built {manifest.name}, {manifest.backend} {manifest.precision}, {size_mb:.1f} MB in "
        f"{seconds:.0f} s; run it with: maskcast run SOURCE --model {path}",
    )


def print_scores(scores: dict[str, Any]) -> None:
    """Print the tables of ``maskcast eval``; ``scores`` as returned by ``evaluate``."""
    console = Console()
    table = Table("", title=f"COCO average precision, percent, {scores['images']} images")
    for name in scores["bbox"]:
        table.add_column(name, justify="right")
    for kind, title in {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}.items():
        if kind in scores:
            table.add_row(title, *(_percent(scores[kind].get(n)) for n in scores["bbox"]))
    console.print(table)
    point = scores["at_threshold"]
    table = Table(title=f"At the bundle's threshold, {point['threshold']:g}, boxes")
    for name in ("precision %", "recall %", "false alarms per image"):
        table.add_column(name, justify="right")
    table.add_row(
        _percent(point["precision"]), _percent(point["recall"]), f"{point['false_per_image']:.3f}"
    )
    console.print(table)


def print_line(console: Console, text: str) -> None:
    """Print a line without markup, highlighting or wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _percent(fraction: float | None) -> str:
    """Format a fraction; COCO's -1 and None mean that there was nothing to measure."""
    return "-" if fraction is None or fraction < 0 else f"{100 * fraction:.1f}"
