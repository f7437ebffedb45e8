"""Does a model fit on this node? Real files, real processes, a real Valkey; gateways are emulated by writing what they write."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django.fixtures import Settings

from models_app import coordination, fit, launch_spec
from models_app.admission import Kind
from models_app.contracts.coordination import TELEMETRY_LIFE_MS, USE_LIFE_MS, telemetry_key, use_key
from models_app.models import Instance, ModelConfig, State
from models_app.process_identity import identify
from tests.fakes import gguf_files
from tests.models.instances import make_instance, make_model, make_node

pytestmark = pytest.mark.django_db

MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean(valkey: str) -> Iterator[None]:
    yield
    for key in coordination.client().scan_iter(match="assistant:*"):
        coordination.client().delete(key)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, settings: Settings) -> Path:
    """smol.gguf and other.gguf: a context of 8,192 tokens takes 32 MiB of either."""
    settings.ASSISTANT_MODEL_DIRS = [tmp_path]
    for name in ("smol", "other"):
        gguf_files.llama(tmp_path / f"{name}.gguf", layers=16, embedding=128, context_length=65_536)
    return tmp_path


def model(name: str = "smol", **fields: Any) -> ModelConfig:
    values = {"slots": 1, "ctx_size": 8192, "extra_args": {"cache_ram_mib": 0}, "chat_model_path": f"{name}.gguf", **fields}
    return make_model(name, **values)


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds 64 MiB of its own: stands for an engine, of which only its memory is looked at."""
    script = "import sys; held = bytearray(b'x') * (64 << 20); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.communicate()


def running(config: ModelConfig, ready_s: float = 300.0, **fields: Any) -> Instance:
    """READY on this node for so long, launched as configured."""
    values = launch_spec.launch_values(config, "chat")
    ready_at = timezone.now() - timedelta(seconds=ready_s)
    digest = launch_spec.digest_of(values)
    return make_instance(State.READY, config, generation=1, launch=values, launch_digest=digest, ready_at=ready_at, **fields)


