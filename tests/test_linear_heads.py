"""Modules as heads, teachers that require grad, and derivatives beyond the first, of the losses on hidden states."""

import functools
import importlib.util
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import kdkernels as kd
from kdkernels import backends

pytestmark = pytest.mark.skipif(
    backends.BACKENDS["cpu"].why_not("cpu") is not None, reason="the C++ extension was not built: the loop runs on it"
)

N, V, D, TEACHER_D = 9, 40, 6, 5


def make(bias=True, dtype=torch.float32, seed=0):
    """Hidden states that require grad, a head, the teacher's two, labels."""
    torch.manual_seed(seed)
    hidden = torch.randn(N, D, dtype=dtype).requires_grad_()
    head = nn.Linear(D, V, bias=bias, dtype=dtype)
    teacher = [torch.randn(N, TEACHER_D, dtype=dtype), nn.Linear(TEACHER_D, V, bias=bias, dtype=dtype)]
    labels = torch.randint(0, V, (N,))
    labels[::4] = -100
    return hidden, head, teacher, labels


def sparse(seed=1):
    torch.manual_seed(seed)
    logprobs, ids = torch.log_softmax(torch.randn(N, V), -1).topk(4)
    return ids, logprobs


class LoraLinear(nn.Module):
    """A layer as peft makes it: the base's weight is handed through, and adapters stand beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class ModulesToSave(nn.Module):
    """A layer of which peft trains a copy: attributes are those of the copy."""

    def __init__(self, base):
        super().__init__()
        self.original_module = base
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(base.in_features, base.out_features)})

    def __getattr__(self, name):
        if name in ("weight", "bias"):
            return getattr(self.modules_to_save["default"], name)
        return super().__getattr__(name)


class LoraInPlace(nn.Linear):
    """A layer whose factors are parameters of its own, as in microsoft/LoRA."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, D)), nn.Parameter(torch.zeros(V, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Quantised(nn.Linear):
    """A layer whose weight is packed in bytes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weight = nn.Parameter(torch.zeros(D * V // 2, 1, dtype=torch.uint8), requires_grad=False)


class PackedWeight(nn.Module):
    """As torch.ao has it: a method gives the weight, of a module of packed parameters."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self._packed_params = nn.Linear(inputs, outputs)

    def weight(self):
        return self._packed_params.weight


class MarkedWeight(nn.Linear):
    """A layer whose weight is of floating point by name, and knows how it was quantised."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weight.quant_state = object()


class GPTQ(nn.Module):
    qweight = torch.zeros(3, dtype=torch.int32)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.25


class ScaledCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 0.25


class ScaledElsewhere(nn.Linear):
    """Of a model that multiplies by the scale after the head."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.logit_scale = nn.Parameter(torch.ones(()))


