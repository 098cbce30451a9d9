"""A deterministic judge behind an OpenAI-compatible endpoint: fills in RAGAS' forms from a hash of the prompt, or misbehaves."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def fill(prompt: str, form: str = "") -> Any:
    "A form filled in by nothing but the prompt, and for forms that stand in no prompt their name."
    number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
    given = prompt.rpartition("\ninput: ")[2]
    statements = re.findall(r'"((?:[^"\\]|\\.)*)"', given.rpartition('"statements": [')[2])
    if '"title": "StatementGeneratorOutput"' in prompt:
        return {"statements": [f"Statement {i} of {number % 97}. Grüße £{i}" for i in range(1 + number % 3)]}
    if '"title": "ClaimDecompositionOutput"' in prompt:
        return {"claims": [f"Claim {i} of {number % 89}" for i in range(1 + number % 4)]}
    if '"title": "NLIStatementOutput"' in prompt:
        return {"statements": [{"statement": text, "reason": "because", "verdict": number >> i & 1} for i, text in enumerate(statements)]}
    if '"title": "AnswerRelevanceOutput"' in prompt:
        return {"question": f"What about {number % 13} and the fee?", "noncommittal": int(number % 5 == 0)}
    if '"title": "ContextPrecisionOutput"' in prompt:
        return {"reason": "because", "verdict": number & 1}
    if '"title": "ContextRecallOutput"' in prompt:
        return {"classifications": [{"statement": f"S{i}", "reason": "r", "attributed": number >> i & 1} for i in range(1 + number % 3)]}
    return {"reason": "because", "value": 0.25 if form == "NumericResponseModel" else "pass"}


class JudgeServer(ThreadingHTTPServer):
    "Answers in one of several ways; `requests` holds what it was asked."

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.way = "good"
        self.release = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        "A client that gave up waiting is no news."


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        way, status = self.server.way, 200
        message: dict[str, Any] = {"role": "assistant", "content": None}
        ended = "stop"
        if way == "hang":
            self.server.release.wait(30)
        if way == "500":
            return self._send(500, {"error": {"message": "out of memory", "type": "server_error"}})
        if way == "no json":
            return self._send(200, b"<html>Welcome</html>")
        if way == "no schema" and "response_format" in body:
            return self._send(400, {"error": {"message": "response_format is not supported by this model", "type": "invalid_request_error"}})
        form = body.get("response_format", {}).get("json_schema", {}).get("name", "")
        filled = json.dumps(fill(body["messages"][-1]["content"], form), ensure_ascii=False)
        message["content"] = {
            "garbage": "blorp blorp 17",
            "half": filled[: len(filled) // 2],
            "cut": filled[: len(filled) // 2],
            "sorry": "I'm sorry, but I cannot help with that.",
            "refusal": None,
            "filter": "",
            "empty": "",
            "wrong form": '{"colour": "blue"}',
            "fenced": f"Here you are:\n```json\n{filled}\n```\nAnything else?",
            "too high": re.sub(r'"(verdict|attributed)": \d', r'"\1": 7', filled),
            "not a number": "NaN",
        }.get(way, filled)
        ended = {"cut": "length", "filter": "content_filter"}.get(way, "stop")
        if way == "refusal":
            message["refusal"] = "I will not judge this."
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        choice = {"index": 0, "finish_reason": ended, "message": message}
        self._send(status, {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice], "usage": usage})

    def _send(self, status: int, content: Any) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if not isinstance(content, bytes) else "text/html")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
