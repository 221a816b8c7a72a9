"""Training-based inversion: same call and result as `invert`; what is carried from round to round."""

import pytest
import torch

from dinv.generator import GeneratorSettings, GeneratorSource, ImageGenerator, create_generator, generate
from dinv.inversion import Inversion, InversionSettings, NotFinite, balanced_labels
from dinv.objectives import Competition, CrossEntropy, FeatureStatistics, Term
from dinv.step import inversion_step

SETTINGS = GeneratorSettings(steps=6, latent=8, width=4, jitter=1, compile="never")
LABELS = balanced_labels(20, 5)


def objective():
    return CrossEntropy() + 1.0 * FeatureStatistics()


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_is_that_of_an_inversion(tiny, portrait):
    teacher = tiny().freeze()
    before = portrait(teacher)
    told = []
    found = generate(
        teacher,
        LABELS,
        objective(),
        SETTINGS,
        snapshots=(0, 5),
        callback=lambda p: told.append(p.step),
        every=2,
    )
    assert isinstance(found, Inversion) and portrait(teacher) == before
    assert found.images.shape == (20, 3, 8, 8) and found.images.dtype == torch.float32
    assert found.images.min() >= 0 and found.images.max() <= 1 and found.images.is_contiguous()
    assert torch.equal(found.labels, LABELS) and set(found.snapshots) == {0, 5} and told == [2, 4, 6]
    assert set(found.losses) == {"cross-entropy", "feature statistics", "objective"}
    assert all(len(values) == 6 for values in found.losses.values())
    sums = zip(found.losses["cross-entropy"], found.losses["feature statistics"], strict=True)
    assert found.losses["objective"] == pytest.approx([a + b for a, b in sums], rel=1e-4)


def test_more_steps_lower_the_objective(tiny):
    losses = generate(tiny().freeze(), LABELS, objective(), GeneratorSettings(
        steps=60, latent=8, width=4, jitter=0, flip=False, compile="never")).losses["objective"]  # fmt: skip
    assert min(losses) < 0.6 * losses[0]


def test_the_gradient_of_the_weights_is_that_of_the_whole_chain(tiny):
    """Step's gradient at the pixels, sent on through the generator, against one graph in float64."""
    teacher = tiny().double().freeze()
    network = create_generator(teacher, SETTINGS).double()
    latent = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = inversion_step(teacher, objective(), InversionSettings(steps=1, compile="never"), batch=20)
    pixels = (network(latent, LABELS) - teacher.mean) / teacher.std
    ones = torch.ones(2, dtype=torch.float64)
    _, gradient = step(pixels, LABELS, ones)
    pixels.backward(gradient)
    found = [p.grad.clone() for p in network.parameters()]
    weight = network.blocks[2].weight
    index, size, values = (1, 2, 0, 1), 1e-6, []
    for change in (size, -2 * size):
        with torch.no_grad():
            weight[index] += change
            pixels = (network(latent, LABELS) - teacher.mean) / teacher.std
        values.append(step(pixels, LABELS, ones)[0].sum().item())
    found = dict(zip((name for name, _ in network.named_parameters()), found, strict=True))
    wanted = (values[0] - values[1]) / (2 * size)
    assert found["blocks.2.weight"][index].item() == pytest.approx(wanted, rel=1e-4)


def test_equal_seeds_give_equal_bytes(tiny):
    teacher = tiny().freeze()
    one, two, other = (generate(teacher, LABELS, objective(), SETTINGS, seed=s).images for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_labels_decide_what_is_made():
    network = ImageGenerator(5, 3, 8, latent=8, width=4).eval()
    latent = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(5, 8)
    images = network(latent, torch.arange(5))
    assert images.shape == (5, 3, 8, 8)
    assert min((images[a] - images[b]).abs().max() for a in range(5) for b in range(a)) > 0


def test_a_given_network_is_trained_in_place(tiny):
    teacher = tiny().freeze()
    network = create_generator(teacher, SETTINGS)
    before = state(network)
    generate(teacher, LABELS, objective(), SETTINGS, network=network)
    assert not equal(before, state(network))


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_starting_point_moves_towards_where_a_batch_ended(tiny, rate):
    teacher = tiny().freeze()
    settings = GeneratorSettings(**{**vars(SETTINGS), "meta_rate": rate})
    source = GeneratorSource(teacher, objective(), settings, batch=20)
    start = {name: value.clone() for name, value in source.start.items()}
    images = source(0, tiny(1))
    assert images.dtype == torch.uint8 and images.shape == (20, 3, 8, 8)
    for name, end in source.network.state_dict().items():
        if end.is_floating_point():
            torch.testing.assert_close(source.start[name], start[name] + rate * (end - start[name]))
    if rate == 0:
        assert equal(start, source.start)


def test_a_learnt_starting_point_is_better_than_a_fresh_one(tiny):
    teacher = tiny().freeze()
    values = {}
    for rate in (0.0, 0.5):
        settings = GeneratorSettings(**{**vars(SETTINGS), "meta_rate": rate})
        source = GeneratorSource(teacher, objective(), settings, batch=20)
        for number in range(15):
            source(number, tiny(1))
        source.network.load_state_dict(source.start)
        found = generate(teacher, LABELS, objective(), settings, network=source.network, seed=99)
        values[rate] = min(found.losses["objective"])
    assert values[0.5] < 0.9 * values[0.0]


def test_competition_begins_after_the_warmup(tiny, monkeypatch):
    teacher, weights = tiny().freeze(), []
    monkeypatch.setattr(Competition, "__rmul__", lambda self, w: weights.append(w) or self * w)
    source = GeneratorSource(teacher, objective(), SETTINGS, batch=20, competition=4.0, warmup=2)
    for number in range(4):
        source(number, tiny(1))
    assert weights == [1e-12, 1e-12, 4.0, 4.0]


def test_compiled_and_plain_agree(tiny):
    teacher = tiny().freeze()
    compiled = GeneratorSettings(**{**vars(SETTINGS), "compile": "always"})
    one, other = (generate(teacher, LABELS, objective(), s, seed=1) for s in (compiled, SETTINGS))
    assert one.compiled and not other.compiled
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
        ({"steps": 0}, "steps=0 of a generator must be positive"),
        ({"width": -1}, "width=-1"),
        ({"meta_rate": 1.5}, "meta_rate=1.5 must lie in 0 to 1"),
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
        ImageGenerator(5, 3, 10)
