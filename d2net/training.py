"""The training loop: read :meth:`Trainer.run` from top to bottom."""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from d2net import __version__
from d2net.checkpoint import CHECKPOINT_NAME, Checkpoint, load_checkpoint, save_checkpoint
from d2net.data.batches import Batch, BatchSampler
from d2net.data.dataset import Dataset
from d2net.data.resident import ResidentFeatures
from d2net.errors import D2NetError, InputError
from d2net.evaluation import evaluate
from d2net.localization import localize
from d2net.losses import D2NetLoss
from d2net.model import D2Net
from d2net.recipes import Recipe, TrainingRecipe
from d2net.step_graph import StepGraph
from d2net.threads import computing, given, multiply_adds, threads_for

# The loss and its terms, each before its weight (D2NetLossResult says how they add up), and their names in the bar.
TERMS = {"total": "loss", "discriminative": "dis", "snippet": "snip", "video": "vid", "uncertainty": "um"}
PRECISIONS = ("fp32", "tf32", "bf16")
RESIDENT_SHARE = 0.25  # of the free memory of a device that features may take; loading them takes twice that
CHECK_EVERY = 10  # iterations between looks at the loss, each of which waits for the device


class Trainer:
    """Trains a network with a recipe; writes ``checkpoint.safetensors``, ``log.jsonl`` and TensorBoard events.

    The log has the loss and its terms every 10 iterations, as means over the iterations since the line before. The
    terms are as they are before they are weighed: total = discriminative + loss.alpha_snippet * snippet +
    loss.alpha_video * video + loss.um_weight * uncertainty, and 0 in an iteration in which they are off.

    On a CPU, small networks are trained in fewer threads than PyTorch would take; ``with d2net.threads.threads(n):``
    around :meth:`run` decides otherwise.

    Args:
        dataset: The recordings to train on (one subset); only their features and labels are read.
        recipe: All settings.
        out: Folder for the results; made where missing.
        seed: Of the weights, the batches, the pairing and the dropout. A resumed run goes on with its own.
        device: Where to train.
        precision: Of the network. "fp32"; "tf32", whose convolutions round their inputs to 10 bits of mantissa (GPUs
            only); "bf16", whose layers compute in bfloat16, with weights, class activations and loss in float32. None:
            tf32 on a GPU, as PyTorch does by itself, fp32 elsewhere.
        resident: Keep all features on the device, and pad every batch to the same length; None: on a GPU where they
            take up to a quarter of its free memory.
        graph: Replay the step as a CUDA graph, which needs resident features; None: where that is possible.
        eval_every: Iterations between evaluations on ``evaluation_dataset``; 0 for none.
        evaluation_dataset: Recordings with segments, of the same classes and stream widths.
        save_every: Iterations between checkpoints; 0 for one at the end only.
        tensorboard: Write events for TensorBoard; None: where it is installed.
        overwrite: Start anew although ``out`` holds a checkpoint.
        progress: Called with (iterations done, all iterations) now and then; None: a bar on stderr.

    Raises:
        InputError: a setting that cannot work, unlabelled recordings, or a folder that cannot be written.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        *,
        out: Path,
        seed: int = 0,
        device: torch.device | str = "cpu",
        precision: str | None = None,
        resident: bool | None = None,
        graph: bool | None = None,
        eval_every: int = 0,
        evaluation_dataset: Dataset | None = None,
        save_every: int = 500,
        tensorboard: bool | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        _check_settings(recipe.training)
        if eval_every and evaluation_dataset is None:
            raise InputError("eval_every is set without a dataset to evaluate on; give one or set it to 0")
        if evaluation_dataset is not None:
            _check_same("classes", dataset.classes, evaluation_dataset.classes, "the dataset to evaluate on")
            _check_same("widths", dataset.stream_widths, evaluation_dataset.stream_widths, "the dataset to evaluate on")
            if eval_every and len(evaluation_dataset.annotations()) == 0:
                raise InputError(
                    f"dataset '{evaluation_dataset.name}', {', '.join(evaluation_dataset.subsets)}: has no segment to "
                    "compare with every so many iterations; choose an annotated subset, or leave --eval-every out"
                )
        self.dataset = dataset
        self.recipe = recipe
        self.out = Path(out)
        self.path = self.out / CHECKPOINT_NAME
        self.seed = seed
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.precision = precision or ("tf32" if on_gpu else "fp32")
        if self.precision not in PRECISIONS or (self.precision == "tf32" and not on_gpu):
            known = ", ".join(PRECISIONS if on_gpu else ("fp32", "bf16"))
            raise InputError(f"precision '{self.precision}' on {self.device}: expected one of {known}")
        if graph and (resident is False or not on_gpu):
            raise InputError("a CUDA graph needs a GPU and resident features; leave graph=True (--graph) out")
        self.graph = graph
        self.eval_every = eval_every
        self.evaluation_dataset = evaluation_dataset
        self.save_every = save_every
        self.tensorboard = tensorboard
        self.overwrite = overwrite
        self.progress = progress

        _check_writable(self.out)
        settings = recipe.training
        self.sampler = BatchSampler(
            dataset,
            batch_size=settings.batch_size,
            max_snippets=settings.max_snippets,
            seed=seed,
            allow_unlabelled=recipe.loss.skip_unlabelled,
        )
        with self._own_rng():
            torch.manual_seed(seed)
            self.model = D2Net.from_recipe(
                recipe.model, num_classes=len(dataset.classes), stream_widths=dataset.stream_widths
            ).to(self.device)
            self._rng = self._rng_state()  # dropout goes on from here
        # What is evaluated and saved as the network: the average of the weights, or the trained network itself.
        self.result = copy.deepcopy(self.model) if settings.ema_decay > 0 else self.model
        # How many steps the average is worth, 1 + decay + decay^2 ...; on the device, so that a CUDA graph can count.
        self._average_size = torch.zeros((), device=self.device)
        self.loss = D2NetLoss.from_recipe(
            recipe.loss, num_classes=len(dataset.classes), embedding_dim=self.model.embedding_dim
        ).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=on_gpu or None,
            capturable=on_gpu,
        )
        self.pairing = torch.Generator(self.device).manual_seed(seed)
        self.resident: ResidentFeatures | None = None
        if resident or (resident is None and on_gpu):
            budget = math.inf if resident else RESIDENT_SHARE * torch.cuda.mem_get_info(self.device)[0]
            self.resident = ResidentFeatures.load(
                dataset, self.device, max_snippets=settings.max_snippets, budget=budget
            )
        if graph and self.resident is None:
            raise InputError("a CUDA graph needs resident features, which do not fit on the device; use --no-graph")
        self.iteration = 0
        self._threads_before = 0  # of a run that is resumed

    def run(self, resume: bool = False) -> Path:
        """Train to ``recipe.training.iterations`` and return the path of the checkpoint.

        Ctrl-C and SIGTERM finish the iteration and save first; a second one stops at once.

        Args:
            resume: Continue the run in ``out``; on a CPU the result is the same, bit for bit, as without the break. It
                goes on in as many threads as before; a warning says so where that cannot be.

        Raises:
            InputError: bad features, nothing to resume, a checkpoint in the way or of another experiment, a full disk.
            D2NetError: the loss or the weights became NaN or Inf; the last checkpoint is from before.
            KeyboardInterrupt: after saving.
        """
        if resume:
            self._restore()
        elif self.path.exists() and not self.overwrite:
            raise InputError(
                f"{self.path}: a checkpoint is there already; continue it with --resume or choose another --out"
            )
        iterations = self.recipe.training.iterations
        if self.iteration >= iterations:
            return self.path

        self.model.train()
        self.loss.train()
        # The terms of the last iterations stay on the device until _check looks at them.
        history = torch.zeros(CHECK_EVERY, len(TERMS), device=self.device)
        self._looked = self.iteration
        graph = self._step_graph()
        with (
            self._own_threads(),
            self._own_rng(),
            _convolutions_in(self.precision),
            _Stop() as stop,
            _Log(self.out, self.iteration, self.tensorboard) as log,
            _Bar(self.iteration, iterations, self.progress, self._shown_terms()) as bar,
        ):
            self._set_rng_state(self._rng)
            while self.iteration < iterations:
                denoise = denoising_is_on(self.recipe.training, self.iteration)
                if self.resident is None:
                    terms_now = self.update(self.sampler.next().to(self.device), denoise)
                else:
                    rows = self.resident.rows(self.sampler.windows(self.resident.lengths))
                    terms_now = (graph or self._update_resident)(rows, denoise)

                history[self.iteration % CHECK_EVERY] = terms_now
                self.iteration += 1
                stopping = stop.requested  # read once: a signal may come at any line
                save = stopping or self.iteration == iterations or _due(self.iteration, self.save_every)
                evaluation = not stopping and _due(self.iteration, self.eval_every)
                if save or evaluation or _due(self.iteration, CHECK_EVERY):
                    terms = self._check(history)
                    log.write(self.iteration, terms)
                    bar.update(self.iteration, terms)
                if save:
                    save_checkpoint(self.path, self._checkpoint())
                if evaluation:
                    found = self._evaluate()
                    log.write(self.iteration, found)
                    bar.tell(f"iteration {self.iteration}: {_in_words(found)}")
                if stopping:
                    raise KeyboardInterrupt(f"stopped at iteration {self.iteration}; saved {self.path}")
        return self.path

    def update(self, batch: Batch, denoise: bool) -> Tensor:
        """One step of the optimizer; returns the loss and its terms, (len(TERMS),) on the device."""
        # A cast weight is used once, and a cache of casts must not outlive the capture of a graph.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False):
            output = self.model(batch.features, batch.lengths)
        loss = self.loss(
            output.tcam,
            output.embeddings,
            batch.lengths,
            batch.labels,
            generator=self.pairing,
            denoise=denoise,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self.optimizer.step()
        if self.result is not self.model:
            self._average()
        return torch.stack([getattr(loss, term).detach() for term in TERMS])

    @torch.no_grad()
    def _average(self) -> None:
        """Take the weights into their average: after n steps the new ones count (1 - decay) / (1 - decay^n).

        So the first average is the weights after the first step, and what the network began with has no share.
        """
        self._average_size.mul_(self.recipe.training.ema_decay).add_(1)
        weight = self._average_size.reciprocal()
        for average, new in zip(self.result.parameters(), self.model.parameters(), strict=True):
            average.lerp_(new, weight)

    def _update_resident(self, rows: Tensor, denoise: bool) -> Tensor:
        """:meth:`update` with a batch of resident features."""
        assert self.resident is not None
        return self.update(self.resident.gather(rows.to(self.device, non_blocking=True)), denoise)

    def _step_graph(self) -> StepGraph | None:
        if self.resident is None or self.device.type != "cuda" or self.graph is False:
            return None
        rows = torch.zeros(3, self.sampler.batch_size, dtype=torch.int64, device=self.device)
        return StepGraph(self._update_resident, rows, [self.pairing], required=bool(self.graph))

    def _check(self, history: Tensor) -> dict[str, float]:
        """Means of the terms since the last look, so that L_D shows where it is on in some iterations only.

        Raises D2NetError for the first of these iterations that is not finite, so that no bad checkpoint is ever saved.
        """
        rows = history.tolist()
        since = range(self._looked, self.iteration)
        for i in since:
            terms = dict(zip(TERMS, rows[i % CHECK_EVERY], strict=True))
            if not all(map(math.isfinite, terms.values())):
                raise self._diverged(i + 1, ", ".join(f"{k} {v:.4g}" for k, v in terms.items()))
        self._looked = self.iteration
        terms = {k: sum(rows[i % CHECK_EVERY][n] for i in since) / len(since) for n, k in enumerate(TERMS)}
        # A gradient can be NaN where its loss is not; the next loss would tell, but too late for a checkpoint.
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            raise self._diverged(self.iteration, "weights hold NaN or Inf, the loss does not yet")
        return terms

    def _diverged(self, iteration: int, what: str) -> D2NetError:
        return D2NetError(
            f"the training is not finite at iteration {iteration} ({what}); lower training.learning_rate "
            f"(now {self.recipe.training.learning_rate:g}) or look at the features"
        )

    def _evaluate(self) -> dict[str, Any]:
        """mAP and F1 in percent on the evaluation dataset, as its protocol of the recipe reports them; or why not."""
        assert self.evaluation_dataset is not None
        detections = localize(
            self.result, self.loss.reference, self.evaluation_dataset, self.recipe.localization, device=self.device
        )
        settings = self.recipe.evaluation
        annotations = self.evaluation_dataset.annotations()
        try:
            found = evaluate(detections, annotations, protocol=settings.protocol, tiou=settings.tiou)
        except InputError as error:  # early networks may find actions only where the protocol does not look
            return {"not_evaluated": str(error)}
        result = found.to_json()
        return {**{key: result[key] for key in ("map", "average", "f1")}, "judged": found.coverage.lines()}

    def _checkpoint(self) -> Checkpoint:
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": self.result.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": {
                f"{index}.{key}": value
                for index, state in self.optimizer.state_dict()["state"].items()
                for key, value in state.items()
            },
            "sampler": self.sampler.state(),
            "rng": {self._pairing_key: self.pairing.get_state(), **self._rng_state()},
        }
        if self.result is not self.model:
            groups["weights"] = self.model.state_dict()
            groups["average"] = {"size": self._average_size}
        return Checkpoint(
            recipe=self.recipe,
            classes=self.dataset.classes,
            stream_widths=self.dataset.stream_widths,
            iteration=self.iteration,
            dataset=self.dataset.name,
            seed=self.seed,
            version=__version__,
            tensors={f"{name}.{key}": t for name, group in groups.items() for key, t in group.items()},
            threads=torch.get_num_threads() if self.device.type == "cpu" else 0,
        )

    def _restore(self) -> None:
        if not self.path.exists():
            raise InputError(f"{self.path}: there is nothing to resume; leave --resume out or correct --out")
        saved = load_checkpoint(self.path)
        _check_same("classes", saved.classes, self.dataset.classes, "the dataset to resume with")
        _check_same("widths", saved.stream_widths, self.dataset.stream_widths, "the dataset to resume with")
        _check_same_recipe(saved.recipe, self.recipe, self.path)
        if saved.iteration > self.recipe.training.iterations:
            raise InputError(
                f"{self.path}: is at iteration {saved.iteration} already, beyond training.iterations = "
                f"{self.recipe.training.iterations}; raise that or leave --resume out"
            )
        try:
            self.result.load_state_dict(saved.group("model"))
            if self.result is not self.model:
                self.model.load_state_dict(saved.group("weights"))
                # Older files have none: their averages began with the initial weights, as after endlessly many steps.
                endless = torch.tensor(1 / (1 - self.recipe.training.ema_decay))
                self._average_size.copy_(saved.group("average").get("size", endless))
            self.loss.load_state_dict(saved.group("loss"))
            state: dict[int, dict[str, Tensor]] = {}
            for key, t in saved.group("optimizer").items():
                index, _, name = key.partition(".")
                state.setdefault(int(index), {})[name] = t
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
            self.sampler.restore(saved.group("sampler"))
            rng = saved.group("rng")
            if self._pairing_key in rng:
                self.pairing.set_state(rng[self._pairing_key])
            self._rng = rng
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.path}: its tensors do not fit this recipe ({reason}); train anew") from error
        self.seed = saved.seed
        self.iteration = saved.iteration
        self._threads_before = saved.threads

    def _own_threads(self) -> AbstractContextManager[None]:
        """As many threads of a CPU as a batch is worth, or as this run has had so far: they decide the last bits."""
        if self.device.type != "cpu":
            return nullcontext()
        snippets = self.sampler.batch_size * self.sampler.max_snippets
        number = threads_for(multiply_adds(self.model, snippets))
        if self._threads_before and not given():
            number = min(self._threads_before, torch.get_num_threads())
        if self._threads_before not in (0, number):
            warnings.warn(
                f"{self.path}: was trained in {self._threads_before} threads and goes on in {number}; the result is "
                "then the same only up to rounding",
                stacklevel=3,
            )
        return computing(number)

    def _shown_terms(self) -> list[str]:
        """Those that the recipe gives a weight."""
        loss = self.recipe.loss
        weights = {"snippet": loss.alpha_snippet, "video": loss.alpha_video, "uncertainty": loss.um_weight}
        return [term for term in TERMS if weights.get(term, 1) != 0]

    @property
    def _pairing_key(self) -> str:
        """Generators of a CPU and a GPU cannot take each other's state."""
        return "pairing_cuda" if self.device.type == "cuda" else "pairing"

    def _own_rng(self) -> AbstractContextManager[None]:
        """The global generators, which dropout draws from, are the caller's again afterwards."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_rng_state(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:  # not there when the run began on a CPU
            torch.cuda.set_rng_state(state["cuda"], self.device)


class _Stop:
    """Turns the first SIGINT or SIGTERM into a request; the second acts as it did before."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        except ValueError:  # not the main thread: signals go elsewhere
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()


