"""Losses on log-probs of sampled tokens: values, gradients, what the gradients are on average, masks, extremes."""

import doctest
import functools
import itertools
import math

import pytest
import torch

from kdkernels import onpolicy

B, T, VOCAB = 3, 7, 6
INF, NAN = math.inf, math.nan


def tokens(dtype=torch.float64, shape=(B, T)):
    """Log-probs of student, teacher and old student, and advantages."""
    x = -torch.rand(*shape, dtype=torch.float64) * 4
    a = -torch.rand(*shape, dtype=torch.float64) * 4
    o = x + 0.3 * torch.randn(*shape, dtype=torch.float64)
    advantages = torch.randn(*shape, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), a.to(dtype), o.to(dtype), advantages.to(dtype)


def r(x, o):
    return (x - o).exp()


def clipped(x, o, A, low, high):
    return torch.maximum(-A * r(x, o), -A * r(x, o).clamp(1 - low, 1 + high))


# By name: the function of (x, a, o, A, options), the formula of the value, and of the derivative in x.
LOSSES = {
    "k2": (
        lambda x, a, o, A, **k: onpolicy.k2(x, a, **k),
        lambda x, a, o, A: (x - a) ** 2 / 2,
        lambda x, a, o, A: x - a,
    ),
    "k3": (
        lambda x, a, o, A, **k: onpolicy.k3(x, a, **k),
        lambda x, a, o, A: (a - x).exp() - 1 - (a - x),
        lambda x, a, o, A: 1 - (a - x).exp(),
    ),
    "k3_plus": (
        lambda x, a, o, A, **k: onpolicy.k3_plus(x, a, **k),
        lambda x, a, o, A: (a - x).exp() - 1 - (a - x),
        lambda x, a, o, A: x - a,
    ),
    "policy_gradient": (
        lambda x, a, o, A, **k: onpolicy.policy_gradient(x, a, **k),
        lambda x, a, o, A: (x - a) * x,
        lambda x, a, o, A: x - a,
    ),
    "importance_clip": (
        lambda x, a, o, A, **k: onpolicy.importance_clip(
            onpolicy.k2(x, a, mask=k.get("mask"), reduction="none"), x, o, clip=1.1, **k
        ),
        lambda x, a, o, A: (x - a) ** 2 / 2 * r(x, o).clamp(max=1.1),
        lambda x, a, o, A: (x - a) * r(x, o).clamp(max=1.1),
    ),
    "advantage": (
        lambda x, a, o, A, **k: onpolicy.advantage(x, A, **k),
        lambda x, a, o, A: -A * x,
        lambda x, a, o, A: -A,
    ),
    "ratio": (
        lambda x, a, o, A, **k: onpolicy.ratio(x, o, A, **k),
        lambda x, a, o, A: -A * r(x, o),
        lambda x, a, o, A: -A * r(x, o),
    ),
    "ppo": (
        lambda x, a, o, A, **k: onpolicy.ppo(x, o, A, **k),
        lambda x, a, o, A: clipped(x, o, A, 0.2, 0.2),
        lambda x, a, o, A: torch.where(torch.where(A > 0, r(x, o) > 1.2, r(x, o) < 0.8), 0, -A * r(x, o)),
    ),
    "ppo-dual": (
        lambda x, a, o, A, **k: onpolicy.ppo(x, o, A, clip_low=0.1, clip_high=0.3, dual_clip=1.2, **k),
        lambda x, a, o, A: torch.where(
            A < 0, torch.minimum(clipped(x, o, A, 0.1, 0.3), -1.2 * A), clipped(x, o, A, 0.1, 0.3)
        ),
        lambda x, a, o, A: torch.where(
            torch.where(A > 0, r(x, o) > 1.3, (r(x, o) < 0.9) | (r(x, o) > 1.2)), 0, -A * r(x, o)
        ),
    ),
    "ref_kl": (
        lambda x, a, o, A, **k: onpolicy.ref_kl(x, a, o, max_drop=0.05, penalty=0.1, **k),
        lambda x, a, o, A: -(a - x) * r(x, o) * (x.exp() - o.exp() >= -0.05) + 0.1 * (x - o) ** 2,
        lambda x, a, o, A: -(a - x) * r(x, o) * (x.exp() - o.exp() >= -0.05) + 0.2 * (x - o),
    ),
    "icepop": (
        lambda x, a, o, A, **k: onpolicy.icepop(x, o, A, low=0.8, high=1.3, **k),
        lambda x, a, o, A: -A * r(x, o) * (r(x, o) >= 0.8) * (r(x, o) <= 1.3),
        lambda x, a, o, A: -A * r(x, o) * (r(x, o) >= 0.8) * (r(x, o) <= 1.3),
    ),
    "icepop-advantage": (
        lambda x, a, o, A, **k: onpolicy.icepop(x, o, A, low=0.8, high=1.3, with_ratio=False, **k),
        lambda x, a, o, A: -A * x * (r(x, o) >= 0.8) * (r(x, o) <= 1.3),
        lambda x, a, o, A: -A * ((r(x, o) >= 0.8) & (r(x, o) <= 1.3)),
    ),
}
losses = pytest.mark.parametrize("name", LOSSES)


@losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_values_and_gradients_are_the_formulas(name, dtype):
    ours, value, slope = LOSSES[name]
    given = tokens(dtype)
    exact = [item.detach().double() for item in given]
    rows = ours(*given, reduction="none")
    assert rows.dtype == dtype and rows.shape == (B, T)
    torch.testing.assert_close(rows, value(*exact).to(dtype))
    factors = torch.linspace(-1, 2, B * T, dtype=dtype).view(B, T)
    (grad,) = torch.autograd.grad(rows, given[0], factors)
    torch.testing.assert_close(grad, (slope(*exact) * factors).to(dtype))
    # Each branch of a formula with a choice is met.
    if name.startswith(("ppo", "icepop", "ref_kl")):
        assert 3 <= ((slope(*exact) == 0) | (value(*exact).abs() < 1e-2)).sum() <= B * T - 3 or name == "ref_kl"


# The others detach a part of their value.
@pytest.mark.parametrize("name", ["k2", "k3", "advantage", "ratio", "ppo", "ppo-dual", "icepop", "icepop-advantage"])
def test_gradcheck(name):
    x, *others = tokens()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, *others, reduction="none"), x)


def test_k1_is_a_reward_without_a_gradient():
    x, a, _, _ = tokens()
    reward = onpolicy.k1(x, a, reduction="none")
    torch.testing.assert_close(reward, (x - a).detach())
    assert not reward.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        onpolicy.k1(x, a).backward()


@losses
def test_only_the_student_gets_a_gradient(name):
    given = [item.detach().requires_grad_() for item in tokens()]
    LOSSES[name][0](*given).backward()
    assert given[0].grad is not None and all(item.grad is None for item in given[1:])