class ScaledTable(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 0.25


def replaced_forward():
    head = nn.Linear(D, V)
    head.forward = lambda x: F.linear(x, head.weight) * 2
    return head


def hooked(register):
    head = nn.Linear(D, V)
    getattr(head, register)(lambda *args: None)
    return head


class TestModules:
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_linear_is_its_weight_and_its_bias(self, bias, backend):
        hidden, head, (teacher_hidden, teacher), labels = make(bias)
        parameters = (hidden, *head.parameters())
        loss = kd.linear_kd_loss(hidden, head, teacher_hidden, teacher, labels, backend=backend)
        expected = kd.linear_kd_loss(
            hidden, head.weight, teacher_hidden, teacher.weight.detach(), labels, student_bias=head.bias,
            teacher_bias=teacher.bias.detach() if bias else None, backend=backend,
        )  # fmt: skip
        assert loss == expected
        for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
            assert torch.equal(a, b)
        ids, logprobs = sparse()
        assert kd.linear_topk_kd_loss(hidden, head, ids, logprobs, backend=backend) == kd.linear_topk_kd_loss(
            hidden, head.weight, ids, logprobs, student_bias=head.bias, backend=backend
        )

    def test_a_bias_beside_a_linear_without_one_counts(self):
        hidden, head, teacher, _ = make(bias=False)
        bias = torch.randn(V)
        assert kd.linear_kd_loss(hidden, head, *teacher, student_bias=bias) == kd.linear_kd_loss(
            hidden, head.weight, *teacher, student_bias=bias
        )

    def test_a_mixture_of_modules(self):
        hidden, head, (teacher_hidden, teacher), _ = make()
        other = nn.Linear(TEACHER_D, V)
        call = functools.partial(kd.linear_kd_loss, hidden, head, [teacher_hidden] * 2, teacher_weights=[0.3, 0.7])
        assert call([teacher, other]) == call([teacher.weight, other.weight], teacher_bias=[teacher.bias, other.bias])

    def test_a_tied_embedding_learns_from_both_ends(self):
        hidden, _, teacher, _ = make()
        table = nn.Embedding(V, D)
        tokens = torch.arange(N)
        grads = []
        for head in (table, table.weight):
            states = table(tokens).tanh() + hidden
            grads.append(torch.autograd.grad(kd.linear_kd_loss(states, head, *teacher), table.weight)[0])
        assert torch.equal(*grads)
        tied = nn.Linear(D, V, bias=False)
        tied.weight = table.weight
        assert kd.linear_kd_loss(hidden, tied, *teacher) == kd.linear_kd_loss(hidden, table.weight, *teacher)

    def test_a_padded_head(self):
        hidden, head, (teacher_hidden, _), _ = make()
        teacher = nn.Linear(TEACHER_D, V + 8)
        loss = kd.linear_kd_loss(hidden, head, teacher_hidden, teacher, vocab_size=V)
        loss.backward()
        assert head.weight.grad is not None and head.bias.grad is not None and teacher.weight.grad is None
        torch.testing.assert_close(loss, kd.kd_loss(head(hidden), teacher(teacher_hidden)[:, :V].detach()))

    def test_a_parametrized_weight_learns_through_its_parametrization(self):
        hidden, head, teacher, _ = make()
        nn.utils.parametrizations.weight_norm(head)
        loss = kd.linear_kd_loss(hidden, head, *teacher)
        expected = kd.kd_loss(head(hidden), teacher[1](teacher[0]).detach())
        for a, b in zip(*(torch.autograd.grad(x, [*head.parameters()]) for x in (loss, expected)), strict=True):
            torch.testing.assert_close(a, b)

    def test_modules_of_losses_take_modules(self):
        hidden, head, teacher, labels = make()
        assert kd.LinearKDLoss()(hidden, head, *teacher, labels) == kd.linear_kd_loss(hidden, head, *teacher, labels)
        ids, logprobs = sparse()
        assert kd.LinearTopKKDLoss()(hidden, head, ids, logprobs) == kd.linear_topk_kd_loss(hidden, head, ids, logprobs)

    def test_compiled(self, backend):
        hidden, head, teacher, labels = make()
        parameters = (hidden, *head.parameters())
        torch._dynamo.reset()
        call = functools.partial(kd.linear_kd_loss, backend=backend)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        found = [f(hidden, head, *teacher, labels) for f in (call, compiled)]
        for a, b in zip(*(torch.autograd.grad(x, parameters) for x in found), strict=True):
            torch.testing.assert_close(a, b)

    def test_autocast(self):
        hidden, head, teacher, labels = make()
        with torch.autocast("cpu", torch.bfloat16):
            loss = kd.linear_kd_loss(hidden, head, *teacher, labels)
        loss.backward()
        assert head.weight.grad.dtype == torch.float32

    def test_a_bias_is_not_given_twice(self):
        hidden, head, teacher, _ = make()
        with pytest.raises(ValueError, match="student_bias must be None where student_weight is a module with a bias"):
            kd.linear_kd_loss(hidden, head, *teacher, student_bias=torch.zeros(V))
        with pytest.raises(ValueError, match="teacher_bias must be None where teacher_weight is a module with a bias"):
            kd.linear_kd_loss(hidden, head, *teacher, teacher_bias=torch.zeros(V))

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (lambda: LoraLinear(nn.Linear(D, V)), r"got LoraLinear with an adapter \(base_layer, lora_A, lora_B\)"),
            (lambda: ModulesToSave(nn.Linear(D, V)), r"with an adapter \(original_module, modules_to_save\)"),
            (lambda: LoraInPlace(D, V), r"got LoraInPlace with an adapter \(lora_A, lora_B\), which would neither"),
            (lambda: nn.Sequential(nn.Linear(D, V)), "a single layer, got Sequential with the modules 0"),
            (lambda: Quantised(D, V), "with a weight of floating point, got Quantised, whose weight is uint8"),
            (lambda: MarkedWeight(D, V), "got MarkedWeight, whose weight is a quantised Parameter"),
            (lambda: PackedWeight(D, V), "got PackedWeight, whose weight is a method: pass the dequantised weight"),
            (lambda: GPTQ(), "got GPTQ, whose weight is NoneType: pass the dequantised weight"),
            (lambda: Scaled(D, V), "an nn.Linear with nn.Linear's own forward, or .* got Scaled: what"),
            (replaced_forward, "an nn.Linear with nn.Linear's own forward"),
            (lambda: ScaledCall(D, V), "an nn.Linear with nn.Linear's own forward, or .* got ScaledCall: what"),
            (lambda: ScaledTable(V, D), "or a tied nn.Embedding, got ScaledTable: what"),
            (lambda: ScaledElsewhere(D, V), r"alone, got ScaledElsewhere with the parameters logit_scale, which would"),
            (lambda: nn.Bilinear(D, D, V), "got Bilinear: what its forward does beside"),
            (lambda: hooked("register_forward_hook"), "without hooks, got Linear with forward_hooks, which would not"),
            (lambda: hooked("register_forward_pre_hook"), "got Linear with forward_pre_hooks"),
            (lambda: hooked("register_full_backward_hook"), "got Linear with backward_hooks"),
            (lambda: hooked("register_full_backward_pre_hook"), "got Linear with backward_pre_hooks"),
        ],
    )  # fmt: skip
    def test_a_module_that_does_more_is_refused(self, head, message):
        hidden, _, teacher, _ = make()
        with pytest.raises(TypeError, match=f"student_weight must be .*{message}"):
            kd.linear_kd_loss(hidden, head(), *teacher)
        with pytest.raises(TypeError, match=f"student_weight must be .*{message}"):
            kd.linear_topk_kd_loss(hidden, head(), *sparse())
        with pytest.raises(TypeError, match=f"weight must be .*{message}"):
            kd.linear_token_logprobs(hidden, head(), torch.zeros(N, dtype=torch.int64))

    def test_what_the_message_says_to_pass_is_the_module(self):
        """The merged weight of an adapter is the module's, and its factors learn."""
        hidden, _, teacher, _ = make()
        lora = LoraLinear(nn.Linear(D, V))
        factors = [lora.lora_A["default"].weight, lora.lora_B["default"].weight]
        merged = lora.base_layer.weight + factors[1] @ factors[0]
        loss = kd.linear_kd_loss(hidden, merged, *teacher, student_bias=lora.bias)
        expected = kd.kd_loss(lora(hidden), teacher[1](teacher[0]).detach())
        for a, b in zip(*(torch.autograd.grad(x, factors) for x in (loss, expected)), strict=True):
            torch.testing.assert_close(a, b)


