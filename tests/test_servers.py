"""Teachers out of servers' answers: the shapes that vLLM, SGLang and OpenAI's API give, and a server on loopback."""

import http.server
import json
import math
import threading
import urllib.request
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kdkernels as kd
from kdkernels import servers

V, L, K = 30, 5, 4
LOGITS = torch.randn(L, V, generator=torch.Generator().manual_seed(0)) * 2
TOKENS = [3, 17, 4, 29, 8]
EXACT = kd.capture_topk(LOGITS, K)
Logprob = namedtuple("Logprob", ["logprob", "rank", "decoded_token"])


def entries(row, extra=None):
    """(id, log-probability, rank) of the K likeliest, and of one more where its rank is above K."""
    logprobs = LOGITS[row].log_softmax(-1)
    order = logprobs.argsort(descending=True).tolist()
    found = [(token, logprobs[token].item(), rank) for rank, token in enumerate(order[:K], 1)]
    if extra is not None and extra not in order[:K]:
        found.insert(0, (extra, logprobs[extra].item(), order.index(extra) + 1))
    return found


# A model's word on token i stands at i.
VLLM = [None, *({t: Logprob(x, r, str(t)) for t, x, r in entries(i, TOKENS[i + 1])} for i in range(L - 1))]
SGLANG = [None, *([(x, t, None) for t, x, _ in entries(i)] for i in range(L - 1))]


def same(found, expected=EXACT, rows=slice(0, L - 1)):
    assert found.ids.dtype == torch.int32 and torch.equal(found.ids, expected.ids[rows])
    torch.testing.assert_close(found.logprobs, expected.logprobs[rows])
    torch.testing.assert_close(found.tail_logprob, expected.tail_logprob[rows], rtol=1e-4, atol=1e-5)


