"""Whatever bytes stand in a sweep's folder: a line each on what is skipped, and the rest counts."""

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_records import line, write

from domainbed_kd.results import logits, records
from domainbed_kd.scripts import collect_results, list_top_hparams

quick = settings(max_examples=60, deadline=None, derandomize=True,
                 suppress_health_check=list(HealthCheck))
numbers = st.one_of(
    st.integers(-2, 2), st.floats(), st.sampled_from([10 ** 30, 10 ** 400, 2 ** 63, 400_000_000]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3),
                            st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=6)
names = st.one_of(st.sampled_from([
    "args", "hparams", "step", "selection", "teacher", "env0_in_acc", "env1_out_acc", "env9_in_acc",
    "fd_env0_in_acc", "step_time", "diagnostics", "run", "selected", "args.test_envs"]),
    st.text(max_size=6))
args_names = st.sampled_from([
    "dataset", "algorithm", "test_envs", "trial_seed", "hparams_seed", "steps", "hparams", "fast",
    "task", "data_dir", "output_dir", "teacher"])


@st.composite
def damaged(draw):
    """A record with parts of it replaced, added or taken away."""
    record = json.loads(line(step=draw(st.integers(0, 20))))
    for name in draw(st.lists(args_names, max_size=2)):
        record["args"][name] = draw(values)
    for name in draw(st.lists(names, max_size=2)):
        record[name] = draw(values)
    record["hparams"] = draw(st.one_of(st.just(record["hparams"]), values))
    for name in draw(st.lists(st.sampled_from(list(record)), max_size=1)):
        del record[name]
    return json.dumps(record).encode("utf-8", "surrogatepass")


lines = st.lists(st.one_of(damaged(), st.binary(max_size=40), st.just(line(10).encode())),
                 max_size=4)


@contextlib.contextmanager
def sweep(content: list[bytes]):
    """A folder with a whole run and one of these lines, and what is said on stdout and stderr."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(
            io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        folder = Path(name)
        write(folder / "whole", line(0, trial_seed=1), line(10, trial_seed=1))
        (folder / "odd").mkdir()
        (folder / "odd" / "results.jsonl").write_bytes(b"\n".join(content))
        yield folder, out, err


@quick
@given(lines)
def test_tables_are_made_of_what_is_sound_and_the_rest_is_one_line(content):
    with sweep(content) as (folder, out, err):
        for flags in ([], ["--latex"], ["--format", "csv"], ["--format", "markdown"]):
            assert collect_results.main(["--input_dir", str(folder), *flags]) == 0
        skipped = [text for text in err.getvalue().splitlines() if text.startswith("skipped")]
    assert len(skipped) in (0, 4)
    assert out.getvalue().count("VLCS") > 4


@pytest.mark.parametrize("name", ['"', "\\", "\x1f", "", "a\nb", "\u00e9"])
def test_a_record_counts_whatever_its_other_entries_are_called(name, tmp_path):
    record = json.loads(line(10)) | {name: None}
    write(tmp_path / "run", json.dumps(record))
    assert len(list(records.Folder(tmp_path).curves())) == 1


@quick
@given(lines)
def test_a_frame_has_the_records_that_the_tables_have(content):
    assume(not re.search(rb"\d{19}", b"".join(content)))  # a frame refuses such integers
    with sweep(content) as (folder, _, _):
        of_tables = [r["step"] for c in records.Folder(folder).curves() for r in c.records()]
        assert logits.to_frame(folder)["step"].tolist() == of_tables


@quick
@given(lines)
def test_top_hparams_are_listed_whatever_stands_beside_them(content):
    with sweep(content) as (folder, out, _):
        list_top_hparams.main(["--input_dir", str(folder), "--dataset", "VLCS", "--algorithm",
                               "ERM", "--test_env", "0"])
    assert out.getvalue().startswith("Total records: ")


@quick
@given(st.binary(max_size=200), st.sampled_from(["args.json", "out.txt", "failed", "sweep.json"]))
def test_a_runs_other_files_may_hold_anything(content, name):
    with sweep([]) as (folder, _, _):
        for run in ("odd", "whole"):
            (folder / run / name).write_bytes(content)
        (folder / "sweep.json").write_bytes(content)
        (folder / "odd" / "results.jsonl").unlink()
        assert collect_results.main(["--input_dir", str(folder)]) == 0
