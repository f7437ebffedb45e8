"""The adapter of the toy engine (tests/fakes/toy_engine.py), registered for a test as any engine is: what adding one takes."""

from __future__ import annotations

import json
import sys

from models_app.engines.base import Command, Launch, ModelSpec
from models_app.engines.embedded import EmbeddedEngine
from models_app.exceptions import PreflightError
from tests.fakes.toy_engine import TOY


class ToyEngine(EmbeddedEngine):
    """A name, a preflight, a command. It is probed as the embedded engine is."""

    name = "toy"

    def preflight(self, model: ModelSpec) -> None:
        if model.extra_args.get("behaviour") is None:
            raise PreflightError("The toy has no behaviour; set extra_args.")

    def command(self, launch: Launch) -> Command:
        said = {"port": str(launch.port), "secret": launch.secret, **launch.model.extra_args}
        return Command([sys.executable, "-I", "-S", str(TOY), str(launch.folder)], files={"toy.json": json.dumps(said)})
