"""Named settings of a whole run.

``RELEASED`` is what the checkpoint in ``../model`` was trained with; ``TINY`` passes through every stage in a few
minutes, to check that the recipe still runs. A stage's steps are of two processes with ``BATCH`` pictures each.
"""
from dataclasses import dataclass, replace

BATCH = 16


@dataclass(frozen=True)
class Compose:
    """How scenes are put together."""
    scenes: int
    seed: int
    counts: tuple                  # probability of zero, one, two and three objects
    sizes: dict                    # longest side over the picture's side, by the number of objects
    shard: int = 2_000
    overlap: float = 0.12          # of the smaller box, at most (relaxed where no place is found)
    hue: float = 0.12              # standard deviation of the hue's turn, radians
    turn: float = 7.0              # standard deviation of the drawing's turn, degrees
    familiar: float = 0.0          # how often a class is shown by the one drawing that stands for it


@dataclass(frozen=True)
class Caption:
    """How captions vary."""
    group_word: float = 0.08       # "animal" instead of "dog"
    no_background: float = 0.15
    no_object: float = 0.04
    empty: float = 0.10            # for classifier-free guidance


@dataclass(frozen=True)
class Autoencoder:
    minutes: float = 13.0
    batch: int = BATCH
    rate: float = 3e-4
    kl: float = 2e-4


@dataclass(frozen=True)
class Stage:
    """A stretch of training of the U-Net and the text encoder."""
    scenes: str                    # which of the composed sets
    steps: int
    rate: float
    fall: float = 0.0              # the share of the steps, at the end, over which the rate falls to nothing
    warmup: int = 100              # steps
    offset_noise: float = 0.0
    spread: float = 0.0            # weight of the first localization loss
    overlap: float = 0.0           # weight of the second
    threshold: float = 0.45        # which the second anticipates
    object_weight: float = 1.0     # of the noise's error where an object is, that of the background being 1
    ema: float = 0.998
    snr_cap: float = 5.0
    batch: int = BATCH
    export_every: float = 6.0      # minutes


@dataclass(frozen=True)
class Settings:
    compose: dict
    stages: dict
    autoencoder: Autoencoder = Autoencoder()
    caption: Caption = Caption()


RELEASED = Settings(
    compose={
        "first": Compose(20_000, 1, (0.05, 0.38, 0.42, 0.15), {1: (0.38, 0.72), 2: (0.32, 0.56), 3: (0.28, 0.44)}),
        "larger": Compose(24_000, 31, (0.03, 0.42, 0.42, 0.13), {1: (0.45, 0.85), 2: (0.36, 0.60), 3: (0.30, 0.46)}),
        "familiar": Compose(24_000, 47, (0.03, 0.48, 0.42, 0.07), {1: (0.45, 0.85), 2: (0.36, 0.60), 3: (0.30, 0.46)},
                            hue=0.08, turn=4.0, familiar=0.65),
    },
    stages={
        "pictures": Stage("first", 3_750, 6e-4, warmup=300),
        "words": Stage("first", 2_014, 6e-4, offset_noise=0.1, spread=0.05),
        "larger": Stage("larger", 1_504, 4e-4, fall=0.57, warmup=300, offset_noise=0.07, spread=0.1),
        "polish": Stage("larger", 164, 1.5e-4, fall=1.0, warmup=20, offset_noise=0.07, spread=0.1, overlap=0.3, ema=0.98),
        "objects": Stage("larger", 6_756, 5e-4, fall=0.6, warmup=100, offset_noise=0.05, spread=0.1, overlap=0.1,
                         object_weight=3.0),
        "familiar": Stage("familiar", 2_700, 5e-4, fall=0.6, warmup=100, offset_noise=0.05, spread=0.1, overlap=0.1,
                          object_weight=3.0),
    })
TINY = Settings(
    compose={k: replace(c, scenes=60, shard=30) for k, c in RELEASED.compose.items()},
    stages={k: Stage(s.scenes, 6, s.rate, s.fall, 2, s.offset_noise, s.spread, s.overlap, object_weight=s.object_weight, batch=4)
            for k, s in RELEASED.stages.items()},
    autoencoder=Autoencoder(minutes=0.3, batch=8))
NAMED = {"released": RELEASED, "tiny": TINY}