class TestExpectedGradients:
    """Over all tokens of a small vocabulary, weighted by the probability of the one who samples."""

    def distributions(self):
        logits = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
        teacher, old = torch.log_softmax(torch.randn(2, VOCAB, dtype=torch.float64), -1)
        return logits, torch.log_softmax(logits, -1), teacher, old

    @staticmethod
    def expected(sampler, rows, logits):
        return torch.autograd.grad((sampler.detach().exp() * rows).sum(), logits, retain_graph=True)[0]

    @pytest.mark.parametrize(
        "loss",
        [
            lambda x, p: onpolicy.k2(x, p, reduction="none"),
            lambda x, p: onpolicy.k3_plus(x, p, reduction="none"),
            lambda x, p: onpolicy.policy_gradient(x, p, reduction="none"),
            lambda x, p: onpolicy.advantage(x, onpolicy.teacher_advantages(p, x), reduction="none"),
            lambda x, p: onpolicy.ratio(x, x.detach(), onpolicy.teacher_advantages(p, x), reduction="none"),
            lambda x, p: onpolicy.ppo(x, x.detach(), onpolicy.teacher_advantages(p, x), reduction="none"),
            lambda x, p: onpolicy.icepop(x, x.detach(), onpolicy.teacher_advantages(p, x), reduction="none"),
            lambda x, p: onpolicy.ref_kl(x, p, x.detach(), reduction="none"),
            lambda x, p: onpolicy.importance_clip(onpolicy.k2(x, p, reduction="none"), x, x.detach(), reduction="none"),
        ],
        ids=["k2", "k3_plus", "policy_gradient", "advantage", "ratio", "ppo", "icepop", "ref_kl", "importance_clip"],
    )
    def test_on_policy_it_is_that_of_the_reverse_kl(self, loss):
        logits, logq, logp, _ = self.distributions()
        (truth,) = torch.autograd.grad((logq.exp() * (logq - logp)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(self.expected(logq, loss(logq, logp), logits), truth, rtol=0, atol=1e-14)

    def test_of_k3_it_is_that_of_the_forward_kl(self):
        logits, logq, logp, _ = self.distributions()
        (truth,) = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), logits, retain_graph=True)
        rows = onpolicy.k3(logq, logp, reduction="none")
        torch.testing.assert_close(self.expected(logq, rows, logits), truth, rtol=0, atol=1e-14)

    def test_of_k1_it_would_be_zero(self):
        """Hence k1 is a reward alone; its mean is the reverse KL, and so is k3's."""
        logits, logq, logp, _ = self.distributions()
        assert self.expected(logq, logq - logp, logits).abs().max() < 1e-15
        reverse_kl = (logq.exp() * (logq - logp)).sum()
        for estimate in (onpolicy.k1, onpolicy.k3, onpolicy.k3_plus):
            torch.testing.assert_close((logq.exp() * estimate(logq, logp, reduction="none")).sum(), reverse_kl)

    @pytest.mark.parametrize("name", ["ratio", "ref_kl", "importance_clip"])
    def test_of_old_samples_the_ratio_makes_it_that_of_new_ones(self, name):
        logits, logq, logp, old = self.distributions()
        advantages = (logp - logq).detach()
        rows = {
            "ratio": lambda: onpolicy.ratio(logq, old, advantages, reduction="none"),
            "ref_kl": lambda: onpolicy.ref_kl(logq, logp, old, max_drop=1.0, penalty=0, reduction="none"),
            "importance_clip": lambda: onpolicy.importance_clip(
                onpolicy.k2(logq, logp, reduction="none"), logq, old, clip=1e9, reduction="none"
            ),
        }[name]()
        (truth,) = torch.autograd.grad((logq.exp() * (logq - logp)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(self.expected(old, rows, logits), truth, rtol=0, atol=1e-14)

    def test_undiscounted_returns_have_the_gradient_of_whole_sequences(self):
        """All sequences of three tokens, where the next token depends on the last one."""
        size, length = 3, 3
        table = torch.randn(size + 1, size, dtype=torch.float64, requires_grad=True)
        logq, logp = (torch.log_softmax(t, -1) for t in (table, torch.randn(size + 1, size, dtype=torch.float64)))
        expected, truth = 0.0, 0.0
        for sequence in itertools.product(range(size), repeat=length):
            before = (size, *sequence[:-1])
            x, a = logq[before, sequence], logp[before, sequence]
            returns = onpolicy.discounted_returns(onpolicy.teacher_advantages(a, x), gamma=1.0)
            expected += x.sum().exp().detach() * onpolicy.advantage(x, returns, reduction="sum")
            truth += x.sum().exp() * (x - a).sum()
        found, wanted = (torch.autograd.grad(value, table, retain_graph=True)[0] for value in (expected, truth))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


class TestMasks:
    @losses
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_nothing_comes_from_behind_a_mask(self, name, bad):
        ours = LOSSES[name][0]
        given = tokens()
        mask = torch.rand(B, T) < 0.6
        spoilt = [torch.where(mask, item.detach(), bad) for item in given]
        spoilt[0].requires_grad_()
        for reduction in ("mean", "sum", "none"):
            value = ours(*spoilt, mask=mask, reduction=reduction)
            rows = torch.where(mask, ours(*given, reduction="none"), 0)
            expected = {"mean": rows.sum() / mask.sum(), "sum": rows.sum(), "none": rows}[reduction]
            torch.testing.assert_close(value, expected)
            grads = [torch.autograd.grad(v.sum(), x)[0] for v, x in ((value, spoilt[0]), (expected, given[0]))]
            torch.testing.assert_close(*grads)
            assert not grads[0][~mask].any()

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_weights_and_returns_too(self, bad):
        x, a, _, advantages = tokens()
        mask = torch.rand(B, T) < 0.6

        def spoilt(item):
            return torch.where(mask, item.detach(), bad)

        def cleared(item):
            return torch.where(mask, item.detach(), 0.0)

        for function in (
            onpolicy.iw_weights,
            functools.partial(onpolicy.discounted_returns, gamma=0.9),
            functools.partial(onpolicy.dpace_weights, alpha=0.1),
        ):
            found = function(spoilt(x), mask=mask)
            torch.testing.assert_close(found, function(cleared(x), mask=mask))
            assert found.isfinite().all() and not found[~mask].any()
        found = onpolicy.teacher_advantages(spoilt(a), spoilt(x), mask=mask)
        assert torch.equal(found, cleared(a) - cleared(x))
        torch.testing.assert_close(
            onpolicy.k1(spoilt(x), spoilt(a), mask=mask), (cleared(x) - cleared(a)).sum() / mask.sum()
        )

    def test_integers_and_masks_of_sequences(self):
        x, a, _, _ = tokens()
        mask = torch.rand(B, T) < 0.6
        for dtype in (torch.int64, torch.uint8):
            assert onpolicy.k2(x, a, mask=mask.to(dtype)) == onpolicy.k2(x, a, mask=mask)
        whole = torch.tensor([[1], [0], [1]])
        torch.testing.assert_close(onpolicy.k2(x, a, mask=whole), onpolicy.k2(x[::2], a[::2]))

    def test_where_no_token_counts_the_mean_is_zero(self):
        x, a, _, _ = tokens()
        loss = onpolicy.k3(x, a, mask=torch.zeros(B, T, dtype=torch.bool))
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
        assert onpolicy.k3(x[:0], a[:0]) == 0

    def test_one_denominator_for_all_microbatches(self):
        x, a, _, _ = tokens()
        mask = torch.rand(B, T) < 0.6
        parts = [onpolicy.k2(x[i], a[i], mask=mask[i], normalizer=mask.sum()) for i in range(B)]
        torch.testing.assert_close(sum(parts), onpolicy.k2(x, a, mask=mask))
        torch.testing.assert_close(
            onpolicy.k2(x, a, mask=mask, normalizer=B, reduction="sum"),
            torch.where(mask, (x - a).square() / 2, 0).sum(-1).mean(),
        )

    def test_losses_of_other_functions_are_reduced_by_the_same_rule(self):
        rows = torch.randn(B, T, requires_grad=True)
        mask = torch.rand(B, T) < 0.6
        torch.testing.assert_close(onpolicy.reduce(rows, mask), rows[mask].mean())
        torch.testing.assert_close(onpolicy.reduce(rows), rows.mean())


class TestExtremes:
    @losses
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_policies_far_apart_give_finite_losses_and_gradients(self, name, dtype):
        far = torch.tensor([0.0, -1e4, -1e4, 0.0, -200.0, -1e-3])
        x = far.to(dtype).requires_grad_()
        others = [-torch.tensor([1e4, 0.0, 1e4, 0.0, 1e-3, 200.0]).to(dtype)] * 2
        rows = LOSSES[name][0](x, *others, torch.tensor([1.0, -1.0, 1, -1, 1, -1]), reduction="none")
        (grad,) = torch.autograd.grad(rows.sum(), x)
        assert rows.dtype == torch.float32 and rows.isfinite().all() and grad.isfinite().all()

    def test_a_token_that_the_student_forgot_is_pulled_up(self):
        """verl's clamps at 20 and 10 leave it without a gradient."""
        x = torch.tensor([-50.0, -1000.0], requires_grad=True)
        rows = onpolicy.k3(x, torch.zeros(2), reduction="none")
        (grad,) = torch.autograd.grad(rows.sum(), x)
        assert (grad < -1e8).all() and rows[1] > rows[0] > 1e8

    @pytest.mark.parametrize("d", [19.99, 20.0, 20.01, 25.0])
    def test_the_exponential_goes_on_as_its_tangent(self, d):
        d = torch.tensor(d, dtype=torch.float64)
        top = torch.tensor(20.0, dtype=torch.float64).exp()
        exact = d.exp() if d <= 20 else top * (1 + d - 20)
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(onpolicy.k3(zero, d), exact - 1 - d)
        torch.testing.assert_close(onpolicy.ratio(d, zero, zero + 1), -exact)

    def test_infinite_log_probs_are_no_nan(self):
        """A token that the teacher excludes is infinitely bad, one that both exclude never sampled."""
        x, a = torch.tensor([-1.0, -INF], requires_grad=True), torch.tensor([-INF, -1.0])
        for loss in (onpolicy.k1, onpolicy.k2, onpolicy.k3):
            assert loss(x.detach(), a, reduction="none")[0] == INF
        assert onpolicy.k3(x, a, reduction="none").tolist() == [INF, INF]
        assert onpolicy.ratio(x, torch.tensor([-1.0, -2.0]), torch.ones(2), reduction="none").tolist() == [-1.0, 0.0]

    def test_near_policies_lose_no_digits(self):
        x = torch.full((5,), -1.0)
        a = x + 1e-3 * torch.arange(5)
        d = (a - x).double()
        torch.testing.assert_close(onpolicy.k3(x, a, reduction="none").double(), d.exp() - 1 - d, rtol=2e-3, atol=1e-14)

    @losses
    def test_16_bits_are_widened_first(self, name):
        given = [item.detach().bfloat16() for item in tokens()]
        wide = [item.float().requires_grad_() for item in given]
        given[0].requires_grad_()
        mask = torch.rand(B, T) < 0.6
        rows, expected = (LOSSES[name][0](*items, mask=mask) for items in (given, wide))
        assert rows.dtype == torch.float32 and torch.equal(rows, expected)
        (grad,), (full,) = (torch.autograd.grad(v, items[0]) for v, items in ((rows, given), (expected, wide)))
        assert grad.dtype == torch.bfloat16 and torch.equal(grad, full.bfloat16())


class TestWeights:
    def test_importance_weighted_distillation(self):
        """Token by token as the paper has it, with masked tokens that neither have nor give credit."""
        _, a, o, _ = tokens()
        mask = torch.rand(B, T) < 0.6
        advantages = onpolicy.teacher_advantages(a, o, mask=mask)
        found = onpolicy.iw_weights(advantages, gamma=0.7, mask=mask)
        for b in range(B):
            size = [abs(a[b, t] - o[b, t]).item() if mask[b, t] else 0.0 for t in range(T)]
            for t in range(T):
                wanted = 1 + 0.7 * (1 - sum(size[:t]) / sum(size)) if mask[b, t] else 0.0
                assert abs(found[b, t] - wanted) < 1e-14
        assert torch.equal(onpolicy.iw_weights(torch.zeros(4)), torch.full((4,), 1.5))

    @pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 1.0])
    @pytest.mark.parametrize("length", [1, 2, 7, 33])
    def test_discounts_count_from_the_token_itself(self, gamma, length):
        rewards = torch.randn(2, length, dtype=torch.float64)
        wanted = torch.zeros_like(rewards)
        for t in range(length):
            for i in range(t, length):
                wanted[:, t] += gamma ** (i - t) * rewards[:, i]
        torch.testing.assert_close(onpolicy.discounted_returns(rewards, gamma=gamma), wanted)
        torch.testing.assert_close(onpolicy.discounted_returns(rewards.T, gamma=gamma, dim=0), wanted.T)

    def test_trl_s_minillm_discounts_from_the_first_token(self):
        """Its code has gamma^i: the same where gamma is 1, and gamma^t times these returns elsewhere."""
        rewards = torch.randn(T, dtype=torch.float64)

        def trl(gamma):
            return (gamma ** torch.arange(T) * rewards).flip(0).cumsum(0).flip(0)

        torch.testing.assert_close(onpolicy.discounted_returns(rewards, gamma=1.0), trl(1.0))
        ours = onpolicy.discounted_returns(rewards, gamma=0.5)
        torch.testing.assert_close(trl(0.5), 0.5 ** torch.arange(T) * ours)
        assert (trl(0.5) - ours).abs().max() > 0.1

    def test_dpace_weights_are_expected_tokens_that_pass_through(self):
        x, _, _, _ = tokens()
        mask = torch.rand(B, T) < 0.7
        found = onpolicy.dpace_weights(x, alpha=0.2, mask=mask)
        for b in range(B):
            chance, passed = 1.0, []
            for t in range(T):
                chance *= 0.8 * x[b, t].exp().item() + 0.2 if mask[b, t] else 1.0
                passed.append(chance if mask[b, t] else 0.0)
            for t in range(T):
                assert abs(found[b, t] - (sum(passed[t:]) if mask[b, t] else 0.0)) < 1e-14
        assert not found.requires_grad
        # With alpha 1 by position, and for a sure drafter too.
        count = torch.arange(T, 0, -1, dtype=torch.float64)
        torch.testing.assert_close(onpolicy.dpace_weights(x[0], alpha=1.0), count)
        torch.testing.assert_close(onpolicy.dpace_weights(torch.zeros_like(x[0]), alpha=0.0), count)

    def test_dpace_s_loss_has_the_gradient_of_the_expected_length(self):
        """With alpha 0 the weighted cross entropy falls as the expected number of accepted tokens rises."""
        x, _, _, _ = tokens(shape=(5,))
        (ours,) = torch.autograd.grad(onpolicy.reduce(-x * onpolicy.dpace_weights(x, alpha=0.0), reduction="sum"), x)
        (length,) = torch.autograd.grad(x.cumsum(-1).exp().sum(), x)
        torch.testing.assert_close(ours, -length)


