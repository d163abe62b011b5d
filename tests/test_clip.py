import clips
import torch
import torch.nn.functional as F
from clips import StubCLIP, bits, make, minibatches, run, same_bits


def test_zero_shot_predicts_scaled_cosines_with_the_classes_sentences():
    clip = StubCLIP()
    algorithm = make("CLIP", clip_model=clip).eval()
    x = torch.rand(4, 3, 28, 28)
    image = clip.encode_image(algorithm.network.teacher.preprocess(x)).detach()
    text = clip.encode_text(clip.tokenizer([f"a photo of a {n}" for n in clips.NAMES])).detach()
    expected = 100 * torch.stack([F.cosine_similarity(image, t[None]) for t in text], dim=1)
    torch.testing.assert_close(algorithm.predict(x), expected)


def test_several_templates_are_averaged_as_unit_vectors():
    clip = StubCLIP()
    algorithm = make("CLIP", clip_model=clip, clip_templates=["a {}", "the {} of it all"])
    raw = clip.encode_text(clip.tokenizer(["a horse", "the horse of it all"])).detach()
    unit = raw / raw.norm(dim=1, keepdim=True)
    torch.testing.assert_close(algorithm.network.text[1], unit.mean(dim=0))


def test_zero_shot_logs_its_cross_entropy_and_learns_nothing():
    algorithm = make("CLIP")
    before = bits(algorithm)
    batches = minibatches(1) * 3
    x, y = (torch.cat(part) for part in zip(*batches[0]))
    expected = F.cross_entropy(algorithm.predict(x), y).item()
    assert run(algorithm, batches) == [{"loss": expected}] * 3
    assert same_bits(before, bits(algorithm)) and not list(algorithm.parameters())


def test_a_probe_is_logistic_regression_on_embeddings_that_stand_still():
    algorithm = make("CLIPLinearProbe", lr=0.01)
    teacher, head = algorithm.network
    by_hand = torch.nn.Linear(16, 3)
    by_hand.load_state_dict(head.state_dict())
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    before = bits(teacher.module)
    for batch in minibatches(3):
        values = algorithm.update(batch)
        x, y = (torch.cat(part) for part in zip(*batch))
        loss = F.cross_entropy(by_hand(teacher.module.encode_image(teacher.preprocess(x))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert values["loss"] == loss.item()
    assert same_bits(bits(by_hand), bits(head))
    assert same_bits(before, bits(teacher.module))
    assert {id(p) for p in algorithm.parameters()} == {id(p) for p in head.parameters()}
