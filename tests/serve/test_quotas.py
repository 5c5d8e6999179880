"""Nobody gets more than its allowance, and nobody is kept from what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from equipot.serve.errors import OverLimit, OverQuota, ServeError
from equipot.serve.quota_file import read_allowances
from equipot.serve.quotas import Account, Allowance, Allowances, Bucket, Quotas
from equipot.serve.status import to_status

RATES = st.floats(0.01, 1e6)
STEPS = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10_000)), min_size=1, max_size=60)


@given(rate=RATES, burst=st.floats(0.1, 100), steps=STEPS)
def test_a_rate_holds_over_any_time(rate: float, burst: float, steps: list[tuple[float, int]]) -> None:
    account = Account("ann", Allowance(atoms_per_second=rate, burst_seconds=burst), now=0.0)
    now, taken, largest = 0.0, 0, 0
    for pause, atoms in steps:
        now += pause
        try:
            account.begin(now=now)
        except OverQuota:
            continue
        account.charge("atoms", atoms, atoms, now=now)
        account.end()
        taken, largest = taken + atoms, max(largest, atoms)
        # What was saved, what came since, and the one request that may go into debt.
        assert taken <= (max(1.0, rate * burst) + rate * now + largest) * (1 + 1e-9)


@given(rate=RATES, burst=st.floats(0.1, 100), steps=STEPS)
def test_a_refused_caller_gets_in_when_it_was_told(
    rate: float, burst: float, steps: list[tuple[float, int]]
) -> None:
    account = Account("ann", Allowance(edges_per_second=rate, burst_seconds=burst), now=0.0)
    now = 0.0
    for pause, edges in steps:
        now += pause
        wait = 0.0
        try:
            account.begin(now=now)
        except OverQuota as refusal:
            wait = refusal.retry_after or 0.0
        if wait:
            now += wait * (1 + 1e-9) + 1e-6
            account.begin(now=now)
        account.charge("edges", edges, edges, now=now)
        account.end()


@given(rate=st.floats(0.1, 1000), pauses=st.lists(st.floats(0, 10), max_size=80))
def test_requests_a_second(rate: float, pauses: list[float]) -> None:
    account = Account("ann", Allowance(requests_per_second=rate, burst_seconds=2.0), now=0.0)
    now, let_in = 0.0, 0
    for pause in pauses:
        now += pause
        try:
            account.begin(now=now)
        except OverQuota:
            continue
        let_in += 1
        assert let_in <= (max(1.0, 2.0 * rate) + rate * now) * (1 + 1e-9)


@given(events=st.lists(st.booleans(), max_size=60), most=st.integers(0, 5))
def test_requests_at_once(events: list[bool], most: int) -> None:
    account, running = Account("ann", Allowance(concurrent_requests=most), now=0.0), 0
    for comes in events:
        if not comes:
            if running:
                account.end()
                running -= 1
            continue
        if running == most:
            with pytest.raises(OverQuota) as refusal:
                account.begin(now=0.0)
            assert refusal.value.facts["concurrent_requests"] == str(most)
        else:
            account.begin(now=0.0)
            running += 1


def test_what_is_held_open_has_a_bound_of_its_own() -> None:
    account = Account("ann", Allowance(concurrent_requests=1, concurrent_streams=1), now=0.0)
    account.begin(now=0.0, of_many=True)
    account.begin(now=0.0)
    with pytest.raises(OverQuota, match="1 concurrent streams"):
        account.begin(now=0.0, of_many=True)
    with pytest.raises(OverQuota, match="1 concurrent requests"):
        account.begin(now=0.0)
    account.end()
    assert not account.is_idle(now=0.0)
    account.end(of_many=True)
    assert account.is_idle(now=0.0)
    account.begin(now=0.0, of_many=True)


def test_a_refused_request_costs_nothing() -> None:
    account = Account(
        "ann", Allowance(requests_per_second=1.0, atoms_per_second=1.0, burst_seconds=5.0), now=0.0
    )
    account.begin(now=0.0)
    account.charge("atoms", 100, 100, now=0.0)
    for _ in range(50):
        with pytest.raises(OverQuota, match="atoms per second"):
            account.begin(now=1.0)
    # 5 saved, 1 taken; the fifty refusals took none, so four more are there as soon as the atoms are paid.
    for _ in range(4):
        account.begin(now=96.0)


@pytest.mark.parametrize(("name", "field"), [("atoms", "request_atoms"), ("edges", "request_edges")])
def test_a_request_too_large_for_its_caller(name: Literal["atoms", "edges"], field: str) -> None:
    account = Account("ann", Allowance(request_atoms=10, request_edges=10), now=0.0)
    account.charge(name, 10, 10, now=0.0)
    with pytest.raises(OverLimit, match="ann is 10") as refusal:
        account.charge(name, 1, 11, now=0.0)
    assert refusal.value.facts == {"identity": "ann", name: "11", field: "10"}


@given(
    rate=RATES,
    new_rate=RATES,
    spent=st.floats(0, 1e6),
    later=st.floats(0, 100),
)
def test_a_change_of_limits_forgives_no_debt(
    rate: float, new_rate: float, spent: float, later: float
) -> None:
    bucket = Bucket(rate, 10 * rate, now=0.0)
    bucket.take(spent, now=0.0)
    changed = bucket.reshaped(new_rate, 10 * new_rate, now=0.0)
    owed = max(0.0, spent - later * new_rate)
    assert changed.seconds_until(10 * new_rate, now=later) == pytest.approx(
        owed / new_rate, rel=1e-6, abs=1e-6
    )


def test_a_clock_that_steps_back_fills_nothing() -> None:
    bucket = Bucket(1.0, 10.0, now=100.0)
    bucket.take(10.0, now=100.0)
    assert bucket.seconds_until(1.0, now=50.0) == pytest.approx(1.0)
    assert bucket.seconds_until(1.0, now=100.0) == pytest.approx(1.0)


def test_each_identity_has_its_own() -> None:
    named = {"ann": Allowance(concurrent_requests=2)}
    quotas = Quotas(Allowances(default=Allowance(concurrent_requests=1), named=named))
    for identity, most in (("ann", 2), ("bob", 1), ("", 1)):
        for _ in range(most):
            quotas.account(identity, now=0.0).begin(now=0.0)
        with pytest.raises(OverQuota):
            quotas.account(identity, now=0.0).begin(now=0.0)
    quotas.change(Allowances(default=Allowance(concurrent_requests=3)), now=0.0)
    # What is under way counts after the change, too.
    quotas.account("ann", now=0.0).begin(now=0.0)
    with pytest.raises(OverQuota):
        quotas.account("ann", now=0.0).begin(now=0.0)


def test_many_identities_are_forgotten_when_idle() -> None:
    quotas = Quotas(Allowances(default=Allowance(requests_per_second=1.0, burst_seconds=1.0)))
    quotas.account("busy", now=0.0).begin(now=0.0)
    for number in range(20_000):
        quotas.account(f"guest-{number}", now=float(number))
    assert len(quotas._accounts) <= 5_000
    assert quotas._accounts["busy"]._running == 1


WRONG = [
    ("[default]\nrequest_per_second = 1", "'request_per_second' is not known; known are atoms_per_second"),
    ("[default]\natoms_per_second = -1", "atoms_per_second is -1, allowed is a positive number"),
    ("[default]\natoms_per_second = nan", "allowed is a positive number"),
    ("[default]\natoms_per_second = true", "allowed is a positive number"),
    ("[default]\nconcurrent_requests = 1.5", "allowed is a whole number"),
    (
        "[identities.ann]\npriority = 'urgent'",
        r"\[identities.ann\]: priority is 'urgent', allowed is one of low",
    ),
    ("[identities]\nann = 3", r"\[identities.ann\] is 3, and should be a table"),
    ("[people.ann]", "'people' is not known; known are default, identities"),
    ("[default", "is not TOML"),
    ("a = " + 5_000 * "[", "is not TOML: maximum recursion depth"),
]


@pytest.mark.parametrize(("text", "says"), WRONG)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(ServeError, match=says):
        read_allowances(path)


def test_a_rate_next_to_nothing_is_refused_as_any_other() -> None:
    account = Account("ann", Allowance(requests_per_second=1e-320), now=0.0)
    account.begin(now=0.0)
    with pytest.raises(OverQuota) as caught:
        account.begin(now=1.0)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in to_status(caught.value).details)
    assert retry.retry_delay.seconds > 10**8


def test_a_right_file(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(
        "[default]\nrequests_per_second = 2\n"
        "[identities.ann]\natoms_per_second = 1e6\nweight = 2\npriority = 'high'\n"
    )
    allowances = read_allowances(path)
    assert allowances.of("bob") == allowances.of("") == Allowance(requests_per_second=2)
    assert allowances.of("ann") == Allowance(atoms_per_second=1e6, weight=2, priority="high")
