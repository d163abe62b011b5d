"""DomainBed's 34 algorithms at 155 settings, without a seed between construction and update."""


import pytest
import short_runs
import torch
from conftest import golden

from domainbed_kd.algorithms import ALGORITHMS, DOMAINBED, ermplusplus, get_algorithm_class

CASES = {case["id"]: case for case in golden("algorithms_wide.json")["cases"]}


@pytest.fixture(autouse=True)
def one_thread():
    """As the goldens were made: another number of threads sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_is_domainbeds_without_a_seed_after_construction(case, monkeypatch):
    if "sma_start_iter" in case:  # the first update that is averaged with the one before it
        monkeypatch.setattr(ermplusplus, "AVERAGED_FROM", case["sma_start_iter"] - 1)
    if tuple(case["input_shape"]) == (3, 64, 64):
        case = case | {"hparams": case["hparams"] | {"weights": "none"}}
    ours = short_runs.run(get_algorithm_class(case["algorithm"]), case)
    found = short_runs.differences(ours, case["upstream"])
    tolerance = {key: max(1e-4, 30 * moved) for key, moved in case["sensitivity"].items()}
    assert {what: apart for what, apart in found.items()
            if not apart <= tolerance.get(what, 0.0)} == {}


def test_every_algorithm_of_domainbeds_is_here_and_held_to_its_runs():
    assert {case["algorithm"] for case in CASES.values()} == set(DOMAINBED)
    assert set(DOMAINBED) <= set(ALGORITHMS)
