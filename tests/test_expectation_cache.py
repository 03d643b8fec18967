"""Expectations on disk: what was written comes back, resumes, trains, and belongs to one head."""

import json

import pytest
import torch

pytest.importorskip("safetensors", reason="the cache writes safetensors")
pytest.importorskip("numpy", reason="safetensors saves torch tensors through numpy")

import kdkernels as kd
from kdkernels import cache as kd_cache
from kdkernels import cli
from kdkernels.cache.index import Index, _sha256, canonical_json

V, D, T = 97, 12, 2.0
NUM_SEQUENCES = 7
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def head():
    generator = torch.Generator().manual_seed(5)
    made = torch.nn.Linear(D, V).requires_grad_(False)
    for item in made.parameters():
        item.copy_(torch.randn(item.shape, generator=generator))
    return made


HEAD = head()
IDENTITY = {"tokenizer": "t", "vocab_size": V, "head": HEAD, "temperature": T}
WRITER = {**IDENTITY, "extras": {"labels": torch.int32}, "shard_bytes": 1500}


def captured(number):
    generator = torch.Generator().manual_seed(number)
    length = 6 + 5 * (number % 3)
    teacher = torch.randn(length, V, generator=generator) * 3
    labels = torch.randint(V, (length,), generator=generator)
    return teacher, kd.capture_expectation(teacher, HEAD, temperature=T), labels


def write(folder, count=NUM_SEQUENCES, **options):
    with kd_cache.ExpectationCacheWriter(folder, **{**WRITER, **options}) as writer:
        for number in range(len(writer), count):
            _, teacher, labels = captured(number)
            writer.append(teacher, labels=labels)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_written_comes_back(tmp_path, dtype):
    write(tmp_path, dtype=DTYPES[dtype])
    cache = kd_cache.ExpectationCache(tmp_path, **IDENTITY, verify="full")
    assert len(cache) == NUM_SEQUENCES and len(cache.index.shards) > 1
    for number in (6, 0, 3):
        _, teacher, labels = captured(number)
        found = cache[number]
        assert torch.equal(found.expectation, teacher.expectation.to(DTYPES[dtype]).float())
        assert torch.equal(found.entropy, teacher.entropy) and torch.equal(found.expected_bias, teacher.bias)
        assert torch.equal(found.extras["labels"], labels.to(torch.int32))
        assert {x.dtype for x in found[:3]} == {torch.float32}
        found.expectation.zero_()
        assert torch.equal(cache[number].entropy, teacher.entropy) and cache[number].expectation.any()
    assert cache.index.layout.token_bytes == D * DTYPES[dtype].itemsize + 4 + 4 + 4


def test_a_student_trains_from_it_as_from_its_teacher(tmp_path):
    cache = kd_cache.ExpectationCache(write(tmp_path), **IDENTITY)
    loader = torch.utils.data.DataLoader(
        kd_cache.TeacherDataset(cache), batch_size=3, collate_fn=kd_cache.collate, num_workers=1
    )
    batch = next(iter(loader))
    assert batch["length"].tolist() == [6, 11, 16] and batch["labels"][0, 6:].eq(-100).all()
    hidden = torch.randn(3, 16, D, requires_grad=True)
    loss = kd.linear_kd_loss(
        hidden, HEAD, labels=batch["labels"], teacher_expectation=cache.teacher(batch), temperature=T, ce_weight=0.5
    )
    (found,) = torch.autograd.grad(loss, hidden)
    teacher = torch.nn.utils.rnn.pad_sequence([captured(number)[0] for number in range(3)], batch_first=True)
    full = kd.linear_kd_loss(
        hidden,
        HEAD,
        labels=batch["labels"],
        teacher_logits=lambda rows: teacher.view(-1, V)[rows],
        temperature=T,
        ce_weight=0.5,
    )
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(full, hidden)[0], rtol=1e-5, atol=1e-6)
    alone = cache.teacher(cache[1])
    assert alone.temperature == T and torch.equal(alone.bias, captured(1)[1].bias)


