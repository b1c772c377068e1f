"""The two trainers behind `llmlite distill`: a smaller student, or with ``--to`` the teacher itself on a grid."""

from __future__ import annotations

import argparse
from dataclasses import fields

from llmlite.errors import InputError
from llmlite.options import read_recipe, settings_from
from llmlite.run.distill import Distilled, DistillSettings, distill
from llmlite.run.qat import TrainCodesSettings, TrainedArtifact, train_quantized


def run_distill(given: argparse.Namespace) -> Distilled | TrainedArtifact:
    """What the options and the recipe ask for; `InputError` for an option that the trainer asked for does not have."""
    wanted = set(vars(given)) | set(read_recipe(given.recipe, DistillSettings) if given.recipe else ())
    if "to" not in wanted:
        return distill(given.out, settings_from(DistillSettings, given, given.recipe))
    known = {item.name for item in fields(TrainCodesSettings)}
    strange = [item.name for item in fields(DistillSettings) if item.name in wanted - known]
    if strange:
        raise InputError(
            f"--{strange[0].replace('_', '-')}: is for smaller students, and --to trains codes; leave it out"
        )
    return train_quantized(given.out, settings_from(TrainCodesSettings, given, given.recipe))
