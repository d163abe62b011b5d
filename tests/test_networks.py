import copy
import hashlib
import subprocess
import sys
import urllib.error
import warnings

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import golden
from torch import nn

from domainbed_kd import backbones, hparams_registry, networks

NETS = golden("networks.json")["nets"]
MLP_HPARAMS = {"mlp_width": 256, "mlp_depth": 3, "mlp_dropout": 0.0}


def hparams(**changes):
    """ERM's, without a download."""
    return hparams_registry.default_hparams("ERM", "PACS") | {"weights": "none"} | changes


RESNET18 = {"resnet18": True, "resnet50_augmix": False}
BUILD = {
    "Featurizer(3, 28, 28)": ((3, 28, 28), lambda s: networks.Featurizer(s, hparams())),
    "Featurizer(1, 28, 28)": ((1, 28, 28), lambda s: networks.Featurizer(s, hparams())),
    "Featurizer(2, 28, 28)": ((2, 28, 28), lambda s: networks.Featurizer(s, hparams())),
    "Featurizer(3, 32, 32)": ((3, 32, 32), lambda s: networks.Featurizer(s, hparams())),
    "MLP(128,3)": ((128,), lambda s: networks.MLP(*s, 3, MLP_HPARAMS)),
    "ContextNet(3,28,28)": ((3, 28, 28), lambda s: networks.ContextNet(s)),
    "Classifier(128,10,False)": ((128,), lambda s: networks.Classifier(*s, 10)),
    "Classifier(128,10,True)": ((128,), lambda s: networks.Classifier(*s, 10, is_nonlinear=True)),
    "ResNet18": ((3, 224, 224), lambda s: networks.Featurizer(s, hparams(**RESNET18))),
    "ResNet18_4ch(ARM)": ((4, 224, 224), lambda s: networks.Featurizer(s, hparams(**RESNET18))),
    "ResNet50_tv": (
        (3, 224, 224), lambda s: networks.Featurizer(s, hparams(resnet50_augmix=False))),
    "ResNet50_augmix_default": ((3, 224, 224), lambda s: networks.Featurizer(s, hparams())),
    "resnet18 True but resnet50_augmix left True": (
        (3, 224, 224), lambda s: networks.Featurizer(s, hparams(resnet18=True))),
}


def test_every_golden_network_is_built_here():
    assert BUILD.keys() == NETS.keys()


@pytest.mark.filterwarnings("ignore:resnet18 has no effect")
@pytest.mark.parametrize("name", NETS)
def test_network_has_domainbeds_names_weights_random_stream_and_outputs(name):
    want, (shape, build) = NETS[name], BUILD[name]
    torch.manual_seed(0)
    network = build(shape)
    assert torch.randint(0, 2**31 - 1, (2,)).tolist() == want["rng_after"]

    state = network.state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    n = len(want["state_dict"])  # of ResNets the golden lists the first few
    assert list(shapes.items())[:n] == list(want["state_dict"].items())
    assert len(state) == want.get("state_dict_n", n)
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values()))
    assert digest.hexdigest() == want["param_sha256_seed0"]
    assert getattr(network, "n_outputs", None) == want["n_outputs"]

    torch.manual_seed(1)
    with torch.no_grad():
        y = network.eval()(torch.randn(2, *shape))
    assert list(y.shape) == want["output_shape"]
    torch.testing.assert_close(
        y.flatten(1)[:, :8], torch.tensor(want["input_seed1_output"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side, kind", [
    (16, networks.MNIST_CNN), (28, networks.MNIST_CNN), (31, networks.MNIST_CNN),
    (32, networks.WideResNet), (63, networks.WideResNet),
    (64, networks.ResNet), (97, networks.ResNet)])
def test_size_of_the_images_chooses_the_network(side, kind):
    network = networks.Featurizer((3, side, side), hparams(**RESNET18))
    assert type(network) is kind
    assert network(torch.randn(2, 3, side, side)).shape == (2, network.n_outputs)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 40, 40), (3, 64, 64)])
