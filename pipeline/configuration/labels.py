"""Labels: the integers that stand for a model's class names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from maskcast.engines.errors import InputError

_MAX_NAMED = 20


def label_of(name: str, label_names: Sequence[str], place: str) -> int:
    """Return the label of a class.

    Args:
        name: of the class.
        label_names: the model's class names, indexed by label; the first is the background's.
        place: where the configuration names the class, for the message.

    Raises:
        InputError: the model has no such class.
    """
    known = label_names[1:]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        has = f"it has {', '.join(known[:_MAX_NAMED])}"
        advice = f"did you mean {near[0]!r}?" if near else has
        raise InputError(f"{place}: the model has no class {name!r}; {advice}")
    return label_names.index(name, 1)
