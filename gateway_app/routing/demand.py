"""What was asked for and had no ready process: the control plane starts it. Pure: no Django, no I/O.

A demand stands while somebody waits, and for DEMAND_LIFE_S after the last who asked; it ends when the part is ready or gone.
So there are never more of them than parts of models, and none outlives its reason by more than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from gateway_app.routing.backends import Model
from models_app.contracts.coordination import DEMAND_LIFE_S


class Demand:
    """The demands of one gateway, by model and part. first: told of one that did not stand before."""

    def __init__(self, first: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first
        self._clock = clock
        self._asked: dict[tuple[str, str], float] = {}  # when it was last asked for
        self.begun = 0  # demands there have been: who has seen this many knows of all of them

    def ask(self, model: Model, part: str) -> None:
        """Somebody wants this part now and it is not ready. What only remote servers have cannot be started."""
        if part in model.parts:
            known = self.stands(model.name, part)
            self._asked[model.name, part] = self._clock()
            if not known:
                self.begun += 1
                self._first()

    def stands(self, name: str, part: str) -> bool:
        """Whether this part is wanted."""
        asked = self._asked.get((name, part))
        return asked is not None and self._clock() - asked < DEMAND_LIFE_S

    def review(self, models: Mapping[str, Model], queued: Callable[[str, str], int]) -> None:
        """Renew what is still waited for, forget what has come true, gone or grown old. queued: waiters by model and part."""
        for model in models.values():
            for part in model.parts:
                if queued(model.name, part) and not model.ready(part):
                    self.ask(model, part)
        self._asked = {
            key: asked for key, asked in self._asked.items() if self.stands(*key) and _open(models.get(key[0]), key[1])
        }

    def __len__(self) -> int:
        return len(self._asked)


def _open(model: Model | None, part: str) -> bool:
    return model is not None and part in model.parts and not model.ready(part)
