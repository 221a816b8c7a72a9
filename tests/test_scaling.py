"""Notebook 09's processes: each has its rank and one thread; an error ends all; memory is a batch's."""

import time

import pytest
import torch

from dinv.experiments.scaling import OwnShare, beside, inverted, message_seconds, pool_cost, processes
from dinv.inversion import InversionSettings, balanced_labels
from dinv.models import load_model
from dinv.objectives import CrossEntropy, FeatureStatistics

OBJECTIVE = CrossEntropy() + 1.0 * FeatureStatistics()
SETTINGS = InversionSettings(steps=4, lr=0.1, jitter=1, precision="float32", compile="never")


def told(group, word):
    rank = group and (group.rank(), group.size())
    return rank, torch.get_num_threads(), word


def one_fails(group):
    if group.rank() == 1:
        raise ValueError("rank 1 has had enough")
    return message_seconds(group, "cpu", [1], 1)


def test_every_process_has_its_rank_and_one_thread():
    assert processes(2, told, "word") == [((0, 2), 1, "word"), ((1, 2), 1, "word")]
    assert processes(1, told, "word") == [(None, 1, "word")]


def test_an_error_in_one_rank_ends_all():
    began = time.monotonic()
    with pytest.raises((ValueError, RuntimeError)):
        processes(2, one_fails)
    assert time.monotonic() - began < 60  # a message waits for half an hour


def test_one_batch_alone_and_shared():
    seconds, images = processes(
        2, beside, load_model("resnet_digits"), OBJECTIVE, SETTINGS, balanced_labels(20, 10), 2
    )[0]
    assert [len(values) for values in (*seconds.values(), *images.values())] == [2] * 8
    alone, threads, shared, larger = (torch.stack(made) for made in images.values())
    assert larger.shape[1] == 40 and (alone[0] - alone[1]).abs().max() > 0.05  # of two seeds
    assert torch.allclose(alone, shared, atol=1e-4) and torch.allclose(alone, threads, atol=1e-4)
    assert (alone - larger[:, :20]).abs().max() > 0.05  # other noise, a larger batch


def test_messages_of_every_length_are_timed():
    short, long = processes(2, message_seconds, "cpu", [1, 4_000_000], 3)[0]
    assert len(short) == len(long) == 3 and 0 < min(short) < min(long)


def test_memory_grows_with_the_batch_and_not_with_the_batches():
    def cost(images, batch_size):
        arguments = load_model("resnet_digits"), OBJECTIVE, SETTINGS, balanced_labels(images, 10), batch_size
        return processes(1, pool_cost, *arguments)[0]

    (_, one), (seconds, large) = cost(1000, 1000), cost(4000, 4000)
    many = min(cost(4000, 1000)[1] for _ in range(2))  # a peak may have something of the moment on top
    assert seconds > 0 and one > 25
    assert many < 1.3 * one and 3 * one < large < 5 * one


def test_each_to_itself_differs_by_the_statistics_alone():
    teacher, labels = load_model("resnet_digits"), torch.arange(10).repeat_interleave(2)
    apart = CrossEntropy() + 1.0 * OwnShare()
    (single,) = processes(1, inverted, teacher, apart, SETTINGS, labels, 1)[0]
    (together,), (alone,) = (
        processes(2, inverted, teacher, o, SETTINGS, labels, 1)[0] for o in (OBJECTIVE, apart)
    )
    assert torch.allclose(single, together, atol=1e-4)  # one process's own share is the whole
    assert (alone - together).abs().max() > 0.05
