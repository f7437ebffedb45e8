"""How a process of llama.cpp's server is asked what it does: the embedded engine and llama-server are the same program."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx

from models_app.engines.base import Health, Probe, Target


def probe(target: Target, client: httpx.Client) -> Probe:
    """/slots: 200 with our key and 401 without it proves that the answer comes from the process we launched."""
    address = f"http://{target.host}:{target.port}/slots"
    try:
        keyed = client.get(address, headers={"Authorization": f"Bearer {target.secret}"})
        if keyed.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            return Probe(Health.LOADING)
        if target.proven and keyed.status_code == httpx.codes.OK:
            return _ready(keyed)  # the engine logs a warning for every request without a key
        bare = client.get(address)
    except httpx.ConnectError:
        return Probe(Health.UNREACHABLE, "refuses connections")
    except httpx.TimeoutException:
        return Probe(Health.BUSY, "did not answer in time")
    except httpx.HTTPError as error:
        return Probe(Health.WRONG_SERVER, f"does not speak HTTP as expected ({type(error).__name__})")
    if keyed.status_code != httpx.codes.OK or bare.status_code != httpx.codes.UNAUTHORIZED:
        return Probe(Health.WRONG_SERVER, f"/slots answered {keyed.status_code} with our key, {bare.status_code} without")
    return _with_slots(_ready(keyed), target, client)


def _with_slots(found: Probe, target: Target, client: httpx.Client) -> Probe:
    """A process that is ready for the first time is also asked how many slots it made of what it was launched with."""
    if found.health != Health.READY:
        return found
    try:
        answer = client.get(f"http://{target.host}:{target.port}/props", headers={"Authorization": f"Bearer {target.secret}"})
        slots = answer.json()["total_slots"]
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return found  # nothing follows from it: who answers has been proven
    return replace(found, slots=slots) if isinstance(slots, int) else found


def _ready(answer: httpx.Response) -> Probe:
    try:
        slots = answer.json()
        busy = [slot for slot in slots if slot["is_processing"]]
        return Probe(Health.READY, slots_busy=len(busy), work=json.dumps([_progress(slot) for slot in busy]))
    except (ValueError, TypeError, KeyError):
        return Probe(Health.WRONG_SERVER, "/slots did not answer a list of slots")


def _progress(slot: dict[str, Any]) -> list[Any]:
    """Of one slot that works: its task, the prompt tokens it has read and the tokens it has written."""
    found = slot.get("next_token", [])
    written = [token["n_decoded"] for token in (found if isinstance(found, list) else [found])]  # older versions give one alone
    return [slot.get("id_task"), slot.get("n_prompt_tokens_processed"), *written]
