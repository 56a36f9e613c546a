"""A run in TensorBoard: its figures, and what makes them easy to read.

    the run's folder            the figures, the layout of the page "Custom Scalars", the recipe as text and as hparams
    tensorboard/predicted       H and learning rates that the recipe leads to, under the tags of the real ones
    tensorboard/worker-K        what each worker told, under tags that all workers share: one card, a curve a worker

A figure that counts what goes wrong is written once it is above 0, so that no card is a flat line at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsr_engine.config.digest import flatten
from qsr_engine.records.run_folder import TENSORBOARD
from qsr_engine.records.trackers import EventFile

COUNTERS = {
    "local_steps/skipped_steps",
    "local_steps/left_out",
    "local_steps/clipped",
    "local_steps/late",
    "checkpoints/failed",
    "data/skipped_samples",
}
_LINES = {  # category, card and the tags of its curves
    "train": {"loss": ["train/loss", "eval/loss"], "accuracy (%)": ["train/accuracy", "eval/accuracy"]},
    "eval": {
        "accuracy (%)": ["eval/accuracy", "eval/best_accuracy"],
        "top-5 accuracy (%)": ["eval/top5_accuracy"],
        "loss": ["eval/loss"],
    },
    "H and learning rate": {"H (steps)": ["local_steps/period"], "learning rate": ["train/lr"]},
    "communication": {
        "of parallel's (%)": ["communication/averagings_percent", "communication/bytes_percent"],
        "bytes sent by a worker": ["communication/bytes_sent"],
        "distance of the workers from their mean": ["local_steps/relative_distance"],
    },
    "time": {
        "where it goes (s)": ["time/compute_seconds", "time/averaging_seconds", "time/data_seconds"],
        "images a second": ["throughput/images_per_second"],
        "tokens a second": ["throughput/tokens_per_second"],
        "waiting for data (%)": ["data/waiting_percent"],
    },
}
_RANGES = {"loss": "loss", "accuracy (%)": "accuracy", "waiting (%)": "waiting_percent", "data (%)": "data_percent"}


@dataclass(frozen=True)
class About:
    """What is known of a run before its first step.

    Args:
        recipe: the resolved recipe as nested plain values.
        text: the same as a file has it.
        predicted: (step, period H, learning rate) at points of the run, in order.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    predicted: Sequence[tuple[int, int, float]] = ()


class TensorBoard:
    """The event files of a run.

    Args:
        from_step: events that other files of the folder hold for later steps do not count; 0 in a new run.
    Raises:
        OSError: they cannot be opened.
    """

    def __init__(self, folder: Path, *, from_step: int = 0, about: About | None = None) -> None:
        self._folder, self._from_step = folder, from_step
        self._main = EventFile(folder, from_step=from_step)
        self._workers: list[EventFile] = []
        if from_step:
            return
        self._main.add(_layout())
        if about is not None:
            self._main.add(_text("recipe", about.text), _hparams(about.recipe))
            self._predict(about.predicted)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write values by their tags; TensorBoard keeps them in fp32."""
        self._main.log({tag: value for tag, value in values.items() if value or tag not in COUNTERS}, step)

    def log_workers(self, values: Sequence[Mapping[str, float]], step: int) -> None:
        """Write what each worker told, by tags that all share."""
        while len(self._workers) < len(values):
            self._workers.append(self._sub_run(f"worker-{len(self._workers)}"))
        for file, of_one in zip(self._workers, values, strict=False):  # a run may go on with fewer workers
            file.log(of_one, step)

    def close(self) -> None:
        for file in (self._main, *self._workers):
            file.close()

    def _sub_run(self, name: str) -> EventFile:
        folder = self._folder / TENSORBOARD / name
        folder.mkdir(parents=True, exist_ok=True)
        return EventFile(folder, from_step=self._from_step)

    def _predict(self, points: Sequence[tuple[int, int, float]]) -> None:
        if not points:
            return
        file = self._sub_run("predicted")
        for step, period, rate in points:
            file.log({"local_steps/period": period, "train/lr": rate}, step)
        file.close()


def _layout() -> Any:
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    def charts(cards: Mapping[str, Sequence[str]]) -> list[Any]:
        return [
            layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
            for title, tags in cards.items()
        ]

    def spread(name: str) -> Any:
        tags = {part: f"workers/{name}_{end}" for part, end in (("value", "mean"), ("lower", "min"), ("upper", "max"))}
        series = [layout_pb2.MarginChartContent.Series(**tags)]
        return layout_pb2.MarginChartContent(series=series)

    ranges = [layout_pb2.Chart(title=title, margin=spread(name)) for title, name in _RANGES.items()]
    layout = layout_pb2.Layout(
        category=[
            *(layout_pb2.Category(title=title, chart=charts(cards)) for title, cards in _LINES.items()),
            layout_pb2.Category(title="workers: mean, least and most", chart=ranges),
        ]
    )
    return _value(metadata.CONFIG_SUMMARY_TAG, metadata.create_summary_metadata(), layout.SerializeToString())


def _text(tag: str, text: str) -> Any:
    """As code: Markdown takes lines that begin with a tab so."""
    from tensorboard.plugins.text import metadata

    indented = "".join(f"\t{line}\n" for line in text.splitlines())
    return _value(f"{tag}/text_summary", metadata.create_summary_metadata(tag, ""), indented.encode())


def _hparams(recipe: Mapping[str, Any]) -> Any:
    """Every key of the recipe; TensorBoard finds the figures beside them itself."""
    from google.protobuf import struct_pb2
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    keys: dict[str, Any] = {}
    for key, value in flatten(recipe):
        if isinstance(value, bool):
            keys[key] = struct_pb2.Value(bool_value=value)
        elif isinstance(value, int | float):
            keys[key] = struct_pb2.Value(number_value=value)
        elif value is not None:
            keys[key] = struct_pb2.Value(string_value=str(value))
    start = plugin_data_pb2.SessionStartInfo(hparams=keys)
    described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_start_info=start))
    return _value(metadata.SESSION_START_INFO_TAG, described, None)


def _value(tag: str, metadata: Any, content: bytes | None) -> Any:
    """A summary of a plugin's: its content is one string, or nothing where the metadata say all."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING

    tensor = TensorProto(dtype=DT_FLOAT) if content is None else TensorProto(dtype=DT_STRING, string_val=[content])
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
