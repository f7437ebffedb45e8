"""How a failure is shown wherever it is shown: what, what to do, evidence, what happens next, and a way to try again."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from django.utils.safestring import SafeString

from models_app import diagnosis
from models_app.admin.base import age, size
from models_app.models import Incident, Instance, ModelConfig, State

TITLES = {
    State.FAILED: "This process failed and will be tried again",
    State.CRASH_LOOP: "This process failed too often; nothing is tried any more until you restart it or change the model",
}
REPLACING = "What was changed cannot start; the process from before the change goes on serving"
CARD_LINES = 40
MODEL_CARDS = 3


@dataclass(frozen=True, slots=True)
class ExitCard:
    """One failure. The urls are empty where there is nothing to open or to try again."""

    anchor: str  # unique on its page
    title: str
    who: str
    kind: str  # the diagnosis in a few words
    what: str
    remedy: str
    since: SafeString | str
    facts: tuple[str, ...]  # exit code or signal, peak memory
    lines: str
    next_attempt: SafeString | str = ""
    again: str = ""  # how often the same was refused
    failing: bool = False
    retry_url: str = ""
    log_url: str = ""
    model_url: str = ""


def of_instance(instance: Instance, request: HttpRequest) -> ExitCard | None:
    """The card of an instance's last exit or refusal, None where it never failed and never ended."""
    if instance.exited_at is None and not instance.exit_reason:
        return None
    state = State(instance.state)
    incident = last_incident(instance)
    reason = instance.exit_reason or "No reason was recorded."
    remedy = incident.remedy if incident else ""
    failing = state in TITLES
    return ExitCard(
        anchor=f"exit-{instance.pk}",
        title=_title(state, instance),
        who=f"{instance}, generation {instance.generation}",
        kind=diagnosis.title(instance.diagnosis),
        what=_without(reason, remedy),
        remedy=remedy,
        since=age(instance.exited_at or instance.state_changed_at),
        facts=_facts(instance.exit_code, instance.exit_signal, instance.peak_memory_bytes),
        lines=last_lines(instance.exit_log),
        next_attempt=next_attempt(instance),
        again=again(incident) if incident and failing else "",
        failing=failing,
        retry_url=_retry_url(instance, request) if failing else "",
        log_url=log_url(instance.pk, instance.generation) if instance.generation else "",
        model_url=_model_url(instance, request) if failing else "",
    )


def of_model(model: ModelConfig, request: HttpRequest) -> list[ExitCard]:
    """Cards of the model's failed instances, the newest failure first, without what leads to the model's own page."""
    failed = model.instances.filter(state__in=TITLES).select_related("replaces").order_by("-state_changed_at")
    failed = failed.defer("engine_secret", "replaces__engine_secret", "replaces__exit_log")[:MODEL_CARDS]
    cards = [of_instance(instance, request) for instance in failed]
    return [replace(card, model_url="") for card in cards if card is not None]


def of_incident(incident: Incident, request: HttpRequest) -> ExitCard:
    """The card of a failure that is kept; it can be tried again as long as it is its instance's present state."""
    instance = incident.instance
    present = instance is not None and instance.generation == incident.generation and instance.state in TITLES
    return ExitCard(
        anchor=f"incident-{incident.pk}",
        title=diagnosis.title(incident.diagnosis),
        who=f"{incident.model_name}#{incident.instance_number}, generation {incident.generation}, on {incident.node_name}",
        kind="",
        what=_without(incident.reason, incident.remedy),
        remedy=incident.remedy,
        since=age(incident.at),
        facts=_facts(incident.exit_code, incident.exit_signal, incident.peak_memory_bytes),
        lines=last_lines(incident.log),
        next_attempt=next_attempt(instance) if instance and present else "",
        again=again(incident),
        failing=present,
        retry_url=_retry_url(instance, request) if instance and present else "",
        log_url=log_url(instance.pk, incident.generation) if instance and incident.generation else "",
        model_url=_model_url(instance, request) if instance else "",
    )


def last_incident(instance: Instance) -> Incident | None:
    """The kept record of what the instance says of its last exit."""
    newest = Incident.objects.filter(instance_number=instance.pk).first()
    return newest if newest and newest.reason == instance.exit_reason else None


def next_attempt(instance: Instance) -> SafeString | str:
    """When a failed instance is tried again, empty where it is not."""
    if instance.state != State.FAILED or instance.next_attempt_at is None:
        return ""
    return age(instance.next_attempt_at) if instance.next_attempt_at > timezone.now() else "due"


def exit_in_words(code: int | None, number: int | None) -> str:
    """“exit code 1”, “signal 9 (SIGKILL)”, or nothing."""
    if number is not None:
        known = number in {known.value for known in signal.Signals}
        return f"signal {number} ({signal.Signals(number).name})" if known else f"signal {number}"
    return f"exit code {code}" if code is not None else ""


def again(incident: Incident) -> str:
    """“seen 12 times”, or nothing where it was seen once."""
    return f"seen {incident.count:,} times" if incident.count > 1 else ""


def last_lines(log: str) -> str:
    return "\n".join(log.splitlines()[-CARD_LINES:])


def log_url(instance_id: int, run: int) -> str:
    """The log page at one run; the newest where none was started."""
    address = reverse("admin:models_app_instance_log", args=[instance_id])
    return f"{address}?run={run}" if run else address


def _title(state: State, instance: Instance) -> str:
    if state == State.FAILED and instance.replaces is not None and instance.replaces.state == State.READY:
        return REPLACING
    return TITLES.get(state, "Its last process ended")


def _facts(code: int | None, number: int | None, peak: int | None) -> tuple[str, ...]:
    memory = f"peak memory {size(peak)}" if peak is not None else ""
    return tuple(filter(None, (exit_in_words(code, number), memory)))


def _without(reason: str, remedy: str) -> str:
    """What happened, without the remedy that is shown beside it."""
    return reason.removesuffix(remedy).strip() or reason


def _retry_url(instance: Instance, request: HttpRequest) -> str:
    allowed = request.user.has_perm("models_app.change_instance")
    return reverse("admin:models_app_instance_restart", args=[instance.pk]) if allowed else ""


def _model_url(instance: Instance, request: HttpRequest) -> str:
    allowed = instance.model_id is not None and request.user.has_perm("models_app.change_modelconfig")
    return reverse("admin:models_app_modelconfig_change", args=[instance.model_id]) if allowed else ""
