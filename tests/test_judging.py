"""Answers and judges, against a local server that speaks the API, and that fails, stalls or plays favourites."""

import json
import re
import shutil
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script

from lit_llama.adapters import load_adapter, save_adapter
from lit_llama.checkpoint import load_base
from lit_llama.evaluation import judging, statistics
from lit_llama.evaluation.answers import Question, append_row, read_folder, read_kept, read_questions
from lit_llama.evaluation.answers_page import write_page
from lit_llama.evaluation.statistics import bootstrap, share_interval
from lit_llama.script.evaluation import column_names


class Endpoint:
    """A server whose replies `reply` makes of the user's message; what it returns may be a status instead.

    `refuse` may find an error in a request's body, which is then answered with status 400.
    """

    def __init__(self):
        self.reply = lambda text: "Verdict: tie"
        self.refuse = lambda body: None
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers["Authorization"], body))
                refused = outer.refuse(body)
                found = 400 if refused else outer.reply(body["messages"][-1]["content"])
                status, content = (found, "") if isinstance(found, int) else (200, found)
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "j", "choices": [choice]}
                if status != 200:
                    reply = {"error": refused or {"message": f"refused with {status}", "type": "error"}}
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "5")
                with suppress(BrokenPipeError):  # who asked has given up
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        polling = {"poll_interval": 0.01}  # seconds, until it sees that it is to end
        threading.Thread(target=self.server.serve_forever, kwargs=polling, daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch):
    one = Endpoint()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{one.server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    yield one
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def answers(tmp_path):
    """Six questions in two categories; `good` answers with their number, `bad` with nonsense to the even ones."""
    questions = [{"question_id": i, "category": "odd" if i % 2 else "even", "turns": [f"Say {i}."]} for i in range(6)]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for name in ("good", "bad"):
        for i in range(6):
            text = f"Here is {i}: GOOD" if name == "good" or i % 2 else "Bla. BAD"
            row = {"question_id": i, "model_id": name, "choices": [{"index": 0, "turns": [text]}]}
            append_row(tmp_path / "model_answer" / f"{name}.jsonl", row)
    return tmp_path


def fair(text):
    """Prefers GOOD to BAD, whatever the order."""
    first, second = re.split("# The second answer", text)
    marks = "GOOD" in first, "GOOD" in second
    return "I compared them.\n\n**Verdict: " + ("tie" if marks[0] == marks[1] else "1" if marks[0] else "2") + "**"


def judge(command, answers, **options):
    options = {"judge_model": "j", "answers_dir": answers, "repeats": 2, **options}
    return command("evaluate/judge.py", "--model=good", "--model=bad", **options)


def test_a_fair_judge(command, answers, endpoint):
    endpoint.reply = fair
    status, out, err = judge(command, answers)
    assert status == 0, err
    assert "| even | 3 | 0 | 0 | 1.000 |" in out
    assert "| odd | 0 | 3 | 0 | 0.500 |" in out
    assert "| all | 3 | 3 | 0 | 0.750 |" in out  # (3 + 3 / 2) / 6
    assert "the same place in both orders in 0 of 12 rounds" in out
    assert len(endpoint.requests) == 24  # 6 questions, 2 rounds, 2 orders
    path, key, body = endpoint.requests[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "j")
    rows = list(read_kept(answers / "judgements" / "good-vs-bad.jsonl"))
    assert len(rows) == 24
    assert all({"question_id", "first", "second", "verdict", "judgement"} <= row.keys() for row in rows)
    assert (answers / "judgements" / "good-vs-bad.png").stat().st_size > 5000
    # All of it is there; a third round takes a third of it more.
    assert judge(command, answers)[1] == out
    assert len(endpoint.requests) == 24
    judge(command, answers, repeats=3)
    assert len(endpoint.requests) == 36


def test_the_orders_unmask_a_judge_that_prefers_the_first(command, answers, endpoint):
    endpoint.reply = lambda _: "Verdict: 1"
    status, out, _ = judge(command, answers)
    assert status == 0
    assert "| all | 0 | 6 | 0 | 0.500 |" in out
    assert "the same place in both orders in 12 of 12 rounds" in out


def test_failures_are_tried_again(command, answers, endpoint):
    failing = iter([500, 429, 503])
    endpoint.reply = lambda text: next(failing, None) or fair(text)
    status, out, err = judge(command, answers)
    assert status == 0, err
    assert "| all | 3 | 3 | 0 | 0.750 |" in out
    assert len(endpoint.requests) == 27


def test_a_stalling_endpoint_is_tried_again(command, answers, endpoint):
    stalls, over = iter([True]), threading.Event()

    def reply(text):
        if next(stalls, False):
            over.wait()
        return fair(text)

    endpoint.reply = reply
    status, out, err = judge(command, answers, timeout=2, repeats=1)  # what is slow for another reason is tried again
    over.set()
    assert status == 0, err
    assert "| all | 3 | 3 | 0 | 0.750 |" in out


def test_nonsense_does_not_count(command, answers, endpoint):
    endpoint.reply = lambda text: "What a day!" if "Say 2" in text else fair(text)
    status, out, _ = judge(command, answers)
    assert status == 0
    assert "| even | 2 | 0 | 0 | 1.000 |" in out
    assert "4 judgements hold no verdict" in out
    assert len(endpoint.requests) == 20 + 4 * 3  # three attempts at each
    endpoint.reply = fair  # and another run asks for those alone
    assert "| even | 3 | 0 | 0 | 1.000 |" in judge(command, answers)[1]
    assert len(endpoint.requests) == 32 + 4
    endpoint.reply = lambda _: "Bla."
    assert "no judgement could be read" in judge(command, answers, judge_model="other", repeats=1)[2]


@pytest.mark.parametrize(("status", "message"), [(401, "status 401, refused with 401"), (404, "status 404")])
def test_a_refusal_ends_with_what_there_is(command, answers, endpoint, status, message):
    endpoint.reply = lambda text: status if "Say 5" in text else fair(text)
    code, _, err = judge(command, answers, workers=1)
    assert code == 1
    assert message in err
    assert len(list(read_kept(answers / "judgements" / "good-vs-bad.jsonl"))) == 20


def openai_s(body):
    """What OpenAI's later models say of options that they do not take."""
    if "max_tokens" in body:
        message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        return {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}
    if body.get("temperature", 1) != 1:
        message = "Unsupported value: 'temperature' does not support 0.7 with this model."
        return {"message": message, "param": "temperature", "code": "unsupported_value"}
    return None


def another_s(body):
    """The same of an endpoint that says it in its text alone."""
    if "temperature" in body:
        return {"message": "temperature is deprecated for this model; neither it nor max_tokens need be given"}
    return {"message": "max_tokens: Extra inputs are not permitted"} if "max_tokens" in body else None


@pytest.mark.parametrize("refuse", [openai_s, another_s])
@pytest.mark.parametrize("workers", [1, 4])
def test_options_that_an_endpoint_refuses(command, answers, endpoint, refuse, workers):
    """The longest judgement by its other name, the temperature left out; learned once."""
    endpoint.reply, endpoint.refuse = fair, refuse
    status, out, err = judge(command, answers, max_tokens=700, workers=workers)
    assert status == 0, err
    assert "| all | 3 | 3 | 0 | 0.750 |" in out
    bodies = [body for *_, body in endpoint.requests]
    accepted = [body for body in bodies if not refuse(body)]
    assert len(accepted) == 24
    assert all(body["max_completion_tokens"] == 700 for body in accepted)
    assert not any({"temperature", "max_tokens"} & body.keys() for body in accepted)
    assert len(bodies) - len(accepted) <= 2 * workers  # what one request learned, the next ones know
    assert err.count("j refuses temperature; options sent from now on: ") == 1
    assert err.count("j refuses max_tokens; options sent from now on: ") == 1


def test_a_refusal_of_a_value_is_no_refusal_of_the_option(command, answers, endpoint):
    endpoint.refuse = lambda body: {"message": "max_tokens is too large: 512, at most 100", "param": "max_tokens"}
    status, _, err = judge(command, answers)
    assert status == 1
    assert "status 400, max_tokens is too large: 512" in err
    assert all("max_tokens" in body for *_, body in endpoint.requests)
    endpoint.refuse = lambda body: {"message": "unsupported: max_tokens, max_completion_tokens"}
    status, _, err = judge(command, answers)
    assert status == 1  # it is asked by either name, and no further
    assert "status 400, unsupported" in err


def test_the_temperature_can_be_left_to_the_endpoint(command, answers, endpoint):
    endpoint.reply = fair
    status, _, err = judge(command, answers, temperature="none")
    assert status == 0, err
    assert not any("temperature" in body for *_, body in endpoint.requests)


def test_no_endpoint_and_no_key(command, answers, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "set OPENAI_API_KEY" in judge(command, answers)[2]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    code, _, err = judge(command, answers, retries=0)
    assert code == 1
    assert "http://127.0.0.1:9/v1/ cannot be reached" in err


def test_a_dry_run_sends_nothing(command, answers, endpoint):
    status, out, err = judge(command, answers, dry_run="true", input_price=2, output_price=10)
    assert (status, out) == (0, "")
    assert re.search(
        r"24 requests \(0 judgements are there\), about [\d,]+ tokens to read, at most 12,288 to write", err
    )
    assert "at most $0.1" in err
    assert not endpoint.requests


def test_requests_per_minute(command, answers, endpoint, monkeypatch):
    """By a clock that stands still: each request waits a twentieth of a second longer than the one before."""
    endpoint.reply = fair
    waits = []
    monkeypatch.setattr(judging, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=waits.append, time=lambda: 0.0))
    judge(command, answers, repeats=1, requests_per_minute=1200)
    assert sorted(waits) == pytest.approx([0.05 * n for n in range(12)])


def test_changed_answers_are_judged_again(command, answers, endpoint):
    endpoint.reply = fair
    judge(command, answers)
    row = {"question_id": 1, "model_id": "bad", "choices": [{"index": 0, "turns": ["BAD, now"]}]}
    append_row(answers / "model_answer" / "bad.jsonl", row)
    assert "| all | 4 | 2 | 0 | 0.833 |" in judge(command, answers)[1]
    assert len(endpoint.requests) == 28


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: 1", "1"),
        ("fine\n**Verdict: 2**\n", "2"),
        ("verdict: TIE.", "tie"),
        ("Verdict: 1\nOn second thoughts:\nVerdict: 2", "2"),
        ("The verdict: 1 of them", None),
        ("Verdict: 12", None),
        ("", None),
    ],
)
def test_verdicts(text, verdict):
    assert load_script("evaluate/judge.py").read_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "score"), [("Score: 7", 7), ("So:\n**Score: 10/10**", 10), ("Score: 11", None), ("Scores are 3", None)]
)
def test_scores(text, score):
    assert load_script("evaluate/safety.py").read_score(text) == score


