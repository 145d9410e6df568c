"""The server's own description of itself, tried by schemathesis: nothing that it allows or forbids gives a 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from faults.runs import make_run
from hypothesis import HealthCheck, given, settings
from live_server import LiveServer, serving
from schemathesis import Case, GenerationMode
from schemathesis.checks import positive_data_acceptance
from scripted_engine import ScriptedEngine

# A valid request may still name no model that there is, or limits that contradict each other.
EXCLUDED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("served")
    make_run(root / "reviews")
    with serving(ScriptedEngine(root), root) as server:
        yield server


def try_requests(live: LiveServer, *, examples: int) -> int:
    """So many allowed and so many forbidden requests to each operation; returns how many operations there are."""
    description = live.send("GET", "/openapi.json").json
    for name in ("ChatRequest", "CompletionRequest"):  # or nearly every request would end at an unknown model
        description["components"]["schemas"][name]["properties"]["model"] = {"enum": ["base", "reviews", "nobody"]}
    schema = schemathesis.openapi.from_dict(description)
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        # Nothing can be wrong with a request that holds nothing.
        for mode in GenerationMode if operation.method == "post" else [GenerationMode.POSITIVE]:

            @settings(
                max_examples=examples,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Case) -> None:
                case.call_and_validate(base_url=live.url, excluded_checks=EXCLUDED)

            send()
    return len(operations)


def test_a_sample_of_requests(live: LiveServer) -> None:
    assert try_requests(live, examples=5) == 6


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_many_requests(live: LiveServer) -> None:
    assert try_requests(live, examples=200) == 6
