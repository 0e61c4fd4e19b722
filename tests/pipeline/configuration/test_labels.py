from __future__ import annotations

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.labels import label_of

NAMES = ("background", "person", "dog")


def test_a_class_is_found_by_its_name() -> None:
    assert [label_of(name, NAMES, "model.classes") for name in NAMES[1:]] == [1, 2]


def test_a_class_may_have_the_name_of_the_background() -> None:
    assert label_of("background", ("background", "dog", "background"), "model.classes") == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("persn", "zone door: the model has no class 'persn'; did you mean 'person'?"),
        ("bus", "zone door: the model has no class 'bus'; it has person, dog"),
        ("background", "zone door: the model has no class 'background'; it has person, dog"),
    ],
)
def test_a_class_that_the_model_does_not_have_is_named(name: str, reason: str) -> None:
    with pytest.raises(InputError) as raised:
        label_of(name, NAMES, "zone door")
    assert str(raised.value) == reason


def test_a_model_with_many_classes_is_not_listed_whole() -> None:
    many = ("background", *(f"kind {i}" for i in range(900)))
    with pytest.raises(InputError) as raised:
        label_of("zzz", many, "model.classes")
    assert len(str(raised.value)) < 300