def test_bootstrap():
    """Of a fair coin thrown 100 times: about 1.96 standard errors of 0.05."""
    interval = bootstrap([0.0, 1.0] * 50)
    assert interval == pytest.approx((0.402, 0.598), abs=0.015)
    assert bootstrap([1.0] * 9) is bootstrap([0.5]) is None  # one of width zero would claim certainty


def test_bootstrap_of_a_ratio():
    """Numbers of different weight: those of the double-sized half count double; equal rates have no interval."""
    values, weights = [0.0, 2.0] * 50, [1.0, 2.0] * 50
    low, high = bootstrap(values, weights)
    assert low < 100 / 150 < high
    # The delta method: residuals values - weights * 2/3 are -2/3 and 2/3, over the mean weight of 1.5.
    assert (low, high) == pytest.approx((2 / 3 - 1.96 * (2 / 3) / 15, 2 / 3 + 1.96 * (2 / 3) / 15), abs=0.015)
    assert bootstrap([2.0, 4.0], [1.0, 2.0]) is None


def test_large_samples_are_drawn_in_parts(monkeypatch):
    values = [0.0, 1.0, 3.0] * 7
    whole = bootstrap(values)
    monkeypatch.setattr(statistics, "CHUNK", 1000)
    assert bootstrap(values) == whole


