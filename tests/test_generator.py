"""Training-based inversion: same call and result as `invert`; what is carried from round to round."""

from dataclasses import replace

import pytest
import torch

from dinv import generator
from dinv.generator import GeneratorInverter, GeneratorSettings, GeneratorSource, create_generator, generate
from dinv.inversion import Inversion, balanced_labels
from dinv.objectives import Competition, CrossEntropy, FeatureStatistics, Term
from dinv.step import NotFinite, Step

SETTINGS = GeneratorSettings(steps=6, latent_dim=8, width=4, jitter=1, compile="never")
LABELS = balanced_labels(20, 5)


def objective():
    return CrossEntropy() + 1.0 * FeatureStatistics()


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_is_that_of_an_inversion(tiny, portrait):
    teacher, steps = tiny().freeze(), []
    before = portrait(teacher)
    options = {"snapshots": (0, 5), "callback": lambda p: steps.append(p.step), "every": 2}
    result = generate(teacher, LABELS, objective(), SETTINGS, **options)
    assert isinstance(result, Inversion) and portrait(teacher) == before
    assert result.images.shape == (20, 3, 8, 8) and result.images.dtype == torch.float32
    assert result.images.min() >= 0 and result.images.max() <= 1 and result.images.is_contiguous()
    assert torch.equal(result.labels, LABELS) and set(result.snapshots) == {0, 5} and steps == [2, 4, 6]
    assert set(result.losses) == {"cross-entropy", "feature statistics", "objective"}
    assert all(len(values) == 6 for values in result.losses.values())
    sums = zip(result.losses["cross-entropy"], result.losses["feature statistics"], strict=True)
    assert result.losses["objective"] == pytest.approx([a + b for a, b in sums], rel=1e-4)


def test_more_steps_lower_the_objective(tiny):
    settings = replace(SETTINGS, steps=60, jitter=0, flip=False)
    losses = generate(tiny().freeze(), LABELS, objective(), settings).losses["objective"]
    assert min(losses) < 0.6 * losses[0]


def test_the_gradient_of_the_weights_is_that_of_the_whole_chain(tiny):
    """Step's gradient at the pixels, sent on through the generator, against finite differences in float64."""
    teacher = tiny().double().freeze()
    network = create_generator(teacher, SETTINGS).double()
    latent = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step, ones = Step(teacher, objective(), compiled=False), torch.ones(2, dtype=torch.float64)

    def pixels():
        return (network(latent, LABELS) - teacher.mean) / teacher.std

    at = pixels()
    at.backward(step(at, LABELS, ones)[1])
    weight, index, size, values = network.blocks[2].weight, (1, 2, 0, 1), 1e-6, []
    for change in (size, -2 * size):
        with torch.no_grad():
            weight[index] += change
        values.append(step(pixels(), LABELS, ones)[0].sum().item())
    assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * size), rel=1e-4)


def test_labels_decide_what_is_made():
    network = generator.ImageGenerator(5, 3, 8, latent_dim=8, width=4).eval()
    latent = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(5, 8)
    images = network(latent, torch.arange(5))
    assert images.shape == (5, 3, 8, 8)
    assert min((images[a] - images[b]).abs().max() for a in range(5) for b in range(a)) > 0


def test_an_inverter_goes_on_with_its_network_and_with_what_the_teacher_has_become(tiny):
    teacher = tiny().freeze()

    def fresh(seed=1, terms=None):
        return generate(teacher, LABELS, terms or objective(), SETTINGS, seed=seed).images

    inverter = GeneratorInverter(teacher, objective(), SETTINGS, seed=1)
    first = inverter(LABELS, seed=1).images
    assert torch.equal(first, fresh()) and not torch.equal(first, fresh(2))
    assert not torch.equal(first, inverter(LABELS, seed=1).images)
    start = create_generator(teacher, SETTINGS, 1).state_dict()
    teacher.load_state_dict(tiny(3).state_dict())
    inverter.network.load_state_dict(start)
    assert torch.equal(inverter(LABELS, seed=1).images, fresh())
    inverter.network.load_state_dict(start)
    alone = inverter(LABELS, seed=1, weights=(1.0, 0.0)).images  # the second term is out
    assert torch.equal(alone, fresh(terms=CrossEntropy()))


