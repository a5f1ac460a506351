"""A training run: its settings, its state, and how it is resumed. The loop is in ``loop.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from d2net import __version__
from d2net.checkpoint import CHECKPOINT_NAME, Checkpoint, Precision, Seed
from d2net.data.batches import Batch
from d2net.data.dataset import Dataset
from d2net.data.keeping import SAME_DATA, keep_features, room_on
from d2net.data.kept import KeptFeatures
from d2net.data.resident import ResidentFeatures
from d2net.distributed import ALONE, RankEnded, Ranks, lost_ranks
from d2net.errors import InputError
from d2net.fields import checked
from d2net.files import check_writable, identity, locked
from d2net.ops.network_call import NetworkCopies
from d2net.recipes import Recipe
from d2net.training.loop import train
from d2net.training.process import threads_of_run
from d2net.training.resume import check_same, digests, hashed, restored, run_name, save_settings
from d2net.training.state import TrainingState
from d2net.training.step_graph import WARM_UP, WARM_UP_TOGETHER, StepGraph
from d2net.training.terms import TERMS
from d2net.training.together import Streams
from d2net.training.watching import evaluate_network
from d2net.words import quoted

PRECISIONS = get_args(Precision)


class Trainer:
    """Trains a network with a recipe; writes ``checkpoint.safetensors``, ``log.jsonl`` and TensorBoard events.

    The log (:mod:`d2net.training_log`) has the loss and its terms every 10 iterations, as means over the iterations
    since the previous line. The terms are logged before their weights: total = discriminative + loss.alpha_snippet *
    snippet + loss.alpha_video * video + loss.um_weight * uncertainty. A term is 0 in an iteration in which it is off.
    With ``training.denoising_agreement`` a line has "denoising" too: the agreement, and when L_D began.

    On a CPU, small networks are trained in fewer threads than PyTorch would use; call :meth:`run` within ``with
    d2net.threads.threads(n):`` to set the number.

    Args:
        dataset: The recordings to train on (one subset); only their features and labels are read.
        recipe: All settings.
        out: Folder for the results; made where missing.
        seed: Of the weights, the batches, the pairing and the dropout. None: that of the run that is resumed, else 0.
        device: Where to train.
        precision: Of the network. "fp32"; "tf32": convolutions round their inputs to 10 bits of mantissa (GPUs only);
            "bf16": layers compute in bfloat16; weights, class activations and loss are float32. None: that of the run
            that is resumed, else tf32 on a GPU, which is PyTorch's default there, and fp32 elsewhere.
        resident: Keep all features on the device, in bfloat16 where the network computes in it. None: on a GPU, where
            they take up to a quarter of its free memory; where they take more, several processes share them among their
            devices, or map them from a file (:func:`d2net.data.keeping.keep_features`).
        graph: Replay the step as a CUDA graph, which needs all features on the device. None: where possible.
        eval_every: Iterations between evaluations on ``evaluation_dataset``; 0 for none.
        evaluation_dataset: Recordings with segments, of the same classes and stream widths.
        save_every: Iterations between checkpoints; 0 for one at the end only. None: 500, and at least 30 seconds, as
            saving would else take most of a fast training's time.
        tensorboard: Write events for TensorBoard; None: where it is installed.
        overwrite: Start anew although ``out`` holds a checkpoint.
        progress: Called with (iterations done, all iterations) now and then; None: a bar on stderr.
        ranks: The processes that train it together, each of which has such a Trainer (:mod:`d2net.distributed`). Rank 0
            writes all files. The result is that of one process, to rounding.

    Attributes:
        copies: In bf16 on a GPU, the weights in bfloat16. Set it to None after changing weights between two updates.
        interrupted: After :meth:`run`: whether a signal came in the last iteration, too late to stop anything.
        trained: After it: the iterations it trained; 0 where the resumed run was at its end already.
        saved: After it: whether it wrote a checkpoint.

    Raises:
        InputError: settings that do not go together, unlabelled recordings, class names that a checkpoint cannot hold,
            or a folder that cannot be written.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        *,
        out: Path,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        precision: str | None = None,
        resident: bool | None = None,
        graph: bool | None = None,
        eval_every: int = 0,
        evaluation_dataset: Dataset | None = None,
        save_every: int | None = None,
        tensorboard: bool | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if eval_every and evaluation_dataset is None:
            raise InputError("eval_every is set without a dataset to evaluate on; give one or set it to 0")
        if evaluation_dataset is not None:
            check_same("classes", dataset.classes, evaluation_dataset.classes, "the dataset to evaluate on")
            check_same("widths", dataset.stream_widths, evaluation_dataset.stream_widths, "the dataset to evaluate on")
            if eval_every and len(evaluation_dataset.annotations()) == 0:
                raise InputError(
                    f"dataset '{evaluation_dataset.name}', {', '.join(evaluation_dataset.subsets)}: has no segment to "
                    "compare with every so many iterations; choose an annotated subset, or leave --eval-every out"
                )
        self.dataset = dataset
        self.recipe = recipe
        self.out = Path(out)
        self.path = self.out / CHECKPOINT_NAME
        self.asked = (seed, precision)  # None: that of the run that is resumed
        self.seed = checked(0 if seed is None else seed, Seed, "seed")
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.precisions = PRECISIONS if on_gpu else ("fp32", "bf16")
        if precision is not None and precision not in self.precisions:
            known = ", ".join(self.precisions)
            raise InputError(f"precision {quoted(precision)} on {self.device}: expected one of {known}")
        self.precision: Any = precision or ("tf32" if on_gpu else "fp32")
        if graph and (resident is False or not on_gpu):
            raise InputError("a CUDA graph needs a GPU and resident features; leave graph=True (--graph) out")
        self.graph = graph
        self.eval_every = eval_every
        self.evaluation_dataset = evaluation_dataset
        self.save_every = save_every
        self.tensorboard = tensorboard
        self.overwrite = overwrite
        self.progress, self.ranks = progress, ranks

        if ranks.leads:
            check_writable(self.out)
        self.state = TrainingState(dataset, recipe, self.seed, self.device, ranks)
        self.sampler, self.loss = self.state.sampler, self.state.loss
        self.model, self.result = self.state.model, self.state.result
        if ranks.size > self.sampler.batch_size:
            ranks.refuse(
                f"{ranks.size} processes are more than the {self.sampler.batch_size} recordings of a batch; start "
                "fewer" + (", or raise training.batch_size" if self.sampler.batch_size < len(dataset) else "")
            )
        self.network: nn.Module = Streams(self.model)  # of several ranks: see in_parallel
        self.resident: KeptFeatures | None = None
        if resident or (resident is None and on_gpu):
            self.resident = keep_features(
                dataset,
                self.device,
                batch_size=self.sampler.batch_size,
                max_snippets=recipe.training.max_snippets,
                layout=self.model,
                dtype=self.resident_dtype(),
                budget=math.inf if resident else room_on(self.device, ranks),
                graph=bool(graph),
                ranks=ranks,
            )
        self.iteration = self.trained = 0
        self.interrupted = self.saved = False
        self.copies: NetworkCopies | None = None
        self.threads_before = 0  # threads of the run that is resumed
        self.checkpoint()  # raises now, not at the first save, for what a checkpoint cannot hold

    def run(self, resume: bool = False) -> Path:
        """Train to ``recipe.training.iterations`` and return the path of the checkpoint.

        On Ctrl-C or SIGTERM the iteration is finished and a checkpoint saved; a second signal stops at once. In the
        last iteration they change nothing: see ``interrupted``. No other d2net can write to ``out`` meanwhile.

        Args:
            resume: Continue the run in ``out``. On a CPU the result has the same bits as without the interruption: the
                run uses the same number of threads, and a warning says where it cannot. Recordings, seed, precision and
                the settings of model, loss and training must be those of the run, except ``training.iterations``. The
                other settings may differ; the checkpoint gets the new ones, also where no iteration is left. A warning
                names what an older checkpoint does not record.

        Raises:
            InputError: bad features, nothing to resume, a checkpoint in the way, one that is damaged, incomplete or of
                another run, a full disk, or another d2net writing to ``out``.
            D2NetError: the loss or the weights became NaN or Inf: the last checkpoint is from before that.
            RankEnded: another of several ranks has ended.
            KeyboardInterrupt: after saving; or at once, with a message where an earlier checkpoint was saved.
        """
        earlier = None if resume else identity(self.path)
        try:
            with locked(self.out) if self.ranks.leads else nullcontext(), lost_ranks():
                return self._run(resume)
        except RankEnded as error:
            kept = "nothing was saved yet"
            if self.saved or resume:
                kept = f"what was saved last is {self.path}; the same command with --resume goes on from there"
            raise RankEnded(f"{error}; {kept}") from error
        except KeyboardInterrupt as error:
            if str(error) or identity(self.path) == earlier:
                raise
            raise KeyboardInterrupt(f"stopped at once; what was saved last is {self.path}") from error

    def _run(self, resume: bool) -> Path:
        self._check_ranks(resume)
        saved = restored(self) if resume else None
        if saved is None and self.path.exists() and not self.overwrite:
            raise InputError(
                f"{self.path}: a checkpoint is there already; continue it with --resume or choose another --out"
            )
        if self.iteration < self.recipe.training.iterations:
            train(self)
        elif saved is not None:
            save_settings(self, saved)
        return self.path

    def _check_ranks(self, resume: bool) -> None:
        """Raises where the ranks would not train the same."""
        same, recordings = self.ranks.check_same, hashed(repr(digests(self.dataset).tolist()))
        same("recordings of hash", recordings, SAME_DATA)
        data = self.dataset
        same(
            "classes and streams", f"{', '.join(data.classes)}; {data.stream_widths}", "give all machines the same data"
        )
        if self.ranks.size > 1 and len(data):
            first = hashed(repr(data.features(0).tobytes()))
            same(f"features of '{data.recordings[0].name}' of hash", first, "give all machines the same data")
        judged = None if self.evaluation_dataset is None else self.evaluation_dataset.fingerprint()
        settings = self.recipe.to_dict(), self.asked, self.precision, self.eval_every, judged, self.save_every, resume
        same("settings of hash", hashed(repr(settings)), "give all processes the same command")

    def update(self, batch: Batch, denoise: bool) -> Tensor:
        """One step of the optimizer; returns the loss and its terms, (len(TERMS),) on the device.

        Args:
            batch: On the device.
            denoise: Whether L_D is on.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.network(batch.parts, batch.mask, self._copies(), batch.numbers)
        where: dict[str, Any] = {"offsets": batch.offsets, "max_length": batch.max_length, "whole": batch.whole}
        loss = self.loss(
            output.tcam,
            output.embeddings,
            batch.lengths,
            batch.labels,
            generator=self.state.pairing,
            logits=output.logits if self.loss.recipe.um_weight != 0 else None,
            denoise=denoise,
            **where,
        )
        if self.state.agreement is not None:
            x_ref = self.loss.reference
            self.state.agreement.add(output.tcam, output.embeddings, batch.lengths, batch.labels, x_ref, **where)
        self.state.optimizer.zero_grad()
        with torch.autograd.set_multithreading_enabled(False):  # waking autograd's thread for a GPU takes some 0.2 ms
            # Of several ranks each gets the mean of the gradients, and the whole batch's is their sum.
            (loss.total if self.ranks.size == 1 else loss.total * self.ranks.size).backward()
        self.state.optimizer.step()
        self.state.average()
        return torch.stack([getattr(loss, term).detach() for term in TERMS])

    def _copies(self) -> NetworkCopies | None:
        """The weights in bfloat16, which the optimizer writes: on a GPU, where casts of them would take long."""
        if self.copies is None and self.precision == "bf16" and self.device.type == "cuda":
            self.copies, of_parameters = self.model.copies(torch.bfloat16)
            self.state.optimizer.keep(of_parameters)
        return self.copies

    def update_resident(self, rows: Tensor, denoise: bool) -> Tensor:
        """:meth:`update` with a batch of features that are all on this device."""
        assert isinstance(self.resident, ResidentFeatures)
        return self.update(self.resident.gather(rows.to(self.device, non_blocking=True)), denoise)

    def resident_dtype(self) -> torch.dtype:
        """The network rounds its input to bfloat16 anyway; not before it has standardized it, though."""
        standardized = self.model.feature_mean is not None
        return torch.bfloat16 if self.precision == "bf16" and not standardized else torch.float32

    def step_graph(self) -> StepGraph | None:
        """:meth:`update_resident` as a CUDA graph; None where that is not wanted or not possible."""
        together = self.ranks.size > 1
        if not isinstance(self.resident, ResidentFeatures) or self.device.type != "cuda" or self.graph is False:
            return None
        if together and not self.ranks.nccl:
            return None  # gloo waits for the device
        warm_up = WARM_UP_TOGETHER if together else WARM_UP
        required = bool(self.graph)
        return StepGraph(self.update_resident, self.device, [self.state.pairing], required=required, warm_up=warm_up)

    def evaluate(self) -> dict[str, Any]:
        """mAP and F1 on the evaluation dataset, or why it could not be evaluated; on rank 0."""
        assert self.evaluation_dataset is not None
        return evaluate_network(self.result, self.evaluation_dataset, self.recipe, self.ranks)

    def checkpoint(self) -> Checkpoint:
        """The current state of the run."""
        return Checkpoint(
            recipe=self.recipe,
            classes=self.dataset.classes,
            stream_widths=self.dataset.stream_widths,
            iteration=self.iteration,
            dataset=self.dataset.name,
            seed=self.seed,
            version=__version__,
            tensors=self.state.tensors(),
            threads=torch.get_num_threads() if self.device.type == "cpu" else 0,
            ranks=self.ranks.size,
            precision=self.precision,
            extraction=self.dataset.extraction,
        )

    def name(self) -> str:
        """A name that identifies the run: the same when it is resumed."""
        return run_name(self.recipe, self.seed, self.precision, digests(self.dataset))

    def own_threads(self) -> AbstractContextManager[None]:
        """Sets the number of threads that the run computes in."""
        if self.device.type != "cpu":
            return nullcontext()
        return threads_of_run(self.model, self.sampler.usual_rows, self.threads_before, self.path)
