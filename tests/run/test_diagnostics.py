import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn

from domainbed_kd import datasets
from domainbed_kd.algorithms.base import Algorithm
from domainbed_kd.folder import files
from domainbed_kd.run import build, diagnostics
from domainbed_kd.scripts import train

FLAGS = ["--dataset", "Debug28", "--steps", "9", "--checkpoint_freq", "3", "--test_envs", "2",
         "--holdout_fraction", "0.5"]
SMALL = {"batch_size": 4}
NOT_COMPARED = ("step_time", "mem_gb", "diagnostics")


def run(folder, *flags, hparams=None):
    hparams = json.dumps(SMALL | (hparams or {}))
    assert train.main([*FLAGS, "--hparams", hparams, *flags, "--output_dir", str(folder)]) == 0
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def comparable(records):
    return [{k: v for k, v in r.items() if k not in (*NOT_COMPARED, "args")} for r in records]


def weights_in(path):
    state = torch.load(path, weights_only=True)["model_dict"]
    return {k: v for k, v in state.items() if torch.is_tensor(v)}


# SMA and SWAD average, KDDG warms a teacher up, DANN has two optimisers, ARM reads the batch as a
# whole, Fish swaps weights, Mixup draws random numbers.
@pytest.mark.parametrize("algorithm", ["ERM", "SMA", "SWAD", "KDDG", "DANN", "ARM", "Fish",
                                       "Mixup"])
