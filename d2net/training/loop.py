"""The training loop, from top to bottom. The run is a :class:`d2net.training.Trainer`."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from d2net.checkpoint import save_checkpoint
from d2net.data.resident import ResidentFeatures
from d2net.recipes import TrainingRecipe
from d2net.training.bar import TrainingBar
from d2net.training.interruption import Stop
from d2net.training.process import convolutions_in
from d2net.training.terms import CHECK_EVERY, RecentTerms, shown_terms
from d2net.training.together import Decisions, in_parallel, same_weights
from d2net.training.watching import in_words
from d2net.training_log import TrainingLog

if TYPE_CHECKING:
    from d2net.training.trainer import Trainer

SAVE_EVERY, SAVE_SECONDS = 500, 30  # where nobody says how often: iterations, and the least time, between checkpoints
DIFFERENT_WEIGHTS = (
    "the weights of the ranks differ, as where their processors are of different kinds; the checkpoint has rank 0's"
)


def train(run: Trainer) -> None:
    """Train from ``run.iteration`` to the last iteration of the recipe; :meth:`Trainer.run` says what is raised."""
    began, iterations = run.iteration, run.recipe.training.iterations
    run.copies = None  # the weights may be others than at the last step
    ranks = run.ranks
    if ranks.size > 1:
        run.network = in_parallel(run.model, run.device)
    run.model.train()
    run.loss.train()
    recent = RecentTerms(run.model, run.iteration, run.recipe.training.learning_rate, run.device)
    graph, agreement = run.step_graph(), run.state.agreement
    saved_at = time.monotonic()
    decisions = Decisions(ranks, run.iteration)
    shown = run.progress if ranks.leads else (lambda *_: None)
    with (
        Stop() as stop,  # first, so that a signal after the last save is still caught
        run.own_threads(),
        run.state.generators(),
        convolutions_in(run.precision),
        TrainingLog(run.out, run.iteration, run.tensorboard, run.name()) if ranks.leads else nullcontext() as log,
        TrainingBar(run.iteration, iterations, shown, shown_terms(run.recipe.loss)) as bar,
    ):
        said: dict[str, Any] = {}  # what the log says beside the terms that were asked for

        def report() -> None:
            iteration = recent.asked
            if iteration is not None:
                terms = recent.means()
                if log is not None:
                    log.write(iteration, {**terms, **said})
                bar.update(iteration, terms)

        if run.resident is not None and ranks.size > 1:
            bar.tell(f"features: {run.resident.where}")
        while run.iteration < iterations:
            denoise = denoising_is_on(run.recipe.training, run.iteration)
            denoise = denoise and (agreement is None or agreement.began is not None)
            if run.resident is None:
                terms_now = run.update(run.sampler.next().to(run.device), denoise)
            elif isinstance(run.resident, ResidentFeatures):
                rows = run.resident.rows(run.sampler.windows(run.resident.lengths))
                terms_now = (graph or run.update_resident)(rows, denoise)
            else:
                terms_now = run.update(run.resident.next(run.sampler.windows(run.resident.lengths)), denoise)

            recent.add(run.iteration, terms_now)
            run.iteration += 1
            last = run.iteration == iterations
            evaluation = _due(run.iteration, run.eval_every)
            may_save = _due(run.iteration, SAVE_EVERY if run.save_every is None else run.save_every)
            save_now = may_save and (run.save_every is not None or time.monotonic() - saved_at >= SAVE_SECONDS)
            # stop.requested is read once, as a signal may come at any line
            at_once = last or evaluation or may_save
            asked, save_now = decisions.take(run.iteration, stop.requested, save_now, now=at_once)
            stopping = asked and not last
            save = stopping or last or save_now
            evaluation = evaluation and not asked
            # Not wherever a checkpoint or an evaluation is due, which must not decide when L_D begins.
            if agreement is not None and _due(run.iteration, CHECK_EVERY) and agreement.look(run.iteration):
                bar.tell(f"iteration {run.iteration}: L_D begins, as lambda' agrees with lambda")
            if save or evaluation or _due(run.iteration, CHECK_EVERY):
                report()  # of what was asked for ten iterations ago, so that a GPU does not wait for it
                recent.ask(run.iteration)
                said = {} if agreement is None else {"denoising": agreement.state()}
                if save or evaluation or recent.at_once:
                    report()
            if save or evaluation:
                recent.check_weights(run.iteration)
            if save:
                if ranks.size > 1 and not same_weights(run.model, ranks):
                    warnings.warn(DIFFERENT_WEIGHTS, stacklevel=4)
                if ranks.leads:
                    save_checkpoint(run.path, run.checkpoint())
                run.saved = True
                saved_at = time.monotonic()
                ranks.wait()  # so that all know that it is saved
            if evaluation:
                found = run.evaluate()
                if log is not None:
                    log.write(run.iteration, found)
                    bar.tell(f"iteration {run.iteration}: {in_words(found)}")
            if stopping:
                raise KeyboardInterrupt(f"stopped at iteration {run.iteration}; saved {run.path}")
    settings, loss = run.recipe.training, run.recipe.loss
    if (loss.alpha_snippet or loss.alpha_video) and not any(denoising_is_on(settings, i) for i in range(iterations)):
        warnings.warn(
            f"L_D was never on: it begins after iteration {settings.denoising_start}, of a training of {iterations}; "
            "lower training.denoising_start, or train longer",
            stacklevel=4,
        )
    elif agreement is not None and agreement.began in (None, iterations):
        warnings.warn(
            f"L_D was never on: at the last iteration lambda' agrees with lambda to {agreement.running.item():.3f}, "
            f"training.denoising_agreement is {agreement.needed:g}; lower that, or train longer",
            stacklevel=4,
        )
    run.interrupted = stop.requested
    run.trained = run.iteration - began


def denoising_is_on(settings: TrainingRecipe, iteration: int) -> bool:
    """Whether L_D is part of the loss in an iteration, as far as its number says (``denoising_agreement`` may not).

    Args:
        settings: Of the recipe.
        iteration: Counted from 0.
    """
    return iteration >= settings.denoising_start and iteration % settings.denoising_every == 0


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0
