"""The work of one process: check candidates against the truth and time interleaved rounds, or measure peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.model import Absent, Candidate, Case, NotHere, Outcome, Run, Suite
from kdkernels import memory

# Largest relative errors against fp64: (loss and whole gradient, worst row of the gradient). Eager PyTorch in 16 bits
# rounds its log-probabilities before it subtracts them, so little is asked of it there: TAID's loss is off by 0.14.
TOLERANCE = {"fp32": (1e-4, 1e-3), "fp16": (2e-2, 0.2), "bf16": (0.2, 0.9)}
# kdkernels sums in fp32 whatever the logits are: what remains is the rounding of the gradient as it is stored.
OWN_TOLERANCE = {"fp32": (5e-6, 1e-4), "fp16": (1e-3, 2e-3), "bf16": (4e-3, 8e-3)}
OWN_FAMILIES = ("kdkernels", "kernel", "reference")
SETTLING_ROUNDS = 2
# Of a case whose time is limited: the part after which no candidate is built any more, and that after which none is
# timed; the rest is for the second check.
BUILDING, TIMING = 0.6, 0.85
OVER = "the time was over"


class CheckFailed(Exception):
    """A candidate's result is wrong, so no figure of the run is worth reading."""


def measure_time(suite: Suite, case: Case, *, rounds: int, seed: int) -> dict[str, Any]:
    """Check every candidate against the truth, time them in interleaved rounds, and check them again.

    Returns:
        A dict with ``candidates``: dicts with name, group, family, ``seconds`` (one per round), ``first_run_seconds``
        ``errors`` and ``figures``; and ``absent``: what could not run, and why.

    Raises:
        CheckFailed: naming every candidate whose loss or gradient is wrong.
    """
    torch.compiler.reset()
    listed = suite.make_candidates(case)
    candidates = [item for item in listed if isinstance(item, Candidate)]
    buffers = [suite.make_inputs(case, seed + index) for index in range(_buffer_count(suite, case))]
    built = []
    for candidate in candidates:
        run = candidate.build()
        first = measure.seconds(case.device, run, buffers[0])
        buffers[0].reset()
        built.append((candidate, run, first))
    runs = [(candidate, run) for candidate, run, _ in built]

    if suite.check is None:
        check(suite, case, runs, buffers[0])
    seconds = np.empty((SETTLING_ROUNDS + rounds, len(runs)))
    order = np.random.default_rng(seed)
    turn = 0
    gc.collect()
    gc.disable()
    try:
        for r in range(len(seconds)):
            for k in order.permutation(len(runs)):
                inputs = buffers[turn % len(buffers)]
                seconds[r, k] = measure.seconds(case.device, runs[k][1], inputs)
                inputs.reset()
                turn += 1
    finally:
        gc.enable()
    errors = check(suite, case, runs, buffers[0])

    return {
        "candidates": [
            {
                "name": candidate.name,
                "group": candidate.group,
                "family": candidate.family,
                "seconds": seconds[SETTLING_ROUNDS:, k].tolist(),
                "first_run_seconds": first,
                "errors": errors[candidate.key],
                "figures": getattr(run, "figures", lambda inputs: {})(buffers[0]),
            }
            for k, (candidate, run, first) in enumerate(built)
        ],
        "absent": [
            {"name": item.name, "group": item.group, "reason": item.reason}
            for item in listed
            if isinstance(item, Absent)
        ],
    }


def measure_memory(suite: Suite, case: Case, group: str, name: str, *, seed: int) -> int:
    """Bytes that forward and backward of one candidate need beyond its inputs, at their peak.

    To be called in a process of its own. A run before the measured one loads libraries, compiles, and starts threads.
    """
    torch.compiler.reset()
    [run] = [
        item.build()
        for item in suite.make_candidates(case)
        if isinstance(item, Candidate) and (item.group, item.name) == (group, name)
    ]
    inputs = suite.make_inputs(case, seed)
    for _ in range(2):
        outcome = run(inputs)
        measure.synchronize(case.device)
        del outcome
        inputs.reset()
    gc.collect()
    memory.empty_cache()
    before = measure.reset_peak(case.device)
    outcome = run(inputs)
    measure.synchronize(case.device)
    peak = measure.peak(case.device)
    del outcome
    return max(0, peak - before)


