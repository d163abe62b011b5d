import hashlib
import io
import itertools
import multiprocessing
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import golden, seed_everything
from torch.utils.data import TensorDataset

from domainbed_kd import datasets, machine
from domainbed_kd.run import loaders, splits
from domainbed_kd.seeds import seed_hash

CASES = golden("loader_streams.json")["cases"]
SPLITS = golden("splits.json")


class Noisy:
    """Items that show which numbers were drawn from each stream to make them."""

    def __init__(self, n):
        self.n = n
        self.targets = [i % 2 for i in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x = [i, random.random(), np.random.rand(), torch.rand(()).item()]
        return torch.tensor(x, dtype=torch.float64), i % 2


class Environments(list):
    """A dataset of environments whose item i is i."""

    def __init__(self, *sizes):
        super().__init__(range(size) for size in sizes)


def peek():
    """Two numbers that the global torch stream would give next."""
    state = torch.get_rng_state()
    try:
        return torch.randint(0, 2**31 - 1, (2,)).tolist()
    finally:
        torch.set_rng_state(state)


def global_streams():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def flat(view):
    return [view[i] for i in range(len(view))]


# Splits.


@pytest.mark.parametrize("case", SPLITS["raw"], ids=lambda c: f"{c['n']}-{c['k']}-{c['seed']}")
def test_split_dataset_shuffles_as_domainbed_does(case):
    first, second = splits.split_dataset(range(case["n"]), case["k"], case["seed"])
    assert (first.keys, second.keys) == (case["first"], case["second"])
    assert first.underlying_dataset == range(case["n"])


@pytest.mark.parametrize("case", SPLITS["train_pipeline"])
def test_make_splits_holds_the_same_items_in_the_same_order_as_domainbed(case):
    def split():
        return splits.make_splits(
            Environments(*case["sizes"]), case["test_envs"], case["trial_seed"],
            case["holdout_fraction"], case["uda_holdout_fraction"])

    if not all(env["in"] and env["out"] for env in case["envs"]):
        with pytest.raises(ValueError, match="empty"):  # DomainBed stops too, when it loads them
            split()
        return
    for expected, in_, out, uda in zip(case["envs"], *split(), strict=True):
        assert flat(in_) == expected["in"]
        assert flat(out) == expected["out"]
        assert flat(uda or []) == expected["uda"]


@pytest.mark.parametrize("case", SPLITS["large"])
def test_split_dataset_agrees_on_the_sizes_of_real_data_sets(case):
    seed = seed_hash(case["trial_seed"], case["env"])
    for which, part in zip(("out", "in"),
                           splits.split_dataset(range(case["n"]), case["n_out"], seed)):
        assert len(part) == case[f"n_{which}"] and part.keys[:5] == case[f"{which}_head"]
        text = ",".join(map(str, part.keys))
        assert hashlib.sha256(text.encode()).hexdigest() == case[f"sha256_{which}"]


def test_a_split_of_a_split_refers_to_the_data_set_itself():
    data = [f"item {i}" for i in range(20)]
    _, rest = splits.split_dataset(data, 5, 0)
    part, _ = splits.split_dataset(rest, 4, 1)
    assert part.underlying_dataset is data
    assert set(flat(part)) <= set(flat(rest)) and len(part) == 4


def test_a_split_reads_items_only_when_asked():
    class Unreadable:
        def __len__(self):
            return 4

    first, _ = splits.split_dataset(Unreadable(), 2, 0)
    assert len(first) == 2


@pytest.mark.parametrize("holdout, uda, which", [
    (0, 0, "out-split of environment 0"), (0.2, 0, "out-split of environment 1"),
    (1, 0, "in-split of environment 0"), (0.5, 1, "in-split of environment 0")])
def test_an_empty_split_is_refused_by_name(holdout, uda, which):
    with pytest.raises(ValueError, match=which) as error:
        splits.make_splits(Environments(10, 4), [0], 0, holdout, uda)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fraction", [-0.5, 1.5])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        splits.make_splits(Environments(10), [], 0, fraction)


# Class weights.


def expected_weights(labels):
    share = {y: 1 / labels.count(y) / len(set(labels)) for y in labels}
    return torch.tensor([share[y] for y in labels])


def test_class_weights_give_each_class_the_same_mass():
    y = torch.tensor([0, 0, 0, 1, 4, 4, 0, 1])
    view, _ = splits.split_dataset(TensorDataset(torch.zeros(8, 1), y), 6, 3)
    before = global_streams()
    weights = splits.class_weights(view)
    assert global_streams() == before
    torch.testing.assert_close(weights, expected_weights(y[view.keys].tolist()))
    assert weights.dtype == torch.float32


@pytest.fixture
def folder(tmp_path):
    """Two domains of two classes of small random images, in ImageFolder's layout."""
    from PIL import Image

    colours = np.random.RandomState(0)
    for domain, label in itertools.product("ab", "xy"):
        path = tmp_path / "toy" / domain / label
        path.mkdir(parents=True)
        for i in range(8 if label == "x" else 4):
            Image.fromarray(colours.randint(0, 255, (24, 20, 3), dtype=np.uint8)).save(
                path / f"{i}.png")
    dataset = datasets.get_dataset_class("Folder:toy")
    return dataset(tmp_path, [1], {"data_augmentation": True, "image_size": 16})


def test_class_weights_draw_what_reading_augmented_images_draws(folder):
    view, _ = splits.split_dataset(folder[0], 12, 0)
    seed_everything(0)
    labels = [view[i][1] for i in range(len(view))]
    expected = peek()
    seed_everything(0)
    torch.testing.assert_close(splits.class_weights(view), expected_weights(labels))
    assert peek() == expected


def test_class_weights_do_not_read_images_that_are_not_augmented(folder):
    view, _ = splits.split_dataset(folder[1], 12, 0)
    labels = [view[i][1] for i in range(len(view))]
    folder[1].samples = None
    torch.testing.assert_close(splits.class_weights(view), expected_weights(labels))


# Indices.


def split_of_tensors(n):
    """A split whose item i is (i,)."""
    view, _ = splits.split_dataset(TensorDataset(torch.empty(n)), n, seed=1)
    view.underlying_dataset.tensors[0][view.keys] = torch.arange(n).float()
    return view


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['kind']}-{c['n']}-{c['num_workers']}-{bool(c['weights'])}")
@pytest.mark.parametrize("make", [range, split_of_tensors])
def test_loaders_draw_the_indices_of_domainbed_and_leave_its_random_stream(case, make):
    data = make(case["n"])
    torch.manual_seed(case["torch_seed"])
    if case["kind"] == "fast":
        loader = loaders.FastDataLoader(data, case["batch_size"], case["num_workers"])
    else:
        weights = torch.tensor(case["weights"]) if case["weights"] else None
        loader = loaders.InfiniteDataLoader(
            data, weights, case["batch_size"], case["num_workers"],
            replacement=case["kind"] == "infinite")
    assert peek() == case["rng_after_construction"]

    def numbers(batch):
        return (batch if isinstance(batch, torch.Tensor) else batch[0]).tolist()

    if case["kind"] == "fast":
        found = [[numbers(batch) for batch in loader] for _ in case["batches"]]
    else:
        found = [numbers(batch) for batch in itertools.islice(loader, len(case["batches"]))]
    assert found == case["batches"]
    assert peek() == case["rng_after"]


