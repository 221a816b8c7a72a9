"""What is compiled: when, once, to the same numbers; and that all goes on where the compiler fails."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from dinv import compiling
from dinv.compiling import Compiled, compiler_available, inversion_flops
from dinv.distillation import DistillationSettings, distill
from dinv.generator import GeneratorSettings, generate
from dinv.inversion import InversionSettings, Inverter, balanced_labels, invert
from dinv.models import Classifier
from dinv.objectives import Competition, CrossEntropy, FeatureStatistics, TotalVariation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LABELS = balanced_labels(20, 5)
ALWAYS = InversionSettings(steps=3, lr=0.1, compile="always")
NEVER = replace(ALWAYS, compile="never")


def deep_inversion():
    return CrossEntropy() + 0.1 * TotalVariation() + 1.0 * FeatureStatistics()


@pytest.fixture
def compile_with(monkeypatch):
    """`compile_with(backend)`: what compiles from now on. Most tests take one that changes nothing."""
    original = torch.compile
    monkeypatch.setattr("shutil.which", lambda name: name)  # a compiler is there

    def use(backend):
        compile_ = functools.wraps(original)(lambda f, **options: original(f, backend=backend, **options))
        monkeypatch.setattr(torch, "compile", compile_)

    return use


@pytest.fixture
def graphs(compile_with):
    """A list that grows by one graph per compilation."""
    graphs = []
    compile_with(lambda graph, inputs: graphs.append(graph) or graph.forward)
    return graphs


def test_an_inverter_compiles_once_and_follows_its_networks(tiny, graphs, portrait):
    teacher, student = tiny(0).train(), tiny(1)
    objective = deep_inversion() + 2.0 * Competition(student)
    inverter, before = Inverter(teacher, objective, ALWAYS), portrait(teacher)
    first = inverter(LABELS)
    assert first.compiled and 0 < first.compile_seconds < first.seconds
    assert torch.equal(first.images, invert(teacher, LABELS, objective, NEVER).images)
    assert portrait(teacher) == before
    with torch.no_grad():  # more training
        for parameter in (*teacher.parameters(), *student.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape)
        teacher.net[1].running_mean += 1
    again = inverter(LABELS)
    assert not torch.equal(first.images, again.images) and again.compile_seconds == 0
    assert torch.equal(again.images, invert(teacher, LABELS, objective, NEVER).images)
    assert len(graphs) == 1


def test_twenty_inverters_and_twenty_batch_sizes_are_all_compiled(graphs):
    """Dynamo gives up after eight graphs of one code object, and says so only in its log."""
    teacher = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), [0.5], [0.5], 4, "ab")
    inverters = [Inverter(teacher, CrossEntropy() + n * TotalVariation(), ALWAYS) for n in range(1, 21)]
    for _ in range(2):
        assert all(inverter(torch.zeros(2, dtype=torch.long)).compiled for inverter in inverters)
        assert len(graphs) == 20
    for _ in range(2):
        for count in range(3, 23):
            inverters[0](torch.zeros(count, dtype=torch.long))
        assert len(graphs) == 40


def test_auto_compiles_for_much_work_with_statistics_only(tiny, graphs, monkeypatch):
    auto = replace(NEVER, compile="auto")
    monkeypatch.setattr(compiling, "WORTH_COMPILING", 30 * inversion_flops(tiny(), auto.plan(8)))
    assert not invert(tiny(), LABELS, deep_inversion(), auto).compiled
    assert not invert(tiny(), LABELS.repeat(2), CrossEntropy(), auto).compiled  # reads no statistics
    assert not graphs
    assert invert(tiny(), LABELS.repeat(2), deep_inversion(), auto).compiled
    inverter = Inverter(tiny(), deep_inversion(), auto)
    inverter.prepare(40)  # images in all
    assert inverter(LABELS).compiled and len(graphs) == 2


def test_operations_of_an_inversion(tiny):
    # multiply-adds of the tiny network: 8x8x4x27, 4x4x6x36, 6x5; two operations each; and back
    once = 4 * (8 * 8 * 4 * 27 + 4 * 4 * 6 * 36 + 6 * 5)
    assert inversion_flops(tiny(), ((1, 8),)) == once
    assert inversion_flops(tiny(), ((10, 4), (3, 8))) == pytest.approx(once * (10 / 4 + 3))


@pytest.mark.skipif(not compiler_available(CPU), reason="no C++ compiler here")
def test_the_compiled_step_agrees_with_the_plain_one(tiny):
    """With the real compiler. Adam magnifies rounding, so the losses are compared, not the pixels."""
    settings = (replace(ALWAYS, steps=12), replace(NEVER, steps=12))
    compiled, plain = (invert(tiny(), LABELS, deep_inversion(), how) for how in settings)
    assert compiled.compiled and not plain.compiled
    for name, values in plain.losses.items():
        assert compiled.losses[name] == pytest.approx(values, rel=2e-2)
        assert compiled.losses[name][0] == pytest.approx(values[0], rel=1e-4)
    torch.testing.assert_close(compiled.images.mean(), plain.images.mean(), rtol=1e-2, atol=0)


def numbers(tiny, user, how):
    """What a user of the compiler makes: images, losses, weights, gradients and buffers."""
    teacher, network = tiny(0), tiny(1)
    network.net[1].momentum = network.net[4].momentum = 0.1  # plain averages break the graph
    if user == "inversion":
        return [invert(teacher, LABELS, deep_inversion(), replace(ALWAYS, compile=how)).images]
    if user == "generator":
        settings = GeneratorSettings(steps=3, latent_dim=8, width=4, compile=how)
        return [generate(teacher, LABELS, deep_inversion(), settings).images]
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if user == "distillation":
        settings = DistillationSettings(rounds=2, updates=2, batch_size=8, pad=1, compile=how)
        history = distill(teacher.freeze(), network, images, settings).history
        return [torch.tensor([record["loss"] for record in history]), *network.state_dict().values()]
    forward = Compiled(network.train().forward, network, how == "always")
    for part in (images, images[:7], images):  # as in a training that changes its images' size
        nn.functional.cross_entropy(forward(part), LABELS[: len(part)]).backward()
    return [*(parameter.grad for parameter in network.parameters()), *network.state_dict().values()]


@pytest.mark.parametrize("user", ["inversion", "generator", "distillation", "training"])
@pytest.mark.parametrize("when", ["never", "forward", "backward", "second"])
def test_a_compiler_that_fails_is_told_of_once_and_gone_without(tiny, compile_with, user, when):
    """Whether it fails or not: a trial leaves nothing behind in buffers, gradients and random numbers."""
    graphs = []

    def fail(graph, inputs):
        raise RuntimeError("gcc: Python.h: no such file")

    def backend(graph, inputs):
        graphs.append(graph)
        fails = when == "forward" or (when == "second" and len(graphs) > 1)
        return fail(graph, inputs) if fails else graph.forward

    compile_with(aot_autograd(fw_compiler=backend, bw_compiler=fail) if when == "backward" else backend)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        results = numbers(tiny, user, "always")
    told = [str(warning.message) for warning in told if warning.category is RuntimeWarning]
    second = user in ("generator", "training")  # a generator has a step as well
    assert graphs and len(told) == {"never": 0, "second": second}.get(when, 1 + (user == "generator"))
    assert all("going on without compilation: " in text and "no such file" in text for text in told)
    pairs = zip(results, numbers(tiny, user, "never"), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_trial_draws_no_random_number_and_what_fails_plain_as_well_is_the_callers(graphs):
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    compiled = Compiled(network.forward, network)
    images, answers = torch.rand(3, 4), []
    for call in (compiled, network):
        torch.manual_seed(0)
        answers.append(call(images))
    assert torch.equal(*answers) and network[2].num_batches_tracked == 2
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        warnings.simplefilter("error")
        compiled(torch.rand(3, 5))
    assert compiled.on


@pytest.mark.parametrize(
    "programs, cc, header, missing",
    [
        (("gcc",), "", True, ""),
        (("clang",), "", True, ""),
        (("my-cc",), "my-cc", True, ""),
        (("gcc",), "nowhere", True, "CC=nowhere is no program"),
        (("g++",), "", True, "neither gcc nor clang is there"),
        (("gcc",), "", False, "Python.h is not there (install python3-dev)"),
        ((), "", False, "neither gcc nor clang is there, and "),
    ],
)
def test_cuda_needs_a_c_compiler_and_pythons_headers(monkeypatch, tmp_path, programs, cc, header, missing):
    compiling._warn_once.cache_clear()
    monkeypatch.setenv("CC", cc)
    monkeypatch.setattr("shutil.which", lambda name: name if name in programs else None)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    if header:
        (tmp_path / "Python.h").touch()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [compiler_available(CUDA) for _ in range(2)] == 2 * [not missing]
    assert len(told) == bool(missing) and (not missing or missing in str(told[0].message))
    compiling._warn_once.cache_clear()


@pytest.mark.parametrize("programs", [("g++",), ("gcc",)])
def test_a_cpu_needs_a_cpp_compiler_without_which_the_plain_path_runs_in_silence(tiny, monkeypatch, programs):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name if name in programs else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler_available(CPU) == ("g++" in programs)
        if not compiler_available(CPU):
            monkeypatch.setattr(torch, "compile", None)
            assert not invert(tiny(), LABELS, deep_inversion(), ALWAYS).compiled
