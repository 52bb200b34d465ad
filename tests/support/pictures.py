"""The tasks and pictures of an emulated gateway."""

from flux2max_async import FluxSession
from flux2max_async.emulator import Emulator


def end_tasks(gateway: Emulator) -> None:
    """End all tasks that there are."""
    for task in tuple(gateway.tasks.values()):
        task.ends = 0.0


async def read_pictures(gateway: Emulator) -> dict[str, bytes]:
    """Return the picture of each prompt, as the service has it; all tasks have ended."""
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        return {
            task.prompt: await session.read((await session.fetch(task.id)).images[0])
            for task in tuple(gateway.tasks.values())
        }
