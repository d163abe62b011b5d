import json
import math
import warnings
import zipfile

import clips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import bits, make, minibatches, run, same_bits
from conftest import losses_in_double
from PIL import Image
from torch import nn

from domainbed_kd import checkpoints, clip_teacher, datasets, hparams_registry, networks, teachers
from domainbed_kd.algorithms import get_algorithm_class
from domainbed_kd.scripts import train

TAUGHT = ["KD", "KDDG", "MosaicKD", "FourDs"]
WITH_CLIP = ["SCMD", "RISE"]
METHODS = TAUGHT + WITH_CLIP
WITH_ANY_TEACHER = [name for name in METHODS if name != "FourDs"]  # whose teacher has stages
SHAPES = [(2, 28, 28), (3, 32, 32), (3, 64, 64),
          pytest.param((3, 224, 224), marks=pytest.mark.slow)]
# What turns a method into ERM.
NOTHING_EXTRA = {
    "KD": {"kd_alpha": 0.0},
    "KDDG": {"kddg_alpha": 0.0, "kddg_filter": "none"},
    "MosaicKD": {"mosaic_kd": 0.0, "mosaic_ce": 1.0},
    "FourDs": {"fourds_div": 0.0, "fourds_beta": 0.0},
    "SCMD": {"scmd_lambda1": 0.0, "scmd_lambda2": 0.0, "scmd_worst_case": 1.0, "scmd_sma": False},
}


def teacher_module(algorithm):
    return algorithm.teacher.module


# What holds for every method that has a teacher.


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_is_the_same_to_the_bit_after_updates_and_cycles_of_eval_and_train(name):
    algorithm = make(name, (3, 32, 32))
    before = bits(teacher_module(algorithm))
    for _ in range(2):
        run(algorithm, minibatches(2, (3, 32, 32)))
        algorithm.eval()
        algorithm.predict(torch.rand(2, 3, 32, 32))
        algorithm.train()
    assert same_bits(before, bits(teacher_module(algorithm)))
    assert not any(module.training for module in teacher_module(algorithm).modules())
    assert not any(p.requires_grad for p in teacher_module(algorithm).parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_is_neither_saved_nor_trained_with_its_student(name):
    algorithm = make(name)
    weights = {id(p) for p in teacher_module(algorithm).parameters()}
    assert not weights & {id(p) for p in algorithm.parameters()}
    assert not any("visual" in key or key.startswith("teacher") for key in algorithm.state_dict())


@pytest.mark.parametrize("name", NOTHING_EXTRA)
def test_with_its_extra_weights_at_0_a_method_trains_as_erm_bit_for_bit(name):
    shape = (3, 32, 32)
    batches = minibatches(4, shape)
    erm, method = make("ERM", shape), make(name, shape, **NOTHING_EXTRA[name])
    after_building = torch.get_rng_state()
    make("ERM", shape)
    assert torch.equal(after_building, torch.get_rng_state())
    for ours, theirs in zip(run(method, batches), run(erm, batches)):
        # KDDG weighs samples one by one, so only the loss that it logs is summed in another order.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6 if name == "KDDG" else 0)
    assert same_bits(bits(erm.network), bits(method.network))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*METHODS, "CLIP", "CLIPLinearProbe"])
def test_it_trains_and_predicts_on_images_of_any_size_and_channels(name, shape):
    algorithm = make(name, shape)
    for values in run(algorithm, minibatches(2, shape, size=2)):
        assert all(math.isfinite(v) for v in values.values()), values
    algorithm.eval()
    assert algorithm.predict(torch.rand(5, *shape)).shape == (5, 3)
    if name in METHODS:
        assert algorithm.teacher_logits(torch.rand(5, *shape)).shape == (5, 3)


@pytest.mark.parametrize("name", METHODS)
def test_predict_never_calls_the_teacher(name):
    algorithm = make(name)
    run(algorithm, minibatches())

    def refuse(*args):
        raise AssertionError("predict called the teacher")

    for method in ("forward", "encode_image", "encode_text"):
        setattr(teacher_module(algorithm), method, refuse)
    for mode in (True, False):
        algorithm.train(mode)
        assert algorithm.predict(torch.rand(2, 3, 28, 28)).shape == (2, 3)
    with pytest.raises(AssertionError, match="called the teacher"):
        algorithm.teacher_logits(torch.rand(2, 3, 28, 28))


@pytest.mark.parametrize("name", [*WITH_CLIP, "CLIP"])
def test_text_is_never_encoded_after_construction(name):
    clip = clips.StubCLIP()
    algorithm = make(name, clip_model=clip)
    at_construction = clip.n_text_calls
    run(algorithm, minibatches(3))
    algorithm.predict(torch.rand(2, 3, 28, 28))
    assert clip.n_text_calls == at_construction > 0
    assert clip.n_image_calls >= 3