@pytest.mark.parametrize("lr", [0.0, 0.25, 1.0])
def test_the_starting_point_moves_towards_where_a_batch_ended(tiny, lr):
    source = GeneratorSource(tiny().freeze(), objective(), replace(SETTINGS, meta_lr=lr), batch_size=20)
    start = create_generator(tiny(), SETTINGS).state_dict()
    images = source(0, None)
    assert images.dtype == torch.uint8 and images.shape == (20, 3, 8, 8)
    for name, end in source._inverter.network.state_dict().items():
        if end.is_floating_point():
            torch.testing.assert_close(source.state()[name], start[name] + lr * (end - start[name]))
    assert lr > 0 or equal(start, source.state())
    assert torch.equal(images, source(0, None))  # begun anew


def test_a_learnt_starting_point_is_better_than_a_fresh_one(tiny):
    values = {}
    for lr in (0.0, 0.5):
        source = GeneratorSource(tiny().freeze(), objective(), replace(SETTINGS, meta_lr=lr), batch_size=20)
        for number in range(15):
            source(number, None)
        source._inverter.network.load_state_dict(source.state())
        values[lr] = min(source._inverter(LABELS, seed=99).losses["objective"])
    assert values[0.5] < 0.9 * values[0.0]


def test_competition_begins_after_the_warmup(tiny):
    """Its weight is 0 before, in one and the same step."""
    teacher = tiny().freeze()
    options = {"batch_size": 20, "seed": 3}
    plain = GeneratorSource(teacher, objective(), SETTINGS, **options)
    later = GeneratorSource(teacher, objective(), SETTINGS, competition=4.0, warmup=2, **options)
    same = [torch.equal(plain(number, tiny(1)), later(number, tiny(1))) for number in range(3)]
    assert same == [True, True, False]
    assert isinstance(later._inverter.step.objective.parts[-1][1], Competition)


def test_a_synthesis_goes_on_at_its_next_batch_to_the_same_bytes(tiny, memory):
    teacher, student, checkpoint = tiny().freeze(), tiny(1), memory(2)

    def run(checkpoint):
        source = GeneratorSource(teacher, objective(), SETTINGS, batch_size=20, competition=4.0)
        return generator.synthesize_from(source, 3, student, checkpoint=checkpoint)

    whole = run(memory())
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint)
    resumed = run(checkpoint)
    assert checkpoint.told == [(1, 3), (2, 3), (3, 3)] and torch.equal(whole.images, resumed.images)
    assert torch.equal(whole.labels, balanced_labels(20, 5).repeat(3)) and whole.seconds > 0


def test_compiled_and_plain_agree(tiny):
    teacher, compiled = tiny().freeze(), replace(SETTINGS, compile="always")
    one, other = (generate(teacher, LABELS, objective(), s, seed=1) for s in (compiled, SETTINGS))
    assert one.compiled and not other.compiled and one.compile_seconds > 0 == other.compile_seconds
    assert one.losses["objective"] == pytest.approx(other.losses["objective"], rel=1e-2)


class _Broken(Term):
    name = "broken"

    def __call__(self, view):
        return view.pixels.sum() * float("nan")


def test_nan_is_told_with_the_term_that_made_it(tiny):
    with pytest.raises(NotFinite, match="broken became nan at step 1"):
        generate(tiny().freeze(), LABELS, CrossEntropy() + _Broken(), SETTINGS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"width": -1}, "width=-1"),
        ({"meta_lr": 1.5}, "meta_lr=1.5 must lie in 0 to 1"),
        ({"compile": "auto"}, "unknown compile 'auto': choose always, never"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        GeneratorSettings(**change)


def test_bad_input(tiny):
    teacher = tiny().freeze()
    with pytest.raises(ValueError, match="label 5 is out of range: the teacher knows 5 classes"):
        generate(teacher, [0, 5], objective(), SETTINGS)
    with pytest.raises(ValueError, match="snapshots \\[6\\] must lie in 0 to 5"):
        generate(teacher, LABELS, objective(), SETTINGS, snapshots=(6,))
    with pytest.raises(ValueError, match="side is a multiple of 4, not 10"):
        generator.ImageGenerator(5, 3, 10)
