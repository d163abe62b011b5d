import math

import clips
import pytest
import torch
import torch.nn.functional as F
from clips import StubCLIP, bits, make, minibatches, run, same_bits
from conftest import seed_everything
from torch import nn

from domainbed_kd import networks
from domainbed_kd.algorithms.rise import (
    NEUTRAL,
    STYLED,
    absolute_distance,
    anchors,
    relative_distance,
)


@pytest.fixture
def space():
    """Images (B, D), text (C, D), anchors (C, S, D), labels (B,), none of unit length."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    y = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    return normal(7, 5), normal(3, 5), normal(3, 4, 5), y


def cosine(a, b):
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def test_the_absolute_distance_equals_a_loop_over_samples(space):
    image, text, _, y = space
    expected = sum(1 - cosine(e, text[c]) for e, c in zip(image, y)) / len(y)
    assert absolute_distance(image, text, y).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_relative_distance_equals_a_loop_over_samples(space, temperature):
    image, text, styled, y = space

    def seen_by(v, c):
        weights = [math.exp(cosine(v, anchor) / temperature) for anchor in styled[c]]
        return [w / sum(weights) for w in weights]

    differences = [(p - q) ** 2 for e, c in zip(image, y)
                   for p, q in zip(seen_by(e, c), seen_by(text[c], c))]
    found = relative_distance(image, text, styled, y, temperature).item()
    assert found == pytest.approx(sum(differences) / len(differences), abs=1e-9)
    assert found > 1e-4


def test_the_absolute_distance_is_0_along_the_text_2_against_it_and_blind_to_lengths(space):
    image, text, _, y = space
    assert absolute_distance(0.3 * text[y], text, y).item() == pytest.approx(0)
    assert absolute_distance(-4 * text[y], text, y).item() == pytest.approx(2)
    torch.testing.assert_close(
        absolute_distance(9 * image, 0.2 * text, y), absolute_distance(image, text, y))


def test_the_relative_distance_is_0_along_the_text_or_with_one_anchor(space):
    image, text, styled, y = space
    assert relative_distance(5 * text[y], text, styled, y).item() == pytest.approx(0)
    assert relative_distance(image, text, styled[:, :1], y).item() == 0


def test_the_relative_distance_is_blind_to_lengths_and_at_most_2_over_the_anchors(space):
    image, text, styled, y = space
    torch.testing.assert_close(relative_distance(9 * image, 0.2 * text, 7 * styled, y),
                               relative_distance(image, text, styled, y))
    # At a low temperature the softmaxes are one-hot: the largest distance there is.
    one_hot = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    image, text = torch.eye(4, dtype=torch.float64)[[0]], torch.eye(4, dtype=torch.float64)[[1]]
    largest = relative_distance(image, text, one_hot[:1], torch.tensor([0]), 1e-3)
    assert largest.item() == pytest.approx(2 / 4)


def test_renaming_classes_with_their_labels_changes_no_distance_but_renaming_alone_does(space):
    image, text, styled, y = space
    order = torch.tensor([2, 0, 1])
    for distance, rows in ((absolute_distance, (text,)), (relative_distance, (text, styled))):
        before = distance(image, *rows, y)
        moved = [row[order] for row in rows]
        torch.testing.assert_close(distance(image, *moved, order.argsort()[y]), before)
        assert abs(distance(image, *moved, y) - before) > 1e-5


def test_the_loss_is_the_authors_sum_of_the_terms_that_are_logged():
    algorithm = make("RISE", rise_distill=0.3, rise_distance=1.5)
    [values] = run(algorithm, minibatches())
    assert values["loss"] == pytest.approx(
        0.7 * values["classify"] + 0.3 * values["distill"]
        + 1.5 * (values["absolute"] + values["relative"]), rel=1e-5)
    untied = run(make("RISE", rise_distill=0.3, rise_distance=1.5, rise_relative=0.5),
                 minibatches())[0]
    assert untied["loss"] == pytest.approx(values["loss"] - values["relative"], rel=1e-5)


def test_the_terms_are_those_of_the_students_embeddings_before_the_step():
    algorithm = make("RISE", rise_temperature=3.0)
    [batch] = minibatches()
    x, y = (torch.cat(part) for part in zip(*batch))
    student = algorithm.network[0]
    image = student.embed(student.featurizer(x))
    logits = student.classifier(image)
    teacher = algorithm.teacher_logits(x)
    expected = {
        "classify": -(logits.log_softmax(1)[range(12), y]).mean().item(),
        "distill": 9 * F.kl_div((logits / 3).log_softmax(1), (teacher / 3).softmax(1),
                                reduction="batchmean").item(),
        "absolute": absolute_distance(image, student.text, y).item(),
        "relative": 10 * relative_distance(image, student.text, student.styled, y).item()}
    values = algorithm.update(batch)
    assert {k: values[k] for k in expected} == pytest.approx(expected, rel=1e-4)


# The head that starts as text.


def test_the_head_starts_as_a_copy_of_the_text_without_bias():
    algorithm = make("RISE")
    student = algorithm.network[0]
    assert torch.equal(student.classifier.weight, student.text)
    assert not student.classifier.bias.any()
    torch.testing.assert_close(student.text.norm(dim=1), torch.ones(3))
    assert (student.classifier(4 * student.text).argmax(1) == torch.arange(3)).all()
    text, styled = student.text.clone(), student.styled.clone()
    run(algorithm, minibatches(2))
    assert torch.equal(student.text, text) and torch.equal(student.styled, styled)
    assert not torch.equal(student.classifier.weight, text)


def test_the_other_weights_start_as_the_authors_do():
    student = make("RISE", rise_text_init=False, clip_model=StubCLIP(width=200)).network[0]
    for layer in (student.embed, student.classifier):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert not layer.bias.any()


def test_the_text_is_the_normalized_mean_of_seven_embeddings_that_are_not():
    clip = StubCLIP()
    student = make("RISE", clip_model=clip).network[0]
    raw = torch.stack([clip.encode_text(clip.tokenizer([t.format(n) for t in NEUTRAL])).detach()
                       for n in clips.NAMES])
    assert raw.shape == (3, 7, 16) and raw.norm(dim=-1).std() > 0
    torch.testing.assert_close(student.text, F.normalize(raw.mean(dim=1), dim=-1))
    of_normalized = F.normalize(F.normalize(raw, dim=-1).mean(dim=1), dim=-1)
    assert (student.text - of_normalized).abs().max() > 1e-6


def test_the_distances_teach_the_head_nothing():
    algorithm = make("RISE", rise_distill=0.0)
    student = algorithm.network[0]
    x, y = minibatches()[0][0]
    image = student.embedding(x)
    loss = (absolute_distance(image, student.text, y)
            + relative_distance(image, student.text, student.styled, y))
    loss.backward()
    assert all(p.grad is None for p in student.classifier.parameters())
    assert student.embed.weight.grad.any()


def test_without_its_terms_it_trains_as_cross_entropy_on_its_own_network_bit_for_bit():
    shape = (3, 32, 32)
    algorithm = make("RISE", shape, rise_text_init=False, rise_distill=0.0, rise_distance=0.0)
    seed_everything(0)
    featurizer = networks.Featurizer(shape, algorithm.hparams)
    plain = nn.Sequential(featurizer, nn.Linear(featurizer.n_outputs, 16), nn.Linear(16, 3))
    for layer in plain[1:]:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for batch in minibatches(4, shape):
        values = algorithm.update(batch)
        x, y = (torch.cat(part) for part in zip(*batch))
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert values == {"loss": loss.item(), "classify": loss.item()}
    student = algorithm.network[0]
    for ours, theirs in zip((student.featurizer, student.embed, student.classifier), plain):
        assert same_bits(bits(ours), bits(theirs))


# Sentences and domains.


def test_anchors_name_the_training_domains():
    assert anchors(["photo", "art painting"]) == ["a photo of a {}", "a art painting of a {}"]


@pytest.mark.parametrize("names", [None, [], ["photo"]])
def test_without_two_telling_domain_names_anchors_name_ways_to_photograph(names):
    assert anchors(names) == list(STYLED)
    assert make("RISE", domain_names=names).network[0].styled.shape == (3, 4, 16)


def test_sentences_name_each_class_in_each_training_domain_and_nothing_else():
    clip = StubCLIP()
    make("RISE", clip_model=clip, domain_names=["photo", "cartoon"])
    neutral = [t.format(n) for n in clips.NAMES for t in NEUTRAL]
    styled = [f"a {d} of a {n}" for n in clips.NAMES for d in ("photo", "cartoon")]
    assert clip.texts == neutral + styled


def test_a_run_never_names_its_test_domain_to_clip(tmp_path, monkeypatch):
    from domainbed_kd import clip_teacher
    from domainbed_kd.scripts import train

    clip = StubCLIP()
    monkeypatch.setattr(clip_teacher, "tiny_clip", lambda: (
        clip, clip.tokenizer, 12, (0.0,) * 3, (1.0,) * 3), raising=False)
    train.main(["--dataset", "DigitsDG", "--algorithm", "RISE", "--steps", "1", "--test_envs", "3",
                "--allow_bad_teacher", "--output_dir", str(tmp_path), "--hparams",
                '{"batch_size": 2, "wrn_depth": 10, "wrn_widen": 1}'])
    assert "a textured picture of a three" in clip.texts
    assert not any("sketch" in text for text in clip.texts)


# Two teachers, other optimisers, other heads.


def test_a_mix_of_teachers_has_a_student_for_each_that_learns_its_own_loss():
    """Without the relative distance, as in the authors' mix."""
    first, second = StubCLIP(), StubCLIP(width=8, seed=7)
    mix = make("RISE", rise_teachers=[first, second])
    alone = [make("RISE", clip_model=clip, rise_relative=0.0) for clip in (first, second)]
    for student, other in zip(mix.network, alone):
        other.network[0].load_state_dict(student.state_dict())
    batches = minibatches(3)
    for mixed, *each in zip(run(mix, batches), *(run(a, batches) for a in alone)):
        assert "relative" not in mixed
        assert mixed["loss"] == pytest.approx(sum(v["loss"] for v in each), rel=1e-4)
        assert mixed["absolute"] == pytest.approx(sum(v["absolute"] for v in each) / 2, rel=1e-4)
    for student, other in zip(mix.network, alone):
        for name, tensor in bits(student).items():
            torch.testing.assert_close(tensor, bits(other.network[0])[name])
    x = torch.rand(4, 3, 28, 28)
    probabilities = [student(x).softmax(dim=1) for student in mix.network]
    torch.testing.assert_close(mix.predict(x).softmax(dim=1), sum(probabilities) / 2)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_student_of_a_mix_may_have_a_lr_of_its_own(optimizer):
    """The authors' second student has twice the first one's."""
    first, second = StubCLIP(), StubCLIP(width=8, seed=7)
    mix = make("RISE", rise_teachers=[first, {"clip_model": second, "lr": 0.02}], lr=0.01,
               rise_optimizer=optimizer)
    alone = [make("RISE", clip_model=clip, rise_relative=0.0, lr=lr, rise_optimizer=optimizer)
             for clip, lr in ((first, 0.01), (second, 0.02))]
    for student, other in zip(mix.network, alone):
        other.network[0].load_state_dict(student.state_dict())
    batches = minibatches(3)
    for algorithm in (mix, *alone):
        run(algorithm, batches)
    for student, other in zip(mix.network, alone):
        for name, tensor in bits(student).items():
            torch.testing.assert_close(tensor, bits(other.network[0])[name])


