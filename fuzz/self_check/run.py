"""The self-check: which planted defects the harness finds, and how often it is wrong about correct targets.

Every planted defect is a target, judged on the cases and properties of a campaign until a check that should find it
fails. A JSON file keeps every result at once, so an interrupted self-check can be resumed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from fuzz.campaign import findings
from fuzz.campaign.job import FATAL, Job
from fuzz.campaign.pool import PROPERTIES_A_CASE
from fuzz.campaign.smallest_case import in_worker, shrink
from fuzz.campaign.worker import Worker, judge_job, wait_until_ready
from fuzz.cases.case import Case
from fuzz.cases.drawing import all_cases
from fuzz.cases.families import PUBLISHED
from fuzz.cases.plain import PLAIN
from fuzz.defects.catalogue import CATALOGUE, spec
from fuzz.defects.defect import Defect
from fuzz.defects.device import DEVICE, build
from fuzz.defects.noise import EXPONENTS, NOISE, name
from fuzz.judging.checks import CHECKS
from fuzz.processes import interrupts
from fuzz.self_check.record import Alarms, Hunt, Record, SelfCheckError, load, save, sources
from fuzz.targets.registry import default_device

MOST_CASES = 500  # within which every defect has to be found
TIME_LIMIT = 60.0  # seconds for one target on one case
SHRINK_LIMIT = 20.0  # seconds for one defect
MOST_FATAL = 5  # cases on which a defect may hang or end its process, until it is given up
TICK = 0.2  # seconds between two looks at everything
ALARM_CASES = 100  # judged between two notes of how far it is

RIGHT = {"cpu": ("model", "fla.naive"), "gpu": ("flash_kda", "fla.chunk", "fla.recurrent")}
"""By profile, targets that are correct: those of the false alarms."""

NOISE_FAMILIES: dict[str, dict[str, str]] = {"all": {}, **PUBLISHED}
"""Of the smallest noise: the cases as they are drawn, and with the families of each published input."""


@dataclass(frozen=True)
class SelfCheckPlan:
    """What a self-check is asked to do.

    defects: names; empty means all.
    seeds: number of seeds, from 0 on.
    cases: greatest number of cases for each defect and seed.
    device: whether defects of device code are planted instead of those on a CPU. They need a Hopper GPU and a compiler.
    noise: whether the smallest error that is seen is searched for.
    alarms: number of cases on which each correct target is judged.
    """

    out: Path
    defects: tuple[str, ...] = ()
    seeds: int = 5
    cases: int = MOST_CASES
    jobs: int = 1
    device: bool = False
    noise: bool = False
    alarms: int = 0

    @property
    def profile(self) -> str:
        return "gpu" if self.device else "cpu"

    @property
    def catalogue(self) -> dict[str, Defect]:
        return DEVICE if self.device else CATALOGUE

    @property
    def names(self) -> tuple[str, ...]:
        return self.defects or tuple(self.catalogue)


@dataclass
class SelfCheckProgress:
    """A self-check as it stands."""

    plan: SelfCheckPlan
    record: Record
    steps: int = 0  # of all there is to do: a defect and a seed, a defect to shrink, a family, 100 cases
    done: int = 0
    resumed: int = 0  # of those done, how many an earlier run did
    doing: str = ""
    interrupted: bool = False


def begin(plan: SelfCheckPlan) -> Record:
    """The record of an earlier run with the same sources and cases, or a new one.

    Raises SelfCheckError when the file holds one of others: it may have taken an hour.
    """
    now = sources(plan.device)
    if plan.out.exists():
        record = load(plan.out)
        if (record.sources, record.profile, record.cases) != (now, plan.profile, plan.cases):
            raise SelfCheckError(
                f"--out: expected results of these sources and --cases {plan.cases}, got {plan.out} with other sources "
                f"or --cases {record.cases}; name another file, or remove this one"
            )
        return record
    return Record(now, plan.profile, plan.cases, findings.environment((default_device(),)))


# ----------------------------------------------------------------------------------------------------------- what to do


def expect_defects(names: Sequence[str], device: bool) -> None:
    """Raises SelfCheckError where a defect is not in the catalogue, or cannot be planted on this machine."""
    catalogue = DEVICE if device else CATALOGUE
    for each in names:
        if each not in catalogue:
            raise SelfCheckError(f"--defect: expected one of {', '.join(catalogue)}, got {each}")
    if device and default_device() != "cuda":
        raise SelfCheckError("--device: expected a GPU, and PyTorch sees none")


def run_self_check(
    plan: SelfCheckPlan, show: Callable[[SelfCheckProgress], None] = lambda progress: None
) -> SelfCheckProgress:
    """Does what of the plan is not yet done, until the end or SIGINT or SIGTERM.

    Raises SelfCheckError or WorkerError when it cannot be run, OSError when the disk gives up.
    """
    expect_defects(plan.defects, plan.device)
    progress = SelfCheckProgress(plan, begin(plan))
    stop = threading.Event()
    with interrupts(stop):
        Runner(progress, stop, show).run()
    progress.interrupted = stop.is_set()
    show(progress)
    return progress


@dataclass
class Runner:
    """Threads that each drive a worker, and the lock under which they note what they found."""

    progress: SelfCheckProgress
    stop: threading.Event
    show: Callable[[SelfCheckProgress], None]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        plan, record = self.progress.plan, self.progress.record
        hunting = [
            (todo, seed)
            for seed in range(plan.seeds)
            for todo in split([each for each in plan.names if seed not in record.hunts.get(each, {})], self.shares())
        ]
        shrinking = [each for each in plan.names if each not in record.shrunk]
        families = [each for each in NOISE_FAMILIES if plan.noise and each not in record.noise]
        right = RIGHT[plan.profile] if plan.alarms else ()
        alarms = {each: plan.alarms - record.alarms.get(each, Alarms(each)).cases for each in right}
        self.progress.resumed = self.progress.done = plan.seeds * len(plan.names) - sum(
            len(todo) for todo, _ in hunting
        )
        self.progress.steps = plan.seeds * len(plan.names) + len(shrinking) + len(families)
        self.progress.steps += sum(-(-max(0, cases) // ALARM_CASES) for cases in alarms.values())
        self.together([lambda todo=todo, seed=seed: self.hunt(todo, seed) for todo, seed in hunting])
        self.together([lambda each=each: self.shrink(each) for each in shrinking])
        self.together([lambda each=each: self.smallest_noise(each) for each in families])
        self.together([lambda each=each: self.false_alarms(each) for each, cases in alarms.items() if cases > 0])

    def shares(self) -> int:
        """Into how many parts the defects of a seed go: so many that no worker is left without one, and in device code
        each is one, because a process loads one library.
        """
        plan = self.progress.plan
        return len(plan.names) if plan.device else -(-plan.jobs // plan.seeds)

    def together(self, tasks: list[Callable[[], None]]) -> None:
        with ThreadPoolExecutor(self.progress.plan.jobs) as threads:
            waiting: set[Future] = {threads.submit(task) for task in tasks}
            try:
                while waiting:
                    done, waiting = wait(waiting, TICK, FIRST_COMPLETED)
                    self.show(self.progress)
                    for future in done:
                        future.result()
            except BaseException:
                self.stop.set()
                raise

    def note(self, doing: str, put: Callable[[Record], None], steps: int = 1) -> None:
        with self.lock:
            put(self.progress.record)
            self.progress.doing = doing
            self.progress.done += steps
            save(self.progress.plan.out, self.progress.record)

    # ------------------------------------------------------------------------------------------------------- the parts

    def hunt(self, todo: Sequence[str], seed: int) -> None:
        def found(hunt: Hunt) -> None:
            self.note(
                f"{hunt.defect}, seed {seed}",
                lambda record: record.hunts.setdefault(hunt.defect, {}).update({seed: hunt}),
            )

        plan = self.progress.plan
        defects = [plan.catalogue[each] for each in todo]
        if plan.device:
            for defect in defects:
                build(defect.make.patches)  # here, where it may take its time
        drawn = islice(all_cases(plan.profile, seed), plan.cases)
        track(defects, drawn, seed, PROPERTIES_A_CASE, self.stop, found)

    def shrink(self, defect: str) -> None:
        """The smallest case on which a check fails that should, from the first one that was found."""
        hunts = self.progress.record.hunts.get(defect, {})
        hunt = next((hunts[seed] for seed in sorted(hunts) if hunts[seed].right), None)
        if hunt is None or self.stop.is_set():
            return
        case = Case.from_dict(hunt.case)
        with closing(Worker((spec(defect),), time_limit=TIME_LIMIT, threads=1)) as worker:
            wait_until_ready(worker, self.stop.is_set)
            properties = tuple(check for check in hunt.right_by if check in CHECKS)
            results = judge_job(worker, Job(case, worker.targets, properties), self.stop.is_set)
            failed = [each for result in results or () for each in findings.failures(result)]
            failure = next((each for each in failed if each.check["name"] in hunt.right_by), None)
            finished = False
            if failure is not None:
                result = shrink(
                    failure, in_worker(worker, failure, self.stop.is_set), seconds=SHRINK_LIMIT, stop=self.stop.is_set
                )
                failure, finished = result.failure, result.finished
        if not self.stop.is_set():
            case, check = (failure.case, failure.check["name"]) if failure else (case, hunt.right_by[0])
            size = {"tokens": case.tokens, "heads": case.heads, "sequences": case.n_seqs}
            fields, plain = case.to_dict(), PLAIN.to_dict()
            differs = {name: value for name, value in fields.items() if value != plain[name]}
            entry = {**size, "check": check, "finished": finished, "case": differs}
            self.note(f"shrinking {defect}", lambda record: record.shrunk.update({defect: entry}))

    def smallest_noise(self, family: str) -> None:
        hunts: dict[str, Hunt] = {}
        drawn = islice(all_cases(self.progress.plan.profile, 0), self.progress.plan.cases)
        drawn = (replace(case, **NOISE_FAMILIES[family]) for case in drawn)
        track(list(NOISE.values()), drawn, 0, 0, self.stop, lambda hunt: hunts.update({hunt.defect: hunt}))
        if not self.stop.is_set():
            self.note(f"noise, {family}", lambda record: record.noise.update({family: hunts}))

    def false_alarms(self, target: str) -> None:
        plan = self.progress.plan
        alarms = replace(self.progress.record.alarms.get(target, Alarms(target)))
        drawn = islice(all_cases(plan.profile, 0), alarms.cases, plan.alarms)
        with closing(Worker((target,), time_limit=TIME_LIMIT, threads=1)) as worker:
            wait_until_ready(worker, self.stop.is_set)
            for case in drawn:
                results = (
                    None
                    if self.stop.is_set()
                    else judge_job(
                        worker, Job(case, (worker.descriptions[0]["name"],), PROPERTIES_A_CASE), self.stop.is_set
                    )
                )
                if results is None:
                    break
                for result in results:
                    alarms.skipped += result.outcome == "skipped"
                    alarms.judged += result.outcome != "skipped"
                    if result.outcome == "failed":
                        alarms.failures.append({"case": case.to_dict(), "checks": result.failed_checks})
                if alarms.cases % ALARM_CASES == 0:
                    now = replace(alarms, failures=list(alarms.failures))
                    self.note(
                        f"{target}: {alarms.cases} cases", lambda record, now=now: record.alarms.update({target: now})
                    )
        self.note(f"{target}: {alarms.cases} cases", lambda record: record.alarms.update({target: alarms}), 0)


def track(
    defects: Sequence[Defect],
    drawn: Iterator[Case],
    seed: int,
    properties: int,
    stop: threading.Event,
    found: Callable[[Hunt], None],
) -> None:
    """Judges the defects on one case after another, each until a check that should find it fails, or to the end.

    One that costs a process time and again is given up: of those that hang, each case would take the time limit.
    """
    hunts = {spec(each.name): Hunt(each.name, seed) for each in defects}
    expected = {spec(each.name): each.expected for each in defects}
    fatal: Counter[str] = Counter()
    with closing(Worker(tuple(hunts), time_limit=TIME_LIMIT, threads=1)) as worker:
        wait_until_ready(worker, stop.is_set)
        for case in drawn:
            if not hunts:
                return
            results = None if stop.is_set() else judge_job(worker, Job(case, tuple(hunts), properties), stop.is_set)
            if results is None:
                return
            for result in results:
                hunts[result.target].take(result, expected[result.target])
                fatal[result.target] += any(check["name"] in FATAL for check in result.failed_checks)
                if hunts[result.target].right is not None or fatal[result.target] == MOST_FATAL:
                    found(hunts.pop(result.target))
    for hunt in hunts.values():
        found(hunt)


def split(names: Sequence[str], parts: int) -> list[list[str]]:
    return [part for part in (list(names[index::parts]) for index in range(parts)) if part]


def smallest(record: Record, family: str, where: str) -> tuple[int, int] | None:
    """The exponent of the smallest noise found, all larger ones having been found too, and after how many cases."""
    found = None
    for exponent in EXPONENTS:
        hunt = record.noise[family][name(where, exponent)]
        if hunt.right is None:
            break
        found = exponent, hunt.right
    return found
