"""Making and revoking API keys: the one place that does, for admin, REST and command.

The text of a key exists in the return value of create_key and nowhere else: only its digest is stored.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypedDict, Unpack

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils import timezone

from models_app.contracts import key_material
from models_app.models import APIKey, ModelAlias, ModelConfig, RemoteServer
from models_app.models.api_key import ADMIN, INFERENCE, SCOPES

NAME_TAKEN = "This user already has a key named “{name}”; choose another name or revoke that key first."


class KeyLimits(TypedDict, total=False):
    """Everything about a key that is not identity or permission. Missing: no limit, or the model's default."""

    expires_at: datetime.datetime | None
    rpm: int | None
    tpm: int | None
    parallel: int | None
    monthly_tokens: int | None
    priority: str
    weight: float
    private: bool


class KeyChanges(KeyLimits, total=False):
    """What may be changed of a key that exists."""

    name: str
    scopes: list[str]
    models: list[str]


class KeyStatus(enum.StrEnum):
    """What a key is worth now, in one word."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"
    USER_INACTIVE = "user inactive"


def status_of(key: APIKey) -> KeyStatus:
    """Needs key.user at hand (select_related)."""
    if key.revoked_at is not None:
        return KeyStatus.REVOKED
    if key.expires_at is not None and key.expires_at <= timezone.now():
        return KeyStatus.EXPIRED
    return KeyStatus.ACTIVE if key.user.is_active else KeyStatus.USER_INACTIVE


def create_key(
    user: User,
    name: str,
    *,
    scopes: Iterable[str] = (INFERENCE,),
    models: Iterable[str] = (),
    actor: User | None = None,
    **limits: Unpack[KeyLimits],
) -> tuple[APIKey, str]:
    """Make a key and return it with its text, which cannot be had again.

    actor: who asks, None for whoever owns the machine (a command). Raises ValidationError with a dict by field name.
    """
    key = APIKey(user=user, name=name, scopes=list(dict.fromkeys(scopes)), models=list(dict.fromkeys(models)), **limits)
    check_new_key(key, actor=actor)
    return key, save_new_key(key)


def check_new_key(key: APIKey, *, actor: User | None) -> None:
    """What must hold of a key before save_new_key. Raises ValidationError with a dict by field name."""
    if not key.user.is_active:
        raise ValidationError({"user": f"User {key.user.get_username()} is deactivated; a key of theirs would be refused."})
    if key.expires_at is not None and key.expires_at <= timezone.now():
        raise ValidationError({"expires_at": "This lies in the past; the key would be expired from the start."})
    check_key(key, {"name", "scopes", "models"}, actor=actor)


def save_new_key(key: APIKey) -> str:
    """Give a checked, unsaved key its secret and save it. The text returned cannot be had again."""
    secret = key_material.generate()
    key.public_id, key.digest = secret.public_id, secret.digest
    try:
        with transaction.atomic():
            key.save(force_insert=True)
    except IntegrityError:
        # Somebody else made one of that name between the check and the insert.
        raise ValidationError({"name": NAME_TAKEN.format(name=key.name)}) from None
    key.refresh_from_db()
    return secret.text


def change_key(key: APIKey, *, actor: User | None = None, **changes: Unpack[KeyChanges]) -> APIKey:
    """Change what is given and nothing else. Raises ValidationError with a dict by field name; a revoked key stays as it was."""
    if key.revoked_at is not None:
        raise ValidationError("This key is revoked; make a new one instead.")
    for field, value in changes.items():
        setattr(key, field, value)
    check_key(key, changes.keys(), actor=actor)
    key.save(update_fields=list(changes))
    return key


def check_key(key: APIKey, fields: Collection[str], *, actor: User | None) -> None:
    """What must hold of a key before these fields of it are saved. Raises ValidationError with a dict by field name."""
    checks: list[Callable[[], None]] = [lambda: key.full_clean(exclude={"public_id", "digest"}, validate_constraints=False)]
    if "scopes" in fields:
        checks.append(lambda: check_scopes(key.user, key.scopes, actor=actor))
    if "models" in fields:
        checks.append(lambda: check_models(key.models))
    if "name" in fields:
        checks.append(lambda: _check_name(key))
    errors: dict[str, list[str]] = {}
    for check in checks:
        try:
            check()
        except ValidationError as error:
            errors = {**errors, **error.message_dict}
    if errors:
        raise ValidationError(errors)


def _check_name(key: APIKey) -> None:
    namesakes = APIKey.objects.filter(user=key.user, name=key.name, revoked_at__isnull=True).exclude(pk=key.pk)
    if namesakes.exists():
        raise ValidationError({"name": NAME_TAKEN.format(name=key.name)})


def check_scopes(user: User, scopes: Sequence[str], *, actor: User | None) -> None:
    """Scopes are known, and nobody hands out more power than they have: an admin key acts with its user's permissions."""
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise ValidationError({"scopes": f"Give one or more of: {', '.join(SCOPES)}." + _not_known(unknown)})
    if ADMIN not in scopes:
        return
    if not user.is_staff:
        raise ValidationError(
            {"scopes": f"An admin key needs a user with staff status; {user.get_username()} has none. Set it in the admin."}
        )
    if actor is not None and actor.pk != user.pk and not actor.is_superuser:
        raise ValidationError({"scopes": "Only a superuser may make an admin key for somebody else."})


def check_models(models: Sequence[str]) -> None:
    """Every name is a model's, an alias's or one offered by a remote server."""
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        raise ValidationError({"models": "Give a list of model names; an empty list allows every model."})
    known = known_model_names() if models else []
    unknown = sorted(set(models) - set(known))
    if unknown:
        raise ValidationError({"models": f"Known models: {', '.join(known) or 'none yet'}." + _not_known(unknown)})


def known_model_names() -> list[str]:
    """Names a client could ask for, sorted: models, aliases, and what remote servers offer."""
    names = set(ModelConfig.objects.values_list("name", flat=True))
    names.update(ModelAlias.objects.values_list("name", flat=True))
    for offered in RemoteServer.objects.values_list("models", flat=True):
        names.update(offered)
    return sorted(names)


def revoke_key(key: APIKey) -> bool:
    """Revoke for good; gateways refuse the key within a second. False where it was revoked already."""
    now = timezone.now()
    revoked = APIKey.objects.filter(pk=key.pk, revoked_at__isnull=True).update(revoked_at=now) == 1
    key.refresh_from_db(fields=["revoked_at"])
    return revoked


def _not_known(names: Sequence[str]) -> str:
    return f" Not known: {', '.join(names)}." if names else ""
