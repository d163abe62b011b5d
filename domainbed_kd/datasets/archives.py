"""Downloads and unpacks dataset archives: downloads resume, unpacking is all or nothing."""

import gzip
import hashlib
import http.client
import lzma
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from domainbed_kd.folder import files

CHUNK = 1 << 20  # bytes


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, fp, code, message, headers, newurl):
        if request.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.HTTPError(
                newurl, code, "redirected away from https", headers, fp)
        return super().redirect_request(request, fp, code, message, headers, newurl)


def fetch_url(url: str, path: Path) -> None:
    """Downloads to `path`, continuing `path`.part if there is one.

    Raises:
        OSError: if the server cannot be reached or the connection breaks; partial data are kept.
    """
    from tqdm import tqdm

    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.build_opener(_NoDowngrade).open(request, timeout=60) as response:
            if response.status != 206:  # the server sends all of it
                start = 0
            length = response.headers.get("Content-Length") or ""
            total = start + int(length) if length.isdecimal() else None
            with part.open("ab" if start else "wb") as file, tqdm(
                    total=total, initial=start, unit="B", unit_scale=True, desc=path.name,
                    disable=not sys.stderr.isatty()) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 416 and start:
            part.unlink()  # longer than the server's file
            return fetch_url(url, path)
        what = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{url} cannot be fetched to {path} ({what}). If it was the connection, run "
                      "the same command again: it continues where it broke off.") from error
    size = part.stat().st_size
    if total is not None and size != total:
        raise OSError(f"{url}, for {path}, broke off after {size} of {total} bytes. Run the same "
                      "command again: it continues from there.")
    part.rename(path)


def fetch_drive(file_id: str, path: Path) -> None:
    """Downloads a file from Google Drive to `path`."""
    if path.exists():
        return
    try:
        import gdown
    except ImportError:
        raise ValueError(f"{path.name} is on Google Drive, which needs gdown. Run: pip install "
                         "domainbed_kd[download]") from None
    from gdown.exceptions import FileURLRetrievalError

    try:
        gdown.download(id=file_id, output=str(path), quiet=not sys.stderr.isatty(), resume=True)
    except (FileURLRetrievalError, OSError) as error:
        raise OSError(
            f"Google Drive refuses {path.name} ({error}). Download https://drive.google.com/"
            f"uc?id={file_id} in a browser, save it as {path}, and run the same command again."
        ) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with files.open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def verified(path: Path) -> Iterator[None]:
    """Checks an archive's SHA-256 against `path`.sha256, if there is one, before it is unpacked.

    Afterwards the SHA-256 is written there and the archive is deleted.

    Raises:
        ValueError: if the SHA-256 differs; the archive is then deleted.
    """
    digest, known = sha256(path), path.with_name(f"{path.name}.sha256")
    expected = files.read_bytes(known).decode(errors="replace") if known.exists() else digest
    expected = (expected.split() or [""])[0]
    if digest != expected:
        path.unlink()
        raise ValueError(
            f"{path.name} has the SHA-256 {digest}, but {known} says {expected}. It is deleted. "
            f"Run the same command again; if its publisher changed it, delete {known} first.")
    yield
    known.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    path.unlink()


@contextmanager
def opened(archive: Path, url: str = "") -> Iterator[None]:
    """Inside, a damaged, encrypted or dangerous archive is refused; the message names its URL."""
    source = f"{archive}{f' from {url}' if url else ''}"
    try:
        yield
    except tarfile.FilterError as error:
        raise ValueError(f"{source} is not unpacked, as it would write outside its folder: "
                         f"{error}. Get it from elsewhere.") from error
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
            EOFError) as error:
        reason = " ".join(str(error).split())  # tarfile's has several lines
        raise ValueError(f"{source} is damaged ({reason}). Delete it and run the same command "
                         "again.") from error
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or an unknown compression
        raise ValueError(f"{source} cannot be unpacked ({error}). Unpack it by hand.") from error


def unpack(archive: Path, folder: Path, url: str = "") -> None:
    """Unpacks a .zip or .tar.* into an existing folder; messages name `url`."""
    with opened(archive, url):
        files.open_regular(archive).close()
        if archive.suffix != ".zip":
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            return
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                path = PurePosixPath(name.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise ValueError(f"{archive} is not unpacked, as it would write outside its "
                                     f"folder: {name}. Get it from elsewhere.")
            file.extractall(folder)


@contextmanager
def beside(data_dir: Path) -> Iterator[Path]:
    """A temporary folder in `data_dir`, so that its contents can be moved there by renaming."""
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpacking-") as folder:
        yield Path(folder)
