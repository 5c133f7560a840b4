"""A load client that is not ours against a running ``moeforge serve``: chats of several turns, streamed completions.

``pip install locust``, then ``moeforge serve FOLDER`` and, beside it,
``locust -f benchmarks/locust_serve.py --host http://127.0.0.1:8000 --headless -u 32 -r 8 -t 60s --json``.
"""

import random
import time

from locust import HttpUser, constant, task


class Reader(HttpUser):
    """Asks again as soon as it has an answer."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Learns the model's name."""
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    @task(3)
    def streamed(self) -> None:
        """Reads a text as it comes; the first token's time stands as a request of its own."""
        asked = {"model": self.model, "prompt": "def " * random.randint(1, 12), "max_tokens": 32, "stream": True}
        asked |= {"ignore_eos": True}
        started, first = time.perf_counter(), None
        with self.client.post("/v1/completions", json=asked, stream=True, catch_response=True, name="stream") as answer:
            lines = []
            for line in answer.iter_lines():
                if line and first is None:
                    first = time.perf_counter() - started
                lines.append(line)
            if answer.status_code != 200 or b"data: [DONE]" not in lines:
                answer.failure(f"status {answer.status_code}, {len(lines)} lines")
        if first is not None:
            self.environment.events.request.fire(
                request_type="POST", name="first token", response_time=1000 * first, response_length=0, exception=None
            )

    @task(1)
    def whole(self) -> None:
        """Waits for all of a text, which must be as long as asked for."""
        asked = {"model": self.model, "prompt": "import ", "max_tokens": 24, "ignore_eos": True}
        with self.client.post("/v1/completions", json=asked, catch_response=True, name="whole") as answer:
            if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 24:
                answer.failure(f"status {answer.status_code}: {answer.text[:200]}")

    @task(1)
    def turned_away(self) -> None:
        """A request that is wrong gets its error, and nothing breaks."""
        asked = {"model": "another", "prompt": "a"}
        with self.client.post("/v1/completions", json=asked, catch_response=True, name="wrong") as answer:
            if answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found":
                answer.success()
            else:
                answer.failure(f"status {answer.status_code}")
