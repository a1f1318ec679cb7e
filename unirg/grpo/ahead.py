"""One step ahead: a batch is sampled while the one before it is trained, so with the weights of one update earlier.

At the start of step b its reports are there, sampled with the weights before the last update. The sampler then gets the
weights as they stand, and samples batch b + 1 with them, in a thread, while the main thread learns from batch b. The
loss weighs each report by its ratio of probabilities, the policy's now to the sampler's then (`loss.correction`). Only
the first batch waits for its own sampling. What has been sampled and not trained yet goes into checkpoints, so that a
run that goes on does what it would have done.
"""

from concurrent.futures import Future
from typing import Any

from unirg import ranks
from unirg.errors import UserError
from unirg.grpo.rollouts import Group, Rollouts, begin_sampling, sample_groups, submit_all
from unirg.rollout import ApartSampler, Sample
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.job_thread import JobThread
from unirg.training import StageRun, Stopwatch

State = dict[str, Any]
"""JSON: the batch's number, and for each of its studies, over all ranks in the step's order, id and samples."""


class Ahead:
    """The batch that is under way."""

    def __init__(self, work: StageRun, sampler: ApartSampler, engine: ScoringEngine) -> None:
        self._work, self._sampler, self._engine = work, sampler, engine
        self._thread = JobThread("sampling ahead")
        self._future: Future[Rollouts] | None = None
        self._batch = -1
        self._taken: tuple[int, list[Group]] = (-1, [])
        self._restored: State | None = None

    def start(self, batch: int) -> None:
        """Has the batch sampled, with the weights that the sampler has now."""
        studies = self._work.mine(self._work.step_studies(batch))
        sample = begin_sampling(self._work, self._sampler.attempt, self._engine, studies, batch)
        self._batch, self._future = batch, self._thread.later(sample)

    def take(self, batch: int, watch: Stopwatch) -> Rollouts | None:
        """The batch, waited for, with what the sampler had left out; None where it was never started. All ranks call
        it. Raises UserError where sampling failed."""
        if self._restored is not None:
            rollouts = self._again(self._restored)
        elif self._batch == batch and self._future is not None:
            with self._work.together("sampling"), watch("sampling"):
                rollouts = self._future.result()
            self._fill(rollouts, batch, watch)
        else:
            return None
        self._taken = batch, rollouts[0]
        self._future = self._restored = None
        return rollouts

    def wait(self) -> None:
        """Returns when nothing is sampled: what else needs the tokenizer may go on."""
        if self._future is not None:
            self._future.exception()

    def state(self, step: int) -> State | None:
        """What a checkpoint after `step` steps needs: the next batch, which is waited for, or the one under way where
        its step is dropped. None where it was not sampled ahead, or failed, which the next `take` tells. All ranks call
        it."""
        batch = step // self._work.stage.iterations
        if self._restored is not None:
            return self._restored
        if batch == self._taken[0]:
            groups: list[Group] | None = self._taken[1]
        elif batch == self._batch and self._future is not None:
            groups = None if self._future.exception() else self._future.result()[0]
            groups = groups if groups is None or all(group.samples for group in groups) else None
        else:
            return None
        own = [[g.study.id, [[s.ids, s.logps, s.text, s.truncated] for s in g.samples]] for g in groups or ()]
        shares = ranks.everyones((groups is None, own))
        if any(failed for failed, _ in shares):
            return None
        world = len(shares)
        count = sum(len(share) for _, share in shares)
        return {"batch": batch, "groups": [shares[i % world][1][i // world] for i in range(count)]}

    def restore(self, state: State | None) -> None:
        """Goes on with what `state` gave, on any number of ranks."""
        self._restored = state

    def end(self) -> None:
        """Ends the thread, and the sampler where that is still at work: in torch's C++ code when the interpreter ends,
        the thread would abort the process."""
        if self._future is not None and not self._future.done():
            self._sampler.close()
        self._thread.end()

    def _fill(self, rollouts: Rollouts, batch: int, watch: Stopwatch) -> None:
        """Samples what was left out, with the weights as they stand."""
        groups, submitted = rollouts
        missing = [i for i, group in enumerate(groups) if not group.samples]
        if any(ranks.everyones(bool(missing))):
            wanted = [groups[i].study for i in missing]
            fresh, more = sample_groups(self._work, self._sampler, self._engine, wanted, watch, batch)
            for i, group in zip(missing, fresh, strict=True):
                groups[i] = group
            submitted += more

    def _again(self, state: State) -> Rollouts:
        """The groups of a checkpoint, scored anew. Raises UserError, on all ranks, where they are of other studies."""
        studies = self._work.step_studies(state["batch"])
        for study, (name, _) in zip(studies, state["groups"], strict=True):
            if name != study.id:
                raise UserError(
                    f"the checkpoint has reports of study {name} where the data have study {study.id} now; put the "
                    "data back as they were, or take another `output`"
                )
        studies, kept = self._work.mine(studies), self._work.mine(state["groups"])
        groups = [
            Group(study, prompt, [Sample(tuple(i), tuple(p), text, cut) for i, p, text, cut in samples])
            for study, prompt, (_, samples) in zip(studies, self._work.encode(studies), kept, strict=True)
        ]
        return groups, submit_all(self._engine, groups)
