"""Caches of other people, each asked in its own cheapest way: a function of the key that returns the value kept under it.

`dict` knows no bound and no threads: it is the floor. `lru_cache` is functools' own, in C. The others are bounded, and safe under threads.
cachetools, cachebox and theine are not part of the workspace: the group `bench` of pyproject.toml lists them.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from importlib import import_module

Get = Callable[[Hashable], object]

ROOM = 1000


def dict_cache(key: Hashable, value: object) -> Get:
    """A dict."""
    return {key: value}.__getitem__


def lru_cache(key: Hashable, value: object) -> Get:
    """functools.lru_cache around a function that would build."""
    return functools.lru_cache(maxsize=ROOM)(lambda _: value)


def ordered_dict_cache(key: Hashable, value: object) -> Get:
    """An OrderedDict and a lock, the cache that the seeds' users would write."""
    kept, lock = OrderedDict({key: value}), threading.Lock()

    def get(asked: Hashable) -> object:
        with lock:
            found = kept[asked]
            kept.move_to_end(asked)
            return found

    return get


def cachetools_cache(key: Hashable, value: object) -> Get:
    """cachetools.LRUCache, and the lock that it leaves to its user."""
    kept, lock = import_module("cachetools").LRUCache(ROOM), threading.Lock()
    kept[key] = value

    def get(asked: Hashable) -> object:
        with lock:
            return kept[asked]

    return get


def cachebox_cache(key: Hashable, value: object) -> Get:
    """cachebox.LRUCache, written in Rust, with its lock inside."""
    kept = import_module("cachebox").LRUCache(ROOM)
    kept[key] = value
    return kept.__getitem__


def theine_cache(key: Hashable, value: object) -> Get:
    """theine.Cache, W-TinyLFU."""
    kept = import_module("theine").Cache(ROOM)
    kept.set(key, value)
    return lambda asked: kept.get(asked)[0]


PEERS: dict[str, Callable[[Hashable, object], Get]] = {
    "dict": dict_cache,
    "functools.lru_cache": lru_cache,
    "OrderedDict + lock": ordered_dict_cache,
    "cachetools + lock": cachetools_cache,
    "cachebox": cachebox_cache,
    "theine": theine_cache,
}

OPTIONAL = {"cachetools + lock": "cachetools", "cachebox": "cachebox", "theine": "theine"}
"""What has to be installed for a peer."""
