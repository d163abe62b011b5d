import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from standins import DIALECTS, make_fork

from domainbed_kd.algorithms import get_algorithm_class
from domainbed_kd.plugin import __main__ as plugin
from domainbed_kd.plugin.guests import METHODS

XY = ("SWAD", "MIRO")  # they have an averaging of their own
FIVE = ("KDDG", "SCMD", "RISE", "MosaicKD", "FourDs")
SMALL = json.dumps({"mosaic_kd_steps": 1, "mosaic_width": 4, "mosaic_batch": 2})
# One process trains all, since each would spend seconds on imports.
ALL_IN_ONE = """
import runpy, sys
for argv in {argvs!r}:
    sys.argv = [argv[0], *argv[1:]]
    run = runpy.run_path if argv[0].endswith(".py") else runpy.run_module
    run(argv[0], run_name="__main__")
"""
SLOW = [d if d in ("DomainBed", "MIRO") else pytest.param(d, marks=pytest.mark.slow)
        for d in DIALECTS]


def python(*words, cwd, plugged=True, **environment):
    """Runs this interpreter, as `python` under the plug-in or alone."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = ["-m", "domainbed_kd.plugin", "--", "python"] if plugged else []
    return subprocess.run([sys.executable, *start, *words], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment})


def digest(folder):
    """Every source file's bytes."""
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.py"))}


def added(dialect):
    """The methods that a fork of a dialect is given."""
    return [name for name in METHODS if name != "SWAD" or dialect not in XY]


def command(dialect, algorithm, *more):
    """A fork's own command for one run, and the folder of its results."""
    if dialect in XY:
        return (["train_all.py", algorithm, "--algorithm", algorithm, *more],
                Path("train_output", algorithm, "0"))
    return (["domainbed.scripts.train", "--algorithm", algorithm, *more,
             "--output_dir", f"train_output/{algorithm}"], Path("train_output", algorithm))


@pytest.mark.parametrize("dialect", SLOW)
def test_all_methods_train_and_save_in_a_fork_and_erm_keeps_its_bits(dialect, tmp_path):
    fork = make_fork(tmp_path, dialect)
    sources = digest(fork)
    small = json.dumps(json.loads(SMALL) | {"clip_backbone": "tiny"})
    # A stand-in asks for an optimiser, and a zero-shot CLIP has nothing to train.
    trained = [name for name in added(dialect) if name != "CLIP"]
    commands = [command(dialect, name, "--hparams", small, "--steps", "4") for name in trained]
    erm = [command(dialect, "ERM"), command(dialect, "Own", "--hparams_seed", "3")]
    process = python("-c", ALL_IN_ONE.format(argvs=[argv for argv, _ in commands + erm]), cwd=fork)
    assert process.returncode == 0, process.stdout + process.stderr
    for name, (_, folder) in zip(trained, commands):
        assert (fork / folder / "done").exists()
        records = [json.loads(line) for line in (fork / folder / "results.jsonl").open()]
        assert [record["step"] for record in records] == [0, 1, 2, 3]
        assert all(record["args"]["algorithm"] == name for record in records)
        own = get_algorithm_class(name).search_space(records[0]["args"]["dataset"])
        assert own.keys() <= records[0]["hparams"].keys()
    plugged = [(fork / folder / "results.jsonl").read_bytes() for _, folder in erm]
    for _, folder in erm:
        (fork / folder / "results.jsonl").unlink()
    process = python("-c", ALL_IN_ONE.format(argvs=[argv for argv, _ in erm]), cwd=fork,
                     plugged=False)
    assert process.returncode == 0, process.stderr
    assert plugged == [(fork / folder / "results.jsonl").read_bytes() for _, folder in erm]
    assert digest(fork) == sources


@pytest.mark.slow
@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d not in ("SWAD", "MIRO")])
def test_the_children_of_a_forks_sweep_have_the_methods_too(dialect, tmp_path):
    fork = make_fork(tmp_path, dialect)
    process = python("-m", "domainbed.scripts.sweep", "launch", "--algorithms", "ERM", *FIVE,
                     "--output_dir", "sweep", "--hparams", SMALL, cwd=fork)
    assert process.returncode == 0, process.stderr
    assert {p.parent.name for p in fork.glob("sweep/*/done")} == {"ERM", *FIVE}


