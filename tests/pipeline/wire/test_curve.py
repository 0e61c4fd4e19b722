import os
import stat

import pytest
import zmq
import zmq.auth

from maskcast.engines.errors import InputError
from maskcast.pipeline.wire.curve import (
    ClientKeys,
    new_keys,
    read_key_pair,
    read_public_key,
)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read_the_secret_file_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        public, secret = new_keys(tmp_path / "server")
    finally:
        os.umask(before)
    assert (public.name, secret.name) == ("server.key", "server.key_secret")
    assert (mode(public), mode(secret)) == (0o644, 0o600)


def test_keys_are_a_pair_that_pyzmq_reads_and_the_public_file_holds_no_secret(tmp_path):
    public, secret = new_keys(tmp_path / "gate-2.north")
    pair = read_key_pair(secret)
    assert zmq.curve_public(pair.secret) == pair.public == read_public_key(public)
    assert zmq.auth.load_certificate(secret) == (pair.public, pair.secret)
    assert zmq.auth.load_certificate(public) == (pair.public, None)
    assert pair.secret not in public.read_bytes()
    assert pair.secret.decode() not in repr(pair)


@pytest.mark.parametrize("there", ["server.key", "server.key_secret"])
def test_keys_that_exist_are_never_overwritten(tmp_path, there):
    (tmp_path / there).write_text("precious")
    with pytest.raises(InputError, match=f"{there}: already exists"):
        new_keys(tmp_path / "server")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


def test_a_folder_is_no_name_for_keys(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        new_keys(tmp_path)


@pytest.mark.parametrize("permissions", [0o640, 0o604, 0o644, 0o660])
def test_a_secret_that_others_can_read_is_refused_with_the_command_that_protects_it(
    tmp_path, permissions
):
    _, secret = new_keys(tmp_path / "server")
    secret.chmod(permissions)
    with pytest.raises(InputError, match=f"chmod 600 {secret}") as caught:
        read_key_pair(secret)
    assert "\n" not in str(caught.value)


def test_public_and_secret_files_are_not_mistaken_for_each_other(tmp_path):
    public, secret = new_keys(tmp_path / "server")
    with pytest.raises(InputError, match="no secret key"):
        read_key_pair(public)
    with pytest.raises(InputError, match="contains a secret key"):
        read_public_key(secret)
    with pytest.raises(InputError, match="contains a secret key"):
        ClientKeys.read(secret, secret)


@pytest.mark.parametrize(
    "text", ["", "hello", 'public-key = "too short"', f'public-key = "{"~" * 40}"', "\xff\x00"]
)
def test_a_file_that_holds_no_key_is_refused(tmp_path, text):
    path = tmp_path / "odd.key"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="not a key file"):
        read_public_key(path)


def test_keys_that_are_no_pair_are_refused(tmp_path):
    (_, one), (_, other) = new_keys(tmp_path / "one"), new_keys(tmp_path / "other")
    lines, foreign = one.read_text().splitlines(), other.read_text().splitlines()
    one.write_text("\n".join([*lines[:-1], foreign[-1]]))
    with pytest.raises(InputError, match="do not match"):
        read_key_pair(one)


def test_a_key_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nobody\.key"):
        read_public_key(tmp_path / "nobody.key")