def test_a_writer_goes_on_where_one_stopped(tmp_path):
    whole = write(tmp_path / "whole")
    folder = tmp_path / "resumed"
    writer = kd_cache.ExpectationCacheWriter(folder, **WRITER)
    for number in range(5):
        _, teacher, labels = captured(number)
        writer.append(teacher, labels=labels)
    closed = writer.closed
    assert 0 < closed < 5
    writer._unlock()  # as a kill: what is in no closed shard is gone
    assert len(kd_cache.ExpectationCache(folder, **IDENTITY)) == closed
    assert files(write(folder)) == files(whole)


def test_a_head_without_a_bias(tmp_path):
    weight = HEAD.weight.detach().clone()
    teacher = kd.capture_expectation(captured(0)[0], weight)
    with kd_cache.ExpectationCacheWriter(tmp_path, tokenizer="t", vocab_size=V, head=weight) as writer:
        writer.append(teacher)
        with pytest.raises(ValueError, match="bias must not be given: the cache has bias=False"):
            writer.append(teacher._replace(bias=teacher.entropy))
    cache = kd_cache.ExpectationCache(tmp_path, tokenizer="t", vocab_size=V, head=weight)
    assert cache[0].expected_bias is None and cache.teacher(cache[0]).bias is None
    assert "expected_bias" not in kd_cache.TeacherDataset(cache)[0]


def test_another_head_is_an_error(tmp_path):
    write(tmp_path)
    moved = head()
    moved.weight[3, 4] += 1e-6
    for other in (moved, HEAD.weight, (HEAD.weight, moved.bias + 1), moved.weight.half()):
        with pytest.raises(kd_cache.IdentityMismatchError, match="was captured with head 'sha256:"):
            kd_cache.ExpectationCache(tmp_path, **{**IDENTITY, "head": other})
    for same in (None, (HEAD.weight, HEAD.bias), kd_cache.head_fingerprint(HEAD), head()):
        assert len(kd_cache.ExpectationCache(tmp_path, **{**IDENTITY, "head": same})) == NUM_SEQUENCES
    with pytest.raises(kd_cache.IdentityMismatchError, match="was captured with head"):
        kd_cache.ExpectationCacheWriter(tmp_path, **{**WRITER, "head": moved})
    with pytest.raises(kd_cache.IdentityMismatchError, match="begun with dtype float32, and float16 was asked for"):
        kd_cache.ExpectationCacheWriter(tmp_path, **WRITER, dtype=torch.float16)
    with pytest.raises(kd_cache.IdentityMismatchError, match=r"temperature 2\.0, and 1\.0 was asked for"):
        kd_cache.ExpectationCache(tmp_path, **{**IDENTITY, "temperature": 1.0})
    with pytest.raises(kd_cache.VocabularyMismatchError, match="tokenizer 't', and 'u' was asked for"):
        kd_cache.ExpectationCache(tmp_path, **{**IDENTITY, "tokenizer": "u"})


def test_the_two_kinds_of_caches_are_told_apart(tmp_path):
    write(tmp_path / "expectations")
    entries = {"tokenizer": "t", "vocab_size": V, "k": 3}
    with kd_cache.TeacherCacheWriter(tmp_path / "entries", **entries) as writer:
        writer.append(*kd.capture_topk(captured(0)[0], 3))
    message = "has expectations under a student's head, and ids and log-probabilities were .*: ExpectationCache reads"
    for kind in (kd_cache.TeacherCache, kd_cache.TeacherCacheWriter):
        with pytest.raises(kd_cache.IdentityMismatchError, match=message):
            kind(tmp_path / "expectations", **entries)
    for kind in (kd_cache.ExpectationCache, kd_cache.ExpectationCacheWriter):
        with pytest.raises(kd_cache.IdentityMismatchError, match="has ids and log-probabilities, and .*: TeacherCache"):
            kind(tmp_path / "entries", **IDENTITY)


