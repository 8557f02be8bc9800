"""Whether what a run tells of its time is true: run it on a terminal, and compare with what it then took.

    python tools/time_left.py quantize CHECKPOINT --save-only --quant-type both

prints, for each phase, the time left as it was told and as it was, then the first line's forecast beside
what each phase took, and the longest silence. It fails where a time left was off by more than 30 percent
after a phase's first third, or where nothing moved for ten seconds.
"""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

WITHIN = 0.3
SILENCE = 10.0
_WIDE = struct.pack("HHHH", 50, 250, 0, 0)
_BAR = re.compile(r"^[━╌#-]+ +")
_LEFT = re.compile(
    r"^(?:[━╌#-]+ +)?(?P<label>[\w ,]+?): .*, (?P<words>a few seconds|about .+?) left$"
)
_FORECAST = re.compile(r"(?:, |: )([a-z ]+?) (a few seconds|about [0-9hmins ]+)")
_UNITS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Told:
    """A time left, as it was told."""

    at: float
    """Seconds since the run began."""
    words: str


@dataclass
class Phase:
    """A part of the run that tells how much is left of it."""

    begun: float
    told: list[Told] = field(default_factory=list)
    ended: float = 0.0

    def errors(self) -> Iterator[tuple[float, Told, float, float]]:
        """Of each telling: the share of the phase's time, the words, the true seconds left, the error.

        The error is a share of the true seconds, and nothing where the words mean what is true.
        """
        for told in self.told:
            true = self.ended - told.at
            low, high = meant(told.words)
            off = max(low - true, true - high, 0.0)
            share = (told.at - self.begun) / max(self.ended - self.begun, 1e-9)
            yield share, told, true, off / max(true, 1.0)


def meant(words: str) -> tuple[float, float]:
    """The seconds that ``about 2 min 30 s`` may stand for."""
    if words == "a few seconds":
        return 0.0, 7.5
    parts = words.removeprefix("about ").split()
    seconds = sum(
        int(number) * _UNITS[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True)
    )
    rounded_by = 2.5 if seconds < 58 else 15 if seconds < 285 else 30 if seconds < 3600 else 300
    return seconds - rounded_by, seconds + rounded_by


def lines_of(command: Sequence[str]) -> Iterator[tuple[float, str]]:
    """Run on a terminal: seconds since the start, and each line as soon as it is shown."""
    started = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], list(command))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, _WIDE)
    rest = ""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # as Linux tells that the other end is closed
            break
        if not block:
            break
        text = rest + block.decode(errors="replace")
        for line in re.split(r"\r\x1b\[K|\r?\n", text):
            if line.strip():
                yield time.monotonic() - started, line.strip()
        rest = ""
    os.waitpid(pid, 0)
    yield time.monotonic() - started, "(the run ended)"


def watch(command: Sequence[str]) -> tuple[dict[str, Phase], str, float]:
    """Run, and gather what was told: the phases, the forecast, and the longest silence in seconds."""
    phases: dict[str, Phase] = {}
    begun: dict[str, float] = {}
    current, forecast, last, silence = "", "", 0.0, 0.0
    for at, line in lines_of(command):
        silence, last = max(silence, at - last), at
        found = _LEFT.match(line)
        label = found["label"] if found else _BAR.sub("", line).partition(":")[0]
        if label != current:
            if current in phases:
                phases[current].ended = at
            current = label
        begun.setdefault(label, at)
        if found:
            phases.setdefault(label, Phase(begun[label])).told.append(Told(at, found["words"]))
        elif label in phases:  # its last line
            phases[label].ended = at
        else:
            print(f"{at:7.1f} {line}")
        if line.startswith("Ahead"):
            forecast = line
    return {name: phase for name, phase in phases.items() if phase.ended}, forecast, silence


def main() -> int:
    """Watch ``smolquant`` with the arguments given."""
    phases, forecast, silence = watch([sys.executable, "-m", "smolquant", *sys.argv[1:]])
    worst = 0.0
    for label, phase in phases.items():
        print(f"\n{label}: {phase.ended - phase.begun:.1f} s")
        shown = 0
        for share, told, true, error in phase.errors():
            if share * 10 >= shown:
                print(
                    f"  {share:4.0%}  told {told.words:18}  true {true:5.1f} s  off by {error:.0%}"
                )
                shown = int(share * 10) + 1
            if share >= 1 / 3:
                worst = max(worst, error)
    print(f"\n{forecast}")
    for label, words in _FORECAST.findall(forecast):
        if label in phases:
            took = phases[label].ended - phases[label].begun
            print(f"  {label}: told {words}, took {took:.1f} s")
    print(f"worst after a third: {worst:.0%}; longest silence: {silence:.1f} s")
    return int(worst > WITHIN or silence > SILENCE)


if __name__ == "__main__":
    sys.exit(main())
