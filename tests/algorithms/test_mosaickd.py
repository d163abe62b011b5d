import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import Teacher, bits, make, minibatches, run, same_bits
from conftest import losses_in_double
from scipy import stats
from torch import nn

from domainbed_kd import checkpoints, datasets, networks
from domainbed_kd.algorithms import get_algorithm_class
from domainbed_kd.algorithms.mosaickd import (
    Generator,
    entropy,
    highest_entropy,
    negative_balance,
    patch_discriminator,
    patch_loss,
)
from domainbed_kd.scripts import train

SHAPE = (3, 16, 16)
WEIGHTS = ("mosaic_local", "mosaic_align", "mosaic_adversarial", "mosaic_balance")
TERMS = {"loss", "distill", "loss_d", "loss_g", "local", "align", "adversarial", "balance"}


def mosaic(shape=SHAPE, **changes):
    """MosaicKD with small players."""
    return make("MosaicKD", shape, **{"mosaic_width": 4, "mosaic_z_dim": 8, "lr": 1e-3} | changes)


def one_batch(shape=SHAPE, size=4):
    [batch] = minibatches(1, shape, size)
    return batch


def real_images(batch):
    return torch.cat([x for x, _ in batch])


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def moved(before, module):
    return any(not torch.equal(p, q) for p, q in zip(before, module.parameters()))


def noise_of(algorithm):
    """The stream from which the algorithm's next update draws."""
    return torch.Generator().manual_seed((algorithm.noise_seed + algorithm.update_count).item())


# The generator and the discriminator.


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_generator_and_discriminator_have_the_authors_sizes():
    assert n_parameters(Generator((3, 32, 32))) == 2_026_051
    assert n_parameters(patch_discriminator((3, 32, 32))) == 531_328
    # Linear, BatchNorm, five blocks and the last convolution; four convolutions and the logit.
    assert n_parameters(Generator((3, 224, 224))) == (
        101 * 64 * 49 + 128 + 5 * (64 * 64 * 9 + 128) + 64 * 3 * 9 + 3)
    assert n_parameters(patch_discriminator((3, 224, 224))) == (
        16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512) + 512)


@pytest.mark.parametrize("shape", [
    (2, 28, 28), (3, 28, 28), (3, 32, 32), (1, 30, 30), (3, 64, 64), (3, 96, 96), (3, 100, 100),
    (3, 224, 224)])
def test_the_generator_makes_images_of_any_shape_between_0_and_1(shape):
    images = Generator(shape, z_dim=8, width=4)(torch.randn(2, 8))
    assert images.shape == (2, *shape)
    assert 0 < images.min() < images.max() < 1


def test_the_largest_generator_is_no_larger_than_its_images_need():
    """The shallow one's first layer would have 80 million weights at 224 pixels."""
    assert n_parameters(Generator((3, 224, 224))) < n_parameters(Generator((3, 32, 32)))


