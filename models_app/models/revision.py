"""One counter that tells a gateway whether anything it must know has changed, and which rows.

Database triggers (models_app/models/triggers.py) do the counting, so that no path can forget it: bulk updates,
cascades and raw SQL included. Every write to a watched column bumps the one Revision row in the same transaction
and stamps the written row with the new value; a deletion leaves a Tombstone. Because the Revision row is locked until
commit, values become visible in order: a reader that has seen N has seen every change up to N.
"""

from __future__ import annotations

import uuid
from typing import ClassVar

from django.db import models


class Revisioned(models.Model):
    """A row that gateways copy. `revision` is written by the trigger alone."""

    revision = models.BigIntegerField(default=0, editable=False, db_index=True)

    class Meta:
        abstract = True


class Revision(models.Model):
    """The single counter row (id 1). Another epoch means another history: reload everything."""

    value = models.BigIntegerField(default=0)
    epoch = models.UUIDField(default=uuid.uuid4)

    class Meta:
        constraints: ClassVar = [models.CheckConstraint(condition=models.Q(id=1), name="revision_single_row")]

    def __str__(self) -> str:
        return f"revision {self.value}"


class Tombstone(models.Model):
    """A watched row that was deleted: its table, its id, and the revision of the deletion."""

    table_name = models.CharField(max_length=64)
    row_id = models.BigIntegerField()
    revision = models.BigIntegerField(db_index=True)

    def __str__(self) -> str:
        return f"{self.table_name} {self.row_id} deleted at {self.revision}"