@pytest.mark.parametrize("name, changes", [
    ("KD", {}), ("KDDG", {"kddg_filter_start": 4}),
    ("KD", {"teacher": None, "teacher_steps": 2}), ("KD", {"teacher": None, "teacher_steps": 5}),
    ("SCMD", {"scmd_sma_start": 3, "total_steps": 6}),
    ("RISE", {"rise_optimizer": "sgd", "total_steps": 6}), ("RISE", {}), ("CLIPLinearProbe", {}),
    ("CLIP", {})])
def test_a_resumed_run_equals_an_uninterrupted_one(name, changes, tmp_path):
    shape = (3, 32, 32)
    batches = minibatches(8, shape)
    whole, first, second = (make(name, shape, seed=s, **changes) for s in (0, 0, 1))
    logged = run(whole, batches)
    run(first, batches[:4])
    checkpoints.save(tmp_path / "state.pt", checkpoints.algorithm_state(first))
    checkpoints.load_algorithm_state(second, checkpoints.load(tmp_path / "state.pt"))
    assert run(second, batches[4:]) == logged[4:]
    assert same_bits(bits(whole), bits(second))
    x = torch.rand(4, *shape)
    for algorithm in (whole, second):
        algorithm.eval()
    assert torch.equal(whole.predict(x), second.predict(x))


@pytest.mark.parametrize("dataset", datasets.DATASETS)
@pytest.mark.parametrize("name", [*METHODS, "CLIP", "CLIPLinearProbe"])
def test_default_and_random_hparams_build_and_train_for_every_dataset(name, dataset):
    for hparams in (hparams_registry.default_hparams(name, dataset),
                    hparams_registry.random_hparams(name, dataset, 7)):
        hparams = json.loads(json.dumps(hparams))
        algorithm = make(name, **hparams | clips.SMALL)
        run(algorithm, minibatches())
    ours = {k for k in hparams_registry.default_hparams(name, dataset)
            if k not in hparams_registry.default_hparams("ERM", dataset)}
    prefix = "mosaic_" if name == "MosaicKD" else f"{name.lower()}_"
    assert all(k.startswith((prefix, "clip_", "teacher_")) for k in ours)


@pytest.mark.parametrize("name", [*METHODS, "CLIPLinearProbe"])
@pytest.mark.cuda
def test_losses_on_cuda_equal_those_on_the_cpu(name):
    batches = minibatches(3)
    on_cpu = losses_in_double(make(name), batches, "cpu")
    on_cuda = losses_in_double(make(name), batches, "cuda")
    for ours, theirs in zip(on_cuda, on_cpu):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", WITH_ANY_TEACHER)
def test_a_student_learns_a_toy_problem(name):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (3, 20), generator=generator)
    x = torch.rand(3, 20, 3, 16, 16, generator=generator) * 0.2
    for c in range(3):
        x[:, :, c][y == c] += 0.8
    algorithm = make(name, (3, 16, 16), lr=1e-3, total_steps=40, teacher=Colour(),
                     clip_model=Colour())
    run(algorithm, [list(zip(x, y))] * 40)
    algorithm.eval()
    assert (algorithm.predict(x.flatten(0, 1)).argmax(1) == y.flatten()).float().mean() > 0.9


class Colour(clips.StubCLIP):
    """Tells red, green and blue images apart: as a teacher, and as CLIP by the classes' names."""

    image_mean, image_std = (0.0,) * 3, (1.0,) * 3

    def __init__(self):
        super().__init__(width=3)

    def forward(self, x):
        return 10 * x.mean(dim=(2, 3))

    def encode_image(self, x):
        return x.mean(dim=(2, 3))

    def tokenizer(self, texts):
        return torch.tensor([[name in text for name in clips.NAMES] for text in texts])

    def encode_text(self, tokens):
        return tokens.float()


# A teacher that warms up beside its student.


@pytest.mark.parametrize("name", TAUGHT)
def test_while_a_teacher_warms_up_only_its_parameters_move_and_it_predicts(name):
    algorithm = make(name, (3, 32, 32), teacher=None, teacher_steps=3)
    student, teacher = bits(algorithm.network), bits(algorithm.teacher)
    logged = run(algorithm, minibatches(3, (3, 32, 32)))
    assert [set(values) for values in logged] == [{"loss", "teacher_loss"}] * 3
    assert same_bits(student, bits(algorithm.network))
    assert not same_bits(teacher, bits(algorithm.teacher))

    fresh = make(name, (3, 32, 32), teacher=None, teacher_steps=3).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(fresh.predict(x), fresh.teacher(x))
    algorithm.eval()
    assert torch.equal(algorithm.predict(x), algorithm.network(x))