@pytest.mark.parametrize(("side", "stride", "field", "before"), [(32, 4, 10, 3), (96, 16, 46, 15)])
def test_a_pixel_changes_only_the_logits_whose_patch_covers_it(side, stride, field, before):
    torch.manual_seed(0)
    discriminator = patch_discriminator((3, side, side), width=4).double().eval()
    x = torch.randn(1, 3, side, side).double()
    logits = discriminator(x)
    assert logits.shape == (1, 1, side // stride, side // stride)
    starts = np.arange(side // stride) * stride - before
    for row, column in [(0, 0), (0, side - 1), (side // 2, side // 2 + 3), (side - 1, 5)]:
        changed = x.clone()
        changed[..., row, column] += 5
        covers_row, covers_column = ((starts <= pixel) & (pixel < starts + field)
                                     for pixel in (row, column))
        found = (discriminator(changed) != logits)[0, 0].numpy()
        assert np.array_equal(found, np.outer(covers_row, covers_column))


@pytest.mark.parametrize("side, given, mean, std", [
    (28, {"normalization": None}, (0.0,) * 3, (1.0,) * 3),
    (224, {"normalization": None}, (0.0,) * 3, (1.0,) * 3),
    (32, {"normalization": ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))}, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
    (32, {}, (0.0,) * 3, (1.0,) * 3),
    (64, {}, datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)])
def test_synthetic_images_are_normalized_as_the_data_sets_are(side, given, mean, std):
    algorithm = mosaic((3, side, side))
    hparams = {k: v for k, v in algorithm.hparams.items() if k != "normalization"} | given
    algorithm = get_algorithm_class("MosaicKD")((3, side, side), 3, 3, hparams)
    for extreme in (0.0, 1.0):
        algorithm.generator.forward = lambda z, extreme=extreme: torch.full(
            (len(z), 3, side, side), extreme)
        images = algorithm.synthesize(2, torch.Generator())
        expected = [(extreme - m) / s for m, s in zip(mean, std)]
        for channel in range(3):
            torch.testing.assert_close(
                images[:, channel], torch.full((2, side, side), expected[channel]))


# The losses.


def random_logits(n=40, n_classes=5):
    return 3 * torch.randn(n, n_classes, generator=torch.Generator().manual_seed(2))


def test_align_and_balance_are_scipys_entropies_in_nats_and_bits():
    logits = random_logits()
    p = logits.double().softmax(dim=1).numpy()
    np.testing.assert_allclose(entropy(logits), stats.entropy(p, axis=1), rtol=1e-5)
    assert negative_balance(logits).item() == pytest.approx(-stats.entropy(p.mean(0), base=2))


def test_align_and_balance_keep_their_ranges_and_gradients_when_logits_saturate():
    for logits in (random_logits(), torch.zeros(6, 5), 1e4 * torch.eye(5), -1e4 * torch.eye(5),
                   1e4 * torch.eye(5)[[2] * 6]):
        logits.requires_grad_()
        align, balance = entropy(logits), negative_balance(logits)
        assert (align >= 0).all() and (align <= math.log(5) + 1e-6).all()
        assert -math.log2(5) - 1e-6 <= balance <= 1e-6
        (align.mean() + balance).backward()
        assert logits.grad.isfinite().all()


def test_balance_is_lowest_where_the_classes_are_even_and_0_where_there_is_one():
    assert negative_balance(1e4 * torch.eye(5)).item() == pytest.approx(-math.log2(5))
    assert negative_balance(1e4 * torch.eye(5)[[2] * 6]).item() == 0


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("side", [7, 8, 14])
def test_a_patch_weighs_the_same_at_any_size_unless_as_published(side, target):
    logits = torch.randn(5, 1, side, side, generator=torch.Generator().manual_seed(0))
    per_patch = F.softplus(logits if target == 0 else -logits)  # -log of the sigmoid
    torch.testing.assert_close(
        patch_loss(logits, target, published=True), per_patch.sum() / len(logits))
    torch.testing.assert_close(patch_loss(logits, target), 64 * per_patch.mean())
    if side == 8:
        assert patch_loss(logits, target) == patch_loss(logits, target, published=True)


@pytest.mark.parametrize("m", [1, 7, 40])
def test_the_rows_of_highest_entropy_are_those_that_a_sort_finds(m):
    logits = random_logits()
    one_by_one = [stats.entropy(row) for row in logits.double().softmax(dim=1).numpy()]
    expected = sorted(range(len(logits)), key=lambda i: -one_by_one[i])[:m]
    assert highest_entropy(logits, m).tolist() == expected


def test_a_saturated_row_is_never_taken_for_one_of_high_entropy():
    logits = torch.cat([1e4 * torch.eye(5), random_logits(4), -1e4 * torch.eye(5)[:1]])
    assert sorted(highest_entropy(logits, 5).tolist()) == [5, 6, 7, 8, 9]


# One update against the card, written out.


def divergence(p, q):
    return (p * (p / q).log()).sum(dim=1).mean()


@pytest.mark.parametrize("published", [True, False])
def test_an_update_is_the_authors_iteration(published):
    """At 28 pixels, where the 49 patches tell the sum from the mean."""
    shape, weights = (3, 28, 28), {"mosaic_local": 0.7, "mosaic_align": 1.3,
                                   "mosaic_adversarial": 0.9, "mosaic_balance": 4.0}
    ours = mosaic(shape, mosaic_published=published, mosaic_student_optimizer="sgd", lr=0.05,
                  weight_decay=1e-4, mosaic_kd_steps=3, mosaic_temperature=2.0, **weights).double()
    g, d, s = (copy.deepcopy(player) for player in (
        ours.generator, ours.discriminator, ours.network))
    t = copy.deepcopy(ours.teacher.module)
    batch = [(x.double(), y) for x, y in one_batch(shape)]
    real, noise = real_images(batch), noise_of(ours)
    n = len(real)
    adam_g, adam_d = (torch.optim.Adam(m.parameters(), 1e-3, (0.5, 0.999)) for m in (g, d))
    sgd = torch.optim.SGD(s.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)

    def synthesize():
        return g(torch.randn(n, 8, generator=noise).double())

    def sum_over_patches(losses):
        return losses.sum() * (1 if published else 64 / 49)

    fake = synthesize()
    loss_d = sum_over_patches(F.softplus(d(fake.detach()))) + sum_over_patches(F.softplus(-d(real)))
    loss_d = loss_d / (2 * n)
    (0.7 * loss_d).backward()
    adam_d.step()
    p = t(fake).softmax(dim=1)
    q = s.train(published)(fake).softmax(dim=1)
    s.train()
    local = sum_over_patches(F.softplus(-d(fake))) / n
    align = -(p * p.log()).sum(dim=1).mean()
    adversarial = -divergence(p, q)
    balance = (p.mean(0) * p.mean(0).log2()).sum()
    loss_g = 0.9 * adversarial + 1.3 * align + 0.7 * local + 4 * balance
    adam_g.zero_grad()
    loss_g.backward()
    adam_g.step()
    losses = []
    for _ in range(3):
        with torch.no_grad():
            images = torch.cat([synthesize(), real])
            p = (t(images) / 2).softmax(dim=1)
        loss = 4 * divergence(p, (s(images) / 2).softmax(dim=1))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())

    values = ours.update(batch)
    assert values == pytest.approx({
        "loss": np.mean(losses), "distill": np.mean(losses), "loss_d": loss_d.item(),
        "loss_g": loss_g.item(), "local": local.item(), "align": align.item(),
        "adversarial": adversarial.item(), "balance": balance.item()})
    for mine, theirs in ((ours.generator, g), (ours.discriminator, d), (ours.network, s)):
        for name, tensor in bits(mine).items():
            torch.testing.assert_close(tensor, bits(theirs)[name])


def test_an_update_logs_every_term_before_weighting():
    values = mosaic().update(one_batch())
    assert values.keys() == TERMS
    weighted = {"local": 1, "align": 1, "adversarial": 1, "balance": 10}
    assert values["loss_g"] == pytest.approx(sum(w * values[k] for k, w in weighted.items()))
    assert 0 <= values["align"] <= math.log(3)
    assert -math.log2(3) <= values["balance"] <= 0
    assert values["adversarial"] < 0 < values["loss"]


# Who moves, and who does not.


@pytest.mark.parametrize("changes", [{}, {"teacher": None, "teacher_steps": 0}])
def test_labels_are_ignored_bit_for_bit(changes):
    batch = one_batch()
    one, other = mosaic(**changes), mosaic(**changes)
    assert one.update(batch) == other.update([(x, (y + 1) % 3) for x, y in batch])
    assert same_bits(bits(one), bits(other))


@pytest.mark.parametrize("changes", [{}, {"teacher": None, "teacher_steps": 2}])
def test_the_teacher_stands_still_to_the_bit_and_gets_neither_gradient_nor_optimizer(changes):
    algorithm = mosaic(**changes)
    run(algorithm, minibatches(2, SHAPE))  # while it may warm up
    teacher = algorithm.teacher.module if not changes else algorithm.teacher
    teacher.zero_grad()
    before = bits(teacher)
    run(algorithm, minibatches(2, SHAPE))
    algorithm.eval()
    algorithm.train()
    run(algorithm, minibatches(1, SHAPE))
    assert same_bits(before, bits(teacher))
    assert all(p.grad is None for p in teacher.parameters())
    stepped = {id(p) for o in (algorithm.generator_optimizer, algorithm.discriminator_optimizer,
                               algorithm.optimizer) for group in o.param_groups
               for p in group["params"]}
    assert not stepped & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("changes, who", [
    ({"mosaic_lr_g": 0.0}, {"network"}), ({"lr": 0.0}, {"generator", "discriminator"}),
    ({}, {"network", "generator", "discriminator"}),
    (dict.fromkeys(WEIGHTS, 0.0), {"network"}),
    ({"mosaic_local": 0.0}, {"network", "generator"})])
def test_only_players_with_a_rate_and_a_loss_move(changes, who):
    algorithm = mosaic(**changes)
    before = {name: parameters(getattr(algorithm, name))
              for name in ("network", "generator", "discriminator")}
    run(algorithm, minibatches(2, SHAPE))
    assert {name for name in before if moved(before[name], getattr(algorithm, name))} == who


def test_each_player_moves_in_its_own_turn_and_leaves_the_others_no_gradient():
    algorithm = mosaic()
    players = {"generator": algorithm.generator, "discriminator": algorithm.discriminator,
               "network": algorithm.network}
    optimizers = {"generator": algorithm.generator_optimizer, "network": algorithm.optimizer,
                  "discriminator": algorithm.discriminator_optimizer}
    turns = []

    def watch(name, step):
        def watched():
            before = {key: parameters(player) for key, player in players.items()}
            step()
            turns.append((name, {key for key in before if moved(before[key], players[key])}))
        return watched

    for name, optimizer in optimizers.items():
        optimizer.step = watch(name, optimizer.step)
    algorithm._play(real_images(one_batch()), torch.Generator())
    assert turns == [("discriminator", {"discriminator"}), ("generator", {"generator"})]
    assert all(p.grad is None for p in algorithm.network.parameters())


@pytest.mark.parametrize("published", [False, True])
def test_only_as_published_do_synthetic_batches_alone_move_the_students_batch_norm(published):
    algorithm = mosaic((3, 32, 32), mosaic_published=published)
    before = bits(algorithm.network)
    algorithm._play(real_images(one_batch((3, 32, 32))), torch.Generator())
    assert same_bits(before, bits(algorithm.network)) is not published
    assert all(module.training for module in algorithm.network.modules())


def test_a_copy_of_the_teacher_has_nothing_to_learn_and_no_disagreement_to_exploit():
    student = mosaic((3, 32, 32)).network
    algorithm = mosaic((3, 32, 32), teacher=copy.deepcopy(student), mosaic_kd_steps=1).eval()
    values = algorithm.update(one_batch((3, 32, 32)))
    assert values["adversarial"] == pytest.approx(0, abs=1e-6)
    assert values["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n_steps", [1, 3, 5])
@pytest.mark.parametrize("n_synthetic", [None, 5])
def test_every_step_of_the_student_sees_fresh_synthetic_images_beside_the_real(
        n_steps, n_synthetic):
    algorithm = mosaic(mosaic_kd_steps=n_steps, mosaic_batch=n_synthetic)
    batch, seen = one_batch(), []
    real = real_images(batch)
    algorithm.network.register_forward_pre_hook(
        lambda module, images: seen.append(images[0].detach().clone()))
    algorithm.update(batch)
    assert {state["step"].item() for state in algorithm.optimizer.state.values()} == {n_steps}
    first, *batches = seen  # the first is the generator's turn
    n = n_synthetic or len(real)
    assert len(first) == n and len(batches) == n_steps
    for images in batches:
        assert len(images) == n + len(real) and torch.equal(images[n:], real)
    synthetic = [first, *(images[:n] for images in batches)]
    assert all(not torch.equal(a, b) for i, a in enumerate(synthetic) for b in synthetic[:i])


def test_a_share_of_the_real_images_is_that_of_the_highest_entropy():
    algorithm, batch, seen = mosaic(mosaic_ood_share=0.5), one_batch(), []
    real = real_images(batch)
    algorithm.discriminator.register_forward_pre_hook(
        lambda module, images: seen.append(images[0].detach().clone()))
    p = algorithm.teacher(real).softmax(dim=1).double().numpy()
    wanted = real[np.argsort(-stats.entropy(p, axis=1))[:6].copy()]
    algorithm.update(batch)
    assert [len(images) for images in seen] == [6, 6, 6]
    assert torch.equal(seen[1], wanted)


# Labels, restarts and random numbers.


def test_with_labels_only_it_trains_as_erm_bit_for_bit():
    shape = (3, 32, 32)
    batches = minibatches(4, shape)
    erm = make("ERM", shape, lr=1e-3)
    after_building = torch.get_rng_state()
    ours = mosaic(shape, mosaic_kd=0.0, mosaic_ce=1.0)
    assert torch.equal(after_building, torch.get_rng_state())
    logged = run(ours, batches)
    assert [values["loss"] for values in logged] == [v["loss"] for v in run(erm, batches)]
    assert same_bits(bits(erm.network), bits(ours.network))


def test_labels_can_be_asked_for_beside_the_teacher():
    batch = one_batch()
    with_labels, without = mosaic(mosaic_ce=0.5), mosaic()
    values = with_labels.update(batch)
    assert values.keys() == TERMS | {"classify"}
    assert values["loss"] == pytest.approx(values["distill"] + 0.5 * values["classify"])
    without.update(batch)
    assert moved(parameters(without.network), with_labels.network)


def test_an_update_leaves_the_global_streams_alone():
    algorithm = mosaic()
    before = torch.get_rng_state()
    run(algorithm, minibatches(2, SHAPE))
    assert torch.equal(before, torch.get_rng_state())


def test_noise_differs_between_updates_and_between_seeds_but_not_between_equal_runs():
    one, again, other = mosaic(), mosaic(), mosaic(seed=1)
    z = [torch.randn(3, generator=noise_of(a)).tolist() for a in (one, again, other)]
    assert z[0] == z[1] != z[2]
    one.update(one_batch())
    assert torch.randn(3, generator=noise_of(one)).tolist() != z[0]


@pytest.mark.parametrize("changes", [
    {}, {"mosaic_student_optimizer": "sgd"}, {"teacher": None, "teacher_steps": 2},
    {"teacher": None, "teacher_steps": 5, "mosaic_student_optimizer": "sgd"},
    {"mosaic_kd": 0.0, "mosaic_ce": 1.0, "mosaic_student_optimizer": "sgd"}])
def test_a_resumed_run_equals_an_uninterrupted_one(changes, tmp_path):
    batches = minibatches(8, SHAPE)
    whole, first, second = (mosaic(seed=seed, **changes) for seed in (0, 0, 1))
    logged = run(whole, batches)
    run(first, batches[:4])
    checkpoints.save(tmp_path / "state.pt", checkpoints.algorithm_state(first))
    checkpoints.load_algorithm_state(second, checkpoints.load(tmp_path / "state.pt"))
    assert run(second, batches[4:]) == logged[4:]
    assert same_bits(bits(whole), bits(second))


@pytest.mark.parametrize("warm_up", [0, 2])
def test_all_three_rates_follow_a_cosine_from_the_first_step_of_the_student_to_the_last(warm_up):
    n_steps, changes = 6, {"teacher": None, "teacher_steps": warm_up} if warm_up else {}
    algorithm = mosaic(
        total_steps=n_steps + warm_up, mosaic_student_optimizer="sgd", lr=0.1, **changes)
    run(algorithm, minibatches(warm_up, SHAPE))
    for step, batch in enumerate(minibatches(n_steps, SHAPE)):
        factor = (1 + math.cos(math.pi * step / n_steps)) / 2
        for optimizer, lr in ((algorithm.optimizer, 0.1), (algorithm.generator_optimizer, 1e-3),
                              (algorithm.discriminator_optimizer, 1e-3)):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(factor * lr)
        algorithm.update(batch)
    assert algorithm.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_domainbeds_adam_keeps_its_rate_and_a_fork_that_does_not_tell_the_steps_anneals_nothing():
    algorithm, in_fork = mosaic(), mosaic(total_steps=0, mosaic_student_optimizer="sgd")
    assert len(algorithm.schedulers) == 2 and in_fork.schedulers == []
    run(algorithm, minibatches(2, SHAPE))
    assert algorithm.optimizer.param_groups[0]["lr"] == 1e-3
    assert type(algorithm.optimizer) is torch.optim.Adam


# Roles.


def unlabeled_images():
    return [torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(9)) for _ in range(2)]


@pytest.mark.parametrize("role, expected", [("dg", "unlabeled"), ("ood", "minibatches")])
def test_unlabeled_images_are_the_real_ones_unless_the_student_must_not_see_that_domain(
        role, expected):
    algorithm, batch, seen = mosaic(mosaic_role=role, mosaic_kd_steps=1), one_batch(), []
    algorithm.network.register_forward_pre_hook(
        lambda module, images: seen.append(images[0].detach().clone()))
    algorithm.update(batch, unlabeled_images())
    real = torch.cat(unlabeled_images()) if expected == "unlabeled" else real_images(batch)
    assert torch.equal(seen[-1][-len(real):], real)


def train_one(folder, test_env, *flags):
    argv = ["--dataset", "Debug28", "--steps", "3", "--test_envs", *test_env, "--output_dir",
            str(folder), *flags]
    assert train.main(argv) == 0
    return folder


@pytest.mark.filterwarnings("ignore:--hparams. nothing here")
def test_out_of_domain_the_teacher_is_a_run_that_trained_on_the_domain_that_was_held_out(
        tmp_path):
    small = {"batch_size": 4, "mosaic_width": 2, "mosaic_kd_steps": 1}
    in_domain = train_one(tmp_path / "in", "12", "--hparams", json.dumps(small))
    elsewhere = train_one(tmp_path / "out", "0", "--hparams", json.dumps(small))

    def student(teacher):
        return ["--dataset", "Debug28", "--steps", "2", "--test_envs", "0", "--algorithm",
                "MosaicKD", "--teacher", str(teacher), "--allow_bad_teacher", "--output_dir",
                str(tmp_path / f"student of {teacher.name}"), "--hparams",
                json.dumps(small | {"mosaic_role": "ood"})]

    assert train.main(student(in_domain)) == 0
    with pytest.raises(ValueError, match=r"held out environments \[0\]. Name a run that trained"):
        train.main(student(elsewhere))


@pytest.mark.parametrize("changes, words", [
    ({"mosaic_role": "odd"}, "mosaic_role is 'odd'; it takes one of dg, ood"),
    ({"mosaic_student_optimizer": "lars"}, "it takes one of adam, sgd"),
    ({"mosaic_ood_share": 0.0}, "it takes a number above 0, up to 1"),
    ({"mosaic_ood_share": 1.5}, "it takes a number above 0, up to 1"),
    ({"mosaic_kd_steps": 0}, "mosaic_kd_steps is 0; it takes at least 1"),
    ({"mosaic_batch": 0}, "mosaic_batch is 0; it takes at least 1, or null"),
    ({"mosaic_width": 0}, "mosaic_width is 0; it takes at least 1"),
    ({"mosaic_kd": 0.0}, "both 0, so the student would learn nothing"),
    ({"mosaic_role": "ood", "mosaic_ce": 1.0}, "labels are ignored. Leave mosaic_ce at 0"),
    ({"mosaic_role": "ood", "teacher": None}, "cannot warm up on the others")])
def test_what_makes_no_sense_is_refused_in_one_line(changes, words):
    with pytest.raises(ValueError, match="MosaicKD: ") as error:
        mosaic(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_teacher_without_gradients_is_refused():
    algorithm = mosaic(teacher=networks.Frozen(Teacher()))
    with pytest.raises(ValueError, match="MosaicKD: the teacher, .* gives no gradient"):
        algorithm.update(one_batch())


# Sizes, devices and learning.


@pytest.mark.parametrize("shape", [
    (2, 28, 28), (3, 28, 28), (3, 32, 32), (1, 30, 30), (3, 64, 64), (3, 96, 96),
    pytest.param((3, 224, 224), marks=pytest.mark.slow)])
def test_it_trains_at_any_size(shape):
    algorithm = mosaic(shape, mosaic_kd_steps=1)
    before = {name: parameters(getattr(algorithm, name))
              for name in ("network", "generator", "discriminator")}
    for values in run(algorithm, minibatches(2, shape, size=2)):
        assert all(math.isfinite(v) for v in values.values())
    assert all(moved(before[name], getattr(algorithm, name)) for name in before)


@pytest.mark.cuda
def test_losses_on_cuda_equal_those_on_the_cpu():
    batches = minibatches(3, SHAPE)
    on_cpu = losses_in_double(mosaic(), batches, "cpu")
    on_cuda = losses_in_double(mosaic(), batches, "cuda")
    for ours, theirs in zip(on_cuda, on_cpu):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


class Colour(nn.Module):
    """Tells red, green and blue images apart."""

    def forward(self, x):
        return 10 * x.mean(dim=(2, 3))


def coloured(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.rand(n, *SHAPE, generator=generator) * 0.2
    x[torch.arange(n), y] += 0.8
    return x, y


def test_a_student_learns_a_toy_problem_without_labels():
    x, _ = coloured(30)
    wrong = torch.zeros(10, dtype=int)
    algorithm = mosaic(teacher=Colour(), mosaic_kd_steps=2)
    run(algorithm, [[(part, wrong) for part in x.split(10)]] * 15)
    x, y = coloured(60, seed=1)
    assert (algorithm.eval().predict(x).argmax(1) == y).float().mean() > 0.9


def test_the_generator_learns_images_of_which_the_teacher_is_sure_evenly_over_its_classes():
    x, y = coloured(30)
    algorithm = mosaic(teacher=Colour(), total_steps=40, mosaic_lr_g=0.02, mosaic_local=0.1,
                       mosaic_kd_steps=1, mosaic_batch=12)
    logged = run(algorithm, [list(zip(x.split(10), y.split(10)))] * 40)
    assert logged[-1]["align"] < 0.6 * logged[0]["align"]
    assert logged[-1]["balance"] < -1.5  # of at least -log2 3 = -1.58


@pytest.mark.slow
def test_digits_are_learned_from_a_teacher_without_any_label():
    dataset = datasets.get_dataset_class("DigitsDG")(None, [3], {})
    generator = torch.Generator().manual_seed(0)

    def batches(n, size=16):
        for _ in range(n):
            picks = [torch.randint(len(env), (size,), generator=generator)
                     for env in dataset.datasets[:3]]
            yield [tuple(part[i] for part in env.tensors)
                   for env, i in zip(dataset.datasets, picks)]

    teacher = make("ERM", (3, 32, 32), 10, lr=1e-3)
    run(teacher, batches(180))
    algorithm = make("MosaicKD", (3, 32, 32), 10, lr=1e-3, teacher=teacher, total_steps=60,
                     mosaic_width=8, mosaic_kd_steps=3, mosaic_batch=16)
    run(algorithm, ([(x, y * 0) for x, y in batch] for batch in batches(60)))
    x, y = (part[:500] for part in dataset.datasets[0].tensors)
    algorithm.eval()
    with torch.no_grad():
        student, taught = ((predict(x).argmax(1) == y).float().mean()
                           for predict in (algorithm.predict, algorithm.teacher))
    assert taught > 0.6 and student > 0.3  # chance is 0.1