def test_pool_takes_the_mean_of_the_last_stages_pixels(shape):
    network = networks.Featurizer(shape, hparams(**RESNET18)).eval()
    x = images = torch.randn(2, *shape)
    for stage in network.stages():
        x = stage(x)
        assert x.ndim == 4
    torch.testing.assert_close(network(images), x.mean(dim=(2, 3)))


def test_stages_of_a_resnet_are_its_layers():
    network = networks.Featurizer((3, 64, 64), hparams(**RESNET18)).eval()
    x, shapes = torch.randn(1, 3, 64, 64), []
    for stage in network.stages():
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


@pytest.mark.parametrize("name, stages", [
    ("resnet10t", 4), ("efficientnet_lite0", 7), ("mobilenetv3_small_050", 1),
    ("convnext_atto", 1), ("vit_tiny_patch16_224", 1)])
@pytest.mark.parametrize("channels", [3, 4])
def test_any_timm_model_computes_by_stages_what_timm_computes(name, stages, channels):
    network = networks.Featurizer((channels, 32, 32), hparams(backbone=name)).eval()
    x = torch.randn(2, channels, 32, 32)
    assert len(network.stages()) == stages
    assert network(x).shape == (2, network.n_outputs)
    torch.testing.assert_close(network(x), network.network(x))


def test_asking_for_stages_registers_nothing():
    network = networks.Featurizer((3, 64, 64), hparams(**RESNET18))
    names = [name for name, _ in network.named_modules()]
    network.stages()
    assert [name for name, _ in network.named_modules()] == names


def test_depth_and_width_of_the_wide_resnet_are_hparams():
    network = networks.Featurizer((3, 32, 32), {"wrn_depth": 22, "wrn_widen": 4})
    assert network.n_outputs == 256
    assert [len(layer) for layer in (network.layer1, network.layer2, network.layer3)] == [3, 3, 3]


def test_vectors_get_an_mlp_as_wide_as_its_features():
    network = networks.Featurizer((5,), hparams())
    assert network(torch.randn(2, 5)).shape == (2, network.n_outputs) == (2, 256)
    deep = networks.Featurizer((5,), {"mlp_width": 8, "mlp_depth": 4})
    assert [tuple(p.shape) for p in deep.parameters() if p.ndim == 2] == [
        (8, 5), (8, 8), (8, 8), (8, 8)]


@pytest.mark.parametrize("shape", [(3, 15, 15), (3, 32, 48), (28, 28), (3, 3, 64, 64)])
def test_shape_that_no_network_takes_is_refused(shape):
    with pytest.raises(NotImplementedError, match=r"^No featurizer takes inputs of shape \("):
        networks.Featurizer(shape, hparams())


@pytest.mark.parametrize("changes, side, says", [
    ({"backbone": "resnet10t", "resnet18": True}, 64, "leaves no room for resnet18"),
    ({"backbone": "resnet10t", "vit": True, "dinov2": True}, 64, "leaves no room"),
    ({"backbone": "resnet10t"}, 28, "images of 32 pixels or more, and these have 28"),
    ({"vit": True, "dinov2": True, "resnet18": True}, 224, "vit and resnet18"),
    ({"vit": True}, 224, "vit takes dinov2 too"),
    ({"dinov2": True}, 224, "dinov2 takes vit too"),
    ({"vit_attn_tune": True}, 224, "vit_attn_tune takes vit"),
])
def test_contradictory_hparams_are_refused(changes, side, says):
    with pytest.raises(ValueError, match=f"^Contradictory hparams: .*{says}"):
        networks.Featurizer((3, side, side), hparams(**changes))


