import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from clips import StubCLIP, bits, make, minibatches, run, same_bits

from domainbed_kd import averaging
from domainbed_kd.algorithms import get_algorithm_class
from domainbed_kd.algorithms.clipood import margin_logits

RAW = torch.tensor([[2.0, 1], [0, 3]])
TEXT = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]])
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(("scale", "margin", "loss"), [
    (10, 0, 1.412905), (10, 0.3, 2.093376), (100, 0, 10.346574), (100, 0.3, 19.000008)])
def test_the_loss_is_the_official_codes(scale, margin, loss):
    found = F.cross_entropy(margin_logits(RAW, TEXT, Y, margin, scale), Y)
    assert found.item() == pytest.approx(loss, abs=2e-5)


def test_the_margin_grows_with_a_classs_distance_and_never_helps():
    torch.manual_seed(0)
    image, text = torch.randn(8, 5), F.normalize(torch.randn(3, 5), dim=-1)
    y = torch.arange(8) % 3
    losses = []
    for margin in (0, 0.1, 0.5, 1):
        added = F.normalize(image, dim=-1) @ text.T + margin * (1 - text[y] @ text.T)
        losses.append(F.cross_entropy(margin_logits(image, text, y, margin, 10), y))
        torch.testing.assert_close(losses[-1], F.cross_entropy(10 * added, y))
    assert losses == sorted(losses)


def test_without_a_margin_the_first_loss_is_that_of_zero_shot_clip():
    [batch] = minibatches()
    x, y = (torch.cat(part) for part in zip(*batch))
    clip = make("CLIP", clip_templates=["a photo of a {}."])
    values = make("CLIPood", clipood_lambda=0.0).update(batch)
    assert values["loss"] == pytest.approx(F.cross_entropy(clip.predict(x), y).item(), rel=1e-5)


def test_it_predicts_with_the_mean_of_all_its_weights_by_scipys_density():
    algorithm = make("CLIPood", total_steps=6, lr=1e-2)
    seen = [bits(algorithm.network)]
    for batch in minibatches(6):
        algorithm.update(batch)
        seen.append(bits(algorithm.network))
    density = torch.from_numpy(scipy.stats.beta.pdf((torch.arange(7) + 0.5) / 7, 0.5, 0.5))
    for name, tensor in algorithm.average.network.state_dict().items():
        values = torch.stack([state[name].double() for state in seen])
        mean = (density.view(-1, *[1] * tensor.dim()) * values).sum(dim=0) / density.sum()
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)
    x = minibatches()[0][0][0]
    assert torch.equal(algorithm.eval().predict(x), algorithm.average(x))


def test_without_a_density_the_live_network_predicts():
    algorithm = make("CLIPood", clipood_beta=None)
    run(algorithm, minibatches(2))
    x = minibatches()[0][0][0]
    assert torch.equal(algorithm.eval().predict(x), algorithm.network(x))


def test_the_average_moves_no_bit_of_what_is_trained():
    one, other = make("CLIPood"), make("CLIPood", clipood_beta=None)
    assert run(one, minibatches(3)) == run(other, minibatches(3))
    assert same_bits(bits(one.network), bits(other.network))


def test_it_is_adamw_along_a_cosine():
    algorithm = make("CLIPood", total_steps=4, lr=0.01, clipood_lambda=0.0)
    tower = make("CLIPood").network[0]
    text = algorithm.network[1].text
    adamw = torch.optim.AdamW(tower.parameters(), 0.01, weight_decay=0.1)
    for batch, lr in zip(minibatches(4), (0.01, 0.0085355339, 0.005, 0.0014644661)):
        adamw.param_groups[0]["lr"] = lr
        x, y = (torch.cat(part) for part in zip(*batch))
        loss = F.cross_entropy(100 * F.normalize(tower.eval()(x), dim=-1) @ text.T, y)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        algorithm.update(batch)
    for one, other in zip(algorithm.network[0].parameters(), tower.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_sentences_scale_and_clip_stay_while_the_image_network_moves():
    clip = StubCLIP()
    algorithm = make("CLIPood", clip_model=clip)
    before = bits(clip), bits(algorithm.network[1]), bits(algorithm.network[0])
    run(algorithm, minibatches(2))
    assert same_bits(before[0], bits(clip)) and same_bits(before[1], bits(algorithm.network[1]))
    assert not same_bits(before[2], bits(algorithm.network[0]))
    assert not any(module.training for module in algorithm.network.modules())


def test_with_a_lr_of_0_it_is_zero_shot_clip_at_any_step():
    algorithm = make("CLIPood", lr=0.0)
    clip = make("CLIP", clip_templates=["a photo of a {}."])
    x = minibatches()[0][0][0]
    for batch in minibatches(3):
        algorithm.update(batch)
        torch.testing.assert_close(algorithm.eval().predict(x), clip.predict(x))
        algorithm.train()


def test_it_averages_its_weights_already_and_needs_names():
    with pytest.raises(ValueError, match="CLIPood averages its weights already"):
        averaging.averaged(get_algorithm_class("CLIPood"), "beta")
    with pytest.raises(ValueError, match="^CLIPood: the classes have no names"):
        make("CLIPood", class_names=None)