def test_the_interval_of_a_share():
    """Wilson's, by hand: of 0 of n it is z^2 / (n + z^2), and the other end of n of n is its mirror."""
    assert share_interval(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)))
    assert share_interval(10, 10) == pytest.approx((1 - 1.96**2 / (10 + 1.96**2), 1.0))
    assert share_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_safety_by_category(command, answers, endpoint):
    endpoint.reply = lambda text: "Harmless.\nScore: " + ("9" if "GOOD" in text else "4" if "Say 2" in text else "3")
    status, out, err = command("evaluate/safety.py", judge_model="j", answers_dir=answers, repeats=2)
    assert status == 0, err
    assert "| category | answers | bad | good |" in out
    assert "| even | 3 | 3.3 (3.0 to 4.0) | 9.0 |" in out  # 3, 4 and 3
    assert "| odd | 3 | 9.0 | 9.0 |" in out
    assert out.count("| all | 6 |") == 1
    assert len(endpoint.requests) == 24
    assert (answers / "judgements" / "safety.png").stat().st_size > 5000


def test_safety_without_categories(command, answers, endpoint):
    """Prompts without categories have the category "all", which is no row twice."""
    questions = (answers / "question.jsonl").read_text().replace('"odd"', '"all"').replace('"even"', '"all"')
    (answers / "question.jsonl").write_text(questions)
    endpoint.reply = lambda text: "Score: 9" if "GOOD" in text else "Score: 3"
    status, out, err = command("evaluate/safety.py", judge_model="j", answers_dir=answers, repeats=1)
    assert status == 0, err
    assert out.count("| all | 6 | 6.0 (4.0 to 8.0) | 9.0 |") == 1


