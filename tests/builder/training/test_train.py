import io
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console

import maskcast.builder.training.train as train_module
from maskcast.builder.checkpoint.checkpoint import (
    load_bundle_weights,
    load_checkpoint,
    read_state,
    save_model,
)
from maskcast.builder.network.network import NetworkConfig, build_network, network_config
from maskcast.builder.training.config import TrainConfig
from maskcast.builder.training.recipe import RECIPES, Recipe
from maskcast.builder.training.train import train
from maskcast.engines.bundle import open_bundle
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import COCO_PERSON

RECIPE = Recipe(
    optimizer="adamw",
    learning_rate=5e-4,
    weight_decay=0.01,
    schedule="cosine",
    warmup_iterations=4,
    gradient_norm=5.0,
    average_decay=0.9,
    epochs=3,
    batch_size=2,
    canvas=64,
    canvas_scales=(0.9, 1.2),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: with several, tiny steps spend their time on synchronisation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip plots, which take longer than such small steps, unless a test asks for ``curves``."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(train_module.TrainingLog, "plot", lambda log: None)


@pytest.fixture
def curves() -> None:
    """Draw the plot of the run's losses and scores."""


@pytest.fixture
def run(draw_ellipses, tmp_path: Path):
    """Make the configuration of a run on two images; keyword arguments change it."""
    folder = draw_ellipses(count=2)

    def make(output: str = "run", *, recipe: Recipe = RECIPE, **changes) -> TrainConfig:
        config = TrainConfig(
            output=tmp_path / output,
            images=folder.images,
            annotations=folder.annotations,
            network="lite0-fpn",
            recipe=recipe,
            workers=0,
        )
        return msgspec.structs.replace(config, **changes)

    return make


def silently(config: TrainConfig) -> Path | None:
    with Path("/dev/null").open("w") as nowhere:
        return train(config, Console(file=nowhere))


def metrics(config: TrainConfig) -> list[dict]:
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """Send SIGINT during an iteration (from 1)."""
    original, calls = train_module.compute_losses, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == iteration:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(train_module, "compute_losses", interrupted)


def test_training_on_two_images_reduces_every_loss_of_the_roi_branches(run) -> None:
    recipe = msgspec.structs.replace(RECIPE, epochs=40)
    config = run(recipe=recipe)
    path = silently(config)
    first, last = [entry["losses"] for entry in metrics(config) if "losses" in entry]
    assert sum(last.values()) < 0.7 * sum(first.values())
    assert last["mask"] < 0.8 * first["mask"]
    assert last["rpn_objectness"] < 0.5 * first["rpn_objectness"]
    assert path is not None
    network, _ = load_checkpoint(path)
    assert network.labels == ("blue", "red")


def test_an_interrupted_run_resumes_to_the_same_weights(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = msgspec.structs.replace(RECIPE, epochs=4)
    whole = silently(run("whole", recipe=recipe))
    config = run("parts", recipe=recipe)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert silently(config) is None
    assert not (config.output / "model.pth").exists()
    assert read_state(config.output / "checkpoint.pth")["iteration"] == 2
    parts = silently(config)
    assert whole is not None
    assert parts is not None
    expected, found = load_checkpoint(whole)[1], load_checkpoint(parts)[1]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("curves")
def test_a_run_is_measured_recorded_and_drawn(run) -> None:
    config = run(
        box_annotations=run().annotations.with_name("boxes.json"),
        validation_annotations=run().annotations,
        recipe=msgspec.structs.replace(RECIPE, bfloat16=True, epochs=2),
        evaluate_every=1.0,
    )
    path = silently(config)
    scored = [entry for entry in metrics(config) if "scores" in entry]
    assert [entry["iteration"] for entry in scored] == [2, 4]
    assert set(scored[0]["scores"]) == {"images", "bbox", "segm"}
    assert (config.output / "metrics.png").read_bytes().startswith(b"\x89PNG")
    training = torch.load(path, weights_only=True)["training"]
    assert training["scores"] == scored[-1]["scores"]
    assert training["images"] == 8
    assert training["recipe"]["epochs"] == 2
    assert training["annotations"] == "instances.json"


def test_frozen_levels_and_batch_statistics_keep_their_imagenet_values(run) -> None:
    path = silently(run(recipe=msgspec.structs.replace(RECIPE, epochs=2, average_decay=None)))
    assert path is not None
    _, state = load_checkpoint(path)
    fresh = train_module.build_network(train_module.network_config("lite0-fpn", ("a", "b")))
    train_module.load_imagenet_weights(fresh.backbone.body, "lite0")
    initial = fresh.state_dict()
    for name, value in initial.items():
        if "running_" in name or name.startswith("backbone.body._conv_stem"):
            assert torch.equal(state[name], value), name
    trained = "backbone.body._blocks.10._project_conv.weight"
    assert not torch.equal(state[trained], initial[trained])


def test_faster_r_cnn_trains_from_boxes_alone(run) -> None:
    boxes = run().annotations.with_name("boxes.json")
    path = silently(run(annotations=boxes, with_masks=False, validation_annotations=boxes))
    assert path is not None
    network, state = load_checkpoint(path)
    assert not network.with_masks
    assert not any("mask" in name for name in state)


def test_a_run_can_start_from_a_model_of_other_classes(run) -> None:
    first = silently(run("first"))
    content = run().annotations.read_text().replace('"blue"', '"green"')
    run().annotations.write_text(content)
    second = silently(run("second", initial=first))
    assert second is not None
    assert load_checkpoint(second)[0].labels == ("green", "red")


def test_a_run_can_start_from_the_default_model(run) -> None:
    path = silently(run(initial=Path("default"), recipe=msgspec.structs.replace(RECIPE, epochs=1)))
    assert path is not None
    labels, state = load_checkpoint(path)[0].labels, load_checkpoint(path)[1]
    shipped = build_network(network_config("lite0-fpn", ("person",)))
    load_bundle_weights(shipped, open_bundle("default"))
    assert labels == ("blue", "red")
    stem = "backbone.body._conv_stem.weight"  # frozen
    assert torch.equal(state[stem], shipped.state_dict()[stem])
    head = "roi_heads.box_head.fc6.weight"
    moved = (state[head] - shipped.state_dict()[head]).abs().mean()
    assert moved < 0.1 * state[head].abs().mean()


def test_masks_for_boxes_are_predicted_once_and_trained_on(run, monkeypatch, tmp_path) -> None:
    boxes = tmp_path / "boxes.json"
    config = run(
        initial=Path("default"),
        box_annotations=boxes,
        predict_masks=True,
        recipe=msgspec.structs.replace(RECIPE, epochs=1),
    )
    predicted = config.output / "predicted_masks.json"
    outlined = config.annotations.read_text()

    def predict(network, images, annotations, output, labels):
        assert (annotations, output, labels) == (boxes, predicted, ("blue", "red"))
        output.write_text(outlined)
        return 4, 4

    monkeypatch.setattr(train_module, "predict_masks", predict)
    assert silently(config) is not None
    monkeypatch.setattr(train_module, "predict_masks", None)
    trained = train_module._Run(config, Console(quiet=True)).dataset
    assert all("masks" in trained[0, index][1] for index in range(len(trained)))


def test_a_bundle_of_another_network_is_an_input_error(run) -> None:
    with pytest.raises(InputError, match="of another network"):
        silently(run(initial=Path("default"), network="lite2-fpn"))


def test_the_papers_recipe_trains_a_resnet_from_a_checkpoint_and_keeps_its_numbers(
    run, tmp_path: Path
) -> None:
    original = NetworkConfig(labels=("cat",), roi_align_aligned=True, frozen_norm_epsilon=0.0)
    resnet = build_network(original)
    for name, value in resnet.state_dict().items():
        # Without ImageNet's statistics only blocks that add nothing keep features of sane size.
        if name.endswith("bn3.weight"):
            value.zero_()
    initial = tmp_path / "resnet.pth"
    save_model(initial, original, resnet.state_dict(), {})
    paper = msgspec.structs.replace(
        RECIPES["paper"], epochs=1, shorter_sides=(64, 64), longest=96, warmup_iterations=1
    )
    path = silently(run(network="resnet50-fpn", recipe=paper, initial=initial))
    assert path is not None
    config, state = load_checkpoint(path)
    assert config == msgspec.structs.replace(original, labels=("blue", "red"))
    before = resnet.state_dict()
    for name, is_trained in {
        "backbone.body.conv1.weight": False,
        "backbone.body.layer1.0.conv1.weight": False,
        "backbone.fpn.inner_blocks.0.0.weight": True,
        "roi_heads.box_head.fc6.weight": True,
    }.items():
        assert torch.equal(state[name], before[name]) != is_trained, name


def test_a_checkpoint_of_another_network_is_an_input_error(run) -> None:
    first = silently(run("first"))
    with pytest.raises(InputError, match="a lite0 network"):
        silently(run("second", network="lite2-fpn", initial=first))


def test_a_run_with_a_duration_ends_when_it_is_over(run) -> None:
    config = run(minutes=0.02)
    assert silently(config) is not None
    state = read_state(config.output / "checkpoint.pth")
    assert state["elapsed_s"] >= 1.2
    assert state["iteration"] >= 1


def test_without_a_terminal_the_losses_of_a_run_of_some_iterations_are_plain_lines(run) -> None:
    text = io.StringIO()
    train(run(iterations=2), Console(file=text, width=40))
    (line,) = text.getvalue().splitlines()
    assert re.fullmatch(r"iteration 2, 100%: (\w+ \d+\.\d{3} ?){5}", line)


def test_a_path_with_brackets_is_printed_as_it_is(run) -> None:
    text = io.StringIO()
    config = run("run[red]", iterations=1)
    path = silently(config)
    train(config, Console(file=text, width=40))
    last = text.getvalue().splitlines()[-1]
    assert last == f"the run is complete: {path}; choose another output folder"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_images_loaded_by_another_process_give_the_same_weights(run) -> None:
    recipe = msgspec.structs.replace(RECIPE, epochs=1)
    here = silently(run("here", recipe=recipe))
    there = silently(run("there", recipe=recipe, workers=1))
    assert here is not None
    assert there is not None
    expected, found = load_checkpoint(here)[1], load_checkpoint(there)[1]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_an_input_error_of_one_line(run, workers: int) -> None:
    config = run(workers=workers)
    (config.images / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        silently(config)
    assert str(caught.value).startswith(f"{config.images / '1.png'}: not an image")
    assert "\n" not in str(caught.value)


def test_a_batch_without_a_finite_loss_is_skipped(run, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = train_module.compute_losses, []

    def poisoned(*arguments):
        calls.append(1)
        losses = original(*arguments)
        return {k: v * float("nan") for k, v in losses.items()} if len(calls) == 2 else losses

    monkeypatch.setattr(train_module, "compute_losses", poisoned)
    path = silently(run())
    assert path is not None
    assert all(value.isfinite().all() for value in load_checkpoint(path)[1].values())


def test_a_loss_that_stays_infinite_ends_the_run_with_advice(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_):
        return {"mask": torch.tensor(float("inf"), requires_grad=True)}

    monkeypatch.setattr(train_module, "compute_losses", diverged)
    monkeypatch.setattr(train_module, "_MAX_BAD_LOSSES", 3)
    with pytest.raises(InputError, match="lower the learning rate"):
        silently(run(recipe=msgspec.structs.replace(RECIPE, epochs=50)))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"recipe": msgspec.structs.replace(RECIPE, epochs=0)}, "epochs 0: give a number above 0"),
        ({"recipe": msgspec.structs.replace(RECIPE, epochs=-1)}, "epochs -1:"),
        ({"recipe": msgspec.structs.replace(RECIPE, epochs=float("nan"))}, "epochs nan:"),
        ({"minutes": -3.0}, "minutes -3: give a number above 0"),
        ({"minutes": 0.0}, "minutes 0:"),
        ({"iterations": 0}, "iterations 0: give 1 or more"),
        ({"recipe": msgspec.structs.replace(RECIPE, batch_size=0)}, "batch size 0: give 1 or more"),
        ({"recipe": msgspec.structs.replace(RECIPE, branch_batch_size=0)}, "branch batch size 0:"),
        ({"recipe": msgspec.structs.replace(RECIPE, learning_rate=0)}, "learning rate 0: give"),
        ({"workers": -1}, "workers -1: give 0 or more"),
        ({"predict_masks": True}, "needs box annotations and an initial model"),
    ],
)
def test_a_setting_out_of_range_is_an_input_error(run, changes, complaint: str) -> None:
    config = run(**changes)
    with pytest.raises(InputError, match=complaint):
        silently(config)
    assert not config.output.exists()


