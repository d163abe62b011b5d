import contextlib
import functools
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
import threading
import types
import urllib.error
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from domainbed_kd import datasets
from domainbed_kd.datasets import archives, counts, sources
from domainbed_kd.scripts import download

CONTENT = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    """Serves `files` {path: bytes}, honours Range, and can break off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requested, self.break_after, self.ranges = {}, [], None, True

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        span = self.headers.get("Range")
        self.server.requested.append((self.path, span))
        content = self.server.files.get(self.path[1:])
        if content is None:
            return self.send_error(404)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and self.server.ranges else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:self.server.break_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with contextlib.closing(Server()) as server:
        server.close = server.server_close
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.files["data.bin"] = CONTENT
        yield server
        server.shutdown()
        thread.join()


def images(folder: Path, domain: str, counts: dict):
    for label, n in counts.items():
        (folder / domain / label).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (folder / domain / label / f"{i}.jpg").touch()


# Fetching.


def test_a_file_is_fetched_whole_and_leaves_no_part(server, tmp_path):
    archives.fetch_url(server.url("data.bin"), tmp_path / "data.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["data.bin"]
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_broken_download_is_refused_and_goes_on_where_it_broke_off(server, tmp_path):
    server.break_after = 3000
    with pytest.raises(OSError, match="broke off after 3000 of 10240 bytes. Run the same command"):
        archives.fetch_url(server.url("data.bin"), tmp_path / "data.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["data.bin.part"]

    server.break_after = None
    archives.fetch_url(server.url("data.bin"), tmp_path / "data.bin")
    assert server.requested == [("/data.bin", None), ("/data.bin", "bytes=3000-")]
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_server_that_cannot_resume_is_read_from_the_start(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(b"something else")
    server.ranges = False
    archives.fetch_url(server.url("data.bin"), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(2 * CONTENT)
    archives.fetch_url(server.url("data.bin"), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"mine")
    archives.fetch_url(server.url("data.bin"), tmp_path / "data.bin")
    assert server.requested == []


def test_a_missing_file_is_reported_with_its_url(server, tmp_path):
    with pytest.raises(OSError, match="nothing.bin cannot be fetched .*404"):
        archives.fetch_url(server.url("nothing.bin"), tmp_path / "x")


def test_a_redirect_away_from_https_is_refused():
    handler = archives._NoDowngrade()
    request = archives.urllib.request.Request("https://example.org/a")
    with pytest.raises(urllib.error.HTTPError, match="away from https"):
        handler.redirect_request(request, io.BytesIO(), 302, "", {}, "http://example.org/a")
    assert handler.redirect_request(
        request, None, 302, "", {}, "https://example.org/b").full_url == "https://example.org/b"


def test_everything_is_fetched_by_https():
    assert sources.TERRA_URL.startswith("https://")
    assert all(datasets.facts(name).SOURCE.page.startswith("https://") for name in sources.known())


def test_a_file_on_drive_without_gdown_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ValueError, match=r"pip install domainbed_kd\[download\]"):
        archives.fetch_drive("id", tmp_path / "PACS.zip")


def fake_gdown(monkeypatch, do):
    module = types.ModuleType("gdown")
    module.exceptions = types.ModuleType("gdown.exceptions")
    module.exceptions.FileURLRetrievalError = type("FileURLRetrievalError", (Exception,), {})
    module.download = functools.partial(do, module)
    monkeypatch.setitem(sys.modules, "gdown", module)
    monkeypatch.setitem(sys.modules, "gdown.exceptions", module.exceptions)


def test_a_refusal_by_drive_says_how_to_get_the_file_by_hand(tmp_path, monkeypatch):
    def refuse(module, **_):
        raise module.exceptions.FileURLRetrievalError("Too many users\nhave viewed it")

    fake_gdown(monkeypatch, refuse)
    with pytest.raises(OSError, match="(?s)Too many users.*uc\\?id=abc in a browser.*PACS.zip"):
        archives.fetch_drive("abc", tmp_path / "PACS.zip")


# Checksums.


def test_a_checksum_is_kept_where_the_archive_was(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(CONTENT)
    with archives.verified(path):
        assert path.exists()
    assert not path.exists()
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert (tmp_path / "a.zip.sha256").read_text() == f"{digest}  a.zip\n"  # as sha256sum -c reads


def test_an_archive_with_another_checksum_is_refused_and_deleted(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(CONTENT)
    (tmp_path / "a.zip.sha256").write_text("0123abcd  a.zip\n")
    with pytest.raises(ValueError, match="a.zip has the SHA-256 .* says 0123abcd"):
        with archives.verified(path):
            pytest.fail("was let in")
    assert not path.exists()
    assert (tmp_path / "a.zip.sha256").read_text() == "0123abcd  a.zip\n"


def test_an_archive_that_cannot_be_unpacked_leaves_no_checksum(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="damaged"), archives.verified(path):
        archives.unpack(path, tmp_path)
    assert not (tmp_path / "a.zip.sha256").exists()


# Unpacking.


def make_tar(path, members: dict, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_zip(path, members: dict):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


@pytest.mark.parametrize("make, suffix", [(make_tar, "tar.gz"), (make_zip, "zip")])
def test_archives_are_unpacked(make, suffix, tmp_path):
    make(tmp_path / f"a.{suffix}", {"d/x.txt": b"one", "y.txt": b"two"})
    (tmp_path / "out").mkdir()
    archives.unpack(tmp_path / f"a.{suffix}", tmp_path / "out")
    assert (tmp_path / "out" / "d" / "x.txt").read_bytes() == b"one"
    assert (tmp_path / "out" / "y.txt").read_bytes() == b"two"


@pytest.mark.parametrize("make, suffix, name", [
    (make_tar, "tar.gz", "../evil"), (make_tar, "tar.gz", "d/../../evil"),
    (make_zip, "zip", "../evil"), (make_zip, "zip", "/evil"), (make_zip, "zip", "..\\evil"),
    (make_zip, "zip", "C:\\evil")])
def test_an_archive_that_leads_out_of_its_folder_is_refused(make, suffix, name, tmp_path):
    make(tmp_path / f"a.{suffix}", {"good": b"", name: b"evil"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="outside its folder"):
        archives.unpack(tmp_path / f"a.{suffix}", tmp_path / "out")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_link_that_leads_out_of_its_folder_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="outside its folder"):
        archives.unpack(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("make, suffix", [(make_tar, "tar.gz"), (make_zip, "zip")])
def test_a_damaged_archive_is_refused_in_one_line(make, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    make(path, {f"{i}.bin": CONTENT for i in range(20)})
    path.write_bytes(path.read_bytes()[:-300])
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is damaged .*Delete it"):
        archives.unpack(path, tmp_path / "out")


# Whole data sets.


def drive_with(monkeypatch, make, members):
    """Lets gdown give an archive of these members."""
    fake_gdown(monkeypatch, lambda module, *, output, **_: make(Path(output), members))


def pacs_archive():
    classes = datasets.get_dataset_class("PACS").CLASSES
    return {f"kfold/{domain}/{label}/{i}.jpg": b""
            for domain, numbers in datasets.facts("PACS").PUBLISHED.items()
            for label, n in zip(classes, numbers) for i in range(n)}


def test_pacs_ends_up_where_the_loaders_look_and_verified(tmp_path, monkeypatch, capsys):
    drive_with(monkeypatch, make_zip, pacs_archive())
    assert download.main(["--data_dir", str(tmp_path / "new"), "--datasets", "PACS"]) == 0
    assert len(list((tmp_path / "new" / "PACS").glob("sketch/house/*.jpg"))) == 80
    assert sorted(p.name for p in (tmp_path / "new").rglob("*") if "PACS/" not in str(p)) == [
        "PACS", "PACS.zip.sha256", "downloads"]
    assert capsys.readouterr().out.count(" ok") == 4

    fake_gdown(monkeypatch, lambda *_, **__: pytest.fail("fetched again"))
    assert download.main(["--data_dir", str(tmp_path / "new"), "--datasets", "PACS"]) == 0


def test_an_archive_with_fewer_images_than_published_is_reported(tmp_path, monkeypatch, capsys):
    members = pacs_archive()
    del members["kfold/photo/dog/0.jpg"]
    drive_with(monkeypatch, make_zip, members)
    assert download.main(["--data_dir", str(tmp_path), "--datasets", "PACS"]) == 1
    assert "photo                1669       1670  1 missing; dog 1 missing" in (
        capsys.readouterr().out)


def test_an_archive_of_something_else_leaves_no_data_set(tmp_path, monkeypatch):
    drive_with(monkeypatch, make_zip, {"other/x.jpg": b""})
    with pytest.raises(ValueError, match="PACS.zip holds no folder kfold"):
        download.main(["--data_dir", str(tmp_path), "--datasets", "PACS"])
    assert [p.name for p in tmp_path.iterdir()] == ["downloads"]


@pytest.mark.parametrize("name", [
    name for name in sources.known() if datasets.facts(name).SOURCE.via == "by hand"])
def test_what_cannot_be_fetched_says_where_to_get_it(name, tmp_path, capsys):
    assert download.main(["--data_dir", str(tmp_path), "--datasets", name]) == 1
    out = capsys.readouterr().out
    assert f"{name} cannot be fetched" in out and "https://" in out and "<" in out


# TerraIncognita.


CLASSES = datasets.get_dataset_class("TerraIncognita").CLASSES


class Counted(list):
    """A list that counts the items read from it."""

    read = 0

    def __iter__(self):
        for item in super().__iter__():
            self.read += 1
            yield item

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


def annotations(n, seed=0):
    """`n` images with one annotation, every tenth with two, in six places and twelve classes."""
    names = [*CLASSES, "car", "deer"]
    categories = Counted({"id": 10 * i, "name": name} for i, name in enumerate(names))
    pictures = Counted({"id": f"{seed}-{i}", "file_name": f"{seed}-{i}.jpg",
                        "location": (38, 46, "100", 43, 7, 120)[i % 6]} for i in range(n))
    labels = Counted({"image_id": f"{seed}-{i}", "category_id": 10 * ((i // 6 + k) % 12)}
                     for i in range(n) for k in ((5, 7) if i % 10 == 0 else (5,)))
    return {"categories": categories, "images": pictures, "annotations": labels}


def naive_places(content):
    """The same by trying all pairs."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    return {(i["file_name"], f"location_{i['location']}/{names[a['category_id']]}")
            for i, a in itertools.product(content["images"], content["annotations"])
            if a["image_id"] == i["id"] and str(i["location"]) in ("38", "46", "100", "43")
            and names[a["category_id"]] in CLASSES}


