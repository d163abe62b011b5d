import json

import pytest
from conftest import golden

from domainbed_kd import averaging, hparams_registry
from domainbed_kd.algorithms import ALGORITHMS, get_algorithm_class, hparam_names
from domainbed_kd.datasets import DATASETS
from domainbed_kd.seeds import seed_hash

DEFAULT, RANDOM = golden("default_hparams.json"), golden("random_hparams.json")
UPSTREAMS = [name for name in ALGORITHMS if name in DEFAULT]
DATASETS_OF_BOTH = list(DEFAULT["ERM"])


@pytest.mark.parametrize("algorithm", UPSTREAMS)
def test_default_hparams_equal_domainbeds(algorithm):
    for dataset in DATASETS_OF_BOTH:
        assert hparams_registry.default_hparams(algorithm, dataset) == DEFAULT[algorithm][dataset]


@pytest.mark.parametrize("algorithm", UPSTREAMS)
def test_random_hparams_equal_domainbeds_bit_for_bit(algorithm):
    for dataset, seeds in RANDOM[algorithm].items():
        for seed, expected in seeds.items():
            assert hparams_registry.random_hparams(algorithm, dataset, int(seed)) == expected


@pytest.mark.parametrize("algorithm", UPSTREAMS)
def test_a_runs_hparams_equal_domainbeds(algorithm):
    for dataset, runs in golden("train_hparams.json")["hparams"][algorithm].items():
        for seeds, expected in runs.items():
            seed = seed_hash(*map(int, seeds.split(",")))
            assert hparams_registry.random_hparams(algorithm, dataset, seed) == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_hparams_are_plain_values_that_survive_json(algorithm, dataset):
    for hparams in (hparams_registry.default_hparams(algorithm, dataset),
                    hparams_registry.random_hparams(algorithm, dataset, 3)):
        back = json.loads(json.dumps(hparams))
        assert back == hparams
        assert {k: type(v) for k, v in back.items()} == {k: type(v) for k, v in hparams.items()}


def test_names_of_hparams_are_known_without_a_class():
    used = {name for algorithm in ALGORITHMS for dataset in DATASETS
            for name in hparams_registry.search_space(algorithm, dataset)}
    assert used | set(hparams_registry.OPTIONAL) <= hparam_names()
    assert "lrr" not in hparam_names()


@pytest.mark.parametrize("kind", averaging.KINDS)
def test_hparams_of_averaging_are_optional_for_every_algorithm(kind):
    erm = get_algorithm_class("ERM")
    names = averaging.averaged(erm, kind).search_space("PACS").keys()
    assert names and names <= set(hparams_registry.OPTIONAL)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_draw_lies_on_both_sides_of_its_default_or_is_fixed(algorithm):
    """Catches ranges with equal ends, which never vary though they look as if they did."""
    draws = [hparams_registry.random_hparams(algorithm, "PACS", seed) for seed in range(40)]
    space = hparams_registry.search_space(algorithm, "PACS")
    for name, (default, _) in space.items():
        values = {json.dumps(draw[name]) for draw in draws}
        assert len(values) > 1 or values == {json.dumps(default)}, name
