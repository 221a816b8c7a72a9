"""`./reproduce.sh lab`: JupyterLab on the notebooks, with this very interpreter and this checkout's dinv."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

from dinv import reproduce


def ask(address: str):
    request = urllib.request.Request(address, headers={"Authorization": "token secret"})
    for _ in range(100):  # the address is told a little before it is listened at
        with suppress(urllib.error.URLError), urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
        time.sleep(0.1)
    raise AssertionError(f"no answer from {address}")


@pytest.mark.slow
def test_the_lab_shows_the_notebooks_and_has_our_kernel_beside_the_users(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    theirs = tmp_path / "jupyter" / "kernels" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "X", "language": "x"}')
    variables = os.environ | {"HOME": str(tmp_path), "JUPYTER_PATH": str(tmp_path / "jupyter")}
    command = ["bash", str(reproduce.ROOT / "reproduce.sh"), "lab", "--", "--no-browser"]
    command += [f"--port={port}", "--IdentityProvider.token=secret"]
    variables |= {"DINV_PYTHON": sys.executable, "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    server = subprocess.Popen(command, cwd="/", env=variables, **pipes)
    try:
        while not re.search(rf":{port}/lab\?token=", line := server.stderr.readline().decode()):
            assert line, f"it ended with status {server.wait()}"
        address = f"http://127.0.0.1:{port}/api"
        assert ask(f"{address}/contents")["content"], "it does not show the notebooks"
        kernels = ask(f"{address}/kernelspecs")["kernelspecs"]
        assert kernels["python3"]["spec"]["display_name"] == "dinv" and "theirs" in kernels
        assert kernels["python3"]["spec"]["argv"][0] == sys.executable
    finally:
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=60)[1]
    assert server.returncode == 0, rest