def test_a_warmed_up_teacher_is_the_network_that_erm_would_have_trained():
    batches = minibatches(4)
    algorithm = make("KD", teacher=None, teacher_steps=4)
    erm = make("ERM")
    erm.network.load_state_dict(algorithm.teacher.state_dict())
    run(algorithm, batches)
    run(erm, batches)
    assert same_bits(bits(erm.network), bits(algorithm.teacher))


def test_a_warmed_up_teacher_stands_still_in_eval_mode():
    algorithm = make("KD", (3, 32, 32), teacher=None, teacher_steps=1)
    batches = minibatches(4, (3, 32, 32))
    run(algorithm, batches[:1])
    teacher = bits(algorithm.teacher)
    for batch in batches[1:]:
        algorithm.update(batch)
        algorithm.eval()
        algorithm.train()
    assert same_bits(teacher, bits(algorithm.teacher))
    assert algorithm.training and not algorithm.teacher.training


@pytest.mark.parametrize("total_steps, expected", [(5001, 1000), (300, 60)])
def test_by_default_a_teacher_warms_up_for_a_fifth_of_all_steps(total_steps, expected):
    algorithm = make("KD", teacher=None, total_steps=total_steps)
    assert algorithm.warm_up_left == expected


def test_a_given_teacher_needs_no_warm_up():
    assert make("KD", teacher_steps=7).warm_up_left == 0


def test_a_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match="KD: teacher_steps is -1; it takes at least 0, or null"):
        make("KD", teacher=None, teacher_steps=-1)


@pytest.mark.parametrize("kind", ["sma", "beta", "swad"])
def test_no_average_takes_in_a_student_that_stands_still_while_its_teacher_warms_up(kind):
    hparams = make("KD", total_steps=6, teacher_steps=3).hparams | {
        "teacher": None, "sma_start": 1, "beta_average": 1.0, "swad_interval": 1}
    cls = teachers.averaging.averaged(get_algorithm_class("KD"), kind)
    algorithm, students = cls((3, 28, 28), 3, 3, hparams), []
    for step, batch in enumerate(minibatches(6)):
        algorithm.update(batch)
        algorithm.checkpoint(step, step == 5, lambda predict: 1.0, lambda n: [])
        if step >= (3 if kind == "swad" else 2):  # the others take in the student's start
            students.append(bits(algorithm.network))
    if kind == "swad":
        assert set(algorithm.valley.averaged) == {(4, 4), (5, 5)}  # (3, 3) only marks the start
        return
    for name, tensor in algorithm.average.network.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                tensor, torch.stack([student[name] for student in students]).mean(dim=0))


# Teachers that finished runs saved.


