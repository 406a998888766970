"""The memory of links: what is kept, what is forgotten, what is not believed."""

import json
import time

import pytest

from localreason.cluster.link import LinkBook

LINK = (0.001, 1e7)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deeper" / "links.json"


def test_a_link_that_was_timed_one_way_holds_for_both(path):
    LinkBook(path).note({("attic", "phone"): LINK})
    LinkBook(path).note({("phone", "barn"): (0.5, 1e6)})
    assert LinkBook(path).read() == {
        ("attic", "phone"): LINK,
        ("phone", "attic"): LINK,
        ("phone", "barn"): (0.5, 1e6),
        ("barn", "phone"): (0.5, 1e6),
    }


def test_each_direction_is_its_own_once_both_were_timed(path):
    LinkBook(path).note({("a", "b"): LINK})
    LinkBook(path).note({("b", "a"): (0.2, 1e5)})
    assert LinkBook(path).read() == {("a", "b"): LINK, ("b", "a"): (0.2, 1e5)}


def test_what_is_old_is_forgotten(path):
    LinkBook(path).note({("a", "b"): LINK})
    rows = json.loads(path.read_text())
    for row, days in ((rows[0], 6), (dict(rows[0], **{"from": "c"}), 8)):
        path.write_text(json.dumps([{**row, "at": time.time() - 86_400 * days}]))
        assert len(LinkBook(path).read()) == (2 if days == 6 else 0)


@pytest.mark.parametrize(
    "text", ["", "{}x", '[{"from": "a"}]', '{"a": 1}', '[{"from":"a","to":"b","link":[0,0],"at":9e9}]']
)
def test_what_cannot_be_read_counts_as_unknown_and_is_replaced(path, text):
    path.parent.mkdir()
    path.write_text(text)
    assert LinkBook(path).read() == {}
    LinkBook(path).note({("a", "b"): LINK})
    assert LinkBook(path).read()["a", "b"] == LINK


@pytest.mark.parametrize("bad", [(99.0, 1e7), (float("nan"), 1e7), (0.001, 0.0), (0.001, float("inf"))])
def test_one_impossible_link_takes_no_other_with_it(path, bad):
    LinkBook(path).note({("a", "b"): LINK, ("a", "c"): bad})
    assert LinkBook(path).read() == {("a", "b"): LINK, ("b", "a"): LINK}
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**rows[0], "from": "c", "link": bad}, 5, *rows]))
    assert LinkBook(path).read() == {("a", "b"): LINK, ("b", "a"): LINK}


def test_a_folder_that_cannot_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("")
    book = LinkBook(tmp_path / "file" / "links.json")
    book.note({("a", "b"): LINK})
    assert book.read() == {}
