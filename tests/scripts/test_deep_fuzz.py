"""Commands that get past the first checks, and folders that anybody may have written.

Every vector is one that somebody might type: names that exist, folders that are there, values of
the right kind, some of them absurd. Every hostile file stands where a command reads. All run in
this process, in which an unexpected error is not caught. DOMAINBED_KD_FUZZ sets how many of each.
"""

import json
import math
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image

from domainbed_kd import __main__ as cli
from domainbed_kd import algorithms, command_launchers, console, hparams_registry
from domainbed_kd.sweep import workers

N = int(os.environ.get("DOMAINBED_KD_FUZZ", 25))
# Seconds of processor time, which a busy machine does not lengthen, and of the clock.
LIMIT, PATIENCE = 10, 120
DATASETS = ("Debug28", "DigitsDG", "Folder:mine")
TAUGHT = [name for name in algorithms.ALGORITHMS if algorithms.learns_from_run(name)]
# 32 pixels make the small network.
SMALL = {"batch_size": 4, "image_size": 32, "wrn_depth": 10, "wrn_widen": 1,
         "clip_backbone": "tiny", "rise_clip_backbone": "tiny"}
SWEEP = ["--datasets", "Folder:mine", "--data_dir", ".", "--algorithms", "ERM", "KDDG",
         "--n_hparams", "1", "--n_trials", "1", "--single_test_envs", "--steps", "2",
         "--checkpoint_freq", "1", "--hparams", json.dumps(SMALL), "--skip_confirmation",
         "--command_launcher", "here", "--save_logits", "--diagnostics", "--format", "safetensors"]
PLUGIN = """
from domainbed_kd.algorithms.erm import ERM


class Mine(ERM):
    pass
"""
ODD = [0, -1, 1, 2, 0.5, 1e-9, 1e9, 1e308, 10**30, True, None, "", "none", [], {}]


# What `run` has returned of the jobs that the command at hand launched here.
JOBS = []
# Earlier vectors that train.
PAST = []


