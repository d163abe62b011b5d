import copy
import math

import clips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import bits, minibatches, run, same_bits
from clips import staged_teacher as network
from torch import nn

from domainbed_kd import checkpoints, hparams_registry, teachers
from domainbed_kd.algorithms.fourds import (
    FLOOR,
    UNKNOWN,
    FourierAdapter,
    FusionActivation,
    amplitude_of,
    compose,
    cross_entropy,
    decompose,
    fuse,
    phase_distance,
    spectrum,
    whole_plane,
)
from domainbed_kd.losses import kd_loss
from domainbed_kd.scripts import train

SHAPE = (3, 32, 32)
SIZES = [(7, 7), (8, 8), (14, 14), (8, 6), (5, 9), (6, 5), (1, 4), (28, 28)]
ORIGINAL, LEARNED = (-100.0, 100.0), (100.0, -100.0)  # alpha is (0, 1), and (1, 0)


def make(shape=SHAPE, **changes):
    return clips.make("FourDs", shape, **changes)


def batches(n=1, shape=SHAPE, size=4):
    return minibatches(n, shape, size)


def images(n=6, shape=SHAPE, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def maps(size, seed=0, sparse=False):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    return x.relu() if sparse else x


def set_alpha(algorithm, mix):
    for adapter in algorithm.adapters:
        adapter.mix.data = torch.tensor(mix)


def teacher_net(algorithm):
    return getattr(algorithm.teacher, "module", algorithm.teacher)


def gradients(module):
    return [p.grad for p in module.parameters() if p.grad is not None]


def angles(x):
    """Of every bin of the plane, by NumPy."""
    return np.angle(np.fft.fft2(x.detach().double().numpy()))


# The transform.


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_composing_phase_and_amplitude_gives_the_maps_back_for_odd_even_and_oblong_sizes(size, raw):
    x = maps(size)
    back = compose(*decompose(x, raw), width=size[1])
    assert not back.is_complex() and back.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_phase_and_amplitude_of_every_bin_are_numpys(size):
    x = maps(size)
    expected = np.fft.fft2(x.double().numpy())
    phase, amplitude = decompose(x)
    cosine, sine = whole_plane(phase, size[1]).numpy()
    np.testing.assert_allclose(cosine, np.cos(np.angle(expected)), atol=1e-4)
    np.testing.assert_allclose(sine, np.sin(np.angle(expected)), atol=1e-4)
    np.testing.assert_allclose(
        amplitude, np.abs(expected)[..., :size[1] // 2 + 1], rtol=1e-4, atol=1e-5)
    [raw] = whole_plane(decompose(x, raw=True)[0], size[1]).numpy()
    np.testing.assert_allclose(np.cos(raw - np.angle(expected)), 1, atol=1e-5)
    assert (np.abs(raw) <= np.float32(math.pi)).all()


@pytest.mark.parametrize("size", SIZES)
def test_rolling_a_map_shifts_its_phases_by_fouriers_theorem_and_leaves_its_amplitudes(size):
    x, (dy, dx) = maps(size), (2, 3)
    phase, amplitude = decompose(x)
    rolled, same = decompose(x.roll((dy, dx), dims=(-2, -1)))
    torch.testing.assert_close(same, amplitude, atol=1e-4, rtol=1e-4)
    u, v = torch.arange(size[0])[:, None], torch.arange(size[1])[None]
    shift = torch.polar(torch.ones(size), -2 * math.pi * (u * dy / size[0] + v * dx / size[1]))
    expected = torch.complex(*whole_plane(phase, size[1])) * shift
    torch.testing.assert_close(
        torch.complex(*whole_plane(rolled, size[1])), expected, atol=1e-4, rtol=0)


def test_an_empty_map_has_no_phase_stays_empty_and_its_gradients_are_finite():
    x = torch.zeros(1, 2, 8, 8, requires_grad=True)
    phase, amplitude = decompose(x)
    assert (phase == 0).all() and (amplitude == torch.tensor(FLOOR)).all()
    back = compose(phase, amplitude, 8)
    assert (back == 0).all()
    (back.sum() + phase.sum()).backward()
    assert x.grad.isfinite().all()


def test_the_published_phase_of_an_empty_map_leaves_an_impulse_of_the_floors_height():
    back = compose(*decompose(torch.zeros(1, 1, 7, 7), raw=True), width=7)
    expected = torch.zeros(1, 1, 7, 7)
    expected[..., 0, 0] = 1e-5**0.5
    torch.testing.assert_close(back, expected, atol=1e-6, rtol=0)


def test_the_phases_gradient_is_bounded_where_that_of_an_angle_is_not():
    spectrum_of_almost_nothing = 1e-5 * maps((8, 8))
    largest = []
    for raw in (False, True):
        x = spectrum_of_almost_nothing.clone().requires_grad_()
        phase, _ = decompose(x, raw)
        [gradient] = torch.autograd.grad(phase[..., 3, 2, 0].sum(), x)
        largest.append(gradient.abs().max().item())
    assert largest[0] <= 1.001 / FLOOR < largest[1]


def test_the_transform_and_its_gradient_are_right_in_double_precision():
    x = maps((4, 5)).double().requires_grad_()
    for raw in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, raw=raw: compose(decompose(x, raw)[0], torch.ones(4, 3).double(), 5), x)


def test_half_precision_maps_are_transformed_in_single_precision():
    for dtype in (torch.float16, torch.bfloat16):
        phase, amplitude = decompose(maps((7, 7)).to(dtype))
        assert phase.dtype == amplitude.dtype == torch.float32
    adapter = FourierAdapter(3).to(torch.bfloat16)
    assert adapter(maps((7, 7)).to(torch.bfloat16))[0].dtype == torch.bfloat16


# The adapter.


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", [(7, 7), (8, 6)])
def test_an_adapter_keeps_the_phases_whatever_its_weights(size, seed, raw):
    torch.manual_seed(seed)
    adapter = FourierAdapter(3, reduction=2, raw=raw)
    for p in adapter.parameters():
        nn.init.normal_(p, std=2.0)
    adapter.mix.data = 0.1 * torch.randn(2)
    x = maps(size, seed, sparse=True)
    out, _ = adapter(x)
    amplitudes = np.abs(np.fft.fft2(out.detach().numpy())), np.abs(np.fft.fft2(x.numpy()))
    bins = np.minimum(*amplitudes) > 1e-2
    assert bins.mean() > 0.9
    assert np.abs(np.sin((angles(out) - angles(x)) / 2)[bins]).max() < 2e-3


def test_an_adapter_that_keeps_the_original_amplitude_is_the_identity():
    adapter = FourierAdapter(3)
    adapter.mix.data = torch.tensor(ORIGINAL)
    for size in SIZES:
        torch.testing.assert_close(adapter(maps(size))[0], maps(size), atol=1e-5, rtol=0)
    published = FourierAdapter(3, raw=True)
    published.mix.data = torch.tensor(ORIGINAL)
    assert published(torch.zeros(2, 3, 7, 7))[0].abs().max() <= 3.2e-3
    assert (adapter(torch.zeros(2, 3, 7, 7))[0] == 0).all()


def test_with_the_learned_amplitude_alone_the_output_has_it_and_its_mean_is_not_negative():
    torch.manual_seed(0)
    adapter = FourierAdapter(3)
    adapter.mix.data = torch.tensor(LEARNED)
    x = maps((8, 6), sparse=True)
    out, phase = adapter(x)
    learned = amplitude_of(spectrum(adapter.restyle(x)))
    torch.testing.assert_close(amplitude_of(spectrum(out)), learned, atol=1e-4, rtol=1e-3)
    assert torch.equal(phase[..., 0, 0, :], torch.tensor([1.0, 0.0]).expand(2, 3, 2))
    assert (out.mean(dim=(-2, -1)) >= -1e-6).all()


def test_the_mixs_shares_start_equal_add_up_to_1_and_saturate_at_a_temperature_of_a_tenth():
    adapter = FourierAdapter(4)
    assert adapter.alpha().tolist() == [0.5, 0.5]
    adapter.mix.data = torch.tensor([0.1, 0.0])
    torch.testing.assert_close(adapter.alpha(), torch.tensor([1.0, 0.0]).softmax(0))


# The loss on phases.


@pytest.mark.parametrize("turns", [-1, 0, 1, 3])
def test_the_distance_of_unit_phasors_is_that_of_the_card_and_knows_no_turns(turns):
    a, b = np.random.RandomState(0).uniform(-4, 4, (2, 1, 3, 5, 5))
    expected = (2 - 2 * np.cos(a - b)).mean()
    student, teacher = (torch.tensor(np.stack([np.cos(t), np.sin(t)]))
                        for t in (a + 2 * math.pi * turns, b))
    found = phase_distance(student, teacher, torch.ones(1, 3, 1, 1)).item()
    assert found == pytest.approx(expected)


def test_raw_angles_just_beside_each_other_across_pi_cost_39_and_phasors_nothing():
    near = torch.tensor([[math.pi - 0.001], [-math.pi + 0.001]])
    raw = [angle.view(1, 1, 1, 1, 1) for angle in near]
    phasors = [torch.stack([angle.cos(), angle.sin()]).view(2, 1, 1, 1, 1) for angle in near]
    gate = torch.ones(1, 1, 1, 1)
    assert phase_distance(*raw, gate).item() == pytest.approx(39.45, abs=0.01)
    assert phase_distance(*phasors, gate).item() == pytest.approx(4e-6, rel=1e-2)


def planes(features, raw=False):
    return [whole_plane(decompose(m, raw)[0], m.shape[-1]) for m in features]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("gate", ["normalized", "detached", "published"])
def test_fusion_and_activation_are_pooling_concatenation_and_a_gate_on_both_sides(gate, raw):
    torch.manual_seed(0)
    ours, theirs = ([torch.randn(2, c, s, s + 1) for c, s in ((4, 8), (6, 4), (8, 2))]
                    for _ in range(2))
    block = FusionActivation([4, 6, 8], [4, 6, 8], gate)
    student, teacher = (torch.stack([torch.cat([
        F.adaptive_avg_pool2d(p, (2, 3)) for p in parts], dim=1) for parts in zip(*planes(f, raw))])
        for f in (ours, theirs))
    squeeze, _, excite, _ = block.excitation
    s = torch.sigmoid(excite.weight @ (squeeze.weight @ teacher[0].mean((-2, -1)).T).relu()).T
    assert squeeze.weight.shape == (1, 18) and excite.bias is None
    if gate == "normalized":
        s = s / s.mean(dim=1, keepdim=True)
    s = s[..., None, None]
    expected = ((s * student - s * teacher) ** 2).sum() / student[0].numel()
    torch.testing.assert_close(block(planes(ours, raw), planes(theirs, raw)), expected)


def test_phases_are_pooled_as_cosines_and_sines_so_angles_across_pi_do_not_cancel():
    plane = torch.tensor([math.pi - 0.1, -math.pi + 0.1]).view(1, 1, 1, 2)
    phasors = torch.stack([plane.cos(), plane.sin()])
    pooled = fuse([phasors], (1, 1)).flatten()
    assert torch.atan2(pooled[1], pooled[0]).abs().item() == pytest.approx(math.pi)
    assert fuse([plane[None]], (1, 1)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("raw", [False, True])
def test_the_phase_loss_does_not_see_positive_scales_but_sees_shifts(raw):
    torch.manual_seed(0)
    block = FusionActivation([4], [4])
    x, theirs = torch.randn(2, 4, 9, 9), planes([torch.randn(2, 4, 9, 9)], raw)
    loss = block(planes([x], raw), theirs)
    scale = torch.rand(2, 4, 1, 1) + 0.5
    torch.testing.assert_close(block(planes([x * scale], raw), theirs), loss, rtol=1e-3, atol=0)
    shifted = block(planes([x.roll(2, dims=-1)], raw), theirs)
    assert (shifted - loss).abs() > 1e-2 * loss


@pytest.mark.parametrize("gate", ["normalized", "detached", "published"])
def test_the_published_gate_closes_to_please_its_loss_and_the_others_do_not(gate):
    torch.manual_seed(0)
    block = FusionActivation([32], [32], gate)
    ours, theirs = (planes([torch.randn(4, 32, 8, 8).relu()]) for _ in range(2))
    fused = fuse(theirs, (8, 8))
    before = block.gate(fused).detach()
    optimizer = torch.optim.Adam(block.parameters(), 0.05)
    for _ in range(30):
        loss = block(ours, theirs)
        if not loss.requires_grad:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = block.gate(fused).detach()
    if gate == "published":
        assert after.mean() < 0.2 * before.mean()
    elif gate == "normalized":
        torch.testing.assert_close(after.mean(dim=1), torch.ones(4, 1, 1))
        assert not torch.allclose(after, before, atol=0.05)
    else:
        assert torch.equal(after, before)


def test_the_losss_gradient_by_a_published_gate_is_never_negative():
    torch.manual_seed(0)
    gate = torch.rand(2, 5, 1, 1, requires_grad=True)
    phase_distance(*torch.randn(2, 2, 2, 5, 3, 3), gate).backward()
    assert (gate.grad >= 0).all()


# The teacher.


@pytest.mark.parametrize("policy", ["eval", "adapt"])
@pytest.mark.parametrize("steps", [None, 2])
def test_the_teachers_own_weights_stay_to_the_bit_and_statistics_too_unless_they_adapt(
        policy, steps):
    """Given, or warmed up in the first two updates."""
    teacher = network() if steps is None else None
    algorithm = make(teacher=teacher, teacher_steps=steps, fourds_teacher_bn=policy)
    run(algorithm, batches(2))
    net = teacher_net(algorithm)
    net.zero_grad()
    weights = {name: p.clone() for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    for _ in range(2):
        run(algorithm, batches(2))
        algorithm.eval()
        algorithm.predict_teacher(images())
        algorithm.train()
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    assert not any(p.requires_grad for p in net.parameters()) and not gradients(net)
    assert same_bits(dict(net.named_buffers()), buffers) == (policy == "eval")
    if teacher is not None:
        assert same_bits(bits(teacher), bits(network()))  # the caller's object
    in_train_mode = {type(m) for m in net.modules() if m.training}
    assert in_train_mode == (set() if policy == "eval" else {nn.BatchNorm2d})
    assert all(m.training for m in algorithm.adapters.modules())


def test_evaluating_moves_no_statistics():
    algorithm = make(fourds_teacher_bn="adapt")
    run(algorithm, batches())
    algorithm.eval()
    before = bits(algorithm)
    algorithm.predict_teacher(images())
    algorithm.pseudo_labels(images())
    assert same_bits(before, bits(algorithm)) and not algorithm.training


@pytest.mark.parametrize("raw", [False, True])
def test_adapters_that_keep_the_amplitude_leave_the_plain_teachers_logits(raw):
    algorithm = make(fourds_phase="raw" if raw else "circular")
    set_alpha(algorithm, ORIGINAL)
    algorithm.eval()
    plain = algorithm.teacher_logits(images())
    torch.testing.assert_close(algorithm.predict_teacher(images()), plain, atol=1e-3, rtol=0)
    set_alpha(algorithm, (0.0, 0.0))
    assert (algorithm.predict_teacher(images()) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [SHAPE, (2, 28, 28)])
def test_a_student_that_is_the_teacher_has_the_same_circular_phases(shape):
    teacher = network(shape)
    algorithm = make(shape, teacher=teacher)
    algorithm.network.load_state_dict(teacher.state_dict())
    set_alpha(algorithm, ORIGINAL)
    for module in algorithm.network.modules():
        module.training = False
    other = make(shape).update(batches(shape=shape)[0])["phase"]
    assert algorithm.update(batches(shape=shape)[0])["phase"] < 1e-3 < other


def test_every_stage_has_an_adapter_as_wide_as_it():
    algorithm = make()
    maps = images()
    widths = []
    for stage in teacher_net(algorithm)[0].stages():
        maps = stage(maps)
        widths.append(maps.shape[1])
    convolutions = [[m for m in adapter.modules() if isinstance(m, nn.Conv2d)]
                    for adapter in algorithm.adapters]
    assert widths == [16, 32, 64]
    assert [[c.weight.shape for c in pair] for pair in convolutions] == [
        [(w // 4, w, 1, 1), (w, w // 4, 1, 1)] for w in widths]
    assert all(c.bias is None for pair in convolutions for c in pair)


@pytest.mark.parametrize("teacher", [
    clips.Teacher(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))])
def test_a_teacher_without_stages_is_refused_in_one_line(teacher):
    with pytest.raises(ValueError, match="^4Ds: the teacher, a .* does not predict by"):
        make(teacher=teacher)


def test_a_teacher_that_does_more_than_its_stages_and_classifier_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.featurizer, self.classifier = network()

        def forward(self, x):
            return 2 * self.classifier(self.featurizer(x)) + 1

    with pytest.raises(ValueError, match="4Ds: the teacher, a Twice, does not predict"):
        make(teacher=Twice())


def test_a_student_without_stages_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^4Ds: the student's MLP has no convolution stages"):
        make((20,), teacher=None)


@pytest.mark.parametrize("name, value", [
    ("fourds_phase", "angle"), ("fourds_gate", "open"), ("fourds_teacher_bn", "train"),
    ("fourds_optimizer", "adamw"), ("fourds_protocol", "B")])
def test_an_unknown_switch_is_refused_with_those_that_are_known(name, value):
    with pytest.raises(ValueError, match=f"4Ds: {name} is '{value}'; it takes one of "):
        make(**{name: value})


@pytest.mark.parametrize("teacher", [
    {"wrn_widen": 2}, {"wrn_depth": 16},
    {"backbone": "efficientnet_lite0", "resnet18": False}])
@pytest.mark.parametrize("phase", ["circular", "raw"])
def test_teacher_and_student_may_differ_in_width_and_in_the_number_of_stages(teacher, phase):
    algorithm = make(teacher=network(**teacher), fourds_phase=phase)
    equal = isinstance(algorithm.fusion.projection, nn.Identity)
    assert equal == (teacher == {"wrn_depth": 16})
    values = run(algorithm, batches(2, size=2))[-1]
    assert all(math.isfinite(value) for value in values.values())
    assert equal or algorithm.fusion.projection.weight.grad.abs().max() > 0


# An update.


@pytest.mark.parametrize("policy", ["eval", "adapt"])
def test_an_updates_terms_are_the_cards_and_the_students_are_from_before_the_adapters_step(policy):
    algorithm = make(fourds_temperature=3.0, fourds_div=0.7, fourds_beta=0.3, fourds_cls=0.9,
                     fourds_teacher_bn=policy, fourds_adapter_lr=0.1)
    [batch] = batches()
    x, y = (torch.cat(part) for part in zip(*batch))
    twin = copy.deepcopy(algorithm)
    with torch.no_grad():
        student = twin.network(x)
        adapted, phases = twin._adapted(x)
        stages = []
        for stage in copy.deepcopy(algorithm).featurizer.stages():
            stages.append(stage(stages[-1] if stages else x))
        phase = twin.fusion(planes(stages), phases)
    expected = {
        "classify": F.cross_entropy(student, y), "distill": kd_loss(student, adapted, 3.0),
        "phase": phase, "teacher_classify": F.cross_entropy(adapted, y),
        "teacher_distill": kd_loss(adapted, student, 3.0)}
    expected = {name: value.item() for name, value in expected.items()}
    expected["loss"] = (0.9 * expected["classify"] + 0.7 * expected["distill"]
                        + 0.3 * expected["phase"])
    values = algorithm.update(batch)
    assert 0 < values.pop("alpha") < 1
    assert values == pytest.approx(expected, rel=1e-4)


def test_every_value_is_a_float_and_alpha_is_the_mean_share_of_the_learned_amplitude():
    algorithm = make()
    values = run(algorithm, batches(2))[-1]
    assert values.keys() == {"loss", "classify", "distill", "phase", "teacher_classify",
                             "teacher_distill", "alpha"}
    assert all(math.isfinite(value) for value in values.values())
    shares = [a.alpha()[0].item() for a in algorithm.adapters]
    assert values["alpha"] == pytest.approx(np.mean(shares))


def test_with_both_weights_at_0_the_student_trains_as_erm_bit_for_bit_and_adapters_by_ce_alone():
    erm = clips.make("ERM", SHAPE)
    off = make(fourds_div=0.0, fourds_beta=0.0)
    after_building = torch.get_rng_state()
    clips.make("ERM", SHAPE)
    assert torch.equal(after_building, torch.get_rng_state())
    before, fusion = bits(off.adapters), bits(off.fusion)
    for ours, theirs in zip(run(off, batches(4)), run(erm, batches(4))):
        assert ours["loss"] == ours["classify"] == theirs["loss"]
        assert ours.keys() == {"loss", "classify", "teacher_classify", "alpha"}
    assert torch.equal(after_building, torch.get_rng_state())
    assert same_bits(bits(erm.network), bits(off.network))
    assert same_bits(fusion, bits(off.fusion))
    assert not any(torch.equal(p, before[name]) for name, p in off.adapters.named_parameters())


def test_the_adapters_alone_learn_the_labels_of_another_domain():
    algorithm = make(fourds_div=0.0, fourds_beta=0.0, fourds_adapter_lr=1e-2, total_steps=100)
    values = run(algorithm, batches(1) * 25)
    assert values[-1]["teacher_classify"] < 0.7 * values[0]["teacher_classify"]


@pytest.mark.parametrize("gate", ["normalized", "detached", "published"])
def test_gradients_stay_on_their_side_and_the_fusion_blocks_come_from_the_phases_alone(gate):
    [batch] = batches()
    x, y = (torch.cat(part) for part in zip(*batch))
    algorithm = make(fourds_gate=gate)
    seen = {}

    def record(when):
        seen[when] = {name: [g.clone() for g in gradients(getattr(algorithm, name))]
                      for name in ("network", "adapters", "fusion")}

    algorithm.adapter_optimizer.register_step_pre_hook(lambda *_: record("adapters"))
    algorithm.optimizer.register_step_pre_hook(lambda *_: record("student"))

    algorithm.distill(x, y)
    assert not seen["adapters"]["network"] and not seen["adapters"]["fusion"]
    assert len(seen["adapters"]["adapters"]) == len(list(algorithm.adapters.parameters()))
    for ours, theirs in zip(seen["adapters"]["adapters"], seen["student"]["adapters"]):
        assert torch.equal(ours, theirs)  # the student's loss added nothing
    assert seen["student"]["network"]
    assert bool(seen["student"]["fusion"]) == (gate != "detached")

    algorithm.hparams["fourds_beta"] = 0.0
    algorithm.fusion.zero_grad()
    algorithm.distill(x, y)
    assert not seen["student"]["fusion"]


def test_the_kept_phase_passes_gradients_back_to_the_adapters_before():
    algorithm = make()
    set_alpha(algorithm, LEARNED)
    first, second, _ = teacher_net(algorithm)[0].stages()
    one, two, _ = algorithm.adapters
    x, _ = one(first(images()))
    x.retain_grad()
    mapped = second(x)
    phase, _ = decompose(mapped)
    out = compose(phase, amplitude_of(spectrum(mapped)).detach(), mapped.shape[-1])
    (out**3).sum().backward()
    assert x.grad.abs().max() > 0 and one.restyle[0].weight.grad.abs().max() > 0


def test_the_students_pull_on_the_adapters_grows_over_a_tenth_of_the_run_or_is_there_at_once():
    def shares(**changes):
        algorithm = make(total_steps=40, **changes)
        found = []
        for _ in range(5):
            found.append(algorithm._ramp())
            algorithm.update_count += 1
        return found

    assert shares() == [0.25, 0.5, 0.75, 1, 1]
    assert shares(fourds_ramp=0.0) == [1] * 5


def test_the_adapters_have_the_authors_optimiser_whose_lr_falls_as_a_cosine_to_0():
    algorithm = make(total_steps=4, fourds_adapter_lr=0.01)
    found = []
    for batch in batches(4):
        found.append(algorithm.adapter_optimizer.param_groups[0]["lr"])
        algorithm.update(batch)
    assert isinstance(algorithm.adapter_optimizer, torch.optim.AdamW)
    assert algorithm.adapter_optimizer.defaults["eps"] == 1e-4
    assert algorithm.adapter_optimizer.defaults["weight_decay"] == 0.01
    assert found == pytest.approx([0.005 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    assert algorithm.adapter_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_the_authors_optimiser_of_the_student_is_sgd_with_momentum_at_a_constant_lr():
    algorithm = make(fourds_optimizer="sgd", lr=0.01, weight_decay=5e-4)
    run(algorithm, batches(2))
    assert type(algorithm.optimizer) is torch.optim.SGD
    for group in algorithm.optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)
    trained = {id(p) for group in algorithm.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for m in (algorithm.network, algorithm.fusion) for p in m.parameters()}


@pytest.mark.parametrize("shape", [(2, 28, 28), SHAPE, (3, 64, 64),
                                   pytest.param((3, 224, 224), marks=pytest.mark.slow)])
@pytest.mark.parametrize("published", [False, True])
def test_it_trains_on_images_of_any_size_and_channels_as_published_too(shape, published):
    changes = {"fourds_phase": "raw", "fourds_gate": "published", "fourds_teacher_bn": "adapt",
               "fourds_optimizer": "sgd", "fourds_ramp": 0.0} if published else {}
    algorithm = make(shape, **changes)
    for values in run(algorithm, batches(2, shape, size=2)):
        assert all(math.isfinite(v) for v in values.values())
    algorithm.eval()
    assert algorithm.predict(images(5, shape)).shape == (5, 3)
    assert algorithm.predict_teacher(images(5, shape)).shape == (5, 3)


def test_predict_is_the_student_alone():
    algorithm = make()
    run(algorithm, batches())

    def refuse(*args):
        raise AssertionError("predict asked the teacher")

    teacher_net(algorithm).forward = refuse
    for module in algorithm.adapters:
        module.forward = refuse
    assert algorithm.predict(images()).shape == (6, 3)
    with pytest.raises(AssertionError, match="asked the teacher"):
        algorithm.predict_teacher(images())


@pytest.mark.parametrize("changes", [
    {}, {"fourds_teacher_bn": "adapt"}, {"teacher": None, "teacher_steps": 2},
    {"teacher": None, "teacher_steps": 4, "fourds_teacher_bn": "adapt"},
    {"fourds_optimizer": "sgd", "fourds_gate": "published"}])
def test_a_resumed_run_equals_an_uninterrupted_one(changes, tmp_path):
    steps = batches(6)
    whole, second = make(**changes), clips.make(
        "FourDs", SHAPE, seed=1, **({"teacher": network()} | changes))
    first = run(whole, steps[:3])
    checkpoints.save(tmp_path / "state.pt", checkpoints.algorithm_state(whole))
    rest = run(whole, steps[3:])
    checkpoints.load_algorithm_state(second, checkpoints.load(tmp_path / "state.pt"))
    assert run(second, steps[3:]) == rest and len(first) == 3
    assert same_bits(bits(whole), bits(second))
    whole.eval(), second.eval()
    assert torch.equal(whole.predict_teacher(images()), second.predict_teacher(images()))


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # a scheduler's copy says so
def test_a_copy_trains_on_its_own():
    algorithm = make(fourds_teacher_bn="adapt")
    twin = copy.deepcopy(algorithm)
    expected = run(algorithm, batches(2))
    assert run(twin, batches(2)) == expected


# The three protocols.


def test_labelled_images_are_left_alone_where_the_source_is_not_to_be_seen():
    unlabelled = [images(8, seed=3), images(4, seed=4)]
    one, other, both = (make(fourds_source=False), make(fourds_source=False), make())
    first = [one.update(b, unlabelled) for b in batches(2)]
    changed = [[(torch.zeros_like(x), y) for x, y in b] for b in batches(2)]
    assert [other.update(b, unlabelled) for b in changed] == first
    assert same_bits(bits(one), bits(other))
    assert first[0].keys() >= {"distill", "phase", "pseudo_labels"}
    assert both.update(batches()[0], unlabelled) != first[0]


def test_unlabelled_images_join_the_labelled_and_their_own_labels_are_never_needed():
    [batch] = batches()
    unlabelled = [images(8, seed=3), images(4, seed=4)]
    algorithm, twin = make(fourds_confidence=1.0), make()
    values = algorithm.update(batch, unlabelled)
    x, y = (torch.cat(part) for part in zip(*batch))
    everything = torch.cat([x, *unlabelled])
    with torch.no_grad():
        student, adapted = twin.network(everything), twin._adapted(everything)[0]
    assert values["classify"] == pytest.approx(F.cross_entropy(student[:12], y).item(), rel=1e-5)
    assert values["distill"] == pytest.approx(kd_loss(student, adapted, 4.0).item(), rel=1e-3)
    assert values["pseudo_labels"] == 0


def test_pseudo_labels_are_the_plain_teachers_and_only_where_it_is_confident():
    algorithm = make()
    probabilities = algorithm.teacher_logits(images(40)).softmax(dim=1)
    median = probabilities.max(dim=1).values.median().item()
    algorithm.hparams["fourds_confidence"] = median
    sure = (probabilities > median).any(dim=1)
    assert 0.3 < sure.float().mean() < 0.7
    assert torch.equal(algorithm.pseudo_labels(images(40)),
                       torch.where(sure, probabilities.argmax(dim=1), UNKNOWN))


def test_images_without_a_pseudo_label_take_no_part_in_cross_entropy():
    algorithm = make(fourds_confidence=1.0, fourds_source=False)
    values = algorithm.update(batches()[0], [images(8)])
    assert values["pseudo_labels"] == values["classify"] == values["teacher_classify"] == 0
    assert values["distill"] > 0 and values["phase"] > 0
    logits, y = torch.randn(4, 3), torch.tensor([0, UNKNOWN, 2, UNKNOWN])
    torch.testing.assert_close(cross_entropy(logits, y), F.cross_entropy(logits[::2], y[::2]))


def test_a_teacher_warms_up_on_labels_before_unlabelled_images_are_used():
    algorithm = make(teacher=None, teacher_steps=1)
    assert algorithm.update(batches()[0], [images(8)]).keys() == {"loss", "teacher_loss"}
    assert "pseudo_labels" in algorithm.update(batches()[0], [images(8)])


RUN = ["--dataset", "DigitsDG", "--steps", "2", "--checkpoint_freq", "1", "--hparams"]
HPARAMS = '{"wrn_depth": 10, "wrn_widen": 1, "batch_size": 8%s}'
TARGET = HPARAMS % ', "fourds_protocol": "target"'


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs: a teacher of domain 0, and a student of domain 1 that learned from it."""
    folder = tmp_path_factory.mktemp("runs")
    teacher, student = folder / "teacher", folder / "student"
    assert train.main(["--algorithm", "ERM", *RUN, HPARAMS % "", "--test_envs", "1", "2", "3",
                       "--output_dir", str(teacher)]) == 0
    assert train.main(["--algorithm", "4Ds", *RUN, TARGET, "--test_envs", "0", "2", "3",
                       "--output_dir", str(student), "--teacher", str(teacher),
                       "--allow_bad_teacher"]) == 0
    return teacher, student


def test_protocol_target_takes_a_teacher_of_another_domain_and_records_the_students_own(runs):
    _, student = runs
    assert '"env1_out_acc"' in (student / "results.jsonl").read_text()
    assert (student / "done").exists()


def test_the_other_protocols_refuse_a_teacher_that_saw_a_test_domain(runs):
    teacher, _ = runs
    hparams = {"dataset": "DigitsDG", "test_envs": [0, 2, 3]}
    with pytest.raises(ValueError, match=r"trained on environments \[0\]"):
        clips.make("FourDs", SHAPE, 10, teacher=teacher, **hparams)
    clips.make("FourDs", SHAPE, 10, teacher=teacher, fourds_protocol="target", **hparams)


@pytest.mark.parametrize("averaging", ["sma", "swad"])
def test_a_teacher_with_averaged_weights_teaches_with_the_average(averaging):
    erm = clips.make("SMA" if averaging == "sma" else "SWAD", SHAPE, sma_start=1)
    run(erm, batches(3))
    if averaging == "swad":
        erm.finished.fill_(True)
    algorithm = make(teacher=erm)
    assert teacher_net(algorithm) is erm.average.network


def test_a_finished_run_of_4ds_can_teach_though_its_own_teacher_is_gone(runs):
    _, student = runs
    teacher = teachers.from_run(student, "DigitsDG", None, 10, SHAPE)
    state = checkpoints.load(student / "model.pkl")["model_dict"]
    own = teacher.module.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert {name.partition(".")[0] for name in own} >= {"featurizer", "classifier", "network"}
    make(shape=SHAPE, n_classes=10, teacher=teacher.module)


@pytest.mark.parametrize("dataset", ["DigitsDG", "PACS", "ColoredMNIST"])
def test_draws_stay_in_the_cards_ranges(dataset):
    for seed in range(1, 30):
        drawn = hparams_registry.random_hparams("FourDs", dataset, seed)
        assert 2 <= drawn["fourds_temperature"] <= 6
        assert 10**-0.5 <= drawn["fourds_div"] <= 10**0.5
        assert 0.01 <= drawn["fourds_beta"] <= 1
        assert 1e-4 <= drawn["fourds_adapter_lr"] <= 10**-2.5
        assert drawn["fourds_reduction"] in (2, 4, 8)
