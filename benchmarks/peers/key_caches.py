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
    entries, lock = OrderedDict({key: value}), threading.Lock()

    def get(key: Hashable) -> object:
        with lock:
            value = entries[key]
            entries.move_to_end(key)
            return value

    return get


def cachetools_cache(key: Hashable, value: object) -> Get:
    """cachetools.LRUCache, and the lock that it leaves to its user."""
    cache, lock = import_module("cachetools").LRUCache(ROOM), threading.Lock()
    cache[key] = value

    def get(key: Hashable) -> object:
        with lock:
            return cache[key]

    return get


def cachebox_cache(key: Hashable, value: object) -> Get:
    """cachebox.LRUCache, written in Rust, with its lock inside."""
    cache = import_module("cachebox").LRUCache(ROOM)
    cache[key] = value
    return cache.__getitem__


def theine_cache(key: Hashable, value: object) -> Get:
    """theine.Cache, W-TinyLFU."""
    cache = import_module("theine").Cache(ROOM)
    cache.set(key, value)
    return lambda key: cache.get(key)[0]


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
