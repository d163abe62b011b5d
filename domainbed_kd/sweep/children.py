"""Jobs as children of a fork server, which imports torch once and may itself be killed.

No child can use a GPU if the server has asked CUDA anything; see scripts/_warm.py. A process needs
seconds to start on a GPU, so one that has started runs job after job, until one fails.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator

from domainbed_kd import console
from domainbed_kd.folder import claims

# The command that the fork server speeds up, and what the server imports.
WARM_MODULE, PRELOAD = "domainbed_kd.scripts.train", ["domainbed_kd.scripts._warm"]
# How long a job may take to save its state when the sweep is interrupted.
GRACE_S = 10
# Flags of jobs whose process takes no further job.
END_THEIR_PROCESS = {"--plugin", "--fork"}
# The exit status that multiprocessing reports if the fork server died first.
UNKNOWN = 255
# How often a job is continued after its fork server died.
MAX_LOST = 5


def is_warm(argv: list[str]) -> bool:
    """Whether the fork server speeds a command up."""
    return argv[:3] == [sys.executable, "-m", WARM_MODULE]


def context(is_warm: bool):
    """Multiprocessing with a fork server, which imports what runs need if it is to be warm."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD if is_warm else [])
    return found


def start_server() -> None:
    """Starts the fork server, which begins to import, if it is not running."""
    # Ctrl-C reaches the whole group. Jobs ignore it: this process tells them to save.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if _in_main_thread():
            signal.signal(signal.SIGINT, previous)


def start(context, argv: list[str], environment: dict, threads: int | None, errors: str | None
          ) -> tuple:
    """Starts a job as a child of the fork server, and the server if it is not running.

    Returns:
        The process and a connection to it. It sends None when the job is done and it would take
        another; see `employ` and `dismiss`.

    Raises:
        OSError: if the server dies again and again.
    """
    for i in range(MAX_LOST):
        jobs, to_child = context.Pipe()
        process = context.Process(target=_work, args=(jobs, environment, threads))
        with contextlib.suppress(EOFError, OSError), jobs:
            start_server()
            process.start()
            # A child that the server forked just before it died gets no job, and ends.
            to_child.send((argv, errors))
            return process, to_child
        to_child.close()
        time.sleep(0.1 * 2 ** i)  # until the system says that the server is dead
    raise OSError("The server that starts jobs died several times. If this machine runs out of "
                  "memory, lower --jobs_per_device.")


def would_take_another(jobs) -> bool:
    """Whether the process at the other end, which has sent something, waits for another job."""
    try:
        return jobs.recv() is None
    except (EOFError, OSError):
        return False


def employ(worker: tuple | None, argv: list[str], errors: str | None) -> tuple | None:
    """Gives a waiting process this job and returns it; None if no process waits or can run it."""
    if worker and is_warm(argv):
        with contextlib.suppress(OSError):
            worker[1].send((argv, errors))
            return worker
    return worker and dismiss(worker)


def dismiss(*workers: tuple) -> None:
    """Tells waiting processes to end, and waits until they have."""
    for _, jobs in workers:
        with jobs, contextlib.suppress(OSError):
            jobs.send((None, None))
    for process, _ in workers:  # leaving a GPU takes a while, so all leave together
        process.join()


def is_orphan(process) -> bool:
    """Whether a job only seems to have ended, as its fork server died."""
    process.join()
    return process.exitcode == UNKNOWN and _is_alive(process.pid)


def stop_orphans(processes: list) -> None:
    """Stops jobs whose fork server died, as their exit statuses are lost; they save first."""
    for process in processes:
        process.join()  # returns at once: the server is dead
    orphans = [process.pid for process in processes if process.exitcode == UNKNOWN]
    with console.lifted():
        print(f"The server that starts jobs died. Its {len(orphans)} jobs are interrupted, and "
              "continue with a new one.", file=sys.stderr)
    _end(orphans)
    _wait_for(orphans)


def _end(pids: list[int]) -> None:
    """Tells jobs to save and end; after GRACE_S seconds kills them and what they started."""
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        _wait_for(pids)
    finally:
        for pid in pids:
            # Each job leads a process group, which outlives it if it left workers behind.
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)


def _wait_for(pids: list[int]) -> None:
    """Waits until processes have ended, for GRACE_S seconds at most."""
    deadline = time.monotonic() + GRACE_S
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    """Whether a process, which need not be our child, is alive."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return not os.path.exists("/proc/self/stat")  # without /proc a zombie cannot be told


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM and a hang-up act as Ctrl-C does."""
    previous = {}
    if _in_main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                previous[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop(processes: list) -> None:
    """Stops jobs, which save first."""
    if not processes:
        return
    print(f"Stopping {len(processes)} jobs. Ctrl-C again kills them at once.", file=sys.stderr)
    try:
        _end([process.pid for process in processes])
    finally:
        for process in processes:
            process.join()


def _work(jobs, environment: dict, threads: int | None) -> None:
    """Runs a job in a child of the fork server, and then perhaps others."""
    os.setpgid(0, 0)
    try:
        argv, errors = jobs.recv()
    except EOFError:
        sys.exit(claims.STOPPED)
    os.environ.clear()
    os.environ.update(environment)
    _print_to(errors)
    if not is_warm(argv):
        jobs.close()
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            print(f"error: {argv[0]}: {error.strerror}", file=sys.stderr)
            sys.exit(127)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads:
        import torch

        torch.set_num_threads(threads)
    while True:
        sys.argv = argv[2:]
        try:
            runpy.run_module(WARM_MODULE, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise
        if not has_begun_with_gpu() or END_THEIR_PROCESS & set(argv):
            return
        jobs.send(None)
        try:
            argv, errors = jobs.recv()
        except EOFError:  # the sweep has died
            return
        if argv is None:
            return
        _print_to(errors)
        _forget()


def has_begun_with_gpu() -> bool:
    """Whether this process has started on a GPU."""
    import torch

    return torch.cuda.is_initialized()


def _forget() -> None:
    """Frees the last job's memory and resets its peak."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _print_to(errors: str | None) -> None:
    """Redirects stderr to a file, if one is given, and drops stdout."""
    if errors:
        for number, path in ((1, os.devnull), (2, errors)):
            file = os.open(path, os.O_WRONLY)
            os.dup2(file, number)
            os.close(file)


def _end_with_parent() -> None:
    """Ends the job, which saves first, when the sweep's process dies, even by SIGKILL."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
