"""`calibrate`: run a model over batches and keep the statistics of the inputs of its linears."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError, StatisticsError
from lowbit.numerics.weight_marks import mark_of

from .accumulate import state_bytes
from .batches import Batch, Split, TokenMask, as_batch
from .collected import Collected
from .collection import Contents, InputFacts, LayerInput, StatisticsCollection, some
from .gradients import Gradients, Objective, fitting, whole_output, within
from .linears import aliases, running, select_linears
from .observe import Observer
from .options import AUTO, Options, as_bytes
from .progress_file import ProgressFile, fingerprint, memory_of
from .room import room_on
from .statistics_file import StatisticsFile
from .stored import fields_of
from .target_file import TargetFile

_log = logging.getLogger("lowbit")

Progress = Callable[[int, int | None, str], None]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    path: str | Path | None = None,
    layers: Sequence[str] | None = None,
    memory: int | str | None = AUTO,
    full_up_to: int | None = None,
    token_mask: TokenMask | None = None,
    share: bool = True,
    names: Mapping[str, str | None] | None = None,
    description: str | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    snapshot_every: float = 30.0,
    seed: int = 0,
    broad: bool = False,
    gradients: bool | Objective = False,
) -> StatisticsCollection:
    """Run `model` on `batches` and return the statistics of every linear's input, by the linear's name.

    A batch is a tensor, a tuple of arguments, a dict of keyword arguments, or a pair of both. Its samples (rows of its
    first tensor) go to the two halves in turn, the second one being held out. Rows that a keyword argument
    `...mask` [samples, tokens] marks by 0 are padding and do not count; `token_mask(args, kwargs)` may give the mask
    (True where a token counts) instead. The model runs as it is, where it is, in eval mode and without gradients.

    With `path`, the statistics are written there and returned as an open `StatisticsFile`. Inputs that do not fit into
    `memory` (bytes, or text such as "8GiB"; "auto": half of what is free, a third with gradients; None: no bound) then
    take further passes over the batches, which therefore must be a sequence or another re-iterable; an interrupted run
    goes on where it stopped, at most `snapshot_every` seconds back, when it is called again with the same arguments.
    Without `path` all is kept in memory.
    An input whose full H alone exceeds `memory`, or with more than `full_up_to` channels, keeps only its diagonal.

    `gradients`: run the model backward too and keep the second moments of the gradient at the output of every linear,
    which tell solvers what of an error reaches the model's output. It takes room for the activations of a batch and
    `memory` once more; where not all fit into that, those of the widest layers are kept in blocks along the diagonal.
    Heads over a vocabulary have none. True: the first floating-point tensor that the model returns is what counts; or a
    function of what it returns and the `Batch`.
    `broad`: the batches are of as many kinds as what the model will meet, so solvers may trust H further.
    `layers`: regular expressions, of which one must match a linear's name. `share`: linears with the same input share
    an entry. `names`: other names for linears, by their names, None to leave one out.
    `progress(done, total or None, what)` is called after every batch.

    Raises `StatisticsError` (an empty iterable, a batch that cannot be passed, a model that raises, values that are
    not finite, too little memory), `PlanError` (`layers` matches nothing) and `WriteError`.

    >>> import torch, lowbit
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> statistics = lowbit.calibrate(model, [torch.randn(8, 16) for _ in range(4)])
    >>> statistics["2"].hessian.shape, statistics["2"].tokens, statistics["2"].held_out_tokens
    (torch.Size([32, 32]), 16, 16)
    """
    objective = whole_output if gradients is True else gradients or None
    options = Options(
        tuple(layers or ()), as_bytes(memory), full_up_to, token_mask, share, seed, snapshot_every, broad, objective
    )
    what = description or type(model).__name__

    target = Path(path) if path is not None and resume else None

    def run() -> Run:
        return Run(model, batches, options, what, dict(names or {}), progress, target)

    if path is None:
        return run().in_memory()
    try:
        return run().to_file(path, resume=resume)
    except CannotGoOnError as error:
        if iter(batches) is batches:
            raise
        _log.warning("%s; starting afresh", error)
        return run().to_file(path, resume=False)


class CannotGoOnError(StatisticsError):
    """An interrupted run cannot be continued: the batches are others, or what it had written is gone."""


class Run:
    """One call of `calibrate`."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        options: Options,
        description: str,
        names: dict[str, str | None],
        progress: Progress | None,
        interrupted: Path | None,
    ) -> None:
        self.model, self.batches, self.options, self.description = model, batches, options, description
        chosen = select_linears(model, options.layers)
        self.aliases = aliases(model, chosen, names)
        self.linears = {name: chosen[name] for name in self.aliases}
        self.marks = {name: mark_of(x.weight, (x.out_features, x.in_features)) for name, x in self.linears.items()}
        dtypes = {str(linear.weight.dtype).removeprefix("torch.") for linear in self.linears.values()}
        self.dtypes = ", ".join(sorted(dtypes))  # what the model runs in, for who reads the file
        self.progress = progress
        self.total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
        self.number = 0  # of the pass
        self.batch_count = self.sample_count = 0  # of the first pass, when it is over
        self.samples = 0  # so far in this pass
        self.seen = hashlib.sha256()  # the batches so far in this pass
        self.outputs: dict[str, str] = {}  # the key in the file of each linear's gradient
        facts = {**options.facts(), "description": description, "names": self.aliases}
        self.asked = fingerprint(self.linears, facts)
        self.memory = self._room(interrupted)
        self.observer = Observer(
            self.linears,
            memory=self.memory,
            full_up_to=options.full_up_to,
            share=options.share,
            seed=options.seed,
        )
        self.gradients = self._gradients()

    def _room(self, interrupted: Path | None) -> int | None:
        """The bytes for second moments; where this run was interrupted those that it had, whatever is free now.

        No less than what the widest input needs for its own.
        """
        asked = self.options.memory
        if not isinstance(asked, str):
            return asked
        if interrupted is not None and (earlier := memory_of(interrupted, self.asked)):
            return earlier
        widest = max(linear.in_features for linear in self.linears.values())
        devices = (linear.weight.device for linear in self.linears.values())
        return max(room_on(devices, gradients=self.options.objective is not None), state_bytes(widest, full=True))

    def _gradients(self) -> Gradients | None:
        """Those that are taken in the first pass, of the linears that have room; None where no linear has."""
        chosen, inside = self.options, within(self.linears)
        if chosen.objective is None:
            return None
        blocks = fitting(inside, self.memory)
        if out := [name for name in inside if name not in blocks]:
            _log.warning("no room for the gradients of %d linears (%s); give more memory", len(out), some(out))
        if not blocks:
            return None
        return Gradients(self.model, inside, blocks, chosen.objective, chosen.seed)

    def in_memory(self) -> Collected:
        """Take everything in one pass and keep it."""
        self.one_pass()
        if waiting := [name for name, group in self.observer.groups.items() if group.accumulator is None]:
            raise StatisticsError(
                f"{self.description}: the second moments do not fit into the memory ({self.memory} bytes), or "
                f"their layers do not always have one input ({some(waiting)}); give a path, so that they are taken in "
                "several passes, give more memory, or restrict full_up_to"
            )
        outputs = self.take_gradients()
        keys = self.keys()
        found = Collected(self.contents(), {})
        for name, made in self.observer.finished():  # one by one: each leaves its memory
            found.add(keys[name], fields_of(made.finish()))
        while outputs:
            found.add(*outputs.popitem())
        return found

    def to_file(self, path: str | Path, *, resume: bool) -> StatisticsFile:
        """Take as many inputs in a pass as memory has room for, write them, and go on with the rest."""
        target = TargetFile(path)
        key = self.asked
        if self.gradients is not None:
            key += f", gradients in blocks {self.gradients.blocks}"  # whose snapshots hold more
        how = self.observer, self.gradients, self.asked, key, self.options.snapshot_every
        snapshots = ProgressFile(target.path, *how)
        record = snapshots.restore(self._devices()) if resume else None
        if record is not None:
            self.number, self.batch_count, self.sample_count = record["pass"], record["batches"], record["samples"]
            self.outputs = record["outputs"]
        try:
            if self.number:
                target.begin(self.contents(), key, resume=resume)
                self.observer.done &= {name for name, number in self.keys().items() if number in target.done}
                self._check_outputs(target)
            while self.observer.surveying or self.observer.waiting():
                self.one_pass(record, snapshots)
                record = None
                if not target.is_open:
                    outputs = self.take_gradients()
                    target.begin(self.contents(), key, resume=resume)
                    target.write_outputs(outputs)
                    del outputs  # further passes need the room
                for name, made in self.observer.finished():
                    target.write(self.keys()[name], made.finish())
                self.next_pass()
                if self.observer.waiting():
                    snapshots.save(self.record(0))
            target.finish()
        except BaseException:
            target.abort(keep=snapshots.path.exists())
            raise
        snapshots.remove()
        return StatisticsFile(path)

    def _check_outputs(self, target: TargetFile) -> None:
        """Raise `CannotGoOnError` where it is not the file that the run had begun: gradients are of the first pass."""
        if not target.done.issuperset(self.outputs.values()):
            raise CannotGoOnError(f"{target.path}: what the interrupted run had written of it is gone")

    def _devices(self) -> dict[str, torch.device]:
        return {name: linear.weight.device for name, linear in self.linears.items()}

    def record(self, done: int) -> dict[str, Any]:
        """Where the run is, for a snapshot after `done` batches of this pass."""
        counts = {"batches": self.batch_count, "samples": self.sample_count}
        return {
            "pass": self.number,
            **counts,
            "done": done,
            "seen": self.seen.hexdigest(),
            "outputs": self.outputs,
        }

    def take_gradients(self) -> dict[str, dict[str, Tensor]]:
        """After the first pass: the moments of the gradients by their keys in the file; none unless asked for."""
        found = {} if self.gradients is None else self.gradients.finish()
        self.outputs = {name: f"g{number}" for number, name in enumerate(found)}
        return {self.outputs[name]: fields for name, fields in found.items()}

    def next_pass(self) -> None:
        """Prepare for another pass over the batches."""
        self.number += 1
        self.samples = 0
        self.seen = hashlib.sha256()
        self.observer.begin_pass(surveying=False)

    def one_pass(self, record: Mapping[str, Any] | None = None, snapshots: ProgressFile | None = None) -> None:
        """Run the model on every batch; those before `record` were seen by an earlier run and are only compared."""
        if self.number and iter(self.batches) is self.batches:
            raise StatisticsError(
                f"{self.description}: another pass over the batches is needed, for {len(self.observer.waiting())} "
                "inputs; pass a list or another re-iterable instead of an iterator, or give more memory"
            )
        skip = record["done"] if record else 0
        count = 0
        gradients = None if self.number else self.gradients
        with self.observer.hooked(), running(self.model), gradients.hooked() if gradients else nullcontext():
            for index, batch in enumerate(self._items()):
                if index == skip:
                    self._compare(record)
                if index >= skip:
                    self._take(batch, index, gradients)
                count += 1
                self.samples += batch.samples
                if snapshots is not None:
                    self.seen.update(batch.digest().encode())
                if snapshots is not None and index >= skip and snapshots.due():
                    snapshots.save(self.record(count))
                if self.progress is not None:
                    self.progress(count, self.total or self.batch_count or None, f"pass {self.number + 1}")
        if count <= skip:
            self._compare(record)
        self._check_count(count)

    def _compare(self, record: Mapping[str, Any] | None) -> None:
        if record is not None and self.seen.hexdigest() != record["seen"]:
            raise CannotGoOnError(
                f"{self.description}: the batches are not those of the interrupted run; give the same ones, or do not "
                "resume"
            )

    def _items(self) -> Iterator[Batch]:
        try:
            iterator = iter(self.batches)
        except TypeError as error:
            raise StatisticsError(f"batches: {error}; give a list or another iterable of batches") from error
        index = 0
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except LowbitError:
                raise
            except Exception as error:
                raise StatisticsError(
                    f"batch {index}: the iterable raised {type(error).__name__}: {error}; correct its source"
                ) from error
            yield as_batch(item, index, self.options.token_mask)
            index += 1

    def _take(self, batch: Batch, index: int, gradients: Gradients | None) -> None:
        split = Split(batch, self.samples)
        self.observer.begin(split, index)
        if gradients is not None:
            gradients.take(split, index, lambda: self._forward(batch, index, ", or calibrate without gradients"))
        else:
            self._forward(batch, index)
        self.observer.end()

    def _forward(self, batch: Batch, index: int, more: str = "") -> Any:
        try:
            return self.model(*batch.args, **batch.kwargs)
        except LowbitError:
            raise
        except Exception as error:
            last = self.observer.last
            where = f"after the linear {last}" if last else "before its first linear"
            raise StatisticsError(
                f"batch {index}: the model raised {type(error).__name__} {where}: {error}; see that it takes the batch "
                f"as it is given (model(*args, **kwargs)), on the same device{more}"
            ) from error

    def _check_count(self, count: int) -> None:
        if not count:
            raise StatisticsError("there are no batches (the iterable is empty); give at least two samples")
        if self.number and count != self.batch_count:
            raise StatisticsError(
                f"the first pass had {self.batch_count} batches, this one has {count}; the iterable must give the same "
                "batches every time"
            )
        if not self.number:
            self.batch_count, self.sample_count = count, self.samples
        if not self.observer.groups:
            raise StatisticsError(f"{self.description}: no batch reached any of its {len(self.linears)} linears")

    def keys(self) -> dict[str, str]:
        """Keys of the inputs in the file by the group: numbers in the order of the first calls."""
        return {name: str(number) for number, name in enumerate(self.observer.groups)}

    def _output(self, name: str) -> tuple[str, str, int]:
        """The key of a linear's gradient, the mark of its weight, and the blocks of the gradient."""
        key = self.outputs.get(name, "")
        return key, self.marks[name], self.gradients.blocks[name] if key and self.gradients else 1

    def contents(self) -> Contents:
        """What the finished file will hold; known after the first pass."""
        keys, watched = self.keys(), self.observer.watched
        inputs = {}
        for name, key in keys.items():
            seen = watched[name]
            kind = "full" if self.observer.is_full(seen.k) else "diagonal"
            inputs[key] = InputFacts(seen.k, seen.tokens[0], seen.tokens[1], kind)
        layers = {
            alias: LayerInput(keys[seen.group], (seen.n, seen.k), *self._output(name))
            for name, seen in watched.items()
            if seen.group
            for alias in self.aliases[name]
        }
        never = tuple(alias for name, seen in watched.items() if not seen.group for alias in self.aliases[name])
        counts = {"batches": self.batch_count, "samples": self.sample_count}
        facts = {**self.options.facts(), **counts, "memory": self.memory, "dtype": self.dtypes}
        return Contents(self.description, layers, inputs, never, facts)
