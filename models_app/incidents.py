"""Keep every failure with its diagnosis, also once the instance has recovered or gone: models_app/models/incident.py."""

from __future__ import annotations

import re
from datetime import timedelta

from django.db.models import F
from django.utils import timezone

from models_app.diagnosis import Exit
from models_app.models import Incident, Instance

KEPT = 1000
KEPT_FOR = timedelta(days=90)


def record(instance: Instance, end: Exit) -> Incident:
    """Write down how this generation ended or why none could start. Call it in the transaction of the transition.

    A start that is refused is tried again every few seconds: the same refusal is counted, not written again.
    """
    now = timezone.now()
    last = Incident.objects.filter(instance_number=instance.pk).first()
    if last is not None and _same(last, instance, end):
        Incident.objects.filter(pk=last.pk).update(count=F("count") + 1, last_at=now, reason=end.reason, remedy=end.remedy)
        return last
    return Incident.objects.create(
        instance=instance,
        instance_number=instance.pk,
        generation=instance.generation,
        model_name=instance.model_name,
        part=instance.part,
        node_name=instance.node.name,
        engine=instance.engine,
        at=now,
        last_at=now,
        diagnosis=end.diagnosis,
        reason=end.reason,
        remedy=end.remedy,
        exit_code=end.code,
        exit_signal=end.signal,
        peak_memory_bytes=end.peak_memory_bytes,
        log=end.log,
    )


def _same(last: Incident, instance: Instance, end: Exit) -> bool:
    """A process that ended is another generation each time; only refusals repeat. Their numbers (free memory, a pid) move."""
    if (last.generation, last.diagnosis) != (instance.generation, end.diagnosis):
        return False
    return _without_numbers(last.reason) == _without_numbers(end.reason)


def _without_numbers(sentence: str) -> str:
    return re.sub(r"[\d.,]*\d", "#", sentence)


def prune() -> int:
    """Delete all but the newest KEPT, and what has not been seen for KEPT_FOR; how many went."""
    surplus = list(Incident.objects.values_list("pk", flat=True)[KEPT:])
    gone, _ = Incident.objects.filter(pk__in=surplus).delete()
    aged, _ = Incident.objects.filter(last_at__lt=timezone.now() - KEPT_FOR).delete()
    return gone + aged
