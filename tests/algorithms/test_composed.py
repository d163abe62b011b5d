"""Teachers on top of any algorithm."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import SMALL, StubCLIP, Teacher, bits, make, minibatches, run, same_bits
from conftest import seed_everything
from torch import nn

from domainbed_kd import algorithms, checkpoints, hparams_registry, networks, teachers
from domainbed_kd.algorithms import composed, get_algorithm_class
from domainbed_kd.folder import composition
from domainbed_kd.losses import kd_loss
from domainbed_kd.scripts import train

SHAPE = (3, 28, 28)
TAKING = [name for name in algorithms.SHIPPED if not get_algorithm_class(name).learns_from_run
          and get_algorithm_class(name).teacher_logits is None
          and get_algorithm_class(name).no_teachers is None]
SMALL_STUDENT = SMALL | {"batch_size": 4}


def build(name, seed=0, **changes):
    """An algorithm with teachers on top, as the training loop makes it."""
    hparams = hparams_registry.default_hparams(name, "Debug28") | SMALL_STUDENT | {
        "class_names": ["cat", "horse", "guitar"], "total_steps": 10, "normalization": None,
        "clip_model": StubCLIP(), "dataset": "Debug28"} | changes
    seed_everything(seed)
    cls = composed.assembled(get_algorithm_class(name), hparams)
    return cls(SHAPE, 3, 3, hparams)


def trained(algorithm, batches):
    """What updates log, from a global random state of their own."""
    seed_everything(7)
    return run(algorithm, batches)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{algorithm: the folder of its finished run on Debug28}."""
    found = {}
    for name, more in (("ERM", {}), ("CORAL", {"averaging": "sma", "sma_start": 1})):
        folder = tmp_path_factory.mktemp(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert train.main([
                "--dataset", "Debug28", "--algorithm", name, "--test_envs", "0", "--steps", "3",
                "--output_dir", str(folder), "--hparams", json.dumps(more | {"batch_size": 4})
            ]) == 0
        found[name] = str(folder)
    return found


@pytest.fixture
def frozen(monkeypatch):
    """Runs among the teachers, by number, are these modules."""
    modules = [Teacher(seed=seed) for seed in (1, 2, 3)]
    monkeypatch.setattr(teachers, "_of_same_view", lambda folder, *_: networks.Frozen(
        modules[int(folder)]))
    return modules


def test_no_teachers_is_the_algorithm_itself():
    for hparams in ({}, {"teachers": []}, {"teachers": None}):
        assert composed.assembled(get_algorithm_class("CORAL"), hparams) is (
            get_algorithm_class("CORAL"))


@pytest.mark.parametrize("averaging", [None, "sma"])
@pytest.mark.parametrize("name", TAKING)
def test_with_weight_0_every_base_trains_as_it_does_alone_to_the_bit(name, averaging):
    if averaging and get_algorithm_class(name).averages_weights:
        pytest.skip("averages its weights itself")
    batches = minibatches(3)
    on_top = {"averaging": averaging} if averaging else {}
    alone = build(name, **on_top)
    with_teacher = build(name, teachers=["clip"], distill_weight=0.0, **on_top)
    assert trained(alone, batches) == trained(with_teacher, batches)
    for part in ("featurizer", "classifier"):
        assert same_bits(bits(getattr(alone, part)), bits(getattr(with_teacher, part)))
    x = batches[0][0][0]
    for algorithm in (alone.eval(), with_teacher.eval()):
        seed_everything(3)  # MTL draws when it predicts
        algorithm.seen = algorithm.predict(x)
    assert torch.equal(alone.seen, with_teacher.seen)


@pytest.mark.parametrize("name", TAKING)
def test_every_base_that_does_not_refuse_learns_from_teachers(name):
    words = ["logit", "feature", "feature_mse", "relation"]
    algorithm = build(name, teachers=["clip"], distill=words)
    before = bits(algorithm.teacher.module)
    [values, *_] = trained(algorithm, minibatches(2))
    assert set(words) <= values.keys()
    assert all(np.isfinite(value) for value in values.values())
    assert same_bits(before, bits(algorithm.teacher.module))
    assert not any("visual" in key for key in algorithm.state_dict())
    assert not same_bits(bits(algorithm.featurizer), bits(build(name).featurizer))


@pytest.mark.parametrize("name", [name for name in algorithms.SHIPPED if name not in TAKING])
def test_every_other_base_is_refused_in_one_line_before_anything_is_built(name):
    with pytest.raises(ValueError, match="teachers do not go with this") as error:
        composed.check(get_algorithm_class(name), {"teachers": ["clip"]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, hparams, words", [
    ("ERM", {"distill": "logit"}, "distill needs teachers"),
    ("ERM", {"distill_weight": 1.0, "teachers": []}, "distill_weight needs teachers"),
    ("ERM", {"distill_temperature": 1.0}, "distill_temperature needs teachers"),
    ("ERM", {"teacher_mix": "mean"}, "teacher_mix needs teachers"),
    ("ERM", {"teacher_template": "a {}"}, "teacher_template needs teachers"),
    ("ERM", {"base_weight": 0.5}, "base_weight needs teachers"),
    ("ERM", {"teachers": ["clip"], "teacher_template": "nothing"}, "a sentence with {} in place"),
    ("ERM", {"teachers": "clip"}, "it takes a list"),
    ("ERM", {"teachers": ["run:"]}, "names nothing after the colon"),
    ("ERM", {"teachers": [3]}, "3 is not a teacher"),
    ("ERM", {"teachers": [{"run": "ERM", "lr": 1}]}, "is not a teacher; a teacher is"),
    ("ERM", {"teachers": ["clip"], "distill": "logits"}, "it takes logit, feature"),
    ("ERM", {"teachers": ["clip"], "distill": []}, "once"),
    ("ERM", {"teachers": ["clip"], "distill": ["text", "text"]}, "once"),
    ("ERM", {"teachers": ["clip"], "teacher_mix": "max"}, "it takes sum, mean, accuracy"),
    ("ERM", {"teachers": ["clip"], "teacher_mix": "mean", "distill": "feature"}, "logit"),
    ("ERM", {"teachers": ["clip"], "teacher_mix": "mean", "distill": "feature_mse"}, "logit"),
    ("ERM", {"teachers": ["run:ERM", "clip"], "distill": "text"}, "ERM reads none"),
    ("Mixup", {"teachers": ["clip"], "distill": "text"}, "needs labels"),
    ("SCMD", {"teachers": ["run:ERM"]}, "Choose a base"),
    ("KD", {"teachers": ["run:SWAD"]}, 'Name that by "teacher"'),
    ("CORAL", {"teacher": "run:SWAD"}, "does not learn from a run"),
    ("Fish", {"teachers": ["clip"]}, "a step for each domain"),
])
def test_what_has_no_meaning_is_refused_in_one_line_that_says_why(name, hparams, words):
    with pytest.raises(ValueError, match=words) as error:
        composed.check(get_algorithm_class(name), hparams)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, words", [
    ({"distill_weight": -1}, "distill_weight is -1"),
    ({"distill_temperature": 0}, "distill_temperature is 0"),
    ({"class_names": None}, "the classes have no names"),
    ({"teachers": ["run:SWAD"]}, "SWAD is a run that a sweep trains first"),
    ({"teachers": ["folder:nowhere"]}, "holds no finished run"),
    ({"distill": "relation", "batch_size": 0.5}, "a batch of 3 or more"),
])
def test_what_can_only_be_seen_when_teachers_are_built_is_refused_then(changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        build("ERM", **({"teachers": ["clip"]} | changes))


def test_a_users_method_that_makes_its_own_steps_is_refused_in_its_first_update():
    class Steps(get_algorithm_class("ERM")):
        def update(self, minibatches, unlabeled=None):
            for minibatch in minibatches:
                values = super().update([minibatch])
            return values

    class Descends(get_algorithm_class("ERM")):
        def update(self, minibatches, unlabeled=None):
            return {"loss": 0.0}

    class Twice(get_algorithm_class("ERM")):
        def update(self, minibatches, unlabeled=None):
            x, y = minibatches[0]
            features = self.featurizer(x)
            return self.descend(F.cross_entropy(
                self.classifier(features) + self.classifier(features), y))

    hparams = build("ERM").hparams | {"teachers": ["clip"]}
    for cls, words in ((Steps, "more than one step"), (Descends, "no step by `descend`"),
                       (Twice, "each image once")):
        algorithm = composed.assembled(cls, hparams)(SHAPE, 3, 3, hparams)
        with pytest.raises(ValueError, match=words):
            run(algorithm, minibatches())


# Published methods as points in the space.


def test_erm_with_a_teacher_is_kd():

    batches = minibatches(4)
    kd = make("KD", teacher=Teacher(seed=1), kd_alpha=0.3, kd_temperature=2.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "_of_same_view", lambda *_: networks.Frozen(Teacher(seed=1)))
        ours = build("ERM", teachers=["run:ERM"], teacher="folder", base_weight=0.7,
                     distill_weight=0.3, distill_temperature=2.0)
    for one, other in zip(trained(ours, batches), trained(kd, batches), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["logit"] == pytest.approx(other["distill"], rel=1e-6)
    x = batches[0][0][0]
    torch.testing.assert_close(ours.predict(x), kd.predict(x))
    torch.testing.assert_close(ours.teacher_logits(x), kd.teacher_logits(x))


def test_erm_with_clip_and_sma_is_scmd_without_selection_and_cross_modality():

    batches = minibatches(6)
    scmd = make("SCMD", clip_model=StubCLIP(), scmd_lambda1=0.8, scmd_lambda2=0.0,
                scmd_worst_case=1.0, scmd_temperature=3.0, scmd_sma_start=3)
    ours = build("ERM", teachers=["clip"], distill_weight=0.8, distill_temperature=3.0,
                 teacher_template="this is a photo of a {}", averaging="sma", sma_start=3)
    for one, other in zip(trained(ours, batches), trained(scmd, batches), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["logit"] == pytest.approx(other["distill"], rel=1e-6)
    x = batches[0][0][0]
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode).predict(x), scmd.train(mode).predict(x))


# What the terms are.


def test_the_logit_term_is_the_worked_example():
    z = torch.tensor([[2.0, 0, -1], [0.5, 1.5, 0]])
    q = torch.tensor([[1.0, 1, 0], [0, 3, -1]])
    assert kd_loss(z, q, 4.0).item() == pytest.approx(0.554667, abs=1e-6)


def test_the_feature_term_is_the_mean_cosine_distance():
    one, other = np.random.RandomState(0).randn(2, 5, 4)
    cosines = [a @ b / np.sqrt(a @ a * (b @ b)) for a, b in zip(one, other)]
    found = composed.feature_distance(torch.tensor(one), torch.tensor(other))
    assert found.item() == pytest.approx(1 - np.mean(cosines))


def test_the_feature_mse_term_is_the_mean_square_of_a_projections_error():
    algorithm, [batch] = build("ERM", teachers=["clip"], distill="feature_mse"), minibatches()
    x = torch.cat([x for x, _ in batch])
    with torch.no_grad():
        seen, features = algorithm.teacher(x), algorithm.featurizer(x)
        layer = algorithm.taught.projections["feature_mse0"]
        layer.weight.zero_()  # the term is then the teacher's mean square about a constant,
        layer.bias.fill_(0.5)
    [values] = run(algorithm, [batch])
    wanted = np.mean([(float(u) - 0.5) ** 2 for row in seen for u in row])
    assert values["feature_mse"] == pytest.approx(wanted, rel=1e-5)
    # and a projection that solves for the teacher's features leaves nothing.
    algorithm = build("ERM", teachers=["clip"], distill="feature_mse")
    layer = algorithm.taught.projections["feature_mse0"]
    ones = torch.cat([features, torch.ones(len(x), 1)], dim=1).double()
    solution = torch.linalg.lstsq(ones, seen.double(), driver="gelsd").solution.float()
    with torch.no_grad():
        layer.weight.copy_(solution[:-1].T)
        layer.bias.copy_(solution[-1])
    assert run(algorithm, [batch])[0]["feature_mse"] == pytest.approx(0, abs=1e-6)


def test_the_text_term_is_rises_distances_at_ten_times_and_a_tenth_by_a_naive_loop():
    algorithm, [batch] = build("ERM", teachers=["clip"], distill="text"), minibatches()
    x, y = (torch.cat(part) for part in zip(*batch))
    with torch.no_grad():
        image = algorithm.taught.projections["text0"](algorithm.featurizer(x)).numpy()
    text, styled = algorithm.text0.numpy(), algorithm.styled0.numpy()

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    def shares(a, sentences):
        powers = [np.exp(cosine(a, sentence) / 0.1) for sentence in sentences]
        return np.array(powers) / sum(powers)

    absolute = [1 - cosine(one, text[label]) for one, label in zip(image, y)]
    relative = [((shares(one, styled[label]) - shares(text[label], styled[label])) ** 2).mean()
                for one, label in zip(image, y)]
    assert np.mean(relative) > 1e-3  # so that factor and temperature show
    wanted = np.mean(absolute) + 10 * np.mean(relative)
    assert run(algorithm, [batch])[0]["text"] == pytest.approx(wanted, rel=1e-5)


def test_gradients_of_several_words_are_the_sum_of_each_ones_in_double_precision():
    words = ["logit", "feature", "feature_mse", "relation", "text"]
    [batch] = minibatches()
    batch = [(x.double(), y) for x, y in batch]

    def gradients(**changes):
        """The gradients of the featurizer, with the same projections in every case."""
        algorithm = build("ERM", teachers=["clip"], **changes).double()
        for name, layer in algorithm.taught.projections.items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            for p in layer.parameters():
                p.data.copy_(torch.randn(p.shape, generator=generator) / 10)
        algorithm.update(batch)
        return [p.grad.clone() for p in algorithm.featurizer.parameters()]

    whole = gradients(distill=words, distill_weight=2.0, base_weight=0.5)
    parts = [gradients(distill=word, distill_weight=2.0, base_weight=0.0) for word in words]
    alone = gradients(distill_weight=0.0, base_weight=0.5)
    assert all(any(g.abs().max() > 1e-6 for g in part) for part in parts)
    for together, one, *each in zip(whole, alone, *parts):
        torch.testing.assert_close(together, one + sum(each), rtol=1e-9, atol=1e-12)


def test_the_relation_term_compares_every_pair_of_two_images():
    one, other = np.random.RandomState(0).randn(5, 4), np.random.RandomState(1).randn(5, 3)
    squares = []
    for i in range(5):
        for j in range(5):
            if i != j:
                a, b = (x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
                        for x in (one, other))
                squares.append((a - b) ** 2)
    found = composed.relation_distance(torch.tensor(one), torch.tensor(other))
    assert found.item() == pytest.approx(np.mean(squares))


def test_terms_add_up_and_are_means_over_teachers(frozen):
    [batch] = minibatches()
    x, y = (torch.cat(part) for part in zip(*batch))
    algorithm = build("ERM", teachers=["run:ERM", "run:SWAD"], teacher=["0", "1"],
                      distill_weight=2.0, distill_temperature=3.0, base_weight=0.5)
    logits = algorithm.network(x).detach()
    each = [kd_loss(logits, networks.Frozen(module)(x), 3.0) for module in frozen[:2]]
    [values] = run(algorithm, [batch])
    assert values["logit"] == pytest.approx(sum(each).item() / 2, rel=1e-5)
    assert values["loss"] == pytest.approx(
        0.5 * F.cross_entropy(logits, y).item() + 2 * values["logit"], rel=1e-5)


def test_a_mean_of_teachers_is_that_of_their_softened_probabilities(frozen):
    [batch] = minibatches()
    x = torch.cat([x for x, _ in batch])
    algorithm = build("ERM", teachers=["run:ERM", "run:SWAD"], teacher=["0", "1"],
                      teacher_mix="mean")
    with torch.no_grad():
        of_each = [networks.Frozen(module)(x) for module in frozen[:2]]
        wanted = (of_each[0] / 4).softmax(1) / 2 + (of_each[1] / 4).softmax(1) / 2
        expected = kd_loss(algorithm.network(x), 4 * wanted.log(), 4.0)
        together = of_each[0].softmax(1) / 2 + of_each[1].softmax(1) / 2
    torch.testing.assert_close(algorithm.teacher_logits(x).softmax(1), together)
    assert run(algorithm, [batch])[0]["logit"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_mean_of_one_teacher_is_a_sum_of_one(frozen):
    logged = [run(build("ERM", teachers=["run:ERM"], teacher="0", teacher_mix=mix), minibatches(2))
              for mix in ("sum", "mean")]
    for one, other in zip(*logged):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_order_of_teachers_does_not_matter(frozen):
    logged = [run(build("ERM", teachers=["run:ERM"] * 3, teacher=order), minibatches(2))
              for order in (["0", "1", "2"], ["2", "0", "1"])]
    for one, other in zip(*logged):
        assert one == pytest.approx(other, rel=1e-4)


def test_shares_by_accuracy_are_those_of_the_validation_images(frozen):
    algorithm = build("ERM", teachers=["run:ERM", "run:SWAD"], teacher=["0", "1"],
                      teacher_mix="accuracy")
    x, y = torch.rand(40, *SHAPE), torch.arange(40) % 3
    algorithm.checkpoint(0, False, lambda predict: F.cross_entropy(predict(x), y).item(), None)
    right = torch.stack([(networks.Frozen(module)(x).argmax(1) == y).float().mean()
                         for module in frozen[:2]])
    torch.testing.assert_close(algorithm.taught.shares, right / right.sum())
    before = algorithm.taught.shares.clone()
    algorithm.checkpoint(1, False, None, None)
    assert torch.equal(before, algorithm.taught.shares)


def test_teachers_that_are_all_wrong_have_equal_shares(frozen):
    algorithm = build("ERM", teachers=["run:ERM", "run:SWAD"], teacher=["0", "1"],
                      teacher_mix="accuracy")
    x = torch.rand(40, *SHAPE)
    algorithm.checkpoint(0, False, lambda predict: F.cross_entropy(
        predict(x), (predict(x).argmax(1) + 1) % 3).item(), None)
    assert algorithm.taught.shares.tolist() == [0.5, 0.5]
    assert np.isfinite(run(algorithm, minibatches())[0]["logit"])


def test_teachers_see_the_images_that_the_student_was_given():
    algorithm = build("Mixup", teachers=["clip"])
    seen = []
    algorithm.teachers[0].look = lambda x, look=algorithm.teachers[0].look: (
        seen.append(x), look(x))[1]
    given = []
    hook = algorithm.featurizer.register_forward_hook(lambda _, args, __: given.append(args[0]))
    run(algorithm, minibatches())
    hook.remove()
    assert torch.equal(torch.cat(given), torch.cat(seen))
    assert not any(torch.equal(torch.cat(seen)[:4], x) for x, _ in minibatches()[0])


def test_a_student_with_its_teachers_features_has_no_relations_to_learn():
    features = torch.randn(6, 4)
    assert composed.relation_distance(features, 3 * features).item() == pytest.approx(0, abs=1e-10)
    assert composed.feature_distance(features, 2 * features).item() == pytest.approx(0, abs=1e-6)


def test_text_pulls_projected_features_to_the_classs_sentence():
    algorithm = build("ERM", teachers=["clip"], distill="text", distill_weight=1.0, lr=1e-3)
    [batch] = minibatches(1, size=8)
    x, y = (torch.cat(part) for part in zip(*batch))

    def cosine():
        with torch.no_grad():
            image = algorithm.taught.projections["text0"](algorithm.featurizer(x))
            return F.cosine_similarity(image, algorithm.text0[y]).mean().item()

    before = cosine()
    values = run(algorithm, [batch] * 20)
    assert cosine() > before + 0.1 and values[-1]["text"] < values[0]["text"]


# A run as a teacher; restarts.


@pytest.mark.parametrize("word", ["logit", "feature", "feature_mse", "relation"])
def test_a_finished_run_teaches_by_logits_and_by_features(finished, word):
    for name, folder in finished.items():
        algorithm = build_for_debug28(folder, distill=word)
        assert np.isfinite(run(algorithm, two_classes(minibatches(2)))[-1][word])
        x = torch.rand(4, *SHAPE)
        direct = teachers.from_run(Path(folder), "Debug28", [0])
        assert torch.equal(algorithm.teacher_logits(x), direct(x)), name


def build_for_debug28(folder, seed=0, **changes):
    hparams = hparams_registry.default_hparams("CORAL", "Debug28") | {
        "batch_size": 4, "total_steps": 10, "dataset": "Debug28", "test_envs": [0],
        "normalization": None, "teachers": ["run:ERM"], "teacher": folder} | changes
    seed_everything(seed)
    return composed.assembled(get_algorithm_class("CORAL"), hparams)(SHAPE, 2, 2, hparams)


def two_classes(batches):
    return [[(x, y % 2) for x, y in batch] for batch in batches]


@pytest.mark.parametrize("word", ["feature", "feature_mse", "relation"])
def test_a_run_that_is_no_head_on_features_teaches_logits_alone(word, monkeypatch):
    other = networks.Frozen(Teacher(n_classes=2))
    monkeypatch.setattr(teachers, "_of_same_view", lambda *_: other)
    build_for_debug28("x", distill="logit")
    with pytest.raises(ValueError, match="has no features"):
        build_for_debug28("x", distill=word)


@pytest.mark.parametrize("asked, held_out, passes", [
    ([0], [0], True), ([0], [0, 1], False), ([0], [1], False)])
def test_a_teacher_that_saw_what_the_student_is_tested_on_is_refused(
        finished, asked, held_out, passes):
    if passes:
        build_for_debug28(finished["ERM"], test_envs=held_out)
    else:
        with pytest.raises(ValueError, match="on which the student is tested"):
            build_for_debug28(finished["ERM"], test_envs=held_out)


def test_projections_and_shares_survive_a_restart_and_are_not_needed_to_teach(
        finished, tmp_path):
    changes = {"distill": ["logit", "feature"]}
    batches = two_classes(minibatches(6))
    whole, first, second = (build_for_debug28(finished["ERM"], seed=s, **changes)
                            for s in (0, 0, 1))
    logged = run(whole, batches)
    run(first, batches[:3])
    checkpoints.save(tmp_path / "state.pt", checkpoints.algorithm_state(first))
    checkpoints.load_algorithm_state(second, checkpoints.load(tmp_path / "state.pt"))
    assert run(second, batches[3:]) == logged[3:]
    assert same_bits(bits(whole), bits(second))


def test_a_student_of_teachers_can_teach_in_turn(finished, tmp_path):
    flags = ["--dataset", "Debug28", "--test_envs", "0", "--steps", "2"]
    hparams = {"batch_size": 4, "teachers": ["run:ERM"], "distill": "feature"}
    assert train.main(["--algorithm", "CORAL", *flags, "--output_dir", str(tmp_path / "a"),
                       "--hparams", json.dumps(hparams), "--teacher", finished["ERM"],
                       "--allow_bad_teacher"]) == 0
    student = teachers.from_run(tmp_path / "a", "Debug28", [0])
    assert isinstance(student.module.network, nn.Sequential)
    assert not hasattr(student.module, "teachers")
    hparams["teachers"] = ["folder:" + str(tmp_path / "a"), "run:ERM"]
    assert train.main(["--algorithm", "ERM", *flags, "--output_dir", str(tmp_path / "b"),
                       "--hparams", json.dumps(hparams), "--teacher", finished["ERM"],
                       "--allow_bad_teacher"]) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_teacher_of_another_trial_seed_and_one_listed_twice_are_named_when_the_run_begins(
        seed, finished, tmp_path, capfd):
    asked = f"folder:{finished['ERM']}"
    hparams = {"batch_size": 4, "teachers": [asked] * (1 + seed)}
    assert train.main(["--dataset", "Debug28", "--algorithm", "CORAL", "--steps", "1",
                       "--trial_seed", str(seed), "--output_dir", str(tmp_path),
                       "--allow_bad_teacher", "--hparams", json.dumps(hparams)]) == 0
    told = capfd.readouterr().err.splitlines()
    assert sum("has trial seed 0, and this run has 1" in line for line in told) == 2 * seed
    assert sum("is listed more than once" in line for line in told) == seed


def test_a_run_cannot_teach_itself(tmp_path):
    hparams = {"teachers": [f"folder:{tmp_path}"], "batch_size": 4}
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        train.main(["--dataset", "Debug28", "--steps", "1", "--output_dir", str(tmp_path),
                    "--hparams", json.dumps(hparams)])


def test_as_many_folders_as_runs_are_asked_for(finished, tmp_path):
    hparams = json.dumps({"teachers": ["run:ERM", "run:SWAD", "clip"]})
    with pytest.raises(ValueError, match="names 1 folders, and ERM learns from 2"):
        train.main(["--dataset", "Debug28", "--output_dir", str(tmp_path / "x"), "--hparams",
                    hparams, "--teacher", finished["ERM"]])


def test_a_label_smoothed_teacher_learns_labels_that_all_classes_share():
    [batch] = minibatches()
    x, y = (torch.cat(part) for part in zip(*batch))
    algorithm = build("ERM", label_smoothing=0.3)
    log_p = algorithm.network(x).log_softmax(1)
    wanted = 0.7 * F.one_hot(y, 3) + 0.1
    assert run(algorithm, [batch])[0]["loss"] == pytest.approx(
        -(wanted * log_p).sum(1).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        build("ERM", label_smoothing=2)


@pytest.mark.parametrize("name", algorithms.SHIPPED)
def test_label_smoothing_is_refused_by_exactly_the_methods_whose_losses_it_does_not_change(name):
    def losses(**changes):
        algorithm = make(name, total_steps=2, resnet18=name != "SDViT", **changes)
        seed_everything(7)
        return run(algorithm, minibatches(2))

    is_read = name != "CLIP" and losses() != losses(label_smoothing=0.5)
    if is_read:
        hparams_registry.refuse_label_smoothing(name, '{"label_smoothing": 0.5}')
    else:
        with pytest.raises(ValueError, match=f"{name} does not read .* only ERM, ARM, SMA, SWAD, "):
            hparams_registry.refuse_label_smoothing(name, '{"label_smoothing": 0.5}')
    hparams_registry.refuse_label_smoothing(name, '{"label_smoothing": 0}')


def test_a_run_with_label_smoothing_that_its_method_does_not_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="KD does not read the hparam label_smoothing"):
        train.main(["--algorithm", "KD", "--dataset", "Debug28", "--output_dir", str(tmp_path),
                    "--hparams", '{"label_smoothing": 0.5}'])


# What rows are called, and what teachers' runs are.


@pytest.mark.parametrize("name, hparams, row", [
    ("CORAL", {}, "CORAL"),
    ("CORAL", {"teachers": []}, "CORAL"),
    ("CORAL", {"averaging": "sma"}, "CORAL + SMA"),
    ("CORAL", {"teachers": ["run:SWAD"], "averaging": "sma"}, "CORAL + KD(SWAD) + SMA"),
    ("ERM", {"teachers": ["clip", "run:ERM"], "distill": ["logit", "text"]},
     "ERM + KD+Text(CLIP, ERM)"),
    ("CORAL", {"teachers": ["run:SWAD"], "distill": "feature_mse"}, "CORAL + FeatureMSE(SWAD)"),
    ("ERM", {"teachers": ["ViT-B-16", "timm:vit_small"], "distill": "relation"},
     "ERM + Relation(CLIP ViT-B-16, vit_small)"),
    ("ERM", {"teachers": ["run:ERM", "run:SWAD"], "teacher_mix": "mean"},
     "ERM + KD(mean of ERM, SWAD)"),
    ("ERM", {"teachers": [{"run": "ERM", "hparams": {"lr": 0.1}, "steps": 5}]},
     "ERM + KD(ERM, lr 0.1, steps 5)"),
    ("ERM", {"teachers": [{"run": "CORAL", "hparams": {"teachers": ["run:SWAD"]}}]},
     "ERM + KD(CORAL + KD(SWAD))"),
    ("ERM", {"teachers": ["folder:a/b/"]}, "ERM + KD(b)"),
    ("KD", {"teacher": "run:SWAD"}, "KD(SWAD)"),
    ("KD", {"teacher": "a/folder"}, "KD"),
    ("ERM", {"teachers": [3]}, "ERM"), ("ERM", {"teachers": {"a": 1}}, "ERM"),
    ("ERM", {"averaging": 3}, "ERM"), ("ERM", {"teachers": ["clip"], "distill": {}}, "ERM")
])
def test_a_row_says_what_it_is_of(name, hparams, row):
    assert composition.row(name, hparams) == row
    assert algorithms.display_name(row) == row


def test_the_methods_own_name_is_shown_with_what_is_on_top_of_it():
    assert algorithms.display_name("FourDs(SWAD) + SMA") == "4Ds(SWAD) + SMA"


def test_what_teachers_add_is_drawn_by_name_so_no_other_draw_moves():
    assert hparams_registry.of_teachers(None, None) == {}
    assert hparams_registry.of_teachers('{"lr": 1}', 3) == {}
    text = '{"teachers": ["clip"]}'
    assert hparams_registry.of_teachers(text, None) == {
        "distill_weight": 1.0, "distill_temperature": 4.0}
    drawn = [hparams_registry.of_teachers(text, seed) for seed in range(30)]
    assert all(0.1 <= one["distill_weight"] <= 10 for one in drawn)
    assert {one["distill_temperature"] for one in drawn} == {1.0, 2.0, 4.0, 8.0}
