"""What is compiled goes on plain where the compiler fails: one warning, the same numbers, all four users."""

import warnings
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from dinv import distillation, generator, step, training
from dinv.datasets import Dataset
from dinv.distillation import DistillationSettings, distill
from dinv.generator import GeneratorSettings, create_generator, generate
from dinv.inversion import InversionSettings, balanced_labels, invert
from dinv.objectives import CrossEntropy, FeatureStatistics
from dinv.step import Compiled, compiler_available
from dinv.training import TrainingSettings, train

CUDA = torch.device("cuda")
LABELS = balanced_labels(20, 5)
USERS = ("step", "lesson", "training", "generator")


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(tiny, user, compiled):
    """What a user of the compiler makes, all that shows it: images, losses, weights and buffers."""
    teacher, network, how = tiny(0), tiny(1), "always" if compiled else "never"
    network.net[1].momentum = network.net[4].momentum = 0.1  # plain averages break the graph
    objective = CrossEntropy() + 1.0 * FeatureStatistics()
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=draws())
    if user == "step":
        return [invert(teacher, LABELS, objective, InversionSettings(steps=3, compile=how)).images]
    if user == "generator":
        settings = GeneratorSettings(steps=3, latent=8, width=4, compile=how)
        network = create_generator(teacher, settings)
        found = [generate(teacher, LABELS, objective, settings, network=network).images]
    elif user == "lesson":
        settings = DistillationSettings(rounds=2, updates=2, batch=8, pad=1, compile=how)
        found = distill(teacher.freeze(), network, images, settings, draws()).history
        found = [torch.tensor([record["loss"] for record in found])]
    else:
        data = Dataset("noise", "train", images, LABELS, teacher.classes)
        settings = TrainingSettings(epochs=2, batch=8, pad=1, small_epochs=1)
        found = [torch.tensor([record["loss"] for record in train(network, data, settings, draws())])]
    return [*found, *network.state_dict().values()]


@pytest.fixture
def pretended(monkeypatch):
    """Compilers are there, and a training takes its device for a card, where alone it compiles."""
    for module in (step, distillation, generator, training):
        monkeypatch.setattr(module, "compiler_available", lambda device: True)
    monkeypatch.setattr(step, "_steps", WeakKeyDictionary())
    monkeypatch.setattr(distillation, "_lessons", WeakKeyDictionary())
    forward = training._forward
    monkeypatch.setattr(training, "_forward", lambda model, device: forward(model, CUDA))


FAILURES = [(user, when) for user in USERS for when in ("forward", "backward")]


@pytest.mark.parametrize("user, when", [*FAILURES, ("training", "at the second size")])
def test_a_compiler_that_fails_is_told_of_once_and_gone_without(tiny, monkeypatch, pretended, user, when):
    made, original = [], torch.compile

    def plain(graph, inputs):
        made.append(graph)
        if when == "forward" or len(made) > 1:
            raise RuntimeError("gcc: Python.h: no such file")
        return graph.forward

    def failing(graph, inputs):
        raise RuntimeError("gcc: Python.h: no such file")

    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=failing)
    backend = backend if when == "backward" else plain
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=backend, **options))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = numbers(tiny, user, compiled=True)
    told = [str(warning.message) for warning in told if warning.category is RuntimeWarning]
    assert len(told) == (2 if user == "generator" else 1)  # it has a step as well
    assert all("going on without compilation: " in text and "no such file" in text for text in told)
    monkeypatch.setattr(training, "compiler_available", lambda device: False)
    expected = numbers(tiny, user, compiled=False)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("user", USERS)
def test_what_is_compiled_is_tried_without_a_trace(tiny, monkeypatch, pretended, user):
    original, made = torch.compile, []

    def plain(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=plain, **options))
    found = numbers(tiny, user, compiled=True)
    monkeypatch.setattr(training, "compiler_available", lambda device: False)
    expected = numbers(tiny, user, compiled=False)
    assert made and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_trial_draws_no_random_number_and_what_fails_plain_as_well_is_the_callers():
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    compiled = Compiled(network.forward, network)
    compiled._compiled = network.forward
    images = torch.rand(3, 4)
    answers = []
    for call in (compiled, network):
        torch.manual_seed(0)
        answers.append(call(images))
    assert torch.equal(*answers) and network[2].num_batches_tracked == 2
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        warnings.simplefilter("error")
        compiled(torch.rand(3, 5))
    assert compiled.on


# ---- whether there is a compiler -------------------------------------------------------------------


@pytest.mark.parametrize(
    "programs, header, lacking",
    [
        (("gcc",), True, ""),
        (("clang",), True, ""),
        (("my-cc",), True, ""),
        (("g++",), True, "neither gcc nor clang is there"),
        (("gcc",), False, "Python.h is not there (install python3-dev)"),
        ((), False, "neither gcc nor clang is there, and "),
    ],
)
def test_a_card_wants_a_c_compiler_and_pythons_headers(monkeypatch, tmp_path, programs, header, lacking):
    step._tell_once.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    if "my-cc" in programs:
        monkeypatch.setenv("CC", "my-cc")
    monkeypatch.setattr("shutil.which", lambda name: name if name in programs else None)
    monkeypatch.setattr("sysconfig.get_path", lambda *given: str(tmp_path))
    if header:
        (tmp_path / "Python.h").touch()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [compiler_available(CUDA) for _ in range(2)] == 2 * [not lacking]
    assert len(told) == bool(lacking) and (not lacking or lacking in str(told[0].message))
    step._tell_once.cache_clear()


def test_an_unusable_cc_is_no_compiler(monkeypatch):
    step._tell_once.cache_clear()
    monkeypatch.setenv("CC", "nowhere")
    monkeypatch.setattr("shutil.which", lambda name: name if name == "gcc" else None)
    with pytest.warns(RuntimeWarning, match="going on without compilation: .*CC=nowhere"):
        assert not compiler_available(CUDA)
    step._tell_once.cache_clear()


def test_a_cpu_wants_a_cpp_compiler_and_is_silent(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    for programs, there in ((("g++",), True), (("gcc",), False)):
        monkeypatch.setattr("shutil.which", lambda name, found=programs: name if name in found else None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert compiler_available(torch.device("cpu")) == there