if importlib.util.find_spec("peft") is not None:
    # The look-alikes above hold without it.

    def test_the_adapters_of_peft_itself():
        import peft

        hidden, _, teacher, _ = make()
        for config in (
            peft.LoraConfig(target_modules=["lm_head"], r=2, use_dora=True),
            peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        ):
            model = nn.Sequential()
            model.add_module("other", nn.Linear(D, D))
            model.add_module("lm_head", nn.Linear(D, V))
            adapted = peft.get_peft_model(model, config)
            with pytest.raises(TypeError, match="with an adapter"):
                kd.linear_kd_loss(hidden, adapted.base_model.model.lm_head, *teacher)
            merged = adapted.merge_and_unload()
            kd.linear_kd_loss(hidden, merged.lm_head, *teacher).backward()

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ["lm_head"], "r": 2, "lora_alpha": 3},
            {"target_modules": ["lm_head"], "r": 2, "lora_bias": True},
            {"target_modules": ["other"], "r": 2, "modules_to_save": ["lm_head"]},
            {"target_modules": ["lm_head"], "r": 2, "lora_dropout": 0.5},
        ],
        ids=["lora", "lora-bias", "modules-to-save", "dropout"],
    )
    def test_lora_of_peft_itself_counts_and_learns(options):
        import peft

        hidden, _, teacher, _ = make()
        model = nn.Sequential()
        model.add_module("other", nn.Linear(D, D))
        model.add_module("lm_head", nn.Linear(D, V))
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options, init_lora_weights=False))
        learns_and_agrees(adapted.base_model.model.lm_head, hidden, teacher)
        if "lm_head" in options["target_modules"]:
            with adapted.disable_adapter():
                learns_and_agrees(adapted.base_model.model.lm_head, hidden, teacher)
            adapted.merge_adapter()
            learns_and_agrees(adapted.base_model.model.lm_head, hidden, teacher)