def measure_within(
    suite: Suite,
    case: Case,
    *,
    rounds: int,
    seed: int,
    seconds: float,
    without: Sequence[str] = (),
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """As ``measure_time`` within some seconds, and with no failure but of the candidate that fails.

    Args:
        without: words; candidates that have one in their name are left out.
        save: takes the result so far, of one run a candidate: the next one may never end.

    Returns:
        The dict of ``measure_time``, and ``failed``: candidates that raised or were wrong, and how.
    """
    begun = time.monotonic()
    torch.compiler.reset()
    listed = suite.make_candidates(case)
    absent = [item for item in listed if isinstance(item, Absent)]
    failed: dict[str, tuple[Candidate, str]] = {}
    built: dict[str, tuple[Candidate, Run, float]] = {}

    def passed(share: float) -> bool:
        return time.monotonic() - begun > share * seconds

    def attempt(candidate: Candidate, work: Any) -> Any:
        try:
            return work()
        except NotHere as reason:
            absent.append(Absent(candidate.name, candidate.group, str(reason)))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            failed[candidate.key] = candidate, f"{type(error).__name__}: {lines[0][:300]}"
        built.pop(candidate.key, None)
        return None

    buffers = [suite.make_inputs(case, seed + index) for index in range(_buffer_count(suite, case))]
    errors: dict[str, dict[str, float]] = {}
    truths: dict[str, Outcome] = {}

    def check_one(candidate: Candidate, run: Run) -> None:
        found, wrong = check_candidate(suite, case, candidate, run, buffers[0], truths)
        if wrong:
            failed[candidate.key] = candidate, "; ".join(wrong)
            built.pop(candidate.key, None)
        errors[candidate.key] = found

    taken: dict[str, list[float]] = {}

    def result() -> dict[str, Any]:
        return {
            "candidates": [
                {
                    "name": candidate.name,
                    "group": candidate.group,
                    "family": candidate.family,
                    "seconds": taken[key],
                    "first_run_seconds": first,
                    "errors": errors[key],
                    "figures": {},
                }
                for key, (candidate, _, first) in built.items()
            ],
            "absent": [{"name": item.name, "group": item.group, "reason": item.reason} for item in absent],
            "failed": [{"name": item.name, "group": item.group, "reason": why} for item, why in failed.values()],
        }

    for candidate in (item for item in listed if isinstance(item, Candidate)):
        out = set(candidate.name.replace(",", "").split()) & set(without)
        if out or passed(BUILDING):
            absent.append(Absent(candidate.name, candidate.group, f"left out: {min(out)}" if out else OVER))
            continue

        def build(candidate: Candidate = candidate) -> tuple[Candidate, Run, float]:
            run = candidate.build()
            return candidate, run, measure.seconds(case.device, run, buffers[0])

        made = attempt(candidate, build)
        _recover(buffers[0], case)
        if made is not None:
            built[candidate.key] = made
            if len(truths) and candidate.group not in truths:
                truths.clear()
            attempt(candidate, lambda made=made: check_one(*made[:2]))
            _recover(buffers[0], case)
        if candidate.key in built:
            run = built[candidate.key][1]
            once = attempt(candidate, lambda run=run: measure.seconds(case.device, run, buffers[0]))
            taken[candidate.key] = [once]
            _recover(buffers[0], case)
        save(result())
    truths.clear()

    taken |= {key: [] for key in built}
    order, turn = np.random.default_rng(seed), 0
    gc.collect()
    gc.disable()
    try:
        for r in range(SETTLING_ROUNDS + rounds):
            # A round of what settles is no figure; one that counts is enough for a number, not for its quartiles.
            if r > SETTLING_ROUNDS and passed(TIMING):
                break
            for key in order.permutation(list(built)).tolist():
                candidate, run, _ = built[key]
                inputs = buffers[turn % len(buffers)]
                turn += 1
                took = attempt(candidate, lambda run=run, inputs=inputs: measure.seconds(case.device, run, inputs))
                _recover(inputs, case)
                if took is not None and r >= SETTLING_ROUNDS:
                    taken[key].append(took)
    finally:
        gc.enable()
    for candidate, run, _ in list(built.values()):
        if len(truths) and candidate.group not in truths:
            truths.clear()
        attempt(candidate, lambda candidate=candidate, run=run: check_one(candidate, run))
        _recover(buffers[0], case)
    return result()


def _recover(inputs: Any, case: Case) -> None:
    """Inputs as they were, and the memory of a candidate that failed half way, where the device still answers."""
    try:
        inputs.reset()
    except Exception:
        pass  # the device is lost: every candidate that follows says so


def check(suite: Suite, case: Case, runs: Sequence[tuple[Candidate, Run]], inputs: Any) -> dict[str, dict[str, float]]:
    """Errors of every candidate's loss and gradients, keyed by ``Candidate.key``.

    Raises:
        CheckFailed: naming all that are wrong.
    """
    if suite.check is not None:
        found_by_key, lines = suite.check(runs, inputs)
        if lines:
            raise CheckFailed(f"{suite.name} {case}: " + "; ".join(lines))
        return found_by_key
    errors: dict[str, dict[str, float]] = {}
    truths: dict[str, Outcome] = {}
    wrong = []
    for group in dict.fromkeys(candidate.group for candidate, _ in runs):
        truths.clear()
        for candidate, run in runs:
            if candidate.group == group:
                found, lines = check_candidate(suite, case, candidate, run, inputs, truths)
                errors[candidate.key] = found
                wrong += [f"{candidate.key}: {line}" for line in lines]
    if wrong:
        raise CheckFailed(f"{suite.name} {case}: " + "; ".join(wrong))
    return errors


def check_candidate(
    suite: Suite, case: Case, candidate: Candidate, run: Run, inputs: Any, truths: dict[str, Outcome]
) -> tuple[dict[str, float], list[str]]:
    """Errors of one candidate, and a line for each that is more than allowed; ``truths`` keeps the one of its group."""
    assert suite.expected is not None
    if candidate.expected is not None:
        expected = candidate.expected(inputs)
    else:
        if candidate.group not in truths:
            truths[candidate.group] = suite.expected(inputs, candidate.group)
        expected = truths[candidate.group]
    if hasattr(inputs, "poison"):
        inputs.poison()
    outcome = run(inputs)
    found = _errors(outcome, expected)
    del outcome
    inputs.reset()
    exact = candidate.family in OWN_FAMILIES and (case.dtype == "fp32" or not suite.rounds_logits)
    bounds = (OWN_TOLERANCE if exact else TOLERANCE)[case.dtype]
    wrong = []
    for what, error in found.items():
        if expected.jumps and what.startswith("worst row"):
            continue
        bound = bounds[what.startswith("worst row")]
        if not error <= bound:  # also when it is NaN
            wrong.append(f"{what} is off by {error:.2e}, allowed {bound:.2e}")
    return found, wrong


def _errors(outcome: Outcome, expected: Outcome) -> dict[str, float]:
    found = {"loss": _relative(outcome.loss.detach(), expected.loss)}
    if len(outcome.gradients) != len(expected.gradients):
        raise CheckFailed(f"expected {len(expected.gradients)} gradients, got {len(outcome.gradients)}")
    for index, (gradient, truth) in enumerate(zip(outcome.gradients, expected.gradients, strict=True)):
        suffix = f" {index}" if len(expected.gradients) > 1 else ""
        if gradient is None or gradient.shape != truth.shape:
            raise CheckFailed(f"gradient{suffix} must have shape {tuple(truth.shape)}")
        norm, largest = _gradient_errors(gradient, truth)
        found[f"gradient{suffix}"] = norm
        found[f"worst row of gradient{suffix}"] = largest
    return found


def _relative(value: Tensor, truth: Tensor) -> float:
    difference = abs(float(value.double()) - float(truth))
    return difference / max(float(truth.abs()), torch.finfo(torch.float64).tiny) if difference else 0.0


def _gradient_errors(gradient: Tensor, truth: Tensor) -> tuple[float, float]:
    """Error over all elements in the 2-norm, and the largest error of a row beside the row's largest element."""
    squares = size = 0.0
    worst = 0.0
    flat, flat_truth = gradient.flatten(0, -2), truth.flatten(0, -2)
    step = max(1, 2**22 // max(flat.shape[-1], 1))
    for start in range(0, flat.shape[0], step):
        exact = flat_truth[start : start + step]
        difference = flat[start : start + step].to(exact.device, torch.float64) - exact
        squares += float(difference.square().sum())
        size += float(exact.square().sum())
        ratio = difference.abs().amax(-1) / exact.abs().amax(-1)
        # A row whose gradient is exactly 0 and was found so has no error.
        ratio = torch.where(difference.abs().amax(-1) == 0, torch.zeros_like(ratio), ratio)
        worst = float(np.maximum(worst, float(ratio.amax())))  # np.maximum keeps a NaN
    return (squares / size) ** 0.5 if squares else 0.0, worst


def _buffer_count(suite: Suite, case: Case) -> int:
    """Input sets to rotate through: enough on a GPU that its L2 holds none of them; on the CPU one, as in training."""
    if case.device != "cuda" or suite.floor_bytes is None:
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return int(np.clip(np.ceil(3 * l2 / suite.floor_bytes(case)) + 1, 2, 16))