class Hang(BaseException):
    """A command that takes longer than anybody waits."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished sweep of students, a run, images and the results of DomainBed."""
    folder, before = tmp_path_factory.mktemp("fuzz"), os.getcwd()
    os.chdir(folder)
    draw = np.random.RandomState(0)
    for domain in "abc":
        for label in ("cat", "dog"):
            Path("mine", domain, label).mkdir(parents=True)
            for i in range(10):
                pixels = draw.randint(256, size=(9, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path("mine", domain, label, f"{i}.png"))
    Path("plugin.py").write_text(PLUGIN)
    shutil.copytree(GOLDENS / "sweep_data", "results")
    known = algorithms.ALGORITHMS.copy(), algorithms._REGISTERED.copy()
    command_launchers.REGISTRY["here"] = here
    command_launchers.BLOCKING += (here,)
    os.environ["HF_HUB_OFFLINE"] = "1"
    assert run(["sweep", "launch", "--output_dir", "sweep", *SWEEP])[0] == 0
    yield folder
    os.chdir(before)
    # The plug-in's method would meet those of other tests.
    algorithms.ALGORITHMS[:], algorithms._REGISTERED = known
    del command_launchers.REGISTRY["here"]
    command_launchers.BLOCKING = command_launchers.BLOCKING[:-1]


def here(commands, jobs_per_device=None):
    """A launcher that runs the jobs in this process, one after the other."""
    JOBS.extend(run(["train", *workers.words(command)[3:]]) for command in commands)
    return [code for code, *_ in JOBS[-len(commands):]] if commands else []


def status(argv):
    try:
        console.run_main(lambda: cli.dispatch(argv))
    except SystemExit as ended:
        return ended.code


def clocks():
    """Seconds of processor time and of the clock."""
    return np.array([time.process_time(), time.monotonic()])


def run(argv):
    """(exit status, what went wrong or None, `clocks` it took) of a command, without its jobs."""
    def expired(*_):
        raise Hang

    began, n_before = clocks(), len(JOBS)
    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(PATIENCE)
    code, wrong = None, None
    try:
        code = status(argv)
    except (Exception, Hang):
        wrong = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    took = clocks() - began - sum(took for *_, took in JOBS[n_before:])
    wrong = next((why for _, why, _ in JOBS[n_before:] if why), wrong)
    if wrong is None and code not in (0, 1, 2, 75):
        wrong = f"exit status {code}"
    if wrong is None and took[0] > LIMIT:
        wrong = f"{took[0]:.1f} s of processor time"
    return code, wrong, took


# Vectors.


def maybe(r, share, *words):
    return [str(word) for word in words] if r.random() < share else []


def hparams(r, algorithm, dataset, also=()):
    """Hparams that a draw could give, small enough for a test, and at times an odd one."""
    found = hparams_registry.random_hparams(algorithm, dataset, r.randrange(99))
    names = [name for name in found if name not in SMALL and name not in ("dinov2", "vit")]
    chosen = {name: found[name] for name in r.sample(names, min(len(names), r.randrange(4)))}
    if r.random() < 0.2:
        chosen[r.choice(names)] = r.choice(ODD)
    if r.random() < 0.15:
        chosen["averaging"] = r.choice(["sma", "swad", "beta"])
    if r.random() < 0.1:
        chosen |= r.choice([{"mended": True}, {"canonical_view": True}, {"sma_start": 0},
                            {"class_names": ["a", "b"]}, {"swad_interval": 1}, {"batch_size": 1},
                            {"backbone": "small_vit"}, {"nonlinear_classifier": True}])
    small = {name: value for name, value in SMALL.items()
             if name in found or name in hparams_registry.OPTIONAL}
    if "--teacher_cache" in also:
        chosen["canonical_view"] = True
    return json.dumps(small | chosen)


def known(folder):
    """The folders in a folder."""
    return sorted(map(str, Path(folder).glob("*/")))


def train_argv(r):
    dataset = r.choice(DATASETS)
    algorithm = r.choice(algorithms.ALGORITHMS)
    steps = r.choice([1, 1, 2, 3])
    if PAST and r.random() < 0.15:  # again: it goes on, is done, or starts anew beside
        return [*r.choice(PAST), *maybe(r, 0.5, "--resume", "never"), *maybe(r, 0.2, "--wandb")]
    cached = maybe(r, 0.05, "--teacher_cache", "recalled")
    argv = ["train", "--dataset", dataset, "--data_dir", ".", "--algorithm", algorithm,
            "--steps", str(steps), "--hparams", hparams(r, algorithm, dataset, cached),
            "--output_dir", "runs/new", *cached,
            "--test_envs", *map(str, r.sample(range(3), r.choice([1, 1, 1, 2])))]
    if algorithm in TAUGHT and r.random() < 0.8:
        argv += ["--teacher", r.choice(known("sweep")), "--allow_bad_teacher"]
    argv += maybe(r, 0.4, "--checkpoint_freq", r.choice([0, 1, 2, 99]))
    argv += maybe(r, 0.2, "--holdout_fraction", r.choice([0.1, 0.3, 0.5, 0.9]))
    argv += maybe(r, 0.1, "--task", "domain_adaptation", "--uda_holdout_fraction", 0.5)
    for name in ("skip_model_save", "save_model_every_checkpoint", "save_logits", "diagnostics",
                 "log_test_domains", "fast", "allow_bad_teacher"):
        argv += maybe(r, 0.15, f"--{name}")
    for name in ("trial_seed", "seed", "hparams_seed"):
        argv += maybe(r, 0.2, f"--{name}", r.randrange(5))
    argv += maybe(r, 0.1, "--format", "safetensors")
    argv += maybe(r, 0.15, "--image_cache", "pixels")
    argv += maybe(r, 0.2, "--resume", r.choice(["auto", "never"]))
    return argv + maybe(r, 0.1, "--plugin", "plugin.py")


def sweep_argv(r):
    command = r.choice(["launch", "launch", "status", "plan", "delete_incomplete"])
    folder = r.choice(["sweep", *known("sweeps"), *["sweeps/new"] * 5 * (command == "launch")])
    is_known = os.path.exists(f"{folder}/sweep.json")
    argv = ["sweep", command, *([folder] if is_known else ["--output_dir", folder])]
    if not is_known or r.random() < 0.3:
        names = r.sample(algorithms.ALGORITHMS, 2)
        chosen = json.loads(hparams(r, names[0], "Folder:mine"))
        argv += ["--datasets", r.choice(["Folder:mine", "Debug28", "DigitsDG"]), "--data_dir", ".",
                 "--algorithms", *names[:r.choice([1, 1, 2])], "--single_test_envs",
                 "--n_hparams", str(r.choice([1, 1, 2])), "--n_trials", "1",
                 "--steps", str(r.choice([1, 2])), "--hparams",
                 json.dumps(SMALL | chosen)]
        argv += maybe(r, 0.1, "--n_hparams_from", 1)
    argv += ["--skip_confirmation"]
    argv += ["--command_launcher", r.choice(["here", "dummy", "dummy"])]
    for name in ("save_logits", "diagnostics", "allow_bad_teacher"):
        argv += maybe(r, 0.1, f"--{name}")
    argv += maybe(r, 0.1, "--retry", 1)
    argv += maybe(r, 0.1, "--image_cache", "pixels")
    argv += maybe(r, 0.1, "--plugin", "plugin.py")
    if command == "plan":
        argv += maybe(r, 0.5, "--hours_per_run", r.choice([0.1, 3, 1e300]))
        argv += maybe(r, 0.5, "--budget", r.choice([0.01, 2, 1e300]))
    return argv


def folder_of_results(r):
    return r.choice(["sweep", "results", "runs", "runs", *known("sweeps")])


def collect_argv(r):
    argv = ["collect_results", "--input_dir", folder_of_results(r)]
    argv += maybe(r, 0.6, "--format", r.choice(["text", "latex", "csv", "markdown"]))
    argv += maybe(r, 0.1, "--latex")
    argv += maybe(r, 0.1, "--auto_lr")
    argv += maybe(r, 0.15, "--upstream")
    argv += maybe(r, 0.3, "--published")
    argv += maybe(r, 0.4, "--compare", r.choice(algorithms.ALGORITHMS[:3]))
    return argv + maybe(r, 0.1, "--plugin", "plugin.py")


def report_argv(r):
    argv = ["report", "--input_dir", folder_of_results(r)]
    argv += maybe(r, 0.3, "--output", "page.html")
    argv += maybe(r, 0.3, "--published")
    return argv + maybe(r, 0.4, "--compare", r.choice(algorithms.ALGORITHMS[:3]))


def list_argv(r):
    folder, dataset = r.choice([("results", "VLCS"), ("sweep", "Folder:mine"), ("runs", "Debug28")])
    return ["list_top_hparams", "--input_dir", folder, "--dataset", dataset, "--algorithm",
            r.choice(["ERM", "ERM", "KDDG"]), "--test_env", str(r.randrange(4))]


def download_argv(r):
    names = r.sample(["PACS", "VLCS", "OfficeHome", "RotatedMNIST", "TerraIncognita"], 2)
    return ["download", *r.choice([["--list"], ["--list", "--datasets", *names],
                                   ["--verify", "--data_dir", "."],
                                   ["--verify", "--data_dir", "data", "--datasets", names[0]]])]


def demo_argv(r):
    algorithm = r.choice(algorithms.ALGORITHMS)
    return ["demo", "--output_dir", f"demo{r.randrange(3)}", "--steps", "1", "--n_trials", "1",
            "--n_hparams", "1", "--algorithms", algorithm, "--hparams",
            hparams(r, algorithm, "DigitsDG"), "--command_launcher", r.choice(["here", "dummy"])]


def deep_argv(seed):
    """A vector, from its seed and what the vectors before it have left."""
    r = random.Random(seed)
    make, = r.choices(
        [train_argv, sweep_argv, collect_argv, report_argv, list_argv, download_argv, demo_argv],
        [40, 25, 18, 4, 7, 3, 3])
    argv = [word.replace("/new", f"/{seed}") for word in make(r)]
    if make is train_argv:
        PAST.append(argv)
    return argv


# Hostile files.

TEXTS = [
    b"", b"\n", b"\x00" * 40, b"\xff\xfe{}", b"[" * 10000, b'{"a": ' * 400 + b"1" + b"}" * 400,
    b'{"seconds": 1' + b"0" * 400 + b"}", b'"\\ud800"', b"NaN", b"null", b"[]", b"{}",
    b'{"launches": [{"cwd": 3, "flags": ["--steps", "1"]}]}', b'{"launches": [{}]}',
    b'{"launches": [{"cwd": "/", "flags": ["--plugin", "plugin.py", "--steps", "-1"]}]}',
    b'{"pid": -1, "host": [], "time": 1e308}', b"-1", b"1e400", b"../../etc/passwd",
    b"cos\nsystem\n(S'touch hacked'\ntR.", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"{" * 100000,
    b"=HYPERLINK(1)", b"<script>alert(1)</script>", b"\\input{x}", b"a" * 10**6]
RUN_FILES = ("results.jsonl", "args.json", "memory.json", "out.txt", "err.txt", "failed", "done",
             "heartbeat", "resume.pt", "model.pkl", "model.safetensors", "logits/step1.npz",
             "results.jsonl.old", "image")
SWEEP_FILES = ("sweep.json", "results.txt", "report.html")


def value(r, depth=3):
    """Any value of JSON, and some that are not."""
    kinds = [lambda: r.choice([None, True, "", "é", "\x00", "a" * 99, "</script>", "%s", "ERM"]),
             lambda: r.choice([0, -1, 1, 2**31, 2**63, 10**400, -10**30]),
             lambda: r.choice([0.5, math.nan, math.inf, -math.inf, 1e-320, -0.0])]
    if depth:
        kinds += [lambda: [value(r, depth - 1) for _ in range(r.randrange(4))],
                  lambda: {str(value(r, 0)): value(r, depth - 1) for _ in range(r.randrange(4))}]
    return r.choice(kinds)()


def changed(r, text):
    """JSON, or lines of it, with a value somewhere in it replaced, removed or doubled."""
    lines = text.decode().splitlines()
    i = r.randrange(len(lines))
    try:
        found = json.loads(lines[i])
    except ValueError:
        return text[:r.randrange(len(text) + 1)]
    inside = found
    while isinstance(inside, (dict, list)) and inside:
        name = r.choice(sorted(inside)) if isinstance(inside, dict) else r.randrange(len(inside))
        if r.random() < 0.5 or not isinstance(inside[name], (dict, list)):
            if r.random() < 0.3:
                del inside[name]
            else:
                inside[name] = value(r)
            break
        inside = inside[name]
    lines[i] = json.dumps(found)
    return "\n".join(lines * r.choice([1, 1, 2])).encode() + r.choice([b"\n", b""])


def harm(r, path):
    """Puts something else in the place of a file; says what."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if path.is_file() and path.stat().st_size < 2**24 else b""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif path.exists() or path.is_symlink():
        path.unlink()
    kind = r.choice(["text", "text", "changed", "changed", "changed", "cut", "flipped", "fifo",
                     "folder", "loop", "nowhere", "sparse", "device"])
    if kind == "changed" and path.suffix in (".jsonl", ".json") and old:
        path.write_bytes(changed(r, old))
    elif kind == "cut" and old:
        path.write_bytes(old[:r.randrange(len(old))])
    elif kind == "flipped" and old:
        new = bytearray(old)
        for _ in range(r.choice([1, 3, 30])):
            new[r.randrange(len(new))] = r.randrange(256)
        path.write_bytes(new)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to("absent")
    elif kind == "device":
        path.symlink_to(r.choice(["/dev/zero", "/dev/null", "/dev/tty"]))
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**36)
    else:
        path.write_bytes(r.choice(TEXTS))
    return kind


def restored(path):
    """The finished sweep as it was, in a folder of that name, with its own images."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree("sweep", path, symlinks=True)


def hostile(seed):
    """Harms a copy of the sweep; returns what was done, and the commands that then read it."""
    r = random.Random(seed)
    restored("harmed")
    runs = sorted(path for path in Path("harmed").iterdir() if path.is_dir())
    student = next(path for path in runs if "KDDG" in (path / "args.json").read_text())
    teacher = next(path for path in runs if "ERM" in (path / "args.json").read_text())
    said = []
    for _ in range(r.choice([1, 1, 2])):
        name = r.choice([*RUN_FILES, *RUN_FILES, *SWEEP_FILES])
        path = (Path("harmed", name) if name in SWEEP_FILES else
                Path("harm/a/cat/0.png") if name == "image" else
                r.choice([student, teacher]) / name)
        if name == "image":
            shutil.rmtree("harm", ignore_errors=True)
            shutil.copytree("mine", "harm")
        said.append((harm(r, path), str(path)))
    if r.random() < 0.5:  # not finished, so that it is gone on with
        for run_ in (student, teacher):
            if (run_ / "done").is_file():
                (run_ / "done").unlink()
    launch = ["sweep", "launch", "harmed", "--skip_confirmation", "--command_launcher", "here"]
    images = ["train", "--dataset", "Folder:harm", "--data_dir", ".", "--steps", "1", "--hparams",
              json.dumps(SMALL), "--output_dir", "harmed/images", *maybe(r, 0.5, "--image_cache",
                                                                         "harmed/pixels")]
    taught = ["train", "--dataset", "Folder:mine", "--data_dir", ".", "--steps", "1", "--hparams",
              json.dumps(SMALL), "--output_dir", "harmed/taught", "--algorithm", "KDDG",
              "--teacher", str(teacher)]
    every = [launch, ["sweep", "status", "harmed"], ["sweep", "plan", "harmed"],
             ["sweep", "delete_incomplete", "harmed", "--skip_confirmation"], taught,
             ["collect_results", "--input_dir", "harmed", "--published", "--compare", "ERM"],
             ["collect_results", "--input_dir", "harmed", "--format", "latex"],
             ["list_top_hparams", "--input_dir", "harmed", "--dataset", "Folder:mine",
              "--algorithm", "KDDG", "--test_env", "0"], ["sweep", "status", "harmed",
                                                        *SWEEP[:-2]]]
    commands = r.sample(every, 2) + ([images] if Path("harm").is_dir() and "harm/" in str(said)
                                     else [])
    if r.random() < 0.06:
        commands.append(["report", "--input_dir", "harmed"])
    return said, commands


def judge(name, ran):
    """Says how long commands took, of (what they are, what `run` returns), and that none erred."""
    codes = Counter(code for _, (code, _, _) in ran)
    print(f"{name}: {len(ran)} commands, by exit status {dict(codes)}")
    for i, clock in enumerate(("processor time", "the clock")):
        what, (*_, took) = max(ran, key=lambda each: each[1][2][i])
        n_slow = sum(took[i] > LIMIT for _, (*_, took) in ran)
        print(f"{n_slow} took over {LIMIT} s of {clock}, the slowest {took[i]:.1f} s: {what}")
    wrong = [f"{what}\n{why}" for what, (_, why, _) in ran if why]
    assert not wrong, "\n\n".join(wrong[:5]) + f"\n{len(wrong)} in all"


@pytest.mark.slow
def test_vectors_that_reach_deep_end_in_a_line_and_in_time(place):
    ran = []
    for seed in range(N):
        argv = deep_argv(seed)
        ran.append((f"seed {seed}: {argv}", run(argv)))
    judge("vectors", ran)


@pytest.mark.slow
def test_hostile_files_cost_a_line_each_and_no_time(place):
    ran = []
    for seed in range(N):
        said, commands = hostile(seed)
        ran += [(f"seed {seed}: {said} {argv}", run(argv)) for argv in commands]
        assert not os.path.exists("hacked")
    judge("hostile files", ran)