def learns_and_agrees(head, hidden, teacher, logits=None):
    """A module as a head has the loss of its own logits, and the gradients of all that learns in it."""
    learning = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    results = []
    for loss in (
        lambda: kd.linear_kd_loss(hidden, head, *teacher),
        lambda: kd.kd_loss((logits or head)(hidden), teacher[1](teacher[0]).detach()),
    ):
        torch.manual_seed(3)  # dropout
        value = loss()
        grads = torch.autograd.grad(value, learning, allow_unused=True)
        results.append([value, *(torch.zeros(()) if g is None or not g.any() else g for g in grads)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


class PeftLora(LoraLinear):
    """The look-alike with all that the forward of peft's layer is made of."""

    def __init__(self, base, bias=False):
        super().__init__(base)
        self.base_layer.requires_grad_(False)
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=bias)})
        self.scaling, self.active_adapters = {"default": 1.5}, ["default"]
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.disable_adapters = self.merged = False

    def forward(self, x):
        base = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return base
        inner = self.lora_A["default"](self.lora_dropout["default"](x))
        return base + self.lora_B["default"](inner) * self.scaling["default"]


class SavedCopy(ModulesToSave):
    active_adapters = ["default"]
    disable_adapters = False

    def forward(self, x):
        return (self.original_module if self.disable_adapters else self.modules_to_save["default"])(x)


class Model(nn.Module):
    """A model of transformers, as far as its head goes."""

    def __init__(self, head, **config):
        super().__init__()
        self.lm_head, self.config = head, types.SimpleNamespace(**config)

    def get_output_embeddings(self):
        return self.lm_head

    def logits(self, hidden):
        config = self.config
        x = self.lm_head(hidden) * getattr(config, "logit_scale", 1.0)
        if hasattr(config, "logits_scaling"):
            x = x / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)
        return x if cap is None else cap * torch.tanh(x / cap)


CONFIGS = [{}, {"logit_scale": 0.3}, {"logits_scaling": 4.0}, {"final_logit_softcapping": 0.7}]
CONFIGS.append({"logit_scale": 2.0, "final_logit_softcapping": 0.7})
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(c) or "plain")


