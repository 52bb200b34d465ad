"""Combine two pictures that Pillow has in memory. Needs `pip install flux2max_async pillow`, and FLUX2MAX_API_KEY."""

import asyncio
import sys
from io import BytesIO

from PIL import Image

from flux2max_async import FluxSession


async def main(person: str, place: str, target: str) -> None:
    """Edit twice, and save what Pillow makes of the result."""
    pictures = [Image.open(person).convert("RGB"), Image.open(place).crop((0, 0, 512, 512))]
    async with FluxSession() as session:
        done = await session.generate("the person of the first picture in the second", input_images=pictures)
        again = await session.generate("the same, at night", input_images=[done.images[0]])  # no file in between
        Image.open(BytesIO(await session.read(again.images[0]))).rotate(90).save(target)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
