"""Plans a landscape: the words of the prompt choose its palette and subjects, the seed decides the rest."""

import hashlib
import math
import random
import re
from dataclasses import dataclass

from PIL import Image

from flux2max_async.emulator._images import drawing

# For each mood: the words that select it, and the colours of the sky (from zenith to horizon), of the sun or moon, and
# of the nearest land. If a prompt selects several moods, the first one wins.
MOODS = {
    "aurora": ("aurora|northern light|polar light", "050a1c 0a1a38 10364f 2b7a78", "eefcf6", "03101a"),
    "night": ("night|midnight|moon|moonlight|starr?|galax", "070b1f 10204a 274680 6d8fbf", "f4f1e2", "050a1c"),
    "sunset": ("sunset|sundown|evening|golden hour", "2d1e4f 8e3b6e e8684a fdb863", "ffe9b8", "24102f"),
    "dawn": ("dawn|sunrise|daybreak|morning", "44558a 9484b0 eaaca3 fcdcb8", "fff4da", "2a2c4c"),
    "twilight": ("twilight|dusk|neon|cyberpunk|dream", "1b1d4d 4b3f8f b16fa8 f6bcae", "fff0e0", "150f33"),
    "fire": ("fire|volcano|lava|dragon|ember|inferno", "1a0b16 561a2a b33a2a f3964a", "ffdf9e", "12060d"),
    "desert": ("desert|dune|camel|caravan|sand|cactus|canyon", "4f6f9f c0a0a0 f0b98a fbe0b0", "fff3d0", "6e2c1f"),
    "spring": ("spring|cherr|blossom|sakura|flower|garden", "7f9fc9 c3b5d9 f2c4cf fbe6d8", "fffaf0", "463a63"),
    "winter": ("snow|winter|ice|ic|frost|arctic|glacier", "5f87b8 98b6d8 cfdeee fbeee6", "ffffff", "2f4668"),
    "autumn": ("autumn|fall|harvest|october|maple", "6b4a5e c27b5a eeb866 fbe5b0", "fff6d6", "381d22"),
    "storm": ("rain|storm|thunder|fogg?|mist|cloud", "333f4a 586973 8a999c c6cbc2", "eef0e6", "172126"),
    "forest": ("forest|wood|tree|jungle|pine|fox|deer|bear|owl", "4f8a94 92b8ae d3e0c0 f8f1d4", "fffbe6", "0f2b27"),
    "sea": ("sea|ocean|wave|water|beach|island|coast|lighthouse", "1d6f93 4fb0b5 a9dcc4 fdf0c4", "fffdf0", "0b3546"),
    "day": ("summer|noon|sunn|sk|meadow", "3a7fc2 79b4de bcdcec f5efdc", "fffce8", "1b4550"),
}
_NIGHT_MOODS = {"aurora", "night", "twilight"}

# For each subject: the words that select it.
_SUBJECTS = {
    "shore": "sea|ocean|wave|water|beach|island|coast|lighthouse|lake|river|pond|harbou?r|boat|ship|sail|sailing|yacht",
    "peaks": "mountain|alp|peak|summit|hill|valley|volcano|dragon",
    "city": "cit|town|skyline|street|skyscraper|metropolis",
    "rain": "rain|storm|thunder|downpour",
    "lighthouse": "lighthouse",
    "boat": "boat|ship|sail|sailing|yacht",
    "camel": "camel|caravan",
}
_LANDSCAPES = ["shore", "forest", "desert", "peaks"]


@dataclass
class Scene:
    """What is painted, and the image that it is painted on."""

    canvas: Image.Image
    rng: random.Random
    tags: set[str]
    """The moods and subjects that the prompt selects."""
    sky: list[drawing.Colour]
    """From zenith to horizon."""
    light: drawing.Colour
    """The colour of the sun or moon."""
    land: drawing.Colour
    """The colour of the nearest land."""
    night: bool
    horizon: float
    """Its y coordinate."""
    sun: drawing.Point
    """The centre of the sun or moon."""
    unit: float
    """The length that sizes are relative to: about the side of the image, less if it is very long."""


def plan_scene(prompt: str, seed: int, width: int, height: int) -> Scene:
    """Plan the landscape for a prompt and a seed."""
    rng = random.Random(hashlib.sha256(f"{seed} {prompt}".encode("utf-8", "surrogatepass")).digest())
    patterns = {name: mood[0] for name, mood in MOODS.items()} | _SUBJECTS
    tags = {tag for tag in patterns if re.search(rf"\b(?:{patterns[tag]})(?:e?s|y|ies)?\b", prompt, re.IGNORECASE)}
    fallback_mood = rng.choice(list(MOODS))
    mood = next((name for name in MOODS if name in tags), fallback_mood)
    if "city" in tags:  # the skyline is painted behind water
        tags.add("shore")
    if tags.isdisjoint(_LANDSCAPES):
        tags.add(rng.choice(_LANDSCAPES))
    _, sky, light, land = MOODS[mood]
    horizon = height * rng.uniform(0.48, 0.66)
    altitude = rng.uniform(0.5, 0.8) if mood in _NIGHT_MOODS else rng.uniform(0.12, 0.5)
    across = rng.choice([rng.uniform(0.18, 0.4), rng.uniform(0.6, 0.82)])
    return Scene(
        canvas=Image.new("RGB", (width, height)),
        rng=rng,
        tags=tags,
        sky=[drawing.parse_colour(text) for text in sky.split()],
        light=drawing.parse_colour(light),
        land=drawing.parse_colour(land),
        night=mood in _NIGHT_MOODS,
        horizon=horizon,
        sun=(width * across, horizon * (1 - altitude)),
        unit=min(math.sqrt(width * height), 1.5 * min(width, height)),
    )