def test_slices_of_tensors_are_what_collating_items_gives():
    x, y = torch.randn(20, 2, 3), torch.randint(0, 5, (20,))
    view, _ = splits.split_dataset(TensorDataset(x, y), 15, 0)

    class Plain:
        """The same items, but not known to be tensors."""

        def __len__(self):
            return 15

        def __getitem__(self, i):
            return view[i]

    results = []
    for data in (view, Plain()):
        seed_everything(1)
        loader = loaders.InfiniteDataLoader(data, None, 4, 8)
        results.append([next(loader) for _ in range(9)] + [peek()])
    for (x1, y1), (x2, y2) in zip(results[0][:-1], results[1][:-1]):
        assert torch.equal(x1, x2) and torch.equal(y1, y2)
        assert (x1.dtype, y1.dtype, x1.shape) == (x2.dtype, y2.dtype, x2.shape)
    assert results[0][-1] == results[1][-1]


# Hangs.


def test_a_batch_larger_than_the_split_is_refused_where_domainbed_spins_for_ever():
    made = splits.make_splits(Environments(16, 16), [0], 0, 0.2)
    with pytest.raises(ValueError, match="The in-split of environment 1 holds 13 .* 64") as error:
        loaders.InfiniteDataLoader(made.in_[1], None, 64, 8)
    assert "\n" not in str(error.value)
    batch = next(loaders.InfiniteDataLoader(made.in_[1], None, 13, 8))
    assert len(batch) == 13


def test_weighted_batches_may_be_larger_than_the_split():
    loader = loaders.InfiniteDataLoader(range(3), torch.tensor([1.0, 0.0, 1.0]), 50, 8)
    assert set(next(loader).tolist()) == {0, 2}


