"""The arithmetic of memory: who fits, who must go, who never."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models_app.admission import Claim, Kind, Memory, Resident, judge, room_without

GIB = 1 << 30
MIB = 1 << 20


def resident(number: int, private: int = GIB, **fields: Any) -> Resident:
    """Loaded whole and idle for a minute, unless told otherwise."""
    files = fields.pop("files", {})
    gpu = fields.pop("gpu", 0)
    values = {"private_now": private, "gpu_now": gpu, "idle_s": 60.0, **fields}
    return Resident(number, 1, f"m{number}", "chat", Claim(private, files, gpu), **values)


def test_what_fits_says_so() -> None:
    verdict = judge(Claim(GIB), Memory(2 * GIB), [], may_evict=True)
    assert (verdict.kind, verdict.needs_bytes, verdict.free_bytes, verdict.victims) == (Kind.FITS, GIB, 2 * GIB, ())


def test_an_idle_model_goes_and_the_sentence_names_it() -> None:
    other = resident(1, private=3 * GIB, idle_s=240.0)
    verdict = judge(Claim(4 * GIB), Memory(2 * GIB), [other], may_evict=True)
    assert (verdict.kind, verdict.victims) == (Kind.FITS_AFTER, (other,))
    assert verdict.sentence == "It fits after unloading m1 (idle 4 min)."


def test_the_pages_of_one_file_count_once() -> None:
    weights = {"/models/a.gguf": 3 * GIB}
    first = resident(1, private=100 * MIB, files=weights, busy=True)
    memory = Memory(available=4 * GIB)
    assert judge(Claim(500 * MIB, weights), memory, [first], may_evict=True).kind == Kind.FITS
    assert judge(Claim(500 * MIB, {"/models/b.gguf": 3 * GIB}), memory, [first], may_evict=True).kind == Kind.WAITS


def test_unloading_one_of_two_that_share_a_file_frees_no_file_page() -> None:
    weights = {"/models/a.gguf": 3 * GIB}
    both = [resident(1, 100 * MIB, files=weights), resident(2, 100 * MIB, files=weights)]
    before = room_without(Claim(GIB), Memory(4 * GIB), both)
    one_gone = room_without(Claim(GIB), Memory(4 * GIB), both, both[:1])
    both_gone = room_without(Claim(GIB), Memory(4 * GIB), both, both)
    assert one_gone.host_free - before.host_free == 100 * MIB
    assert both_gone.host_free - one_gone.host_free == 100 * MIB + 3 * GIB


def test_a_load_in_progress_reserves_what_it_has_not_taken_yet() -> None:
    loading = resident(1, private=3 * GIB, private_now=GIB, state="STARTING", idle_s=None)
    verdict = judge(Claim(2 * GIB), Memory(3 * GIB), [loading], may_evict=True)
    assert verdict.kind == Kind.WAITS
    assert verdict.free_bytes == GIB
    assert verdict.sentence == "It waits for memory: needs 2.0 GiB, free 1.0 GiB; in the way: m1 (loading)."


def test_the_limit_of_a_node_caps_all_engines_together() -> None:
    other = resident(1, private=2 * GIB, busy=True)
    assert judge(Claim(GIB), Memory(64 * GIB, limit=3 * GIB), [other], may_evict=True).kind == Kind.FITS
    assert judge(Claim(GIB + 1), Memory(64 * GIB, limit=3 * GIB), [other], may_evict=True).kind == Kind.WAITS
    assert judge(Claim(3 * GIB + 1), Memory(64 * GIB, limit=3 * GIB), [other], may_evict=True).kind == Kind.NEVER


def test_what_never_fits_says_how_much_context_would() -> None:
    asked: list[tuple[int, int]] = []

    def largest(host: int, gpu: int) -> int:
        asked.append((host, gpu))
        return 2048

    verdict = judge(Claim(9 * GIB), Memory(4 * GIB), [resident(1, GIB, busy=True)], may_evict=True, largest_ctx=largest)
    assert (verdict.kind, verdict.largest_ctx, asked) == (Kind.NEVER, 2048, [(5 * GIB, 0)])
    assert verdict.sentence == "It does not fit: needs 9.0 GiB of memory, free 5.0 GiB; fits with ctx_size ≤ 2048."


def test_pinned_models_are_no_reserve_and_are_named() -> None:
    verdict = judge(Claim(4 * GIB), Memory(GIB), [resident(1, 8 * GIB, pinned=True)], may_evict=True)
    assert verdict.kind == Kind.NEVER
    assert verdict.sentence.startswith(
        "It does not fit beside m1 (pinned): needs 4.0 GiB of memory, free 1.0 GiB; no context size"
    )


def test_gpu_memory_is_judged_by_itself() -> None:
    other = resident(1, private=MIB, gpu=6 * GIB, idle_s=30.0)
    claim = Claim(MIB, gpu=4 * GIB)
    assert judge(claim, Memory(GIB, gpu_free=4 * GIB), [other], may_evict=True).kind == Kind.FITS
    assert judge(claim, Memory(GIB, gpu_free=2 * GIB), [other], may_evict=True).victims == (other,)
    never = judge(claim, Memory(GIB, gpu_free=2 * GIB), [], may_evict=True)
    assert "needs 4.0 GiB of GPU memory, free 2.0 GiB" in never.sentence


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"busy": True}, "m1 (busy)"),
        ({"idle_s": None}, "m1 (busy)"),
        ({"just_loaded": True}, "m1 (just loaded)"),
        ({"state": "STARTING", "idle_s": None}, "m1 (loading)"),
        ({"state": "DRAINING"}, "m1 (being unloaded)"),
    ],
)
def test_what_may_not_be_unloaded_is_waited_for(fields: dict[str, Any], says: str) -> None:
    verdict = judge(Claim(2 * GIB), Memory(GIB), [resident(1, 2 * GIB, **fields)], may_evict=True)
    assert (verdict.kind, verdict.victims) == (Kind.WAITS, ())
    assert verdict.sentence.endswith(f"in the way: {says}.")


def test_whoever_may_not_evict_waits_for_idle_ones_too() -> None:
    verdict = judge(Claim(2 * GIB), Memory(GIB), [resident(1, 2 * GIB, idle_s=240.0)], may_evict=False)
    assert (verdict.kind, verdict.victims) == (Kind.WAITS, ())
    assert "m1 (idle 4 min)" in verdict.sentence


def test_the_lower_priority_goes_first_then_the_least_recently_used() -> None:
    precious = resident(1, GIB, priority=5, idle_s=9000.0)
    recent = resident(2, GIB, idle_s=10.0)
    old = resident(3, GIB, idle_s=500.0)
    everyone = [precious, recent, old]
    assert judge(Claim(GIB), Memory(0), everyone, may_evict=True).victims == (old,)
    assert judge(Claim(2 * GIB), Memory(0), everyone, may_evict=True).victims == (old, recent)
    assert judge(Claim(3 * GIB), Memory(0), everyone, may_evict=True).victims == (old, recent, precious)


def test_a_victim_that_turns_out_unnecessary_stays() -> None:
    small, large = resident(1, 100 * MIB, idle_s=900.0), resident(2, 4 * GIB, idle_s=60.0)
    assert judge(Claim(4 * GIB), Memory(0), [small, large], may_evict=True).victims == (large,)


PATHS = st.sampled_from(["a", "b", "c"])
CLAIMS = st.builds(Claim, st.integers(0, 60), st.dictionaries(PATHS, st.integers(0, 40), max_size=2), st.integers(0, 30))


@st.composite
def residents(draw: st.DrawFn) -> list[Resident]:
    return [
        Resident(
            number,
            1,
            f"m{number}",
            "chat",
            draw(CLAIMS),
            private_now=draw(st.integers(0, 60)),
            gpu_now=draw(st.integers(0, 30)),
            state=draw(st.sampled_from(["READY", "READY", "READY", "STARTING", "DRAINING", "STOPPING"])),
            idle_s=draw(st.none() | st.floats(0, 1000)),
            busy=draw(st.booleans()),
            just_loaded=draw(st.integers(0, 4).map(lambda one: one == 0)),
            pinned=draw(st.integers(0, 3).map(lambda one: one == 0)),
            priority=draw(st.integers(-2, 2)),
        )
        for number in range(draw(st.integers(0, 6)))
    ]


MEMORIES = st.builds(Memory, st.integers(0, 200), st.none() | st.integers(0, 200), st.integers(0, 60))


@settings(max_examples=200, deadline=None)
@given(CLAIMS, MEMORIES, residents())
def test_victims_are_free_to_go_suffice_and_are_all_needed(claim: Claim, memory: Memory, everyone: list[Resident]) -> None:
    verdict = judge(claim, memory, everyone, may_evict=True)
    assert (verdict.kind == Kind.FITS_AFTER) == bool(verdict.victims)
    for victim in verdict.victims:
        assert victim.state == "READY"
        assert victim.idle_s is not None
        assert (victim.busy, victim.pinned, victim.just_loaded) == (False, False, False)
        others = [one for one in verdict.victims if one is not victim]
        assert not room_without(claim, memory, everyone, others).enough
    if verdict.kind in (Kind.FITS, Kind.FITS_AFTER):
        assert room_without(claim, memory, everyone, verdict.victims).enough


@settings(max_examples=100, deadline=None)
@given(CLAIMS, MEMORIES, residents(), st.randoms(use_true_random=False))
def test_the_order_in_which_residents_are_listed_changes_nothing(
    claim: Claim, memory: Memory, everyone: list[Resident], random: Any
) -> None:
    shuffled = list(everyone)
    random.shuffle(shuffled)
    assert judge(claim, memory, everyone, may_evict=True) == judge(claim, memory, shuffled, may_evict=True)


ORDER = [Kind.NEVER, Kind.WAITS, Kind.FITS_AFTER, Kind.FITS]


@settings(max_examples=200, deadline=None)
@given(CLAIMS, MEMORIES, residents(), st.integers(0, 100), st.integers(0, 40))
def test_more_free_memory_never_makes_it_worse(
    claim: Claim, memory: Memory, everyone: list[Resident], more: int, more_gpu: int
) -> None:
    limit = None if memory.limit is None else memory.limit + more
    richer = replace(memory, available=memory.available + more, limit=limit, gpu_free=memory.gpu_free + more_gpu)
    before = judge(claim, memory, everyone, may_evict=True)
    after = judge(claim, richer, everyone, may_evict=True)
    assert ORDER.index(after.kind) >= ORDER.index(before.kind)
    assert len(after.victims) <= len(before.victims) or before.kind != Kind.FITS_AFTER


@settings(max_examples=100, deadline=None)
@given(CLAIMS, MEMORIES, residents())
def test_every_verdict_explains_itself(claim: Claim, memory: Memory, everyone: list[Resident]) -> None:
    verdict = judge(claim, memory, everyone, may_evict=True)
    assert verdict.sentence.startswith("It ")
    assert verdict.sentence.endswith(".")
    if verdict.kind in (Kind.WAITS, Kind.NEVER):
        assert verdict.needs_bytes > verdict.free_bytes
