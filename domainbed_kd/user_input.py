"""What users type: the nearest known name for a mistyped one, and hparams as JSON."""

import difflib
import json
import math
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """" Did you mean X?" with the nearest known name, whatever its case; empty if none is near."""
    known = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.5)
    return f" Did you mean {known[near[0]]}?" if near else ""


def parse_hparams(text: str) -> dict:
    """The hparams of a JSON object, such as '{"lr": 0.001}'.

    Raises:
        ValueError: if the text is no JSON object, or holds a number that is not finite.
    """
    def finite(number):
        if not math.isfinite(float(number)):
            raise ValueError(f"--hparams: {number} is no finite number: {text}")
        return float(number)

    try:
        changes = json.loads(text, parse_float=finite, parse_constant=finite)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--hparams is not JSON ({error}): {text[:200]}") from None
    if not isinstance(changes, dict):
        raise ValueError(f'--hparams takes a JSON object such as {{"lr": 0.001}}; found {text}')
    return changes
