import math

import clips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import StubCLIP, bits, make, minibatches, run, same_bits
from scipy.special import softmax
from scipy.stats import entropy

from domainbed_kd.algorithms.scmd import cross_modal_logits, hardest
from domainbed_kd.averaging import averaged
from domainbed_kd.losses import kd_loss


def whole(batch):
    return [torch.cat(part) for part in zip(*batch)]


def no_selection(**changes):
    return make("SCMD", scmd_worst_case=1.0, **changes)


# Selection.


@pytest.mark.parametrize("n, share, expected", [
    (96, 0.2, 19), (96, 0.25, 24), (96, 0.3, 28), (3, 0.2, 1), (10, 1.0, 10)])
def test_the_hardest_are_the_rows_with_the_largest_losses_and_at_least_one(n, share, expected):
    losses = torch.randn(n, generator=torch.Generator().manual_seed(0))
    kept = hardest(losses, share)
    assert sorted(kept.tolist()) == sorted(np.argsort(losses.numpy())[n - expected:].tolist())


@pytest.mark.parametrize("total_steps, published, last", [
    (5001, False, 3750), (15001, False, 11250), (15001, True, 3750), (301, False, 225)])
def test_selection_ends_after_its_share_of_the_runs_steps(total_steps, published, last):
    algorithm = make("SCMD", total_steps=total_steps, scmd_published=published, scmd_last_k=0.25)
    algorithm.update_count.fill_(last)
    assert algorithm.selects()
    algorithm.update_count.fill_(last + 1)
    assert not algorithm.selects()


def test_updates_count_from_0_and_the_last_ones_see_the_whole_batch():
    values = run(make("SCMD", total_steps=5, scmd_last_k=0.5), minibatches(5))
    # int(4 * 0.5) = 2: updates 0, 1, 2 keep floor(0.2 * 12) of 12 rows.
    assert [v["selected"] for v in values] == [2 / 12] * 3 + [1.0] * 2


def test_a_step_of_the_selection_phase_is_one_on_the_rows_with_the_largest_cross_entropy():
    [batch] = minibatches(size=5)
    x, y = whole(batch)
    algorithm, by_hand = make("SCMD"), no_selection()
    losses = [F.cross_entropy(algorithm.network(x[i:i + 1]), y[i:i + 1]).item()
              for i in range(15)]
    rows = np.argsort(losses)[-3:]
    [ours] = run(algorithm, [batch])
    [theirs] = run(by_hand, [[(x[rows.copy()], y[rows.copy()])]])
    assert ours.pop("selected") == 0.2 and theirs.pop("selected") == 1
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, tensor in bits(algorithm.network).items():
        torch.testing.assert_close(tensor, bits(by_hand.network)[name])


def test_rows_that_are_not_selected_have_no_influence():
    [batch] = minibatches()
    x, y = whole(batch)
    one, other = make("SCMD"), make("SCMD")
    easiest = F.cross_entropy(one.network(x), y, reduction="none").argmin()
    changed = x.clone()
    changed[easiest] += 1e-3
    assert one.update([(x, y)]) == other.update([(changed, y)])
    assert same_bits(bits(one.network), bits(other.network))
    assert same_bits(bits(one.projector), bits(other.projector))


# Losses.


