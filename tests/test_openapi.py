"""What schemathesis makes of /openapi.json: whatever it sends, the server answers as documented."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving import PATIENCE_S, Running, serving, wait_for, write_talker

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
pytestmark = pytest.mark.slow
ERROR_KEYS = {"message", "type", "param", "code"}
Answered = Counter[tuple[str, str, int]]  # valid or not, route, status


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    # a short context, as requests may ask for 128 answers without an end
    weights = write_talker(tmp_path_factory.mktemp("talker"), max_seq_len=48)
    with serving(weights) as running:
        yield running


def send_what_comes_to_mind(server: Running, n_examples: int) -> Answered:
    """Send requests that fit the schema and such that do not; return how they were answered."""
    schema = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
    answered: Answered = Counter()
    valid, invalid = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    for found in schema.get_all_operations():
        operation = found.ok()
        send(operation, valid, n_examples, answered)
        if len(operation.body):  # elsewhere there is nothing to do wrong
            send(operation, invalid, n_examples, answered)
    return answered


def send(operation: Any, mode: Any, n_examples: int, answered: Answered) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=n_examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        response = case.call(timeout=PATIENCE_S)
        answered[mode.value, f"{case.method} {operation.path}", response.status_code] += 1
        # the schema tells of each field, not of what fields make together
        beyond = [schemathesis.checks.positive_data_acceptance]
        case.validate_response(response, excluded_checks=beyond)
        if response.status_code >= 400:
            assert response.json()["error"].keys() >= ERROR_KEYS

    check()


def check_answers(server: Running, n_examples: int) -> None:
    answered = send_what_comes_to_mind(server, n_examples)
    statuses = {(kind, status) for kind, _, status in answered}
    assert statuses >= {("positive", 200), ("negative", 400)}
    assert {status for _, status in statuses} <= {200, 400, 404}  # 404: no model of that name
    wait_for(server.is_at_rest)


def test_whatever_comes_is_answered_as_documented(server: Running) -> None:
    check_answers(server, 10)


@pytest.mark.soak
def test_whatever_comes_is_answered_as_documented_for_long(server: Running) -> None:
    check_answers(server, 120)