class TestModulesThatAreMore:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("off", [None, "disable_adapters", "merged"])
    def test_the_factors_of_lora_learn(self, bias, off):
        hidden, _, teacher, _ = make()
        head = PeftLora(nn.Linear(D, V), bias)
        if off:
            setattr(head, off, True)
        learns_and_agrees(head, hidden, teacher)

    def test_an_adapter_that_is_small_beside_its_base_survives_16_bits(self):
        hidden, _, teacher, _ = make()
        head = PeftLora(nn.Linear(D, V, bias=False))
        with torch.no_grad():
            head.lora_B["default"].weight *= 1e-3
        exact = torch.autograd.grad(kd.linear_kd_loss(hidden, head, *teacher), list(head.lora_B.parameters()))[0]
        head, hidden = head.bfloat16(), hidden.detach().bfloat16().requires_grad_()
        teacher = [teacher[0].bfloat16(), teacher[1].bfloat16()]
        found = kd.linear_kd_loss(hidden, head, *teacher)
        without = kd.linear_kd_loss(hidden, head.base_layer, *teacher)
        assert found != without
        grad = torch.autograd.grad(found, list(head.lora_B.parameters()))[0]
        assert (grad.float() - exact).norm() < 0.05 * exact.norm()

    @pytest.mark.parametrize("off", [False, True])
    def test_the_copy_that_peft_trains_is_the_head(self, off):
        hidden, _, teacher, _ = make()
        head = SavedCopy(nn.Linear(D, V))
        head.disable_adapters = off
        learns_and_agrees(head, hidden, teacher)

    def test_lora_that_is_not_known_stays_an_error(self):
        hidden, _, teacher, _ = make()
        head = PeftLora(nn.Linear(D, V))
        head.use_dora = {"default": True}
        with pytest.raises(TypeError, match="with an adapter .*: of adapters only peft's LoRA is known"):
            kd.linear_kd_loss(hidden, head, *teacher)
        head = PeftLora(nn.Linear(D, V))
        head.base_layer.register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match="must be a module without hooks"):
            kd.linear_kd_loss(hidden, head, *teacher)

    @configs
    def test_a_model_has_its_scale_and_softcap(self, config):
        hidden, head, teacher, labels = make()
        model = Model(head, **config)
        learns_and_agrees(model, hidden, teacher, model.logits)
        values = kd.linear_topk_kd_loss(hidden, model, *sparse(), labels, ce_weight=0.5)
        torch.testing.assert_close(values, kd.topk_kd_loss(model.logits(hidden), *sparse(), labels, ce_weight=0.5))
        tokens = labels.clamp_min(0)
        torch.testing.assert_close(
            kd.linear_token_logprobs(hidden, model, tokens).logprobs,
            kd.token_logprobs(model.logits(hidden), tokens).logprobs,
        )
        found = kd.linear_gather_logprobs(hidden.detach(), model, tokens[:, None]).logprobs
        torch.testing.assert_close(found, kd.gather_logprobs(model.logits(hidden), tokens[:, None]).logprobs)

    @configs
    def test_a_teacher_s_model_too(self, config):
        hidden, head, (states, teacher), _ = make()
        model = Model(teacher, **config)
        loss = kd.linear_kd_loss(hidden, head, states, model)
        torch.testing.assert_close(loss, kd.kd_loss(head(hidden), model.logits(states).detach()))

    def test_a_softcap_that_contradicts_the_model_is_an_error(self):
        hidden, head, teacher, _ = make()
        model = Model(head, final_logit_softcapping=30.0)
        assert kd.linear_kd_loss(hidden, model, *teacher, student_softcap=30.0) > 0
        with pytest.raises(ValueError, match="student_softcap must be None or the model's own, 30, got 20"):
            kd.linear_kd_loss(hidden, model, *teacher, student_softcap=20.0)
        with pytest.raises(ValueError, match="models of one softcap"):
            kd.linear_kd_loss(
                hidden, head, [teacher[0]] * 2, [teacher[1], Model(teacher[1], final_logit_softcapping=3.0)]
            )
        with pytest.raises(TypeError, match="must be a model with a head, got Model, whose get_output_embeddings"):
            kd.linear_kd_loss(hidden, Model(None), *teacher)

    @pytest.mark.parametrize(
        "head",
        [
            lambda: Scaled(TEACHER_D, V),
            lambda: ScaledCall(TEACHER_D, V),
            lambda: nn.Sequential(nn.Linear(TEACHER_D, V), nn.Tanh()),
            lambda: LoraLinear(nn.Linear(TEACHER_D, V)),
            lambda: PeftLora(nn.Linear(TEACHER_D, V)),
            lambda: Int8(TEACHER_D, V),
        ],
        ids=["scaled", "scaled-call", "sequence", "adapter", "lora", "int8"],
    )
    def test_a_teacher_s_head_that_does_more_is_called(self, head, backend):
        hidden, student, (states, plain), labels = make()
        head = head()
        options = {"labels": labels, "ce_weight": 0.5, "chunk_bytes": 1000, "backend": backend}
        loss = kd.linear_kd_loss(hidden, student, states, head, **options)
        expected = kd.kd_loss(student(hidden), head(states).detach(), labels, ce_weight=0.5, backend=backend)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(*(torch.autograd.grad(x, [hidden, student.weight]) for x in (loss, expected)), strict=True):
            torch.testing.assert_close(a, b)
        both = kd.linear_kd_loss(hidden, student, [states] * 2, [plain, head], backend=backend)
        teachers = [plain(states).detach(), head(states).detach()]
        torch.testing.assert_close(both, kd.kd_loss(student(hidden), teachers, backend=backend))

    def test_what_a_teacher_s_head_would_lose_is_an_error(self):
        hidden, student, (states, _), _ = make()
        for head in (ScaledElsewhere(TEACHER_D, V), ScaledTable(V, TEACHER_D)):
            with pytest.raises(TypeError, match="teacher_weight must be"):
                kd.linear_kd_loss(hidden, student, states, head)
        with pytest.raises(ValueError, match="teacher_bias must be None where teacher_weight is a module that is call"):
            kd.linear_kd_loss(hidden, student, states, Scaled(TEACHER_D, V), teacher_bias=torch.zeros(V))
        with pytest.raises(ValueError, match=r"teacher_hidden must have shape \(9, 'D'\) as the student's"):
            kd.linear_kd_loss(hidden, student, states[1:], Scaled(TEACHER_D, V))