@pytest.mark.parametrize("changes, side, says", [
    ({"weights": "IMAGENET1K_V2"}, 64, r'timm\'s resnet50.ram_in1k.*"resnet50_augmix": false'),
    ({"weights": "IMAGENET1K_V2", **RESNET18}, 64, "resnet18 takes IMAGENET1K_V1, DEFAULT, 'none'"),
    ({"weights": True, **RESNET18}, 64, "weights is True; resnet18 takes"),
    ({"weights": "IMAGENET1K_V1"}, 32, "the network for 32-pixel images starts at random"),
    ({"weights": "net.pth"}, 28, "the network for 28-pixel images starts at random"),
    ({"backbone": "resnet18z"}, 64, "timm has no 'resnet18z'. Near it: resnet18"),
    ({"backbone": "resnet18.no_tag"}, 64, "timm has no 'resnet18.no_tag'"),
    ({"backbone": "efficientnet_l2", "weights": None}, 64, "timm has no weights for"),
    ({"wrn_depth": 17}, 32, "wrn_depth is 17 .* 10, 16, 22"),
    ({"vit": True, "dinov2": True}, 96, "DINOv2 takes 3 channels and a side that 14 divides"),
    ({"vit": True, "dinov2": True, "weights": "V1"}, 224, "DINOv2 takes a file, or 'none'"),
])
def test_hparams_that_name_nothing_are_refused(changes, side, says):
    with pytest.raises(ValueError, match=says):
        networks.Featurizer((3, side, side), hparams(**changes))


def test_resnet18_beside_augmix_warns_once_that_augmix_is_trained_as_upstream_does():
    backbones._warn_once.cache_clear()
    with pytest.warns(UserWarning, match='"resnet50_augmix": false') as caught:
        for _ in range(2):
            network = networks.Featurizer((3, 64, 64), hparams(resnet18=True))
    assert len(caught) == 1
    assert network.n_outputs == 2048


def test_channel_i_of_other_images_starts_as_pretrained_channel_i_mod_3(tmp_path):
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "r18.pth")
    network = networks.Featurizer(
        (5, 64, 64), hparams(**RESNET18, weights=str(tmp_path / "r18.pth")))
    for i in range(5):
        assert torch.equal(network.network.conv1.weight[:, i], source.conv1.weight[:, i % 3])


@pytest.mark.parametrize("changes", [RESNET18, {"backbone": "efficientnet_lite0"}])
@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_bn_keeps_statistics_while_scales_learn(changes, frozen):
    network = networks.Featurizer((3, 64, 64), hparams(**changes, freeze_bn=frozen))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    assert network.train() is network
    network(torch.randn(4, 3, 64, 64)).square().mean().backward()
    still = [torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before)]
    assert still == [frozen] * len(norms)
    assert all(norm.weight.grad.any() for norm in norms[-3:])


def test_freeze_bn_leaves_dropout_on():
    network = networks.Featurizer(
        (3, 64, 64), hparams(**RESNET18, freeze_bn=True, resnet_dropout=0.5))
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


# --- initial weights ---

@pytest.fixture
def resnet18():
    torch.manual_seed(7)
    return torchvision.models.resnet18()


def features(network, x):
    """Those of a torchvision ResNet, by way of its own forward."""
    network = copy.deepcopy(network).eval()
    network.fc = nn.Identity()
    with torch.no_grad():
        return network(x)


def featurizer(weights):
    return networks.Featurizer((3, 64, 64), hparams(**RESNET18, weights=str(weights))).eval()


def without_counters(state):
    return {name: value for name, value in state.items() if "num_batches" not in name}


@pytest.mark.parametrize("name, save", [
    ("net.pth", lambda state, path: torch.save(state, path)),
    ("net.pt", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path)),
    ("net.pth", lambda state, path: torch.save(without_counters(state), path)),
    ("net.safetensors", lambda state, path: safetensors.torch.save_file(state, path)),
], ids=["pth", "pt with an epoch", "without counters", "safetensors"])
def test_weights_are_read_from_a_file_and_its_classifier_is_left_out(
        tmp_path, resnet18, name, save):
    save(resnet18.state_dict(), tmp_path / name)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(featurizer(tmp_path / name)(x), features(resnet18, x))


