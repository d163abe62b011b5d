"""The root of every draw, split and job seed: a hash that depends on the values alone."""

import hashlib


def seed_hash(*args) -> int:
    """A seed in [0, 2**31) from plain Python scalars, strings and lists, as DomainBed derives it.

    The md5 of the text of the argument tuple, so `seed_hash(0)` hashes "(0,)". NumPy scalars
    print differently from version to version; convert them first.
    """
    text = str(args).encode("utf-8")
    return int(hashlib.md5(text).hexdigest(), 16) % 2**31