class _Log:
    """``log.jsonl``, a line per entry, and the same as TensorBoard scalars.

    Entries past ``iteration`` are dropped: they are of a run that is being redone from there.
    """

    def __init__(self, out: Path, iteration: int, tensorboard: bool | None) -> None:
        self.path = out / "log.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() and iteration else []
        kept = [line for line in lines if _iteration_of(line) <= iteration]
        try:
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        self.events = _summary_writer(out / "tensorboard", iteration, tensorboard)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.events is not None:
            self.events.close()

    def write(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Append numbers; a nested mapping becomes one scalar per key."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error
        if self.events is None:
            return
        for key, value in values.items():
            scalars = {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            for name, scalar in scalars.items():
                if not isinstance(scalar, (str, list)):
                    self.events.add_scalar(name, scalar, iteration)

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written ({error.strerror}); free some space or choose another --out")


class _Bar:
    """A progress bar on a terminal; elsewhere a line after every tenth of the run; or whoever wants to know instead."""

    def __init__(
        self, start: int, total: int, instead: Callable[[int, int], None] | None, shown: Sequence[str]
    ) -> None:
        self.start, self.total, self.instead, self.shown = start, total, instead, shown
        self.begun = time.monotonic()
        self.reported = 10 * start // total
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> _Bar:
        if self.instead is None and sys.stderr.isatty():
            self.progress = Progress(
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.progress.add_task("", total=self.total, completed=self.start)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def tell(self, text: str) -> None:
        """A line that stays."""
        if self.instead is not None:
            return
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr)

    def update(self, iteration: int, terms: Mapping[str, float]) -> None:
        """Show how far it is, how fast, and the loss with its terms that are shown."""
        if self.instead is not None:
            self.instead(iteration, self.total)
            return
        speed = (iteration - self.start) / max(time.monotonic() - self.begun, 1e-9)
        text = " ".join(f"{TERMS[k]} {terms[k]:.2f}" for k in self.shown) + f" {speed:.1f} it/s"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=iteration, description=text)
        elif 10 * iteration // self.total > self.reported:
            self.reported = 10 * iteration // self.total
            left = (self.total - iteration) / speed
            print(f"iteration {iteration}/{self.total}: {text}, {left:.0f} s left", file=sys.stderr)


def _in_words(found: Mapping[str, Any]) -> str:
    """What an evaluation found, in a line."""
    if "not_evaluated" in found:
        return f"not evaluated, {found['not_evaluated']}"
    levels = ", ".join(f"mAP@{level} {value:.1f}" for level, value in found["map"].items())
    return f"{levels}, average {found['average']:.1f}, F1@0.5 {found['f1']:.1f}; {found['judged'][0]}"


def denoising_is_on(settings: TrainingRecipe, iteration: int) -> bool:
    """Whether L_D is part of the loss in an iteration, counted from 0."""
    return iteration >= settings.denoising_start and iteration % settings.denoising_every == 0


@contextmanager
def _convolutions_in(precision: str) -> Iterator[None]:
    """Whether convolutions may use TF32, which is a setting of the whole process."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0


def _check_settings(settings: TrainingRecipe) -> None:
    for name in ("iterations", "batch_size", "max_snippets", "denoising_every"):
        if getattr(settings, name) < 1:
            raise InputError(f"training.{name} is {getattr(settings, name)}; it must be at least 1")
    for name, low in (("learning_rate", "above 0"), ("weight_decay", "at least 0")):
        value = getattr(settings, name)
        if not math.isfinite(value) or value < 0 or (name == "learning_rate" and value == 0):
            raise InputError(f"training.{name} is {value}; it must be {low}")
    if not 0 <= settings.ema_decay < 1:
        raise InputError(f"training.ema_decay is {settings.ema_decay}; it must be at least 0 and below 1")


def _check_same(what: str, expected: tuple[object, ...], found: tuple[object, ...], where: str) -> None:
    if expected != found:
        first, second = (", ".join(map(str, x)) for x in (expected, found))
        raise InputError(f"{where} has the {what} {second}, expected {first}; use data of the same kind")


def _check_same_recipe(saved: Recipe, wanted: Recipe, path: Path) -> None:
    """What decides the weights must be the same; names, localization and the number of iterations may differ."""
    old, new = saved.to_dict(), wanted.to_dict()
    differences = [
        f"{section}.{key} was {old[section][key]} and is {new[section][key]}"
        for section in ("model", "loss", "training")
        for key in new[section]
        if old[section][key] != new[section][key] and (section, key) != ("training", "iterations")
    ]
    if differences:
        raise InputError(
            f"{path}: was trained with another recipe ({'; '.join(differences)}); "
            "resume with the same or choose another --out"
        )


def _check_writable(out: Path) -> None:
    """Find out before hours of training that nothing can be saved."""
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"d2net")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error


def _iteration_of(line: str) -> float:
    """Of a log line; infinite for one that an interruption cut."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _summary_writer(folder: Path, iteration: int, wanted: bool | None) -> Any:
    """A TensorBoard writer that hides events past ``iteration``, or None."""
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted:
            raise InputError("TensorBoard is not installed; run: pip install tensorboard") from error
        return None
    return SummaryWriter(str(folder), purge_step=iteration + 1)
