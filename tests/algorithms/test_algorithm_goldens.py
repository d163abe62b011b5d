import pytest
import torch
from conftest import golden, seed_everything

from domainbed_kd import datasets, hparams_registry
from domainbed_kd.algorithms import ALGORITHMS, DOMAINBED, get_algorithm_class

GOLDEN = golden("algorithms_debug28.json")["algorithms"]
# An algorithm's entry may also hold a note: text, not a run.
CASES = [(name, variant) for name in ALGORITHMS if name in GOLDEN
         for variant, run in GOLDEN[name].items() if isinstance(run, dict)]
# State that a restart needs, where DomainBed's checkpoint lacks it or cannot be loaded.
MENDED_STATE = {
    "GroupDRO": {"q": [3]},
    "Fishr": {"mean_variance": [3, 2 * 128 + 2]},
    "TRM": {"alpha": [3, 3]} | {
        f"heads.{i}.{name}": shape for i in range(3)
        for name, shape in (("weight", [2, 128]), ("bias", [2]))},
    "ERMPlusPlus": {"global_iter": []},
}


@pytest.fixture(autouse=True)
def two_threads():
    """As the goldens were made: another number sums in another order, which MLDG amplifies."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def minibatches():
    seed_everything(0)
    dataset = datasets.get_dataset_class("Debug28")(None, [], {})
    return [(x[:8], y[:8]) for x, y in (env.tensors for env in dataset)]


def build(name, variant):
    hparams = hparams_registry.default_hparams(name, "Debug28")
    hparams |= GOLDEN[name][variant]["overrides"]
    batches = minibatches()
    seed_everything(1)
    return get_algorithm_class(name)((3, 28, 28), 2, 3, hparams), batches


def assert_near(actual, expected):
    """1e-4 relative; a vector's entries relative to its largest, since logits may be near 0."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), expected,
        rtol=1e-4, atol=1e-4 * expected.abs().max().item() if expected.ndim else 1e-7)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_updates_and_predictions_are_domainbeds(name, variant):
    run = GOLDEN[name][variant]
    algorithm, batches = build(name, variant)
    seed_everything(2)
    for step, expected in enumerate(run["update_values"]):
        values = algorithm.update(batches)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            try:
                assert_near(values[key], value)
            except AssertionError as error:
                raise AssertionError(f"{key} of update {step}: {error}") from None
    seed_everything(3)
    algorithm.eval()
    with torch.no_grad():
        assert_near(algorithm.predict(batches[0][0]), run["predict_env0_logits"])


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_state_dicts_have_domainbeds_names_order_and_shapes(name, variant):
    algorithm, _ = build(name, variant)
    shapes = {key: list(tensor.shape) for key, tensor in algorithm.state_dict().items()}
    expected = GOLDEN[name][variant]["state_dict_shapes"]
    assert shapes == expected | MENDED_STATE.get(name, {})
    assert [key for key in shapes if key in expected] == list(expected)
    assert (sum(p.numel() for key, p in algorithm.named_parameters() if key in expected)
            == GOLDEN[name][variant]["n_parameters"])


def test_all_of_domainbeds_algorithms_are_there_in_its_order():
    assert list(DOMAINBED) == list(GOLDEN) == ALGORITHMS[:len(GOLDEN)]
