"""The same server as a Ray Serve deployment: replicas on the machines of a cluster, more of them under load.

    serve run llmlite.serve.ray_app:build artifact=smol-q4 context=4096 parallel=4 max_replicas=8 cpus=4

Ray Serve has the port and spreads the requests; each replica has its own engine, prompt cache and limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import yaml
from ray import serve

from llmlite.errors import InputError
from llmlite.options import check_values
from llmlite.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

RAYS = ("host", "port")
"""Settings of the server that are Ray Serve's own here."""


@dataclass(frozen=True)
class Replicas:
    """How many replicas of what there are, and what each takes."""

    artifact: str = field(metadata={"help": "as of llmlite serve; every machine of the cluster must have it"})
    min_replicas: int = field(default=1, metadata={"help": "replicas that are always there"})
    max_replicas: int = field(default=2, metadata={"help": "replicas that there may be under load"})
    cpus: int = field(default=1, metadata={"help": "CPU cores for each, and its threads unless threads says another"})
    gpus: float = field(default=0.0, metadata={"help": "GPUs for each"})


def build(given: dict[str, Any]) -> Application:
    """The application that `serve run` and Serve's config file name; ``given``: `Replicas` and `ServeSettings` by name.

    Raises `InputError` for an unknown name or a wrong value.
    """
    values = {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in given.items()}
    own = {item.name for item in fields(Replicas)}
    for key in RAYS:
        if key in values:
            raise InputError(f"{key}: is Ray Serve's to set, as in serve start --http-{key}")
    if "artifact" not in values:
        raise InputError("artifact: is missing, as in artifact=smol-q4")
    replicas = Replicas(**check_values({k: v for k, v in values.items() if k in own}, Replicas, "ray"))
    rest = {key: value for key, value in values.items() if key not in own}
    settings = ServeSettings(**{"threads": replicas.cpus, **check_values(rest, ServeSettings, "ray")})

    def app() -> FastAPI:
        """Called in each replica."""
        from llmlite.serve.run import local

        return local([replicas.artifact], settings)[0]

    class Replica:
        app: FastAPI

        def check_health(self) -> None:
            """Ray Serve asks every few seconds; a replica whose engine can't be opened again is replaced."""
            for model in self.app.state.models.models:
                if model.failure is not None:
                    raise RuntimeError(f"{model.spec.name}: {model.failure}")

    deployment = serve.deployment(serve.ingress(app)(Replica)).options(
        name="llmlite",
        max_ongoing_requests=settings.parallel + settings.max_queue,
        autoscaling_config={
            "min_replicas": replicas.min_replicas,
            "initial_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": settings.parallel,
        },
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
    )
    return deployment.bind()
