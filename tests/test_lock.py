"""One process at a time holds a folder."""

import signal
import threading
import time

import fsspec
import pytest
from stores import new_folder

from adaptrm import lock, paths
from adaptrm.errors import InputError
from adaptrm.lock import hold


def test_one_holder_a_folder(store, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 3.0)
    with hold(store):
        assert paths.names(store) == [".lock"]
        with pytest.raises(InputError, match="another run holds this folder; wait for it or give another --out"):
            hold(store).__enter__()
        assert paths.names(store) == [".lock"]
    assert paths.names(store) == []
    with hold(store):
        pass


def test_what_is_written_anew_between_a_look_and_a_read_is_read_as_it_is_then(s3, monkeypatch):
    file = paths.join(new_folder("s3"), ".lock")
    paths.write_bytes(file, lock._sign("a", 0))
    store = fsspec.get_filesystem_class("s3")
    look, looks = store._info, 0

    async def looked_at(self, path, *args, **options):
        nonlocal looks
        found, looks = await look(self, path, *args, **options), looks + 1
        await self._pipe_file(path, lock._sign("a", looks))
        return found

    monkeypatch.setattr(store, "_info", looked_at)
    assert lock._content(file) == lock._sign("a", looks)
    assert looks


@pytest.fixture
def in_background():
    """What a script starts with ``&`` ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_background")
def test_a_dead_holder_is_followed_and_one_that_wakes_up_stops(monkeypatch, capsys):
    store = new_folder("memory")
    monkeypatch.setattr(lock, "LEASE", 1.2)
    paths.write_bytes(paths.join(store, ".lock"), lock._sign("somebody", 7))
    start, taken, ended = time.monotonic(), lock._sign("a third", 0), threading.Event()

    def take() -> None:  # again and again: a sign of the holder's own may come between
        while not ended.wait(0.01):
            paths.write_bytes(paths.join(store, ".lock"), taken)

    third = threading.Thread(target=take)
    try:
        with pytest.raises(InputError, match="another run took this folder over"), hold(store):
            assert time.monotonic() - start > lock.LEASE
            assert "waiting up to 1 s for a sign of its life" in capsys.readouterr().err
            third.start()
            while True:
                time.sleep(0.01)
    finally:
        ended.set()
        third.join()
    assert paths.read_bytes(paths.join(store, ".lock")) == taken  # the lock of the third stays


def test_of_many_that_wait_for_a_dead_holder_one_follows(monkeypatch):
    store = new_folder("memory")
    monkeypatch.setattr(lock, "LEASE", 3.0)
    paths.write_bytes(paths.join(store, ".lock"), b"not what a holder writes")
    held, ended = [], threading.Event()

    def wait(number: int) -> None:
        try:
            with hold(store):
                held.append(number)
                ended.wait(10)
        except InputError as wrong:
            assert "another run holds this folder" in str(wrong)
            ended.set()

    both = [threading.Thread(target=wait, args=(number,)) for number in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    assert len(held) == 1
