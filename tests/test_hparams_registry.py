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
        if name == "gda":  # Transfer's is false by default and true in every draw of DomainBed's
            continue
        values = {json.dumps(draw[name]) for draw in draws}
        assert len(values) > 1 or values == {json.dumps(default)}, name


OURS = ("KD", "KDDG", "SCMD", "RISE", "MosaicKD", "FourDs", "SDViT", "VL2VADiP",
        "VL2VSD", "WAKD", "LFME", "CLIPood", "XDED")


@pytest.mark.parametrize("algorithm", OURS)
def test_every_number_of_our_methods_says_what_it_takes_and_is_refused_by_name_otherwise(
        algorithm):
    cls = get_algorithm_class(algorithm)
    hparams = hparams_registry.default_hparams(algorithm, "DigitsDG")
    numbers = {name for name in cls.search_space("DigitsDG")
               if type(hparams[name]) in (int, float)}
    assert numbers | {"lr", "weight_decay"} <= cls.takes.keys()
    for name in cls.takes:
        for value in (-2, float("nan"), "foo", [1]):
            with pytest.raises(ValueError) as error:
                cls((3, 32, 32), 10, 3, hparams | {name: value})
            said = str(error.value)
            assert f": {name} is {value!r}; it takes " in said and said.endswith("."), said


@pytest.mark.parametrize("algorithm", OURS)
def test_every_default_and_every_draw_is_taken(algorithm):
    takes = get_algorithm_class(algorithm).takes
    draws = [hparams_registry.random_hparams(algorithm, "PACS", seed) for seed in range(40)]
    for hparams in (hparams_registry.default_hparams(algorithm, "PACS"), *draws):
        assert all(takes[name].fits(hparams[name])
                   for name in takes.keys() - hparams_registry.OPTIONAL.keys())


@pytest.mark.parametrize("algorithm, name, refused, taken", [
    ("KD", "kd_temperature", (0, -1.0), (0.01, 1e6)),
    ("KD", "kd_alpha", (-0.01, 1.01), (0, 1)),
    ("KDDG", "teacher_steps", (-1,), (0, None)),
    ("SCMD", "scmd_worst_case", (0, 1.5), (1.0,)),
    ("RISE", "rise_relative", (-0.5,), (0, None)),
    ("ERM", "lr", (-1, -1e-9), (0, 5.0))])
def test_ranges_end_where_the_losses_stop_to_make_sense(algorithm, name, refused, taken):
    takes = get_algorithm_class(algorithm).takes[name]
    assert not any(map(takes.fits, refused)) and all(map(takes.fits, taken))


@pytest.mark.parametrize("algorithm, name, default, value", [
    ("ANDMask", "tau", 1, 0.7), ("IGA", "penalty", 1000, 0.5),
    ("EQRM", "eqrm_burnin_iters", 2500, 1.5), ("URM", "urm_discriminator_label_smoothing", 0, 0.1)])
def test_a_default_that_domainbed_states_as_a_whole_number_may_be_replaced_by_a_fraction(
        algorithm, name, default, value):
    hparams = hparams_registry.default_hparams(algorithm, "PACS")
    assert hparams[name] == default and type(hparams[name]) is int
    takes = get_algorithm_class(algorithm).takes
    assert hparams_registry.override(hparams, json.dumps({name: value}), takes)[name] == value
    with pytest.raises(ValueError, match="batch_size is 1.5, a float; it takes an int"):
        hparams_registry.override(hparams, '{"batch_size": 1.5}', takes)