def train_one(folder, *flags):
    argv = ["--dataset", "Debug28", "--steps", "3", "--test_envs", "1", "--output_dir",
            str(folder), "--hparams", '{"batch_size": 4}', *flags]
    assert train.main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished ERM run on Debug28 that held out environment 1."""
    return train_one(tmp_path_factory.mktemp("runs") / "erm")


def test_a_run_teaches_what_it_would_predict(finished):
    teacher = teachers.from_run(finished, "Debug28", [1], 2, (3, 28, 28))
    model = checkpoints.load(finished / "model.pkl")
    erm = get_algorithm_class("ERM")((3, 28, 28), 2, 2, model["model_hparams"])
    erm.load_state_dict(model["model_dict"])
    x = torch.randn(4, 3, 28, 28)
    assert torch.equal(teacher(x), erm.eval().predict(x))
    assert isinstance(teacher, networks.Frozen) and not list(teacher.parameters())


@pytest.mark.parametrize("kind", ["sma", "swad"])
@pytest.mark.filterwarnings("ignore:SWAD. the validation loss", "ignore:--hparams. nothing here")
def test_a_run_that_averaged_its_weights_teaches_with_the_average(kind, tmp_path):
    folder = train_one(tmp_path / "run", "--hparams", json.dumps(
        {"batch_size": 4, "averaging": kind, "sma_start": 2}))
    teacher = teachers.from_run(folder, "Debug28", [1])
    x = torch.randn(4, 3, 28, 28)
    assert torch.equal(teacher(x), teacher.module.average(x))
    assert not torch.equal(teacher(x), teacher.module.network(x))


def test_a_student_of_a_run_can_teach_in_turn(finished, tmp_path):
    folder = train_one(tmp_path / "kd", "--algorithm", "KD", "--teacher", str(finished),
                       "--allow_bad_teacher")
    model = checkpoints.load(folder / "model.pkl")
    teacher = teachers.from_run(folder, "Debug28", [1])
    assert not any(key.startswith("teacher") for key in model["model_dict"])
    x = torch.randn(4, 3, 28, 28)
    assert torch.equal(teacher(x), teacher.module.network(x))


def test_a_student_can_teach_although_its_own_teacher_warmed_up_beside_it(tmp_path):
    folder = train_one(tmp_path / "kd", "--algorithm", "KD", "--hparams",
                       '{"batch_size": 4, "teacher_steps": 1}')
    teacher = teachers.from_run(folder, "Debug28", [1])
    x = torch.randn(4, 3, 28, 28)
    assert torch.equal(teacher(x), teacher.module.network(x))


@pytest.mark.parametrize("name", [*WITH_CLIP, "CLIPLinearProbe"])
def test_a_student_of_clip_can_teach_whatever_its_domains_are_called(name, tmp_path):
    algorithm = make(name, domain_names=["sketch", "photo"], rise_clip_head_at_test=True)
    run(algorithm, minibatches())
    hparams = {k: v for k, v in algorithm.hparams.items()
               if k not in ("teacher", "clip_model", "domain_names")}
    (tmp_path / "done").touch()
    checkpoints.save(tmp_path / "model.pkl", {
        "args": {"dataset": "Debug28", "test_envs": [1], "algorithm": name, "trial_seed": 0,
                 "hparams_seed": 0},
        "model_input_shape": (3, 28, 28), "model_num_classes": 3, "model_num_domains": 3,
        "model_hparams": hparams, "model_dict": algorithm.state_dict()})
    stub = algorithm.hparams["clip_model"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_teacher, "_open_clip", lambda name: (
            stub, stub.tokenizer, stub.image_size, stub.image_mean, stub.image_std))
        teacher = teachers.from_run(tmp_path, "Debug28", [1])
    x = torch.rand(4, 3, 28, 28)
    assert torch.equal(teacher(x), algorithm.eval().predict(x))


@pytest.mark.parametrize("arguments, words", [
    (("Debug224", [1], 2, None), "trained on Debug28, the student trains on Debug224"),
    (("Debug28", [0, 1], 2, None), r"trained on environments \[0\], on which the student is"),
    (("Debug28", [1], 3, None), "knows 2 classes, the student's dataset has 3"),
    (("Debug28", [1], 2, (3, 32, 32)), r"takes images of shape \(3, 28, 28\), the student's are"),
])
def test_a_run_that_does_not_suit_the_student_is_refused_in_one_line(finished, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        teachers.from_run(finished, *arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm, hparams, is_refused", [
    ("FourDs", {"fourds_protocol": "target"}, True),
    ("FourDs", {"fourds_protocol": "generalization"}, False),
    ("MosaicKD", {"mosaic_role": "ood"}, True),
    ("KD", {"teacher": {"run": "4Ds", "hparams": {"fourds_protocol": "target"}}}, True),
    ("ERM", {"teachers": [{"run": "CORAL", "hparams": {"teachers": ["run:MosaicKD"]}}],
             "mosaic_role": "ood"}, True),
    ("ERM", {"teachers": ["clip", "run:4Ds"]}, False),
])
def test_a_teacher_that_learned_from_one_of_the_held_out_domain_is_refused_over_any_number_of_links(
        algorithm, hparams, is_refused, finished, tmp_path):
    model = checkpoints.load(finished / "model.pkl")
    model["args"]["algorithm"] = algorithm
    defaults = hparams_registry.default_hparams(algorithm, "Debug28")
    model["model_hparams"] = defaults | model["model_hparams"] | hparams
    model["model_dict"] = {}
    checkpoints.save(tmp_path / "model.pkl", model)
    (tmp_path / "done").touch()
    words = "may have trained on its test environments" if is_refused else "does not load into"
    with pytest.raises(ValueError, match=words) as error:
        teachers.from_run(tmp_path, "Debug28", [1], 2, (3, 28, 28))
    assert "\n" not in str(error.value)


def test_a_teacher_may_have_held_out_more_than_the_student_is_tested_on(tmp_path):
    folder = train_one(tmp_path / "run", "--test_envs", "0", "1")
    teachers.from_run(folder, "Debug28", [1])


def test_what_a_fork_does_not_tell_is_not_compared(finished):
    assert make("KD", n_classes=2, teacher=str(finished)).teacher(torch.rand(1, 3, 28, 28)).any()


def test_a_run_that_has_not_finished_or_saved_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished run. Train the teacher there"):
        teachers.from_run(tmp_path, "Debug28", [1])
    (tmp_path / "done").touch()
    with pytest.raises(FileNotFoundError, match="holds no model.pkl. .* without --skip_model_save"):
        teachers.from_run(tmp_path, "Debug28", [1])


def test_weights_that_do_not_all_fit_are_refused_in_one_line(finished, tmp_path):
    model = checkpoints.load(finished / "model.pkl")
    (tmp_path / "done").touch()
    del model["model_dict"]["network.1.bias"]
    checkpoints.save(tmp_path / "model.pkl", model)
    with pytest.raises(ValueError, match="does not load into ERM: .*network.1.bias") as error:
        teachers.from_run(tmp_path, "Debug28", [1])
    assert "\n" not in str(error.value)
    checkpoints.save(tmp_path / "model.pkl", {"state_dict": model["model_dict"]})
    with pytest.raises(ValueError, match="is not the model of a run: it lacks args, model_dict"):
        teachers.from_run(tmp_path, "Debug28", [1])


def test_loading_a_run_draws_no_random_numbers_of_the_student(finished):
    make("ERM", n_classes=2)
    expected = torch.get_rng_state()
    make("KD", n_classes=2, teacher=str(finished), dataset="Debug28", test_envs=[1])
    assert torch.equal(expected, torch.get_rng_state())


# CLIP.


def clip(shape=(3, 28, 28), model=None, **hparams):
    return teachers.clip({"clip_model": model or clips.StubCLIP(), **hparams}, shape)


def test_clip_sees_a_png_as_its_own_preprocessing_would_show_it():
    """From the student's normalized tensor back to what open_clip does with the image."""
    from open_clip.transform import image_transform
    from torchvision import transforms as T

    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(60, 200, (6, 6, 3), dtype=np.uint8)).resize(
        (96, 96), Image.Resampling.BICUBIC)
    stub = clips.StubCLIP()
    theirs = image_transform(12, is_train=False, mean=stub.image_mean, std=stub.image_std)(smooth)
    normalization = (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)
    x = T.Compose([T.ToTensor(), T.Normalize(*normalization)])(smooth)
    ours = clip((3, 96, 96), stub, normalization=normalization).preprocess(x[None])
    # PIL rounds to whole steps of 1/255, once along each axis.
    torch.testing.assert_close(ours[0], theirs, atol=1 / 255 / min(stub.image_std), rtol=0)