def identity(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    found = identify(process.pid)
    assert found is not None
    return {"pid": found.pid, "start_ticks": found.start_ticks, "boot_id": found.boot_id}


def gateway_says(in_flight: dict[Instance, int] | None = None, queued: dict[str, int] | None = None, name: str = "gw") -> None:
    rows = {
        f"{one.pk}:{one.generation}": {"in_flight": count, "last_byte_s": None, "last_end_s": None, "silent_s": None}
        for one, count in (in_flight or {}).items()
    }
    models = {one: {"chat": {"queued": count, "oldest_wait_s": 1.0, "wanted": True}} for one, count in (queued or {}).items()}
    said = {"gateway": name, "node": "n", "instances": rows, "models": models}
    coordination.client().set(telemetry_key(name), json.dumps(said), px=TELEMETRY_LIFE_MS * 10)


def limit(mib: float) -> None:
    node = make_node()
    node.memory_limit_bytes = int(mib * MIB)
    node.save()


class TestResidents:
    def test_what_a_process_holds_and_claims_is_told(self, holder: subprocess.Popen[bytes]) -> None:
        config = model(pinned=True, priority=3)
        instance = running(config, **identity(holder))
        gateway_says()
        (one,) = fit.residents(instance.node.name)
        assert 64 * MIB <= one.private_now <= 110 * MIB
        assert one.claim == fit.claim_of(fit.need_of(config, "chat"))
        assert (one.pinned, one.priority, one.busy, one.just_loaded) == (True, 3, False, False)
        assert one.idle_s == pytest.approx(300, abs=30)

    def test_it_claims_what_it_was_launched_with_not_what_is_configured_now(self) -> None:
        config = model()
        before = fit.claim_of(fit.need_of(config, "chat"))
        instance = running(config)
        config.ctx_size = 65_536
        config.save()
        assert fit.residents(instance.node.name)[0].claim == before

    def test_one_whose_file_is_gone_claims_what_was_reserved(self, folder: Path) -> None:
        instance = running(model(), memory_bytes=77 * MIB)
        (folder / "smol.gguf").unlink()
        (one,) = fit.residents(instance.node.name)
        assert (one.claim.private, one.claim.files, one.private_now) == (77 * MIB, {}, 0)

    def test_requests_in_flight_or_waiting_make_it_busy(self) -> None:
        instance = running(model())
        gateway_says({instance: 1})
        assert fit.residents(instance.node.name)[0].busy
        gateway_says(queued={"smol": 1})
        assert fit.residents(instance.node.name)[0].busy

    def test_without_a_gateways_word_nobody_is_idle(self) -> None:
        instance = running(model())
        assert fit.residents(instance.node.name)[0].idle_s is None
        gateway_says()
        coordination.client().set(use_key(instance.pk, 1, "silent"), "1", px=USE_LIFE_MS)
        assert fit.residents(instance.node.name)[0].idle_s is None

    def test_a_fresh_one_is_just_loaded(self) -> None:
        assert fit.residents(running(model(), ready_s=3.0).node.name)[0].just_loaded

    @pytest.mark.parametrize(
        ("load_s", "ready_s", "stays"),
        [(0.5, 1.0, True), (0.5, 2.5, False), (20.0, 15.0, True), (20.0, 21.0, False), (600.0, 31.0, False), (1.0, -9e3, False)],
    )
    def test_one_that_was_used_stays_as_long_as_its_load_took(self, load_s: float, ready_s: float, stays: bool) -> None:
        """Within bounds, and not for hours where the clock was set back."""
        instance = running(model(), ready_s=ready_s)
        assert instance.ready_at is not None
        used_at = instance.ready_at + timedelta(seconds=0.1)
        Instance.objects.update(started_at=instance.ready_at - timedelta(seconds=load_s), last_used_at=used_at)
        assert fit.residents(instance.node.name)[0].just_loaded == stays

    def test_without_valkey_all_count_as_busy(self, settings: Settings) -> None:
        instance = running(model())
        settings.REDIS_URL = "unix:///nonexistent/valkey.sock"
        coordination.client.cache_clear()
        try:
            assert fit.residents(instance.node.name)[0].idle_s is None
        finally:
            coordination.client.cache_clear()


class TestVerdicts:
    def test_a_small_model_fits(self) -> None:
        report = fit.judge_model(model())
        assert (report.verdict.kind, report.verdict.sentence) == (Kind.FITS, "It fits.")
        assert [(part.part, part.processes, part.need.cache) for part in report.parts] == [("chat", 1, 32 * MIB)]

    def test_it_fits_after_unloading_an_idle_one(self) -> None:
        running(model("other"), ready_s=240.0)
        gateway_says()
        limit(130)
        verdict = fit.judge_model(model()).verdict
        assert (verdict.kind, verdict.sentence) == (Kind.FITS_AFTER, "It fits after unloading other (idle 4 min).")

    def test_it_waits_for_a_busy_one(self) -> None:
        other = running(model("other"))
        gateway_says({other: 1})
        limit(130)
        verdict = fit.judge_model(model()).verdict
        assert verdict.kind == Kind.WAITS
        assert verdict.sentence.endswith("in the way: other (busy).")

    def test_what_does_not_fit_is_told_the_context_that_would(self) -> None:
        limit(100)
        config = model(ctx_size=65_536)
        verdict = fit.judge_model(config).verdict
        assert verdict.kind == Kind.NEVER
        assert verdict.largest_ctx is not None
        assert f"fits with ctx_size ≤ {verdict.largest_ctx}." in verdict.sentence
        config.ctx_size = verdict.largest_ctx
        assert fit.judge_model(config).verdict.kind == Kind.FITS
        config.ctx_size += 256
        assert fit.judge_model(config).verdict.kind == Kind.NEVER

    def test_a_model_larger_than_the_machine_never_fits(self, folder: Path) -> None:
        with (folder / "smol.gguf").open("r+b") as file:
            file.truncate(1 << 42)  # sparse: takes no room
        verdict = fit.judge_model(model()).verdict
        assert (verdict.kind, verdict.largest_ctx) == (Kind.NEVER, None)
        assert "needs 4096" in verdict.sentence

    def test_its_own_processes_are_not_in_its_way(self) -> None:
        config = model()
        running(config)
        limit(110)
        assert fit.judge_model(config).verdict.kind == Kind.FITS

    def test_all_parts_and_all_replicas_count(self) -> None:
        config = model(embedding_model_path="smol.gguf", min_replicas=2, max_replicas=2)
        report = fit.judge_model(config)
        assert [(part.part, part.processes) for part in report.parts] == [("chat", 2), ("embedding", 2)]
        private = sum(2 * part.need.private for part in report.parts)
        assert report.verdict.needs_bytes == private + report.parts[0].need.mapped

    def test_a_measured_peak_of_the_same_settings_counts_where_it_is_more(self) -> None:
        config = model()
        ended = running(config)
        estimated = fit.need_of(config, "chat")
        Instance.objects.filter(pk=ended.pk).update(state=State.STOPPED, peak_memory_bytes=900 * MIB, exited_at=timezone.now())
        assert fit.need_of(config, "chat").measured == 900 * MIB - estimated.mapped
        config.ctx_size = 4096
        assert fit.need_of(config, "chat").measured == 0

    def test_file_pages_of_rearranged_weights_are_not_measured_as_the_process_own(self, folder: Path) -> None:
        """While such a process loads it maps the file and holds its copy: the kernel's peak counts the weights twice."""
        gguf_files.llama(folder / "q.gguf", layers=16, embedding=1024, kind=gguf_files.Q4_0)
        config = model("q", chat_model_path="q.gguf")
        estimated = fit.need_of(config, "chat")
        assert estimated.weights > 16 * MIB
        held = estimated.private - estimated.margin
        peak = held + (folder / "q.gguf").stat().st_size
        ended = running(config)
        Instance.objects.filter(pk=ended.pk).update(state=State.STOPPED, peak_memory_bytes=peak, exited_at=timezone.now())
        assert fit.need_of(config, "chat").private == estimated.private


class TestAdmission:
    def admit(self, config: ModelConfig, instance: Instance, may_evict: bool = True) -> Any:
        return fit.admit(instance, config, launch_spec.model_spec(config, "chat"), may_evict)

    def test_a_pending_instance_is_judged_beside_the_others(self) -> None:
        other = running(model("other"))
        gateway_says()
        limit(130)
        config = model()
        instance = make_instance(State.PENDING, config)
        verdict = self.admit(config, instance)
        assert [one.instance_id for one in verdict.victims] == [other.pk]
        assert self.admit(config, instance, may_evict=False).kind == Kind.WAITS

    def test_a_load_in_progress_reserves_its_memory(self) -> None:
        config, other = model(), model("other")
        loading = make_instance(State.STARTING, other, launch=launch_spec.launch_values(other, "chat"))
        limit(130)
        verdict = self.admit(config, make_instance(State.PENDING, config))
        assert verdict.kind == Kind.WAITS
        assert verdict.sentence.endswith(f"in the way: {loading.model_name} (loading).")

    def test_a_second_replica_shares_the_weights(self) -> None:
        config = model(max_replicas=2)
        running(config)
        verdict = self.admit(config, make_instance(State.PENDING, config))
        need = fit.need_of(config, "chat")
        assert (verdict.kind, verdict.needs_bytes) == (Kind.FITS, need.private)


@pytest.fixture
def boss(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("boss"))
    return client


class TestApi:
    def ask(self, boss: Client, config: ModelConfig, **what_if: Any) -> tuple[int, dict[str, Any]]:
        answer = boss.post(f"/api/v1/models/{config.pk}/fit/", what_if, content_type="application/json")
        return answer.status_code, answer.json()

    def test_the_answer_holds_the_verdict_and_every_part(self, boss: Client) -> None:
        status, told = self.ask(boss, model())
        assert status == 200
        assert (told["verdict"], told["sentence"], told["largest_ctx"], told["unload"]) == ("fits", "It fits.", None, [])
        (part,) = told["parts"]
        assert (part["part"], part["cache"]) == ("chat", 32 * MIB)
        private = part["cache"] + part["compute"] + part["program"] + part["prompt_cache"] + part["margin"]
        assert part["needs"] == part["weights"] + private
        assert told["needs"] == part["needs"] <= told["free"]

    def test_what_would_be_unloaded_is_listed(self, boss: Client) -> None:
        other = running(model("other"), ready_s=240.0)
        gateway_says()
        limit(130)
        _, told = self.ask(boss, model())
        assert told["verdict"] == "fits_after"
        (victim,) = told["unload"]
        assert (victim["instance"], victim["model"], victim["part"]) == (other.pk, "other", "chat")
        assert victim["idle_s"] == pytest.approx(240, abs=30)

    def test_other_settings_can_be_tried_and_nothing_is_saved(self, boss: Client) -> None:
        config = model()
        limit(100)
        assert self.ask(boss, config)[1]["verdict"] == "fits"
        status, told = self.ask(boss, config, ctx_size=65_536)
        assert (status, told["verdict"]) == (200, "never")
        assert self.ask(boss, config, ctx_size=told["largest_ctx"])[1]["verdict"] == "fits"
        config.refresh_from_db()
        assert config.ctx_size == 8192

    def test_wrong_settings_are_refused_by_field(self, boss: Client) -> None:
        status, told = self.ask(boss, model(), slots=0, extra_args={"port": 1})
        assert status == 400
        assert set(told) == {"slots"}
        status, told = self.ask(boss, model("other"), extra_args={"port": 1})
        assert status == 400
        assert set(told) == {"extra_args"}

    def test_a_file_that_cannot_be_judged_is_a_conflict(self, boss: Client, folder: Path) -> None:
        config = model()
        (folder / "smol.gguf").write_bytes(b"GGUF")
        status, told = self.ask(boss, config)
        assert status == 409
        assert "is truncated" in told["detail"]


class TestAdmin:
    def form(self, **given: Any) -> dict[str, Any]:
        return {
            "name": "smol", "engine": "embedded", "chat_model_path": "smol.gguf", "embedding_model_path": "",
            "tts_model_path": "", "prompt_template": "", "ctx_size": 8192, "batch_size": 512, "slots": 1, "threads": 0,
            "gpu_layers": 0, "extra_args": '{"cache_ram_mib": 0}', "min_replicas": 1, "max_replicas": 1, "idle_timeout_s": 0,
            "priority": 0, "port": "", **given,
        }  # fmt: skip

    def test_a_new_models_form_is_judged_before_it_is_saved(self, boss: Client) -> None:
        page = boss.get(reverse("admin:models_app_modelconfig_add")).content.decode()
        assert "Check memory" in page
        answer = boss.post(reverse("admin:models_app_modelconfig_check_memory"), self.form())
        assert "It fits." in answer.content.decode()
        assert "32 MiB" in answer.content.decode()
        assert not ModelConfig.objects.exists()

    def test_a_saved_models_form_is_judged_with_what_stands_in_it(self, boss: Client) -> None:
        config = model()
        limit(100)
        address = reverse("admin:models_app_modelconfig_check_memory", args=[config.pk])
        assert address in boss.get(reverse("admin:models_app_modelconfig_change", args=[config.pk])).content.decode()
        text = boss.post(address, self.form(ctx_size=65_536)).content.decode()
        assert "It does not fit: needs" in text
        assert "fits with ctx_size ≤" in text
        config.refresh_from_db()
        assert config.ctx_size == 8192

    def test_mistakes_of_the_form_are_named(self, boss: Client) -> None:
        text = boss.post(
            reverse("admin:models_app_modelconfig_check_memory"), self.form(chat_model_path="no.gguf")
        ).content.decode()
        assert "Chat model: There is no file no.gguf" in text

    def test_who_may_not_change_models_may_not_ask(self, client: Client) -> None:
        config = model()
        client.force_login(User.objects.create_user("sam", is_staff=True))
        for address in ("check-memory/", f"{config.pk}/check-memory/"):
            assert client.post(f"/admin/models_app/modelconfig/{address}", self.form()).status_code == 403

    def test_it_is_asked_by_post(self, boss: Client) -> None:
        assert boss.get(reverse("admin:models_app_modelconfig_check_memory")).status_code == 405
        assert boss.post("/admin/models_app/modelconfig/999/check-memory/", self.form()).status_code == 404