class Int8(nn.Module):
    """A quantised head: 8 bits and a factor per row."""

    def __init__(self, columns, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-128, 127, (rows, columns), dtype=torch.int8), requires_grad=False)
        self.factor = torch.rand(rows) / 64

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T * self.factor


class TestTeachers:
    def test_one_that_requires_grad_is_detached(self, backend):
        """A teacher in eval mode has parameters that require grad: everybody's first call."""
        hidden, head, (_, teacher), labels = make()
        states = torch.randn(N, TEACHER_D, requires_grad=True)
        call = functools.partial(kd.linear_kd_loss, hidden, head, labels=labels, backend=backend)
        loss = call(teacher_hidden=states * 1.0, teacher_weight=teacher.weight, teacher_bias=teacher.bias)
        assert loss == call(
            teacher_hidden=states.detach(), teacher_weight=teacher.weight.detach(), teacher_bias=teacher.bias.detach()
        )
        loss.backward()
        assert states.grad is teacher.weight.grad is teacher.bias.grad is None and head.weight.grad.any()

    def test_with_a_frozen_student_there_is_no_gradient_at_all(self, backend):
        hidden, head, teacher, _ = make()
        head.requires_grad_(False)
        assert not kd.linear_kd_loss(hidden.detach(), head, *teacher, backend=backend).requires_grad


def penalised(loss, inputs):
    """The gradient of a loss and of a penalty on its gradient."""
    value = loss(*inputs)
    grads = torch.autograd.grad(value, inputs, create_graph=True)
    return torch.autograd.grad(value + 10 * sum(g.pow(2).sum() for g in grads), inputs)


