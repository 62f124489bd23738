"""A model's packed step as a program: compiled pieces and attention calls in order, bound to the model's weights. Running it
is piece, attention, piece, ... : no guards, no Dynamo. compile.py makes one.

A program is saved as one JSON file, which says what is called with what, and one file for each unique piece. Weights are named,
not stored. Loading it compiles nothing.
"""

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor
from torch import Tensor

from gemma4_compile.hf.watch import address_of, describe
from gemma4_compile.ops.dependent import ROWS, constants
from gemma4_compile.passes import Miss, Record, Site

from .inputs import OPTIONAL, check_inputs, require, step_input, varying_dim
from .split import SPLIT_POINTS

_FORMAT = 4

Check = Callable[[dict[str, Tensor]], None]  # raises ValueError for a step's inputs that do not fit
# Where a value comes from: ["value", number], ["weight", name], ["input", name], ["size", input, dimension], ["constant", x].
Reference = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One step of a program: `piece` is the key of a compiled piece, or `op` a name in pieces.SPLIT_POINTS; the other is empty.
    `host` names what a piece computes on the host though the model is on a GPU, empty if nothing."""

    piece: str
    op: str
    arguments: tuple[Reference, ...]
    results: tuple[int, ...]
    host: str = ""


@dataclass
class ProgramSpec:
    """What a program does, without weights and code: everything that its JSON file says."""

    calls: list[Call]
    result: Reference
    hidden: Reference  # [1, N, H]
    record: Record
    model: str = ""  # fingerprint of the model that it was made of
    limits: dict[str, int] = field(default_factory=dict)  # input -> the largest size of its rows that the code can index
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def pieces(self) -> int:
        return sum(bool(call.piece) for call in self.calls)

    @property
    def unique_pieces(self) -> int:
        return len({call.piece for call in self.calls} - {""})


class StepResult(NamedTuple):
    """What a step gives of its N wanted rows: logits [1, N, vocabulary], and hidden [N, H], the states behind the last norm,
    which the head multiplies. Of a draft step: draft tokens [N] int64, and the states that the next draft step takes."""

    logits: Tensor
    hidden: Tensor


class Program:
    """A spec with compiled pieces and a model's weights. Call it with a step's inputs, see packed/inputs.py.

    It holds the weights' tensors: what is copied into them counts, another tensor in a parameter's place does not.

    compiled    unique pieces that were compiled for it; 0 if it was loaded
    steps       its calls, bound to weights
    boundary    index of the first step that reads which rows are wanted: with YOCO, all behind it work on those rows. -1 for
                a draft step, whose rows are all wanted
    """

    def __init__(
        self, spec: ProgramSpec, pieces: Mapping[str, Callable[..., Any]], weights: dict[str, Tensor], compiled: int,
        check: Check = check_inputs,
    ):  # fmt: skip
        self.spec, self.compiled, self._check_inputs = spec, compiled, check
        self._pieces, self.weights = pieces, weights
        self._addresses = [*map(address_of, weights.values())]
        self._folder: Path | None = None  # that it was loaded from: a loaded piece cannot be written again
        self._values: list[Any] = []
        self._inputs: list[tuple[int, str]] = []
        self._sizes: list[tuple[int, str, int]] = []
        places: dict[Reference, int] = {}

        def place(reference: Reference) -> int:
            kind, *rest = reference
            if kind == "constant":  # not shared: 1 and 1.0 are equal
                self._values.append(rest[0])
                return len(self._values) - 1
            if reference not in places:
                places[reference] = len(self._values)
                self._values.append(weights[rest[0]] if kind == "weight" else None)
                if kind == "input":
                    self._inputs.append((places[reference], rest[0]))
                elif kind == "size":
                    self._sizes.append((places[reference], *rest))
            return places[reference]

        self.steps: list[BoundCall] = []
        for call in spec.calls:
            function = SPLIT_POINTS[call.op].op if call.op else pieces[call.piece]
            arguments = tuple(place(reference) for reference in call.arguments)
            self.steps.append(BoundCall(function, call.op, arguments, tuple(place(("value", i)) for i in call.results)))
        self._result, self._hidden = place(spec.result), place(spec.hidden)
        reads_rows = (i for i, call in enumerate(spec.calls) if call.piece and ("input", "rows") in call.arguments)
        self.boundary = next(reads_rows, -1)
        self._free_after_use()

    def with_weights(self, weights: dict[str, Tensor]) -> "Program":
        """The same program over other tensors of a model with its fingerprint; itself if they are those that it has, where they
        were."""
        same = all(weights[name] is tensor for name, tensor in self.weights.items())
        if same and [*map(address_of, self.weights.values())] == self._addresses:
            return self
        other = Program(self.spec, self._pieces, weights, self.compiled, self._check_inputs)
        other._folder = self._folder
        return other

    @property
    def input_names(self) -> dict[int, str]:
        """The step's inputs by their index among the values of a run."""
        return dict(self._inputs)

    def _free_after_use(self) -> None:
        made = {index for step in self.steps for index in step.results}
        seen = {self._result, self._hidden}
        for step in reversed(self.steps):
            used = {index for index in (*step.arguments, *step.results) if index in made}
            step.dead = tuple(used - seen)
            seen |= used

    def bind(self, inputs: dict[str, Tensor]) -> list[Any]:
        """The values of a run before its first step. Raises ValueError for inputs that are missing or do not fit."""
        self._check(inputs)
        values = list(self._values)
        self.rebind(values, inputs)
        return values

    def rebind(self, values: list[Any], inputs: dict[str, Tensor]) -> None:
        """Give the values of a run other inputs; what its steps have computed stays."""
        for index, name in self._inputs:
            values[index] = step_input(inputs, name)
        for index, name, dim in self._sizes:
            values[index] = step_input(inputs, name).shape[dim]

    def _check(self, inputs: dict[str, Tensor]) -> None:
        """What the code relies on, as far as the host can tell without waiting for the GPU."""
        self._check_inputs(inputs)
        require(inputs, (name for _, name in self._inputs if name not in OPTIONAL))
        for name, most in self.spec.limits.items():
            size = step_input(inputs, name).shape[varying_dim(name)]
            if size > most:
                raise ValueError(f"{name} must have at most {most} elements, as offsets are 32-bit, got {size}; split the step")

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [1, N, vocabulary] of the N wanted rows; keys and values are written in place."""
        return self.run(inputs).logits

    def run(self, inputs: dict[str, Tensor]) -> StepResult:
        """Logits [1, N, vocabulary] and final-normed states [N, H] of the N wanted rows; keys and values are written in place.

        Raises ValueError for inputs that are missing or do not fit."""
        values = self.bind(inputs)
        with torch.no_grad():
            for step in self.steps:
                step.run(values)
        return self.result(values)

    def run_recorded(self, inputs: dict[str, Tensor]) -> StepResult:
        """As run, for what a CUDA graph holds: few rows run as kernels that start while those before them still run, see
        ops/dependent.py."""
        few = inputs["positions"].shape[0] <= ROWS
        with constants(self.weights.values()) if few else nullcontext():
            return self.run(inputs)

    def result(self, values: list[Any]) -> StepResult:
        """What a run gives, once all steps have run."""
        return StepResult(values[self._result], values[self._hidden][0])

    def save(self, folder: str | Path) -> None:
        """Write the program to a folder that does not exist yet; whole or not at all."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
        try:
            if self._folder is not None:
                shutil.copytree(self._folder, draft, dirs_exist_ok=True)
            else:
                for key, piece in self._pieces.items():
                    piece.save(path=str(draft / f"{key}.piece"), format="binary")  # type: ignore[attr-defined]
                (draft / "program.json").write_text(json.dumps({"format": _FORMAT, **vars(self.spec)}, default=vars, indent=1))
            draft.chmod(0o755)  # mkdtemp's is for one user
            try:
                draft.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(draft)  # another process was faster: its files are as good
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


