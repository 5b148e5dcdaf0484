"""The engine "ray": a campaign on all machines of a Ray cluster, each with a pool of workers of its own.

Batches are the shards. Each has a seed of its own, and is drawn by the machine that judges it. Results come back to the
one process that keeps the store. The batches of a lost machine are given to others, without the cases that have a
result. So only the cases under way are lost. Machines that join get batches.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fuzz.campaign.devices import cores, default_jobs, gpus, seats
from fuzz.campaign.job import WorkerError
from fuzz.campaign.pool import Assignment, Ended, Event, Pool
from fuzz.campaign.worker import START_LIMIT
from fuzz.cases.strategies import PROFILES

LOOK_AROUND = 5.0  # seconds between two looks for machines that have joined
REPORT_EVERY = 0.5  # seconds for which a machine gathers results


@dataclass
class Report:
    """What a machine has to say."""

    events: list[Event]
    descriptions: list[dict]
    devices: list[str]
    compiling: int
    wants: bool
    idle: bool


class Machine:
    """The actor: one for each machine of the cluster."""

    def __init__(self, settings: dict, jobs: int | None, granted: int):
        found = gpus()
        fitting = default_jobs(found, PROFILES[settings["profile"]].gpu_memory, min(granted, cores()))
        place = f"{socket.gethostname()} {os.getpid()}"
        self.pool = Pool(seats=seats(found, jobs or fitting), place=place, **settings)

    def pid(self) -> int:
        return os.getpid()

    def advance(self, given: list[Assignment], retired: dict[str, str], stop: bool) -> Report:
        pool = self.pool
        for assignment in given:
            pool.give(assignment)
        for target, reason in retired.items():
            pool.retire(target, reason)
        if stop:
            pool.stop()
        events: list[Event] = []
        end = time.monotonic() + REPORT_EVERY
        while (left := end - time.monotonic()) > 0 and not (pool.idle and pool.descriptions):
            events += pool.advance(left)
        return Report(events, pool.descriptions, pool.devices, pool.compiling, pool.wants, pool.idle)

    def close(self) -> None:
        self.pool.close()


@dataclass
class Member:
    """A machine as the campaign sees it: what it is asked next, and what it said last."""

    actor: object
    answer: object = None  # the future of the call under way
    given: list[Assignment] = field(default_factory=list)  # to be handed over with the next call
    retired: dict[str, str] = field(default_factory=dict)
    batches: set[int] = field(default_factory=set)  # under way
    last: Report | None = None


class Cluster:
    """All machines, with the interface of a Pool. Joins the cluster that RAY_ADDRESS names, or starts a local one."""

    def __init__(self, settings: dict, jobs: int | None):
        self.settings, self.jobs = settings, jobs
        self.members: dict[str, Member] = {}  # by id of the node
        self.stopped = False
        self.gone: list[int] = []
        self.retired: dict[str, str] = {}
        self.looked_at = 0.0
        self.alone_since = time.monotonic()
        self.began = not ray.is_initialized()
        if self.began:
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        self._look_around()

    def _look_around(self) -> None:
        self.looked_at = time.monotonic()
        for node in ray.nodes():
            id, resources = node["NodeID"], node["Resources"]
            if not node["Alive"] or id in self.members or not resources.get("CPU"):
                continue
            options = {
                "num_cpus": resources["CPU"],
                "num_gpus": resources.get("GPU", 0),
                "scheduling_strategy": NodeAffinitySchedulingStrategy(id, soft=False),
            }
            actor = ray.remote(Machine).options(**options).remote(self.settings, self.jobs, int(resources["CPU"]))
            self.members[id] = Member(actor, retired=dict(self.retired))
            self._ask(self.members[id])

    def _ask(self, member: Member) -> None:
        member.answer = member.actor.advance.remote(member.given, member.retired, self.stopped)
        member.given, member.retired = [], {}

    @property
    def descriptions(self) -> list[dict]:
        return next(
            (each.last.descriptions for each in self.members.values() if each.last and each.last.descriptions), []
        )

    @property
    def devices(self) -> list[str]:
        return sorted({device for each in self.members.values() if each.last for device in each.last.devices})

    @property
    def compiling(self) -> int:
        return sum(each.last.compiling for each in self.members.values() if each.last)

    @property
    def wants(self) -> bool:
        return self._hungry() is not None

    @property
    def idle(self) -> bool:
        return all(each.last is not None and each.last.idle and not each.given for each in self.members.values())

    def _hungry(self) -> Member | None:
        hungry = [each for each in self.members.values() if each.last and each.last.wants and not each.given]
        return min(hungry, key=lambda each: len(each.batches), default=None)

    def give(self, assignment: Assignment) -> None:
        member = self._hungry()
        member.given.append(assignment)
        member.batches.add(assignment.batch)
        member.last.wants = member.last.idle = False  # until it reports again

    def retire(self, target: str, reason: str) -> None:
        self.retired[target] = reason
        for member in self.members.values():
            member.retired[target] = reason

    def stop(self) -> None:
        self.stopped = True
        for member in self.members.values():
            member.given.clear()

    def lost(self) -> list[int]:
        """Batches whose machine was lost, which have to be given again."""
        batches, self.gone = self.gone, []
        return batches

    def advance(self, timeout: float) -> list[Event]:
        """What the machines report by now, after waiting for `timeout` seconds at most."""
        if time.monotonic() - self.looked_at > LOOK_AROUND:
            self._look_around()
        answers = [member.answer for member in self.members.values()]
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=timeout) if answers else ([], [])
        if not answers:
            time.sleep(timeout)
        events: list[Event] = []
        for id, member in list(self.members.items()):
            if member.answer not in ready:
                continue
            try:
                member.last = ray.get(member.answer)
            except ray.exceptions.RayTaskError as error:  # raised by the machine's own code, as a pool would raise it
                if isinstance(error.cause, WorkerError):
                    raise error.cause from error
                raise
            except RayError:
                self.gone += member.batches
                del self.members[id]
                continue
            for event in member.last.events:
                if isinstance(event, Ended):
                    member.batches.discard(event.batch)
            events += member.last.events
            self._ask(member)
        if self.members:
            self.alone_since = time.monotonic()
        elif time.monotonic() - self.alone_since > START_LIMIT:
            raise WorkerError(f"--engine ray: expected a machine in the Ray cluster, got none for {START_LIMIT:g} s")
        return events

    def close(self) -> None:
        for member in self.members.values():
            member.actor.close.remote()
            ray.kill(member.actor)
        if self.began:
            ray.shutdown()
