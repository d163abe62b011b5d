import pytest

from domainbed_kd import algorithms, hparams_registry
from domainbed_kd.folder.curves import of_records
from domainbed_kd.results import protocols, tables
from domainbed_kd.results.records import Grid

DEFAULTS = hparams_registry.default_hparams("ERM", "PACS")


def grid(*runs):
    """Of runs given as (args, hparams) that say what is not usual, and parts of their records."""
    records = []
    for args, hparams, *more in runs:
        args = {"dataset": "PACS", "algorithm": "ERM", "test_envs": [0], "trial_seed": 0,
                "hparams_seed": 0, "steps": None} | args
        records.append({"args": args, "hparams": DEFAULTS | hparams, "step": 9,
                        **{f"env{i}_{split}_acc": .5 for i in range(4) for split in ("in", "out")},
                        **dict(*more)})
    return Grid(of_records(records))


def line(*runs, dataset="PACS"):
    made = grid(*runs)
    rows = tables.row_order(made.algorithms)
    return protocols.line(protocols.of_runs(made), made, dataset, "a rule", rows)


@pytest.mark.parametrize("dataset, hparams, expected", [
    ("PACS", {}, ("ResNet-50", "AugMix")),
    ("PACS", {"resnet18": True}, ("ResNet-50", "AugMix")),  # as DomainBed has it
    ("PACS", {"resnet50_augmix": False}, ("ResNet-50", "ImageNet")),
    ("PACS", {"resnet50_augmix": False, "resnet18": True}, ("ResNet-18", "ImageNet")),
    ("PACS", {"resnet50_augmix": False, "weights": "IMAGENET1K_V2"},
     ("ResNet-50", "IMAGENET1K_V2")),
    ("PACS", {"freeze_bn": True}, ("ResNet-50 with frozen BatchNorm", "AugMix")),
    ("PACS", {"vit": True, "dinov2": True}, ("ViT-B/14", "DINOv2")),
    ("PACS", {"backbone": "efficientnet_lite0", "weights": "none"},
     ("efficientnet_lite0", "random")),
    ("PACS", {"backbone": "efficientnet_lite0", "weights": "a/file.pth"},
     ("efficientnet_lite0", "a/file.pth")),
    ("PACS", {"image_size": 32, "wrn_depth": 10}, ("WRN-10-2", "random")),
    ("DigitsDG", {"wrn_depth": 10, "wrn_widen": 1}, ("WRN-10-1", "random")),
    ("ColoredMNIST", {}, ("small CNN", "random"))])
def test_the_network_is_the_one_that_hparams_mean(dataset, hparams, expected):
    assert protocols.student(dataset, DEFAULTS | hparams) == expected


def test_hparams_without_a_network_claim_none():
    assert protocols.student("PACS", {"lr": 1}) == ("not recorded",) * 2


@pytest.mark.parametrize("hparams, name", [
    ({"wrn_depth": 10, "wrn_widen": 1}, "WideResNet"), ({"backbone": "resnet18"}, "ResNet")])
def test_the_network_said_is_the_network_built(hparams, name):
    from domainbed_kd import networks

    made = networks.Featurizer((3, 32, 32), DEFAULTS | hparams | {"weights": "none"})
    assert type(made).__name__ == name
    said, weights = protocols.student("DigitsDG", DEFAULTS | hparams | {"weights": "none"})
    assert said == {"WideResNet": "WRN-10-1", "ResNet": "resnet18"}[name] and weights == "random"


def test_what_all_share_is_said_once():
    assert line(({}, {}), ({"algorithm": "CORAL"}, {}), ({"trial_seed": 1}, {})) == (
        "Protocol: network ResNet-50; initial weights AugMix; 5,001 steps; 1 draw of hparams, "
        "2 trials; selected by a rule; exact mode; teacher none.")


def test_what_differs_says_where():
    said = line(({"output_dir": "a/teacher"}, {}),
                ({"algorithm": "FourDs", "teacher": "moved/teacher", "fast": True}, {}),
                ({"algorithm": "KDDG", "teacher": "far/away", "steps": 10}, {}),
                ({"algorithm": "RISE"}, {"clip_backbone": "ViT-B-16", "vit": True}),
                ({"algorithm": "SCMD"}, {"clip_backbone": "b", "rise_teachers": ["b", "c"]}))
    assert "5,001 steps (ERM, 4Ds, RISE, SCMD), 10 steps (KDDG)" in said
    assert "exact mode (ERM, KDDG, RISE, SCMD), fast mode (4Ds)" in said
    assert "network ResNet-50 (ERM, 4Ds, KDDG, SCMD), ViT-B/14 (RISE)" in said
    assert said.endswith("teacher a run of ERM (4Ds), another run (KDDG), CLIP ViT-B-16 (RISE), "
                         "CLIP b + c (SCMD).")