def test_terra_places_are_those_of_trying_all_pairs():
    content = annotations(300)
    found = list(sources.terra_places(content))
    assert set(found) == naive_places(content)
    assert len({place for _, place in found}) > 10


def test_terra_places_read_each_image_and_annotation_once():
    content = annotations(5000)
    assert len(list(sources.terra_places(content))) > 2000
    assert {name: items.read for name, items in content.items()} == {
        "categories": 12, "images": 5000, "annotations": 5500}


def terra_archives(folder, leave_out=()):
    """The two archives, and the places they should lead to."""
    contents = {name: annotations(120, name) for name in sources.TERRA_ANNOTATIONS}
    make_tar(folder / "eccv_18_annotations.tar.gz", {
        **{f"eccv_18_annotation_files/{name}_annotations.json": json.dumps(content).encode()
           for name, content in contents.items()},
        "eccv_18_annotation_files/other.json": b"not for us"})
    names = [i["file_name"] for content in contents.values() for i in content["images"]]
    make_tar(folder / "eccv_18_all_images_sm.tar.gz", {
        f"eccv_18_all_images_sm/{name}": name.encode() for name in names if name not in leave_out})
    return {(name, place) for content in contents.values() for name, place in naive_places(content)}


def test_terra_is_built_from_its_archives(server, tmp_path, monkeypatch, capsys):
    expected = terra_archives(tmp_path)
    server.files.update({p.name: p.read_bytes() for p in tmp_path.glob("*.tar.gz")})
    monkeypatch.setattr(sources, "TERRA_URL", server.url(""))
    assert download.main(
        ["--data_dir", str(tmp_path / "data"), "--datasets", "TerraIncognita"]) == 1  # too few
    root = tmp_path / "data" / "terra_incognita"
    found = {(p.name, str(p.parent.relative_to(root))) for p in root.rglob("*.jpg")}
    assert found == expected
    assert all(p.read_text() == p.name for p in root.rglob("*.jpg"))
    assert not list(tmp_path.glob("data/.unpacking*")) + list(tmp_path.glob("data/*/*.gz"))
    out = capsys.readouterr().out
    assert "missing" in out and "location_100" in out


