import json
import os
import socket
import threading

import pytest

from domainbed_kd.folder import args, claims, files
from domainbed_kd.folder.foreign import parse_json

ARGS = {"dataset": "VLCS", "algorithm": "ERM", "test_envs": [0], "trial_seed": 0,
        "hparams_seed": 0}


def in_time(function, *values):
    """What a function returns or raises; a failure if it takes five seconds."""
    found = []

    def call():
        try:
            found.append(function(*values))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(5)
    assert found, "it hangs"
    return found[0]


@pytest.mark.parametrize("text, found", [
    ('{"a": [1, -2.5, null, true, "b"]}', {"a": [1, -2.5, None, True, "b"]}),
    ("Infinity", float("inf")), ("[" * 40 + "]" * 40, None)])
def test_json_within_bounds_is_read(text, found):
    assert parse_json(text) == (found if found is not None else json.loads(text))


@pytest.mark.parametrize("text", [
    "[" * 10000 + "]" * 10000, "[" * 10000, '{"a": ' * 60 + "1" + "}" * 60, "1" + "0" * 400,
    "1" + "0" * 10000, '"\\ud800"', '{"\\ud800": 1}', "", "{", b"\xff\xfe", b"\x00" * 100])
def test_json_that_no_reader_could_bear_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.fixture(params=["fifo", "socket", "device", "folder", "link to a FIFO"])
def irregular(request, tmp_path):
    """Makes a path something that is not a regular file."""
    def make(path):
        if request.param == "fifo":
            os.mkfifo(path)
        elif request.param == "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        elif request.param == "folder":
            path.mkdir()
        else:
            os.mkfifo(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
    return make


@pytest.mark.parametrize("name, read, expected", [
    (files.RESULTS, files.last_record, None), (files.RESULTS, files.steps_done, 0),
    (files.ARGS, files.planned_args, None), (files.OUT, files.planned_args, None),
    (files.ERR, files.last_error, ""), (files.MEMORY, files.cost, {}),
    (files.MEMORY, files.divergence, None), (files.OUT, claims.holder, None)])
def test_what_is_not_a_regular_file_is_not_read_and_holds_nobody_up(
        irregular, name, read, expected, tmp_path):
    (tmp_path / "run").mkdir()
    irregular(tmp_path / "run" / name)
    assert in_time(read, tmp_path / "run") == expected


def test_what_is_not_a_regular_file_is_not_written_to_and_holds_nobody_up(irregular, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (files.ARGS, files.FAILED, files.OUT, files.HEARTBEAT):
        if not (tmp_path / "elsewhere").exists():
            irregular(run / name)
    in_time(files.leave_args, run, ARGS)
    in_time(files.note_failure, run, "why")
    in_time(files.failure, run)

    def hold():
        with claims.held(run, 0):
            pass

    assert "is not a regular file. Delete it" in str(in_time(hold))


def test_a_run_that_is_refused_for_an_irregular_file_says_so_in_its_folder(tmp_path):
    os.mkfifo(tmp_path / files.RESULTS)
    with pytest.raises(ValueError, match="not a regular file"), claims.held(tmp_path):
        pass
    assert "results.jsonl is not a regular file" in files.failure(tmp_path)


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "elsewhere").write_text(json.dumps(ARGS))
    (tmp_path / files.ARGS).symlink_to(tmp_path / "elsewhere")
    assert files.planned_args(tmp_path) == ARGS


@pytest.mark.parametrize("envs", [[400_000_000], [-1], [], [0, 0], [1.5], "0", None, {}])
def test_test_envs_that_no_dataset_has_tell_nothing(envs):
    assert args.are_args(ARGS) and not args.are_args(ARGS | {"test_envs": envs})


@pytest.mark.parametrize("padding", [1, 100_000, 300_000])
def test_the_last_whole_record_is_found_from_the_end(tmp_path, padding):
    path = tmp_path / files.RESULTS
    assert files.last_record(tmp_path) is None and files.steps_done(tmp_path) == 0
    lines = [json.dumps({"step": step, "args": ARGS, "x": "x" * padding}) for step in (0, 4)]
    path.write_text("\n".join(lines))  # the second is being written
    assert files.steps_done(tmp_path) == 1
    path.write_text("\n".join(lines) + "\n" + '{"torn')
    assert files.steps_done(tmp_path) == 5 and files.first_args(tmp_path) == ARGS
    path.write_text("\n".join([*lines, "damaged", '{"step": "six"}', ""]))
    assert files.steps_done(tmp_path) == 5


def test_progress_costs_the_same_however_long_the_file_is(tmp_path):
    line = json.dumps({"step": 3, "x": "x" * 1000}) + "\n"
    (tmp_path / files.RESULTS).write_text(line * 20_000)
    n_read, read = [], files.io.FileIO.read

    class Counted(files.io.FileIO):
        def read(self, size=-1):
            n_read.append(size)
            return read(self, size)

    def counted(path):
        return Counted(path)

    original, files.open_regular = files.open_regular, counted
    try:
        assert files.steps_done(tmp_path) == 4
    finally:
        files.open_regular = original
    assert sum(n_read) <= 2**16


@pytest.mark.parametrize("text", ["[" * 10000, '{"seconds": 1' + "0" * 400 + "}", "[1]", "",
                                  '{"seconds": "\\ud800"}', '{"steps": -1}', '{"steps": NaN}',
                                  '{"steps": 2}', '{"seconds": 1.5}'])
def test_a_damaged_memory_json_tells_nothing(text, tmp_path):
    (tmp_path / files.MEMORY).write_text(text)
    assert files.cost(tmp_path) == {} and files.divergence(tmp_path) is None


def test_a_finished_run_tells_what_it_did_not_keep(tmp_path):
    wanted = {"save_logits": True, "diagnostics": True, "format": "safetensors"}
    (tmp_path / files.RESULTS).write_text(json.dumps({"step": 0}) + "\n")
    assert files.lacks(tmp_path, {}) == []
    assert files.lacks(tmp_path, wanted) == ["save_logits", "format", "diagnostics"]
    (tmp_path / files.LOGITS).mkdir()
    (tmp_path / files.SAFETENSORS).touch()
    (tmp_path / files.RESULTS).write_text(json.dumps({"step": 0, "diagnostics": {}}) + "\n")
    assert files.lacks(tmp_path, wanted) == []