def test_a_one_pass_loader_refuses_an_empty_data_set():
    with pytest.raises(ValueError, match="empty"):
        loaders.FastDataLoader(range(0), 64, 8)


def test_an_endless_loader_has_no_length():
    with pytest.raises(ValueError, match="no length"):
        len(loaders.InfiniteDataLoader(range(5), None, 2, 0))


@pytest.mark.parametrize("n, length", [(64, 1), (65, 2), (1, 1)])
def test_a_one_pass_loader_visits_each_item_once(n, length):
    loader = loaders.FastDataLoader(range(n), 64, 8)
    assert len(loader) == length
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == length
        assert sorted(torch.cat(batches).tolist()) == list(range(n))


def test_negative_numbers_of_workers_are_refused():
    with pytest.raises(ValueError, match="-1"):
        loaders.InfiniteDataLoader(range(5), None, 2, -1)


# Items that draw random numbers.


def torch_loader_batches(data, num_workers, n):
    """The first batches of an unweighted infinite loader, from torch's own worker processes."""
    class Repeated:
        def __init__(self, sampler):
            self.sampler = sampler

        def __iter__(self):
            while True:
                yield from self.sampler

    sampler = torch.utils.data.BatchSampler(
        torch.utils.data.RandomSampler(data, replacement=True), 3, drop_last=True)
    loader = iter(torch.utils.data.DataLoader(
        data, batch_sampler=Repeated(sampler), num_workers=num_workers))
    return [next(loader) for _ in range(n)]


def same(first, second):
    return all(torch.equal(a, b) for one, two in zip(first, second, strict=True)
               for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2, 8])
def test_random_items_are_those_that_torchs_worker_processes_make(num_workers):
    seed_everything(5)
    expected = torch_loader_batches(Noisy(10), num_workers, 19)
    left = peek()
    seed_everything(5)
    loader = loaders.InfiniteDataLoader(Noisy(10), None, 3, num_workers)
    assert same([next(loader) for _ in range(19)], expected)
    assert peek() == left


def test_workers_draw_from_streams_of_their_own():
    seed_everything(0)
    loader = loaders.InfiniteDataLoader(Noisy(10), None, 3, 8)
    python, numpy, _ = global_streams()
    for _ in range(9):
        next(loader)
    assert global_streams()[:2] == (python, numpy)


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(machine, "available", lambda: 64)


@pytest.mark.parametrize("processes", [1, 2, 3, 10])
def test_batches_do_not_depend_on_the_number_of_real_processes(processes, many_cores):
    results = []
    for n in (0, processes):
        seed_everything(5)
        with loaders.Readers(n) as readers:
            loader = loaders.InfiniteDataLoader(Noisy(10), None, 3, 8, readers)
            results.append([next(loader) for _ in range(19)])
        left = global_streams()
        results.append([[torch.tensor(part) for part in left[1:]]])
    assert same(results[0], results[2]) and same(results[1], results[3])


def test_a_thread_finishes_batches_in_order_and_ahead_of_need(many_cores):
    results, finished, main = [], [], threading.get_ident()

    def finish(batch):
        finished.append((batch[0].clone(), threading.get_ident()))
        return [part + 1 for part in batch]

    for n in (0, 3):
        seed_everything(5)
        with loaders.Readers(n, finish) as readers:
            loader = loaders.InfiniteDataLoader(Noisy(10), None, 3, 8, readers)
            results.append([next(loader) for _ in range(9)])
    plain, ahead = results
    assert len(finished) > 9  # what readers had in hand when the loader stopped, too
    for batch, more, (x, thread) in zip(plain, ahead, finished):
        assert torch.equal(batch[0], x) and thread != main
        assert all(torch.equal(part + 1, other) for part, other in zip(batch, more))


def test_loaders_in_turn_share_processes_and_keep_their_own_streams(folder, many_cores):
    results = []
    for n in (0, 4):
        seed_everything(5)
        with loaders.Readers(n) as readers:
            endless = [loaders.InfiniteDataLoader(domain, None, 3, 8, readers) for domain in folder]
            passes = loaders.FastDataLoader(folder[0], 5, 8, readers)
            found = []
            for _ in range(3):
                found += [next(loader) for _ in range(5) for loader in endless]
                found += list(passes)
        results.append([*found, [torch.get_rng_state()]])
    assert same(*results)


