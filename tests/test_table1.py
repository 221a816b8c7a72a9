"""Table 1: what the methods have in common, where they differ, and that they need no data."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinv.compiling import forward_flops
from dinv.data import load_dataset
from dinv.distillation import FixedImages, InversionSource
from dinv.experiments import paper, table1
from dinv.experiments.profiles import PROFILES, load_profile
from dinv.experiments.settings import PAPER
from dinv.experiments.stages import distill, fresh_student, networks_of, synthesize
from dinv.generator import GeneratorSource, create_generator
from dinv.inversion import Inverter, balanced_labels
from dinv.models import NETWORKS, create_model
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, TotalVariation

PAIR = "resnet_digits->vgg_digits"
DATA_FREE = ("raw noise", "noise", "DeepDream", "DeepInversion", "ADI", "generator")
SHORT = {
    **{"batch_size": 20, "distillation.start_images": 40},
    **{"distillation.inversion.stages": ((3, 8),), "distillation.settings.rounds": 3},
    **{"distillation.settings.updates": 2, "distillation.settings.batch_size": 20},
    **{"generator.distillation.rounds": 3, "generator.distillation.updates": 2, "generator.images": 20},
    **{"generator.settings.steps": 2, "generator.warmup": 1},
}


@pytest.fixture
def profile(short_profile):
    return short_profile(SHORT)


def objectives_of(profile):
    """As notebook 04 writes them down; ADI adds the competition to that of DeepInversion."""
    chosen = profile.distillation
    prior = CrossEntropy() + chosen.tv * TotalVariation() + profile.l2 * L2Norm()
    of_generator = CrossEntropy() + profile.tv * TotalVariation() + profile.l2 * L2Norm()
    return {
        "noise": 1.0 * CrossEntropy(),
        "DeepDream": prior,
        "DeepInversion": prior + profile.alpha_f * FeatureStatistics(),
        "generator": of_generator + profile.generator.alpha_f * FeatureStatistics(),
    }


def pool_of(profile, method, teacher, seed=0):
    inverter = Inverter(teacher, objectives_of(profile)[method], profile.distillation.inversion)
    labels = balanced_labels(table1.image_count(profile), len(teacher.classes))
    return synthesize(inverter, labels, batch_size=profile.batch_size, seed=seed)


def source_of(profile, method, teacher, seed=0):
    """As notebook 04 writes them down."""
    d, g, objectives = profile.distillation, profile.generator, objectives_of(profile)
    if method == "generator":
        options = {"batch_size": g.images, "seed": seed, "competition": g.alpha_c, "warmup": g.warmup}
        return GeneratorSource(teacher, objectives["generator"], g.settings, **options)
    if method == "ADI":
        start = pool_of(profile, "DeepInversion", teacher, seed).images[: d.start_images]
        options = {"batch_size": profile.batch_size, "seed": seed, "competition": d.alpha_c}
        return InversionSource(teacher, objectives["DeepInversion"], d.inversion, start=start, **options)
    if method == "raw noise":
        images = table1.noise(teacher, table1.image_count(profile), seed)
    else:
        images = pool_of(profile, method, teacher, seed).images
    return FixedImages(images, start=d.start_images, batch_size=profile.batch_size)


def test_all_methods_have_the_same_number_of_images_and_objectives_that_grow(profile):
    names = {method: objective.names for method, objective in objectives_of(profile).items()}
    assert names["DeepInversion"] == names["generator"] == (*names["DeepDream"], "feature statistics")
    teacher, architecture = networks_of(profile, PAIR)
    assert architecture == "vgg_digits" and table1.image_count(profile) == 80
    assert [len(source_of(profile, name, teacher).start) for name in DATA_FREE] == [40] * 5 + [0]
    student = create_model("vgg_digits", "digits").freeze()
    for method in DATA_FREE[:-1]:
        source = source_of(profile, method, teacher)
        assert source(0, student) is None  # a round with the first images alone
        assert [source(number, student).shape for number in (1, 2)] == [(20, 1, 8, 8)] * 2


def test_the_work_of_a_method_is_counted_by_hand(profile):
    teacher, student = (create_model(name, "digits").freeze() for name in ("resnet_digits", "vgg_digits"))
    one, two = forward_flops(teacher), forward_flops(student)
    updates = 3 * 2 * 20 * (one + 3 * two)  # rounds, updates, batch
    assert one != two
    assert table1.work(profile, "raw noise", teacher, student) == (0, updates)
    assert table1.work(profile, "all real", teacher, student) == (0, updates)
    assert table1.work(profile, "DeepInversion", teacher, student) == (80 * 3 * 2 * one, updates)
    assert table1.work(profile, "noise", teacher, student) == (80 * 3 * 2 * one, updates)  # optimised, too
    adaptive = 80 * 3 * 2 * one + 40 * 3 * 2 * two  # the student looks at the images of the rounds alone
    assert table1.work(profile, "ADI", teacher, student) == (adaptive, updates)
    synthesis, learning = table1.work(profile, "generator", teacher, student)
    rounds, steps, images = 3, 2, 20
    maker = FlopCounterMode(display=False)
    with maker, torch.no_grad():
        network = create_generator(teacher, profile.generator.settings).eval()
        network(torch.zeros(1, profile.generator.settings.latent_dim), torch.tensor([0]))
    competing = (rounds - 1) * images * steps * 2 * two  # not in the round of the warm-up
    expected = rounds * images * steps * (2 * one + 3 * maker.get_total_flops()) + competing
    assert (synthesis, learning) == (expected, updates / 20 * 64) and maker.get_total_flops() > 0


def test_rounds_make_updates_or_work_equal(profile, short_profile):
    teacher, student = (create_model(name, "digits").freeze() for name in ("resnet_digits", "vgg_digits"))
    longer = short_profile(SHORT | {"generator.distillation.rounds": 50})
    assert table1.at_equal_updates(longer, "generator").rounds == 3
    assert table1.at_equal_updates(profile, "ADI") == profile.distillation.settings
    budget = sum(table1.work(profile, "ADI", teacher, student))
    for name in ("generator", "all real", "ADI"):
        rounds = table1.at_equal_work(profile, name, teacher, student).rounds
        part = "generator.distillation" if name == "generator" else "distillation.settings"
        fewer, more = (
            sum(table1.work(short_profile(SHORT | {f"{part}.rounds": r}), name, teacher, student))
            for r in (rounds, rounds + 1)
        )
        assert fewer <= 1.2 * budget and more > budget, name  # the generator's warm-up is no share of all


def test_adi_begins_with_the_images_of_deepinversion_and_goes_on_with_its_seeds(profile):
    teacher, _ = networks_of(profile, PAIR)
    fixed = source_of(profile, "DeepInversion", teacher)
    d, objective = profile.distillation, objectives_of(profile)["DeepInversion"]
    live = InversionSource(teacher, objective, d.inversion, start=fixed.start, batch_size=20)
    assert torch.equal(live.start, source_of(profile, "ADI", teacher).start)
    for number in (1, 2):  # without the competition it makes the very batches of the other method
        assert torch.equal(live(number, teacher), fixed(number, teacher))


@pytest.mark.parametrize("method", DATA_FREE)
def test_a_data_free_method_needs_no_training_image(profile, monkeypatch, method):
    def only_tests(name, split, *more, original=load_dataset):
        assert split == "test", "a data-free method asked for training images"
        return original(name, split, *more)

    for module in ("data", "experiments.table1", "experiments.stages"):
        monkeypatch.setattr(f"dinv.{module}.load_dataset", only_tests)
    teacher, architecture = networks_of(profile, PAIR)
    settings = profile.generator.distillation if method == "generator" else profile.distillation.settings
    source, student = source_of(profile, method, teacher), fresh_student(profile, architecture, 0)
    tests = load_dataset("digits", "test")
    result = distill(teacher, student, source, settings, seed=0, eval_data=tests, eval_every=1)
    synthesised = 60 if method == "generator" else 40  # else the first of three rounds has the start alone
    assert len(result.history) == 3 and len(result.images) == synthesised
    cost = table1.cost(result, before=5.0)
    assert cost["synthesis"] >= 5 and cost["distillation"] > 0
    assert cost["total"] > cost["synthesis"] + cost["distillation"]
    minutes, accuracies = table1.timeline(result, before=60.0)
    assert len(minutes) == len(accuracies) == 3 and 1 < minutes[0] < minutes[-1]
    assert minutes[-1] - 1 == pytest.approx((cost["synthesis"] - 5 + cost["distillation"]) / 60)


def test_the_ceilings_have_their_share_of_every_class(profile):
    counts = [len(table1.real_images(profile, share)) for share in ("1 % real", "10 % real", "all real")]
    assert counts == [10, 140, 1437]
    with pytest.raises(ValueError, match="'some real' of the real images must read"):
        table1.real_images(profile, "some real")


# ---- the paper -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PROFILES)
def test_the_columns_of_every_profile_fit_its_networks_and_batches(name):
    profile = load_profile(name)
    for pair in profile.distillation.pairs:
        assert set(pair.split("->")) <= set(NETWORKS)
    assert profile.distillation.start_images % profile.batch_size == 0


def test_the_paper_profile_holds_the_papers_numbers():
    d = PAPER.distillation
    numbers = (d.settings.batch_size, d.settings.lr, d.settings.temperature, d.alpha_c, d.settings.schedule)
    assert numbers == (256, 0.1, 3.0, 10.0, "steps")
    assert d.settings.rounds * d.settings.updates == 250 * 195 and d.settings.updates == 50
    assert table1.image_count(PAPER) == 1000 * 256
    assert set(d.pairs) == set(paper.PAIRS)
