import pytest
from conftest import golden

from domainbed_kd.seeds import seed_hash


def as_argument(value):
    is_tuple = isinstance(value, dict) and "__tuple__" in value
    return tuple(value["__tuple__"]) if is_tuple else value


@pytest.mark.parametrize("vector", golden("seed_hash.json")["vectors"],
                         ids=lambda v: v["hashed_text"])
def test_seed_hash_equals_domainbeds(vector):
    assert seed_hash(*map(as_argument, vector["args"])) == vector["hash"]
