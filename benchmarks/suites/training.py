"""Students trained side by side, one for each way to compute the loss: the time of a step, and one loss curve.

Models and data are those of ``examples``. A round is one step of every student, all from the same weights on the same
batches. The first loss of each is held against the reference in fp64, its curve against the eager student's; one
student learns from labels alone, to show what the teacher is worth. A case of 10 classes is that of the digits; every
other one is of the language models, in sequences of 128 tokens.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kdkernels as kd
from benchmarks import eager
from benchmarks.model import Absent, Candidate, Candidates, Case, Outcome, Run, Suite
from benchmarks.suites import common
from examples import distill_digits, language_model
from kdkernels.cache import TeacherCache, TeacherCacheWriter, TeacherDataset

DIGITS, MODELS, SPARSE = "digits", "language models", "language models, top 64"
K = 64
BATCHES = 16  # the students see them again and again
TEACHER_STEPS, QUICK_TEACHER_STEPS = 280, 20
TEACHERS = Path("out")
# Of the relative difference of two curves. Rounding alone gives 1e-6, a wrong gradient shows in the first steps. A
# cache rounds log-probabilities to fp16: 1e-5 in the first steps, which training carries to 1e-3 in a hundred.
TOLERANCE, CACHE_TOLERANCE, FIRST_TOLERANCE = 1e-3, 1e-2, 1e-4
CACHE = "teacher cache"

# From the student, the task and the number of the step to the loss.
StepLoss = Callable[[Any, "Task", int], Tensor]


@dataclass
class Task:
    """A teacher, the student as it starts, the batches, and how good a trained student is."""

    teacher: Any
    student: Any
    batches: Sequence[Tensor]
    labels: Sequence[Tensor]  # of the rows of a batch's logits, -100 where there is none
    temperature: float
    learning_rate: float
    score: str
    evaluate: Callable[[nn.Module], float]
    rest: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Nothing: a student goes on where it stopped."""

    def asked(self, number: int) -> Tensor:
        """The teacher's logits ``[N, V]`` of a batch."""
        with torch.no_grad():
            logits: Tensor = self.teacher(self.batches[number])
        return logits.flatten(0, -2)


def make_task(case: Case, seed: int) -> Task:
    if case.dtype != "fp32":
        raise ValueError(f"suite 'training' trains in fp32, got {case.dtype}")
    torch.manual_seed(seed)
    return _digits(case) if case.shape[1] == distill_digits.CLASSES else _language_models(case)


def _digits(case: Case) -> Task:
    images, test_images, labels, test_labels = (part.to(case.device) for part in distill_digits.load_images())
    teacher, student = distill_digits.train_teacher(images, labels, 400), distill_digits.make_student()
    drawn = [torch.randint(len(images), (case.shape[0],)) for _ in range(BATCHES)]
    return Task(
        teacher,
        student.to(case.device),
        [images[index] for index in drawn],
        [labels[index] for index in drawn],
        temperature=4.0,
        learning_rate=1e-2,
        score="accuracy",
        evaluate=lambda model: distill_digits.accuracy(model, test_images, test_labels),
    )


def _language_models(case: Case) -> Task:
    rows, columns = case.shape
    if rows % language_model.LENGTH or columns != language_model.VOCABULARY:
        raise ValueError(
            f"suite 'training' takes N = 128 B and V = {language_model.VOCABULARY}, or V = 10; got {rows}x{columns}"
        )
    batch_size = rows // language_model.LENGTH
    steps = TEACHER_STEPS if batch_size >= 8 else QUICK_TEACHER_STEPS
    teacher, training, held_out = language_model.load_teacher(TEACHERS, steps, case.device)
    held_out = held_out[: 32 * (language_model.LENGTH + 1)]
    torch.manual_seed(0)
    student = language_model.LanguageModel(training, **language_model.STUDENT)
    batches = [language_model.windows(training, language_model.LENGTH, batch_size) for _ in range(BATCHES)]
    return Task(
        teacher,
        student,
        batches,
        [F.pad(batch[:, 1:], (0, 1), value=-100).flatten() for batch in batches],
        temperature=2.0,
        learning_rate=5e-3,
        score="perplexity",
        evaluate=lambda model: language_model.perplexity(model, held_out),
    )


