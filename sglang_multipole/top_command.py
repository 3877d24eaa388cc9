"""`sglang-multipole top`: what a server's multipole attention does, as it does it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
from rich.console import Console
from rich.live import Live

from sglang_multipole import event_source, top_view
from sglang_multipole.event_source import Event, EventSource
from sglang_multipole.top_state import TopState

HELP = "watch a server's event stream, or a recorded one"
DEFAULT_ENDPOINT = "tcp://127.0.0.1:5570"
REFRESH_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint",
        default=DEFAULT_ENDPOINT,
        help=f"the server's events_endpoint, {DEFAULT_ENDPOINT} by default",
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="show a recording instead")
    parser.add_argument("--record", type=Path, metavar="FILE", help="also write what arrives")
    parser.add_argument(
        "--speed", type=float, default=1.0, help="of a replay; 2 is twice as fast, 0 at once"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show events until the recording ends or Ctrl-C; returns the exit code."""
    try:
        with contextlib.ExitStack() as stack:
            if arguments.replay is not None:
                where = str(arguments.replay)
                events = event_source.replay(arguments.replay, max(arguments.speed, 0.0))
            else:
                where = arguments.endpoint
                source = stack.enter_context(EventSource(where))
                events = event_source.live(source, REFRESH_SECONDS)
            if arguments.record is not None:
                events = _recorded(events, arguments.record)
            # a generator's file is closed here, not when the interpreter ends
            stack.enter_context(contextlib.closing(events))
            _show(events, where, is_live=arguments.replay is None)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # `top | head`: the reader has had enough; nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError) as error:
        sys.stderr.write(f"sglang-multipole top: {error}\n")
        return 1
    return 0


def _show(events: Iterator[Event | None], where: str, is_live: bool) -> None:
    state, console = TopState(), Console()
    if not console.is_terminal:
        for event in events:
            if event is not None:
                state.apply(event)
                if event["event"] in ("step", "request", "stop"):
                    sys.stdout.write(top_view.line(state) + "\n")
                    sys.stdout.flush()
        return

    def picture() -> object:
        return top_view.screen(state, where, time.time() if is_live else None)

    with Live(picture(), console=console, auto_refresh=False, screen=is_live) as live:
        drawn = 0.0
        for event in events:
            if event is not None:
                state.apply(event)
            # hundreds of events a second are drawn as few pictures
            if event is None or time.monotonic() - drawn > REFRESH_SECONDS / 2:
                live.update(picture(), refresh=True)
                drawn = time.monotonic()
        live.update(picture(), refresh=True)


def _recorded(events: Iterator[Event | None], path: Path) -> Iterator[Event | None]:
    with path.open("wb") as file:
        for event in events:
            if event is not None:
                file.write(orjson.dumps(event) + b"\n")
                file.flush()
            yield event