def test_our_prompts_have_five_in_each_of_the_papers_categories():
    questions = read_questions(ROOT / "examples" / "safety.jsonl")
    categories = [question.category for question in questions]
    names = ["crime", "emotional harm", "immoral", "insult", "physical harm", "pornographic", "privacy", "social bias"]
    assert {name: categories.count(name) for name in categories} == dict.fromkeys(names, 5)


def test_answers_of_models(command, base_dir, aligner_path, tmp_path):
    """In FastChat's layout, turn by turn, each once, whatever was interrupted; the answers are `generate`'s."""
    questions = tmp_path / "q.jsonl"
    rows = [{"question_id": i, "category": "a", "turns": ["Count.", "Again."][: 1 + i % 2]} for i in range(4)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    options = {
        "checkpoint_dir": base_dir,
        "questions_path": questions,
        "out_dir": tmp_path / "out",
        "max_new_tokens": 6,
    }
    models = ["--model=base", f"--model=mine={aligner_path}"]
    status, _, err = command("evaluate/vicuna.py", *models, **options)
    assert status == 0, err
    file = tmp_path / "out" / "model_answer" / "mine.jsonl"
    rows = list(read_kept(file))
    assert sorted(row["question_id"] for row in rows) == [0, 1, 2, 3]
    assert {row["model_id"] for row in rows} == {"mine"}
    assert [len(row["choices"][0]["turns"]) for row in sorted(rows, key=lambda row: row["question_id"])] == [1, 2, 1, 2]
    plain = {"checkpoint_dir": base_dir, "aligner_path": aligner_path, "max_new_tokens": 6, "prompt": "Count."}
    text = command("generate/aligner.py", **plain)[1].strip()
    assert all(row["choices"][0]["turns"][0].strip() == text for row in rows)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1] + lines[2][:40])  # killed in the middle of a line
    assert command("evaluate/vicuna.py", *models, **options)[0] == 0
    again = [json.loads(line) for line in file.read_text().splitlines()]  # half a line is gone
    assert sorted(row["question_id"] for row in again) == [0, 1, 2, 3]
    assert {row["question_id"]: row["choices"] for row in again} == {row["question_id"]: row["choices"] for row in rows}
    questions.write_text(questions.read_text().replace("Again", "Once more"))
    assert "holds answers to other questions" in command("evaluate/vicuna.py", *models, **options)[2]


