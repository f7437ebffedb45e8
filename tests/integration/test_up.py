"""What `up` does around the supervisor: first start, addresses, environment of the programs, the ready block."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from pytest_django.fixtures import Settings

from assistant_site import demo, env, platform_programs
from assistant_site.first_start import KEY_NAME, Admin, ensure_admin, quick_start_key
from assistant_site.previous_life import only_one
from assistant_site.up import CannotStart, Welcome, check_addresses, model_to_try, ready_block
from models_app.keys import revoke_key
from models_app.models import APIKey, ModelAlias, ModelConfig
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("ASSISTANT_ADMIN_PASSWORD", raising=False)
    settings.ASSISTANT_HOME = tmp_path
    settings.ASSISTANT_MODEL_DIRS = [tmp_path / "models"]
    return tmp_path


def start_up(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`manage.py up` where it is expected to refuse."""
    environment = {**os.environ, "ASSISTANT_HOME": str(home), **variables}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    return subprocess.run(
        [sys.executable, "manage.py", "up"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.django_db
def test_the_superuser_is_made_once_with_a_password_kept_in_a_private_file(home: Path) -> None:
    first = ensure_admin(home)
    assert first.created
    assert first.password_file == home / "secrets" / "admin_password"
    assert first.password_file.stat().st_mode & 0o777 == 0o600
    assert first.password_file.read_text().strip() == first.new_password
    assert User.objects.get(username="admin", is_superuser=True).check_password(first.new_password)
    assert ensure_admin(home) == Admin(created=False, password_file=first.password_file)


@pytest.mark.django_db
def test_a_given_password_is_used_and_written_nowhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSISTANT_ADMIN_PASSWORD", "given by the operator")
    assert ensure_admin(home) == Admin(created=True, password_file=None)
    assert User.objects.get(username="admin").check_password("given by the operator")
    assert not (home / "secrets" / "admin_password").exists()


@pytest.mark.django_db
def test_a_changed_password_stays_changed(home: Path) -> None:
    ensure_admin(home)
    user = User.objects.get(username="admin")
    user.set_password("changed")
    user.save()
    ensure_admin(home)
    assert User.objects.get(username="admin").check_password("changed")


@pytest.mark.django_db
def test_another_superuser_is_enough(home: Path) -> None:
    User.objects.create_superuser("root", password="x")
    assert ensure_admin(home) == Admin(created=False, password_file=None)
    assert not User.objects.filter(username="admin").exists()


@pytest.mark.django_db
def test_the_quick_start_key_is_the_same_on_the_second_start(home: Path) -> None:
    ensure_admin(home)
    first = quick_start_key(home, new_installation=True)
    assert first.startswith("ast_")
    assert (home / "secrets" / "quickstart_key").stat().st_mode & 0o777 == 0o600
    assert quick_start_key(home, new_installation=False) == first
    assert APIKey.objects.filter(name=KEY_NAME).count() == 1


@pytest.mark.django_db
def test_a_revoked_quick_start_key_is_not_replaced(home: Path) -> None:
    ensure_admin(home)
    quick_start_key(home, new_installation=True)
    revoke_key(APIKey.objects.get(name=KEY_NAME))
    assert quick_start_key(home, new_installation=False) == ""
    (home / "secrets" / "quickstart_key").unlink()
    assert quick_start_key(home, new_installation=False) == ""


@pytest.mark.django_db
def test_a_new_database_gets_a_new_key_though_the_home_is_old(home: Path) -> None:
    env.private_folder(home / "secrets")
    env.write_secret(home / "secrets" / "quickstart_key", "ast_of_a_database_that_is_no_more")
    ensure_admin(home)
    text = quick_start_key(home, new_installation=True)
    assert text == (home / "secrets" / "quickstart_key").read_text().strip()
    assert APIKey.objects.usable().filter(name=KEY_NAME).exists()


@pytest.mark.django_db
def test_the_demo_is_described_once_and_stays_deleted(home: Path, demo_model: Path) -> None:
    (home / "models").mkdir()
    shutil.copy(demo_model, home / "models")
    assert demo.wanted()
    demo.create()
    model = ModelConfig.objects.get(name="smollm2-135m-instruct")
    assert (model.ctx_size, model.slots, Path(model.chat_model_path)) == (4096, 2, home / "models" / demo_model.name)
    assert ModelAlias.objects.get(name="demo").model == model
    assert model_to_try() == "demo"
    assert demo.wanted()
    model.delete()
    assert not demo.wanted()
    demo.create()
    assert not ModelConfig.objects.exists()


@pytest.mark.django_db
def test_a_disabled_demo_is_not_waited_for(home: Path, settings: Settings) -> None:
    (home / "demo_model").touch()
    model = ModelConfig.objects.create(name=demo.NAME, chat_model_path="x.gguf", enabled=False)
    assert not demo.wanted()
    ModelConfig.objects.filter(pk=model.pk).update(enabled=True)
    assert demo.wanted()
    settings.ASSISTANT_DEMO_MODEL = False
    assert not demo.wanted()


@pytest.mark.django_db
def test_the_curl_takes_any_enabled_model_or_says_where_to_add_one() -> None:
    assert model_to_try() == ""
    ModelConfig.objects.create(name="off", chat_model_path="x.gguf", enabled=False)
    assert model_to_try() == ""
    ModelConfig.objects.create(name="on", chat_model_path="x.gguf")
    assert model_to_try() == "on"


def test_the_password_is_shown_only_by_the_start_that_made_it(tmp_path: Path) -> None:
    file = tmp_path / "admin_password"
    assert "password s3cret (kept in" in ready_block(Welcome(Admin(True, file, "s3cret"), "ast_key"), "demo")
    later = ready_block(Welcome(Admin(False, file), "ast_key"), "demo")
    assert f"first password in {file}" in later
    assert "Authorization: Bearer ast_key" in later
    assert '"model": "demo"' in later


def test_without_a_key_or_a_model_the_block_says_where_to_get_one() -> None:
    assert "/admin/models_app/apikey/" in ready_block(Welcome(Admin(False, None), ""), "demo")
    assert "/admin/models_app/modelconfig/" in ready_block(Welcome(Admin(False, None), "ast_key"), "")


def test_an_address_bound_everywhere_is_shown_as_one_that_can_be_typed(settings: Settings) -> None:
    settings.ASSISTANT_HTTP_ADDR = ("0.0.0.0", 8080)
    settings.ASSISTANT_GRPC_ADDR = ("::", 50051)
    block = ready_block(Welcome(Admin(False, None), "ast_key"), "demo")
    assert "http://127.0.0.1:8080/v1" in block
    assert "[::1]:50051" in block


def test_a_taken_port_is_named_with_its_holder_and_the_setting(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        settings.ASSISTANT_HTTP_ADDR = ("127.0.0.1", port)
        with pytest.raises(CannotStart) as refused:
            check_addresses()
    for part in (f"127.0.0.1:{port}", f"pid {os.getpid()}", "ASSISTANT_HTTP_ADDR"):
        assert part in str(refused.value)


def test_an_address_of_another_machine_is_refused_with_the_setting(settings: Settings) -> None:
    settings.ASSISTANT_HTTP_ADDR = ("127.0.0.1", free_port())
    settings.ASSISTANT_GRPC_ADDR = ("192.0.2.1", free_port())
    with pytest.raises(CannotStart, match=r"192\.0\.2\.1.*ASSISTANT_GRPC_ADDR"):
        check_addresses()


def test_programs_get_absolute_folders_and_not_the_first_password(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSISTANT_ADMIN_PASSWORD", "secret")
    given = platform_programs.environment()
    assert "ASSISTANT_ADMIN_PASSWORD" not in given
    assert given["ASSISTANT_HOME"] == str(settings.ASSISTANT_HOME)
    assert given["PYTHONUNBUFFERED"] == "1"
    assert given["ASSISTANT_UP"]


def test_a_home_with_a_colon_in_its_name_stays_one_folder_for_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASSISTANT_MODEL_DIRS", raising=False)
    assert "ASSISTANT_MODEL_DIRS" not in platform_programs.environment()
    monkeypatch.setenv("ASSISTANT_MODEL_DIRS", str(tmp_path))  # the settings were read before this
    assert Path(platform_programs.environment()["ASSISTANT_MODEL_DIRS"]).is_absolute()


def test_no_program_holds_a_secret_in_its_arguments(settings: Settings) -> None:
    words = [word for program in platform_programs.programs() for word in program.argv]
    assert all(settings.ASSISTANT_VALKEY_PASSWORD not in word for word in words)


def test_programs_stop_from_the_outside_in() -> None:
    orders = {program.name: program.stop_order for program in platform_programs.programs()}
    assert orders["gateway"] < orders["worker"] == orders["bulk"] == orders["beat"]
    assert orders["beat"] < orders["console"] == orders["grpcserver"] < platform_programs.ENGINES < orders["valkey"]


def test_a_port_that_somebody_else_answers_is_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"]) as other:
        port = server.getsockname()[1]
        assert platform_programs.listens(os.getpid(), port)
        assert not platform_programs.listens(other.pid, port)
        other.kill()
    assert not platform_programs.listens(os.getpid(), port)


def test_a_second_up_on_the_same_home_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    with only_one(tmp_path / "run" / "up.lock"):
        second = start_up(tmp_path)
    assert second.returncode == 1
    assert second.stderr == f"Assistant is already running here, pid {os.getpid()}.\n"


def test_up_on_a_taken_port_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        refused = start_up(tmp_path, ASSISTANT_HTTP_ADDR=f"127.0.0.1:{port}", ASSISTANT_GRPC_ADDR=f"127.0.0.1:{free_port()}")
    assert refused.returncode == 1
    assert f"127.0.0.1:{port}" in refused.stderr
    assert not (tmp_path / "assistant.sqlite3").exists()
