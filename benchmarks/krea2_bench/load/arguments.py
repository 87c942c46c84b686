"""The options that load tests and comparisons share: what is asked, when, and how it is judged."""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from krea2_bench.arguments import count
from krea2_bench.load.endpoint import EndpointOptions
from krea2_bench.load.mix import SYNTAX, Kind, parse_mix
from krea2_bench.load.plan import ARRIVALS, Planned, draw_plan, replayed
from krea2_bench.load.points import Point
from krea2_srt.errors import Krea2Error

T = TypeVar("T", int, float)


DEFAULT_MIX = "1024x1024:steps=8"


class OptionError(Krea2Error):
    """An option that cannot be; the message names it."""


def add_load_options(parser: argparse.ArgumentParser, requests: int) -> None:
    """Options of the load itself.

    Args:
        parser: that gets them.
        requests: default number.
    """
    add = parser.add_argument_group("load").add_argument
    add(
        "--mix",
        action="append",
        metavar="MIX",
        help=f"kinds of requests: {SYNTAX} (default {DEFAULT_MIX})",
    )
    add("--requests", type=count, default=requests, help=f"of a point (default {requests})")
    add(
        "--rate",
        type=_list_of(_positive_or_inf),
        metavar="R[,R…]",
        help="requests a second, whatever the server does (open loop); inf sends all at once",
    )
    add(
        "--concurrency",
        type=_list_of(count),
        metavar="N[,N…]",
        help="clients that send one request after the other (closed loop)",
    )
    add("--trace", type=Path, metavar="FILE", help="replay arrivals from a file of JSON lines")
    add("--trace-speed", type=_positive, default=1.0, metavar="X", help="times are divided by it")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="of a rate (default poisson)")
    add(
        "--burstiness",
        type=_positive,
        default=0.25,
        metavar="X",
        help="shape of gamma arrivals: 1 is Poisson, less is burstier (default 0.25)",
    )
    add("--cancel-rate", type=_share, default=0.0, metavar="X", help="clients that hang up")
    add(
        "--cancel-after-s",
        type=_positive,
        default=1.0,
        metavar="S",
        help="after this long on average (default 1)",
    )
    add("--seed", type=_natural, default=0, help="of everything random (default 0)")
    add = parser.add_argument_group("requests").add_argument
    add("--stream", action="store_true", help="ask for streams of events")
    add("--previews", type=_natural, default=0, metavar="N", help="of each image, in a stream")
    add("--model", default="", help="model of the requests; by default the first of /v1/models")
    add(
        "--api-key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the API key, if the server wants one",
    )
    add("--omit", default="", metavar="FIELD[,FIELD…]", help="fields that are not to be sent")
    add("--extra", default="{}", metavar="JSON", help="fields that are to be sent beside ours")
    add(
        "--timeout-s", type=_positive, default=600.0, metavar="S", help="of a request (default 600)"
    )
    add = parser.add_argument_group("judgement").add_argument
    add(
        "--slo-scale",
        type=_positive,
        default=3.0,
        metavar="X",
        help="a request is in time within this multiple of its time alone (default 3)",
    )
    add("--slo-s", type=_positive, metavar="S", help="or within so many seconds")
    add("--alone", type=_natural, default=3, metavar="N", help="requests to measure that time with")
    add("--warm-up", type=_natural, default=1, metavar="N", help="requests of each kind before it")


def endpoint_options(args: argparse.Namespace, url: str) -> EndpointOptions:
    """How requests are sent.

    Raises:
        OptionError: an option cannot be.
    """
    try:
        extra = json.loads(args.extra)
    except ValueError as error:
        raise OptionError(f"--extra: is no JSON: {error}") from None
    if not isinstance(extra, dict):
        raise OptionError(f"--extra: must be a JSON object, got {args.extra}")
    if args.previews and not args.stream:
        raise OptionError("--previews: only streams have them; add --stream")
    if not url.startswith(("http://", "https://")):
        raise OptionError(f"--url: must begin with http:// or https://, got {url!r}")
    return EndpointOptions(
        url.rstrip("/").removesuffix("/v1"),
        args.model,
        os.environ.get(args.api_key_variable, ""),
        args.stream,
        args.previews,
        frozenset(filter(None, (field.strip() for field in args.omit.split(",")))),
        extra,
        args.timeout_s,
    )


def load_of(
    args: argparse.Namespace, number: int = 0
) -> tuple[tuple[Kind, ...], list[Planned], list[Point]]:
    """The mix, the plan without times, and the points.

    Args:
        args: with the options of `add_load_options`.
        number: of the plan; each has other prompts and images.

    Raises:
        OptionError, MixError, TraceError: they cannot be.
    """
    chosen = [name for name in ("rate", "concurrency", "trace") if getattr(args, name) is not None]
    if len(chosen) > 1:
        raise OptionError(f"--{chosen[0]} and --{chosen[1]}: only one of them can be given")
    if args.trace is not None:
        if args.cancel_rate:
            raise OptionError("--cancel-rate: does not go with a trace")
        plan = replayed(args.trace, args.seed + number, args.trace_speed)
        return tuple(dict.fromkeys(p.kind for p in plan)), plan, [Point("trace")]
    mixes = args.mix or [DEFAULT_MIX]
    if len(mixes) > 1:
        raise OptionError("--mix: can be given once; the kinds of a mix are separated by commas")
    mix = parse_mix(mixes[0])
    patience = (args.cancel_rate, args.cancel_after_s)
    plan = draw_plan(mix, args.requests, args.seed, *patience, number)
    if args.concurrency is not None:
        return mix, plan, [Point("closed", concurrency=n) for n in args.concurrency]
    rates = [1.0] if args.rate is None else args.rate
    return mix, plan, [Point(args.arrivals, rate, burstiness=args.burstiness) for rate in rates]


def _natural(text: str) -> int:
    return _checked(int, text, lambda value: value >= 0, "a whole number from 0 on")


def _positive(text: str) -> float:
    return _checked(float, text, lambda value: 0 < value < math.inf, "a number greater than 0")


def _positive_or_inf(text: str) -> float:
    return _checked(float, text, lambda value: value > 0, "a number greater than 0, or inf")


def _share(text: str) -> float:
    return _checked(float, text, lambda value: 0 <= value <= 1, "between 0 and 1")


def _checked(kind: Callable[[str], T], text: str, valid: Callable[[T], bool], wanted: str) -> T:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return value


def positive_list(text: str) -> list[float]:
    """The type of an option that is a list of numbers greater than 0."""
    return [_positive(part.strip()) for part in text.split(",")]


def _list_of(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [item(part.strip()) for part in text.split(",")]

    return parse