@pytest.mark.parametrize("categories", [["all", "all"], ["sums", "words"]])
def test_categories_are_chosen_from_where_there_are_some(tmp_path, categories):
    questions = [Question(number, category, ["Count."]) for number, category in enumerate(categories)]
    write_page(tmp_path / "a.html", questions, {"base": {0: ["1"], 1: ["2"]}}, "Answers")
    page = (tmp_path / "a.html").read_text()
    assert ('aria-label="Category" hidden' in page) == (categories[0] == "all")
    labels = re.findall('<div class="category">(.*)</div>', page)
    assert labels == (["0", "1"] if categories[0] == "all" else ["0 · sums", "1 · words"])


PROMPTS = {
    "lines.txt": "Count.\n\nAgain: é.\n",
    "rows.jsonl": '{"prompt": "Count."}\n{"instruction": "Again: é.", "input": null}\n',
    "rows.json": '[{"instruction": "Count.", "prompt": null}, {"turns": ["Again: é."]}]',
    "table.csv": "topic,prompt\nsums,Count.\nwords,Again: é.\n",
    "fastchat.jsonl": '{"question_id": 1, "category": "all", "turns": ["Count."]}\n'
    '{"question_id": 2, "category": "all", "turns": ["Again: é."]}\n',
}


@pytest.mark.parametrize("name", PROMPTS)
def test_one_reader_of_prompts(command, base_dir, aligner_path, tmp_path, name):
    """What generate reads the others read, and answer alike."""
    file = tmp_path / name
    file.write_text(PROMPTS[name])
    assert read_questions(file) == [Question(1, "all", ["Count."]), Question(2, "all", ["Again: é."])]
    options = {"checkpoint_dir": base_dir, "max_new_tokens": 6}
    status, out, err = command("generate/aligner.py", aligner_path=aligner_path, prompts_file=file, **options)
    assert status == 0, err
    kept = {"out_dir": tmp_path / "out", **options}
    status, _, err = command("evaluate/side_by_side.py", prompts_file=file, adapter_path=aligner_path, **kept)
    assert status == 0, err
    _, answers = read_folder(tmp_path / "out", ["aligner"])
    assert "\n".join(answers["aligner"][i][0] + "\n" for i in (1, 2)) == out
    status, _, err = command(
        "evaluate/vicuna.py", f"--model=aligner={aligner_path.parent}", questions_path=file, **kept
    )
    assert status == 0, err
    assert len((tmp_path / "out" / "model_answer" / "aligner.jsonl").read_text().splitlines()) == 2  # all were there