@pytest.mark.parametrize("processes", [0, 3])
def test_batches_that_are_read_apart_leave_the_loader_where_it_is(processes, many_cores):
    requests = [(loaders.Turn(100 + k, k % 3, None), [k, 2 * k, 9 - k]) for k in range(5)]
    wanted = [turn.read(Noisy(10), indices)[0] for turn, indices in requests * 2]
    found = {}
    for between in (False, True):
        seed_everything(5)
        with loaders.Readers(processes) as processes_that_read:
            loader = loaders.InfiniteDataLoader(Noisy(10), None, 3, 8, processes_that_read)
            first, apart = next(loader), []
            if between:
                before = global_streams()
                apart = [batch for _ in range(2) for batch in loader.read_apart(requests)]
                assert same(apart, wanted) and global_streams() == before
            found[between] = [first, *(next(loader) for _ in range(9))]
    assert same(found[False], found[True])


def test_processes_are_no_more_than_the_cores_and_start_when_a_batch_is_asked_for(monkeypatch):
    monkeypatch.setattr(machine, "available", lambda: 2)
    before = set(multiprocessing.active_children())
    with loaders.Readers(8) as readers:
        made = [loaders.InfiniteDataLoader(Noisy(10), None, 3, 8, readers) for _ in range(5)]
        assert set(multiprocessing.active_children()) == before
        for loader in made:
            next(loader)
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert set(multiprocessing.active_children()) == before


class Noted(Noisy):
    """Items that leave a byte each in a file when they are read."""

    def __init__(self, n, path):
        super().__init__(n)
        self.path = path

    def __getitem__(self, i):
        with self.path.open("ab") as file:
            file.write(bytes([i]))
        return super().__getitem__(i)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_pass_reads_each_item_once_and_nothing_of_the_next_pass(processes, tmp_path, many_cores):
    with loaders.Readers(processes) as readers:
        loader = loaders.FastDataLoader(Noted(23, tmp_path / "read"), 4, 8, readers)
        for n in (1, 2):
            list(loader)
            assert sorted((tmp_path / "read").read_bytes()) == sorted([*range(23)] * n)


def test_processes_that_read_end_when_their_run_is_killed(tmp_path):
    code = ("import os, signal, sys, torch\n"
            "from domainbed_kd import machine\n"
            "from domainbed_kd.run import loaders\n"
            "machine.available = lambda: 3\n"
            "class Numbers:\n"
            "    def __len__(self): return 9\n"
            "    def __getitem__(self, i): return torch.tensor(os.getpid())\n"
            "readers = loaders.Readers(3)\n"
            "loader = loaders.InfiniteDataLoader(Numbers(), None, 2, 8, readers)\n"
            "found = {n for _ in range(40) for n in next(loader).tolist()}\n"
            "print(*found, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n")
    # The pipe closes when the last process has ended that inherited it.
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=120)
    assert killed.returncode == -signal.SIGKILL and killed.stdout.split()


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_is_killed_is_said_and_the_others_end(which, many_cores):
    before = set(multiprocessing.active_children())
    with pytest.raises(ChildProcessError, match="A loader process ended early. The same command"):
        with loaders.Readers(2) as readers:
            loader = loaders.FastDataLoader(Noisy(40), 4, 8, readers)
            list(loader)  # all are idle: one holds the lock of what is asked for, one waits for it
            processes = sorted(set(multiprocessing.active_children()) - before,
                               key=lambda process: process.pid)
            too_late = threading.Timer(60, processes[1 - which].kill)
            too_late.start()
            processes[which].kill()
            while True:
                list(loader)
    assert too_late.is_alive(), "it waited for the other process, which never ended"
    too_late.cancel()
    assert set(multiprocessing.active_children()) == before


# Batches of a few classes.


