"""An emulation of one gateway as the control plane meets it: its use keys and its telemetry in a real Valkey, and no HTTP.

It looks at the database when told to, as a gateway looks at its snapshot: it takes up what is READY, sends nothing new to what
is not, and gives its key back once its last request has ended. A request is a number in telemetry until end() is called.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from models_app import coordination
from models_app.contracts.coordination import GatewayTelemetry, telemetry_key, use_key
from models_app.models import Instance

LIFE_MS = 60_000  # a test says how time passes; nothing lapses behind its back

Key = tuple[int, int]  # instance id, generation
Part = tuple[str, str]  # model name, part


@dataclass
class SpokenGateway:
    """One gateway. in_flight counts requests by process, waiting by part; last_end_s says how long ago the last one ended."""

    name: str
    in_flight: Counter[Key] = field(default_factory=Counter)
    waiting: Counter[Part] = field(default_factory=Counter)
    last_end_s: dict[Key, float] = field(default_factory=dict)
    held: set[Key] = field(default_factory=set)
    ready: dict[Key, Part] = field(default_factory=dict)

    def look(self) -> None:
        """Adopt the database's present state, hand waiting requests to what is READY, and say everything."""
        rows = Instance.objects.ready().values_list("pk", "generation", "model_name", "part")
        self.ready = {(pk, generation): (model, part) for pk, generation, model, part in rows}
        for part in [part for part, count in self.waiting.items() if count]:
            self._hand_out(part)
        self.speak()

    def _hand_out(self, part: Part) -> None:
        able = sorted(key for key, serves in self.ready.items() if serves == part)
        if able:
            self.in_flight[able[0]] += self.waiting.pop(part)

    def begin(self, model: str, part: str = "chat") -> None:
        """A request arrives: it is sent to a process or waits for one."""
        self.waiting[model, part] += 1
        if any(serves == (model, part) for serves in self.ready.values()):
            self._hand_out((model, part))
        self.speak()

    def end(self, key: Key) -> None:
        """A request that runs on this process ends, or is cut off with it."""
        if self.in_flight[key]:
            self.in_flight[key] -= 1
            self.last_end_s[key] = 0.0
        self.speak()

    def end_all(self) -> None:
        for key in [key for key, count in self.in_flight.items() if count]:
            self.in_flight[key] = 0
            self.last_end_s[key] = 0.0
        self.speak()

    def give_up_waiting(self) -> None:
        """Those that wait hang up."""
        self.waiting.clear()
        self.speak()

    def pass_time(self, seconds: float) -> None:
        self.last_end_s = {key: ago + seconds for key, ago in self.last_end_s.items()}

    def speak(self) -> None:
        """Write telemetry and use keys as they are now."""
        client = coordination.client()
        keep = set(self.ready) | {key for key, count in self.in_flight.items() if count}
        for key in self.held - keep:
            client.delete(use_key(*key, self.name))
        for key in keep:
            client.set(use_key(*key, self.name), "1", px=LIFE_MS)
        self.held = keep
        client.set(telemetry_key(self.name), json.dumps(self._telemetry()), px=LIFE_MS)

    def _telemetry(self) -> GatewayTelemetry:
        models: dict[str, dict[str, object]] = {}
        for (model, part), count in self.waiting.items():
            models.setdefault(model, {})[part] = {"queued": count, "oldest_wait_s": 1.0, "wanted": count > 0}
        instances = {
            f"{pk}:{generation}": {
                "in_flight": self.in_flight[pk, generation],
                "last_byte_s": None,
                "last_end_s": self.last_end_s.get((pk, generation)),
                "silent_s": None,
            }
            for pk, generation in self.held
        }
        return {"gateway": self.name, "node": "n", "instances": instances, "models": models}  # type: ignore[typeddict-item]

    def vanish(self) -> None:
        """Stopped in good order: nothing of it is left in Valkey."""
        for key in self.held:
            coordination.client().delete(use_key(*key, self.name))
        coordination.client().delete(telemetry_key(self.name))
