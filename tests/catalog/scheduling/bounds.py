"""Bounds that the scheduling rules promise: on waiting, and on the loss of a project to the classes of others.

docs/internals/scheduling-bounds.md states them for users. The service itself never computes them.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from catalog.scheduling.snapshot import USUAL, Policy
from catalog.states import PriorityClass


def most_before(priority: int, policy: Policy = USUAL) -> tuple[float, int]:
    """Return the bound on the waiting of a class within a project: (seconds, jobs).

    Consider a class that was not served for these seconds by any worker that can hold its first job. On such a worker
    at most these jobs of the project then go before that job: one of each other class. When the project itself is
    served depends on its share; see `longest_wait`.
    """
    return (priority + 1) * policy.priority_aging_seconds, len(PriorityClass) - 1


def longest_wait(
    level: float,
    *,
    of_others: Collection[float],
    longest_job: float,
    num_devices: int,
    policy: Policy,
    jobs_per_device: int = 1,
) -> float:
    """Return the maximum seconds that a project waits while all devices train jobs of other projects, of any class.

    `level`: of the project at the start. `of_others`: weights of the projects that wait or train. `longest_job`: in
    device-seconds. When a job of another project starts, the level of that project is at most this project's level plus
    `max_usage_lead`. At the end, all n other projects have therefore used at most
    W · (level + max_usage_lead) + n · D · j · longest_job, decayed as the level is. W is the sum of their weights, D
    the number of devices, j the jobs per device, and h the half-life. They have used at least what the devices
    provided, D · h / ln 2 · (1 - 2^(-t/h)). Both together give t. Infinite if jobs are about as long as the half-life.
    """
    full = num_devices * policy.half_life_seconds / math.log(2)
    spare = full - len(of_others) * num_devices * jobs_per_device * longest_job
    if spare <= 0:
        return math.inf
    entitled = sum(of_others) * (level + max_usage_lead(policy))
    return policy.half_life_seconds * math.log2((full + entitled) / spare)


def largest_loss(
    weight: float,
    *,
    of_others: Collection[float],
    longest_job: float,
    num_devices: int,
    seconds: float,
    policy: Policy,
    jobs_per_device: int = 1,
) -> float:
    """Return the maximum device-seconds by which a project that always has queued jobs stays below its fair share.

    The window starts at equal levels and lasts `seconds`; all devices are busy; every job fits every device. The bound
    holds for all classes, numbers and times of jobs of the other projects, if the project itself submits no `urgent`
    job. At any time another project of weight w has a decayed usage of at most
    w · (own level + max_usage_lead + advance · D / own weight) + D · j · longest_job: its last job started below that
    level, and the jobs that train then run to their end. D is the number of devices, j the jobs per device. The last
    factor converts the decayed sum into the plain sum.
    """
    held = num_devices * policy.advance_seconds / weight
    running = len(of_others) * num_devices * jobs_per_device * longest_job
    excess = sum(of_others) * (max_usage_lead(policy) + held) + running
    undecayed = 1 + seconds * math.log(2) / policy.half_life_seconds
    return weight / (weight + sum(of_others)) * excess * undecayed


def max_usage_lead(policy: Policy) -> float:
    """Return the maximum by which a project's level may exceed another's while its jobs are still first by class."""
    return policy.handicap(max(PriorityClass)) - policy.handicap(min(PriorityClass))
