"""What the benchmark measures, each in child processes that end with the measurement."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from krea2_bench.worker_process import LIMIT_S, WorkerProcess, warm_environment
from krea2_bench.workers import PROMPT, SIDE, STEPS, Message, peak_memory_mib
from krea2_srt.testing.processes import ChildProcess, ProcessError, free_ports, installed

SIZE = f"{SIDE}x{SIDE}"
WARM_UPS = 2
# What SGLang calls the stages of our pipeline (on) and of its own (off).
_ENCODE = {"on": "encode", "off": "Krea2BeforeDenoisingStage"}
_DENOISE = {"on": "denoise", "off": "DenoisingStage"}
_DECODE = {"on": "decode", "off": "DecodingStage"}


@dataclass(frozen=True)
class Samples:
    """Samples of one quantity, ours and theirs taken in turn.

    Attributes:
        quantity, detail: what was measured.
        unit: of all samples.
        ours: one a round.
        theirs: the same of the other implementation; empty where there is none.
    """

    quantity: str
    detail: str
    unit: str
    ours: list[float]
    theirs: list[float] = field(default_factory=list)


def measure_engines(model: Path, rounds: int, scratch: Path) -> list[Samples]:
    """Stages, requests and memory of two SGLang engines: with our runner, and without."""
    with ExitStack() as stack:
        engines = {
            switch: stack.enter_context(
                WorkerProcess(
                    "serve_engine",
                    model,
                    scratch,
                    {"output_path": str(scratch), **_engine_ports()},
                    switch,
                )
            )
            for switch in ("on", "off")
        }
        pids = {switch: engine.answer()["worker_pid"] for switch, engine in engines.items()}
        answers: dict[str, list[Message]] = {switch: [] for switch in engines}
        for i in range(WARM_UPS + rounds):
            progress(f"engines: picture {i + 1} of {WARM_UPS + rounds}")
            for switch, engine in engines.items():
                # A new prompt each time, so that no cache of prompts helps.
                answer = engine.ask({"prompt": f"{PROMPT}, number {i}", "seed": i})
                answers[switch].append(answer)
        peaks = [[peak_memory_mib(pid)] for pid in pids.values()]
    warm = {switch: found[WARM_UPS:] for switch, found in answers.items()}
    requests = [[answer["request"] for answer in found] for found in warm.values()]
    size = f"{SIZE}, {STEPS} steps, vs SGLang"
    return [
        Samples("denoise", size, "ms", *_stage_times(warm, _DENOISE)),
        Samples("encode + denoise", size, "ms", *_stage_times(warm, _ENCODE, _DENOISE)),
        Samples("decode in the engine", f"{SIZE}, vs SGLang", "ms", *_stage_times(warm, _DECODE)),
        Samples("whole request", size, "ms", *requests),
        Samples("peak memory", "SGLang worker, vs SGLang", "MiB", *peaks),
    ]


def measure_decoders(
    model: Path, rounds: int, scratch: Path
) -> tuple[list[Samples], dict[str, float]]:
    """VAE decoding alone, and the largest difference of the pixels, by dtype and size."""
    progress("VAE decoders")
    with WorkerProcess("decode", model, scratch, {"rounds": rounds}) as child:
        found = child.answer(rounds * LIMIT_S)
    samples = [
        Samples("VAE decode", f"{name}, vs Diffusers", "ms", answer["ours"], answer["theirs"])
        for name, answer in found.items()
    ]
    return samples, {name: answer["difference"] for name, answer in found.items()}


def measure_memory(model: Path, starts: int, scratch: Path) -> list[Samples]:
    """Peak memory of plain processes that load the model and generate one picture."""
    peaks: dict[str, list[float]] = {"generate_ours": [], "generate_diffusers": []}
    for i in range(starts):
        progress(f"memory: start {i + 1} of {starts}")
        for job, found in peaks.items():
            found.append(_answer(job, model, scratch)["peak"])
    return [Samples("peak memory", "one picture, vs Diffusers", "MiB", *peaks.values())]


def measure_prompts(model: Path, scratch: Path) -> list[Samples]:
    """Our encoder on a prompt in the cache, and on new ones."""
    progress("prompt cache")
    found = _answer("encode", model, scratch)
    return [
        Samples("cached prompt", "encode", "ms", found["cached"]),
        Samples("new prompt", "encode", "ms", found["new"]),
    ]


def measure_starts(model: Path, starts: int, scratch: Path) -> list[Samples]:
    """Whole commands that generate one picture; the first start of each is extra: it fills caches.

    The time is that until the command has ended.
    """
    seconds: list[list[float]] = [[], []]
    for i in range(1 + starts):
        progress(f"start to picture: {i} of {starts}" if i else "start to picture: warm-up")
        for side, found in enumerate(seconds):
            folder = scratch / f"start_{i}_{side}"
            folder.mkdir()
            found.append(_seconds_to_picture(_commands(model, folder)[side], folder))
    warm = [found[1:] for found in seconds]
    return [Samples("start to picture", f"{SIZE}, {STEPS} steps, vs SGLang", "s", *warm)]


def progress(line: str) -> None:
    """Say on stderr what goes on."""
    print(line, file=sys.stderr, flush=True)


def _stage_times(answers: dict[str, list[Message]], *stages: dict[str, str]) -> list[list[float]]:
    """Sum of some stages of each request, in ms: ours, theirs."""
    try:
        return [
            [sum(answer["stages"][stage[switch]] for stage in stages) for answer in found]
            for switch, found in answers.items()
        ]
    except KeyError as stage:
        raise ProcessError(f"an engine ran no stage {stage}: another pipeline serves") from None


def _commands(model: Path, folder: Path) -> tuple[list[str], list[str]]:
    """The command lines, ours and SGLang's, that generate one picture into a folder."""
    size = ["--height", str(SIDE), "--width", str(SIDE)]
    ours = [installed("krea2-generate"), PROMPT, "--checkpoint", str(model), *size]
    theirs = [installed("sglang"), "generate", "--model-path", str(model), *size]
    for name, port in _engine_ports().items():
        theirs += [f"--{name.replace('_', '-')}", str(port)]
    return (
        [*ours, "--steps", str(STEPS), "--output", str(folder / "picture")],
        [
            *theirs,
            *("--prompt", PROMPT, "--num-inference-steps", str(STEPS)),
            *("--save-output", "--output-path", str(folder)),
        ],
    )


def _seconds_to_picture(command: Sequence[str], folder: Path) -> float:
    start = time.perf_counter()
    environment = warm_environment(folder.parent, "off")
    log = folder.with_suffix(".log")
    with ChildProcess(command, log, environment=environment, apart=True) as child:
        child.finish(LIMIT_S)
        seconds = time.perf_counter() - start
        # SGLang's command ends well even where it could not generate.
        if not any(folder.iterdir()):
            raise child.error()
    return round(seconds, 3)


def _answer(job: str, model: Path, scratch: Path) -> Message:
    """The answer of a job that has only one and needs no settings."""
    with WorkerProcess(job, model, scratch, {}) as child:
        return child.answer()


def _engine_ports() -> dict[str, int]:
    """Ports for one engine, under SGLang's names. It looks for its own at the start but binds them
    half a minute later, when another SGLang may have taken them.
    """
    return free_ports(("port", "scheduler_port", "master_port"))
