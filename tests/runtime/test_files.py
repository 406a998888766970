"""Files that appear whole or not at all."""

import contextlib
import stat
import sys

import pytest

from localreason.runtime.files import replacing


def test_what_was_written_takes_the_place_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    with contextlib.suppress(KeyError), replacing(path) as part:
        part.write_text("half")
        raise KeyError

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"

    with replacing(path) as one:
        with replacing(path) as other:
            other.write_text("other")
        one.write_text("one")

    assert path.read_text() == "one"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such rights")
def test_rights_are_those_asked_for_from_the_first_byte_on(tmp_path):
    with replacing(tmp_path / "key", 0o600) as part:
        assert stat.S_IMODE(part.stat().st_mode) == 0o600

    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_name_as_long_as_a_file_system_takes(tmp_path):
    path = tmp_path / ("ä" * 127)

    with replacing(path) as part:
        part.write_text("new")

    assert path.read_text() == "new"


def test_a_file_without_a_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "a"):
        pytest.fail("there is no place to write to")