@pytest.mark.parametrize("with_classifier", [True, False])
def test_tensors_under_other_names_load_by_order_with_a_warning(
        tmp_path, resnet18, with_classifier):
    values = list(resnet18.state_dict().values())[:None if with_classifier else -2]
    torch.save({f"t{i}": value for i, value in enumerate(values)}, tmp_path / "net.pth")
    x = torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match="names its tensors differently; all 120"):
        network = featurizer(tmp_path / "net.pth")
    with torch.no_grad():
        assert torch.equal(network(x), features(resnet18, x))


def test_a_timm_models_classifier_is_left_out_under_its_own_name(tmp_path):
    source = timm.create_model("efficientnet_lite0")
    torch.save(source.state_dict(), tmp_path / "net.pth")
    network = networks.Featurizer((3, 64, 64), hparams(
        backbone="efficientnet_lite0", weights=str(tmp_path / "net.pth")))
    assert torch.equal(network.network.conv_head.weight, source.conv_head.weight)


def renamed_and_reordered(state):
    return {f"t{i}": value for i, value in enumerate(reversed(state.values()))}


@pytest.mark.parametrize("change, says", [
    (lambda s: torchvision.models.resnet34().state_dict(), "of its 218 tensors .* 120 are expect"),
    (lambda s: {**s, "conv1.weight": torch.zeros(64, 4, 7, 7)}, "119 match by name and shape"),
    (lambda s: {name: s[name] for name in s if "layer4" not in name}, "90 match by name"),
    (lambda s: s | {"layer5.0.conv1.weight": torch.zeros(3)}, "120 match by name and shape"),
    (lambda s: {name: s[name] for name in s if "fc" not in name} | {"extra": torch.zeros(3)},
     "of its 121 tensors 120 match by name and shape"),
    (renamed_and_reordered, "0 match by name and shape"),
    (lambda s: {"epoch": 3}, "of its 0 tensors 0 match by name"),
    (lambda s: [1, 2], "of its 0 tensors 0 match by name"),
], ids=["another network", "another shape", "tensors absent", "tensors unknown", "one unknown",
        "another order", "no tensor", "no dict"])
def test_a_file_that_does_not_fit_is_refused_with_counts(tmp_path, resnet18, change, says):
    torch.save(change(resnet18.state_dict()), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=f"net.pth does not fit ResNet: .*{says}") as error:
        featurizer(tmp_path / "net.pth")
    assert "\n" not in str(error.value)


class Unsafe:
    """Not a tensor."""


