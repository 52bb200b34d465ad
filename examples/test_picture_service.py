"""A test of the picture service, without a key and without costs.

Needs `pip install 'flux2max_async[emulator]' fastapi httpx pytest`.
"""

from fastapi.testclient import TestClient
from picture_service import create_app

from flux2max_async.emulator import Emulator


def test_a_picture(flux_emulator: Emulator) -> None:
    """The service answers with a picture, although the first submit is refused, and pays for it once."""
    flux_emulator.script("submit", "rate_limited")
    with TestClient(create_app(flux_emulator.session)) as client:
        response = client.post("/pictures", json={"prompt": "a cat"})

    assert response.headers["content-type"] == "image/jpeg"
    assert response.content.startswith(b"\xff\xd8")
    assert flux_emulator.accepted == {"a cat": 1}
