"""The command line of a script with presets: `script.py [preset] [--setting value ...] [--run folder]`."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import tyro

Settings = TypeVar("Settings")
Where = TypeVar("Where")


@dataclasses.dataclass(frozen=True)
class Place:
    run: Path | None = None
    """The run's folder; a fresh one under runs/ if not named."""
    resume: bool = False
    """Continue the run in that folder."""
    overwrite: bool = False
    """Delete the run in that folder first."""


def check_file(name: str, file: Path | None) -> None:
    """Refuses a file that cannot be written, before the work whose result it is to hold."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"{name} must be a file in a folder that exists, got {file}")


def parse(
    presets: Mapping[str, Settings], place: Where, description: str | None, argv: list[str]
) -> tuple[str, Settings, Where]:
    """The preset's name, its settings as the arguments change them, and what is not a setting. The first preset is the
    one that is taken where none is named."""
    script, *arguments = argv
    name = next(iter(presets))
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in presets:
        sys.exit(f"unknown preset {name!r}; there are {', '.join(presets)}")
    settings, place = tyro.cli(
        tyro.conf.OmitArgPrefixes[tuple[type(presets[name]), type(place)]],
        default=(presets[name], place),
        args=arguments,
        prog=f"{Path(script).name} {name}",
        description=description,
    )
    return name, settings, place
