"""Key text: made, recognised, masked. Secrets: sealed and unsealed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_app.contracts import key_material, secret_box
from models_app.exceptions import SecretUnreadable


def test_a_new_key_has_the_published_format_and_is_recognised() -> None:
    key = key_material.generate()
    assert re.fullmatch(r"ast_[0-9A-Za-z]{10}_[0-9A-Za-z]{43}[0-9A-Za-z]{6}", key.text)
    assert key_material.well_formed(key.text)
    assert key.text.startswith(f"ast_{key.public_id}_")
    assert key.digest == key_material.digest(key.text)
    assert len(key.digest) == 64


def test_two_keys_are_never_the_same() -> None:
    assert len({key_material.generate().text for _ in range(200)}) == 200


@given(position=st.integers(0, key_material.KEY_LENGTH - 1), letter=st.sampled_from(key_material.ALPHABET + "_-é "))
def test_one_changed_letter_is_noticed_without_a_look_up(position: int, letter: str) -> None:
    text = "ast_0123456789_" + "a" * 43
    text += key_material.checksum(text)
    changed = text[:position] + letter + text[position + 1 :]
    assert key_material.well_formed(changed) == (changed == text)


@given(st.text())
def test_noise_is_refused_and_never_raises(text: str) -> None:
    assert not key_material.well_formed(text)
    key_material.digest(text)


def test_a_masked_key_shows_neither_secret_nor_checksum() -> None:
    key = key_material.generate()
    shown = key_material.masked(key.text)
    assert len(shown) < 16
    assert key.text[15:-2] not in shown
    assert key_material.masked("short") == "****"


@given(st.text())
def test_a_sealed_secret_comes_back(text: str) -> None:
    sealed = secret_box.seal("installation", text)
    assert secret_box.unseal("installation", sealed) == text
    assert not text or len(text) < 4 or text not in sealed


def test_a_secret_of_another_installation_is_unreadable_and_says_what_to_do() -> None:
    sealed = secret_box.seal("installation", "s3cret")
    with pytest.raises(SecretUnreadable, match="secret_key"):
        secret_box.unseal("another", sealed)
    with pytest.raises(SecretUnreadable):
        secret_box.unseal("installation", "not sealed at all")