def test_imagenet_normalization_becomes_clips_by_the_published_factors():
    stub = clips.StubCLIP()
    stub.image_size = 64
    stub.image_mean = (0.48145466, 0.4578275, 0.40821073)
    stub.image_std = (0.26862954, 0.26130258, 0.27577711)
    x = torch.randn(2, 3, 64, 64)
    factor = torch.tensor([0.852475, 0.857244, 0.815876]).view(3, 1, 1)
    offset = torch.tensor([0.013198, -0.006994, -0.008016]).view(3, 1, 1)
    torch.testing.assert_close(clip((3, 64, 64), stub).preprocess(x), factor * x + offset,
                               atol=1e-5, rtol=0)


def test_small_images_that_a_fork_does_not_describe_are_taken_as_they_are():
    stub = clips.StubCLIP()
    stub.image_size = 28
    x = torch.rand(2, 3, 28, 28)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (stub.image_mean, stub.image_std))
    torch.testing.assert_close(clip(model=stub).preprocess(x), (x - mean) / std)
    torch.testing.assert_close(
        clip((3, 64, 64), stub, normalization=None).preprocess(x), (x - mean) / std)


def test_without_renormalization_clip_gets_the_students_numbers():
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(clip((3, 12, 12), clip_renormalize=False).preprocess(x), x)


@pytest.mark.parametrize("channels, expected", [
    (1, lambda x: x.expand(-1, 3, -1, -1)),
    (2, lambda x: torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)),
    (4, lambda x: x[:, :3])])
def test_images_of_other_than_three_channels_get_three(channels, expected):
    x = torch.rand(2, channels, 12, 12)
    stub = clips.StubCLIP()
    stub.image_mean, stub.image_std = (0.0,) * 3, (1.0,) * 3
    torch.testing.assert_close(clip((channels, 12, 12), stub).preprocess(x), expected(x))


def test_clips_logits_are_scaled_cosines():
    stub = clips.StubCLIP()
    teacher = clip(model=stub)
    x, text = torch.rand(4, 3, 28, 28), torch.randn(5, 16)
    image = stub.eval().encode_image(teacher.preprocess(x)).detach()
    expected = [[100 * F.cosine_similarity(i, t, dim=0).item() for t in text] for i in image]
    torch.testing.assert_close(teacher.logits(x, text), torch.tensor(expected))
    assert not teacher.logits(x, text).requires_grad


