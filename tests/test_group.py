"""Two processes that share a batch optimise what one process does; they stop together and resume."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dinv import files, objectives
from dinv.distillation import DistillationSettings, DistillStep, InversionSource, distill
from dinv.experiments.cache import Checkpoint
from dinv.group import normalise_together, share
from dinv.inversion import InversionSettings, Inverter, balanced_labels, invert
from dinv.models import create_model, load_model
from dinv.objectives import Competition, CrossEntropy, FeatureStatistics, L2Norm, Term, TotalVariation
from dinv.pool import synthesize
from dinv.step import NotFinite

# Two processes are forked from one that has imported everything, which takes longest.
multiprocessing.get_context("forkserver").set_forkserver_preload(["dinv.experiments.stages", "torch._dynamo"])
LABELS = balanced_labels(24, 10)
SETTINGS = InversionSettings(lr=0.1, jitter=1, stages=((8, 4), (12, 8)), precision="float32", compile="never")


def objective():
    prior = CrossEntropy() + 0.01 * TotalVariation() + 0.001 * L2Norm()
    return prior + 1.0 * FeatureStatistics() + 0.5 * Competition(create_model("vgg_digits", "digits", seed=1))


class UndefinedAtTheEnd(Term):
    """NaN where the batch's last label is in it, which one rank alone sees."""

    name = "undefined"

    def __call__(self, view):
        return view.pixels.mean() * (float("nan") if (view.labels == 7).any() else 1.0)


def both(group):
    """The images with shared statistics, at the end and on their way, and without."""
    teacher = load_model("resnet_digits")
    whole = invert(teacher, LABELS, objective(), SETTINGS, seed=3, snapshots=(0, 9), group=group)
    found = {"whole": whole.images, "snapshot": whole.snapshots[9], "labels": whole.labels}
    found |= {"losses": torch.tensor([whole.losses[name] for name in sorted(whole.losses)])}
    objectives.moments_of_all = lambda pairs, shifts, group: pairs  # each rank to itself
    return found | {"apart": invert(teacher, LABELS, objective(), SETTINGS, seed=3, group=group).images}


def undefined(group):
    labels = torch.tensor([0, 1, 2, 7])
    with pytest.raises(NotFinite, match="undefined became nan at step 1"):
        invert(load_model("resnet_digits"), labels, 1.0 * UndefinedAtTheEnd(), SETTINGS, group=group)
    inverter = Inverter(load_model("resnet_digits"), 1.0 * UndefinedAtTheEnd(), SETTINGS)
    with pytest.raises(NotFinite, match="undefined became nan at step 1"):  # in the batch of rank 1
        synthesize(inverter, labels, batch_size=2, group=group)
    return {}


def always_saved(group, saves=0):
    """A checkpoint of this rank's own, which is left whenever it may be; the process dies after `saves`."""
    number = group.rank() if group else 0
    checkpoint = Checkpoint(Path(os.environ["FOLDER"]) / f"rank{number}", "a test")
    checkpoint.path.parent.mkdir(exist_ok=True)
    checkpoint.share, save, left = 1e9, checkpoint.save, [saves]

    def save_and_die(make):
        save(make)
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    checkpoint.save = save_and_die
    return checkpoint


def pool(group, saves=0):
    inverter = Inverter(
        load_model("resnet_digits"), 1.0 * CrossEntropy() + FeatureStatistics(), SETTINGS, group
    )
    return {
        "images": synthesize(inverter, LABELS, batch_size=8, checkpoint=always_saved(group, saves)).images
    }


def killed(group):
    return pool(group, saves=1)


def dealt(group, saves=0):
    """Three batches, one process each."""
    inverter = Inverter(load_model("resnet_digits"), 1.0 * CrossEntropy() + FeatureStatistics(), SETTINGS)
    options = {"batch_size": 8, "snapshots": (0, 9), "checkpoint": always_saved(group, saves)}
    tensors, values = files.packed(synthesize(inverter, LABELS, group=group, **options))
    return tensors | {"terms": values["terms"]}


def killed_dealt(group):
    return dealt(group, saves=1)


def student(group, checkpoint=None):
    """Three rounds of adaptive images and blends: the weights, and the numbers of the history."""
    teacher, learner = load_model("resnet_digits"), create_model("vgg_digits", "digits", seed=1)
    brief = InversionSettings(steps=3, lr=0.1, precision="float32", compile="never")
    source = InversionSource(
        teacher, CrossEntropy() + FeatureStatistics(), brief, batch_size=12, competition=1.0
    )
    settings = DistillationSettings(
        rounds=3, updates=2, batch_size=12, lr=0.02, pad=1, augmentation="mixup", precision="float32"
    )
    step = DistillStep(teacher, learner, compile="never", precision="float32", group=group)
    saved = {} if checkpoint is None else {"checkpoint": checkpoint}
    result = distill(teacher, learner, source, settings, step=step, **saved)
    numbers = [[record[name] for name in ("loss", "agreement", "fresh")] for record in result.history]
    return dict(learner.state_dict()) | {"images": result.images, "numbers": torch.tensor(numbers)}


