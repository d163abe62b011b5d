"""Reads untrusted JSON within bounds that later steps can handle."""

import json

# Bounds on the depth, and on the size of an integer.
_MOST_NESTED, _MOST_BITS = 50, 63


def parse_json(text: bytes | str):
    """The content of untrusted JSON; NaN and Infinity are allowed.

    Raises:
        ValueError: with a short reason, if it is not JSON, is nested too deeply, or holds an
            integer of more than 63 bits or text that cannot be encoded as UTF-8.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [found]
    for _ in range(_MOST_NESTED):
        below = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                value.encode()  # a lone surrogate is a ValueError
            elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise ValueError("an integer of more than 63 bits")
        if not below:
            return found
        level = below
    raise ValueError("nested too deeply")