def test_terra_without_all_its_images_is_refused_and_leaves_no_data_set(
        server, tmp_path, monkeypatch):
    expected = terra_archives(tmp_path, leave_out=("train-6.jpg", "train-12.jpg"))
    assert {"train-6.jpg", "train-12.jpg"} <= {name for name, _ in expected}
    server.files.update({p.name: p.read_bytes() for p in tmp_path.glob("*.tar.gz")})
    monkeypatch.setattr(sources, "TERRA_URL", server.url(""))
    with pytest.raises(ValueError, match="lacks 2 annotated images, such as train-12.jpg"):
        download.main(["--data_dir", str(tmp_path / "data"), "--datasets", "TerraIncognita"])
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["downloads"]


# Verifying.


def test_published_numbers_add_up_to_what_papers_print():
    totals = {name: sum(sum(n) if isinstance(n, tuple) else n for n in domains.values())
              for name in counts.published() for domains in [datasets.facts(name).PUBLISHED]}
    assert totals == {"VLCS": 10729, "PACS": 9991, "OfficeHome": 15588, "TerraIncognita": 24330,
                      "DomainNet": 586575}


@pytest.mark.parametrize("name", counts.published())
def test_published_domains_are_in_the_loaders_order(name):
    assert list(datasets.facts(name).PUBLISHED) == sorted(datasets.facts(name).PUBLISHED)
    labels = datasets.environments(name)
    assert len(labels) == len(datasets.facts(name).PUBLISHED)
    for label, domain in zip(labels, datasets.facts(name).PUBLISHED):
        initial, digits = label[0], label[1:] if label[1:].isdigit() else ""
        assert domain[0].lower() == initial.lower() and domain.endswith(digits)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """VLCS as if it had been published small, and complete in tmp_path."""
    classes = datasets.get_dataset_class("VLCS").CLASSES
    monkeypatch.setattr(datasets.get_dataset_class("VLCS"), "PUBLISHED",
                        {"Real World": 10, "sketch": (1, 1, 1, 1, 2)})
    images(tmp_path / "VLCS", "Real_world", dict.fromkeys(classes, 2))
    images(tmp_path / "VLCS", "sketch", dict(zip(classes, (1, 1, 1, 1, 2))))
    return tmp_path


