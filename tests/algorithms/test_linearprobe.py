"""LinearProbe: which images its frozen network sees."""

import clips
import pytest
import timm
import torch

from domainbed_kd import averaging, datasets
from domainbed_kd.algorithms import get_algorithm_class

SHAPE = (3, 64, 64)
IMAGENET = datasets.IMAGENET_MEAN, datasets.IMAGENET_STD
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)


@pytest.fixture
def weights(request, tmp_path):
    """The network of a test's first parameter, and a file of its weights."""
    torch.manual_seed(0)
    name = request.node.callspec.params["name"]
    options = {"img_size": 64} if name == "test_vit" else {}
    network = timm.create_model(name, **options).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return network, str(tmp_path / "weights.pth")


def probe(name, file, cls=None, **changes):
    hparams = clips.make("LinearProbe", SHAPE).hparams | {
        "backbone": name, "weights": file, "resnet18": False, "normalization": IMAGENET} | changes
    return (cls or get_algorithm_class("LinearProbe"))(SHAPE, 3, 3, hparams).eval()


def shown(network, x):
    """Pooled features, by timm alone, of images."""
    with torch.no_grad():
        return network.forward_head(network.forward_features(x), pre_logits=True)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_network_of_timms_sees_images_with_its_own_mean_and_deviation(name, weights):
    network, file = weights
    image = torch.rand(4, *SHAPE)
    of_half = shown(network, 2 * image - 1)  # both were trained with mean and deviation 0.5
    algorithm, x = probe(name, file), (image - MEAN) / STD
    expected = algorithm.classifier(of_half)
    torch.testing.assert_close(algorithm.predict(x), expected, rtol=1e-4, atol=1e-5)
    # A saved model is built without its weights, and has them from the state dict.
    copy = probe(name, "none")
    copy.load_state_dict(algorithm.state_dict())
    assert torch.equal(copy.predict(x), algorithm.predict(x))
    averaged = probe(name, file, averaging.averaged(get_algorithm_class("LinearProbe"), "sma"))
    averaged.train().update([(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([2, 0]))])
    torch.testing.assert_close(averaged.eval().predict(x), averaged.average.network[-1](of_half),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, changes", [
    ("test_efficientnet", {}),  # its mean and deviation are ImageNet's
    ("test_resnet", {"normalization": None}),
    ("test_resnet", {"weights": "none"}),
    ("test_resnet", {"normalization": ((0.5,) * 3, (0.5,) * 3)}),
])
def test_all_others_see_the_datasets_images_to_the_bit(name, changes, weights):
    algorithm, x = probe(name, weights[1], **changes), torch.randn(4, *SHAPE)
    network = algorithm.featurizer.network
    assert torch.equal(algorithm.featurizer(x), shown(network, x))


@pytest.mark.parametrize("name", ["test_resnet"])
def test_a_run_of_it_teaches_by_features_what_its_network_sees(name, weights):
    from domainbed_kd import networks, teachers

    algorithm = probe(name, weights[1])
    layers = teachers.layers_of(networks.Frozen(algorithm), SHAPE)
    image = torch.rand(2, *SHAPE)
    torch.testing.assert_close(layers[:-1]((image - MEAN) / STD),
                               shown(weights[0], 2 * image - 1), rtol=1e-4, atol=1e-5)