def naive_groups(labels, groups, batch_size, k):
    """The items of batch k, one after another."""
    stream = torch.Generator().manual_seed(groups.seed + k)
    order = torch.randperm(len(groups.classes), generator=stream).tolist()
    batch = []
    for place, which in enumerate(order[:groups.n]):
        own, left = [i for i, y in enumerate(labels) if y == groups.classes[which]], []
        for _ in range(batch_size // groups.n + (place < batch_size % groups.n)):
            left = left or [own[j] for j in torch.randperm(len(own)).tolist()]
            batch.append(left.pop(0))
    return batch


class Labelled:
    """Items whose image is their number."""

    def __init__(self, labels):
        self.targets = labels

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return i, self.targets[i]


def split_of(labels):
    return splits.SplitDataset(Labelled(labels), range(len(labels)), "")


LABELS = [0] * 9 + [1] * 2 + [3] * 7 + [8] * 5


@pytest.mark.parametrize("n, batch_size, num_workers", [(1, 6, 8), (2, 6, 0), (3, 8, 2), (3, 3, 8)])
def test_batches_of_class_groups_are_those_of_a_naive_loop(n, batch_size, num_workers):
    groups = splits.Groups(n, [0, 1, 8], 77)
    seed_everything(1)
    loader = loaders.InfiniteDataLoader(split_of(LABELS), None, batch_size, num_workers,
                                        groups=groups)
    drawn = [next(loader)[0].tolist() for _ in range(20)]
    seed_everything(1)
    torch.empty((), dtype=torch.int64).random_()  # the workers' seed
    assert drawn == [naive_groups(LABELS, groups, batch_size, k) for k in range(20)]


def test_every_domain_has_the_same_classes_in_equal_shares_and_no_image_twice():
    others = [8] * 6 + [0] * 6 + [1] * 6 + [3] * 6 + [2] * 30
    groups = splits.class_groups([split_of(LABELS), split_of(others)], 3, 8)
    assert groups.classes == [0, 1, 3, 8]  # 2 is not in both
    pair = [loaders.InfiniteDataLoader(split_of(labels), None, 8, workers, groups=groups)
            for labels, workers in ((LABELS, 8), (others, 0))]
    seen, counts = [set(), set()], dict.fromkeys(groups.classes, 0)
    for _ in range(400):
        batches = [[part.tolist() for part in next(loader)] for loader in pair]
        assert batches[0][1] == batches[1][1]  # labels, in order
        assert sorted(batches[0][1].count(y) for y in set(batches[0][1])) == [2, 3, 3]
        assert len(set(batches[1][0])) == 8
        for found, (items, _) in zip(seen, batches):
            found |= set(items)
        for y in set(batches[0][1]):
            counts[y] += 1
    assert seen == [set(range(len(LABELS))), set(range(24))]
    assert all(abs(count - 300) < 4 * (400 * 0.75 * 0.25) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("n", [0, 5, 2.0, True, "2"])
def test_what_is_no_number_of_classes_is_refused_in_one_line(n):
    with pytest.raises(ValueError, match="takes a whole number from 1 to 4, as batch_size is 8"):
        splits.class_groups([split_of(LABELS)], n, 8)


def test_labels_are_known_without_reading_augmented_images(folder):
    view, _ = splits.split_dataset(folder[0], 12, 0)
    expected = [view[i][1] for i in range(len(view))]
    folder[0].samples = None
    assert splits.labels(view) == expected


# Restarts.


def make_loader(kind, data, readers=None, num_workers=8):
    weights = torch.linspace(0, 1, len(data)) if kind == "weighted" else None
    if kind == "one pass":
        loader = loaders.FastDataLoader(data, 4, num_workers, readers)
        return loader, itertools.chain.from_iterable(itertools.repeat(loader))
    groups = splits.Groups(2, [0, 1], 5) if kind == "groups" else None
    if groups:
        data = splits.SplitDataset(data, range(len(data)), "")
    loader = loaders.InfiniteDataLoader(data, weights, 4, num_workers, readers,
                                        replacement=kind != "without replacement", groups=groups)
    return loader, loader


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "kind", ["uniform", "weighted", "groups", "without replacement", "one pass"])
@pytest.mark.parametrize("before, after, num_workers, n", [
    (0, 0, 8, 0), (0, 0, 8, 6), (0, 0, 8, 21), (0, 0, 0, 6), (0, 0, 0, 0), (2, 0, 8, 7),
    (0, 4, 8, 7), (2, 2, 8, 0), (4, 2, 8, 9)])
def test_a_restarted_loader_goes_on_with_the_same_batches(kind, before, after, num_workers, n,
                                                          many_cores):
    data = Noisy(9)
    seed_everything(2)
    with loaders.Readers(before) as readers:
        loader, batches = make_loader(kind, data, readers, num_workers)
        for _ in range(n):
            next(batches)
        state, left = through_a_file(loader.state_dict()), [
            torch.get_rng_state(), random.getstate(), np.random.get_state()]
        expected = [next(batches) for _ in range(20)]
    with loaders.Readers(after) as readers:
        assert same(continued(kind, data, readers, num_workers, state, left), expected)


def continued(kind, data, readers, num_workers, state, left):
    """20 batches of a loader that goes on from a state, with the global streams `left`."""
    seed_everything(77)
    loader, batches = make_loader(kind, data, readers, num_workers)
    next(batches)
    loader.load_state_dict(state)
    if kind == "one pass":  # the rest of the pass that was cut short is the first of the new one
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
    torch.set_rng_state(left[0])
    random.setstate(left[1])
    np.random.set_state(left[2])
    return [next(batches) for _ in range(20)]