class TestSecondDerivatives:
    def inputs(self):
        hidden, head, _, labels = make(dtype=torch.float64)
        return [hidden, *(p.detach().requires_grad_() for p in head.parameters())], labels

    @pytest.mark.parametrize("options", [{}, {"labels": True, "ce_weight": 0.5}, {"row_weight": True}, {"jsd": True}])
    def test_plain_pytorch_has_them(self, options):
        inputs, labels = self.inputs()
        options = dict(options)
        if options.pop("labels", False):
            options["labels"] = labels
        if options.pop("row_weight", False):
            options["row_weight"] = torch.linspace(0, 1, N)
        if options.pop("jsd", False):
            options["divergence"] = "jsd"
        teacher = [torch.randn(N, TEACHER_D).double(), torch.randn(V, TEACHER_D).double()]
        ours = penalised(
            lambda h, w, b: kd.linear_kd_loss(
                h, w, *teacher, student_bias=b, chunk_bytes=1000, backend="torch", **options
            ),
            inputs,
        )
        full = penalised(
            lambda h, w, b: kd.kd_loss(F.linear(h, w, b), F.linear(*teacher), backend="torch", **options), inputs
        )
        for a, b in zip(ours, full, strict=True):
            torch.testing.assert_close(a, b)

    def test_of_the_hidden_states_alone_and_through_what_made_them(self):
        inputs, _ = self.inputs()
        teacher = [torch.randn(N, TEACHER_D).double(), torch.randn(V, TEACHER_D).double()]
        x = inputs[0].detach().requires_grad_()
        weight = inputs[1].detach()

        def step(loss):
            (grad,) = torch.autograd.grad(loss(x.tanh() * 2), x, create_graph=True)
            return torch.autograd.grad(loss((x - 5 * grad).tanh()), x)[0]

        torch.testing.assert_close(
            step(lambda h: kd.linear_kd_loss(h, weight, *teacher, backend="torch")),
            step(lambda h: kd.kd_loss(F.linear(h, weight), F.linear(*teacher), backend="torch")),
        )

    @pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
    def test_of_sparse_teachers(self, tail):
        inputs, labels = self.inputs()
        ids, logprobs = sparse()
        ours = penalised(
            lambda h, w, b: kd.linear_topk_kd_loss(
                h, w, ids, logprobs, labels, student_bias=b, tail=tail, backend="torch"
            ),
            inputs,
        )
        full = penalised(
            lambda h, w, b: kd.topk_kd_loss(F.linear(h, w, b), ids, logprobs, labels, tail=tail, backend="torch"),
            inputs,
        )
        for a, b in zip(ours, full, strict=True):
            torch.testing.assert_close(a, b)

    def test_of_teacher_logits_that_are_asked_for_again(self):
        inputs, labels = self.inputs()
        logits = torch.randn(N, V).double()
        ours = penalised(
            lambda h, w, b: kd.linear_kd_loss(
                h, w, labels=labels, teacher_logits=logits.__getitem__, student_bias=b, backend="torch"
            ),
            inputs,
        )
        full = penalised(lambda h, w, b: kd.kd_loss(F.linear(h, w, b), logits, labels, backend="torch"), inputs)
        for a, b in zip(ours, full, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("outer", ["penalty", "maml", "loss squared"])
    def test_the_kernels_refuse_and_name_the_backend_that_has_them(self, outer):
        hidden, head, teacher, _ = make()
        loss = kd.linear_kd_loss(hidden, head, *teacher, backend="cpu")
        if outer == "loss squared":
            loss = loss**2
        wanted = head.weight if outer == "maml" else hidden
        with pytest.raises(RuntimeError, match='backend="torch" can be differentiated again'):
            torch.autograd.grad(loss, wanted, create_graph=True)

    def test_a_sparse_gradient_has_none(self):
        hidden, head, _, _ = make(bias=False)
        loss = kd.linear_topk_kd_loss(
            hidden, head, *sparse(), tail="renormalize_both", sparse_grad=True, backend="torch"
        )
        with pytest.raises(RuntimeError, match="sparse_grad=True has no second derivative"):
            torch.autograd.grad(loss, head.weight, create_graph=True)

    def test_a_weight_changed_in_between_is_noticed(self):
        hidden, head, teacher, _ = make()
        loss = kd.linear_kd_loss(hidden, head, *teacher, backend="torch")
        with torch.no_grad():
            head.weight += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, hidden, create_graph=True)


