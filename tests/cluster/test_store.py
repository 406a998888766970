"""Window files put together from parts: kept, resumed, shared, limited, never believed without their digest."""

import contextlib
import hashlib
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from localreason.cluster.errors import ClusterError, ProtocolError
from localreason.cluster.store import Piece, Recipe, Store, make_recipe
from localreason.quant.gguf import ModelFile
from localreason.runtime.errors import ModelUnsupported
from tests.gguf_models import write_model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return ModelFile(write_model(tmp_path_factory.mktemp("m") / "whole.gguf", n_layers=4))


def recipe_of(store, file, first, end):
    window = file.window(first, end, False)
    return window, make_recipe(file, window, store.digests(file))


def fill(file, window, building, most=10**9):
    """Send what is missing, at most so many bytes; how many were sent."""
    sent = 0
    while (missing := building.missing()) is not None:
        index, offset = missing
        part = window.parts[index]
        data = part.data or b"".join(file.read(part))
        if sent + len(data) > most:
            return sent
        building.write(index, offset, data)
        sent += len(data)
    return sent


def build(store, file, first, end):
    window, recipe = recipe_of(store, file, first, end)
    building = store.build(recipe)
    if building is None:
        return store.path(recipe), 0
    try:
        sent = fill(file, window, building)
        return building.finish(), sent
    finally:
        building.close()


def test_a_window_is_kept_and_its_layers_serve_others(tmp_path, file):
    store = Store(tmp_path, 1 << 30)
    path, sent = build(store, file, 0, 3)
    assert sent == sum(part.n_bytes for part in file.window(0, 3, False).parts)
    assert path.stat().st_size == file.window(0, 3, False).n_bytes
    assert build(store, file, 0, 3)[1] == 0
    assert build(store, file, 1, 3)[1] == 0
    layer = sum(tensor.n_bytes for tensor in file.layer(3))
    # The norms of the tiny model are alike in all layers, and what is alike is not sent again.
    assert layer * 0.99 < build(Store(tmp_path, 1 << 30), file, 1, 4)[1] < layer


def test_the_model_file_itself_is_read_where_it_is(tmp_path, file):
    stub = sum(part.n_bytes for part in file.window(0, 3, False).parts if part.data)
    assert build(Store(tmp_path / "a", 1 << 30, [file.path]), file, 0, 3)[1] == stub
    other = tmp_path / "models" / file.path.name
    other.parent.mkdir()
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1  # the same name and size, other bytes
    other.write_bytes(data)
    path, sent = build(Store(tmp_path / "b", 1 << 30, [other.parent]), file, 2, 4)
    assert sent > stub
    assert path.read_bytes() == build(Store(tmp_path / "c", 1 << 30), file, 2, 4)[0].read_bytes()


