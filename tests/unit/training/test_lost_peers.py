"""What the libraries say when a rank is gone becomes one line that says what to do; other errors keep their
traceback."""

from __future__ import annotations

import pytest

from dasd_megatron.training.parallel import LostPeerError, PeerError, naming_lost_peers


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 20000ms for recv "
        "operation to complete",
        "Application timeout caused pair closure",
        "Connection closed by peer [10.77.0.11]:41922",
        "Connection reset by peer",
        "Broken pipe",
    ],
)
def test_a_lost_rank_is_one_line(message: str) -> None:
    with (
        pytest.raises(LostPeerError, match="within backend.timeout_seconds=20.*continue with resume=auto"),
        naming_lost_peers(20.0),
    ):
        raise RuntimeError(message)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), PeerError("disk full: Broken pipe"), ValueError("Broken pipe")]
)
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_lost_peers(20.0):
        raise error
    assert caught.value is error