def test_the_loss_is_the_cards_sum_by_scipy():
    algorithm = no_selection(scmd_lambda1=0.6, scmd_lambda2=0.9, scmd_temperature=2.0)
    [batch] = minibatches()
    x, y = whole(batch)
    clip = algorithm.teacher.module
    image = clip.encode_image(algorithm.teacher.preprocess(x)).detach().numpy()
    text = clip.encode_text(clip.tokenizer(
        [f"this is a photo of a {name}" for name in clips.NAMES])).detach().numpy()

    def unit(v):
        return v / np.linalg.norm(v, axis=1, keepdims=True)

    teacher = softmax(100 * unit(image) @ unit(text).T / 2.0, axis=1)
    features = algorithm.featurizer(x)
    logits = algorithm.classifier(features).detach().numpy()
    projected = (features @ algorithm.projector.weight.T).detach().numpy()
    cross_modal = unit(projected) @ unit(text).T / 0.07

    def divergence(student):
        return 4 * entropy(teacher, softmax(student / 2.0, axis=1), axis=1).mean()

    classify = -np.log(softmax(logits, axis=1)[np.arange(12), y]).mean()
    expected = {"classify": classify, "distill": divergence(logits),
                "cross_modal": divergence(cross_modal)}
    values = algorithm.update(batch)
    assert {k: values[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert values["loss"] == pytest.approx(
        classify + 0.6 * expected["distill"] + 0.9 * expected["cross_modal"], rel=1e-4)


def test_cross_modal_logits_are_clips_where_features_project_to_its_embedding_at_its_scale():
    algorithm = no_selection()
    x = torch.rand(6, 3, 28, 28)
    teacher = algorithm.teacher_logits(x)
    log_scale = torch.tensor(100.0).log()
    student = cross_modal_logits(7 * algorithm.teacher(x), algorithm.text, log_scale)
    assert kd_loss(student, teacher, 3.0) == pytest.approx(0, abs=1e-5)
    assert kd_loss(cross_modal_logits(-algorithm.teacher(x), algorithm.text, log_scale),
                   teacher, 3.0) > 1


def test_a_projection_of_zero_gives_finite_logits_and_gradients():
    image = torch.zeros(2, 16, requires_grad=True)
    logits = cross_modal_logits(image, torch.randn(3, 16), torch.tensor(1.0))
    logits.sum().backward()
    assert (logits == 0).all() and image.grad.isfinite().all()


def updated(lambda1, lambda2):
    algorithm = no_selection(scmd_lambda1=lambda1, scmd_lambda2=lambda2, lr=0.0)
    algorithm.update(minibatches()[0])
    return algorithm


def test_labels_and_logits_teach_neither_the_projector_nor_the_scale():
    algorithm = updated(1.0, 0.0)
    assert algorithm.projector.weight.grad is None and algorithm.log_scale.grad is None
    assert algorithm.classifier.weight.grad.any()


def test_the_cross_modal_term_teaches_all_but_the_classifier():
    without, with_it = updated(0.0, 0.0), updated(0.0, 1.0)
    assert torch.equal(without.classifier.weight.grad, with_it.classifier.weight.grad)
    first = [next(iter(a.featurizer.parameters())).grad for a in (without, with_it)]
    assert not torch.equal(*first)
    assert with_it.projector.weight.grad.any() and with_it.log_scale.grad.any()


@pytest.mark.parametrize("start, sign", [(2.0, 1), (2.0, -1), (4.6, 1)])
def test_the_scale_stays_within_1_and_100_however_large_the_step(start, sign):
    algorithm = no_selection()
    algorithm.log_scale.data.fill_(start)
    algorithm.optimizer.param_groups[2].update(lr=sign * 100.0)
    for values in run(algorithm, minibatches(4)):
        assert 0 <= algorithm.log_scale.item() <= math.log(100) + 1e-6
        assert 1 <= values["scale"] <= 100.001


def test_the_scale_starts_at_clips_and_decays_only_as_published():
    groups = make("SCMD", weight_decay=0.3).optimizer.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [
        (1e-3, 0.3), (1e-3, 0.3), (1e-4, 0)]
    published = make("SCMD", weight_decay=0.3, scmd_published=True)
    assert published.optimizer.param_groups[2]["weight_decay"] == 0.3
    assert published.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert published.log_scale.dtype == torch.float32


@pytest.mark.parametrize("changes", [{"scmd_published": True}, {"clip_renormalize": False}])
def test_as_published_clip_sees_the_students_tensor(changes):
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(make("SCMD", **changes).teacher.preprocess(x), x)
    assert not torch.equal(make("SCMD").teacher.preprocess(x), x)


# The moving average.


def test_the_average_is_the_mean_of_the_iterates_since_one_before_its_start():
    algorithm = make("SCMD", scmd_sma_start=4)
    iterates = []
    x = torch.rand(4, 3, 28, 28)
    for t, batch in enumerate(minibatches(7), start=1):
        algorithm.update(batch)
        iterates.append([p.detach().double().clone() for p in algorithm.network.parameters()])
        algorithm.eval()
        if t < 4:
            assert torch.equal(algorithm.predict(x), algorithm.network(x))
        else:
            for mean, *all_of_it in zip(algorithm.average.network.parameters(), *iterates[2:]):
                expected = sum(all_of_it) / len(all_of_it)
                torch.testing.assert_close(mean.double(), expected, atol=1e-6, rtol=1e-4)
            assert torch.equal(algorithm.predict(x), algorithm.average.network(x))
        algorithm.train()
    assert not same_bits(bits(algorithm.network), bits(algorithm.average.network))


def test_in_train_mode_and_with_the_average_off_the_live_student_predicts():
    x = torch.rand(4, 3, 28, 28)
    for algorithm in (make("SCMD", scmd_sma_start=1),
                      make("SCMD", scmd_sma_start=1, scmd_sma=False).eval()):
        mode = algorithm.training
        run(algorithm.train(), minibatches(3))
        algorithm.train(mode)
        assert torch.equal(algorithm.predict(x), algorithm.network(x))


def test_averaging_leaves_the_students_training_as_it_is():
    batches = minibatches(4)
    with_it, without = make("SCMD", scmd_sma_start=2), make("SCMD", scmd_sma=False)
    assert run(with_it, batches) == run(without, batches)
    assert same_bits(bits(with_it.network), bits(without.network))


def test_an_average_of_an_average_is_refused():
    with pytest.raises(ValueError, match="SCMD averages its weights already"):
        averaged(type(make("SCMD")), "sma")


def test_a_start_before_the_first_update_is_refused():
    with pytest.raises(ValueError, match="SCMD: scmd_sma_start is 0; it takes at least 1, or null"):
        make("SCMD", scmd_sma_start=0)


# Order, and who is needed when.


def test_the_order_of_the_domains_does_not_matter():
    [batch] = minibatches(size=5)
    forwards, backwards = run(make("SCMD"), [batch]), run(make("SCMD"), [batch[::-1]])
    assert forwards[0] == pytest.approx(backwards[0], rel=1e-5)


def test_naming_the_classes_in_another_order_with_the_labels_changes_no_loss():
    order = torch.tensor([2, 0, 1])  # new class i is the old class order[i]
    [batch] = minibatches(size=5)
    one = make("SCMD")
    other = make("SCMD", class_names=[clips.NAMES[i] for i in order])
    for parameter in other.classifier.parameters():
        parameter.data = parameter.data[order]
    [theirs] = run(other, [[(x, order.argsort()[y]) for x, y in batch]])
    assert theirs == pytest.approx(run(one, [batch])[0], rel=1e-4)
    names_only = make("SCMD", class_names=[clips.NAMES[i] for i in order])
    assert run(names_only, [batch])[0]["distill"] != pytest.approx(
        run(make("SCMD"), [batch])[0]["distill"], rel=1e-2)


def test_every_row_twice_changes_no_loss():
    [batch] = minibatches()
    twice = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in batch]
    [once], [doubled] = run(no_selection(), [batch]), run(no_selection(), [twice])
    assert once == pytest.approx(doubled, rel=1e-5)


def test_it_predicts_although_its_teacher_is_gone():
    algorithm = make("SCMD")
    run(algorithm, minibatches())
    del algorithm.teacher
    assert algorithm.eval().predict(torch.rand(5, 3, 28, 28)).shape == (5, 3)


def test_a_weight_of_0_asks_clip_nothing():
    clip = StubCLIP()
    run(make("SCMD", clip_model=clip, scmd_lambda1=0.0, scmd_lambda2=0.0), minibatches(2))
    assert clip.n_image_calls == 0


@pytest.mark.parametrize("names, words", [
    (None, "SCMD: the classes have no names. Pass them in label order"),
    (["cat"], "SCMD: the dataset has 3 classes but .* holds 1")])
def test_classes_must_be_named(names, words):
    with pytest.raises(ValueError, match=words):
        make("SCMD", class_names=names)


@pytest.mark.parametrize("total_steps, published, start", [
    (5001, False, 300), (5001, True, 300), (240, False, 14), (15001, False, 900),
    (15001, True, 300), (1, False, 1)])
def test_the_average_begins_after_the_share_of_the_run_that_300_is_of_5001(
        total_steps, published, start):
    algorithm = make("SCMD", total_steps=total_steps, scmd_published=published)
    assert algorithm.average.start == start - 1
