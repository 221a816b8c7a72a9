"""On a CUDA device, where there is one: recorded steps, equal bytes, and a host that never waits."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dinv.compiling import Recorded
from dinv.data import augment
from dinv.data.dataset import sent
from dinv.distillation import DistillationSettings, DistillStep, InversionSource, distill, mixup
from dinv.experiments import device
from dinv.feature_statistics import moments
from dinv.generator import GeneratorSettings, generate
from dinv.inversion import InversionSettings, balanced_labels, invert
from dinv.models import create_model
from dinv.objectives import Competition, CrossEntropy, FeatureStatistics, TotalVariation
from dinv.step import Step
from dinv.training import Updates, UpdateSettings, optimizer_for

CUDA = torch.device("cuda")
LABELS = balanced_labels(20, 5)
OBJECTIVE = CrossEntropy() + 0.1 * TotalVariation() + 1.0 * FeatureStatistics()
SETTINGS = InversionSettings(lr=0.1, stages=((3, 4), (5, 8)), compile="never")


class FakeCard:
    """As much of a tensor on a card as `Recorded` looks at."""

    is_cuda, shape = True, torch.Size([2])

    def get_device(self):
        return -1  # of a computer without a card


def test_what_cannot_be_recorded_is_called_as_it_is(monkeypatch):
    calls, cards = [], []
    recorded = Recorded(lambda x: (calls.append(x),), list)
    monkeypatch.setattr(recorded, "_record", lambda inputs: 1 / 0)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: cards.append(x) or nullcontext())
    with pytest.warns(RuntimeWarning, match="going on without a CUDA graph: division by zero"):
        recorded(FakeCard())
    assert cards == calls  # a recording belongs to the card of its inputs, not to the current one
    recorded(FakeCard())
    assert len(calls) == 2 and not recorded.on


def test_what_fails_without_recording_fails_as_it_is():
    recorded = Recorded(lambda x: x.nothing, list)
    with pytest.raises(AttributeError, match="nothing"):
        recorded(FakeCard())


class TestOnACard:
    pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

    @pytest.fixture(autouse=True)
    def repeatable(self, monkeypatch):
        monkeypatch.setenv("DINV_DEVICE", "cuda")
        device.begin("smoke")

    @pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_moments_and_their_gradient_are_those_of_float64(self, form, dtype):
        x = 3 + 2 * torch.randn(16, 8, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        exact = x.double().requires_grad_()
        x = x.to(CUDA).contiguous(memory_format=form).requires_grad_()
        ours, theirs = moments(x, torch.zeros(8, device=CUDA)), moments(exact, torch.zeros(8))
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == torch.float32 and torch.allclose(one.cpu().double(), other, rtol=1e-5)
        weights = torch.arange(8.0)
        (given,) = torch.autograd.grad((ours[0] + ours[1]) @ weights.to(CUDA), x)
        (wanted,) = torch.autograd.grad((theirs[0] + theirs[1]) @ weights.double(), exact)
        assert torch.allclose(
            given.cpu().double(), wanted, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-6
        )

    def test_a_recorded_step_is_the_plain_one(self, tiny):
        teacher, student = tiny(0).to(CUDA), tiny(1).to(CUDA)
        objective = OBJECTIVE + 2.0 * Competition(student)
        recorded, plain = (Step(teacher, objective, False) for _ in range(2))
        plain._recorded.on = False
        weights = torch.tensor(recorded.weights, device=CUDA)
        for round in range(3):
            pixels = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(round)).to(CUDA)
            for step in (recorded, plain):
                step.load_student(tiny(round + 2).to(CUDA))
            pairs = zip(*(step(pixels, LABELS.to(CUDA), weights) for step in (recorded, plain)), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
        assert recorded._recorded.on and recorded._recorded._recordings

    def test_a_recorded_update_of_muon_is_the_plain_one(self, monkeypatch):
        weights = []
        for plain in (False, True):
            if plain:
                monkeypatch.setattr("dinv.muon.Recorded", lambda function, kept: function)
            model = create_model("resnet_tiny", seed=1).to(CUDA).to(memory_format=torch.channels_last)
            optimizer = optimizer_for(model, UpdateSettings(muon=0.2))
            for update in range(4):
                for parameter in model.parameters():
                    draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(update))
                    parameter.grad = draw.to(CUDA)
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 * (update + 1)
                optimizer.step()
            (moves,) = optimizer._recordings.values()
            assert plain or (moves.on and moves._recordings)
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.allclose(*weights, rtol=1e-6, atol=0)

    def test_a_network_that_asks_the_card_for_a_number_goes_on_without(self, tiny):
        class Asking(nn.Module):
            def forward(self, x):
                return x * (1 if x.sum().item() > 0 else 2)

        teacher = tiny()
        teacher.net = nn.Sequential(Asking(), teacher.net)
        with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
            assert invert(teacher.to(CUDA), LABELS, OBJECTIVE, SETTINGS).images.is_cuda

    def test_equal_seeds_give_equal_bytes(self):
        teacher = create_model("resnet_small").to(CUDA).freeze()
        labels = balanced_labels(64, 10)
        settings = InversionSettings(steps=20, compile="never")
        images = [invert(teacher, labels, OBJECTIVE, settings, seed=1).images for _ in range(2)]
        assert torch.equal(*images)
        images = [
            generate(teacher, labels, OBJECTIVE, GeneratorSettings(compile="never")).images for _ in range(2)
        ]
        assert torch.equal(*images)
        weights = []
        for _ in range(2):
            student = create_model("resnet_tiny", seed=1).to(CUDA)
            source = InversionSource(teacher, OBJECTIVE, settings, batch_size=64, competition=1.0)
            distill(
                teacher,
                student,
                source,
                DistillationSettings(batch_size=32, rounds=3, updates=5, compile="never"),
            )
            weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
        assert torch.equal(*weights)

    def test_the_host_never_waits_within_a_round(self):
        teacher, student = (create_model("resnet_tiny", seed=seed).to(CUDA) for seed in range(2))
        generator, pool = torch.Generator().manual_seed(0), torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
        pool, labels, pixels = pool.to(CUDA), LABELS.to(CUDA), torch.randn(20, 3, 32, 32).to(CUDA)
        step = DistillStep(teacher, student, compile="never")
        loop = Updates(step.student.train(), UpdateSettings(muon=0.2), 20, 20, generator)
        descent = Step(teacher, OBJECTIVE, False)
        weights = torch.tensor(descent.weights, device=CUDA)

        def update():
            picked = sent(torch.randint(64, (20,), generator=generator), CUDA)
            batch = mixup(augment(pool[picked], generator, pad=2).float().div_(255), generator)
            loss = step(batch.contiguous(memory_format=torch.channels_last))[0]
            loop.update()
            return loss, descent(pixels, labels, weights)

        update(), update()
        torch.cuda.set_sync_debug_mode("error")
        try:
            update()
            with pytest.raises(RuntimeError, match="synchroniz"):
                update()[0].item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