def verl_kl(x, a, kind):
    """verl's estimators with their clamps, as plain functions."""
    if kind == "k1":
        return x - a
    if kind == "k2":
        return 0.5 * (x - a).square()
    if kind == "k3":
        d = (a - x).clamp(-20, 20)
        return (d.exp() - d - 1).clamp(-10, 10)
    square = 0.5 * (x - a).square()
    return square - square.detach() + verl_kl(x, a, kind[:-1]).detach()


def verl_policy_loss(x, o, A, low, high, c):
    """verl's clipped policy loss, its dual clip always on."""
    r = (x - o).clamp(-20, 20).exp()
    losses = torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))
    return torch.where(A < 0, torch.minimum(losses, -A * c), losses)


class TestOthers:
    @pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3+"])
    def test_verl_s_estimators(self, kind):
        x, a, _, _ = tokens(torch.float32)
        a = (a - 0.8).clamp(max=0)  # k3 stays below the clamp of its value at 10
        a = torch.maximum(a, x.detach() - 2).clamp(max=0)
        ours = getattr(onpolicy, kind.replace("+", "_plus"))(x, a, reduction="none")
        theirs = verl_kl(x, a, kind)
        assert theirs.abs().max() < 10
        torch.testing.assert_close(ours, theirs if kind != "k1" else theirs.detach(), rtol=1e-6, atol=1e-6)
        if kind != "k1":
            grads = [torch.autograd.grad(value.sum(), x)[0] for value in (ours, theirs)]
            torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)

    def test_verl_clamps_k3_where_the_gradient_is_largest(self):
        x, a = torch.tensor([-5.0, -30.0], requires_grad=True), torch.zeros(2)
        (theirs,) = torch.autograd.grad(verl_kl(x, a, "k3").sum(), x)
        (ours,) = torch.autograd.grad(onpolicy.k3(x, a, reduction="sum"), x)
        assert not theirs.any() and (ours < -100).all()

    def test_verl_s_policy_loss(self):
        x, _, o, A = tokens(torch.float32)
        ours = onpolicy.ppo(x, o, A, clip_low=0.2, clip_high=0.28, dual_clip=1.3, reduction="none")
        theirs = verl_policy_loss(x, o, A, 0.2, 0.28, 1.3)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(value.sum(), x)[0] for value in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)

    def test_verl_s_policy_gradient_of_an_estimator(self):
        """``use_policy_gradient``: the estimator's value is the advantage with its sign turned."""
        x, a, o, _ = tokens()
        reward = onpolicy.k1(x, a, reduction="none")
        ours = onpolicy.ppo(x, o, -reward, dual_clip=3.0, reduction="none")
        torch.testing.assert_close(ours, verl_policy_loss(x, o, -reward, 0.2, 0.2, 3.0))