def test_an_interrupted_window_goes_on_where_it_stopped(tmp_path, file):
    store = Store(tmp_path, 1 << 30)
    window, recipe = recipe_of(store, file, 0, 3)
    total = sum(part.n_bytes for part in window.parts)
    building = store.build(recipe)
    first = fill(file, window, building, total // 2)
    building.close()
    building = Store(tmp_path, 1 << 30).build(recipe)
    second = fill(file, window, building)
    building.finish()
    assert 0 < first < total
    assert first + second == total


def test_a_damaged_beginning_is_sent_again(tmp_path, file):
    store = Store(tmp_path, 1 << 30)
    window, recipe = recipe_of(store, file, 0, 3)
    building = store.build(recipe)
    fill(file, window, building, 40_000)
    building.close()
    part = next(tmp_path.glob("*.part"))
    data = bytearray(part.read_bytes())
    data[len(recipe.header) + 5] ^= 1
    part.write_bytes(data)
    building = store.build(recipe)
    assert building.missing() == (0, 0)
    building.close()


@pytest.mark.parametrize("harm", ["digest", "part", "offset", "long"])
def test_other_bytes_than_asked_for_are_refused(tmp_path, file, harm):
    store = Store(tmp_path, 1 << 30)
    window, recipe = recipe_of(store, file, 0, 1)
    building = store.build(recipe)
    index, offset = building.missing()
    data = window.parts[index].data or b"".join(file.read(window.parts[index]))
    wrong = {
        "digest": (index, offset, bytes([data[0] ^ 1]) + data[1:]),
        "part": (index + 1, offset, data),
        "offset": (index, offset + 1, data[1:]),
        "long": (index, offset, data + b"x"),
    }[harm]
    with pytest.raises(ProtocolError):
        building.write(*wrong)
    building.close()
    assert not list(tmp_path.glob("*.gguf"))


def test_a_limit_drops_what_was_used_longest_ago_and_refuses_what_is_too_large(tmp_path, file):
    size = file.window(0, 1, False).n_bytes
    store = Store(tmp_path, 3 * size)
    paths = [build(Store(tmp_path, 3 * size), file, i, i + 1)[0] for i in range(3)]
    build(Store(tmp_path, 3 * size), file, 0, 1)
    build(store, file, 3, 4)
    assert paths[0].exists(), "used again since"
    assert not paths[1].exists()
    session = Store(tmp_path, 3 * size)
    with pytest.raises(ClusterError, match="larger than the cache's limit"):
        build(Store(tmp_path, size), file, 0, 3)
    for i in range(3):  # of one ring: none can be dropped for another
        build(session, file, i, i + 1)
    with pytest.raises(ClusterError, match=f"windows in use take {3 * size} bytes and one more {size}"):
        build(session, file, 3, 4)
    assert store.clear() > 0
    assert store.entries() == []


def test_two_that_build_the_same_window_do_not_disturb_each_other(tmp_path, file):
    found = []

    def work():
        found.append(build(Store(tmp_path, 1 << 30), file, 0, 3))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({path for path, _ in found}) == 1
    assert sum(sent > 0 for _, sent in found) == 1
    assert found[0][0].stat().st_size == file.window(0, 3, False).n_bytes


@pytest.mark.parametrize(
    ("header", "pieces"),
    [
        (bytes(33), ()),
        (bytes(32 << 20), ()),
        (bytes(32), (Piece(b"short", 5, 0),)),
        (bytes(32), (Piece(bytes(32), 0, 0),)),
        (bytes(32), (Piece(bytes(32), 1 << 50, 0),)),
    ],
)
def test_recipes_of_impossible_sizes_are_refused(header, pieces):
    with pytest.raises(ProtocolError):
        Recipe(header, pieces)


@pytest.mark.parametrize("ending", ["lock", "gguf.part"])
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, file, ending):
    store = Store(tmp_path, 1 << 30)
    _, recipe = recipe_of(store, file, 0, 1)
    (tmp_path / f"{recipe.name}.{ending}").mkdir()  # nothing can be opened there, by root neither
    for _ in range(2):  # the lock is not kept
        with pytest.raises(ClusterError, match=r"cannot be written: Is a directory; .* --cache"):
            store.build(recipe)


def test_digests_are_read_once(tmp_path, file):
    store = Store(tmp_path, 1 << 30)
    found = store.digests(file)
    tensor = file.layer(2)[0]
    data = file.path.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes]
    assert found[tensor.offset] == hashlib.sha256(data).digest()
    assert Store(tmp_path, 1 << 30).digests(file) == found


def test_what_an_earlier_ring_used_is_dropped_for_the_next_one(tmp_path, file):
    size = file.window(0, 1, False).n_bytes
    store = Store(tmp_path, 2 * size + size // 2)
    for first in range(3):
        store.forget_used()
        build(store, file, first, first + 1)
    assert len(store.entries()) == 2


def test_a_begun_window_needs_only_the_rest_of_its_space(tmp_path, file, monkeypatch):
    window, recipe = recipe_of(Store(tmp_path, 1 << 30), file, 0, 3)
    building = Store(tmp_path, 1 << 30).build(recipe)
    fill(file, window, building, most=window.n_bytes // 2)
    building.close()
    begun = next(tmp_path.glob("*.part")).stat().st_size
    assert begun > 0
    free = [recipe.n_bytes - begun - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    with pytest.raises(ClusterError, match=f"takes {recipe.n_bytes - begun} bytes and {free[0]} are free"):
        Store(tmp_path, recipe.n_bytes).build(recipe)
    free[0] += 1
    build(Store(tmp_path, recipe.n_bytes), file, 0, 3)


def test_a_window_of_another_architecture_is_refused(tmp_path, file):
    window = file.window(0, 1, False)
    store = Store(tmp_path, 1 << 30)
    strange = replace(window, header=window.header.replace(b"llama", b"mamba"))
    building = store.build(make_recipe(file, strange, store.digests(file)))
    with contextlib.closing(building):
        fill(file, window, building)
        with pytest.raises(ModelUnsupported, match="windows of a mamba are not known here"):
            building.finish()
