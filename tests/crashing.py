"""A place that dies at its k-th call, before or after the call took effect, to find every state that a dead process can leave.

    for crash in everywhere(fresh, lambda place: Store(place).seal(work, "models/a/v1")):
        look(Store(crash.inner))       # as the next process finds it

Once dead it stays dead: a cleanup in the code under test must not reach the place, for a killed process cleans nothing up.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator

from waystation.place import Entry, Place


class Crash(BaseException):
    "The process is gone. Not an Exception: no `except Exception` of the code under test may swallow it."


class Crashing(Place):
    "`place`, which dies at call number `at` (from 1; 0: never). Each key of a `delete` is a call of its own."

    workers = 1  # one call after the other, so that number k is the same call each time

    def __init__(self, place: Place, at: int, after: bool = False, exit: bool = False):
        self.inner, self.at, self.after, self.exit = place, at, after, exit
        self.url, self.checked = place.url, place.checked
        self.calls, self.log, self.dead = 0, [], False
        self._lock = threading.Lock()

    def __repr__(self):
        last = self.log[self.at - 1] if 0 < self.at <= len(self.log) else "never"
        return f"<crash {'after' if self.after else 'before'} call {self.at}: {last}>"

    def _die(self):
        self.dead = True
        if self.exit:
            os._exit(137)  # as kill -9: no handlers, no buffers
        raise Crash(repr(self))

    def _call(self, what: str, call: Callable):
        with self._lock:
            if self.dead:
                raise Crash("dead already")
            self.calls += 1
            self.log.append(what)
            mine = self.calls == self.at
            if mine and not self.after:
                self._die()
        done = call()
        if mine:
            self._die()
        return done

    def create(self, key: str, data: bytes) -> bool:
        return self._call(f"create {key}", lambda: self.inner.create(key, data))

    def put(self, key, path, digest) -> None:
        return self._call(f"put {key}", lambda: self.inner.put(key, path, digest))

    def read(self, key: str) -> bytes:
        return self._call(f"read {key}", lambda: self.inner.read(key))

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        yield from self._call(f"chunks {key}", lambda: list(self.inner.chunks(key, size)))

    def size(self, key: str) -> int | None:
        return self._call(f"size {key}", lambda: self.inner.size(key))

    def has(self, key: str, size: int, digest: str) -> bool:
        return self._call(f"has {key}", lambda: self.inner.has(key, size, digest))

    def entries(self, prefix: str) -> Iterable[Entry]:
        return self._call(f"entries {prefix}", lambda: list(self.inner.entries(prefix)))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._call(f"delete {key}", lambda key=key: self.inner.delete([key]))

    def sweep(self) -> None:
        return self._call("sweep", self.inner.sweep)

    def __getattr__(self, name):  # what a kind of place has besides, `path` for example; not counted
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def everywhere(fresh: Callable[[], Place], act: Callable[[Place], object]) -> Iterator[Crashing]:
    "Run `act` on a fresh place with a crash at every call, before and after it; yields each dead one."
    for after in (False, True):
        for at in itertools.count(1):
            place = Crashing(fresh(), at, after)
            try:
                act(place)
            except Crash:
                pass
            if not place.dead:
                if place.calls >= at:
                    raise AssertionError(f"{place!r} was swallowed")
                break
            yield place
