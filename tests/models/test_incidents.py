"""Failures are kept with their diagnosis: written with the transition, refusals counted, the old forgotten."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import IntegrityError
from django.utils import timezone

from models_app import incidents, lifecycle
from models_app.diagnosis import Exit
from models_app.exceptions import StaleTransition
from models_app.models import Incident, Instance, State
from tests.models.instances import make_claim, make_instance

pytestmark = pytest.mark.django_db

DIED = Exit("It ran out of memory. Lower ctx_size.", "last words", None, 9, 123, "out_of_memory", "Lower ctx_size.")


def failed_instance(end: Exit = DIED) -> Instance:
    instance = make_instance(State.STARTING, port=20_001, pid=7, start_ticks=1, generation=3, part="chat")
    lifecycle.failed(instance, end)
    return instance


def refuse(instance: Instance, reason: str) -> None:
    lifecycle.refused(instance, reason, "d")


def test_a_failure_is_kept_with_its_evidence_and_who_it_was() -> None:
    instance = failed_instance()
    kept = Incident.objects.get()
    assert (kept.instance_id, kept.instance_number, kept.generation) == (instance.pk, instance.pk, 3)
    assert (kept.model_name, kept.part, kept.node_name, kept.engine) == ("smol", "chat", instance.node.name, "embedded")
    assert (kept.diagnosis, kept.reason, kept.remedy) == ("out_of_memory", DIED.reason, "Lower ctx_size.")
    assert (kept.exit_code, kept.exit_signal, kept.peak_memory_bytes, kept.log) == (None, 9, 123, "last words")
    assert (instance.diagnosis, instance.exit_reason) == ("out_of_memory", DIED.reason)


def test_it_stays_when_the_instance_recovers_and_when_its_row_goes() -> None:
    instance = failed_instance()
    lifecycle.starting(instance, make_claim())
    lifecycle.stopping(instance)
    lifecycle.stopped(instance)
    number = instance.pk
    instance.delete()
    kept = Incident.objects.get()
    assert (kept.instance_id, kept.instance_number) == (None, number)


def test_every_process_that_fails_is_an_incident_of_its_own() -> None:
    instance = failed_instance()
    lifecycle.starting(instance, make_claim())
    lifecycle.failed(instance, DIED)
    assert list(Incident.objects.values_list("generation", "count")) == [(4, 1), (3, 1)]


def test_a_transition_that_is_refused_leaves_no_incident() -> None:
    mine = make_instance(State.STARTING, port=20_001, pid=7, start_ticks=1)
    lifecycle.stopping(Instance.objects.get())
    with pytest.raises(StaleTransition):
        lifecycle.failed(mine, DIED)
    assert not Incident.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_where_the_incident_cannot_be_written_the_state_stays_too() -> None:
    instance = make_instance(State.STARTING, port=20_001, pid=7, start_ticks=1)
    unwritable = Exit("It died.", remedy=None)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError):
        lifecycle.failed(instance, unwritable)
    assert Instance.objects.get().state == State.STARTING
    assert not Incident.objects.exists()


def test_the_same_refusal_again_is_counted_although_its_numbers_move() -> None:
    instance = make_instance()
    refuse(instance, "Needs 1,500 MiB, free are 900 MiB; lower ctx_size.")
    first = Incident.objects.get().at
    refuse(instance, "Needs 1,500 MiB, free are 87.5 MiB; lower ctx_size.")
    kept = Incident.objects.get()
    assert (kept.count, kept.diagnosis, kept.at) == (2, "preflight", first)
    assert kept.last_at >= first
    assert "87.5 MiB" in kept.reason


def test_another_refusal_is_another_incident() -> None:
    instance = make_instance()
    refuse(instance, "There is no file x.gguf; put it back.")
    refuse(instance, "x.gguf is empty; download it again.")
    refuse(instance, "There is no file x.gguf; put it back.")
    assert list(Incident.objects.values_list("count", flat=True)) == [1, 1, 1]


def test_another_instance_s_refusal_is_not_counted_here() -> None:
    refuse(make_instance(), "There is no file x.gguf.")
    refuse(make_instance(), "There is no file x.gguf.")
    assert Incident.objects.count() == 2


def make_incident(age: timedelta = timedelta()) -> Incident:
    when = timezone.now() - age
    return Incident.objects.create(
        instance_number=1, model_name="smol", node_name="n", engine="embedded", at=when, last_at=when, diagnosis="crashed"
    )


def test_the_oldest_are_forgotten_beyond_the_number_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incidents, "KEPT", 2)
    old, *newer = [make_incident(timedelta(hours=hours)) for hours in (3, 2, 1)]
    assert incidents.prune() == 1
    assert not Incident.objects.filter(pk=old.pk).exists()
    assert Incident.objects.count() == len(newer)


def test_what_was_not_seen_for_ninety_days_is_forgotten() -> None:
    make_incident(timedelta(days=91))
    seen_again = make_incident(timedelta(days=91))
    Incident.objects.filter(pk=seen_again.pk).update(last_at=timezone.now())
    make_incident(timedelta(days=89))
    assert incidents.prune() == 1
    assert Incident.objects.filter(pk=seen_again.pk).exists()
