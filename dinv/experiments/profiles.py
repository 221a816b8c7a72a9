"""The five profiles: the same experiments with other numbers.

`paper` holds the paper's settings. The others shorten them, each number beside the paper's in
`Profile.table()`, which the notebooks print.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dinv.checks import near
from dinv.continual import ContinualSettings
from dinv.distillation import DistillationSettings
from dinv.experiments.overrides import override
from dinv.experiments.settings import (
    PAPER,
    Continual,
    Distillation,
    Generator,
    Imagenet,
    Octaves,
    Profile,
    Pruning,
    Scaling,
    Sweep,
)
from dinv.generator import GeneratorSettings
from dinv.inversion import InversionSettings
from dinv.pruning import PruningSettings
from dinv.training import TrainingSettings

PROFILES = ("smoke", "cpu", "night", "gpu", "paper")
SEEDED = ("octaves", "distillation", "generator", "pruning", "continual", "imagenet")  # have their own seeds

# fmt: off
# Students of some hundreds of updates, and of thousands; chosen in benchmarks/LOG.md.
_SHORT = {"batch_size": 128, "lr": 0.2, "muon": 0.1, "temperature": 30.0, "augmentation": "strong"}
_LONG = {"lr": 0.1, "muon": 0.05, "temperature": 30.0}
_CARD = _LONG | {"augmentation": "mixup"}  # strong teaches more, but figures/gpu was made with blends
GPU = replace(
    PAPER, name="gpu", images=2560, imagenet=Imagenet(transfer_images=0, seeds=1),
    teacher_training=TrainingSettings(epochs=30, batch_size=512, lr=0.4),
    verifier_training=TrainingSettings(epochs=30, batch_size=512, lr=0.4),
    inversion=InversionSettings(steps=1000, schedule="cosine", flip=False), alpha_f=1.0,
    octaves=Octaves(inversion=replace(Octaves.inversion, steps=1000)),
    sweep=Sweep(images=1024, without_batchnorm=1024),
    distillation=Distillation(
        start_images=7680,  # as on cpu, and longer
        settings=DistillationSettings(rounds=12, updates=275, compile="never", **_CARD),
        inversion=InversionSettings(lr=0.2, schedule="cosine", flip=False, compile="never",
                                    stages=((50, 8), (50, 16), (120, 32))),  # as on cpu
        tv=0.03, alpha_c=1.0, eval_every=1),  # alpha_c: the paper's ratio to alpha_f
    generator=Generator(
        settings=GeneratorSettings(steps=5, width=64, flip=False, compile="never"),
        distillation=DistillationSettings(rounds=220, updates=20, compile="never", **_CARD),
        warmup=20, eval_every=5, pixel_batches=5),
    pruning=Pruning(
        images=2048, settings=PruningSettings(step=0.02, multiple=8),
        distillation=replace(Pruning.distillation, updates=2000)),
    continual=Continual(epochs=30, images=5120, settings=ContinualSettings(updates=2000, batch_size=256)),
)

CPU = replace(
    PAPER, name="cpu", teacher="resnet_small", verifier="vgg_small", retrain=False, images=512,
    teacher_training=TrainingSettings(epochs=30, low_res_epochs=15),
    verifier_training=TrainingSettings(epochs=18, low_res_epochs=9),
    inversion=InversionSettings(steps=80, lr=0.2, schedule="cosine", flip=False, compile="always"),
    # The paper's 10 wants the paper's 2,000 steps: in 80 the teacher would not be satisfied any more.
    alpha_f=1.0, alpha_f_kl=10.0,
    octaves=Octaves(images=128, seeds=1, inversion=replace(Octaves.inversion, steps=1000, compile="always")),
    sweep=Sweep(images=256, batch_sizes=(16, 256), without_batchnorm=128),
    distillation=Distillation(
        pairs=("resnet_small->resnet_small", "resnet_small->resnet_tiny"), start_images=1024, seeds=1,
        settings=DistillationSettings(rounds=7, updates=120, **_SHORT),
        # At one size, the noise of the start stays where the teacher does not look. Coarse to fine and with
        # more total variation little does, and an image costs a quarter. Notebook 04 draws the spectra.
        inversion=InversionSettings(lr=0.2, schedule="cosine", flip=False, compile="always",
                                    stages=((40, 8), (40, 16), (40, 32))),
        # The paper's ratio to alpha_f is 1; thirty times that teaches more, see benchmarks/LOG.md.
        tv=0.03, alpha_c=30.0, competitions=(1.0, 5.0, 10.0, 30.0), eval_every=1),
    generator=Generator(
        settings=GeneratorSettings(steps=5, width=16, flip=False),
        distillation=DistillationSettings(rounds=200, updates=22, **_SHORT),
        warmup=20, seeds=1, eval_every=5, compare=40, pixel_batches=5),
    pruning=Pruning(
        images=256, settings=PruningSettings(step=0.05), front=(0.2, 0.5, 0.7), etas=(0.0, 0.01, 0.1),
        distillation=replace(Pruning.distillation, updates=100, **_SHORT | {"lr": 0.05, "muon": 0.02}),
        seeds=1),
    continual=Continual(epochs=12, images=512, settings=ContinualSettings(updates=60), seeds=1),
    imagenet=Imagenet(
        teacher=("package:efficientnet_lite0",), images_per_class=1, comparison_stages=((200, 112),),
        verifiers=("package:efficientnet_lite1", "package:efficientnet_lite2"), transfer_images=0, seeds=1,
        # On the pixels the same steps end in grain and false colours: see `pyramid`, and notebook 07.
        inversion=InversionSettings(lr=0.4, octaves=5, chroma_lr=0.3, betas=(0.5, 0.9), schedule="cosine",
                                    jitter=30, stages=((800, 112), (300, 224))),
        # Layers' median variances from 0.01 to 140 leave the l2 distance to a few of them: see notebook 07.
        distance="kl", alpha_f=1.0,
        tv=3e-3, l2=1e-5),  # with the paper's 1e-4 there is coloured grain on everything
    scaling=Scaling(60, replace(Scaling.inversion, steps=40, lr=0.2, flip=False), pools=(15, 30, 60, 120)),
)

# The networks of `cpu` at full strength: evenings, not minutes. The paper's join by distillation.pairs.
NIGHT = replace(
    CPU, name="night", images=1024,
    octaves=replace(CPU.octaves, images=256, inversion=replace(CPU.octaves.inversion, steps=2000), seeds=3),
    sweep=replace(CPU.sweep, images=1024, batch_sizes=(16, 64, 256), without_batchnorm=512),
    distillation=replace(
        CPU.distillation, start_images=7680, competitions=Distillation.competitions, seeds=3, eval_every=2,
        settings=replace(CPU.distillation.settings, rounds=22, updates=275, **_LONG),
        inversion=replace(CPU.distillation.inversion, stages=((60, 8), (60, 16), (60, 32)))),
    generator=replace(
        CPU.generator, compare=80, pixel_batches=10, seeds=3,
        distillation=replace(CPU.generator.distillation, rounds=360, **_LONG)),
    pruning=replace(
        CPU.pruning, images=1024, settings=PruningSettings(step=0.02), front=Pruning.front, seeds=3,
        distillation=replace(CPU.pruning.distillation, updates=400)),
    continual=replace(
        CPU.continual, epochs=20, images=2560, settings=ContinualSettings(updates=250), seeds=3),
    imagenet=replace(
        CPU.imagenet, images_per_class=3, seeds=3, comparison_stages=((400, 112),),
        inversion=replace(CPU.imagenet.inversion, stages=((2000, 112), (1000, 224)))),
)

# At 8x8 a shift by two pixels is a quarter of the digit, and a mirrored digit is none.
_DIGITS = InversionSettings(steps=200, lr=0.3, schedule="cosine", jitter=0, flip=False, compile="never")
_TRAINING = TrainingSettings(epochs=8, batch_size=64, lr=0.1, pad=1, flip=False)
_STUDENT = DistillationSettings(
    rounds=5, updates=10, batch_size=64, muon=0.1, pad=1, flip=False, compile="never")
SMOKE = replace(
    CPU, name="smoke", dataset="digits", teacher="resnet_digits", verifier="vgg_digits", retrain=True,
    seeds=1, teacher_training=_TRAINING, verifier_training=_TRAINING,
    images=128, batch_size=64, inversion=_DIGITS, alpha_f=0.1,
    octaves=Octaves(
        images=40, inversion=replace(_DIGITS, lr=0.2, octaves=2, chroma_lr=0.3, betas=(0.5, 0.9)),
        tv=2.5e-5, alpha_f=0.1, dream_tv=(2.5e-5, 2.5e-3), seeds=1),
    sweep=Sweep(64, (0.0, 0.01, 0.1, 1.0), real=(10, 100, 500), batch_sizes=(16, 64), without_batchnorm=64),
    distillation=Distillation(
        pairs=("resnet_digits->resnet_digits", "resnet_digits->vgg_digits"), start_images=64,
        inversion=replace(_DIGITS, stages=((200, 8),)), settings=_STUDENT, alpha_c=0.1,
        competitions=(0.1, 1.0), seeds=1, eval_every=1),
    generator=Generator(
        settings=GeneratorSettings(steps=5, width=8, jitter=0, flip=False, compile="never"),
        distillation=replace(_STUDENT, rounds=20, updates=5), images=64, alpha_f=0.1, alpha_c=0.1,
        warmup=4, seeds=1, eval_every=5, compare=10, pixel_batches=2),
    pruning=Pruning(
        images=128, settings=PruningSettings(step=0.05), front=(0.2, 0.5), etas=(0.0, 0.1), seeds=1,
        distillation=replace(_STUDENT, rounds=1, updates=30, lr=0.02, muon=0.0),
        latency_shares=(0.05,)),  # of 8x8 images little time goes into what a filter less makes less
    continual=Continual(
        domain="negative digits", epochs=8, images=128, seeds=1,
        settings=ContinualSettings(updates=60, batch_size=64, pad=1, flip=False)),
    imagenet=Imagenet(
        teacher=("resnet_digits",), verifiers=("vgg_digits",), classes=("0", "1", "2", "3", "4", "5"),
        images_per_class=2, distance="kl", alpha_f=10.0, l2_weights=(0.01, 1.0), kl_weights=(1.0, 10.0),
        tv=2.5e-5, l2=3e-8,
        inversion=replace(_DIGITS, stages=((60, 4), (120, 8)), compile="auto"),
        comparison_stages=((100, 8),), transfer_images=128, transfer_epochs=10, seeds=1),
    scaling=Scaling(60, replace(_DIGITS, steps=80), turns=3, pools=(200, 400, 800, 1600)),
)
# fmt: on

_ALL = {profile.name: profile for profile in (SMOKE, CPU, NIGHT, GPU, PAPER)}


def load_profile(name: str = "auto", overrides: Mapping[str, Any] | None = None) -> Profile:
    """The profile of this name, with single settings replaced.

    Args:
        name: smoke, cpu, night, gpu or paper; "auto" is the environment variable DINV_PROFILE where it is
            set, else gpu where CUDA is and DINV_DEVICE is not cpu, else cpu.
        overrides: settings by dotted name, such as {"inversion.steps": 400}, as for `overrides.override`.

    Raises:
        ValueError: unknown profile (the message names the nearest), or what `override` raises.
    """
    if name == "auto":
        cuda = os.environ.get("DINV_DEVICE") != "cpu" and torch.cuda.is_available()
        name = os.environ.get("DINV_PROFILE") or ("gpu" if cuda else "cpu")
    if name not in _ALL:
        raise ValueError(f"unknown profile {name!r}{near(name, _ALL)} The profiles are {', '.join(_ALL)}")
    profile = _ALL[name]
    for key, value in (overrides or {}).items():
        profile = override(profile, key, value)
    return profile


def with_seeds(profile: Profile, count: int) -> Profile:
    """The profile with so many seeds everywhere, as `--seeds` asks."""
    parts = {part: replace(getattr(profile, part), seeds=count) for part in SEEDED}
    return replace(profile, seeds=count, **parts)
