"""The thread that makes all videos: a chunk of each that is wanted, in as few passes of the network as they fit in."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rcm_jax.pipelines.live import TOGETHER, Live, advance
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.policy_options import FLAGS
from rcm_jax.serve import metrics, wire
from rcm_jax.serve.options import ServeOptions
from rcm_jax.serve.programs import Programs
from rcm_jax.serve.show import Deliver, Show
from rcm_jax.worlds.painted import Painted

log = logging.getLogger("rcm_jax.serve")
REFUSED = (ValueError, TypeError, ArithmeticError)  # what a reader asked for cannot be done


def with_changes(options: dict[str, Any], changes: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Another cache policy takes its own settings, those of the one before are none of it: the server's `own`, where it
    is the server's policy, else as published."""
    policy = changes.get("cache_policy")
    if policy not in (None, options.get("cache_policy")):
        kept = {"window", "sink", *(flag for flags in FLAGS.values() for flag in flags)}
        options = {name: value for name, value in options.items() if name not in kept}
        if policy == own.get("cache_policy"):
            options |= {name: value for name, value in own.items() if name in kept}
    return options | changes


class Engine:
    """options: of every video, unless its reader says otherwise."""

    def __init__(self, pipe: Pipeline, limits: ServeOptions, options: dict[str, Any]):
        self.pipe, self.limits, self.options = pipe, limits, options
        self._shows: list[Show] = []
        self._wake, self._stopping, self._news = threading.Condition(), False, False
        most = limits.together or (max(TOGETHER) if pipe.world.small else 1)
        self._programs = Programs(pipe, most, self.changed)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.beat = time.monotonic()

    @property
    def compiling(self) -> bool:
        """Whether a program is being compiled beside the streams."""
        return self._programs.compiling

    # --- from other threads -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Compiles what the first reader needs, so that it waits for nothing, then runs. Raises for options that do not
        go together."""
        live = Live(self.pipe, None, **self.options)
        self.size, self.settings = live.size, live.settings  # of every video, unless changed
        live.close()
        self._programs.compile(self.options, video=False)
        self.beat = time.monotonic()
        self._thread.start()

    @property
    def steps(self) -> list[int]:
        """Numbers of steps that may be asked for."""
        own = self.settings["num_steps"]
        return list(range(1, 5)) if self.pipe.info.kind == "student" else sorted({10, 20, 50, own})

    def open(self, opening: wire.Open, deliver: Deliver) -> Show:
        """A video. What it is refused for comes as its `end`."""
        self.check_prompt(opening.prompt)
        show = Show(opening, deliver, self.changed)
        with self._wake:
            if self._stopping:
                show.end("the server stops")
                return show
            self._shows.append(show)
            self._news = True
            self._wake.notify()
        return show

    def check_prompt(self, prompt: str | None) -> None:
        """Raises BadMessage for one that is too long."""
        if prompt is not None and len(prompt) > self.limits.max_prompt:
            raise wire.BadMessage(f"a prompt of {len(prompt)} characters; at most {self.limits.max_prompt} are taken")

    def changed(self) -> None:
        """Something is to be looked at."""
        with self._wake:
            self._news = True
            self._wake.notify()

    def stop(self, seconds: float) -> None:
        """All streams end after the chunk that is made; waits for that, but no longer than so many seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._programs.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._news or self._due(), timeout=1.0)
                shows, stopping, self._news = list(self._shows), self._stopping, False
            self.beat = time.monotonic()
            if stopping:
                for show in shows:
                    self._end(show, "the server stops")
                return
            self._tend(shows)
            self._advance([show for show in shows if not show.closed and show.live is not None and show.runnable])

    def _due(self) -> bool:
        return any(show.live is not None and show.runnable for show in self._shows)

    def _tend(self, shows: Sequence[Show]) -> None:
        """Opens, ends and changes what is to be, before chunks are made."""
        now = time.monotonic()
        for show in shows:
            if show.closed:
                self._end(show, "closed")
            elif now - show.heard > self.limits.idle_seconds:
                self._end(show, f"nothing was heard for {self.limits.idle_seconds:g} seconds")
            elif show.live is None:
                self._open(show)
            else:
                while show.words and self._change(show, show.words[0]):
                    show.words.popleft()

    def _open(self, show: Show) -> None:
        try:
            show.options = with_changes(self.options, wire.changes(show.opening), self.options)
            if self._ready(show, show.options):
                show.live = Live(self.pipe, show.opening.prompt, pushed=show.pushed, **show.options)
        except Exception as error:
            show.failed = error
            self._end(show, "")

    def _ready(self, show: Show, options: dict[str, Any]) -> bool:
        """Whether it can go on with these; else its reader is told, once, that it takes a while."""
        ready = self._programs.ready(options, video=show.opening.video)
        if not ready and not show.prepares:
            show.deliver(wire.event("preparing"))
        show.prepares = not ready
        return ready

    def _change(self, show: Show, word: wire.Say | wire.Change) -> bool:
        """Whether it is done, or refused: what needs programs that are not compiled yet waits for them."""
        live = show.live
        try:
            if isinstance(word, wire.Say):
                self.check_prompt(word.prompt)
                live.say(word.prompt, cut=word.cut)
            else:
                options = with_changes(show.options, wire.changes(word), self.options)
                if not self._ready(show, options):
                    return False
                live.change(**options)
                show.options = options
            show.deliver(wire.event("said", prompt=live.prompt, settings=live.settings, chunk=show.made))
        except REFUSED as error:
            show.deliver(wire.event("refused", why=str(error)))
        return True

    def _advance(self, shows: Sequence[Show]) -> None:
        alike: dict[Any, list[Show]] = defaultdict(list)
        for show in shows:
            alike[self._programs.key(show.options, show.opening.video)].append(show)
        for key, group in alike.items():
            begun, sizes = time.monotonic(), self._programs.sizes(key, group[0].options, len(group))
            metrics.TOGETHER.observe(len(group))
            for show, part in zip(group, advance([show.live for show in group], sizes), strict=True):
                self._made(show, part, begun)

    def _made(self, show: Show, part: Painted | Exception | None, begun: float) -> None:
        if part is None:
            self._end(show, "there are no more chunks")
        elif isinstance(part, Exception):
            show.failed = part
            self._end(show, "")
        else:
            show.show(part, begun)
            first, rest = show.live.chunk_frames
            if first + (show.made - 1) * rest >= self.limits.max_seconds * self.pipe.world.fps:
                self._end(show, f"a stream lasts {self.limits.max_seconds:g} seconds at most")

    def _end(self, show: Show, why: str) -> None:
        with self._wake:
            self._shows.remove(show)
        if (error := show.failed) is not None:
            told = isinstance(error, REFUSED)
            why = str(error) if told else f"something went wrong ({type(error).__name__})"
            if not told:
                log.error("a stream failed", exc_info=error)
        metrics.ENDED.labels("ended" if error is None else "failed").inc()
        show.end(why, wrong=error is not None)
