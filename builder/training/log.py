"""Training log: losses and scores as JSON lines, and as a plot."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


class TrainingLog:
    """Appends to ``metrics.jsonl`` in a run's folder; ``plot`` draws it as ``metrics.png``.

    Args:
        folder: of the run.
        iteration: where the run resumes. Later lines and an incomplete last line, both left by a
            killed run, are dropped.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._plot = folder / "metrics.png"
        lines = self._path.read_text().split("\n")[:-1] if self._path.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.entries = [entry for entry in self.entries if entry["iteration"] <= iteration]
        self._path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry; ``iteration`` is required, ``losses`` and ``scores`` are plotted."""
        self.entries.append(entry)
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def plot(self) -> None:
        """Plot the losses and the AP over the iterations."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        loss_axes, score_axes = figure.subplots(1, 2)
        trained = [entry for entry in self.entries if "losses" in entry]
        for name in trained[0]["losses"] if trained else []:
            loss_axes.plot(
                [entry["iteration"] for entry in trained],
                [entry["losses"][name] for entry in trained],
                label=name,
                linewidth=0.8,
            )
        loss_axes.set(xlabel="iteration", ylabel="loss", yscale="log")
        scored = [entry for entry in self.entries if "scores" in entry]
        for kind in ("bbox", "segm", "keypoints"):
            points = [(e["iteration"], e["scores"][kind]) for e in scored if kind in e["scores"]]
            for name in ("AP", "AP50"):
                score_axes.plot(
                    [iteration for iteration, _ in points],
                    [100 * scores[name] for _, scores in points],
                    marker="o",
                    label=f"{kind} {name}",
                )
        score_axes.set(xlabel="iteration", ylabel="AP, %")
        for axes in (loss_axes, score_axes):
            if axes.lines:
                axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
        figure.savefig(self._plot, dpi=120)
