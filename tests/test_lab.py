"""`./reproduce.sh lab`: JupyterLab on the notebooks, with this very interpreter and this checkout's dinv."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from websocket import create_connection

import dinv
from dinv import reproduce
from dinv.reproduce import cli, execution


def test_the_lab_has_our_kernel_beside_the_users(tmp_path, monkeypatch):
    for name in ("python3", "theirs"):
        folder = tmp_path / "kernels" / name
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "X", "language": "x"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    theirs = str(tmp_path / "ipython")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", theirs)
    monkeypatch.setenv("IPYTHONDIR", theirs)
    with execution.own_kernel(alone=False):
        found = {name: kernel["spec"] for name, kernel in KernelSpecManager().get_all_specs().items()}
        assert os.environ["JUPYTER_RUNTIME_DIR"] == os.environ["IPYTHONDIR"] == theirs
    assert found["python3"]["display_name"] == "dinv" and found["python3"]["argv"][0] == sys.executable
    assert "theirs" in found


@pytest.mark.parametrize("user, root", [(0, ["--allow-root"]), (1000, [])])
def test_what_the_lab_is_given(monkeypatch, user, root):
    from jupyterlab.labapp import LabApp

    given = []
    monkeypatch.setattr(LabApp, "launch_instance", given.extend)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert reproduce.main(["lab", "--", "--port", "1"]) == 0
    assert given == [f"--ServerApp.root_dir={cli.NOTEBOOKS}", *root, "--port", "1"]


def ask(address: str, data: dict | None = None):
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(address, body, {"Authorization": "token secret"})
    for _ in range(100):  # the address is told a little before it is listened at
        with suppress(urllib.error.URLError), urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
        time.sleep(0.1)
    raise AssertionError(f"no answer from {address}")


def run(address: str) -> str:
    """What a kernel prints of itself and of dinv."""
    code = "import sys, dinv; print(sys.executable, dinv.__file__)"
    header = {"msg_id": "1", "msg_type": "execute_request", "session": "1", "username": "", "version": "5.3"}
    content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}}
    request = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}
    kernel = create_connection(address, timeout=120)
    kernel.send(json.dumps(request))
    printed, state = "", ""
    while state != "idle":
        message = json.loads(kernel.recv())
        if message["parent_header"].get("msg_id") == "1":
            printed += message["content"].get("text", "")
            state = message["content"].get("execution_state", "")
    kernel.close()
    return printed


@pytest.mark.slow
def test_a_kernel_of_the_lab_imports_this_checkout(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["lab", "--", "--no-browser", f"--port={port}", "--IdentityProvider.token=secret"]
    variables = os.environ | {"HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    variables.pop("PYTHONPATH", None)
    root = Path(dinv.__file__).parents[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "dinv.reproduce", *words], cwd=root, env=variables,
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        told = ""
        while f":{port}/lab?token=" not in told:
            line = server.stderr.readline()
            assert line, f"it ended with status {server.wait()}: {told}"
            told += line
        address = f"http://127.0.0.1:{port}/api"
        assert ask(f"{address}/contents")["content"], "it does not show the notebooks"
        assert ask(f"{address}/kernelspecs")["kernelspecs"]["python3"]["spec"]["display_name"] == "dinv"
        number = ask(f"{address}/kernels", {"name": "python3"})["id"]
        printed = run(f"ws://127.0.0.1:{port}/api/kernels/{number}/channels?token=secret")
        assert printed == f"{sys.executable} {dinv.__file__}\n"
    finally:
        server.send_signal(signal.SIGINT)
        began = time.monotonic()
        rest = server.communicate(timeout=60)[1]
    assert server.returncode == 0, rest
    assert time.monotonic() - began < 30