def test_verify_accepts_what_is_complete_in_any_spelling(small, capsys):
    (small / "VLCS" / "notes.txt").touch()
    (small / "VLCS" / "sketch" / "bird" / "Thumbs.db").touch()
    assert download.main(["--data_dir", str(small), "--verify"]) == 0
    assert capsys.readouterr().out.count(" ok") == 2


@pytest.mark.parametrize("change, said", [
    (lambda root: (root / "Real_world/bird/1.jpg").unlink(), "1 missing"),
    (lambda root: (root / "sketch/person/2.JPEG").touch(), "1 too many; person 1 too many"),
    (lambda root: (root / "sketch/car/0.jpg").rename(root / "sketch/dog/9.jpg"),
     "car 1 missing; dog 1 too many"),
    (lambda root: (root / "Real_world").rename(root / "elsewhere"), "all missing"),
    (lambda root: (root / "Real_world").rename(root / "elsewhere"), "does not belong here"),
    (lambda root: (root / "Real_world/car").rename(root / "Real_world/cars"),
     "no car; unknown class cars")])
def test_verify_says_what_differs_and_exits_1(small, change, said, capsys):
    change(small / "VLCS")
    assert download.main(["--data_dir", str(small), "--datasets", "VLCS", "--verify"]) == 1
    assert said in capsys.readouterr().out