@dataclass
class BoundCall:
    """One call of a program, bound: arguments, results and what nothing needs afterwards are indices of its values. `op` names
    the op between pieces that it calls, empty for a piece."""

    function: Callable[..., Any]
    op: str
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    dead: tuple[int, ...] = ()

    def run(self, values: list[Any]) -> None:
        results = self.function(*[values[i] for i in self.arguments])
        for index, value in zip(self.results, (results,) if self.op else results, strict=True):
            values[index] = value
        for index in self.dead:
            values[index] = None


def load(folder: str | Path, module: Any, check: Check = check_inputs) -> Program:
    """A saved program with this model's weights. Compiles nothing.

    Raises ValueError for files that are missing, broken, of another torch, or of another model."""
    from torch._inductor.standalone_compile import CompiledArtifact

    folder = Path(folder)
    try:
        saved = json.loads((folder / "program.json").read_text())
        if saved.pop("format") != _FORMAT:
            raise ValueError("another version wrote it")
        if not saved["model"] or saved["model"] != fingerprint(module):
            raise ValueError("another model's")
        calls = [
            Call(c["piece"], c["op"], tuple(tuple(a) for a in c["arguments"]), tuple(c["results"]), c["host"])
            for c in saved["calls"]
        ]
        record = Record(
            [Site(**site | {"nodes": tuple(site["nodes"])}) for site in saved["record"]["sites"]],
            [Miss(**miss) for miss in saved["record"]["misses"]],
            saved["record"]["seconds"],
        )
        results = tuple(saved["result"]), tuple(saved["hidden"])
        spec = ProgramSpec(calls, *results, record, saved["model"], saved["limits"], saved["seconds"])
        keys = {call.piece for call in calls} - {""}
        with torch._inductor.config.patch(compile_threads=1):  # else it starts workers that have nothing to do
            pieces = {key: CompiledArtifact.load(path=str(folder / f"{key}.piece"), format="binary") for key in keys}
        program = Program(spec, pieces, weights_of(module), 0, check)
        program._folder = folder
        return program
    except Exception as error:  # of JSON, of the file system, and of torch's loader, which asserts
        raise ValueError(f"a saved program must be whole and of this model, got {error!r} in {folder}; delete it") from error


def fingerprint(module: Any) -> str:
    """Of everything of a model that its program depends on, but for the weights' values. Empty for a model that nothing tells
    from others, see watch.describe."""
    described = describe(module)
    if described is None:
        return ""
    config = {key: value for key, value in module.config.to_dict().items() if key != "_name_or_path"}
    weights = weights_of(module)
    names = {id(tensor): name for name, tensor in weights.items()}  # one name for tied ones
    tensors = [(name, names[id(w)], tuple(w.shape), w.stride(), str(w.dtype), str(w.device)) for name, w in weights.items()]
    experts = getattr(module.config, "_experts_implementation", None)
    parts = (json.dumps(config, sort_keys=True, default=str), sorted(tensors), experts, described)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def weights_of(module: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
