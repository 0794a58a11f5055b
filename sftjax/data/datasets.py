"""Data sets by name: TFDS builds and hub ids.

TFDS rows come as they were before TFDS turned them: text as text (not bytes), and a list of objects as a list of
objects (not an object of lists), so that a conversation is the same by either route.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from sftjax.data import files, sources
from sftjax.errors import ConfigError, DataError, StorageError


def open_named(path: str, split: str, *, data_dir: str | None, revision: str | None, config: str | None):
    """A source for "tfds:name" or "hub:owner/name", and the ranges of `split` (None: the whole)."""
    name = sources.split_name(split) or "train"
    brackets = split[len(sources.split_name(split)) :]
    ranges = [part[1:] for part in sources.parse_split(brackets)] if brackets else None
    if path.startswith("tfds:"):
        return Tfds(path, name, data_dir), ranges
    return Hub(path, name, revision, config), ranges


class Tfds:
    """A prepared TFDS data set in array_record files."""

    def __init__(self, path: str, split: str, data_dir: str | None):
        self.name, self._split, self._data_dir = path, split, data_dir
        self._rows: Any = None
        builder = self._builder()
        if split not in builder.info.splits:
            raise DataError(f"{path}: no split {split!r}; there are {', '.join(builder.info.splits)}")
        file_format = getattr(builder.info.file_format, "value", None)
        if file_format != "array_record":
            remedy = "point data.train at its files directly" if file_format == "parquet" else "or export it as JSONL"
            raise DataError(
                f"{path} is prepared as {file_format}, which has no random access here: prepare it again with "
                f"file_format='array_record', {remedy}"
            )
        self._length = builder.info.splits[split].num_examples
        if not self._length:
            raise DataError(f"{path}: the split {split!r} has no rows")

    def _builder(self):
        logging.getLogger("absl").setLevel(logging.ERROR)
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(self.name.removeprefix("tfds:"), data_dir=self._data_dir)
        except Exception as error:  # it raises several kinds, with pages of advice
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"{self.name}: TFDS doesn't find it in {self._data_dir or 'its usual folder'} ({first})"
            ) from None
        if not builder.info.splits:
            raise DataError(
                f"{self.name} is not prepared in {builder.data_dir}: run "
                "tfds.builder(..., file_format='array_record').download_and_prepare() where there is a network"
            )
        return builder

    def _loaded(self):
        if self._rows is None:
            builder = self._builder()
            self._features = builder.info.features
            self._rows = builder.as_data_source(split=self._split)
        return self._rows

    def __getstate__(self):
        return {**{k: v for k, v in self.__dict__.items() if k != "_features"}, "_rows": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._loaded()[index]
        return _turned_back(row, self._features)

    def location(self, index: int) -> str:
        return f"{self.name}/{self._split}[{index}]"

    def fingerprint(self) -> str:
        paths = self._builder().info.splits[self._split].filepaths
        return files.digest(self.name, self._split, *(files.hash_file(str(path)) for path in paths))


def _turned_back(value, feature):
    """A TFDS value as the plain Python value it was made of."""
    inner = getattr(feature, "feature", None)
    if inner is not None:  # a sequence
        if hasattr(inner, "keys"):  # of objects: TFDS keeps an object of lists
            columns = {key: _turned_back_list(value[key], inner[key]) for key in inner}
            lengths = {len(column) for column in columns.values()}
            if len(lengths) > 1:
                raise DataError("a TFDS sequence has columns of several lengths")
            return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]
        return _turned_back_list(value, inner)
    if hasattr(feature, "keys"):
        return {key: _turned_back(value[key], feature[key]) for key in feature}
    return _scalar(value)


def _turned_back_list(values, feature) -> list:
    if isinstance(values, dict):  # a sequence of sequences of objects
        count = len(next(iter(values.values())))
        return [_turned_back({key: column[i] for key, column in values.items()}, feature) for i in range(count)]
    return [_turned_back(value, feature) for value in values]


def _scalar(value):
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_scalar(item) for item in value] if value.ndim else _scalar(value.item())
    return value.item() if isinstance(value, np.generic) else value


class Hub:
    """A data set of the Hugging Face hub, or one the `datasets` package has cached."""

    def __init__(self, path: str, split: str, revision: str | None, config: str | None):
        self.name, self._split, self._revision, self._config = path, split, revision, config
        self._rows: Any = None
        self._length = len(self._loaded())

    def _loaded(self):
        if self._rows is None:
            try:
                import datasets
            except ImportError:
                raise ConfigError(
                    f"{self.name}: hub data sets need the package `datasets` (pip install datasets); or download the "
                    "files and give their path"
                ) from None
            try:
                self._rows = datasets.load_dataset(
                    self.name.removeprefix("hub:"), self._config, split=self._split, revision=self._revision
                )
            except Exception as error:
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise StorageError(
                    f"{self.name} can't be had from the hub ({first}): where there is no network, download the files "
                    "elsewhere and give their path"
                ) from None
        return self._rows

    def __getstate__(self):
        return {**self.__dict__, "_rows": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return files.drop_none(self._loaded()[int(index)])

    def location(self, index: int) -> str:
        return f"{self.name}/{self._split}[{index}]"

    def fingerprint(self) -> str:
        return files.digest(self.name, self._config or "", self._split, str(self._loaded()._fingerprint))
