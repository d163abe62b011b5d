import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from domainbed_kd.folder import claims


@pytest.fixture
def other_machine(monkeypatch):
    """A switch: inside it, this process is on a machine that does not see the first one's locks."""
    @contextlib.contextmanager
    def switch():
        with monkeypatch.context() as patch:
            patch.setattr(claims, "_boot", lambda: "another boot")
            patch.setattr(claims, "_lock", lambda file, kind: True)
            yield

    monkeypatch.setattr(claims, "SETTLE_S", 0)
    return switch


def test_a_folder_is_held_by_one_at_a_time_and_free_afterwards(tmp_path):
    assert claims.holder(tmp_path) is None
    with claims.held(tmp_path):
        assert claims.holder(tmp_path) == os.uname().nodename
        with pytest.raises(ValueError, match="Another process trains in"):
            with claims.held(tmp_path, wait_s=0):
                pass
    assert claims.holder(tmp_path) is None and os.listdir(tmp_path) == ["out.txt"]
    with claims.held(tmp_path, wait_s=0):
        pass


def test_a_killed_process_frees_its_folder_at_once_on_its_machine(tmp_path):
    code = ("import sys, time; from pathlib import Path; from domainbed_kd.folder import claims\n"
            "with claims.held(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert claims.holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "heartbeat").exists() and claims.holder(tmp_path) is None
    with claims.held(tmp_path, wait_s=0):
        assert json.loads((tmp_path / "heartbeat").read_text())["pid"] == os.getpid()


def test_a_machine_that_does_not_see_the_lock_sees_the_heartbeat(tmp_path, other_machine):
    with claims.held(tmp_path), other_machine():
        assert claims.holder(tmp_path) == os.uname().nodename
        with pytest.raises(ValueError, match="Another process"), claims.held(tmp_path, wait_s=0):
            pass
    with other_machine():
        assert claims.holder(tmp_path) is None


def test_the_heartbeat_of_a_dead_machine_expires(tmp_path, other_machine):
    (tmp_path / "out.txt").touch()
    beat = tmp_path / "heartbeat"
    beat.write_text('{"host": "lost", "boot": "earlier", "pid": 1}')
    assert claims.holder(tmp_path) == "lost"
    with pytest.raises(ValueError, match="on lost"), claims.held(tmp_path, wait_s=0):
        pass
    late = time.time() - claims.STALE_S - 1
    os.utime(beat, (late, late))
    assert claims.holder(tmp_path) is None
    with claims.held(tmp_path, wait_s=0):
        assert json.loads(beat.read_text())["pid"] == os.getpid()
    assert not beat.exists()


def test_a_heartbeat_from_the_future_is_stale_beyond_what_clocks_may_differ(
        tmp_path, other_machine):
    (tmp_path / "out.txt").touch()
    beat = tmp_path / "heartbeat"
    beat.write_text('{"host": "ahead", "boot": "earlier", "pid": 1}')
    now = time.time()
    os.utime(beat, (now + claims.STALE_S / 2,) * 2)
    assert claims.holder(tmp_path) == "ahead"
    with pytest.raises(claims.Busy, match=f"delete {beat}"), claims.held(tmp_path, wait_s=0):
        pass
    os.utime(beat, (now + 10 * claims.STALE_S,) * 2)
    assert claims.holder(tmp_path) is None
    with claims.held(tmp_path, wait_s=0):
        assert json.loads(beat.read_text())["pid"] == os.getpid()


def test_who_takes_over_a_stale_heartbeat_second_loses(tmp_path, other_machine, monkeypatch):
    beat = tmp_path / "heartbeat"
    beat.write_text('{"host": "lost", "boot": "earlier", "pid": 1}')
    os.utime(beat, (0, 0))
    # While this process settles, another one that saw the same stale file replaces it.
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: beat.write_text(
        '{"host": "quicker", "boot": "theirs", "pid": 2}'))
    with pytest.raises(ValueError, match="on quicker"), claims.held(tmp_path, wait_s=0):
        pass
    assert "quicker" in beat.read_text()


def test_where_files_cannot_be_locked_the_heartbeat_holds_on_one_machine_too(
        tmp_path, monkeypatch):
    def no_locks(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    with claims.held(tmp_path):
        assert claims.holder(tmp_path) == os.uname().nodename
        with pytest.raises(ValueError, match="Another process"), claims.held(tmp_path, wait_s=0):
            pass
    assert claims.holder(tmp_path) is None


def test_the_heartbeat_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    with claims.held(tmp_path):
        os.utime(tmp_path / "heartbeat", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / "heartbeat").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_damaged_heartbeat_counts_until_it_is_stale(tmp_path):
    (tmp_path / "out.txt").touch()
    for content in ("", "{", "[]", "{}"):
        (tmp_path / "heartbeat").write_text(content)
        assert claims.holder(tmp_path) == "another machine"
    os.utime(tmp_path / "heartbeat", (0, 0))
    assert claims.holder(tmp_path) is None
