"""The page of published numbers with ours beside them, which scripts write with `--record`."""

import dataclasses
import os
import re
import statistics
from pathlib import Path

from _command import check_file
from _timing import where

PAGE = "REPRODUCE.md"
HEAD = """\
# Published numbers and ours

Each script writes its own line when it is started with `--record experiments/REPRODUCE.md`: the command below it made
it, with this commit. A number with ± is mean and standard deviation over seeds. Where no number of ours stands, the
command has not been run to its end yet.

The presets are this library's recipes: width 64, endless fresh training data, and for induction a loss on the answer
alone. Of the published numbers those of arXiv 2212.14052 are of width 32, 5,000 training examples and a loss on all
tokens; `-published` presets have the recipe of their source. Compare accordingly.

"""
COLUMNS = ("command", "published", "ours", "seeds", "steps", "seconds a run", "machine", "commit", "date")

RECALL = "python experiments/assoc_recall.py"
H3, HYENA, S5 = "arXiv 2212.14052", "arXiv 2302.10866", "lindermanlab/S5"
PUBLISHED = {
    f"{RECALL} 131k-30 --seeds 10": f"Hyena-S5 97.2 %, 10 seeds ({S5})",
    f"{RECALL} 131k-30-published": f"Hyena-S5 97.2 %, 10 seeds ({S5})",
    f"{RECALL} 131k-30-published-hyena": f"Hyena 97.2 % ({HYENA})",
    f"{RECALL} 131k-40-published": "",
    f"{RECALL} 2048-30": f"Hyena 85 %, Transformer 82 % ({HYENA})",
    f"{RECALL} 2048-30 --mixer hyena": f"Hyena 85 % ({HYENA})",
    f"{RECALL} --test-lengths 40 80 160 320 --seeds 3": (
        f"H3 99.8 %, attention 100 %, S4D 86.0 %, of 5,000 examples ({H3})"
    ),
    f"{RECALL} 128-20": "",
    "python experiments/induction.py --seeds 3": f"H3 100 %, attention 100 %, S4D 35.6 %, of 5,000 examples ({H3})",
    "python experiments/induction.py --mixer h3": f"H3 100 % ({H3})",
    "python experiments/induction.py --mixer attention": f"attention 100 % ({H3})",
    "python experiments/induction.py --mixer s4d": f"S4D 35.6 % ({H3})",
}
"""What was published of the task that a command trains on. Not of the same recipe where the library has its own."""


@dataclasses.dataclass(frozen=True)
class Ours:
    """What a command has come to."""

    command: str
    value: str
    seeds: int
    steps: str
    seconds: float
    machine: str
    commit: str
    date: str

    def cells(self) -> tuple[str, ...]:
        """The columns of its line, from `ours` on."""
        commit = self.commit[:7] + ("-dirty" if self.commit.endswith("-dirty") else "")
        return self.value, f"{self.seeds}", self.steps, f"{self.seconds:,.0f}", self.machine, commit, self.date


def spread(values: list[float], *, percent: bool) -> str:
    """Mean and deviation of accuracies, as percentages, or of losses."""
    scale, digits, unit = (100, 2, " %") if percent else (1, 5, "")
    deviation = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{deviation}{unit}"


def machine(versions: dict[str, str]) -> str:
    """What a result was computed on."""
    kind, _, name = versions["device"].partition(" ")
    return where()["machine"] if kind == "cpu" else name


def check_page(page: Path) -> None:
    """Refuses what is no page of results, before anything is computed."""
    check_file("record", page)
    if page.exists() and not page.read_text().startswith(HEAD.splitlines()[0]):
        raise ValueError(f"record must be a page that these scripts wrote, or a new file; {page} is another file")


def record(page: Path, ours: Ours) -> None:
    """Writes the line of a command into the page, and leaves those of others as they are."""
    lines = read(page)
    lines[ours.command] = ours.cells()
    empty = ("",) * (len(COLUMNS) - 2)
    order = [*PUBLISHED, *(command for command in lines if command not in PUBLISHED)]
    rows = [(f"`{command}`", PUBLISHED.get(command, ""), *lines.get(command, empty)) for command in order]
    table = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    write(page, HEAD + "".join(f"| {' | '.join(row)} |\n" for row in table))


def write(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    os.replace(part, file)


def read(page: Path) -> dict[str, tuple[str, ...]]:
    """The lines of a page that have a number of ours, from that column on, by their commands."""
    if not page.exists():
        return {}
    found = {}
    for line in page.read_text().splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        command = re.fullmatch(r"`(.*)`", cells[0])
        if command and len(cells) == len(COLUMNS) and cells[2]:
            found[command[1]] = cells[2:]
    return found
