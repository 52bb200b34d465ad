"""An embedded gateway that speaks the FLUX.2 [max] protocol on 127.0.0.1 and draws real images.

For demos, and for testing applications without an API key, costs or a network. Needs the extra `emulator` (Pillow).

    async with Emulator(seconds=8.0, spread=0.3, seed=1) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            ...

`with Emulator() as gateway:` runs it in a thread of its own, for synchronous code. The pytest fixture `flux_emulator`
is available without any configuration; `gateway.session()` is a session for tests, whose polls are quick.
"""

from flux2max_async.emulator._faults import Fault
from flux2max_async.emulator._server import Emulator
from flux2max_async.emulator._service import EmulatedTask
from flux2max_async.emulator._webhook_sender import Delivery, Webhooks

__all__ = ["Delivery", "EmulatedTask", "Emulator", "Fault", "Webhooks"]