LOOK = """
import json, torch
from domainbed import algorithms, datasets, hparams_registry
hparams = hparams_registry.default_hparams({name!r}, "DigitsDG")
dataset = datasets.DigitsDG({arguments})
algorithm = algorithms.get_algorithm_class({name!r})(dataset.input_shape, 10, 3, hparams)
"""


def test_a_line_at_the_end_of_the_algorithms_module_is_enough(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    with (fork / "domainbed" / "algorithms.py").open("a") as file:
        file.write("\nimport domainbed_kd.plugin\ndomainbed_kd.plugin.install()\n")
    look = LOOK.format(name="RISE", arguments="None, [1], hparams") + """
print(type(algorithm.core).__name__, algorithms.ALGORITHMS, sorted(set(hparams) - set(
    hparams_registry.default_hparams("ERM", "DigitsDG"))))
"""
    process = python("-c", look, cwd=fork, plugged=False)
    assert process.stdout.startswith("RISE ['ERM', 'Own', 'KD'"), process.stderr
    assert "'rise_distill'" in process.stdout


def test_a_guest_has_the_forks_backbone_and_names_without_the_test_domains(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    look = LOOK.format(name="RISE", arguments="None, [1], hparams") + """
from domainbed_kd import datasets as ours
state = algorithm.state_dict()
print(json.dumps([type(algorithm.core.network[0].featurizer).__name__,
                  algorithm.core.hparams["class_names"], algorithm.core.hparams["domain_names"],
                  ours.domain_names("DigitsDG"), algorithm.core.hparams["total_steps"],
                  [k for k in state if "teacher" in k or "visual" in k]]))
"""
    process = python("-c", look, cwd=fork)
    network, classes, domains, ours, steps, teacher = json.loads(process.stdout)
    assert network == "MNIST_CNN" and steps == 4 and teacher == []
    assert classes[:3] == ["zero", "one", "two"]
    assert domains == [name for i, name in enumerate(ours) if i != 1]


REBUILD = """
import torch
from domainbed import algorithms
saved = torch.load("train_output/{name}/model.pkl")
hparams = saved["model_hparams"]
algorithm = algorithms.get_algorithm_class("{name}")((3, 32, 32), 10, 3, hparams)
algorithm.load_state_dict(saved["model_dict"])
x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # the first domain's
logits = algorithm.eval().predict(x)
logits = logits[""] if isinstance(logits, dict) else logits
print(torch.equal(logits, torch.load("train_output/{name}/predictions.pt")),
      hparams.get("class_names"), hparams.get("domain_names"))
"""


@pytest.mark.parametrize("dialect", ["SCMD", pytest.param("domainbedv2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["RISE", "KDDG"])
def test_a_checkpoint_is_rebuilt_from_its_hparams_in_a_process_that_has_seen_no_data(
        name, dialect, tmp_path):
    fork = make_fork(tmp_path, dialect)
    words, _ = command(dialect, name, "--steps", "2", "--test_envs", "1")
    process = python("-m", *words, cwd=fork)
    assert process.returncode == 0, process.stderr
    process = python("-c", REBUILD.format(name=name), cwd=fork)
    assert process.stdout.startswith("True "), process.stderr
    if name == "RISE":
        from domainbed_kd import datasets

        training = [n for i, n in enumerate(datasets.domain_names("DigitsDG")) if i != 1]
        assert process.stdout.startswith("True ['zero', 'one'")
        assert process.stdout.endswith(f"{training}\n")


@pytest.mark.parametrize("name", ["KDDG", "RISE"])
def test_any_method_is_averaged_in_any_forks_loop(name, tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    hparams = json.dumps({"averaging": "sma", "sma_start": 1, "teacher_steps": 0})
    words, folder = command("DomainBed", name, "--steps", "3", "--hparams", hparams)
    process = python("-m", *words, cwd=fork)
    assert process.returncode == 0, process.stderr
    assert (fork / folder / "done").exists()
    import torch

    state = torch.load(fork / folder / "model.pkl")["model_dict"]
    live, mean = ({key.removeprefix(prefix): value for key, value in state.items()
                   if key.startswith(prefix)}
                  for prefix in ("core.network.", "core.average.network."))
    assert live.keys() == mean.keys()
    assert any(not torch.equal(live[key], mean[key]) for key in live)


def test_a_method_of_ours_takes_teachers_in_a_forks_loop(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    hparams = json.dumps({"teachers": ["tiny"], "distill": ["logit", "text"], "xded_unistyle": []})
    words, folder = command("DomainBed", "XDED", "--steps", "2", "--hparams", hparams)
    process = python("-m", *words, cwd=fork)
    assert process.returncode == 0, process.stderr
    record = json.loads((fork / folder / "results.jsonl").read_text().splitlines()[-1])
    assert record["loss"] > record["classify"] and record["logit"] > 0 and record["text"] > 0


IN_A_LOOP = LOOK.format(name="SWAD", arguments="None, [1], hparams") + """
import numpy as np
import torch.nn.functional as F
from domainbed.lib import misc
algorithm.core.interval, algorithm.core.hparams["total_steps"] = 2, 6
splits = [misc.split_dataset(env, 3, i) for i, env in enumerate(dataset)]
batch = [next(iter(torch.utils.data.DataLoader(splits[i][1], 4))) for i in (0, 2, 3)]
expected, weights, segments, add = [], [], [], algorithm.core.valley.add
algorithm.core.valley.add = lambda segment: (segments.append(segment), add(segment))
streams = torch.get_rng_state(), np.random.get_state()[1]
for step in range(6):
    algorithm.update(batch)
    weights.append(torch.cat([p.detach().flatten() for p in algorithm.core.network.parameters()]))
    if step % 2 == 0 or step == 5:
        algorithm.eval()
        expected.append(sum(F.cross_entropy(
            algorithm.core.network(torch.stack([x for x, _ in splits[i][0]])),
            torch.stack([y for _, y in splits[i][0]])).item() for i in (0, 2, 3)) / 3)
        algorithm.train()
names = list(dict(algorithm.core.network.named_parameters()))
means = [torch.cat([segment.weights[name].flatten() for name in names]) for segment in segments]
print(np.allclose([segment.loss for segment in segments], expected, atol=1e-6),
      [(segment.start, segment.end) for segment in segments],
      all(torch.allclose(mean, sum(weights[segment.start:segment.end + 1]) / (
          segment.end - segment.start + 1), atol=1e-6) for mean, segment in zip(means, segments)),
      torch.equal(streams[0], torch.get_rng_state()),
      (streams[1] == np.random.get_state()[1]).all())
model = torch.cat([p.flatten() for p in algorithm.core.average.network.parameters()])
kept = [mean for pair in algorithm.core.valley.averaged for mean, segment in zip(means, segments)
        if pair == (segment.start, segment.end)]
x = torch.rand(2, 3, 32, 32)
algorithm.eval(), algorithm.core.average.network.eval()
print(torch.allclose(model, sum(kept) / len(kept), atol=1e-6),
      torch.equal(algorithm.predict(x), algorithm.core.average.network(x)))
"""


def test_swad_averages_by_the_loss_on_what_a_fork_holds_out_of_its_training_domains(tmp_path):
    process = python("-c", IN_A_LOOP, cwd=make_fork(tmp_path, "DomainBed"))
    assert process.stdout == (
        "True [(0, 0), (1, 2), (3, 4), (5, 5)] True True True\nTrue True\n"), process.stderr


def test_swad_on_any_method_trains_and_reloads_in_a_forks_loop(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    hparams = json.dumps({"averaging": "swad", "swad_interval": 1, "teacher_steps": 0})
    words, folder = command("DomainBed", "KDDG", "--hparams", hparams)
    process = python("-m", *words, cwd=fork)
    assert process.returncode == 0 and (fork / folder / "done").exists(), process.stderr


SWAD = '{"averaging": "swad"}'


@pytest.mark.parametrize(("dialect", "name", "hparams", "words"), [
    ("DomainBed", "KDDG", SWAD, 'could not find out. Use "averaging": "sma", or our `train`.'),
    ("MIRO", "KDDG", SWAD, "which this fork's loop keeps to its own SWAD. Use that, or 'sma'."),
    ("DomainBed", "XDED", '{"class_groups": 4}', "class_groups needs our own training loop")])
def test_what_a_forks_loop_or_loaders_cannot_do_is_refused(
        dialect, name, hparams, words, tmp_path):
    fork = make_fork(tmp_path, dialect)
    run = fork / "domainbed" / "scripts" / "run.py"  # a loop that splits in a way of its own
    run.write_text(run.read_text().replace("misc.split_dataset(env, 3, i)", "env"))
    argv, _ = command(dialect, name, "--hparams", hparams)
    process = python(*(["-m"] if dialect not in XY else []), *argv, cwd=fork)
    assert words in process.stderr.splitlines()[-1]


def test_a_guest_is_parallel_as_any_module_is(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    look = LOOK.format(name="KD", arguments="None, [1], hparams") + """
x = torch.rand(2, 3, 32, 32)
parallel = torch.nn.DataParallel(algorithm).eval()
print(torch.equal(parallel(x), algorithm.predict(x)))
names = list(algorithm.state_dict())
algorithm.network = torch.nn.DataParallel(algorithm.network)  # as T3A's train does
print(names == list(algorithm.state_dict()), torch.equal(parallel(x), algorithm.predict(x)))
"""
    assert python("-c", look, cwd=fork).stdout == "True\nTrue True\n"


def test_cuda_moves_a_guest_and_its_frozen_teacher_and_deepcopy_shares_the_teacher(tmp_path):
    look = LOOK.format(name="RISE", arguments="None, [1], hparams") + """
import copy
copied = copy.deepcopy(algorithm)
print(copied.core.teacher.module is algorithm.core.teacher.module)
torch.Tensor.cuda = lambda tensor, *_: tensor.to("meta")  # stands for a GPU
algorithm.train()  # as loops do after each evaluation
teacher = algorithm.cuda().core.teacher.module
print({p.device.type for module in (algorithm, teacher) for p in module.parameters()},
      teacher.training)
"""
    process = python("-c", look, cwd=make_fork(tmp_path, "DomainBed"))
    assert process.stdout == "True\n{'meta'} False\n", process.stderr


def test_a_warmed_up_teacher_is_neither_saved_nor_copied(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    look = LOOK.format(name="KDDG", arguments="None, [1], hparams").replace(
        '"DigitsDG")\n', '"DigitsDG") | {"teacher_steps": 1}\n', 1) + """
import copy
batch = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1])) for _ in range(3)]
before = [k for k in algorithm.state_dict() if "teacher." in k]
algorithm.update(batch)
state, copied = algorithm.state_dict(), copy.deepcopy(algorithm)
fresh = type(algorithm)(dataset.input_shape, 10, 3, hparams)
fresh.load_state_dict(state)
x = torch.rand(2, 3, 32, 32)
algorithm.eval(), fresh.eval(), copied.eval()
print(len(before) > 0, [k for k in state if "teacher." in k],
      copied.core.teacher is algorithm.core.teacher, copied.core.network is algorithm.core.network,
      torch.equal(algorithm.predict(x), fresh.predict(x)))
"""
    process = python("-c", look, cwd=fork)
    assert process.stdout.split("\n")[0] == "True [] True False True", process.stderr


def test_a_method_of_the_forks_own_wins_and_the_plugin_says_so(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    with (fork / "domainbed" / "algorithms.py").open("a") as file:
        file.write("\n\nclass RISE(ERM):\n    pass\n")
    process = python("-c", "from domainbed.algorithms import get_algorithm_class as get;"
                     "print(get('RISE').__bases__[0].__name__, get('KDDG').method)", cwd=fork)
    assert process.stdout == "ERM KDDG\n"
    assert "this fork has RISE of its own; it is kept" in process.stderr


def test_our_draws_are_those_of_our_own_registry_and_the_forks_do_not_move(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    code = ("import json; from domainbed.hparams_registry import random_hparams as r;"
            "print(json.dumps([r('ERM', 'PACS', 5), r('4Ds', 'PACS', 5)]))")
    plugged, alone = (python("-c", code.replace("'4Ds'", "'4Ds'" if p else "'ERM'"), cwd=fork,
                             plugged=p) for p in (True, False))
    erm, ours = json.loads(plugged.stdout)
    assert erm == json.loads(alone.stdout)[0] == {k: ours[k] for k in erm}
    from domainbed_kd.hparams_registry import random_hparams

    expected = random_hparams("FourDs", "PACS", 5)
    assert {k: ours[k] for k in ours if k not in erm} == {
        k: v for k, v in expected.items() if k.startswith(("fourds_", "teacher_"))}


@pytest.mark.parametrize("base, words", [
    ("class Algorithm:\n    def update(self, batch, opt, sch):\n        pass\n",
     ["update(batch, opt, sch)", "Expected update(minibatches)", "update(x, y, **kwargs)"]),
    ("Trainer = 1\n", ["no class Algorithm"])])
def test_a_fork_of_an_unknown_dialect_goes_on_after_one_line(base, words, tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    (fork / "domainbed" / "algorithms.py").write_text(
        base + "def get_algorithm_class(name):\n    pass\n")
    process = python("-c", "import domainbed.algorithms; print('on')", cwd=fork)
    assert process.returncode == 0 and process.stdout == "on\n"
    line, = process.stderr.splitlines()
    assert all(word in line for word in (*words, str(fork), "plugin doctor")), line


def test_a_bridge_that_breaks_does_not_stop_the_forks_own_erm(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    for name in ("algorithms", "hparams_registry", "datasets"):
        with (fork / "domainbed" / f"{name}.py").open("a") as file:
            file.write("\nclass Odd(type):\n    __mro__ = property(lambda cls: 1 / 0)\n"
                       "    __subclasscheck__ = __instancecheck__ = lambda cls, other: 1 / 0\n"
                       "class Algorithm(metaclass=Odd):\n    def update(self):\n        pass\n"
                       "MultipleDomainDataset = default_hparams = Algorithm\n"
                       if name == "datasets" else "\nget_algorithm_class.__globals__['Algorithm']"
                       " = 1\n" if name == "algorithms" else "\ndel random_hparams\n")
    process = python("-m", "domainbed.scripts.train", "--steps", "2", cwd=fork)
    assert process.returncode == 0, process.stderr
    assert (fork / "train_output" / "done").exists()
    assert sum("runs without our methods" in line
               for line in process.stderr.splitlines()) >= 2


def test_nothing_heavy_is_imported_before_the_fork_imports_it(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    process = python("-c", "import sys; print(sorted(m for m in sys.modules if m.split('.')[0] in "
                     "('torch', 'open_clip', 'timm', 'numpy', 'domainbed')))", cwd=fork)
    assert process.stdout == "[]\n", process.stderr
    look = ("import sys, domainbed.algorithms;"
            "print('open_clip' in sys.modules, 'timm' in sys.modules)")
    assert python("-c", look, cwd=fork).stdout == "False False\n"


def test_the_environments_own_sitecustomize_still_runs(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('own')\n")
    path = f"{tmp_path / 'site'}{os.pathsep}{ROOT}"
    process = python("-c", "print('command')", cwd=tmp_path, PYTHONPATH=path)
    assert process.stdout.splitlines()[-2:] == ["own", "command"]


def test_a_commands_exit_status_is_passed_on(tmp_path):
    assert python("-c", "raise SystemExit(7)", cwd=tmp_path).returncode == 7


@pytest.mark.parametrize("argv, words", [
    ([], "Expected `-- COMMAND"), (["--"], "Expected `-- COMMAND"),
    (["docter"], "`doctor [--try]`"),
    (["--", "no-such-program"], "no such program")])
def test_misuse_is_one_line_and_exit_status_2(argv, words, tmp_path):
    process = subprocess.run([sys.executable, "-m", "domainbed_kd.plugin", *argv], cwd=tmp_path,
                             capture_output=True, text=True, env=os.environ | {
                                 "PYTHONPATH": str(ROOT)})
    line, = process.stderr.splitlines()
    assert process.returncode == 2 and words in line


@pytest.mark.parametrize("dialect", SLOW)
def test_the_doctor_names_the_dialect_the_methods_and_one_next_command(dialect, tmp_path):
    fork = make_fork(tmp_path, dialect)
    process = subprocess.run([sys.executable, "-m", "domainbed_kd.plugin", "doctor"], cwd=fork,
                             capture_output=True, text=True, env=os.environ | {
                                 "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr
    assert f"Dialect:  {dialect}:" in process.stdout
    assert process.stdout.count(": added\n") == len(added(dialect))
    assert all(f"Method:   {name}: added" in process.stdout for name in added(dialect))
    assert process.stdout.splitlines()[-1].startswith("Next:     python -m domainbed_kd.plugin --")


BROKEN = [
    ("import no_such_package\n", ["No module named 'no_such_package'",
                                  "pip install no_such_package"]),
    ("x = 1\nclass A(:\n", ["SyntaxError", "(algorithms.py, line 2)"]),
    ("import numpy as np\nx = np.int_eger\n", ["AttributeError", "int_eger"])]


@pytest.mark.parametrize("source, words", BROKEN)
def test_a_fork_that_does_not_import_is_one_line_for_the_doctor_and_for_ours(
        source, words, tmp_path):
    (tmp_path / "domainbed").mkdir()
    (tmp_path / "domainbed" / "__init__.py").touch()
    (tmp_path / "domainbed" / "algorithms.py").write_text(source)
    process = subprocess.run([sys.executable, "-m", "domainbed_kd.plugin", "doctor"], cwd=tmp_path,
                             capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr == ""
    assert all(word in process.stdout.splitlines()[-1] for word in words), process.stdout
    process = python(*TRAIN, "--fork", str(tmp_path), cwd=tmp_path, plugged=False)
    line, = process.stderr.splitlines()
    assert process.returncode == 2 and f"--fork {tmp_path}" in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize("source, words", [
    ("import no_such_package\n", ["imports no_such_package", "pip install no_such_package"]),
    ("import pkg_resources.nothing\n", ["pip install 'setuptools<80'"]),
    ("x = lambda: np.int(3)\n", ["networks.py:", "np.int", "numpy<1.24"]),
    ("x = lambda path: torch.load(path)\n", ["torch.load", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"])])
def test_the_doctor_names_old_habits_in_what_training_imports(source, words, tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    (fork / "domainbed" / "unused.py").write_text("import never_needed\n")
    networks = fork / "domainbed" / "networks.py"
    networks.write_text(source + networks.read_text())
    process = subprocess.run([sys.executable, "-m", "domainbed_kd.plugin", "doctor"], cwd=fork,
                             capture_output=True, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("Obstacle:")]
    assert any(all(word in line for word in words) for line in lines), process.stdout
    assert "never_needed" not in process.stdout


@pytest.mark.slow
def test_the_doctor_tries_every_method_and_names_those_that_fail(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    with (fork / "domainbed" / "algorithms.py").open("a") as file:
        file.write("\n\nclass SCMD(ERM):\n    pass\n")
    networks = fork / "domainbed" / "networks.py"
    networks.write_text(networks.read_text().replace(  # no architecture that 4Ds and XDED can cut
        "x = self.bn1(F.relu(self.conv2(x)))", "x = self.bn1(F.relu(self.conv2(x))) * 2"))
    sources = digest(fork)
    process = subprocess.run([sys.executable, "-m", "domainbed_kd.plugin", "doctor", "--try"],
                             cwd=fork, capture_output=True, text=True,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    tried = dict(line.removeprefix("Tried:    ").rsplit(": ", 1) for line in
                 process.stdout.splitlines() if line.startswith("Tried:")
                 and "4Ds" not in line and "XDED" not in line)
    assert set(tried.values()) == {"works"}, process.stdout + process.stderr
    assert {"Debug28: ERM", "Debug28: RISE", "reload Debug28: KDDG", "ERM: without us",
            "Debug28: RISE + sma", "sources: unchanged"} <= tried.keys()
    assert "Debug28: SCMD" not in tried
    assert "Debug28: 4Ds: ValueError: 4Ds: the" in process.stdout and process.returncode == 1
    assert "Debug28: XDED: ValueError: XDED: xded_unistyle is" in process.stdout
    assert digest(fork) == sources


def test_the_doctor_says_so_where_there_is_no_fork(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plugin.main(["doctor"]) == 1
    assert "Next: run this in the folder" in capsys.readouterr().out


TRAIN = ["-m", "domainbed_kd.scripts.train", "--dataset", "DigitsDG", "--algorithm", "Own",
         "--steps", "4", "--checkpoint_freq", "2", "--hparams", '{"batch_size": 4}']


@pytest.mark.parametrize("dialect", [d if d == "DomainBed" else pytest.param(
    d, marks=pytest.mark.slow) for d in DIALECTS])
def test_a_forks_method_trains_in_our_loop_with_its_own_hparams(dialect, tmp_path):
    fork = make_fork(tmp_path / "fork", dialect)
    process = python(*TRAIN, "--fork", str(fork), "--output_dir", "out", cwd=tmp_path,
                     plugged=False)
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    assert [record["step"] for record in records] == [0, 2, 3]
    assert records[0]["hparams"]["fork_only"] is True
    assert (tmp_path / "out" / "done").exists()


def test_what_a_forks_hparams_lack_is_filled_in_or_named(tmp_path):
    fork = make_fork(tmp_path / "fork", "DomainBed")
    registry = fork / "domainbed" / "hparams_registry.py"
    registry.write_text(registry.read_text() + """
def default_hparams(algorithm, dataset):
    return {"lr": 1e-3, "weight_decay": 0.0}
""")
    code = f"""
from domainbed_kd.plugin import visitors
from domainbed_kd.run import build
assert visitors.load({str(fork)!r}) == ["Own"]
args = {{"algorithm": "Own", "dataset": "DigitsDG", "hparams_seed": 0}}
print(build.choose_hparams(args | {{"hparams": '{{"batch_size": 4}}'}}))
build.choose_hparams(args | {{"hparams": None}})
"""
    process = python("-c", code, cwd=tmp_path, plugged=False)
    assert process.stdout == str({
        "class_balanced": False, "data_augmentation": True, "lr": 1e-3, "weight_decay": 0.0,
        "batch_size": 4}) + "\n"
    assert process.stderr.splitlines()[-1] == (
        "ValueError: Own: its hparams hold no batch_size, which every run needs. Pass --hparams "
        "'{\"batch_size\": 32}'.")


@pytest.mark.slow
def test_a_forks_method_stands_in_our_sweep_and_our_table_beside_ours(tmp_path):
    fork = make_fork(tmp_path / "fork", "DomainBed")
    process = python(
        "-m", "domainbed_kd.scripts.sweep", "launch", "--fork", str(fork), "--datasets", "DigitsDG",
        "--algorithms", "ERM", "Own", "--single_test_envs", "--n_trials", "1", "--n_hparams", "1",
        "--steps", "2", "--hparams", '{"batch_size": 4}', "--skip_confirmation",
        "--command_launcher", "local", "--output_dir", "sweep", cwd=tmp_path, plugged=False)
    assert process.returncode == 0, process.stderr
    process = python("-m", "domainbed_kd.scripts.collect_results", "--input_dir", "sweep",
                     cwd=tmp_path, plugged=False)
    rows = [line.split()[0] for line in process.stdout.splitlines() if line]
    assert "ERM" in rows and "Own" in rows and "X" not in process.stdout.split()


RESTART = """
import pathlib, torch
from domainbed_kd import algorithms, checkpoints, hparams_registry
from domainbed_kd.plugin import visitors
assert visitors.load({fork!r}) == ["Own"]
hparams = hparams_registry.default_hparams("Own", "DigitsDG")
def make(seed):
    torch.manual_seed(seed)
    return algorithms.get_algorithm_class("Own")((3, 32, 32), 10, 2, hparams)
batches = [[(torch.rand(4, 3, 32, 32), torch.arange(4)) for _ in range(2)] for _ in range(4)]
whole, first, second = make(0), make(0), make(1)
expected = [whole.update(batch) for batch in batches]
for batch in batches[:2]:
    first.update(batch)
state = pathlib.Path("state.pt")
checkpoints.save(state, checkpoints.algorithm_state(first))
checkpoints.load_algorithm_state(second, checkpoints.load(state))
print([second.update(batch) for batch in batches[2:]] == expected[2:], second.inner.seen)
"""


def test_a_forks_method_restarts_in_the_same_bits_with_its_plain_counters(tmp_path):
    fork = make_fork(tmp_path, "DomainBed")
    code = RESTART.format(fork=str(fork))
    process = python("-c", code, cwd=tmp_path, plugged=False)
    assert process.stdout == "True 4\n", process.stderr


def test_a_forks_method_that_needs_a_gpu_says_so_in_one_line(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    fork = make_fork(tmp_path / "fork", "DomainBed")
    source = fork / "domainbed" / "algorithms.py"
    source.write_text(source.read_text().replace(
        "return super().update(minibatches)",
        "return super().update([(x.cuda(), y.cuda()) for x, y in minibatches])"))
    process = python(*TRAIN, "--fork", str(fork), cwd=tmp_path, plugged=False)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == (
        "error: Own: the fork's code moves tensors by .cuda(), and this machine has no GPU. Run "
        "it on one.")


def test_a_folder_without_a_fork_is_refused_in_one_line(tmp_path):
    process = python(*TRAIN, "--fork", str(tmp_path), cwd=tmp_path, plugged=False)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert "domainbed" in process.stderr
