"""A transition that the table lacks is rejected with the actions that the job's state allows."""

from __future__ import annotations

import pytest

from catalog.errors import Conflict
from catalog.jobs import commands
from catalog.lifecycle.transitions import move
from catalog.states import Verb
from tests.catalog.world import World


@pytest.mark.parametrize(
    ("act", "remedy"),
    [
        (None, "Use an action that is allowed in this state: pause or cancel."),
        (commands.pause, "Use an action that is allowed in this state: resume or cancel."),
        (commands.cancel, "To train again, create a new job: a finished job can't be changed."),
    ],
)
def test_rejected_transition_names_the_allowed_actions(world: World, act: object, remedy: str) -> None:
    job = world.queued()
    if callable(act):
        act(world.db, **world.of(job.id))
    state = world.job(job.id).state

    with (
        pytest.raises(
            Conflict, match=f"'complete' is not allowed for job {job.id}, whose state is '{state}'"
        ) as refused,
        world.db.write() as session,
    ):
        move(session, world.job(job.id), Verb.COMPLETE, now=world.clock(), message="Done.")

    assert (refused.value.code, refused.value.remedy) == ("invalid_transition", remedy)
