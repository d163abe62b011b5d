"""No shell, no eval, no foreign pickles, nothing fetched without TLS, in any file of ours."""

import ast
import os
import random
import re
import tarfile
import zipfile

import pytest
from conftest import ROOT

from domainbed_kd import datasets
from domainbed_kd.datasets import archives, sources

FILES = sorted([*(ROOT / "domainbed_kd").rglob("*.py"), *(ROOT / "tools").glob("*.py")])

# What runs code or shells out whatever its arguments; `pickle.UnpicklingError` is only a name.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load",
    "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads", "shelve.open",
    "yaml.load", "yaml.unsafe_load", "pandas.read_pickle", "torch.hub.load", "tempfile.mktemp",
    "shutil.unpack_archive", "ssl._create_unverified_context", "subprocess.getoutput"}
# DINOv2 is its authors' code, over TLS, for those who ask for it by hparam, as in DomainBed.
EXCEPTIONS = {("torch.hub.load", "facebookresearch/dinov2")}
# A trial of a fork loads what the fork's own code has just written in a copy of it: SWAD and MIRO
# keep paths and objects of their configuration there. The pages' tool compiles the lambdas of our
# own files to tell them apart.
ALLOWED = {"domainbed_kd/plugin/_child.py": "torch.load",
           "domainbed_kd/plugin/trials.py": "torch.load", "tools/method_pages.py": "compile"}
# Calls that are safe with one argument only.
DEMANDED = {"torch.load": ("weights_only", True), "tar.extractall": ("filter", "data")}
REFUSED = {"shell": True, "allow_pickle": True, "verify": False, "trust_remote_code": True}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source, allowed=None):
    """What a file does that it must not, as lines; `allowed` names a call that it may make."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name == allowed:
                continue
            given = {k.arg: k.value.value for k in node.keywords
                     if isinstance(k.value, ast.Constant)}
            first = node.args[0].value if node.args and isinstance(
                node.args[0], ast.Constant) else None
            if name in FORBIDDEN and (name, first) not in EXCEPTIONS:
                yield f"line {node.lineno}: {name}"
            keyword, value = DEMANDED.get(name, (None, None))
            if keyword and given.get(keyword) != value:
                yield f"line {node.lineno}: {name} without {keyword}={value!r}"
            yield from (f"line {node.lineno}: {k}={v}" for k, v in REFUSED.items()
                        if given.get(k) is v)
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: bare except"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.match(r"(http|ftp)://(?!localhost|127\.)\S+\.", node.value):
                yield f"line {node.lineno}: {node.value}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_does_what_runs_foreign_code(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix())
    assert not list(dangers(path.read_text(encoding="utf-8"), allowed))


@pytest.mark.parametrize("source", [
    "eval('1')", "os.system('ls')", "subprocess.run('ls', shell=True)", "pickle.load(f)",
    "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
    "tar.extractall(d)", "requests.get(u, verify=False)", "u = 'http://a.org/b.zip'",
    "try: f()\nexcept: pass"])
def test_the_check_finds_each_kind(source):
    assert list(dangers(source))


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..\\out", "C:\\out"])
def test_no_archive_writes_outside_its_folder(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(name, "bad")
    with pytest.raises(ValueError, match="outside"):
        archives.unpack(tmp_path / "x.zip", folder)
    if "\\" not in name:
        (tmp_path / "content").write_text("bad")
        with tarfile.open(tmp_path / "x.tar", "w") as file:
            file.add(tmp_path / "content", arcname="link")
            member = file.gettarinfo(tmp_path / "content")
            member.name = name
            file.addfile(member, (tmp_path / "content").open("rb"))
        if name == "/tmp/out":  # tar's filter makes it relative, as tar does
            archives.unpack(tmp_path / "x.tar", folder)
        else:
            with pytest.raises(ValueError, match="outside"):
                archives.unpack(tmp_path / "x.tar", folder)
    assert sorted(os.listdir(tmp_path)) == sorted(
        {"in", "x.zip", *(["x.tar", "content"] if "\\" not in name else [])})


def test_a_link_in_an_archive_does_not_lead_outside(tmp_path):
    (tmp_path / "in").mkdir()
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "../../secret"
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.addfile(link)
    with pytest.raises(ValueError, match="outside"):
        archives.unpack(tmp_path / "x.tar", tmp_path / "in")
    assert os.listdir(tmp_path / "in") == []


def test_damaged_archives_are_refused_in_a_line(tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", "b" * 1000)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as file:
        file.add(tmp_path / "x.zip", arcname="a")
    for name in ("x.zip", "x.tar.gz"):
        whole = (tmp_path / name).read_bytes()
        for seed in range(100):
            r = random.Random(seed)
            damaged = bytearray(whole[:r.randrange(1, len(whole) + 1)])
            for _ in range(r.randrange(4)):
                damaged[r.randrange(len(damaged))] = r.randrange(256)
            (tmp_path / name).write_bytes(damaged)
            try:
                archives.unpack(tmp_path / name, tmp_path / "in")
            except (ValueError, OSError, NotImplementedError) as error:
                assert "\n" not in str(error), seed


def test_every_download_is_over_tls():
    assert sources.TERRA_URL.startswith("https://")
    assert all(datasets.facts(name).SOURCE.page.startswith("https://") for name in sources.known())
