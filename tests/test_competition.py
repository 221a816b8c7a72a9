"""R_compete: against NumPy in float64, at the extremes, and with a student that goes on learning."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dinv.files import digest
from dinv.inversion import InversionSettings, Inverter, balanced_labels, invert
from dinv.objectives import Competition, CrossEntropy, View, jensen_shannon
from dinv.step import Step


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numpy_js(one, other):
    """Straight from the definition, with probabilities in float64 and 0 log 0 = 0."""

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def kl(p, q):
        return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0).sum(1)

    p, q = softmax(one.numpy()), softmax(other.numpy())
    m = (p + q) / 2
    return 0.5 * (kl(p, m) + kl(q, m))


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_against_numpy(classes, scale):
    one, other = (
        scale * torch.randn(6, classes, generator=generator(s), dtype=torch.float64) for s in (1, 2)
    )
    js = jensen_shannon(one, other)
    assert js.shape == (6,)
    np.testing.assert_allclose(js.numpy(), numpy_js(one, other), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(jensen_shannon(one.float(), other.float()), js.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jensen_shannon(other, one), js)


def test_equal_outputs_are_at_no_distance_and_opposite_ones_at_ln_2():
    logits = torch.randn(4, 10, generator=generator())
    assert jensen_shannon(logits, logits + 7).abs().max() < 1e-6
    sure, other = (1e4 * nn.functional.one_hot(torch.tensor([k]), 10).float() for k in (2, 5))
    assert jensen_shannon(sure, other).item() == pytest.approx(math.log(2), rel=1e-6)


EXTREMES = {
    "uniform": lambda k: torch.zeros(3, k),
    "one-hot": lambda k: 1e4 * nn.functional.one_hot(torch.arange(3), k).float(),
    "all but one impossible": lambda k: torch.full((3, k), -1e30).index_fill(1, torch.tensor([0]), 0.0),
    "ordinary": lambda k: torch.randn(3, k, generator=generator()),
}


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("one", EXTREMES)
@pytest.mark.parametrize("other", EXTREMES)
def test_value_and_gradient_are_finite_at_the_extremes(one, other, classes):
    logits = EXTREMES[one](classes).requires_grad_(), EXTREMES[other](classes).requires_grad_()
    value = jensen_shannon(*logits)
    assert ((value >= -1e-6) & (value <= math.log(2) + 1e-6)).all()
    value.sum().backward()
    assert all(x.grad.isfinite().all() for x in logits)


@pytest.mark.parametrize("classes", [10, 1000])
def test_gradient_against_finite_differences(classes):
    one = 2 * torch.randn(2, classes, generator=generator(), dtype=torch.float64)
    other = 2 * torch.randn(2, classes, generator=generator(1), dtype=torch.float64)
    one.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jensen_shannon(x, other).sum(), one)


def test_the_term_is_one_minus_the_mean_over_images(tiny):
    teacher, student = tiny(0).freeze(), tiny(1).freeze()
    images = torch.rand(6, 3, 8, 8, generator=generator())
    view = View(images, torch.zeros(6).long(), teacher(images), images=images)
    js = jensen_shannon(teacher(images), student(images))
    assert Competition(student)(view).item() == pytest.approx(1 - js.mean().item())
    agree = teacher(images).argmax(1) == student(images).argmax(1)
    expected = 1 - (js * agree).sum().item() / 6
    assert Competition(student, agreeing=True)(view).item() == pytest.approx(expected)
    assert 0 < agree.sum() < 6  # both kinds were there


def test_competing_images_are_more_in_dispute(tiny):
    teacher, student = tiny(0).freeze(), tiny(1).freeze()
    settings = InversionSettings(steps=40, lr=0.1, flip=False, compile="never")
    labels, js = balanced_labels(20, 5), {}
    for weight in (0.0, 10.0):
        images = invert(teacher, labels, CrossEntropy() + weight * Competition(student), settings).images
        js[weight] = jensen_shannon(teacher(images), student(images)).mean().item()
    assert js[10.0] > 1.5 * js[0.0]


def test_the_student_is_left_as_it_was(tiny, portrait):
    teacher, student = tiny(0).freeze(), tiny(1).train()
    before = portrait(student)
    objective = CrossEntropy() + Competition(student)
    invert(teacher, [0, 1], objective, InversionSettings(steps=3, compile="never"))
    assert portrait(student) == before


def test_an_inversion_competes_with_the_student_as_it_is_then(tiny):
    teacher, student, settings = tiny(0), tiny(1), InversionSettings(steps=4, lr=0.1, compile="never")
    inverter = Inverter(teacher, CrossEntropy() + 10 * Competition(student), settings)
    before = inverter([0, 1], seed=2).images
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    after = inverter([0, 1], seed=2).images
    assert not torch.equal(before, after)
    assert torch.equal(after, invert(teacher, [0, 1], inverter.objective, settings, seed=2).images)


def test_another_student_of_the_same_kind_can_be_loaded(tiny):
    teacher, students = tiny(0).freeze(), (tiny(1).freeze(), tiny(2).freeze())
    step = Step(teacher, 1.0 * Competition(students[0]), compiled=False)
    pixels = torch.randn(4, 3, 8, 8, generator=generator())
    images = pixels * teacher.std + teacher.mean
    for student in (*students, students[0]):
        step.load_student(student)
        step.reload()
        terms, _ = step(pixels, balanced_labels(4, 5), torch.ones(1))
        js = jensen_shannon(teacher(images), student(images)).mean().item()
        assert terms.item() == pytest.approx(1 - js, rel=1e-4)
    with pytest.raises(ValueError, match="tiny does not fit this step, make a new one: .*size mismatch"):
        step.load_student(tiny(1, classes=4))
    with pytest.raises(ValueError, match="no student competes in this objective: add .*Competition"):
        Step(teacher, CrossEntropy(), compiled=False).load_student(students[0])


def test_the_digest_follows_the_student(tiny):
    assert digest(Competition(tiny(1))) == digest(Competition(tiny(1)))
    others = (Competition(tiny(1)), Competition(tiny(2)), Competition(tiny(1), agreeing=True))
    assert len({digest(term) for term in others}) == 3


def test_other_classes_are_refused(tiny):
    with pytest.raises(ValueError, match="the same classes: tiny has 5, tiny has 4"):
        Competition(tiny(1, classes=4)).bind(tiny(0))
