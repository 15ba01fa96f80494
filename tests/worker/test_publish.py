"""What is published of what a trainer wrote, and what is not."""

from __future__ import annotations

import math

import pytest

from catalog import claims
from catalog.artifacts.manifest import DamagedArtifact
from tests.worker.pack_site import PackSite
from worker import publish


def test_a_folder_that_is_missing_is_never_stored_as_an_empty_artifact(site: PackSite) -> None:
    with pytest.raises(DamagedArtifact, match="missing"):
        site.store.put_folder(site.folder / "none", kind="checkpoint")


def test_a_loss_beyond_all_measure_still_has_a_perplexity(site: PackSite) -> None:
    claim = site.claim()
    claims.record_metrics(site.db, claim.claim_id, [{"kind": "valid", "step": 0, "loss": 1000.0}])

    evaluation = publish.evaluate(site.context, claim, kept_step=5)

    assert evaluation is not None
    assert evaluation["base_loss"] == 1000.0
    assert math.isfinite(evaluation["perplexity"])


def test_the_loss_on_record_is_that_of_the_weights_that_were_kept(site: PackSite) -> None:
    claim = site.claim()
    curve = [(0, 3.0), (5, 2.0), (10, 2.5)]
    points = [{"kind": "valid", "step": step, "loss": loss} for step, loss in curve]
    claims.record_metrics(site.db, claim.claim_id, points)

    for kept_step, loss in ((5, 2.0), (10, 2.5)):
        evaluation = publish.evaluate(site.context, claim, kept_step=kept_step)

        assert evaluation is not None
        assert (evaluation["base_loss"], evaluation["loss"], evaluation["step"]) == (3.0, loss, kept_step)
