"""bfloat16 and float32: which of the two when, and that they see the same objective."""

import pytest
import torch
from torch import nn

from dinv.continual import ContinualSettings
from dinv.distillation import DistillationSettings, DistillStep
from dinv.files import digest
from dinv.generator import GeneratorSettings, generate
from dinv.inversion import InversionSettings, balanced_labels, invert
from dinv.models import load_model
from dinv.objectives import Competition, CrossEntropy, FeatureStatistics, TotalVariation
from dinv.precision import autocast, choose
from dinv.step import Step
from dinv.training import TrainingSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OBJECTIVE = CrossEntropy() + 2.5e-5 * TotalVariation() + 1.0 * FeatureStatistics()


@pytest.fixture
def hardware(monkeypatch):
    """`hardware(avx512_bf16=True)`: what the machine has, and nothing else."""
    monkeypatch.delenv("DINV_PRECISION", raising=False)

    def has(avx512_bf16=False, amx=False, card=False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: card)

    return has


def test_auto_goes_by_what_the_hardware_multiplies(hardware, monkeypatch):
    plain, depthwise = nn.Conv2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    hardware()
    assert choose("auto", CPU, plain) == choose("auto", CUDA, plain) == "float32"
    for had in ("avx512_bf16", "amx"):
        hardware(**{had: True})
        assert choose("auto", CPU, plain) == "bfloat16" != choose("auto", CPU, plain, depthwise)
        assert choose("auto", CUDA, plain) == "float32"
    hardware(card=True)  # where it helps depthwise networks as well
    assert choose("auto", CUDA, depthwise) == "bfloat16" != choose("auto", CPU, plain)
    monkeypatch.setenv("DINV_PRECISION", "float32")
    assert choose("auto", CUDA, plain) == "float32" and choose("bfloat16", CPU, depthwise) == "bfloat16"


def test_a_misspelt_precision_is_refused(monkeypatch):
    for settings in (InversionSettings, GeneratorSettings, TrainingSettings, DistillationSettings):
        with pytest.raises(ValueError, match="unknown precision 'bf16': choose auto, float32, bfloat16"):
            settings(precision="bf16")
    monkeypatch.setenv("DINV_PRECISION", "half")
    with pytest.raises(ValueError, match="unknown precision 'half': choose auto, float32, bfloat16"):
        choose("auto", CPU)


def test_what_was_kept_before_there_was_a_choice_is_found_again():
    kept = {
        InversionSettings: "2e1182210029b8c3",
        GeneratorSettings: "43de882e675313d2",
        DistillationSettings: "75528214805b3b22",
    }
    kept |= {TrainingSettings: "86b12877011003c8", ContinualSettings: "8a43ba05c4eb00e0"}
    for settings, before in kept.items():
        assert digest(settings()).startswith(before)
        assert digest(settings(precision="float32")) != digest(settings())


@pytest.mark.parametrize("name", ["resnet_small", "vgg_small", "resnet_digits", "vgg_digits", "tiny"])
def test_both_precisions_descend_alike(tiny, name):
    teacher = tiny() if name == "tiny" else load_model(name)
    labels = balanced_labels(32, len(teacher.classes))
    steps = [Step(teacher, OBJECTIVE, False, precision) for precision in ("float32", "bfloat16")]
    weights = torch.tensor(steps[0].weights)
    halfway = invert(teacher, labels, OBJECTIVE, InversionSettings(steps=20, lr=0.1, compile="never")).images
    noise = torch.randn(halfway.shape, generator=torch.Generator().manual_seed(0))
    for pixels, least in ((noise, 0.995), ((halfway - teacher.mean) / teacher.std, 0.95)):
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        (exact, one), (terms, other) = (step(pixels, labels, weights) for step in steps)
        assert terms.dtype == other.dtype == torch.float32
        assert torch.allclose(terms, exact, rtol=0.03, atol=0.02)
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) >= least


def test_bfloat16_is_for_the_layers_alone(tiny, monkeypatch):
    monkeypatch.setenv("DINV_PRECISION", "bfloat16")
    teacher, student = tiny(0), tiny(1)
    kinds = []

    def watch(*networks):
        for network in networks:
            network.net[0].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))

    step = Step(teacher, OBJECTIVE + 1.0 * Competition(student), False)
    watch(*(own for own, _ in step._copies))
    labels = balanced_labels(10, 5)
    terms, gradient = step(torch.randn(10, 3, 8, 8), labels, torch.tensor(step.weights))
    assert kinds == [torch.bfloat16] * 2 and terms.dtype == gradient.dtype == torch.float32
    images = generate(teacher, labels, OBJECTIVE, GeneratorSettings(steps=1, compile="never")).images
    assert images.dtype == torch.float32
    distillation = DistillStep(teacher, student, compile="never")
    watch(distillation.teacher, distillation.student)
    loss, _ = distillation(images)
    assert loss.dtype == torch.float32 and kinds == [torch.bfloat16] * 4
    with autocast(CPU, "float32"):
        assert teacher.net[0](torch.zeros(1, 3, 8, 8)).dtype == torch.float32