def test_the_prompt_s_own_tokens_are_told_by_their_ranks():
    same(kd.TeacherTopK.from_vllm(VLLM, K))
    whole = kd.TeacherTopK.from_vllm(VLLM)
    assert whole.ids.shape == (L - 1, K + 1)
    rows = torch.arange(L - 1)
    assert (whole.ids == torch.tensor(TOKENS[1:])[:, None]).any(-1).all()
    expected = kd.gather_logprobs(LOGITS[rows], whole.ids)
    torch.testing.assert_close(whole.logprobs, expected.logprobs)
    torch.testing.assert_close(whole.tail_logprob, expected.tail_logprob, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_vllm_gives_the_loss_of_the_logits_before_each_token():
    student = torch.randn(L, V, requires_grad=True)
    teacher = kd.TeacherTopK.from_vllm(VLLM, K)
    losses = [
        kd.topk_kd_loss(student[:-1], *given[:2], tail_logprob=given.tail_logprob, divergence="reverse_kl")
        for given in (teacher, kd.TeacherTopK(*(x[:-1] for x in EXACT)))
    ]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert student.grad[:-1].any() and not student.grad[-1].any()


def test_json_of_a_server_of_vllm():
    text = json.dumps([p and {str(t): entry._asdict() for t, entry in p.items()} for p in VLLM])
    same(kd.TeacherTopK.from_vllm(json.loads(text), k=K))


def test_texts_of_unequal_length_are_padded_by_rows_without_entries():
    teacher = kd.TeacherTopK.from_vllm([VLLM, VLLM[:3]], K)
    assert teacher.ids.shape == (2, L - 1, K)
    same(kd.TeacherTopK(*(x[0] for x in teacher)))
    assert (teacher.ids[1, 2:] == -1).all() and (teacher.tail_logprob[1, 2:] == 0).all()
    student = torch.randn(2, L - 1, V)
    rows = kd.topk_kd_loss(student, *teacher[:2], tail_logprob=teacher.tail_logprob, reduction="none")
    assert (rows[1, 2:] == 0).all() and (rows[0] > 0).all()


def test_generated_tokens_have_no_none_first():
    same(kd.TeacherTopK.from_vllm(VLLM[1:], K))
    same(kd.TeacherTopK.from_sglang(SGLANG[1:]))


def test_sglang():
    same(kd.TeacherTopK.from_sglang(SGLANG))
    # JSON has lists in place of tuples, and None where there is no list.
    same(kd.TeacherTopK.from_sglang(json.loads(json.dumps(SGLANG))))
    batch = kd.TeacherTopK.from_sglang([SGLANG, SGLANG[:2]], k=2)
    assert batch.ids.shape == (2, L - 1, 2) and (batch.ids[1, 1:] == -1).all()
    assert torch.equal(batch.ids[0], EXACT.ids[: L - 1, :2])


def test_empty_answers():
    teachers = [kd.TeacherTopK.from_vllm([None]), kd.TeacherTopK.from_sglang([])]
    teachers += [kd.TeacherTopK.from_openai({field: []}, {}) for field in ("content", "top_logprobs")]
    for teacher in teachers:
        assert teacher.ids.shape == (0, 1) and teacher.tail_logprob.shape == (0,)


def test_an_empty_answer_in_a_batch():
    teacher = kd.TeacherTopK.from_openai([chat([0]), {"content": [], "top_logprobs": None}], dict.fromkeys(WORDS, 3))
    assert teacher.ids.shape[:2] == (2, 1) and teacher.ids[1, 0].eq(-1).all()


# Tokens by their texts

WORDS = [" a", "a", "\n", "é", "token", " token", *(chr(0x4E00 + i) for i in range(V - 6))]


def chat(rows, word=lambda token: WORDS[token]):
    return {
        "content": [
            {
                "token": word(TOKENS[i]),
                "logprob": 0.0,
                "bytes": None,
                "top_logprobs": [
                    {"token": word(t), "logprob": x, "bytes": list(WORDS[t].encode())} for t, x, _ in entries(i)
                ],
            }
            for i in rows
        ]
    }


def as_objects(value):
    """JSON as the objects of a client."""
    if isinstance(value, dict):
        return SimpleNamespace(**{name: as_objects(x) for name, x in value.items()})
    return [as_objects(x) for x in value] if isinstance(value, list) else value


OF_WORDS = {word: i for i, word in enumerate(WORDS)}


@pytest.mark.parametrize(
    "table",
    [OF_WORDS, {word.encode(): i for word, i in OF_WORDS.items()}, OF_WORDS.get],
    ids=["texts", "bytes", "function"],
)
def test_openai_s_chat(table):
    answer = chat(range(L))
    same(kd.TeacherTopK.from_openai(answer, table), rows=slice(L))
    same(kd.TeacherTopK.from_openai(as_objects(answer), table), rows=slice(L))
    batch = kd.TeacherTopK.from_openai([answer, chat(range(2))], table)
    assert batch.ids.shape == (2, L, K) and (batch.ids[1, 2:] == -1).all()


def test_openai_s_completion_with_echo_has_none_first():
    top = [None, *({WORDS[t]: x for t, x, _ in entries(i)} for i in range(L - 1))]
    answer = {"tokens": [], "token_logprobs": [], "top_logprobs": top, "text_offset": []}
    same(kd.TeacherTopK.from_openai(answer, OF_WORDS))


def test_tokens_written_as_ids_need_no_table():
    same(kd.TeacherTopK.from_openai(chat(range(L), word=lambda t: f"token_id:{t}"), {}), rows=slice(L))


def test_a_token_without_a_number_is_no_entry():
    answer = chat(range(L))
    answer["content"][1]["top_logprobs"][K - 1]["logprob"] = -9999.0
    answer["content"][1]["top_logprobs"][K - 1]["token"] = "not in the table"
    teacher = kd.TeacherTopK.from_openai(answer, OF_WORDS)
    assert (teacher.ids[1] == -1).tolist() == [False, False, False, True]
    torch.testing.assert_close(teacher.logprobs[1, :3], EXACT.logprobs[1, :3])


def test_a_token_that_is_not_in_the_table_is_an_error_or_tail():
    table = {word: i for word, i in OF_WORDS.items() if i != int(EXACT.ids[2, 1])}
    with pytest.raises(ValueError, match="token_ids has no id for the token '.*': pass the tokenizer"):
        kd.TeacherTopK.from_openai(chat(range(L)), table)
    teacher = kd.TeacherTopK.from_openai(chat(range(L)), table, missing="tail")
    row = EXACT.logprobs[2].exp()
    assert (teacher.ids[2] >= 0).sum() == K - 1
    torch.testing.assert_close(teacher.tail_logprob[2].exp(), EXACT.tail_logprob[2].exp() + row[1])


class Vocabulary:
    all_special_tokens = ["<eos>"]

    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


def test_tables_of_tokenizers():
    byte_level = servers.token_table(Vocabulary("<eos>", "\u0120the", "\u010a", "\u00c3\u00a9", "x"))
    assert byte_level == {b"<eos>": 0, b" the": 1, b"\n": 2, "é".encode(): 3, b"x": 4}
    pieces = servers.token_table(Vocabulary("<eos>", "\u2581the", "<0x0A>", "é", "a", "<0x61>"))
    assert pieces == {b"<eos>": 0, b" the": 1, b"\n": 2, "é".encode(): 3, b"a": 4}


def test_the_byte_alphabet_is_that_of_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    assert sorted(servers.byte_alphabet()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    decoder = tokenizers.decoders.ByteLevel()
    assert all(decoder.decode([c]) == chr(b) for c, b in servers.byte_alphabet().items() if b < 128)


# Masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_from_mask(dtype):
    mask = torch.ones(L, K, dtype=torch.bool)
    mask[1, 2:] = mask[3] = False
    ids, logprobs = EXACT.ids.long().clone(), EXACT.logprobs.to(dtype)
    ids[3], logprobs[3] = 10**6, 5.0
    teacher = kd.TeacherTopK.from_mask(ids, logprobs, mask)
    assert torch.equal(teacher.ids, torch.where(mask, EXACT.ids, -1)) and teacher.logprobs.dtype == dtype
    assert teacher.tail_logprob[3] == 0
    p = torch.where(mask, logprobs, -torch.inf).double().exp().sum(-1)
    torch.testing.assert_close(teacher.tail_logprob.double(), torch.log1p(-p), rtol=1e-5, atol=1e-6)
    rows = kd.TeacherTopK.from_mask(ids, logprobs, torch.tensor([1, 1, 1, 0, 1]))
    assert (rows.ids[3] == -1).all() and (rows.ids[1] >= 0).all()


def test_a_sure_teacher_leaves_a_tail_that_rounding_leaves_open():
    teacher = kd.TeacherTopK.from_mask(torch.zeros(1, 1).long(), torch.zeros(1, 1), torch.ones(1, 1))
    assert 1e-8 < teacher.tail_logprob.exp() < 1e-6
    loss = kd.topk_kd_loss(torch.randn(1, V), *teacher[:2], tail_logprob=teacher.tail_logprob, divergence="reverse_kl")
    assert torch.isfinite(loss)


# Errors


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda t: t.from_vllm("text"), TypeError, "prompt_logprobs must be a list of positions, got str"),
        (
            lambda t: t.from_vllm(SimpleNamespace(prompt_logprobs=[None])),
            TypeError,
            "got SimpleNamespace with the field prompt_logprobs$",
        ),
        (lambda t: t.from_sglang({"meta_info": {}}), TypeError, "got dict with the field meta_info$"),
        (lambda t: t.from_openai({"choices": []}, {}), TypeError, "got dict with the field choices: ask the server"),
        (lambda t: t.from_vllm([None, [1]]), TypeError, "prompt_logprobs must be a list of positions, got NoneType"),
        (lambda t: t.from_vllm([[1]]), TypeError, r"None or a dict \{id: logprob\} per position"),
        (lambda t: t.from_vllm([{"a": -1.0}]), TypeError, "ids that are integers, got 'a'"),
        (lambda t: t.from_vllm([{1: None}]), TypeError, "log-probabilities that are numbers, got None"),
        (lambda t: t.from_vllm([{1: math.nan}]), TypeError, "log-probabilities that are numbers, got nan"),
        (lambda t: t.from_vllm([{1: 0.5}]), ValueError, r"got 0.5 above 0: pass log\(p\) of probabilities"),
        (lambda t: t.from_vllm([{1: -1.0}], k=0), ValueError, "k must be at least 1"),
        (lambda t: t.from_sglang([[[-1.0]], [3]]), TypeError, "input_top_logprobs must have None or a list of"),
        (lambda t: t.from_openai({"content": None}, {}), TypeError, "logprobs must be choice.logprobs, with the field"),
        (lambda t: t.from_openai({"content": [{"token": "a"}]}, {}), ValueError, "top_logprobs at every position"),
        (lambda t: t.from_openai(chat([0]), 3), TypeError, "token_ids must be a tokenizer, a mapping"),
        (lambda t: t.from_openai(chat([0]), {}, missing="drop"), ValueError, "missing must be one of error, tail"),
        (lambda t: t.from_mask(EXACT.ids, EXACT.logprobs[:1], EXACT.ids), ValueError, "logprobs must have the shape"),
        (
            lambda t: t.from_mask(EXACT.ids, EXACT.logprobs, EXACT.ids[:1]),
            ValueError,
            "mask must have the shape of ids",
        ),
        (lambda t: t.from_mask(EXACT.logprobs, EXACT.logprobs, EXACT.ids), TypeError, "ids must be int64 or int32"),
    ],
)
def test_errors_name_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call(kd.TeacherTopK)


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parent.parent / "docs" / "guide" / "sparse-teachers.md").read_text()
    names: dict = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["teacher"].ids.tolist() == [[5, 9], [3, 7]] and names["loss"].requires_grad


