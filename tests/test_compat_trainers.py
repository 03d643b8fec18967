"""Trainers of other libraries with tiny random models: Hugging Face's, Lightning, a loop of Accelerate."""

import importlib.util
from pathlib import Path

import pytest
import torch

import kdkernels as kd

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None,
    reason="trains by Hugging Face's Trainer: pip install transformers accelerate",
)
needs_lightning = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="pip install lightning")
needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="pip install accelerate")
V = 50


def model(seed, width=16, columns=V):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=columns, num_key_value_heads=2, initializer_range=0.3, **sizes))


def data(count=8, length=6):
    torch.manual_seed(7)
    rows = []
    for i in range(count):
        ids = torch.randint(0, V, (length,))
        # Sequences of unequal numbers of tokens that count.
        labels = ids.masked_fill(torch.arange(length) < i % length, -100)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def trainer(path, options=None, teacher=None, **arguments):
    from transformers import TrainingArguments

    from kdkernels.compat.transformers import KDTrainer

    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, **arguments}
    arguments |= {"learning_rate": 1e-2, "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(str(path), use_cpu=True, report_to=[], disable_tqdm=True, **arguments)
    teacher = teacher or model(1, 24)
    rows = data()
    return KDTrainer(model(0), args, teacher_model=teacher, kd_options=options, train_dataset=rows, eval_dataset=rows)


OPTIONS = {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3, "divergence": "jsd"}


@needs_transformers
def test_the_trainer_s_loss_is_that_of_the_shifted_rows(tmp_path):
    found = trainer(tmp_path, OPTIONS).evaluate()["eval_loss"]
    batch = {name: torch.stack([row[name] for row in data()]) for name in data()[0]}
    with torch.no_grad():
        logits = [m(batch["input_ids"]).logits[:, :-1] for m in (model(0), model(1, 24))]
    labels = batch["labels"][:, 1:]
    # A mean of the means of two batches.
    expected = sum(kd.kd_loss(*(x[part] for x in (*logits, labels)), **OPTIONS) for part in (slice(4), slice(4, 8))) / 2
    assert abs(found - expected) < 1e-5


@needs_transformers
def test_accumulated_batches_are_one_batch(tmp_path):
    trainers = [trainer(tmp_path, OPTIONS, per_device_train_batch_size=8)]
    trainers.append(trainer(tmp_path, OPTIONS, per_device_train_batch_size=2, gradient_accumulation_steps=4))
    losses = []
    for one in trainers:
        one.train()
        losses.append([entry["loss"] for entry in one.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0][0] > losses[0][1]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(one.model.parameters() for one in trainers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@needs_transformers
def test_a_teacher_of_another_padding(tmp_path):
    with pytest.raises(ValueError, match="vocab_size"):
        trainer(tmp_path, teacher=model(1, columns=V + 6)).train()
    trainer(tmp_path, {"vocab_size": V}, teacher=model(1, columns=V + 6)).train()


@needs_transformers
@pytest.mark.parametrize(
    "options, message",
    [
        ({"T": 2.0}, "unexpected option 'T'; did you mean 'temperature'"),
        ({"reduction": "sum"}, "kd_options must not have 'reduction'"),
    ],
)
def test_wrong_options_are_an_error_before_training(tmp_path, options, message):
    with pytest.raises(TypeError, match=message):
        trainer(tmp_path, options)


@needs_transformers
def test_an_option_of_the_loss_given_to_the_trainer_is_told_its_place():
    from kdkernels.compat.transformers import KDTrainer

    with pytest.raises(TypeError, match="temperature is an option of kd_loss: pass kd_options={'temperature': ...}"):
        KDTrainer(model(0), teacher_model=model(1, 24), temperature=2.0)


@needs_lightning
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_lightning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from examples import lightning_module

    assert lightning_module.main(steps=12) < 0.9 * lightning_module.main(steps=1)


@needs_accelerate
def test_the_example_of_accelerate():
    from examples import accelerate_loop

    accumulated, whole = accelerate_loop.main(), accelerate_loop.main(parts=1, batch_size=16)
    torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-5)
    assert whole[-1] < 0.7 * whole[0]


def test_the_examples_are_short():
    for name in ("lightning_module", "accelerate_loop"):
        assert len((Path(__file__).parent.parent / "examples" / f"{name}.py").read_text().splitlines()) <= 40