class Training:
    """A student of its own: a call is its next step."""

    def __init__(self, loss: StepLoss) -> None:
        self.loss = loss
        self.losses: list[Tensor] = []
        self.student: Any = None

    def __call__(self, task: Task) -> Outcome:
        if self.student is None:
            self.student = copy.deepcopy(task.student)
            self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=task.learning_rate)
        loss = self.loss(self.student, task, len(self.losses) % BATCHES)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())
        return Outcome(loss.detach(), ())

    def figures(self, task: Task) -> dict[str, Any]:
        return {"losses": torch.stack(self.losses).tolist(), **self.scores(task)}

    def scores(self, task: Task) -> dict[str, float]:
        if "teacher" not in task.rest:
            task.rest["teacher"] = task.evaluate(task.teacher)
        return {f"{task.score} (teacher: {task.rest['teacher']:.4g})": task.evaluate(self.student)}


class Rest(Training):
    """A step with no loss: both models, and a backward pass of a gradient that is there already."""

    def __init__(self) -> None:
        super().__init__(self._nothing)
        self.gradient: Optional[Tensor] = None

    def _nothing(self, student: Any, task: Task, number: int) -> Tensor:
        task.asked(number)
        logits = student(task.batches[number])
        if self.gradient is None:
            self.gradient = torch.full_like(logits, 1e-6)
        logits.backward(self.gradient)
        return torch.zeros((), requires_grad=True)

    def figures(self, task: Task) -> dict[str, Any]:
        return {}


class Alone(Training):
    """A student without a teacher: its losses are of another kind, and its score tells what a teacher is worth."""

    def __init__(self) -> None:
        super().__init__(self._of_labels)

    def _of_labels(self, student: Any, task: Task, number: int) -> Tensor:
        return F.cross_entropy(student(task.batches[number]).flatten(0, -2), task.labels[number])

    def figures(self, task: Task) -> dict[str, Any]:
        return self.scores(task)


def of_logits(formulation: Callable[[Tensor, Tensor, float], Tensor], student: Any, task: Task, number: int) -> Tensor:
    teacher = task.asked(number)
    return formulation(student(task.batches[number]).flatten(0, -2), teacher, task.temperature)


def eager_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return eager.forward_kl_best(student, teacher, torch.empty(0), temperature)


