"""Scalars, texts and tables for TensorBoard, without TensorFlow."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary import Writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Logger:
    """Writes event files into `folder`; read them with `tensorboard --logdir`."""

    def __init__(self, folder: Path):
        self._folder = str(folder)
        self._writer = Writer(self._folder)
        self._texts: EventFileWriter | None = None

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_):
        self._writer.close()
        if self._texts is not None:
            self._texts.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve in `values`."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def table(self, tag: str, rows: Mapping[str, object]) -> None:
        """A table of two columns, on TensorBoard's page of texts."""
        cells = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        self.text(0, tag, f"| name | value |\n|---|---|\n{cells}")

    def text(self, step: int, tag: str, text: str) -> None:
        """A text in Markdown, on the same page."""
        if self._texts is None:
            self._texts = EventFileWriter(self._folder, filename_suffix=".texts")
        self._texts.add_event(Event(summary=text_pb(tag, text), wall_time=time.time(), step=step))