# A server


class Handler(http.server.BaseHTTPRequestHandler):
    """The answers of ``/v1/completions`` and ``/v1/chat/completions`` of logits that hang on one token."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_chat = self.path == "/v1/chat/completions"
        tokens = [WORDS.index(x) for x in (asked["messages"][0]["content"] if is_chat else asked["prompt"])]
        k = asked["top_logprobs"] if is_chat else asked["logprobs"]
        positions = [MODEL[token].log_softmax(-1).topk(k) for token in tokens]
        if is_chat:
            # One token, the likeliest one.
            top = [
                {"token": WORDS[i], "bytes": list(WORDS[i].encode()), "logprob": x}
                for x, i in zip(*map(torch.Tensor.tolist, positions[-1]), strict=True)
            ]
            logprobs = {"content": [{**top[0], "top_logprobs": top}]}
        else:
            tops = [{WORDS[i]: x for x, i in zip(*map(torch.Tensor.tolist, p), strict=True)} for p in positions[:-1]]
            logprobs = {"tokens": [WORDS[t] for t in tokens], "top_logprobs": [None, *tops]}
        body = json.dumps({"choices": [{"index": 0, "logprobs": logprobs}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


MODEL = torch.randn(V, V, generator=torch.Generator().manual_seed(5)) * 2


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def post(url, asked):
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return json.load(answer)


def test_a_teacher_behind_a_server_teaches_as_its_logits_do(url):
    prompt = [WORDS[token] for token in TOKENS]
    answer = post(f"{url}/completions", {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": K})
    teacher = kd.TeacherTopK.from_openai(answer["choices"][0]["logprobs"], OF_WORDS)
    exact = kd.capture_topk(MODEL[TOKENS[:-1]], K)
    assert torch.equal(teacher.ids, exact.ids)
    losses = []
    for given in (teacher, exact):
        student = LOGITS[:-1].clone().requires_grad_()
        loss = kd.topk_kd_loss(student, *given[:2], tail_logprob=given.tail_logprob)
        losses.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_the_chat_of_a_server(url):
    messages = [{"role": "user", "content": [WORDS[token] for token in TOKENS]}]
    answer = post(f"{url}/chat/completions", {"messages": messages, "logprobs": True, "top_logprobs": K})
    teacher = kd.TeacherTopK.from_openai(answer["choices"][0]["logprobs"], OF_WORDS)
    assert torch.equal(teacher.ids, kd.capture_topk(MODEL[TOKENS[-1:]], K).ids)