def our_kl(backend: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return kd.kd_loss(student, teacher, temperature=temperature, reduction="batchmean", backend=backend)


def of_hidden(backend: Any, student: Any, task: Task, number: int) -> Tensor:
    batch, teacher = task.batches[number], task.teacher
    states = student.hidden(batch), student.tokens.weight, teacher.hidden(batch), teacher.tokens.weight
    biases = {"student_bias": student.bias, "teacher_bias": teacher.bias}
    return kd.linear_kd_loss(*states, **biases, temperature=task.temperature, backend=backend)


def eager_sparse(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    ids, logprobs = eager.capture(teacher, K)
    return eager.topk_kl(student, ids, logprobs, torch.log1p(-logprobs.exp().sum(-1).clamp(max=1 - 1e-6)))


def our_sparse(backend: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    ids, logprobs, tail = kd.capture_topk(teacher, K)
    return kd.topk_kd_loss(student, ids, logprobs, tail_logprob=tail, backend=backend)


class FromCache:
    """The teacher is asked once, before the first step, and read from disk from then on."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.folder = tempfile.TemporaryDirectory()
        self.loaded: Optional[Iterator[dict[str, Tensor]]] = None

    def __call__(self, student: Any, task: Task, number: int) -> Tensor:
        if number == 0:
            self.loaded = iter(self._loader(task))
        assert self.loaded is not None
        read = {name: value.to(task.batches[0].device) for name, value in next(self.loaded).items()}
        ids, logprobs, tail = read["ids"], read["logprobs"], read["tail_logprob"]
        logits = student(read["input_ids"].long())
        return kd.topk_kd_loss(logits, ids, logprobs, tail_logprob=tail, backend=self.backend)

    def _loader(self, task: Task) -> DataLoader:
        identity: dict[str, Any] = {"tokenizer": "the examples'", "vocab_size": language_model.VOCABULARY, "k": K}
        folder, extras = self.folder.name, {"input_ids": torch.int32}
        if self.loaded is None:
            with TeacherCacheWriter(folder, **identity, extras=extras) as writer, torch.no_grad():
                for batch in task.batches:
                    for tokens, *row in zip(batch, *kd.capture_topk(task.teacher(batch), K), strict=True):
                        writer.append(*row, input_ids=tokens)
        return DataLoader(TeacherDataset(TeacherCache(folder, **identity)), batch_size=len(task.batches[0]))


def make_candidates(case: Case) -> Candidates:
    found: Candidates = []

    def add(name: str, group: str, loss: Callable[..., StepLoss], family: str = "kdkernels") -> None:
        found.append(Candidate(name, group, family, lambda: Training(loss())))

    group = DIGITS if case.shape[1] == distill_digits.CLASSES else MODELS
    found.append(Candidate("a step with no loss", group, "probe", Rest))
    found.append(Candidate("labels alone, no teacher", group, "alone", Alone))
    add("eager, log_target", group, lambda: partial(of_logits, eager_kl), "eager")
    names = _backends(case, "dense_fwd", group, found)
    for name in names:
        add(f"kdkernels {name}", group, lambda name=name: partial(of_logits, partial(our_kl, name)))
    if group == MODELS:
        for name in names:
            add(f"kdkernels {name}, linear_kd_loss", group, lambda name=name: partial(of_hidden, name))
        add("eager, topk", SPARSE, lambda: partial(of_logits, eager_sparse), "eager")
        for name in _backends(case, "topk_fwd", SPARSE, found):
            add(f"kdkernels {name}", SPARSE, lambda name=name: partial(of_logits, partial(our_sparse, name)))
            add(f"kdkernels {name}, {CACHE}", SPARSE, partial(FromCache, name))
    return found


def _backends(case: Case, pattern: str, group: str, found: Candidates) -> list[str]:
    """The kernels that run here, or plain PyTorch where none does; the others are listed as absent."""
    answers = common.availability(case, pattern=pattern)
    found += [Absent(f"kdkernels {answer.name}", group, answer.reason) for answer in answers if not answer.ok]
    return [answer.name for answer in answers if answer.ok] or ["torch"]


def check(runs: Sequence[tuple[Candidate, Run]], task: Task) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The first loss beside the reference in fp64, and the curve beside that of the group's eager student."""
    errors: dict[str, dict[str, float]] = {}
    wrong = []
    curves: dict[str, Tensor] = {}
    for candidate, run in runs:
        assert isinstance(run, Training)
        errors[candidate.key] = {}
        if candidate.family in ("probe", "alone"):
            continue
        if not run.losses:
            run(task)
        curve = torch.stack(run.losses).double().cpu()
        reference = curves.setdefault(candidate.group, curve)
        tolerance = CACHE_TOLERANCE if CACHE in candidate.name else TOLERANCE
        held = {
            "first loss": (_relative(curve[:1], _first_loss(task, candidate.group)), FIRST_TOLERANCE),
            "loss curve": (_relative(curve, reference), tolerance),
        }
        for what, (error, bound) in held.items():
            errors[candidate.key][what] = error
            if not error <= bound:  # also when it is NaN
                wrong.append(f"{candidate.key}: {what} is off by {error:.2e}, allowed {bound:.0e}")
    return errors, wrong


def _relative(curve: Tensor, truth: Tensor) -> float:
    """The largest difference at any step, infinite where one of the two is not finite."""
    return ((curve - truth).abs() / truth.abs()).nan_to_num(nan=torch.inf).amax().item()


def _first_loss(task: Task, group: str) -> Tensor:
    """The reference's loss of the untrained student, in fp64."""
    if group not in task.rest:
        with torch.no_grad():
            student = task.student(task.batches[0]).flatten(0, -2).cpu().double()
        teacher = task.asked(0).cpu().double()
        loss = our_sparse if group == SPARSE else our_kl
        task.rest[group] = loss("torch", student, teacher, task.temperature)
    found: Tensor = task.rest[group]
    return found


SUITE = Suite(
    name="training",
    title="Students trained side by side: the time of a step",
    shapes=((128, 10), (1024, 8192)),
    dtypes=("fp32",),
    quick_shapes=((128, 10), (512, 8192)),
    make_inputs=make_task,
    make_candidates=make_candidates,
    expected=None,
    floor_bytes=None,
    probe="rest",
    yardstick="a step with no loss: both models, a backward pass of a gradient that is there already, the optimizer",
    check=check,
    rounds=(60, 12),
)
