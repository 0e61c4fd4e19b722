import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskcast.engines.errors import InputError
from maskcast.pipeline.wire.message import topic
from maskcast.pipeline.wire.rights import ClientRights, make_rights, read_rights, write_rights

names = st.text("ab1", min_size=1, max_size=3)
patterns = st.one_of(names, names.map(lambda name: f"{name}*"), st.just("*"))


def sees(rights, name):
    return any(
        name.startswith(one[:-1]) if one.endswith("*") else name == one for one in rights.sources
    )


@given(st.lists(patterns, max_size=4), names, st.text("v1/ab", max_size=6))
def test_what_is_granted_is_exactly_what_is_subscribed_to_and_may_be_seen(sources, name, prefix):
    rights = ClientRights(sources=tuple(sources))
    granted = rights.granted(prefix.encode())
    for kind in ("instances", "event"):
        message = topic(name, kind)
        matching = [part for part in granted if message.startswith(part)]
        assert len(matching) == (message.startswith(prefix.encode()) and sees(rights, name))
    assert rights.allows(name) == sees(rights, name)


@pytest.mark.parametrize(
    ("subscription", "granted"),
    [
        (b"", [b"v1/door/", b"v1/yard"]),
        (b"v1/", [b"v1/door/", b"v1/yard"]),
        (b"v1/door", [b"v1/door/"]),
        (b"v1/door/event", [b"v1/door/event"]),
        (b"v1/door2/", []),
        (b"v1/yard3/", [b"v1/yard3/"]),
        (b"v1/cellar/", []),
        (b"v2/door/", []),
    ],
)
def test_a_subscription_is_narrowed_to_the_sources_of_a_client(subscription, granted):
    assert sorted(ClientRights(sources=("door", "yard*")).granted(subscription)) == granted


def test_rights_are_written_and_read_back(tmp_path):
    rights = make_rights(["door", "yard*"], control=True)
    assert write_rights(tmp_path / "alice.key", rights) == tmp_path / "alice.yaml"
    assert read_rights(tmp_path / "alice.key") == rights
    assert [path.name for path in tmp_path.iterdir()] == ["alice.yaml"]


def test_what_is_not_listed_is_not_granted(tmp_path):
    (tmp_path / "alice.yaml").write_text("{}")
    rights = read_rights(tmp_path / "alice.key")
    assert not rights.control
    assert rights.granted(b"") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sources: door",
        "sources: ['do*or']",
        "sources: ['../door']",
        "sources: ['**']",
        "sources: [door]\ncontrol: maybe",
        "sources: [door]\nadmin: true",
        "sources: [door",
        "- door",
        "sources: [" + "x, " * 40_000 + "]",
    ],
)
def test_a_malformed_rights_file_is_reported_in_one_line(tmp_path, text):
    (tmp_path / "alice.yaml").write_text(text)
    with pytest.raises(InputError, match=r"alice\.yaml") as caught:
        read_rights(tmp_path / "alice.key")
    assert "\n" not in str(caught.value)


def test_an_invalid_source_name_is_refused():
    with pytest.raises(InputError, match="invalid source 'a/b'"):
        make_rights(["door", "a/b"], control=False)
    with pytest.raises(InputError, match="too many"):
        make_rights(["door"] * 2000, control=False)
