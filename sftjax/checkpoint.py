"""Checkpoints: the state and the data position as one atomic unit, with a digest that finds any flipped bit.

Orbax writes asynchronously, shards across processes and restores onto other meshes, but it doesn't check array data:
one flipped bit restores silently. So a *digest* of every leaf is computed on the devices before a save, committed in
the same folder, and compared after a restore. A damaged newest checkpoint is renamed aside and the one before it is
used; a run with nothing sound left is an error, never a quiet restart from zero.

    checkpoints/<step>/{state,position,meta,digest,metrics}    committed by renaming a temporary folder
    checkpoints/LATEST, BEST                                   the steps' numbers, for people and scripts
    committed.json                                             beside the folder: that there are checkpoints
    checkpoints/deleted/, damaged/                             being removed (renamed first); put aside

The state is stored as nested dicts by path, so that a part of it (`restore_params`) can be read without its classes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as policies

from sftjax import paths
from sftjax import tree as tree_lib
from sftjax.digest import Damaged, as_json, check_documents, check_leaves, check_seal, digest, seal, signature
from sftjax.errors import ConfigError, StorageError
from sftjax.utils import storage

log = logging.getLogger(__name__)

DOCUMENTS = ("position", "meta", "metrics", "digest")
DELETED, DAMAGED = "deleted", "damaged"


class Restored(NamedTuple):
    """What a checkpoint holds: the step, the state, where the data stood, and what the saver added."""

    step: int
    state: Any
    position: dict[str, Any]
    meta: dict[str, Any]


# --- trees ------------------------------------------------------------------------------------------------------------


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _paths(state: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves with paths such as "opt_state/0/mu/w", whatever classes the branches are; and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/") or "value", leaf) for path, leaf in leaves]
    if len({name for name, _ in named}) != len(named):
        raise ValueError("two leaves of the state have the same path")
    return named, structure


def _stored(leaf: Any) -> Any:
    """The array that stands for a leaf on disk: the data of a PRNG key, scalars as 0-d arrays."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _stored_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The same of a `ShapeDtypeStruct`, always with a sharding (the first device where none is given)."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    elif not hasattr(leaf, "dtype"):
        leaf = jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _as_asked(abstract: Any, stored: jax.Array) -> jax.Array:
    if not _is_key(abstract):
        return stored
    return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(jnp.empty((), abstract.dtype)))


def _differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    lines = [f"{path} isn't in the checkpoint" for path in wanted if path not in saved]
    lines += [f"{path} is in the checkpoint only" for path in saved if path not in wanted]
    return lines + [
        f"{path} is {saved[path]} there and {wanted[path]} here"
        for path in wanted
        if path in saved and saved[path] != wanted[path]
    ]


# --- the checkpointer -------------------------------------------------------------------------------------------------