def saved_student(group):
    return student(group, always_saved(group))


def killed_student(group):
    return student(group, always_saved(group, saves=1))


def lost(group):
    """Rank 1 is gone after a few steps."""
    with pytest.raises(RuntimeError):
        callback = (lambda progress: os._exit(9)) if group.rank() else None
        invert(
            load_model("resnet_digits"),
            LABELS,
            objective(),
            SETTINGS,
            callback=callback,
            every=3,
            group=group,
        )
    return {}


def rank(number, folder, work):
    torch.set_num_threads(1)
    os.environ["FOLDER"] = str(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{work.__name__}", rank=number, world_size=2)
    torch.save(work(dist.group.WORLD), f"{folder}/{work.__name__}{number}.pt")


def two(folder, work, fails=False):
    """What each of two processes makes of `work`."""
    options = {"nprocs": 2, "join": False, "start_method": "forkserver"}
    processes = multiprocessing.start_processes(rank, (folder, work), **options)
    outcome = pytest.raises(multiprocessing.ProcessExitedException, match="exit code 9")
    with outcome if fails else nullcontext():
        while not processes.join():
            pass
    return None if fails else [torch.load(folder / f"{work.__name__}{number}.pt") for number in range(2)]


def test_two_processes_optimise_what_one_does(tmp_path):
    one = invert(load_model("resnet_digits"), LABELS, objective(), SETTINGS, seed=3, snapshots=(0, 9))
    first, second = two(tmp_path, both)
    for name in ("whole", "snapshot", "labels", "losses"):
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(first["labels"], LABELS)
    assert torch.allclose(first["whole"], one.images, atol=1e-4)
    assert torch.allclose(first["snapshot"], one.snapshots[9], atol=1e-4)
    losses = torch.tensor([one.losses[name] for name in sorted(one.losses)])
    assert torch.allclose(first["losses"], losses, rtol=1e-3, atol=1e-4)
    assert (first["apart"] - one.images).abs().max() > 0.05  # another objective


def test_what_is_not_finite_stops_all(tmp_path):
    two(tmp_path, undefined)


def test_a_killed_pool_goes_on_to_the_same_bytes(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = two(tmp_path / "whole", pool)
    two(tmp_path, killed, fails=True)
    again = two(tmp_path, pool)
    assert torch.equal(again[0]["images"], again[1]["images"])
    assert torch.equal(again[0]["images"], whole[0]["images"])


def test_a_pool_dealt_out_is_that_of_one_process_and_goes_on_with_any_number(tmp_path, monkeypatch):
    for name in ("alone", "two", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("FOLDER", str(tmp_path / "alone"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone, found = dealt(None), two(tmp_path / "two", dealt)
    two(tmp_path / "killed", killed_dealt, fails=True)
    monkeypatch.setenv("FOLDER", str(tmp_path / "killed"))
    tensors, _ = always_saved(None).load()
    assert len(tensors["images"]) == 16 and not (tmp_path / "killed/rank1/partial.safetensors").exists()
    found += [dealt(None)]  # goes on alone
    torch.set_num_threads(threads)
    for one in found:
        assert one["terms"] == alone["terms"]
        assert all(
            torch.equal(alone[name], one[name]) for name in ("images", "losses", "snapshots", "labels")
        )


def test_two_processes_distil_as_one_does_and_go_on_to_the_same_bytes(tmp_path):
    alone, (first, second) = student(None), two(tmp_path, saved_student)
    assert first.keys() == alone.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value.double(), alone[name].double(), rtol=1e-4, atol=1e-4, msg=name)
    (tmp_path / "again").mkdir()
    two(tmp_path / "again", killed_student, fails=True)
    again, _ = two(tmp_path / "again", saved_student)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_student_that_cannot_be_shared_is_refused():
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm1d(4))
    normalise_together(network, None)
    assert type(network[0]) is torch.nn.BatchNorm2d
    with pytest.raises(ValueError, match=r"1 = BatchNorm1d\(4, .* cannot be shared by processes"):
        normalise_together(network, object())


def test_a_process_that_dies_ends_the_others(tmp_path):
    two(tmp_path, lost, fails=True)


def test_a_batch_that_cannot_be_shared_is_refused():
    class Three:
        size, rank = staticmethod(lambda: 3), staticmethod(lambda: 1)

    assert share(9, Three()) == slice(3, 6) and share(9, None) == slice(None)
    with pytest.raises(ValueError, match="10 images cannot be shared equally by 3 processes"):
        share(10, Three())
