import pytest
from keyring import admit, allow, new_client

from maskcast.engines.errors import InputError
from maskcast.pipeline.wire.curve import new_keys, read_public_key
from maskcast.pipeline.wire.server_keys import AllowedClients, ServerKeys


@pytest.fixture
def secret(tmp_path):
    return new_keys(tmp_path / "server")[1]


@pytest.fixture
def folder(tmp_path):
    new_client(tmp_path / "clients" / "anna", "door")
    new_client(tmp_path / "clients" / "bert", control=True)
    return tmp_path / "clients"


def keys(folder, *names):
    return {read_public_key(folder / f"{name}.key") for name in names}


def test_allowed_clients_are_a_folder_or_a_list(secret, folder):
    for given in (folder, str(folder)):
        assert ServerKeys.read(secret, given).clients.keys() == keys(folder, "anna", "bert")
    (anna,) = ServerKeys.read(secret, [str(folder / "anna.key")]).clients.values()
    assert anna.sources == ("door",)


def test_only_those_with_the_right_may_control(secret, folder):
    assert ServerKeys.read(secret, folder, "control").clients.keys() == keys(folder, "bert")
    allow(folder / "bert.key")
    with pytest.raises(InputError, match="--control"):
        ServerKeys.read(secret, folder, "control")


def test_a_client_without_rights_is_refused_with_the_command_that_gives_them(secret, folder):
    (folder / "anna.yaml").unlink()
    with pytest.raises(InputError, match=r"maskcast keys allow .*anna\.key --sources"):
        ServerKeys.read(secret, folder)
    assert len(ServerKeys.read(secret, folder, "publish").clients) == 2


def test_allowing_no_client_is_an_input_error(secret, tmp_path):
    for nobody in (tmp_path / "missing", []):
        with pytest.raises(InputError, match=r"no client keys|not a folder"):
            ServerKeys.read(secret, nobody)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no client keys"):
        ServerKeys.read(secret, tmp_path / "empty")


def test_a_secret_is_not_shown(secret, folder):
    read = ServerKeys.read(secret, folder)
    assert read.own.secret.decode() not in repr(read)


def test_changes_of_keys_and_rights_are_returned_and_unreadable_ones_allow_no_client(
    secret, folder, caplog
):
    clients = AllowedClients(ServerKeys.read(secret, folder))
    anna, bert = (read_public_key(folder / f"{name}.key") for name in ("anna", "bert"))
    assert clients.reload() == frozenset()
    allow(folder / "anna.key", "door", "yard")
    assert clients.reload() == {anna}
    assert clients.rights[anna].sources == ("door", "yard")
    (folder / "broken.key").write_text("nonsense")
    assert clients.reload() == frozenset()
    (folder / "bert.yaml").write_text("nonsense")
    assert clients.reload() == {bert}
    assert clients.rights.keys() == {anna}
    (folder / "anna.key").unlink()
    assert clients.reload() == {anna}
    assert not clients.rights
    new_client(folder.parent / "carl")
    admit(folder.parent / "carl.key", folder)
    assert clients.reload() == frozenset()
    assert len(clients.rights) == 1
    assert "client_not_allowed" in caplog.messages


def test_a_change_before_the_first_check_is_not_missed(secret, folder):
    read = ServerKeys.read(secret, folder)
    allow(folder / "anna.key", "yard")
    clients = AllowedClients(read)
    assert clients.reload() == keys(folder, "anna")