def test_teachers_are_named_whichever_of_a_runs_folders_they_are():
    fast = {"fast": True}
    said = line(({"output_dir": "a/exact"}, {}), ({"output_dir": "a/fast"} | fast, {}),
                ({"algorithm": "KDDG", "teacher": "a/exact", "output_dir": "a/x"}, {}),
                ({"algorithm": "KDDG", "teacher": "a/fast", "output_dir": "a/y"} | fast, {}))
    assert "exact mode (ERM, KDDG), fast mode (ERM, KDDG)" in said
    assert said.endswith("teacher a run of ERM (KDDG).")


def test_a_clip_that_an_algorithm_does_not_read_is_no_teacher():
    clip = {"clip_backbone": "b"}
    assert line(({}, clip)).endswith("teacher none.")
    assert line(({}, clip), ({"algorithm": "SCMD"}, clip)).endswith("teacher CLIP b (SCMD).")


def test_the_network_of_what_predicts_by_a_clip_is_the_clips():
    clip = {"clip_backbone": "ViT-B-16"}
    said = line(({}, clip), ({"algorithm": "CLIPood"}, clip), ({"algorithm": "VL2VADiP"}, clip))
    assert "network ResNet-50 (ERM, VL2V-ADiP), ViT-B-16 (CLIPood);" in said
    assert "initial weights AugMix (ERM, VL2V-ADiP), CLIP (CLIPood);" in said


@pytest.mark.parametrize("name", algorithms.SHIPPED)
def test_what_is_said_to_predict_by_a_clip_declares_it(name):
    declared = algorithms.get_algorithm_class(name).network_is_clips
    assert algorithms.network_is_clips(name) == declared


@pytest.mark.parametrize("name", algorithms.SHIPPED)
def test_the_algorithms_said_to_ignore_a_clip_have_no_such_hparam(name):
    hparams = hparams_registry.default_hparams(name, "PACS")
    assert algorithms.ignores_clip(name) == ("clip_backbone" not in hparams)


def test_what_was_wrong_with_a_teacher_is_said():
    def audited(problem):
        return {"teacher": {"accuracy": .1, "problem": problem}}

    order = "has its classes in another order: it says 1 for 0. In the labels' order ..."
    said = line(
        ({"output_dir": "a/t"}, {}),
        ({"algorithm": "KDDG", "teacher": "a/t"}, {}, audited("is near chance: right on 1%.")),
        ({"algorithm": "FourDs", "teacher": "a/t"}, {}, audited(None)),
        ({"algorithm": "RISE"}, {"clip_backbone": "b"}, audited(order)),
        ({"algorithm": "Mine"}, {}, audited("is near chance: right on 1%.")))
    assert said.endswith(
        "teacher a run of ERM (4Ds), a run of ERM, near chance (KDDG), "
        "CLIP b, its classes in another order (RISE), not recorded, near chance (Mine).")


@pytest.mark.parametrize("teacher", [None, "a name", {}, {"problem": None}, {"problem": 3}])
def test_what_other_packages_record_of_teachers_is_no_problem(teacher):
    made = grid(({}, {}, {"teacher": teacher}))
    assert not made.teacher_problems and "teacher none" in line(({}, {}, {"teacher": teacher}))


def test_an_algorithm_of_two_protocols_is_named_with_both():
    assert "ResNet-50 (ERM), ViT-B/14 (ERM)" in line(({}, {}), ({"trial_seed": 1}, {"vit": True}))


def test_averages_say_which_data_set_differs():
    runs = [({}, {}), ({"dataset": "DomainNet", "steps": 15001}, {})]
    assert "15,001 steps (DomainNet), 5,001 steps (PACS)" in line(*runs, dataset=None)
    assert "; 5,001 steps;" in line(*runs)


def test_a_data_set_that_is_not_registered_has_the_steps_of_its_longest_run():
    assert "; 10 steps;" in line(({"dataset": "Elsewhere"}, {}), dataset="Elsewhere")