def test_a_teacher_of_a_mix_may_have_its_own_preprocessing():
    mix = make("RISE", clip_renormalize=False, rise_teachers=[
        StubCLIP(), {"clip_model": StubCLIP(), "clip_renormalize": True}])
    assert [teacher.renormalize for teacher in mix.teachers] == [False, True]


def test_a_mix_is_also_named_by_backbones(monkeypatch):
    from domainbed_kd import clip_teacher

    asked = []

    def stub(name):
        asked.append(name)
        return StubCLIP(), StubCLIP().tokenizer, 12, (0.0,) * 3, (1.0,) * 3

    monkeypatch.setattr(clip_teacher, "_open_clip", stub)
    assert len(make("RISE", rise_teachers=["ViT-B-16", "RN101"]).network) == 2
    assert asked == ["ViT-B-16", "RN101"]


def test_sgd_has_the_authors_momentum_and_drop():
    algorithm = make("RISE", rise_optimizer="sgd", lr=0.01, weight_decay=5e-4, total_steps=10)
    group = algorithm.optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 5e-4)
    rates = []
    for batch in minibatches(10):
        rates.append(group["lr"])
        algorithm.update(batch)
    assert rates == pytest.approx([0.01] * 8 + [0.001] * 2)
    make("RISE", rise_optimizer="sgd", total_steps=1).update(minibatches()[0])


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="RISE: rise_optimizer is 'lion'; it takes one of "):
        make("RISE", rise_optimizer="lion")