def test_sentences_are_the_embeddings_of_every_template_with_every_name():
    stub = clips.StubCLIP()
    found = clip(model=stub).sentences(["a {}.", "the {}!"], clips.NAMES)
    assert found.shape == (3, 2, 16)
    horse = stub.encode_text(stub.tokenizer(["the horse!"]))[0]
    torch.testing.assert_close(found[1, 1], horse.detach())


def test_an_object_that_is_no_clip_is_refused():
    with pytest.raises(ValueError, match="found a Linear without encode_image, encode_text"):
        clip(model=nn.Linear(1, 1))


@pytest.mark.parametrize("name, words", [
    ("ViT-B/16", "knows no model 'ViT-B'. Did you mean ViT-B-16?"),
    ("RN50/laion", "RN50 has no weights 'laion', and no such file exists. Known: openai"),
])
def test_a_clip_that_open_clip_does_not_know_is_refused_with_what_it_knows(name, words):
    with pytest.raises(ValueError, match=words):
        teachers.clip({"clip_backbone": name}, (3, 28, 28))


@pytest.fixture
def small_architecture(tmp_path):
    """A tiny model that open_clip knows by the name of its configuration."""
    import open_clip

    (tmp_path / "test-tiny.json").write_text(json.dumps({
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8,
                       "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1,
                     "layers": 1}}))
    open_clip.add_model_config(tmp_path)
    yield "test-tiny"
    (tmp_path / "test-tiny.json").unlink()
    open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path)
    open_clip.factory._rescan_model_configs()


def test_a_local_file_is_loaded_whole_through_open_clip(small_architecture, tmp_path):
    import open_clip

    model = open_clip.create_model(small_architecture)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    teacher = teachers.clip(
        {"clip_backbone": f"{small_architecture}/{tmp_path / 'clip.pt'}"}, (3, 28, 28))
    assert same_bits(bits(model), bits(teacher.module))
    assert (teacher.size, tuple(teacher.mean)) == (16, open_clip.OPENAI_DATASET_MEAN)
    x = torch.rand(2, 3, 28, 28)
    model.eval()
    torch.testing.assert_close(
        teacher(x), model.encode_image(teacher.preprocess(x)).detach(), rtol=0, atol=1e-5)
    tokens = open_clip.get_tokenizer(small_architecture)(["a cat"])
    torch.testing.assert_close(teacher.sentences(["a {}"], ["cat"])[0, 0],
                               model.encode_text(tokens)[0].detach(), rtol=0, atol=1e-5)


def test_a_damaged_file_is_refused_in_one_line(small_architecture, tmp_path):
    (tmp_path / "clip.pt").write_bytes(b"no weights")
    with pytest.raises(OSError, match="clip_backbone: the weights of .* cannot be loaded") as error:
        teachers.clip(
            {"clip_backbone": f"{small_architecture}/{tmp_path / 'clip.pt'}"}, (3, 28, 28))
    assert "\n" not in str(error.value)
    assert f'"clip_backbone": "{small_architecture}/file.pt"' in str(error.value)


