import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.packages import check_installed


def test_packages_that_are_installed_pass() -> None:
    check_installed(("numpy", "json.decoder"), "a test", "dev")


@pytest.mark.parametrize("absent", ["absent_package", "absent_package.part"])
def test_a_missing_package_is_an_error_of_one_line_that_names_the_extra(absent: str) -> None:
    with pytest.raises(InputError, match=rf"^a test needs {absent}, .*\'maskcast\[dev\]\'.*$"):
        check_installed(("numpy", absent), "a test", "dev")
