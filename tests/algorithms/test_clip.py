import math

import clips
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clips import StubCLIP, bits, make, minibatches, run, same_bits

from domainbed_kd import datasets, hparams_registry


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


@pytest.mark.parametrize("name", ["RISE", "SCMD"])
def test_real_images_teach_by_a_clip_object_of_open_clips_shape(name, pacs):
    hparams = hparams_registry.default_hparams(name, "PACS") | clips.SMALL | {"image_size": 96}
    dataset = datasets.PACS(pacs, [3], hparams)
    clip = open_clip.CLIP(512, {"image_size": 224, "patch_size": 32, "width": 64, "layers": 1},
                          {"width": 64, "heads": 1, "layers": 1})
    clip.image_size, clip.tokenizer = 224, open_clip.get_tokenizer("ViT-B-32")
    algorithm = make(name, (3, 96, 96), 7, **hparams | {
        "clip_model": clip, "class_names": dataset.class_names, "lr": 1e-3,
        "domain_names": dataset.domain_names[:3], "normalization": dataset.NORMALIZATION})
    assert algorithm.teacher_logits(torch.rand(2, 3, 96, 96)).shape == (2, 7)
    batch = [(torch.stack([env[i][0] for i in (0, len(env) - 1)]),
              torch.tensor([env[i][1] for i in (0, len(env) - 1)])) for env in dataset[:3]]
    logged = run(algorithm, [batch] * 3)
    assert all(math.isfinite(value) for values in logged for value in values.values())
    assert logged[-1]["classify"] < logged[0]["classify"]