class _KeepOnly(policies.PreservationPolicy):
    """Orbax's `BestN` over figures that this module has read itself."""

    def __init__(self, best_step):
        self._best_step = best_step

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [info.step == self._best_step() for info in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to `stopping`: at such a step Orbax subtracts time stamps that it hasn't read."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Args:
      directory: the run's `checkpoints` folder, local or `gs://`; made when missing.
      keep: how many of the newest checkpoints stay; the best one stays besides.
      metric: the name in `metrics` that decides which one is best.
      greater_is_better: whether a larger value of it is.
      record: a file that says that checkpoints were committed; a restore that finds it, and none of them, refuses.

    Raises (from every method):
      StorageError: the storage can't be written, or no sound checkpoint is left.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        metric: str = "eval_loss",
        greater_is_better: bool = False,
        record: str | os.PathLike[str] | None = None,
    ):
        if keep < 1:
            raise ConfigError(f"checkpoint: at least one checkpoint must be kept (got {keep})")
        self._directory = epath.Path(paths.absolute(directory))
        self._metric, self._sign = metric, 1.0 if greater_is_better else -1.0
        self._primary = jax.process_index() == 0
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _KeepOnly(self.best_step)]),
            lightweight_initialize=True,  # else one damaged document keeps all of them from being opened
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,  # a plain deletion, killed half-way, leaves a folder that looks like a checkpoint
            async_options=ocp.AsyncOptions(post_finalization_callback=self._written),
        )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = _Manager(self._directory, options=options, item_names=("state", *DOCUMENTS))
        except (OSError, ValueError) as error:
            raise StorageError(f"{directory}: can't keep checkpoints here ({error})") from error
        self._ranks = {step: self._rank(self._read_metrics(step)) for step in self.all_steps()}
        self._saving: int | None = None
        self._commit_record = record
        self._remove_deleted()

    def _rank(self, metrics: Any) -> float:
        """Higher is better; a checkpoint without the metric, or with a NaN, is worse than any."""
        value = metrics.get(self._metric) if isinstance(metrics, Mapping) else None
        return self._sign * value if isinstance(value, int | float) and math.isfinite(value) else -math.inf

    # -- saving

    def save(
        self,
        step: int,
        state: Any,
        position: dict[str, Any],
        meta: dict[str, Any] | None = None,
        metrics: dict[str, float] | None = None,
    ) -> bool:
        """Saves in the background; returns once the arrays may be overwritten.

        Args:
          step: the number of finished steps.
          state: any tree of arrays (nested dicts, dataclasses, optax states, PRNG keys, scalars).
          position: where the data stands; JSON.
          meta: anything else that must travel with it; JSON.
          metrics: figures such as `{"eval_loss": 1.2}`, by which the best checkpoint is chosen.

        Returns:
          False if this step is saved already (and then nothing is written).
        """
        if step in self._manager.all_steps():
            return False
        named, _ = _paths(state)
        flat = {path: _stored(leaf) for path, leaf in named}
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        documents = as_json({"position": position, "meta": meta or {}, "metrics": metrics})
        self._check_space(flat)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree_lib.unflatten(flat)),
            position=ocp.args.JsonSave(documents["position"]),
            meta=ocp.args.JsonSave(documents["meta"]),
            metrics=ocp.args.JsonSave(metrics),
            digest=ocp.args.JsonSave(seal(digest(flat), documents)),
        )
        try:
            self._manager.wait_until_finished()  # an error of the save before belongs to that one
            self._remove_deleted()
            self._record()
            storage.moment("checkpoint saving", step)
            self._saving = step
            self._ranks[step] = self._rank(metrics)
            return self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._storage_error(step, error) from error

    def poll(self) -> None:
        """Writes down a commit that has come about in the background; to be called now and then, costs nothing."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until what was saved is committed, and what it replaces is deleted."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._storage_error(self._saving, error) from error
        self._remove_deleted()
        self._record()

    def close(self) -> None:
        """Waits, and frees the background threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(StorageError):  # which would hide the error that ends the run
            self.close()

    def _storage_error(self, step: int | None, error: Exception) -> Exception:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return error
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return StorageError(
            f"{self._directory}: checkpoint {step} could not be written ({reason}); earlier ones are untouched. "
            "Make room or repair the storage, then run the same command again."
        )

    def _check_space(self, flat: Mapping[str, Any]) -> None:
        """Random weights hardly compress, so a save without room for most of the bytes is not even begun."""
        if "://" in str(self._directory):
            return
        needed = sum(leaf.nbytes for leaf in flat.values()) // jax.process_count()
        free = shutil.disk_usage(self._directory).free
        if free < 0.8 * needed:
            raise StorageError(
                f"{self._directory}: a checkpoint needs about {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} are left; "
                "make room, or keep fewer (checkpoint.save_total_limit), then run the same command again."
            )

    def _written(self) -> None:
        """Runs in the background when all files are written, before the folder gets its final name."""
        if self._primary and "://" not in str(self._directory):
            for folder in self._directory.glob(f"{self._saving}.*"):
                _sync_small_files(str(folder))
        storage.moment("checkpoint committing", self._saving)

    def _record(self) -> None:
        """Writes down which steps are committed."""
        committed, self._saving = self._saving, None
        if committed is not None:
            storage.moment("checkpoint committed", committed)
        if self._primary and self.all_steps():
            if self._commit_record is not None:
                storage.write_text(self._commit_record, json.dumps({"step": self.latest_step()}) + "\n")
            if "://" not in str(self._directory):
                storage.fsync(str(self._directory))  # the new checkpoint's name
            for name, step in (("LATEST", self.latest_step()), ("BEST", self.best_step())):
                if step is not None:
                    storage.write_text(self._directory / name, f"{step}\n")
            storage.moment("checkpoint recorded", committed)

    def _remove_deleted(self) -> None:
        if self._primary and (self._directory / DELETED).exists():
            (self._directory / DELETED).rmtree()

    # -- looking

    def all_steps(self) -> list[int]:
        """The steps saved, in order; includes one that is being written."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return max(self._manager.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best metric, or None when none has one."""
        rank, step = max(((self._ranks[step], step) for step in self.all_steps()), default=(-math.inf, None))
        return step if rank > -math.inf else None

    def _read_metrics(self, step: int) -> Any:
        for name in ("metrics", "metadata"):  # Orbax names a document's file by what kind of item it takes it for
            try:
                return json.loads((self._directory / str(step) / "metrics" / name).read_text())
            except (OSError, ValueError):
                continue
        return None  # costs it the rank only; restore() finds it damaged

    # -- restoring

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The newest sound checkpoint (or exactly `step`), laid out as `abstract_state` says.

        Args:
          abstract_state: the tree of `ShapeDtypeStruct`s with shardings; any mesh, whatever it was saved from.
          step: take this one or fail.

        Returns:
          None if nothing was ever saved here.

        Raises:
          ConfigError: the checkpoint is sound, but of another model, adapter or optimizer.
          StorageError: every checkpoint is damaged, or `step` is damaged or missing.
        """
        self.wait()
        steps = self.all_steps()
        if not steps:
            self._check_never_saved()
        if step is not None:
            if step not in steps:
                raise StorageError(f"{self._directory}: there is no checkpoint {step}; there are {steps or 'none'}")
            try:
                with _quiet():
                    return self._read(step, abstract_state)
            except Damaged as error:
                raise StorageError(f"{self._directory}/{step} is damaged: {error}; choose another step") from error
        with _quiet():
            for candidate in reversed(steps):
                try:
                    return self._read(candidate, abstract_state)
                except Damaged as error:
                    self._put_aside(candidate, str(error))
        aside = self._directory / DAMAGED
        if steps or aside.exists():
            raise StorageError(
                f"{self._directory}: every checkpoint is damaged (kept in {aside}). Restore them from a copy, or "
                "choose another run_dir to start anew; this run won't start from zero by itself."
            )
        return None

    def _check_never_saved(self) -> None:
        record = self._commit_record and epath.Path(self._commit_record)
        if record and record.exists() and not (self._directory / DAMAGED).exists():
            raise StorageError(
                f"{record} says that checkpoints were saved, and {self._directory} has none: put them back from a "
                "copy, or choose another run_dir to start anew; this run won't start from zero by itself."
            )

    def _read(self, step: int, abstract_state: Any) -> Restored:
        named, structure = _paths(abstract_state)
        wanted = {path: _stored_abstract(leaf) for path, leaf in named}
        try:
            # The documents come first: they say whether the state fits before any of it is read.
            documents = self._manager.restore(
                step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in DOCUMENTS})
            )
            item = check_seal(documents["digest"])
        except Exception as error:
            raise _told_apart(error, self._directory) from error
        check_documents(item, {name: documents[name] for name in DOCUMENTS if name != "digest"})
        saved = {path: value.split(" ")[0] for path, value in item["leaves"].items()}
        unlike = _differences(saved, {path: signature(leaf) for path, leaf in wanted.items()})
        if unlike:
            more = f"; and {len(unlike) - 5} more" if len(unlike) > 5 else ""
            raise ConfigError(
                f"{self._directory}/{step} doesn't fit this run: {'; '.join(unlike[:5])}{more}. "
                "Use the configuration the run began with, or another run_dir."
            )
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(tree_lib.unflatten(wanted)))
            flat = tree_lib.flatten(self._manager.restore(step, args=args)["state"])
        except Exception as error:
            raise _told_apart(error, self._directory) from error
        check_leaves(item, flat)
        leaves = [_as_asked(leaf, flat[path]) for path, leaf in named]
        return Restored(step, jax.tree.unflatten(structure, leaves), documents["position"], documents["meta"])

    def _put_aside(self, step: int, reason: str) -> None:
        aside = self._directory / DAMAGED
        log.warning("checkpoint %d is damaged (%s); put aside in %s, taking the one before", step, reason, aside)
        if self._primary:
            try:
                aside.mkdir(exist_ok=True)
                name = next(
                    name for k in range(1000) if not (name := aside / (f"{step}-{k}" if k else str(step))).exists()
                )
                (self._directory / str(step)).rename(name)
            except OSError as error:
                log.warning("checkpoint %d could not be put aside: %s", step, error)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"sftjax_aside_{step}")
        self._manager.reload()
        self._ranks.pop(step, None)


def restore_params(
    directory: str | os.PathLike[str], *, step: int | None = None, prefix: str = "trainable", abstract: Any = None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """One branch of a saved state, without the rest of it (the optimizer's moments, usually); read-only.

    Args:
      directory: a run's `checkpoints` folder.
      step: which one; None takes the newest that is sound.
      prefix: the branch, a path such as "trainable".
      abstract: nested dicts of `ShapeDtypeStruct`s with shardings for it; None puts all on the first device.

    Returns:
      (step, the branch as nested dicts of arrays, meta).

    Raises:
      StorageError: there is no (sound) checkpoint, or it has no such branch.
    """
    root = epath.Path(paths.absolute(directory))
    steps = _steps(root)
    if step is not None and step not in steps:
        raise StorageError(f"{directory}: there is no checkpoint {step}; there are {sorted(steps) or 'none'}")
    reasons = []
    with _quiet():
        for candidate in [step] if step is not None else steps:
            try:
                return candidate, *_read_branch(root / str(candidate), prefix, abstract)
            except Damaged as error:
                log.warning("checkpoint %d is damaged: %s", candidate, error)
                reasons.append(f"{candidate}: {error}")
    raise StorageError(f"{directory}: no sound checkpoint ({'; '.join(reasons) or 'none was saved'})")


def newest_meta(directory: str | os.PathLike[str]) -> tuple[int, dict[str, Any]] | None:
    """The step and the `meta` of the newest checkpoint whose documents are sound, without its arrays; None: there is
    none."""
    for step in _steps(epath.Path(directory)):
        with contextlib.suppress(Damaged):
            return step, _read_documents(epath.Path(directory) / str(step))[1]
    return None


def _steps(root: epath.Path) -> list[int]:
    """Newest first."""
    if not root.exists():
        return []
    return sorted((int(path.name) for path in root.iterdir() if path.name.isdigit()), reverse=True)


def _read_documents(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the digest item, meta) of a checkpoint."""
    try:
        item = check_seal(json.loads((folder / "digest" / "metadata").read_text()))
        meta = json.loads((folder / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise _told_apart(error, folder) from error
    check_documents(item, {"meta": meta})
    return item, meta


def _read_branch(folder: epath.Path, prefix: str, abstract: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    item, meta = _read_documents(folder)
    chosen = {path: value for path, value in item["leaves"].items() if path.startswith(prefix + "/")}
    if not chosen:
        raise StorageError(f"{folder}: holds no {prefix!r}; it has {sorted({p.split('/')[0] for p in item['leaves']})}")
    if abstract is None:
        here = SingleDeviceSharding(jax.devices()[0])
        wanted = {path: _from_signature(value.split(" ")[0], here) for path, value in chosen.items()}
    else:
        wanted = {f"{prefix}/{path}": _stored_abstract(leaf) for path, leaf in tree_lib.flatten(abstract).items()}
        saved = {path: value.split(" ")[0] for path, value in chosen.items()}
        unlike = _differences(saved, {path: signature(leaf) for path, leaf in wanted.items()})
        if unlike:
            raise ConfigError(f"{folder} doesn't fit: {'; '.join(unlike[:5])}")
    target = tree_lib.unflatten(wanted)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
            flat = tree_lib.flatten(reader.restore(folder / "state", args=args))
    except Exception as error:
        raise _told_apart(error, folder) from error
    check_leaves({"leaves": chosen}, flat)
    return tree_lib.unflatten({path.removeprefix(prefix + "/"): leaf for path, leaf in flat.items()}), meta


# Of what reading a checkpoint raises, what says nothing about its files: of the machine, the storage, or this program.
_NOT_DAMAGE = (MemoryError, TypeError, AttributeError, NameError, ImportError, NotImplementedError)
_OUT_OF_REACH = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Too many open files")


def _told_apart(error: Exception, place: Any) -> Exception:
    """What to raise for what reading raised: `Damaged` only where the files aren't as they were written."""
    if isinstance(error, (Damaged, *_NOT_DAMAGE)) or "RESOURCE_EXHAUSTED" in str(error):
        return error
    line = (str(error).strip().splitlines() or [""])[0][:200]
    system = isinstance(error, OSError) and error.errno is not None
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if (system and not missing) or any(word in str(error) for word in _OUT_OF_REACH):
        return StorageError(f"{place}: can't be read ({line})")
    return Damaged(f"{type(error).__name__}: {line}")


def _from_signature(signature: str, sharding: Sharding) -> jax.ShapeDtypeStruct:
    dtype, shape = signature.rstrip("]").split("[")
    return jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), jnp.dtype(dtype), sharding=sharding)


@contextlib.contextmanager
def _quiet():
    """Keeps Python from printing what TensorStore's other reads came to; the first error is reported by us."""
    logger = logging.getLogger("asyncio")
    before, logger.disabled = logger.disabled, True
    told, sys.unraisablehook = sys.unraisablehook, lambda late: log.debug("%s: %s", late.object, late.exc_value)
    try:
        yield
    finally:
        gc.collect()  # it prints when the futures are collected
        logger.disabled, sys.unraisablehook = before, told


# --- files ------------------------------------------------------------------------------------------------------------


def _sync_small_files(directory: str) -> None:
    """Asks the system to write names and small files to disk: TensorStore syncs the arrays, nobody else does these."""
    for parent, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(parent, name)
            if os.path.getsize(path) < 2**20:
                storage.fsync(path)
        storage.fsync(parent)
