"""The losses of TRL's trainers, against TRL's own, alone and within trainers of tiny random models."""

import importlib
import inspect
import os
import warnings
from types import SimpleNamespace

import pytest
import torch

# Everything is made here: nothing is to be looked for elsewhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("trl", reason="compares with TRL: pip install trl")

from kdkernels.compat import trl as compat  # noqa: E402

# Releases from 1.10 on have no experimental DistillationTrainer.
PATHS = [path for path in compat._PLACES if "experimental.distillation" not in path]
B, L, V, K, D = 2, 4, 40, 5, 8
LABELS = torch.tensor([[3, -100, 0, 39], [7, 3, -100, -100]])
MASK = (LABELS != -100).int()


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


STUDENT, TEACHER = logits(B, L, V), logits(B, L, V, seed=1)


@pytest.fixture(scope="module")
def original():
    """TRL's own function of a module or a class of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in PATHS:
            importlib.import_module(module)

    def find(module, name, kind=None):
        (path,) = (path for path in PATHS if path.endswith(f".{module}_trainer"))
        owner = importlib.import_module(path)
        return getattr(getattr(owner, kind) if kind else owner, name)

    return find


def agree(ours, theirs, *inputs, tolerance=2e-6):
    """The same results, and the same gradient of every input by the first of them."""
    leaves = [[x.detach().clone().requires_grad_() for x in inputs] for _ in range(2)]
    results = [call(*own) for call, own in zip((ours, theirs), leaves, strict=True)]
    for found, expected in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
    for result in results:
        (result[0] if isinstance(result, tuple) else result).sum().backward()
    for own, other in zip(*leaves, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=tolerance, atol=tolerance)


betas = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
REDUCTIONS = [{}, {"reduction": "sum"}, {"reduction": "mean"}, {"num_items_in_batch": 3}]
REDUCTIONS.append({"num_items_in_batch": torch.tensor(3)})


@betas
@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "whole"])
@pytest.mark.parametrize("reduced", REDUCTIONS, ids=["batchmean", "sum", "mean", "items", "items-tensor"])
@pytest.mark.parametrize("module, kind", [("gkd", "GKDTrainer"), ("gold", "GOLDTrainer")])
def test_gkd_and_gold(original, beta, labels, reduced, module, kind):
    options = {"labels": labels, "beta": beta, "temperature": 0.9, **reduced}
    theirs = original(module, "generalized_jsd_loss", kind)
    agree(
        lambda s: compat.generalized_jsd_loss(s, TEACHER, **options),
        lambda s: theirs(s, TEACHER, **options),
        STUDENT,
    )


@betas
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("top_k", [0, 1, K, V])
@pytest.mark.parametrize("reduced", REDUCTIONS[:4], ids=["batchmean", "sum", "mean", "items"])
def test_iw_opd(original, beta, add_tail, top_k, reduced):
    theirs = original("iw_opd", "generalized_jsd_loss", "IWOPDTrainer")
    options = {"labels": LABELS, "beta": beta, "temperature": 0.9, "top_k": top_k, "add_tail": add_tail, **reduced}
    agree(
        lambda s: compat.generalized_jsd_loss_on_support(s, TEACHER, **options),
        lambda s: theirs(s, TEACHER, **options),
        STUDENT,
    )


HIDDEN, HEAD = logits(B, L, D), logits(V, D, seed=2)
OF_TEACHER = logits(B, L, 6, seed=3), logits(V, 6, seed=4)
BIASES = logits(V, seed=5), logits(V, seed=6)


@betas
@pytest.mark.parametrize("items", [None, 3, torch.tensor(3.0)], ids=["mean", "items", "items-tensor"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_the_stable_distillation_trainer(original, beta, items, scaled):
    theirs = original("distillation", "_chunked_divergence_loss")
    options = {"num_items_in_batch": items}
    if scaled:
        options |= {"student_lm_head_bias": BIASES[0], "teacher_lm_head_bias": BIASES[1], "temperature": 1.5}
        options |= {"student_logit_scale": 0.6, "teacher_logit_scale": 1.7}
        options |= {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 4.0}

    def call(loss):
        return lambda h, w: loss(h, OF_TEACHER[0], w, OF_TEACHER[1], MASK, beta, **options)

    agree(call(compat.chunked_divergence_loss), call(theirs), HIDDEN, HEAD, tolerance=2e-5)


def test_hidden_states_of_16_bits_meet_a_head_of_32():
    call = OF_TEACHER[0].bfloat16(), HEAD, OF_TEACHER[1].bfloat16(), MASK, 0.5
    loss, _, count = compat.chunked_divergence_loss(HIDDEN.bfloat16(), *call)
    assert torch.isfinite(loss) and count == 5
    exact, _, _ = compat.chunked_divergence_loss(HIDDEN.bfloat16().float(), *(x.float() for x in call[:3]), MASK, 0.5)
    torch.testing.assert_close(loss, exact)


@betas
@pytest.mark.parametrize("module", ["sdft", "sdpo"])
def test_self_distillation(original, module, beta):
    name = "compute_full_logit_self_distillation_loss"
    ours, theirs = getattr(compat, name), original(module, name)
    options = {"distillation_alpha": beta}
    agree(lambda s: ours(s, TEACHER, **options), lambda s: theirs(s, TEACHER, **options), STUDENT)
    name = "compute_topk_self_distillation_loss"
    topk, theirs_topk = getattr(compat, name), original(module, name)
    for tail in (True, False):
        given = {**options, "distillation_topk": K, "distillation_add_tail": tail}
        agree(lambda s: topk(s, TEACHER, **given), lambda s: theirs_topk(s, TEACHER, **given), STUDENT)  # noqa: B023


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(
    "module, kind", [("server_distillation", "ServerDistillationTrainer"), ("iw_opd", "IWOPDTrainer")]
)
def test_teachers_on_a_server(original, module, kind, tail):
    top = TEACHER.log_softmax(-1).topk(K)
    values, ids = top.values.clone(), top.indices.clone()
    values[0, 2, 3:], ids[0, 2, 3:] = -torch.inf, 0
    values[1, 3], ids[1, 3] = -torch.inf, 0
    result = {"topk_logprobs": values, "topk_token_ids": ids}
    trainer = SimpleNamespace(loss_add_tail=tail, beta=0.0)
    cls = getattr(importlib.import_module(original(module, "__init__", kind).__module__), kind)
    trainer._reduce_divergence_loss = cls._reduce_divergence_loss
    theirs = original(module, "_compute_server_forward_kl_loss", kind)
    agree(
        lambda s: compat.server_forward_kl_loss(trainer, result, s.log_softmax(-1), LABELS),
        lambda s: theirs(trainer, result, s.log_softmax(-1), LABELS),
        STUDENT,
    )
    sampled = LABELS.clamp_min(0)
    sampled[0, 0] = ids[0, 0, 0]
    of_sampled = TEACHER.log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
    theirs = original(module, "_compute_sparse_top_1_divergence_loss", kind)
    for trainer.beta in (0.5, 1.0):
        call = top.indices[..., 0], top.values[..., 0], sampled, of_sampled, LABELS
        agree(
            lambda s: compat.sparse_top_1_divergence_loss(trainer, s.log_softmax(-1), *call),  # noqa: B023
            lambda s: theirs(trainer, s.log_softmax(-1), *call),  # noqa: B023
            STUDENT,
        )


@betas
@pytest.mark.parametrize("tail", [True, False])
def test_asynchronous_distillation(original, beta, tail):
    theirs = original("async_distillation", "_chunked_jsd_loss")
    top = TEACHER.reshape(-1, V).log_softmax(-1).topk(K)
    mask = torch.ones(B * L, K, dtype=torch.bool)
    mask[2, 3:] = False
    ids, logprobs = torch.where(mask, top.indices, -1), torch.where(mask, top.values, -torch.inf)
    teacher = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0])

    def call(loss):
        options = (None, 0.7, 5.0, ids, logprobs, mask, beta, 1.3, tail, teacher, 2, 3)
        return lambda h, w: loss(h, w, *options)

    agree(call(compat.chunked_jsd_loss), call(theirs), HIDDEN.reshape(-1, D), HEAD, tolerance=1e-5)


def test_a_loss_per_element_is_refused():
    with pytest.raises(ValueError, match="TRL's generalized_jsd_loss is one number per row and token"):
        compat.generalized_jsd_loss(STUDENT, TEACHER, reduction="none")


# Trainers


def tokenizer():
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    outer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{% generation %}{{ m['content'] }}{% endgeneration %};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return outer


def model(path, seed, width, words):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, initializer_range=0.5, **sizes, **tokens)
    LlamaForCausalLM(config).save_pretrained(path)
    words.save_pretrained(path)
    return LlamaForCausalLM.from_pretrained(path)


# Each trainer: its module, whether it has a teacher apart, and options of its own.
TRAINERS = {
    "GKD": ("trl.experimental.gkd", True, {"lmbda": 0.0, "max_length": 16}),
    "GOLD": ("trl.experimental.gold", True, {"lmbda": 0.0, "max_length": 16, "max_completion_length": 4}),
    "Distillation": ("trl", True, {"max_completion_length": 4, "beta": 0.5}),
    "IWOPD": (
        "trl.experimental.iw_opd",
        True,
        {"max_completion_length": 4, "max_length": 16, "distillation_objective": "jsd", "beta": 0.5, "lmbda": 0.0},
    ),
    "SDFT": (
        "trl.experimental.sdft",
        False,
        {"max_completion_length": 4, "teacher_model_kind": "live", "num_generations": 2, "distillation_topk": 5},
    ),
    "SDPO": (
        "trl.experimental.sdpo",
        False,
        {
            "max_completion_length": 4,
            "teacher_model_kind": "live",
            "num_generations": 2,
            "distillation_mode": "full_logits",
        }
        | {"include_environment_feedback": True},
    ),
}


def losses_of_training(name, path):
    from datasets import Dataset

    module, has_teacher, options = TRAINERS[name]
    module = importlib.import_module(module)
    words = tokenizer()
    given = {"model": model(path / "student", 0, 16, words), "processing_class": words}
    if has_teacher:
        given["teacher_model"] = model(path / "teacher", 1, 24, words)
    rows = [{"prompt": f"ab{c}", "privileged_context": f"{c}d"} for c in "abcd"]
    if name in ("GKD", "GOLD", "IWOPD"):
        turns = [("user", "assistant"), ("ab", "de")]
        rows = [{"messages": [{"role": r, "content": x + c} for r, x in zip(*turns, strict=True)]} for c in "abcd"]
    if name == "SDPO":
        given["reward_funcs"] = lambda completions, **_: [float(i % 2) for i in range(len(completions))]
    options = options | {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
    options |= {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    args = getattr(module, f"{name}Config")(output_dir=str(path / "out"), **options)
    trainer = getattr(module, f"{name}Trainer")(args=args, train_dataset=Dataset.from_list(rows), **given)
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_has_the_same_losses_patched_and_not(name, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="TRL's trainers take data sets: pip install datasets")
    expected = losses_of_training(name, tmp_path / "plain")
    calls = []
    loss = compat.kd.kd_loss, compat.kd.topk_kd_loss, compat.kd.linear_kd_loss
    for function in loss:
        counted = (lambda f: lambda *args, **options: (calls.append(f), f(*args, **options))[1])(function)
        monkeypatch.setattr(compat.kd, function.__name__, counted)
    compat.patch()
    try:
        found = losses_of_training(name, tmp_path / "patched")
    finally:
        compat.unpatch()
    assert len(found) == 2 and len(calls) >= 2
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-4, atol=1e-5)


# Patching


@pytest.fixture
def patched():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = compat.patch()
    yield names
    compat.unpatch()


def test_patch_replaces_every_loss_and_unpatch_puts_it_back(original):
    before = {name: original(*name) for name in _names()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = compat.patch()
        assert compat.patch() == names and len(names) == len(before) == len(set(names))
    assert all(original(*name) is not function for name, function in before.items())
    assert sorted(compat.unpatch()) == sorted(names) and compat.unpatch() == []
    assert all(original(*name) is function for name, function in before.items())


def _names():
    for path in PATHS:
        kind, functions = compat._PLACES[path]
        yield from ((path.split(".")[-1].removesuffix("_trainer"), name, kind) for name, _ in functions)


def test_static_methods_stay_static(patched, original):
    trainer = importlib.import_module("trl.experimental.gkd").GKDTrainer
    assert isinstance(inspect.getattr_static(trainer, "generalized_jsd_loss"), staticmethod)
    torch.testing.assert_close(
        trainer.generalized_jsd_loss(STUDENT, TEACHER, LABELS),
        compat.generalized_jsd_loss(STUDENT, TEACHER, LABELS),
    )


def test_gold_keeps_trl_s_loss_for_probabilities(original):
    theirs = original("gold", "generalized_jsd_loss", "GOLDTrainer")
    p, q = (x.softmax(-1)[..., :7] for x in (STUDENT, TEACHER))
    expected = theirs(p, q, logits_are_probs=True)
    torch.testing.assert_close(compat._gold(theirs)(p, q, logits_are_probs=True), expected)


@pytest.mark.parametrize("version", ["0.29.1", "1.17.0", "1.17rc0", "2.0.0", "11.6"])
def test_an_unknown_release_is_an_error(monkeypatch, version):
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=rf"knows trl 1.0 to 1.16, got {version}: install one of these"):
        compat.patch()


def test_an_unknown_argument_is_an_error_and_nothing_is_replaced(monkeypatch, original):
    trainer = importlib.import_module("trl.experimental.sdpo.sdpo_trainer")
    monkeypatch.setattr(trainer, "compute_topk_self_distillation_loss", lambda student_logits, new: None)
    before = original("gkd", "generalized_jsd_loss", "GKDTrainer")
    with pytest.raises(RuntimeError, match="sdpo_trainer.compute_topk_self_distillation_loss of trl .* with new"):
        compat.patch()
    assert original("gkd", "generalized_jsd_loss", "GKDTrainer") is before