class Archive(nn.Module):
    """Holds tensors under their names, as the modules in OpenAI's archives do."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_buffer(leaf, tensor)

    def forward(self, x):
        return x


def gelu_of(model):
    return {type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__}


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:'torch.load' received a zip file")
def test_openais_weights_get_openais_activation(monkeypatch, small_architecture, tmp_path):
    """By the tag or, as OpenAI alone publishes TorchScript, by the kind of file."""
    import open_clip

    torch.save(open_clip.create_model(small_architecture).state_dict(), tmp_path / "clip.pt")
    plain = teachers.clip(
        {"clip_backbone": f"{small_architecture}/{tmp_path / 'clip.pt'}"}, (3, 28, 28))
    assert gelu_of(plain.module) == {"GELU"}

    archive = Archive(torch.load(tmp_path / "clip.pt"))
    torch.jit.script(archive).save(tmp_path / "openai.pt")
    teacher = teachers.clip(
        {"clip_backbone": f"{small_architecture}/{tmp_path / 'openai.pt'}"}, (3, 28, 28))
    assert gelu_of(teacher.module) == {"QuickGELU"}
    assert same_bits(bits(archive), bits(teacher.module))

    asked = {}
    create = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained, **options: (
        asked.update({pretrained: options["force_quick_gelu"]}), create(small_architecture))[1])
    for tag in ("openai", "laion2b_s34b_b79k"):
        teachers.clip({"clip_backbone": f"ViT-B-32/{tag}"}, (3, 28, 28))
    assert asked == {"openai": True, "laion2b_s34b_b79k": False}


def test_a_file_that_may_hold_openais_weights_says_which_name_they_need(
        monkeypatch, small_architecture, tmp_path):
    import open_clip

    create = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **options: create(
        small_architecture))
    (tmp_path / "b32.pt").touch()
    with pytest.warns(UserWarning, match="if .*b32.pt holds OpenAI's weights, .*name "
                                         "ViT-B-32-quickgelu/.*b32.pt"):
        teachers.clip({"clip_backbone": f"ViT-B-32/{tmp_path}/b32.pt"}, (3, 28, 28))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teachers.clip({"clip_backbone": f"ViT-B-32-quickgelu/{tmp_path}/b32.pt"}, (3, 28, 28))


# The audit.


def test_an_audit_reports_accuracy_chance_weights_and_preprocessing():
    algorithm = make("SCMD", clip_model=Colour())
    x = torch.eye(3)[:, :, None, None].expand(3, 3, 28, 28)
    batches = [(x, torch.tensor([0, 1, 2]))] * 6 + [(x, torch.tensor([0, 1, 1]))] * 2
    report = teachers.audit(algorithm, batches)
    assert report == {
        "accuracy": 22 / 24, "chance": 1 / 3, "n_images": 24, "weights_loaded": None,
        "preprocessing": "mean (0.0, 0.0, 0.0) and std (1.0, 1.0, 1.0) undone; 3 channels, 12 x "
                         "12 pixels; mean (0.0, 0.0, 0.0), std (1.0, 1.0, 1.0)", "problem": None}
    json.dumps(report)


def test_an_audit_of_a_finished_run_reports_that_all_its_weights_were_loaded(finished):
    algorithm = make("KD", n_classes=2, teacher=str(finished))
    x = torch.randn(40, 3, 28, 28)
    y = algorithm.teacher_logits(x).argmax(dim=1)
    report = teachers.audit(algorithm, [(x, y)])
    assert (report["accuracy"], report["weights_loaded"]) == (1.0, 1.0)


@pytest.mark.parametrize("name", WITH_ANY_TEACHER)
def test_an_audit_refuses_a_teacher_near_chance_unless_it_is_allowed(name):
    class Constant(Colour):
        def forward(self, x):
            return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)

        def encode_image(self, x):
            return self.forward(x)

    algorithm = make(name, teacher=Constant(), clip_model=Constant())
    batches = [(torch.rand(30, 3, 28, 28), torch.arange(30) % 3)]
    with pytest.raises(ValueError, match="The teacher is near chance: right on 33.3% of 30 "
                                         "validation images .*--allow_bad_teacher") as error:
        teachers.audit(algorithm, batches)
    assert "\n" not in str(error.value)
    assert "near chance" in teachers.audit(algorithm, batches, allow_bad=True)["problem"]


def test_an_audit_refuses_classes_in_another_order():
    algorithm = make("RISE", clip_model=Colour(), class_names=["horse", "guitar", "cat"])
    x = torch.eye(3)[:, :, None, None].expand(3, 3, 28, 28)
    with pytest.raises(ValueError, match="in another order: it says 2 for 0, 0 for 1, 1 for 2"):
        teachers.audit(algorithm, [(x, torch.tensor([0, 1, 2]))] * 9)


def test_an_audit_without_images_says_so():
    with pytest.raises(ValueError, match="no validation images were given"):
        teachers.audit(make("KD"), [])


def test_an_audit_leaves_out_methods_without_a_teacher_and_teachers_that_warm_up():
    batches = [(torch.rand(30, 3, 28, 28), torch.arange(30) % 3)]
    assert teachers.audit(make("ERM"), batches) is None
    assert teachers.audit(make("CLIP"), batches) is None
    assert teachers.audit(make("KD", teacher=None), batches) is None


def test_an_audit_draws_no_random_numbers_and_moves_nothing():
    algorithm = make("KD", (3, 32, 32))
    before, stream = bits(algorithm.teacher.module), torch.get_rng_state()
    x = torch.zeros(30, 3, 32, 32)
    teachers.audit(algorithm, [(x, torch.arange(30) % 3)], allow_bad=True)
    assert torch.equal(stream, torch.get_rng_state())
    assert same_bits(before, bits(algorithm.teacher.module)) and algorithm.training


@pytest.mark.parametrize("confusion, words", [
    ([[9, 1, 0], [0, 9, 1], [1, 0, 9]], None),
    ([[10, 0, 0], [0, 0, 10], [0, 0, 10]], None),  # two of three classes
    ([[0, 10, 0], [0, 0, 10], [10, 0, 0]], "another order: it says 1 for 0, 2 for 1, 0 for 2"),
    ([[9, 0, 0], [0, 1, 8], [0, 8, 1]], "another order: it says 2 for 1, 1 for 2"),
    ([[10, 0, 0], [10, 0, 0], [10, 0, 0]], "near chance: right on 33.3% of 30"),
    ([[0, 10, 0], [0, 10, 0], [0, 10, 0]], "near chance"),
    ([[4, 3, 3], [3, 4, 3], [3, 3, 4]], "near chance: right on 40.0% of 30"),
    ([[400, 300, 300], [300, 400, 300], [300, 300, 400]], None),  # the same, on more images
    ([[1, 9], [9, 1]], "another order"),
    ([[0, 0, 0], [0, 20, 0], [0, 0, 20]], None),  # a class without images
])
def test_an_audit_reads_a_confusion_matrix(confusion, words):
    problem = teachers.audit_confusion(torch.tensor(confusion))
    if words is None:
        assert problem is None
    else:
        assert words in problem


def test_near_chance_means_less_than_three_standard_errors_above_it():
    # A guesser's accuracy on 100 images of 5 classes: 0.2 +- 0.04, so 0.32 is asked for.
    def confusion(right):
        wrong = torch.zeros(5, 5, dtype=torch.long)
        wrong[0, 0] = right
        wrong[1:, 0] = (100 - right) // 4
        wrong[1, 0] += (100 - right) % 4
        return wrong

    assert "near chance" in teachers.audit_confusion(confusion(31))
    assert teachers.audit_confusion(confusion(33)) is None


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("per_class", [1, 2, 3, 5, 20])
def test_a_perfect_teacher_passes_however_few_images_there_are(n_classes, per_class):
    assert teachers.audit_confusion(per_class * torch.eye(n_classes, dtype=torch.long)) is None


def test_of_too_few_images_nothing_is_concluded_and_halfway_to_perfect_is_enough():
    # Two classes: 0.5 + 3 * 0.5 / sqrt(n) is 1 at 9 images.
    guesses = torch.tensor([[0, 3], [3, 0]])
    assert teachers.audit_confusion(guesses) is None
    assert "another order" in teachers.audit_confusion(2 * guesses)
    # 12 images: 0.93 would be asked for, so halfway between chance and 1 is: 9 of 12.
    assert "near chance" in teachers.audit_confusion(torch.tensor([[4, 2], [2, 4]]))
    assert teachers.audit_confusion(torch.tensor([[5, 1], [2, 4]])) is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kddg_learns_from_a_run_on_debug28_whose_labels_are_noise(tmp_path, seed):
    flags = ["--dataset", "Debug28", "--test_envs", "0", "--steps", "2", "--seed", str(seed),
             "--hparams", '{"batch_size": 4}']
    train.main([*flags, "--algorithm", "ERM", "--output_dir", str(tmp_path / "teacher")])
    assert train.main([*flags, "--algorithm", "KDDG", "--teacher", str(tmp_path / "teacher"),
                       "--output_dir", str(tmp_path / "student")]) == 0


def test_a_weak_teacher_of_unequal_classes_is_not_taken_for_one_in_another_order():
    """As zero-shot CLIP on camera traps: most images are of a class that it takes for another."""
    confusion = torch.tensor([[5, 95, 0, 0], [0, 20, 0, 0], [0, 10, 10, 0], [0, 10, 0, 30]])
    assert "near chance" not in (teachers.audit_confusion(confusion) or "")
    assert "order" not in (teachers.audit_confusion(confusion) or "")


def test_the_tests_of_openais_files_know_torchscript_from_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("archive/data.pkl", "")
    assert not clip_teacher._is_torchscript(str(tmp_path / "other.pt"))
    assert not clip_teacher._is_torchscript("openai")


def test_a_default_of_null_takes_any_kind_of_value():
    hparams = hparams_registry.default_hparams("RISE", "PACS")
    changes = {"rise_teachers": ["ViT-B-16", "RN101"], "rise_relative": 0.5}
    assert hparams_registry.override(hparams, json.dumps(changes)) == hparams | changes
    taught = hparams_registry.default_hparams("KD", "PACS")
    assert hparams_registry.override(taught, '{"teacher_steps": 7}')["teacher_steps"] == 7


def test_parts_that_do_not_fit_together_are_not_the_layers_of_a_teacher():
    class MTLs(nn.Module):
        def __init__(self):
            super().__init__()
            self.featurizer, self.classifier = nn.Flatten(), nn.Linear(24, 3)

        def forward(self, x):
            features = self.featurizer(x)
            return self.classifier(torch.cat([features, 0 * features], dim=1))

    assert teachers.layers_of(networks.Frozen(MTLs()), (3, 2, 2)) is None
    fitting = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert teachers.layers_of(networks.Frozen(fitting), (3, 2, 2)) is fitting
