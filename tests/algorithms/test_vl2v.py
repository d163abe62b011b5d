import io

import pytest
import torch
import torch.nn.functional as F
from clips import NAMES, StubCLIP, bits, make, minibatches, run, same_bits

from domainbed_kd import averaging, checkpoints, networks
from domainbed_kd.algorithms import get_algorithm_class
from domainbed_kd.algorithms.vl2v import alignment_loss

RAW = torch.tensor([[3.0, 4], [0, 2]])
SEEN = torch.tensor([[1.0, 0], [0.6, 0.8]])
TEXT = torch.tensor([[0.0, 1], [1, 0]])


@pytest.mark.parametrize(("share", "loss"), [(0, -0.4), (0.1, -0.43), (0.5, -0.55), (1, -0.7)])
def test_the_loss_is_the_official_codes(share, loss):
    assert alignment_loss(RAW, SEEN, TEXT, share).item() == pytest.approx(loss, abs=1e-6)
    assert alignment_loss(RAW, SEEN, 100 * TEXT, share).item() == pytest.approx(loss, abs=1e-6)


def test_the_head_is_the_official_codes():
    head = networks.CosineClassifier(TEXT, torch.tensor(100.0))
    torch.testing.assert_close(head(RAW), torch.tensor([[80.0, 60], [100, 0]]))
    torch.testing.assert_close(head(7 * RAW), head(RAW))
    assert head(torch.zeros(1, 2)).isfinite().all()


def test_the_loss_is_least_where_image_clip_and_sentence_agree():
    assert alignment_loss(RAW, 2 * RAW, 5 * RAW, 0.5).item() == pytest.approx(-1)
    assert alignment_loss(RAW, -RAW, -RAW, 0.5).item() == pytest.approx(1)


def test_first_the_projector_learns_and_then_the_student():
    algorithm = make("VL2VADiP", (3, 32, 32), vl2v_align_steps=2)  # it has BatchNorm
    batches = minibatches(4, (3, 32, 32))
    before = bits(algorithm.featurizer), bits(algorithm.projector)
    values = run(algorithm, batches[:2])
    middle = bits(algorithm.featurizer), bits(algorithm.projector)
    values += run(algorithm, batches[2:])
    after = bits(algorithm.featurizer), bits(algorithm.projector)
    assert same_bits(before[0], middle[0]) and not same_bits(before[1], middle[1])
    assert not same_bits(middle[0], after[0]) and same_bits(middle[1], after[1])
    assert [value["stage"] for value in values] == [0, 0, 1, 1]


