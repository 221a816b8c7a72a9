"""On a card that is not there: no tensor in the wrong place, and no wait for it that grows with the steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("without_a_card.py")


@pytest.fixture(scope="module")
def cases():
    """name -> error, and waits by line of a short run and of one twice as long."""
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    return {case.pop("name"): case for case in map(json.loads, run.stdout.splitlines())}


def test_every_loop_runs_and_its_steps_wait_for_nothing(cases):
    loops = {name: case for name, case in cases.items() if not name.startswith("control")}
    assert len(loops) >= 13
    for name, case in loops.items():
        short, long = case["waits"]
        assert not case["error"], f"{name}: {case['error']}"
        assert short == long, f"{name}: the longer it runs, the more the host waits"
        assert short, f"{name}: what is sent and read once is counted"


def test_planted_faults_are_found(cases):
    assert "same device" in cases["control: a tensor on the host"]["error"]
    assert "a generator of cpu for stand_in" in cases["control: a generator of the host"]["error"]
    short, long = cases["control: a term that asks"]["waits"]
    assert long != short
