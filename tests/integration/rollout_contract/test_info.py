"""Contract of /health, /model_info and /server_info, and of bodies that are not JSON."""

from __future__ import annotations

import time

import httpx
import pytest

from tests.support.rollout_contract import (
    busy_request,
)

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
def test_health(target, path):
    assert target.request("GET", path).status_code == 200


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(target, path):
    info = target.request("GET", path).json()
    assert info["model_path"] == target.model_path
    assert info["weight_version"] == "v1"
    assert info["is_generation"] is True
    assert info["model_type"] == "qwen3"


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(target, path):
    info = target.request("GET", path).json()
    assert info["model_path"] == target.model_path
    assert isinstance(info["internal_states"], list)


def test_health_answers_during_generation(embedded_target):
    running = busy_request(embedded_target)
    slowest = 0.0
    for _ in range(10):
        start = time.monotonic()
        assert embedded_target.request("GET", "/health").status_code == 200
        slowest = max(slowest, time.monotonic() - start)
    assert not running.future.done()
    assert embedded_target.request("GET", "/health_generate").status_code == 200
    running.answer()
    assert slowest < 1.0


@pytest.mark.parametrize("path", ["/generate", "/update_weights_from_disk", "/pause_generation", "/abort_request"])
def test_a_body_that_is_not_json_is_refused(target, path):
    response = httpx.post(
        target.url + path,
        content=b"{not json",
        headers={"content-type": "application/json"},
        timeout=10,
        trust_env=False,
    )
    assert response.status_code == 400
    assert response.json()["type"] == "Bad Request"


def test_required_fields_and_choices_of_control_calls(target):
    assert target.post("/update_weights_from_disk", {}).status_code == 400
    assert target.post("/pause_generation", {"mode": "sleep"}).status_code == 400