def test_both_stages_are_those_of_a_naive_loop():
    algorithm = make("VL2VADiP", vl2v_align_steps=2, weight_decay=0.1, lr=1e-3)
    clone = make("VL2VADiP", vl2v_align_steps=2)
    student, projector, teacher = clone.featurizer, clone.projector, clone.teacher
    text = F.normalize(teacher.sentences(["a photo of a {}"], NAMES)[:, 0], dim=-1)
    for step, batch in enumerate(minibatches(5)):
        if step in (0, 2):
            learner = (projector, None, student)[step]
            adam = torch.optim.Adam(learner.parameters(), lr=1e-3, weight_decay=0.1)
        loss = 0
        for x, y in batch:
            p, v = F.normalize(projector(student(x)), dim=-1), F.normalize(teacher(x), dim=-1)
            loss = loss - 0.5 * ((p * v).sum() + (p * text[y]).sum()) / 12
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert algorithm.update(batch)["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for one, other in ((algorithm.featurizer, student), (algorithm.projector, projector)):
        for a, b in zip(one.parameters(), other.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["VL2VADiP", "VL2VSD"])
def test_with_a_share_of_1_labels_do_not_matter(name):
    one, other = (make(name, vl2v_lambda=1.0) for _ in range(2))
    for batch in minibatches(3):
        one.update(batch)
    for seed, batch in enumerate(minibatches(3)):
        if seed == 0:
            torch.manual_seed(0)
        other.update([(x, (y + 1) % 3) for x, y in batch])
    if name == "VL2VADiP":  # the other has dropout
        assert same_bits(bits(one.network), bits(other.network))
    loss = [alignment_loss(RAW, SEEN, text, 1) for text in (TEXT, TEXT.flip(0))]
    assert loss[0] == loss[1]


@pytest.mark.parametrize("name", ["VL2VADiP", "VL2VSD"])
def test_with_a_share_of_0_clip_looks_at_no_image(name):
    clip = StubCLIP()
    run(make(name, vl2v_lambda=0.0, clip_model=clip), minibatches(6))
    assert clip.n_image_calls == 0


@pytest.mark.parametrize("name", ["VL2VADiP", "VL2VSD"])
def test_the_logit_scale_changes_logits_and_no_loss(name):
    losses, logits = [], []
    [batch] = minibatches()
    for scale in (10.0, 100.0):
        clip = StubCLIP()
        clip.logit_scale.data.fill_(torch.tensor(scale).log())
        algorithm = make(name, clip_model=clip).eval()
        logits.append(algorithm.predict(batch[0][0]))
        losses.append(algorithm.update(batch)["loss"])
    assert losses[0] == losses[1]
    torch.testing.assert_close(10 * logits[0], logits[1])


def test_the_classes_sentences_and_clip_never_change():
    for name in ("VL2VADiP", "VL2VSD"):
        clip = StubCLIP()
        algorithm = make(name, clip_model=clip)
        before = bits(clip), bits(algorithm.network[-1])
        run(algorithm, minibatches(6))
        assert same_bits(before[0], bits(clip))
        assert same_bits(before[1], bits(algorithm.network[-1]))
        assert not any("text_" in key or "letters" in key for key in algorithm.state_dict())


def test_a_student_that_is_clip_starts_where_its_teacher_is():
    algorithm = make("VL2VSD", vl2v_lambda=1.0).eval()
    [batch] = minibatches()
    x = batch[0][0]
    torch.testing.assert_close(algorithm.featurizer(x), algorithm.teacher(x))
    torch.testing.assert_close(algorithm.predict(x), algorithm.teacher_logits(x))
    assert algorithm.update(batch)["loss"] == pytest.approx(-1, abs=1e-6)
    assert not torch.equal(algorithm.featurizer(x), algorithm.teacher(x))  # its own weights


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_that_restarts_around_the_switch_ends_in_the_same_bits(at):
    whole, restarted = (make("VL2VADiP", vl2v_align_steps=2, weight_decay=0.1) for _ in range(2))
    batches = minibatches(5)
    run(whole, batches[:at])
    file = io.BytesIO()
    torch.save(checkpoints.algorithm_state(whole), file)
    file.seek(0)
    checkpoints.load_algorithm_state(restarted, torch.load(file, weights_only=True))
    assert run(whole, batches[at:]) == run(restarted, batches[at:])
    assert same_bits(bits(whole.network), bits(restarted.network))


def test_the_first_stage_is_half_of_the_run_and_no_average_takes_it_in():
    assert make("VL2VADiP", total_steps=10).averages_after == 5
    algorithm = make("VL2VADiP", total_steps=6)
    averaged = averaging.averaged(get_algorithm_class("VL2VADiP"), "sma")(
        (3, 28, 28), 3, 3, algorithm.hparams | {"sma_start": 1})
    seen = []
    for batch in minibatches(6):
        averaged.update(batch)
        seen.append(bits(averaged.network)["0.conv1.weight"])
    mean = averaged.average.network.state_dict()["0.conv1.weight"]
    torch.testing.assert_close(mean, torch.stack(seen[2:]).mean(dim=0))  # from the switch on


def test_a_clip_whose_image_network_cannot_be_copied_is_refused_in_one_line():
    clip = StubCLIP()
    clip.look = clip.visual
    del clip.visual
    with pytest.raises(ValueError, match="^The image network of a StubCLIP cannot be .*visual.*$"):
        make("VL2VSD", clip_model=clip)
