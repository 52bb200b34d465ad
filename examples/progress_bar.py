"""A hundred pictures with a progress bar. Needs `pip install 'flux2max_async' tqdm`, and FLUX2MAX_API_KEY."""

import asyncio

from tqdm import tqdm

from flux2max_async import Failed, FluxSession, GenerationRequest, SqliteJournal

PROMPTS = [f"plate {number} of a herbarium, watercolour" for number in range(1, 101)]


async def main() -> None:
    """Generate the pictures, or those that are missing."""
    requests = [GenerationRequest(prompt, width=512, height=512) for prompt in PROMPTS]
    async with FluxSession(journal=SqliteJournal("herbarium.db"), budget="10.00") as session:
        with tqdm(total=len(requests)) as bar:
            async for outcome in session.stream(requests, save_to="herbarium"):
                bar.update()
                if isinstance(outcome, Failed):
                    bar.write(f"{outcome.request.prompt if outcome.request else '?'}: {outcome.error}")
                bar.set_postfix(spent=f"${session.stats.spent}")


if __name__ == "__main__":
    asyncio.run(main())
