"""The folder of a run: fresh unless named, and never shared by two runs."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from s5eqx.train.processes import done_by_first

SETTINGS = "settings.json"
PACKAGES = ("jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run: its folder, what it was started with, and whether it continues."""

    folder: Path
    settings: dict
    versions: dict
    resumed: bool


def open_run(
    settings: Mapping[str, object],
    *,
    folder: Path | None = None,
    parent: Path = Path("runs"),
    stem: str = "run",
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Makes the folder of a run, or opens it again, and writes `settings.json` into it.

    Of several processes the first does so, and all of them get its folder, which they must be able to reach.

    **Arguments:**

    - `settings`: all that decides what the run computes, fit for JSON, nested as you like.
    - `folder`: the run's folder. `None`: a fresh one, `<parent>/<stem>-<date>-<time>`.
    - `resume`: continue the run in `folder`, whose settings must be the same.
    - `overwrite`: delete the run in `folder` first.
    """
    plain: dict = json.loads(json.dumps(settings))
    if resume and overwrite:
        raise ValueError("resume continues a run and overwrite deletes it: choose one")
    if folder is None and (resume or overwrite):
        raise ValueError("resume and overwrite are about a run that exists: name its folder")

    def prepare() -> str:
        if folder is None:
            return str(_create(_fresh(Path(parent), stem), plain))
        return str(_open(Path(folder), plain, resume=resume, overwrite=overwrite))

    return Run(Path(done_by_first(prepare)), plain, versions(), resumed=resume)


def resume_command(run: Path, arguments: Sequence[str]) -> str:
    """The command that continues a run.

    **Arguments:**

    - `run`: the run's folder.
    - `arguments`: the words that the stopped script was started with, as in `sys.argv`. The script takes the run's
      folder as `--run` and has the flags `--resume` and `--overwrite`.
    """
    script, *given = arguments
    flags = {f"--{no}{flag}" for no in ("", "no-") for flag in ("resume", "overwrite")}
    kept = [word for word in given if word not in flags]
    is_named = any(word.split("=")[0] == "--run" for word in kept)
    where = [] if is_named else ["--run", str(run)]
    return shlex.join(["python", script, *kept, *where, "--resume"])


def versions() -> dict[str, str]:
    """The versions and the device that a result depends on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = jax.devices()[0]
    return {"python": platform.python_version(), **found, "device": f"{device.platform} {device.device_kind}"}


def commit(file: Path, *, apart_from: Sequence[str] = ()) -> str | None:
    """The git commit of the tree that `file` belongs to, marked if changed; `None` if it is not tracked.

    Changes of the files `apart_from`, relative to the folder of `file`, do not count.
    """

    def git(*words: str) -> str:
        words = ("git", "-C", str(Path(file).absolute().parent), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(file).name)
        others = [f":(exclude){name}" for name in apart_from]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings with dotted names."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _fresh(parent: Path, stem: str) -> Path:
    """A folder that this call has made: of two runs that start in one second each gets its own."""
    parent.mkdir(parents=True, exist_ok=True)
    name = f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder, number = parent / name, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = parent / f"{name}-{number}"


def _open(folder: Path, settings: dict, *, resume: bool, overwrite: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the run's folder {folder} is a file; name another")
    holds_run = (folder / SETTINGS).is_file()
    if resume:
        _check_settings(folder, settings, holds_run)
        return folder
    if holds_run and not overwrite:
        raise ValueError(
            f"{folder} holds another run; continue it with resume, delete it with overwrite, or name another folder"
        )
    if holds_run:
        shutil.rmtree(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are not of a run; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return _create(folder, settings)


def _create(folder: Path, settings: dict) -> Path:
    page = json.dumps({"settings": settings, "versions": versions()}, indent=2)
    part = folder / f"{SETTINGS}.part"
    part.write_text(page + "\n")
    os.replace(part, folder / SETTINGS)
    return folder


def _check_settings(folder: Path, settings: dict, holds_run: bool) -> None:
    if not holds_run:
        raise ValueError(f"{folder} holds no run to resume: it has no {SETTINGS}")
    before, now = flat(json.loads((folder / SETTINGS).read_text())["settings"]), flat(settings)
    for name in [*now, *before]:
        was, given = before.get(name, "absent"), now.get(name, "absent")
        if was != given:
            raise ValueError(
                f"a run resumes with its own settings, but {name} was {was!r} and is now {given!r}; "
                f"pass the settings in {folder / SETTINGS}, or start a new run"
            )