def test_compiled_to_one_graph_for_any_number_of_tokens():
    torch._dynamo.reset()

    def call(x, a, o, A, mask):
        for name in ("k2", "k3", "k3_plus", "policy_gradient", "importance_clip", "ppo-dual", "ref_kl", "icepop"):
            yield LOSSES[name][0](x, a, o, A, mask=mask)
        yield onpolicy.ratio(x, o, A, reduction="none").square().sum()

    traced = torch.compile(lambda *given: torch.stack(list(call(*given))), backend="aot_eager", fullgraph=True)
    for length in (T, T + 2):
        given, mask = tokens(shape=(B, length)), torch.rand(B, length) < 0.6
        found, expected = traced(*given, mask), torch.stack(list(call(*given, mask)))
        torch.testing.assert_close(found, expected)
        factors = torch.linspace(-1, 2, len(found), dtype=found.dtype)
        torch.testing.assert_close(*(torch.autograd.grad(v, given[0], factors)[0] for v in (found, expected)))


def test_weights_are_compiled_to_one_graph():
    torch._dynamo.reset()

    def call(x, mask):
        A = onpolicy.discounted_returns(x, gamma=0.9, mask=mask)
        return A, onpolicy.iw_weights(A, mask=mask), onpolicy.dpace_weights(x, alpha=0.1, mask=mask)

    x, mask = tokens()[0], torch.rand(B, T) < 0.6
    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(x, mask), call(x, mask))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: onpolicy.k2([0.0], x), TypeError, "student_logprobs must be a torch.Tensor, got list"),
        (lambda x: onpolicy.k2(x, x.long()), TypeError, "teacher_logprobs must be float32, bfloat16, .* got int64"),
        (lambda x: onpolicy.k2(x, x[0]), ValueError, r"teacher_logprobs must have .* shape \(3, 7\), got \(7,\)"),
        (lambda x: onpolicy.k2(x, x[:1]), ValueError, r"teacher_logprobs must have .* shape \(3, 7\), got \(1, 7"),
        (lambda x: onpolicy.ratio(x, x, x[:, 0]), ValueError, r"advantages .* or 1 in some dimensions, got \(3,\)"),
        (lambda x: onpolicy.k2(x, x, mask=x), TypeError, "of integers, got float64: pass mask.bool"),
        (lambda x: onpolicy.k2(x, x, mask=x[0] > 0), ValueError, r"mask must have the tokens' shape \(3, 7\), or 1"),
        (lambda x: onpolicy.k2(x, x.to("meta")), ValueError, "teacher_logprobs must be on the tokens' device cpu, got"),
        (lambda x: onpolicy.k2(x, x, reduction="batchmean"), ValueError, "reduction must be one of none, sum, mean"),
        (lambda x: onpolicy.k2(x, x, reduction="none", normalizer=3), ValueError, "normalizer needs reduction 'sum'"),
        (lambda x: onpolicy.k2(x, x, normalizer=0), ValueError, "normalizer must be > 0, got 0"),
        (lambda x: onpolicy.ppo(x, x, x, dual_clip=1.0), ValueError, "dual_clip must be > 1, got 1"),
        (lambda x: onpolicy.ppo(x, x, x, clip_low=1.5), ValueError, r"clip_low must be in \[0, 1\], got 1.5"),
        (lambda x: onpolicy.icepop(x, x, x, low=2.0, high=1.0), ValueError, "high must be >= 2, got 1"),
        (lambda x: onpolicy.discounted_returns(x, gamma=1.5), ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        (lambda x: onpolicy.dpace_weights(x, alpha=-0.1), ValueError, r"alpha must be in \[0, 1\], got -0.1"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 7, dtype=torch.float64))