def test_verify_accepts_the_real_pacs(pacs, capsys):
    assert download.main(["--data_dir", str(pacs), "--verify", "--datasets", "PACS"]) == 0
    assert capsys.readouterr().out.count(" ok") == 4


# The command.


def test_list_names_every_source_with_its_licence(capsys):
    assert download.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == sources.known()
    assert "CDLA-Permissive" in next(line for line in lines if line.startswith("Terra"))


@pytest.mark.parametrize("arguments, said", [
    ([], "--data_dir is required"),
    (["--data_dir", "d"], "Name what to fetch"),
    (["--data_dir", "d", "--datasets", "PCAS"], "Dataset not found: PCAS. Did you mean PACS"),
    (["--data_dir", "d", "--datasets", "Debug28"], "Debug28 has no files to fetch"),
    (["--data_dir", "d", "--verify"], "d holds none of VLCS"),
    (["--data_dir", "d", "--verify", "--datasets", "SVIRO"], "no published numbers")])
def test_misuse_is_said_in_one_line(arguments, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "domainbed_kd.scripts.download", *arguments], cwd=tmp_path,
        capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_data_set_has_a_source_or_needs_none():
    assert set(datasets.DATASETS) - set(sources.known()) == {
        "Debug28", "Debug224", "DigitsDG", "DigitsSeg"}


# Servers and archives that nobody planned for.

class Answer(Handler):
    """Answers every request with the same bytes, whatever HTTP says of them."""

    def do_GET(self):
        self.wfile.write(self.server.answer)
        self.close_connection = True


@pytest.mark.parametrize("answer", [
    b"", b"no HTTP at all\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\ntorn",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n" + b"X: y\r\n" * 200 + b"\r\n"])
def test_a_server_that_breaks_http_is_one_line_with_file_and_url(server, tmp_path, answer):
    server.RequestHandlerClass, server.answer = Answer, answer
    url, path = server.url("PACS.zip"), tmp_path / "PACS.zip"
    with pytest.raises(OSError) as error:
        archives.fetch_url(url, path)
    said = str(error.value)
    assert url in said and str(path) in said and "\n" not in said and "again" in said
    assert not path.exists()


def test_a_length_that_is_not_a_number_is_ignored(server, tmp_path):
    server.RequestHandlerClass = Answer
    server.answer = b"HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\nall of it"
    archives.fetch_url(server.url("a"), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"all of it"


def zipped(tmp_path, change):
    """A zip of one stored file whose headers `change` has edited."""
    path = tmp_path / "PACS.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("kfold/a.jpg", b"image")
    content = bytearray(path.read_bytes())
    change(content, content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02"))
    path.write_bytes(content)
    return path


def encrypt(content, local, central):
    content[local + 6] |= 1
    content[central + 8] |= 1


def pack_strangely(content, local, central):
    content[local + 8] = content[central + 10] = 97


@pytest.mark.parametrize("change, word", [(encrypt, "encrypted"), (pack_strangely, "compression")])
def test_a_zip_that_python_cannot_open_is_one_line_with_file_and_url(tmp_path, change, word):
    path = zipped(tmp_path, change)
    with pytest.raises(ValueError, match=word) as error:
        archives.unpack(path, tmp_path, "https://example.org/PACS.zip")
    said = str(error.value)
    assert f"{path} from https://example.org/PACS.zip" in said and "\n" not in said


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"[]", b'{"categories": 3}', b"\xff"])
def test_annotations_that_are_not_what_they_should_be_are_one_line(tmp_path, content):
    archive = tmp_path / "eccv_18_annotations.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in sources.TERRA_ANNOTATIONS:
            member = tarfile.TarInfo(f"{name}_annotations.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="cis_test_annotations.json in .*is damaged") as error:
        sources.build_terra(tmp_path / "images.tar.gz", archive, tmp_path / "terra")
    said = str(error.value)
    assert str(archive) in said and sources.TERRA_URL + archive.name in said and "\n" not in said