def test_wrong_input_adds_nothing(tmp_path):
    _, teacher, labels = captured(0)
    wrong = [
        (TypeError, "teacher must be a TeacherExpectation, got Tensor", teacher.expectation, {}),
        (ValueError, r"temperature must be the cache's 2\.0, got 1\.0", teacher._replace(temperature=1.0), {}),
        (ValueError, "bias must be given: the cache has bias=True", teacher._replace(bias=None), {}),
        (ValueError, r"expectation must have shape \(L, 12\)", teacher._replace(expectation=teacher.expectation.T), {}),
        (TypeError, "expectation must be float32", teacher._replace(expectation=teacher.expectation.int()), {}),
        (TypeError, "entropy must be a torch.Tensor, got NoneType", teacher._replace(entropy=None), {}),
        (ValueError, "entropy must have one value per token", teacher._replace(entropy=teacher.entropy[1:]), {}),
        (ValueError, "entropy must be at least 0, got -", teacher._replace(entropy=-teacher.entropy), {}),
        (ValueError, "expectation must be finite", teacher._replace(expectation=teacher.expectation / 0), {}),
        (ValueError, "expectation must be finite", teacher._replace(expectation=teacher.expectation * 1e6), {}),
        (ValueError, r"extras must be \['labels'\], got \[\]", teacher, None),
        (ValueError, "labels must fit int32", teacher, {"labels": labels + 2**40}),
    ]
    with kd_cache.ExpectationCacheWriter(tmp_path, **WRITER, dtype=torch.float16) as writer:
        for error, message, given, extras in wrong:
            extras = {} if extras is None else {"labels": labels, **extras}
            with pytest.raises(error, match=message):
                writer.append(given, **extras)
        assert len(writer) == 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"head": "sha256:0"}, TypeError, "head must be a module, a tensor or a tuple of two, got str"),
        ({"head": HEAD.weight[0]}, ValueError, "head_weight must have shape"),
        ({"dtype": torch.float64}, ValueError, "dtype must be float32, float16 or bfloat16"),
        ({"extras": {"entropy": torch.int32}}, ValueError, "extras must not have the name 'entropy'"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
    ],
)
def test_wrong_options_leave_no_cache(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        kd_cache.ExpectationCacheWriter(tmp_path / "new", **{**WRITER, **change})
    assert not (tmp_path / "new").exists()


def test_damage_is_found(tmp_path, capsys):
    write(tmp_path)
    shard = tmp_path / "teacher-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    cache = kd_cache.ExpectationCache(tmp_path, **IDENTITY)
    with pytest.raises(kd_cache.ChecksumError):
        list(cache)
    assert cli.main(["cache", "verify", str(tmp_path)]) == 1
    assert "teacher-00001.safetensors  ChecksumError" in capsys.readouterr().out


def test_info(tmp_path, capsys):
    assert cli.main(["cache", "info", str(write(tmp_path, dtype=torch.bfloat16))]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["expectation"] == "12 (bfloat16)" and facts["head"] == kd_cache.head_fingerprint(HEAD)
    assert facts["bias"] == "yes" and "top-k" not in facts


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {"hidden_size": 0}},
        {"identity": {"hidden_size": "12"}},
        {"identity": {"head": 3}},
        {"identity": {"k": 5}},
        {"dtype": "float64"},
        {"bias": 1},
        {"tail": True},
        {"version": 1},
    ],
    ids=lambda change: json.dumps(change),
)
def test_every_malformed_index_is_a_format_error(tmp_path, change):
    write(tmp_path, 1)
    path = tmp_path / "index.json"
    content = json.loads(path.read_text())
    assert content["version"] == 2 and set(content) == {
        *("format", "version", "identity", "dtype", "bias", "extras", "shards", "sha256")
    }
    content["identity"] |= change.get("identity", {})
    content |= {name: value for name, value in change.items() if name != "identity"}
    del content["sha256"]
    path.write_text(json.dumps({**content, "sha256": _sha256(canonical_json(content))}))
    with pytest.raises(kd_cache.CacheFormatError):
        Index.read(tmp_path)
