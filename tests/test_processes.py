"""torchrun's processes: pools are made together, to the bytes of one; one that dies ends the run by name."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from dinv import files
from dinv.experiments import device, processes, stages
from dinv.inversion import InversionSettings, Inverter, balanced_labels
from dinv.models import load_model
from dinv.objectives import CrossEntropy, Term
from dinv.pool import synthesize

torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["dinv.experiments.stages", "torch._dynamo"]  # as in test_group: there is one such server
)
CHECKOUT = Path(__file__).parents[1]
CELL = """
from dinv import CrossEntropy, Inverter, InversionSettings, balanced_labels, load_model
from dinv.experiments.stages import synthesize
from fragile import Fragile

settings = InversionSettings(steps=4, precision="float32", compile="never")
inverter = Inverter(load_model("resnet_digits"), CrossEntropy() + Fragile(), settings)
pool = synthesize(inverter, balanced_labels(24, 10), batch_size=8, snapshots=(0,))
len(pool)"""
OWN_TERM = """
class Own(CrossEntropy):
    pass
own = Inverter(load_model("resnet_digits"), 1.0 * Own(), settings)
len(synthesize(own, balanced_labels(4, 10), batch_size=2))"""
FRAGILE = """
import os
from dinv.objectives import Term

class Fragile(Term):
    name = "fragile"
    def __call__(self, view):
        with open(f"{os.environ['DINV_CACHE']}/rank{os.environ.get('RANK', 0)}", "a") as file:
            file.write(f"{len(view.labels)} ")
        if os.environ.get("RANK") == os.environ.get("DIES"):
            os.kill(os.getpid(), 9)
        return 0 * view.pixels.mean()
"""
# A checkout of the test's own, in the place of the real one.
RUN = """
import sys
from pathlib import Path
from dinv import reproduce
reproduce.ROOT = Path(__file__).parent
sys.exit(reproduce.main(["--profile", "smoke"]))
"""


def write_checkout(folder: Path) -> None:
    (folder / "notebooks").mkdir()
    (folder / "runs").mkdir()
    (folder / "fragile.py").write_text(FRAGILE)
    (folder / "run.py").write_text(RUN)
    metadata = {"kernelspec": {"name": "python3", "display_name": "P", "language": "python"}}
    for name, codes in {"00_whole": [CELL, OWN_TERM], "01_bad": ["1 / 0"]}.items():
        cells = [new_code_cell("", metadata={"tags": ["parameters"]}), *map(new_code_cell, codes)]
        nbformat.write(new_notebook(metadata=metadata, cells=cells), folder / "notebooks" / f"{name}.ipynb")


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    own = {"DINV_CACHE": folder / "runs", "DINV_FIGURES": folder / "figures", "DINV_DEVICE": "cpu"}
    own |= {"PYTHONPATH": f"{CHECKOUT}:{folder}", "OMP_NUM_THREADS": "1", "DINV_PROFILE": ""} | environment
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {name: str(value) for name, value in own.items()}
    words = [*command, str(folder / "run.py")]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_pools_are_made_together_and_a_process_that_dies_ends_the_run(tmp_path):
    write_checkout(tmp_path)
    killed = run(tmp_path, DIES="1")
    assert killed.returncode == 1
    assert "reproduce.sh: rank 1 died; the same command goes on\n" in killed.stderr, killed.stderr
    assert "[2/2]" not in killed.stdout

    again = run(tmp_path)
    assert again.returncode == 1 and "reproduce.sh: failed: 01_bad;" in again.stderr, again.stderr
    assert "1 of 2 done" in again.stdout and "died" not in again.stderr
    made_by_rank1 = (tmp_path / "runs" / "rank1").read_text()
    assert (
        made_by_rank1 == "8 " * 5
    )  # a step, and death; then the second batch, and none of the notebook's own class
    made = [
        files.read_tensors(path)[0] for path in sorted((tmp_path / "runs").glob("pool-*/data.safetensors"))
    ]
    whole = next(tensors for tensors in made if len(tensors["images"]) == 24)
    settings = InversionSettings(steps=4, precision="float32", compile="never")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inverter = Inverter(load_model("resnet_digits"), 1.0 * CrossEntropy(), settings)
    alone = synthesize(inverter, balanced_labels(24, 10), batch_size=8, snapshots=(0,))
    torch.set_num_threads(threads)
    assert len(made) == 2 and torch.equal(whole["images"], alone.images)
    assert torch.equal(whole["snapshots"], alone.snapshots)


class Counted(Term):
    """Notes which rank made how large a batch."""

    name = "counted"

    def __call__(self, view):
        with open(f"{os.environ['DINV_CACHE']}/rank{os.environ['RANK']}", "a") as file:
            file.write(f"{len(view.labels)} ")
        return 0 * view.pixels.mean()


def small(objective) -> Inverter:
    settings = InversionSettings(steps=1, precision="float32", compile="never")
    return Inverter(load_model("resnet_digits"), CrossEntropy() + objective, settings)


def one_rank(number, folder, port):
    """As torchrun's and a notebook's kernel in one."""
    own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    own |= {"MASTER_ADDR": "127.0.0.1", "DINV_CACHE": folder, "DINV_DEVICE": "cpu", "DINV_NOTEBOOK": "00"}
    os.environ.update({name: str(value) for name, value in own.items()})
    processes.begin("smoke")
    if number:
        return processes.help_with(["00", "01"])
    inverter, labels = small(Counted()), balanced_labels(24, 10)
    pools = [stages.synthesize(inverter, labels, batch_size=8, seed=seed) for seed in range(2)]
    with pytest.raises(ValueError, match="must lie in 0 to 1"):
        stages.synthesize(inverter, labels, batch_size=8, snapshots=(5,))
    inverter.own = lambda: None  # cannot be sent
    stages.synthesize(inverter, labels, batch_size=12)
    processes.over("00")
    processes.over("01")
    torch.save([pool.images for pool in pools], folder / "pools.pt")


def test_a_pool_of_a_stage_is_made_by_all_ranks(tmp_path, monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(one_rank, (tmp_path, store.port), 2, start_method="forkserver")
    assert (tmp_path / "rank0").read_text() == "8 8 " * 2 + "12 12 "
    assert (tmp_path / "rank1").read_text() == "8 " * 3  # the third while rank 0 refused the snapshot
    monkeypatch.setenv("RANK", "alone")
    monkeypatch.setenv("DINV_CACHE", str(tmp_path))
    for seed, images in enumerate(torch.load(tmp_path / "pools.pt")):
        alone = synthesize(small(Counted()), balanced_labels(24, 10), batch_size=8, seed=seed)
        assert (images.int() - alone.images).abs().max() <= 1  # the threads differ


def test_more_processes_than_cards_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(device, "begin", lambda profile: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="one process for each card, 2 here: torchrun --nproc-per-node 2"):
        processes.begin("gpu")