@pytest.mark.parametrize("name, write", [
    ("empty.pth", lambda path: path.write_bytes(b"")),
    ("text.pth", lambda path: path.write_text("<html>not found</html>")),
    ("zip.pth", lambda path: path.write_bytes(b"PK\x03\x04 broken")),
    ("code.pth", lambda path: torch.save({"x": Unsafe()}, path)),
    ("text.safetensors", lambda path: path.write_text("<html>not found</html>")),
])
def test_an_unreadable_file_is_refused_in_one_line(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read") as error:
        featurizer(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*absent.pth"):
        featurizer(tmp_path / "absent.pth")


@pytest.mark.parametrize("changes, tag", [
    ({"resnet18": True}, "ResNet18_Weights.IMAGENET1K_V1"),
    ({}, "ResNet50_Weights.IMAGENET1K_V1"),
    ({"weights": "IMAGENET1K_V2"}, "ResNet50_Weights.IMAGENET1K_V2"),
])
def test_torchvisions_weights_are_the_first_version_unless_named(monkeypatch, changes, tag):
    asked = []

    def state_dict(weights, *args, **kwargs):
        asked.append(str(weights))
        build = getattr(torchvision.models, str(weights).split("_")[0].lower())
        torch.manual_seed(7)
        return build().state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", state_dict)
    network = networks.Featurizer(
        (3, 64, 64), hparams(resnet50_augmix=False, weights=None) | changes)
    assert asked == [tag]
    torch.manual_seed(7)
    expected = getattr(torchvision.models, tag.split("_")[0].lower())()
    assert torch.equal(network.network.conv1.weight, expected.conv1.weight)


def test_the_default_is_timms_augmix_network_and_downloads_no_other(monkeypatch):
    asked, create_model = [], timm.create_model

    def create(name, pretrained):
        asked.append((name, pretrained))
        return create_model(name)

    monkeypatch.setattr(timm, "create_model", create)
    network = networks.Featurizer((3, 64, 64), hparams(weights=None))
    assert asked == [("resnet50.ram_in1k", True)]
    assert network.n_outputs == 2048


def unreachable(*args, **kwargs):
    raise urllib.error.URLError("[Errno -2] Name or service not known")


@pytest.mark.parametrize("where, attribute, changes, model", [
    (torchvision.models.WeightsEnum, "get_state_dict", RESNET18, "resnet18"),
    (timm, "create_model", {}, "resnet50.ram_in1k"),
    (torch.hub, "load", {"vit": True, "dinov2": True}, "DINOv2"),
])
def test_without_a_connection_one_line_names_the_model_and_the_two_ways_out(
        monkeypatch, where, attribute, changes, model):
    monkeypatch.setattr(where, attribute, unreachable)
    with pytest.raises(OSError, match=model) as error:
        networks.Featurizer((3, 224, 224), hparams(weights=None) | changes)
    message = str(error.value)
    assert "\n" not in message
    assert """--hparams '{"weights": "path.pth"}', or "none\"""" in message
    assert "Name or service not known" in message


# --- DINOv2 ---

class FakeViT(nn.Module):
    """DINOv2's interface: its blocks' tokens are the number of the block."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(2, 2), nn.Linear(2, 2)

    def get_intermediate_layers(self, x, n, return_class_token):
        patches = (x.shape[2] // 14) * (x.shape[3] // 14)
        ramp = torch.arange(float(patches))[None, :, None]  # whose mean is (patches - 1) / 2
        return tuple(((ramp + i).expand(len(x), patches, 768), torch.full((len(x), 768), float(i)))
                     for i in range(n))


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((*args, kwargs))
        return FakeViT()

    monkeypatch.setattr(torch.hub, "load", load)
    return asked


VIT = {"vit": True, "dinov2": True}


@pytest.mark.parametrize("weights, pretrained", [(None, True), ("none", False)])
def test_dinov2_is_the_four_last_class_tokens_and_the_last_mean_patch(hub, weights, pretrained):
    network = networks.Featurizer((3, 70, 70), hparams(**VIT, weights=weights))
    assert hub == [("facebookresearch/dinov2", "dinov2_vitb14", {"pretrained": pretrained})]
    tokens = network(torch.randn(2, 3, 70, 70)).reshape(2, 5, 768)
    assert network.n_outputs == 3840
    for i, value in enumerate([0, 1, 2, 3, 3 + (25 - 1) / 2]):
        assert (tokens[:, i] == value).all()


def test_vit_attn_tune_trains_attention_only(hub):
    network = networks.Featurizer((3, 224, 224), hparams(**VIT, vit_attn_tune=True))
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        "network.attn.weight", "network.attn.bias"}


def test_dinov2_refuses_other_than_three_channels(hub):
    with pytest.raises(ValueError, match="3 channels .* found 4 and 224"):
        networks.Featurizer((4, 224, 224), hparams(**VIT))


def test_dinov2_takes_weights_from_a_file(hub, tmp_path):
    source = FakeViT()
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    network = networks.Featurizer(
        (3, 224, 224), hparams(**VIT, weights=str(tmp_path / "vit.pth")))
    assert torch.equal(network.network.attn.weight, source.attn.weight)


# --- Frozen ---

class Owner(nn.Module):
    """A student with a teacher."""

    def __init__(self):
        super().__init__()
        self.student = nn.Linear(3, 2)
        self.teacher = networks.Frozen(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)))


def test_a_frozen_teacher_has_no_parameters_buffers_or_saved_entries():
    owner = Owner()
    assert {name for name, _ in owner.named_parameters()} == {"student.weight", "student.bias"}
    assert list(owner.buffers()) == []
    assert set(owner.state_dict()) == {"student.weight", "student.bias"}
    assert not any(p.requires_grad for p in owner.teacher.module.parameters())


def test_a_frozen_teacher_stays_in_eval_mode_and_unmoved_by_training():
    owner = Owner()
    before = copy.deepcopy(owner.teacher.module.state_dict())
    optimizer = torch.optim.Adam(owner.parameters(), lr=0.1)
    x = torch.randn(8, 3)
    for _ in range(2):
        owner.eval()
        owner.train()
        F.mse_loss(owner.student(x), owner.teacher(x)).backward()
        optimizer.step()
    assert not any(module.training for module in owner.teacher.module.modules())
    assert torch.equal(owner.teacher(x), owner.teacher(x))
    after = owner.teacher.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_frozen_teacher_ignores_apply_of_initialisers():
    owner = Owner()
    weight = owner.teacher.module[0].weight.clone()
    owner.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Linear) else None)
    assert not owner.student.weight.any()
    assert torch.equal(owner.teacher.module[0].weight, weight)


def test_a_frozen_teacher_follows_its_owners_type_and_device():
    owner = Owner().double()
    assert owner.teacher(torch.randn(2, 3, dtype=torch.float64)).dtype == torch.float64
    owner.to("meta")
    devices = {t.device.type for t in owner.teacher.module.state_dict().values()}
    assert devices == {"meta"}


def test_a_frozen_teacher_is_called_without_gradients():
    x = torch.randn(2, 3, requires_grad=True)
    y = Owner().teacher(x)
    assert not y.requires_grad
    student = nn.Linear(2, 2)
    student(y).sum().backward()  # outputs may take part in a graph
    assert student.weight.grad is not None


def test_the_wrapped_module_differentiates_through_its_input():
    teacher = Owner().teacher
    x = torch.randn(2, 3, requires_grad=True)
    teacher.module(x).sum().backward()
    assert x.grad.any()
    assert all(p.grad is None for p in teacher.module.parameters())


def test_a_copy_of_the_owner_shares_the_teacher():
    owner = Owner()
    twin = copy.deepcopy(owner)
    assert twin.teacher.module is owner.teacher.module
    assert twin.student.weight is not owner.student.weight


def test_a_checkpoint_of_the_owner_loads_whatever_the_teacher():
    owner = Owner()
    owner.teacher = networks.Frozen(nn.Linear(3, 7))
    owner.load_state_dict(Owner().state_dict())


@pytest.mark.cuda
@pytest.mark.parametrize("side", [28, 32, 64])
def test_features_on_cuda_are_those_of_the_cpu(side):
    network = networks.Featurizer((3, side, side), hparams(**RESNET18)).eval().double()
    frozen = networks.Frozen(copy.deepcopy(network))
    x = torch.randn(2, 3, side, side, dtype=torch.double)
    with torch.no_grad():
        want = network(x)
    torch.testing.assert_close(frozen.cuda()(x.cuda()).cpu(), want, rtol=1e-6, atol=1e-8)


def test_importing_networks_needs_neither_torchvision_nor_timm():
    code = "import sys, domainbed_kd.networks; print({'timm', 'torchvision'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 28, 28), (1, 32, 32)])
def test_the_small_transformer_cuts_small_images_into_patches_of_4_pixels(shape):
    featurizer = networks.Featurizer(shape, hparams(backbone="small_vit"))
    x = torch.randn(2, *shape)
    assert featurizer(x).shape == (2, featurizer.n_outputs)
    assert featurizer.network.patch_embed.num_patches == (shape[1] // 4) ** 2


def test_the_small_transformer_refuses_sides_and_weights_that_do_not_fit():
    with pytest.raises(ValueError, match="small_vit.*found 30 pixels"):
        networks.Featurizer((3, 30, 30), hparams(backbone="small_vit"))
    with pytest.raises(ValueError, match="small_vit.*weights 'IMAGENET1K_V1'"):
        networks.Featurizer((3, 32, 32), hparams(backbone="small_vit", weights="IMAGENET1K_V1"))
