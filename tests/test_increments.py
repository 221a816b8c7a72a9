"""Table 7: scenarios, what each method may see, that data-free methods need no old image."""

from dataclasses import replace

import pytest

from dinv.data import DATASETS, load_dataset
from dinv.experiments import continual, stages
from dinv.experiments.profiles import load_profile
from dinv.files import digest
from dinv.inversion import Inverter, balanced_labels
from dinv.models import load_model
from dinv.objectives import CrossEntropy, FeatureStatistics

SHORT = {
    **{"batch_size": 20, "distillation.inversion.stages": ((3, 8),)},
    **{"continual.settings.updates": 3, "continual.settings.batch_size": 20, "continual.epochs": 1},
}


@pytest.fixture
def profile(short_profile):
    return short_profile(SHORT)


def inverted(profile, old):
    objective = CrossEntropy() + profile.alpha_f * FeatureStatistics()
    inverter = Inverter(old, objective, profile.distillation.inversion)
    return stages.synthesize(inverter, balanced_labels(40, len(old.classes)), batch_size=20).images


def test_the_steps_of_a_split(profile):
    parts = [continual.scenario(profile, (6, 2, 2), number) for number in range(3)]
    names = [part.new_train.classes for part in parts]
    assert names[:2] == [("6", "7"), ("8", "9")] and names[2][0] == "negative 0" and len(names[2]) == 10
    assert [len(part.old_test.classes) for part in parts] == [6, 8, 10]
    assert parts[1].new_train.labels.unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match="unknown domain 'birds': choose mnist or negative digits"):
        continual.new_domain("birds", "test")


def test_a_teacher_of_some_classes_is_trained_or_shipped(profile, ledger):
    model, history = continual.trained_on_part(profile, 4)
    assert model.classes == ("0", "1", "2", "3") and not model.training and history
    again = continual.teacher_of_part(profile, 4)  # none is shipped
    assert digest(again) == digest(model) and ledger[-1]["cached"]
    cpu = load_profile("cpu")
    for count, *_ in cpu.continual.splits:
        model = continual.teacher_of_part(cpu, count)
        assert model.classes == DATASETS["cifar10"][:count] and not model.training
        assert digest(model) == digest(load_model(f"{cpu.teacher}-{count}-classes"))


@pytest.mark.parametrize("replay", [False, True])
def test_an_increment_without_old_data_does_not_touch_them(profile, monkeypatch, replay):
    old = stages.network(profile, "teacher")
    data = replace(continual.scenario(profile, (10,)), old_train=None)

    def only_tests(name, split, *more, original=load_dataset):
        assert split == "test", "the old training images are gone"
        return original(name, split, *more)

    for module in ("data", "experiments.continual", "experiments.table1", "experiments.stages"):
        monkeypatch.setattr(f"dinv.{module}.load_dataset", only_tests)
    images = inverted(profile, old) if replay else None
    one, again, other = (
        continual.learn_increment(old, data, profile.continual.settings, images=images, seed=seed)
        for seed in (0, 0, 1)
    )
    assert one.network.classes == (*old.classes, *data.new_train.classes) and not one.network.training
    assert 0 <= one.accuracy.mean <= 100 and one.history == again.history
    assert digest(one.network) == digest(again.network) != digest(other.network)


def test_a_sequence_extends_what_the_last_step_left(profile):
    steps = []

    def step(network, data):
        steps.append((network, data))
        return continual.learn_increment(network, data, profile.continual.settings)

    done = continual.sequence(profile, (6, 2, 2), step)
    assert [len(one.network.classes) for one in done] == [8, 10, 20]
    for before, (network, data) in zip(done, steps[1:], strict=False):
        assert network is before.network and data.old_test.classes == network.classes
