"""A server's life in real processes: who is let in, what is too much, who hangs up, and how it ends."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from moeforge.cli.main import main
from tests.serve.conftest import Served, free_port, model_folder, serving

openai = pytest.importorskip("openai", reason="the client that everybody uses")


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """What a server says that does not start, in one line; exit code 2."""

    def ask(folder: Path, *options: object) -> str:
        assert main(["serve", str(folder), *map(str, options)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return ask


def test_a_port_in_use_is_said_before_the_model_is_opened(tmp_path: Path, refused: Refused) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port}" in refused(tmp_path / "no model", "--port", port)


def test_other_machines_need_keys(tmp_path: Path, refused: Refused) -> None:
    assert "--api-key-file" in refused(tmp_path, "--host", "0.0.0.0", "--port", free_port())


def test_a_file_without_keys_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    assert "holds no API key" in refused(tmp_path, "--api-key-file", tmp_path / "keys", "--port", free_port())


def test_a_folder_cut_short_is_refused(folder: Path, tmp_path: Path, refused: Refused) -> None:
    for file in (path for path in folder.iterdir() if path.is_file()):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged or cut short" in refused(tmp_path, "--port", free_port())


def test_a_model_whose_routers_compare_tokens_is_refused(tmp_path: Path, refused: Refused) -> None:
    moe = {"experts": {"num_experts": 4, "d_expert": 16}, "router": {"select": "expert_choice", "losses": []}}
    folder = model_folder(tmp_path / "leaky", moe=moe)
    assert "--unsafe-batch-dependent" in refused(folder, "--port", free_port())
    with serving(folder, "--unsafe-batch-dependent") as served:
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200


def test_memory_that_is_not_there_is_said_before(folder: Path, refused: Refused) -> None:
    assert "GiB" in refused(folder, "--kv-memory", 1e6, "--max-running", 10**7, "--port", free_port())


def test_keys(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# two\none\ntwo\n")
    with serving(folder, "--host", "0.0.0.0", "--api-key-file", tmp_path / "keys") as served:
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        for key, status in ((None, 401), ("three", 401), ("one two", 401), ("one", 200), ("two", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            for path in ("/v1/models", "/metrics", "/facts"):
                assert httpx.get(f"{url}{path}", headers=headers).status_code == status
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="three").models.list()
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="two").models.list().data[0].id == "tiny"


def test_no_key_learns_from_what_was_reused_what_another_has_asked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    with serving(folder, "--api-key-file", tmp_path / "keys") as served:

        def reused(key: str, stream: bool = False) -> int:
            client, options = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key), {"include_usage": True}
            asked: Any = {"stream": True, "stream_options": options} if stream else {}
            answer: Any = client.completions.create(model="tiny", prompt="x" * 40, max_tokens=1, **asked)
            usage = [*answer][-1].usage if stream else answer.usage
            return usage.prompt_tokens_details.cached_tokens

        assert [reused("one"), reused("two"), reused("one"), reused("two", stream=True)] == [0, 0, 32, 32]
        assert [reused("two"), reused("one", stream=True)] == [32, 32]


def test_keys_from_the_environment(folder: Path) -> None:
    with serving(folder, MOEFORGE_API_KEYS="one, two") as served:
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer two"}
        assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 200


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(server: Served) -> None:
    size = (4 << 20) + 10
    said = httpx.post(f"{server.url}/v1/completions", content=b"a" * size)
    unsaid = httpx.post(f"{server.url}/v1/completions", content=(b"a" * 65536 for _ in range(70)))
    for answer in (said, unsaid):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


LONG = {"prompt": "a", "max_tokens": 250, "ignore_eos": True}


def test_who_hangs_up_frees_the_place(server: Served) -> None:
    before = server.metric("moeforge_tokens_written_total")
    for stream in (True, False):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as line:
                body = json.dumps(LONG | {"stream": stream, "n": 2}).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
                line.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
                if stream:
                    line.recv(100)
    server.until(lambda: server.metric("moeforge_running_requests") == 0)
    assert server.metric("moeforge_kv_blocks_used") == 0
    assert server.metric("moeforge_tokens_written_total") - before < 20 * 250
    ended = re.search(r'requests_total{outcome="cancelled"} (\S+)', httpx.get(f"{server.url}/metrics").text)
    assert ended and float(ended[1]) >= 10, "also those that nobody waited for are counted"


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Any:
    with serving(folder, "--max-running", 1, "--max-waiting", 1, "--grace", 20) as served:
        yield served


def test_a_full_queue_answers_429_and_clients_come_back(narrow: Served) -> None:
    statuses: list[int] = []

    def ask() -> None:
        answer = httpx.post(f"{narrow.url}/v1/completions", json=LONG, timeout=60)
        statuses.append(answer.status_code)
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1" and answer.json()["error"]["code"] == "queue_full"

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*statuses} == {200, 429}
    patient = openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="none", max_retries=20)
    answers: list[Any] = []

    def patiently() -> None:
        answers.append(patient.completions.create(model="tiny", prompt="a", max_tokens=100))

    threads = [threading.Thread(target=patiently) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 5


def test_a_request_that_takes_too_long_ends_with_what_it_has(folder: Path) -> None:
    with serving(folder, "--max-seconds", 0.05) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json=LONG, timeout=30).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 <= answer["usage"]["completion_tokens"] < 250


def test_sigterm_lets_requests_finish_and_takes_no_new_ones(folder: Path) -> None:
    with serving(folder, "--grace", 20, "--max-running", 1) as served:
        answers: list[Any] = []

        def ask() -> None:
            answers.append(httpx.post(f"{served.url}/v1/completions", json=LONG | {"n": 4}, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        served.until(lambda: served.metric("moeforge_running_requests") == 1)
        served.process.send_signal(signal.SIGTERM)
        asking.join()
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 1000
        assert served.process.wait(timeout=20) == 0


def test_after_the_grace_time_what_still_runs_ends_too(folder: Path) -> None:
    with serving(folder, "--grace", 0, "--max-running", 1) as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG | {"stream": True, "n": 16}) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)
        assert served.process.wait(timeout=20) == 0


def test_the_log_is_json_and_has_no_text_of_requests(folder: Path) -> None:
    with serving(folder) as served:
        httpx.post(f"{served.url}/v1/completions", json={"prompt": "a secret text", "max_tokens": 3})
        httpx.post(f"{served.url}/v1/completions", content=b"a secret text")
        served.until(lambda: len(served.log) >= 2)
        lines = [json.loads(line)["event"] for line in served.log]
        assert [(line["path"], line["status"]) for line in lines] == [
            ("/v1/completions", 200),
            ("/v1/completions", 400),
        ]
        assert "secret" not in "".join(served.log)


def test_ready_and_health(server: Served) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with serving(model_folder(tmp_path / "base", template=None)) as served:
        messages = [{"role": "user", "content": "hi"}]
        answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": messages})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")


def test_numbers_that_are_none_fail_alone(tmp_path: Path) -> None:
    import torch

    from moeforge.hub import load, save

    model, tokenizer = load(model_folder(tmp_path / "whole", tie_embeddings=False))
    with torch.no_grad():
        model.embedding.weight[ord("x")] = torch.nan
    save(model, tokenizer, tmp_path / "broken")
    with serving(tmp_path / "broken") as served:
        url = f"{served.url}/v1/completions"
        bad, good = (httpx.post(url, json={"prompt": text, "max_tokens": 2}) for text in ("x", "y"))
        assert (bad.status_code, bad.json()["error"]["code"]) == (500, "request_failed")
        assert "not finite" in bad.json()["error"]["message"]
        assert good.status_code == 200


def test_schemathesis_finds_no_failure(server: Served) -> None:
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--max-examples=6"]
    command += ["--checks=not_a_server_error", "--phases=examples,fuzzing", "--no-color"]
    command += ["--seed=1"]  # the same requests each time: a wide run is made by hand
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"[1-9]\d* generated", done.stdout), done.stdout
    assert httpx.get(f"{server.url}/ready").status_code == 200