def test_a_run_trains_to_the_same_bits_with_and_without(algorithm, tmp_path):
    without = run(tmp_path / "without", "--algorithm", algorithm)
    with_ = run(tmp_path / "with", "--algorithm", algorithm, "--diagnostics")
    assert comparable(with_) == comparable(without)
    ours, theirs = (weights_in(tmp_path / name / "model.pkl") for name in ("with", "without"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert all("diagnostics" in record for record in with_)
    assert not any("diagnostics" in record | record["args"] for record in without)


def norm(difference):
    return np.sqrt(sum((d ** 2).sum() for d in difference.values()))


@pytest.mark.parametrize("algorithm", ["ERM", "SWAD", "KDDG"])
def test_the_weight_distance_is_the_sum_of_steps_between_saved_weights(
        algorithm, tmp_path, monkeypatch):
    make, start = build.make_algorithm, {}

    def kept(*args):
        algorithm = make(*args)
        start.update({k: v.clone() for k, v in algorithm.state_dict().items()
                      if torch.is_tensor(v)})
        return algorithm

    monkeypatch.setattr(build, "make_algorithm", kept)
    records = run(tmp_path, "--algorithm", algorithm, "--diagnostics", "--checkpoint_freq", "1",
                  "--save_model_every_checkpoint")
    path = [start, *(weights_in(tmp_path / f"model_step{i}.pkl") for i in range(9))]
    trained = [name for name in start if name.startswith("network.")
               and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    path = [{name: weights[name].double().numpy() for name in trained} for weights in path]

    def step(i, names):
        return norm({name: path[i + 1][name] - path[i][name] for name in names})

    layers = {name.rpartition(".")[0] for name in trained}
    total = 0.0
    for i, record in enumerate(records):
        found, before = record["diagnostics"], total
        total += step(i, trained)
        assert found["weight_distance"] == pytest.approx(total, rel=1e-12)
        assert found["weight_distance_relative"] == pytest.approx(total / norm(path[0]))
        assert before <= total
        straight = norm({name: path[i + 1][name] - path[0][name] for name in trained})
        assert found["weight_distance"] >= straight * (1 - 1e-12)
        by_layer = found["weight_distance_by_layer"]
        assert {f"network.{name}" for name in by_layer} == layers
        for layer, value in by_layer.items():
            names = [n for n in trained if n.rpartition(".")[0] == f"network.{layer}"]
            assert value == pytest.approx(sum(step(j, names) for j in range(i + 1)), rel=1e-12)
    assert total > 0


def test_a_stopped_run_goes_on_with_its_distance(tmp_path, monkeypatch):
    quiet = run(tmp_path / "quiet", "--diagnostics")
    append, calls = files.append_record, []

    def append_and_die(*args):
        calls.append(append(*args))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "append_record", append_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", "--diagnostics")
    monkeypatch.undo()
    stopped = run(tmp_path / "stopped", "--diagnostics")
    assert [r["diagnostics"] for r in stopped] == [r["diagnostics"] for r in quiet]


def test_a_finished_run_without_diagnostics_is_not_trained_again_for_them(tmp_path, capsys):
    before = run(tmp_path)
    assert run(tmp_path, "--diagnostics") == before
    assert "holds this run, finished" in capsys.readouterr().err


class Lookup(nn.Module):
    """An algorithm whose features, logits and teacher are read off its input."""

    part = Algorithm.part

    class Featurizer(nn.Module):
        n_outputs = 4

        def forward(self, x):
            return x[:, :4]

    def __init__(self):
        super().__init__()
        self.featurizer = self.Featurizer()

    def teacher_is_ready(self):
        return True

    def predict(self, x):
        self.featurizer(x)
        return x[:, 4:7]

    def teacher_logits(self, x):
        return x[:, 7:]


@pytest.fixture
def measured():
    generator = torch.Generator().manual_seed(0)
    domains = []
    for i in range(3):
        y = torch.randint(3, (100 + 20 * i,), generator=generator)
        x = torch.randn(len(y), 10, generator=generator)
        x[torch.arange(len(y)), y] += 2  # features tell the class,
        x[:, 3] += i  # a little about the domain,
        x[torch.arange(len(y)), 4 + y] += 1  # and logits are better than chance
        domains.append((x, y))

    def read(split):
        x, y = split
        yield from zip(x.split(64), y.split(64))

    found = diagnostics.Diagnostics(Lookup(), domains, [0, 2], read).measure()
    return domains, found


def test_accuracy_and_agreement_are_shares_of_the_same_guesses(measured):
    domains, found = measured
    for i, (x, y) in enumerate(domains):
        student, teacher = x[:, 4:7].numpy().argmax(1), x[:, 7:].numpy().argmax(1)
        assert found[f"env{i}_acc"] == pytest.approx(np.mean(student == y.numpy()))
        assert found[f"env{i}_teacher_acc"] == pytest.approx(np.mean(teacher == y.numpy()))
        assert found[f"env{i}_teacher_agreement"] == pytest.approx(np.mean(student == teacher))


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy(measured):
    domains, found = measured
    for i, (x, y) in enumerate(domains):
        logits = x[:, 4:7].double().numpy()
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        expected = 0
        for low in np.arange(15) / 15:
            inside = [(p.max(), p.argmax() == label) for p, label in zip(probabilities, y.numpy())
                      if low < p.max() <= low + 1 / 15]
            if inside:
                confidence, right = np.mean(inside, axis=0)
                expected += len(inside) / len(y) * abs(confidence - right)
        assert found[f"env{i}_ece"] == pytest.approx(expected)


@pytest.mark.parametrize("right, expected", [(True, 0.0), (False, 1.0)])
def test_a_sure_guesser_is_calibrated_if_it_is_right(right, expected):
    logits = torch.tensor([[50.0, -50.0]]).repeat(10, 1)
    y = torch.full((10,), 0 if right else 1)
    assert diagnostics.calibration_error(logits, y) == pytest.approx(expected)


@pytest.mark.parametrize("about", ["class", "domain"])
def test_information_is_that_of_a_probe_on_held_out_features_of_the_training_domains(
        about, measured):
    domains, found = measured

    def half(start):
        x = np.concatenate([domains[i][0][start::2, :4] for i in (0, 2)])
        y = np.concatenate([domains[i][1][start::2] if about == "class"
                            else np.full(len(domains[i][1][start::2]), i) for i in (0, 2)])
        return x, y

    (x, y), (x_test, y_test) = half(0), half(1)
    scaled = [(part - x.mean(0)) / x.std(0, ddof=1) for part in (x, x_test)]
    # sklearn's objective is the sum of losses and half the squared weights over C.
    probe = LogisticRegression(C=1 / (2 * diagnostics.RIDGE * len(y)), max_iter=1000)
    loss = log_loss(y_test, probe.fit(scaled[0], y).predict_proba(scaled[1]))
    share = np.unique(y_test, return_counts=True)[1] / len(y_test)
    expected = -(share * np.log(share)).sum() - loss
    assert expected > 0.05
    # The probe has two weights a class where sklearn's of two classes has one, and a bias each.
    assert found[f"mutual_information_{about}"] == pytest.approx(expected, abs=0.02)


def test_a_predictor_of_one_logit_guesses_the_second_class_above_zero():
    class Binary(nn.Module):
        part = Algorithm.part

        def teacher_is_ready(self):
            return False

        def predict(self, x):
            return x

    x, y = torch.tensor([[-1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0])
    found = diagnostics.Diagnostics(Binary(), [None], [0], lambda _: [(x, y)]).measure()
    assert found["env0_acc"] == pytest.approx(2 / 3)
    assert found.keys() == {"env0_acc", "env0_ece"}  # no featurizer, no weights, no teacher


def test_a_warm_up_teacher_is_compared_once_it_is_ready(tmp_path):
    records = run(tmp_path, "--algorithm", "KDDG", "--diagnostics", hparams={"teacher_steps": 4})
    assert "filtered" not in records[0] and 0 <= records[-1]["filtered"] <= 1
    agree = [f"env{i}_teacher_agreement" in r["diagnostics"] for r in records for i in range(3)]
    assert agree == [False] * 3 + [True] * 9


@pytest.mark.parametrize("name", ["ERM", "KD", "SMA", "SagNet"])
def test_the_distance_is_that_of_the_student_alone(name):
    dataset = datasets.get_dataset_class("Debug28")(None, [0], {})
    args = {"dataset": "Debug28", "algorithm": name, "test_envs": [0], "trial_seed": 0,
            "hparams_seed": 0, "hparams": None, "steps": 5}
    algorithm = build.make_algorithm(args, build.choose_hparams(args), dataset, torch.device("cpu"))
    distance = diagnostics.WeightDistance(algorithm)
    with torch.no_grad():
        for p in algorithm.parameters():
            p += 0.5
    distance.add_step()
    n_weights = sum(p.numel() for p in algorithm.network.parameters())
    assert distance.total == pytest.approx(0.5 * math.sqrt(n_weights), rel=1e-4)


def test_a_step_reads_no_distance_back():
    dataset = datasets.get_dataset_class("Debug28")(None, [0], {})
    args = {"dataset": "Debug28", "algorithm": "ERM", "test_envs": [0], "trial_seed": 0,
            "hparams_seed": 0, "hparams": None, "steps": 5}
    algorithm = build.make_algorithm(args, build.choose_hparams(args), dataset, torch.device("cpu"))
    distance = diagnostics.WeightDistance(algorithm)
    algorithm.to("meta")  # where reading a value fails
    distance.restart()
    distance.add_step()
    with pytest.raises(NotImplementedError):
        _ = distance.total