def test_advantages_of_whole_sequences():
    x, _, o, A = tokens()
    torch.testing.assert_close(onpolicy.ratio(x, o, A[:, :1]), onpolicy.ratio(x, o, A[:, :1].expand(B, T)))


def test_the_examples_of_the_docstrings_are_right():
    results = doctest.testmod(onpolicy)
    assert results.attempted > 20 and results.failed == 0


def test_every_function_says_where_it_is_from_and_what_it_does_on_average():
    for name in onpolicy.__all__:
        text = getattr(onpolicy, name).__doc__
        assert ">>> " in text, name
        if name in {key.partition("-")[0] for key in LOSSES}:
            assert "Gradient: " in text and "xpected gradient" in text, name


def test_what_a_gate_shuts_out_may_be_infinite():
    inf = torch.inf
    x = torch.tensor([-1.0, -3.0], requires_grad=True)
    for loss in (
        onpolicy.icepop(x, torch.tensor([-9.0, -30.0]), torch.tensor([-inf, inf])),
        onpolicy.ref_kl(x[1:], torch.tensor([-inf]), torch.tensor([-0.1]), penalty=0.0),
        onpolicy.ref_kl(torch.where(x < -2, -inf, x)[1:], torch.tensor([-1.0]), torch.tensor([-0.1]), penalty=0.0),
    ):
        assert loss == 0 and torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(2))
    loss = onpolicy.k3_plus(x[:1], torch.tensor([-inf]))
    assert loss == onpolicy.k3(x[:1], torch.tensor([-inf])) == inf


def test_a_normalizer_of_any_shape_gives_a_number():
    x = torch.randn(2, 3)
    for normalizer in (torch.tensor([5]), torch.tensor([[5.0]])):
        assert onpolicy.k2(x, x - 1, normalizer=normalizer).shape == ()
