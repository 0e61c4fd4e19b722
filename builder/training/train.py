"""Training of a network on COCO annotations: the loop, its checkpoints and measurements."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maskcast.builder.checkpoint.checkpoint import (
    load_matching,
    read_state,
    save_atomically,
    save_model,
)
from maskcast.builder.console import print_line
from maskcast.builder.evaluation.evaluate import evaluate, torch_predictor
from maskcast.builder.network.backbone import freeze_levels, load_imagenet_weights
from maskcast.builder.network.network import (
    build_network,
    freeze_all_but_keypoints,
    network_config,
)
from maskcast.builder.training.config import TrainConfig, check_config
from maskcast.builder.training.dataset import (
    AugmentedDataset,
    EpochSampler,
    InstanceDataset,
    Masks,
    collate,
    open_keypoints,
)
from maskcast.builder.training.initial import InitialModel, read_initial
from maskcast.builder.training.keypoint_norms import add_norms, fold_norms
from maskcast.builder.training.log import TrainingLog
from maskcast.builder.training.losses import Target, compute_keypoint_loss, compute_losses
from maskcast.builder.training.predicted_masks import predict_masks
from maskcast.builder.training.process import ignore_interrupt, interruption
from maskcast.builder.training.recipe import (
    learning_rate,
    make_optimizer,
    update_average,
)
from maskcast.engines.errors import InputError
from maskcast.engines.memory import keep_memory

_LOG_EVERY = 20
_SAVE_EVERY = 200
_MAX_BAD_LOSSES = 20


def train(config: TrainConfig, console: Console | None = None) -> Path | None:
    """Train a network, or resume a run that was interrupted.

    It trains on a CUDA GPU if torch finds one, else on the CPU. SIGINT saves the run and ends it;
    the same call resumes it. A complete run is not changed.

    Returns:
        The path of ``model.pth``, or None if the run was interrupted.

    Raises:
        InputError: the data, the initial model or a setting cannot be used, or the loss diverged.
    """
    check_config(config)
    return _Run(config, console or Console(stderr=True)).run()


class _Run:
    """The state of a training run and its loop."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.recipe = config.recipe
        initial = None if config.initial is None else read_initial(config.initial, config.network)
        datasets = []
        if config.annotations is not None:
            masks: Masks = "all" if config.with_masks else "none"
            datasets.append(self.open(config.annotations, masks))
            labels, with_masks = datasets[0].labels, config.with_masks
        else:  # the keypoint branch alone
            assert initial is not None
            labels, with_masks = initial.config.labels, initial.config.with_masks
        posed = open_keypoints(
            config.images, config.keypoint_annotations, labels, with_masks=with_masks
        )
        keypoints = posed[0].keypoints if posed else None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            keep_memory()
        torch.manual_seed(config.seed)
        if initial is None:
            self.network_config = network_config(config.network, labels, with_masks, keypoints)
        else:
            self.network_config = initial.adapt(labels, with_masks, keypoints)
        self.network = self.build(initial)
        if config.annotations is None:
            freeze_all_but_keypoints(self.network)
        else:
            freeze_levels(self.network.backbone.body, self.recipe.frozen_levels)
        if keypoints is not None and self.recipe.keypoint_norms:
            add_norms(self.network.roi_heads.keypoint_head)
        self.network.to(self.device, memory_format=torch.channels_last)
        if config.box_annotations is not None:
            config.output.mkdir(parents=True, exist_ok=True)
            datasets.append(self.boxes(config.box_annotations))
        datasets += posed
        self.dataset = AugmentedDataset(datasets, self.recipe, config.seed, keypoints)
        self.iterations_per_epoch = len(self.dataset) // self.recipe.batch_size
        if not self.iterations_per_epoch:
            raise InputError(
                f"{config.images}: fewer annotated images than one batch; "
                "choose a smaller --batch-size"
            )
        self.iterations = config.iterations or max(
            1, round(self.recipe.epochs * self.iterations_per_epoch)
        )
        self.average = copy.deepcopy(self.network).eval()
        self.optimizer = make_optimizer(self.network, self.recipe)
        self.iteration, self.elapsed_s, self.bad_losses = 0, 0.0, 0
        config.output.mkdir(parents=True, exist_ok=True)
        self.checkpoint = config.output / "checkpoint.pth"
        if self.checkpoint.exists():
            self.resume()
        self.log = TrainingLog(config.output, self.iteration)

    def build(self, initial: InitialModel | None) -> Any:
        """Build the network, with the weights of the initial model or of ImageNet."""
        network = build_network(self.network_config)
        if initial is None:
            load_imagenet_weights(network.backbone.body, self.network_config.backbone)
            return network
        for name in load_matching(network, initial.state):
            print_line(self.console, f"not in {self.config.initial}, initialised at random: {name}")
        return network

    def boxes(self, annotations: Path) -> InstanceDataset:
        """Open the images with boxes only, with predicted masks if the run is to use them."""
        config, labels = self.config, self.network_config.labels
        if not config.predict_masks:
            return self.open(annotations, "none", labels)
        predicted = config.output / "predicted_masks.json"
        if not predicted.exists():
            kept, boxes = predict_masks(self.network, config.images, annotations, predicted, labels)
            print_line(self.console, f"predicted masks for {kept} of {boxes} boxes: {predicted}")
        return self.open(predicted, "some", labels)

    def open(
        self, annotations: Path, masks: Masks, labels: tuple[str, ...] | None = None
    ) -> InstanceDataset:
        """Open annotated images, with keypoints if the network learns some."""
        config = self.config
        return InstanceDataset(
            config.images,
            annotations,
            labels=labels,
            masks=masks,
            with_keypoints=bool(config.keypoint_annotations),
        )

    @property
    def progress(self) -> float:
        """How much of the run is done, 0..1."""
        if self.config.minutes is not None:
            return min(1.0, self.elapsed_s / (60 * self.config.minutes))
        return self.iteration / self.iterations

    def description(self, format_path: Callable[[Path], str] = str) -> dict[str, Any]:
        """Describe the run with builtins, except what may change when it is resumed."""
        run: dict[str, Any] = msgspec.to_builtins(self.config, enc_hook=format_path)
        return {k: v for k, v in run.items() if k not in ("workers", "evaluate_every", "output")}

    def save(self) -> None:
        state = {
            "run": self.description(),
            "iteration": self.iteration,
            "elapsed_s": self.elapsed_s,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        save_atomically(state, self.checkpoint)

    def resume(self) -> None:
        state = read_state(self.checkpoint)
        if state.get("run") != self.description():
            raise InputError(
                f"{self.checkpoint}: belongs to a run with other settings; "
                "choose another output folder"
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.iteration, self.elapsed_s = state["iteration"], state["elapsed_s"]
        print_line(self.console, f"resuming from iteration {self.iteration}")

    def batches(self) -> Iterator[tuple[list[Tensor], list[Target]]]:
        stop = self.iterations if self.config.minutes is None else 2**31
        sampler = EpochSampler(
            len(self.dataset),
            self.recipe.batch_size,
            seed=self.config.seed,
            start=self.iteration,
            stop=stop,
        )
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.config.workers,
            prefetch_factor=4 if self.config.workers else None,
            worker_init_fn=ignore_interrupt,
            # Without a generator of its own the loader would draw its workers' seed from ours.
            generator=torch.Generator(),
        )
        return iter(loader)

    def run(self) -> Path | None:
        started = time.monotonic() - self.elapsed_s
        recent: list[dict[str, float]] = []
        evaluate_every = max(1, round(self.config.evaluate_every * self.iterations_per_epoch))
        path = self.config.output / "model.pth"
        if self.progress >= 1 and path.is_file():
            print_line(self.console, f"the run is complete: {path}; choose another output folder")
            return path
        with self.show_progress() as show, interruption() as interrupted:
            batches = self.batches()
            while self.progress < 1:
                images, targets = _next_batch(batches)
                losses = self.step(images, targets)
                self.iteration += 1
                self.elapsed_s = time.monotonic() - started
                if losses:
                    recent.append(losses)
                if recent and (self.iteration % _LOG_EVERY == 0 or self.progress >= 1):
                    means = {k: sum(step[k] for step in recent) / len(recent) for k in recent[0]}
                    self.record(means)
                    show(means)
                    recent.clear()
                if interrupted.is_set():
                    self.save()
                    print_line(
                        self.console, f"stopped at iteration {self.iteration}, {self.checkpoint}"
                    )
                    return None
                if self.iteration % _SAVE_EVERY == 0:
                    self.save()
                if self.iteration % evaluate_every == 0 and self.progress < 1:
                    self.measure()
                    self.elapsed_s = time.monotonic() - started
        scores = self.measure()
        training = {
            # A model may be shared: it names its data, but not the folders on this machine.
            **self.description(lambda path: path.name),
            "iterations": self.iteration,
            "images": self.iteration * self.recipe.batch_size,
            "elapsed_s": round(self.elapsed_s),
            "scores": scores,
        }
        # In this order: a complete run always has its model.
        state = fold_norms(self.kept.state_dict())
        save_model(path, self.network_config, state, training)
        self.save()
        return path

    @property
    def kept(self) -> Any:
        """The network that is evaluated and saved."""
        return self.network if self.recipe.average_decay is None else self.average

    def step(self, images: list[Tensor], targets: list[Target]) -> dict[str, float]:
        """Make one step; a batch whose loss is not finite is skipped."""
        is_whole = self.config.annotations is not None
        self.network.train(is_whole)
        if self.network.roi_heads.has_keypoint():
            self.network.roi_heads.keypoint_head.train()
        for module in self.network.backbone.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        rate = learning_rate(self.recipe, self.iteration, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        images = [image.to(self.device) for image in images]
        targets = [{k: v.to(self.device) for k, v in target.items()} for target in targets]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
            spread = self.recipe.keypoint_spread
            if is_whole:
                limit = self.recipe.branch_batch_size
                losses = compute_losses(self.network, images, targets, limit, spread)
            else:
                losses = compute_keypoint_loss(self.network, images, targets, spread)
            weights = {"keypoint": self.recipe.keypoint_weight if is_whole else 1.0}
            total = torch.stack([weights.get(k, 1.0) * v for k, v in losses.items()]).sum()
        self.optimizer.zero_grad()
        if not math.isfinite(total.item()):
            self.bad_losses += 1
            if self.bad_losses > _MAX_BAD_LOSSES:
                raise InputError(
                    f"the loss diverged at iteration {self.iteration}; lower the learning rate"
                )
            return {}
        self.bad_losses = 0
        torch.autograd.backward(total)
        if self.recipe.gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_norm)
        self.optimizer.step()
        if self.recipe.average_decay is not None:
            # Early on the average would otherwise hold the first, random weights for too long.
            decay = min(self.recipe.average_decay, (1 + self.iteration) / (10 + self.iteration))
            update_average(self.average, self.network, decay)
        return {name: value.item() for name, value in losses.items()}

    def record(self, losses: dict[str, float]) -> None:
        self.log.append(
            {
                "iteration": self.iteration,
                "epoch": round(self.iteration / self.iterations_per_epoch, 3),
                "elapsed_s": round(self.elapsed_s, 1),
                "learning_rate": learning_rate(self.recipe, self.iteration, self.progress),
                "losses": {name: round(value, 5) for name, value in losses.items()},
            }
        )

    def measure(self) -> dict[str, Any] | None:
        """Evaluate the network that is saved."""
        config = self.config
        if config.validation_annotations is None:
            self.log.plot()
            return None
        scores = evaluate(
            torch_predictor(self.kept.eval()),
            config.validation_images or config.images,
            config.validation_annotations,
            self.network_config.labels,
            with_masks=self.network_config.with_masks,
            keypoints=self.network_config.keypoints,
        )
        self.log.append({"iteration": self.iteration, "scores": scores})
        self.log.plot()
        figures = ", ".join(
            f"{kind} AP {100 * scores[kind]['AP']:.1f} AP50 {100 * scores[kind]['AP50']:.1f}"
            for kind in ("bbox", "segm", "keypoints")
            if kind in scores
        )
        print_line(self.console, f"iteration {self.iteration}: {figures}")
        return scores

    @contextmanager
    def show_progress(self) -> Iterator[Any]:
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:.1f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        is_terminal = self.console.is_terminal
        with Progress(*columns, console=self.console, disable=not is_terminal) as bar:
            task = bar.add_task("", total=1.0)
            bar.update(task, completed=self.progress)

            def show(losses: dict[str, float]) -> None:
                text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
                bar.update(task, completed=self.progress, description=text)
                if not is_terminal:
                    done = f"iteration {self.iteration}, {self.progress:.0%}"
                    print_line(self.console, f"{done}: {text}")

            yield show


def _next_batch(batches: Iterator[Any]) -> Any:
    """Return the next batch; reduce a worker's error about an image to its last line."""
    try:
        return next(batches)
    except InputError as error:
        # The loader raises a worker's exception with its traceback as the message.
        last = str(error).splitlines()[-1]
        raise InputError(last.removeprefix("maskcast.engines.errors.InputError: ")) from None