def test_the_text_head_at_test_adds_clips_probabilities_to_the_students():
    algorithm = make("RISE", rise_clip_head_at_test=True)
    run(algorithm, minibatches())
    x = torch.rand(4, 3, 28, 28)
    algorithm.eval()
    student = algorithm.network[0]
    image = student.embedding(x)
    zero_shot = 100 * torch.stack([F.cosine_similarity(image, t[None]) for t in student.text], 1)
    expected = student.classifier(image).softmax(1) + zero_shot.softmax(1)
    torch.testing.assert_close(algorithm.predict(x).exp(), expected)
    algorithm.train()
    torch.testing.assert_close(
        algorithm.predict(x), student.classifier(student.embedding(x)))


def test_terra_alone_asks_for_the_text_head_at_test():
    from domainbed_kd import hparams_registry

    asks = [d for d in ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet", "DigitsDG")
            if hparams_registry.default_hparams("RISE", d)["rise_clip_head_at_test"]]
    assert asks == ["TerraIncognita"]


def test_classes_must_be_named():
    with pytest.raises(ValueError, match="RISE: the classes have no names. Pass them"):
        make("RISE", class_names=None)
    with pytest.raises(ValueError, match="RISE: the dataset has 3 classes but .* holds 2"):
        make("RISE", class_names=["cat", "dog"])