class TestTransforms:
    def calls(self):
        torch.manual_seed(0)
        weight, teacher = torch.randn(V, D), [torch.randn(N, TEACHER_D), torch.randn(V, TEACHER_D)]
        ids, logprobs = sparse()
        dense = functools.partial(kd.linear_kd_loss, student_weight=weight, teacher_hidden=teacher[0])
        yield (
            lambda h, backend: dense(h, teacher_weight=teacher[1], backend=backend),
            lambda h: kd.kd_loss(F.linear(h, weight), F.linear(*teacher), backend="torch"),
        )
        for tail in ("bucket", "renormalize_both"):
            yield (
                lambda h, backend, tail=tail: kd.linear_topk_kd_loss(
                    h, weight, ids, logprobs, tail=tail, backend=backend
                ),
                lambda h, tail=tail: kd.topk_kd_loss(F.linear(h, weight), ids, logprobs, tail=tail, backend="torch"),
            )

    @staticmethod
    def dual_numbers(call, hidden, direction):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(hidden, direction))).tangent

    TRANSFORMS = {
        "grad": lambda call, h, v: torch.func.grad(call)(h),
        "jvp": lambda call, h, v: torch.func.jvp(call, (h,), (v,))[1],
        "dual numbers": lambda call, h, v: TestTransforms.dual_numbers(call, h, v),
        "vmap": lambda call, h, v: torch.func.vmap(call)(torch.stack([h, v])),
        "vmap of grad": lambda call, h, v: torch.func.vmap(torch.func.grad(call))(torch.stack([h, v])),
        "jacrev": lambda call, h, v: torch.func.jacrev(call)(h),
        "hessian": lambda call, h, v: torch.func.hessian(call)(h),
        "functional.hvp": lambda call, h, v: torch.autograd.functional.hvp(call, h, v)[1],
    }

    @pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
    def test_they_are_right_or_refused(self, transform):
        hidden, direction = torch.randn(2, N, D)
        for ours, full in self.calls():
            expected = transform(full, hidden, direction)
            assert expected.any()
            torch.testing.assert_close(transform(lambda h, f=ours: f(h, "torch"), hidden, direction), expected)
            with pytest.raises(RuntimeError, match='backend="torch"'):
                transform(lambda h, f=ours: f(h, "cpu"), hidden, direction)

    def test_a_tangent_of_the_head(self, backend):
        hidden, head, teacher, _ = make(bias=False)
        weight, direction = head.weight.detach(), torch.randn(V, D)
        teacher = [teacher[0], teacher[1].weight.detach()]

        def tangent(call):
            return torch.func.jvp(call, (weight,), (direction,))[1]

        def ours(w):
            return kd.linear_kd_loss(hidden.detach(), w, *teacher, backend=backend)

        if backend == "cpu":
            with pytest.raises(RuntimeError, match='backend="torch"'):
                tangent(ours)
        else:
            torch.testing.assert_close(
                tangent(ours),
                tangent(lambda w: kd.kd_loss(F.linear(hidden.detach(), w), F.linear(*teacher), backend="torch")),
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
    def test_batches_of_gradients(self, dtype, backend):
        hidden, head, teacher, _ = make(dtype=dtype)
        inputs = (hidden, *head.parameters())
        loss = kd.linear_kd_loss(hidden, head, *teacher, backend=backend)
        factors = torch.tensor([1.0, -3.0, 0.5])
        batch = torch.autograd.grad(loss, inputs, factors, is_grads_batched=True, retain_graph=True)
        for k, factor in enumerate(factors):
            one = torch.autograd.grad(loss, inputs, factor, retain_graph=True)
            for a, b in zip(batch, one, strict=True):
                torch.testing.assert_close(a[k], b)

    def test_hooks_on_saved_tensors_keep_what_they_saw(self):
        hidden, head, teacher, _ = make()
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append((t, t.clone())) or t, lambda t: t):
            loss = kd.linear_kd_loss(hidden, head, *teacher, backend="cpu")
        (3 * loss).backward()
        assert seen
        for kept, copy in seen:
            assert torch.equal(kept, copy)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_head_is_refused_by_name():
    hidden, head = torch.randn(3, D).requires_grad_(), nn.Linear(D, V)
    for scripted in (torch.jit.script(head), torch.jit.trace(head, hidden)):
        with pytest.raises(TypeError, match="student_weight must be an nn.Linear .* got the scripted module"):
            kd.linear_kd_loss(hidden, scripted, torch.randn(3, D), torch.randn(V, D))
