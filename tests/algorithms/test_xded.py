import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from clips import bits, make, minibatches, run, same_bits

from domainbed_kd.algorithms.xded import class_means, domains_of_class, standardized
from domainbed_kd.losses import kd_loss, kd_per_sample
from domainbed_kd.run import training
from domainbed_kd.scripts import train

LOGITS = torch.tensor([[2.0, 0, -1], [0, 1, 1], [1, 3, 0], [0, 2, 2]])
Y = torch.tensor([0, 0, 1, 1])
SHAPE = (3, 16, 16)


def term(logits, y, temperature=4.0):
    return kd_loss(logits, class_means(logits.detach(), y), temperature)


def test_ensembles_and_loss_are_the_official_codes():
    torch.testing.assert_close(
        class_means(LOGITS, Y)[[0, 2]], torch.tensor([[1.0, 0.5, 0], [0.5, 2.5, 1]]))
    assert term(LOGITS, Y).item() == pytest.approx(0.302600, abs=1e-6)
    assert F.cross_entropy(LOGITS, Y).item() == pytest.approx(0.740078, abs=1e-6)
    total = F.cross_entropy(LOGITS, Y) + 5 * term(LOGITS, Y)
    assert total.item() == pytest.approx(2.253076, abs=5e-6)


def test_images_may_come_in_any_order():
    order = [0, 2, 1, 3]
    assert term(LOGITS[order], Y[order]).item() == pytest.approx(0.302600, abs=1e-6)


def test_the_term_is_0_where_a_class_agrees_or_has_one_image():
    assert term(LOGITS[[0, 0, 2, 2]], Y).item() == pytest.approx(0, abs=1e-6)
    assert term(LOGITS[:3], torch.arange(3)).item() == pytest.approx(0, abs=1e-6)


def test_the_terms_gradient_sums_to_0_over_the_classes_of_an_image():
    logits = LOGITS.clone().requires_grad_()
    term(logits, Y).backward()
    assert logits.grad.abs().sum() > 0.1
    torch.testing.assert_close(logits.grad.sum(dim=1), torch.zeros(4), rtol=0, atol=1e-6)


def test_style_is_removed_as_by_the_official_code():
    x = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 0], [0, 8]]]])
    expected = [-1.161895, -0.387298, 0.387298, 1.161895, -0.5, -0.5, -0.5, 1.5]
    torch.testing.assert_close(
        standardized(x).flatten(), torch.tensor(expected), rtol=0, atol=2e-6)


def test_maps_without_style_have_mean_0_variance_1_and_forget_scale_and_shift():
    x = torch.randn(2, 3, 5, 5)
    plain = standardized(x)
    torch.testing.assert_close(plain.mean(dim=(2, 3)), torch.zeros(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.var(dim=(2, 3)), torch.ones(2, 3), rtol=0, atol=1e-4)
    scale, shift = torch.tensor([2.0, 0.5, 9]), torch.tensor([1.0, -3, 0])
    torch.testing.assert_close(
        standardized(x * scale.view(3, 1, 1) + shift.view(3, 1, 1)), plain, rtol=0, atol=1e-4)
    assert torch.equal(standardized(torch.full((1, 1, 2, 2), 7.0)), torch.zeros(1, 1, 2, 2))


def test_with_a_weight_of_0_and_all_style_it_trains_as_erm():
    erm, ours = make("ERM"), make("XDED", xded_weight=0.0, xded_unistyle=[])
    for algorithm in (erm, ours):
        run(algorithm, minibatches(3))
    assert same_bits(bits(erm), bits(ours))


def test_no_parameter_is_added():
    ours, erm = ([p.shape for p in make(name).parameters()] for name in ("XDED", "ERM"))
    assert ours == erm


def test_a_class_of_one_domain_has_no_ensemble_but_counts_in_the_mean():
    algorithm = make("XDED", SHAPE, xded_weight=5.0, xded_unistyle=[])
    labels = [torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 0])]
    batch = [(x, y) for (x, _), y in zip(minibatches(shape=SHAPE)[0], labels)]
    x, y = (torch.cat(part) for part in zip(*batch))
    assert domains_of_class(labels, 3).tolist() == [3, 2, 1, 3, 3, 2, 2, 3, 3, 3, 3, 3]
    with torch.no_grad():
        logits = algorithm.predict(x)
    per_image = kd_per_sample(logits, torch.stack([logits[y == c].mean(dim=0) for c in y]), 4.0)
    values = algorithm.update(batch)
    assert values["covered"] == pytest.approx(11 / 12)
    assert values["distill"] == pytest.approx(per_image[y != 2].sum().item() / 12, rel=1e-4)
    assert values["loss"] == pytest.approx(
        (values["classify"] + 5 * values["distill"]).item(), rel=1e-5)


def test_an_image_without_an_ensemble_has_no_gradient_from_the_term():
    algorithm = make("XDED", SHAPE)
    batch = [(x, torch.full_like(y, i)) for i, (x, y) in enumerate(minibatches(shape=SHAPE)[0])]
    values = algorithm.update(batch)
    assert values["distill"] == 0 == values["covered"]
    within = make("XDED", SHAPE, xded_min_domains=1).update(batch)
    assert within["distill"] > 0 and within["covered"] == 1


@pytest.mark.parametrize(("n_classes", "groups", "warns"),
                         [(7, None, False), (345, None, True), (345, 4, False)])
def test_it_warns_where_few_images_will_have_an_ensemble(n_classes, groups, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make("XDED", n_classes=n_classes, class_names=None, batch_size=32, class_groups=groups)
    said = [str(w.message) for w in caught if "XDED" in str(w.message)]
    assert said == (["XDED: about 17% of a batch's images will have one of their class from "
                     "another domain to learn from. Raise batch_size or, in this package's own "
                     'loop, pass "class_groups": 4.'] if warns else [])


RUN = ["--dataset", "DigitsDG", "--algorithm", "XDED", "--test_envs", "3", "--steps", "5",
       "--checkpoint_freq", "2", "--hparams",
       '{"wrn_depth": 10, "wrn_widen": 1, "batch_size": 6, "class_groups": 4}']


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fast"]])
def test_in_batches_of_class_groups_every_image_has_an_ensemble_and_a_restart_has_the_same_bits(
        more, tmp_path, monkeypatch):
    def train_in(name):
        return train.main([*RUN, *more, "--output_dir", str(tmp_path / name)])

    def records_and_weights(name):
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items()
                 if k not in ("args", "step_time", "mem_gb")} for line in lines], torch.load(
                     tmp_path / name / "model.pkl", weights_only=True)["model_dict"]

    assert train_in("whole") == 0
    update, made = training.update, []

    def stop(*args):
        made.append(update(*args))
        if len(made) == 4:
            raise KeyboardInterrupt
        return made[-1]

    monkeypatch.setattr(training, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        train_in("cut")
    monkeypatch.setattr(training, "update", update)
    assert train_in("cut") == 0
    (whole, weights), (cut, weights_of_cut) = map(records_and_weights, ("whole", "cut"))
    assert whole == cut and same_bits(weights, weights_of_cut)
    assert [record["covered"] for record in whole] == [1.0] * 3


@pytest.mark.parametrize(("after", "network"), [
    ([9], {}), ([0], {}),
    ([1], {"backbone": "small_vit", "resnet18": False, "resnet50_augmix": True})])
def test_stages_that_the_network_has_not_are_refused_in_one_line(after, network):
    with pytest.raises(ValueError, match=r"^XDED: xded_unistyle is \[\d\], and this .*pass \[\].$"):
        make("XDED", SHAPE, xded_unistyle=after, **network)