def test_a_complete_run_is_not_changed(run) -> None:
    config = run(validation_annotations=run().annotations)
    path = silently(config)
    assert path is not None
    files = [path, config.output / "metrics.jsonl", config.output / "checkpoint.pth"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in (files[0], files[2])]
    lines = files[1].read_text()
    assert silently(config) == path
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in (files[0], files[2])] == before
    assert files[1].read_text() == lines


def test_a_short_run_records_its_losses(run) -> None:
    config = run()
    silently(config)
    (entry,) = metrics(config)
    assert entry["iteration"] == 3
    assert entry["losses"]["mask"] > 0


def test_a_folder_with_a_run_of_other_settings_is_an_input_error(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        silently(run())
    with pytest.raises(InputError, match="other settings"):
        silently(run(seed=5))


def test_fewer_images_than_a_batch_are_an_input_error(run) -> None:
    with pytest.raises(InputError, match="fewer annotated images"):
        silently(run(recipe=msgspec.structs.replace(RECIPE, batch_size=3)))


@pytest.fixture
def of_red(run, tmp_path: Path) -> Path:
    """A model of red ellipses without keypoints."""
    torch.manual_seed(0)
    config = network_config("lite0-fpn", ("red",))
    path = tmp_path / "red.pth"
    save_model(path, config, build_network(config).state_dict(), {})
    return path


def test_training_a_keypoint_branch_does_not_change_the_rest_of_the_model(
    run, of_red: Path
) -> None:
    config = run(
        recipe=msgspec.structs.replace(RECIPE, epochs=60, learning_rate=1e-3, paste=0.5),
        annotations=None,
        keypoint_annotations=(run().annotations.with_name("keypoints.json"),),
        initial=of_red,
    )
    path = silently(config)
    assert path is not None
    first, *_, last = [entry["losses"] for entry in metrics(config)]
    assert set(first) == {"keypoint"}
    assert last["keypoint"] < first["keypoint"] - 0.5
    (before, old), (after, new) = load_checkpoint(of_red), load_checkpoint(path)
    assert after.labels == before.labels == ("red",)
    assert after.with_masks
    assert after.keypoints is not None
    assert after.keypoints.names == ("left_end", "right_end", "bottom", "top")
    # The preset's numbers, not the paper's, which a model without such a branch is read with.
    assert (after.keypoint_head_channels, after.keypoint_head_layers) == (96, 8)
    assert all(torch.equal(new[name], value) for name, value in old.items())
    added = new.keys() - old.keys()
    assert added
    assert all(name.startswith("roi_heads.keypoint_") for name in added)


def test_a_keypoint_branch_starts_from_that_of_the_initial_model(run, of_red: Path) -> None:
    poses = (run().annotations.with_name("keypoints.json"),)
    recipe = msgspec.structs.replace(RECIPE, epochs=1, learning_rate=1e-9, weight_decay=0.0)
    settings = {"annotations": None, "keypoint_annotations": poses, "recipe": recipe}
    first = silently(run("first", initial=of_red, **settings))
    assert first is not None
    second = silently(run("second", initial=first, **settings))
    assert second is not None
    expected, found = load_checkpoint(first)[1], load_checkpoint(second)[1]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_network_learns_boxes_masks_and_keypoints_at_once(run) -> None:
    poses = run().annotations.with_name("keypoints.json")
    config = run(annotations=poses, keypoint_annotations=(poses,))
    path = silently(config)
    assert path is not None
    (entry,) = metrics(config)
    assert entry["losses"].keys() >= {"rpn_box", "box_class", "mask", "keypoint"}
    assert load_checkpoint(path)[0].keypoints is not None


def test_a_joint_run_learns_the_keypoints_of_all_its_files(run, of_red: Path) -> None:
    poses = run().annotations.with_name("keypoints.json")
    boxes = poses.with_name("posed_boxes.json")
    content = json.loads(poses.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    boxes.write_text(json.dumps(content))
    joint = run(
        annotations=poses,
        box_annotations=boxes,
        keypoint_annotations=(poses,),
        initial=of_red,
        predict_masks=True,
    )
    for config in (joint, msgspec.structs.replace(joint, predict_masks=False, initial=None)):
        dataset = train_module._Run(config, Console(quiet=True)).dataset
        known = [bool((dataset[0, i][1]["keypoints"][..., 2] > 0).any()) for i in range(6)]
        assert known == [True] * 6
    predicted = json.loads((joint.output / "predicted_masks.json").read_text())
    assert [a["keypoints"] for a in predicted["annotations"]] == [
        a["keypoints"] for a in content["annotations"]
    ]
    assert silently(joint) is not None


def test_without_files_of_keypoints_those_of_other_files_are_not_read(run) -> None:
    poses = run().annotations.with_name("keypoints.json")
    dataset = train_module._Run(run(annotations=poses), Console(quiet=True)).dataset
    assert "keypoints" not in dataset[0, 0][1]


def test_files_with_other_keypoints_than_the_branch_are_an_input_error(run) -> None:
    poses = run().annotations.with_name("keypoints.json")
    content = json.loads(poses.read_text())
    content["categories"][0]["keypoints"][0] = "tail"
    other = poses.with_name("other.json")
    other.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"other\.json: its keypoints differ from those in the key"
    ):
        silently(run(annotations=poses, box_annotations=other, keypoint_annotations=(poses,)))


def test_keypoints_are_measured_where_they_are_those_of_a_person(run, of_red: Path) -> None:
    poses = run().annotations.with_name("keypoints.json")
    content = json.loads(poses.read_text())
    content["categories"][0] |= {"keypoints": list(COCO_PERSON.names), "skeleton": []}
    for annotation in content["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][:3] * 17
    poses.write_text(json.dumps(content))
    config = run(
        annotations=None,
        keypoint_annotations=(poses,),
        initial=of_red,
        validation_annotations=poses,
    )
    assert silently(config) is not None
    scores = metrics(config)[-1]["scores"]
    assert set(scores) == {"images", "bbox", "segm", "keypoints"}
    assert set(scores["keypoints"]) == {"AP", "AP50", "AP75", "APm", "APl"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"annotations": None}, "nothing to train on"),
        (
            {"annotations": None, "keypoint_annotations": (Path("k"),)},
            "give the model to add it to .*--initial",
        ),
        (
            {
                "annotations": None,
                "keypoint_annotations": (Path("k"),),
                "initial": Path("default"),
                "box_annotations": Path("b"),
            },
            "b: no boxes are learned without annotations",
        ),
    ],
)
def test_a_keypoint_branch_alone_needs_keypoints_and_a_model(run, changes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        silently(run(**changes))
