"""How the engine's threads wait: beside another process that computes, and what it costs alone."""

from pathlib import Path
from statistics import median

from krea2_bench.micro.timing import Timed
from krea2_bench.threads.measure import DEFAULT, OURS, running_engines

MAX_SLOWEST = 6.0
"""The setting of `krea2_srt.threads` was chosen for 5; a kernel that places threads worse, or a
noisier machine, has made the same setting 5.2 at best. libgomp's own waiting has had 31."""

MIN_THROUGHPUT = 0.96
BESIDE_ROUNDS = 3


def waiting(folder: Path, checkpoint: Path, rounds: int) -> list[Timed]:
    """The slowest of eight pictures beside a process that computes, against one without it, and
    the time of a mix against that with libgomp's own waiting.
    """
    with running_engines(folder, checkpoint, (OURS, DEFAULT)) as engines:
        # The mix first: having been beside another process can leave one slower, by a sixth here.
        engines.generate_mix(rounds)
        engines.generate_beside([OURS], BESIDE_ROUNDS)
    ours, default = engines.times[OURS], engines.times[DEFAULT]
    default_ms = median(default.mixed)
    mixed_ms = median(ours.mixed_ratios(default)) * default_ms
    return [
        Timed(
            "slowest picture beside a process that computes",
            median(ours.slowest) * ours.alone_ms,
            "a picture alone",
            ours.alone_ms,
            MAX_SLOWEST,
        ),
        Timed(
            "mix of pictures",
            mixed_ms,
            "with libgomp's own waiting",
            default_ms,
            1 / MIN_THROUGHPUT,
        ),
    ]