def test_inputs_and_turns(command, base_dir, aligner_path, tmp_path):
    """An input stands in the place that the prompt style has for it; a question of two turns is not generate's."""
    file = tmp_path / "q.jsonl"
    file.write_text('{"instruction": "Translate.", "input": "Le chat."}\n')
    options = {"checkpoint_dir": base_dir, "max_new_tokens": 6, "prompt_style": "alpaca", "prompts_file": file}
    status, out, err = command("generate/aligner.py", aligner_path=aligner_path, **options)
    assert status == 0, err
    options["out_dir"] = tmp_path / "out"
    assert command("evaluate/side_by_side.py", adapter_path=aligner_path, **options)[0] == 0
    questions, answers = read_folder(tmp_path / "out", ["aligner"])
    assert questions[0].input == "Le chat."
    assert answers["aligner"][1][0] + "\n" == out
    assert "Translate.\n\nLe chat." in (tmp_path / "out" / "responses.html").read_text()
    file.write_text('{"turns": ["One.", "Two."]}')
    message = "line 1: a question of 2 turns, and this script answers one: evaluate/vicuna.py"
    assert message in command("generate/base.py", checkpoint_dir=base_dir, prompts_file=file)[2]


def test_did_it_work(command, base_dir, aligner_path, tmp_path):
    """Answers in columns, the base first; the share that matches; only what has changed is asked again."""
    file, out_dir = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("".join(f"Say {i}.\n" for i in range(5)))
    options = {"checkpoint_dir": base_dir, "prompts_file": file, "out_dir": out_dir, "max_new_tokens": 12}
    again = tmp_path / "again" / "aligner.safetensors"  # half of the first
    again.parent.mkdir()
    adapter = load_adapter(aligner_path)
    with torch.no_grad():
        for gate in adapter.parameters():
            gate.mul_(0.5)
    save_adapter(again, adapter, base=load_base(base_dir), prompt_style="chat")
    adapters = [f"--adapter_path={aligner_path.parent}", f"--adapter_path={again}"]
    status, out, err = command("evaluate/side_by_side.py", *adapters, matches="(?i)[aeiou].*[st]", shown=2, **options)
    assert status == 0, err
    assert re.search(r"^prompt +base +aligner +again$", out, re.M)
    assert "... and 3 more on the page" in out
    assert f"page: {out_dir / 'responses.html'}" in err
    _, answers = read_folder(out_dir, ["base", "aligner", "again"])
    for name, texts in answers.items():
        n = sum(bool(re.search("(?i)[aeiou].*[st]", text)) for [text] in texts.values())
        low, high = share_interval(n, 5)
        assert f"| {name} | 5 | {n / 5:.1%} | {low:.1%} to {high:.1%} |" in out
    page = (out_dir / "responses.html").read_text()
    assert page.count("<section ") == 5
    assert page.count("<mark>matches</mark>") == sum(
        bool(re.search("(?i)[aeiou].*[st]", text)) for texts in answers.values() for [text] in texts.values()
    )

    def lines():
        return {name: len((out_dir / "model_answer" / f"{name}.jsonl").read_text().splitlines()) for name in answers}

    assert command("evaluate/side_by_side.py", *adapters, **options)[0] == 0
    assert lines() == {"base": 5, "aligner": 5, "again": 5}
    save_adapter(again, load_adapter(aligner_path), base=load_base(base_dir), prompt_style="chat")  # trained again
    file.write_text(file.read_text().replace("Say 4", "Tell me 4"))
    assert command("evaluate/side_by_side.py", *adapters, **options)[0] == 0
    assert lines() == {"base": 6, "aligner": 6, "again": 10}
    _, answers = read_folder(out_dir, ["aligner", "again"])
    assert answers["aligner"] == answers["again"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matches": "("}, "--matches (: not a regular expression"),
        ({"batch_size": 0}, "--batch_size is 0, it must be at least 1"),
        ({"shown": -1}, "--shown is -1, it must be at least 0"),
        ({"prompts_file": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"prompts_file": "empty.txt"}, "empty.txt holds no prompt; expected one on each line"),
        ({"adapter_path": "nowhere"}, "nowhere: no such file"),
        ({"adapter_path": "."}, ". is a folder and holds no adapter"),
    ],
)
def test_side_by_side_with_bad_options(command, base_dir, aligner_path, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("One.")
    (tmp_path / "empty.txt").write_text("\n")
    options = {"checkpoint_dir": base_dir, "prompts_file": "p.txt", "adapter_path": aligner_path, **options}
    status, out, err = command("evaluate/side_by_side.py", **options)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_names_of_columns(aligner_path, tmp_path):
    """A run's folder names its adapter; where two have that name, the path does."""
    for folder in ("a/run", "b/run", "base"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(aligner_path, tmp_path / folder / "aligner.safetensors")
    names = column_names([tmp_path / "a/run", tmp_path / "base", aligner_path], "base")
    root = "-".join(tmp_path.parts[1:])
    assert list(names) == ["run", f"{root}-base-aligner", "aligner"]
    assert names["run"] == tmp_path / "a" / "run" / "aligner.safetensors"
    assert list(column_names([tmp_path / "a/run", tmp_path / "b/run"])) == [
        f"{root}-a-run-aligner",
        f"{root}-b-run-aligner",
    ]
    with pytest.raises(ValueError, match="is given twice"):
        column_names([aligner_path, aligner_path.parent])


def test_bad_questions_and_answers_name_the_place(command, answers, tmp_path):
    bad = tmp_path / "bad.jsonl"
    for text, message in (
        ('{"question_id": 1, "text": "Hm?"}', "line 1: expected a text under 'prompt' or 'instruction', or a list"),
        ('{"turns": []}', "line 1: expected a text under 'prompt'"),
        ('{"prompt": 3}', "line 1: expected a text under 'prompt'"),
        ('{"prompt": "Hm?", "input": ["a"]}', "line 1: expected a text under 'input', found list"),
        ('{"prompt": "Hm?", "aligner": "a"}', "line 1: names the adapter a"),
        ("", "is empty"),
    ):
        bad.write_text(text)
        assert (
            f"bad.jsonl{', ' * (text != '')}{' ' * (text == '')}{message}"
            in command("evaluate/vicuna.py", questions_path=bad)[2]
        )
    one = '{"question_id": 1, "category": "a", "turns": ["Hm?"]}'
    bad.write_text(f"{one}\n{one}")
    assert "bad.jsonl, line 2: there are two questions" in command("evaluate/vicuna.py", questions_path=bad)[2]
    assert "there are bad, good" in command("evaluate/responses.py", "--model=other", answers_dir=answers)[2]
    file = answers / "model_answer" / "bad.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert "lacks answers to 1 of 6 questions, the first is 5" in judge(command, answers)[2]
    file.write_text('{"question_id": 1}')
    assert "bad.jsonl, line 1: expected 'question_id' and 'choices'" in judge(command, answers)[2]
    shutil.rmtree(answers / "model_answer")
    assert "holds no answers: write them with evaluate/vicuna.py" in judge(command, answers)[2]


def test_a_page_for_people(command, answers, tmp_path):
    """In a browser, offline: every answer is there as text, and search and categories hide what they should."""
    row = {"question_id": 0, "model_id": "bad", "choices": [{"index": 0, "turns": ["<script>alert(1)</script> & co"]}]}
    append_row(answers / "model_answer" / "bad.jsonl", row)
    status, out, err = command("evaluate/responses.py", answers_dir=answers)
    assert status == 0, err
    assert "6 prompts, 2 models" in out
    page_file = answers / "responses.html"
    assert not re.search(r"(?:src|href)=|https?://|@import", page_file.read_text())
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or pytest.skip("no chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page()
        failures = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("dialog", lambda dialog: failures.append(dialog.message))
        page.goto(page_file.as_uri())
        assert page.locator("section:visible").count() == 6
        assert page.locator("section").first.locator(".text").first.text_content() == "<script>alert(1)</script> & co"
        assert page.locator("section").first.locator(".model").all_text_contents() == ["bad", "good"]
        page.select_option("#category", "odd")
        assert page.locator("section:visible").count() == 3
        page.fill("#search", "say 3")
        assert page.locator("section:visible").count() == 1
        assert page.text_content("#count") == "1 of 6 prompts"
        assert not failures
        browser.close()
